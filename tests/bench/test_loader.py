"""The loader's bench: lengths of its texts, a gate that can fail, rows and targets."""

import os
from dataclasses import replace

import numpy as np
import pytest

from bench import loader as bench
from bench import report
from mlembed.data.batches import Batches

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")


def test_smoke_runs_everything_without_numbers(smoke):
    result, printed = smoke("loader", "--case", "bitext", "streamed")
    modes = {mode: {"ours": "ran"} for mode in bench.MODES}
    assert result["ran"] == {"bitext": modes, "streamed": modes}
    assert f"gate: {3 * len(bench.CASES)} of {3 * len(bench.CASES)} checks" in printed


def test_texts_have_the_lengths_of_the_case():
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
    case = replace(bench.CASES["groups"].toy(), modes=bench.MODES[:2])
    return case, bench.batches(case, tmp_path)


def test_gate_sees_other_batches(toy, monkeypatch):
    case, data = toy
    assert all(verdict["ok"] for verdict in bench.compared(case, data))
    batch = Batches.__getitem__
    parent = os.getpid()
    monkeypatch.setattr(
        Batches, "__getitem__", lambda self, i: batch(self, i + (os.getpid() != parent))
    )
    assert [verdict["ok"] for verdict in bench.compared(case, data)] == [True, False]


def test_row_has_the_measured_numbers(toy):
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
    row |= {"provider": "ours", "ms": 500.0}
    rows = [row, row | {"mode": "1 worker"}, row | {"case": "bitext", "ms": None}]
    (target,) = bench.targets(rows)
    assert target["value"] == pytest.approx(250_000 / 169e3) and target["met"]
    (target,) = bench.targets([row | {"own_ms": 600.0}])
    assert target["value"] < 1 and not target["met"]


def test_table():
    row = {"mode": "0 workers", "status": "ran", "ms": 12.34, "p20": 10.0, "p80": 20.0}
    row |= {"own_ms": 11.0, "tokens_s": 123456.0, "tokens": 789, "parts": {"draw": 1.0}}
    row |= {"case": "groups", "provider": "ours", "value": 1.0}
    failed = row | {"mode": "4 workers", "status": "failed", "note": "no memory", "ms": None}
    how = None, (), bench.COLUMNS, bench.cells
    printed = report.table([row, row | {"mode": "1 worker"}], "0 workers", *how)
    assert "12.34" in printed and "123,456" in printed and "draw 1.0" in printed
    assert printed.count("ours") == 1
    assert "failed" in report.table([failed], "4 workers", *how)
