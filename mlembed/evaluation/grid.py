"""Score a model over any set of widths, depths and vocabulary ranks.

For each rank the model runs once, and every width and depth is scored from that pass. Documents to
be searched are streamed: only the nearest so far stay in memory.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..config.choices import Stored
from ..data.eval_tasks import STS, Bitext, Mining, Pool, Retrieval, Side, Task
from ..inference import codes, cost
from ..inference.encoder import Encoder, FullSize, Size
from ..inference.onnx_encoder import OnnxEncoder
from ..inference.search import Funnel, Nearest, not_unit
from . import charts, scores
from .charts import mean_score

DOCUMENTS = 16_384  # Documents that are encoded and searched at once.
IN_MEMORY = 2**30  # Bytes of vectors of one task; more of them go to a file.
TOP = 100  # Documents of a query that count.

Results = dict[FullSize, dict[str, Any]]  # A task's scores by size.
BYTES = {"int8": ", 1/4", "binary": ", 1/32"}  # of those of float32
Kind = tuple[FullSize, str]  # A size, and codes.FLOAT or what vectors are stored in.


@dataclass(frozen=True)
class Grid:
    """Scores and costs of a model at every size, the value that grid.json holds as `cells`.

    cells: dictionaries with `dim`, `exit`, `rank` (None for a plain table), `parameters`,
    `parameter_bytes`, `bytes_per_vector`, if measured `latency_ms`, `texts_per_second` and
    `memory_mib`, and `scores` by task; rising by rank, exit and dim. A task that is scored as bytes
    and bits, too, has `int8` and `binary`, the metrics of those, and its cell `int8_range`, the
    least and greatest number of every dimension.
    """

    cells: list[dict[str, Any]]

    @property
    def dims(self) -> list[int]:
        return sorted({cell["dim"] for cell in self.cells})

    @property
    def precisions(self) -> list[str]:
        """Return what else than float32 vectors are scored in."""
        return charts.precisions(self.cells)

    def check(self) -> None:
        """Raise ValueError if a task has no score at some size, because of its vectors."""
        for cell in self.cells:
            for task, result in cell["scores"].items():
                if broken := result.get("not_unit"):
                    raise ValueError(
                        f"{task}: expected vectors of length one, got {broken} of another length "
                        f"at width {cell['dim']}, exit {cell['exit']}, rank {cell['rank']}"
                    )

    def rows(self) -> list[dict[int, dict[str, Any]]]:
        """Return the cells of each rank and exit by dim."""
        rows: dict[Any, dict[int, dict[str, Any]]] = {}
        for cell in self.cells:
            rows.setdefault((cell["rank"], cell["exit"]), {})[cell["dim"]] = cell
        return list(rows.values())

    def table(self) -> str:
        """Return the mean scores as text: a line for each rank and exit, a column for each dim."""
        lines = [
            "                       score (%) at width, bytes a vector",
            "  rank  exit  params  " + "".join(f"{dim:>8}" for dim in self.dims),
            " " * 22 + "".join(f"{4 * dim:>7}B" for dim in self.dims),
        ]
        for row in self.rows():
            cell = next(iter(row.values()))
            means = "".join(f"{mean_score(row[dim]):>8.1f}" for dim in self.dims)
            size = f"{cell['rank'] or 'table':>6}{cell['exit']:>6}"
            lines.append(f"{size}{cell['parameters'] / 1e6:>7.2f}M  {means}")
            for name in self.precisions:
                means = "".join(f"{mean_score(row[dim], name):>8.1f}" for dim in self.dims)
                lines.append(f"{name + BYTES[name]:>20}  {means}")
        return "\n".join(lines)

    def markdown(self, bold: Size | None = None) -> str:
        """Return sizes, measured costs and mean scores as a Markdown table.

        bold: the (dim, exit, rank) whose score is bold.
        """
        titles = {"latency_ms": "ms a text", "texts_per_second": "texts/s", "memory_mib": "MiB"}
        titles = {k: title for k, title in titles.items() if any(k in c for c in self.cells)}
        head = ["rank", "exit", "parameters", *titles.values(), *(f"{d} wide" for d in self.dims)]
        head += [f"{d} wide, {name}" for name in self.precisions for d in self.dims]
        lines = [f"| {' | '.join(head)} |", f"|{' ---: |' * len(head)}"]
        for row in self.rows():
            cell = next(iter(row.values()))
            words = [str(cell["rank"] or "table"), str(cell["exit"])]
            words.append(f"{cell['parameters'] / 1e6:.2f} M")
            words += [f"{cell[key]:.4g}" if key in cell else "" for key in titles]
            for dim in self.dims:
                score = f"{mean_score(row[dim]):.1f}" if dim in row else ""
                words.append(f"**{score}**" if (dim, cell["exit"], cell["rank"]) == bold else score)
            for name in self.precisions:
                stored = (mean_score(row[d], name) if d in row else math.nan for d in self.dims)
                words += ["" if math.isnan(score) else f"{score:.1f}" for score in stored]
            lines.append(f"| {' | '.join(words)} |")
        return "\n".join(lines)

    def figure(self, title: str) -> Figure:
        """Return the mean scores as a heat map for each rank."""
        return charts.score_map(self.cells, title)


def score_grid(
    encoder: Encoder,
    tasks: Sequence[Task],
    dims: Sequence[int] | None = None,
    exits: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    progress: bool = False,
    *,
    prompts: dict[str, str] | None = None,
    costs: bool = True,
    precisions: Sequence[Stored] = (),
) -> Grid:
    """Score tasks at every (rank, exit, dim), the largest last. A score is NaN if a vector is not
    of length one (`not_unit` counts them) or the metric is undefined.

    Args:
        dims, exits, ranks: those of training by default, in any order.
        prompts: `query` and `document`, to put before those of retrieval; the encoder's by default.
        costs: measure latency, texts a second and memory, which takes part of a second for each
            exit and rank.
        precisions: what else than float32 to score vectors in, see `codes`.

    Raises:
        ValueError: a width, depth or rank that the model lacks.
    """
    cfg = encoder.model.cfg
    dims, exits, ranks = (
        sorted(set(chosen or trained))
        for chosen, trained in ((dims, cfg.matryoshka_dims), (exits, cfg.exits), (ranks, cfg.ranks))
    )
    for dim, exit, rank in itertools.product(dims, exits, ranks or (None,)):
        cfg.check(dim, exit, rank)
    prompts = encoder.prompts if prompts is None else prompts
    cells: list[dict[str, Any]] = []
    for rank in ranks or (None,):
        sizes = [(dim, exit, rank) for exit in exits for dim in dims]
        by_task = {t.name: score(encoder, t, sizes, prompts, progress, precisions) for t in tasks}
        measured = {exit: cost.measure(encoder, exit, rank) if costs else {} for exit in exits}
        for size in sizes:
            dim, exit, _ = size
            price = {**cost.sizes(encoder, *size), **measured[exit]}
            results = {name: by_size[size] for name, by_size in by_task.items()}
            cells.append({"dim": dim, "exit": exit, "rank": rank, **price, "scores": results})
            if reached := [r["int8"].pop("largest") for r in results.values() if "int8" in r]:
                cells[-1]["int8_range"] = [*codes.symmetric_range(max(reached))]
    return Grid(cells)


def score(
    encoder: Encoder,
    task: Task,
    sizes: Sequence[FullSize],
    prompts: dict[str, str],
    progress: bool = False,
    precisions: Sequence[Stored] = (),
) -> Results:
    """Return one task's scores at each size; those of each of `precisions` by its name."""
    kinds: list[Kind] = [(size, name) for size in sizes for name in (codes.FLOAT, *precisions)]
    by_kind = _scores(encoder, task, kinds, prompts, progress)
    for size, name in kinds:
        if name != codes.FLOAT and not by_kind[size, codes.FLOAT].get("not_unit"):
            metrics = by_kind[size, name].items()
            by_kind[size, codes.FLOAT][name] = {k: v for k, v in metrics if isinstance(v, float)}
    return {size: by_kind[size, codes.FLOAT] for size in sizes}


def _scores(
    encoder: Encoder,
    task: Task,
    kinds: Sequence[Kind],
    prompts: dict[str, str],
    progress: bool,
) -> dict[Kind, dict[str, Any]]:
    if isinstance(task, Pool):
        return _pool(encoder, task, kinds, progress)
    if isinstance(task, Retrieval):
        nearest = _search(
            encoder, task.queries, task.documents(), TOP + 1, kinds, prompts, progress
        )
        judged = task.judged, task.order_N, task.own_Q
        return {
            kind: scores.retrieval(found.scores.numpy(), found.rows.numpy(), *judged)
            | found.coder.reached()
            if not found.not_unit
            else _no_score(found.not_unit)
            for kind, found in nearest.items()
        }
    metrics: dict[type, Callable[[Any, Tensor], dict[str, Any]]] = {
        Bitext: scores.score_bitext,
        STS: scores.score_sts,
        Mining: scores.score_mining,
    }
    sizes = list(dict.fromkeys(size for size, _ in kinds))
    numbers = len({size[:0:-1] for size in sizes}) * len(task.texts) * encoder.model.cfg.hidden_size
    vectors = encoder.encode_grid(task.texts, sizes, progress, on_disk=4 * numbers > IN_MEMORY)
    results: dict[Kind, dict[str, Any]] = {}
    for size in sizes:
        unit = vectors[size]
        broken = not_unit(unit)
        for name in (name for one, name in kinds if one == size):
            coder = codes.Coder(name)
            results[size, name] = (
                _no_score(broken)
                if broken
                else metrics[type(task)](task, coder(unit)) | coder.reached()
            )
    return results


def _no_score(broken: int) -> dict[str, Any]:
    return {"score": math.nan, "not_unit": broken}


def _search(
    encoder: Encoder,
    queries: Sequence[str],
    documents: Iterable[str],
    k: int,
    kinds: Sequence[Kind],
    prompts: dict[str, str],
    progress: bool,
) -> dict[Kind, Nearest]:
    """Return the k nearest documents of each query of each kind, from one pass over documents."""
    device = encoder.model.device
    sizes = list(dict.fromkeys(size for size, _ in kinds))
    query_vectors = encoder.encode_grid(queries, sizes, progress, prompts.get("query")).to(device)
    nearest = {kind: Nearest(len(queries), k, codes.Coder(kind[1])) for kind in kinds}
    for some in _chunks(documents):
        vectors = encoder.encode_grid(some, sizes, progress, prompts.get("document")).to(device)
        for (size, _), found in nearest.items():
            found.add(query_vectors[size], vectors[size])
    return nearest


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while some := list(itertools.islice(rest, DOCUMENTS)):
        yield some


def _pool(
    encoder: Encoder, task: Pool, kinds: Sequence[Kind], progress: bool
) -> dict[Kind, dict[str, Any]]:
    """Return P@1 over the pool, averaged over target languages, like LaBSE on the UN's text."""
    by_language = {
        lang: _pool_side(encoder, side, kinds, progress) for lang, side in task.sides.items()
    }
    results = {}
    for kind in kinds:
        found = {lang: by_kind[kind] for lang, by_kind in by_language.items()}
        by_lang = {lang: result["score"] for lang, result in found.items()}
        results[kind] = {"score": float(np.mean(list(by_lang.values()))), "by_language": by_lang}
        if reached := [result["largest"] for result in found.values() if "largest" in result]:
            results[kind]["largest"] = max(reached)
        if broken := sum(result.get("not_unit", 0) for result in found.values()):
            results[kind]["not_unit"] = broken
    return results


def _pool_side(
    encoder: Encoder, side: Side, kinds: Sequence[Kind], progress: bool
) -> dict[Kind, dict[str, Any]]:
    pool = itertools.chain(side.answers, side.others())
    nearest = _search(encoder, side.queries, pool, 1, kinds, {}, progress)
    return {
        kind: {"score": scores.precision_at_1(found.rows[:, 0].numpy(), side.answers)}
        | found.coder.reached()
        if not found.not_unit
        else _no_score(found.not_unit)
        for kind, found in nearest.items()
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
    """Score a two-stage search: nDCG@10 of `full` vectors, of `small` ones, and of the `funnel`.

    Also returns `scanned`, the bytes of vectors that the funnel compares with a query, and
    `encoded`, the documents that it encodes at full size, as shares of a full search.

    Args:
        cells: those of a Grid with these prompts, whose scores of this task are used again.

    Raises:
        ValueError: a size that the model lacks, a shortlist below 10.
    """
    if shortlist < 10:
        raise ValueError(f"shortlist: expected at least 10, for nDCG@10, got {shortlist}")
    prompts = encoder.prompts if prompts is None else prompts
    sizes = {"full": encoder.full_size(), "small": encoder.full_size(small)}
    known = {(c["dim"], c["exit"], c["rank"]): c["scores"].get(task.name) for c in cells}
    new = [size for size in sizes.values() if not known.get(size)]
    known |= score(encoder, task, new, prompts, progress) if new else {}
    if any(math.isnan(known[size]["score"]) for size in sizes.values()):
        return dict.fromkeys(("full", "small", "funnel", "scanned", "encoded"), math.nan)
    funnel = Funnel.build(
        encoder, list(task.documents()), small, stored=False, prompts=prompts, progress=progress
    )
    best = funnel.search(task.queries, min(TOP + 1, shortlist), shortlist, progress)
    ranked = scores.retrieval(best.scores_QK, best.rows_QK, task.judged, task.order_N, task.own_Q)
    return {
        **{name: known[size]["score"] for name, size in sizes.items()},
        "funnel": ranked["score"],
        "scanned": best.scanned,
        "encoded": best.encoded,
    }


def score_graph(
    encoder: Encoder,
    path: Path,
    tasks: Sequence[Task],
    grid: Grid,
    prompts: dict[str, str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score an ONNX graph of the encoder's full depth and rank at the widths that the grid has.

    Returns its `cells`, like those of a Grid, with the graph's `bytes`, `latency_ms` and
    `texts_per_second` next to them.

    Raises:
        ValueError: a grid without that depth and rank, a file that is not such a graph.
    """
    widest, exit, rank = encoder.full_size()
    sizes = [(cell["dim"], cell["exit"], cell["rank"]) for cell in grid.cells]
    dims = [size[0] for size in sizes if size[1:] == (exit, rank) and size[0] <= widest]
    if not dims:
        raise ValueError(f"graph: expected exit {exit} and rank {rank} to compare, got neither")
    reader = OnnxEncoder.of(encoder, path)
    ranks = None if rank is None else (rank,)
    scored = score_grid(reader, tasks, dims, (exit,), ranks, progress, prompts=prompts, costs=False)
    measured = cost.measure(reader, exit, rank)
    return {
        "bytes": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
        **{name: measured[name] for name in ("latency_ms", "texts_per_second")},
        "cells": scored.cells,
    }


def add_mteb(
    encoder: Encoder,
    source: str,
    names: Sequence[str],
    grid: Grid,
    prompts: dict[str, str],
    out: Path | None,
    progress: bool = False,
) -> None:
    """Add scores of mteb's tasks to each cell, computed by mteb, whose own json goes to `out`.

    If a rank has several cells, a task's vectors lie in files until all of them are scored.
    """
    tool = load_mteb()
    tasks, name = tool.tasks(names), tool.model_name(source)
    for rank in dict.fromkeys(cell["rank"] for cell in grid.cells):
        cells = [cell for cell in grid.cells if cell["rank"] == rank]
        sizes = [(cell["dim"], cell["exit"], rank) for cell in cells]
        passes = tool.Passes(encoder, sizes) if len(sizes) > 1 else None
        models = [tool.MTEBEncoder(encoder, name, *size, prompts, passes) for size in sizes]
        for task in tasks:
            for cell, model in zip(cells, models, strict=True):
                cell["scores"] |= tool.evaluate(model, [task], out, progress)
            if passes:
                passes.clear()


def load_mteb() -> Any:
    """Import `mteb_model`. ValueError if the package mteb is not installed."""
    try:
        from . import mteb_model
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise ValueError("mteb: expected the package mteb: pip install mlembed[mteb]") from None
    return mteb_model
