"""A run that is killed, at any instant, goes on as if it had not been: the same losses to the last
bit, from real processes that get SIGKILL."""

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

from mlembed.runtime import checkpoint
from mlembed.runtime.distributed import World
from mlembed.training.resume import find_run

STEPS = 12
SMALL = [
    *("--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.head-dim", "8"),
    *("--model.intermediate-size", "48", "--model.vocab-size", "400", "--model.exits", "1", "2"),
    *("--model.matryoshka-dims", "8", "32", "--model.ranks", "8", "16"),
    *("--batch-size", "8", "--log-every", "1", "--precision", "fp32", "--max-length", "32"),
    *("--tracker", "none", "--save-every", "1", "--model.dropout", "0.1"),
    *(
        "--loss.memory-bank",
        "40",
        "--loss.num-negatives",
        "1",
        "--gradient-cache",
        "--activation-gib",
        "1e-4",
    ),
]


def written(folder):
    """Text of a run: pairs with hard negatives and an n-way table, two sources."""
    pairs = [
        {"query": f"{n} of {i}", "positive": f"{i} : {n}", "negatives": [f"{i + 1} : {n}"]}
        for i in range(8)
        for n in ("cats", "dogs", "owls")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in pairs))
    rows = [
        {"id": f"{i} {n}", "lang": lang, "text": f"{i} {n} {mark}"}
        for i in range(8)
        for n in ("cats", "dogs")
        for lang, mark in (("eng", "."), ("deu", "!"), ("fra", "?"))
    ]
    (folder / "nway.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    dev = [{"id": i, "lang": x, "text": f"{i} {x} in all"} for i in "ab" for x in ("eng", "deu")]
    (folder / "dev.jsonl").write_text("\n".join(json.dumps(row) for row in dev))
    return folder


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    text = written(tmp_path_factory.mktemp("text"))
    sources = [str(text / "pairs.jsonl"), str(text / "nway.jsonl")]
    return ["tiny", *SMALL, "--data", *sources, "--eval", str(text / "dev.jsonl")]


def finished(args, size=1):
    """Run train.py to its end; -> its standard output."""
    done = processes.run("train.py", *args, processes=size)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def launch(args, size=1, restarts=0):
    """Start train.py, by torchrun if it is several processes, as what signals are sent to."""
    launcher = [sys.executable]
    if size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher += [size, "--max-restarts", restarts]
    return processes.started([*launcher, "train.py", *args], stdout=PIPE, stderr=PIPE)


def trace(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "rank", "losses")
    return [{k: line[k] for k in kept} for line in lines if line["kind"] == "train"]


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A run of STEPS steps that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finished([*arguments, "--output-dir", folder, "--steps", STEPS])
    assert [line["step"] for line in trace(folder / "tiny")] == list(range(1, STEPS + 1))
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
    """Start or go on, and SIGKILL the run; -> whether it was still alive."""
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
    """-> (the run's directory, kinds of the kills that hit it, alive)."""
    rng, hits = random.Random(seed), []
    args = [*arguments, "--output-dir", tmp_path, "--steps", steps]
    run = tmp_path / "tiny"
    kinds = ["while saving", "after a step", "any time"]
    for i in range(kills):
        if killed(args, run, kinds[i % 3], rng):
            hits.append(kinds[i % 3])
    finished([*args, *(["--resume"] if (run / "config.json").is_file() else [])])
    return run, hits


def test_three_kills_leave_the_trace_as_it_was(arguments, whole, tmp_path):
    run, hits = survives(arguments, tmp_path, 3, STEPS, seed=0)
    assert len(hits) >= 2
    assert trace(run) == trace(whole)
    assert weights(run) == weights(whole)
    assert not partial(run)


@pytest.mark.slow
def test_thirty_kills_leave_the_trace_as_it_was(arguments, tmp_path):
    finished([*arguments, "--output-dir", tmp_path / "whole", "--steps", 600])
    run, hits = survives(arguments, tmp_path / "killed", 30, 600, seed=1)
    assert len(hits) == 30 and set(hits) == {"while saving", "after a step", "any time"}
    assert trace(run) == trace(tmp_path / "whole" / "tiny")
    assert weights(run) == weights(tmp_path / "whole" / "tiny")


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_torchrun_restarts_a_run_whose_process_was_killed(arguments, tmp_path, engine):
    """Elastic restart: one of two workers gets SIGKILL, both begin anew from the checkpoint."""
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
    assert trace(run) == trace(tmp_path / "whole" / "tiny")
    assert weights(run) == weights(tmp_path / "whole" / "tiny")


def test_sigterm_to_all_of_a_job_saves_and_stops(arguments, tmp_path):
    """As SLURM ends a job: all processes get SIGTERM, the workers from torchrun once more."""
    args = [*arguments, "--save-every", 0, "--steps", 100_000, "--output-dir", tmp_path]
    run = tmp_path / "tiny"
    with launch(args, 2) as process:
        while process.poll() is None and reached(run) < 2:
            time.sleep(0.01)
        for number in (*children(process), process.pid):
            os.kill(number, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert "go on with --resume" in out and process.returncode != 0
    (saved,) = checkpoint.complete(run / "checkpoints")
    assert saved.name == f"step_{trace(run)[-1]['step']:08d}" and not partial(run)
    assert "terminate called" not in err


def test_another_number_of_processes(arguments, whole, tmp_path):
    """Without dropout, which each process draws for itself, the losses are those of one process."""
    args = [*arguments, "--model.dropout", 0, "--output-dir", tmp_path, "--save-every", 4]
    finished([*args, "--steps", STEPS])
    want = trace(tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "model")
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / f"step_{STEPS:08d}")
    out = finished([*args, "--steps", STEPS, "--resume", "--engine", "fsdp"], 2)
    assert "2 x cpu by fsdp" in out
    got = trace(tmp_path / "tiny")
    assert got[8:] != want[8:]  # sums in another order: it was another number
    assert got[:8] == want[:8] and [line["step"] for line in got] == list(range(1, STEPS + 1))
    for a, b in zip(got[8:], want[8:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_damaged_checkpoint_is_passed_over(arguments, whole, tmp_path):
    """A bit flipped in the newest: said, set aside, and the one before gives the same losses."""
    run = tmp_path / "tiny"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    newest = checkpoint.complete(run / "checkpoints")[-1]
    assert newest.name == f"step_{STEPS:08d}"
    file = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    args = [*arguments, "--output-dir", tmp_path, "--steps", STEPS, "--resume"]
    args += ["--allow-changed", "output_dir"]
    out = finished(args)
    assert file.name in out and "damaged" in out
    assert trace(run) == trace(whole) and weights(run) == weights(whole)
    aside = [path for path in (run / "checkpoints").iterdir() if "damaged" in path.name]
    assert len(aside) == 1 and (aside[0] / file.name).read_bytes() == content


# ---- a changed configuration ----


def changed(args, say=print):
    from mlembed.training.arguments import parse

    return find_run(parse([str(x) for x in args]), World(0, 1, "cpu"), say)


def test_a_changed_configuration_is_refused_by_its_keys_unless_allowed(arguments, whole):
    args = [*arguments, "--output-dir", whole.parent, "--resume", "--steps", 20, "--seed", 5]
    with pytest.raises(ValueError, match=r"other values for seed, steps; --allow-changed"):
        changed(args)
    with pytest.raises(ValueError, match=r"other values for seed; --allow-changed"):
        changed([*args, "--allow-changed", "steps", "optim.lr"])
    directory, found = changed([*args, "--allow-changed", "steps", "seed"])
    assert directory == whole and found.name == f"step_{STEPS:08d}"
    with pytest.raises(ValueError, match=r"allow_changed: no such key stepz"):
        changed([*args, "--allow-changed", "stepz"])


@pytest.mark.parametrize("by", ["TORCHELASTIC", "SLURM"])
def test_a_restart_goes_on_without_being_asked_to(arguments, whole, tmp_path, monkeypatch, by):
    args = [*arguments, "--output-dir", whole.parent, "--steps", STEPS]
    with pytest.raises(ValueError, match="expected a new directory, found files in it"):
        changed(args)
    monkeypatch.setenv(f"{by}_RESTART_COUNT", "1")
    assert changed(args)[1].name == f"step_{STEPS:08d}"
    early = [*arguments, "--output-dir", tmp_path, "--steps", STEPS]  # nothing was written yet
    assert changed(early) == (tmp_path / "tiny", None)


def test_what_fits_a_machine_may_change(arguments, whole):
    machine = ["--no-gradient-cache", "--activation-gib", 3]
    machine += ["--loss.negatives-across", "ring", "--loss.bank-on", "host"]
    machine += ["--non-finite", "skip", "--engine", "fsdp", "--cpu-offload"]
    args = [*arguments, "--output-dir", whole.parent, "--resume", "--steps", STEPS, *machine]
    assert changed(args)[1] is not None


def test_an_allowed_change_is_recorded(arguments, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "model")
    before = (tmp_path / "tiny" / "config.json").read_text()
    args = [*arguments, "--output-dir", tmp_path, "--resume", "--steps", STEPS + 2]
    finished([*args, "--allow-changed", "steps", "output_dir"])
    run = tmp_path / "tiny"
    assert trace(run)[:STEPS] == trace(whole) and len(trace(run)) == STEPS + 2
    assert (run / f"config_until_{STEPS}.json").read_text() == before
    assert json.loads((run / "config.json").read_text())["steps"] == STEPS + 2
