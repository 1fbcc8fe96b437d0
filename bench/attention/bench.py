"""Attention over packed sequences, next to other implementations; see cases.py."""

from functools import partial

import torch

from mlembed_kernels.attention.attention import attention

from ..harness import BACKWARD, FORWARD, Apart, Tensors
from ..report import Row, Targets
from . import peers
from .cases import CASES, SKIPPING, Case
from .gate import gate, spot
from .peers import Batch, Packed

__all__ = "CASES", "gate", "spot"

TESTS = ("attention/*",)
BREAKDOWN = "short", "mid", "long"
BASELINES = "varlen", "varlen_gqa", "alone"


def whole(inputs: Packed) -> tuple[Tensors, Tensors]:
    return inputs.stacked, (inputs.dout,)


def prefix(T: int, copied: bool, inputs: Packed) -> tuple[Tensors, Tensors]:
    """Return the first T rows, as a view of the buffer or copied."""
    rows = [x.detach()[:T] for x in (*inputs.stacked, inputs.dout)]
    q, k, v, dout = (x.clone() for x in rows) if copied else rows
    return tuple(x.requires_grad_() for x in (q, k, v)), (dout,)


def ours(case: Case, provider: str, device: torch.device) -> Apart:
    """Return attention over the sequences that are left, or over all of them.

    ours: as a prefix of the buffer. alone: of a copy. active: by flags. whole: over all.
    """
    group = case.Hq // case.Hkv
    prefixed = provider in ("ours", "alone")
    lengths = case.lengths[: case.alive] if prefixed else case.lengths
    batch = Batch.of(lengths, case.causal, group, device)
    active = None
    if provider == "active":
        active = torch.arange(len(lengths), device=device) < case.alive
    options = {"cu_seqlens": batch.cu, "causal": case.causal, "active": active}
    function = partial(attention, **options, impl="triton", plan=batch.plan)
    if not (prefixed and case.gone):
        return Apart(function, whole)
    return Apart(function, partial(prefix, case.tokens, provider == "alone"))


def build(name: str, case: Case, like: Packed, smoke: bool) -> tuple[Apart, str | None]:
    """Return a provider's step, and a note on its result, if it needs one."""
    device = like.dout.device
    if name in SKIPPING:
        note = "all sequences; TFLOP/s and GB/s count only those that are left"
        return ours(case, name, device), note if name == "whole" else None
    batch = Batch.of(case.lengths, case.causal, case.Hq // case.Hkv, device)
    peer = peers.build(name, batch, smoke)
    prepare = peer.prepare or whole
    if name == "rope_qk_norm":
        return Apart(peer.function, prepare), peer.note
    return Apart(peer.function, prepare, partial(spot, case)), peer.note


# ---- targets ----

# Mix of lengths -> speed relative to torch's FlashAttention 2 (varlen): required, aimed at.
GOALS = {
    "short": {FORWARD: (3.0, 4.5), BACKWARD: (3.0, 6.0)},
    "mid": {FORWARD: (1.6, 2.5), BACKWARD: (1.6, 2.5)},
    "long": {FORWARD: (1.0, 1.3), BACKWARD: (1.0, 1.3)},
}
AS_FA3 = 0.8  # of FA3's speed on long sequences
ABOVE_BYTES = 1.5  # times the floor of bytes on short ones
SKIPPED = 1.05  # times attention on the rest alone


def targets(rows: list[Row]) -> list[Row]:
    targets = Targets(rows)
    for name, case in CASES.items():
        for mode in case.modes:
            mine, varlen, fa3, alone = (
                targets.row(name, provider, mode) for provider in ("ours", "varlen", "fa3", "alone")
            )
            if mine is None:
                continue
            if alone is not None:
                ratio = mine["ms"] / alone["ms"]
                targets.add(f"{name}, {mode}: time / that of the rest alone", ratio, "<=", SKIPPED)
            goals = GOALS.get(case.mix, {}).get(mode)
            if goals is None or case.gone:
                continue
            if varlen is not None:
                ratio = varlen["ms"] / mine["ms"]
                targets.add(f"{name}, {mode}: times FA2 varlen", ratio, ">=", goals[0])
                targets.add(f"{name}, {mode}: times FA2 varlen", ratio, ">=", goals[1], aim=True)
            if case.mix == "short":
                what, above = f"{name}, {mode}: time / floor of bytes", 1 / mine["copy_share"]
                targets.add(what, above, "<=", ABOVE_BYTES, aim=True)
            if case.mix == "long" and fa3 is not None:
                ratio = fa3["ms"] / mine["ms"]
                targets.add(f"{name}, {mode}: times FA3", ratio, ">=", AS_FA3, aim=True)
    return targets.listed


# ---- launch configurations ----

SWEEP_CASE = "mid"  # has short and long sequences
SWEEP = {"attention._forward": FORWARD, "attention._backward": BACKWARD}
# Options that differ from the present entry, for every width of heads. More than 64 ROWS are those
# of two query heads, in groups of an even number of heads.
CANDIDATES: dict[str, list[dict[str, int | None]]] = {
    "packed_forward_pair": [
        {"maxnreg": None}, {"HEADS": 1, "num_warps": 4, "maxnreg": None},
        {"HEADS": 1, "num_warps": 8, "maxnreg": None},
    ],
    "packed_forward": [{"num_warps": 8}],
    "long_forward": [
        {"num_stages": 2}, {"num_stages": 4}, {"num_warps": 4}, {"BN": 32},
        {"BN": 32, "num_stages": 4}, {"BN": 128}, {"BN": 128, "num_stages": 2},
        {"ROWS": 64, "num_warps": 4}, {"ROWS": 64, "BN": 32, "num_warps": 4},
    ],
    "middle_forward": [
        {"num_stages": 3}, {"BN": 32}, {"BN": 32, "num_stages": 3}, {"BN": 128},
        {"ROWS": 128, "num_warps": 8}, {"ROWS": 128, "num_warps": 8, "num_stages": 3},
    ],
    "packed_backward_pair": [
        {"maxnreg": None}, {"HEADS": 1, "maxnreg": None},
        {"HEADS": 1, "num_stages": 2, "maxnreg": None},
    ],
    "packed_backward": [
        {"num_warps": 4}, {"num_stages": 2},
    ],
    "queries_backward": [
        {"num_stages": 1}, {"num_stages": 3}, {"num_warps": 4}, {"BN": 32},
        {"BN": 32, "num_stages": 3}, {"BN": 128}, {"ROWS": 64, "num_warps": 4},
        {"ROWS": 64, "BN": 32, "num_warps": 4},
    ],
    "middle_queries_backward": [
        {"num_stages": 1}, {"BN": 32}, {"BN": 32, "num_stages": 3},
        {"ROWS": 128, "num_warps": 8},
    ],
    "keys_backward": [
        {"num_stages": 1}, {"num_stages": 3}, {"BM": 32}, {"BM": 32, "num_stages": 3},
        {"BM": 128}, {"TOKENS": 64}, {"TOKENS": 64, "num_warps": 4},
        {"TOKENS": 64, "BM": 32, "num_warps": 4}, {"TOKENS": 128}, {"TOKENS": 128, "BM": 32},
    ],
}  # fmt: skip
