"""Quantisation-aware training: the loss of vectors that are rounded to bytes or to bits.

    loss = (1 - w) loss(x) + w loss(q(x)),  w = loss.quantise_weight

q rounds element by element, so the kernels of the loss stay as they are. With r, the root mean
square of a vector's D numbers, which is ||x|| / sqrt(D),

    binary   q(x) = r if x > 0, else -r: the sign of a prefix does not depend on its length
    int8     q(x) = s round(x / s), at most 127 steps of s = RANGE r / 127 from zero

The derivative of q is 1 where |x| <= CLIP r (binary) or |x| <= RANGE r (int8), and 0 beyond, where
a number has left the steps: the straight-through estimator of arXiv 1602.02830, equation 4. r keeps
the gradients of both parts at one scale, and is a constant for them.

A prefix that is normalised after it is cut has steps of its own length. Here its steps are those of
the whole vector, as fine relative to its numbers up to the ratio of both root mean squares.

Letters: E exits, N texts, D width, M prefixes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import config
from ...config.choices import Stored

CLIP = 1.0
RANGE = 8.0


class _Straight(torch.autograd.Function):
    """q(x) forward, and backward the gradient where q has steps."""

    @staticmethod
    def forward(ctx: Any, x_END: Tensor, kind: str) -> Tensor:
        x = x_END.to(torch.promote_types(x_END.dtype, torch.float32))
        rms_EN1 = x.square().mean(-1, keepdim=True).sqrt()
        clip = CLIP if kind == "binary" else RANGE
        ctx.save_for_backward(x.abs() <= clip * rms_EN1)
        if kind == "binary":
            return torch.where(x > 0, rms_EN1, -rms_EN1).to(x_END.dtype)
        step_EN1 = RANGE / 127 * rms_EN1
        codes = (x / step_EN1.clamp(min=1e-30)).round().clamp(-127, 127)
        return (codes * step_EN1).to(x_END.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_END: Tensor) -> tuple[Tensor, None]:
        (inside_END,) = ctx.saved_tensors
        return grad_END * inside_END, None


def quantised(x_END: Tensor, kind: str) -> Tensor:
    """Return q(x), in the dtype of x. kind: int8 or binary."""
    made: Tensor = _Straight.apply(x_END, kind)
    return made


def scored(loss: config.Loss) -> tuple[Stored, ...]:
    """Return what else than float32 a run's vectors are scored in."""
    return ("int8", "binary") if loss.quantise != "none" else ()


def mixed(
    tables: Callable[[Tensor], dict[str, Tensor]], exits_END: Tensor, loss: config.Loss
) -> dict[str, Tensor]:
    """Return loss_EM of each term, the weighted mean of those of x and q(x).

    tables: function of exits_END to loss_EM by term, which may communicate.
    """
    if loss.quantise == "none":
        return tables(exits_END)
    w = loss.quantise_weight
    rounded = tables(quantised(exits_END, loss.quantise))
    if w == 1:
        return rounded
    plain = tables(exits_END)
    return {name: (1 - w) * plain[name] + w * rounded[name] for name in plain}
