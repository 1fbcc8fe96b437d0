"""A signal ends train.py with status 130 wherever it is, and a resumed run has the same trace: real
processes, each held up for a while in one phase.
"""

import os
import signal
from pathlib import Path

import processes
import pytest
from factories import SMALL, loss_trace, metrics, small_text

STEPS = 6
# Phase: the function that is slow, which call, for how many seconds (inside a step a run goes on to
# the end of the step), and a step that is saved, or a later one: none before the first step.
PHASES = {
    "reading": ("mlembed.data.sources.read", 1, 60, None),
    "building": ("mlembed.training.gradcache.budget_bytes", 1, 60, None),
    "first score": ("mlembed.evaluation.grid.score_grid", 1, 60, None),
    "first files": ("mlembed.training.resume.write_config", 1, 1, 1),
    "step": ("mlembed.training.step.update", 3, 1, 3),
    "saving": ("mlembed.runtime.checkpoint._finish", 2, 1, 4),
    "score": ("mlembed.evaluation.grid.score_grid", 2, 60, 3),
    "last step": ("mlembed.training.step.update", STEPS, 1, STEPS),
    "last save": ("mlembed.runtime.checkpoint._finish", STEPS // 2, 1, STEPS),
    "last score": ("mlembed.evaluation.grid.score_grid", 3, 60, STEPS),
    "report": ("mlembed.evaluation.tables.write_report", 1, 60, STEPS),
    "export": ("mlembed.publishing.export.export", 1, 60, STEPS),
    "probes": ("mlembed.publishing.probes.check", 1, 60, STEPS),
}
NAMES = "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGQUIT", "SIGUSR2", "SIGXCPU"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    data = small_text(folder)
    options = ["--steps", STEPS, "--save-every", 2, "--eval-every", 3, "--gradient-cache"]
    options += ["--model.dropout", 0.1]
    return ["tiny", *SMALL, *options, "--data", *data, "--eval", folder / "dev.jsonl"]


def finished(args):
    done = processes.run("train.py", *args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """Return an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finished([*arguments, "--output-dir", folder])
    return folder / "tiny"


def assert_same(run: Path, whole: Path) -> None:
    assert loss_trace(run) == loss_trace(whole)
    assert metrics(run, "eval") == metrics(whole, "eval")
    for file in ("model/model.safetensors", "report/grid.png"):
        assert (run / file).is_file()
    name = "model/model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def leftovers(run: Path) -> list[str]:
    """Return the names of files and directories that are half written."""
    hidden = {path.name for path in run.rglob(".*")} - {".lock"}
    return sorted(hidden | {path.name for path in run.rglob("*partial*")})


CASES = [(phase, NAMES[i % len(NAMES)]) for i, phase in enumerate(PHASES)]
EVERY = [(phase, name) for phase in PHASES for name in NAMES]


@pytest.mark.parametrize(
    ("phase", "name"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in CASES)],
)
def test_a_signal_saves_and_stops(arguments, whole, tmp_path, phase, name):
    *slow, saved = PHASES[phase]
    args, run = [*arguments, "--output-dir", tmp_path], tmp_path / "tiny"
    with processes.forked("train.py", *args, slow=slow) as child:
        child.wait_for(processes.HELD_UP)
        os.kill(child.pid, getattr(signal, name))
        assert child.status() == 130, child.text("stderr")
        lines = child.text("stderr").replace("\r", "\n").splitlines()
        assert [line for line in lines if line.strip() and "tiny: " not in line] == [
            f"got {name}, stopping; a second signal stops at once"
        ]
    assert not leftovers(run)
    if saved is None:
        assert not (run / "config.json").exists()
        finished(args)
    else:
        checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert checkpoints[-1] >= f"step_{saved:08d}"
        finished([*args, "--resume"])
    assert_same(run, whole)
