"""`cosine` in Triton: one pass over the vectors forward, one backward, sums in fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

NO_LENGTH = tl.constexpr(1e-12)  # As in cosine.py.
Outputs = tuple[Tensor, Tensor, Tensor]


@triton.jit(do_not_specialize=["R"])
def _cosine_forward_kernel(
    X, Y, COS, U, V, R, K, D, EDGES: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):
    """Compute COS of X [E, R, D], Y [E, R, K, D], and their inverse lengths U, V."""
    e = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    valid = rows < R
    M: tl.constexpr = len(EDGES) - 1
    c = tl.arange(0, BK)
    x_rows = X + (e * R + rows)[:, None] * D
    for k in range(K):
        y_rows = Y + ((e * R + rows) * K + k)[:, None] * D
        xx, xy = tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32)
        yy = tl.zeros([BR], tl.float32)
        for m in tl.static_range(M):
            for at in range(EDGES[m], EDGES[m + 1], BK):
                col = (at + c)[None, :]
                inside = valid[:, None] & (col < EDGES[m + 1])
                x = tl.load(x_rows + col, mask=inside, other=0.0).to(tl.float32)
                y = tl.load(y_rows + col, mask=inside, other=0.0).to(tl.float32)
                xx += tl.sum(x * x, 1)
                xy += tl.sum(x * y, 1)
                yy += tl.sum(y * y, 1)
            u = 1.0 / tl.where(tl.sqrt(xx) <= NO_LENGTH, 1.0, tl.sqrt(xx))
            v = 1.0 / tl.where(tl.sqrt(yy) <= NO_LENGTH, 1.0, tl.sqrt(yy))
            row = (e * M + m) * R + rows
            tl.store(U + row, u, mask=valid)
            tl.store(V + row * K + k, v, mask=valid)
            tl.store(COS + row * K + k, xy * u * v, mask=valid)


@triton.jit(do_not_specialize=["R"])
def _cosine_backward_kernel(
    X, Y, COS, U, V, DCOS, DX, DY, R, K, D,
    EDGES: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum dx = sum_k dcos (u v y - cos u^2 x), dy = dcos (u v x - cos v^2 y) over prefixes."""
    e = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    valid = rows < R
    M: tl.constexpr = len(EDGES) - 1
    c = tl.arange(0, BK)
    x_rows = (e * R + rows)[:, None] * D
    for band in tl.static_range(M):
        for at in range(EDGES[band], EDGES[band + 1], BK):
            col = (at + c)[None, :]
            inside = valid[:, None] & (col < EDGES[band + 1])
            x = tl.load(X + x_rows + col, mask=inside, other=0.0).to(tl.float32)
            dx = tl.zeros([BR, BK], tl.float32)
            for k in range(K):
                y_rows = ((e * R + rows) * K + k)[:, None] * D
                y = tl.load(Y + y_rows + col, mask=inside, other=0.0).to(tl.float32)
                across = tl.zeros([BR], tl.float32)
                along_x, along_y = tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32)
                for m in tl.static_range(band, M):
                    row = (e * M + m) * R + rows
                    d = tl.load(DCOS + row * K + k, mask=valid, other=0.0)
                    cos = tl.load(COS + row * K + k, mask=valid, other=0.0)
                    u = tl.load(U + row, mask=valid, other=1.0)
                    v = tl.load(V + row * K + k, mask=valid, other=1.0)
                    across += d * u * v
                    along_x += d * cos * u * u
                    along_y += d * cos * v * v
                dx += across[:, None] * y - along_x[:, None] * x
                dy = across[:, None] * x - along_y[:, None] * y
                tl.store(DY + y_rows + col, dy.to(DY.dtype.element_ty), mask=inside)
            tl.store(DX + x_rows + col, dx.to(DX.dtype.element_ty), mask=inside)


@library.custom_op("mlembed::cosine", mutates_args=())
def cosine_op(x: Tensor, y: Tensor, dims: list[int]) -> Outputs:
    """Return cos [E, M, R, K], and inverse lengths [E, M, R], [E, M, R, K] for the gradient."""
    (E, R, D), K, M = x.shape, y.shape[2], len(dims)
    cos, v = (x.new_empty(E, M, R, K, dtype=torch.float32) for _ in range(2))
    u = x.new_empty(E, M, R, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device.
        if cos.numel():
            _cosine_forward_kernel[(triton.cdiv(R, 16), E)](
                x.contiguous(), y.contiguous(), cos, u, v, R, K, D,
                EDGES=(0, *dims), BR=16, BK=64, num_warps=4,
            )  # fmt: skip
    return cos, u, v


@cosine_op.register_fake
def _(x, y, dims):  # type: ignore[no-untyped-def]
    (E, R, _), K, M = x.shape, y.shape[2], len(dims)
    cos, v = (x.new_empty(E, M, R, K, dtype=torch.float32) for _ in range(2))
    return cos, x.new_empty(E, M, R, dtype=torch.float32), v


@library.custom_op("mlembed::cosine_backward", mutates_args=())
def _backward_op(
    x: Tensor, y: Tensor, cos: Tensor, u: Tensor, v: Tensor, dcos: Tensor, dims: list[int]
) -> tuple[Tensor, Tensor]:
    (E, R, D), K = x.shape, y.shape[2]
    dx, dy = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (x, y))
    with torch.cuda.device_of(x):
        if cos.numel():
            _cosine_backward_kernel[(triton.cdiv(R, 16), E)](
                x.contiguous(), y.contiguous(), cos, u, v, dcos.contiguous(), dx, dy, R, K, D,
                EDGES=(0, *dims), BR=16, BK=64, num_warps=4,
            )  # fmt: skip
    return dx, dy


@_backward_op.register_fake
def _(x, y, cos, u, v, dcos, dims):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, y, ctx.dims = inputs
    ctx.save_for_backward(x, y, *output)


def _grads(ctx, dcos, du, dv):  # type: ignore[no-untyped-def]
    return *_backward_op(*ctx.saved_tensors, dcos, ctx.dims), None


cosine_op.register_autograd(_grads, setup_context=_setup)
