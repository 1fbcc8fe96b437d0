"""Depths by stratified token quotas, and LayerSkip's layer dropout."""

import numpy as np
import pytest

from mlembed import config
from mlembed.data.depth import draw_depths, draw_runs, skip_probabilities


def rng(seed=0):
    return np.random.default_rng(seed)


def tokens(n, seed=0):
    """Tokens of n groups: some short queries, some long documents with seven negatives."""
    return rng(seed).lognormal(4, 1, n).astype(np.int64) + 1


# ---- depths ----


def test_default_depth():
    assert draw_depths(tokens(5), config.Depth(), 28, rng()).tolist() == [28] * 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("shares", "want"), [((0.2, 0.8), [1, 2, 2, 2]), ((0.25, 0.25, 0.5), [1, 2, 4, 4])]
)
def test_few_equal_groups(shares, want, seed):
    """20 % of four equal groups are one group, not none."""
    cfg = config.Depth(exits=(1, 2, 4)[: len(shares)], shares=shares)
    assert sorted(draw_depths(np.full(4, 9), cfg, cfg.exits[-1], rng(seed))) == want


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shares", [(), (0.1, 0.2, 0.3, 0.4), (0.7, 0.1, 0.1, 0.1)])
@pytest.mark.parametrize("n", [16, 97, 1000])
def test_token_shares(n, shares, seed):
    """Each depth has its share of the tokens up to half a group at either end."""
    cfg = config.Depth(exits=(7, 14, 21, 28), shares=shares)
    t = tokens(n, seed)
    depths = draw_depths(t, cfg, 28, rng(seed))
    for exit, share in zip(cfg.exits, shares or [0.25] * 4, strict=True):
        assert abs(t[depths == exit].sum() - share * t.sum()) <= t.max()


def test_groups_are_drawn_evenly():
    cfg = config.Depth(exits=(1, 2))
    t = np.full(10, 7)
    seen = np.array([draw_depths(t, cfg, 2, rng(seed)) for seed in range(400)])
    assert ((seen == 2).sum(1) == 5).all()
    assert (abs((seen == 2).mean(0) - 0.5) < 4 * 0.5 / 400**0.5).all()


@pytest.mark.parametrize("least", [1, 3, 4])
def test_least_full_depth(least):
    """Processes need gradients of all layers, also where one group is nearly all of the batch."""
    cfg = config.Depth(exits=(1, 2, 4), shares=(0.9, 0.05, 0.05))
    for seed in range(50):
        depths = draw_depths(np.array([1000, 1, 1, 1]), cfg, 4, rng(seed), least)
        assert (depths == 4).sum() >= least


def test_depths_depend_on_the_generator_only():
    cfg = config.Depth(exits=(1, 2, 4))
    a, b, c = (draw_depths(tokens(50), cfg, 4, rng(seed)) for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any() and a.dtype == np.int64


# ---- layer dropout ----


def test_skip_probabilities():
    """LayerSkip: p_max at the last layer, zero at the first, exponential in between."""
    cfg = config.Depth(layer_dropout=0.2)
    p = skip_probabilities(cfg, 5)
    assert p == pytest.approx([0.2 * (2 ** (layer / 4) - 1) for layer in range(5)])
    assert p[0] == 0 and p[-1] == pytest.approx(0.2)
    assert skip_probabilities(cfg, 1).tolist() == [0]


def test_skip_frequency():
    cfg, n = config.Depth(layer_dropout=0.5), 20_000
    runs_LN = draw_runs(n, cfg, 4, rng())
    assert runs_LN.shape == (4, n) and runs_LN.dtype == bool
    for row, p in zip(runs_LN, skip_probabilities(cfg, 4), strict=True):
        assert abs((~row).mean() - p) <= 4 * (p * (1 - p) / n) ** 0.5
    assert draw_runs(n, config.Depth(), 4, rng()) is None
