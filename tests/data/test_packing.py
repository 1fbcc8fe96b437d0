"""Token lists to one row and back, and packs within a token budget."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mlembed.data.collate import collate
from mlembed.data.packing import budgeted, pack, packs, shared_out
from mlembed_kernels import AttentionPlan

# One token, a prime, equal neighbours, a long one: boundaries off by one show in each.
LENGTHS = (3, 1, 7, 1, 1, 64, 2)


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 1000, n).astype(np.int32) for n in LENGTHS]


def test_pack_gives_every_text_back(texts):
    batch = pack(texts)
    assert len(batch) == len(texts)
    bounds = batch.cu_seqlens.tolist()
    assert bounds == [0, 3, 4, 11, 12, 13, 77, 79]
    for text, begin, end in zip(texts, bounds[:-1], bounds[1:], strict=True):
        assert batch.ids_T[begin:end].tolist() == text.tolist()
        assert batch.pos_T[begin:end].tolist() == list(range(len(text)))
    assert batch.plan.max_seqlen == 64 and type(batch.plan.max_seqlen) is int


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_dtypes_are_fixed_whatever_came_in(dtype):
    batch = pack([np.array([5, 6], dtype=dtype), np.array([7], dtype=dtype)])
    assert batch.ids_T.dtype == batch.pos_T.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.ids_T.tolist() == [5, 6, 7]


def test_pack_copies(texts):
    batch = pack(texts[:1])
    before = batch.ids_T.tolist()
    texts[0][:] = 0
    assert batch.ids_T.tolist() == before


def test_to_moves_everything(texts):
    batch = pack(texts).to(torch.device("meta"))
    tensors = (batch.ids_T, batch.pos_T, batch.cu_seqlens, batch.plan.buffer)
    assert {t.device.type for t in tensors} == {"meta"}
    assert len(batch) == len(texts) and batch.plan.max_seqlen == 64


def test_the_work_of_attention_is_listed_once(texts):
    batch = pack(texts)
    assert batch.plan.tokens == len(batch.ids_T) and batch.plan.sequences == len(texts)
    assert batch.cu_seqlens.data_ptr() == batch.plan.buffer.data_ptr()  # no second copy of it
    assert torch.equal(batch.plan.buffer, AttentionPlan.of(batch.cu_seqlens).buffer)


def test_worker_processes_hand_it_over(texts):
    loader = DataLoader([pack(texts), pack(texts[:1])], batch_size=None, num_workers=1)
    for got, want in zip(loader, (pack(texts), pack(texts[:1])), strict=True):
        assert len(got) == len(want) and got.plan.max_seqlen == want.plan.max_seqlen
        assert torch.equal(got.ids_T, want.ids_T) and torch.equal(got.pos_T, want.pos_T)
        assert torch.equal(got.plan.buffer, want.plan.buffer)
        assert got.plan.counts == want.plan.counts


def test_nothing_to_pool_is_an_error():
    with pytest.raises(ValueError, match="expected one or more"):
        pack([])
    with pytest.raises(ValueError, match=r"one or more tokens, got lengths \[2 0\]"):
        pack([np.array([1, 2]), np.array([], dtype=np.int64)])


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


def test_budgeted_keeps_the_order_of_equal_lengths():
    assert [p.tolist() for p in budgeted(np.array([2, 1, 2, 1]), 4)] == [[1, 3, 0], [2]]


def test_budgeted_of_nothing():
    assert budgeted(np.array([], dtype=np.int64), 10) == []


# ---- texts that leave ----


def test_those_that_are_there_are_a_prefix(texts):
    depths = np.array([4, 4, 4, 2, 2, 1, 1])
    batch = pack(texts, depths)
    whole = pack(texts)
    assert torch.equal(batch.ids_T, whole.ids_T) and torch.equal(batch.pos_T, whole.pos_T)
    assert [until for until, _ in batch.live] == [1, 2, 4]
    for depth, there in {1: 7, 2: 5, 3: 3, 4: 3}.items():
        plan = batch.work_at(depth)
        assert plan.sequences == there and plan.tokens == sum(LENGTHS[:there])
        assert torch.equal(plan.buffer, AttentionPlan.of(whole.cu_seqlens[: there + 1]).buffer)
    assert batch.work_at(5) is None
    assert whole.work_at(1) is whole.work_at(1000) is whole.plan


def test_all_of_one_depth(texts):
    batch = pack(texts, np.full(7, 3))
    assert batch.work_at(3) is batch.plan and batch.work_at(4) is None


def test_texts_that_skip_a_layer(texts):
    depths = np.array([3, 3, 3, 2, 2, 2, 2])
    runs = np.ones((3, 7), dtype=bool)
    runs[0, [1, 5]] = False
    runs[1] = False  # all would: the first does not
    runs[2, 3:] = False  # they are not there any more
    batch = pack(texts, depths, runs).to(torch.device("cpu"))
    assert sorted(batch.kept) == [1, 2]
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)])
    for depth, who in ((1, [0, 2, 3, 4, 6]), (2, [0])):
        kept = batch.kept[depth]
        rows = [row for i in who for row in range(bounds[i], bounds[i + 1])]
        assert kept.rows_T.tolist() == rows
        assert kept.plan.cu_seqlens.diff().tolist() == [LENGTHS[i] for i in who]
    assert runs[1].any() == False  # noqa: E712  the caller's array is as it was


def test_depths_that_rise_are_an_error(texts):
    for wrong in ([1, 2, 2, 2, 2, 2, 2], [3] * 6, [1, 1, 1, 1, 1, 1, 0]):
        with pytest.raises(ValueError, match="depths: expected one a text, falling, from 1 on"):
            pack(texts, np.array(wrong))


# ---- even shares ----


def cases():
    """Lengths and depths of groups: as they come, of one length, one huge, fewer than shares."""
    rng = np.random.default_rng(3)
    yield rng.lognormal(4, 1, 256).astype(np.int64) + 1, rng.choice([7, 14, 21, 28], 256)
    yield np.full(64, 5), np.full(64, 4)
    yield np.array([10_000, 1, 1, 1, 1, 1, 1, 1]), np.array([1, 2, 2, 2, 2, 2, 2, 2])
    yield np.array([3, 4]), np.array([2, 1])


@pytest.mark.parametrize("shares", [1, 2, 4, 8])
@pytest.mark.parametrize("case", range(4))
def test_shares_have_as_much_to_do(case, shares):
    lengths, depths = list(cases())[case]
    n = len(lengths)
    parts = shared_out(lengths, depths, shares)
    assert len(parts) == shares
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for depth in np.unique(depths):  # at every layer
        there = [lengths[part][depths[part] >= depth].sum() for part in parts]
        assert max(there) - min(there) <= lengths.max()
        if case == 0 and shares <= 4:
            assert max(there) / min(there) < 1.02
    if n % shares == 0:
        even = shared_out(lengths, depths, shares, n // shares)
        assert [len(part) for part in even] == [n // shares] * shares
        assert sorted(np.concatenate(even).tolist()) == list(range(n))


def test_the_deepest_are_on_every_share():
    depths = np.array([1, 1, 1, 2, 2, 1, 1, 1])
    parts = shared_out(np.array([900, 1, 1, 1, 500, 1, 1, 1]), depths, 2, 4)
    assert all((depths[part] == 2).any() for part in parts)


@pytest.mark.parametrize("budget", [1, 10, 64, 500, 100_000])
@pytest.mark.parametrize("case", range(4))
def test_packs_within_a_budget(case, budget):
    lengths, depths = list(cases())[case]
    found = packs(lengths, depths, budget)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    for rows in found:
        assert len(rows) == 1 or lengths[rows].sum() <= budget
        assert (np.diff(depths[rows]) <= 0).all()  # deepest first
        same = np.diff(depths[rows]) == 0
        assert (np.diff(lengths[rows])[same] >= 0).all()  # then shortest first
    if case == 0 and budget == 500:
        assert len(found) <= 1.2 * lengths.sum() / budget + (lengths > budget).sum()
    if budget == 100_000:
        assert len(found) == 1


# ---- a step's texts ----


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_collate(size, skip, max_tokens):
    """Every group whole, on one process; queries and documents apart; deepest first."""
    rng = np.random.default_rng(1)
    tables = [rng.integers(0, 100, n) for n in rng.integers(1, 20, 80)]
    groups, row = [], 0
    for negatives in rng.integers(0, 5, 16).tolist():
        groups.append(list(range(row, row + 2 + negatives)))
        row += 2 + negatives
    ids = rng.integers(0, 10**6, 80)
    depths = rng.choice([1, 2, 4], 16) if skip else np.full(16, 4)
    depths[:4] = 4
    scores = rng.random(16).astype(np.float32)
    seen = []
    for rank in range(size):
        batch = collate(
            groups, tables.__getitem__, ids, depths, None,
            rank=rank, size=size, max_tokens=max_tokens, source="s", task="sts",
            temperature=0.5, scores=scores,
        )  # fmt: skip
        assert (batch.source, batch.task, batch.temperature) == ("s", "sts", 0.5)
        assert batch.scores.dtype == torch.float32
        texts, of_pack = [], []
        for i, one in enumerate(batch.packs):
            bounds = one.cu_seqlens.tolist()
            assert len(one) == 1 or bounds[-1] <= max_tokens
            texts += [one.ids_T[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
            of_pack += [i] * len(one)
            # A text runs as deep as its pack says.
            one_depths = [sum(j < w.sequences for _, w in one.live) for j in range(len(one))]
            assert one_depths == sorted(one_depths, reverse=True)
        order = batch.place.tolist()
        n, each = 16 // size, 16 // size * rank
        queries, docs = order[:n], order[n:]
        assert not {of_pack[i] for i in queries} & {of_pack[i] for i in docs}
        own_ids = batch.query_ids[each : each + n].tolist()
        first_doc = sum(batch.doc_sizes[:rank])
        doc_ids = batch.doc_ids[first_doc : first_doc + batch.doc_sizes[rank]].tolist()
        assert len(docs) == len(doc_ids)
        doc_depths = batch.doc_depths[first_doc : first_doc + batch.doc_sizes[rank]]
        query_depths = batch.query_depths[each : each + n]
        assert (query_depths.diff() <= 0).all() and (doc_depths.diff() <= 0).all()
        assert query_depths.max() == 4
        has_negatives = batch.has_negatives[each : each + n].tolist()
        assert len(batch.has_negatives) == 16 and len(batch.owner) == len(docs)
        assert batch.negatives.shape[1] == max((batch.negatives >= 0).sum(1))
        for i, at in enumerate(queries):
            (group,) = (g for g in groups if ids[g[0]] == own_ids[i])
            seen.append(group[0])
            positive = int(batch.target[i])
            assert texts[at] == tables[group[0]].tolist()
            assert texts[docs[positive]] == tables[group[1]].tolist()
            assert doc_ids[positive] == ids[group[1]]
            assert query_depths[i] == doc_depths[positive] == depths[groups.index(group)]
            assert batch.scores[i] == scores[groups.index(group)]
            hard = [place for place in batch.negatives[i].tolist() if place >= 0]
            assert has_negatives[i] == bool(hard)
            own = [i, *(n + place for place in [positive, *hard])]
            assert batch.rows[own].tolist() == group
            assert (batch.owner == i).nonzero()[:, 0].tolist() == sorted([positive, *hard])
            for negative in group[2:]:
                at_doc = doc_ids.index(ids[negative])
                assert texts[docs[at_doc]] == tables[negative].tolist()
                assert doc_depths[at_doc] == query_depths[i]
        assert batch.tokens == sum(map(len, texts))
    assert sorted(seen) == [group[0] for group in groups]


@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_collated_texts_skip_the_layers_that_were_drawn_for_them(max_tokens):
    """Text i is tokens i; where all of a pack would skip a layer, its first does not."""
    groups = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10]]
    text = [np.full(i + 1, i) for i in range(11)]
    depths = np.array([2, 1, 2, 2])
    runs_LN = np.random.default_rng(0).random((2, 11)) < 0.5
    batch = collate(groups, text.__getitem__, np.arange(11), depths, runs_LN, max_tokens=max_tokens)
    checked = 0
    for one in batch.packs:
        for depth in (1, 2):
            plan = one.work_at(depth)
            if plan is None:
                continue
            there = dict.fromkeys(one.ids_T[: plan.tokens].tolist())
            kept = one.kept.get(depth)
            ran = there if kept is None else dict.fromkeys(one.ids_T[kept.rows_T].tolist())
            want = [i for i in there if runs_LN[depth - 1, i]]
            assert list(ran) == (want or list(there)[:1])
            checked += len(want) not in (0, len(there))
    assert checked


@pytest.mark.parametrize("task", ["retrieval", "bitext", "clustering", "classification"])
def test_negatives_of_a_query_s_own_id(task):
    """They are none, but where ids may tie classes together."""
    groups = [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    ids = np.array([1, 1, 9, 1, 4, 4, 4, 7, 7])
    batch = collate(
        groups, lambda row: np.array([row]), ids, np.full(3, 2), None, max_tokens=99, task=task
    )
    assert batch.owner.tolist() == [0, 1, 2, 0, 0, 1] and batch.scores is None
    of_classes = task in ("clustering", "classification")
    want = [[3, 4], [5, -1], [-1, -1]] if of_classes else [[3], [-1], [-1]]
    assert batch.negatives.tolist() == want
    assert batch.has_negatives.tolist() == [True, of_classes, False]
    pairs = [group[:2] for group in groups]
    batch = collate(
        pairs, lambda row: np.array([row]), ids, np.full(3, 2), None, max_tokens=9, task=task
    )
    assert batch.negatives.shape == (3, 0) and batch.negatives.dtype == torch.int64
    assert not batch.has_negatives.any()


def test_a_score_for_each_group():
    with pytest.raises(ValueError, match="scores: expected one for each of 2 groups, got 1"):
        collate(
            [[0, 1], [2, 3]], lambda row: np.array([row]), np.arange(4), np.ones(2, int), None,
            max_tokens=9, scores=np.ones(1),
        )  # fmt: skip
