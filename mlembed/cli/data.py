"""Read training data without training: what each column is taken for, counts, lengths, examples.

mlembed data FILE_OR_DIR .. [--tokenizer DIR] [--json]
"""

import json as json_lines
import sys
from collections.abc import Callable
from typing import Annotated

import tyro

from ..config import Columns, Run
from ..config.choices import BadRows
from ..runtime.errors import printable


def main(
    data: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    columns: Columns = Columns(),  # noqa: B008
    header: bool = True,
    eval: tuple[str, ...] = (),
    tokenizer: str = "",
    init: str = "",
    bad_rows: BadRows = "error",
    json: bool = False,
) -> None:
    """Print what training would understand of its data. Exit status 1 if it would refuse any.

    Args:
        data: sources, in every form that train.py's --data takes.
        columns: columns by role, where their names do not say it.
        header: whether the first row of .csv and .tsv names the columns.
        eval: evaluation, whose texts training leaves out.
        tokenizer: directory or Hub id of a tokenizer; lengths are in tokens then.
        init: checkpoint whose tokenizer to take instead.
        bad_rows: make a malformed row an error, or skip such rows and list the first ones.
        json: print one JSON object a source.
    """
    from ..data import sources, summary
    from ..data.eval_sets import read_all
    from ..data.formats.readers import normalise

    length: Callable[[str], int] = len
    if tokenizer or init:
        from ..data import tokenizer as tokenizers
        from ..modeling.hf_config import resolve

        tokens = tokenizers.load(resolve(init or tokenizer, "init" if init else "tokenizer"))
        longest = tokenizers.LONGEST_TEXT
        length = lambda text: len(tokens.encode(text[:longest]).ids)  # noqa: E731
    run = sources.expand(Run(data=data, columns=columns, header=header, eval=eval))
    held_out = frozenset(
        normalise(text) for task in read_all(eval, bad_rows) for text in task.texts
    )
    names, refused = list[str](), 0
    for one in summary.summaries(run, held_out, bad_rows, length):
        if not one.error and one.name in names:
            one.error = f"expected sources of different names, got several {one.name}"
        names.append(one.name)
        refused += bool(one.error)
        if json:
            print(printable(json_lines.dumps(one.to_dict(), ensure_ascii=False)))
        else:
            print(printable(one.text("tokens" if tokenizer or init else "characters")))
    if refused:
        print(f"{refused} of {len(names)} sources refused", file=sys.stderr)
        sys.exit(1)
