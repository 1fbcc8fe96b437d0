"""Every distillation term in float64, text by text, from the formulas; and batches for them."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from factories import tiny_run
from objective_truth import ALONE, DIMS, D, weighted_sum
from torch import Tensor

from mlembed.config import Distill, Loss, Run
from mlembed.data.collate import Batch, collate
from mlembed.runtime.distributed import World
from mlembed.training.objective.distill import Distiller, principal

EXITS = 1, 2, 4
WIDE, NARROW = 17, 5  # widths of teachers
NEGATIVES = (3, 0, 1, 2, 0, 1, 4, 2)  # Processes get different numbers of documents.


class Sample(NamedTuple):
    """Raw vectors [E, rows, D], a teacher's [rows, Dt], groups of rows, the depth of each group."""

    vectors: Tensor
    teacher: Tensor
    groups: list[list[int]]
    depths: np.ndarray


def texts(negatives=NEGATIVES, skip=False, width=WIDE, dtype=torch.float64) -> Sample:
    """Return groups of `negatives`. skip: they leave after the first or second layer, or never."""
    ends = np.cumsum([2 + n for n in negatives]).tolist()
    groups = [list(range(end - 2 - n, end)) for end, n in zip(ends, negatives, strict=True)]
    depths = np.array([4, 1, 2] if skip else [4, 4, 4])[np.arange(len(groups)) % 3]
    rng, rows = np.random.default_rng(0), ends[-1]
    x = rng.normal(size=(3, rows, D)) * rng.uniform(0.1, 3, (3, rows, 1))
    t = rng.normal(size=(rows, width)) * rng.uniform(0.1, 3, (rows, 1)) * np.arange(1, width + 1)
    x, t = torch.from_numpy(x).to(dtype), torch.from_numpy(t / width).to(dtype)
    return Sample(x, t, groups, depths)


def batch_of(sample: Sample, where: World = ALONE, task="retrieval", **options) -> Batch:
    """Collate several packs, with the teacher's vectors in the order of the rows."""
    scores = np.linspace(0, 1, len(sample.groups)) if task == "sts" else None
    batch = collate(
        sample.groups, lambda row: np.full(1 + row % 3, row), np.arange(sample.vectors.shape[1]),
        sample.depths, None, rank=where.rank, size=where.size, max_tokens=11, source="s", task=task,
        scores=scores, **options,
    )  # fmt: skip
    return replace(batch, teacher_ND=sample.teacher[batch.rows])


def run_of(**distill) -> Run:
    shape = {"hidden_size": D, "num_hidden_layers": 4, "exits": EXITS, "matryoshka_dims": DIMS}
    teacher = "some" if distill.get("features") or distill.get("logits") else ""
    distill = Distill(**{"teacher": teacher, **distill})
    return tiny_run(shape, loss=Loss(temperature=0.1), distill=distill)


def distiller(run: Run, sample: Sample, where: World = ALONE) -> Distiller:
    made = Distiller.of(run, sample.teacher.shape[1], sample.teacher, where)
    assert made is not None
    return made


# ---- the formulas, text by text ----


def truth(sample: Sample, run: Run, term: str, temperature=0.1):
    """Return loss_EM, its gradient by row, and that of P (0 without a projection)."""
    cfg, x = run.distill, sample.vectors.clone().double().requires_grad_()
    t = sample.teacher.double()
    P = distiller(run, sample).projection
    P = None if P is None else P.detach().double().requires_grad_()
    if cfg.features and cfg.align == "pca":
        t = t @ principal(sample.teacher).double()
        t = torch.cat([t, torch.zeros(len(t), max(0, D - t.shape[1]))], 1)
    ml_embed = cfg.feature_form == "ml-embed"
    entries = []
    for (e, exit), d in itertools.product(enumerate(EXITS), DIMS):
        depth = 4 if term == "between_exits" else exit
        groups = [g for g, deep in zip(sample.groups, sample.depths, strict=True) if deep >= depth]
        last = exit == EXITS[-1]
        absent = last if term == "between_exits" else cfg.exits == "last" and not last
        if term == "features" and ml_embed:
            absent = d < D
        if absent or not groups:
            entries.append((x * 0).sum())
        elif term == "features":
            rows = [[row for group in groups for row in group]]
            if ml_embed:
                rows = [[g[0] for g in groups], [g[1] for g in groups]]
                rows.append([row for group in groups for row in group[2:]])
            means = [one_of_features(x[e, some, :d], t[some], P, cfg) for some in rows if some]
            entries.append(sum(means))
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
    weighted_sum(loss_EM).backward()
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
