"""Tables to batches: an order that is a function of the seed, which any process can draw alone."""

import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mlembed import config, tokenizer
from mlembed.data import Batches, Table, text_id
from mlembed.distributed import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tables():
    """17 pairs of which two share a positive, with 0 to 3 negatives; 11 ids of 2 to 4 texts."""
    texts, starts, ids = [], [0], []
    for i in range(17):
        positive = f"positive {min(i, 15)}"
        texts += [f"query {i}", positive, *(f"negative {i} {j}" for j in range(i % 4))]
        starts.append(len(texts))
        ids += [text_id(positive)] * 2 + [text_id(text) for text in texts[len(ids) + 2 :]]
    pairs = Table("pairs", False, texts, np.array(ids), np.array(starts))
    texts, starts = [], [0]
    for i in range(11):
        texts += [f"id {i} language {j}" for j in range(2 + i % 3)]
        starts.append(len(texts))
    ids = np.array([text_id("nway", text.split()[1]) for text in texts])
    return [pairs, Table("nway", True, texts, ids, np.array(starts))]


@pytest.fixture(scope="module")
def learnt(tables):
    return tokenizer.train([text for table in tables for text in table.texts], 300)


@pytest.fixture
def make(tables, learnt):
    def make(which=tables, rank=0, size=1, negatives=2, **fields):
        run = config.Run(
            **{"batch_size": 4, "steps": 40, "loss": config.Loss(num_negatives=negatives)} | fields
        )
        return Batches(which, learnt, run, World(rank, size, CPU))

    return make


def texts_of(batch, learnt):
    """Queries, positives, negatives; in a pack itself the shortest come first."""
    texts = []
    for packed in batch.packs:
        bounds = packed.cu_seqlens
        assert torch.equal(bounds.diff(), bounds.diff().sort().values)
        texts += [
            learnt.decode(packed.ids_T[begin:end].tolist())
            for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
    assert sorted(batch.place.tolist()) == list(range(len(texts)))
    return [texts[i] for i in batch.place]


def same(a, b):
    tensors = ("place", "target", "query_ids", "query_depths", "doc_ids", "doc_depths")
    return (
        all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)
        and (a.doc_sizes, a.source) == (b.doc_sizes, b.source)
        and len(a.packs) == len(b.packs)
        and all(map(same_pack, a.packs, b.packs))
    )


def same_pack(a, b):
    return (
        all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("ids_T", "pos_T", "cu_seqlens"))
        and [until for until, _ in a.live] == [until for until, _ in b.live]
        and all(
            torch.equal(x.buffer, y.buffer) for (_, x), (_, y) in zip(a.live, b.live, strict=True)
        )
        and a.kept.keys() == b.kept.keys()
        and all(torch.equal(a.kept[d].rows_T, b.kept[d].rows_T) for d in a.kept)
    )


def test_a_batch_is_a_function_of_its_number(make):
    a, b, c = make(), make(), make()
    assert len(a) == 40
    forward = [a[i] for i in range(40)]
    backward = [b[i] for i in reversed(range(40))][::-1]
    assert all(same(x, y) for x, y in zip(forward, backward, strict=True))
    assert same(c[33], forward[33]) and same(c[33], forward[33])  # also asked twice, and alone


def test_a_longer_run_begins_with_the_same_batches(make):
    short, long = make(steps=10), make(steps=30, gradient_accumulation_steps=2)
    assert len(long) == 60
    assert all(same(short[i], long[i]) for i in range(10))


def test_seeds_differ(make):
    a, b = make(), make(seed=1)
    assert not all(same(a[i], b[i]) for i in range(5))


def test_workers_give_the_same_batches(make):
    """In whichever way worker processes start: forked, or fresh ones that unpickle the data set."""
    batches = make()
    copy = pickle.loads(pickle.dumps(batches))
    assert all(same(batches[i], copy[i]) for i in range(len(batches)))
    loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert all(same(batches[i], batch) for i, batch in enumerate(loader))


@pytest.mark.parametrize("batch_size", [1, 4, 17, 40])
@pytest.mark.parametrize("which", [0, 1])
def test_each_epoch_is_a_permutation(make, tables, learnt, which, batch_size):
    table = tables[which]
    batches = make([table], batch_size=batch_size, steps=-(-5 * len(table) // batch_size))
    drawn = []
    for number in range(len(batches)):
        first = texts_of(batches[number], learnt)[:batch_size]
        drawn += [int(text.split()[1]) for text in first]
    n = len(table)
    epochs = [drawn[i : i + n] for i in range(0, 5 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_epochs_of_a_source_go_on_between_batches_of_another(make, tables, learnt):
    batches = make(steps=200)
    for table in tables:
        of_source = [b for b in (batches[i] for i in range(200)) if b.source == table.name]
        assert len(of_source) > 20
        drawn = [int(t.split()[1]) for b in of_source for t in texts_of(b, learnt)[:4]]
        n = len(table)
        for i in range(0, len(drawn) - n, n):
            assert sorted(drawn[i : i + n]) == list(range(n))


def test_layout_of_a_pair_batch(make, tables, learnt):
    """Queries, then their positives, then stored negatives of theirs, none twice."""
    batches = make(tables[:1], negatives=2)
    some = Counter()
    for number in range(len(batches)):
        batch = batches[number]
        texts = texts_of(batch, learnt)
        queries, positives, negatives = texts[:4], texts[4:8], texts[8:]
        rows = [int(q.removeprefix("query ")) for q in queries]
        assert positives == [f"positive {min(i, 15)}" for i in rows]
        # A row may come twice where one epoch ends and the next begins.
        times = Counter(rows)
        assert Counter(int(text.split()[1]) for text in negatives) == Counter(
            {i: times[i] * min(2, i % 4) for i in rows if i % 4}
        )
        for text, count in Counter(negatives).items():
            assert count <= times[int(text.split()[1])]
        assert all(int(t.split()[2]) < int(t.split()[1]) % 4 for t in negatives)
        some.update(negatives)
        assert batch.query_ids.tolist() == [text_id(t) for t in positives]
        assert batch.doc_ids.tolist() == [text_id(t) for t in positives + negatives]
        assert batch.doc_sizes == (4 + len(negatives),)
        assert batch.query_ids.dtype == batch.doc_ids.dtype == torch.int64
    assert len(some) == sum(i % 4 for i in range(17))  # all of them are drawn sooner or later


@pytest.mark.parametrize("negatives, most", [(0, 0), (1, 1), (3, 3), (9, 3)])
def test_number_of_negatives(make, tables, learnt, negatives, most):
    batches = make(tables[:1], negatives=negatives)
    texts = [texts_of(batches[i], learnt) for i in range(len(batches))]
    times, drawn = (
        Counter(t.split()[1] for row in texts for t in row[part])
        for part in (slice(4), slice(8, None))
    )
    assert all(drawn[row] == times[row] * min(most, int(row) % 4) for row in times)


def test_nway_pairs_are_two_different_texts_of_one_id(make, tables, learnt):
    batches = make(tables[1:], steps=300)
    ordered = Counter()
    for number in range(len(batches)):
        batch = batches[number]
        texts = texts_of(batch, learnt)
        assert len(texts) == 8
        for query, positive, pair_id in zip(texts[:4], texts[4:], batch.query_ids, strict=True):
            (_, i, _, a), (_, j, _, b) = query.split(), positive.split()
            assert i == j and a != b
            assert pair_id == text_id("nway", i)
            ordered[i, a, b] += 1
        assert batch.doc_ids.tolist() == batch.query_ids.tolist()
    # Each ordered pair of languages occurs: neither side is reserved for some of them.
    assert len(ordered) == sum((n := 2 + i % 3) * (n - 1) for i in range(11))


@pytest.mark.parametrize("size", [2, 4])
def test_shares_together_are_the_single_process_batch(make, tables, learnt, size):
    whole = make()
    shares = [make(rank=rank, size=size) for rank in range(size)]
    assert not any(b.order.tolist() != whole.order.tolist() for b in shares)
    each = 4 // size
    sources = set()
    for number in range(len(whole)):
        one, parts = whole[number], [b[number] for b in shares]
        sources.add(one.source)
        texts = texts_of(one, learnt)
        split = [texts_of(part, learnt) for part in parts]
        # Which process has a pair is decided by the work; it has all of it.
        pairs = [pair for t in split for pair in zip(t[:each], t[each : 2 * each], strict=True)]
        assert sorted(pairs) == sorted(zip(texts[:4], texts[4:8], strict=True))
        assert sorted(sum((t[2 * each :] for t in split), [])) == sorted(texts[8:])
        # What every process knows of the others: equal everywhere, process by process.
        sizes = tuple(len(t) - each for t in split)
        for part in parts:
            assert part.source == one.source
            assert torch.equal(part.query_ids.sort().values, one.query_ids.sort().values)
            assert part.doc_sizes == sizes
            assert torch.equal(part.doc_ids, parts[0].doc_ids)
            assert torch.equal(part.query_ids, parts[0].query_ids)
            assert part.target.tolist() == list(range(each))
        if one.source == "pairs":
            want = [text_id(t) for texts in split for t in texts[each:]]
            assert parts[0].doc_ids.tolist() == want
        assert sorted(parts[0].doc_ids.tolist()) == sorted(one.doc_ids.tolist())
    assert sources == {"pairs", "nway"}


def test_batch_size_must_divide_by_processes(make):
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes, got 4"):
        make(rank=0, size=3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sources_are_drawn_by_size_to_the_alpha(make, alpha):
    sizes = (40, 400, 1000)
    tables = [
        Table(str(n), False, ["a", "b"] * n, np.arange(2 * n) // 2, np.arange(0, 2 * n + 1, 2))
        for n in sizes
    ]
    n = 3000
    batches = make(tables, batch_size=1, steps=n, source_alpha=alpha)
    drawn = Counter(batches[i].source for i in range(n))
    weights = np.array(sizes, dtype=float) ** alpha
    for size, p in zip(sizes, weights / weights.sum(), strict=True):
        assert abs(drawn[str(size)] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_texts_are_cut_to_max_length(make, learnt):
    batches = make(max_length=3)
    for packed in batches[0].packs:
        assert packed.work.max_seqlen == 3
        ends = packed.cu_seqlens[1:].long() - 1
        assert (packed.ids_T[ends] == learnt.token_to_id(tokenizer.EOS)).all()


# ---- ids ----

SCRIPT = "from mlembed.data import text_id; print(text_id('Meer'), text_id('n', '7'), text_id(''))"


@pytest.mark.parametrize("seed", ["0", "77"])
def test_ids_are_the_same_in_every_process(seed):
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    ids = [int(word) for word in out.split()]
    assert ids == [text_id("Meer"), text_id("n", "7"), text_id("")]
    assert all(0 <= i < 2**63 for i in ids) and len(set(ids)) == 3


def test_ids_tell_parts_apart():
    assert text_id("a", "bc") != text_id("ab", "c") != text_id("abc")
    many = {text_id(str(i)) for i in range(100_000)}
    assert len(many) == 100_000 and max(many) < 2**63


# ---- real files ----
