"""The overhead of the gradient cache, by the graphs it keeps: one optimiser step, cached and plain.

Plain is train_step's step: a graph of every pack, one loss, one backward. Cached is what train.py
runs with --gradient-cache, on the same texts and weights, compiled the same way:

none_kept   every pack is encoded without a graph, and again with one
half_kept   the budget is a little over half of the graphs' bytes: those that fit stay, the other
            packs are encoded twice
all_kept    everything is encoded once; the loss has a graph of its own
large_packs the plain step in as few packs as training makes by default: the cost of small packs

Floors are those of train_step, and for packs that are encoded twice one more forward of the blocks:

products    2 of 6 FLOPs; of bytes a third
attention   4 of 14 FLOPs; 2 (2 Hq + 2 Hkv) K bytes a token
point-wise  2 (9 D + 2 (Hq + Hkv) K + 3 I) bytes a token

`fit` is a batch of sentences whose graphs all fit a card of 80 GB; `peer` fits without packing too,
which compares sentence-transformers with itself; the graphs of `big` fit no card.
CachedGISTEmbedLoss needs a guide's vectors: another loss, which has no row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlembed import config
from mlembed.data.collate import Batch
from mlembed.data.packing import PackedBatch
from mlembed.modeling.transformer import Transformer
from mlembed.runtime import transfer
from mlembed.runtime.distributed import World
from mlembed.training import gradcache
from mlembed.training.engine import Engine
from mlembed.training.gradcache import ActivationCost
from mlembed.training.objective.loss import loss_table, weights
from mlembed.training.optim import optimizer_of, to_weights

from . import harness
from .harness import judged
from .report import Floors, Row, Targets, gib
from .train_step import bench, cases, peers
from .train_step import gate as checked
from .train_step.bench import spot
from .train_step.cases import SHORT, Lengths, Texts, Trained, allocated

__all__ = ("spot",)

TESTS = bench.TESTS
BASELINES = ("sentence_transformers",)
REPEATS = 3
AGAIN = "all encoded again"
HALF = 0.55  # of the graphs' bytes: packs differ, and at 0.5 the larger half does not fit
Keep = Literal["none", "half", "all", "budget"]


# ---- cases ----


@dataclass(frozen=True, kw_only=True)
class Case(cases.Case):
    @property
    def about(self) -> str:
        size = self.run.activation_gib
        budget = f", {size:g} GiB for graphs" if size else ""
        return f"{super().about}; {self.pairs} pairs, packs of {self.run.pack_tokens}{budget}"

    def toy(self) -> "Case":
        """Return the case in seconds, on any device: several packs, few of which fit."""
        small, budget = super().toy(), 6e-4 if self.run.activation_gib else 0.0
        run = replace(small.run, pack_tokens=24, activation_gib=budget)
        return replace(self, **{**vars(small), "run": run})

    def floors(self, mode: str, tflops: float, gbs: float) -> dict[str, float]:
        """Return the lower bounds of a plain step's stages, and that of one more forward."""
        again = cases.floors_of(again_work(self), tflops, gbs)
        return {**super().floors(mode, tflops, gbs), AGAIN: sum(again.values())}


def case(name: str, pack_tokens: int, lengths: tuple[Lengths, Lengths], **options: Any) -> Case:
    """Return a case. gib: budget for graphs, 0 if every provider has its own."""
    budget, (queries, docs) = options.pop("gib", 0.0), lengths
    run = replace(cases.of_qwen3(), activation_checkpointing="none", activation_gib=budget)
    run = replace(run, pack_tokens=pack_tokens)
    return Case(name=name, run=run, queries=queries, docs=docs, **options)


CACHED = "uncached", "none_kept", "all_kept", "half_kept"
SENTENCE = "sentence_transformers", "sentence_transformers_uncached"
SHORTER: Lengths = 20, 0.6, 5, 64
LONG: tuple[Lengths, Lengths] = (20, 0.6, 5, 512), (110, 0.7, 8, 512)
PEER = *CACHED, *SENTENCE
FIT = *CACHED, "large_packs", SENTENCE[0]
CASES = {
    case.name: case
    for case in (
        case("fit", 16_384, (SHORT, SHORT), pairs=1024, providers=FIT),
        case("peer", 2048, (SHORTER, SHORTER), pairs=128, providers=PEER, mini_batch=32),
        case("big", 16_384, LONG, gib=42.0, pairs=16_384, providers=("within_budget", "none_kept")),
    )
}


def again_work(case: cases.Case) -> dict[str, tuple[float, float]]:
    """Return FLOPs and bytes of one more forward of all texts, by stage."""
    m = case.run.model
    heads = (m.num_attention_heads + m.num_key_value_heads) * m.head_dim
    S = sum(float(cases.running(case, d).sum()) for d in range(1, m.num_hidden_layers + 1))
    whole = cases.stage_work(case)
    products, size = whole["products"]
    point_wise = 9 * m.hidden_size + 2 * heads + 3 * m.intermediate_size
    return {
        "attention": (whole["attention"][0] * 4 / 14, 2 * 2 * heads * S),
        "products": (products / 3, size / 3),
        "point-wise": (0.0, 2 * point_wise * S),
    }


# ---- steps ----


def cached_step(
    engine: Engine,
    run: config.Run,
    batch: Batch,
    packs: Sequence[PackedBatch],
    kept: ActivationCost,
    budget: float,
    half: bool,
    mark: Callable[[str], None] = lambda stage: None,
) -> tuple[Tensor, float]:
    """Take gradients with the gradient cache, like train.py in one process.

    Args:
        budget: bytes for graphs. half: under bf16 autocast.
        mark: is called with "backward" after the backward of the loss, before those of packs.

    Returns:
        The loss, and the share of the tokens that were encoded twice.
    """
    device = packs[0].plan.buffer.device
    keeps, again, final = gradcache.choose_graphs(run, kept, packs, budget)
    total: list[Tensor] = []

    def forward(i: int, sync: bool) -> Tensor:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        with autocast, gradcache.seeded_dropout((run.seed, 6, i), run.model.dropout, device):
            return engine.forward(packs[i], rank=None, recompute=again[i], sync=sync)

    def loss(exits_END: Tensor) -> Tensor:
        exits_END.register_hook(lambda grad: mark("backward"))
        exits_END = exits_END.bfloat16() if half and device.type == "cuda" else exits_END
        loss_EM = loss_table(exits_END, batch, run, World(0, 1, device))
        total.append((transfer.moved(weights(run), device) * loss_EM).sum())
        return total[0]

    engine.begin()
    gradcache.gradients(engine, forward, loss, keeps, final, sync=True)
    twice = sum(p.plan.tokens for p, keep in zip(packs, keeps, strict=True) if not keep)
    return total[0].detach(), twice / batch.tokens


def budget_of(
    keep: Keep, kept: ActivationCost, packs: Sequence[PackedBatch], run: config.Run
) -> float:
    """Return the bytes for graphs."""
    if keep in ("none", "all"):
        return float("inf") if keep == "all" else 0.0
    if keep == "budget":
        return run.activation_gib * 2**30
    return HALF * sum(gradcache.graph_bytes(kept, run.model, pack, 0) for pack in packs)


class Cached(Trained):
    """A model and its optimiser, whose steps use the gradient cache."""

    def __init__(
        self, model: Transformer, run: config.Run, keep: Keep, before: int, half: bool
    ) -> None:
        super().__init__(model, optimizer_of(model, run.optim), no_graph, before)
        self.run, self.keep, self.half = replace(run, gradient_cache=True), keep, half
        device = model.device
        self.engine = Engine.of(model, self.run, World(0, 1, device), half)
        self.kept = ActivationCost.measure(model, half)
        self.budget, self.twice = 0.0, 0.0

    def __call__(self, inputs: Texts, backward: bool) -> Tensor:
        batch, packs = inputs.packs(False)
        self.budget = budget_of(self.keep, self.kept, packs, self.run)
        how = self.engine, self.run, batch, packs, self.kept, self.budget, self.half
        loss, self.twice = cached_step(*how, mark=self.mark)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optim.max_grad_norm)
        self.optimizer.step()
        self.engine.zero()
        return loss


def no_graph(step: Trained, inputs: Texts) -> Tensor:
    raise AssertionError("expected a cached step to be called whole, got a call of its loss")


OURS: dict[str, dict[str, Any]] = {
    "uncached": {},
    "none_kept": {"keep": "none"},
    "half_kept": {"keep": "half"},
    "all_kept": {"keep": "all"},
    "within_budget": {"keep": "budget"},
    "large_packs": {"pack_tokens": config.Run.pack_tokens},
}


def ours(
    case: cases.Case,
    device: torch.device,
    smoke: bool,
    *,
    keep: Keep | None = None,
    pack_tokens: int = 0,
) -> Trained:
    """Return a step. keep: None for the plain one. pack_tokens: instead of the case's."""
    if keep is None:
        step = bench.ours(case, device, smoke)
        if pack_tokens:
            texts = Texts(replace(case, run=replace(case.run, pack_tokens=pack_tokens)), device)
            loss = step.loss
            step.loss = lambda step, inputs: loss(step, texts)
        return step
    before = allocated(device)
    model = bench.fresh(case.run.model, device)
    to_weights(model, case.run.optim)
    checked.compile_for(model, device)
    return Cached(model, case.run, keep, before, device.type == "cuda")


PEERS: dict[str, Callable[[cases.Case, Transformer], peers.Peer]] = {
    SENTENCE[0]: peers.sentence_transformers,
    SENTENCE[1]: partial(peers.sentence_transformers, cached=False),
}


def build(name: str, case: cases.Case, like: Texts, smoke: bool) -> tuple[Trained, str | None]:
    """Return a provider's step, and a note on its result, if it needs one."""
    if name in OURS:
        return ours(case, like.device, smoke, **OURS[name]), None
    return bench.peer(PEERS[name], case, like.device)


# ---- right or not ----


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """Run train_step's checks with the cache, and check that dropout is repeated.

    With dropout there is no truth: nothing kept is compared with everything kept.
    """

    def trials() -> Iterator[harness.Trial]:
        checks = [c.toy() if smoke else c for c in checked.checks() if not c.liger]
        for check in checks:
            for keep in ("none", "half", "all"):
                at = {"check": f"{check.name}, {keep} kept", "shape": check.about}
                compute: Any = partial(packed, keep=keep)
                yield at, partial(checked.verdict, check, device, compute)
        at = {"check": "dropout, drawn again", "shape": checks[0].about}
        yield at, partial(drawn_again, checks[0], device)

    return harness.gate(trials())


def packed(
    check: checked.Check, device: torch.device, keep: Keep, dropout: float = 0.0
) -> tuple[Tensor, checked.Gradients]:
    """Return loss and gradients as training computes them with the gradient cache."""
    how: Literal["none", "selective"] = "selective" if check.again else "none"
    run = replace(check.run, gradient_cache=True, activation_checkpointing=how)
    run = replace(run, model=replace(run.model, dropout=dropout))
    model, half = checked.made(check, device, dropout), device.type == "cuda"
    checked.compile_for(model, device, lean=check.again > 0)
    model.train()
    batch = checked.batch_of(check).to(device)
    packs = batch.packs
    kept = ActivationCost.measure(model, half)
    engine = Engine.of(model, run, World(0, 1, device), half)
    budget = budget_of(keep, kept, packs, run)
    loss, _ = cached_step(engine, run, batch, packs, kept, budget, half)
    grads = {name: p.grad.cpu() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    return loss.cpu(), grads


def drawn_again(check: checked.Check, device: torch.device) -> dict[str, Any]:
    """Compare loss and gradients with no graph kept and with all, to two steps of the dtype."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    floor = checked.floor_of(check, dtype)
    got, want = (packed(check, device, keep, dropout=0.2) for keep in ("none", "all"))
    pairs = {"loss": (got[0], want[0])} | {name: (x, want[1][name]) for name, x in got[1].items()}
    parts = {name: judged(a, b, b.double(), floor) for name, (a, b) in pairs.items()}
    return checked.summary(parts, dtype)


# ---- further numbers of a row ----


def numbers(case: cases.Case, step: Trained, inputs: Texts, ms: float) -> dict[str, Any]:
    """Return tokens a second, the share encoded twice, the budget and the memory of a step."""
    twice, budget = (step.twice, step.budget) if isinstance(step, Cached) else (0.0, None)
    limit = budget / 2**20 if case.run.activation_gib and budget else None
    device = inputs.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    rates = {"tokens_s": cases.tokens(case) / ms * 1e3, "again": twice, "budget_mib": limit}
    hopper = "H100" in name or "H200" in name
    return {**rates, "hopper": hopper, **bench.memory(step, inputs)}


COLUMNS = (
    *("of uncached", "encoded twice", "floor, ms", "of it"),
    *("peak GiB", "of activations", "budget GiB"),
)
SAME = 0.02  # relative: losses of the first step, in bf16


def overhead(rows: Sequence[Row], row: Row) -> float | None:
    """Return the time relative to the same provider's plain step on the same texts.

    None if that step has no time, either is not right, or their losses differ.
    """
    name = row["provider"]
    base = SENTENCE[1] if name.startswith("sentence_transformers") else "uncached"
    for other in rows:
        if (other["case"], other["provider"]) != (row["case"], base) or not other.get("ms"):
            continue
        if not row.get("ms") or name == base or False in (row.get("green"), other.get("green")):
            return None
        if not abs(row["value"] - other["value"]) <= SAME * abs(other["value"]):
            return None
        ratio: float = row["ms"] / other["ms"]
        return ratio
    return None


def cells(rows: Sequence[Row], row: Row, floors: Floors) -> list[str]:
    times, again, lowest = overhead(rows, row), "-", ("-", "-")
    if row["provider"] in OURS:
        again = f"{row['again']:.0%}"
        if floors is not None:
            plain = sum(ms for stage, ms in floors.items() if stage != AGAIN)
            floor = plain + row["again"] * floors[AGAIN]
            lowest = f"{floor:.1f}", f"{floor / row['ms']:.1%}"
    sizes = (gib(row.get(name)) for name in ("peak_mib", "activation_mib", "budget_mib"))
    return ["-" if times is None else f"{times:.2f}", again, *lowest, *sizes]


# ---- targets ----

OVERHEADS = {"none_kept": 1.40, "all_kept": 1.10}
WITHIN = 1.25  # of the budget, as the probe takes 0.8 of what is free


def targets(rows: list[Row]) -> list[Row]:
    """Compare with the targets, which are for an H100 or H200."""
    targets = Targets(row for row in rows if row.get("hopper"))
    right = list(targets.rows.values())
    for row in right:
        name, limit = row["provider"], OVERHEADS.get(row["provider"])
        if row["case"] == "fit" and limit and (times := overhead(right, row)) is not None:
            targets.add(f"fit, {name}: times the plain step", times, "<=", limit)
        if row.get("budget_mib") and row.get("activation_mib") is not None:
            share = row["activation_mib"] / row["budget_mib"]
            what = f"{row['case']}, {name}: peak of activations / budget"
            targets.add(what, share, "<=", WITHIN)
    return targets.listed
