"""The stage before training: vocabulary and first layers learn a teacher's hidden states.

    loss  mean over texts, their tokens and ranks of |h - t|^2 / |t|^2

h and t are the states of one token after the first sixth of the layers, of the student at a rank
and of the teacher, which has the whole table. A step runs no other layers, so it costs a fraction
of a step of training, and what a low rank loses is lost before them (bench/LOG.md, elastic).

Letters: T tokens of a pack, D width.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import config
from ...data.batches import Batches
from ...data.collate import Batch
from ...modeling.transformer import Transformer
from ...runtime.distributed import World
from ..optim import learning_rate
from .hidden import shares
from .packed_teacher import PackedTeacher
from .teacher import Teacher

RATE = 1.5  # times optim.lr


def fit(
    model: Transformer,
    teacher: Teacher | None,
    run: config.Run,
    batches: Batches,
    where: World,
    half: bool,
    say: Callable[[str], None],
) -> None:
    """Train vocabulary and first layers for `distill.first_layers` of the steps, on the batches of
    the run's first steps; all processes call it with equal weights.

    The rate is RATE times the run's, whose schedule it takes from begin to end. Without ranks, or
    if all text is streamed, nothing is trained, and a line says so.

    Args:
        half: under bf16 autocast.
    """
    steps = round(run.distill.first_layers * run.steps)
    numbers = np.flatnonzero(batches.order < len(batches.tables))[:steps].tolist()
    if steps and not (numbers and model.cfg.ranks):
        why = "all text is streamed" if model.cfg.ranks else "the vocabulary has no ranks"
        say(f"fit    no first layers before training: {why}")
    if not numbers or not model.cfg.ranks:
        return
    assert teacher is not None and isinstance(teacher.model, PackedTeacher)
    model.embed_tokens.rows.requires_grad_(not run.optim.freeze_tokens)
    began, layers = time.perf_counter(), max(1, round(model.cfg.num_hidden_layers / 6))
    parameters = first_parameters(model, layers)
    optimizer = torch.optim.AdamW(parameters, betas=run.optim.betas, weight_decay=0.0, fused=True)
    errors = []
    for step, number in enumerate(numbers):
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_rate(step * run.steps // len(numbers), run)
        batch = batches[number].to(where.device)
        errors.append(add_gradients(model, teacher.model.trunk.model, batch, layers, where, half))
        average([errors[-1], *(p.grad for p in parameters if p.grad is not None)], where)
        nn.utils.clip_grad_norm_(parameters, run.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    few = max(1, len(errors) // 10)
    began_with, ended_with = (
        torch.stack(some).mean(0).tolist() for some in (errors[:few], errors[-few:])
    )
    moved = ", ".join(
        f"{before:.3f} to {after:.3f} at rank {rank}"
        for rank, before, after in zip(model.cfg.ranks, began_with, ended_with, strict=True)
    )
    seconds = time.perf_counter() - began
    say(f"fit    vocabulary and first {layers} layers, error {moved}; {seconds:.1f} s")


def first_parameters(model: Transformer, layers: int) -> list[nn.Parameter]:
    """Return the parameters up to the first layers that have a gradient."""
    names = ("embed_", *(f"layers.{i}." for i in range(layers)))
    named = model.named_parameters()
    return [p for name, p in named if p.requires_grad and name.startswith(names)]


def add_gradients(
    model: Transformer, teacher: Transformer, batch: Batch, layers: int, where: World, half: bool
) -> Tensor:
    """Add the gradients of a batch's loss, and return the errors fp32 [ranks].

    The mean over processes is the whole batch's.
    """
    texts = len(batch.query_ids) + len(batch.doc_ids)
    ranks = model.cfg.ranks
    errors = torch.zeros(len(ranks), device=where.device)
    for pack in batch.packs:
        share_T = shares(pack, texts, where)
        with torch.autocast(where.device.type, torch.bfloat16, enabled=half):
            with torch.no_grad():
                t_TD = teacher.states(pack, layers).float()
            for place, rank in enumerate(ranks):
                h_TD = model.states(pack, layers, rank).float()
                each_T = (h_TD - t_TD).square().sum(1) / t_TD.square().sum(1)
                error = (share_T * each_T).sum()
                (error / len(ranks)).backward()
                errors[place] += error.detach()
    return errors


def average(tensors: Sequence[Tensor], where: World) -> None:
    """Average tensors over processes, in place."""
    if where.size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= where.size
