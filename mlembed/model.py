"""One transformer: a Qwen3-style encoder over packed text, with exits and a nested vocabulary.

    x = E(r)[ids];   for each layer:  x += attention(norm(x));  x += swiglu(norm(x))
    exit l of a text:  pool(norm(x after layer l)), one final norm shared by all exits

Texts that run less deep than others leave: packs are ordered deepest first, so everything behind
works on a shorter prefix of the rows.

Modules are named as in Hugging Face Qwen3, so weights load and save without renaming, except for
the nested vocabulary, whose factors U [V, R] and W [R, D] replace the table `embed_tokens`.

Letters: E exits, N texts, T packed tokens, D width, H heads, K head width, V vocabulary, R rank.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mlembed_kernels import Occurrences, Work, attention, embed

from . import config
from .pack import Kept, PackedBatch


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

    def forward(
        self, ids_T: Tensor, rank: int | None, occurrences: Occurrences | None = None
    ) -> Tensor:
        """-> [T, D] in the weights' dtype, or autocast's."""
        if self.ranks:
            rank = self.ranks[-1] if rank is None else rank
            return embed(ids_T, self.U, self.W, rank, occurrences=occurrences)
        V = len(self.weight)
        if occurrences is not None and not 0 <= occurrences.lowest <= occurrences.highest < V:
            found = f"{occurrences.lowest}..{occurrences.highest}"
            raise ValueError(f"ids: expected tokens in 0..{V - 1}, got {found}")
        rows_TD = F.embedding(ids_T, self.weight)
        if torch.is_autocast_enabled(ids_T.device.type):
            return rows_TD.to(torch.get_autocast_dtype(ids_T.device.type))
        return rows_TD

    def table(self, rank: int | None = None) -> Tensor:
        """The merged table E(r) [V, D]. ValueError for a rank that is not stored."""
        if not self.ranks:
            return self.weight.clone()
        rank = self.ranks[-1] if rank is None else rank
        ids = torch.arange(len(self.U), device=self.U.device)
        return embed(ids, self.U, self.W, rank, impl="reference")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What to compute in where weights are of `dtype`: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.RMSNorm):
    """In fp32, or its weight's fp64, also where autocast hands it bf16, or FSDP2 a bf16 weight."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


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


def together(x_TD: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Linear layers of one input as one product. Their gradients towards the input add up within
    the product, where two more passes over [T, D] would; the weights copied are small beside it."""
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x_TD, weight).split([layer.out_features for layer in layers], dim=-1)


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


class Block(nn.Module):
    """A layer, in two halves around attention: each is one graph for torch.compile, whatever the
    batch, and what computes attention is not its affair."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
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

    def before(self, x_TD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the layer."""
        normed_TD = self.input_layernorm(x_TD).to(x_TD.dtype)
        return self.self_attn(normed_TD, cos_TK, sin_TK)

    def after(self, x_TD: Tensor, out_THK: Tensor) -> Tensor:
        """The residual stream behind the layer, out_THK being what attention gave."""
        x_TD = x_TD + self.dropped(self.self_attn.o_proj(out_THK.flatten(1)))
        normed_TD = self.post_attention_layernorm(x_TD).to(x_TD.dtype)
        return x_TD + self.dropped(self.mlp(normed_TD))

    def dropped(self, x_TD: Tensor) -> Tensor:
        # Without dropout a compiled half is the same for training and evaluation.
        return F.dropout(x_TD, self.dropout) if self.dropout and self.training else x_TD


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def keep_products(ctx: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    kept = operator in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def lean_half(half: Callable[..., Any], dropout: bool) -> Callable[..., Any]:
    """A half of a block, for the compiler, that keeps products alone; with `dropout`, what it takes
    to drop the same again as well."""

    def run(*args: Any) -> Any:
        return checkpoint(
            half,
            *args,
            use_reentrant=False,
            preserve_rng_state=dropout,
            context_fn=partial(create_selective_checkpoint_contexts, keep_products),
        )

    return run


class Exit(torch.autograd.Function):
    """x_TD, rows_N, staying -> (x[:staying], x[rows]): what goes on, and what is pooled.

    One gradient buffer [T, D], where two slices would each fill and add one. The rows differ.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_N: Tensor, staying: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_N)
        ctx.shape, ctx.staying = x_TD.shape, staying
        ctx.set_materialize_grads(False)
        return x_TD[:staying], x_TD[rows_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        of_staying, of_rows = grads
        (rows_N,) = ctx.saved_tensors
        known = of_rows if of_staying is None else of_staying
        if known is None:
            return None, None, None
        grad = known.new_empty(ctx.shape)
        if of_staying is None:
            grad.zero_()
        else:
            grad[: ctx.staying] = of_staying
            grad[ctx.staying :] = 0
        if of_rows is not None:
            grad.index_add_(0, rows_N, of_rows.to(grad.dtype))
        return grad, None, None


class Transformer(nn.Module):
    """Packed text -> one raw (not normalised) vector per text and exit."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = Vocabulary(cfg)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self._before: Callable[..., Any] = Block.before
        self._after: Callable[..., Any] = Block.after
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

    def compile_blocks(self, backend: str = "inductor", lean: bool = False) -> None:
        """torch.compile of the blocks' halves, once for all layers and any number of tokens: norms,
        RoPE with QK-norm and SwiGLU each become part of a kernel beside the products.

        lean: of the halves only products are kept for the backward, and what is element-wise is
        computed again. By itself the compiler keeps whatever a product reads, as it would write it
        anew: 44 KiB a token and layer of Qwen3-0.6B in bf16 instead of 34, attention's included
        (bench/LOG.md).
        """
        drops = self.cfg.dropout > 0
        halves = (lean_half(f, drops) if lean else f for f in (Block.before, Block.after))
        self._before, self._after = (
            torch.compile(half, dynamic=True, backend=backend) for half in halves
        )

    def forward(
        self,
        batch: PackedBatch,
        *,
        exits: Sequence[int] | None = None,
        rank: int | None = None,
        recompute: int = 0,
    ) -> Tensor:
        """-> exits_END fp32 [E, N, D], texts in the batch's order; layers past the last exit unrun.

        A text that has left before an exit has zeros there. The residual stream is in the dtype of
        the embedding: that of the weights, or autocast's.

        Args:
            batch: N packed texts on the model's device.
            exits: rising depths in 1..num_hidden_layers; the configured ones by default.
            rank: vocabulary rank, 1..stored; the stored one by default.
            recompute: of so many layers, the first ones, only the input is kept for the backward,
                which computes them again. The first: when it reaches them, what the others kept has
                been freed.

        Raises:
            ValueError: an exit deeper than the model, a rank or a token that is not stored, a
                configured attention that this machine or dtype has not.
        """
        exits = self.cfg.exits if exits is None else exits
        config.check_rising("exit", exits, self.cfg.num_hidden_layers, "depth")
        self.cfg.check(rank=rank)
        x_TD = self.embed_tokens(batch.ids_T, rank, batch.occurrences)
        cos_sin = self.rotation(batch.pos_T)
        pooled = []
        for depth, layer in enumerate(self.layers[: exits[-1]], 1):
            work = batch.work_at(depth)
            if work is None:
                break
            run = self._kept if depth in batch.kept else self.block
            again = depth <= recompute and torch.is_grad_enabled()
            x_TD = layer(x_TD, run, cos_sin, batch.kept.get(depth, work), recompute=again)
            further = batch.work_at(depth + 1) if depth < exits[-1] else None
            staying = 0 if further is None else further.tokens
            if depth in exits:
                x_TD, here_nD = self._exit(x_TD, work, staying)
                # Padding at the end: who has left comes last.
                pooled.append(F.pad(here_nD, (0, 0, 0, len(batch) - work.sequences)))
            elif staying < len(x_TD):
                x_TD, _ = Exit.apply(x_TD, work.cu_seqlens[:0].long(), staying)
        if len(pooled) < len(exits):  # deeper than any of the texts
            nobody_ND = x_TD.new_zeros(len(batch), self.cfg.hidden_size, dtype=wide(x_TD.dtype))
            pooled += [nobody_ND] * (len(exits) - len(pooled))
        return torch.stack(pooled)

    def block(
        self, layer: nn.Module, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], work: Work
    ) -> Tensor:
        """One layer over the first work.tokens rows of a pack."""
        # To the compiler a view of a table is another input than a table: it would compile anew.
        cos_TK, sin_TK = (table[: len(x_TD)].detach() for table in cos_sin)
        q, k, v = self._before(layer, x_TD, cos_TK, sin_TK)
        out_THK = attention(
            q,
            k,
            v,
            cu_seqlens=work.cu_seqlens,
            causal=self.cfg.causal,
            impl=self.cfg.attention,
            work=work,
        )
        return self._after(layer, x_TD, out_THK)

    def _kept(
        self, layer: nn.Module, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], kept: Kept
    ) -> Tensor:
        """A layer that some of the texts skip: it is run on the others, gathered."""
        cos_TK, sin_TK = (table[kept.rows_T] for table in cos_sin)
        some_tD = self.block(layer, x_TD[kept.rows_T], (cos_TK, sin_TK), kept.work)
        return x_TD.index_copy(0, kept.rows_T, some_tD)

    def rotation(self, pos_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, K / 2] of position x frequency, theta^(-2i/K) for i = 0..K/2-1.

        In fp32 at least, as norms are: position 4000 times frequency 1 has no fraction in bf16.
        """
        K = self.cfg.head_dim
        exponent = torch.arange(0, K, 2, device=pos_T.device, dtype=torch.float32) / K
        angle = pos_T.float()[:, None] * self.cfg.rope_theta**-exponent
        dtype = wide(self.norm.weight.dtype)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _exit(self, x_TD: Tensor, work: Work, staying: int) -> tuple[Tensor, Tensor]:
        """x_TD of those who go on, and fp32 [n, D] of the n texts that are here.

        For one-token poolings only that token's row is normed.
        """
        begin, end = work.cu_seqlens[:-1].long(), work.cu_seqlens[1:].long()
        if self.cfg.pooling == "mean":
            pooled = torch.segment_reduce(
                self.norm(x_TD), "mean", lengths=end - begin, axis=0, unsafe=True
            )
            x_TD, _ = Exit.apply(x_TD, end[:0], staying)
        else:
            rows_N = end - 1 if self.cfg.pooling == "last" else begin
            x_TD, pooled = Exit.apply(x_TD, rows_N, staying)
            pooled = self.norm(pooled)
        return x_TD, pooled


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the model is in training or in evaluation mode; then in the one that it was in."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


# ---- sizes ----


def num_parameters(cfg: config.Model, exit: int | None = None, rank: int | None = None) -> int:
    """Parameters that a model cut to `exit` layers and vocabulary rank `rank` holds."""
    D, K, V = cfg.hidden_size, cfg.head_dim, cfg.vocab_size
    heads = 2 * cfg.num_attention_heads + 2 * cfg.num_key_value_heads
    layer = heads * K * D + 3 * D * cfg.intermediate_size + 2 * D + 2 * K
    vocabulary = (V + D) * (rank or cfg.ranks[-1]) if cfg.ranks else V * D
    return vocabulary + layer * (exit or cfg.num_hidden_layers) + D
