"""Cosines of given pairs, at every exit and every prefix.

For row i, its partner k and prefix width d,

    cos_dik = x_i[:d] . y_ik[:d] / (|x_i[:d]| |y_ik[:d]|)

A prefix of length zero (norm <= 1e-12) has no direction: it is not normalised, so its cosine is 0
and its gradient that of a plain product with the other side's unit vector. The gradient is finite,
so a dead unit can recover.

For the few pairs that need no matrix: hard negatives of one query, and thresholds. Bytes: forward
reads (1 + K) rows of D numbers and writes M K numbers; backward reads both and writes the rows.
"""

import torch
from torch import Tensor

from .._dispatch import use_triton

NO_LENGTH = 1e-12


def unit(x: Tensor) -> Tensor:
    """Return x / |x| along the last axis, x itself where |x| <= 1e-12."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.where(~(norm <= NO_LENGTH), 1.0)


def cosine_ref(x: Tensor, y: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    """Compute the specification, half precision in fp32; float64 in, float64 out."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(wide)[:, :, None], y.to(wide)
        return torch.stack([(unit(x[..., :d]) * unit(y[..., :d])).sum(-1) for d in dims], dim=1)


def cosine(x: Tensor, y: Tensor, *, dims: tuple[int, ...], impl: str = "auto") -> Tensor:
    """Return cosines [E, M, R, K] of x [E, R, D] with its partners y [E, R, K, D].

    They are fp32, or float64 for float64 inputs.

    Args:
        dims: prefix widths, rising, the last at most D.
        impl: "auto", "triton" (CUDA; fp16, bf16, fp32) or "reference".

    Raises:
        ValueError: an unknown or unavailable `impl`.
    """
    if not use_triton(impl, x, dots=False):
        return cosine_ref(x, y, dims=dims)
    from ._cosine_op import cosine_op  # imports triton, which not every platform has

    return cosine_op(x, y, list(dims))[0]
