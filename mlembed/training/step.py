"""One optimiser step: its terms, its result, and the update of the weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import config
from ..runtime.distributed import any_process
from . import guards
from .engine import first_bad as first_bad_gradient
from .objective.distill import rows_of
from .optim import learning_rate
from .setup import Job, batches_of

Terms = dict[str, Tensor]  # loss_EM by name: contrastive, and what is distilled


@dataclass(frozen=True)
class Step:
    """What a step gave: the exits that had a loss, by term loss_EM of this process at them and what
    each entry weighs, the queries of all processes at each, gradient norm, tokens of all processes,
    and the first tensor that was not finite, if any; then the step was left out."""

    exits: tuple[int, ...]
    losses: Terms
    weight_EM: Tensor
    queries: list[int]
    norm: Tensor
    tokens: int
    bad: str | None


def update(job: Job, step: int, losses: Terms, exits: tuple[int, ...]) -> tuple[Tensor, str | None]:
    """Clip and step, unless something is not finite; -> gradient norm, and what that was."""
    run, where, engine = job.run, job.where, job.engine
    norm = engine.norm()
    finite = bool(norm.isfinite() & torch.stack(list(losses.values())).isfinite().all())
    finite = finite and (job.distiller is None or job.distiller.finite())
    bad = None
    if any_process(not finite, where):
        bad = first_bad(job, losses, exits)
    else:
        engine.clip(norm, run.optim.max_grad_norm)
        job.optimizer.step()
    if job.distiller is not None:
        if bad is None:
            job.distiller.step(learning_rate(step, run), run.optim.max_grad_norm)
        else:
            job.distiller.discard()
    engine.zero()
    return norm, bad


def source_of(job: Job, step: int) -> str:
    """Where a step's texts are from."""
    numbers = (job.batches.order[number] for number in batches_of(job.run, step))
    return ", ".join(sorted({job.batches.names[number] for number in numbers}))


@dataclass(frozen=True)
class Pass:
    """What a pass of a step is about: exits with a loss, vocabulary rank, weights of the loss."""

    step: int
    exits: tuple[int, ...]
    rank: int | None
    weight_EM: Tensor
    share: float


def weighted(run: config.Run, weight_EM: Tensor, terms: Terms) -> Tensor:
    """The loss: terms by their weights, entries by theirs, which a term that only some exits have
    shares out among these."""
    total = weight_EM.new_zeros(())
    for name, loss_EM in terms.items():
        here_EM = weight_EM * rows_of(run.distill, name, len(weight_EM)).to(weight_EM)[:, None]
        here_EM = here_EM * (weight_EM.sum() / here_EM.sum().clamp(min=1e-30))
        total = total + getattr(run.distill, name) * (here_EM * loss_EM).sum()
    return total


def first_bad(job: Job, losses: Terms, exits: tuple[int, ...]) -> str:
    """What was not finite, in the order in which it was computed: weights, losses, gradients. All
    processes call it, and agree on whether it is weights; of these and of losses each sees its own.
    """
    gradient = first_bad_gradient(job.model)
    weight = guards.bad_weight(job.model)
    if any_process(weight is not None, job.where):
        return weight or "weight that another process holds"
    dims = job.run.model.matryoshka_dims
    named = ((name, guards.bad_loss(table, exits, dims)) for name, table in losses.items())
    loss = next((f"{bad} ({name})" for name, bad in named if bad), None)
    return loss or f"gradient of {gradient or 'nothing by itself, but their norm'}"
