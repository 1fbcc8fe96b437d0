"""The nested contrastive loss, next to eager, compiled and other packages; see cases.py."""

import torch
from torch import Tensor

from mlembed_kernels import infonce

from ..harness import FORWARD, TRAIN, Leaves, Missing, Step
from ..report import Row, Targets
from . import peers
from .cases import BREAKDOWN, CASES, Case
from .gate import gate, spot

__all__ = "BREAKDOWN", "CASES", "gate", "spot"

TESTS = ("similarity/*",)
OURS = "ours", "ours_graph"
BASELINES = "eager", "compile"


def ours(case: Case) -> Step:
    def step(inputs: Leaves, backward: bool) -> Tensor:
        q, c = inputs.stacked
        loss = infonce(q, c, **case.options, impl="triton").sum()
        if backward:
            loss.backward()
        return loss.detach()

    return step


def graphed(case: Case) -> Step:
    """Return ours as CUDA graphs: one of each set of inputs and mode, captured at its first call.

    A small case takes its host longer than its device, which a replay does not.
    """
    eager = ours(case)
    graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, list[Tensor | None]]] = {}

    def step(inputs: Leaves, backward: bool) -> Tensor:
        key = id(inputs), backward
        if key not in graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                eager(inputs, backward)  # compiles
            torch.cuda.current_stream().wait_stream(side)
            inputs.clear()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = eager(inputs, backward)
            graphs[key] = graph, loss, [leaf.grad for leaf in inputs.stacked]
        graph, loss, gradients = graphs[key]
        graph.replay()
        for leaf, gradient in zip(inputs.stacked, gradients, strict=True):
            leaf.grad = gradient
        return loss

    return step


def build(name: str, case: Case, like: Leaves, smoke: bool) -> tuple[Step, str | None]:
    """Return a provider's step, and what it leaves out of the case, if anything."""
    if name == "ours":
        return ours(case), None
    if name == "ours_graph":
        if not like.stacked[0].is_cuda:
            raise Missing("needs CUDA")
        return graphed(case), None
    return peers.build(name, case, like.stacked[0][0].detach(), smoke)


def targets(rows: list[Row]) -> list[Row]:
    targets = Targets(rows)
    reference, both, e1, huge = (
        targets.row(name, "ours", TRAIN) for name in ("reference", "both", "e1", "huge")
    )
    if reference and both:
        ratio = both["ms"] / reference["ms"]
        targets.add("both directions / one, fwd+bwd", ratio, "<=", 1.3)
    if e1 and huge:
        targets.add("TFLOP/s of huge / of e1, fwd+bwd", huge["tflops"] / e1["tflops"], ">=", 0.9)
    if huge:
        targets.add("peak of huge, GiB", huge["peak_mib"] / 1024, "<", 2)
    return targets.listed


# ---- launch configurations ----

SWEEP_CASE = "e1"
# Module with a table CONFIGS -> the mode that is timed.
SWEEP = {"similarity._lse_forward": FORWARD, "similarity._lse_backward": TRAIN}
# Options that differ from the present entry. `--case both` also sweeps kernels that sum columns.
CANDIDATES: dict[str, list[dict[str, int | None]]] = {
    "narrow_forward": [
        {"num_stages": 2}, {"num_stages": 4}, {"maxnreg": 128}, {"BM": 64, "BN": 64},
        {"BM": 64, "BN": 256, "num_warps": 8}, {"BM": 128, "BN": 64},
        {"BM": 128, "BN": 128, "num_warps": 8},
        {"BM": 128, "BN": 128, "num_warps": 8, "maxnreg": 128},
    ],
    "wide_forward": [
        {"num_stages": 2}, {"num_stages": 4}, {"maxnreg": None},
        {"maxnreg": None, "num_stages": 4},
        {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3, "maxnreg": None},
        {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 4, "maxnreg": None},
        {"BM": 64, "BN": 256, "num_warps": 8, "num_stages": 3, "maxnreg": None},
        {"BM": 128, "BN": 256, "num_warps": 8, "num_stages": 3, "maxnreg": None},
        {"BK": 128, "num_stages": 2},
    ],
    "narrow_backward": [
        {"num_stages": 2}, {"num_stages": 4}, {"BM": 64, "BN": 32, "num_warps": 4},
        {"BM": 64, "BN": 64, "num_warps": 4}, {"BM": 64, "BN": 64, "num_warps": 8},
        {"BM": 128, "BN": 64},
    ],
    "wide_backward": [
        {"num_stages": 2}, {"maxnreg": None}, {"maxnreg": None, "num_stages": 4},
        {"BM": 64, "BN": 128, "num_warps": 4, "maxnreg": None},
    ],
    "wide_backward_more": [
        {"num_stages": 2}, {"num_stages": 4}, {"maxnreg": 128},
        {"BM": 64, "BN": 128, "num_warps": 4},
    ],
    "product": [
        {"num_stages": 4}, {"BM": 128}, {"BM": 128, "num_stages": 4}, {"BM": 128, "BN": 256},
        {"BM": 128, "BN": 256, "num_stages": 4}, {"BK": 32, "num_stages": 5},
        {"BK": 128, "num_stages": 2},
    ],
}  # fmt: skip
