"""Search in two steps: a shortlist by small vectors, ranked again by full ones.

The small ones are a prefix, a shallow exit, a lower vocabulary rank, or all of these, of the same
model (adaptive retrieval: Kusupati et al., arXiv 2205.13147). The index holds and scans small
vectors only; full ones are stored beside it, or documents are encoded at full size when they are
first shortlisted.

Letters: Q queries, N documents, K results, D the small width, F the full one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import Encoder

CHUNK = 16_384  # documents encoded at once

Size = tuple[int | None, int | None, int | None]  # dim, exit, rank; None is the largest
Whole = tuple[int, int, int | None]  # a plain table has no rank
FULL: Size = (None, None, None)


def size_of(text: str) -> Size:
    """DIM[:EXIT[:RANK]], a place left empty being the largest. ValueError for anything else."""
    parts = text.split(":")
    if len(parts) > 3 or not all(part.isdecimal() or not part for part in parts):
        raise ValueError(f"funnel: expected DIM:EXIT:RANK, as 48:2:64 or 48::, got {text!r}")
    dim, exit, rank = [*(int(part) if part else None for part in parts), None, None][:3]
    return dim, exit, rank


@dataclass(frozen=True)
class Found:
    """The K nearest documents of each query, and what it took.

    rows_QK: int64, falling by score; there are no more than documents. scores_QK: fp32, cosines at
    full size.
    scanned: bytes of vectors compared with a query, as a share of those of a full search.
    encoded: documents that have been encoded at full size so far, as a share of all.
    """

    rows_QK: np.ndarray
    scores_QK: np.ndarray
    scanned: float
    encoded: float


@dataclass
class Funnel:
    """Documents to be searched in two steps.

    full_NF: fp32 vectors of full size, of all documents or of those that were shortlisted so far.
    place_N: int64, each document's row in it, or -1.
    """

    encoder: Encoder
    documents: Sequence[str]
    small: Whole
    full: Whole
    index: Any
    full_NF: np.ndarray
    place_N: np.ndarray
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
        """Encode documents in chunks: at both sizes, in one pass where their rank is one, or, not
        `stored`, at the small size only.

        Args:
            small, full: (dim, exit, rank).
            prompts: `query` and `document` go before these; the encoder's own by default.

        Raises:
            ValueError: no documents, a size that the model lacks.
        """
        if not documents:
            raise ValueError("funnel: expected documents, got none")
        sizes = whole(encoder, small), whole(encoder, full)
        prompts = encoder.prompts if prompts is None else prompts
        index = faiss.IndexFlatIP(sizes[0][0])
        N = len(documents)
        full_NF = np.empty((N if stored else 0, sizes[1][0]), dtype=np.float32)
        place_N = np.arange(N) if stored else np.full(N, -1)
        for begin in range(0, N, CHUNK):
            some = documents[begin : begin + CHUNK]
            before = prompts.get("document", "")
            vectors = _encoded(encoder, some, sizes[: 1 + stored], before, progress)
            index.add(vectors[0])
            if stored:
                full_NF[begin : begin + len(some)] = vectors[1]
        return Funnel(encoder, documents, *sizes, index, full_NF, place_N, prompts)

    def search(
        self, queries: Sequence[str], k: int = 10, shortlist: int = 100, progress: bool = False
    ) -> Found:
        """The k nearest by full vectors among the `shortlist` nearest by small ones.

        Raises:
            ValueError: k or shortlist below 1, or k above the shortlist.
        """
        if not 1 <= k <= shortlist:
            raise ValueError(f"shortlist: expected at least k = {k}, k at least 1, got {shortlist}")
        N, before = len(self.documents), self.prompts.get("query", "")
        sizes = [self.small, self.full]
        small_QD, full_QF = _encoded(self.encoder, queries, sizes, before, progress)
        listed = self.index.search(small_QD, min(shortlist, N))[1]
        self._want(np.unique(listed), progress)
        scores = np.empty(listed.shape, dtype=np.float32)
        for query, rows in enumerate(listed):
            scores[query] = self.full_NF[self.place_N[rows]] @ full_QF[query]
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        small, full = small_QD.shape[1], full_QF.shape[1]
        return Found(
            np.take_along_axis(listed, order, axis=1),
            np.take_along_axis(scores, order, axis=1),
            (N * small + listed.shape[1] * full) / (N * full),
            float((self.place_N >= 0).mean()),
        )

    def _want(self, rows: np.ndarray, progress: bool) -> None:
        """See to it that these documents' full vectors are there."""
        new = rows[self.place_N[rows] < 0]
        if not len(new):
            return
        texts = [self.documents[row] for row in new.tolist()]
        before = self.prompts.get("document", "")
        (vectors,) = _encoded(self.encoder, texts, [self.full], before, progress)
        self.place_N[new] = len(self.full_NF) + np.arange(len(new))
        self.full_NF = np.concatenate([self.full_NF, vectors])


def funnel(
    encoder: Encoder,
    queries: Sequence[str],
    documents: Sequence[str],
    small: Size,
    full: Size = FULL,
    *,
    k: int = 10,
    shortlist: int = 100,
    stored: bool = True,
) -> Found:
    """One search of documents that are not searched again. Raises as `Funnel` does."""
    built = Funnel.build(encoder, documents, small, full, stored=stored)
    return built.search(queries, k, shortlist)


def whole(encoder: Encoder, size: Size) -> Whole:
    """With every None made the largest that there is. ValueError for what the model lacks."""
    cfg = encoder.model.cfg
    cfg.check(*size)
    dim, exit, rank = size
    stored = cfg.ranks[-1] if cfg.ranks else None
    return dim or cfg.hidden_size, exit or cfg.num_hidden_layers, rank or stored


def _encoded(
    encoder: Encoder, texts: Sequence[str], sizes: Sequence[Whole], prompt: str, progress: bool
) -> list[np.ndarray]:
    """Unit vectors at each size, fp32 [N, dim]; sizes of one rank in one pass."""
    found: dict[Whole, np.ndarray] = {}
    for rank in {size[2] for size in sizes}:
        of_rank = [size for size in sizes if size[2] == rank]
        exits = sorted({exit for _, exit, _ in of_rank})
        raw_END = encoder.exits(texts, exits, rank, progress, prompt)
        for dim, exit, _ in of_rank:
            unit = F.normalize(raw_END[exits.index(exit), :, :dim], dim=-1)
            found[dim, exit, rank] = unit.numpy()
    return [found[size] for size in sizes]


BLOCK = 2**26  # scores at once: 256 MiB
NEIGHBOURS = 4  # k of margins, in LASER and BUCC's evaluations


# ---- bitext ----


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a [n, D] the row of b [m, D] of the highest product, and the reverse; of
    equal ones the first. In blocks, so that n m may be any number."""
    step = max(1, BLOCK // max(1, len(b)))
    if len(a) <= step:
        products = a @ b.T
        return products.argmax(1), products.argmax(0)
    there, back = [], torch.zeros(len(b), dtype=torch.int64, device=b.device)
    best = torch.full((len(b),), -torch.inf, dtype=b.dtype, device=b.device)
    for begin in range(0, len(a), step):
        products = a[begin : begin + step] @ b.T
        there.append(products.argmax(1))
        high, row = products.max(0)
        better = high > best
        best[better], back[better] = high[better], row[better] + begin
    return torch.cat(there), back


# ---- mining ----


def neighbours(a: np.ndarray, b: np.ndarray, k: int = NEIGHBOURS) -> tuple[np.ndarray, np.ndarray]:
    """Cosines, falling, and rows of the k nearest of unit rows b for each of a: [n, k] each."""
    index = faiss.IndexFlatIP(b.shape[1])
    index.add(np.ascontiguousarray(b, dtype=np.float32))
    cosines, rows = index.search(np.ascontiguousarray(a, dtype=np.float32), min(k, len(b)))
    return cosines, rows


# ---- search ----


def not_finite(vectors: Tensor) -> int:
    """Rows in which something is NaN or infinite."""
    return int((~torch.isfinite(vectors).all(-1)).sum())


class Nearest:
    """The k nearest documents of each query among those seen so far: memory does not grow with
    their number.

    scores: fp32 [Q, <= k]. rows: int64 [Q, <= k], in the order in which documents came, or -1.
    not_finite: vectors of documents, and of queries, that are no numbers.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k, self.not_finite = k, 0
        self.scores = torch.empty(queries, 0)
        self.rows = torch.empty(queries, 0, dtype=torch.int64)

    def add(self, unit_QD: Tensor, unit_CD: Tensor, first: int) -> None:
        """Documents first, first + 1, ..; both of unit rows, on one device."""
        self.not_finite += not_finite(unit_CD) + (0 if first else not_finite(unit_QD))
        step = max(1, BLOCK // max(1, len(unit_CD)))
        scores, rows = [], []
        for begin in range(0, len(unit_QD), step):
            some = slice(begin, begin + step)
            high, row = (unit_QD[some] @ unit_CD.T).topk(min(self.k, len(unit_CD)))
            both = torch.cat([self.scores[some], high.cpu()], dim=1)
            places = torch.cat([self.rows[some], row.cpu() + first], dim=1)
            kept, at = both.topk(min(self.k, both.shape[1]))
            scores.append(kept)
            rows.append(places.gather(1, at))
        self.scores, self.rows = torch.cat(scores), torch.cat(rows)
