"""Search for exact nearest neighbours, by full vectors or in two stages.

Of equal scores the lower row comes first, also where the last of the k nearest is decided.

Letters: Q queries, N documents, C documents of a chunk, K results, D the small width, F the full
one.
"""

import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .codes import FLOAT, Coder
from .encoder import FULL, Encoder, FullSize, Size
from .vector_files import UNIT, check_unit

CHUNK = 16_384  # Documents that are encoded or compared at once.
BLOCK = 2**24  # Scores that are held at once: 64 MiB.


def not_unit(vectors: Tensor) -> int:
    """Count the rows that are not of length one: NaN, infinite or zero vectors."""
    return int((~((vectors.norm(dim=-1) - 1).abs() < UNIT)).sum())


class Nearest:
    """The k nearest documents of each query among those added so far, on the CPU.

    Memory does not grow with the number of documents.

    scores: [Q, <= k], falling. rows: int64 [Q, <= k], documents numbered in the order of adding.
    not_unit: vectors of queries and documents that are not of length one. coder: makes the codes
    that are compared; the vectors themselves by default.
    """

    def __init__(self, queries: int, k: int, coder: Coder | None = None) -> None:
        self.k, self.count, self.not_unit = k, 0, 0
        self.coder = coder or Coder()
        self.scores = torch.empty(queries, 0)
        self.rows = torch.empty(queries, 0, dtype=torch.int64)

    def add(self, unit_QD: Tensor, unit_CD: Tensor) -> None:
        """Compare all queries with the next documents; both are unit rows on one device."""
        self.not_unit += not_unit(unit_CD) + (0 if self.count else not_unit(unit_QD))
        if self.coder.precision != FLOAT:
            if self.not_unit:
                return
            self.coder.fit(unit_QD, unit_CD)
            unit_QD, unit_CD = self.coder(unit_QD), self.coder(unit_CD)
        width = min(self.k, self.scores.shape[1] + len(unit_CD))
        scores = torch.empty(len(unit_QD), width, dtype=unit_QD.dtype)
        rows = torch.empty(len(unit_QD), width, dtype=torch.int64)
        step = max(1, BLOCK // max(1, len(unit_CD)))
        for begin in range(0, len(unit_QD), step):
            some = slice(begin, begin + step)
            new_scores, new_rows = _top(unit_QD[some] @ unit_CD.T, self.k)
            both = torch.cat([self.scores[some], new_scores.cpu()], dim=1)
            both_rows = torch.cat([self.rows[some], new_rows.cpu() + self.count], dim=1)
            scores[some], columns = _top(both, self.k)
            rows[some] = both_rows.gather(1, columns)
        self.scores, self.rows, self.count = scores, rows, self.count + len(unit_CD)


def nearest(unit_QD: Tensor, unit_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return scores, falling, and rows of the k nearest documents of each query, [Q, <= k]."""
    found = Nearest(len(unit_QD), k)
    for documents in unit_ND.split(CHUNK):
        found.add(unit_QD, documents)
    return found.scores, found.rows


def rank_again(scores: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Return the places [.., <= k] of the k highest scores; of equal ones the lower row first."""
    return np.lexsort((rows, -scores), axis=-1)[..., :k]


def _top(scores_QC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest scores of each row, falling, and their columns, lower ones first."""
    k = min(k, scores_QC.shape[1])
    more = min(k + 1, scores_QC.shape[1])
    scores, columns = scores_QC.topk(more)
    if more > k:
        # topk chooses any of equal scores: choose again where it had a choice.
        for row in (scores[:, k - 1] == scores[:, k]).nonzero()[:, 0].tolist():
            equal = (scores_QC[row] >= scores[row, k]).nonzero()[:, 0]
            order = scores_QC[row, equal].argsort(descending=True, stable=True)
            columns[row, :k] = equal[order[:k]]
    columns = columns[:, :k].sort(dim=1)[0]
    scores, order = scores_QC.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return scores, columns.gather(1, order)


# ---- vectors on demand ----


class LazyVectors:
    """Unit vectors of documents, each encoded when it is first needed, in a sparse file.

    vectors_ND: fp32. encoded_N: which rows of it are there.
    """

    def __init__(
        self,
        encode: Callable[[np.ndarray], np.ndarray],
        count: int,
        width: int,
        directory: Path | None = None,
    ) -> None:
        """Args:
        encode: function of rows, int64 [n], to their unit vectors.
        directory: place of the file; the system's for temporary files by default.
        """
        self.encode = encode
        self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.file.truncate(4 * count * width)
        self.vectors_ND = np.memmap(self.file, np.float32, "r+", shape=(count, width))
        self.encoded_N = np.zeros(count, dtype=bool)

    def ensure_encoded(self, rows: np.ndarray) -> None:
        """Encode those of the rows that are not encoded yet."""
        new = np.unique(rows)
        new = new[~self.encoded_N[new]]
        for begin in range(0, len(new), CHUNK):
            some = new[begin : begin + CHUNK]
            self.store(some, self.encode(some))

    def store(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Write vectors of rows.

        Raises:
            OSError: the disk is full; the mapping would raise SIGBUS.
            ValueError: a vector is not of length one.
        """
        for row, vector in zip(rows.tolist(), check_unit(vectors, rows), strict=True):
            self.file.seek(vector.nbytes * row)
            self.file.write(np.ascontiguousarray(vector, np.float32).data)
        self.file.flush()
        self.encoded_N[rows] = True


# ---- two stages ----


def size_of(text: str) -> Size:
    """Parse DIM[:EXIT[:RANK]]; an empty part is the largest. ValueError for anything else."""
    parts = text.split(":")
    if len(parts) > 3 or not all(part.isdecimal() or not part for part in parts):
        raise ValueError(f"funnel: expected DIM:EXIT:RANK, as 48:2:64 or 48::, got {text!r}")
    dim, exit, rank = [*(int(part) if part else None for part in parts), None, None][:3]
    return dim, exit, rank


@dataclass(frozen=True)
class FunnelResult:
    """The K nearest documents of each query, and what the search cost.

    rows_QK: int64, falling by score. scores_QK: fp32, cosines at full size.
    scanned: bytes of vectors compared with a query, as a share of those of a full search.
    encoded: documents encoded at full size so far, as a share of all.
    """

    rows_QK: np.ndarray
    scores_QK: np.ndarray
    scanned: float
    encoded: float


@dataclass
class Funnel:
    """Adaptive retrieval (arXiv 2205.13147): small vectors make a shortlist, full ones rank it.

    The small vectors are a prefix, a shallow exit, a lower vocabulary rank, or all of these, of the
    same model. Only they are scanned. Full vectors are stored as well, or documents are encoded at
    full size when they are first shortlisted.

    small_ND: unit vectors of all documents at the small size. full: those at full size.
    """

    encoder: Encoder
    sizes: tuple[FullSize, FullSize]
    small_ND: Tensor
    full: LazyVectors
    prompts: dict[str, str]

    @staticmethod
    def build(
        encoder: Encoder,
        documents: Sequence[str],
        small: Size,
        full: Size = FULL,
        *,
        stored: bool = True,
        prompts: dict[str, str] | None = None,
        progress: bool = False,
    ) -> "Funnel":
        """Encode documents at the small size and, if `stored`, at full size.

        Args:
            small, full: (dim, exit, rank). One pass makes both sizes of one rank.
            prompts: `query` and `document`, to put before these; the encoder's own by default.

        Raises:
            ValueError: no documents, a size that the model lacks, a vector not of length one.
        """
        if not documents:
            raise ValueError("funnel: expected documents, got none")
        sizes = encoder.full_size(small), encoder.full_size(full)
        prompts = encoder.prompts if prompts is None else prompts
        before = prompts.get("document")

        def encode(rows: np.ndarray) -> np.ndarray:
            texts = [documents[row] for row in rows.tolist()]
            return encoder.encode_grid(texts, sizes[1:], progress, before)[sizes[1]].numpy()

        lazy = LazyVectors(encode, len(documents), sizes[1][0])
        small_ND = torch.empty(len(documents), sizes[0][0])
        for begin in range(0, len(documents), CHUNK):
            rows = slice(begin, begin + CHUNK)
            vectors = encoder.encode_grid(documents[rows], sizes[: 1 + stored], progress, before)
            numbers = np.arange(len(documents))[rows]
            small_ND[rows] = torch.from_numpy(check_unit(vectors[sizes[0]].numpy(), numbers))
            if stored:
                lazy.store(numbers, vectors[sizes[1]].numpy())
        return Funnel(encoder, sizes, small_ND, lazy, prompts)

    def search(
        self, queries: Sequence[str], k: int = 10, shortlist: int = 100, progress: bool = False
    ) -> FunnelResult:
        """Return the k nearest by full vectors among the `shortlist` nearest by small ones.

        Raises:
            ValueError: k or shortlist below 1, k above the shortlist, a vector not of length one.
        """
        if not 1 <= k <= shortlist:
            raise ValueError(f"shortlist: expected at least k = {k}, k at least 1, got {shortlist}")
        before = self.prompts.get("query")
        vectors = self.encoder.encode_grid(queries, self.sizes, progress, before)
        small_QD, full_QF = (vectors[size] for size in self.sizes)
        for unit in (small_QD, full_QF):
            check_unit(unit.numpy())
        listed_QK = nearest(small_QD, self.small_ND, shortlist)[1].numpy()
        self.full.ensure_encoded(listed_QK)
        scores_QK = np.empty(listed_QK.shape, dtype=np.float32)
        for query, (rows, vector) in enumerate(zip(listed_QK, full_QF.numpy(), strict=True)):
            scores_QK[query] = self.full.vectors_ND[rows] @ vector
        order = rank_again(scores_QK, listed_QK, k)
        small, full, N = small_QD.shape[1], full_QF.shape[1], len(self.small_ND)
        return FunnelResult(
            np.take_along_axis(listed_QK, order, axis=1),
            np.take_along_axis(scores_QK, order, axis=1),
            (N * small + listed_QK.shape[1] * full) / (N * full),
            float(self.full.encoded_N.mean()),
        )
