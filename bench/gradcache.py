"""What the gradient cache costs, by which graphs it keeps: one optimiser step, cached and plain.

Plain is train_step's step: a graph of every pack, one loss, one backward. Cached is what train.py
runs with --gradient-cache, on the same texts, by the same weights, compiled the same way:

none_kept   every pack is encoded without a graph, and again with one
half_kept   the budget is a little over half of the graphs' bytes: as many as fit stay, the rest is
            encoded twice
all_kept    everything is encoded once; the loss has a graph of its own
large_packs the plain step in as few packs as training makes by default: what small packs cost

Floors are those of train_step, and for what is encoded twice one more forward of the blocks:

products    2 of 6 FLOPs; of bytes a third
attention   4 of 14 FLOPs; 2 (2 Hq + 2 Hkv) K bytes a token
point-wise  2 (9 D + 2 (Hq + Hkv) K + 3 I) bytes a token

`fit` is a batch of sentences whose graphs all fit a card of 80 GB, so that nothing has to be
cached; `peer` is one that fits without packing too, where sentence-transformers is compared with
itself; `big` is one whose graphs fit no card. CachedGISTEmbedLoss asks for a guide's vectors
besides: another loss, and no row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlembed import config
from mlembed.data.collate import Batch
from mlembed.data.packing import PackedBatch
from mlembed.modeling.transformer import Transformer
from mlembed.runtime.distributed import World
from mlembed.training import gradcache
from mlembed.training.engine import Engine
from mlembed.training.gradcache import ActivationCost
from mlembed.training.objective.loss import loss_table, weights
from mlembed.training.optim import adamw, to_weights

from . import report
from .harness import judged, reason
from .train_step import bench, cases, peers
from .train_step import gate as checked
from .train_step.bench import fresh
from .train_step.bench import spot as spot
from .train_step.cases import Case, Texts, Trained, allocated
from .train_step.cases import flops as flops
from .train_step.cases import inputs as inputs
from .train_step.cases import nbytes as nbytes

TESTS = bench.TESTS
BREAKDOWN: tuple[str, ...] = ()
BASELINES = ("sentence_transformers",)  # speed-ups are printed against these
REPEATS = 3
SWEEP: dict[str, str] = {}  # launches no kernel of its own
SWEEP_CASE = "fit"

Keep = Literal["none", "half", "all", "budget"]
HALF = 0.55  # packs are not quite alike: at 0.5 the larger half would not fit

# ---- cases ----

SHORT = 20, 0.6, 5, 128
CACHED = "none_kept", "all_kept", "half_kept"


def case(name: str, pack_tokens: int, gib: float = 0.0, **options: Any) -> Case:
    """gib: for graphs, 0 where rows have budgets of their own."""
    run = replace(
        cases.of_qwen3(),
        pack_tokens=pack_tokens,
        activation_checkpointing="none",
        activation_gib=gib,
    )
    return Case(name=name, run=run, **options)


CASES = {
    case.name: case
    for case in (
        case(
            "fit",
            16_384,
            pairs=1024,
            queries=SHORT,
            docs=SHORT,
            providers=(
                *("uncached", *CACHED, "large_packs", "sentence_transformers"),
                *("uncached_eager", "none_kept_eager"),
            ),
        ),
        case(
            "peer",
            2048,
            pairs=128,
            queries=(20, 0.6, 5, 64),
            docs=(20, 0.6, 5, 64),
            providers=(
                *("uncached", *CACHED),
                *("sentence_transformers", "sentence_transformers_uncached"),
            ),
            mini_batch=32,
        ),
        case(
            "big",
            16_384,
            gib=42.0,
            pairs=16_384,
            queries=(20, 0.6, 5, 512),
            docs=(110, 0.7, 8, 512),
            providers=("within_budget", "none_kept"),
        ),
    )
}


def toy(case: Case) -> Case:
    """The same lines of code in seconds, on any device: several packs, few of which fit."""
    small = cases.toy(case)
    gib = 6e-4 if case.run.activation_gib else 0.0
    return replace(small, run=replace(small.run, pack_tokens=24, activation_gib=gib))


def about(case: Case) -> str:
    gib = case.run.activation_gib
    budget = f", {gib:g} GiB for graphs" if gib else ""
    return f"{cases.about(case)}; {case.pairs} pairs, packs of {case.run.pack_tokens}{budget}"


def again_work(case: Case) -> dict[str, tuple[float, float]]:
    """stage -> FLOPs, bytes of one more forward of all texts."""
    m = case.run.model
    D, K, Hq, Hkv = m.hidden_size, m.head_dim, m.num_attention_heads, m.num_key_value_heads
    heads = (Hq + Hkv) * K
    S = sum(float(cases.there(case, depth).sum()) for depth in range(1, m.num_hidden_layers + 1))
    whole = cases.stage_work(case)
    products, size = whole["products"]
    return {
        "attention": (whole["attention"][0] * 4 / 14, 2 * 2 * heads * S),
        "products": (products / 3, size / 3),
        "point-wise": (0.0, 2 * (9 * D + 2 * heads + 3 * m.intermediate_size) * S),
    }


AGAIN = "all encoded again"


def floors(case: Case, mode: str, tflops: float, gbs: float) -> dict[str, float]:
    """Milliseconds that no stage of a plain step can go under, and those of one more forward."""
    again = (max(a / tflops / 1e9, b / gbs / 1e6) for a, b in again_work(case).values())
    return {**cases.floors(case, mode, tflops, gbs), AGAIN: sum(again)}


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
    """Gradients by the gradient cache, as train.py takes them, in one process.

    Args:
        budget: bytes for graphs. half: under bf16 autocast.
        mark: is told "backward" once the loss's is over, before there is a parameter's gradient.

    Returns:
        The loss, and how large a part of the tokens was encoded twice.
    """
    device = packs[0].plan.buffer.device
    keeps, again, final = gradcache.choose_graphs(run, kept, packs, budget)
    found: list[Tensor] = []

    def forward(i: int, sync: bool) -> Tensor:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        with autocast, gradcache.seeded_dropout((run.seed, 6, i), run.model.dropout, device):
            return engine.forward(packs[i], rank=None, recompute=again[i], sync=sync)

    def loss(exits_END: Tensor) -> Tensor:
        exits_END.register_hook(lambda grad: mark("backward"))
        exits_END = exits_END.bfloat16() if half and device.type == "cuda" else exits_END
        loss_EM = loss_table(exits_END, batch, run, World(0, 1, device))
        found.append((weights(run).to(device) * loss_EM).sum())
        return found[0]

    engine.begin()
    gradcache.gradients(engine, forward, loss, keeps, final, sync=True)
    twice = sum(p.plan.tokens for p, keep in zip(packs, keeps, strict=True) if not keep)
    return found[0].detach(), twice / batch.tokens


def budget_of(
    keep: Keep, kept: ActivationCost, packs: Sequence[PackedBatch], run: config.Run
) -> float:
    """Bytes for graphs that keep so many of them."""
    if keep in ("none", "all"):
        return float("inf") if keep == "all" else 0.0
    if keep == "budget":
        return run.activation_gib * 2**30
    layers = run.model.num_hidden_layers
    return HALF * sum(gradcache.graph_bytes(kept, pack, 0, layers) for pack in packs)


class Cached(Trained):
    """A model with its optimiser, of whose steps some graphs are kept."""

    def __init__(
        self, model: Transformer, run: config.Run, keep: Keep, before: int, half: bool
    ) -> None:
        super().__init__(model, adamw(model, run.optim), no_graph, before)
        self.run, self.keep, self.half = replace(run, gradient_cache=True), keep, half
        device = model.device
        self.engine = Engine.of(model, self.run, World(0, 1, device), half)
        self.kept = ActivationCost.measure(model, half)
        self.budget, self.twice = 0.0, 0.0

    def __call__(self, inputs: Texts, backward: bool) -> Tensor:
        batch, packs = inputs.packs(False)
        self.budget = budget_of(self.keep, self.kept, packs, self.run)
        loss, self.twice = cached_step(
            *(self.engine, self.run, batch, packs, self.kept, self.budget, self.half),
            mark=self.mark,
        )
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
    "uncached_eager": {"compiled": False},
    "none_kept_eager": {"keep": "none", "compiled": False},
}


def ours(
    case: Case,
    device: torch.device,
    smoke: bool,
    *,
    keep: Keep | None = None,
    compiled: bool = True,
    pack_tokens: int = 0,
) -> Trained:
    """keep: None for the plain step. pack_tokens: another limit than the case's."""
    if keep is None:
        step = bench.ours(case, device, smoke, compiled=compiled)
        return Repacked(step, case, device, pack_tokens) if pack_tokens else step
    before = allocated(device)
    model = fresh(case.run.model, device)
    to_weights(model, case.run.optim)
    if compiled:
        if not smoke:
            torch._dynamo.reset()  # what others compiled counts towards its limit
        model.compile_blocks("inductor" if device.type == "cuda" else "aot_eager")
    return Cached(model, case.run, keep, before, device.type == "cuda")


class Repacked(Trained):
    """A step on the same texts in other packs."""

    def __init__(self, step: Trained, case: Case, device: torch.device, pack_tokens: int) -> None:
        super().__init__(step.model, step.optimizer, step.loss, step.before)
        case = replace(case, run=replace(case.run, pack_tokens=pack_tokens))
        self.texts = Texts(case, device)

    def __call__(self, inputs: Texts, backward: bool) -> Tensor:
        return super().__call__(self.texts, backward)


PEERS: dict[str, Callable[[Case, Transformer], peers.Peer]] = {
    "sentence_transformers": peers.sentence_transformers,
    "sentence_transformers_uncached": partial(peers.sentence_transformers, cached=False),
}


def build(name: str, case: Case, like: Texts, smoke: bool) -> tuple[Trained, str | None]:
    """A provider's step, and what has to be said of it, if anything.

    Raises:
        Missing: its library is not installed.
    """
    device = like.device
    if name in OURS:
        return ours(case, device, smoke, **OURS[name]), None
    before = allocated(device)
    start = fresh(case.run.model, device)
    model, loss, note = PEERS[name](case, start)
    del start
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.run.optim.lr, fused=True)
    return Trained(model, optimizer, loss, before), note


# ---- right or not ----


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """train_step's checks, cached: loss and every gradient against float64, whatever is kept; and
    with dropout, of which there is no truth, with none kept against all kept."""
    for check in (c for c in checked.checks() if not c.liger):
        check = check.toy() if smoke else check
        at = {"shape": checked.about_check(check)}
        for keep in ("none", "half", "all"):
            try:
                found = checked.verdict(check, device, partial(packed, keep=keep))
            except Exception as error:  # whatever it is, it is not right
                found = {"ok": False, "dtype": "-", "error": reason(error)}
            yield {"check": f"{check.name}, {keep} kept", **at, **found}
    check = next(checked.checks())
    check = check.toy() if smoke else check
    at = {"check": "dropout, drawn again", "shape": checked.about_check(check)}
    try:
        yield at | drawn_again(check, device)
    except Exception as error:
        yield at | {"ok": False, "dtype": "-", "error": reason(error)}


def packed(
    check: checked.Check, device: torch.device, keep: Keep, dropout: float = 0.0
) -> tuple[Tensor, checked.Gradients]:
    """Loss and gradients as training computes them with the gradient cache."""
    how: Literal["none", "selective"] = "selective" if check.again else "none"
    run = replace(check.run, gradient_cache=True, activation_checkpointing=how)
    run = replace(run, model=replace(run.model, dropout=dropout))
    model, half = checked.made(check, device, dropout), device.type == "cuda"
    checked.compile_for(model, device, lean=check.again > 0)
    model.train()
    batch = checked.batch_of(check)
    packs = [some.to(device) for some in batch.packs]
    kept = ActivationCost.measure(model, half)
    engine = Engine.of(model, run, World(0, 1, device), half)
    budget = budget_of(keep, kept, packs, run)
    loss, _ = cached_step(engine, run, batch, packs, kept, budget, half)
    gradients = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        gradients[name] = p.grad.cpu()
    return loss.cpu(), gradients


def drawn_again(check: checked.Check, device: torch.device) -> dict[str, Any]:
    """Floor: two steps of the dtype, as with dropout left out."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    floor = 2 * torch.finfo(dtype).eps + 64 * checked.EPS32 / check.run.loss.temperature
    got, want = (packed(check, device, keep, dropout=0.2) for keep in ("none", "all"))
    pairs = {"loss": (got[0], want[0])} | {name: (x, want[1][name]) for name, x in got[1].items()}
    parts = {name: judged(a, b, b.double(), floor) for name, (a, b) in pairs.items()}
    worst = max(parts, key=lambda name: (not parts[name]["ok"], parts[name]["rms"]))
    return {
        "ok": all(part["ok"] for part in parts.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "gradients": {"worst": worst, **parts[worst]},
    }


# ---- what is read off beside the time ----


def numbers(case: Case, step: Trained, inputs: Texts, ms: float) -> dict[str, Any]:
    """Of a row: what was encoded twice, the budget, and the step's memory, after another step."""
    twice, budget = (step.twice, step.budget) if isinstance(step, Cached) else (0.0, None)
    limit = budget if case.run.activation_gib and budget else None
    device = inputs.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "tokens_s": cases.tokens(case) / ms * 1e3,
        "again": twice,
        "budget_mib": None if limit is None else limit / 2**20,
        "hopper": "H100" in name or "H200" in name,
        **bench.memory(step, inputs),
    }


# ---- what is printed ----

COLUMNS = (
    *("provider", "ms", "p20..p80", "of uncached", "encoded twice", "floor, ms", "of it"),
    *("peak GiB", "of activations", "budget GiB"),
)
SAME = 0.02  # relative: losses of the first step, in bf16


def overhead(rows: Sequence[report.Row], row: report.Row) -> float | None:
    """How many times as long as the same provider's plain step on the same texts.

    None where there is none, either is not right, or the two have different losses.
    """
    name = row["provider"]
    if name.startswith("sentence_transformers"):
        base = "sentence_transformers_uncached"
    else:
        base = "uncached_eager" if name.endswith("_eager") else "uncached"
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


def cells(
    rows: list[report.Row],
    row: report.Row,
    floors: dict[str, float] | None,
    baselines: tuple[str, ...],
) -> list[str]:
    if row.get("ms") is None:
        return [row["provider"], row["status"]]
    ratio = overhead(rows, row)
    ours = row["provider"] in OURS
    lowest = "-", "-"
    if ours and floors is not None:
        plain = sum(ms for stage, ms in floors.items() if stage != AGAIN)
        floor = plain + row["again"] * floors[AGAIN]
        lowest = f"{floor:.1f}", f"{floor / row['ms']:.1%}"
    sizes = (row.get(name) for name in ("peak_mib", "activation_mib", "budget_mib"))
    return [
        row["provider"],
        f"{row['ms']:.1f}",
        f"{row['p20']:.1f}..{row['p80']:.1f}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{row['again']:.0%}" if ours else "-",
        *lowest,
        *("-" if size is None else f"{size / 1024:.1f}" for size in sizes),
        *(report.ratio(rows, row, baseline) for baseline in baselines),
    ]


def table(
    rows: list[report.Row],
    mode: str,
    floors: dict[str, float] | None,
    baselines: tuple[str, ...],
) -> str:
    """One case: how many times the plain step, and how many times as fast as `baselines`."""
    mine = [row for row in rows if row["mode"] == mode]
    lines = [[*COLUMNS, *(f"x {name}" for name in baselines)]]
    lines += [cells(rows, row, floors, baselines) for row in mine]
    notes = [f"  {row['provider']}: {row['note']}" for row in mine if row.get("note")]
    if floors is not None:
        told = ", ".join(f"{stage} {ms:.2f} ms" for stage, ms in floors.items())
        notes.insert(0, f"  floors at the ceilings: {told}")
    return "\n".join(["one optimiser step", *report.aligned(lines), *notes])


# ---- targets ----

OVERHEADS = {"none_kept": 1.40, "all_kept": 1.10}
WITHIN = 1.25  # of the budget: what is free beside the part of it that the probe takes (0.8)


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is aimed at, where its numbers were obtained on an H100 or H200 and are right."""
    got = [row for row in rows if row.get("hopper") and row.get("green") is not False]
    found = []
    for row in got:
        limit = OVERHEADS.get(row["provider"])
        if row["case"] == "fit" and limit and (times := overhead(got, row)) is not None:
            what = f"fit, {row['provider']}: times the plain step"
            found.append((what, times, f"<= {limit:g}", times <= limit))
        if row.get("budget_mib") and row.get("activation_mib") is not None:
            share = row["activation_mib"] / row["budget_mib"]
            what = f"{row['case']}, {row['provider']}: peak of activations / budget"
            found.append((what, share, f"<= {WITHIN:g}", share <= WITHIN))
    names = "target", "value", "limit", "met"
    return [dict(zip(names, values, strict=True)) for values in found]
