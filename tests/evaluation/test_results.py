"""A run's files read back: values that a crash left out, and errors that name the malformed one."""

import json
import os

import numpy as np
import pytest

from mlembed.evaluation import results

CELL = {"dim": 8, "exit": 1, "rank": 4, "parameters": 100, "bytes_per_vector": 32}
CELL["scores"] = {"a": {"score": 0.5}}


def run_of(path, cells=None, lines=None, config=None, **grid):
    path.mkdir(exist_ok=True)
    given = {"grid.json": cells and json.dumps({"cells": cells, **grid}), "metrics.jsonl": lines}
    given["config.json"] = config and json.dumps(config)
    for name, text in given.items():
        if text is not None:
            (path / name).write_text(text)
    return path


# ---- files ----


def test_grid_alone(tmp_path):
    run = results.read(run_of(tmp_path / "r", [CELL]))
    assert run.lines is None and run.cells == [CELL] and run.name == "r"
    assert run.directory == tmp_path / "r" and run.grid["untrained"] == {}


def test_metrics_alone(tmp_path):
    lines = '{"step": 3, "kind": "train"}\n{"step": 4, "kind": "eval"}\n'
    run = results.read(run_of(tmp_path, lines=lines, config={"name": "mine"}))
    assert run.cells == [] and run.name == "mine" and run.directory == tmp_path / "report"
    assert run.logged("eval") == [{"step": 4, "kind": "eval"}]


def test_date_is_the_newest_files(tmp_path):
    run = run_of(tmp_path, [CELL], "")
    os.utime(run / "grid.json", (0, 86_400 * 365))
    os.utime(run / "metrics.jsonl", (0, 60))
    assert results.read(run).date == "1971-01-01 00:00 UTC"


def test_grid_of_the_run_comes_first(tmp_path):
    run = run_of(tmp_path, [CELL, CELL])
    run_of(run / "report", [CELL], run={"name": "inner"})
    read = results.read(run)
    assert len(read.cells) == 1 and read.name == "inner" and read.directory == run / "report"


@pytest.mark.parametrize("ranked", [True, False])
def test_full_is_the_largest_cell(ranked):
    sizes = [(4, 1, 64), (8, 2, 8), (8, 1, 64), (8, 2, 32), (8, 2, 16)]
    cells = [{**CELL, "rank": r if ranked else None, "exit": e, "dim": d} for r, e, d in sizes]
    assert results.Results(None, None, "", "", {"cells": cells}, None).full is cells[3]


def test_null_and_nan_stand_for_a_score(tmp_path):
    scores = {"a": {"score": None}, "b": {"score": float("nan")}, "c": {}, "d": {"score": 10**400}}
    cell = {key: value for key, value in CELL.items() if key != "rank"} | {"scores": scores}
    run = results.read(run_of(tmp_path, [cell], untrained={"a": {"score": "x"}, "b": 3}))
    (cell,) = run.cells
    assert cell["scores"]["a"] == cell["scores"]["c"] == {"score": None} and cell["rank"] is None
    assert all(np.isnan(cell["scores"][task]["score"]) for task in "bd")
    assert run.grid["untrained"] == {"a": {"score": None}}
    assert np.isnan(results.number(-(10**400)))


@pytest.mark.parametrize("last", ['{"step": 2, "ki', '{"st\xc3', "7", '{"kind": "train"}', "   "])
def test_unfinished_last_line_is_left_out(tmp_path, last):
    run = run_of(tmp_path, lines='{"step": 1}\n\n{"step": 2}')
    assert results.read(run).lines == [{"step": 1}, {"step": 2}]
    run = run_of(tmp_path, lines='{"step": 1}\n\n' + last)
    assert results.read(run).lines == [{"step": 1}]


def test_repeated_step_has_its_later_line(tmp_path):
    steps = [(1, 9), (2, 8), (3, 7), (2, 6), (3, 5), (4, 4)]
    lines = "".join(f'{{"step": {s}, "kind": "train", "loss": {x}}}\n' for s, x in steps)
    train = results.read(run_of(tmp_path, lines=lines)).logged("train")
    assert [(line["step"], line["loss"]) for line in train] == [(1, 9), (2, 6), (3, 5), (4, 4)]


# ---- errors ----


@pytest.mark.parametrize(
    "line",
    ['{"step": 1', "[1]", '{"kind": "train"}', '{"step": NaN}', '{"step": true}']
    + ['{"step": 1' + 400 * "0" + "}", '{"a":' * 100_000],
    ids=range(7),
)
def test_malformed_line(tmp_path, line):
    run = run_of(tmp_path, lines='{"step": 1}\n' + line + '\n{"step": 3}\n')
    error = r'metrics\.jsonl:2: expected a JSON object with an integer "step", got b'
    with pytest.raises(ValueError, match=error):
        results.read(run)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"dim": "8"}, r"cells\[1\]\.dim: expected an integer from 1 on, got '8'"),
        ({"exit": 0}, r"cells\[1\]\.exit: expected an integer from 1 on, got 0"),
        ({"parameters": 10**400}, r"cells\[1\]\.parameters: expected an integer from 1 on"),
        ({"bytes_per_vector": True}, r"cells\[1\]\.bytes_per_vector: .* got True"),
        ({"rank": 0}, r"cells\[1\]\.rank: expected an integer from 1 on or null, got 0"),
        ({"scores": []}, r"cells\[1\]\.scores: expected a score of each task, got \[\]"),
        ({"scores": {"a": {"score": "1"}}}, r"cells\[1\]\.scores: expected a score of each task"),
        ({"scores": {"a": 0.5}}, r"cells\[1\]\.scores: expected a score of each task"),
    ],
)
def test_malformed_cell(tmp_path, change, error):
    with pytest.raises(ValueError, match=error):
        results.read(run_of(tmp_path, [CELL, {**CELL, **change}]))


@pytest.mark.parametrize(
    "text, error",
    [
        ("{", "grid.json:1: invalid JSON: "),
        ("\xff", "grid.json: invalid UTF-8 at byte 0"),
        ("[]", r"grid.json: expected a JSON object, got \[\]"),
        ("{}", 'grid.json: expected "cells", a list of at least one'),
        ('{"cells": []}', 'grid.json: expected "cells", a list of at least one'),
        ('{"cells": [3]}', r"cells\[0\]\.dim: "),
    ],
)
def test_malformed_grid(tmp_path, text, error):
    (tmp_path / "grid.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=error):
        results.read(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"run: expected a directory, got .*absent"):
        results.read(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"expected report/grid\.json, grid\.json or metrics"):
        results.read(tmp_path)
    run_of(tmp_path, lines="").joinpath("config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json:1: invalid JSON"):
        results.read(tmp_path)


# ---- curves ----


def test_thinned_averages_neighbours():
    x, y = results.thinned([1, 2, 3, 4, 5], [1.0, 3.0, float("nan"), 5.0, 9.0], 2)
    assert x.tolist() == [1.5, 4.5] and y.tolist() == [2.0, 7.0]
    x, y = results.thinned([1, 2], [1.0, 2.0], 200)
    assert x.tolist() == [1, 2] and y.tolist() == [1, 2]
    assert [len(part) for part in results.thinned([1], [float("inf")], 5)] == [0, 0]


def test_curve_of_entries_that_some_lines_lack():
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
