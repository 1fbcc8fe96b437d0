"""One transformer over packed text, with exits and a nested vocabulary: a Qwen3 or a BERT.

    x = E(r)[ids];  for each layer:  x = layer(x)        (blocks.py has the layers of both styles)
    exit l of a text:  pool(norm(x after layer l)), with what pools shared by all exits

Qwen3's final norm is shared by all exits; a BERT's layers end in norms of their own, and it has
none. Texts that run less deep than others leave: packs are ordered deepest first, so everything
behind works on a shorter prefix of the rows.

Letters: E exits, N texts, T packed tokens, D width, H heads, K head width, V vocabulary, R rank.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mlembed_kernels import AttentionPlan, attention

from .. import config
from ..config import strict
from ..data.packing import PackedBatch, SkipLayer
from .blocks import BertBlock, BertEmbedding, Block, Pooler, RMSNorm, wide
from .vocabulary import Vocabulary

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
        kind: type[Block] | type[BertBlock] = BertBlock if cfg.style == "bert" else Block
        if cfg.style == "bert":
            self.embed_places = BertEmbedding(cfg)
        self.layers = nn.ModuleList(kind(cfg) for _ in range(cfg.num_hidden_layers))
        # No parameter without use: gradients of all are expected where processes average them.
        if cfg.style == "qwen3":
            self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        if cfg.pooling == "pooler":
            self.pooler = Pooler(cfg.hidden_size, cfg.hidden_size)
        self._before: Callable[..., Any] = kind.before
        self._after: Callable[..., Any] = kind.after
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02) for matrices, norms of weight 1, biases 0. What writes to the residual
        stream / sqrt(2 L) where it is normed nowhere on its way, as Qwen3's is.

        So is the product of the vocabulary's factors at full rank: with U of Normal(0, 0.02) and W
        of Normal(0, 1 / sqrt(R)), an entry of U W has variance R 0.02^2 / R.
        """
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            if last and self.cfg.style == "qwen3":
                std /= math.sqrt(2 * self.cfg.num_hidden_layers)
            if name == "embed_tokens.W":
                std = len(weight) ** -0.5
            nn.init.normal_(weight, std=std)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its matrices."""
        return next(self.parameters()).dtype

    def compile_blocks(self, backend: str = "inductor", lean: bool = False) -> None:
        """torch.compile of the blocks' halves, once for all layers and any number of tokens: norms,
        RoPE with QK-norm and SwiGLU each become part of a kernel beside the products.

        lean: of the halves only products are kept for the backward, and what is element-wise is
        computed again. By itself the compiler keeps whatever a product reads, as it would write it
        anew: 44 KiB a token and layer of Qwen3-0.6B in bf16 instead of 34, attention's included
        (bench/LOG.md).
        """
        drops = self.cfg.dropout > 0
        kind: Any = type(self.layers[0])
        halves = (lean_half(f, drops) if lean else f for f in (kind.before, kind.after))
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
            ValueError: an exit deeper than the model, a rank or a token that is not stored, a text
                longer than a BERT has positions, a configured attention that this machine or dtype
                has not.
        """
        exits = self.cfg.exits if exits is None else exits
        strict.check_rising("exit", exits, self.cfg.num_hidden_layers, "depth")
        self.cfg.check(rank=rank)
        x_TD = self.embed_tokens(batch.ids_T, rank, batch.token_index)
        if self.cfg.style == "bert":
            most = self.cfg.max_position_embeddings
            if batch.plan.max_seqlen > most:
                got = batch.plan.max_seqlen
                raise ValueError(f"texts: expected at most {most} tokens (positions), got {got}")
            x_TD = self.embed_places(x_TD, batch.pos_T)
        tables = self.rotation(batch.pos_T)
        pooled = []
        for depth, layer in enumerate(self.layers[: exits[-1]], 1):
            plan = batch.work_at(depth)
            if plan is None:
                break
            run: Callable[..., Tensor] = self._kept if depth in batch.skip_layers else self.block
            early = depth == exits[-1] and self._ends_early and depth not in batch.skip_layers
            if early:
                run = partial(self.block, rows_N=self._rows(plan))
            again = depth <= recompute and torch.is_grad_enabled()
            x_TD = layer(x_TD, run, tables, batch.skip_layers.get(depth, plan), recompute=again)
            further = batch.work_at(depth + 1) if depth < exits[-1] else None
            staying = 0 if further is None else further.tokens
            if depth in exits:
                if early:
                    here_nD = self._pooled(x_TD)
                else:
                    x_TD, here_nD = self._exit(x_TD, plan, staying)
                # Padding at the end: who has left comes last.
                pooled.append(F.pad(here_nD, (0, 0, 0, len(batch) - plan.sequences)))
            elif staying < len(x_TD):
                x_TD, _ = Exit.apply(x_TD, plan.cu_seqlens[:0].long(), staying)
        if len(pooled) < len(exits):  # deeper than any of the texts
            nobody_ND = x_TD.new_zeros(len(batch), self.cfg.hidden_size, dtype=wide(x_TD.dtype))
            pooled += [nobody_ND] * (len(exits) - len(pooled))
        return torch.stack(pooled)

    @property
    def _ends_early(self) -> bool:
        """Whether the last layer that is run computes, behind attention, the pooled rows alone: two
        thirds of it. That is in torch.inference_mode, as encoding is; where there may be a graph,
        or hooks that count tokens under no_grad, all rows are there, and every pass rounds alike.
        """
        inference = torch.is_inference_mode_enabled()
        return inference and not self.training and self.cfg.pooling != "mean"

    def block(
        self,
        layer: nn.Module,
        x_TD: Tensor,
        tables: tuple[Tensor, ...],
        plan: AttentionPlan,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        """One layer over the first work.tokens rows of a pack; tables: what `rotation` gives.

        rows_N: those that are wanted of it; all by default.
        """
        # To the compiler a view of a table is another input than a table: it would compile anew.
        q, k, v = self._before(layer, x_TD, *(table[: len(x_TD)].detach() for table in tables))
        out_THK = attention(
            q,
            k,
            v,
            cu_seqlens=plan.cu_seqlens,
            causal=self.cfg.causal,
            impl=self.cfg.attention,
            plan=plan,
        )
        if rows_N is not None:
            x_TD, out_THK = x_TD[rows_N], out_THK[rows_N]
        return self._after(layer, x_TD, out_THK)

    def _kept(
        self, layer: nn.Module, x_TD: Tensor, tables: tuple[Tensor, ...], kept: SkipLayer
    ) -> Tensor:
        """A layer that some of the texts skip: it is run on the others, gathered."""
        theirs = tuple(table[kept.rows_T] for table in tables)
        some_tD = self.block(layer, x_TD[kept.rows_T], theirs, kept.plan)
        return x_TD.index_copy(0, kept.rows_T, some_tD)

    def rotation(self, pos_T: Tensor) -> tuple[Tensor, ...]:
        """cos and sin [T, K / 2] of position x frequency, theta^(-2i/K) for i = 0..K/2-1; nothing
        for a BERT, whose positions are learnt.

        In fp32 at least, as norms are: position 4000 times frequency 1 has no fraction in bf16.
        """
        if self.cfg.style == "bert":
            return ()
        K = self.cfg.head_dim
        exponent = torch.arange(0, K, 2, device=pos_T.device, dtype=torch.float32) / K
        angle = pos_T.float()[:, None] * self.cfg.rope_theta**-exponent
        dtype = wide(self.dtype)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _exit(self, x_TD: Tensor, plan: AttentionPlan, staying: int) -> tuple[Tensor, Tensor]:
        """x_TD of those who go on, and fp32 [n, D] of the n texts that are here.

        For one-token poolings only that token's row is normed, or pooled by the pooler.
        """
        if self.cfg.pooling == "mean":
            begin, end = plan.cu_seqlens[:-1].long(), plan.cu_seqlens[1:].long()
            pooled = torch.segment_reduce(
                self._normed(x_TD), "mean", lengths=end - begin, axis=0, unsafe=True
            )
            x_TD, _ = Exit.apply(x_TD, end[:0], staying)
            return x_TD, pooled
        x_TD, pooled = Exit.apply(x_TD, self._rows(plan), staying)
        return x_TD, self._pooled(pooled)

    def _rows(self, plan: AttentionPlan) -> Tensor:
        """int64 [n], which token's row stands for each text, of one-token poolings."""
        last = self.cfg.pooling == "last"
        return plan.cu_seqlens[1:].long() - 1 if last else plan.cu_seqlens[:-1].long()

    def _pooled(self, rows_nD: Tensor) -> Tensor:
        normed = self._normed(rows_nD)
        return self.pooler(normed) if self.cfg.pooling == "pooler" else normed

    def _normed(self, x_TD: Tensor) -> Tensor:
        """In fp32 at least: by the final norm, or, of a BERT, as its layer's own norm left it."""
        return self.norm(x_TD) if self.cfg.style == "qwen3" else x_TD.to(wide(x_TD.dtype))


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
    D, F_, V = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size
    vocabulary = (V + D) * (rank or cfg.ranks[-1]) if cfg.ranks else V * D
    if cfg.style == "bert":
        layer = 4 * D * D + 4 * D + 2 * D * F_ + F_ + D + 4 * D  # with biases and two norms
        rows = cfg.position_offset + cfg.max_position_embeddings + cfg.type_vocab_size
        outside = rows * D + 2 * D + (D * D + D if cfg.pooling == "pooler" else 0)
    else:
        heads = 2 * cfg.num_attention_heads + 2 * cfg.num_key_value_heads
        layer = heads * cfg.head_dim * D + 3 * D * F_ + 2 * D + 2 * cfg.head_dim
        outside = D
    return vocabulary + layer * (exit or cfg.num_hidden_layers) + outside
