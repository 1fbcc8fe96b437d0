"""Token lists in one row, and packs within a token budget."""

import numpy as np
import pytest
import torch

from mlembed.data.packing import budgeted, even_packs, even_shares, pack
from mlembed_kernels import AttentionPlan
from tests.data.samples import equal

# One token, a prime, equal neighbours, a long one: boundaries off by one show in each.
LENGTHS = (3, 1, 7, 1, 1, 64, 2)


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 1000, n).astype(np.int32) for n in LENGTHS]


# ---- one pack ----


def test_pack(texts):
    batch = pack(texts)
    bounds = batch.cu_seqlens.tolist()
    assert len(batch) == len(texts) and bounds == [0, 3, 4, 11, 12, 13, 77, 79]
    for text, begin, end in zip(texts, bounds[:-1], bounds[1:], strict=True):
        assert batch.ids_T[begin:end].tolist() == text.tolist()
        assert batch.pos_T[begin:end].tolist() == list(range(len(text)))
    plan = batch.plan
    assert plan.max_seqlen == 64 and type(plan.max_seqlen) is int
    assert plan.tokens == len(batch.ids_T) and plan.sequences == len(texts)
    assert batch.cu_seqlens.data_ptr() == plan.buffer.data_ptr()  # not a second copy
    assert equal(plan, AttentionPlan.of(batch.cu_seqlens))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_dtypes(dtype):
    batch = pack([np.array([5, 6], dtype=dtype), np.array([7], dtype=dtype)])
    assert batch.ids_T.dtype == batch.pos_T.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.ids_T.tolist() == [5, 6, 7]


def test_pack_copies(texts):
    batch = pack(texts[:1])
    before = batch.ids_T.tolist()
    texts[0][:] = 0
    assert batch.ids_T.tolist() == before


def test_pack_without_tokens():
    with pytest.raises(ValueError, match="expected one or more"):
        pack([])
    with pytest.raises(ValueError, match=r"one or more tokens, got lengths \[2 0\]"):
        pack([np.array([1, 2]), np.array([], dtype=np.int64)])


# ---- depths and skipped layers ----


def test_live_texts_are_a_prefix(texts):
    batch, whole = pack(texts, np.array([4, 4, 4, 2, 2, 1, 1])), pack(texts)
    assert torch.equal(batch.ids_T, whole.ids_T) and torch.equal(batch.pos_T, whole.pos_T)
    assert [until for until, _ in batch.live] == [1, 2, 4]
    for depth, count in {1: 7, 2: 5, 3: 3, 4: 3}.items():
        plan = batch.plan_at(depth)
        assert plan.sequences == count and plan.tokens == sum(LENGTHS[:count])
        assert equal(plan, AttentionPlan.of(whole.cu_seqlens[: count + 1]))
    assert batch.plan_at(5) is None
    assert whole.plan_at(1) is whole.plan_at(1000) is whole.plan
    even = pack(texts, np.full(7, 3))
    assert even.plan_at(3) is even.plan and even.plan_at(4) is None


def test_skipped_layers(texts):
    depths = np.array([3, 3, 3, 2, 2, 2, 2])
    runs = np.ones((3, 7), dtype=bool)
    runs[0, [1, 5]] = False
    runs[1] = False  # All texts would skip the layer, so the first does not.
    runs[2, 3:] = False  # These texts left before.
    batch = pack(texts, depths, runs).to(torch.device("cpu"))
    assert sorted(batch.skip_layers) == [1, 2]
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)])
    for depth, running in ((1, [0, 2, 3, 4, 6]), (2, [0])):
        layer = batch.skip_layers[depth]
        rows = [row for i in running for row in range(bounds[i], bounds[i + 1])]
        assert layer.rows_T.tolist() == rows
        assert layer.plan.cu_seqlens.diff().tolist() == [LENGTHS[i] for i in running]
    assert not runs[1].any()  # The caller's array did not change.


@pytest.mark.parametrize("depths", [[1, 2, 2, 2, 2, 2, 2], [3] * 6, [1, 1, 1, 1, 1, 1, 0]])
def test_wrong_depths(texts, depths):
    with pytest.raises(ValueError, match="depths: expected one a text, falling, from 1 on"):
        pack(texts, np.array(depths))


# ---- packs within a budget ----


@pytest.mark.parametrize("budget", [1, 2, 5, 64, 100, 10_000])
@pytest.mark.parametrize("kind", ["random", "equal", "one", "rising"])
def test_budgeted(budget, kind):
    lengths = {
        "random": np.random.default_rng(1).integers(1, 80, 97),
        "equal": np.full(13, 5),
        "one": np.array([7]),
        "rising": np.arange(1, 30),
    }[kind]
    packs = budgeted(lengths, budget)
    rows = np.concatenate(packs)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[rows]) >= 0).all()
    for one in packs:
        assert len(one) == 1 or lengths[one].sum() <= budget
    for one, following in zip(packs[:-1], packs[1:], strict=True):
        assert lengths[one].sum() + lengths[following[0]] > budget  # no pack closed early


def test_budgeted_order():
    assert [p.tolist() for p in budgeted(np.array([2, 1, 2, 1]), 4)] == [[1, 3, 0], [2]]
    assert budgeted(np.array([], dtype=np.int64), 10) == []


# ---- even shares ----

CASES = [
    (
        np.random.default_rng(0).lognormal(4, 1, 256).astype(np.int64) + 1,
        np.random.default_rng(1).choice([7, 14, 21, 28], 256),
    ),
    (np.full(64, 5), np.full(64, 4)),
    (np.array([10_000, 1, 1, 1, 1, 1, 1, 1]), np.array([1, 2, 2, 2, 2, 2, 2, 2])),
    (np.array([3, 4]), np.array([2, 1])),
]


@pytest.mark.parametrize("shares", [1, 2, 4, 8])
@pytest.mark.parametrize("case", range(4))
def test_even_shares(case, shares):
    lengths, depths = CASES[case]
    n = len(lengths)
    parts = even_shares(lengths, depths, shares)
    assert len(parts) == shares
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for depth in np.unique(depths):  # at every layer
        tokens = [lengths[part][depths[part] >= depth].sum() for part in parts]
        assert max(tokens) - min(tokens) <= lengths.max()
        if case == 0 and shares <= 4:
            assert max(tokens) / min(tokens) < 1.02
    if n % shares == 0:
        equal_sized = even_shares(lengths, depths, shares, n // shares)
        assert [len(part) for part in equal_sized] == [n // shares] * shares
        assert sorted(np.concatenate(equal_sized).tolist()) == list(range(n))


def test_every_share_has_a_deepest_text():
    depths = np.array([1, 1, 1, 2, 2, 1, 1, 1])
    parts = even_shares(np.array([900, 1, 1, 1, 500, 1, 1, 1]), depths, 2, 4)
    assert all((depths[part] == 2).any() for part in parts)


@pytest.mark.parametrize("budget", [1, 10, 64, 500, 100_000])
@pytest.mark.parametrize("case", range(4))
def test_even_packs(case, budget):
    lengths, depths = CASES[case]
    packs = even_packs(lengths, depths, budget)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    for rows in packs:
        assert len(rows) == 1 or lengths[rows].sum() <= budget
        assert (np.diff(depths[rows]) <= 0).all()  # deepest first
        same = np.diff(depths[rows]) == 0
        assert (np.diff(lengths[rows])[same] >= 0).all()  # then shortest first
    if case == 0 and budget == 500:
        assert len(packs) <= 1.2 * lengths.sum() / budget + (lengths > budget).sum()
    if budget == 100_000:
        assert len(packs) == 1
