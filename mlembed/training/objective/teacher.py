"""Teacher vectors: encoded by another model during training, or stored before it.

Stored vectors are looked up by their text: keys.npy has 128 bits of each text's hash, sorted, as
two rows of uint64, and vectors.npy, memory-mapped, the vectors in the same order. If queries have a
prompt, a text has one vector as a query and another as a document.
"""

import hashlib
import itertools
import json
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...config.choices import Pooling
from ...data.tables import Table
from ...modeling import hf_config, weight_checks
from ...runtime import files, model_files, transfer
from .packed_teacher import PackedTeacher, UnsupportedError
from .sentence_teacher import SentenceTeacher

SLICE = 8192  # texts per update of the progress bar


@dataclass
class Teacher:
    """A model that encodes text for distillation: a run, a directory or a hub id.

    mlembed's trunk encodes all models that it supports (`PackedTeacher`), and sentence-transformers
    the others. prompt: text before each query. kept: fp16 vectors of texts encoded before, by
    digest of the prompted text; None keeps none. Each takes 2 bytes a coordinate and about 200.
    """

    model: PackedTeacher | SentenceTeacher
    width: int
    prompt: str
    kept: dict[bytes, bytes] | None = None

    @staticmethod
    def load(
        source: str,
        prompt: str,
        device: torch.device,
        pooling: Pooling | None = None,
        bf16: bool = False,
        compile: bool = False,
        keep: bool = False,
    ) -> "Teacher":
        """Load a run, a directory or a hub id, from safetensors and without code of its own.

        A default prompt of the model is not used, because documents have none.

        Args:
            pooling: of a directory that does not say how it is pooled.
            bf16, compile: of mlembed's trunk; sentence-transformers encodes in bf16 on CUDA alone.
            keep: keep vectors for the texts of later calls.

        Raises:
            ValueError: the model cannot be opened so, or is pooled in another way than `pooling`.
        """
        directory = _directory(source)
        model: PackedTeacher | SentenceTeacher
        try:
            model = PackedTeacher.load(directory, pooling, device, bf16, compile)
        except UnsupportedError as why:
            model = SentenceTeacher.load(directory, pooling, device, str(why))
        return Teacher(model, model.width, prompt, {} if keep else None)

    @property
    def pipeline(self) -> str:
        """The model's modules in order, with the pooling: "Transformer, Pooling (mean)"."""
        return self.model.pipeline

    @property
    def note(self) -> str:
        """The clause that tells the pooling of a directory that does not, "" of others."""
        return self.model.note

    # Not inference_mode, because losses may keep these vectors for their backward.
    @torch.no_grad()
    def encode(self, texts: Sequence[str], queries: int = 0, progress: bool = False) -> Tensor:
        """Encode texts to fp32 [N, width] on the model's device.

        Vectors are what the model's modules return, normalised only if a module normalises. The
        first `queries` texts get the prompt. Each distinct text is encoded once.
        """
        inputs = [self.prompt + text for text in texts[:queries]] + list(texts[queries:])
        place = {text: i for i, text in enumerate(dict.fromkeys(inputs))}
        distinct, device = list(place), self.model.device
        if not distinct:
            return torch.empty(0, self.width, device=device)
        with tqdm(total=len(distinct), disable=not progress, desc="teacher") as bar:
            encode = self.model.encode if self.kept is None else self._remember
            vectors = encode(distinct, bar)
        rows_N = torch.tensor([place[text] for text in inputs])
        return vectors[transfer.moved(rows_N, device)]

    def _remember(self, texts: list[str], bar: tqdm) -> Tensor:
        """Return vectors rounded to fp16, and encode only texts that have none yet.

        Vectors beyond fp16's range stay fp32 and are encoded each time.
        """
        assert self.kept is not None
        keys = [_digest(text, False) for text in texts]
        new = [row for row, key in enumerate(keys) if key not in self.kept]
        out = np.empty((len(texts), self.width), np.float32)
        if new:
            encoded = self.model.encode([texts[row] for row in new], bar).cpu().numpy()
            with np.errstate(over="ignore"):
                halves = encoded.astype(np.float16)
            beyond = set(bad_rows(halves).tolist())
            fits = ((i, row) for i, row in enumerate(new) if i not in beyond)
            self.kept.update((keys[row], halves[i].tobytes()) for i, row in fits)
            out[new] = encoded
        known = [row for row, key in enumerate(keys) if key in self.kept]
        halves = np.frombuffer(b"".join(self.kept[keys[row]] for row in known), np.float16)
        out[known] = halves.reshape(-1, self.width)
        return transfer.moved(torch.from_numpy(out), self.model.device)


def _directory(source: str) -> Path:
    """Return the directory of a model that sentence-transformers can open as data alone.

    Raises:
        ValueError: the model is not found, `model_files.check_model` rejects it, or a weight is not
            finite (`weight_checks.check_file`).
    """
    try:
        directory = hf_config.resolve(source)
        model_files.check_model(directory)
    except ValueError as error:
        raise ValueError(f"teacher: {str(error).removeprefix('model: ')}") from None
    for file in sorted(directory.rglob("*.safetensors")):
        weight_checks.check_file(file)
    return directory


# ---- stored ----


@dataclass(frozen=True)
class StoredVectors:
    """A directory of a teacher's vectors, memory-mapped.

    keys: uint64 [2, n], rising. prompted: queries have vectors of their own.
    """

    directory: str
    vectors_ND: np.ndarray
    keys: np.ndarray
    prompted: bool

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself.
        return StoredVectors.open, (self.directory,)

    @property
    def width(self) -> int:
        """Width of the vectors."""
        return self.vectors_ND.shape[1]

    @staticmethod
    def open(directory: str) -> "StoredVectors":
        """Map a directory that `mlembed teacher` wrote.

        Raises:
            ValueError: the directory was not written by it, or is damaged.
        """
        path = Path(directory)
        names = ("teacher.json", "vectors.npy", "keys.npy")
        if missing := [name for name in names if not (path / name).is_file()]:
            raise ValueError(f"teacher: expected {', '.join(missing)} in {directory}, got none")
        try:
            about = files.read_object(path / "teacher.json")
            prompted = bool(files.field(path / "teacher.json", about, "prompt", str))
            vectors = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
            keys = np.load(path / "keys.npy", mmap_mode="r", allow_pickle=False)
        # A header may nest too deep for its parser, or claim more than memory holds.
        except (ValueError, OSError, EOFError, RecursionError, MemoryError) as error:
            raise ValueError(f"teacher: cannot read {directory}: {error}") from None
        floats = vectors.dtype.str in ("<f2", "<f4", "<f8")
        right = keys.dtype == np.uint64 and vectors.ndim == 2 and floats
        if not right or keys.shape != (2, len(vectors)) or not len(vectors):
            raise ValueError(
                f"teacher: expected a vector for each key in {directory}, got {vectors.dtype} "
                f"{list(vectors.shape)} for {keys.dtype} {list(keys.shape)}"
            )
        return StoredVectors(directory, vectors, keys, prompted)

    def check(self) -> None:
        """Check all vectors, in one pass of about a second for 1 GB.

        Raises:
            ValueError: a vector, by row, is zero or not finite.
        """
        for begin in range(0, len(self.vectors_ND), SLICE):
            if (bad := bad_rows(self.vectors_ND[begin : begin + SLICE])).size:
                raise ValueError(
                    f"teacher: {self.directory}/vectors.npy: expected finite vectors that are not "
                    f"zero, got another in row {begin + bad[0]}"
                )

    def vectors(self, texts: Sequence[str], queries: int = 0) -> np.ndarray:
        """Look up fp32 [N, width]; the first `queries` texts are queries.

        Raises:
            ValueError: a text has no vector.
        """
        keys = [_key(text, self.prompted and i < queries) for i, text in enumerate(texts)]
        keys_2N = np.array(keys, dtype=np.uint64).reshape(-1, 2).T
        # The first 64 bits find the row, and all 128 confirm it.
        at = np.searchsorted(self.keys[0], keys_2N[0]).clip(max=self.keys.shape[1] - 1)
        if (lost := np.flatnonzero((self.keys[:, at] != keys_2N).any(0))).size:
            role = "query" if lost[0] < queries else "document"
            raise ValueError(
                f"teacher: expected the vector of every text, got none of the {role} "
                f"{texts[int(lost[0])][:60]!r}"
            )
        return np.asarray(self.vectors_ND[at], dtype=np.float32)


def check_vectors(texts: Sequence[str], vectors: np.ndarray) -> None:
    """Raise ValueError, with its text, for a vector that is zero or not finite."""
    if (bad := bad_rows(vectors)).size:
        raise ValueError(
            "teacher: expected finite vectors that are not zero, got another for the text "
            f"{texts[bad[0]][:60]!r}"
        )


def bad_rows(vectors: np.ndarray) -> np.ndarray:
    """Return the rows that are zero or contain NaN or infinity, of floats [N, D]: int64.

    Without their sign, the bits of floats rise with their size, and infinity and NaN come last;
    reading them is ten times as fast as np.isfinite of fp16.
    """
    unsigned = np.dtype(f"u{vectors.itemsize}")
    sign = np.array(1 << 8 * vectors.itemsize - 1, unsigned)
    largest = (vectors.view(unsigned) & ~sign).max(axis=1)
    infinity = np.array(np.inf, vectors.dtype).view(unsigned)
    return np.flatnonzero((largest == 0) | (largest >= infinity))


def _digest(text: str, query: bool) -> bytes:
    person = b"query" if query else b"document"
    content = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16, person=person).digest()


def _key(text: str, query: bool) -> tuple[int, int]:
    digest = _digest(text, query)
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def store(
    teacher: Teacher,
    tables: Sequence[Table],
    out: Path,
    dtype: Literal["fp16", "fp32"] = "fp16",
    about: dict[str, Any] | None = None,
    progress: bool = False,
) -> int:
    """Encode every distinct text of the tables, once in each role, and return their number.

    The directory `out` appears when it is complete. Memory holds some 80 bytes of each text.

    Raises:
        ValueError: `out` is not empty; vectors that are zero, not finite, or beyond fp16's range.
    """
    prompted = bool(teacher.prompt)
    halves = array("Q")
    for text, query in _roles(tables, prompted):
        halves.extend(_key(text, query))
    keys, row_of, new = _sorted(np.frombuffer(halves, dtype=np.uint64).reshape(-1, 2))
    kind = np.float16 if dtype == "fp16" else np.float32
    count = keys.shape[1]
    with files.atomic_directory(out) as partial:
        files.save_array(partial / "keys.npy", keys)
        path = partial / "vectors.npy"
        vectors = np.lib.format.open_memmap(path, "w+", dtype=kind, shape=(count, teacher.width))
        with path.open("r+b") as file:
            files.reserve(file, path.stat().st_size)
        each = zip(_roles(tables, prompted), row_of, new, strict=True)
        distinct = ((query, row, text) for (text, query), row, is_new in each if is_new)
        with tqdm(total=count, disable=not progress, desc="teacher", file=sys.stderr) as bar:
            while some := list(itertools.islice(distinct, SLICE)):
                # Queries come first.
                some.sort(reverse=True)
                roles, rows, texts = zip(*some, strict=True)
                encoded = teacher.encode(texts, queries=sum(roles)).cpu().numpy()
                check_vectors(texts, encoded)
                with np.errstate(over="ignore"):
                    cast = encoded.astype(kind)
                if bad_rows(cast).size:
                    raise ValueError("dtype: expected fp32 for vectors beyond fp16's range")
                vectors[list(rows)] = cast
                bar.update(len(some))
        vectors.flush()
        content = {
            **(about or {}),
            "pipeline": teacher.pipeline,
            "prompt": teacher.prompt,
            "dtype": dtype,
            "width": teacher.width,
            "count": count,
        }
        files.write_text(partial / "teacher.json", json.dumps(content, indent=2) + "\n")
    return count


def _sorted(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort uint64 [n, 2] -> distinct pairs, rising, [2, distinct]; the place of each of n among
    them; whether it is the first of its kind.
    """
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    rising = pairs[order]
    first = np.ones(len(pairs), dtype=bool)
    first[1:] = (rising[1:] != rising[:-1]).any(1)
    row_of, new = np.empty(len(pairs), dtype=np.int64), np.empty(len(pairs), dtype=bool)
    row_of[order], new[order] = first.cumsum() - 1, first
    return np.ascontiguousarray(rising[first].T), row_of, new


def _roles(tables: Sequence[Table], prompted: bool) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether as a query), twice for texts that may be drawn as either."""
    for table in tables:
        query = np.zeros(len(table.texts), dtype=bool)
        query[table.starts[:-1]] = prompted and not table.either
        for text, first in zip(table.texts, query.tolist(), strict=True):
            if prompted and table.either:
                yield text, True
            yield text, first
