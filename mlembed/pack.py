"""Token lists to packed batches: one flat row of tokens and the boundaries between texts.

Letters: N texts, T packed tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlembed_kernels import Work


@dataclass(frozen=True)
class PackedBatch:
    """N texts end to end, without padding.

    ids_T: int64 [T] tokens. pos_T: int64 [T] position of each token in its own text.
    work: what attention has to compute, listed on the host once for all layers.
    """

    ids_T: Tensor
    pos_T: Tensor
    work: Work

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [N + 1]; text i is ids_T[cu_seqlens[i]:cu_seqlens[i + 1]]."""
        return self.work.cu_seqlens

    def __len__(self) -> int:
        return self.work.sequences

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch(
            self.ids_T.to(device, non_blocking=True),
            self.pos_T.to(device, non_blocking=True),
            self.work.to(device),
        )


def pack(texts: Sequence[np.ndarray]) -> PackedBatch:
    """int arrays, one a text, each of at least one token -> PackedBatch.

    Raises:
        ValueError: no texts, or a text without tokens (there would be nothing to pool).
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() < 1:
        raise ValueError(
            f"texts: expected one or more, each of one or more tokens, got lengths {lengths[:20]}"
        )
    ends = lengths.cumsum()
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return PackedBatch(
        torch.from_numpy(np.concatenate(texts).astype(np.int64)),
        torch.from_numpy(positions),
        Work.of(torch.from_numpy(np.concatenate([[0], ends]))),
    )


def budgeted(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row numbers in packs of at most `max_tokens` tokens (a longer text is a pack of its own).

    Rows are sorted by length, so that texts of a pack are alike and attention wastes nothing.
    """
    order = np.argsort(lengths, kind="stable")
    packs, begin, tokens = [], 0, 0
    for at, row in enumerate(order):
        if at > begin and tokens + lengths[row] > max_tokens:
            packs.append(order[begin:at])
            begin, tokens = at, 0
        tokens += int(lengths[row])
    return [*packs, order[begin:]] if len(order) else []
