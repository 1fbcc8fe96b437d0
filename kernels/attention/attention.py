"""Attention over packed sequences: each token sees its own sequence and nothing else.

    o_t = sum_s softmax_s(scale * q_t . k_s) v_s,   s in the sequence of t (and s <= t when causal)

Query head h reads key/value head h // (Hq / Hkv) (grouped queries, GQA).

Layer-skip. Where sequences leave at depths of their own, order the batch deepest first: those
alive at a layer are then a prefix of the packed buffer, and attention over them is this function on
`q[:T_l]`, `cu_seqlens[:n + 1]` and `AttentionPlan.of(cu_seqlens[:n + 1])`. Nothing is launched,
filled or read for the others. Sets that are no prefix, or that only the device knows, come as
`active`.

For sequences of lengths n_i: FLOPs 4 Hq K sum(n_i^2) forward (half of it when causal), 2.5 times
that backward; bytes (2 Hq + 2 Hkv) K T forward, (3 Hq + 4 Hkv) K T backward, times those of an
element. At n = 20..110 and K = 128 what has to be done is bound by bytes on an H200.
"""

import math

import torch
from torch import Tensor

from .._dispatch import INTERPRETED
from .plan import AttentionPlan

IMPLS = ("auto", "triton", "sdpa", "varlen", "flash_attn", "xformers", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = tuple(range(16, 129, 16))  # of heads, K
CPU = torch.device("cpu")


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """The specification: one dense softmax per sequence. Arguments as in `attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    alive = [True] * (len(cu_seqlens) - 1)
    if active is not None:
        flags = active.dtype == torch.bool
        alive = active.tolist() if flags else [i < int(active) for i in range(len(alive))]
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for begin, end, here in zip(bounds[:-1], bounds[1:], alive, strict=True):
        if not here:
            continue
        keys = k[begin:end].repeat_interleave(group, dim=1)
        values = v[begin:end].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhk,shk->hqs", q[begin:end], keys) * scale
        if causal:
            n = end - begin
            future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        out[begin:end] = torch.einsum("hqs,shk->qhk", scores.softmax(-1), values)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None = None,
    active: Tensor | None = None,
    impl: str = "auto",
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Attention within each packed sequence -> [T, Hq, K], dtype of q.

    By "triton" the same bits every time; libraries may add up gradients in any order.

    Args:
        q: [T, Hq, K]. k, v: [T, Hkv, K], Hkv a divisor of Hq; one floating dtype, one device.
        cu_seqlens: int [N + 1], 0 = first, rising, last = T: sequence i is rows cu[i]:cu[i + 1].
        causal: whether a token sees only itself and what precedes it. (A NaN stays within its
            sequence, not behind its token.)
        scale: factor on q . k; K ** -0.5 by default.
        active: which sequences take part, where that is no prefix or only the device knows: bool
            [N], or an integer (a tensor of one element), the first so many. Rows of the others are
            not read; they are 0 in the output and in the gradients. The host does not wait for it.
        impl: "triton" (fp32, bf16, fp16; K a multiple of 16, at most 128), "sdpa" (torch, on a
            rectangle), "varlen" (torch's FlashAttention 2), "flash_attn", "xformers" (packages),
            "reference" (a loop over sequences). "auto": triton on CUDA for what it has, else sdpa.
        plan: `AttentionPlan.of(cu_seqlens)` on q's device. Made once for all layers; without it the
            call makes one and waits for a cu_seqlens on a device. Its boundaries are those that
            count: on a device no more than T and N are compared.

    Raises:
        ValueError: shapes, dtypes, devices, boundaries or an `impl` other than the above.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    _check(q, k, v, cu_seqlens, active)
    if impl == "auto":
        ours = q.is_cuda and q.dtype in DTYPES and q.shape[-1] in WIDTHS
        impl = "triton" if ours else "sdpa"
    if impl == "triton":
        _check_triton(q)
    if plan is None:
        plan = AttentionPlan.of(cu_seqlens).to(q.device)
    _check_plan(plan, q, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if impl == "reference":
        return attention_ref(
            q, k, v, cu_seqlens=cu_seqlens, causal=causal, scale=scale, active=active
        )
    alive_T = None if active is None else plan.alive_T(active)
    if impl == "triton":
        from . import _op as _attention_op  # imports triton, which not every platform has

        return _attention_op.run(q, k, v, plan, alive_T, scale, causal)
    from . import _backends as _attention_backends

    if alive_T is not None:  # of zeros alone it is zero, and so are the gradients
        q, k, v = (x.masked_fill(~alive_T[:, None, None], 0) for x in (q, k, v))
    return getattr(_attention_backends, impl)(q, k, v, plan, scale, causal)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, active: Tensor | None) -> None:
    integers = cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.ndim == 1
    if not integers or not len(cu_seqlens) or cu_seqlens.device not in (q.device, CPU):
        raise ValueError(
            f"cu_seqlens: expected integers [N + 1], int32 or int64, on {q.device} or the CPU, "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if q.ndim != 3 or k.shape != v.shape or k.ndim != 3 or q.shape[::2] != k.shape[::2]:
        raise ValueError(
            "q, k, v: expected [T, Hq, K], [T, Hkv, K], [T, Hkv, K], got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not k.shape[1] or not q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads: expected Hkv to divide Hq, got {k.shape[1]} and {q.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.is_floating_point():
        raise ValueError(f"q, k, v: expected a floating dtype, got {q.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v: expected one device, got {q.device}, {k.device}, {v.device}")
    if active is None:
        return
    N = len(cu_seqlens) - 1
    flags = active.dtype == torch.bool and active.shape == (N,)
    count = active.numel() == 1 and active.dtype in (torch.int32, torch.int64)
    if not (flags or count) or active.device != q.device:
        raise ValueError(
            f"active: expected bool [{N}] or one integer on {q.device}, "
            f"got {active.dtype} {list(active.shape)} on {active.device}"
        )


def _check_triton(q: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"impl: triton has fp32, bf16 and fp16, got {q.dtype}")
    if q.shape[-1] not in WIDTHS:
        raise ValueError(
            f"impl: triton has heads of 16 to 128, multiples of 16, got K = {q.shape[-1]}"
        )
    if not (q.is_cuda or INTERPRETED):
        raise ValueError(f"impl: triton needs CUDA (or TRITON_INTERPRET=1), got {q.device}")
    if not q.is_cuda and q.dtype == torch.bfloat16:
        raise ValueError(f"impl: triton's interpreter has no bf16 products, got {q.dtype}")


def _check_plan(plan: AttentionPlan, q: Tensor, cu_seqlens: Tensor) -> None:
    found = plan.tokens, plan.sequences, plan.buffer.device
    wanted = len(q), len(cu_seqlens) - 1, q.device
    if plan.tokens != len(q) and plan.sequences == len(cu_seqlens) - 1:
        raise ValueError(f"cu_seqlens: expected the last to be T = {len(q)}, got {plan.tokens}")
    if found != wanted:
        raise ValueError(f"plan: expected (T, N, device) {wanted}, got {found}")
    # Looking into a device tensor would wait for the device, and break a compiled graph.
    here = cu_seqlens.is_cpu and plan.buffer.is_cpu and not torch.compiler.is_compiling()
    if here and (cu_seqlens != plan.cu_seqlens).any():
        raise ValueError("plan: expected that of cu_seqlens, got that of other boundaries")
