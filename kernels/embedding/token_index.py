"""Index of a batch's tokens: where each distinct token occurs, listed once on the host.

In text most tokens are repetitions: of 73,419 tokens of a Zipf stream some 21,600 differ. Kernels
compute a token's row once for each distinct token, or once for each part of at most PART of its
occurrences, so that tiles of parts are even. Grids are exact: the device looks nothing up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._lists import ListField, joined

PART = 16  # Occurrences of a part; tokens with more are summed in two steps.
STEP = 1024  # Tokens of several parts between two `bounds`.


@dataclass(frozen=True)
class TokenIndex:
    """Lists of a batch's tokens, for `embed(.., token_index=)`; `TokenIndex.of` makes them.

    Distinct tokens are sorted by falling number of occurrences, then by id. The first `several`
    tokens have more than PART occurrences and are cut into parts.

    tokens, distinct, lowest, highest: T, n, and the least and greatest id, on the host.
    order_T: int32 [T], where the first token occurs, in rising order, then the second, ...
    ids_P, first_P, count_P: int32 [P], each part's token, its begin in order_T and its length.
    ids_n: int32 [n], the distinct tokens.
    first_part_m, parts_m: int32 [several], the first part and the number of parts of each token.
    """

    buffer: Tensor  # int32, all lists end to end
    tokens: int
    distinct: int
    lowest: int
    highest: int
    parts: int
    several: int
    # Parts before token 0, STEP, 2 STEP, .. and after the last token of several.
    bounds: tuple[int, ...]
    order_T = ListField(0)
    ids_P, first_P, count_P = ListField(1), ListField(2), ListField(3)
    ids_n = ListField(4)
    first_part_m, parts_m = ListField(5), ListField(6)

    @staticmethod
    def of(ids: Tensor) -> "TokenIndex":
        """Return lists on the CPU for ids [T]; the host waits if they are on a device.

        Raises:
            ValueError: not int32 or int64 [T], T >= 1.
        """
        check_ids(ids)
        given = ids.detach().to("cpu", torch.int64)
        T = len(given)
        by_id, place = torch.sort(given, stable=True)
        ids_n, count_n = torch.unique_consecutive(by_id, return_counts=True)
        first_n = count_n.cumsum(0) - count_n
        rank_n = torch.argsort(count_n, descending=True, stable=True)
        ids_n, count_n, first_n = ids_n[rank_n], count_n[rank_n], first_n[rank_n]
        begin_n = count_n.cumsum(0) - count_n
        order_T = place[torch.arange(T) + _each(first_n - begin_n, count_n, T)]

        parts_n = (count_n + PART - 1) // PART
        P, several = int(parts_n.sum()), int((parts_n > 1).sum())
        part_n = parts_n.cumsum(0) - parts_n
        skipped_P = (torch.arange(P) - _each(part_n, parts_n, P)) * PART
        first_P = _each(begin_n, parts_n, P) + skipped_P
        count_P = (_each(count_n, parts_n, P) - skipped_P).clamp(max=PART)
        ids_P = _each(ids_n, parts_n, P)
        of_several = part_n[:several], parts_n[:several]
        lists = [order_T, ids_P, first_P, count_P, ids_n, *of_several]
        ends = [*part_n[:several:STEP].tolist(), int(parts_n[:several].sum())]
        lowest, highest = int(by_id[0]), int(by_id[-1])
        counts = T, len(ids_n), lowest, highest, P, several
        return TokenIndex(joined(lists), *counts, tuple(ends))

    def to(self, device: torch.device | str) -> "TokenIndex":
        """Return the index on a device, by one copy."""
        buffer = self.buffer.to(device, non_blocking=True)
        return TokenIndex(buffer, *self.counts, self.bounds)

    @property
    def counts(self) -> tuple[int, int, int, int, int, int]:
        """Numbers that the host knows, except `bounds`."""
        ends = self.lowest, self.highest
        return self.tokens, self.distinct, *ends, self.parts, self.several

    def chunks(self, rows: int) -> list[tuple[slice, slice]]:
        """Return slices of at most `rows` (or STEP) distinct tokens, and of their several parts."""
        size = max(STEP, rows // STEP * STEP)
        chunks = []
        for a in range(0, self.distinct, size):
            b = min(a + size, self.distinct)
            # Beyond the bounds there are no more tokens of several parts.
            first, last = (self.bounds[min(x // STEP, len(self.bounds) - 1)] for x in (a, b))
            if b >= self.several:
                last = self.bounds[-1]
            chunks.append((slice(a, b), slice(first, last)))
        return chunks

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of all lists."""
        T, n, P, m = self.tokens, self.distinct, self.parts, self.several
        return T, P, P, P, n, m, m


def check_ids(ids: Tensor) -> None:
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
        got = f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(f"ids: expected int32 or int64 [T], at least one, got {got}")


def _each(x: Tensor, times: Tensor, total: int) -> Tensor:
    return torch.repeat_interleave(x, times, output_size=total)
