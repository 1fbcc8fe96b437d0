"""Every objective in float64, text by text, from the formulas alone; and batches to try them on."""

from typing import NamedTuple

import numpy as np
import torch

from mlembed.config import Loss, Model, Run
from mlembed.data.collate import collate
from mlembed.runtime.distributed import World
from mlembed.training.objective.loss import loss_table

ALONE = World(0, 1, torch.device("cpu"))
EXITS, DIMS, D = (1, 2), (3, 8, 13), 13  # the width is a prime, as no tile is

# ---- batches of vectors ----


class Texts(NamedTuple):
    """Raw vectors [E, rows, D], groups of rows, ids by row, the depth of each group, scores."""

    vectors: torch.Tensor
    groups: list[list[int]]
    ids: np.ndarray
    depths: np.ndarray
    scores: np.ndarray


def texts(negatives, skip=False, same=(), dtype=torch.float64, seed=0):
    """same: pairs (row, other row), whose id the first has as well."""
    groups, row = [], 0
    for n in negatives:
        groups.append(list(range(row, row + 2 + n)))
        row += 2 + n
    ids = np.arange(100, 100 + row)
    for group in groups:
        ids[group[1]] = ids[group[0]]
    for one, other in same:
        ids[one] = ids[other]
    rng = np.random.default_rng(seed)
    depths = np.where(np.arange(len(groups)) % 3 == 1, 1, 2) if skip else np.full(len(groups), 2)
    vectors = torch.from_numpy(rng.normal(size=(2, row, D)) * rng.uniform(0.1, 9, (2, row, 1)))
    scores = rng.integers(0, 5, len(groups)) / 4  # with ties
    return Texts(vectors.to(dtype), groups, ids, depths, scores)


# Groups 0 and 2 share an id; a hard negative of group 3 has its query's own, one of group 6 has
# that of group 1; one query's only hard negative is false.
RAGGED = (3, 0, 1, 2, 0, 1, 4, 1)
SAME = ((7, 0), (8, 0), (12, 10), (21, 5), (18, 16))


def ragged(skip=False):
    return texts(RAGGED, skip, SAME)


def batch_of(told, task, where=ALONE, **options):
    return collate(
        told.groups, lambda row: np.full(1 + row % 3, row), told.ids, told.depths, None,
        rank=where.rank, size=where.size, max_tokens=11, source="s", task=task,
        scores=told.scores if task == "sts" else None, **options,
    )  # fmt: skip


def run_of(dims=DIMS, exits=EXITS, **loss):
    shape = Model(hidden_size=D, num_hidden_layers=2, exits=exits, matryoshka_dims=dims)
    return Run(model=shape, loss=Loss(**loss))


def table(told, task, run, where=ALONE, bank=None, **options):
    """-> (loss_EM, its gradient by row of the table, 0 for those of other processes)."""
    batch = batch_of(told, task, where, **options)
    leaf = told.vectors.clone().requires_grad_()
    of_packs = batch.rows[batch.place.argsort()]
    loss_EM = loss_table(leaf[:, of_packs], batch, run, where, bank=bank)
    cotangent = torch.arange(1.0, 1 + loss_EM.numel()).view_as(loss_EM).to(loss_EM)
    (loss_EM * cotangent).sum().backward()
    return loss_EM.detach(), leaf.grad


# ---- the formulas, text by text ----


def truth(told, task, loss):
    """As `table`, on one process: sums of exponentials in float64, no logarithm before the last."""
    leaf = told.vectors.clone().double().requires_grad_()
    rows = [
        [one_loss(told, leaf[e, :, :d], task, loss, exit) for d in DIMS]
        for e, exit in enumerate(EXITS)
    ]
    loss_EM = torch.stack([torch.stack(row) for row in rows])
    cotangent = torch.arange(1.0, 1 + loss_EM.numel(), dtype=torch.float64).view_as(loss_EM)
    (loss_EM * cotangent).sum().backward()
    return loss_EM.detach(), leaf.grad


def one_loss(told, x, task, loss, exit):
    t, ids = loss.temperature, told.ids
    here = [i for i in range(len(told.groups)) if told.depths[i] >= exit]
    groups = [told.groups[i] for i in here]
    unit = x / (x * x).sum(1, keepdim=True).sqrt()
    cos = unit @ unit.T
    s = (cos / t).exp()
    zero = x.sum() * 0
    if task == "sts":
        z = {i: cos[told.groups[i][0], told.groups[i][1]] / t for i in here}
        pairs = [(i, j) for i in here for j in here if told.scores[i] > told.scores[j]]
        return (1 + zero + sum((z[j] - z[i]).exp() for i, j in pairs)).log()

    def over(a, others):
        """Sum of exp(cos / t) of text a with others, less those of its id."""
        return zero + sum(s[a, b] for b in others if ids[b] != ids[a])

    positives = [p for _, p, *_ in groups]
    terms = {"forward": [], "backward": [], "joint": [], "hard": []}
    margin = loss.margin if task == "bitext" else 0.0
    hard = "own" if task == "bitext" and loss.hard_negatives == "separate" else loss.hard_negatives
    for q, p, *mine in groups:
        plus = ((cos[q, p] - margin) / t).exp()
        if task not in ("clustering", "classification"):
            mine = [n for n in mine if ids[n] != ids[q]]
        if hard == "shared":
            docs = [b for group in groups for b in group[1:] if b != p]
            not_mine = [b for group in groups for b in group[1:] if group[0] != q]
        else:
            docs = [b for b in positives if b != p]
            not_mine = docs
        forward = over(q, docs) + (over(q, mine) if hard == "own" else 0)
        backward = zero + sum(s[p, o] for o, *_ in groups if ids[o] != ids[p])
        queries = over(q, [o for o, *_ in groups if o != q])
        k = 2 if loss.count_positive_twice else 1
        joint = forward + backward + queries + over(p, not_mine)
        terms["forward"].append(((plus + forward) / plus).log())
        terms["backward"].append(((plus + backward) / plus).log())
        terms["joint"].append(((k * plus + joint) / plus).log())
        if mine:
            terms["hard"].append(((plus + s[q, mine].sum()) / plus).log())
    mean = {name: sum(x) / max(1, len(x)) + zero for name, x in terms.items()}
    if task in ("clustering", "classification"):
        return mean["hard"]
    if task == "bitext":
        total = mean["forward"] + mean["backward"]
        return total / 2 if loss.normalise_weights else total
    total = {
        "query_to_doc": mean["forward"],
        "symmetric": (mean["forward"] + mean["backward"]) / 2,
        "gte": mean["joint"],
    }[loss.directions]
    return total + mean["hard"] if hard == "separate" else total


HARD = ("shared", "own", "separate")
OBJECTIVES = {
    **{
        f"{directions}-{hard}": (
            "retrieval",
            {"directions": directions, "hard_negatives": hard, "margin": 0.3},  # of bitext alone
        )
        for directions in ("query_to_doc", "symmetric", "gte")
        for hard in HARD
    },
    "gte-once": ("retrieval", {"directions": "gte", "count_positive_twice": False}),
    **{
        f"bitext-{hard}": ("bitext", {"directions": directions, "hard_negatives": hard})
        for hard, directions in zip(HARD, ("gte", "query_to_doc", "symmetric"), strict=True)
    },
    "bitext-margin": ("bitext", {"margin": 0.3, "temperature": 0.1}),
    "bitext-sum": ("bitext", {"margin": 0.2, "normalise_weights": False, "hard_negatives": "own"}),
    "clustering": ("clustering", {"directions": "gte"}),
    "classification": ("classification", {"temperature": 0.2, "margin": 0.3}),
    "sts": ("sts", {"temperature": 0.1}),
}


def assert_close(got, want, rtol=1e-12):
    assert torch.allclose(got[0], want[0], rtol=rtol, atol=0), (got[0], want[0])
    assert want[1].norm() > 0 and (got[1] - want[1]).norm() / want[1].norm() < rtol
