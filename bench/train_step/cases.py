"""Cases of a training step, their batch, and the least work of a step.

Letters: T tokens of all texts, n distinct ones, S the sum over layers of the tokens that run
through them (L T if no text exits early), P pairs of a token and one it sees, summed likewise; D
width, Hq and Hkv heads of width K, I of the feed-forward, V and r of the vocabulary, Q queries and
C documents at each of E exits. The least work of a step, stage by stage, in bf16:

products    6 FLOPs for each token and weight of the layers' matrices, 2 D K (Hq + Hkv) + 3 D I;
            bytes: each of three products (out, dx, dw) has inputs and outputs of
            4 D + 2 (Hq + Hkv) K + 3 I elements a token
attention   14 Hq K FLOPs for each pair (3.5 times 4 Hq K); (5 Hq + 6 Hkv) K elements a token
point-wise  norms, rotary positions, SwiGLU, residuals, each half of a block in one pass: forward
            9 D + 2 (Hq + Hkv) K + 3 I elements a token, backward 8 D + 3 (Hq + Hkv) K + 5 I
            A BERT has an MLP without a gate (2 matrices of I), norms after the halves and no
            rotary positions: point-wise forward 6 D + 2 I, backward 8 D + 3 I.
embedding   a plain table: n D numbers are read, T D elements written; backward T D are read and
            V D numbers written, dense; a nested one as in bench/embed.py (fp32 factors)
loss        6 Q C D FLOPs an exit, 6 (Q + C) D bytes (bench/infonce.py)
optimiser   40 bytes a parameter, fp32: gradients read for their norm, read and written to be
            clipped (12), then weight, gradient and two moments read, three written (28)

A stage's floor is the larger of FLOPs over the matmul rate and bytes over the copy rate. Casts of
the weights to bf16, and of their gradients back, have no floor, as they can be fused.

TFLOP/s and MFU count 6 FLOPs for each token and weight of the layers it has to run through (440.4 M
weights in all at 0.6B), for every provider.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlembed import config
from mlembed.config import recipes, shapes
from mlembed.data.collate import Batch, collate
from mlembed.data.depth import draw_depths
from mlembed.data.packing import PackedBatch
from mlembed.modeling.flops import PEAKS, layer_weights
from mlembed.modeling.transformer import num_parameters
from mlembed.training.optim import prepare
from mlembed_kernels import TokenIndex

from .. import harness
from ..embed import stream
from ..harness import TRAIN
from ..infonce.cases import NESTED

Lengths = tuple[float, float, int, int]  # of a lognormal: median, sigma; least, most
ACTIVATION_GIB = 70.0  # of ours_selective: under 80 GiB with weights, moments and gradients
PEAK_TFLOPS = PEAKS["H200"]  # MFU is against it.


@dataclass(frozen=True, kw_only=True)
class Case(harness.Case):
    """A model and the lengths of its texts.

    negatives: of each pair. mini_batch: of peers with a gradient cache.
    """

    run: config.Run
    pairs: int
    negatives: int = 0
    queries: Lengths
    docs: Lengths
    modes: tuple[str, ...] = (TRAIN,)
    mini_batch: int = 64

    @property
    def texts(self) -> int:
        return self.pairs * (2 + self.negatives)

    @property
    def about(self) -> str:
        m, early = self.run.model, self.run.depth.exits
        ranks = f" nested to rank {m.ranks[-1]}" if m.ranks else ""
        return (
            f"{num_parameters(m) / 1e6:.1f} M parameters, {m.num_hidden_layers} layers of "
            f"{m.hidden_size}, vocabulary {m.vocab_size}{ranks}; {self.texts} texts, "
            f"T = {tokens(self)}, of a Zipf stream; exits {m.exits}"
            f"{f', texts leave at {early}' if early else ''}, {len(m.matryoshka_dims)} prefixes"
        )

    def toy(self) -> "Case":
        """Return the case in seconds, on any device, with as many layers as exits."""
        model, depth = self.run.model, self.run.depth
        layers = {e: i for i, e in enumerate(model.exits, 1)}
        small = replace(
            model, vocab_size=97, hidden_size=32, num_hidden_layers=len(layers),
            num_attention_heads=2, num_key_value_heads=2 if model.style == "bert" else 1,
            head_dim=16, intermediate_size=48, exits=tuple(layers.values()),
            matryoshka_dims=(8, 32), ranks=(4, 8) if model.ranks else (), last_layers=0,
            max_position_embeddings=512,
        )  # fmt: skip
        depth = replace(depth, exits=tuple(layers[e] for e in depth.exits))
        run = replace(self.run, model=small, depth=depth, activation_gib=3e-3)
        lengths: dict[str, Any] = {"queries": (4, 0.6, 1, 9), "docs": (7, 0.6, 2, 12)}
        few = min(self.negatives, 2)
        return replace(self, run=run, pairs=8, negatives=few, mini_batch=4, **lengths)

    def inputs(self, device: torch.device, seed: int) -> "Texts":
        """Return the batch, which is the same for every seed."""
        return Texts(self, device)

    def flops(self, mode: str) -> float:
        """Return those of the layers' products alone."""
        return stage_work(self)["products"][0]

    def nbytes(self, mode: str) -> float:
        return sum(size for _, size in stage_work(self).values())

    def floors(self, mode: str, tflops: float, gbs: float) -> dict[str, float]:
        """Return the lower bound of every stage, in milliseconds, at these ceilings."""
        return floors_of(stage_work(self), tflops, gbs)


LEALLA = replace(
    shapes.SHAPES["lealla-small"],
    exits=(6, 12, 18, 24),
    matryoshka_dims=NESTED[:5],
    ranks=(16, 32, 64),
)
SKIP = config.Depth(exits=(7, 14, 21, 28))  # in equal shares


def of_qwen3(
    depth: config.Depth | None = None,
    exits: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 28),
    ranks: tuple[int, ...] = (),
) -> config.Run:
    """Return the recipe: ML-Embed's weights, temperature and learning rate, one direction."""
    recipe, shape = recipes.qwen3(), shapes.SHAPES["ml-embed-0.6b"]
    model = replace(shape, exits=exits, matryoshka_dims=NESTED, ranks=ranks)
    return replace(recipe, model=model, depth=depth or recipe.depth, activation_gib=ACTIVATION_GIB)


def case(name: str, run: config.Run, *providers: str) -> Case:
    """Return a case of 64 queries, their positives and seven hard negatives each: 576 texts."""
    lengths: dict[str, Any] = {"queries": (20, 0.6, 5, 512), "docs": (110, 0.7, 8, 512)}
    return Case(
        name=name, run=run, pairs=64, negatives=7, providers=providers, device="cuda", **lengths
    )


SIDE = "ours_bf16", "ours_liger", "ours_eager", "ours_block"
STEP = "ours", "ours_selective", "sentence_transformers", *SIDE, "padded"
SHORT: Lengths = 20, 0.6, 5, 128
# The most telling first, as the last ones are skipped when time runs out.
CASES = {
    case.name: case
    for case in (
        case("step", of_qwen3(), *STEP),
        case(
            "step_skip", of_qwen3(SKIP, exits=(1, 2, 4, 7, 14, 21, 28)),
            "ours", "full_depth", "ours_block",
        ),
        case("step_nested", of_qwen3(ranks=(64, 128, 256, 512)), "ours", "ours_bf16"),
        Case(
            name="lealla", run=config.Run(model=LEALLA, optim=config.Optim(lr=1e-5)),
            pairs=8192, queries=SHORT, docs=SHORT, mini_batch=1024, device="cuda",
            providers=("ours", "sentence_transformers", "ours_bf16", "ours_eager"),
        ),
    )
}  # fmt: skip


# ---- the batch ----


@cache
def lengths(case: Case) -> tuple[int, ...]:
    """Return the tokens of the queries, the positives, then the negatives group by group."""
    generator = torch.Generator().manual_seed(1)
    sizes: list[int] = []
    counts = case.pairs, case.texts - case.pairs
    for n, (median, sigma, low, high) in zip(counts, (case.queries, case.docs), strict=True):
        normal = torch.randn(n, generator=generator)
        some = torch.exp(normal * sigma + math.log(median)).round().clamp(low, high)
        sizes += some.long().tolist()
    return tuple(sizes)


def tokens(case: Case) -> int:
    return sum(lengths(case))


def groups(case: Case) -> list[list[int]]:
    """Return the rows of each query, its positive and its negatives."""
    P, n = case.pairs, case.negatives
    return [[i, P + i, *range(2 * P + i * n, 2 * P + (i + 1) * n)] for i in range(P)]


@cache
def depths(case: Case) -> np.ndarray:
    """Return int64 [groups], the last layer of each."""
    n = np.array(lengths(case))
    of_groups = np.array([n[rows].sum() for rows in groups(case)])
    L = case.run.model.num_hidden_layers
    return draw_depths(of_groups, case.run.depth, L, np.random.default_rng(1))


def running(case: Case, depth: int) -> np.ndarray:
    """Return the lengths of the texts that run through a layer."""
    n = np.array(lengths(case), dtype=np.float64)
    rows = [row for group, d in zip(groups(case), depths(case), strict=True) if d >= depth
            for row in group]  # fmt: skip
    return n[rows]


class Texts:
    """The batch on the device: rows of token ids, and packs like those of training."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        ids = stream(tokens(case), case.run.model.vocab_size)
        self.rows = [part.numpy() for part in ids.split(lengths(case))]
        self.made: dict[bool, tuple[Batch, list[PackedBatch]]] = {}

    def packs(self, deep: bool) -> tuple[Batch, list[PackedBatch]]:
        """Return the batch and its packs. deep: all texts run through all layers."""
        if deep not in self.made:
            some = depths(self.case)
            last = np.full_like(some, self.case.run.model.num_hidden_layers)
            batch = collate(
                groups(self.case), self.rows.__getitem__, np.arange(self.case.texts),
                last if deep else some, None, max_tokens=self.case.run.pack_tokens,
            ).to(self.device)  # fmt: skip
            self.made[deep] = batch, list(batch.packs)
        return self.made[deep]

    def clear(self) -> None:
        """Do nothing: a step leaves no gradients."""

    def nbytes(self) -> int:
        """Return the bytes of the weights, which exceed any cache."""
        return 4 * num_parameters(self.case.run.model)


# ---- the numbers ----


def stage_work(case: Case) -> dict[str, tuple[float, float]]:
    """Return FLOPs and bytes of every stage, as above."""
    m = case.run.model
    D, K, Hq, Hkv = m.hidden_size, m.head_dim, m.num_attention_heads, m.num_key_value_heads
    I, V, heads = m.intermediate_size, m.vocab_size, (Hq + Hkv) * K  # noqa: E741
    ups = 2 if m.style == "bert" else 3  # matrices of I
    point_wise = 17 * D + 5 * heads + 8 * I if m.style == "qwen3" else 14 * D + 5 * I
    layers = [running(case, depth) for depth in range(1, m.num_hidden_layers + 1)]
    S = float(sum(n.sum() for n in layers))
    P = float(sum((n * (n + 1) / 2 if m.causal else n * n).sum() for n in layers))
    T = tokens(case)
    distinct = TokenIndex.of(stream(T, V)).distinct
    read, written, rows = 4.0 * distinct * D, 4.0 * V * D, 0.0
    if m.ranks:
        r = m.ranks[-1]
        read, written, rows = 4.0 * r * (distinct + D), 4.0 * r * (V + D), 6.0 * distinct * r * D
        read *= 2  # as the backward reads them again
    alive = [sum(d >= e for d in depths(case).tolist()) for e in m.exits]
    docs = 1 + case.negatives
    return {
        "embedding": (rows, read + 2 * 2 * T * D + written),
        "attention": (14 * Hq * K * P, 2 * (5 * Hq + 6 * Hkv) * K * S),
        "products": (
            6 * layer_weights(m) * S,
            3 * 2 * (4 * D + 2 * heads + ups * I) * S,
        ),
        "point-wise": (0.0, 2 * point_wise * S),
        "loss": (
            float(sum(6 * n * n * docs * D for n in alive)),
            float(sum(6 * n * (1 + docs) * D for n in alive)),
        ),
        "optimiser": (0.0, 40.0 * num_parameters(m)),
    }


def floors_of(work: dict[str, tuple[float, float]], tflops: float, gbs: float) -> dict[str, float]:
    return {name: max(a / tflops / 1e9, b / gbs / 1e6) for name, (a, b) in work.items()}


# ---- steps ----


class Trained:
    """A model and its optimiser. A call is one optimiser step or, without backward, its loss.

    mark: is called with the name of each stage as it begins.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[["Trained", Texts], Tensor],
        before: int,
    ) -> None:
        """Arguments:
        before: bytes that were allocated on the device before the model was built.
        """
        self.model, self.optimizer, self.loss, self.before = model, optimizer, loss, before
        self.mark: Callable[[str], None] = lambda stage: None

    def __call__(self, inputs: Texts, backward: bool) -> Tensor:
        loss = self.loss(self, inputs)
        if backward:
            self.mark("backward")
            loss.backward()
            self.mark("optimiser")
            self.update(inputs.case.run.optim.max_grad_norm)
            self.optimizer.zero_grad(set_to_none=True)
            self.mark("end")
        return loss.detach()

    def update(self, max_norm: float) -> None:
        """Clip the gradients, then step the optimiser."""
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()


class Ours(Trained):
    """The step of train.py."""

    def update(self, max_norm: float) -> None:
        """Step the optimiser, which clips as it reads the gradients."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        prepare(self.optimizer, norm, max_norm, 1 - norm.isfinite().float())
        self.optimizer.step()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
