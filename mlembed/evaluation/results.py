"""Read a run's directory back: its grid of scores, and the metrics that it logged.

Missing values stay missing, and null and NaN may stand for a number; a malformed file is a
ValueError. A crash may have cut off the last line of metrics.jsonl, which is then left out.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike

from ..config.choices import Stored
from ..runtime import files
from ..runtime.log import METRICS

LARGEST = 2**53  # A float, and so a figure, holds every count up to here.

EXPECTED = dict.fromkeys(("dim", "exit", "parameters", "bytes_per_vector"), "an integer from 1 on")
MEASURED = {"latency_ms", "texts_per_second", "memory_mib"}
EXPECTED["rank"] = "an integer from 1 on or null"


@dataclass
class Results:
    """Files of a run.

    Args:
        directory: holds grid.json, or would hold it.
        date: of the newest file.
        grid: grid.json; its "cells" are [] for a run without a grid.
        lines: of metrics.jsonl, None without that file.
    """

    run: Path
    directory: Path
    name: str
    date: str
    grid: dict[str, Any]
    lines: list[dict[str, Any]] | None

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.grid["cells"]

    @property
    def full(self) -> dict[str, Any]:
        """The largest cell."""
        return max(self.cells, key=lambda c: (c["rank"] or 0, c["exit"], c["dim"]))

    def logged(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of a kind by step; a step that was logged twice has its later line."""
        by_step = {line["step"]: line for line in self.lines or [] if line.get("kind") == kind}
        return [by_step[step] for step in sorted(by_step)]


def read(run: Path) -> Results:
    """Read a directory that train.py or `mlembed evaluate --out` wrote.

    Raises:
        ValueError: not a directory, a directory with neither grid nor metrics, a malformed file.
    """
    if not run.is_dir():
        raise ValueError(f"run: expected a directory, got {run}")
    places = [run / "report" / "grid.json", run / "grid.json"]
    grid_path = next((path for path in places if path.is_file()), None)
    metrics_path = run / METRICS
    read_from = [path for path in (grid_path, metrics_path) if path and path.is_file()]
    if not read_from:
        raise ValueError(f"{run}: expected report/grid.json, grid.json or {METRICS}, got none")
    grid = read_grid(grid_path) if grid_path else {"cells": [], "untrained": {}}
    config = grid.get("run")
    if not isinstance(config, dict):
        path = run / "config.json"
        config = files.read_object(path, strict=False) if path.is_file() else {}
    newest = max(path.stat().st_mtime for path in read_from)
    return Results(
        run,
        (grid_path or places[0]).parent,
        str(config.get("name") or run.resolve().name),
        f"{datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC",
        grid,
        read_lines(metrics_path) if metrics_path in read_from else None,
    )


def read_grid(path: Path) -> dict[str, Any]:
    """Read grid.json, whose cells then have what every figure needs: sizes, and a score a task,
    None for null. ValueError otherwise.
    """
    grid = files.read_object(path, strict=False)
    untrained = mapping(grid.get("untrained"))
    grid["untrained"] = {task: result for task, result in untrained.items() if mapping(result)}
    for result in grid["untrained"].values():
        result["score"] = number(result["score"]) if _is_number(result.get("score")) else None
    texts = grid.get("texts_by_language")
    if texts is None:
        grid.pop("texts_by_language", None)
    else:
        for code in files.field(path, grid, "texts_by_language", dict):
            files.field(path, texts, code, int)
    if not isinstance(grid.get("cells"), list) or not grid["cells"]:
        raise ValueError(f'{path}: expected "cells", a list of at least one')
    for i, cell in enumerate(grid["cells"]):
        cell = mapping(cell)
        cell.setdefault("rank", None)
        for key, expected in EXPECTED.items():
            value = cell.get(key)
            if not (_is_count(value) or key == "rank" and value is None):
                raise ValueError(
                    f"{path}: cells[{i}].{key}: expected {expected}, got {value!r:.60}"
                )
        for key in cell.keys() & MEASURED:
            cell[key] = number(cell[key])
        if not _is_range(cell.get("int8_range", [-1.0, 1.0])):
            raise ValueError(
                f"{path}: cells[{i}].int8_range: expected a least and a greatest number, got "
                f"{cell['int8_range']!r:.60}"
            )
        scores = cell.get("scores")
        if not isinstance(scores, dict) or not all(
            isinstance(task, dict) and (task.get("score") is None or _is_number(task["score"]))
            for task in scores.values()
        ):
            raise ValueError(
                f"{path}: cells[{i}].scores: expected a score of each task, got {scores!r:.60}"
            )
        for task in scores.values():
            if "by_language" in task:
                task["by_language"] = mapping(task["by_language"])
            task["score"] = None if task.get("score") is None else number(task["score"])
            for name in task.keys() & get_args(Stored):
                task[name] = {"score": number(mapping(task[name]).get("score"))}
    return grid


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl. ValueError if a complete line is not an object with an integer "step"."""
    lines = []
    with path.open("rb") as file:
        for at, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = files.parse_json(line.decode(), path, at, strict=False)
                valid = type(entry["step"]) is int and abs(entry["step"]) <= LARGEST
            except (ValueError, TypeError, KeyError):
                valid = False
            if valid:
                lines.append(entry)
            elif line.endswith(b"\n"):
                raise ValueError(
                    f'{path}:{at}: expected a JSON object with an integer "step", got {line!r:.60}'
                )
    return lines


def _is_range(value: Any) -> bool:
    both = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    return both and -math.inf < value[0] < value[1] < math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def number(value: Any) -> float:
    """Return a number as a float; nan for null, what is beyond a float, and every other value."""
    try:
        return float(value) if _is_number(value) else math.nan
    except OverflowError:
        return math.nan


def mapping(value: Any) -> dict[str, Any]:
    """Return a dictionary as it is, and {} for every other value."""
    return value if isinstance(value, dict) else {}


# ---- curves ----


def thinned(x: ArrayLike, y: ArrayLike, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points, each the mean of neighbours; points with NaN or infinity are
    left out.
    """
    points = np.stack([np.asarray(x, float), np.asarray(y, float)], axis=1)
    points = points[np.isfinite(points).all(axis=1)]
    parts = np.array_split(points, min(most, len(points))) if len(points) else []
    means = np.array([part.mean(axis=0) for part in parts]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def curve(lines: Sequence[dict[str, Any]], *keys: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a nested entry, thinned."""
    steps = [line["step"] for line in lines]
    values = [number(_nested(line, keys[:-1]).get(keys[-1])) for line in lines]
    return thinned(steps, values, most)


def names_of(lines: Sequence[dict[str, Any]], kind: str, *keys: str) -> list[str]:
    """Return keys such as "exit_4" that any line's nested entry has, by their number."""
    names = {name for line in lines for name in _nested(line, keys)}
    names = {name for name in names if re.fullmatch(rf"{kind}_\d+", name)}
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def _nested(line: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    for key in keys:
        line = mapping(line.get(key))
    return line
