"""What is distilled, in float64 and text by text, from the formulas; and what to try it on."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlembed.config import Distill, Loss, Model, Run
from mlembed.data.collate import Batch, collate
from mlembed.runtime.distributed import World
from mlembed.training.objective.distill import Distiller, principal

ALONE = World(0, 1, torch.device("cpu"))
EXITS, DIMS, D = (1, 2, 4), (3, 8, 13), 13  # widths are primes, as no tile is
WIDE, NARROW = 17, 5  # of teachers
NEGATIVES = (3, 0, 1, 2, 0, 1, 4, 2)  # of each group: processes have unlike numbers of documents


class Told(NamedTuple):
    """Raw vectors [E, rows, D], a teacher's [rows, Dt], groups of rows, the depth of each group."""

    vectors: Tensor
    teacher: Tensor
    groups: list[list[int]]
    depths: np.ndarray


def texts(negatives=NEGATIVES, skip=False, width=WIDE, dtype=torch.float64) -> Told:
    """skip: groups leave after the first layer, after the second, or never."""
    ends = np.cumsum([2 + n for n in negatives]).tolist()
    groups = [list(range(end - 2 - n, end)) for end, n in zip(ends, negatives, strict=True)]
    many = np.arange(len(groups))
    depths = np.array([4, 1, 2])[many % 3] if skip else np.full(len(groups), 4)
    rng = np.random.default_rng(0)
    rows = ends[-1]
    x = rng.normal(size=(3, rows, D)) * rng.uniform(0.1, 3, (3, rows, 1))
    t = rng.normal(size=(rows, width)) * rng.uniform(0.1, 3, (rows, 1)) * np.arange(1, width + 1)
    return Told(
        torch.from_numpy(x).to(dtype), torch.from_numpy(t / width).to(dtype), groups, depths
    )


def batch_of(told: Told, where: World = ALONE, task="retrieval", **options) -> Batch:
    """In several packs, with the teacher's vectors in the order of the rows."""
    scores = np.linspace(0, 1, len(told.groups)) if task == "sts" else None
    batch = collate(
        told.groups, lambda row: np.full(1 + row % 3, row), np.arange(told.vectors.shape[1]),
        told.depths, None, rank=where.rank, size=where.size, max_tokens=11, source="s", task=task,
        scores=scores, **options,
    )  # fmt: skip
    return replace(batch, teacher_ND=told.teacher[batch.rows])


def run_of(**distill) -> Run:
    shape = Model(hidden_size=D, num_hidden_layers=4, exits=EXITS, matryoshka_dims=DIMS)
    weighs = any(distill.get(term) for term in ("features", "logits"))
    distill = {"teacher": "some" if weighs else "", **distill}
    return Run(model=shape, loss=Loss(temperature=0.1), distill=Distill(**distill))


def distiller(run: Run, told: Told, where: World = ALONE) -> Distiller:
    made = Distiller.of(run, told.teacher.shape[1], told.teacher, where)
    assert made is not None
    return made


def backward(loss_EM: Tensor) -> None:
    """With unlike weights, so that no exit or prefix passes for another."""
    (loss_EM * torch.arange(1.0, 1 + loss_EM.numel()).view_as(loss_EM).to(loss_EM)).sum().backward()


# ---- the formulas, text by text ----


def truth(told: Told, run: Run, term: str, temperature=0.1):
    """-> loss_EM, its gradient by row, and that of P, if any (0 otherwise)."""
    cfg, x = run.distill, told.vectors.clone().double().requires_grad_()
    t = told.teacher.double()
    P = distiller(run, told).projection
    P = None if P is None else P.detach().double().requires_grad_()
    if cfg.features and cfg.align == "pca":
        t = t @ principal(told.teacher).double()
        t = torch.cat([t, torch.zeros(len(t), max(0, D - t.shape[1]))], 1)
    entries = []
    for (e, exit), d in itertools.product(enumerate(EXITS), DIMS):
        there = 4 if term == "between_exits" else exit
        groups = [g for g, deep in zip(told.groups, told.depths, strict=True) if deep >= there]
        last = exit == EXITS[-1]
        absent = last if term == "between_exits" else cfg.exits == "last" and not last
        if absent or not groups:
            entries.append((x * 0).sum())
        elif term == "features":
            rows = [row for group in groups for row in group]
            entries.append(one_of_features(x[e, rows, :d], t[rows], P, cfg))
        else:
            queries, docs = [g[0] for g in groups], [row for g in groups for row in g[1:]]
            target = x[-1].detach() if term == "between_exits" else t
            s, want = (
                torch.stack([torch.stack([cosine(v[i], v[j]) for j in docs]) for i in queries])
                for v in (x[e, :, :d], target)
            )
            if cfg.logit_form == "mse":
                entries.append((s - want).pow(2).mean())
            else:
                r, p = (s / temperature).exp(), (want / cfg.teacher_temperature).exp()
                r, p = r / r.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
                entries.append((p * (p / r).log()).sum() / len(queries))
    loss_EM = torch.stack(entries).view(len(EXITS), len(DIMS))
    backward(loss_EM)
    grad = torch.zeros((), dtype=torch.float64) if P is None or P.grad is None else P.grad
    return loss_EM.detach(), x.grad, grad


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / ((a @ a) * (b @ b)).sqrt()


def one_of_features(s: Tensor, t: Tensor, P: Tensor | None, cfg: Distill) -> Tensor:
    d = s.shape[1]
    if P is not None:
        s = torch.stack([sum(row[i] * P[:, i] for i in range(d)) for row in s])
    elif t.shape[1] < d:
        return (s * 0).sum()
    else:
        t = t[:, :d]
    if cfg.feature_form == "normalised":
        s, t = (
            torch.stack([row / (row @ row).sqrt().clamp(min=1e-12) for row in v]) for v in (s, t)
        )
    return (s - t).pow(2).mean()
