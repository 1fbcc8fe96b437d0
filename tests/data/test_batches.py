"""Batches of tables: an order that is a function of the seed, which any process can draw."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch

from mlembed import config
from mlembed.data import tokenizer
from mlembed.data.batches import Batches, draw_distinct, steps_of
from mlembed.data.tables import Table, TextWriter, text_id
from mlembed.runtime.distributed import World
from mlembed.training.objective import teacher
from tests.data.samples import batch_texts, equal

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
    def make(which=tables, rank=0, size=1, negatives=2, vectors=None, **fields):
        run = config.Run(
            **{"batch_size": 4, "steps": 40, "loss": config.Loss(num_negatives=negatives)} | fields
        )
        return Batches(which, learnt, run, World(rank, size, CPU), teacher=vectors)

    return make


# ---- which batches ----


def test_batch_depends_on_its_number_only(make):
    a, b, c = make(), make(), make()
    assert len(a) == 40
    forward = [a[i] for i in range(40)]
    backward = [b[i] for i in reversed(range(40))][::-1]
    assert all(map(equal, forward, backward))
    assert equal(c[33], forward[33]) and equal(c[33], forward[33])
    other = make(seed=1)
    assert not all(equal(forward[i], other[i]) for i in range(5))


def test_longer_run_begins_with_the_same_batches(make):
    short, long = make(steps=10), make(steps=30, gradient_accumulation_steps=2)
    assert len(long) == 60
    assert all(equal(short[i], long[i]) for i in range(10))


@pytest.mark.parametrize("batch_size", [1, 4, 17, 40])
@pytest.mark.parametrize("which", [0, 1])
def test_epochs_are_permutations(make, tables, learnt, which, batch_size):
    n = len(tables[which])
    batches = make([tables[which]], batch_size=batch_size, steps=-(-5 * n // batch_size))
    drawn = [
        int(text.split()[1])
        for number in range(len(batches))
        for text in batch_texts(batches[number], learnt)[:batch_size]
    ]
    epochs = [drawn[i : i + n] for i in range(0, 5 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_epochs_continue_between_batches_of_another_source(make, tables, learnt):
    batches = make(steps=120)
    for table in tables:
        of_source = [b for b in (batches[i] for i in range(120)) if b.source == table.name]
        assert len(of_source) > 20
        drawn = [int(t.split()[1]) for b in of_source for t in batch_texts(b, learnt)[:4]]
        n = len(table)
        for i in range(0, len(drawn) - n, n):
            assert sorted(drawn[i : i + n]) == list(range(n))


# ---- what a batch holds ----


def test_pair_batch(make, tables, learnt):
    """Queries, then their positives, then stored negatives of theirs, none twice."""
    batches = make(tables[:1], negatives=2)
    seen = Counter()
    for number in range(len(batches)):
        batch = batches[number]
        texts = batch_texts(batch, learnt)
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
        seen.update(negatives)
        assert batch.query_ids.tolist() == [text_id(t) for t in positives]
        assert batch.doc_ids.tolist() == [text_id(t) for t in positives + negatives]
        assert batch.doc_sizes == (4 + len(negatives),)
        assert batch.query_ids.dtype == batch.doc_ids.dtype == torch.int64
    assert len(seen) == sum(i % 4 for i in range(17))  # every negative is drawn at some time


def test_nway_batch(make, tables, learnt):
    """Pairs are two different texts of one id, and each ordered pair of languages occurs."""
    batches = make(tables[1:], steps=300)
    ordered = set()
    for number in range(len(batches)):
        batch = batches[number]
        texts = batch_texts(batch, learnt)
        assert len(texts) == 8
        for query, positive, pair_id in zip(texts[:4], texts[4:], batch.query_ids, strict=True):
            (_, i, _, a), (_, j, _, b) = query.split(), positive.split()
            assert i == j and a != b and pair_id == text_id("nway", i)
            ordered.add((i, a, b))
        assert batch.doc_ids.tolist() == batch.query_ids.tolist()
    assert len(ordered) == sum((n := 2 + i % 3) * (n - 1) for i in range(11))


@pytest.mark.parametrize("size", [2, 4])
def test_shares_add_up_to_the_whole_batch(make, tables, learnt, size):
    whole = make()
    shares = [make(rank=rank, size=size) for rank in range(size)]
    assert not any(b.order.tolist() != whole.order.tolist() for b in shares)
    each, sources = 4 // size, set()
    for number in range(len(whole)):
        one, parts = whole[number], [b[number] for b in shares]
        sources.add(one.source)
        texts = batch_texts(one, learnt)
        split = [batch_texts(part, learnt) for part in parts]
        # The work decides which process has a pair; it has all of the pair.
        pairs = [pair for t in split for pair in zip(t[:each], t[each : 2 * each], strict=True)]
        assert sorted(pairs) == sorted(zip(texts[:4], texts[4:8], strict=True))
        assert sorted(sum((t[2 * each :] for t in split), [])) == sorted(texts[8:])
        # Every process has the ids of all processes, process by process.
        for part in parts:
            assert part.source == one.source
            assert torch.equal(part.query_ids.sort().values, one.query_ids.sort().values)
            assert part.doc_sizes == tuple(len(t) - each for t in split)
            assert torch.equal(part.doc_ids, parts[0].doc_ids)
            assert torch.equal(part.query_ids, parts[0].query_ids)
            assert part.target.tolist() == list(range(each))
        if one.source == "pairs":
            want = [text_id(t) for texts in split for t in texts[each:]]
            assert parts[0].doc_ids.tolist() == want
        assert sorted(parts[0].doc_ids.tolist()) == sorted(one.doc_ids.tolist())
    assert sources == {"pairs", "nway"}


def test_construction_errors(make):
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes, got 4"):
        make(rank=0, size=3)
    with pytest.raises(ValueError, match="data: expected at least one source, got none"):
        make([])


def test_layer_dropout(make):
    cfg = config.Depth(layer_dropout=0.4)
    batches = make(batch_size=64, steps=2, negatives=0, depth=cfg)
    last, texts = batches.run.model.num_hidden_layers, 2 * 64
    for number in range(2):
        runs = sum(
            pack.skip_layers[last].plan.sequences if last in pack.skip_layers else len(pack)
            for pack in batches[number].packs
        )
        assert abs(1 - runs / texts - 0.4) <= 3 * (0.4 * 0.6 / texts) ** 0.5


def test_texts_are_cut_to_max_length(make, tables, learnt):
    batches = make(max_length=3)
    assert batches.truncated == [len(table.texts) for table in tables]
    assert make().truncated == [0, 0] and make().names == ["pairs", "nway"]
    for packed in batches[0].packs:
        assert packed.plan.max_seqlen == 3
        ends = packed.cu_seqlens[1:].long() - 1
        assert (packed.ids_T[ends] == learnt.token_to_id(tokenizer.EOS)).all()


# ---- which source ----


def pairs(name, n, **source):
    texts, ids = [name, "b"] * n, np.arange(2 * n) // 2
    return Table(
        name, False, texts, ids, np.arange(0, 2 * n + 1, 2), config.Source(path=name, **source)
    )


def chi_square(order, p):
    """Sum of (drawn - expected)^2 / expected; its mean is the number of sources less one."""
    drawn = np.bincount(order, minlength=len(p))
    assert (drawn[p == 0] == 0).all()
    expected = p[p > 0] * len(order)
    return (((drawn[p > 0] - expected) ** 2) / expected).sum()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sampling_by_alpha(make, alpha):
    sizes = (40, 400, 1000)
    batches = make([pairs(str(n), n) for n in sizes], batch_size=1, steps=3000, source_alpha=alpha)
    weights = np.array(sizes, dtype=float) ** alpha
    assert chi_square(batches.order, weights / weights.sum()) < 13.8  # 2 degrees of freedom: 0.1 %
    for other in {0.0, 0.5, 1.0} - {alpha}:
        wrong = np.array(sizes, dtype=float) ** other
        assert chi_square(batches.order, wrong / wrong.sum()) > 100
    assert batches[0].source == str(sizes[batches.order[0]])


def test_nway_table_counts_half_its_texts(make):
    texts, starts = ["a"] * 3000, np.arange(0, 3001, 30)  # 100 ids of 30 languages
    nway = Table("nway", True, texts, np.arange(3000) // 30, starts)
    batches = make([nway, pairs("p", 500)], batch_size=1, steps=3000, source_alpha=1.0)
    assert chi_square(batches.order, np.array([0.75, 0.25])) < 10.8
    assert steps_of(config.Run(epochs=1.0, batch_size=7), [nway]) == 215  # 1500 / 7


def test_sampling_by_weights(make):
    tables = [pairs("a", 40, weight=3.0), pairs("b", 4000, weight=0.0), pairs("c", 9, weight=1.0)]
    batches = make(tables, batch_size=1, steps=3000, sampling="weights")
    assert chi_square(batches.order, np.array([0.75, 0.0, 0.25])) < 10.8
    with pytest.raises(ValueError, match="sources: expected a weight above 0, got only 0"):
        make(tables[1:2], sampling="weights")


def test_files_share_the_weight_of_their_source(make):
    one = config.Source(path="folder", weight=2.0)
    tables = [dataclasses.replace(pairs(name, n), source=one) for name, n in (("a", 30), ("b", 90))]
    batches = make([*tables, pairs("c", 9)], batch_size=1, steps=3000, sampling="weights")
    assert chi_square(batches.order, np.array([1 / 6, 1 / 2, 1 / 3])) < 13.8


def test_sampling_exhaust(make):
    """Every batch of every source once a round."""
    tables = [pairs(str(n), n) for n in (1, 13, 40)]
    order = make(tables, steps=50, sampling="exhaust").order
    rounds = [order[i : i + 15] for i in range(0, 45, 15)]
    assert all(np.bincount(one).tolist() == [1, 4, 10] for one in rounds)  # ceil(n / 4)
    assert len({tuple(one) for one in rounds}) == 3


@pytest.mark.parametrize("sampling", ["alpha", "weights", "exhaust"])
def test_order_of_a_longer_run(make, sampling):
    tables = [pairs("a", 5), pairs("b", 50), pairs("c", 21)]
    long = make(tables, sampling=sampling, steps=97).order
    assert long.dtype == np.int64 and len(long) == 97
    for steps in (1, 13, 96):
        assert make(tables, sampling=sampling, steps=steps).order.tolist() == long[:steps].tolist()
    assert make(tables, sampling=sampling, steps=97, seed=1).order.tolist() != long.tolist()


@pytest.mark.parametrize(
    ("epochs", "B", "accumulated", "steps"),
    [(1.0, 33, 1, 1), (1.0, 32, 1, 2), (0.5, 4, 2, 3), (3.0, 1, 5, 20)],
)
def test_steps_of_epochs(tables, epochs, B, accumulated, steps):
    """17 pairs and 32 texts of translations: 33 items."""
    run = config.Run(epochs=epochs, batch_size=B, gradient_accumulation_steps=accumulated)
    assert steps_of(run, tables) == steps
    assert steps_of(config.Run(steps=77), tables) == 77


# ---- how many negatives, and which ----


@pytest.mark.parametrize("task, most", [("retrieval", 2), ("bitext", 2), ("sts", 0),
                                        ("clustering", 3), ("classification", 1)])  # fmt: skip
def test_negatives_by_task(make, tables, learnt, task, most):
    loss = config.Loss(num_negatives=2, clustering_negatives=3, classification_negatives=1)
    needed = task in ("clustering", "classification")
    for given in (-1, 0, 1, 3):
        source = config.Source(path="x", num_negatives=given, temperature=0.25)
        table = dataclasses.replace(tables[0], task=task, source=source)
        if needed and given == 0:
            with pytest.raises(ValueError, match=f"x: num_negatives: expected 1 .* {task}, got 0"):
                make([table], loss=loss)
            continue
        batches = make([table], loss=loss)
        for number in range(5):
            batch = batches[number]
            texts = batch_texts(batch, learnt)
            stored = [int(text.split()[1]) % 4 for text in texts[:4]]
            wanted = most if given < 0 else given
            assert len(texts) == 8 + sum(min(n, wanted) for n in stored)
            assert (batch.task, batch.temperature) == (task, 0.25)
    if needed:
        none = dataclasses.replace(loss, clustering_negatives=0, classification_negatives=0)
        with pytest.raises(ValueError, match=f"loss.{task}_negatives: expected 1 or more"):
            make([dataclasses.replace(tables[0], task=task)], loss=none)


def test_scores_of_pairs(make, tables, learnt):
    scores = np.linspace(0, 1, 17, dtype=np.float32)
    batches = make([dataclasses.replace(tables[0], task="sts", scores=scores)])
    for number in range(9):
        rows = [int(text.split()[1]) for text in batch_texts(batches[number], learnt)[:4]]
        assert batches[number].scores.tolist() == scores[rows].tolist()
    assert make()[0].scores is None


@pytest.mark.parametrize("n, K", [(5, 3), (4, 4), (2, 2), (6, 1)])
def test_draws_are_even(n, K):
    """Every ordered choice of K from n is equally frequent: chi-square, against all of them."""
    drawn = draw_distinct(np.full(24_000, n), K, np.random.default_rng(0))
    counts = Counter(map(tuple, drawn.tolist()))
    cells = list(permutations(range(n), K))
    assert set(counts) == set(cells)
    expected = 24_000 / len(cells)
    statistic = sum((counts[cell] - expected) ** 2 / expected for cell in cells)
    assert abs(statistic - (len(cells) - 1)) < 5 * (2 * (len(cells) - 1)) ** 0.5


@pytest.mark.parametrize("K", [0, 1, 3, 9])
def test_draws_of_ragged_counts(K):
    counts = np.array([0, 1, 2, 7, 1000, 3, 0])
    drawn = draw_distinct(counts, K, np.random.default_rng(1))
    assert drawn.shape == (7, K) and drawn.dtype == np.int64
    for row, n in zip(drawn.tolist(), counts.tolist(), strict=True):
        k = min(K, n)
        assert row[k:] == [-1] * (K - k)
        assert len(set(row[:k])) == k and all(0 <= i < n for i in row[:k])
    assert draw_distinct(counts[:0], 2, np.random.default_rng(0)).shape == (0, 2)


# ---- for distillation ----


class Telling(teacher.Teacher):
    """A teacher whose vectors tell the text and, with a prompt, the role."""

    pipeline = "Telling"

    def encode(self, texts, queries=0, progress=False):
        prompted = bool(self.prompt)
        return torch.tensor([tells(t, prompted and i < queries) for i, t in enumerate(texts)])


def tells(text, query):
    return [float(text_id(text) % 997), float(query)]


TAUGHT = config.Distill(teacher="somewhere", features=1.0)
STORED = config.Distill(embeddings="somewhere", features=1.0)


@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2)])
def test_batches_carry_texts_or_teacher_vectors(make, tables, learnt, rank, size, tmp_path):
    """One table is mapped from a file, the other is held in memory."""
    writer = TextWriter(tmp_path / "texts.arrow")
    writer.extend(tables[0].texts)
    tables = [dataclasses.replace(tables[0], texts=writer.close()), tables[1]]
    batches = make(tables, rank, size, distill=TAUGHT)
    for number in range(9):
        assert list(batches[number].texts) == batch_texts(batches[number], learnt)
        assert batches[number].teacher_ND is None
    for prompted in (False, True):
        out = tmp_path / f"{prompted}"
        teacher.store(Telling(None, 2, "ask: " * prompted), tables, out, "fp32")
        stored = teacher.StoredVectors.open(str(out))
        taught = make(tables, rank, size, distill=STORED, vectors=stored)
        for number in range(9):
            batch = taught[number]
            assert batch.texts is None and batch.teacher_ND.dtype == torch.float32
            texts, queries = batch_texts(batch, learnt), 4 // size
            want = [tells(t, prompted and i < queries) for i, t in enumerate(texts)]
            assert batch.teacher_ND.tolist() == want
    assert make()[0].texts is None and make()[0].teacher_ND is None


# ---- ids ----

SCRIPT = (
    "from mlembed.data.tables import text_id;print(text_id('Meer'), text_id('n', '7'), text_id(''))"
)


def test_ids_are_equal_in_every_process():
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONHASHSEED": "77"},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    ids = [int(word) for word in out.split()]
    assert ids == [text_id("Meer"), text_id("n", "7"), text_id("")]
    assert all(0 <= i < 2**63 for i in ids)
    assert text_id("a", "bc") != text_id("ab", "c") != text_id("abc")
    assert len({text_id(str(i)) for i in range(100_000)}) == 100_000
