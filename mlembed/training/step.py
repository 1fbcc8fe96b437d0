"""Parts of one optimiser step: the weighted loss, the update of the weights, result and speed."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..modeling import flops
from ..modeling.flops import Flops
from ..runtime import log, process, transfer
from . import average, guards
from .objective.distill import rows_of
from .objective.loss import ranks_of, weights
from .optim import learning_rate, prepare
from .setup import Job, batches_of

Terms = dict[str, Tensor]  # loss_EM by term: contrastive, scores, features, logits, ..


@dataclass(frozen=True)
class LossSpec:
    """One forward and backward of a micro-batch: its rank and the weights of its loss.

    rank: vocabulary rank, None for the whole table. weight_EM: weights of the exits and prefixes.
    share: this pass's part of the step's loss. seed: numbers that dropout is drawn from, to which
    each process and pack adds its own.
    """

    rank: int | None
    weight_EM: Tensor
    share: float
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """Result of one optimiser step.

    losses: loss_EM of each term, of this process. queries: queries of all processes at each exit.
    norm: gradient norm. tokens, flops: of this process. check: whether its numbers are finite.
    """

    losses: Terms
    queries: list[int]
    norm: Tensor
    tokens: int
    flops: Flops
    check: guards.Check


class Rates:
    """Speed of the steps since `begin`: tokens of all processes, operations of a device.

    tokens_per_second: texts of a step count once, even if the step encodes them at several ranks.
    tflops: TFLOP/s of a device, forward, backward, and recomputed ones apart. mfu: the share of the
    device's peak that forward and backward are, where bf16 multiplies and the peak is known.
    """

    def __init__(self, job: Job) -> None:
        self.where = job.where
        self.peak = flops.peak(log.device_name(job.where.device)) if job.bf16 else None
        self.begin()

    def begin(self) -> None:
        """Start counting now."""
        self.tokens, self.flops, self.since = 0, Flops(), time.perf_counter()

    def add(self, step: Step) -> None:
        """Count a step."""
        self.tokens, self.flops = self.tokens + step.tokens, self.flops + step.flops

    def take(self) -> dict[str, Any]:
        """Return the speed since `begin`, and begin again; all processes call it."""
        seconds, where = time.perf_counter() - self.since, self.where
        counts = [float(self.tokens), *vars(self.flops).values()]
        if where.size > 1:
            total = torch.tensor(counts, dtype=torch.float64, device=where.device)
            torch.distributed.all_reduce(total)
            counts = total.tolist()
        tokens, *work = counts
        tflops = [count / seconds / where.size / 1e12 for count in work]
        self.begin()
        mfu = {"mfu": (tflops[0] + tflops[1]) / self.peak} if self.peak else {}
        names = ("forward", "backward", "recomputed")
        speed = {"tokens_per_second": tokens / seconds}
        return speed | {"tflops": dict(zip(names, tflops, strict=True)), **mfu}


def speed_line(speed: dict[str, Any]) -> str:
    """Return what `Rates.take` returned, for the progress bar."""
    tflops = speed["tflops"]["forward"] + speed["tflops"]["backward"]
    mfu = f" ({speed['mfu']:.0%} MFU)" if "mfu" in speed else ""
    return f"{speed['tokens_per_second'] / 1e3:.1f}k tokens/s, {tflops:.3g} TFLOP/s{mfu}"


def total_loss(run: config.Run, weight_EM: Tensor, terms: Terms) -> Tensor:
    """Return the weighted sum of all loss terms.

    If a term exists only at some exits, their weights are scaled up to the sum of all weights.
    """
    total = weight_EM.new_zeros(())
    for name, loss_EM in terms.items():
        rows_E = transfer.moved(rows_of(run.distill, name, len(weight_EM)), weight_EM.device)
        term_EM = weight_EM * rows_E[:, None]
        term_EM = term_EM * (weight_EM.sum() / term_EM.sum().clamp(min=1e-30))
        total = total + getattr(run.distill, name) * (term_EM * loss_EM).sum()
    return total


def update(job: Job, step: int, losses: Terms) -> tuple[Tensor, guards.Check]:
    """Clip the gradients and step the optimisers, or do neither if a number is not finite.

    The device decides that, and the host waits for nothing.

    Returns:
        The gradient norm before clipping, and the check of the step's numbers.
    """
    run, engine, distiller = job.run, job.engine, job.distiller
    norms = engine.norms()
    norm = engine.norm(norms)
    numbers = [norm, *losses.values()]
    if distiller is not None:
        numbers += distiller.gradients()
    answers = guards.agree(numbers, process.stopping(), job.where)
    found = answers[0]
    prepare(job.optimizer, norm, run.optim.max_grad_norm, found)
    job.optimizer.step()
    if run.optim.ema:
        average.update(job.optimizer, run.optim.ema, step, found)
    if distiller is not None:
        distiller.step(learning_rate(step, run), run.optim.max_grad_norm, found)
    engine.zero()
    return norm, guards.Check(step, answers, losses, norms)


def source_of(job: Job, step: int) -> str:
    """Return the names of the sources that a step's texts come from."""
    numbers = (job.batches.order[number] for number in batches_of(job.run, step))
    return ", ".join(sorted({job.batches.names[number] for number in numbers}))


def record(
    job: Job, step: int, result: Step, speed: dict[str, Any], stage_ms: dict[str, float]
) -> float:
    """Log the losses of a step, averaged over processes, and return the weighted loss."""
    losses, run = result.losses, job.run
    if job.where.size > 1:
        stacked = torch.stack(list(losses.values()))
        torch.distributed.all_reduce(stacked)
        losses = dict(zip(losses, stacked / job.where.size, strict=True))
    weight_EM = weights(run).to(job.where.device)
    loss, gradient = total_loss(run, weight_EM, losses).item(), result.norm.item()
    exits, dims = run.model.exits, run.model.matryoshka_dims
    by_term = {
        name: {
            f"exit_{exit}": {f"dim_{dim}": x for dim, x in zip(dims, row, strict=True)}
            for exit, row in zip(exits, loss_EM.tolist(), strict=True)
        }
        for name, loss_EM in losses.items()
    }
    contrastive = by_term.pop("contrastive", {})
    values = {
        "loss": loss,
        "grad_norm": gradient,
        "lr": learning_rate(step - 1, run),
        "rank": ranks_of(run, step - 1)[-1][0],
        "source": source_of(job, step - 1),
        **speed,
        "stage_ms": stage_ms,
        # Only queries that run as deep as an exit are candidates of each other there.
        "queries": {f"exit_{e}": n for e, n in zip(exits, result.queries, strict=True)},
        "losses": contrastive,
        **({"distilled": by_term} if by_term else {}),
    }
    job.out.metrics(step, "train", values)
    return loss
