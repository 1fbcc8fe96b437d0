"""Our packed attention for models of transformers, under the name `mlembed`.

    from mlembed import attention_interface
    attention_interface.register()
    model = AutoModel.from_pretrained(path, attn_implementation="mlembed")

transformers asks two functions of an attention: `mask`, once a forward pass, which makes of the
user's padding mask what the layers are handed, and `attend`, in every layer. Ours unpad, attend
within each sequence, and pad again: rows of padding are 0. Sequences are the rows of the batch, or,
as with FlashAttention, what `cu_seq_lens_q` bounds (DataCollatorWithFlattening), or, where there is
no mask, runs of `position_ids` that rise by one.

What the kernels have not is an error: windows, soft caps, biases, sinks, dropout, keys of a cache.

Letters: B rows of a batch, S slots of a row, H heads, K head width, T tokens that are no padding.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from einops import rearrange
from torch import Tensor, nn
from transformers import masking_utils

from mlembed_kernels import AttentionPlan, attention

# What else transformers hands to an attention function and would change its result.
REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "cache", "output_attentions")


def register() -> None:
    """Make `attn_implementation="mlembed"` known to transformers.

    Raises:
        ValueError: a transformers that asks for masks in another way, as before 5.4.
    """
    if "q_length" not in inspect.signature(masking_utils.flash_attention_mask).parameters:
        raise ValueError(f"transformers: expected 5.4 or newer, got {transformers.__version__}")
    transformers.AttentionInterface.register("mlembed", attend)
    transformers.AttentionMaskInterface.register("mlembed", mask)


# ---- once a forward pass ----


@dataclass
class Forward:
    """What the layers of one forward pass share; rides on the mask that they are handed."""

    causal: bool
    layout: "Layout | None" = None  # by the first layer


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a padded batch are, and what attention over them has to compute."""

    rows_T: Tensor | None  # int64 [T] in 0..B S; None: all of them, there is no padding
    plan: AttentionPlan


@torch.compiler.disable
def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """-> integers or bools [B, S]: 0 for padding, and neighbours of one number are one sequence.

    Without a mask [B, 0]: no layer has looked yet, `attend` does. New in every pass, so that what
    is found out about it once holds for all layers and no longer.

    Raises:
        ValueError: a window or another pattern, queries and keys of unlike lengths (a cache).
    """
    kinds = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    if local_size is not None:
        raise ValueError(f"mlembed attention: expected no window, got one of {local_size} tokens")
    if use_vmap or (attention_mask is not None and mask_function not in kinds):
        raise ValueError("mlembed attention: expected all keys, or all before, got another mask")
    _check_lengths(q_length, kv_length)
    if attention_mask is not None:
        numbers_BS = attention_mask[:, :]  # another tensor on the same memory
    elif mask_function in kinds:
        numbers_BS = torch.ones(batch_size, 0, dtype=torch.bool, device=device)
    else:
        numbers_BS = _packed(mask_function, batch_size, q_length, device)
    causal = mask_function is not masking_utils.bidirectional_mask_function
    numbers_BS.mlembed = Forward(causal)  # type: ignore[attr-defined]
    return numbers_BS


def _packed(sees: Callable[..., Any], B: int, S: int, device: torch.device | str) -> Tensor:
    """The sequences that a mask of transformers tells apart, by asking it about neighbours.

    Its packed masks are closures; asked about all pairs, it would answer with [S, S].
    """
    b = torch.arange(B, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    t = torch.arange(S - 1, device=device)
    if sees(b, head, t, t + 1).any():
        raise ValueError("mlembed attention: expected all keys, or all before, got another mask")
    begins = ~sees(b, head, t + 1, t).expand(B, S - 1)
    return nn.functional.pad(begins, (1, 0), value=True).cumsum(1)


def _layout(
    shape: tuple[int, int],
    device: torch.device,
    numbers_BS: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout:
    """The one place that waits for the device: masks, positions and bounds are read on the host."""
    B, S = shape
    given = None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64)
    if numbers_BS is None and given is not None:
        return Layout(None, AttentionPlan.of(given).to(device))
    if numbers_BS is not None:
        numbers = numbers_BS.to("cpu", torch.int64)
    elif position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape[1] != S:
            raise ValueError(f"position_ids: expected [{B}, {S}], got {list(position_ids.shape)}")
        steps = position_ids.to("cpu", torch.int64).expand(B, S).diff(dim=1)
        numbers = 1 + nn.functional.pad((steps != 1).cumsum(1), (1, 0))
    else:
        numbers = torch.ones(B, S, dtype=torch.int64)
    rows = numbers.flatten().nonzero()[:, 0]
    # Over the tokens that are left: a sequence begins with each row and with each new number.
    begins = (numbers.flatten()[rows].diff() != 0) | ((rows // S).diff() != 0)
    inner = (1 + begins.nonzero()[:, 0]).tolist()
    bounds = torch.tensor([0, *inner, len(rows)] if len(rows) else [0])
    if given is not None and (len(rows) < B * S or not torch.equal(given, bounds)):
        raise ValueError(
            f"cu_seq_lens_q: expected the mask's {bounds.tolist()[:9]}, got {given.tolist()[:9]}"
        )
    rows_T = None if len(rows) == B * S else rows.to(device, non_blocking=True)
    return Layout(rows_T, AttentionPlan.of(bounds).to(device))


# ---- in every layer ----


@torch.compiler.disable  # the number of tokens is data
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, H, S, K], key and value [B, Hkv, S, K] -> [B, S, H, K], and no weights.

    Args:
        attention_mask: from `mask`; None asks for what `position_ids` or `cu_seq_lens_q` say.
        dropout: 0. scaling: factor on the scores; K ** -0.5 by default.
        is_causal: the layer's own `is_causal` by default.

    Raises:
        ValueError: whatever the kernels have not; shapes that do not fit.
    """
    _check(module, query, key, attention_mask, dropout, options)
    B, _, S, _ = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    shared = getattr(attention_mask, "mlembed", None)
    if shared is not None and shared.causal != causal:
        raise ValueError(f"is_causal: expected {shared.causal}, as the mask is, got {causal}")
    layout = shared.layout if shared is not None else None
    if layout is None:
        given = attention_mask if attention_mask is not None and attention_mask.shape[1] else None
        cu_seqlens = _same(cu_seq_lens_q, cu_seq_lens_k)
        layout = _layout((B, S), query.device, given, position_ids, cu_seqlens)
        if shared is not None:
            shared.layout = layout
    rows_T, plan = layout.rows_T, layout.plan
    # Norms leave queries and keys in fp32 where autocast narrows values.
    q, k, v = (rearrange(x.to(value.dtype), "b h s k -> (b s) h k") for x in (query, key, value))
    if rows_T is not None:
        q, k, v = (x.index_select(0, rows_T) for x in (q, k, v))
    out = attention(q, k, v, cu_seqlens=plan.cu_seqlens, causal=causal, scale=scaling, plan=plan)
    if rows_T is not None:
        out = out.new_zeros(B * S, *out.shape[1:]).index_copy(0, rows_T, out)
    return rearrange(out, "(b s) h k -> b s h k", b=B), None


def _same(cu_seqlens: Tensor | None, keys: Tensor | None) -> Tensor | None:
    """Bounds of queries, which have to be those of keys."""
    if (cu_seqlens is None) != (keys is None) or (
        keys is not cu_seqlens and not torch.equal(cu_seqlens, keys)  # type: ignore[arg-type]
    ):
        raise ValueError("cu_seq_lens: expected the same for queries and keys, got two")
    return cu_seqlens


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> None:
    for name in REFUSED:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"mlembed attention: expected no {name}, got {options[name]}")
    if dropout:
        raise ValueError(
            f"mlembed attention: expected no dropout of attention weights, got {dropout} "
            "(load the model with attention_dropout=0.0 or attention_probs_dropout_prob=0.0)"
        )
    config = getattr(module, "config", None)
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"mlembed attention: expected self-attention only, got {name}")
    _check_lengths(query.shape[2], key.shape[2])
    B, S = query.shape[0], query.shape[2]
    if attention_mask is not None and (
        tuple(attention_mask.shape) not in ((B, S), (B, 0)) or attention_mask.is_floating_point()
    ):
        raise ValueError(
            f"attention_mask: expected bools or integers [{B}, {S}], 0 for padding, got "
            f"{attention_mask.dtype} {list(attention_mask.shape)}"
        )


def _check_lengths(queries: int, keys: int) -> None:
    if queries != keys:
        raise ValueError(
            f"mlembed attention: expected as many queries as keys, got {queries} and {keys} "
            "(text is encoded as a whole: use_cache=False)"
        )
