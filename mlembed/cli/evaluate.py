"""Score a model over widths, depths and vocabulary ranks.

mlembed evaluate MODEL [--data DIR_OR_FILE ..] [--mteb TASK ..] [--out report]
"""

import functools
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..config.choices import BadRows, Dtype, Pooling, Stored
from ..config.strict import check_number
from ..runtime.errors import printable
from ..runtime.files import atomic_directory, check_new

if TYPE_CHECKING:
    from ..data.eval_tasks import Task


def main(
    model: Annotated[str, tyro.conf.Positional],
    /,
    data: tuple[str, ...] = (),
    mteb: tuple[str, ...] = (),
    dim: tuple[int, ...] = (),
    exit: tuple[int, ...] = (),
    rank: tuple[int, ...] = (),
    pooling: Pooling | None = None,
    funnel: str = "",
    shortlist: int = 100,
    graph: str = "",
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    precision: tuple[Stored, ...] = (),
    bad_rows: BadRows = "error",
    out: str = "",
    dtype: Dtype = "float32",
    device: str = "auto",
) -> None:
    """Score a model over width x depth x vocabulary rank.

    The exit status is 1 if vectors were not of length one, so that a task has no score.

    Args:
        model: run, checkpoint, model directory or Hub id.
        data: cldr (the default without --mteb), directories in the format of Tatoeba, BEIR, BUCC or
            UN, n-way tables (id, lang, text), STS csv files.
        mteb: names of tasks of the package mteb, which writes its own json to OUT/mteb.
        dim: widths; by default those of training, with --mteb the full width.
        exit: depths, likewise.
        rank: vocabulary ranks, likewise.
        pooling: last, mean, cls or pooler, of a model whose directory does not say it.
        funnel: DIM:EXIT:RANK of the small vectors that make a shortlist, which full vectors rank
            again, for retrieval tasks; a part that is left empty is the largest.
        shortlist: documents of a query that the funnel ranks again.
        graph: ONNX file in the directory of an exported model, like onnx/model_quantized.onnx, to
            score as well and to compare with the weights at each width.
        query_prompt: text to put before queries of retrieval, instead of the model's `query`.
        document_prompt: text to put before documents, instead of the model's `document`.
        precision: int8, binary or both, to score --data with vectors stored in bytes or bits as
            well; grid.json then has the ranges of int8.
        bad_rows: make a malformed row of --data an error, or skip such rows and say how many.
        out: new directory for grid.json and grid.png.
        dtype: dtype of the weights, in which the model is scored and measured.
        device: auto, cpu or cuda.
    """
    check_number("shortlist", shortlist, least=10, below=2**31)
    if graph and mteb:
        raise ValueError("graph: expected --data, got --mteb")
    if precision and mteb:
        raise ValueError("precision: expected --data, got --mteb")
    if graph and not (Path(model) / graph).is_file():
        raise ValueError(f"graph: expected a file in {model}, got {graph}")
    if out:
        check_new(Path(out), "directory")
    from ..data.eval_tasks import Retrieval
    from ..evaluation import tables
    from ..evaluation.grid import add_mteb, score_funnel, score_graph, score_grid
    from ..inference.encoder import Encoder
    from ..inference.search import size_of
    from ..runtime import log

    small = size_of(funnel) if funnel else None
    tasks = _tasks(data, mteb, bool(small), bad_rows)
    say = functools.partial(print, file=sys.stderr)
    encoder = Encoder.load(model, device, dtype, pooling=pooling, say=say)
    cfg = encoder.model.cfg
    if mteb:
        dim, exit, rank = (
            dim or encoder.full_size()[:1],
            exit or (cfg.num_hidden_layers,),
            rank or cfg.ranks[-1:],
        )
    prompts = dict(encoder.prompts)
    for name, given in (("query", query_prompt), ("document", document_prompt)):
        if given is not None:
            prompts[name] = given
    progress = sys.stderr.isatty()
    with atomic_directory(Path(out)) if out else nullcontext() as partial:
        grid = score_grid(
            encoder, tasks, dim, exit, rank, progress, prompts=prompts, precisions=precision
        )
        if mteb:
            where = partial / "mteb" if partial else None
            add_mteb(encoder, model, mteb, grid, prompts, where, progress)
        full, size = grid.cells[-1]["scores"], tables.size_name(encoder, grid.cells[-1])
        parts = [grid.table(), tables.by_kind(full, {}, size), tables.details(full, size)]
        parts.append(tables.prices(grid))
        extra: dict[str, Any] = {
            "commit": log.commit(),
            "model": model,
            "data": [*(data or [task.name for task in tasks]), *mteb],
            "device": log.device_name(encoder.model.device),
            "dtype": dtype,
        }
        if small:
            extra["funnel"] = {"small": small, "shortlist": shortlist} | {
                task.name: score_funnel(
                    encoder, task, small, shortlist, prompts, progress, grid.cells
                )
                for task in tasks
                if isinstance(task, Retrieval)
            }
            parts.append(tables.funnels(extra["funnel"]))
        if graph:
            scored = score_graph(encoder, Path(model) / graph, tasks, grid, prompts, progress)
            extra["graph"] = {"file": graph, **scored}
            parts.append(tables.graph(extra["graph"], grid))
        print(printable("\n\n".join(part for part in parts if part)))
        if partial:
            tables.write_report(partial, grid, extra)
    grid.check()


def _tasks(
    data: Sequence[str], mteb: Sequence[str], funnel: bool, bad_rows: BadRows
) -> "list[Task]":
    """Read the tasks of --data. ValueError for combinations that cannot be scored."""
    from ..data.eval_sets import read_all
    from ..data.eval_tasks import Retrieval
    from ..evaluation.grid import load_mteb

    tasks = read_all(data or (() if mteb else ("cldr",)), bad_rows)
    if shared := {task.name for task in tasks} & set(mteb):
        raise ValueError(f"mteb: expected names that differ from --data, got {', '.join(shared)}")
    if funnel and not any(isinstance(task, Retrieval) for task in tasks):
        raise ValueError("funnel: expected retrieval among --data, got none")
    if mteb:
        load_mteb().tasks(mteb)
    return tasks
