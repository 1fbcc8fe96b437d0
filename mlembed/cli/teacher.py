"""A teacher's vectors: of another model, with its own tokenizer, as they are needed or stored.

python -m mlembed teacher MODEL OUT --data bitext.parquet ..
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ..data import sources
from ..training.objective.teacher import Teacher, store


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    data: tuple[str, ...],
    prompt: str = "",
    dtype: Literal["fp16", "fp32"] = "fp16",
    batch_tokens: int = 16_384,
    bad_rows: Literal["error", "skip"] = "error",
    device: str = "auto",
) -> None:
    """Store a teacher's vectors of training text, for `--distill.embeddings OUT`.

    Args:
        model: sentence-transformers or transformers model: run, directory or hub id.
        out: new directory.
        data: what train.py's --data takes, mixtures too.
        prompt: before each query; documents have none.
        dtype: of the stored vectors.
        batch_tokens: encoded at once, padding included.
        bad_rows: error, or skip.
        device: auto, cpu or cuda.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new directory, got {out}, which exists")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    tables = sources.tables_of(data, bad_rows)
    chosen = torch.device(where if device == "auto" else device)
    teacher = Teacher.load(model, prompt, batch_tokens, chosen)
    count = store(teacher, tables, out, dtype, {"model": model}, progress=True)
    print(f"{out}: {count} vectors of width {teacher.width}, by {teacher.pipeline}")
