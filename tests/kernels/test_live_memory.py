"""The tools of the tests of memory: unwritten numbers are NaN, and Live sees inside operators."""

import torch
from live_memory import Live
from torch import Tensor, library


def test_unwritten_memory_is_nan():
    """Unwritten floats of the package are NaN, those of others are as torch leaves them."""
    code = "(torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty(2, dtype=torch.int8))"
    inside = eval(code, {"torch": torch, "x": torch.ones(2), "__name__": "mlembed_kernels._x"})
    assert all(x.isnan().all() for x in inside[:3]) and inside[3].dtype == torch.int8
    given = {"requires_grad": True, "dtype": torch.float16}
    leaf = eval("torch.empty(3, **given)", {"torch": torch, "given": given, "__name__": "x"})
    assert leaf.is_leaf and leaf.requires_grad


@library.custom_op("mlembed_tests::sum_of_pairs", mutates_args=())
def sum_of_pairs(x: Tensor) -> Tensor:
    pairs = x[:, None] * x
    rows = pairs.sum(1)
    del pairs
    return rows + x


def test_memory_inside_an_operator_is_counted_while_it_lives():
    x = torch.ones(100)
    with Live() as made:
        first = sum_of_pairs(x)
        second = sum_of_pairs(x)
    pairs, rows = 4 * 100 * 100, 4 * 100
    assert made.shapes == [(100, 100), (100,), (100,)] * 2
    assert made.most() == rows + pairs + rows
    assert made.most(lambda shape: shape == (100, 100)) == pairs
    del first, second
    assert sum(size for size, _ in made.events) == 0
