"""The nested contrastive loss: its cases, its two numbers, its gate.

Letters: E exits, B queries, N candidates (B = N here), D width, M prefixes.

FLOPs. A product of all pairs, S = q c', is 2BND an exit; the prefixes are sums within it and cost
nothing more. The loss needs S, its gradients dq = G c and dc = G' q. Useful: 2BNDE forward, three
times that with backward. TFLOP/s count these, whatever a provider does (one GEMM per prefix is
sum(dims) / D = 2 times S). Who keeps no S forms it again in the backward: "four-GEMM" = S forward,
S backward, dq, dc = 4 x 2BNDE, the floor of that design.

Bytes. Forward reads q and c once, 2 (B + N) D E in bf16. Backward reads them again and writes their
gradients: three times that. Norms, sums and losses are E M (B + N) numbers, less than 1 % of it.

Exponentials. Each pass takes one for every pair and prefix, E M B N. They share no unit with the
matrix products and no ceiling is measured for them, so they are in no floor here; see LOG.md.
"""

from typing import Any

from torch import Tensor

from mlembed_kernels import infonce

from ..harness import FORWARD, TRAIN, Leaves, Step
from . import peers
from .cases import BOTH, NESTED, Case
from .cases import BREAKDOWN as BREAKDOWN
from .cases import floors as floors
from .cases import flops as flops
from .cases import inputs as inputs
from .cases import nbytes as nbytes
from .cases import toy as toy
from .gate import gate as gate
from .gate import spot as spot

TESTS = ("similarity/*",)  # below tests/kernels/
STEPS, PAIRS = tuple(peers.STEPS), tuple(peers.PAIRS)
# The most telling first: what time is left for shrinks from the end.
CASES = {
    case.name: case
    for case in (
        Case(name="reference", E=7, B=16384, providers=("ours", *STEPS, *PAIRS)),
        Case(name="both", E=7, B=16384, directions=BOTH, providers=("ours", *STEPS[:-1])),
        Case(name="small", E=1, B=4096, providers=("ours", *STEPS[:-1], *PAIRS)),
        Case(name="labse", E=7, B=16384, D=256, dims=NESTED[:6], providers=("ours", *STEPS[:-1])),
        Case(name="e1", E=1, B=16384, providers=("ours", *STEPS[:-1])),
        Case(name="huge", E=1, B=131072, providers=("ours",)),
    )
}
BASELINES = "eager", "compile"  # speed-ups are printed against these
SWEEP_CASE = "e1"  # where launch configurations are compared


def about(case: Case) -> str:
    way = "both directions" if case.both else "one direction"
    prefixes = f"{case.dims[0]}..{case.dims[-1]} (M = {len(case.dims)})"
    return f"E = {case.E}, B = N = {case.B}, D = {case.D}, prefixes {prefixes}, {way}"


def ours(case: Case) -> Step:
    def step(inputs: Leaves, backward: bool) -> Tensor:
        q, c = inputs.stacked
        loss_EM = infonce(
            q,
            c,
            dims=case.dims,
            temperature=case.temperature,
            directions=case.directions,
            partition_mode="per_direction" if case.both else "joint",
            impl="triton",
        )
        loss = loss_EM.sum()
        if backward:
            loss.backward()
        return loss.detach()

    return step


def build(name: str, case: Case, like: Leaves, smoke: bool) -> tuple[Step, str | None]:
    """A provider's step, and what it leaves out of the case, if anything."""
    if name == "ours":
        return ours(case), None
    return peers.build(name, case, like.stacked[0][0].detach(), smoke)


# ---- targets ----


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, where both of its numbers were obtained and are right."""
    got = {
        row["case"]: row
        for row in rows
        if (row["provider"], row["mode"]) == ("ours", TRAIN) and row.get("ms") and row["green"]
    }
    found = []
    if {"reference", "both"} <= got.keys():
        ratio = got["both"]["ms"] / got["reference"]["ms"]
        found.append(("both directions / one, fwd+bwd", ratio, "<= 1.3", ratio <= 1.3))
    if {"e1", "huge"} <= got.keys():
        ratio = got["huge"]["tflops"] / got["e1"]["tflops"]
        found.append(("TFLOP/s of huge / of e1, fwd+bwd", ratio, ">= 0.9", ratio >= 0.9))
    if "huge" in got:
        peak = got["huge"]["peak_mib"] / 1024
        found.append(("peak of huge, GiB", peak, "< 2", peak < 2))
    names = "target", "value", "limit", "met"
    return [dict(zip(names, values, strict=True)) for values in found]


# ---- launch configurations ----

SWEEP = {
    "similarity._lse_forward": FORWARD,
    "similarity._lse_backward": TRAIN,
}  # module of CONFIGS -> what is timed
# Beside the present entry, from which they take what they do not name. `--case both` reaches the
# kernels that sum columns too.
CANDIDATES: dict[str, list[dict[str, int | None]]] = {
    "narrow_forward": [
        {"num_stages": 2},
        {"num_stages": 4},
        {"maxnreg": 128},
        {"BM": 64, "BN": 64},
        {"BM": 64, "BN": 256, "num_warps": 8},
        {"BM": 128, "BN": 64},
        {"BM": 128, "BN": 128, "num_warps": 8},
        {"BM": 128, "BN": 128, "num_warps": 8, "maxnreg": 128},
    ],
    "wide_forward": [
        {"num_stages": 2},
        {"num_stages": 4},
        {"maxnreg": None},
        {"maxnreg": None, "num_stages": 4},
        {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3, "maxnreg": None},
        {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 4, "maxnreg": None},
        {"BM": 64, "BN": 256, "num_warps": 8, "num_stages": 3, "maxnreg": None},
        {"BM": 128, "BN": 256, "num_warps": 8, "num_stages": 3, "maxnreg": None},
        {"BK": 128, "num_stages": 2},
    ],
    "narrow_backward": [
        {"num_stages": 1},
        {"num_stages": 3},
        {"BM": 64, "BN": 32, "num_warps": 4},
        {"BM": 64, "BN": 64, "num_warps": 4},
        {"BM": 64, "BN": 64, "num_warps": 8},
        {"BM": 128, "BN": 64},
    ],
    "wide_backward": [
        {"num_stages": 2},
        {"num_stages": 4},
        {"maxnreg": 128},
        {"BM": 64, "BN": 128, "num_warps": 4},
        {"BM": 128, "BN": 64, "num_warps": 4},
        {"BM": 128, "BN": 128, "num_warps": 16},
    ],
    "product": [
        {"num_stages": 4},
        {"num_warps": 4},
        {"BM": 128, "BN": 256},
        {"BM": 128, "BN": 256, "num_stages": 4},
        {"BK": 32, "num_stages": 5},
        {"BK": 128, "num_stages": 2},
    ],
    "exact": [],  # has work to do only where temperatures are low
}
