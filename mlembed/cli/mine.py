"""Mine hard negatives for pairs: documents near a query, but not too near.

mlembed mine MODEL OUT.jsonl --data pairs.jsonl [--exit 4 --dim 256 --rescore]
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..config import Columns
from ..config.choices import BadRows, Pooling
from ..config.mining import Options
from ..runtime.files import check_new


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    data: tuple[str, ...],
    options: Annotated[Options, tyro.conf.arg(name="")] = Options(),  # noqa: B008
    corpus: str = "",
    columns: Columns = Columns(),  # noqa: B008
    header: bool = True,
    bad_rows: BadRows = "error",
    pooling: Pooling | None = None,
    cross_encoder: str = "",
    device: str = "auto",
) -> None:
    """Mine hard negatives for pairs, aware of their positives.

    Args:
        model: run, checkpoint, model directory or Hub id.
        out: new .jsonl file of query, positive, negatives and their scores.
        data: pairs, in every form that train.py's --data takes. Their negatives become documents;
            the rows of `out` have the mined negatives.
        corpus: file of documents (_id or doc_id, text [, title]) to search instead.
        columns: columns of the pairs by role, where their names do not say it.
        header: whether the first row of .csv and .tsv names the columns.
        bad_rows: make a malformed row an error, or skip such rows and report how many.
        pooling: last, mean, cls or pooler, of a model whose directory does not say it.
        cross_encoder: cross-encoder of one score, a directory or Hub id, to score candidates and
            positives again: --max-score and the margins are then of the sigmoid of its scores.
        device: auto, cpu or cuda.
    """
    options.check()
    if cross_encoder and options.rescore:
        raise ValueError("rescore: expected it without --cross-encoder, which decides alone")
    check_new(out)
    from ..data import sources
    from ..data.formats import layouts
    from ..inference.cross_encoder import CrossEncoder
    from ..inference.encoder import Encoder
    from ..inference.mining import Column, gather, write

    say = partial(print, file=sys.stderr)
    tables = sources.tables_of(data, bad_rows, columns, header, say)
    texts = gather(tables, Column(layouts.Corpus(corpus)) if corpus else None)
    encoder = Encoder.load(model, device, pooling=pooling, say=say)
    cross = CrossEncoder.load(cross_encoder, device) if cross_encoder else None
    report = write(encoder, texts, options, out, sys.stderr.isatty(), cross)
    print(f"{out}: {report}")
