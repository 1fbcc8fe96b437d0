"""Tables of scores and costs, as text and as files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import cldr
from ..inference.encoder import Encoder
from ..inference.search import FULL, whole
from ..runtime import files
from . import charts
from .charts import mean_score

# ---- showing ----


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The grid as text: a line for each rank and exit, a column for each width."""
    dims = sorted({cell["dim"] for cell in cells})
    at = {(cell["rank"], cell["exit"], cell["dim"]): cell for cell in cells}
    lines = [
        "                       score (%) at width, bytes a vector",
        "  rank  exit  params  " + "".join(f"{dim:>8}" for dim in dims),
        " " * 22 + "".join(f"{4 * dim:>7}B" for dim in dims),
    ]
    for rank, exit in dict.fromkeys((cell["rank"], cell["exit"]) for cell in cells):
        parameters = at[rank, exit, dims[0]]["parameters"]
        scores = "".join(f"{mean_score(at[rank, exit, dim]):>8.1f}" for dim in dims)
        lines.append(f"{rank or 'table':>6}{exit:>6}{parameters / 1e6:>7.2f}M  {scores}")
    return "\n".join(lines)


def size_name(encoder: Encoder, cell: dict[str, Any]) -> str:
    """How a cell's size is called."""
    size = cell["dim"], cell["exit"], cell["rank"]
    if size == whole(encoder, FULL):
        return "full size"
    return f"width {size[0]}, exit {size[1]}" + (f", rank {size[2]}" if size[2] else "")


def by_kind(trained: dict[str, Any], untrained: dict[str, Any], size: str = "full size") -> str:
    """Scores at one size, kind by kind, beside the untrained model's (percent)."""
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


def prices(cells: Sequence[dict[str, Any]]) -> str:
    """What was measured of each rank and exit, a line each; nothing where nothing was."""
    by_size = {(cell["rank"], cell["exit"]): cell for cell in cells if "latency_ms" in cell}
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
    """Measures beside the score, a line or so each task (percent)."""
    lines = []
    for task, result in by_task.items():
        if "not_finite" in result:
            lines.append(f"  {task}: no score, as {result['not_finite']} vectors are no numbers")
        plain = {k: v for k, v in result.items() if isinstance(v, float) and k != "score"}
        said = [f"{name} {100 * value:.1f}" for name, value in plain.items()]
        for languages, mean in result.get("means", {}).items():
            if "accuracy" in mean:
                said.append(f"mean of {languages} languages {100 * mean['accuracy']:.1f}")
            else:
                said.append(f"mean of {languages} languages: {mean['languages']} of them are here")
        if said:
            lines.append(f"  {task}: {', '.join(said)}")
        for lang, said_of in result.get("splits", {}).items():
            lines.append(f"    {lang}: {said_of}")
    return "\n".join([f"  other measures at {size} (%)", *lines]) if lines else ""


def funnels(found: dict[str, Any]) -> str:
    """`score_funnel` by task name, a line each."""
    dim, exit, rank = (value or "full" for value in found["small"])
    lines = [
        f"  funnel of {found['shortlist']} by width {dim}, exit {exit}, rank {rank}: nDCG@10 (%)",
        "                                full   small  funnel   bytes scanned  encoded at full",
    ]
    for task, scored in found.items():
        if isinstance(scored, dict):
            ndcg = "".join(f"{100 * scored[name]:>8.1f}" for name in ("full", "small", "funnel"))
            shares = f"{100 * scored['scanned']:>15.1f}%{100 * scored['encoded']:>16.1f}%"
            lines.append(f"  {task:26}{ndcg}{shares}")
    return "\n".join(lines)


def write_report(directory: Path, cells: Sequence[dict[str, Any]], extra: dict[str, Any]) -> None:
    """grid.json, where null stands for nan, and grid.png in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    title = ", ".join(cells[0]["scores"])
    files.write_text(
        directory / "grid.json", json.dumps(_nulls({**extra, "cells": cells}), indent=1) + "\n"
    )
    title = f"{title}: mean score by width, depth and vocabulary rank"
    charts.heat_map(cells, directory / "grid.png", title)


def _nulls(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _nulls(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
