"""Encode texts to vectors at any width, depth and vocabulary rank.

mlembed encode MODEL "a text" "another" [--dim 48] [--exit 2] [--rank 64]
mlembed encode MODEL --input texts.txt --out vectors.npy
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..config.choices import Dtype, Invalid, Pooling, Precision
from ..config.strict import check_number
from ..runtime.errors import printable
from ..runtime.files import check_new


def main(
    model: Annotated[str, tyro.conf.Positional],
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    input: str = "",
    column: str = "",
    invalid: Invalid = "error",
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
    pooling: Pooling | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    precision: Precision = "float32",
    ranges: Path | None = None,
    dtype: Dtype = "float32",
    device: tuple[str, ...] = ("auto",),
    max_tokens: int = 16_384,
    compile: bool = False,
    out: str = "",
) -> None:
    """Encode texts to unit vectors. Memory does not grow with the number of texts.

    Args:
        model: run, model directory or Hub id.
        texts: texts to encode; without them those of --input, or the lines of standard input.
        input: file of lines, or .jsonl, .json, .csv, .tsv or .parquet with a column of texts.
        column: column of texts in a table; by default text, after title if there is one.
        invalid: make invalid UTF-8 an error, or replace it by U+FFFD and report how many.
        dim: width; full by default.
        exit: depth; full by default.
        rank: vocabulary rank; the stored rank by default.
        pooling: last, mean, cls or pooler, of a model whose directory does not say it.
        prompt: text to put before each text.
        prompt_name: name of a prompt of the model to put before each text.
        precision: number format of the vectors, quantised like sentence-transformers does.
        ranges: .npy file [2, dim] for int8 and uint8, which another call wrote next to its --out;
            by default that of the model, if its export has one.
        dtype: dtype of the weights.
        device: auto, cpu, cuda or cuda:0 ..; each of several devices gets a process.
        max_tokens: tokens of a packed batch; a CPU takes fewer.
        compile: compile blocks with torch.compile.
        out: new .npy or .parquet file; without it vectors are printed, one a line.
    """
    target = Path(out)
    if texts and input:
        raise ValueError("texts: expected some or --input, got both")
    if not device:
        raise ValueError("device: expected one or more, got none")
    check_number("max-tokens", max_tokens, least=1, below=2**31)
    from ..inference import vector_files

    if precision in ("int8", "uint8") and ranges is None:
        ranges = vector_files.model_ranges(model, (dim, exit, rank))
        if ranges is not None:
            print(f"ranges: {ranges}", file=sys.stderr)
    makes_ranges = precision in ("int8", "uint8") and ranges is None
    if makes_ranges and not out:
        raise ValueError(f"ranges: expected --ranges or --out for {precision}, got neither")
    if out:
        if target.suffix.lower() not in (".npy", ".parquet"):
            raise ValueError(f"out: expected a name that ends in .npy or .parquet, got {out}")
        check_new(target)
    from ..data.formats.text_reader import TextReader
    from ..inference.encoder import Encoder

    if makes_ranges:
        check_new(vector_files.beside(target))
    stored = None if ranges is None else vector_files.read_ranges(ranges)
    quantise = vector_files.Quantiser(precision, stored)
    source = TextReader(input or "-", column, invalid)
    if understood := source.check():
        print(printable(f"{input}: {understood}"), file=sys.stderr)
    several = len(device) > 1
    where, alone = "cpu" if several else device[0], compile and not several
    say = partial(print, file=sys.stderr)
    encoder = Encoder.load(model, where, dtype, alone, pooling, say)
    encoder.max_tokens = max_tokens
    with encoder.on(device, compile) if several else nullcontext(encoder) as ready:
        parts = ready.stream(
            texts or source,
            dim,
            exit,
            rank,
            prompt=prompt,
            prompt_name=prompt_name,
            precision=quantise,
            progress=bool(out) and sys.stderr.isatty(),
        )
        if out:
            width = encoder.full_size((dim, None, None))[0]
            print(vector_files.save(target, parts, quantise, width), file=sys.stderr)
        else:
            for part in parts:
                vector_files.print_vectors(part)
    if source.replaced:
        print(f"invalid UTF-8: {source.replaced} bytes replaced by U+FFFD", file=sys.stderr)
