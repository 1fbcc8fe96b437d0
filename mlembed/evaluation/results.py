"""A run's directory, read back: its grid of scores, and what it logged.

What is not there stays out, and is told apart from what is malformed, which is a ValueError: a
crash may cut off the last line of metrics.jsonl, null and NaN may stand for a number.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.log import METRICS

MOST = 2**53  # of a count: a float holds it, and so does a figure


@dataclass
class Found:
    """A run's files. cells: [] where there is no grid; lines: of metrics.jsonl, None without it.
    directory: where grid.json is, or would be. date: of the newest of these files."""

    run: Path
    directory: Path
    name: str
    date: str
    grid: dict[str, Any]
    cells: list[dict[str, Any]]
    lines: list[dict[str, Any]] | None

    def logged(self, kind: str) -> list[dict[str, Any]]:
        """Lines of that kind by step; of a step that was logged twice, the later line."""
        found = {line["step"]: line for line in self.lines or [] if line.get("kind") == kind}
        return [found[step] for step in sorted(found)]

    @property
    def full(self) -> dict[str, Any]:
        """The largest cell."""
        return max(self.cells, key=lambda c: (c["rank"] or 0, c["exit"], c["dim"]))


def read(run: Path) -> Found:
    """What a run's directory, or one of evaluate's, holds.

    Raises:
        ValueError: no directory, neither grid nor metrics in it, a file that is not as written by
            us. A last line of metrics.jsonl that a crash cut off is left out.
    """
    if not run.is_dir():
        raise ValueError(f"run: expected a directory, got {run}")
    places = [run / "report" / "grid.json", run / "grid.json"]
    grid_path = next((path for path in places if path.is_file()), None)
    metrics_path = run / METRICS
    if grid_path is None and not metrics_path.is_file():
        raise ValueError(f"{run}: expected report/grid.json, grid.json or {METRICS}, got none")
    grid = read_grid(grid_path) if grid_path else {"cells": [], "untrained": {}}
    lines = read_lines(metrics_path) if metrics_path.is_file() else None
    config = grid.get("run")
    if not isinstance(config, dict):
        path = run / "config.json"
        config = _object(path, path.read_bytes()) if path.is_file() else {}
    times = [path.stat().st_mtime for path in (grid_path, metrics_path) if path and path.is_file()]
    return Found(
        run,
        grid_path.parent if grid_path else places[0].parent,
        str(config.get("name") or run.resolve().name),
        f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d %H:%M} UTC",
        grid,
        grid["cells"],
        lines,
    )


def read_grid(path: Path) -> dict[str, Any]:
    """grid.json with "cells" that have what every figure needs. ValueError for others."""
    grid = _object(path, path.read_bytes())
    grid["untrained"] = {k: v for k, v in mapping(grid.get("untrained")).items() if mapping(v)}
    for task in grid["untrained"].values():
        task["score"] = number(task["score"]) if _is_number(task.get("score")) else None
    cells = grid.get("cells")
    if not isinstance(cells, list) or not cells:
        raise ValueError(f'{path}: expected "cells", a list of at least one')
    for i, cell in enumerate(cells):
        cell = cell if isinstance(cell, dict) else {}
        for key in ("dim", "exit", "parameters", "bytes_per_vector"):
            if not _is_count(cell.get(key)):
                raise ValueError(
                    f"{path}: cells[{i}].{key}: expected a whole number from 1 on, "
                    f"got {cell.get(key)!r:.60}"
                )
        if cell.setdefault("rank", None) is not None and not _is_count(cell["rank"]):
            raise ValueError(
                f"{path}: cells[{i}].rank: expected a whole number from 1 on or null, "
                f"got {cell['rank']!r:.60}"
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
            task["score"] = None if task.get("score") is None else number(task["score"])
    return grid


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; one that was cut off at the end is left out.

    Raises:
        ValueError: another line is no JSON object with a "step".
    """
    found = []
    with path.open("rb") as file:
        for at, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = _object(f"{path}:{at}", line)
                step = entry.get("step")
                if type(step) is not int or not -MOST <= step <= MOST:
                    raise ValueError(
                        f"{path}:{at}: step: expected a whole number, got {step!r:.60}"
                    )
            except ValueError:
                if not line.endswith(b"\n"):  # a crash came first
                    break
                raise
            found.append(entry)
    return found


def _object(path: Path | str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON in UTF-8: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected JSON in UTF-8: it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {value!r:.60}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST


def number(value: Any) -> float:
    """A number as it is; nan for null, what is beyond a float, and whatever else is none."""
    try:
        return float(value) if _is_number(value) else math.nan
    except OverflowError:
        return math.nan


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# ---- curves ----


def thinned(x: Sequence[float], y: Sequence[float], most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, each the mean of as many neighbours; those not finite are left
    out."""
    points = np.stack([np.asarray(x, float), np.asarray(y, float)], axis=1)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) == 0:
        return np.empty(0), np.empty(0)
    parts = np.array_split(points, min(most, len(points)))
    means = np.array([part.mean(axis=0) for part in parts])
    return means[:, 0], means[:, 1]


def curve(lines: Sequence[dict[str, Any]], *keys: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a nested entry."""
    values = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = mapping(value).get(key)
        values.append(number(value))
    return thinned([line["step"] for line in lines], values, most)


def names_of(lines: Sequence[dict[str, Any]], kind: str, *keys: str) -> list[str]:
    """Keys such as "exit_4" that occur in any line's nested entry, by their number."""
    found: set[str] = set()
    for line in lines:
        value: Any = line
        for key in keys:
            value = mapping(value).get(key)
        found |= {name for name in mapping(value) if re.fullmatch(rf"{kind}_\d+", name)}
    return sorted(found, key=lambda name: int(name.rpartition("_")[2]))
