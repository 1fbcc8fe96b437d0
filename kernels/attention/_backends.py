"""Libraries for attention over packed sequences, under their names in `attention(impl=)`.

    sdpa        torch's dense attention on a rectangle: every device, dtype and head width
    varlen      FlashAttention 2 inside torch, torch.nn.attention.varlen
    flash_attn  the package flash-attn
    xformers    the package xformers: FlashAttention 2, in fp32 CUTLASS

None replaces another: a missing library is an error with the command that installs it. All but
sdpa need CUDA, and add up dq with atomics: its last bits differ from call to call, except under
`torch.use_deterministic_algorithms`, which xformers rejects.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import AttentionPlan

HALF = (torch.bfloat16, torch.float16)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """Compute torch's dense attention, for which q, k, v are copied to rectangles.

    CPUs take a rectangle for each quarter of the sequences, which have similar lengths in a sorted
    batch; a device, on which that would mean reading the lengths, takes a single one.
    """
    cu_seqlens = plan.cu_seqlens
    if q.device.type != "cpu" or cu_seqlens.numel() < 16:
        return _rectangle(q, k, v, cu_seqlens, plan.max_seqlen, causal, scale, window)
    outs = []
    for part in cu_seqlens[1:].chunk(4):
        first = cu_seqlens[cu_seqlens < part[0]][-1:]
        cu = torch.cat([first, part])
        rows = slice(int(cu[0]), int(cu[-1]))
        L = int(cu.diff().max())
        outs.append(_rectangle(q[rows], k[rows], v[rows], cu - cu[0], L, causal, scale, window))
    return torch.cat(outs)


def _rectangle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    L: int,
    causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """Return attention of sequences of at most L tokens, by way of a rectangle [N, H, L, K].

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
        return rectangle.unflatten(0, (N, L)).transpose(1, 2)

    q, k, v = spread(q), spread(k), spread(v)
    k, v = _repeated(q, k, v)
    mask = None
    if not causal:
        mask = (torch.arange(L, device=q.device) < lengths[:, None])[:, None, None]
    if window is not None:
        near_LL = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1 - window)
        near_LL = near_LL.tril(0 if causal else window - 1)
        # Queries of the unused tail see its keys: a softmax over no key would be NaN.
        mask = near_LL if mask is None else near_LL & (mask.mT == mask)
    if q.device.type == "cpu" and L <= 256:
        out = _softmax_cpu(q, k, v, mask, scale)
    else:
        # A mask of a window is causal itself.
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
    return out.transpose(1, 2).flatten(0, 1)[slot_T]


def _softmax_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute attention from all scores at once.

    At [256, 4, 48, 48], forward and backward, torch 2.13 on 2 Zen cores took 24 ms (bf16: 12 ms),
    its flash kernel for CPUs 68 ms (64 ms). 2026-11-20.
    """
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # Adding has no backward of its own, unlike masked_fill, which copies and fills both ways.
    bias = torch.zeros(mask.shape, dtype=scores.dtype, device=q.device)
    scores.add_(bias.masked_fill_(~mask, -torch.inf))
    return scores.softmax(-1).to(v.dtype) @ v


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """Call torch's own FlashAttention 2, with k and v repeated if it lacks grouped queries."""
    _check(q, "varlen", plan, HALF)
    attend, grouped = _varlen()
    options = {"enable_gqa": True} if grouped else {}
    if not grouped:
        k, v = _repeated(q, k, v)
    bounds = plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen
    return attend(q, k, v, *bounds, scale=scale, window_size=_sides(causal, window), **options)


def flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """Call flash-attn's function for packed sequences."""
    _check(q, "flash_attn", plan, HALF)
    bounds = plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen
    same_bits = torch.are_deterministic_algorithms_enabled()
    local = {} if window is None else {"window_size": _sides(causal, window)}
    return _flash_attn()(
        q, k, v, *bounds, softmax_scale=scale, causal=causal, deterministic=same_bits, **local
    )


def _sides(causal: bool, window: int | None) -> tuple[int, int]:
    """Return how many tokens before and after itself a token sees, -1 for all of them."""
    side = -1 if window is None else window - 1
    return side, 0 if causal else side


def xformers(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, causal: bool
) -> Tensor:
    """Call xformers' memory_efficient_attention, whose grouped queries lack a backward."""
    _check(q, "xformers", plan, (*HALF, torch.float32))
    fmha = _xformers()
    q, k, v = (x[None] for x in (q, *_repeated(q, k, v)))
    mask = _block_diagonal(fmha.attn_bias, plan, causal)
    return fmha.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)[0]


def _block_diagonal(attn_bias: Any, plan: AttentionPlan, causal: bool) -> Any:
    """Return xformers' mask of a packed batch, from the boundaries on the device.

    Its own `from_seqlens` takes lengths on the host and copies them at every call. Its kernels only
    compare the host's lists of boundaries of queries and keys.
    """
    ends = [0, plan.tokens]
    blocks = attn_bias._SeqLenInfo(
        seqstart=plan.cu_seqlens, max_seqlen=plan.max_seqlen, min_seqlen=1, seqstart_py=ends
    )
    kind = attn_bias.BlockDiagonalCausalMask if causal else attn_bias.BlockDiagonalMask
    return kind(q_seqinfo=blocks, k_seqinfo=blocks)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v with each head (axis 1) once for every query head that reads it."""
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


# ---- availability ----


def _check(q: Tensor, impl: str, plan: AttentionPlan, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError for inputs that the CUDA libraries do not support."""
    if not q.is_cuda:
        raise ValueError(f"impl: {impl} needs CUDA, got {q.device}")
    if q.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"impl: {impl} supports {names}, got {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise ValueError(
            f"impl: {impl} supports heads of 8 to 256, multiples of 8, got K = {q.shape[-1]}"
        )
    if not plan.sequences:
        raise ValueError(f"impl: {impl} needs one or more sequences, got none")


@cache
def _varlen() -> tuple[Callable[..., Any], bool]:
    """Return torch's function, and whether it has `enable_gqa`, as from 2.12 on."""
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
    except ImportError as error:  # An extension built for another torch raises it too.
        raise ValueError(
            "impl: flash_attn needs the package flash-attn (built against the installed torch): "
            f"pip install --no-build-isolation 'flash-attn>=2.8' ({error})"
        ) from None
    return flash_attn_varlen_func


def _xformers() -> Any:
    try:
        from xformers.ops import fmha
    except ImportError as error:  # An unsupported version of flash-attn raises it too.
        raise ValueError(
            f"impl: xformers needs the package xformers: pip install 'mlembed[xformers]' ({error})"
        ) from None
    return fmha
