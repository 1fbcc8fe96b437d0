"""Where each distinct token of a batch occurs, listed once on the host.

In text most tokens are repetitions: of 73,419 tokens of a Zipf stream some 21,600 differ. What a
token's row costs is then paid once for each distinct token, or for each part of at most PART of its
occurrences, so that tiles of parts are even. Grids are exact: nothing is asked on the device.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

PART = 16  # occurrences: more are parts of their own, and summed in two steps
STEP = 1024  # tokens of several parts between two `bounds`
ALIGN = 16  # ints: each list begins where Triton sees a pointer divisible by 16 bytes


@dataclass(frozen=True)
class TokenIndex:
    """Lists of a batch's tokens, for `embed(.., token_index=)`. Made by `TokenIndex.of`.

    Distinct tokens stand in falling order of their number of occurrences, equal ones by id. The
    first `several` of them have more than PART and are cut into parts.

    tokens, distinct, lowest, highest: T, n, and the least and greatest id, on the host.
    order_T: int32 [T], where the first token occurs, in rising order, then the second, ...
    ids_P, first_P, count_P: int32 [P], of each part its token, its begin in order_T, its length.
    ids_n: int32 [n]. first_part_m, parts_m: int32 [several], of each its parts.
    """

    buffer: Tensor  # int32, all lists end to end
    tokens: int
    distinct: int
    lowest: int
    highest: int
    parts: int
    several: int
    bounds: tuple[int, ...]  # parts before token 0, STEP, 2 STEP, .. and after the last of several

    @staticmethod
    def of(ids: Tensor) -> "TokenIndex":
        """ids [T] -> lists on the CPU. Ids that lie on a device are waited for.

        Raises:
            ValueError: not int32 or int64 [T], or none.
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
        padded = [torch.nn.functional.pad(x, (0, -len(x) % ALIGN)) for x in lists]
        return TokenIndex(
            torch.cat(padded).to(torch.int32),
            T,
            len(ids_n),
            int(by_id[0]),
            int(by_id[-1]),
            P,
            several,
            tuple(ends),
        )

    def to(self, device: torch.device | str) -> "TokenIndex":
        """One copy."""
        buffer = self.buffer.to(device, non_blocking=True)
        return TokenIndex(buffer, *self.counts, self.bounds)

    @property
    def counts(self) -> tuple[int, int, int, int, int, int]:
        """What is known on the host, but for `bounds`."""
        return (
            self.tokens, self.distinct, self.lowest, self.highest, self.parts, self.several
        )  # fmt: skip

    def chunks(self, rows: int) -> list[tuple[slice, slice]]:
        """At most `rows` (or STEP) distinct tokens at a time, and the parts of those of several."""
        size = max(STEP, rows // STEP * STEP)
        found = []
        for a in range(0, self.distinct, size):
            b = min(a + size, self.distinct)
            # Where a bound is not known the tokens of several parts are at their end.
            first, last = (self.bounds[min(x // STEP, len(self.bounds) - 1)] for x in (a, b))
            if b >= self.several:
                last = self.bounds[-1]
            found.append((slice(a, b), slice(first, last)))
        return found

    def _list(self, i: int) -> Tensor:
        # Of a compiled graph's symbols there is nothing to remember.
        places = _places if torch.compiler.is_compiling() else _remembered
        first, last = places(self.tokens, self.distinct, self.parts, self.several)[i]
        return self.buffer[first:last]

    @property
    def order_T(self) -> Tensor:
        return self._list(0)

    @property
    def ids_P(self) -> Tensor:
        return self._list(1)

    @property
    def first_P(self) -> Tensor:
        return self._list(2)

    @property
    def count_P(self) -> Tensor:
        return self._list(3)

    @property
    def ids_n(self) -> Tensor:
        return self._list(4)

    @property
    def first_part_m(self) -> Tensor:
        return self._list(5)

    @property
    def parts_m(self) -> Tensor:
        return self._list(6)


def check_ids(ids: Tensor) -> None:
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
        raise ValueError(
            f"ids: expected int32 or int64 [T], at least one, got {ids.dtype} {list(ids.shape)}"
        )


def _each(x: Tensor, times: Tensor, total: int) -> Tensor:
    return torch.repeat_interleave(x, times, output_size=total)


def _places(tokens: int, distinct: int, parts: int, several: int) -> list[tuple[int, int]]:
    """Where in the buffer each list begins and ends."""
    found, first = [], 0
    for size in (tokens, parts, parts, parts, distinct, several, several):
        found.append((first, first + size))
        first += size + -size % ALIGN
    return found


_remembered = lru_cache(maxsize=64)(_places)
