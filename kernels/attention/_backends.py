"""Attention over packed sequences by libraries, under the names that `attention(impl=)` takes.

    sdpa        torch's dense attention on a rectangle: every device, dtype and head width
    varlen      FlashAttention 2 inside torch, torch.nn.attention.varlen
    flash_attn  the package flash-attn
    xformers    the package xformers: FlashAttention 2, in fp32 CUTLASS

Each is what its library has: none replaces another, and what is missing is said with the line that
installs it. All but sdpa need CUDA, and add up dq with atomics: its last bits differ from call to
call, except under `torch.use_deterministic_algorithms`, which xformers refuses.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .plan import AttentionPlan

HALF = (torch.bfloat16, torch.float16)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, causal: bool
) -> Tensor:
    """torch's dense attention. Only q, k, v are laid out on rectangles, for this one call.

    On CPUs one for each quarter of the sequences, which are alike in length where a batch is
    sorted; on a device, where that would mean reading the lengths, a single one.
    """
    cu_seqlens = plan.cu_seqlens
    if q.device.type != "cpu" or cu_seqlens.numel() < 16:
        return _rectangle(q, k, v, cu_seqlens, plan.max_seqlen, causal, scale)
    outs = []
    for part in cu_seqlens[1:].chunk(4):  # the ends of its sequences
        first = cu_seqlens[cu_seqlens < part[0]][-1:]
        cu = torch.cat([first, part])
        rows = slice(int(cu[0]), int(cu[-1]))
        L = int(cu.diff().max())
        outs.append(_rectangle(q[rows], k[rows], v[rows], cu - cu[0], L, causal, scale))
    return torch.cat(outs)


def _rectangle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    L: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """Attention of sequences of at most L tokens on a rectangle [N, H, L, K], packed again.

    A sequence starts at slot 0 of its row, so a causal query never reaches the unused tail.
    """
    T, N = q.shape[0], cu_seqlens.numel() - 1
    lengths = cu_seqlens.diff().long()
    texts = torch.arange(N, device=q.device)
    sequence_T = torch.repeat_interleave(texts, lengths, output_size=T)
    position_T = torch.arange(T, device=q.device) - cu_seqlens.long()[sequence_T]
    slot_T = sequence_T * L + position_T

    def spread(x: Tensor) -> Tensor:
        rectangle = x.new_zeros(N * L, *x.shape[1:]).index_copy(0, slot_T, x)
        return rearrange(rectangle, "(n l) h k -> n h l k", n=N, l=L)

    q, k, v = spread(q), spread(k), spread(v)
    k, v = _repeated(q, k, v)
    mask = None
    if not causal:
        mask = (torch.arange(L, device=q.device) < lengths[:, None])[:, None, None]
    if q.device.type == "cpu" and L <= 256:
        out = _softmax_cpu(q, k, v, mask, scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return rearrange(out, "n h l k -> (n l) h k")[slot_T]


def _softmax_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scores in full. At [256, 4, 48, 48], forward and backward, torch 2.13 on 2 Zen cores: 24 ms
    (bf16 12 ms) against 68 ms (64 ms) of its flash kernel for CPUs. 2026-11-20."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def varlen(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, causal: bool
) -> Tensor:
    """torch's own FlashAttention 2. Where it has no grouped queries, k and v are repeated."""
    _check(q, "varlen", plan, HALF)
    attend, grouped = _varlen()
    options = {"enable_gqa": True} if grouped else {}
    if not grouped:
        k, v = _repeated(q, k, v)
    return attend(
        q,
        k,
        v,
        plan.cu_seqlens,
        plan.cu_seqlens,
        plan.max_seqlen,
        plan.max_seqlen,
        scale=scale,
        window_size=(-1, 0 if causal else -1),
        **options,
    )


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, causal: bool
) -> Tensor:
    """flash-attn's function for packed sequences."""
    _check(q, "flash_attn", plan, HALF)
    return _flash_attn()(
        q,
        k,
        v,
        plan.cu_seqlens,
        plan.cu_seqlens,
        plan.max_seqlen,
        plan.max_seqlen,
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def xformers(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, causal: bool
) -> Tensor:
    """xformers' memory_efficient_attention. Its grouped queries have no backward: k, v repeated."""
    _check(q, "xformers", plan, (*HALF, torch.float32))
    fmha = _xformers()
    q, k, v = (x[None] for x in (q, *_repeated(q, k, v)))
    mask = _block_diagonal(fmha.attn_bias, plan, causal)
    return fmha.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)[0]


def _block_diagonal(attn_bias: Any, plan: AttentionPlan, causal: bool) -> Any:
    """xformers' mask of a packed batch.

    From the boundaries on the device: its own `from_seqlens` takes lengths on the host and copies
    them at every call. Of its list of boundaries on the host, kernels ask no more than whether
    queries and keys have the same.
    """
    blocks = attn_bias._SeqLenInfo(
        seqstart=plan.cu_seqlens,
        max_seqlen=plan.max_seqlen,
        min_seqlen=1,
        seqstart_py=[0, plan.tokens],
    )
    kind = attn_bias.BlockDiagonalCausalMask if causal else attn_bias.BlockDiagonalMask
    return kind(q_seqinfo=blocks, k_seqinfo=blocks)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads (axis 1) of k and v once for every query head that reads them."""
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


# ---- what is there ----


def _check(q: Tensor, impl: str, plan: AttentionPlan, dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError, before anything is launched, for what kernels of CUDA libraries have not."""
    if not q.is_cuda:
        raise ValueError(f"impl: {impl} needs CUDA, got {q.device}")
    if q.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"impl: {impl} has {names}, got {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise ValueError(
            f"impl: {impl} has heads of 8 to 256, multiples of 8, got K = {q.shape[-1]}"
        )
    if not plan.sequences:
        raise ValueError(f"impl: {impl} needs one or more sequences, got none")


@cache
def _varlen() -> tuple[Callable[..., Any], bool]:
    """torch's function, and whether it takes grouped queries (`enable_gqa`, from 2.12 on)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        options = set()
    else:
        options = set(inspect.signature(varlen_attn).parameters)
    if not {"scale", "window_size"} <= options:
        raise ValueError(f"impl: varlen needs torch 2.11 or newer, got {torch.__version__}")
    return varlen_attn, "enable_gqa" in options


def _flash_attn() -> Callable[..., Tensor]:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:  # also an extension built for another torch
        raise ValueError(
            "impl: flash_attn needs the package flash-attn (built against the torch that is "
            f"installed): pip install --no-build-isolation 'flash-attn>=2.8' ({error})"
        ) from None
    return flash_attn_varlen_func


def _xformers() -> Any:
    try:
        from xformers.ops import fmha
    except ImportError as error:  # also a flash-attn that it does not know
        raise ValueError(
            f"impl: xformers needs the package xformers: pip install 'mlembed[xformers]' ({error})"
        ) from None
    return fmha
