"""fp16 gradients: of a scaled loss, whose slopes are divided by the largest before rounding; of
short prefixes; and of several prefixes and tiles.
"""

import loss_truth
import pytest
import torch
from loss_truth import DEVICE, vectors
from loss_truth import check as check_against_truth
from torch import Tensor

from mlembed_kernels.similarity.distill import distill
from mlembed_kernels.similarity.pairwise_lse import pairwise_lse

pytest.importorskip("triton")

ROWS, COLUMNS, DIMS = 5, 40, (8, 144)
SMALL = 2.0**-17  # 7.6e-6: a slope of 1e-2 times it has three bits left in fp16
NORMAL = torch.finfo(torch.float16).smallest_normal


def short_vectors() -> tuple[Tensor, Tensor]:
    """Vectors of a length of about 1e-3, whose gradients are no smaller than fp16 holds."""
    vectors_of = ((ROWS, 1), (COLUMNS, 2))
    x, y = (vectors(1, n, DIMS[-1], seed=seed) * 2.0**-10 for n, seed in vectors_of)
    return x.half().to(DEVICE), y.half().to(DEVICE)


def assert_scales(gradients) -> None:
    """gradients: loss scale -> gradients. By a power of two all bits are the same."""
    for whole, small in zip(gradients(1.0), gradients(SMALL), strict=True):
        whole, small = whole.float(), small.float()
        normal = small.abs() >= NORMAL
        assert normal.sum() > 100, "expected gradients in fp16's range to compare"
        assert torch.equal(small[normal], whole[normal] * SMALL)


@pytest.mark.parametrize("columns", [False, True])
def test_gradients_scale_with_the_loss(columns):
    scale = torch.tensor([[20.0, 13.0]], device=DEVICE)
    given = {"dims": DIMS, "scale": scale, "columns": columns, "impl": "triton"}

    def gradients(loss_scale: float) -> tuple[Tensor, ...]:
        leaves = tuple(x.requires_grad_() for x in short_vectors())
        parts = [part for part in pairwise_lse(*leaves, **given) if part is not None]
        slopes = [torch.linspace(0.5, 1, part.numel()).view_as(part).to(DEVICE) for part in parts]
        return torch.autograd.grad(parts, leaves, [slope * loss_scale for slope in slopes])

    assert_scales(gradients)


def test_gradients_against_a_teacher_scale_with_the_loss():
    teachers = (vectors(1, n, 24, seed=n)[0].half().to(DEVICE) for n in (ROWS, COLUMNS))
    teacher_q, teacher_c = teachers

    def gradients(loss_scale: float) -> tuple[Tensor, ...]:
        leaves = tuple(x.requires_grad_() for x in short_vectors())
        loss_EM = distill(*leaves, teacher_q, teacher_c, dims=DIMS, kind="mse", impl="triton")
        # A mean over all pairs has smaller gradients than a sum over rows.
        return torch.autograd.grad(loss_EM.sum() * 64 * loss_scale, leaves)

    assert_scales(gradients)


def inputs(R: int, S: int, dims: tuple[int, ...], exits: int = 1) -> dict:
    """Vectors of length 300, the positives of most rows, and both directions."""
    given = {"dims": dims, "positive": torch.arange(R) - 1, "columns": True}
    for name, n, seed in (("x", R, 1), ("y", S, 2)):
        unit = torch.nn.functional.normalize(vectors(exits, n, dims[-1], seed=seed), dim=-1)
        given[name] = unit * 300
    given["scale"] = torch.linspace(10, 20, exits * len(dims), dtype=torch.float64)
    given["scale"] = given["scale"].view(exits, len(dims))
    return given


def check(given: dict) -> None:
    truth = loss_truth.pairwise_lse
    check_against_truth("triton", pairwise_lse, truth, given, dtype=torch.float16)


@pytest.mark.parametrize(
    ("dims", "share"), [((8, 16, 144), 1e-4), ((130, 260), 2e-3)], ids=["narrow", "wide"]
)
def test_short_prefixes(dims, share, large_tiles):
    """A row and a column whose first prefix has little of their length: 1 / length of both is more
    than fp16 holds.
    """
    given = inputs(5, 7, dims)
    for side, short in (("x", 0), ("y", 3)):
        prefix = given[side][:, short, : dims[0]]
        prefix *= 300 * share / prefix.norm()
    check(given)


@pytest.mark.parametrize("near", [False, True])
def test_four_wide_prefixes(near, large_tiles):
    """A band is rounded once for each prefix that has it."""
    given = inputs(5, 7, (130, 200, 260, 330))
    if near:
        given |= {"columns": False, "ceiling": torch.full((1, 5), 0.05, dtype=torch.float64)}
    check(given)


@pytest.mark.parametrize(("R", "S"), [(257, 3), (3, 257)], ids=["rows", "columns"])
def test_three_tiles(R, S):
    """Two programs of a product with tiles of 256 share the second of three 128 rows."""
    check(inputs(R, S, (130, 197)))
