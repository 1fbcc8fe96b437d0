"""Choose the parametrisations of a test: all pairs of values always, all combinations in
`make test-all`.
"""

from itertools import combinations, product
from typing import Any

import pytest


def all_pairs(*axes: Any) -> list[Any]:
    """Return every combination of one value from each axis, as parameters of a test.

    Combinations beyond a greedy cover of all pairs of values are marked slow. A fault that needs
    two particular values is met in `make test`; one that needs three, in `make test-all`.
    """
    axes = tuple(tuple(axis) for axis in axes)
    chosen = _cover([len(axis) for axis in axes])
    return [
        pytest.param(*values, marks=() if index in chosen else pytest.mark.slow)
        for index, values in enumerate(product(*axes))
    ]


def _cover(sizes: list[int]) -> set[int]:
    """Return numbers of the combinations (in the order of `product`) that together hold every pair
    of values of two axes.
    """
    rows = list(product(*map(range, sizes)))
    pairs = [set(combinations(enumerate(row), min(2, len(sizes)))) for row in rows]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
