"""Parts of one optimiser step: the weighted loss, the update of the weights, the result."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import config
from . import guards
from .objective.distill import rows_of
from .objective.loss import ranks_of, weights
from .optim import learning_rate, prepare
from .setup import Job, batches_of

Terms = dict[str, Tensor]  # loss_EM by term: contrastive, features, logits, between_exits


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
    norm: gradient norm. tokens: tokens of all processes.
    """

    losses: Terms
    queries: list[int]
    norm: Tensor
    tokens: int


def total_loss(run: config.Run, weight_EM: Tensor, terms: Terms) -> Tensor:
    """Return the weighted sum of all loss terms.

    If a term exists only at some exits, their weights are scaled up to the sum of all weights.
    """
    total = weight_EM.new_zeros(())
    for name, loss_EM in terms.items():
        rows_E = rows_of(run.distill, name, len(weight_EM)).to(weight_EM)
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
    found = guards.found_inf(numbers, job.where)
    prepare(job.optimizer, norm, run.optim.max_grad_norm, found)
    job.optimizer.step()
    if distiller is not None:
        distiller.step(learning_rate(step, run), run.optim.max_grad_norm, found)
    engine.zero()
    return norm, guards.Check(step, found, losses, norms)


def source_of(job: Job, step: int) -> str:
    """Return the names of the sources that a step's texts come from."""
    numbers = (job.batches.order[number] for number in batches_of(job.run, step))
    return ", ".join(sorted({job.batches.names[number] for number in numbers}))


def record(job: Job, step: int, result: Step, rate: float, stage_ms: dict[str, float]) -> float:
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
        "tokens_per_second": rate,
        "stage_ms": stage_ms,
        # Only queries that run as deep as an exit are candidates of each other there.
        "queries": {f"exit_{e}": n for e, n in zip(exits, result.queries, strict=True)},
        "losses": contrastive,
        **({"distilled": by_term} if by_term else {}),
    }
    job.out.metrics(step, "train", values)
    return loss
