"""Groups of texts to the packed batch of each process."""

import numpy as np
import pytest
import torch

from mlembed.data.collate import collate

RNG = np.random.default_rng(1)
TOKENS = [RNG.integers(0, 100, n) for n in RNG.integers(1, 20, 80)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_collate(size, skip, max_tokens):
    """Every group whole, on one process; queries and documents together; deepest first."""
    rng = np.random.default_rng(1)
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
            groups, TOKENS.__getitem__, ids, depths, None,
            rank=rank, size=size, max_tokens=max_tokens, source="s", task="sts",
            temperature=0.5, scores=scores,
        )  # fmt: skip
        assert (batch.source, batch.task, batch.temperature) == ("s", "sts", 0.5)
        assert batch.scores.dtype == torch.float32
        texts, pack_of = [], []
        for i, one in enumerate(batch.packs):
            bounds = one.cu_seqlens.tolist()
            assert len(one) == 1 or bounds[-1] <= max_tokens
            texts += [one.ids_T[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
            pack_of += [i] * len(one)
            one_depths = [sum(j < w.sequences for _, w in one.live) for j in range(len(one))]
            assert one_depths == sorted(one_depths, reverse=True)
        order = batch.place.tolist()
        n, each = 16 // size, 16 // size * rank
        queries, docs = order[:n], order[n:]
        shared = {pack_of[i] for i in queries} & {pack_of[i] for i in docs}
        assert shared and (len(batch.packs) == 1) == (max_tokens > sum(map(len, texts)))
        query_ids = batch.query_ids[each : each + n].tolist()
        first = sum(batch.doc_sizes[:rank])
        mine = slice(first, first + batch.doc_sizes[rank])
        doc_ids, doc_depths = batch.doc_ids[mine].tolist(), batch.doc_depths[mine]
        assert len(docs) == len(doc_ids)
        query_depths = batch.query_depths[each : each + n]
        assert (query_depths.diff() <= 0).all() and (doc_depths.diff() <= 0).all()
        assert query_depths.max() == 4
        has_negatives = batch.has_negatives[each : each + n].tolist()
        assert len(batch.has_negatives) == 16 and len(batch.owner) == len(docs)
        assert batch.negatives.shape[1] == max((batch.negatives >= 0).sum(1))
        for i, at in enumerate(queries):
            (group,) = (g for g in groups if ids[g[0]] == query_ids[i])
            seen.append(group[0])
            positive = int(batch.target[i])
            assert texts[at] == TOKENS[group[0]].tolist()
            assert texts[docs[positive]] == TOKENS[group[1]].tolist()
            assert doc_ids[positive] == ids[group[1]]
            assert query_depths[i] == doc_depths[positive] == depths[groups.index(group)]
            assert batch.scores[i] == scores[groups.index(group)]
            hard = [place for place in batch.negatives[i].tolist() if place >= 0]
            assert has_negatives[i] == bool(hard)
            rows = batch.rows[[i, *(n + place for place in [positive, *hard])]]
            assert rows.tolist() == group
            assert (batch.owner == i).nonzero()[:, 0].tolist() == sorted([positive, *hard])
            for negative in group[2:]:
                at_doc = doc_ids.index(ids[negative])
                assert texts[docs[at_doc]] == TOKENS[negative].tolist()
                assert doc_depths[at_doc] == query_depths[i]
        assert batch.tokens == sum(map(len, texts))
    assert sorted(seen) == [group[0] for group in groups]


@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_skipped_layers(max_tokens):
    """Text i is tokens i; where all texts of a pack would skip a layer, its first does not."""
    groups = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10]]
    text = [np.full(i + 1, i) for i in range(11)]
    depths = np.array([2, 1, 2, 2])
    runs_LN = np.random.default_rng(0).random((2, 11)) < 0.5
    batch = collate(groups, text.__getitem__, np.arange(11), depths, runs_LN, max_tokens=max_tokens)
    checked = 0
    for one in batch.packs:
        for depth in (1, 2):
            plan = one.plan_at(depth)
            if plan is None:
                continue
            live = list(dict.fromkeys(one.ids_T[: plan.tokens].tolist()))
            layer = one.skip_layers.get(depth)
            rows = slice(plan.tokens) if layer is None else layer.rows_T
            ran = list(dict.fromkeys(one.ids_T[rows].tolist()))
            want = [i for i in live if runs_LN[depth - 1, i]]
            assert ran == (want or live[:1])
            checked += len(want) not in (0, len(live))
    assert checked


@pytest.mark.parametrize("task", ["retrieval", "bitext", "clustering", "classification"])
def test_negatives_with_the_id_of_their_query(task):
    """They are left out, except where ids may tie classes together."""
    groups = [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    ids = np.array([1, 1, 9, 1, 4, 4, 4, 7, 7])
    options = (lambda row: np.array([row]), ids, np.full(3, 2), None)
    batch = collate(groups, *options, max_tokens=99, task=task)
    assert batch.owner.tolist() == [0, 1, 2, 0, 0, 1] and batch.scores is None
    of_classes = task in ("clustering", "classification")
    want = [[3, 4], [5, -1], [-1, -1]] if of_classes else [[3], [-1], [-1]]
    assert batch.negatives.tolist() == want
    assert batch.has_negatives.tolist() == [True, of_classes, False]
    batch = collate([group[:2] for group in groups], *options, max_tokens=9, task=task)
    assert batch.negatives.shape == (3, 0) and batch.negatives.dtype == torch.int64
    assert not batch.has_negatives.any()


def test_number_of_scores():
    with pytest.raises(ValueError, match="scores: expected one for each of 2 groups, got 1"):
        collate(
            [[0, 1], [2, 3]], lambda row: np.array([row]), np.arange(4), np.ones(2, int), None,
            max_tokens=9, scores=np.ones(1),
        )  # fmt: skip
