"""The pairs of rows and columns that count in a log-sum-exp."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PairMask(NamedTuple):
    """The pairs (i, j) of R rows and S columns that count; `pairwise_lse` explains each part.

    Custom operators take tensors only: their callers unpack it, `*mask`, and they pack it again.
    """

    positive: Tensor | None = None  # int [R]
    row_keys: Tensor | None = None  # int64 [keys, R]
    col_keys: Tensor | None = None  # int64 [keys, S]
    ceiling: Tensor | None = None  # [E, R]
    row_counts: Tensor | None = None  # int [E]
    col_counts: Tensor | None = None  # int [E]

    @staticmethod
    def of(
        row_keys: Sequence[Tensor] = (),
        col_keys: Sequence[Tensor] = (),
        ceiling: Tensor | None = None,
        **rest: Tensor | None,
    ) -> "PairMask":
        """Return the mask that the arguments of `pairwise_lse` describe."""
        if len(row_keys) != len(col_keys):
            raise ValueError(
                "row_keys, col_keys: expected as many of one as of the other, "
                f"got {len(row_keys)} and {len(col_keys)}"
            )
        rows, cols = (torch.stack(list(x)).long() if x else None for x in (row_keys, col_keys))
        ceiling = None if ceiling is None else ceiling.detach()
        return PairMask(row_keys=rows, col_keys=cols, ceiling=ceiling, **rest)


def present(counts: Tensor | None, E: int, n: int, device: torch.device) -> Tensor:
    """bool [E, n]: whether a text is present at exit e; the first counts[e] are, None: all."""
    if counts is None:
        return torch.ones(E, n, dtype=torch.bool, device=device)
    return torch.arange(n, device=device) < counts[:, None]
