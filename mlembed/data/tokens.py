"""Tables to tokens: each text once, to files that later runs and other processes map.

The key of what is kept is a digest of the tokenizer, the length, the prompts and the text itself,
so that what is found is what would be computed. Tables of few texts are tokenised in memory.
"""

import hashlib
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
from .tables import Table
from .tokenizer import tokenize

VERSION = 1  # of what is kept
FEW = 4096  # texts up to which a table's tokens are not kept


@dataclass(frozen=True)
class Tokens:
    """Text i is flat[offsets[i]:offsets[i + 1]], its last token EOS."""

    flat: np.ndarray  # int32 [all tokens], memory-mapped where the table is large
    offsets: np.ndarray  # int64 [texts + 1]
    truncated: int  # texts that were longer than max_length

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.flat, np.memmap) and self.flat.filename:
            return _open, (Path(self.flat.filename).parent,)  # another process maps the files
        return Tokens, (self.flat, self.offsets, self.truncated)


def tokenised(
    table: Table, tokenizer: Tokenizer, max_length: int, progress: bool = False
) -> Tokens:
    """All texts of a table as tokens, prompts included.

    The first text of an item of pairs comes after `source.prompt`, its others after
    `source.document_prompt`. A text longer than `max_length` tokens, prompt and special ones
    included, is cut at its end; the special tokens that close it, EOS, stay.

    Args:
        progress: show a bar where it takes longer than two seconds.

    Raises:
        ValueError: an n-way table, whose texts are queries and documents alike, with two prompts.
    """
    source = table.source
    if table.nway and source.prompt != source.document_prompt:
        raise ValueError(
            f"source {table.name}: prompt: expected that of documents, {source.document_prompt!r}, "
            f"as each text of an n-way table is drawn as either, got {source.prompt!r}"
        )
    # A copy: the caller's keeps its truncation, and the key does not depend on it.
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    if len(table.texts) <= FEW:
        parts, lengths, truncated = [], array("q"), 0
        for ids_of_chunk, cut in _chunks(table, own, max_length, progress):
            parts += ids_of_chunk
            lengths.extend(map(len, ids_of_chunk))
            truncated += cut
        flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return Tokens(flat, _offsets(lengths), truncated)

    def build(directory: Path) -> None:
        with (directory / "flat.bin").open("wb") as file:
            lengths, truncated = _write(file, _chunks(table, own, max_length, progress))
        np.save(directory / "offsets.npy", _offsets(lengths))
        about = json.dumps({"truncated": truncated}) + "\n"
        (directory / "about.json").write_text(about, encoding="utf-8")

    return cache.cached("tokens", _key(table, own, max_length), build, _open)


def _write(file: BinaryIO, chunks: Iterator[tuple[list[np.ndarray], int]]) -> tuple[array, int]:
    """Tokens to a file -> (length of each text, how many were cut)."""
    lengths, truncated = array("q"), 0
    for ids_of_chunk, cut in chunks:
        file.write(np.concatenate(ids_of_chunk).tobytes())
        lengths.extend(map(len, ids_of_chunk))
        truncated += cut
    return lengths, truncated


def _offsets(lengths: array) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))]).astype(np.int64)


def _open(directory: Path) -> Tokens:
    truncated = json.loads((directory / "about.json").read_text(encoding="utf-8"))["truncated"]
    offsets = np.load(directory / "offsets.npy", mmap_mode="r")
    flat = np.memmap(directory / "flat.bin", dtype=np.int32, mode="r")
    return Tokens(flat, offsets, truncated)


def _prompts(table: Table) -> np.ndarray | None:
    """Which texts come after `source.prompt` -> bool [texts]; None where all prompts are one."""
    if table.source.prompt == table.source.document_prompt:
        return None
    first = np.zeros(len(table.texts), dtype=bool)
    first[table.starts[:-1]] = True
    return first


def _key(table: Table, tokenizer: Tokenizer, max_length: int) -> str:
    """Digest of the tokenizer (without truncation and padding), the length, and each text with
    what comes before it."""
    source, first = table.source, _prompts(table)
    notes = [VERSION, tokenizer.to_str(), max_length, source.prompt, source.document_prompt]
    total = hashlib.sha256(json.dumps(notes).encode())
    if first is not None:
        total.update(np.packbits(first).tobytes())
    for begin in range(0, len(table.texts), cache.CHUNK):
        texts = [text.encode() for text in table.texts[begin : begin + cache.CHUNK]]
        total.update(np.array([len(text) for text in texts], dtype=np.int64).tobytes())
        total.update(b"".join(texts))
    return total.hexdigest()


def _chunks(
    table: Table, tokenizer: Tokenizer, max_length: int, progress: bool
) -> Iterator[tuple[list[np.ndarray], int]]:
    """(ids of each text, how many of them were cut), some thousand texts at a time.

    One token more than there may be tells a text that is cut from one that just fits.
    """
    # How many special tokens close a text: they stay where it is cut.
    mask = tokenizer.encode("a").special_tokens_mask
    closing = (mask[::-1] + [0]).index(0)
    source, first = table.source, _prompts(table)
    texts = len(table.texts)
    with tqdm(total=texts, desc=f"tokens {table.name}", disable=not progress, delay=2) as bar:
        for begin in range(0, texts, cache.CHUNK):
            some = list(table.texts[begin : begin + cache.CHUNK])
            query = np.zeros(len(some), bool) if first is None else first[begin : begin + len(some)]
            given = [
                (source.prompt if is_query else source.document_prompt) + text
                for text, is_query in zip(some, query.tolist(), strict=True)
            ]
            ids = tokenize(tokenizer, given, max_length + 1)
            long = [i for i, one in enumerate(ids) if len(one) > max_length]
            for i in long:
                kept = max_length - closing
                ids[i] = np.concatenate([ids[i][:kept], ids[i][len(ids[i]) - closing :]])
            yield ids, len(long)
            bar.update(len(some))
