"""Attention over packed sequences by others: what `attention` is measured against.

Each peer is made once for a case: a function of its leaves, what to prepare them from a set of
inputs (the inputs themselves by default), and what has to be said of it. Sequences' bounds, masks
and copies that a model would make once for all layers are made here, outside of every time.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels.attention.attention import attention
from mlembed_kernels.attention.plan import AttentionPlan

from ..harness import Leaves, Missing

Tensors = tuple[Tensor, ...]
Prepare = Callable[["Packed"], tuple[Tensors, Tensors]]  # -> leaves, gradients of what they give


class Packed(Leaves):
    """q, k, v, and the gradient of what becomes of them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        super().__init__()
        self.stacked = tuple(x.requires_grad_() for x in (q, k, v))
        self.dout = dout


@dataclass(frozen=True)
class Batch:
    """The sequences as every peer wants them: bounds on the device, sizes on the host."""

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


def module_of(name: str, package: str) -> Any:
    """A library's module.

    Raises:
        Missing: it is not there (one that is there and fails to import raises what it raises).
    """
    parts = name.split(".")
    for i in range(len(parts)):
        if importlib.util.find_spec(".".join(parts[: i + 1])) is None:
            raise Missing(f"{package} is not installed")
    return importlib.import_module(name)


def by_schema(operator: Any, **values: Any) -> Any:
    """Calls an operator by its arguments' names, which outlive their order.

    Raises:
        TypeError: this version asks for something else.
    """
    arguments = operator._schema.arguments
    asked = [a.name for a in arguments if not a.has_default_value() and a.name not in values]
    if asked:
        raise TypeError(f"{operator}: this version asks for {', '.join(asked)}")
    return operator(**{a.name: values[a.name] for a in arguments if a.name in values})


class Manual(torch.autograd.Function):
    """A forward and a backward that a library has side by side.

    forward: q, k, v -> out, what to save. backward: dout, q, k, v, out, saved -> dq, dk, dv.
    """

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[..., tuple[Tensor, Tensors]],
        backward: Callable[..., Tensors],
        *inputs: Tensor,
    ) -> Tensor:
        out, saved = forward(*inputs)
        ctx.backward_of = backward
        ctx.save_for_backward(*inputs, out, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.backward_of(grads[0].contiguous(), *ctx.saved_tensors)


# ---- torch's own ----


def repeated(group: int) -> Prepare:
    """Keys and values of every query head written out, for who knows no groups."""

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
    """torch's FlashAttention 2 as it was measured on 2026-11-20: torch 2.11 shows no groups."""
    if batch.group == 1:
        return Peer(varlen_function(batch))
    note = "kv repeated for every query head, outside of the time"
    return Peer(varlen_function(batch), repeated(batch.group), note)


def varlen_gqa(batch: Batch, smoke: bool) -> Peer:
    """The same kernel with kv as they are, which it can read, where this torch lets it."""
    from torch.nn.attention.varlen import varlen_attn

    known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return Peer(varlen_function(batch, **({"enable_gqa": True} if known else {})))


def flex_mask(batch: Batch) -> Any:
    """Documents as FlexAttention's block mask."""
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
    compiled = device.type == "cuda"  # else [T, T] is formed
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
    """Compiled backwards may else write over what they saved, and a second one is an error."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False


def cudnn(batch: Batch, smoke: bool) -> Peer:
    """cuDNN on packed rows. torch's backward there takes K for the longest sequence (query.size(2)
    of a [T, H, K]): where that is too short its gradients are wrong, and the row says so."""
    aten = torch.ops.aten
    shared = {
        "cum_seq_q": batch.cu,
        "cum_seq_k": batch.cu,
        "max_q": batch.longest,
        "max_k": batch.longest,
        "attn_bias": None,
        "dropout_p": 0.0,
        "is_causal": batch.causal,
    }

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensors]:
        found = by_schema(
            aten._cudnn_attention_forward.default,
            query=q,
            key=k,
            value=v,
            compute_log_sumexp=True,
            return_debug_mask=False,
            **shared,
        )
        return found[0], (found[1], found[6], found[7])

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *saved: Tensor
    ) -> Tensors:
        logsumexp, seed, offset = saved
        return by_schema(
            aten._cudnn_attention_backward.default,
            grad_out=dout,
            query=q,
            key=k,
            value=v,
            out=out,
            logsumexp=logsumexp,
            philox_seed=seed,
            philox_offset=offset,
            **shared,
        )

    return Peer(lambda *x: Manual.apply(forward, backward, *x))


def sdpa(batch: Batch, smoke: bool) -> Peer:
    """torch's dense attention on a padded rectangle, laid out and packed again within the time."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(
            q, k, v, cu_seqlens=batch.cu, causal=batch.causal, impl="sdpa", plan=batch.plan
        )

    return Peer(function)


# ---- packages ----


def flash(package: Any, batch: Batch) -> Callable[..., Tensor]:
    """`flash_attn_varlen_func`, as versions 2, 3 and 4 have it."""
    if not hasattr(package, "flash_attn_varlen_func"):
        raise Missing(f"{package.__name__} has no flash_attn_varlen_func")
    cu, n = batch.cu, batch.longest

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = package.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=n,
            max_seqlen_k=n,
            causal=batch.causal,
        )
        return out[0] if isinstance(out, tuple) else out

    return function


def flash_attn(batch: Batch, smoke: bool) -> Peer:
    return Peer(flash(module_of("flash_attn", "flash-attn"), batch))


def fa4(batch: Batch, smoke: bool) -> Peer:
    return Peer(flash(module_of("flash_attn.cute", "flash-attn-4"), batch))


def fa3(batch: Batch, smoke: bool) -> Peer:
    """flash_attn_interface, or the operators of its binary alone, which xformers' wheels hold."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return Peer(flash(importlib.import_module("flash_attn_interface"), batch))
    places = [Path(p) / folder for p in sys.path for folder in (".", "xformers")]
    binaries = [path for place in places for path in place.glob("flash_attn_3/_C*.so")]
    if not binaries:
        raise Missing("flash-attn-3 is not installed")
    torch.ops.load_library(str(binaries[0]))
    shared = {
        "cu_seqlens_q": batch.cu,
        "cu_seqlens_k": batch.cu,
        "max_seqlen_q": batch.longest,
        "max_seqlen_k": batch.longest,
        "is_causal": batch.causal,
    }

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensors]:
        scale = q.shape[-1] ** -0.5
        operator = torch.ops.flash_attn_3.fwd.default
        out, lse, *_ = by_schema(operator, q=q, k=k, v=v, softmax_scale=scale, **shared)
        return out, (lse,)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Tensors:
        grads = tuple(torch.empty_like(x) for x in (q, k, v))  # written in place
        given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
        given |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        scale = q.shape[-1] ** -0.5
        by_schema(torch.ops.flash_attn_3.bwd.default, **given, softmax_scale=scale, **shared)
        return grads

    return Peer(lambda *x: Manual.apply(forward, backward, *x))


def xformers(batch: Batch, smoke: bool) -> Peer:
    """Whatever it dispatches to, on [1, T, Hkv, Hq / Hkv, K]."""
    ops = module_of("xformers.ops", "xformers")
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
    """RMSNorm of every head of q and k, then rotary positions, in a pass of its own: what loading q
    and k in the attention itself could save. Toy runs stop at the front half of the compiler."""
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
    "varlen": varlen,
    "varlen_gqa": varlen_gqa,
    "flex": flex,
    "cudnn": cudnn,
    "fa3": fa3,
    "fa4": fa4,
    "flash_attn": flash_attn,
    "xformers": xformers,
    "sdpa": sdpa,
    "rope_qk_norm": rope_qk_norm,
}
ANYWHERE = "sdpa", "rope_qk_norm"  # the others have no backward, or nothing, but on CUDA


def build(name: str, batch: Batch, smoke: bool) -> Peer:
    """A peer for these sequences.

    Raises:
        Missing: its library is not installed, or there is no GPU and it needs one.
    """
    if name not in ANYWHERE and batch.cu.device.type != "cuda":
        raise Missing("needs CUDA")
    return PEERS[name](batch, smoke)
