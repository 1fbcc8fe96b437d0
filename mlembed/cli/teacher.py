"""Store a teacher's vectors of training text, for distillation.

mlembed teacher MODEL OUT --data bitext.parquet ..
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import Columns
from ..config.choices import BadRows, Pooling
from ..runtime.files import check_new


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    data: tuple[str, ...],
    prompt: str = "",
    dtype: Literal["fp16", "fp32"] = "fp16",
    columns: Columns = Columns(),  # noqa: B008
    header: bool = True,
    bad_rows: BadRows = "error",
    pooling: Pooling | None = None,
    device: str = "auto",
) -> None:
    """Store a teacher's vectors of training text, for `--distill.embeddings OUT`.

    Args:
        model: sentence-transformers or transformers model: run, directory or Hub id.
        out: new directory.
        data: training text, in every form that train.py's --data takes.
        prompt: text to put before each query; documents have none.
        dtype: dtype of the stored vectors.
        columns: columns by role, where their names do not say it.
        header: whether the first row of .csv and .tsv names the columns.
        bad_rows: make a malformed row an error, or skip such rows and report how many.
        pooling: last, mean, cls or pooler, of a model whose directory does not say it.
        device: auto, cpu or cuda.
    """
    check_new(out, "directory")
    import torch

    from ..data import sources
    from ..training.objective.teacher import Teacher, store

    where = "cuda" if torch.cuda.is_available() else "cpu"
    say = partial(print, file=sys.stderr)
    tables = sources.tables_of(data, bad_rows, columns, header, say)
    chosen = torch.device(where if device == "auto" else device)
    teacher = Teacher.load(model, prompt, chosen, pooling)
    if teacher.note:
        say(teacher.note)
    count = store(teacher, tables, out, dtype, {"model": model}, progress=True)
    print(
        f"{out}: {count} vectors of width {teacher.width}, by {teacher.pipeline}; "
        f"{teacher.model.encoder}"
    )
