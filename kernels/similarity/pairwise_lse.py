"""Log-partition of all pairs' similarities, at every exit and prefix, without the matrix.

For exit e, prefix width d and temperature t, over the kept pairs (i, j) of rows x and columns y,

    cos_ij = x_i[:d] . y_j[:d] / (|x_i[:d]| |y_j[:d]|)        z_ij = cos_ij / t
    rows_i = log sum_j exp(z_ij)        columns_j = log sum_i exp(z_ij)        (-inf where none)

A pair is dropped, from both, if j is row i's positive (its cosine comes back by itself, so that
p - 1 is never formed from a rounded p), if any of their keys are equal, or if a text has left
before exit e. `ceiling` drops likely false negatives as well: decided once for all exits and
prefixes, at the widest prefix of the deepest exit at which both texts are present.

Logarithms of sums merge exactly, log(exp(a) + exp(b)), and so do their gradients: candidates may
come chunk by chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import check_impl, use_triton
from .cosine import unit

WORKSPACE = 512 << 20  # bytes
NOTHING = -1e30  # for the log of an empty sum: finite, so that its gradient is 0 and not NaN
Parts = tuple[Tensor, Tensor | None, Tensor | None]


def present(counts: Tensor | None, E: int, n: int, device: torch.device) -> Tensor:
    """bool [E, n]: which texts are still there at exit e, the first counts[e] or all."""
    if counts is None:
        return torch.ones(E, n, dtype=torch.bool, device=device)
    return torch.arange(n, device=device) < counts[:, None]


def pairwise_lse_ref(
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
) -> Parts:
    """The specification: one [R, S] matrix per exit and prefix. Arguments as in `pairwise_lse`."""
    E, R, S = x.shape[0], x.shape[1], y.shape[1]
    # Half precision has a step of 0.06 at logit 16: products and sums are taken in fp32 or wider.
    wide = torch.promote_types(x.dtype, torch.float32)
    here_x, here_y = present(row_counts, E, R, x.device), present(col_counts, E, S, x.device)
    dropped = torch.zeros(R, S, dtype=torch.bool, device=x.device)
    for row_key, col_key in zip(row_keys, col_keys, strict=True):
        dropped |= row_key[:, None] == col_key[None, :]
    if positive is not None:
        dropped |= positive[:, None] == torch.arange(S, device=x.device)
        inside = (positive >= 0) & (positive < S)
        at = positive.clamp(0, max(S - 1, 0))
    rows, cols, own = [], [], []
    with torch.autocast(x.device.type, enabled=False):
        # What has left is not looked at, whatever it holds.
        x = x.to(wide).masked_fill(~here_x[..., None], 0)
        y = y.to(wide).masked_fill(~here_y[..., None], 0)
        if ceiling is not None:
            dropped = dropped | _too_similar(x, y, dims[-1], ceiling, here_x, here_y)
        for e in range(E):
            drop = dropped | ~(here_x[e, :, None] & here_y[e, None, :])
            for m, d in enumerate(dims):
                unit_x, unit_y = unit(x[e, :, :d]), unit(y[e, :, :d])
                z = (unit_x @ unit_y.T * scale[e, m].to(wide)).masked_fill(drop, -torch.inf)
                rows.append(_logsumexp(z))
                if columns:
                    cols.append(_logsumexp(z.T))
                if positive is not None:
                    cos = (unit_x * unit_y[at]).sum(-1) if S else unit_x.sum(-1) * 0
                    there = inside & here_x[e] & here_y[e, at] if S else inside
                    own.append(cos.where(there, 0.0))
    shape = E, len(dims), -1
    return (
        torch.stack(rows).view(*shape[:2], R),
        torch.stack(cols).view(*shape[:2], S) if columns else None,
        torch.stack(own).view(*shape[:2], R) if positive is not None else None,
    )


def _logsumexp(z: Tensor) -> Tensor:
    """Over the last axis; -inf with gradient 0 where nothing is kept (torch's gradient is NaN)."""
    if not z.shape[-1]:
        return z.sum(-1) - torch.inf
    top = z.detach().amax(-1, keepdim=True)
    top = top.where(top != -torch.inf, 0.0)
    total = (z - top).exp().sum(-1)
    empty = total == 0
    return torch.where(empty, -torch.inf, total.where(~empty, 1.0).log() + top[..., 0])


def _too_similar(
    x: Tensor, y: Tensor, d: int, ceiling: Tensor, here_x: Tensor, here_y: Tensor
) -> Tensor:
    """bool [R, S]: cosine above the row's ceiling, as the deepest exit with both texts has it."""
    drop = torch.zeros(x.shape[1], y.shape[1], dtype=torch.bool, device=x.device)
    for e in range(x.shape[0]):
        cos = unit(x[e, :, :d].detach()) @ unit(y[e, :, :d].detach()).T
        judges = here_x[e, :, None] & here_y[e, None, :] & (ceiling[e] < torch.inf)[:, None]
        drop = torch.where(judges, cos > ceiling[e, :, None], drop)
    return drop


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
    """rows [E, M, R], columns [E, M, S] or None, cosines of the positives [E, M, R] or None.

    fp32, or float64 for float64 inputs; differentiable in x, y and scale.

    Args:
        x, y: [E, R, D], [E, S, D] raw vectors of one dtype.
        dims: prefix widths, rising, the last at most D.
        scale: [E, M], 1 / t.
        positive: int [R], each row's positive column; outside 0..S-1 it has none here, cosine 0.
        row_keys, col_keys: ints [R] and [S], any number of pairs of them; equal means dropped.
        ceiling: [E, R], cosine above which a pair is dropped; +inf where exit e does not decide.
            Rows only: with it, columns must be False.
        row_counts, col_counts: int [E], so many leading texts are present at exit e.
        columns: whether the columns' partitions are wanted.
        workspace: bytes that matrices of pairs may take at any time.
        impl: "auto", "triton" or "reference".

    Raises:
        ValueError: ceiling with columns, an implementation that cannot be.
    """
    check_impl(impl)
    if ceiling is not None and columns:
        raise ValueError("columns: expected False with ceilings, which belong to rows, got True")
    if not use_triton(impl, x):
        return pairwise_lse_ref(
            x,
            y,
            dims=dims,
            scale=scale,
            positive=positive,
            row_keys=row_keys,
            col_keys=col_keys,
            ceiling=ceiling,
            row_counts=row_counts,
            col_counts=col_counts,
            columns=columns,
            workspace=workspace,
        )
    from . import _lse_op as _partition_op  # imports triton, which not every platform has

    rows, cols, own = _partition_op.pairwise_lse_op(
        x,
        y,
        scale,
        positive,
        _stacked(row_keys),
        _stacked(col_keys),
        None if ceiling is None else ceiling.detach(),
        row_counts,
        col_counts,
        list(dims),
        columns,
        workspace,
    )
    return rows, cols if columns else None, None if positive is None else own


def pairwise_lse_backward(
    x: Tensor,
    y: Tensor,
    outputs: Parts,
    slopes: Parts,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dx [E, R, D], dy [E, S, D], dscale [E, M] of `pairwise_lse`, by hand.

    For callers that hand y through and keep no graph of it: what autograd would return, from
    nothing but the inputs and the outputs. Not differentiable.

    Args:
        outputs: what `pairwise_lse` returned for the other arguments, which are its own.
        slopes: dL/d of each output, None where that is None.

    Raises:
        ValueError: an implementation that cannot be.
    """
    check_impl(impl)
    if use_triton(impl, x):
        from . import _lse_op as _partition_op

        empty = scale.new_empty(*scale.shape, 0, dtype=torch.float32)  # what was not asked for
        saved = [empty if part is None else part.contiguous() for part in (*outputs, *slopes)]
        with torch.no_grad():
            return _partition_op._backward_op(
                x,
                y,
                scale,
                positive,
                _stacked(row_keys),
                _stacked(col_keys),
                ceiling,
                row_counts,
                col_counts,
                list(dims),
                columns,
                workspace,
                *saved,
            )
    with torch.enable_grad():
        x, y, scale = (t.detach().requires_grad_() for t in (x, y, scale))
        again = pairwise_lse_ref(
            x,
            y,
            dims=dims,
            scale=scale,
            positive=positive,
            row_keys=row_keys,
            col_keys=col_keys,
            ceiling=ceiling,
            row_counts=row_counts,
            col_counts=col_counts,
            columns=columns,
            workspace=workspace,
        )
    wanted = [part for part in again if part is not None]
    given = [slope for slope in slopes if slope is not None]
    dx, dy, dscale = torch.autograd.grad(wanted, (x, y, scale), given)
    return dx, dy, dscale


def _stacked(keys: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(keys)).long() if keys else None
