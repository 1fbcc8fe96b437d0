"""Commands that meet in one directory: one goes on undisturbed, the others say so."""

import json
import os
import shutil
import signal
import sys
import time
from subprocess import PIPE

import processes
import pytest
from factories import SMALL, loss_trace, small_text, tiny_encoder, write_encoder
from processes import started
from races import check_one_wins, race

from mlembed.runtime import checkpoint, lock

STEPS = 8


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    options = ["--tracker", "none", "--save-every", "2", "--steps", STEPS, "--compile", "off"]
    return ["train.py", "tiny", *SMALL, *options, "--data", *small_text(folder), "--eval"]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = processes.run(*arguments, "--output-dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "tiny"


def check_run(run, undisturbed):
    assert loss_trace(run) == loss_trace(undisturbed)
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()
    saved = [path.name for path in checkpoint.complete(run / "checkpoints")]
    assert saved == [path.name for path in checkpoint.complete(undisturbed / "checkpoints")]
    assert not [*run.rglob(".*")]


def until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while process.poll() is None and not condition() and time.monotonic() < end:
        time.sleep(0.005)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_two_starts(arguments, undisturbed, tmp_path, seed):
    """Two runs of one name and of other seeds: one goes on, undisturbed."""
    command = [*arguments, "--output-dir", tmp_path]
    outcomes = race([command, [*command, "--seed", "7"]], seed)
    winner = check_one_wins(outcomes, tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert config["seed"] == (7 if winner else 0)
    if not winner:
        check_run(tmp_path / "tiny", undisturbed)


def killed(command, run):
    """Start a run, kill it after its first checkpoint, and return whether it was alive."""
    with started([sys.executable, *command], stdout=PIPE, stderr=PIPE) as process:
        until(lambda: checkpoint.complete(run / "checkpoints"), process)
        return process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_two_resumes(arguments, undisturbed, tmp_path, seed):
    command = [*arguments, "--output-dir", tmp_path]
    assert killed(command, tmp_path / "tiny")
    check_one_wins(race([[*command, "--resume"]] * 2, seed), tmp_path / "tiny")
    check_run(tmp_path / "tiny", undisturbed)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_encoder(tiny_encoder(), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_two_exports(model, tmp_path, seed):
    command = ["-m", "mlembed", "export", model, tmp_path / "out"]
    check_one_wins(race([command] * 2, seed, within=0.2), tmp_path / "out")
    opened = processes.run("-m", "mlembed", "encode", tmp_path / "out", "a text")
    assert opened.returncode == 0 and len(opened.stdout.split()) == 32


def test_all_processes_are_told_who_is_at_work(arguments, tmp_path):
    run = tmp_path / "tiny"
    with lock.owned(run):
        done = processes.run(*arguments, "--output-dir", tmp_path, processes=2)
    assert done.returncode == 1 and not run.exists()
    words = f"expected no run at work in {run}, got pid {os.getpid()} on "
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines and all(line.startswith("error: ") and words in line for line in lines), lines


def test_run_that_is_killed_in_its_set_up_can_be_started_again(arguments, undisturbed, tmp_path):
    command, run = [*arguments, "--output-dir", tmp_path], tmp_path / "tiny"
    with started([sys.executable, *command], stdout=PIPE, stderr=PIPE) as process:
        until((run / lock.OWNER).exists, process)
        process.send_signal(signal.SIGKILL)
    assert not (run / "config.json").exists()
    done = processes.run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    check_run(run, undisturbed)


def test_deleted_directory_is_an_error_and_stays_deleted(arguments, tmp_path):
    command, run = [*arguments, "--output-dir", tmp_path, "--steps", "100000"], tmp_path / "tiny"
    with started([sys.executable, *command], stdout=PIPE, stderr=PIPE) as process:
        until((run / "metrics.jsonl").exists, process)
        os.rename(run, tmp_path / "moved")
        shutil.rmtree(tmp_path / "moved")
        _, err = process.communicate(timeout=120)
    words = f"error: {run}: expected the directory of this run, which was deleted"
    assert process.returncode == 1 and not run.exists(), err[-3000:]
    assert [line for line in err.splitlines() if "error: " in line][0].startswith(words)


def test_requeued_run_waits_for_the_node_that_died(arguments, undisturbed, tmp_path):
    """The node's heartbeat is 57 s old: a start by hand is refused, after a requeue it waits."""
    command, run = [*arguments, "--output-dir", tmp_path], tmp_path / "tiny"
    command += ["--allow-changed", "output_dir"]
    shutil.copytree(undisturbed, run, ignore=shutil.ignore_patterns("model", f"*{STEPS:08d}"))
    owner = {"host": "node3", "pid": 1, "since": "2026-01-02 03:04:05", "boot": "b", "namespace": 1}

    def node_dies():
        (run / lock.OWNER).write_text(json.dumps(owner))
        os.utime(run / lock.OWNER, (time.time() - 57,) * 2)

    node_dies()
    done = processes.run(*command, "--resume")
    words = f"error: expected no run at work in {run}, got pid 1 on node3 since 2026-01-02 03:04:05"
    assert done.returncode == 1 and done.stderr.startswith(words)
    assert "without a heartbeat it counts as dead in" in done.stderr
    node_dies()
    done = processes.run(*command, env=os.environ | {"SLURM_RESTART_COUNT": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{run}: waiting for pid 1 on node3" in done.stdout
    assert loss_trace(run) == loss_trace(undisturbed)
