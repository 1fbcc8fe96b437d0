"""Work lists of attention over one packed batch, made once on the host.

A tile holds as many neighbouring short sequences as fit, and one program computes it whole. Longer
sequences are cut into tiles, each with its sequence's bounds. So grids are exact, kernels look
nothing up on the device, and a prefix of the batch has lists of its own, which launch nothing for
the other sequences. Kernels differ in the tiles that suit them; fp32 takes the smallest.
"""

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from .._lists import ListField, joined, list_of

PACKS = 16, 64  # Tokens of a tile of whole sequences; longer sequences are not packed.
TILES = {16: 16, 64: 64, 128: 64}  # Tokens of a tile -> sequences with more tokens than this.
LONG = 512  # Sequences of more tokens have kernels of their own.


@dataclass(frozen=True)
class AttentionPlan:
    """Work lists of a packed batch, for `attention(.., plan=)`; `AttentionPlan.of` makes them.

    tokens, sequences, max_seqlen: T, N and the longest sequence, on the host.
    cu_seqlens: int32 [N + 1]. begin_T, end_T: int32 [T], the bounds of each token's sequence.
    packs(size): int32 [P, 2], first token and number of tokens of each tile of whole sequences.
    tiles(size): int32 [n, 3], first token of each tile of a longer sequence, and the sequence's
    bounds: longest sequences first, each from its end, where causal attention has most to do.
    tiles(size, long): those of sequences of more than 512 tokens, or of the others.
    """

    buffer: Tensor  # int32, all lists end to end
    tokens: int
    sequences: int
    max_seqlen: int
    # Tiles in each list of packs, in each list of tiles, and those of long sequences among them.
    counts: tuple[int, ...]
    cu_seqlens = ListField(0)
    begin_T = ListField(1)
    end_T = ListField(2)

    @staticmethod
    def of(cu_seqlens: Tensor) -> "AttentionPlan":
        """Return lists on the CPU for cu_seqlens [N + 1]; the host waits if that is on a device.

        In a batch ordered by exit depth, deepest first, the lists of the n sequences that are alive
        are `AttentionPlan.of(cu_seqlens[:n + 1])`.

        Raises:
            ValueError: not integers in one row, not from 0, not rising (an empty sequence).
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or not cu_seqlens.numel():
            got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens: expected integers [N + 1], got {got}")
        cu = cu_seqlens.detach().to("cpu", torch.int64)
        lengths = cu.diff()
        if cu[0] != 0 or (lengths < 1).any():
            wrong = 0 if cu[0] != 0 else int((lengths < 1).nonzero()[0])
            raise ValueError(
                "cu_seqlens: expected 0 = first, rising (no sequence is empty), got "
                f"{cu[wrong : wrong + 2].tolist()} at {wrong}"
            )
        begin, end = cu[:-1], cu[1:]
        lists = [_packs(cu, lengths > size, size) for size in PACKS]
        for size, most in TILES.items():
            long = lengths > most
            lists.append(_tiles(begin[long], end[long], size))
        counts = [len(x) for x in lists]
        counts += [int((x[:, 2] - x[:, 1] > LONG).sum()) for x in lists[len(PACKS) :]]
        bounds_T = [torch.repeat_interleave(x, lengths) for x in (begin, end)]
        return AttentionPlan(
            joined([cu, *bounds_T, *(x.reshape(-1) for x in lists)]),
            int(cu[-1]),
            len(lengths),
            int(lengths.max()) if len(lengths) else 0,
            tuple(counts),
        )

    def to(self, device: torch.device) -> "AttentionPlan":
        """Return the plan on a device, by one copy."""
        buffer = self.buffer.to(device, non_blocking=True)
        return AttentionPlan(buffer, self.tokens, self.sequences, self.max_seqlen, self.counts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of all lists."""
        P, both = len(PACKS), len(PACKS) + len(TILES)
        tiles = [2 * n for n in self.counts[:P]] + [3 * n for n in self.counts[P:both]]
        return self.sequences + 1, self.tokens, self.tokens, *tiles

    def packs(self, size: int) -> Tensor:
        return list_of(self.buffer, self.sizes, 3 + PACKS.index(size)).view(-1, 2)

    def tiles(self, size: int, long: bool | None = None) -> Tensor:
        i = len(PACKS) + list(TILES).index(size)
        tiles, count = (
            list_of(self.buffer, self.sizes, 3 + i).view(-1, 3),
            self.counts[len(TILES) + i],
        )
        return tiles if long is None else tiles[:count] if long else tiles[count:]

    def alive_T(self, active: Tensor) -> Tensor:
        """bool [T] on the device: whether a token's sequence is `active`, as in `attention`."""
        cu = self.cu_seqlens
        if active.dtype == torch.bool:
            lengths = cu.diff()
            return torch.repeat_interleave(active, lengths, output_size=self.tokens)
        count = active.reshape(1).clamp(0, self.sequences)
        return torch.arange(self.tokens, device=cu.device) < cu.index_select(0, count)


def _packs(cu: Tensor, long: Tensor, size: int) -> Tensor:
    """Return int64 [P, 2]: neighbours that are not `long`, up to `size` tokens."""
    bounds = cu.tolist()
    # A run of short sequences ends at the next long one.
    stops = [*long.nonzero()[:, 0].tolist(), len(long)]
    froms, untils, i = [], [], 0
    for stop in stops:
        while i < stop:
            froms.append(i)
            i = min(bisect_right(bounds, bounds[i] + size, i) - 1, stop)
            untils.append(i)
        i = stop + 1
    first, last = (cu[torch.tensor(x, dtype=torch.int64)] for x in (froms, untils))
    return torch.stack([first, last - first], 1)


def _tiles(begin: Tensor, end: Tensor, size: int) -> Tensor:
    """Return int64 [n, 3]: longest sequences first, each from its end."""
    order = (begin - end).argsort(stable=True)
    begin, end = begin[order], end[order]
    counts = (end - begin + size - 1) // size
    which = torch.repeat_interleave(counts)
    back = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    first = begin[which] + (counts[which] - 1 - back) * size
    return torch.stack([first, begin[which], end[which]], 1)
