"""`pairwise_lse` as one node that torch.compile and CUDA graphs can carry."""

import torch
import torch.nn.functional as F
from torch import Tensor, library

from ._bands import bands_of, padded
from ._lse_backward import backward
from ._lse_forward import forward
from ._tiles import PairMask

Outputs = tuple[Tensor, Tensor, Tensor]


def counts_of(counts: Tensor | None, x: Tensor) -> Tensor:
    """int32 [E], how many rows of x [E, n, D] are present."""
    if counts is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int32, device=x.device)
    return counts.clamp(0, x.shape[1]).to(torch.int32)


def _kept(
    positive: Tensor | None, row_keys: Tensor | None, col_keys: Tensor | None, R: int, S: int
) -> PairMask:
    if positive is not None:
        positive = positive.masked_fill((positive < 0) | (positive >= S), -1).to(torch.int32)
        positive = F.pad(positive, (0, padded(R) - R), value=-1)
    if row_keys is not None and col_keys is not None:
        row_keys, col_keys = _ranks(row_keys, col_keys)
        row_keys = F.pad(row_keys, (0, padded(R) - R), value=-1)
        col_keys = F.pad(col_keys, (0, padded(S) - S), value=-1)
    return PairMask(positive, row_keys, col_keys)


def _ranks(row_keys: Tensor, col_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys as int32 [K, n], equal where the keys [K, n] are; half the registers of int64.

    Without torch.unique, whose size would have to be waited for: a key's rank among the columns'.
    """
    if not col_keys.shape[1]:
        return torch.full_like(row_keys, -1, dtype=torch.int32), col_keys.int()
    ordered = col_keys.sort(dim=1).values
    rows = torch.searchsorted(ordered, row_keys)
    found = ordered.gather(1, rows.clamp(max=ordered.shape[1] - 1)) == row_keys
    cols = torch.searchsorted(ordered, col_keys)
    return rows.masked_fill(~found, -1).int(), cols.int()


@library.custom_op("mlembed::pairwise_lse", mutates_args=())
def pairwise_lse_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor | None,
    row_keys: Tensor | None,
    col_keys: Tensor | None,
    ceiling: Tensor | None,
    row_counts: Tensor | None,
    col_counts: Tensor | None,
    dims: list[int],
    columns: bool,
    workspace: int,
) -> Outputs:
    """rows [E, M, R], columns [E, M, S], positives' cosines [E, M, R]; empty if not asked for."""
    with torch.cuda.device_of(x):  # where triton launches
        return forward(
            x,
            y,
            bands_of(tuple(dims)),
            scale,
            _kept(positive, row_keys, col_keys, x.shape[1], y.shape[1]),
            (counts_of(row_counts, x), counts_of(col_counts, y)),
            ceiling,
            columns,
            workspace,
        )


@pairwise_lse_op.register_fake
def _(x, y, scale, positive, *others):  # type: ignore[no-untyped-def]
    *_, dims, columns, _ = others
    (E, R, _), S, M = x.shape, y.shape[1], len(dims)
    rows = x.new_empty(E, M, R, dtype=torch.float32)
    cols = x.new_empty(E, M, S if columns else 0, dtype=torch.float32)
    own = x.new_empty(E, M, R if positive is not None else 0, dtype=torch.float32)
    return rows, cols, own


@library.custom_op("mlembed::pairwise_lse_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor | None,
    row_keys: Tensor | None,
    col_keys: Tensor | None,
    ceiling: Tensor | None,
    row_counts: Tensor | None,
    col_counts: Tensor | None,
    dims: list[int],
    columns: bool,
    workspace: int,
    rows: Tensor,
    cols: Tensor,
    own: Tensor,
    drows: Tensor,
    dcols: Tensor,
    down: Tensor,
) -> Outputs:
    """dx, dy, dscale."""
    with torch.cuda.device_of(x):
        return backward(
            x,
            y,
            bands_of(tuple(dims)),
            scale,
            _kept(positive, row_keys, col_keys, x.shape[1], y.shape[1]),
            (counts_of(row_counts, x), counts_of(col_counts, y)),
            ceiling,
            (rows, drows),
            (cols, dcols) if columns else None,
            (own, down) if positive is not None else None,
            workspace,
        )


@_backward_op.register_fake
def _(x, y, scale, *others):  # type: ignore[no-untyped-def]
    shape = scale.shape
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(shape, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.dims, ctx.columns, ctx.workspace = inputs
    ctx.save_for_backward(*tensors, *output)


def _grads(ctx, drows, dcols, down):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    dx, dy, dscale = _backward_op(
        *saved[:9], ctx.dims, ctx.columns, ctx.workspace, *saved[9:], drows, dcols, down
    )
    return dx, dy, dscale, *(None,) * 9


pairwise_lse_op.register_autograd(_grads, setup_context=_setup)
