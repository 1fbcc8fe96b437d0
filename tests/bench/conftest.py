"""Fixtures of the benches' tests: a worker in this process, faulty kernels, tables of LOG.md."""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report, worker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_worker(monkeypatch):
    """Return a function that makes a worker which takes short times on this CPU."""

    def make(name, smoke=False, skip=()):
        monkeypatch.setattr(worker, "MS", 1.0)
        args = argparse.Namespace(
            name=name, smoke=smoke, red=False, skip=skip, seconds=300.0, model=""
        )
        made = worker.Worker(args, torch.device("cpu"))
        made.ceilings = {"tflops": 2.0, "gbs": 3.0}
        return made

    return make


@pytest.fixture
def records(capsys):
    """Return a function that reads the worker's records of one kind, or all."""

    def read(kind=None):
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return [line for line in lines if kind in (None, line["kind"])]

    return read


@pytest.fixture
def smoke():
    """Return a function that runs a bench on toy shapes -> its result, and what it printed."""

    def run(name, *args):
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "bench", name, "--smoke", *args]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        last = json.loads(done.stdout.splitlines()[-1])
        result = last["benches"][name]
        assert last["smoke"] and last["ok"] and result["green"] and result["finished"]
        assert result["failed"] == result["ceilings"] == {} and result["targets"] == []
        assert "ms" not in result
        numbers = r"\d ?(ms|s|us)\b|TFLOP|GB/s|[MG]iB|tokens/s|texts/s"
        assert not re.search(numbers, done.stdout), done.stdout
        return result, done.stdout

    return run


@pytest.fixture
def log_rows():
    """Return a function that reads the table rows of a section of LOG.md, for some first cells."""

    def read(heading, names):
        text = (ROOT / "bench/LOG.md").read_text(encoding="utf-8")
        lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
        cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines]
        return [row for row in cells if row[0] in names]

    return read


@pytest.fixture(params=["nothing", "value", "gradient", "noise", "nan", "raises"])
def wrong(request):
    return request.param


@pytest.fixture
def faulty(wrong):
    """Return a function that makes a kernel of its reference, which is wrong in one way."""
    calls = itertools.count(1)

    def make(reference, factor, noise):
        def kernel(*args, impl="triton", plan=None, **options):
            out = reference(*args, **options)
            if impl == "reference" or wrong == "nothing":
                return out
            if wrong == "raises":
                raise RuntimeError("out of resources")
            if wrong == "noise":  # differs between two runs
                return out + next(calls) * noise
            if wrong == "gradient":
                return out.detach() + factor * (out - out.detach())
            return out * {"value": factor, "nan": torch.nan}[wrong]

        return kernel

    return make


@pytest.fixture
def assert_verdicts():
    """Return a function that asserts that all checks are right, or that none is."""

    def check(verdicts, count, right):
        assert len(verdicts) == count and all(verdict["ok"] == right for verdict in verdicts)
        assert report.gate(verdicts).count("RED") == (0 if right else count)

    return check
