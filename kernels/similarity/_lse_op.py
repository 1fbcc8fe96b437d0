"""`pairwise_lse` as one node that torch.compile and CUDA graphs can carry."""

import torch
from torch import Tensor, library

from ._bands import bands_of
from ._lse_backward import backward
from ._lse_forward import forward
from ._mask import PairMask

Outputs = tuple[Tensor, Tensor, Tensor]


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
    """Return row LSEs [E, M, R], column LSEs and positives' cosines, empty if not asked for."""
    mask = PairMask(positive, row_keys, col_keys, ceiling, row_counts, col_counts)
    with torch.cuda.device_of(x):  # Triton launches on the current device.
        return forward(x, y, bands_of(tuple(dims)), scale, mask, columns, workspace)


@pairwise_lse_op.register_fake
def _(x, y, scale, positive, *others):  # type: ignore[no-untyped-def]
    *_, dims, columns, _ = others
    (E, R, _), S, M = x.shape, y.shape[1], len(dims)
    rows = x.new_empty(E, M, R, dtype=torch.float32)
    cols = x.new_empty(E, M, S if columns else 0, dtype=torch.float32)
    cos = x.new_empty(E, M, R if positive is not None else 0, dtype=torch.float32)
    return rows, cols, cos


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
    cos: Tensor,
    drows: Tensor,
    dcols: Tensor,
    dcos: Tensor,
) -> Outputs:
    """Return dx, dy, dscale."""
    mask = PairMask(positive, row_keys, col_keys, ceiling, row_counts, col_counts)
    of_cols = (cols, dcols) if columns else None
    of_cos = (cos, dcos) if positive is not None else None
    with torch.cuda.device_of(x):
        return backward(
            x, y, bands_of(tuple(dims)), scale, mask, (rows, drows), of_cols, of_cos, workspace
        )


@_backward_op.register_fake
def _(x, y, scale, *others):  # type: ignore[no-untyped-def]
    shape = scale.shape
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(shape, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.dims, ctx.columns, ctx.workspace = inputs
    ctx.save_for_backward(*tensors, *output)


def _grads(ctx, drows, dcols, dcos):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    dx, dy, dscale = _backward_op(
        *saved[:9], ctx.dims, ctx.columns, ctx.workspace, *saved[9:], drows, dcols, dcos
    )
    return dx, dy, dscale, *(None,) * 9


pairwise_lse_op.register_autograd(_grads, setup_context=_setup)
