"""What a transformer is made of: a nested vocabulary, norms, and layers of two styles.

Qwen3: norms before, rotary positions, SwiGLU, no biases (names as in Hugging Face Qwen3).

    x += attention(norm(x));  x += swiglu(norm(x))

BERT (arXiv 1810.04805): norms behind, positions learnt, GELU, biases.

    x = norm(word + position + segment);  x = norm(x + attention(x));  x = norm(x + mlp(x))

Letters: N texts, T packed tokens, D width, H heads, K head width, V vocabulary, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import config


def wide(dtype: torch.dtype) -> torch.dtype:
    """What to compute in where weights are of `dtype`: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.RMSNorm):
    """In fp32, or its weight's fp64, also where autocast hands it bf16, or FSDP2 a bf16 weight."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """As RMSNorm: in fp32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


# ---- a layer of either style ----


class Layer(nn.Module):
    """A layer, in two halves around attention: each is one graph for torch.compile, whatever the
    batch, and what computes attention is not its affair."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.dropout = cfg.dropout

    def forward(
        self, x_TD: Tensor, run: Callable[..., Tensor], *args: Any, recompute: bool = False
    ) -> Tensor:
        """run(self, x_TD, *args), as a call of this module, which is what FSDP2's hooks are on.

        What is recomputed in the backward calls `run` alone: the hooks have had their turn.
        """
        if not recompute:
            return run(self, x_TD, *args)
        drops = self.dropout > 0 and self.training  # the same again; saving the state costs
        return checkpoint(run, self, x_TD, *args, use_reentrant=False, preserve_rng_state=drops)

    def dropped(self, x_TD: Tensor) -> Tensor:
        # Without dropout a compiled half is the same for training and evaluation.
        return F.dropout(x_TD, self.dropout) if self.dropout and self.training else x_TD


def together(x_TD: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Linear layers of one input as one product. Their gradients towards the input add up within
    the product, where two more passes over [T, D] would; the weights copied are small beside it."""
    weight = torch.cat([layer.weight for layer in layers])
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    made = F.linear(x_TD, weight, torch.cat(biases) if biases else None)
    return made.split([layer.out_features for layer in layers], dim=-1)


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
        """q [T, Hq, K], k, v [T, Hkv, K], ready for attention."""
        q, k, v = (
            rearrange(x, "t (h k) -> t h k", k=self.head_dim)
            for x in together(x_TD, self.q_proj, self.k_proj, self.v_proj)
        )
        q = rope(self.q_norm(q), cos_TK, sin_TK).to(v.dtype)
        return q, rope(self.k_norm(k), cos_TK, sin_TK).to(v.dtype), v


def rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary positions, the two halves of a head forming the pairs (as Qwen3 and Llama do).

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
        """q, k, v of the layer."""
        normed_TD = self.input_layernorm(x_TD).to(x_TD.dtype)
        return self.self_attn(normed_TD, cos_TK, sin_TK)

    def after(self, x_TD: Tensor, out_THK: Tensor) -> Tensor:
        """The residual stream behind the layer, out_THK being what attention gave."""
        x_TD = x_TD + self.dropped(self.self_attn.o_proj(out_THK.flatten(1)))
        normed_TD = self.post_attention_layernorm(x_TD).to(x_TD.dtype)
        return x_TD + self.dropped(self.mlp(normed_TD))


# ---- BERT ----


class BertEmbedding(nn.Module):
    """What a token's place adds to its word: norm(word + position + first segment).

    `positions` has `position_offset` rows before position 0, as RoBERTa's table has.
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
        """[T, D] in the dtype of the words; pos_T: int64 [T] in 0..max_position_embeddings - 1."""
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
        """q, k, v [T, H, K], ready for attention."""
        made = together(x_TD, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rearrange(x, "t (h k) -> t h k", k=self.head_dim) for x in made)
        return q, k, v


class BertMLP(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_TD)))  # by erf, as BERT's


class BertBlock(Layer):
    """x = norm(x + attention(x));  x = norm(x + mlp(x)).

    Dropout is on what both add, not on attention's probabilities, which no packed kernel drops.
    """

    def __init__(self, cfg: config.Model) -> None:
        super().__init__(cfg)
        self.self_attn = BertAttention(cfg)
        self.mlp = BertMLP(cfg)
        self.attention_norm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.output_norm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def before(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the layer."""
        return self.self_attn(x_TD)

    def after(self, x_TD: Tensor, out_THK: Tensor) -> Tensor:
        """The layer's output, out_THK being what attention gave."""
        added_TD = self.dropped(self.self_attn.o_proj(out_THK.flatten(1)))
        x_TD = self.attention_norm(x_TD + added_TD).to(x_TD.dtype)
        return self.output_norm(x_TD + self.dropped(self.mlp(x_TD))).to(x_TD.dtype)


class Pooler(nn.Linear):
    """tanh(W x + b) of a text's first token, in fp32 at least, also under autocast: of N rows only,
    and what comes out is a vector as users have it."""

    def forward(self, x_ND: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            made_ND = F.linear(x_ND.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return made_ND.tanh()
