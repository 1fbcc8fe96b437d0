"""Attention over packed sequences: each token sees its own sequence and nothing else.

    o_t = sum_s softmax_s(scale * q_t . k_s) v_s,   s in the sequence of t (and s <= t when causal)

Query head h reads key/value head h // (Hq / Hkv) (grouped queries, GQA). With a window W, as in the
local layers of ModernBERT and Gemma 3, a token sees only tokens at a distance |s - t| < W.

Layer-skip: if sequences leave at different depths, order the batch deepest first. The sequences
alive at a layer are then a prefix of the packed buffer, and their attention is this function on
`q[:T_l]`, `cu_seqlens[:n + 1]` and `AttentionPlan.of(cu_seqlens[:n + 1])`: it launches, fills and
reads nothing for the others. Pass other sets, or sets that only the device knows, as `active`.

For sequences of lengths n_i: FLOPs 4 Hq K sum(n_i^2) forward (half of it when causal), 2.5 times
that backward; bytes (2 Hq + 2 Hkv) K T forward, (3 Hq + 4 Hkv) K T backward, times those of an
element. At n = 20..110 and K = 128 bytes are the bound on an H200.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .._dispatch import DTYPES, check_impl, use_triton
from .plan import AttentionPlan

IMPLS = ("auto", "triton", "sdpa", "varlen", "flash_attn", "xformers", "reference")
LOCAL = ("sdpa", "varlen", "flash_attn", "reference")  # Implementations with windows.
WIDTHS = tuple(range(16, 129, 16))  # Widths K of heads that Triton's kernels support.
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
    window: int | None = None,
) -> Tensor:
    """Compute the specification, one dense softmax per sequence; arguments as in `attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    alive = [True] * (len(cu_seqlens) - 1)
    if active is not None:
        flags = active.dtype == torch.bool
        alive = active.tolist() if flags else [i < int(active) for i in range(len(alive))]
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for begin, end, is_alive in zip(bounds[:-1], bounds[1:], alive, strict=True):
        if not is_alive:
            continue
        keys = k[begin:end].repeat_interleave(group, dim=1)
        values = v[begin:end].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhk,shk->hqs", q[begin:end], keys) * scale
        hidden = torch.zeros(end - begin, end - begin, dtype=torch.bool, device=q.device)
        if causal:
            hidden |= torch.ones_like(hidden).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).triu(window) | torch.ones_like(hidden).tril(-window)
        if causal or window is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
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
    window: int | None = None,
    impl: str = "auto",
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Return the attention within each packed sequence, [T, Hq, K] in q's dtype.

    "triton" gives the same bits every time; libraries may add up gradients in any order.

    Args:
        q: [T, Hq, K]. k, v: [T, Hkv, K], Hkv a divisor of Hq; one floating dtype, one device.
        cu_seqlens: int [N + 1], 0 = first, rising, last = T: sequence i is rows cu[i]:cu[i + 1].
        causal: whether a token sees only itself and the tokens before it. A NaN spreads within its
            sequence, even to earlier tokens.
        scale: factor on q . k; K ** -0.5 by default.
        active: which sequences take part, if they are not a prefix or only the device knows: bool
            [N], or an integer (a tensor of one element), the number of leading sequences. Rows of
            the others are not read; they are 0 in the output and in the gradients. The host does
            not wait for it.
        window: a token sees only tokens at a smaller distance than this, from 1 on; None for no
            limit. "triton" and "xformers" do not support a window that is shorter than the longest
            sequence.
        impl: "triton" (fp32, bf16, fp16; K a multiple of 16, at most 128), "sdpa" (torch, on a
            rectangle), "varlen" (torch's FlashAttention 2), "flash_attn", "xformers" (packages),
            "reference" (a loop over sequences). "auto" is triton on CUDA for the dtypes, widths and
            windows that it supports, else sdpa.
        plan: `AttentionPlan.of(cu_seqlens)` on q's device, made once for all layers. Without it the
            call makes one, and waits for a cu_seqlens on a device. The kernels follow the plan: of
            a cu_seqlens on a device only T and N are compared with it.

    Raises:
        ValueError: shapes, dtypes, devices, boundaries or an `impl` that are not as described.
    """
    check_impl(impl, IMPLS)
    _check(q, k, v, cu_seqlens, active)
    if plan is None:
        plan = AttentionPlan.of(cu_seqlens).to(q.device)
    _check_plan(plan, q, cu_seqlens)
    window = _limit(window, plan)
    if impl == "auto":
        supported = q.is_cuda and q.dtype in DTYPES and q.shape[-1] in WIDTHS and window is None
        impl = "triton" if supported else "sdpa"
    if window is not None and impl not in LOCAL:
        raise ValueError(
            f"impl: {impl} supports windows from the longest sequence on, {plan.max_seqlen} "
            f"tokens, got a window of {window}: choose {', '.join(LOCAL[:-1])}"
        )
    if impl == "triton" and use_triton(impl, q) and q.shape[-1] not in WIDTHS:
        raise ValueError(
            f"impl: triton supports heads of 16 to 128, multiples of 16, got K = {q.shape[-1]}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if impl == "reference":
        options: dict[str, Any] = {"scale": scale, "active": active, "window": window}
        return attention_ref(q, k, v, cu_seqlens=cu_seqlens, causal=causal, **options)
    alive_T = None if active is None else plan.alive_T(active)
    if impl == "triton":
        from . import _op  # imports triton, which not every platform has

        return _op.run(q, k, v, plan, alive_T, scale, causal)
    from . import _backends

    if alive_T is not None:  # Attention over zeros is zero, and so are its gradients.
        q, k, v = (x.masked_fill(~alive_T[:, None, None], 0) for x in (q, k, v))
    local = {} if window is None else {"window": window}
    return getattr(_backends, impl)(q, k, v, plan, scale, causal, **local)


def _limit(window: int | None, plan: AttentionPlan) -> int | None:
    """Return the window, None if it hides no token of the batch. ValueError below 1."""
    if window is not None and window < 1:
        raise ValueError(f"window: expected 1 or more, got {window}")
    return None if window is None or window >= plan.max_seqlen else window


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


def _check_plan(plan: AttentionPlan, q: Tensor, cu_seqlens: Tensor) -> None:
    got = plan.tokens, plan.sequences, plan.buffer.device
    expected = len(q), len(cu_seqlens) - 1, q.device
    if plan.tokens != len(q) and plan.sequences == len(cu_seqlens) - 1:
        raise ValueError(f"cu_seqlens: expected the last to be T = {len(q)}, got {plan.tokens}")
    if got != expected:
        raise ValueError(f"plan: expected (T, N, device) {expected}, got {got}")
    # Reading a device tensor would wait for the device, and break a compiled graph.
    readable = cu_seqlens.is_cpu and plan.buffer.is_cpu and not torch.compiler.is_compiling()
    if readable and (cu_seqlens != plan.cu_seqlens).any():
        raise ValueError("plan: expected that of cu_seqlens, got that of other boundaries")
