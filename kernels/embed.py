"""Nested low-rank token embedding (Matryoshka Embedding Learning, ML-Embed, arXiv 2605.15081).

    E(r) = U[:, :r] W[:r, :]   in R^{V x D},      x_t = E(r)[ids_t] = U[ids_t, :r] W[:r]

Gathering first costs 2 T r D FLOPs and T (r + D) elements; building the table, as the public
ML-Embed code does, costs 2 V r D and V D. Ranks nest: the first r columns of U with the first r
rows of W are themselves an embedding. A rank above V D / (V + D) holds more than the plain table.
"""

import torch.nn.functional as F
from torch import Tensor

IMPLS = ("auto", "reference")


def embed_ref(ids: Tensor, U: Tensor, W: Tensor, rank: int) -> Tensor:
    """The specification. Arguments as in `embed`."""
    return F.embedding(ids, U[:, :rank]) @ W[:rank]


def embed(ids: Tensor, U: Tensor, W: Tensor, rank: int, impl: str = "auto") -> Tensor:
    """Embed tokens at a nested rank -> [T, D], dtype of U.

    Args:
        ids: int [T], each in 0..V-1. U: [V, R]. W: [R, D].
        rank: columns of U and rows of W in use, 1..R.
        impl: "reference"; "auto" is the same until a kernel beats it.

    Raises:
        ValueError: rank outside 1..R, U and W that do not fit, an unknown `impl`.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if U.ndim != 2 or W.ndim != 2 or U.shape[1] != W.shape[0]:
        raise ValueError(f"U, W: expected [V, R] and [R, D], got {list(U.shape)}, {list(W.shape)}")
    if not 1 <= rank <= U.shape[1]:
        raise ValueError(f"rank: expected 1..{U.shape[1]} (the stored rank), got {rank}")
    return embed_ref(ids, U, W, rank)
