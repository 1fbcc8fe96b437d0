"""Packed attention as one node that torch.compile and CUDA graphs can carry."""

import torch
from torch import Tensor, library

from ._backward import backward
from ._forward import forward
from .plan import AttentionPlan


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    alive_T: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """Return o [T, Hq, K]."""
    if abs(scale) < 1e-30:  # It is 0 in fp32.
        q, scale = q * 0, 1.0
    if scale < 0:  # Kernels take maxima before the factor.
        q, scale = -q, -scale
    counts = [plan.tokens, plan.sequences, plan.max_seqlen, *plan.counts]
    return attention_op(q, k, v, plan.buffer, alive_T, counts, scale, causal)[0]


def _side_by_side(x: Tensor) -> Tensor:
    """Return x if its heads lie side by side, as in slices of a fused projection, else a copy."""
    _, H, K = x.shape
    heads = x.stride(2) == 1 and x.stride(1) == K
    # Kernels read 16 bytes at a time. Tokens of an expanded gradient share memory: it is copied.
    apart = x.stride(0) % 16 == 0 and x.stride(0) >= H * K and x.data_ptr() % 16 == 0
    return x if heads and apart and len(x) > 1 else x.contiguous()


def _plan(buffer: Tensor, counts: list[int]) -> AttentionPlan:
    return AttentionPlan(buffer, counts[0], counts[1], counts[2], tuple(counts[3:]))


@library.custom_op("mlembed::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buffer: Tensor,
    alive_T: Tensor | None,
    counts: list[int],
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Return o, and LSEs fp32 [Hq, T], which only rows of longer sequences have."""
    with torch.cuda.device_of(q):  # Triton launches on the current device.
        q, k, v = _side_by_side(q), _side_by_side(k), _side_by_side(v)
        return forward(q, k, v, _plan(buffer, counts), alive_T, scale, causal)


@attention_op.register_fake
def _(q, k, v, buffer, alive_T, counts, scale, causal):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@library.custom_op("mlembed::attention_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    buffer: Tensor,
    alive_T: Tensor | None,
    counts: list[int],
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        do, q, k, v = _side_by_side(do), _side_by_side(q), _side_by_side(k), _side_by_side(v)
        return backward(do, q, k, v, o, lse, _plan(buffer, counts), alive_T, scale, causal)


@_backward_op.register_fake
def _(do, q, k, v, *others):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, buffer, alive_T, ctx.counts, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, buffer, alive_T)
    ctx.set_materialize_grads(False)


def _grads(ctx, do, dlse):  # type: ignore[no-untyped-def]
    if do is None:
        return (None,) * 8
    options = ctx.counts, ctx.scale, ctx.causal
    return *_backward_op(do, *ctx.saved_tensors, *options), *(None,) * 5


attention_op.register_autograd(_grads, setup_context=_setup)
