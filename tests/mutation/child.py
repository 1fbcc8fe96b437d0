"""The forked process that runs a mutant's tests, and what it is forked from."""

import ctypes
import json
import math
import os
import resource
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .operators import Mutant
from .parts import ROOT

LIBRARIES = (
    "numpy torch triton transformers sentence_transformers tokenizers safetensors.torch datasets "
    "pyarrow.parquet scipy.stats babel tyro tqdm matplotlib.pyplot einops pytest "
    "torch.distributed.checkpoint torch.utils.data torch._dynamo torch.utils.tensorboard"
)
MEMORY, FILE_SIZE = 16 * 2**30, 8 * 2**30
DEATH_SIGNAL = 1  # of prctl


@dataclass
class Trial:
    """One run of pytest: of a mutant's tests, or of the one test that killed it, unmutated."""

    mutant: Mutant
    source: str
    tests: tuple[str, ...]
    skip: set[str] = field(default_factory=set)
    killer: str = ""
    verdict: dict[str, Any] = field(default_factory=dict)
    begun: float = 0.0
    folder: Path = Path()


class Watch:
    """A plugin of pytest, which orders tests, notes the one that runs, and stops in time."""

    def __init__(self, folder: Path, budget: float, skip: set[str], modules: dict) -> None:
        self.folder, self.budget, self.skip, self.modules = folder, budget, skip, modules
        self.verdict = {"passed": 0, "killer": "", "stopped": math.inf, "longest": 0.0}
        self.begun = cpu()

    def pytest_configure(self) -> None:
        sys.modules.update(self.modules)

    def pytest_collection_modifyitems(self, items: list) -> None:
        first, second, seen = [], [], set()
        for item in items:
            function = item.nodeid.partition("[")[0]
            if item.nodeid not in self.skip:
                (second if function in seen else first).append(item)
                seen.add(function)
        items[:] = first + second

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.verdict["killer"]:
            self.verdict["killer"] = report.nodeid

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        (self.folder / "current").write_text(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.verdict["killer"]:
            self.verdict["killer"] = report.nodeid
        self.verdict["passed"] += report.when == "call" and report.passed
        self.verdict["longest"] = max(self.verdict["longest"], report.duration)

    def pytest_runtest_teardown(self, item: Any) -> None:
        if cpu() - self.begun > self.budget:
            self.verdict["stopped"] = self.budget
            item.session.shouldstop = "budget"


def cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def prepare() -> None:
    """Set the environment of all tests, and import their libraries."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # Graphs that were compiled before are kept by a key that does not see our operators.
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "mlembed-inductor"),
        "TRITON_CACHE_DIR": str(Path(tempfile.gettempdir()) / "mlembed-triton"),
    }
    for name in LIBRARIES.split():
        try:
            import_module(name)
        except ImportError as error:
            print(f"not imported beforehand: {error}", file=sys.stderr)


def child(trial: Trial, budget: float, root: Path) -> None:
    """Run pytest in a copy of the tree; never returns."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    os.setsid()
    # A mutant that asks for too much must not take the machine down.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, resource.RLIM_INFINITY))
    folder, tree = trial.folder, trial.folder / "tree"
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(tree)
    (folder / "tmp").mkdir()
    tempfile.tempdir = None
    paths = [str(tree / ".path"), str(tree)]
    ours = {folder / name for folder in (root, ROOT) for name in ("", ".path", "tests")}
    sys.path[:] = paths + [path for path in sys.path if path and Path(path) not in ours]
    os.environ |= {
        "TMPDIR": str(folder / "tmp"),
        "MLEMBED_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tests", "__main__"):
            del sys.modules[name]
    sys.modules["__main__"] = ModuleType("__main__")  # multiprocessing looks for it
    # tests/conftest.py wants to be there before Triton, to choose the interpreter: it is chosen.
    triton = {"triton": sys.modules.pop("triton")} if "triton" in sys.modules else {}
    watch = Watch(folder, budget, trial.skip, triton)
    import pytest

    tests = [trial.killer] if trial.killer else list(trial.tests)
    options = ["-x", "-p", "no:cacheprovider", "--rootdir", str(tree)]
    if trial.killer and "::" not in trial.killer:
        options.append("--collect-only")
    watch.verdict["code"] = int(pytest.main([*options, *tests], plugins=[watch]))
    (folder / "verdict").write_text(json.dumps(watch.verdict | {"cpu": round(cpu(), 1)}))
    sys.stdout.flush()
    os._exit(0)
