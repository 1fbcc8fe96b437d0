"""Set before torch and triton load: one thread a test process (two run side by side), no network,
a cache of the tests' own, and Triton's interpreter where there is no GPU. Memory that a kernel
leaves unwritten reads NaN."""

import atexit
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in this process, not in more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "MLEMBED_CACHE" not in os.environ:  # in the processes that run side by side it is, by then
    os.environ["MLEMBED_CACHE"] = tempfile.mkdtemp(prefix="mlembed-")
    atexit.register(shutil.rmtree, os.environ["MLEMBED_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Its own library is compiled, or interpreted, for good when it is imported.
    assert "triton" not in sys.modules, "triton was imported before tests/conftest.py"
    os.environ["TRITON_INTERPRET"] = "1"

import processes  # noqa: E402

PACKAGE = "mlembed_kernels"
# torch remembers which functions take the device of `with torch.device(...)`, by identity, at its
# first use: that has to be the true torch.empty.
with torch.device("cpu"):
    torch.empty(0)


def _filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make_filled(*args: object, **kwargs: object) -> torch.Tensor:
        x = make(*args, **kwargs)
        if torch.compiler.is_compiling():
            return x
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == PACKAGE and x.is_floating_point():
            with torch.no_grad():
                x.fill_(math.nan)
        return x

    return make_filled


# Made once: torch.compile remembers functions by identity, too.
ALLOCATORS = [
    (owner, name, _filled(getattr(owner, name)))
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file that share a fixture on one worker, which then builds it once."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs
        scopes = {
            fixtures[name][-1].scope for name in fixtures.keys() - {no_child_is_left.__name__}
        }
        if "module" in scopes:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_sessionfinish() -> None:
    processes.stop_server()


@pytest.fixture(autouse=True, scope="module")
def no_child_is_left() -> Iterator[None]:
    """Kill processes that outlive the tests of their file, and fail."""
    before = processes.children()
    yield
    left = {pid: name for pid, name in processes.children().items() if pid not in before}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"expected no process to outlive its tests, got {left}"


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not torch.utils.deterministic, which does it everywhere: its switch also makes CUDA's own
    operators deterministic, and would hide that two calls differ."""
    with monkeypatch.context() as patch:
        for owner, name, filled in ALLOCATORS:
            patch.setattr(owner, name, filled)
        yield
