"""Log-sum-exp (LSE) of all pairs' similarities, at every exit and prefix, without the matrix.

For exit e, prefix width d and temperature t, over the pairs (i, j) of rows x and columns y that
count,

    cos_ij = x_i[:d] . y_j[:d] / (|x_i[:d]| |y_j[:d]|)        z_ij = cos_ij / t
    rows_i = log sum_j exp(z_ij)        columns_j = log sum_i exp(z_ij)        (-inf if empty)

A pair does not count, in either sum, if j is row i's positive (its cosine is returned separately,
so that p - 1 is never computed from a rounded p), if any of their keys are equal, or if a text has
left before exit e. `ceiling` also drops likely false negatives: the widest prefix of the deepest
exit at which both texts are present decides for all exits and prefixes.

Logarithms of sums merge exactly, log(exp(a) + exp(b)), and so do their gradients: candidates may
come chunk by chunk.

FLOPs, per exit: 2 R S D forward and 6 R S D backward; the kernels compute 1.9 times the dots of the
widest prefix backward. Bytes: the vectors once forward; backward, also 2 bytes for each pair and
wide prefix, written once and read twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import check_impl, reference_of, use_triton
from ._mask import PairMask, present
from .cosine import unit

WORKSPACE = 512 << 20  # bytes
# Stands for the log of an empty sum: finite, so that its gradient is 0 and not NaN.
NOTHING = -1e30
Parts = tuple[Tensor, Tensor | None, Tensor | None]


def pairwise_lse(
    x: Tensor,
    y: Tensor,
    *,
    dims: tuple[int, ...],
    scale: Tensor,
    positive: Tensor | None = None,
    row_keys: Sequence[Tensor] = (),
    col_keys: Sequence[Tensor] = (),
    ceiling: Tensor | None = None,
    row_counts: Tensor | None = None,
    col_counts: Tensor | None = None,
    columns: bool = False,
    workspace: int = WORKSPACE,
    impl: str = "auto",
) -> Parts:
    """Return row LSEs [E, M, R], column LSEs [E, M, S] and the positives' cosines [E, M, R].

    They are fp32 (float64 for float64 inputs) and differentiable in x, y and scale. The columns are
    None unless `columns`, the cosines None without `positive`.

    Args:
        x, y: [E, R, D], [E, S, D] raw vectors of one dtype.
        dims: prefix widths, rising, the last at most D.
        scale: [E, M], 1 / t.
        positive: int [R], each row's positive column. A value outside 0..S-1 means that y does not
            hold the positive; its cosine is 0.
        row_keys, col_keys: ints [R] and [S], any number of pairs of them. Pairs (i, j) with an
            equal key do not count.
        ceiling: [E, R], the cosine above which a pair does not count; +inf where exit e does not
            decide. It belongs to rows: with it, columns must be False.
        row_counts, col_counts: int [E], how many leading texts are present at exit e.
        columns: whether to return the column LSEs.
        workspace: bytes that matrices of pairs may take at any time.
        impl: "auto", "triton" or "reference".

    Raises:
        ValueError: ceiling with columns, unlike numbers of keys, an unknown or unavailable `impl`.
    """
    check_impl(impl)
    if ceiling is not None and columns:
        raise ValueError("columns: expected False with ceilings, which belong to rows, got True")
    counts = {"row_counts": row_counts, "col_counts": col_counts}
    mask = PairMask.of(row_keys, col_keys, ceiling, positive=positive, **counts)
    if not use_triton(impl, x):
        return _dense(x, y, dims, scale, mask, columns)
    from ._lse_op import pairwise_lse_op  # imports triton, which not every platform has

    rows, cols, cos = pairwise_lse_op(x, y, scale, *mask, list(dims), columns, workspace)
    return rows, cols if columns else None, None if positive is None else cos


pairwise_lse_ref = reference_of(pairwise_lse)


def _dense(
    x: Tensor, y: Tensor, dims: tuple[int, ...], scale: Tensor, mask: PairMask, columns: bool
) -> Parts:
    """Return what `pairwise_lse` does, by one [R, S] matrix per exit and prefix."""
    E, R, S, positive = x.shape[0], x.shape[1], y.shape[1], mask.positive
    # Half precision has a step of 0.06 at logit 16: products and sums are in fp32 or wider.
    wide = torch.promote_types(x.dtype, torch.float32)
    x_in = present(mask.row_counts, E, R, x.device)
    y_in = present(mask.col_counts, E, S, x.device)
    dropped = torch.zeros(R, S, dtype=torch.bool, device=x.device)
    if mask.row_keys is not None and mask.col_keys is not None:
        for row_key, col_key in zip(mask.row_keys, mask.col_keys, strict=True):
            dropped |= row_key[:, None] == col_key[None, :]
    if positive is not None:
        dropped |= positive[:, None] == torch.arange(S, device=x.device)
        inside = (positive >= 0) & (positive < S)
        at = positive.clamp(0, max(S - 1, 0))
    rows, cols, cosines = [], [], []
    with torch.autocast(x.device.type, enabled=False):
        # Vectors that have left are not read, even if they hold NaN.
        x = x.to(wide).masked_fill(~x_in[..., None], 0)
        y = y.to(wide).masked_fill(~y_in[..., None], 0)
        if mask.ceiling is not None:
            widest = x[..., : dims[-1]], y[..., : dims[-1]]
            dropped = dropped | _too_similar(*widest, mask.ceiling, x_in, y_in)
        for e in range(E):
            drop = dropped | ~(x_in[e, :, None] & y_in[e, None, :])
            for m, d in enumerate(dims):
                unit_x, unit_y = unit(x[e, :, :d]), unit(y[e, :, :d])
                z = (unit_x @ unit_y.T * scale[e, m].to(wide)).masked_fill(drop, -torch.inf)
                rows.append(_logsumexp(z))
                if columns:
                    cols.append(_logsumexp(z.T))
                if positive is not None:
                    cos = (unit_x * unit_y[at]).sum(-1) if S else unit_x.sum(-1) * 0
                    both_in = inside & x_in[e] & y_in[e, at] if S else inside
                    cosines.append(cos.where(both_in, 0.0))

    def table(x: list[Tensor]) -> Tensor | None:
        return torch.stack(x).unflatten(0, (E, len(dims))) if x else None

    return torch.stack(rows).unflatten(0, (E, len(dims))), table(cols), table(cosines)


def _logsumexp(z: Tensor) -> Tensor:
    """Return LSEs over the last axis; -inf with gradient 0 for empty sums, where torch's is NaN."""
    if not z.shape[-1]:
        return z.sum(-1) - torch.inf
    top = z.detach().amax(-1, keepdim=True)
    top = top.where(top != -torch.inf, 0.0)
    total = (z - top).exp().sum(-1)
    empty = total == 0
    return torch.where(empty, -torch.inf, total.where(~empty, 1.0).log() + top[..., 0])


def _too_similar(x: Tensor, y: Tensor, ceiling: Tensor, x_in: Tensor, y_in: Tensor) -> Tensor:
    """bool [R, S]: whether the deepest exit that has both texts puts them above the ceiling."""
    drop = torch.zeros(x.shape[1], y.shape[1], dtype=torch.bool, device=x.device)
    for e in range(x.shape[0]):
        cos = unit(x[e].detach()) @ unit(y[e].detach()).T
        decides = x_in[e, :, None] & y_in[e, None, :] & (ceiling[e] < torch.inf)[:, None]
        drop = torch.where(decides, cos > ceiling[e, :, None], drop)
    return drop


def pairwise_lse_backward(
    x: Tensor,
    y: Tensor,
    outputs: Parts,
    slopes: Parts,
    *,
    dims: tuple[int, ...],
    scale: Tensor,
    columns: bool = False,
    workspace: int = WORKSPACE,
    impl: str = "auto",
    **mask: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients dx [E, R, D], dy [E, S, D], dscale [E, M] of `pairwise_lse`.

    They are what autograd would return, computed from inputs and outputs alone: for callers that
    stream y and keep no graph of it. Not differentiable.

    Args:
        outputs: what `pairwise_lse` returned for the other arguments, which are its own.
        slopes: dL/d of each output; None for an output that is `None`.

    Raises:
        ValueError: an unknown or unavailable `impl`.
    """
    check_impl(impl)
    pairs = PairMask.of(**mask)
    if use_triton(impl, x):
        from ._lse_op import _backward_op

        # Stands for outputs that do not exist.
        empty = scale.new_empty(*scale.shape, 0, dtype=torch.float32)
        saved = [empty if part is None else part.contiguous() for part in (*outputs, *slopes)]
        with torch.no_grad():
            return _backward_op(x, y, scale, *pairs, list(dims), columns, workspace, *saved)
    with torch.enable_grad():
        x, y, scale = (t.detach().requires_grad_() for t in (x, y, scale))
        again = _dense(x, y, dims, scale, pairs, columns)
    outs = [part for part in again if part is not None]
    given = [slope for slope in slopes if slope is not None]
    dx, dy, dscale = torch.autograd.grad(outs, (x, y, scale), given)
    return dx, dy, dscale
