"""The loader's bench: it runs, its text is of the lengths that it says, its gate can fail."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as command
from bench import loader as bench
from mlembed.data.batches import Batches

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "bench", "loader", *args],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_smoke_runs_everything_and_gives_no_numbers():
    done = run("--smoke", "--case", "bitext", "streamed")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    result = last["benches"]["loader"]
    assert last["ok"] and result["green"] and result["finished"] and result["failed"] == {}
    assert result["ran"] == {
        name: {mode: {"ours": "ran"} for mode in bench.MODES} for name in ("bitext", "streamed")
    }
    assert f"gate: {3 * len(bench.CASES)} of {3 * len(bench.CASES)} checks" in done.stdout
    assert not re.search(r"\d ?(ms|s)\b|tokens/s", done.stdout), done.stdout


def test_names_are_one_anothers():
    assert command.NAMES[-1] == "loader"
    assert all(case.modes == bench.MODES and case.name == n for n, case in bench.CASES.items())


def test_texts_have_the_lengths_of_their_case():
    case = bench.CASES["groups"]
    counts = [len(text.split()) for text in bench.texts(case, 1500, 5)]
    median, sigma, least, most = case.words
    assert np.median(counts) == pytest.approx(median, rel=0.05)
    assert np.log(counts).std() == pytest.approx(sigma, rel=0.1)
    assert min(counts) >= least and max(counts) <= most
    assert list(bench.texts(case, 3, 5)) != list(bench.texts(case, 3, 6))
    known = bench.words(2000, 0)
    assert len(set(known)) == 2000 and len(known[0]) < len(known[-1])


@pytest.fixture
def toy(tmp_path):
    case = replace(bench.toy(bench.CASES["groups"]), modes=bench.MODES[:2])
    return case, bench.batches(case, tmp_path)


def test_a_loader_of_other_batches_is_not_green(toy, monkeypatch):
    case, data = toy
    assert all(verdict["ok"] for verdict in bench.gate(case, data))
    batch = Batches.__getitem__
    parent = os.getpid()
    monkeypatch.setattr(
        Batches, "__getitem__", lambda self, i: batch(self, i + (os.getpid() != parent))
    )
    assert [verdict["ok"] for verdict in bench.gate(case, data)] == [True, False]


def test_a_row_is_what_was_measured(toy):
    case, data = toy
    for mode in case.modes:
        row = bench.measure(replace(case, seconds=0.2), data, mode)
        assert row["tokens"] == pytest.approx(np.mean([data[i].tokens for i in range(40)]), rel=0.2)
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        mean = 1e3 * row["tokens"] / row["tokens_s"]
        assert row["batches"] >= 2 and row["batches"] * mean >= 190
        assert "ms" not in bench.measure(case, data, mode)
    found = bench.parts(data, 3)
    assert {"draw", "share out", "pack"} <= set(found) and min(found.values()) > 0
    assert found["of it attention plan"] + found["of it token index"] < found["pack"]


def test_targets_compare_two_workers_with_the_step():
    row = {"case": "groups", "mode": "0 workers", "tokens": 50_000, "own_ms": 400.0}
    rows = [row, row | {"mode": "1 worker"}, {"case": "bitext", "mode": "0 workers"}]
    (target,) = bench.targets(rows)
    assert target["value"] == pytest.approx(250_000 / 169e3) and target["met"]
    (target,) = bench.targets([row | {"own_ms": 600.0}])
    assert target["value"] < 1 and not target["met"]


def test_the_table_says_what_is_measured_and_what_failed():
    row = {"mode": "0 workers", "status": "ran", "ms": 12.34, "p20": 10.0, "p80": 20.0}
    row |= {"own_ms": 11.0, "tokens_s": 123456.0, "tokens": 789, "parts": {"draw": 1.0}}
    told = bench.table([row, row | {"mode": "1 worker"}], "0 workers", None, ())
    assert "12.3" in told and "123,456" in told and "draw 1.0" in told and "1 worker" not in told
    failed = {"mode": "4 workers", "status": "failed", "note": "no memory"}
    assert bench.table([failed], "4 workers", None, ()) == "4 workers    failed no memory"
