"""One optimiser step of a whole model, next to other trainers.

A step is forward, loss, backward, clipping, optimiser and clearing, on packs that lie on the
device: in training a loader's process makes them. Ours is that of train.py on CUDA. Token ids are a
Zipf stream (bench/embed.py), lengths those that were measured on 2026-11-20. LEALLA-small has its
published shape with a nested vocabulary. cases.py has the least work of a step.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mlembed import config
from mlembed.modeling.transformer import Transformer
from mlembed.training.gradcache import ActivationCost, layers_to_recompute
from mlembed.training.optim import optimizer_of, to_weights

from ..harness import TRAIN
from ..report import Floors, Row, Targets, gib
from . import cases, cpu, peers
from . import stages as staged
from .cases import PEAK_TFLOPS, Case, Ours, Texts, Trained, allocated, tokens
from .gate import compile_for, gate, packed_loss

__all__ = "CASES", "gate"

TESTS = ("*/*",)
DEVICES = "cuda", "cpu"  # Times on a CPU are those of the case `cpu`.
CASES = {**cases.CASES, cpu.CASE.name: cpu.CASE}
BREAKDOWN = tuple(cases.CASES)
BASELINES = "sentence_transformers", "padded", "full_depth", "st_matryoshka_2d"
REPEATS = 3  # a step of a peer takes seconds

# Variants of the step of train.py, as arguments of `ours`.
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
    """Return the step of train.py on CUDA.

    keep: activation checkpointing. deep: all texts run through all layers.
    Raises Missing if Liger's functions are asked for and are missing.
    """
    halves = peers.liger_halves(device) if liger else None
    before = allocated(device)
    optim = replace(case.run.optim, weights=weights)
    run = replace(case.run, optim=optim, activation_checkpointing=keep)
    model = fresh(run.model, device)
    to_weights(model, run.optim)
    if halves is not None:
        model._before, model._after = halves
    elif compiled:
        compile_for(model, device, lean=keep == "selective")
    half = device.type == "cuda" or weights == "bf16"
    kept = ActivationCost.measure(model, half) if keep == "selective" else None
    loss = partial(our_loss, run=run, kept=kept, deep=deep, half=half)
    return Ours(model, optimizer_of(model, run.optim), loss, before)


def fresh(cfg: config.Model, device: torch.device) -> Transformer:
    """Return the model that every provider starts from."""
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
    batch, packs = inputs.packs(deep)
    again = layers_to_recompute(run, kept, packs, run.activation_gib * 2**30)
    return packed_loss(step.model, run, batch, packs, again, half, lambda name: step.mark(name))


def build(name: str, case: Case, like: Texts, smoke: bool) -> tuple[Trained, str | None]:
    """Return a provider's step, and a note on its result, if it needs one."""
    if name in OURS:
        note = "all texts through all layers; MFU counts only the layers they have to run through"
        step = ours(case, like.device, smoke, **OURS[name])
        return step, note if name == "full_depth" else None
    return peer(peers.PEERS[name], case, like.device)


def peer(make: Any, case: Case, device: torch.device) -> tuple[Trained, str]:
    """Return the step of another trainer. Raises Missing if its library is not installed."""
    before = allocated(device)
    model, loss, note = make(case, fresh(case.run.model, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.run.optim.lr, fused=True)
    return Trained(model, optimizer, loss, before), note


def spot(case: Case, inputs: Texts, mode: str, got: Tensor) -> dict[str, Any]:
    """Check the range of a first loss, as float64 is too slow at this size.

    Random weights guess among all candidates, and logits differ by at most 2 / temperature.
    """
    candidates = case.texts - case.pairs
    most = math.log(candidates) + 2 / case.run.loss.temperature
    value = float(got)
    return {"ok": 0 < value < most, "loss": value}


# ---- further numbers of a row ----


def numbers(case: Case, step: Trained, inputs: Texts, ms: float) -> dict[str, Any]:
    """Return tokens a second, MFU and the memory of one more step."""
    return {
        "tokens_s": tokens(case) / ms * 1e3,
        "mfu": case.flops(TRAIN) / ms / 1e9 / PEAK_TFLOPS,
        **memory(step, inputs),
    }


def memory(step: Trained, inputs: Texts) -> dict[str, float | None]:
    """Return the peak in MiB with weights and moments, and the part of activations."""
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
    """Return the bytes of the peak, and those of activations.

    The forward has no gradients yet, the backward at most all of them, which are subtracted.
    held: bytes of weights and moments. forward, rest: peaks before and after the backward begins.
    """
    return max(forward, rest) - before, max(forward - held, rest - held - gradients)


def stages(case: Case, step: Trained, inputs: Texts, ceilings: dict[str, float]) -> dict[str, Any]:
    """Return the time of a step by stage, with floors unless it is a toy run."""
    floors = case.floors(TRAIN, **ceilings) if ceilings else {}
    return staged.summed(staged.profiled(step, inputs), floors)


COLUMNS = "tokens/s", "MFU", "of matmul", "peak GiB", "of activations"


def cells(rows: Sequence[Row], row: Row, floors: Floors) -> list[str]:
    mfu, share = (f"{row[key]:.1%}" if key in row else "-" for key in ("mfu", "share"))
    return [
        f"{row['tokens_s']:.0f}",
        mfu,
        share,
        gib(row.get("peak_mib")),
        gib(row.get("activation_mib")),
    ]


# ---- targets ----

RATE = 150e3, 190e3  # real tokens a second: required, aimed at
GIB = 80.0
TIMES = {"step": (11.0,), "lealla": (3.0, 6.0)}  # speed relative to sentence-transformers
SKIPPED = 0.70, 0.65  # of full depth, in time and in memory


def targets(rows: list[Row]) -> list[Row]:
    targets = Targets(rows)
    both = "ours", "ours_selective"
    for who in both:
        if (step := targets.row("step", who, TRAIN)) is None:
            continue
        for limit, aim in zip(RATE, (False, True), strict=True):
            targets.add(f"step, {who}: real tokens/s", step["tokens_s"], ">=", limit, aim)
        if step.get("peak_mib") is not None:
            targets.add(f"step, {who}: peak, GiB", step["peak_mib"] / 1024, "<", GIB)
    for name, limits in TIMES.items():
        theirs = targets.row(name, "sentence_transformers", TRAIN)
        for who in both:
            if theirs is None or (mine := targets.row(name, who, TRAIN)) is None:
                continue
            what, times = f"{name}, {who}: times sentence-transformers", theirs["ms"] / mine["ms"]
            for limit, aim in zip(limits, (False, True), strict=False):
                targets.add(what, times, ">=", limit, aim)
    skip, full = (targets.row("step_skip", who, TRAIN) for who in ("ours", "full_depth"))
    if skip is not None and full is not None:
        for what, key in (("time", "ms"), ("memory of activations", "activation_mib")):
            if skip.get(key) is not None and full.get(key):
                for limit, aim in zip(SKIPPED, (False, True), strict=True):
                    share = skip[key] / full[key]
                    targets.add(f"step_skip: {what} / at full depth", share, "<=", limit, aim)
    cpu.targets(targets)
    return targets.listed
