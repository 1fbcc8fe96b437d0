"""fp16 gradients of a scaled loss: slopes are divided by the largest before they are rounded."""

import pytest
import torch
from loss_truth import DEVICE, vectors
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
