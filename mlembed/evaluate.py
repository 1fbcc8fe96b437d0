"""Scores over any set of widths, depths and vocabulary ranks.

python -m mlembed.evaluate MODEL [--data DIR_OR_FILE ..] [--mteb TASK ..] [--out report]

One pass of the trunk a rank serves all widths and depths, and of documents to be searched no more
is kept than the nearest so far. `tasks` reads what to score, `scores` has the measures, `cost` says
what each size costs.
"""

import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from . import charts, scores
from .charts import mean_score
from .data import cldr
from .data.eval_sets import STS, Bitext, Mining, Pool, Retrieval, Side, Task, read_all
from .inference import cost, search
from .inference.encoder import Encoder
from .inference.search import FULL, Funnel, Size, size_of, whole
from .runtime import files, log

DOCUMENTS = 16_384  # encoded and searched at once
IN_MEMORY = 2**30  # bytes of vectors; more of one task lie in a file
TOP = 100  # documents of a query that are looked at

Cells = dict[tuple[int, int], dict[str, Any]]  # by exit and dim

# ---- vectors and their scores ----


def grid(
    encoder: Encoder,
    tasks: Sequence[Task],
    dims: Sequence[int] | None = None,
    exits: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    progress: bool = False,
    *,
    prompts: dict[str, str] | None = None,
    costs: bool = True,
) -> list[dict[str, Any]]:
    """One cell for each (rank, exit, dim), rising, the largest last: its cost, and its scores by
    task name, nan where vectors are no numbers or a measure is of nothing.

    Args:
        dims, exits, ranks: the trained ones by default, in any order.
        prompts: `query` and `document` go before those of retrieval; the encoder's by default.
        costs: measure latency, texts a second and memory, which takes part of a second for each
            exit and rank.

    Raises:
        ValueError: a width, depth or rank that the model does not have.
    """
    cfg = encoder.model.cfg
    dims, exits, ranks = (
        sorted(set(chosen or trained))
        for chosen, trained in ((dims, cfg.matryoshka_dims), (exits, cfg.exits), (ranks, cfg.ranks))
    )
    for sizes, name in ((dims, "dim"), (exits, "exit"), (ranks, "rank")):
        for size in sizes:
            cfg.check(**{name: size})
    prompts = encoder.prompts if prompts is None else prompts
    cells = []
    for rank in ranks or (None,):
        by_task: Cells = {(exit, dim): {} for exit in exits for dim in dims}
        for task in tasks:
            found = score(encoder, task, dims, exits, rank, prompts, progress)
            for key, result in found.items():
                by_task[key][task.name] = result
        measured = {exit: cost.measure(encoder, exit, rank) if costs else {} for exit in exits}
        for (exit, dim), results in by_task.items():
            price = {**cost.sizes(encoder, dim, exit, rank), **measured[exit]}
            cells.append({"dim": dim, "exit": exit, "rank": rank, **price, "scores": results})
    return cells


def score(
    encoder: Encoder,
    task: Task,
    dims: Sequence[int],
    exits: Sequence[int],
    rank: int | None,
    prompts: dict[str, str],
    progress: bool = False,
) -> Cells:
    """One task's scores at every exit and dim of one rank."""
    if isinstance(task, Pool):
        return _pool(encoder, task, dims, exits, rank, progress)
    if isinstance(task, Retrieval):
        nearest = _search(
            encoder, task.queries, task.documents(), TOP + 1, dims, exits, rank, prompts, progress
        )
        judged = task.judged, task.order_N, task.own_Q
        return {
            size: scores.retrieval(found.scores.numpy(), found.rows.numpy(), *judged)
            if not found.not_finite
            else _no_score(found.not_finite)
            for size, found in nearest.items()
        }
    measures: dict[type, Callable[[Any, Tensor], dict[str, Any]]] = {
        Bitext: scores.score_bitext,
        STS: scores.score_sts,
        Mining: scores.score_mining,
    }
    with tempfile.TemporaryDirectory(prefix="mlembed-") as directory:
        exits_END = _stored(encoder, task.texts, exits, rank, progress, Path(directory))
        return {
            (exit, dim): _no_score(broken)
            if (broken := search.not_finite(vectors[:, :dim]))
            else measures[type(task)](task, vectors[:, :dim])
            for exit, vectors in zip(exits, exits_END, strict=True)
            for dim in dims
        }


def _no_score(broken: int) -> dict[str, Any]:
    return {"score": math.nan, "not_finite": broken}


def _stored(
    encoder: Encoder,
    texts: Sequence[str],
    exits: Sequence[int],
    rank: int | None,
    progress: bool,
    directory: Path,
) -> Tensor:
    """Vectors [E, N, D] of all texts; if they are many, in a file there."""
    shape = len(exits), len(texts), encoder.model.cfg.hidden_size
    if 4 * int(np.prod(shape)) <= IN_MEMORY:
        return encoder.exits(texts, exits, rank, progress)
    file = np.memmap(directory / "vectors", dtype=np.float32, mode="w+", shape=shape)
    for begin in range(0, len(texts), DOCUMENTS):
        some = slice(begin, begin + DOCUMENTS)
        file[:, some] = encoder.exits(texts[some], exits, rank, progress).numpy()
    return torch.from_numpy(file)


def _search(
    encoder: Encoder,
    queries: Sequence[str],
    documents: Iterable[str],
    k: int,
    dims: Sequence[int],
    exits: Sequence[int],
    rank: int | None,
    prompts: dict[str, str],
    progress: bool,
) -> dict[tuple[int, int], search.Nearest]:
    """The k nearest documents of each query at every exit and dim; documents are gone through once,
    and forgotten."""
    device = encoder.model.device
    before, before_document = prompts.get("query", ""), prompts.get("document", "")
    queries_EQD = encoder.exits(queries, exits, rank, progress, before).to(device)
    found = {(exit, dim): search.Nearest(len(queries), k) for exit in exits for dim in dims}
    first = 0
    for some in _chunks(documents):
        some_ECD = encoder.exits(some, exits, rank, progress, before_document).to(device)
        for exit, of_queries, of_documents in zip(exits, queries_EQD, some_ECD, strict=True):
            for dim in dims:
                unit_QD, unit_CD = (
                    F.normalize(x[:, :dim], dim=-1) for x in (of_queries, of_documents)
                )
                found[exit, dim].add(unit_QD, unit_CD, first)
        first += len(some)
    return found


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    left = iter(texts)
    while some := list(itertools.islice(left, DOCUMENTS)):
        yield some


def _pool(
    encoder: Encoder,
    task: Pool,
    dims: Sequence[int],
    exits: Sequence[int],
    rank: int | None,
    progress: bool,
) -> Cells:
    """P@1 over the pool, averaged over target languages, as LaBSE reports it of the UN's text."""
    by_language = {
        lang: _pool_side(encoder, side, dims, exits, rank, progress)
        for lang, side in task.sides.items()
    }
    return {
        (exit, dim): {
            "score": float(np.mean([found[exit, dim] for found in by_language.values()])),
            "by_language": {lang: found[exit, dim] for lang, found in by_language.items()},
        }
        for exit in exits
        for dim in dims
    }


def _pool_side(
    encoder: Encoder,
    side: Side,
    dims: Sequence[int],
    exits: Sequence[int],
    rank: int | None,
    progress: bool,
) -> dict[tuple[int, int], float]:
    among = itertools.chain(side.answers, side.others())
    nearest = _search(encoder, side.queries, among, 1, dims, exits, rank, {}, progress)
    return {
        size: scores.precision_at_1(found.rows[:, 0].numpy(), side.answers)
        if not found.not_finite
        else math.nan
        for size, found in nearest.items()
    }


def score_funnel(
    encoder: Encoder,
    task: Retrieval,
    small: Size,
    shortlist: int,
    prompts: dict[str, str] | None = None,
    progress: bool = False,
    cells: Sequence[dict[str, Any]] = (),
) -> dict[str, float]:
    """nDCG@10 of a search by full vectors, by small ones, and by the latter's shortlist ranked
    again by the former; `scanned`, bytes of vectors that the funnel compares with a query, and
    `encoded`, documents that it encodes at full size for these queries, as shares of a full
    search's.

    Args:
        cells: a `grid` with these prompts, whose scores of this task are not made again.

    Raises:
        ValueError: a size that the model lacks, a shortlist below 10.
    """
    if shortlist < 10:
        raise ValueError(f"shortlist: expected at least 10, for nDCG@10, got {shortlist}")
    prompts = encoder.prompts if prompts is None else prompts
    sizes = {"full": whole(encoder, FULL), "small": whole(encoder, small)}
    known = {(c["dim"], c["exit"], c["rank"]): c["scores"].get(task.name) for c in cells}
    found = {name: known[size]["score"] for name, size in sizes.items() if known.get(size)}
    left = {name: size for name, size in sizes.items() if name not in found}
    for rank in {rank for _, _, rank in left.values()}:
        of_rank = {name: size for name, size in left.items() if size[2] == rank}
        dims = sorted({dim for dim, _, _ in of_rank.values()})
        exits = sorted({exit for _, exit, _ in of_rank.values()})
        scored = score(encoder, task, dims, exits, rank, prompts, progress)
        found |= {name: scored[exit, dim]["score"] for name, (dim, exit, _) in of_rank.items()}
    built = Funnel.build(
        encoder, list(task.documents()), small, stored=False, prompts=prompts, progress=progress
    )
    best = built.search(task.queries, min(TOP + 1, shortlist), shortlist, progress)
    ranked = scores.retrieval(best.scores_QK, best.rows_QK, task.judged, task.order_N, task.own_Q)
    return {
        "full": found["full"],
        "small": found["small"],
        "funnel": ranked["score"],
        "scanned": best.scanned,
        "encoded": best.encoded,
    }


def add_mteb(
    encoder: Encoder,
    source: str,
    names: Sequence[str],
    cells: Sequence[dict[str, Any]],
    prompts: dict[str, str],
    out: Path | None,
    progress: bool = False,
) -> None:
    """Scores of mteb's tasks into each cell, by mteb at that cell's size; its own json to `out`.

    Where a rank has several cells, a task's vectors lie in files until it is scored at all of them.
    """
    tool = _mteb()
    wanted, name = tool.tasks(names), tool.model_name(source)
    for rank in dict.fromkeys(cell["rank"] for cell in cells):
        of_rank = [cell for cell in cells if cell["rank"] == rank]
        sizes = [(cell["dim"], cell["exit"], rank) for cell in of_rank]
        with tempfile.TemporaryDirectory(prefix="mlembed-") as directory:
            passes = (
                tool.Passes(encoder, [exit for _, exit, _ in sizes], rank, Path(directory))
                if len(sizes) > 1
                else None
            )
            models = [tool.MTEBEncoder(encoder, name, *size, prompts, passes) for size in sizes]
            for task in wanted:
                for cell, model in zip(of_rank, models, strict=True):
                    cell["scores"] |= tool.evaluate(model, [task], out, progress)
                if passes:
                    passes.forget()


def _mteb() -> Any:
    try:
        from . import mteb_encoder
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise ValueError("mteb: expected the package mteb: pip install mlembed[mteb]") from None
    return mteb_encoder


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
        for margin, by_candidates in result.get("by_margin", {}).items():
            f1 = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in by_candidates.items())
            lines.append(f"    F1 by {margin}: {f1}")
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
        _mteb().tasks(mteb)
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
    cells = grid(encoder, tasks, dim, exit, rank, progress, prompts=prompts)
    if mteb:
        where = Path(out) / "mteb" if out else None
        add_mteb(encoder, model, mteb, cells, prompts, where, progress)
    full, size = cells[-1]["scores"], size_name(encoder, cells[-1])
    parts = [table(cells), by_kind(full, {}, size), details(full, size), prices(cells)]
    extra: dict[str, Any] = {
        "commit": log.commit(),
        "model": model,
        "data": [*(data or [task.name for task in tasks]), *mteb],
        "device": log.device_name(encoder.model.device),
        "dtype": dtype,
    }
    if small:
        extra["funnel"] = {"small": small, "shortlist": shortlist} | {
            task.name: score_funnel(encoder, task, small, shortlist, prompts, progress, cells)
            for task in tasks
            if isinstance(task, Retrieval)
        }
        parts.append(funnels(extra["funnel"]))
    print("\n\n".join(part for part in parts if part))
    if out:
        write_report(Path(out), cells, extra)


if __name__ == "__main__":
    with log.one_line_errors():
        tyro.cli(main, prog="python -m mlembed.evaluate")
