"""Packed attention for models of transformers, registered as `mlembed`.

    from mlembed.modeling import attention_interface
    attention_interface.register()
    model = AutoModel.from_pretrained(path, attn_implementation="mlembed")

transformers calls two functions of an attention: `mask`, once per forward pass, turns the user's
padding mask into what the layers get, and `attend` computes each layer. `attend` removes the
padding, attends within each sequence, and pads again with zeros. Sequences are the rows of the
batch; without a mask, they are the runs of rising `position_ids`, or, like for FlashAttention, what
`cu_seq_lens_q` bounds (DataCollatorWithFlattening).

Local layers see a window of tokens. Unsupported features raise ValueError: soft caps, biases,
sinks, dropout of attention weights, cross-attention, keys of a cache, masks made of the text.

Letters: B rows of a batch, S slots of a row, H heads, K head width, T tokens without padding.
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

# Options of transformers that would change the result.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "output_attentions")
PATTERNS = "causal or full attention, or a window of it"


def register() -> None:
    """Register `attn_implementation="mlembed"` with transformers.

    Raises:
        ValueError: transformers before 5.4, which calls masks with other arguments.
    """
    if "q_length" not in inspect.signature(masking_utils.flash_attention_mask).parameters:
        raise ValueError(f"transformers: expected 5.4 or newer, got {transformers.__version__}")
    transformers.AttentionInterface.register("mlembed", attend)
    transformers.AttentionMaskInterface.register("mlembed", mask)


# ---- once per forward pass ----


# Rows of a padded batch that are tokens, int64 [T] in 0..B S - 1 (None without padding), and the
# plan of attention over them.
Layout = tuple[Tensor | None, AttentionPlan]


@dataclass
class Forward:
    """State that the layers of one forward pass share, an attribute of their mask.

    The first layer sets `layout`. window, impl: as in `attention`.
    """

    causal: bool
    window: int | None = None
    layout: Layout | None = None
    impl: str = "auto"


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
    """Return integers or bools [B, S]: 0 is padding, equal neighbours are of one sequence.

    Without a mask it is [B, 0], and `attend` finds the sequences. The tensor is new in every pass:
    the layers of one pass share its attribute, a `Forward`.

    Raises:
        ValueError: not one of PATTERNS, more keys than queries (a cache).
    """
    _check_lengths(q_length, kv_length)
    # Of the masks of transformers, that of packed sequences holds their numbers.
    packed = attention_mask is None and not use_vmap and _holds_tensors(mask_function)
    causal, window = (True, local_size) if packed else _pattern(mask_function, local_size)
    if attention_mask is not None:
        # A view: the same memory, but a tensor with attributes of its own.
        numbers_BS = attention_mask[:, :]
    elif packed:
        numbers_BS = _packed(mask_function, batch_size, q_length, device)
    else:
        numbers_BS = torch.ones(batch_size, 0, dtype=torch.bool, device=device)
    numbers_BS.mlembed = Forward(causal, window)  # type: ignore[attr-defined]
    return numbers_BS


def _pattern(sees: Callable[..., Any], size: int | None) -> tuple[bool, int | None]:
    """Return whether a mask is causal, and its window.

    Its function is called for some queries and keys on either side of the window's bounds.

    Args:
        size: transformers' size of the window. Causal models count a token itself, bidirectional
            ones the tokens on one side.

    Raises:
        ValueError: not one of PATTERNS, or a mask that depends on the text.
    """
    if sees is masking_utils.causal_mask_function:
        return True, None
    if sees is masking_utils.bidirectional_mask_function:
        return False, None
    if not _holds_tensors(sees):
        far = size or 1
        q_Q1 = torch.tensor([0, far, 2 * far + 1, 3 * far + 2])[:, None]
        k_K = torch.arange(5 * far + 8)
        zero = torch.zeros((), dtype=torch.int64)
        seen_QK = sees(zero, zero, q_Q1, k_K).expand(len(q_Q1), len(k_K))
        before_QK = q_Q1 - k_K
        for causal in (True, False):
            for window in (None,) if size is None else (size, size + 1):
                near_QK = before_QK.abs() < (window or len(k_K))
                if torch.equal(seen_QK, near_QK & (before_QK >= 0) if causal else near_QK):
                    return causal, window
    raise ValueError(f"mlembed attention: expected {PATTERNS}, got another mask")


def _holds_tensors(value: Any) -> bool:
    """Return whether a value is a tensor, or a function or tuple that holds one."""
    if isinstance(value, tuple | list):
        return any(map(_holds_tensors, value))
    cells = getattr(value, "__closure__", None) or ()
    return isinstance(value, Tensor) or any(_holds_tensors(cell.cell_contents) for cell in cells)


def _packed(sees: Callable[..., Any], B: int, S: int, device: torch.device | str) -> Tensor:
    """Return sequence numbers [B, S] of a packed mask of transformers, which is a closure.

    It is called for neighbours only: the answer for all pairs would take [S, S].
    """
    b = torch.arange(B, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    t = torch.arange(S - 1, device=device)
    if sees(b, head, t, t + 1).any():
        raise ValueError(f"mlembed attention: expected {PATTERNS}, got another mask")
    begins = ~sees(b, head, t + 1, t).expand(B, S - 1)
    return nn.functional.pad(begins, (1, 0), value=True).cumsum(1)


def _layout(
    shape: tuple[int, int],
    device: torch.device,
    numbers_BS: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
) -> Layout:
    """Return the layout of a batch; waits for the device to read masks, positions and bounds."""
    B, S = shape
    user_bounds = None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64)
    if numbers_BS is None and user_bounds is not None:
        return None, AttentionPlan.of(user_bounds).to(device)
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
    # Among the tokens, a sequence begins with each row and with each new number.
    begins = (numbers.flatten()[rows].diff() != 0) | ((rows // S).diff() != 0)
    if window is not None and ((rows.diff() != 1) & ~begins).any():
        raise ValueError(
            f"attention_mask: expected padding only around texts with a window of {window}, got "
            "padding inside a text"
        )
    inner = (1 + begins.nonzero()[:, 0]).tolist()
    bounds = torch.tensor([0, *inner, len(rows)] if len(rows) else [0])
    if user_bounds is not None and (len(rows) < B * S or not torch.equal(user_bounds, bounds)):
        raise ValueError(
            f"cu_seq_lens_q: expected the mask's bounds {bounds.tolist()[:9]}, got "
            f"{user_bounds.tolist()[:9]}"
        )
    rows_T = None if len(rows) == B * S else rows.to(device, non_blocking=True)
    return rows_T, AttentionPlan.of(bounds).to(device)


# ---- in every layer ----


# The number of tokens depends on data, so it is not compiled.
@torch.compiler.disable
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention's output [B, S, H, K], and None for its weights.

    Args:
        query: [B, H, S, K]; key and value [B, Hkv, S, K].
        attention_mask: from `mask`; None to use `position_ids` or `cu_seq_lens_q`.
        dropout: 0.
        scaling: factor on the scores; K ** -0.5 by default.
        is_causal: the layer's attribute `is_causal` by default.
        sliding_window: the mask's by default; a token sees tokens at a smaller distance.

    Raises:
        ValueError: unsupported features, or shapes that do not fit.
    """
    _check(module, query, key, attention_mask, dropout, options)
    B, _, S, _ = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    shared = getattr(attention_mask, "mlembed", None)
    if shared is not None and shared.causal != causal:
        raise ValueError(f"is_causal: expected {shared.causal} like the mask, got {causal}")
    window = sliding_window if shared is None else shared.window
    if sliding_window not in (None, window):
        raise ValueError(f"sliding_window: expected {window} like the mask, got {sliding_window}")
    layout = shared.layout if shared is not None else None
    if layout is None:
        masked = attention_mask is not None and attention_mask.shape[1]
        numbers_BS = attention_mask if masked else None
        cu_seqlens = _shared_bounds(cu_seq_lens_q, cu_seq_lens_k)
        layout = _layout((B, S), query.device, numbers_BS, position_ids, cu_seqlens, window)
        if shared is not None:
            shared.layout = layout
    rows_T, plan = layout
    # Under autocast, norms leave queries and keys in fp32; values are narrower.
    q, k, v = (rearrange(x.to(value.dtype), "b h s k -> (b s) h k") for x in (query, key, value))
    if rows_T is not None:
        q, k, v = (x.index_select(0, rows_T) for x in (q, k, v))
    out = attention(
        q,
        k,
        v,
        cu_seqlens=plan.cu_seqlens,
        causal=causal,
        scale=scaling,
        window=window,
        impl="auto" if shared is None else shared.impl,
        plan=plan,
    )
    if rows_T is not None:
        out = out.new_zeros(B * S, *out.shape[1:]).index_copy(0, rows_T, out)
    return rearrange(out, "(b s) h k -> b s h k", b=B), None


def _shared_bounds(queries: Tensor | None, keys: Tensor | None) -> Tensor | None:
    """Return the bounds of queries, which must be those of keys."""
    if (queries is None) != (keys is None) or (
        keys is not queries and not torch.equal(queries, keys)  # type: ignore[arg-type]
    ):
        raise ValueError("cu_seq_lens: expected equal bounds for queries and keys, got others")
    return queries


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> None:
    for name in UNSUPPORTED:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"mlembed attention: {name}: expected None, got {options[name]}")
    if dropout:
        raise ValueError(
            f"mlembed attention: expected dropout 0 of attention weights, got {dropout}: load the "
            "model with attention_dropout=0.0 or attention_probs_dropout_prob=0.0"
        )
    config = getattr(module, "config", None)
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"mlembed attention: expected only self-attention, got {name}")
    _check_lengths(query.shape[2], key.shape[2])
    B, S = query.shape[0], query.shape[2]
    if attention_mask is not None and (
        tuple(attention_mask.shape) not in ((B, S), (B, 0)) or attention_mask.is_floating_point()
    ):
        raise ValueError(
            f"attention_mask: expected bools or integers [{B}, {S}] with 0 for padding, got "
            f"{attention_mask.dtype} {list(attention_mask.shape)}"
        )


def _check_lengths(queries: int, keys: int) -> None:
    if queries != keys:
        raise ValueError(
            f"mlembed attention: expected as many queries as keys, got {queries} and {keys}: "
            "encode whole texts with use_cache=False"
        )
