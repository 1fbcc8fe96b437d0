"""One optimiser step of a whole model: its cases, its numbers, who else takes one.

A step is forward, loss, backward, clipping, optimiser and clearing, over texts that lie on the
device: in training a loader's process packs them. Ours is what train.py runs on CUDA. Token ids are
a Zipf stream (bench/embed.py), lengths those that were measured on 2026-11-20. LEALLA-small is as
published, but for its vocabulary, which is nested.

What a step must do at least, and how that is counted, is in bench/train_step_cases.py.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mlembed import config
from mlembed.modeling.transformer import Transformer
from mlembed.runtime.distributed import World
from mlembed.training.gradcache import ActivationCost, layers_to_recompute
from mlembed.training.objective.loss import loss_table, weights
from mlembed.training.optim import adamw, to_weights

from .. import report
from ..harness import TRAIN
from . import peers
from . import stages as staged
from .cases import (
    CASES,
    PEAK_TFLOPS,
    Case,
    Texts,
    Trained,
    allocated,
    floors,
    flops,
    tokens,
)
from .cases import about as about
from .cases import inputs as inputs
from .cases import nbytes as nbytes
from .cases import toy as toy
from .gate import gate as gate

TESTS = ("*/*",)  # below tests/kernels/
BREAKDOWN = tuple(CASES)  # where ours is split into its stages
BASELINES = "sentence_transformers", "padded", "full_depth"  # speed-ups are printed against these
REPEATS = 3  # at least: a step takes seconds elsewhere
SWEEP: dict[str, str] = {}  # launches no kernel of its own
SWEEP_CASE = "step"


# provider -> how it differs from what train.py runs
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_bf16": {"weights": "bf16"},
    "ours_liger": {"liger": True},
    "ours_eager": {"compiled": False},
    "ours_block": {"keep": "block"},
    "ours_selective": {"keep": "selective"},
    "full_depth": {"deep": True},
}


def ours(
    case: Case,
    device: torch.device,
    smoke: bool,
    *,
    weights: Literal["fp32", "bf16"] = "fp32",
    compiled: bool = True,
    liger: bool = False,
    keep: Literal["none", "block", "selective"] = "none",
    deep: bool = False,
) -> Trained:
    """The model as train.py sets it up on CUDA.

    Raises:
        Missing: Liger's functions are asked for, and are not there.
    """
    halves = peers.liger_halves(device) if liger else None
    before, run = allocated(device), case.run
    optim = replace(run.optim, weights=weights)
    run = replace(run, optim=optim, activation_checkpointing=keep)
    model = fresh(run.model, device)
    to_weights(model, run.optim)
    if halves is not None:
        model._before, model._after = halves
    elif compiled:
        if not smoke:
            torch._dynamo.reset()  # what others compiled counts towards its limit
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        model.compile_blocks(backend, lean=keep == "selective")
    half = device.type == "cuda" or weights == "bf16"
    kept = ActivationCost.measure(model, half) if keep == "selective" else None
    loss = partial(our_loss, run=run, kept=kept, deep=deep, half=half)
    return Trained(model, adamw(model, run.optim), loss, before)


def fresh(cfg: config.Model, device: torch.device) -> Transformer:
    """Every provider begins with these weights."""
    torch.manual_seed(0)
    with device:
        return Transformer(cfg)


def our_loss(
    step: Trained,
    inputs: Texts,
    *,
    run: config.Run,
    kept: ActivationCost | None,
    deep: bool,
    half: bool,
) -> Tensor:
    """As train.py computes it, in one process."""
    device = inputs.device
    batch, packs = inputs.packs(deep)
    again = layers_to_recompute(run, kept, packs, run.activation_gib * 2**30)
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        parts = [step.model(pack, recompute=again) for pack in packs]
    exits_END = torch.cat(parts, dim=1)
    if half and device.type == "cuda":
        exits_END = exits_END.bfloat16()
    step.mark("loss")
    if exits_END.requires_grad:
        exits_END.register_hook(lambda grad: step.mark("blocks"))
    loss_EM = loss_table(exits_END, batch, run, World(0, 1, device))
    return (weights(run).to(device) * loss_EM).sum()


def build(name: str, case: Case, like: Texts, smoke: bool) -> tuple[Trained, str | None]:
    """A provider's step, and what has to be said of it, if anything.

    Raises:
        Missing: its library is not installed.
    """
    device = like.device
    if name in OURS:
        note = "all texts through all layers; MFU counts only those that they are to run through"
        return ours(case, device, smoke, **OURS[name]), note if name == "full_depth" else None
    before = allocated(device)
    start = fresh(case.run.model, device)
    model, loss, note = peers.PEERS[name](case, start)
    del start
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.run.optim.lr, fused=True)
    return Trained(model, optimizer, loss, before), note


def spot(case: Case, inputs: Texts, mode: str, got: Tensor) -> dict[str, Any]:
    """At this size nothing is had in float64; random weights guess among all candidates, and a
    cosine says at most 1 / temperature more than another."""
    candidates = case.texts - case.pairs
    most = math.log(candidates) + 2 / case.run.loss.temperature
    value = float(got)
    return {"ok": 0 < value < most, "loss": value}


# ---- what is read off beside the time ----


def numbers(case: Case, step: Trained, inputs: Texts, ms: float) -> dict[str, Any]:
    """Of a row: tokens a second, MFU, and the step's memory, after another step."""
    return {
        "tokens_s": tokens(case) / ms * 1e3,
        "mfu": flops(case, TRAIN) / ms / 1e9 / PEAK_TFLOPS,
        **memory(step, inputs),
    }


def memory(step: Trained, inputs: Texts) -> dict[str, float | None]:
    """MiB at the most, with weights and moments, and of it what was neither they nor gradients."""
    device = inputs.device
    if device.type != "cuda":
        step(inputs, True)
        return {"peak_mib": None, "activation_mib": None}
    forward = [0]

    def mark(stage: str) -> None:
        if stage == "backward":
            forward.append(torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held, step.mark = allocated(device), mark
    try:
        step(inputs, True)
    finally:
        step.mark = lambda stage: None
    rest = torch.cuda.max_memory_allocated(device)
    gradients = sum(p.nbytes for p in step.model.parameters() if p.requires_grad)
    peak, activations = parted(step.before, held, forward[-1], rest, gradients)
    return {"peak_mib": peak / 2**20, "activation_mib": activations / 2**20}


def parted(before: int, held: int, forward: int, rest: int, gradients: int) -> tuple[int, int]:
    """-> bytes at the peak, and those of activations: in the forward there are no gradients yet to
    be subtracted, and later at most all of them.

    held: with weights and moments. forward, rest: the peaks until the backward begins, and since.
    """
    return max(forward, rest) - before, max(forward - held, rest - held - gradients)


def stages(case: Case, step: Trained, inputs: Texts, ceilings: dict[str, float]) -> dict[str, Any]:
    """A step by stage, with the floors at these ceilings, of which a toy run has none."""
    found = staged.profiled(step, inputs)
    lowest = floors(case, TRAIN, ceilings["tflops"], ceilings["gbs"]) if ceilings else {}
    return staged.summed(found, lowest)


# ---- what is printed ----

COLUMNS = (
    *("provider", "ms", "p20..p80", "tokens/s", "MFU", "of matmul"),
    *("peak GiB", "of activations"),
)


def cells(rows: list[report.Row], row: report.Row, baselines: tuple[str, ...]) -> list[str]:
    if row.get("ms") is None:
        return [row["provider"], row["status"]]
    sizes = (row.get(name) for name in ("peak_mib", "activation_mib"))
    return [
        row["provider"],
        f"{row['ms']:.1f}",
        f"{row['p20']:.1f}..{row['p80']:.1f}",
        f"{row['tokens_s']:.0f}",
        f"{row['mfu']:.1%}",
        f"{row['share']:.1%}",
        *("-" if size is None else f"{size / 1024:.1f}" for size in sizes),
        *(report.ratio(rows, row, baseline) for baseline in baselines),
    ]


def table(
    rows: list[report.Row],
    mode: str,
    floors: dict[str, float] | None,
    baselines: tuple[str, ...],
) -> str:
    """One case, with speed-ups against `baselines`."""
    mine = [row for row in rows if row["mode"] == mode]
    lines = [[*COLUMNS, *(f"x {name}" for name in baselines)]]
    lines += [cells(rows, row, baselines) for row in mine]
    notes = [f"  {row['provider']}: {row['note']}" for row in mine if row.get("note")]
    if floors is not None:
        told = ", ".join(f"{stage} {ms:.2f} ms" for stage, ms in floors.items())
        notes.insert(0, f"  floors at the ceilings: {told}")
    return "\n".join(["one optimiser step", *report.aligned(lines), *notes])


# ---- targets ----

RATE = 150e3, 190e3  # real tokens a second: asked for, aimed at
GIB = 80.0
TIMES: dict[str, tuple[float, float | None]] = {
    "step": (11.0, None),
    "lealla": (3.0, 6.0),
}  # sentence-transformers'
SKIPPED = 0.70, 0.65  # of full depth, in time and in memory


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for and what is aimed at, where its numbers were obtained and are right."""
    got = {
        (row["case"], row["provider"]): row
        for row in rows
        if row.get("ms") and row.get("green") is not False
    }
    found = []

    def least(what: str, value: float, limit: float, aim: bool = False) -> None:
        found.append((what, value, f"{'aim ' if aim else ''}>= {limit:g}", value >= limit))

    def most(what: str, value: float, limit: float, aim: bool = False) -> None:
        found.append((what, value, f"{'aim ' if aim else ''}<= {limit:g}", value <= limit))

    for who in ("ours", "ours_selective"):  # both are asked of one of them
        if (step := got.get(("step", who))) is None:
            continue
        least(f"step, {who}: real tokens/s", step["tokens_s"], RATE[0])
        least(f"step, {who}: real tokens/s", step["tokens_s"], RATE[1], aim=True)
        if step.get("peak_mib") is not None:
            peak = step["peak_mib"] / 1024
            found.append((f"step, {who}: peak, GiB", peak, f"< {GIB:g}", peak < GIB))
    for name, (limit, aim) in TIMES.items():
        theirs = got.get((name, "sentence_transformers"))
        for who in ("ours", "ours_selective"):
            if theirs is None or (mine := got.get((name, who))) is None:
                continue
            times = theirs["ms"] / mine["ms"]
            least(f"{name}, {who}: times sentence-transformers", times, limit)
            if aim is not None:
                least(f"{name}, {who}: times sentence-transformers", times, aim, aim=True)
    skip, full = (got.get(("step_skip", who)) for who in ("ours", "full_depth"))
    if skip is not None and full is not None:
        for what, key in (("time", "ms"), ("memory of activations", "activation_mib")):
            if skip.get(key) is not None and full.get(key):
                share = skip[key] / full[key]
                most(f"step_skip: {what} / at full depth", share, SKIPPED[0])
                most(f"step_skip: {what} / at full depth", share, SKIPPED[1], aim=True)
    names = "target", "value", "limit", "met"
    return [dict(zip(names, values, strict=True)) for values in found]
