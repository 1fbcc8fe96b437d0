"""A run's files read back: what a crash leaves is read, what is malformed is named."""

import json
import os

import numpy as np
import pytest

from mlembed.evaluation import results

CELL = {"dim": 8, "exit": 1, "rank": 4, "parameters": 100, "bytes_per_vector": 32}
CELL["scores"] = {"a": {"score": 0.5}}


def run_of(path, cells=None, lines=None, config=None, **grid):
    path.mkdir(exist_ok=True)
    if cells is not None:
        (path / "grid.json").write_text(json.dumps({"cells": cells, **grid}))
    if lines is not None:
        (path / "metrics.jsonl").write_text(lines)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


# ---- what is there ----


def test_grid_alone(tmp_path):
    found = results.read(run_of(tmp_path / "r", [CELL]))
    assert found.lines is None and found.cells == [CELL] and found.name == "r"
    assert found.directory == tmp_path / "r" and found.grid["untrained"] == {}


def test_metrics_alone(tmp_path):
    lines = '{"step": 3, "kind": "train"}\n{"step": 4, "kind": "eval"}\n'
    found = results.read(run_of(tmp_path, lines=lines, config={"name": "mine"}))
    assert found.cells == [] and found.name == "mine" and found.directory == tmp_path / "report"
    assert found.logged("eval") == [{"step": 4, "kind": "eval"}]


def test_date_is_the_newest_files(tmp_path):
    run = run_of(tmp_path, [CELL], "")
    os.utime(run / "grid.json", (0, 86_400 * 365))
    os.utime(run / "metrics.jsonl", (0, 60))
    assert results.read(run).date == "1971-01-01 00:00 UTC"


def test_a_runs_own_grid_comes_first(tmp_path):
    run = run_of(tmp_path, [CELL, CELL])
    run_of(run / "report", [CELL], run={"name": "inner"})
    found = results.read(run)
    assert len(found.cells) == 1 and found.name == "inner" and found.directory == run / "report"


def test_full_is_the_largest_cell():
    sizes = [(4, 1, 64), (8, 2, 8), (8, 1, 64), (8, 2, 32), (8, 2, 16)]
    cells = [{**CELL, "rank": r, "exit": e, "dim": d} for r, e, d in sizes]
    found = results.Found(None, None, "", "", {}, cells, None)
    assert found.full is cells[3]
    plain = [{**cell, "rank": None} for cell in cells]
    assert results.Found(None, None, "", "", {}, plain, None).full is plain[3]


def test_null_and_nan_stand_for_a_score(tmp_path):
    cells = [{**CELL, "scores": {"a": {"score": None}, "b": {"score": float("nan")}, "c": {}}}]
    untrained = {"a": {"score": "x"}, "b": 3}
    (cell,) = (found := results.read(run_of(tmp_path, cells, untrained=untrained))).cells
    assert cell["scores"]["a"] == cell["scores"]["c"] == {"score": None}
    assert found.grid["untrained"] == {"a": {"score": None}}
    del cells[0]["rank"]
    assert results.read(run_of(tmp_path, cells)).cells[0]["rank"] is None


# ---- what a crash leaves ----


@pytest.mark.parametrize("last", ['{"step": 2, "ki', '{"st\xc3', "7", '{"kind": "train"}', "   "])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, last):
    run = run_of(tmp_path, lines='{"step": 1}\n\n' + last)
    assert results.read(run).lines == [{"step": 1}]


def test_a_last_line_that_is_whole_is_kept(tmp_path):
    assert len(results.read(run_of(tmp_path, lines='{"step": 1}\n{"step": 2}')).lines) == 2


def test_a_step_logged_again_counts_once(tmp_path):
    steps = [(1, 9), (2, 8), (3, 7), (2, 6), (3, 5), (4, 4)]
    lines = "".join(f'{{"step": {s}, "kind": "train", "loss": {x}}}\n' for s, x in steps)
    train = results.read(run_of(tmp_path, lines=lines)).logged("train")
    assert [(line["step"], line["loss"]) for line in train] == [(1, 9), (2, 6), (3, 5), (4, 4)]


def test_what_no_float_holds_is_not_finite(tmp_path):
    cells = [{**CELL, "scores": {"a": {"score": 10**400}}}]
    (cell,) = results.read(run_of(tmp_path, cells)).cells
    assert np.isnan(cell["scores"]["a"]["score"]) and np.isnan(results.number(-(10**400)))


# ---- what is malformed ----


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"step": 1', r"metrics\.jsonl:2: expected JSON in UTF-8: "),
        ("[1]", r"metrics\.jsonl:2: expected a JSON object, got \[1\]"),
        ('{"kind": "train"}', r"metrics\.jsonl:2: step: expected a whole number, got None"),
        ('{"step": NaN}', r"metrics\.jsonl:2: step: expected a whole number, got nan"),
        ('{"step": 1' + 400 * "0" + "}", r"metrics\.jsonl:2: step: expected a whole number"),
        ('{"a":' * 100_000, r"metrics\.jsonl:2: expected JSON in UTF-8: it is nested too deep"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, error):
    run = run_of(tmp_path, lines='{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=error):
        results.read(run)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"dim": "8"}, r"cells\[1\]\.dim: expected a whole number from 1 on, got '8'"),
        ({"exit": 0}, r"cells\[1\]\.exit: expected a whole number from 1 on, got 0"),
        ({"parameters": None}, r"cells\[1\]\.parameters: .* got None"),
        ({"bytes_per_vector": True}, r"cells\[1\]\.bytes_per_vector: .* got True"),
        ({"parameters": 10**400}, r"cells\[1\]\.parameters: expected a whole number from 1 on"),
        ({"rank": "x"}, r"cells\[1\]\.rank: expected a whole number from 1 on or null, got 'x'"),
        ({"rank": 0}, r"cells\[1\]\.rank: expected a whole number from 1 on or null, got 0"),
        ({"scores": []}, r"cells\[1\]\.scores: expected a score of each task, got \[\]"),
        ({"scores": {"a": {"score": "1"}}}, r"cells\[1\]\.scores: expected a score of each task"),
        ({"scores": {"a": 0.5}}, r"cells\[1\]\.scores: expected a score of each task"),
    ],
)
def test_a_malformed_cell_is_named(tmp_path, change, error):
    with pytest.raises(ValueError, match=error):
        results.read(run_of(tmp_path, [CELL, {**CELL, **change}]))


@pytest.mark.parametrize(
    "text, error",
    [
        ("{", "grid.json: expected JSON in UTF-8: "),
        ("\xff", "grid.json: expected JSON in UTF-8: "),
        ("[]", r"grid.json: expected a JSON object, got \[\]"),
        ("{}", 'grid.json: expected "cells", a list of at least one'),
        ('{"cells": []}', 'grid.json: expected "cells", a list of at least one'),
        ('{"cells": [3]}', r"cells\[0\]\.dim: "),
    ],
)
def test_a_malformed_grid_is_named(tmp_path, text, error):
    (tmp_path / "grid.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=error):
        results.read(tmp_path)


def test_where_there_is_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"run: expected a directory, got .*absent"):
        results.read(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"expected report/grid\.json, grid\.json or metrics"):
        results.read(tmp_path)
    run_of(tmp_path, lines="").joinpath("config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        results.read(tmp_path)


# ---- curves ----


def test_thinned_is_means_of_neighbours():
    x, y = results.thinned([1, 2, 3, 4, 5], [1.0, 3.0, float("nan"), 5.0, 9.0], 2)
    assert x.tolist() == [1.5, 4.5] and y.tolist() == [2.0, 7.0]
    x, y = results.thinned([1, 2], [1.0, 2.0], 200)
    assert x.tolist() == [1, 2] and y.tolist() == [1, 2]
    assert [len(part) for part in results.thinned([1], [float("inf")], 5)] == [0, 0]


def test_curve_of_what_some_lines_have():
    lines = [
        {"step": 1, "losses": {"exit_2": {"dim_8": 4.0}, "exit_10": {}}},
        {"step": 2, "losses": None},
        {"step": 3, "losses": {"exit_2": {"dim_8": None, "dim_16": 1.0}, "other": 3}},
        {"step": 4, "losses": {"exit_2": {"dim_8": 2}}},
    ]
    x, y = results.curve(lines, "losses", "exit_2", "dim_8", most=9)
    assert x.tolist() == [1, 4] and y.tolist() == [4, 2]
    assert results.names_of(lines, "exit", "losses") == ["exit_2", "exit_10"]
    assert results.names_of(lines, "dim", "losses", "exit_2") == ["dim_8", "dim_16"]
