"""Scores over any set of widths, depths and vocabulary ranks.

One pass of the trunk a rank serves all widths and depths, and of documents to be searched no more
is kept than the nearest so far. `tasks` reads what to score, `scores` has the measures, `cost` says
what each size costs.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.eval_sets import STS, Bitext, Mining, Pool, Retrieval, Side, Task
from ..inference import cost, search
from ..inference.encoder import Encoder
from ..inference.search import FULL, Funnel, Size, whole
from . import scores

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
        from . import mteb_model as mteb_encoder
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise ValueError("mteb: expected the package mteb: pip install mlembed[mteb]") from None
    return mteb_encoder
