"""Several int32 lists in one buffer, which one copy takes to a device."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ALIGN = 16  # ints: Triton sees that 16 bytes divide the address of each list.


def joined(lists: Sequence[Tensor]) -> Tensor:
    """Return int32 lists end to end, padded to multiples of ALIGN."""
    padded = [torch.nn.functional.pad(x, (0, -len(x) % ALIGN)) for x in lists]
    return torch.cat(padded).to(torch.int32)


class ListField:
    """The i-th list of an object with a `buffer` and the `sizes` of its lists."""

    def __init__(self, i: int) -> None:
        self.i = i

    def __get__(self, owner: Any, kind: type) -> Tensor:
        return list_of(owner.buffer, owner.sizes, self.i)


def list_of(buffer: Tensor, sizes: tuple[int, ...], i: int) -> Tensor:
    """Return the i-th of the lists of these sizes."""
    # Sizes are symbols in a compiled graph, and a cache would keep them.
    find = _places if torch.compiler.is_compiling() else _cached_places
    first, last = find(sizes)[i]
    return buffer[first:last]


def _places(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    places, first = [], 0
    for size in sizes:
        places.append((first, first + size))
        first += size + -size % ALIGN
    return places


_cached_places = lru_cache(maxsize=64)(_places)
