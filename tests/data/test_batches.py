"""Tables to batches: an order that is a function of the seed, which any process can draw alone."""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from mlembed import config
from mlembed.data import tokenizer
from mlembed.data.batches import Batches, some_of, steps_of
from mlembed.data.tables import Table, text_id
from mlembed.runtime.cache import Writer
from mlembed.runtime.distributed import World
from mlembed.training.objective import teacher

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")


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


def texts_of(batch, learnt):
    """Queries, positives, negatives; in a pack itself the shortest come first."""
    for packed in batch.packs:
        bounds = packed.cu_seqlens
        assert torch.equal(bounds.diff(), bounds.diff().sort().values)
    return each_text(batch, learnt)


def each_text(batch, learnt):
    texts = []
    for packed in batch.packs:
        bounds = packed.cu_seqlens.tolist()
        texts += [
            learnt.decode(packed.ids_T[begin:end].tolist())
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
        ]
    assert sorted(batch.place.tolist()) == list(range(len(texts)))
    return [texts[i] for i in batch.place]


def same(a, b):
    """Field by field, whatever fields a batch has."""
    return all(
        len(a.packs) == len(b.packs) and all(map(same_pack, a.packs, b.packs))
        if field.name == "packs"
        else same_value(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(a)
    )


def same_value(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


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


@pytest.mark.parametrize("workers, start", [(0, None), (1, "fork"), (4, "fork"), (2, "spawn")])
def test_workers_and_resume_give_the_same_batches(make, workers, start):
    """In whichever way worker processes start: forked, or fresh ones that unpickle the data set."""
    batches = make()
    want = [batches[i] for i in range(len(batches))]
    # What a resumed run has begins in the midst. (Fresh processes take seconds: for one of them.)
    for own, begin in ((batches, 0), (make(), 17))[start == "spawn" :]:
        loader = DataLoader(
            Subset(own, range(begin, 40)),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=start,
        )
        got = list(loader)
        assert len(got) == 40 - begin
        assert all(same(a, b) for a, b in zip(want[begin:], got, strict=True))


def test_same_sees_every_field(make):
    batch = make()[0]
    assert same(batch, pickle.loads(pickle.dumps(batch)))
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        other = value + 1 if isinstance(value, torch.Tensor) and value.numel() else None
        if field.name == "packs":
            other = value[1:]
        if field.name == "has_negatives":
            other = ~value
        if other is None:
            other = "other" if value is None or isinstance(value, str) else 7
        if field.name != "negatives" or value.numel():
            assert not same(batch, dataclasses.replace(batch, **{field.name: other})), field.name


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


def test_layer_dropout_of_batches(make):
    cfg = config.Depth(layer_dropout=0.4)
    batches = make(batch_size=64, steps=2, negatives=0, depth=cfg)
    last, texts = batches.run.model.num_hidden_layers, 2 * 64
    for number in range(2):
        runs = sum(
            pack.kept[last].plan.sequences if last in pack.kept else len(pack)
            for pack in batches[number].packs
        )
        assert abs(1 - runs / texts - 0.4) <= 3 * (0.4 * 0.6 / texts) ** 0.5


# ---- which source ----


def pairs(name, n, **source):
    texts, ids = [name, "b"] * n, np.arange(2 * n) // 2
    own = config.Source(path=name, **source)
    return Table(name, False, texts, ids, np.arange(0, 2 * n + 1, 2), own)


def chi_square(order, p):
    """Sum of (drawn - expected)^2 / expected; its mean is the number of sources less one."""
    drawn = np.bincount(order, minlength=len(p))
    assert (drawn[p == 0] == 0).all()
    expected = p[p > 0] * len(order)
    return (((drawn[p > 0] - expected) ** 2) / expected).sum()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sources_are_drawn_by_size_to_the_alpha(make, alpha):
    sizes = (40, 400, 1000)
    batches = make([pairs(str(n), n) for n in sizes], batch_size=1, steps=3000, source_alpha=alpha)
    weights = np.array(sizes, dtype=float) ** alpha
    p = weights / weights.sum()
    assert chi_square(batches.order, p) < 13.8  # of two degrees of freedom: 0.1 %
    for other in {0.0, 0.5, 1.0} - {alpha}:
        wrong = np.array(sizes, dtype=float) ** other
        assert chi_square(batches.order, wrong / wrong.sum()) > 100
    assert batches[0].source == str(sizes[batches.order[0]])


def test_an_nway_table_counts_half_its_texts(make):
    texts, starts = ["a"] * 3000, np.arange(0, 3001, 30)  # 100 ids of 30 languages
    nway = Table("nway", True, texts, np.arange(3000) // 30, starts)
    batches = make([nway, pairs("p", 500)], batch_size=1, steps=3000, source_alpha=1.0)
    assert chi_square(batches.order, np.array([0.75, 0.25])) < 10.8
    assert steps_of(config.Run(epochs=1.0, batch_size=7), [nway]) == 215  # 1500 / 7


def test_sources_are_drawn_by_their_weights(make):
    tables = [pairs("a", 40, weight=3.0), pairs("b", 4000, weight=0.0), pairs("c", 9, weight=1.0)]
    batches = make(tables, batch_size=1, steps=3000, sampling="weights")
    assert chi_square(batches.order, np.array([0.75, 0.0, 0.25])) < 10.8
    with pytest.raises(ValueError, match="sources: expected weights .* got all 0"):
        make(tables[1:2], sampling="weights")


def test_files_of_one_source_share_its_weight(make):
    one = config.Source(path="folder", weight=2.0)
    tables = [
        dataclasses.replace(pairs("a", 30), source=one),
        dataclasses.replace(pairs("b", 90), source=one),
        pairs("c", 9, weight=1.0),
    ]
    batches = make(tables, batch_size=1, steps=3000, sampling="weights")
    assert chi_square(batches.order, np.array([1 / 6, 1 / 2, 1 / 3])) < 13.8


def test_exhaust_uses_every_batch_once_a_round(make):
    sizes, B = (1, 13, 40), 4
    tables = [pairs(str(n), n) for n in sizes]
    per_round = [1, 4, 10]  # ceil(n / B)
    batches = make(tables, batch_size=B, steps=50, sampling="exhaust")
    rounds = [batches.order[i : i + 15] for i in range(0, 45, 15)]
    assert all(np.bincount(order).tolist() == per_round for order in rounds)
    assert len({tuple(order) for order in rounds}) == 3
    assert batches.order[45:].tolist() == make(tables, batch_size=B, steps=60, sampling="exhaust",
        ).order[45:50].tolist()  # fmt: skip


@pytest.mark.parametrize("sampling", ["alpha", "weights", "exhaust"])
def test_the_order_of_a_longer_run_begins_with_that_of_a_shorter(make, sampling):
    tables = [pairs("a", 5), pairs("b", 50), pairs("c", 21)]
    long = make(tables, sampling=sampling, steps=97).order
    assert long.dtype == np.int64 and len(long) == 97
    for steps in (1, 13, 96):
        assert make(tables, sampling=sampling, steps=steps).order.tolist() == long[:steps].tolist()
    assert make(tables, sampling=sampling, steps=97, seed=1).order.tolist() != long.tolist()


def test_epochs_are_as_many_items_as_there_are(tables):
    """17 pairs and 32 texts of translations: 33 items."""
    for epochs, B, more, want in (
        (1.0, 33, 1, 1),
        (1.0, 32, 1, 2),
        (0.5, 4, 2, 3),
        (3.0, 1, 5, 20),
    ):
        run = config.Run(epochs=epochs, batch_size=B, gradient_accumulation_steps=more)
        assert steps_of(run, tables) == want
    assert steps_of(config.Run(steps=77), tables) == 77


def test_no_sources_is_an_error(make):
    with pytest.raises(ValueError, match="data: expected at least one source, got none"):
        make([])


# ---- how many negatives, and which ----


@pytest.mark.parametrize("task, most", [("retrieval", 2), ("bitext", 2), ("sts", 0),
                                        ("clustering", 3), ("classification", 1)])  # fmt: skip
def test_tasks_have_numbers_of_negatives(make, tables, learnt, task, most):
    loss = config.Loss(num_negatives=2, clustering_negatives=3, classification_negatives=1)
    for own in (-1, 0, 1, 3):
        source = config.Source(path="x", num_negatives=own, temperature=0.25)
        table = dataclasses.replace(tables[0], task=task, source=source)
        if task in ("clustering", "classification") and own == 0:
            with pytest.raises(ValueError, match=f"x: num_negatives: expected 1 .* {task}, got 0"):
                make([table], loss=loss)
            continue
        batches = make([table], loss=loss)
        for number in range(5):
            batch = batches[number]
            texts = texts_of(batch, learnt)
            stored = [int(text.split()[1]) % 4 for text in texts[:4]]
            wanted = most if own < 0 else own
            assert len(texts) == 8 + sum(min(n, wanted) for n in stored)
            assert (batch.task, batch.temperature) == (task, 0.25)
    none = dataclasses.replace(loss, clustering_negatives=0, classification_negatives=0)
    if task in ("clustering", "classification"):
        with pytest.raises(ValueError, match=f"loss.{task}_negatives: expected 1 or more"):
            make([dataclasses.replace(tables[0], task=task)], loss=none)


def test_scores_are_their_pairs(make, tables, learnt):
    scores = np.linspace(0, 1, 17, dtype=np.float32)
    batches = make([dataclasses.replace(tables[0], task="sts", scores=scores)])
    for number in range(9):
        batch = batches[number]
        rows = [int(text.split()[1]) for text in texts_of(batch, learnt)[:4]]
        assert batch.scores.tolist() == scores[rows].tolist()
    assert make()[0].scores is None


def test_draws_are_even_and_have_no_repetition():
    """Every ordered choice of k from n as often as any other: chi-square, against all of them."""
    rng = np.random.default_rng(0)
    for n, K in ((5, 3), (4, 4), (2, 2), (6, 1)):
        drawn = some_of(np.full(24_000, n), K, rng)
        found = Counter(map(tuple, drawn.tolist()))
        cells = list(permutations(range(n), K))
        assert set(found) == set(cells)
        expected = 24_000 / len(cells)
        statistic = sum((found[cell] - expected) ** 2 / expected for cell in cells)
        spread = (2 * (len(cells) - 1)) ** 0.5
        assert abs(statistic - (len(cells) - 1)) < 5 * spread, (n, K)


def test_draws_of_ragged_counts():
    counts = np.array([0, 1, 2, 7, 1000, 3, 0])
    for K in (0, 1, 3, 9):
        drawn = some_of(counts, K, np.random.default_rng(1))
        assert drawn.shape == (7, K) and drawn.dtype == np.int64
        for row, n in zip(drawn.tolist(), counts.tolist(), strict=True):
            k = min(K, n)
            assert row[k:] == [-1] * (K - k)
            assert len(set(row[:k])) == k and all(0 <= i < n for i in row[:k])
    assert some_of(np.zeros(0, dtype=np.int64), 2, np.random.default_rng(0)).shape == (0, 2)
    pairs = Counter(map(tuple, np.sort(some_of(np.full(900, 4), 2, np.random.default_rng(2)))))
    assert set(pairs) == set(combinations(range(4), 2))


# ---- for distillation ----


class Telling(teacher.Teacher):
    """Its vectors tell the text and, where it has a prompt, the role."""

    pipeline = "Telling"

    def encode(self, texts, queries=0, progress=False):
        prompted = bool(self.prompt)
        return torch.tensor([tells(t, prompted and i < queries) for i, t in enumerate(texts)])


def tells(text, query):
    return [float(text_id(text) % 997), float(query)]


TAUGHT = config.Distill(teacher="somewhere", features=1.0)
STORED = config.Distill(embeddings="somewhere", features=1.0)


@pytest.mark.parametrize("mapped", [False, True])
def test_batches_carry_the_texts_of_their_rows(make, tables, learnt, mapped, tmp_path):
    if mapped:
        own = []
        for table in tables:
            writer = Writer(tmp_path / f"{table.name}.arrow")
            writer.extend(table.texts)
            own.append(dataclasses.replace(table, texts=writer.close()))
        tables = own
    for rank, size in ((0, 1), (1, 2)):
        batches = make(tables, rank, size, distill=TAUGHT)
        for number in range(9):
            batch = batches[number]
            assert list(batch.texts) == texts_of(batch, learnt)
            assert batch.teacher_ND is None
        for prompted in (False, True):
            out = tmp_path / f"{rank} {prompted}"
            teacher.store(Telling(None, 2, "ask: " * prompted, 1), tables, out, "fp32")
            vectors = teacher.Stored.open(str(out))
            taught = make(tables, rank, size, distill=STORED, vectors=vectors)
            for number in range(9):
                batch = taught[number]
                assert batch.texts is None and batch.teacher_ND.dtype == torch.float32
                texts, queries = texts_of(batch, learnt), 4 // size
                want = [tells(t, prompted and i < queries) for i, t in enumerate(texts)]
                assert batch.teacher_ND.tolist() == want
    assert make()[0].texts is None and make()[0].teacher_ND is None


# ---- tokens ----


def test_texts_are_cut_to_max_length(make, tables, learnt):
    batches = make(max_length=3)
    assert batches.truncated == [len(table.texts) for table in tables]
    assert make().truncated == [0, 0] and make().names == ["pairs", "nway"]
    for packed in batches[0].packs:
        assert packed.plan.max_seqlen == 3
        ends = packed.cu_seqlens[1:].long() - 1
        assert (packed.ids_T[ends] == learnt.token_to_id(tokenizer.EOS)).all()


# ---- ids ----

SCRIPT = (
    "from mlembed.data.tables import text_id;print(text_id('Meer'), text_id('n', '7'), text_id(''))"
)


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
