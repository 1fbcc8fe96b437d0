"""Attention over packed sequences by other implementations.

A peer is built once for a case: a function of leaves, a function that prepares the leaves from a
set of inputs (by default the inputs), and a note. Bounds, masks and copies that a model makes once
for all layers are made here and not timed.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels.attention.attention import attention
from mlembed_kernels.attention.plan import AttentionPlan

from ..harness import Leaves, Missing, Tensors, imported

Prepare = Callable[["Packed"], tuple[Tensors, Tensors]]  # -> leaves, gradients of the outputs


class Packed(Leaves):
    """q, k, v, and the gradient of the output."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        super().__init__()
        self.stacked = tuple(x.requires_grad_() for x in (q, k, v))
        self.dout = dout


@dataclass(frozen=True)
class Batch:
    """Bounds of the sequences on the device, sizes on the host."""

    cu: Tensor  # int32 [N + 1]
    T: int
    longest: int
    causal: bool
    group: int  # query heads of a key/value head
    plan: AttentionPlan

    @staticmethod
    def of(lengths: Sequence[int], causal: bool, group: int, device: torch.device) -> "Batch":
        cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
        plan = AttentionPlan.of(cu).to(device)
        return Batch(cu.to(device), int(cu[-1]), max(lengths), causal, group, plan)


@dataclass(frozen=True)
class Peer:
    function: Callable[..., Any]
    prepare: Prepare | None = None
    note: str | None = None


# ---- torch's own ----


def repeated(group: int) -> Prepare:
    """Repeat keys and values for every query head, for peers without grouped heads."""

    def prepare(inputs: Packed) -> tuple[Tensors, Tensors]:
        q, k, v = inputs.stacked
        k, v = (x.detach().repeat_interleave(group, 1).requires_grad_() for x in (k, v))
        return (q, k, v), (inputs.dout,)

    return prepare


def varlen_function(batch: Batch, **options: Any) -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    cu, n = batch.cu, batch.longest
    window = (-1, 0) if batch.causal else (-1, -1)
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, n, n, window_size=window, **options)


def varlen(batch: Batch, smoke: bool) -> Peer:
    """Return torch's FlashAttention 2, as it was measured on 2026-11-20, without grouped heads."""
    if batch.group == 1:
        return Peer(varlen_function(batch))
    note = "kv repeated for every query head, outside of the time"
    return Peer(varlen_function(batch), repeated(batch.group), note)


def varlen_gqa(batch: Batch, smoke: bool) -> Peer:
    """Return the same kernel with grouped heads, if this torch has an option for them."""
    from torch.nn.attention.varlen import varlen_attn

    known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return Peer(varlen_function(batch, **({"enable_gqa": True} if known else {})))


def flex_mask(batch: Batch) -> Any:
    """Return the sequences as a block mask of FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    sequence = torch.repeat_interleave(
        torch.arange(len(batch.cu) - 1, device=batch.cu.device),
        batch.cu.diff().long(),
        output_size=batch.T,
    )

    def mask(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        same = sequence[q] == sequence[s]
        return same & (s <= q) if batch.causal else same

    device = batch.cu.device
    compiled = device.type == "cuda"
    return create_block_mask(mask, None, None, batch.T, batch.T, device=device, _compile=compiled)


def flex(batch: Batch, smoke: bool) -> Peer:
    from torch.nn.attention.flex_attention import flex_attention

    allow_backward_again()
    mask = flex_mask(batch)
    on_cuda = batch.cu.device.type == "cuda"
    attend: Any = torch.compile(flex_attention, dynamic=False) if on_cuda else flex_attention

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = attend(q, k, v, block_mask=mask, enable_gqa=batch.group > 1)
        return out[0].transpose(0, 1)

    return Peer(function)


def allow_backward_again() -> None:
    """Let a compiled backward run twice: without this it may overwrite its saved tensors."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False


def sdpa(batch: Batch, smoke: bool) -> Peer:
    """Return torch's dense attention on a padded rectangle; padding and packing are timed."""
    options: dict[str, Any] = {"cu_seqlens": batch.cu, "causal": batch.causal, "plan": batch.plan}
    return Peer(lambda q, k, v: attention(q, k, v, impl="sdpa", **options))


# ---- packages ----


def flash(package: Any, batch: Batch) -> Callable[..., Tensor]:
    """Return `flash_attn_varlen_func` of version 2, 3 or 4."""
    if not hasattr(package, "flash_attn_varlen_func"):
        raise Missing(f"{package.__name__} has no flash_attn_varlen_func")
    options: dict[str, Any] = {f"cu_seqlens_{x}": batch.cu for x in "qk"}
    options |= {f"max_seqlen_{x}": batch.longest for x in "qk"} | {"causal": batch.causal}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = package.flash_attn_varlen_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return function


def flash_attn(batch: Batch, smoke: bool) -> Peer:
    return Peer(flash(imported("flash_attn", "flash-attn"), batch))


def fa3(batch: Batch, smoke: bool) -> Peer:
    return Peer(flash(imported("flash_attn_interface", "flash-attn-3"), batch))


def fa4(batch: Batch, smoke: bool) -> Peer:
    return Peer(flash(imported("flash_attn.cute", "flash-attn-4"), batch))


def xformers(batch: Batch, smoke: bool) -> Peer:
    """Return its own choice of kernel, on [1, T, Hkv, Hq / Hkv, K]."""
    ops = imported("xformers.ops", "xformers")
    bias: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    blocks = bias.BlockDiagonalCausalMask if batch.causal else bias.BlockDiagonalMask
    mask = blocks.from_seqlens(batch.cu.diff().tolist(), device=batch.cu.device)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T, Hq, K = q.shape
        if batch.group == 1:
            out = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
            return out[0]
        shape = 1, T, Hq // batch.group, batch.group, K
        k, v = (x[None, :, :, None].expand(shape) for x in (k, v))
        return ops.memory_efficient_attention(q.view(shape), k, v, attn_bias=mask).view(T, Hq, K)

    return Peer(function)


# ---- not attention ----


def rope_qk_norm(batch: Batch, smoke: bool) -> Peer:
    """Return RMSNorm of the heads of q and k, then rotary positions, as a pass of their own.

    An attention kernel that does both as it loads q and k could save this time. Toy runs use the
    eager backend of the compiler.
    """
    allow_backward_again()

    def rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]

    def both(q: Tensor, k: Tensor, *others: Tensor) -> Tensors:
        q_weight, k_weight, cos, sin = others
        return rotated(q, q_weight, cos, sin), rotated(k, k_weight, cos, sin)

    compiled: Any = torch.compile(both, dynamic=False, backend="eager" if smoke else "inductor")
    begin_T = batch.plan.begin_T
    tables: list[Tensor] = []  # cos, sin

    def prepare(inputs: Packed) -> tuple[Tensors, Tensors]:
        q, k, _ = inputs.stacked
        weights = [q.new_ones(q.shape[-1]).requires_grad_() for _ in "qk"]
        if not tables:
            half = torch.arange(0, q.shape[-1], 2, device=q.device) / q.shape[-1]
            position = torch.arange(batch.T, device=q.device) - begin_T
            angle = torch.outer(position, 1e4**-half).repeat(1, 2)
            tables.extend([angle.cos().to(q.dtype), angle.sin().to(q.dtype)])
        return (q, k, *weights), (inputs.dout, k.detach())

    note = "no attention: QK-norm and RoPE by themselves; only its ms mean anything"
    return Peer(lambda *leaves: compiled(*leaves, *tables), prepare, note)


PEERS: dict[str, Callable[[Batch, bool], Peer]] = {
    peer.__name__: peer
    for peer in (*(varlen, varlen_gqa, flex, fa3, fa4, flash_attn, xformers, sdpa, rope_qk_norm),)
}
ANYWHERE = "sdpa", "rope_qk_norm"  # the backward of the others needs CUDA


def build(name: str, batch: Batch, smoke: bool) -> Peer:
    """Return a peer for these sequences.

    Raises Missing if its library is not installed, or if it needs a GPU and there is none.
    """
    if name not in ANYWHERE and batch.cu.device.type != "cuda":
        raise Missing("needs CUDA")
    return PEERS[name](batch, smoke)
