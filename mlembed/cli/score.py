"""Score training pairs with a cross-encoder, for a student to learn from.

mlembed score MODEL OUT.jsonl --data mined.jsonl
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..config import Columns
from ..config.choices import BadRows
from ..runtime.files import check_new


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    data: tuple[str, ...],
    columns: Columns = Columns(),  # noqa: B008
    header: bool = True,
    bad_rows: BadRows = "error",
    device: str = "auto",
) -> None:
    """Score training pairs with a cross-encoder, for `--distill.scores` to learn from.

    Args:
        model: cross-encoder of one score: directory of sentence-transformers or transformers.
        out: new .jsonl file of query, pos, neg, pos_scores and neg_scores.
        data: pairs, in every form that train.py's --data takes.
        columns: columns by role, where their names do not say it.
        header: whether the first row of .csv and .tsv names the columns.
        bad_rows: make a malformed row an error, or skip such rows and report how many.
        device: auto, cpu or cuda.
    """
    check_new(out)
    from ..data import sources
    from ..inference.cross_encoder import CrossEncoder, write

    say = partial(print, file=sys.stderr)
    tables = sources.tables_of(data, bad_rows, columns, header, say)
    count = write(CrossEncoder.load(model, device), tables, out, sys.stderr.isatty())
    print(f"{out}: {count} scores of {sum(map(len, tables))} pairs")
