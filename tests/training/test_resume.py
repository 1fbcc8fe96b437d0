"""A run that is killed at any instant continues with the same losses to the last bit: real
processes that get SIGKILL.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE

import processes
import pytest
from factories import SMALL, loss_trace, small_text

from mlembed.runtime import intact
from mlembed.runtime.distributed import World
from mlembed.training.arguments import parse
from mlembed.training.resume import find_run

STEPS = 12
OPTIONS = [
    *("--tracker", "none", "--save-every", "1", "--model.dropout", "0.1", "--gradient-cache"),
    *("--activation-gib", "1e-4", "--loss.memory-bank", "40", "--loss.num-negatives", "1"),
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    data = small_text(folder)
    return ["tiny", *SMALL, *OPTIONS, "--data", *data, "--eval", str(folder / "dev.jsonl")]


def finished(args, size=1):
    """Run train.py to its end and return its standard output."""
    done = processes.run("train.py", *args, processes=size)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def launch(args, size=1, restarts=0):
    """Start train.py as a real process, with torchrun for several."""
    launcher = [sys.executable]
    if size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher += [size, "--max-restarts", restarts]
    return processes.started([*launcher, "train.py", *args], stdout=PIPE, stderr=PIPE)


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """Return an uninterrupted run of STEPS steps."""
    folder = tmp_path_factory.mktemp("whole")
    finished([*arguments, "--output-dir", folder, "--steps", STEPS])
    assert [line["step"] for line in loss_trace(folder / "tiny")] == list(range(1, STEPS + 1))
    return folder / "tiny"


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def reached(run):
    path = run / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def partial(run):
    return any((run / "checkpoints").glob(".step_*.partial"))


def killed(args, run, kind, rng):
    """Start or resume the run and kill it; return whether it was still alive."""
    more = ["--resume"] if (run / "config.json").is_file() else []
    begun, end = reached(run), time.monotonic() + rng.uniform(0.5, 6)
    steps = begun + rng.randint(1, 3)
    done = {
        "any time": lambda: time.monotonic() > end,
        "after a step": lambda: reached(run) >= steps,
        "while saving": lambda: partial(run) and reached(run) > begun,
    }[kind]
    with launch([*args, *more]) as process:
        while process.poll() is None and not done():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        return process.poll() is None


def survives(arguments, tmp_path, kills, steps, seed):
    """Kill a run repeatedly and finish it; return its directory and the kinds of kills that hit."""
    rng, hits = random.Random(seed), []
    args = [*arguments, "--output-dir", tmp_path, "--steps", steps]
    run = tmp_path / "tiny"
    kinds = ["while saving", "after a step", "any time"]
    for i in range(kills):
        if killed(args, run, kinds[i % 3], rng):
            hits.append(kinds[i % 3])
    finished([*args, *(["--resume"] if (run / "config.json").is_file() else [])])
    return run, hits


def test_three_kills(arguments, whole, tmp_path):
    run, hits = survives(arguments, tmp_path, 3, STEPS, seed=0)
    assert len(hits) >= 2
    assert loss_trace(run) == loss_trace(whole)
    assert weights(run) == weights(whole)
    assert not partial(run)


@pytest.mark.slow
def test_thirty_kills(arguments, tmp_path):
    finished([*arguments, "--output-dir", tmp_path / "whole", "--steps", 600])
    run, hits = survives(arguments, tmp_path / "killed", 30, 600, seed=1)
    assert len(hits) == 30 and set(hits) == {"while saving", "after a step", "any time"}
    assert loss_trace(run) == loss_trace(tmp_path / "whole" / "tiny")
    assert weights(run) == weights(tmp_path / "whole" / "tiny")


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_torchrun_restarts_after_a_kill(arguments, tmp_path, engine):
    """One of two workers gets SIGKILL, and both restart from the checkpoint."""
    args = [*arguments, "--engine", engine, "--steps", 8]
    finished([*args, "--output-dir", tmp_path / "whole"], 2)
    run = tmp_path / "killed" / "tiny"
    with launch([*args, "--output-dir", tmp_path / "killed"], 2, restarts=2) as process:
        while process.poll() is None and reached(run) < 3:
            time.sleep(0.01)
        workers = children(process)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out[-2000:] + err[-3000:]
    assert loss_trace(run) == loss_trace(tmp_path / "whole" / "tiny")
    assert weights(run) == weights(tmp_path / "whole" / "tiny")


def test_sigterm_to_all_processes_saves_and_stops(arguments, tmp_path):
    """SLURM sends SIGTERM to all processes, and torchrun forwards it to the workers."""
    args = [*arguments, "--save-every", 0, "--steps", 100_000, "--output-dir", tmp_path]
    run = tmp_path / "tiny"
    with launch(args, 2) as process:
        while process.poll() is None and reached(run) < 2:
            time.sleep(0.01)
        for number in (*children(process), process.pid):
            os.kill(number, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert "continue with --resume" in out and process.returncode != 0
    (saved,) = intact.complete(run / "checkpoints")
    assert saved.name == f"step_{loss_trace(run)[-1]['step']:08d}" and not partial(run)
    assert "terminate called" not in err


def test_workers_save_and_stop_when_torchrun_is_killed(arguments, tmp_path):
    args = [*arguments, "--save-every", 0, "--steps", 100_000, "--output-dir", tmp_path]
    run = tmp_path / "tiny"
    with launch(args, 2) as process:
        while process.poll() is None and reached(run) < 2:
            time.sleep(0.01)
        workers = children(process)
        process.kill()
        end = time.monotonic() + 60
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < end
            time.sleep(0.05)
        out, err = process.communicate()
    assert "continue with --resume" in out and "Traceback" not in err
    (saved,) = intact.complete(run / "checkpoints")
    assert saved.name == f"step_{loss_trace(run)[-1]['step']:08d}" and not partial(run)


def test_another_number_of_processes(arguments, whole, tmp_path):
    """Without dropout, which each process draws by itself, losses are those of one process."""
    args = [*arguments, "--model.dropout", 0, "--output-dir", tmp_path, "--save-every", 4]
    finished([*args, "--steps", STEPS])
    want = loss_trace(tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "model")
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / f"step_{STEPS:08d}")
    out = finished([*args, "--steps", STEPS, "--resume", "--engine", "fsdp"], 2)
    assert "2 x cpu by fsdp" in out
    got = loss_trace(tmp_path / "tiny")
    # Two processes add in another order.
    assert got[8:] != want[8:]
    assert got[:8] == want[:8] and [line["step"] for line in got] == list(range(1, STEPS + 1))
    for a, b in zip(got[8:], want[8:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_damaged_checkpoint_is_set_aside(arguments, whole, tmp_path):
    """After a flipped bit in the newest checkpoint the one before gives the same losses."""
    run = tmp_path / "tiny"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    newest = intact.complete(run / "checkpoints")[-1]
    assert newest.name == f"step_{STEPS:08d}"
    file = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    args = [*arguments, "--output-dir", tmp_path, "--steps", STEPS, "--resume"]
    args += ["--allow-changed", "output_dir"]
    out = finished(args)
    assert file.name in out and "damaged" in out
    assert loss_trace(run) == loss_trace(whole) and weights(run) == weights(whole)
    aside = [path for path in (run / "checkpoints").iterdir() if "damaged" in path.name]
    assert len(aside) == 1 and (aside[0] / file.name).read_bytes() == content


# ---- a changed configuration ----


MORE = ["--steps", STEPS + 2, "--allow-changed", "steps"]  # A finished run goes on.


def find(args):
    return find_run(parse([str(x) for x in args]), World(0, 1, "cpu"), print)


def test_resume_lists_changed_keys(arguments, whole):
    args = [*arguments, "--output-dir", whole.parent, "--resume", "--steps", 20, "--seed", 5]
    with pytest.raises(ValueError, match=r"other values for seed, steps; --allow-changed"):
        find(args)
    with pytest.raises(ValueError, match=r"other values for seed; --allow-changed"):
        find([*args, "--allow-changed", "steps", "optim.lr"])
    directory, saved = find([*args, "--allow-changed", "steps", "seed"])
    assert directory == whole and saved.name == f"step_{STEPS:08d}"
    with pytest.raises(ValueError, match=r"allow_changed: no such key stepz"):
        find([*args, "--allow-changed", "stepz"])


@pytest.mark.parametrize("launcher", ["TORCHELASTIC", "SLURM"])
def test_restart_resumes_without_the_option(arguments, whole, tmp_path, monkeypatch, launcher):
    args = [*arguments, "--output-dir", whole.parent, *MORE]
    with pytest.raises(ValueError, match="expected a new directory, found files in it"):
        find(args)
    monkeypatch.setenv(f"{launcher}_RESTART_COUNT", "1")
    assert find(args)[1].name == f"step_{STEPS:08d}"
    # A restart may come before the first attempt has written anything.
    early = [*arguments, "--output-dir", tmp_path, "--steps", STEPS]
    assert find(early) == (tmp_path / "tiny", None)


def test_hardware_settings_may_change(arguments, whole):
    machine = ["--no-gradient-cache", "--activation-gib", 3]
    machine += ["--loss.negatives-across", "ring", "--loss.bank-on", "host"]
    machine += ["--non-finite", "skip", "--engine", "fsdp", "--cpu-offload"]
    args = [*arguments, "--output-dir", whole.parent, "--resume", *MORE, *machine]
    assert find(args)[1] is not None


def test_allowed_change_is_recorded(arguments, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "tiny")
    before = (tmp_path / "tiny" / "config.json").read_text()
    finished([*arguments, "--output-dir", tmp_path, "--resume", *MORE, "output_dir"])
    run = tmp_path / "tiny"
    assert loss_trace(run)[:STEPS] == loss_trace(whole) and len(loss_trace(run)) == STEPS + 2
    assert (run / f"config_until_{STEPS}.json").read_text() == before
    assert json.loads((run / "config.json").read_text())["steps"] == STEPS + 2
