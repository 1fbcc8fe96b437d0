"""One transformer over packed text, with exits and a nested vocabulary: a Qwen3 or a BERT.

    x = E(r)[ids];  for each layer:  x = layer(x)        (blocks.py has the layers of both styles)
    exit l of a text:  pool(norm(x after layer l))

With `last_layers` H, exit l runs the last H of L layers after layer l - H, before its pooling:

    for each layer 1..L - H:  x = layer(x)
    exit l of a text:  y = x after layer l - H;  for each of the last H layers:  y = layer(y)

All exits share the pooling and Qwen3's final norm; BERT's layers end in norms of their own. Packs
are ordered deepest text first: after the last layer of a text its rows are dropped, and later
layers run on a shorter prefix of the rows.

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
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mlembed_kernels import AttentionPlan, attention

from .. import config
from ..config import strict
from ..data.packing import PackedBatch, SkipLayer
from ..runtime.profiling import Spans
from .automodel import architecture
from .blocks import BertBlock, BertEmbedding, Block, Pooler, RMSNorm, wide
from .vocabulary import Vocabulary

Tap = Callable[[Tensor], Tensor]  # hidden states [T, D] -> those to continue with

PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


def lean_half(half: Callable[..., Any], dropout: bool) -> Callable[..., Any]:
    """Return a half of a block that saves only its products, and the generator's state for
    `dropout`, when compiled.
    """

    def run(*args: Any) -> Any:
        return checkpoint(
            half,
            *args,
            use_reentrant=False,
            preserve_rng_state=dropout,
            context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS),
        )

    return run


class Exit(torch.autograd.Function):
    """x_TD, rows_N, staying -> (x[:staying], x[rows]): rows for the next layer and for pooling.

    Saves a gradient buffer [T, D] compared to two slices. Rows are distinct.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_N: Tensor, staying: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_N)
        ctx.shape, ctx.staying = x_TD.shape, staying
        ctx.set_materialize_grads(False)
        return x_TD[:staying], x_TD[rows_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        staying_grad, rows_grad = grads
        (rows_N,) = ctx.saved_tensors
        some = rows_grad if staying_grad is None else staying_grad
        if some is None:
            return None, None, None
        grad = some.new_empty(ctx.shape)
        if staying_grad is None:
            grad.zero_()
        else:
            grad[: ctx.staying] = staying_grad
            grad[ctx.staying :] = 0
        if rows_grad is not None:
            grad.index_add_(0, rows_N, rows_grad.to(grad.dtype))
        return grad, None, None


class Transformer(nn.Module):
    """Model from packed text to one raw (not normalised) vector per text and exit."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = Vocabulary(cfg)
        self.build(cfg)
        self.init_weights()

    def build(self, cfg: config.Model) -> None:
        """Build the modules after the vocabulary."""
        kind: type[Block] | type[BertBlock] = BertBlock if cfg.style == "bert" else Block
        if cfg.style == "bert":
            self.embed_places = BertEmbedding(cfg)
        self.layers = nn.ModuleList(kind(cfg) for _ in range(cfg.num_hidden_layers))
        # Every parameter is used: processes that average gradients wait for all of them.
        if cfg.style == "qwen3":
            self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        if cfg.pooling == "pooler":
            self.pooler = Pooler(cfg.hidden_size, cfg.hidden_size)
        self._before: Callable[..., Any] = kind.before
        self._after: Callable[..., Any] = kind.after
        self.dense = nn.ModuleList()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices from Normal(0, 0.02); norms are 1 and biases 0.

        Qwen3's matrices that write to the residual stream are divided by sqrt(2 L). With U from
        Normal(0, 0.02) and W from Normal(0, 1 / sqrt(R)), entries of U W have standard deviation
        0.02 at full rank.
        """
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if writes and self.cfg.style == "qwen3":
                std /= math.sqrt(2 * self.cfg.num_hidden_layers)
            if name == "embed_tokens.W":
                std = len(weight) ** -0.5
            nn.init.normal_(weight, std=std)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the matrices."""
        return next(self.parameters()).dtype

    def compile_blocks(self, backend: str = "inductor", lean: bool = False) -> None:
        """Compile the blocks' halves, once for all layers and any number of tokens.

        lean: save only products for the backward, which computes element-wise operations again. By
        default the compiler also saves the inputs of products: 44 KiB per token and layer of
        Qwen3-0.6B in bf16 instead of 34, attention included (bench/LOG.md).
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
        tap: tuple[int, Tap] | None = None,
    ) -> Tensor:
        """Return exits_END fp32 [E, N, D], texts in the batch's order; no layer runs past the last
        exit.

        A text that ends before an exit has zeros there. The residual stream is in the dtype of the
        embedding: that of the weights, or autocast's.

        Args:
            batch: N packed texts on the model's device.
            exits: rising depths in last_layers + 1..num_hidden_layers; the configured ones by
                default.
            rank: vocabulary rank, 1..stored; the stored one by default.
            recompute: number of first layers that save only their input for the backward, which
                computes them again. It reaches them last, when the other layers' memory is free.
            tap: (l, function): the function takes the hidden states [T, D] of all texts that run
                layers 1..l, after these and before the last layers of exits, and returns those to
                continue with.

        Raises:
            ValueError: an exit outside of these, a rank or a token that is not stored, a text
                longer than a BERT's position table, a configured attention that this machine or
                dtype does not support.
        """
        exits = self.cfg.exits if exits is None else exits
        strict.check_rising("exit", exits, self.cfg.num_hidden_layers, "depth")
        self.cfg.check(exit=exits[0], rank=rank)
        x_TD, tables = self.embed(batch, rank)
        pooled = []
        spans = Spans(f"exit {exit}" for exit in exits)
        spans.next()
        last = self.cfg.last_layers
        recompute = recompute if torch.is_grad_enabled() else 0
        # Texts of depth d run layers 1..d - last and then the last layers.
        for depth, layer in enumerate(self.layers[: exits[-1] - last], last + 1):
            plan = batch.plan_at(depth)
            if plan is None:
                break
            if plan.tokens < len(x_TD):
                x_TD, _ = Exit.apply(x_TD, plan.cu_seqlens[:0].long(), plan.tokens)
            run: Callable[..., Tensor] = self._skip if depth in batch.skip_layers else self.block
            early = not last and depth == exits[-1] and self._ends_early
            early &= depth not in batch.skip_layers
            if early:
                run = partial(self.block, rows_N=self._rows(plan))
            again = depth - last <= recompute
            x_TD = layer(x_TD, run, tables, batch.skip_layers.get(depth, plan), recompute=again)
            if tap and depth - last == tap[0]:
                x_TD = tap[1](x_TD)
            if depth not in exits:
                continue
            if last:
                exit_nD = self._through_last(x_TD, tables, plan, recompute)
            elif early:
                exit_nD = self._pooled(x_TD)
            else:
                further = batch.plan_at(depth + 1) if depth < exits[-1] else None
                x_TD, exit_nD = self._exit(x_TD, plan, 0 if further is None else further.tokens)
            # Texts that ended before come last: their rows are zeros.
            pooled.append(F.pad(exit_nD, (0, 0, 0, len(batch) - plan.sequences)))
            spans.next()
        spans.close()
        # Exits may be deeper than all texts.
        if deeper := len(exits) - len(pooled):
            zeros_ND = x_TD.new_zeros(len(batch), self.cfg.hidden_size, dtype=wide(x_TD.dtype))
            pooled += [zeros_ND] * deeper
        return torch.stack(pooled)

    def embed(self, batch: PackedBatch, rank: int | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the residual stream [T, D] before the first layer, and `rotation`'s tables."""
        x_TD = self.embed_tokens(batch.ids_T, rank, batch.token_index)
        if self.cfg.style == "bert":
            most = self.cfg.max_position_embeddings
            if batch.plan.max_seqlen > most:
                got = batch.plan.max_seqlen
                raise ValueError(f"texts: expected at most {most} tokens (positions), got {got}")
            x_TD = self.embed_places(x_TD, batch.pos_T)
        return x_TD, self.rotation(batch.pos_T)

    def states(self, batch: PackedBatch, layers: int, rank: int | None = None) -> Tensor:
        """Return the hidden states [T, D] of all texts after the first layers."""
        x_TD, tables = self.embed(batch, rank)
        for layer in self.layers[:layers]:
            x_TD = layer(x_TD, self.block, tables, batch.plan, recompute=False)
        return x_TD

    def _through_last(
        self, x_TD: Tensor, tables: tuple[Tensor, ...], plan: AttentionPlan, recompute: int
    ) -> Tensor:
        """Return the vectors fp32 [n, D] that the last layers and the pooling make of an exit's n
        texts.
        """
        early, L = self._ends_early, len(self.layers)
        for number in range(L - self.cfg.last_layers + 1, L + 1):
            rows_N = self._rows(plan) if early and number == L else None
            run, again = partial(self.block, rows_N=rows_N), number <= recompute
            x_TD = self.layers[number - 1](x_TD, run, tables, plan, recompute=again)
        return self._pooled(x_TD) if early else self._exit(x_TD, plan, 0)[1]

    @property
    def _ends_early(self) -> bool:
        """Return whether the last layer computes only the pooled rows after attention.

        This saves two thirds of that layer. Only in torch.inference_mode, like encoding: with a
        graph, or hooks that count tokens under no_grad, all passes compute all rows and round
        equally.
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
        """Run a layer on the first plan.tokens rows of a pack, with the tables of `rotation`.

        rows_N: rows of the output to compute; all by default.
        """
        # Without detach, a view of a table would be another kind of input and compile again.
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

    def _skip(
        self, layer: nn.Module, x_TD: Tensor, tables: tuple[Tensor, ...], skip: SkipLayer
    ) -> Tensor:
        """Run a layer on the gathered rows of the texts that do not skip it."""
        rows_T = skip.rows_T
        out_tD = self.block(layer, x_TD[rows_T], tuple(x[rows_T] for x in tables), skip.plan)
        return x_TD.index_copy(0, rows_T, out_tD)

    def rotation(self, pos_T: Tensor) -> tuple[Tensor, ...]:
        """Return cos and sin [T, K / 2] of position x theta^(-2i/K) for i = 0..K/2-1, () for BERT.

        In fp32 at least, like norms: bf16 has no fractions at position 4000.
        """
        if self.cfg.style == "bert":
            return ()
        K = self.cfg.head_dim
        exponent = torch.arange(0, K, 2, device=pos_T.device, dtype=torch.float32) / K
        angle = pos_T.float()[:, None] * self.cfg.rope_theta**-exponent
        dtype = wide(self.dtype)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _exit(self, x_TD: Tensor, plan: AttentionPlan, staying: int) -> tuple[Tensor, Tensor]:
        """Return x_TD of the texts that continue, and pooled vectors fp32 [n, D] of all n texts.

        Poolings of one token norm only its row.
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
        """Return int64 [n], the row of each text's pooled token, for poolings of one token."""
        last = self.cfg.pooling == "last"
        return plan.cu_seqlens[1:].long() - 1 if last else plan.cu_seqlens[:-1].long()

    def _pooled(self, rows_nD: Tensor) -> Tensor:
        normed = self._normed(rows_nD)
        return self.pooler(normed) if self.cfg.pooling == "pooler" else normed

    def project(self, pooled_ND: Tensor) -> Tensor:
        """Return the vectors [N, D] that linear layers after the pooling make of pooled ones."""
        return pooled_ND

    def _normed(self, x_TD: Tensor) -> Tensor:
        """Return Qwen3's rows after the final norm, BERT's as they are, in fp32 at least."""
        return self.norm(x_TD) if self.cfg.style == "qwen3" else x_TD.to(wide(x_TD.dtype))


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the model's mode inside the block, and restore it afterwards."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


# ---- sizes ----


def num_parameters(cfg: config.Model, exit: int | None = None, rank: int | None = None) -> int:
    """Return the number of parameters of a model cut to `exit` layers and vocabulary `rank`."""
    D, F_, V = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size
    vocabulary = (V + D) * (rank or cfg.ranks[-1]) if cfg.ranks else V * D
    if cfg.style == "transformers":
        each, outside, _ = architecture.numbers(cfg)
        layers = cfg.layers_of(exit or cfg.num_hidden_layers)
        return vocabulary + outside + sum(each[number - 1] for number in layers)
    if cfg.style == "bert":
        layer = 4 * D * D + 4 * D + 2 * D * F_ + F_ + D + 4 * D
        rows = cfg.position_offset + cfg.max_position_embeddings + cfg.type_vocab_size
        outside = rows * D + 2 * D + (D * D + D if cfg.pooling == "pooler" else 0)
    else:
        heads = 2 * cfg.num_attention_heads + 2 * cfg.num_key_value_heads
        layer = heads * cfg.head_dim * D + 3 * D * F_ + 2 * D + 2 * cfg.head_dim
        outside = D
    return vocabulary + layer * (exit or cfg.num_hidden_layers) + outside
