"""Depths by stratified token quotas, LayerSkip's dropout and its curricula."""

import dataclasses

import numpy as np
import pytest

from mlembed import config
from mlembed.data.depth import drawn, enabled, runs, skip_probabilities


def rng(seed=0):
    return np.random.default_rng(seed)


def tokens(n, seed=0):
    """Groups as they come: some queries, some of long documents with seven negatives."""
    return rng(seed).lognormal(4, 1, n).astype(np.int64) + 1


# ---- depths ----


def test_everything_runs_to_the_end_by_default():
    assert drawn(tokens(5), config.Depth(), 28, rng()).tolist() == [28] * 5


@pytest.mark.parametrize("seed", range(5))
def test_a_few_groups_come_as_near_as_they_can(seed):
    """Of four alike 20 % are one, not none; of three depths with a quarter, a quarter, a half..."""
    alike = np.full(4, 9)
    few = config.Depth(exits=(1, 2), shares=(0.2, 0.8))
    assert sorted(drawn(alike, few, 2, rng(seed))) == [1, 2, 2, 2]
    more = config.Depth(exits=(1, 2, 4), shares=(0.25, 0.25, 0.5))
    assert sorted(drawn(alike, more, 4, rng(seed))) == [1, 2, 4, 4]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shares", [(), (0.1, 0.2, 0.3, 0.4), (0.7, 0.1, 0.1, 0.1)])
@pytest.mark.parametrize("n", [16, 97, 1000])
def test_each_depth_has_its_share_of_the_tokens(n, shares, seed):
    cfg = config.Depth(exits=(7, 14, 21, 28), shares=shares)
    t = tokens(n, seed)
    depths = drawn(t, cfg, 28, rng(seed))
    for exit, share in zip(cfg.exits, shares or [0.25] * 4, strict=True):
        off = t[depths == exit].sum() - share * t.sum()
        assert abs(off) <= t.max()  # half a group at either end
    # Independent draws would be off by far more than a group.
    if n == 1000:
        independent = rng(seed).choice(cfg.exits, size=n, p=shares or [0.25] * 4)
        worst = max(
            abs(t[independent == e].sum() - s * t.sum())
            for e, s in zip(cfg.exits, shares or [0.25] * 4, strict=True)
        )
        got = max(
            abs(t[depths == e].sum() - s * t.sum())
            for e, s in zip(cfg.exits, shares or [0.25] * 4, strict=True)
        )
        assert got <= max(worst, t.max())


def test_which_group_leaves_where_is_chance():
    cfg = config.Depth(exits=(1, 2))
    t = np.full(10, 7)
    seen = np.array([drawn(t, cfg, 2, rng(seed)) for seed in range(400)])
    assert ((seen == 2).sum(1) == 5).all()
    share = (seen == 2).mean(0)
    assert (abs(share - 0.5) < 4 * 0.5 / 400**0.5).all()


def test_some_always_run_to_the_end():
    """Also where one group is nearly all of the batch: processes need gradients of all layers."""
    cfg = config.Depth(exits=(1, 2, 4), shares=(0.9, 0.05, 0.05))
    for seed in range(50):
        for least in (1, 3, 4):
            depths = drawn(np.array([1000, 1, 1, 1]), cfg, 4, rng(seed), least)
            assert (depths == 4).sum() >= least


def test_depths_are_a_function_of_the_generator():
    cfg = config.Depth(exits=(1, 2, 4))
    a, b, c = (drawn(tokens(50), cfg, 4, rng(seed)) for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any() and a.dtype == np.int64


# ---- stochastic layer dropout ----


def test_probabilities_rise_with_depth():
    """LayerSkip: p_max at the last layer, nothing at the first, exponential in between."""
    cfg = config.Depth(layer_dropout=0.2)
    p = skip_probabilities(cfg, 5, 0, 10)
    assert p == pytest.approx([0.2 * (2 ** (layer / 4) - 1) for layer in range(5)])
    assert p[0] == 0 and p[-1] == pytest.approx(0.2)
    assert skip_probabilities(cfg, 1, 0, 10).tolist() == [0]
    rising = dataclasses.replace(cfg, dropout_schedule="exponential")
    assert skip_probabilities(rising, 5, 0, 10).tolist() == [0] * 5
    assert skip_probabilities(rising, 5, 5, 10) == pytest.approx(p * (2**0.5 - 1))


def test_texts_skip_layers_as_often_as_said():
    cfg, n = config.Depth(layer_dropout=0.5), 20_000
    runs_LN = runs(n, cfg, 4, 0, 1, rng())
    assert runs_LN.shape == (4, n) and runs_LN.dtype == bool
    for row, p in zip(runs_LN, skip_probabilities(cfg, 4, 0, 1), strict=True):
        assert abs((~row).mean() - p) <= 4 * (p * (1 - p) / n) ** 0.5
    assert runs(n, config.Depth(), 4, 0, 1, rng()) is None


# ---- curricula ----

EXITS = (1, 2, 4, 8, 16, 24, 28)


def test_all_exits_by_default():
    assert enabled(EXITS, config.Depth(), 3, 10) == EXITS


@pytest.mark.parametrize("rotation", [1, 2, 3, 6, 9])
def test_rotational(rotation):
    cfg = config.Depth(curriculum="rotational", rotation=rotation)
    steps = [enabled(EXITS, cfg, step, 100) for step in range(rotation)]
    assert all(on[-1] == 28 and list(on) == sorted(on) for on in steps)
    inner = sorted(e for on in steps for e in on[:-1])
    assert inner == list(EXITS[:-1])  # in so many steps each has its turn once
    assert enabled(EXITS, cfg, rotation, 100) == steps[0]


@pytest.mark.parametrize("steps", [1, 7, 12, 100])
def test_gradual(steps):
    cfg = config.Depth(curriculum="gradual")
    on = [enabled(EXITS, cfg, step, steps) for step in range(steps)]
    assert on[0] == (28,)
    assert all(set(a) <= set(b) for a, b in zip(on[:-1], on[1:], strict=True))
    assert all(b == EXITS[len(EXITS) - len(b) :] for b in on)  # from the deepest on
    assert all(b == EXITS for b in on[-(-steps // 2) :] if steps > 1)
    if steps == 100:
        assert enabled(EXITS, cfg, 48, steps) != EXITS


def test_one_exit_has_no_curriculum():
    for curriculum in ("rotational", "gradual"):
        assert enabled((4,), config.Depth(curriculum=curriculum), 0, 10) == (4,)


# ---- configuration ----


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"exits": (1, 4), "shares": (0.5,)}, "depth.shares: expected one for each"),
        ({"exits": (1, 4), "shares": (0.5, 0.6)}, "depth.shares: expected positive"),
        ({"exits": (1, 4), "shares": (1.5, -0.5)}, "depth.shares: expected positive"),
        ({"exits": (1, 4), "shares": (1.0, 0.0)}, "depth.shares: expected positive"),
        ({"layer_dropout": 1.0}, "depth.layer_dropout: expected 0..1, got 1.0"),
        ({"layer_dropout": -0.1}, "depth.layer_dropout"),
        ({"rotation": 0}, "depth.rotation"),
        ({"exits": (1, 2)}, "depth.exits: expected some of model.exits"),
        ({"exits": (3, 4)}, "depth.exits: expected some of model.exits"),
        ({"exits": (4, 1)}, "depth.exits: expected rising"),
        ({"exits": (1, 9)}, "depth.exits: expected at most"),
    ],
)
def test_mistakes(fields, says):
    shape = config.Model(num_hidden_layers=4, exits=(1, 2, 4))
    with pytest.raises(ValueError, match=says):
        config.Run(model=shape, depth=config.Depth(**fields))
