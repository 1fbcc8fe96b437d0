"""Every objective in float64, text by text, from the formulas alone; and batches to try them on."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from factories import tiny_run, tiny_tokenizer

from mlembed.config import Depth, Loss
from mlembed.data.collate import collate
from mlembed.data.tables import Table, text_id
from mlembed.modeling.transformer import Transformer
from mlembed.runtime.distributed import World
from mlembed.training.objective.loss import loss_table

ALONE = World(0, 1, torch.device("cpu"))
EXITS, DIMS, D = (1, 2), (3, 8, 13), 13  # Tiles are never as wide as a prime.

# ---- a run, its text and its model ----


@cache
def tables_and_tokenizer():
    """Return pairs with 0 to 3 hard negatives, n-way ids, and a tokenizer of both."""
    texts, starts, ids = [], [0], []
    for i in range(24):
        texts += [f"query {i}", f"positive {i % 20}", *(f"negative {i} {j}" for j in range(i % 4))]
        starts.append(len(texts))
        ids += [text_id(f"positive {i % 20}")] * 2
        ids += [text_id(text) for text in texts[len(ids) :]]
    pairs = Table("pairs", False, texts, np.array(ids), np.array(starts))
    texts = [f"id {i} in {j}" for i in range(20) for j in range(3)]
    groups = np.array([text_id("nway", text.split()[1]) for text in texts])
    nway = Table("nway", True, texts, groups, np.arange(0, 61, 3))
    return [pairs, nway], tiny_tokenizer([*pairs.texts, *nway.texts])


def training(dtype, symmetric, skip, **loss):
    """Return a run of four steps with every nesting, its tables, tokenizer and model.

    skip: some groups leave after the first layer, and texts are in more packs than two.
    """
    tables, tokens = tables_and_tokenizer()
    directions = "symmetric" if symmetric else "query_to_doc"
    run = tiny_run(
        {"vocab_size": tokens.get_vocab_size(), "ranks": (4, 8)},
        loss=Loss(num_negatives=2, directions=directions, **loss),
        depth=Depth(exits=(1, 2), shares=(0.3, 0.7)) if skip else Depth(),
        steps=4,
        batch_size=8,
        pack_tokens=20 if skip else 131_072,
    )
    torch.manual_seed(0)
    return run, tables, tokens, Transformer(run.model).to(dtype)


# ---- batches of vectors ----


class Texts(NamedTuple):
    """Raw vectors [E, rows, D], groups of rows, ids by row, the depth of each group, scores."""

    vectors: torch.Tensor
    groups: list[list[int]]
    ids: np.ndarray
    depths: np.ndarray
    scores: np.ndarray


def texts(negatives, skip=False, same=(), dtype=torch.float64, seed=0):
    """Return groups of `negatives` hard negatives each. same: pairs of rows with equal ids."""
    ends = np.cumsum([2 + n for n in negatives]).tolist()
    groups = [list(range(end - 2 - n, end)) for end, n in zip(ends, negatives, strict=True)]
    rows = ends[-1]
    ids = np.arange(100, 100 + rows)
    for group in groups:
        ids[group[1]] = ids[group[0]]
    for one, other in same:
        ids[one] = ids[other]
    rng = np.random.default_rng(seed)
    depths = np.where(np.arange(len(groups)) % 3 == 1, 1, 2) if skip else np.full(len(groups), 2)
    vectors = torch.from_numpy(rng.normal(size=(2, rows, D)) * rng.uniform(0.1, 9, (2, rows, 1)))
    # Some scores are equal.
    scores = rng.integers(0, 5, len(groups)) / 4
    return Texts(vectors.to(dtype), groups, ids, depths, scores)


# Groups 0 and 2 share an id; a hard negative of group 3 has its query's own, one of group 6 has
# that of group 1; one query's only hard negative is false.
RAGGED = (3, 0, 1, 2, 0, 1, 4, 1)
SAME = ((7, 0), (8, 0), (12, 10), (21, 5), (18, 16))


def ragged(skip=False):
    return texts(RAGGED, skip, SAME)


def batch_of(sample, task, where=ALONE, **options):
    return collate(
        sample.groups, lambda row: np.full(1 + row % 3, row), sample.ids, sample.depths, None,
        rank=where.rank, size=where.size, max_tokens=11, source="s", task=task,
        scores=sample.scores if task == "sts" else None, **options,
    )  # fmt: skip


def run_of(dims=DIMS, exits=EXITS, **loss):
    shape = {"hidden_size": D, "exits": exits, "matryoshka_dims": dims}
    return tiny_run(shape, loss=Loss(**loss))


def weighted_sum(loss_EM):
    """Return the sum with different weights, so that exits and prefixes cannot be confused."""
    return (loss_EM * torch.arange(1.0, 1 + loss_EM.numel()).view_as(loss_EM).to(loss_EM)).sum()


def table(sample, task, run, where=ALONE, bank=None, **options):
    """Return loss_EM and its gradient by row, 0 for rows of other processes."""
    batch = batch_of(sample, task, where, **options)
    leaf = sample.vectors.clone().requires_grad_()
    of_packs = batch.rows[batch.place.argsort()]
    loss_EM = loss_table(leaf[:, of_packs], batch, run, where, bank=bank)
    weighted_sum(loss_EM).backward()
    return loss_EM.detach(), leaf.grad


# ---- the formulas, text by text ----


def truth(sample, task, loss):
    """Return what `table` does from sums of exponentials in float64, one logarithm at the end."""
    leaf = sample.vectors.clone().double().requires_grad_()
    rows = [
        [one_loss(sample, leaf[e, :, :d], task, loss, exit) for d in DIMS]
        for e, exit in enumerate(EXITS)
    ]
    loss_EM = torch.stack([torch.stack(row) for row in rows])
    weighted_sum(loss_EM).backward()
    return loss_EM.detach(), leaf.grad


def one_loss(sample, x, task, loss, exit):
    t, ids = loss.temperature, sample.ids
    present = [i for i in range(len(sample.groups)) if sample.depths[i] >= exit]
    groups = [sample.groups[i] for i in present]
    unit = x / (x * x).sum(1, keepdim=True).sqrt()
    cos = unit @ unit.T
    s = (cos / t + loss.hardness * cos.detach()).exp()
    zero = x.sum() * 0
    if task == "sts":
        z = {i: cos[sample.groups[i][0], sample.groups[i][1]] / t for i in present}
        pairs = [(i, j) for i in present for j in present if sample.scores[i] > sample.scores[j]]
        return (1 + zero + sum((z[j] - z[i]).exp() for i, j in pairs)).log()

    def over(a, others):
        """Sum exp(cos / t) of text a with the others of different ids."""
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
    "hardness-symmetric": ("retrieval", {"hardness": 3.0, "hard_negatives": "own"}),
    "hardness-separate": ("retrieval", {"hardness": 2.0, "hard_negatives": "separate"}),
    "hardness-gte": ("retrieval", {"hardness": 3.0, "directions": "gte"}),
    "hardness-bitext": ("bitext", {"hardness": 2.0, "margin": 0.3, "hard_negatives": "shared"}),
    "hardness-clustering": ("clustering", {"hardness": 4.0}),
    "clustering": ("clustering", {"directions": "gte"}),
    "classification": ("classification", {"temperature": 0.2, "margin": 0.3}),
    "sts": ("sts", {"temperature": 0.1}),
}


def assert_close(got, want, rtol=1e-12):
    assert torch.allclose(got[0], want[0], rtol=rtol, atol=0), (got[0], want[0])
    assert want[1].norm() > 0 and (got[1] - want[1]).norm() / want[1].norm() < rtol
