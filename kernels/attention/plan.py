"""What attention over one packed batch has to compute, listed once on the host.

Short sequences are packed: as many neighbours as fit a tile, which one program computes whole.
Longer ones are cut into tiles, each with its sequence's bounds. So grids are exact, and a batch's
prefix has lists of its own: nothing is asked on the device, and nothing is launched for sequences
that are not in the list. Kernels differ in the tiles that suit them; fp32 takes the smallest.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

PACKS = 16, 64  # tokens that a tile of whole sequences holds: what is longer is not packed
TILES = {16: 16, 64: 64, 128: 64}  # tokens of a tile: of sequences of more than so many
ALIGN = 16  # ints: each list begins where Triton sees a pointer divisible by 16 bytes


@dataclass(frozen=True)
class AttentionPlan:
    """Work lists of a packed batch, for `attention(.., plan=)`. Made by `AttentionPlan.of`.

    tokens, sequences, max_seqlen: T, N and the longest sequence, on the host.
    cu_seqlens: int32 [N + 1]. begin_T: int32 [T], the first token of each token's sequence.
    packs(size): int32 [P, 2], first token and number of tokens of each tile of whole sequences.
    tiles(size): int32 [n, 3], first token of each tile of a longer sequence, and the sequence's
    bounds: longest sequences first, each from its end, where causal attention has most to do.
    """

    buffer: Tensor  # int32, all lists end to end
    tokens: int
    sequences: int
    max_seqlen: int
    counts: tuple[int, ...]  # of tiles in each list of packs, of tiles

    @staticmethod
    def of(cu_seqlens: Tensor) -> "AttentionPlan":
        """cu_seqlens [N + 1] -> lists on the CPU. One that lies on a device is waited for.

        A batch ordered by exit depth, deepest first: the lists of the n sequences that are alive
        are `AttentionPlan.of(cu_seqlens[:n + 1])`.

        Raises:
            ValueError: not integers in one row, not from 0, not rising (an empty sequence).
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or not cu_seqlens.numel():
            raise ValueError(
                "cu_seqlens: expected integers [N + 1], got "
                f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
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
        begin_T = torch.repeat_interleave(begin, lengths)
        parts = [cu, begin_T, *(x.reshape(-1) for x in lists)]
        padded = [torch.nn.functional.pad(x, (0, -len(x) % ALIGN)) for x in parts]
        return AttentionPlan(
            torch.cat(padded).to(torch.int32),
            int(cu[-1]),
            len(lengths),
            int(lengths.max()) if len(lengths) else 0,
            tuple(len(x) for x in lists),
        )

    def to(self, device: torch.device) -> "AttentionPlan":
        """One copy."""
        buffer = self.buffer.to(device, non_blocking=True)
        return AttentionPlan(buffer, self.tokens, self.sequences, self.max_seqlen, self.counts)

    def _list(self, i: int) -> Tensor:
        # Asked for in every layer. Of a compiled graph's symbols there is nothing to remember.
        places = _places if torch.compiler.is_compiling() else _remembered
        first, last = places(self.tokens, self.sequences, self.counts)[i]
        return self.buffer[first:last]

    @property
    def cu_seqlens(self) -> Tensor:
        return self._list(0)

    @property
    def begin_T(self) -> Tensor:
        return self._list(1)

    def packs(self, size: int) -> Tensor:
        return self._list(2 + PACKS.index(size)).view(-1, 2)

    def tiles(self, size: int) -> Tensor:
        return self._list(2 + len(PACKS) + list(TILES).index(size)).view(-1, 3)

    def alive_T(self, active: Tensor) -> Tensor:
        """bool [T] on the device: tokens of active sequences. Arguments as in `attention`."""
        cu = self.cu_seqlens
        if active.dtype == torch.bool:
            lengths = cu.diff()
            return torch.repeat_interleave(active, lengths, output_size=self.tokens)
        count = active.reshape(1).clamp(0, self.sequences)
        return torch.arange(self.tokens, device=cu.device) < cu.index_select(0, count)


def _places(tokens: int, sequences: int, counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where in the buffer each list begins and ends."""
    sizes = [sequences + 1, tokens]
    sizes += [2 * count for count in counts[: len(PACKS)]]
    sizes += [3 * count for count in counts[len(PACKS) :]]
    found, first = [], 0
    for size in sizes:
        found.append((first, first + size))
        first += size + -size % ALIGN
    return found


_remembered = lru_cache(maxsize=64)(_places)


def _packs(cu: Tensor, long: Tensor, size: int) -> Tensor:
    """int64 [P, 2]: neighbours that are not `long`, as many as fit `size` tokens."""
    bounds = cu.tolist()
    # Where the run of short sequences that begins at i ends: at the next long one.
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
    """int64 [n, 3]: longest sequences first, each from its end."""
    order = (begin - end).argsort(stable=True)
    begin, end = begin[order], end[order]
    counts = (end - begin + size - 1) // size
    which = torch.repeat_interleave(counts)
    back = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    first = begin[which] + (counts[which] - 1 - back) * size
    return torch.stack([first, begin[which], end[which]], 1)
