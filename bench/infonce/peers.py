"""The same loss by other implementations.

Each builds a step for a case: (inputs, backward) -> the summed loss. Every exit is a leaf, as in a
model: slices of one stacked leaf add a zero-filled gradient of the whole stack per exit and prefix,
which `eager_stacked` measures. A step runs its backward per exit or per pair if that saves memory
at the same cost.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness import Leaves, Missing, Step, imported
from .cases import Case

PairLoss = Callable[[Tensor, Tensor], Tensor]  # normalised [B, d], [N, d] -> the mean loss
CHUNK = 16384  # rows of the logits that the GEMM floor holds at a time


def exit_loss(q: Tensor, c: Tensor, case: Case) -> Tensor:
    """Return the loss of an exit like ML-Embed's code: normalise, matmul, cross entropy."""
    labels = torch.arange(q.shape[0], device=q.device)
    total = q.new_zeros(())
    for d in case.dims:
        logits = F.normalize(q[:, :d], dim=-1) @ F.normalize(c[:, :d], dim=-1).T / case.temperature
        loss = F.cross_entropy(logits, labels)
        if case.both:
            loss = (loss + F.cross_entropy(logits.T, labels)) / 2
        total = total + loss
    return total


def at_once(case: Case, exits: Callable[[Leaves], list[Any]]) -> Step:
    """Return a step with one backward for all exits."""

    def step(inputs: Leaves, backward: bool) -> Tensor:
        loss = torch.stack([exit_loss(q, c, case) for q, c in exits(inputs)]).sum()
        if backward:
            loss.backward()
        return loss.detach()

    return step


def eager(case: Case, smoke: bool) -> Step:
    return at_once(case, lambda inputs: inputs.views)


def eager_stacked(case: Case, smoke: bool) -> Step:
    """Return a step on slices of one leaf [E, B, D], as it was measured on 2026-11-20."""
    return at_once(
        case, lambda inputs: [(x[e], y[e]) for x, y in [inputs.stacked] for e in range(case.E)]
    )


def by_exit(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return a step with one backward per exit."""

    def step(inputs: Leaves, backward: bool) -> Tensor:
        total = []
        for q, c in inputs.views:
            loss = loss_of(q, c)
            if backward:
                loss.backward()
            total.append(loss.detach())
        return torch.stack(total).sum()

    return step


def compiled(case: Case, smoke: bool) -> Step:
    """Compile one exit; toy runs use the eager backend, which needs no C++ compiler."""

    def one_exit(q: Tensor, c: Tensor) -> Tensor:
        return exit_loss(q, c, case)

    backend = "eager" if smoke else "inductor"
    return by_exit(torch.compile(one_exit, dynamic=False, backend=backend))


class Vectors(nn.Module):
    """A model for the losses of sentence-transformers that returns the vectors it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.get_embedding_dimension = lambda: width
        self.get_sentence_embedding_dimension = lambda: width

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}


def sentence_transformers(case: Case, smoke: bool) -> Step:
    """Return MatryoshkaLoss(MultipleNegativesRankingLoss) on vectors, exit after exit."""
    losses = imported("sentence_transformers.sentence_transformer.losses", "sentence-transformers")
    model = Vectors(case.D)
    ranking = losses.MultipleNegativesRankingLoss(
        model, scale=1 / case.temperature, directions=case.directions,
        partition_mode=case.options["partition_mode"],
    )  # fmt: skip
    matryoshka = losses.MatryoshkaLoss(model, ranking, list(case.dims))
    no_labels = torch.empty(0)
    return by_exit(lambda q, c: matryoshka([{"vectors": q}, {"vectors": c}], no_labels))


# ---- one fused cross entropy per exit and prefix ----


def by_pair(loss_of: PairLoss, dims: tuple[int, ...], temperature: float) -> Step:
    """Return a step with one backward per exit and prefix. Queries carry the temperature."""

    def step(inputs: Leaves, backward: bool) -> Tensor:
        total = []
        for q, c in inputs.views:
            for d in dims:
                x = F.normalize(q[:, :d], dim=-1) / temperature
                loss = loss_of(x, F.normalize(c[:, :d], dim=-1))
                if backward:
                    loss.backward()
                total.append(loss.detach().float())
        return torch.stack(total).sum()

    return step


def runnable(loss_of: PairLoss, case: Case, like: Tensor) -> tuple[int, ...]:
    """Return the prefixes that a library can run, tried on 256 rows.

    Raises RuntimeError if it runs none of them.
    """
    works = []
    for d in case.dims:
        inputs = Leaves(*(torch.randn_like(like[:256])[None] for _ in "qc"))
        try:
            by_pair(loss_of, (d,), case.temperature)(inputs, True)
            works.append(d)
        except Exception as error:
            warnings.warn(f"prefix {d}: {error}", stacklevel=2)
    if not works:
        raise RuntimeError("runs none of the prefixes")
    return tuple(works)


def cut_cross_entropy(case: Case, smoke: bool) -> PairLoss:
    """Use `cce_exact`: the default drops gradients below 2^-12, like those of a flat softmax."""
    linear_cross_entropy = imported("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def loss_of(q: Tensor, c: Tensor) -> Tensor:
        labels = torch.arange(q.shape[0], device=q.device)
        return linear_cross_entropy(q, c, labels, impl="cce_exact")

    return loss_of


def inf_cl(case: Case, smoke: bool) -> PairLoss:
    """Use heads of at most 256, powers of two from 16: prefix 8 cannot run."""
    cal_flash_loss = imported("inf_cl", "inf-cl").cal_flash_loss

    def loss_of(q: Tensor, c: Tensor) -> Tensor:
        head = min(q.shape[1], 256)
        if head < 16 or head & (head - 1) or q.shape[1] % head:
            raise ValueError(f"a width of {q.shape[1]} gives wrong row strides in inf_cl")
        return cal_flash_loss(q.contiguous(), c.contiguous(), head_dim=head).mean()

    return loss_of


def liger(case: Case, smoke: bool) -> PairLoss:
    fused = imported("liger_kernel.transformers", "liger-kernel").LigerFusedLinearCrossEntropyLoss()

    def loss_of(q: Tensor, c: Tensor) -> Tensor:
        return fused(c, q, torch.arange(q.shape[0], device=q.device))

    return loss_of


# ---- another loss of the same size ----

SIGMOID = "SigLIP's sigmoid loss of the same pairs, another loss: no speed-up is printed"


def siglip_kernel(case: Case, like: Tensor) -> Step:
    """Return the fused sigmoid loss on normalised vectors, with SigLIP's first scale and bias.

    Each pair of it is a binary classification, so no row has a softmax; products and bytes are
    those of the contrastive loss. Its gradients include scale and bias.
    """
    loss_of = imported("siglip_kernel", "siglip-kernel").fused_siglip_loss
    if like.device.type != "cuda":
        raise Missing("needs CUDA")
    log_scale, bias = (
        torch.tensor(x, device=like.device, requires_grad=True) for x in (math.log(10), -10.0)
    )

    def one_exit(q: Tensor, c: Tensor) -> Tensor:
        log_scale.grad = bias.grad = None
        loss: Tensor = loss_of(F.normalize(q, dim=-1), F.normalize(c, dim=-1), log_scale, bias)
        return loss

    return by_exit(one_exit)


# ---- the floor ----


def gemm(case: Case, smoke: bool) -> Step:
    """Form S = q c' by cuBLAS and, with backward, dq = S c and dc = S' q, once per exit."""

    def step(inputs: Leaves, backward: bool) -> None:
        with torch.no_grad():
            for q, c in inputs.views:
                dc = torch.zeros_like(c) if backward and len(q) > CHUNK else None
                for rows in q.split(CHUNK):
                    S = rows @ c.T
                    if backward:
                        _ = S @ c
                        _ = S.T @ rows if dc is None else dc.addmm_(S.T, rows)

    return step


STEPS: dict[str, Callable[[Case, bool], Step]] = {
    "eager": eager,
    "gemm": gemm,
    "compile": compiled,
    "sentence_transformers": sentence_transformers,
    "eager_stacked": eager_stacked,
}
PAIRS: dict[str, Callable[[Case, bool], PairLoss]] = {
    "cut_cross_entropy": cut_cross_entropy,
    "inf_cl": inf_cl,
    "liger": liger,
}


def build(name: str, case: Case, like: Tensor, smoke: bool) -> tuple[Step, str | None]:
    """Return the step of a peer, and what it leaves out, if anything.

    Raises Missing if its library is not installed.
    """
    if name in STEPS:
        return STEPS[name](case, smoke), None
    if name == "siglip_kernel":
        return siglip_kernel(case, like), SIGMOID
    loss_of = PAIRS[name](case, smoke)
    dims = runnable(loss_of, case, like)
    without = [str(d) for d in case.dims if d not in dims]
    note = f"without prefixes {', '.join(without)}, which it cannot run" if without else None
    return by_pair(loss_of, dims, case.temperature), note
