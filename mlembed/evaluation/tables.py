"""Print scores and costs next to the grid, and write grid.json and grid.png."""

import json
import math
from pathlib import Path
from typing import Any

from ..data import cldr
from ..inference.encoder import Encoder
from . import charts
from .grid import Grid


def size_name(encoder: Encoder, cell: dict[str, Any]) -> str:
    """Return what to call a cell's size."""
    size = cell["dim"], cell["exit"], cell["rank"]
    if size == encoder.full_size():
        return "full size"
    return f"width {size[0]}, exit {size[1]}" + (f", rank {size[2]}" if size[2] else "")


def by_kind(trained: dict[str, Any], untrained: dict[str, Any], size: str = "full size") -> str:
    """Return scores at one size, kind by kind, next to the untrained model's (percent)."""
    head = f"at {size} (%)"
    lines = [f"  {head:26}trained  untrained" if untrained else f"  {head}"]
    for task, result in trained.items():
        start = untrained.get(task, {})
        rows = {task: (result["score"], start.get("score"))}
        for kind, score in result.get("by_kind", {}).items():
            note = " (unseen names)" if kind in cldr.ZERO_SHOT else ""
            rows[f"  {kind}{note}"] = (score, start.get("by_kind", {}).get(kind))
        for name, (now, then) in rows.items():
            before = f"{100 * then:>11.1f}" if then is not None else " " * 11
            lines.append(f"  {name:26}{100 * now:>7.1f}{before}")
    return "\n".join(lines)


def prices(grid: Grid) -> str:
    """Return the measured costs, a line for each rank and exit; "" if none were measured."""
    by_size = {(cell["rank"], cell["exit"]): cell for cell in grid.cells if "latency_ms" in cell}
    if not by_size:
        return ""
    lines = ["  rank  exit  ms a short text  texts a second  MiB to encode 32"]
    for (rank, exit), cell in by_size.items():
        lines.append(
            f"{rank or 'table':>6}{exit:>6}{cell['latency_ms']:>17.2f}"
            f"{cell['texts_per_second']:>16.0f}{cell['memory_mib']:>18.1f}"
        )
    return "\n".join(lines)


def details(by_task: dict[str, Any], size: str = "full size") -> str:
    """Return the metrics other than `score`, a line or so for each task (percent)."""
    lines = []
    for task, result in by_task.items():
        if broken := result.get("not_unit"):
            lines.append(f"  {task}: no score: {broken} vectors are not of length one")
        floats = {k: v for k, v in result.items() if isinstance(v, float) and k != "score"}
        parts = [f"{name} {100 * value:.1f}" for name, value in floats.items()]
        for languages, mean in result.get("means", {}).items():
            if "accuracy" in mean:
                parts.append(f"mean of {languages} languages {100 * mean['accuracy']:.1f}")
            else:
                parts.append(f"mean of {languages} languages: only {mean['languages']} present")
        if parts:
            lines.append(f"  {task}: {', '.join(parts)}")
        for lang, split in result.get("splits", {}).items():
            lines.append(f"    {lang}: {split}")
    return "\n".join([f"  other metrics at {size} (%)", *lines]) if lines else ""


def funnels(scored: dict[str, Any]) -> str:
    """Return `grid.score_funnel` by task name as text, a line for each task."""
    dim, exit, rank = (value or "full" for value in scored["small"])
    lines = [
        f"  funnel of {scored['shortlist']} by width {dim}, exit {exit}, rank {rank}: nDCG@10 (%)",
        "                                full   small  funnel   bytes scanned  encoded at full",
    ]
    for task, by_name in scored.items():
        if isinstance(by_name, dict):
            ndcg = "".join(f"{100 * by_name[name]:>8.1f}" for name in ("full", "small", "funnel"))
            shares = f"{100 * by_name['scanned']:>15.1f}%{100 * by_name['encoded']:>16.1f}%"
            lines.append(f"  {task:26}{ndcg}{shares}")
    return "\n".join(lines)


def graph(scored: dict[str, Any], grid: Grid) -> str:
    """Return `grid.score_graph` as text, a line for each width (mean scores in percent)."""

    def size(cell: dict[str, Any]) -> tuple[int, int, int | None]:
        return cell["dim"], cell["exit"], cell["rank"]

    own = {size(cell): cell for cell in grid.cells}
    weights = own[size(scored["cells"][0])]
    lines = [f"  {scored['file']}       MiB  ms a short text  texts a second"]
    for name, size_bytes, cell in (
        ("weights", weights["parameter_bytes"], weights),
        ("graph", scored["bytes"], scored),
    ):
        lines.append(
            f"  {name:{len(scored['file'])}}{size_bytes / 2**20:>10.1f}"
            f"{cell['latency_ms']:>17.2f}{cell['texts_per_second']:>16.0f}"
        )
    lines.append("   width  score (%) of the weights  of the graph    loss")
    for cell in scored["cells"]:
        before, after = charts.mean_score(own[size(cell)]), charts.mean_score(cell)
        lines.append(f"{cell['dim']:>8}{before:>26.1f}{after:>14.1f}{before - after:>8.1f}")
    return "\n".join(lines)


def write_report(directory: Path, grid: Grid, extra: dict[str, Any]) -> None:
    """Write grid.json, in which null stands for NaN, and grid.png to a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    value = _finite({**extra, "cells": grid.cells})
    text = json.dumps(value, indent=1) + "\n"
    (directory / "grid.json").write_text(text, encoding="utf-8")
    title = f"{', '.join(grid.cells[0]['scores'])}: mean score by width, depth and vocabulary rank"
    charts.heat_map(grid.cells, directory / "grid.png", title)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
