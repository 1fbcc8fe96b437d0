"""Texts to vectors at any width, depth and vocabulary rank: the one inference path.

python -m mlembed encode MODEL "a text" "another" [--dim 48] [--exit 2] [--rank 64]
python -m mlembed encode MODEL --input texts.txt --out vectors.npy
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data.formats import readers
from ..inference import vector_files
from ..inference.encoder import Encoder
from ..inference.vector_files import Quantiser

# ---- the command ----


def main(
    model: Annotated[str, tyro.conf.Positional],
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    input: str = "",
    column: str = "text",
    invalid: Literal["error", "replace"] = "error",
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    precision: vector_files.Precision = "float32",
    ranges: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: tuple[str, ...] = ("auto",),
    max_tokens: int = 16_384,
    compile: bool = False,
    out: str = "",
    keep_text: bool = False,
) -> None:
    """Encode texts, a file's or lines of standard input, to unit vectors, in memory that does not
    grow with their number.

    Args:
        model: run, model directory or hub id.
        texts: what to encode; else --input's, else standard input's lines.
        input: file of lines, or .jsonl or .parquet with a column of texts.
        column: of .jsonl and .parquet.
        invalid: bytes that are no UTF-8: an error, or U+FFFD in their place, counted at the end.
        dim: width; full by default.
        exit: depth; full by default.
        rank: vocabulary rank; the stored one by default.
        prompt: text before each text.
        prompt_name: one of the model's own prompts before each text.
        precision: of the vectors, as sentence-transformers quantises.
        ranges: .npy file [2, dim] for int8 and uint8, as another call wrote beside its --out.
        dtype: of the weights.
        device: auto, cpu, cuda or cuda:0 ..; several, and each has a process.
        max_tokens: in one packed batch; a CPU takes fewer.
        compile: blocks by torch.compile.
        out: new .npy, .parquet or .jsonl file; else a line of numbers a text on standard output.
        keep_text: a column of the texts too, in .parquet and .jsonl.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half written goes
    target = Path(out)
    if texts and input:
        raise ValueError("texts: expected some or --input, got both")
    if keep_text and not out:
        raise ValueError("keep-text: expected --out, got none")
    if max_tokens < 1:
        raise ValueError(f"max-tokens: expected 1 or more, got {max_tokens}")
    quantise = Quantiser(precision, None if ranges is None else vector_files.read_ranges(ranges))
    if quantise.makes_ranges and not out:
        raise ValueError(f"ranges: expected --ranges or --out for {precision}, got neither")
    if out:
        vector_files.check_new(target)
    if quantise.makes_ranges:
        vector_files.check_new(vector_files.beside(target))
    source = readers.TextReader(input or "-", column, invalid)
    source.check()
    several = len(device) > 1
    encoder = Encoder.load(model, "cpu" if several else device[0], dtype, compile and not several)
    encoder.max_tokens = max_tokens
    given = vector_files.TextBuffer(texts or source, keep_text)
    with encoder.on(device, compile) if several else nullcontext(encoder) as ready:
        parts = ready.stream(
            given,
            dim,
            exit,
            rank,
            prompt=prompt,
            prompt_name=prompt_name,
            precision=quantise,
            progress=bool(out) and sys.stderr.isatty(),
        )
        if out:
            width = dim or encoder.model.cfg.hidden_size
            print(vector_files.save(target, parts, given, quantise, width), file=sys.stderr)
        else:
            try:
                for part in parts:
                    vector_files.printed(part)
            except BrokenPipeError:  # as of `| head`: who reads no more wants no more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if source.replaced:
        print(f"no UTF-8: {source.replaced} replaced by U+FFFD", file=sys.stderr)
