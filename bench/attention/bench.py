"""Attention over packed sequences: its cases, its two numbers, its gate.

Letters: T tokens of all sequences, n_i those of one, Hq query heads, Hkv key/value heads, K their
width. A pair is a query and a key that it sees: n_i^2 of a sequence, n_i (n_i + 1) / 2 if causal.

FLOPs. Two products forward, q k' and p v: 4 Hq K for each pair. Backward five (q k' again, do v',
and those of dq, dk, dv): 2.5 times that. TFLOP/s count these, whatever a provider computes besides
(whole tiles where a triangle or a few tokens are asked for).

Bytes, of bf16. Forward reads q, k, v and writes o: (2 Hq + 2 Hkv) K T elements. Backward reads q,
do, k, v and writes dq, dk, dv: (3 Hq + 4 Hkv) K T, without o, which nobody needs who has the whole
sequence at hand. The larger of the two times is the floor: bytes up to a few hundred tokens, FLOPs
beyond.

Exponentials. One for each pair and query head, forward and again backward. They share no unit with
the products and no ceiling is measured for them, so they are in no floor here; see LOG.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mlembed_kernels.attention.attention import attention

from ..harness import BACKWARD, FORWARD, TRAIN, Apart
from . import peers
from .cases import CASES, SKIPPING, Case
from .cases import about as about
from .cases import floors as floors
from .cases import flops as flops
from .cases import inputs as inputs
from .cases import nbytes as nbytes
from .cases import toy as toy
from .gate import gate as gate
from .gate import spot
from .peers import Batch, Packed, Tensors

TESTS = ("attention/*",)  # below tests/kernels/
BREAKDOWN = "short", "mid", "long"  # where ours is split into its kernels
BASELINES = "varlen", "varlen_gqa", "alone"  # speed-ups are printed against these
SWEEP_CASE = "mid"  # where launch configurations are compared: it has short and long sequences


def whole(inputs: Packed) -> tuple[Tensors, Tensors]:
    return inputs.stacked, (inputs.dout,)


def prefix(T: int, copied: bool, inputs: Packed) -> tuple[Tensors, Tensors]:
    """The rows of those that are there: where they lie in the buffer, or in memory of their own."""
    rows = [x.detach()[:T] for x in (*inputs.stacked, inputs.dout)]
    q, k, v, dout = (x.clone() for x in rows) if copied else rows
    return tuple(x.requires_grad_() for x in (q, k, v)), (dout,)


class Checked(Apart):
    """What it gives in each mode is judged once: who computes something else has no time."""

    def __init__(
        self,
        function: Callable[..., Any],
        prepare: Callable[[Any], tuple[Tensors, Tensors]],
        judge: Callable[[Packed, str, Tensors], dict[str, Any] | None],
    ) -> None:
        super().__init__(function, prepare)
        self.judge, self.seen = judge, set[str]()

    def once(self, inputs: Packed, mode: str, got: Tensors) -> Tensors:
        if mode not in self.seen:
            self.seen.add(mode)
            found = self.judge(inputs, mode, got)
            if found is not None and not found["near"]:
                raise RuntimeError(f"computes something else, relative errors {found['rms']}")
        return got

    def __call__(self, inputs: Packed, backward: bool) -> Tensors:
        mode = TRAIN if backward else FORWARD
        return self.once(inputs, mode, super().__call__(inputs, backward))

    def backward(self, inputs: Packed) -> Callable[[], Tensors]:
        again = super().backward(inputs)
        if BACKWARD not in self.seen:
            self.once(inputs, BACKWARD, again())
        return again


def ours(case: Case, provider: str, device: torch.device) -> Apart:
    """Attention over those that are there: as a prefix, alone, by flags; or over all of them."""
    group = case.Hq // case.Hkv
    prefixed = provider in ("ours", "alone")
    lengths = case.lengths[: case.alive] if prefixed else case.lengths
    batch = Batch.of(lengths, case.causal, group, device)
    active = None
    if provider == "active":
        active = torch.arange(len(lengths), device=device) < case.alive
    function = partial(
        attention,
        cu_seqlens=batch.cu,
        causal=case.causal,
        active=active,
        impl="triton",
        plan=batch.plan,
    )
    if not (prefixed and case.gone):
        return Apart(function, whole)
    return Apart(function, partial(prefix, case.tokens, provider == "alone"))


def build(name: str, case: Case, like: Packed, smoke: bool) -> tuple[Apart, str | None]:
    """A provider's step, and what has to be said of it, if anything."""
    device = like.dout.device
    if name in SKIPPING:
        note = "all sequences; TFLOP/s and GB/s count only those that are there"
        return ours(case, name, device), note if name == "whole" else None
    batch = Batch.of(case.lengths, case.causal, case.Hq // case.Hkv, device)
    peer = peers.build(name, batch, smoke)
    prepare = peer.prepare or whole
    if name == "rope_qk_norm":
        return Apart(peer.function, prepare), peer.note
    return Checked(peer.function, prepare, partial(spot, case)), peer.note


# ---- targets ----

# mix -> times as fast as torch's FlashAttention 2 (varlen): at least, aimed at; fwd and bwd.
GOALS = {
    "short": {FORWARD: (3.0, 4.5), BACKWARD: (3.0, 6.0)},
    "mid": {FORWARD: (1.6, 2.5), BACKWARD: (1.6, 2.5)},
    "long": {FORWARD: (1.0, 1.3), BACKWARD: (1.0, 1.3)},
}
AS_FA3 = 0.8  # of FA3's speed on long sequences
ABOVE_BYTES = 1.5  # times the floor of bytes on short ones
SKIPPED = 1.05  # times attention on the rest alone


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for and what is aimed at, where its numbers were obtained and are right."""
    got = {
        (row["case"], row["provider"], row["mode"]): row
        for row in rows
        if row.get("ms") and row.get("green") is not False
    }
    found = []

    def least(what: str, value: float, limit: float, aim: bool = False) -> None:
        found.append((what, value, f"{'aim ' if aim else ''}>= {limit}", value >= limit))

    def most(what: str, value: float, limit: float, aim: bool = False) -> None:
        found.append((what, value, f"{'aim ' if aim else ''}<= {limit}", value <= limit))

    for name, case in CASES.items():
        for mode in case.modes:
            mine, varlen, fa3, alone = (
                got.get((name, provider, mode)) for provider in ("ours", "varlen", "fa3", "alone")
            )
            if mine is None:
                continue
            if alone is not None:
                ratio = mine["ms"] / alone["ms"]
                most(f"{name}, {mode}: time / that of the rest alone", ratio, SKIPPED)
            goals = GOALS.get(case.mix, {}).get(mode)
            if goals is None or case.gone:
                continue
            if varlen is not None:
                ratio = varlen["ms"] / mine["ms"]
                least(f"{name}, {mode}: times FA2 varlen", ratio, goals[0])
                least(f"{name}, {mode}: times FA2 varlen", ratio, goals[1], aim=True)
            if case.mix == "short":
                above = 1 / mine["copy_share"]
                most(f"{name}, {mode}: time / floor of bytes", above, ABOVE_BYTES, aim=True)
            if case.mix == "long" and fa3 is not None:
                ratio = fa3["ms"] / mine["ms"]
                least(f"{name}, {mode}: times FA3", ratio, AS_FA3, aim=True)
    names = "target", "value", "limit", "met"
    return [dict(zip(names, values, strict=True)) for values in found]


# ---- launch configurations ----

SWEEP = {"attention._forward": FORWARD, "attention._backward": BACKWARD}  # module -> what is timed
# Beside the present entry, from which they take what they do not name; for every width of heads.
# More than 64 ROWS are those of two query heads where groups are even.
CANDIDATES: dict[str, list[dict[str, int | None]]] = {
    "packed_forward_pair": [
        {"maxnreg": None},
        {"HEADS": 1, "num_warps": 4, "maxnreg": None},
        {"HEADS": 1, "num_warps": 8, "maxnreg": None},
    ],
    "packed_forward": [{"num_warps": 8}],
    "long_forward": [
        {"num_stages": 2},
        {"num_stages": 4},
        {"num_warps": 4},
        {"BN": 32},
        {"BN": 32, "num_stages": 4},
        {"BN": 128},
        {"BN": 128, "num_stages": 2},
        {"ROWS": 64, "num_warps": 4},
        {"ROWS": 64, "BN": 32, "num_warps": 4},
    ],
    "packed_backward_pair": [
        {"maxnreg": None},
        {"HEADS": 1, "maxnreg": None},
        {"HEADS": 1, "num_stages": 2, "maxnreg": None},
    ],
    "packed_backward": [
        {"num_warps": 4},
        {"num_stages": 2},
    ],
    "queries_backward": [
        {"num_stages": 1},
        {"num_stages": 3},
        {"num_warps": 4},
        {"BN": 32},
        {"BN": 32, "num_stages": 3},
        {"BN": 128},
        {"ROWS": 64, "num_warps": 4},
        {"ROWS": 64, "BN": 32, "num_warps": 4},
    ],
    "keys_backward": [
        {"num_stages": 1},
        {"num_stages": 3},
        {"num_warps": 4},
        {"BM": 32},
        {"BM": 32, "num_stages": 3},
        {"BM": 128},
        {"TOKENS": 64, "num_warps": 4},
        {"TOKENS": 64, "BM": 32, "num_warps": 4},
        {"TOKENS": 128, "BM": 32, "num_stages": 3},
    ],
}
