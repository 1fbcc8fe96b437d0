"""Tokenise tables, each text once, into files that later runs and other processes map.

The key of an entry digests the tokenizer, the length, the prompts and the texts. Tables of few
texts are tokenised in memory.
"""

import io
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from ..runtime import cache
from ..runtime.errors import printable
from ..runtime.files import read_json, save_array
from . import tables
from .tables import Table
from .tokenizer import tokenize

VERSION = 1  # of the files
FEW = 4096  # texts of a table up to which its tokens are not stored


@dataclass(frozen=True)
class Tokens:
    """Text i is flat[offsets[i]:offsets[i + 1]], its last token EOS.

    flat: int32 [all tokens], memory-mapped if the table is large. offsets: int64 [texts + 1].
    truncated: number of texts that were longer than the maximum length.
    """

    flat: np.ndarray
    offsets: np.ndarray
    truncated: int

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.flat, np.memmap) and self.flat.filename:
            # Another process maps the files itself.
            return _open, (Path(self.flat.filename).parent,)
        return Tokens, (self.flat, self.offsets, self.truncated)


def tokenise(table: Table, tokenizer: Tokenizer, max_length: int, progress: bool = False) -> Tokens:
    """Tokenise all texts of a table, prompts included.

    The first text of a pair comes after `source.prompt`, its other texts after
    `source.document_prompt`. A text longer than `max_length` tokens, prompt and special tokens
    included, is cut at its end; the special tokens that close it, EOS, stay.

    Args:
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: two prompts for a table each of whose texts may be query or document.
    """
    check_prompts(table)
    # The caller's tokenizer keeps its truncation, and the key does not depend on it.
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if len(table.texts) <= FEW:
        memory = io.BytesIO()
        offsets, truncated = _write(memory, _chunks(table, tokenizer, max_length, progress))
        return Tokens(np.frombuffer(memory.getvalue(), dtype=np.int32), offsets, truncated)

    def build(directory: Path) -> None:
        with (directory / "flat.bin").open("wb") as file:
            offsets, truncated = _write(file, _chunks(table, tokenizer, max_length, progress))
        save_array(directory / "offsets.npy", offsets)
        about = json.dumps({"truncated": truncated}) + "\n"
        (directory / "about.json").write_text(about, encoding="utf-8")

    key = _key(table, tokenizer, max_length)
    return cache.cached("tokens", key, build, _open, f"{table.source.path}: {table.name}")


def check_prompts(table: Table) -> None:
    """Raise ValueError for two prompts of a table each of whose texts may be query or document."""
    source = table.source
    if table.either and source.prompt != source.document_prompt:
        raise ValueError(
            f"source {table.name}: prompt: expected that of documents, {source.document_prompt!r}, "
            f"as each text of it may be drawn as either, got {source.prompt!r}"
        )


def _write(
    file: BinaryIO, chunks: Iterator[tuple[list[np.ndarray], int]]
) -> tuple[np.ndarray, int]:
    """Write tokens to a file and return their offsets and the number of cut texts."""
    lengths, truncated = array("q", [0]), 0
    for ids, cut in chunks:
        file.write(np.concatenate(ids).tobytes())
        lengths.extend(map(len, ids))
        truncated += cut
    return np.cumsum(np.array(lengths)), truncated


def _open(directory: Path) -> Tokens:
    truncated = read_json(directory / "about.json")["truncated"]
    offsets = np.load(directory / "offsets.npy", mmap_mode="r")
    flat = np.memmap(directory / "flat.bin", dtype=np.int32, mode="r")
    return Tokens(flat, offsets, truncated)


def _queries(table: Table) -> np.ndarray | None:
    """Return which texts come after `source.prompt`, bool [texts], None if there is one prompt."""
    if table.source.prompt == table.source.document_prompt:
        return None
    first = np.zeros(len(table.texts), dtype=bool)
    first[table.starts[:-1]] = True
    return first


def _key(table: Table, tokenizer: Tokenizer, max_length: int) -> str:
    source, queries = table.source, _queries(table)
    notes = [VERSION, tokenizer.to_str(), max_length, source.prompt, source.document_prompt]
    arrays = [] if queries is None else [np.packbits(queries)]
    return cache.digest(*notes, table.texts_sha256, arrays=arrays)


def _chunks(
    table: Table, tokenizer: Tokenizer, max_length: int, progress: bool
) -> Iterator[tuple[list[np.ndarray], int]]:
    """Yield (ids of each text, number of cut texts), `tables.CHUNK` texts at a time.

    A text is encoded up to one token more than the maximum, which tells a cut text from a text that
    just fits.
    """
    # The special tokens that close a text stay when it is cut.
    mask = tokenizer.encode("a").special_tokens_mask
    closing = (mask[::-1] + [0]).index(0)
    source, queries = table.source, _queries(table)
    total = len(table.texts)
    with tqdm(
        total=total, desc=printable(f"tokens {table.name}"), disable=not progress, delay=2
    ) as bar:
        for begin in range(0, total, tables.CHUNK):
            chunk = list(table.texts[begin : begin + tables.CHUNK])
            prompts = [source.document_prompt] * len(chunk)
            if queries is not None:
                for i in np.flatnonzero(queries[begin : begin + len(chunk)]).tolist():
                    prompts[i] = source.prompt
            texts = [prompt + text for prompt, text in zip(prompts, chunk, strict=True)]
            ids = tokenize(tokenizer, texts, max_length + 1)
            long = [i for i, one in enumerate(ids) if len(one) > max_length]
            for i in long:
                end = ids[i][len(ids[i]) - closing :]
                ids[i] = np.concatenate([ids[i][: max_length - closing], end])
            yield ids, len(long)
            bar.update(len(chunk))
