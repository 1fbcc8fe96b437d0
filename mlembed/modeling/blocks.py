"""Norms and layers of two styles.

Qwen3: norms before attention and MLP, rotary positions, SwiGLU, no biases (with Hugging Face's
names).

    x += attention(norm(x));  x += swiglu(norm(x))

BERT (arXiv 1810.04805): norms after them, learnt positions, GELU, biases.

    x = norm(word + position + segment);  x = norm(x + attention(x));  x = norm(x + mlp(x))

Letters: N texts, T packed tokens, D width, H heads, K head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import config


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in for weights of `dtype`: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in fp32 at least, even if autocast passes bf16 or FSDP2 a bf16 weight."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


# ---- both styles ----


class Layer(nn.Module):
    """A layer in two halves around attention, which the caller computes.

    Each half is one graph for torch.compile, which serves batches of any shape.
    """

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.dropout = cfg.dropout

    def forward(
        self, x_TD: Tensor, run: Callable[..., Tensor], *args: Any, recompute: bool = False
    ) -> Tensor:
        """Return run(self, x_TD, *args), in a call of this module, so that FSDP2's hooks run.

        Recomputation in the backward calls `run` alone, without the hooks.
        """
        if not recompute:
            return run(self, x_TD, *args)
        # Saving the generator's state takes time, so only dropout does.
        drops = self.dropout > 0 and self.training
        return checkpoint(run, self, x_TD, *args, use_reentrant=False, preserve_rng_state=drops)

    def drop(self, x_TD: Tensor) -> Tensor:
        """Apply dropout in training. Without it, one compiled half serves both modes."""
        return F.dropout(x_TD, self.dropout) if self.dropout and self.training else x_TD


def together(x_TD: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Return the outputs of linear layers of one input, computed by one product.

    Gradients to the input add up within the product, which saves two passes over [T, D] per layer;
    the copied weights are small compared to that. Layers with adapters (training/lora.py) run one
    by one.
    """
    if any(type(layer) is not nn.Linear for layer in layers):
        return tuple(layer(x_TD) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    outputs = F.linear(x_TD, weight, torch.cat(biases) if biases else None)
    return outputs.split([layer.out_features for layer in layers], dim=-1)


# ---- Qwen3 ----


class Attention(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        D, K = cfg.hidden_size, cfg.head_dim
        self.head_dim = K
        self.q_proj = nn.Linear(D, cfg.num_attention_heads * K, bias=False)
        self.k_proj = nn.Linear(D, cfg.num_key_value_heads * K, bias=False)
        self.v_proj = nn.Linear(D, cfg.num_key_value_heads * K, bias=False)
        self.o_proj = nn.Linear(cfg.num_attention_heads * K, D, bias=False)
        self.q_norm = RMSNorm(K, eps=cfg.rms_norm_eps)
        self.k_norm = RMSNorm(K, eps=cfg.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, cos_TK: Tensor, sin_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [T, Hq, K], k and v [T, Hkv, K] for attention."""
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim))
            for x in together(x_TD, self.q_proj, self.k_proj, self.v_proj)
        )
        q = rope(self.q_norm(q), cos_TK, sin_TK).to(v.dtype)
        return q, rope(self.k_norm(k), cos_TK, sin_TK).to(v.dtype), v


def rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate by position; the two halves of a head form the pairs, like in Qwen3 and Llama.

    cos_TK, sin_TK: [T, K / 2], of position x frequency.
    """
    low, high = x_THK.chunk(2, dim=-1)
    cos, sin = cos_TK[:, None], sin_TK[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class MLP(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = together(x_TD, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(Layer):
    """x += attention(norm(x));  x += swiglu(norm(x))."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__(cfg)
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)

    def before(self, x_TD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of the layer."""
        normed_TD = self.input_layernorm(x_TD).to(x_TD.dtype)
        return self.self_attn(normed_TD, cos_TK, sin_TK)

    def after(self, x_TD: Tensor, out_THK: Tensor) -> Tensor:
        """Return the residual stream after the layer; out_THK is attention's output."""
        x_TD = x_TD + self.drop(self.self_attn.o_proj(out_THK.flatten(1)))
        normed_TD = self.post_attention_layernorm(x_TD).to(x_TD.dtype)
        return x_TD + self.drop(self.mlp(normed_TD))


# ---- BERT ----


class BertEmbedding(nn.Module):
    """Embedding of words at their positions: norm(word + position + first segment).

    `positions` has `position_offset` rows before position 0, like RoBERTa's table.
    """

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.offset = cfg.position_offset
        rows = cfg.position_offset + cfg.max_position_embeddings
        self.positions = nn.Embedding(rows, cfg.hidden_size)
        self.segments = nn.Embedding(cfg.type_vocab_size, cfg.hidden_size)
        self.norm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.dropout = cfg.dropout

    def forward(self, words_TD: Tensor, pos_T: Tensor) -> Tensor:
        """Return [T, D] in words' dtype; pos_T: int64 [T] in 0..max_position_embeddings - 1."""
        places_TD = self.positions(pos_T + self.offset) + self.segments.weight[0]
        summed_TD = words_TD.to(wide(words_TD.dtype)) + places_TD
        x_TD = self.norm(summed_TD).to(words_TD.dtype)
        return F.dropout(x_TD, self.dropout) if self.dropout and self.training else x_TD


class BertAttention(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        D = cfg.hidden_size
        self.head_dim = cfg.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))
        self.o_proj = nn.Linear(D, D)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v [T, H, K] for attention."""
        outputs = together(x_TD, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in outputs)
        return q, k, v


class BertMLP(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        # The exact GELU with erf, like BERT's.
        return self.down_proj(F.gelu(self.up_proj(x_TD)))


class BertBlock(Layer):
    """x = norm(x + attention(x));  x = norm(x + mlp(x)).

    Dropout applies to both summands, not to attention's probabilities: packed kernels do not
    support that.
    """

    def __init__(self, cfg: config.Model) -> None:
        super().__init__(cfg)
        self.self_attn = BertAttention(cfg)
        self.mlp = BertMLP(cfg)
        self.attention_norm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.output_norm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def before(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of the layer."""
        return self.self_attn(x_TD)

    def after(self, x_TD: Tensor, out_THK: Tensor) -> Tensor:
        """Return the layer's output; out_THK is attention's output."""
        added_TD = self.drop(self.self_attn.o_proj(out_THK.flatten(1)))
        x_TD = self.attention_norm(x_TD + added_TD).to(x_TD.dtype)
        return self.output_norm(x_TD + self.drop(self.mlp(x_TD))).to(x_TD.dtype)


class Pooler(nn.Linear):
    """tanh(W x + b) of a text's first token, in fp32 at least, even under autocast: it has N rows
    only, and its output is the final vector.
    """

    def forward(self, x_ND: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            out_ND = F.linear(x_ND.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return out_ND.tanh()
