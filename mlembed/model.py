"""One transformer: a Qwen3-style encoder over packed text, with exits and a nested vocabulary.

    x = E(r)[ids];   for each layer:  x += attention(norm(x));  x += swiglu(norm(x))
    exit l of a text:  pool(norm(x after layer l)), one final norm shared by all exits

Modules are named as in Hugging Face Qwen3, so weights load and save without renaming, except for
the nested vocabulary, whose factors U [V, R] and W [R, D] replace the table `embed_tokens`.

Letters: E exits, N texts, T packed tokens, D width, H heads, K head width, V vocabulary, R rank.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mlembed_kernels import attention, embed

from . import config
from .pack import PackedBatch


class Vocabulary(nn.Module):
    """Token embedding U[ids, :r] W[:r] (ranks given) or a plain table `weight` (no ranks)."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.ranks = cfg.ranks
        V, D = cfg.vocab_size, cfg.hidden_size
        if self.ranks:
            self.U = nn.Parameter(torch.empty(V, self.ranks[-1]))
            self.W = nn.Parameter(torch.empty(self.ranks[-1], D))
        else:
            self.weight = nn.Parameter(torch.empty(V, D))

    def forward(self, ids_T: Tensor, rank: int | None) -> Tensor:
        if not self.ranks:
            return F.embedding(ids_T, self.weight)
        return embed(ids_T, self.U, self.W, self.ranks[-1] if rank is None else rank)

    def table(self, rank: int | None = None) -> Tensor:
        """The merged table E(r) [V, D]. ValueError for a rank that is not stored."""
        rows = self.U if self.ranks else self.weight
        return self.forward(torch.arange(len(rows), device=rows.device), rank)


class RMSNorm(nn.RMSNorm):
    """In the dtype of its weight (fp32 masters), also where autocast hands it bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        D, K = cfg.hidden_size, cfg.head_dim
        self.head_dim, self.causal = K, cfg.causal
        self.q_proj = nn.Linear(D, cfg.num_attention_heads * K, bias=False)
        self.k_proj = nn.Linear(D, cfg.num_key_value_heads * K, bias=False)
        self.v_proj = nn.Linear(D, cfg.num_key_value_heads * K, bias=False)
        self.o_proj = nn.Linear(cfg.num_attention_heads * K, D, bias=False)
        self.q_norm = RMSNorm(K, eps=cfg.rms_norm_eps)
        self.k_norm = RMSNorm(K, eps=cfg.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, batch: PackedBatch, cos_sin: tuple[Tensor, Tensor], impl: str
    ) -> Tensor:
        q, k, v = (
            rearrange(proj(x_TD), "t (h k) -> t h k", k=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (
            rope(self.q_norm(q), *cos_sin).to(v.dtype),
            rope(self.k_norm(k), *cos_sin).to(v.dtype),
        )
        out = attention(
            q,
            k,
            v,
            cu_seqlens=batch.cu_seqlens,
            causal=self.causal,
            impl=impl,
            work=batch.work,
        )
        return self.o_proj(rearrange(out, "t h k -> t (h k)"))


def rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary positions, the two halves of a head forming the pairs (as Qwen3 and Llama do)."""
    low, high = x_THK.chunk(2, dim=-1)
    return x_THK * cos_TK[:, None] + torch.cat([-high, low], dim=-1) * sin_TK[:, None]


class MLP(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, batch: PackedBatch, cos_sin: tuple[Tensor, Tensor], impl: str
    ) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), batch, cos_sin, impl)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Transformer(nn.Module):
    """Packed text -> one raw (not normalised) vector per text and exit."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = Vocabulary(cfg)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02) for matrices; what writes to the residual stream / sqrt(2 L).

        So is the product of the vocabulary's factors at full rank: with U of Normal(0, 0.02) and W
        of Normal(0, 1 / sqrt(R)), an entry of U W has variance R 0.02^2 / R.
        """
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.cfg.num_hidden_layers)
            if name == "embed_tokens.W":
                std = len(weight) ** -0.5
            nn.init.normal_(weight, std=std)

    def forward(
        self,
        batch: PackedBatch,
        *,
        exits: Sequence[int] | None = None,
        rank: int | None = None,
    ) -> Tensor:
        """-> exits_END fp32 [E, N, D], texts in the batch's order; layers past the last exit unrun.

        Args:
            batch: N packed texts on the model's device.
            exits: rising depths in 1..num_hidden_layers; the configured ones by default.
            rank: vocabulary rank, 1..stored; the stored one by default.

        Raises:
            ValueError: an exit deeper than the model, a rank that is not stored, a configured
                attention that this machine or dtype has not.
        """
        exits = self.cfg.exits if exits is None else exits
        config.check_rising("exit", exits, self.cfg.num_hidden_layers, "depth")
        self.cfg.check(rank=rank)
        # The residual stream keeps the weights' dtype; autocast narrows only what matmuls read.
        x_TD = self.embed_tokens(batch.ids_T, rank).to(self.norm.weight.dtype)
        cos_sin = self._rotation(batch.pos_T, x_TD.dtype)
        pooled = []
        for depth, layer in enumerate(self.layers[: exits[-1]], 1):
            x_TD = layer(x_TD, batch, cos_sin, self.cfg.attention)
            if depth in exits:
                pooled.append(self._pool(x_TD, batch))
        return torch.stack(pooled)

    def _rotation(self, pos_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, K] of position x frequency, theta^(-2i/K) for i = 0..K/2-1.

        Angles in fp32: position 4000 times frequency 1 has no fraction left in bf16.
        """
        K = self.cfg.head_dim
        exponent = torch.arange(0, K, 2, device=pos_T.device, dtype=torch.float32) / K
        angle = pos_T.float()[:, None] * self.cfg.rope_theta**-exponent
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _pool(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """[T, D] -> fp32 [N, D]. For one-token poolings only that token's row is normed."""
        begin, end = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
        if self.cfg.pooling == "last":
            pooled = self.norm(x_TD[end - 1])
        elif self.cfg.pooling == "cls":
            pooled = self.norm(x_TD[begin])
        else:
            pooled = torch.segment_reduce(
                self.norm(x_TD), "mean", lengths=end - begin, axis=0, unsafe=True
            )
        return pooled.to(torch.promote_types(pooled.dtype, torch.float32))


# ---- sizes ----


def num_parameters(cfg: config.Model, exit: int | None = None, rank: int | None = None) -> int:
    """Parameters that a model cut to `exit` layers and vocabulary rank `rank` holds."""
    D, K, V = cfg.hidden_size, cfg.head_dim, cfg.vocab_size
    heads = 2 * cfg.num_attention_heads + 2 * cfg.num_key_value_heads
    layer = heads * K * D + 3 * D * cfg.intermediate_size + 2 * D + 2 * K
    vocabulary = (V + D) * (rank or cfg.ranks[-1]) if cfg.ranks else V * D
    return vocabulary + layer * (exit or cfg.num_hidden_layers) + D
