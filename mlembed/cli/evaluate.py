"""Scores over any set of widths, depths and vocabulary ranks.

python -m mlembed evaluate MODEL [--data DIR_OR_FILE ..] [--mteb TASK ..] [--out report]
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..data.eval_sets import Retrieval, Task, read_all
from ..evaluation.grid import add_mteb, load_mteb, score_funnel, score_grid
from ..evaluation.tables import by_kind, details, funnels, prices, size_name, write_report
from ..inference.encoder import Encoder, Size
from ..inference.search import size_of
from ..runtime import log


def _asked(data: Sequence[str], mteb: Sequence[str], small: Size | None, out: str) -> list[Task]:
    """The tasks of a command. ValueError, before any work, for what it cannot do."""
    if out and Path(out).exists():
        raise ValueError(f"out: expected a new directory, got {out}, which exists")
    above = next(p for p in Path(out).absolute().parents if p.exists())
    if out and not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"out: expected a new directory, got {out}, in {above} where none can be")
    tasks = read_all(data or (() if mteb else ("cldr",)))
    if twice := {task.name for task in tasks} & set(mteb):
        raise ValueError(f"mteb: expected other names than --data has, got {', '.join(twice)}")
    if small and not any(isinstance(task, Retrieval) for task in tasks):
        raise ValueError("funnel: expected retrieval among --data, got none")
    if mteb:
        load_mteb().tasks(mteb)
    return tasks


def main(
    model: Annotated[str, tyro.conf.Positional],
    /,
    data: tuple[str, ...] = (),
    mteb: tuple[str, ...] = (),
    dim: tuple[int, ...] = (),
    exit: tuple[int, ...] = (),
    rank: tuple[int, ...] = (),
    funnel: str = "",
    shortlist: int = 100,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    out: str = "",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
) -> None:
    """Score a model over width x depth x vocabulary rank.

    Args:
        model: run, checkpoint, model directory or hub id.
        data: cldr (by default, without --mteb), directories in the layout of Tatoeba, BEIR, BUCC or
            UN, n-way tables (id, lang, text), STS csv files.
        mteb: tasks of the package mteb, by name; it runs them, and writes its own json to OUT/mteb.
        dim: widths; those it was trained for by default, with --mteb the full one.
        exit: depths, likewise.
        rank: vocabulary ranks, likewise.
        funnel: DIM:EXIT:RANK of the small vectors whose shortlist is ranked again by full ones, for
            retrieval tasks; a place left empty is the largest.
        shortlist: documents of a query that the funnel ranks again.
        query_prompt: goes before queries of retrieval, instead of the model's own prompt `query`.
        document_prompt: before documents, instead of the model's `document`.
        out: new directory for grid.json and grid.png.
        dtype: of the weights, in which everything here is scored and measured, mteb's tasks too.
        device: auto, cpu or cuda.
    """
    small = size_of(funnel) if funnel else None
    tasks = _asked(data, mteb, small, out)
    encoder = Encoder.load(model, device, dtype)
    cfg = encoder.model.cfg
    if mteb:
        dim, exit, rank = (
            dim or (cfg.hidden_size,),
            exit or (cfg.num_hidden_layers,),
            rank or cfg.ranks[-1:],
        )
    prompts = dict(encoder.prompts)
    for name, given in (("query", query_prompt), ("document", document_prompt)):
        if given is not None:
            prompts[name] = given
    progress = sys.stderr.isatty()
    grid = score_grid(encoder, tasks, dim, exit, rank, progress, prompts=prompts)
    if mteb:
        where = Path(out) / "mteb" if out else None
        add_mteb(encoder, model, mteb, grid, prompts, where, progress)
    full, size = grid.cells[-1]["scores"], size_name(encoder, grid.cells[-1])
    parts = [grid.table(), by_kind(full, {}, size), details(full, size), prices(grid)]
    extra: dict[str, Any] = {
        "commit": log.commit(),
        "model": model,
        "data": [*(data or [task.name for task in tasks]), *mteb],
        "device": log.device_name(encoder.model.device),
        "dtype": dtype,
    }
    if small:
        extra["funnel"] = {"small": small, "shortlist": shortlist} | {
            task.name: score_funnel(encoder, task, small, shortlist, prompts, progress, grid.cells)
            for task in tasks
            if isinstance(task, Retrieval)
        }
        parts.append(funnels(extra["funnel"]))
    print("\n\n".join(part for part in parts if part))
    if out:
        write_report(Path(out), grid, extra)
