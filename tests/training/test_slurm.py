"""examples/slurm.sh by itself, with a SLURM that starts its one task here."""

import os
import signal
import sys
import time
from subprocess import PIPE

import pytest
from factories import SMALL, loss_trace, small_text
from processes import ROOT, on_path, started

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path):
    """Return the environment of a job, and a checkout to submit it from."""
    scripts = {"bin/scontrol": "#!/bin/sh\necho localhost\n", "bin/srun": SRUN}
    scripts[".venv/bin/python"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for name, text in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    job = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    env = (
        on_path() | job | {"SLURM_JOB_ID": "1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    )
    return env, tmp_path


@pytest.mark.slow
def test_preempted_job_continues_without_a_flag(slurm):
    env, folder = slurm
    command = ["bash", ROOT / "examples" / "slurm.sh", "tiny", *SMALL, "--compile", "off"]
    command += ["--steps", "60", "--save-every", "0", "--tracker", "none", "--device", "cpu"]
    command += ["--data", *small_text(folder), "--eval"]
    options = {"cwd": folder, "stdout": PIPE, "stderr": PIPE}
    run = folder / "runs" / "tiny"
    with started(command, env=env, **options) as process:
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            if (run / "metrics.jsonl").exists() and len(loss_trace(run)) >= 2:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)  # SLURM signals every process of the job.
        out, err = process.communicate(timeout=120)
    assert "continue with --resume" in out and process.returncode, err[-2000:]
    with started(command, env=env | {"SLURM_RESTART_COUNT": "1"}, **options) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert [line["step"] for line in loss_trace(run)] == list(range(1, 61))
