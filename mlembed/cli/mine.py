"""Hard negatives for pairs: documents that a model finds near a query, but not too near.

python -m mlembed mine MODEL OUT.jsonl --data pairs.jsonl [--exit 4 --dim 256 --rescore]
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data import sources
from ..data.formats import layouts
from ..inference.encoder import Encoder
from ..inference.mining import Column, Options, gather, write


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    data: tuple[str, ...],
    options: Annotated[Options, tyro.conf.arg(name="")] = Options(),  # noqa: B008
    corpus: str = "",
    bad_rows: Literal["error", "skip"] = "error",
    device: str = "auto",
) -> None:
    """Mine hard negatives for pairs, aware of their positives.

    Args:
        model: run, checkpoint or model directory, or hub id.
        out: new .jsonl file: query, positive, negatives, and their scores.
        data: pairs, as train.py's --data takes them, mixtures too, with their prompts. Negatives
            that they have become documents; rows of `out` have the mined ones.
        corpus: file of documents (_id or doc_id, text [, title]) to look in instead of these.
        bad_rows: error, or skip.
        device: auto, cpu or cuda.
    """
    options.check()
    if out.exists():
        raise ValueError(f"out: expected a new file, got {out}, which exists")
    texts = gather(
        sources.tables_of(data, bad_rows), Column(layouts.Corpus(corpus)) if corpus else None
    )
    report = write(Encoder.load(model, device), texts, options, out, sys.stderr.isatty())
    print(f"{out}: {report}")
