"""Each task's loss against its formula, text by text in float64, and against published losses:
sentence-transformers' on the same bits, ML-Embed's and LaBSE's in plain torch.
"""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objective_truth import (
    ALONE,
    DIMS,
    HARD,
    OBJECTIVES,
    D,
    assert_close,
    batch_of,
    ragged,
    run_of,
    table,
    texts,
    truth,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import pairwise_cos_sim

from mlembed.config import Distill
from mlembed.training.objective.bank import Bank
from mlembed.training.objective.distill import Distiller
from mlembed.training.objective.loss import loss_table, weights
from mlembed.training.step import total_loss

# ---- against the formulas ----


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_its_formula(name, skip):
    task, options = OBJECTIVES[name]
    run, sample = run_of(**options), ragged(skip)
    got = table(sample, task, run)
    assert got[0].shape == (2, 3) and got[0].dtype == torch.float64
    assert_close(got, truth(sample, task, run.loss))
    narrow = sample._replace(vectors=sample.vectors.float())
    assert table(narrow, task, run)[0].dtype == torch.float32
    assert_close(
        [x.double() for x in table(narrow, task, run)], truth(narrow, task, run.loss), 2e-5
    )


def test_objectives_differ():
    """Otherwise the test above would not tell one objective from another."""
    sample = ragged()
    losses_of = {
        name: table(sample, task, run_of(**{**options, "temperature": 0.05}))[0]
        for name, (task, options) in OBJECTIVES.items()
        if name not in ("bitext-separate", "classification")
    }
    alike = {"symmetric-shared": "bitext-shared", "symmetric-own": "bitext-own"}
    for a in losses_of:
        for b in losses_of:
            same = torch.allclose(losses_of[a], losses_of[b], rtol=1e-6)
            assert same == (a == b or alike.get(a) == b or alike.get(b) == a), (a, b)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_few_texts(name):
    """One group; one group left at an exit; one text everywhere."""
    task, options = OBJECTIVES[name]
    run = run_of(**options)
    for sample in (texts([1]), texts([2, 0], skip=True)):
        got = table(sample, task, run)
        assert got[0].isfinite().all()
        # A single pair has no order, so sts has no gradient.
        if task != "sts":
            assert_close(got, truth(sample, task, run.loss))
    sample = texts([1, 1, 1])
    equal = sample._replace(vectors=sample.vectors[:, :1].repeat(1, 9, 1))
    loss_EM, gradient = table(equal, task, run)
    assert torch.allclose(loss_EM, truth(equal, task, run.loss)[0], rtol=1e-12)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("task", ["retrieval", "bitext", "clustering", "sts"])
def test_batch_overrides_the_temperature(task):
    sample = ragged()
    want = table(sample, task, run_of(temperature=0.2))[0]
    assert torch.equal(table(sample, task, run_of(), temperature=0.2)[0], want)
    assert not torch.allclose(table(sample, task, run_of())[0], want)


def test_tasks_need_negatives_or_scores():
    with pytest.raises(ValueError, match="s: expected hard negatives.*clustering.*without any"):
        table(texts([0, 0]), "clustering", run_of())
    with pytest.raises(ValueError, match="s: expected hard negatives.*classification"):
        table(texts([0]), "classification", run_of())
    batch = dataclasses.replace(batch_of(texts([0, 0]), "sts"), scores=None)
    with pytest.raises(ValueError, match="s: expected scores for task sts, got none"):
        loss_table(texts([0, 0]).vectors, batch, run_of(), ALONE)


def test_sts_counts_wrong_orders_but_not_ties():
    sample = texts([0] * 4)._replace(scores=np.array([0.0, 1.0, 1.0, 0.5]))
    angles = torch.tensor([0.3, 0.1, 0.8, 0.2], dtype=torch.float64)
    vectors = torch.zeros(2, 8, D, dtype=torch.float64)
    vectors[:, ::2, 0] = 1
    vectors[:, 1::2, 0], vectors[:, 1::2, 1] = angles.cos(), angles.sin()
    got, _ = table(sample._replace(vectors=vectors), "sts", run_of(temperature=0.1))
    c = angles.cos() / 0.1
    pairs = [(1, 0), (1, 3), (2, 0), (2, 3), (3, 0)]
    want = (1 + sum((c[j] - c[i]).exp() for i, j in pairs)).log()
    assert torch.allclose(got, want.expand(2, 3), rtol=1e-12)
    equal = sample._replace(vectors=vectors, scores=np.ones(4))
    assert torch.equal(table(equal, "sts", run_of())[0], torch.zeros(2, 3, dtype=torch.float64))


# ---- with a bank ----


@pytest.mark.parametrize("hard", HARD)
def test_bank_holds_candidates(hard):
    """Unless hard negatives are shared, only positives are candidates of later queries."""
    earlier, sample = texts([2, 1], seed=1), texts([1, 1, 0])
    run = run_of(directions="query_to_doc", hard_negatives=hard)
    bank = Bank(100, host=False)
    table(earlier, "retrieval", run, bank=bank)
    bank.commit()
    (shard,) = bank.shards("s")
    positives = [1, 5]
    stored = [1, 5, 2, 3, 6] if hard == "shared" else positives
    assert torch.equal(shard.vectors_EnD, earlier.vectors[:, stored])
    assert shard.ids_n.tolist() == earlier.ids[stored].tolist()
    bank.load({"s.0.0.vectors": shard.vectors_EnD, "s.0.0.ids": shard.ids_n + 10_000})
    got, _ = table(sample, "retrieval", run, bank=bank)
    n = sample.vectors.shape[1]
    logits = []
    for e in range(2):
        for d in DIMS:
            x = F.normalize(sample.vectors[e, :, :d], dim=-1)
            y = F.normalize(shard.vectors_EnD[e, :, :d], dim=-1)
            logits.append(torch.cat([x @ x.T, x @ y.T], 1) * 20)
    old = list(range(n, n + len(stored)))
    want = []
    for z in logits:
        total, extra = 0.0, []
        for q, p, *mine in sample.groups:
            others = [1, 4, 7] if hard != "shared" else [1, 2, 4, 5, 7]
            docs = others + old + (mine if hard == "own" else [])
            total = total + (z[q, docs].logsumexp(0) - z[q, p]) / 3
            if mine:
                extra.append(z[q, [p, *mine]].logsumexp(0) - z[q, p])
        want.append(total + (sum(extra) / len(extra) if hard == "separate" else 0))
    assert torch.allclose(got, torch.stack(want).view(2, 3), rtol=1e-12)


@pytest.mark.parametrize("task", ["sts", "clustering", "classification"])
def test_bank_is_for_retrieval_and_bitext(task):
    bank = Bank(100, host=False)
    table(ragged(), "bitext", run_of(), bank=bank)
    bank.commit()
    before = bank.state()
    want = table(ragged(), task, run_of())
    got = table(ragged(), task, run_of(), bank=bank)
    bank.commit()
    assert torch.equal(got[0], want[0])
    assert bank.state().keys() == before.keys()


# ---- sentence-transformers' losses ----


class Vectors(torch.nn.Module):
    """Model whose inputs are its embeddings."""

    def forward(self, features):
        return {"sentence_embedding": features["x"]}

    def get_embedding_dimension(self):
        return D


def theirs(sample, make, labels=None, prefix_weights=None):
    """Return the mean over exits of their MatryoshkaLoss over `make(model)`, and its gradient."""
    leaf = sample.vectors.clone().requires_grad_()
    total = 0
    for e in range(2):
        model = Vectors()
        loss = losses.MatryoshkaLoss(model, make(model), list(DIMS), prefix_weights)
        columns = [{"x": leaf[e, list(rows)]} for rows in zip(*sample.groups, strict=True)]
        total = total + loss(columns, labels) / 2
    total.backward()
    return total.detach(), leaf.grad


def ours(sample, task, run, teacher_ND=None):
    """Return the loss that train.py minimises, and its gradient."""
    batch = batch_of(sample, task)
    leaf = sample.vectors.clone().requires_grad_()
    exits_END = leaf[:, batch.rows[batch.place.argsort()]]
    terms = {"contrastive": loss_table(exits_END, batch, run, ALONE)}
    if teacher_ND is not None:
        batch = dataclasses.replace(batch, teacher_ND=teacher_ND[batch.rows])
        distiller = Distiller.of(run, teacher_ND.shape[1], None, ALONE)
        terms |= distiller.tables(exits_END, batch, run, ALONE)
    total = total_loss(run, weights(run).to(leaf), terms)
    total.backward()
    return total.detach(), leaf.grad


FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RANKING = {
    "query_to_doc": {},
    "symmetric": {"directions": FOUR[::2], "partition_mode": "per_direction"},
    "gte": {"directions": FOUR},
}
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@dtypes
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("directions", RANKING)
def test_multiple_negatives_ranking_loss(directions, negatives, dtype):
    """Hard negatives shared; prefixes that each weigh 1, as theirs do."""
    sample = texts([negatives] * 7, dtype=dtype)
    run = run_of(directions=directions, temperature=0.02, normalise_weights=False)

    def make(model):
        return losses.MultipleNegativesRankingLoss(model, scale=50, **RANKING[directions])

    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(ours(sample, "retrieval", run), theirs(sample, make), rtol)


@dtypes
@pytest.mark.skipif(
    "hardness_mode" not in inspect.signature(losses.MultipleNegativesRankingLoss).parameters,
    reason="sentence-transformers is too old to weigh negatives",
)
def test_hardness_of_multiple_negatives_ranking_loss(dtype):
    """Theirs weighs the negatives of queries alone, so the other direction is left out."""
    sample = texts([2] * 7, dtype=dtype)
    options = {"directions": "query_to_doc", "temperature": 0.05, "normalise_weights": False}

    def make(model):
        return losses.MultipleNegativesRankingLoss(
            model, scale=20, hardness_mode="all_negatives", hardness_strength=9.0
        )

    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    got = ours(sample, "retrieval", run_of(**options, hardness=9.0))
    assert_close(got, theirs(sample, make), rtol)
    assert got[0] != ours(sample, "retrieval", run_of(**options))[0]


@dtypes
def test_cosent_loss(dtype):
    sample = texts([0] * 11, dtype=dtype)
    given = 1.0, 0.5, 0.25
    run = run_of(matryoshka_weights="custom", custom_matryoshka_weights=given)
    run = dataclasses.replace(run, loss=dataclasses.replace(run.loss, normalise_weights=False))

    def make(model):
        return losses.CoSENTLoss(model, scale=20, similarity_fct=pairwise_cos_sim)

    scores = torch.from_numpy(sample.scores).float()
    assert len(scores.unique()) < len(scores)
    want = theirs(sample, make, scores, list(given))
    assert_close(ours(sample, "sts", run), want, 1e-12 if dtype == torch.float64 else 1e-5)


# ---- in plain torch, in the published form ----

WEIGHTS_FP32 = 1e-7  # Losses are float64, but w_e w_m is rounded to fp32.


@pytest.mark.parametrize("task", ["retrieval", "clustering"])
@pytest.mark.parametrize("kd_weight", [0.0, 1.0, 0.7])
def test_ml_embed(task, kd_weight):
    """Compare with ( sum over exits of inbatch + hard + kd_weight kd ) / exits.

    inbatch, for retrieval alone, and hard are sums over prefixes of w CE; kd is of the full width.
    """
    sample = texts([3] * 5)
    run = run_of(
        directions="query_to_doc", hard_negatives="separate", matryoshka_weights="ml-embed",
        normalise_weights=False,
    )  # fmt: skip
    teacher_ND = None
    if kd_weight:
        distill = Distill(teacher="some", features=kd_weight, feature_form="ml-embed")
        run = dataclasses.replace(run, distill=distill)
        rng = torch.Generator().manual_seed(0)
        teacher_ND = torch.randn(25, D + 4, generator=rng, dtype=torch.float64)
    leaf = sample.vectors.clone().requires_grad_()
    rows = [list(column) for column in zip(*sample.groups, strict=True)]
    q, p, *n = (leaf[:, column] for column in rows)
    total = 0
    for e in range(2):
        for count, dim in enumerate(reversed(DIMS), 1):
            w = 1 / (count * (D / dim) ** 0.5)
            qs, ps = F.normalize(q[e, :, :dim], dim=-1), F.normalize(p[e, :, :dim], dim=-1)
            pool = torch.stack([p[e], *(x[e] for x in n)], dim=1)[..., :dim]
            logits = (qs[:, None] * F.normalize(pool, dim=-1)).sum(-1) / 0.05
            total = total + w * F.cross_entropy(logits, torch.zeros(5).long()) / 2
            if task == "retrieval":
                total = total + w * F.cross_entropy(qs @ ps.T / 0.05, torch.arange(5)) / 2
        if kd_weight:
            t = teacher_ND[:, :D]
            neg, t_neg = torch.cat([x[e] for x in n]), torch.cat([t[column] for column in rows[2:]])
            kd = F.mse_loss(q[e], t[rows[0]]) + F.mse_loss(p[e], t[rows[1]])
            total = total + kd_weight * (kd + F.mse_loss(neg, t_neg)) / 2
    total.backward()
    assert_close(ours(sample, task, run, teacher_ND), (total.detach(), leaf.grad), WEIGHTS_FP32)


def test_labse():
    """Compare with mean CE(scale (X Y^T - margin I)) plus that of the transpose."""
    sample = texts([0] * 6)
    run = run_of((D,), temperature=0.01, margin=0.3, normalise_weights=False)
    leaf = sample.vectors.clone().requires_grad_()
    total = 0
    for e in range(2):
        x, y = F.normalize(leaf[e, ::2], dim=-1), F.normalize(leaf[e, 1::2], dim=-1)
        left = 100 * (x @ y.T - 0.3 * torch.eye(6).double())
        right = 100 * (y @ x.T - 0.3 * torch.eye(6).double())
        label = torch.arange(6)
        total = total + (F.cross_entropy(left, label) + F.cross_entropy(right, label)) / 2
    total.backward()
    assert_close(ours(sample, "bitext", run), (total.detach(), leaf.grad))
