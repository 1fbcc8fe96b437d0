"""Ratios of two results files, their noise, and what got slower."""

import json

import pytest

from bench import compare


def row(provider, ms, spread=0.0, **values):
    at = {"case": "reference", "provider": provider, "mode": "fwd"}
    times = {"ms": ms, "p20": ms * (1 - spread), "p80": ms * (1 + spread)}
    return {"kind": "row", "bench": "infonce", **at, **times, **values}


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "ro')
    return path


@pytest.fixture
def run(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as caught:
            compare.main(list(map(str, args)))
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return call


@pytest.fixture
def two(tmp_path):
    environment = {"kind": "environment", "bench": "infonce", "gpu": "H200", "torch": "2.11.0"}
    a = written(
        tmp_path / "a.jsonl", environment,
        row("ours", 90.0), row("ours", 10.0, 0.02), row("noisy", 10.0, 0.10), row("eager", 10.0),
        row("gone", 1.0), row("failed", 0.0, status="failed"),
    )  # fmt: skip
    (tmp_path / "b").mkdir()
    written(
        tmp_path / "b/results.jsonl", environment | {"torch": "2.13.0"},
        row("ours", 10.5, 0.02), row("noisy", 11.5, 0.10), row("eager", 9.0), row("new", 1.0),
    )  # fmt: skip
    return a, tmp_path / "b"


def test_rows_are_compared_beyond_their_noise(two, run):
    status, out, _ = run(*two)
    lines = {line.split()[2]: line.split() for line in out.splitlines() if "reference" in line}
    assert lines["ours"][4:] == ["10.000", "10.500", "1.050", "4.0%", "slower"]
    assert lines["noisy"][4:] == ["10.000", "11.500", "1.150", "20.0%"]
    assert lines["eager"][4:] == ["10.000", "9.000", "0.900", "0.0%", "faster"]
    assert "3 rows in both: 1 faster, 1 slower" in out and "torch: 2.11.0 and 2.13.0" in out
    assert "only in A: infonce reference gone fwd" in out and "only in B: infonce" in out
    assert "slower: infonce reference ours fwd: 1.050" in out and status == 0


def test_strict_is_a_status(two, run):
    assert run(*two, "--strict")[0] == 1
    assert run(two[0], two[0], "--strict")[0] == 0


def test_small_changes_are_within_the_noise(tmp_path, run):
    a, b = (written(tmp_path / f"{n}.jsonl", row("ours", ms)) for n, ms in (("a", 1), ("b", 1.009)))
    assert run(a, b, "--strict")[0] == 0


@pytest.mark.parametrize("content", [None, '{"kind": "row", "ms": null}\n'])
def test_missing_results_are_an_error(tmp_path, content, run):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    status, out, err = run(path, path)
    assert status == 2 and out == "" and "a.jsonl: expected " in err


def test_sweeps_and_training_are_rows(tmp_path):
    sweep = {"kind": "sweep", "bench": "embed", "case": "step", "kernel": "k", "ms": 2.0}
    sweep["config"] = {"BM": 64}
    path = written(
        tmp_path / "a.jsonl", sweep, {"kind": "training", "bench": "training", "ms": 5.0}
    )
    rows, _ = compare.rows_of(path)
    assert list(rows) == [
        ("embed", "sweep step", "k", "BM=64"),
        ("training", "train.py", "ours", "a step"),
    ]
