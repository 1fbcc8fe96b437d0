"""Weights of exits and prefixes, ranks of a step, and texts that leave before an exit."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from objective_truth import assert_close, ragged, run_of, table

from mlembed.config import Loss, Model, Run
from mlembed.training.objective.loss import ranks_of, sample_rank, weights

# ---- weights ----


@pytest.mark.parametrize("exits", ["uniform", "depth", "inverse", "log"])
@pytest.mark.parametrize("prefixes", ["uniform", "ml-embed"])
@pytest.mark.parametrize("dims", [(256,), (7, 100, 256)])
def test_weights_sum_to_one(exits, prefixes, dims):
    shape = Model(exits=(1, 3, 4), matryoshka_dims=dims)
    loss = Loss(exit_weights=exits, matryoshka_weights=prefixes)
    w_EM = weights(Run(model=shape, loss=loss))
    assert w_EM.shape == (3, len(dims)) and (w_EM > 0).all()
    assert abs(w_EM.double().sum().item() - 1) < 1e-6


# At exits 1, 2, 3 and 6.
BY_RULE = {
    "depth": [1, 2, 3, 6],
    "inverse": [1, 1 / 2, 1 / 3, 1],
    # 1 / (1 + ln 2), 1 / (1 + ln 3), 1 / (1 + ln 4)
    "log": [0.5906161, 0.4765053, 0.4190597, 1],
    "custom": [3, 0, 5, 2],
    "uniform": [0.25] * 4,
}


@pytest.mark.parametrize("rule", BY_RULE)
def test_exit_weights(rule):
    """uniform is a mean over exits even without normalisation."""
    shape = Model(num_hidden_layers=6, exits=(1, 2, 3, 6), matryoshka_dims=(256,))
    options = {"custom_exit_weights": (3.0, 0.0, 5.0, 2.0)} if rule == "custom" else {}
    for normalise, scale in ((False, 1), (True, sum(BY_RULE[rule]))):
        loss = Loss(exit_weights=rule, normalise_weights=normalise, **options)
        got = weights(Run(model=shape, loss=loss))[:, 0].tolist()
        assert got == pytest.approx([w / scale for w in BY_RULE[rule]], rel=1e-6)


# For ml-embed the paper's own numbers for a full width of 1024.
@pytest.mark.parametrize(
    "rule, raw",
    [("uniform", (1, 1, 1)), ("custom", (0.5, 0, 2)), ("ml-embed", (0.0179, 0.1667, 1))],
)
def test_prefix_weights(rule, raw):
    dims = (8, 16, 32, 64, 128, 256, 512, 1024) if rule == "ml-embed" else (8, 16, 1024)
    options = {"custom_matryoshka_weights": (0.5, 0.0, 2.0)} if rule == "custom" else {}
    shape = Model(hidden_size=1024, exits=(4,), matryoshka_dims=dims)
    for normalise in (False, True):
        loss = Loss(matryoshka_weights=rule, normalise_weights=normalise, **options)
        got = weights(Run(model=shape, loss=loss))[0]
        total = got.sum().item()
        if rule == "ml-embed":
            assert total == pytest.approx(1.0 if normalise else 1.717, abs=1e-3)
            got = got[[1, 5, 7]]
        scale = got[2].item() / raw[2]
        assert got.tolist() == pytest.approx([w * scale for w in raw], abs=1e-4)
        assert normalise or scale == 1


# ---- texts that leave ----


@pytest.mark.parametrize("directions", ["query_to_doc", "symmetric", "gte"])
def test_texts_that_left_are_not_read(directions):
    run, sample = run_of(directions=directions), ragged(skip=True)
    want_EM, want = table(sample, "retrieval", run)
    left = [row for g, d in zip(sample.groups, sample.depths, strict=True) if d < 2 for row in g]
    vectors = sample.vectors.clone()
    vectors[1, left] = torch.nan
    got_EM, got = table(sample._replace(vectors=vectors), "retrieval", run)
    assert_close((got_EM, got.nan_to_num()), (want_EM, want))


# ---- ranks ----


@pytest.mark.parametrize(
    ("rule", "weights"), [("sampled", (1, 2, 4)), ("evenly", (1, 1, 1)), ("inversely", (4, 2, 1))]
)
def test_ranks_are_drawn_by_their_rule(rule, weights):
    ranks, n = (32, 64, 128), 4000
    run = Run(model=Model(ranks=ranks), loss=Loss(ranks=rule), seed=3)
    drawn = Counter(ranks_of(run, step)[0][0] for step in range(n))
    assert set(drawn) == set(ranks)
    for rank, weight in zip(ranks, weights, strict=True):
        p = weight / sum(weights)
        assert abs(drawn[rank] / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_ranks_are_a_function_of_seed_and_step():
    ranks = (1, 2, 3, 4)
    first = [sample_rank(ranks, 5, step) for step in range(50)]
    np.random.seed(1)
    torch.manual_seed(1)
    assert [sample_rank(ranks, 5, step) for step in reversed(range(50))][::-1] == first
    assert [sample_rank(ranks, 6, step) for step in range(50)] != first
    assert all(type(rank) is int for rank in first)
    assert sample_rank((), 0, 0) is None and sample_rank((7,), 0, 0) == 7


def test_all_ranks_have_their_probability_as_weight():
    shape = Model(ranks=(4, 8, 16))
    every = ranks_of(Run(model=shape, loss=Loss(ranks="all")), 3)
    assert every == [(4, 4 / 28), (8, 8 / 28), (16, 16 / 28)]
    assert ranks_of(Run(model=shape), 3) == [(sample_rank((4, 8, 16), 0, 3), 1.0)]
    # A plain table has no ranks.
    assert ranks_of(Run(loss=Loss(ranks="all")), 0) == [(None, 1.0)]
