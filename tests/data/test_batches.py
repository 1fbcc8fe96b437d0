"""Batches of tables: an order that is a function of the seed, which any process can draw."""

import dataclasses
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


# ---- lengths ----


def row_tokens(batch):
    """Return the tokens of every text, queries first."""
    parts = [part for pack in batch.packs for part in texts_of(pack)]
    return [parts[place] for place in batch.place.tolist()]


def texts_of(pack):
    bounds = pack.plan.cu_seqlens.tolist()
    return [pack.ids_T[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


@pytest.mark.parametrize("size", [1, 2])
def test_queries_are_cut_shorter_than_documents(make, tables, learnt, size):
    """To the tokens that the tokenizer itself cuts them to, of either kind of table."""
    cut = [make(rank=rank, size=size, query_max_length=3) for rank in range(size)]
    whole = [make(rank=rank, size=size) for rank in range(size)]
    seen = 0
    for number in range(20):
        for one, other in zip(cut, whole, strict=True):
            short, long = one[number], other[number]
            assert short.rows.tolist() == long.rows.tolist()
            count = len(short.target)
            got, want = row_tokens(short), row_tokens(long)
            assert got[count:] == want[count:]
            table = tables[int(one.order[number])]
            texts = [table.texts[row] for row in short.rows.tolist()[:count]]
            assert got[:count] == [ids.tolist() for ids in tokenizer.tokenize(learnt, texts, 3)]
            seen += sum(len(ids) == 3 for ids in got[:count])
    assert seen > 40
    pairs = tables[0]
    queries = [pairs.texts[row] for row in pairs.starts[:-1]]
    lengths = [len(ids) for ids in tokenizer.tokenize(learnt, queries, 64)]
    assert cut[0].short == [sum(n > 3 for n in lengths), 0] and whole[0].short == [0, 0]


@pytest.mark.parametrize("length", [1, 65])
def test_length_of_queries_out_of_range(make, length):
    with pytest.raises(ValueError, match="query_max_length: expected 0, or 2 to max_length 64"):
        make(query_max_length=length)


# ---- which batches ----


def test_batch_depends_on_its_number_and_seed(make):
    """Not on the batches drawn before, nor on the length of the run."""
    a, b, long = make(), make(), make(steps=30, gradient_accumulation_steps=2)
    assert len(a) == 40 and len(long) == 60
    forward = [a[i] for i in range(40)]
    backward = [b[i] for i in reversed(range(40))][::-1]
    assert all(map(equal, forward, backward))
    assert all(equal(long[i], forward[i]) for i in (33, 7, 33))
    other = make(seed=1)
    assert not all(equal(forward[i], other[i]) for i in range(5))


@pytest.mark.parametrize("batch_size", [1, 4, 17, 40])
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(2)], ids=["pairs", "nway", "2"])
def test_epochs_are_permutations(make, tables, learnt, which, batch_size):
    """Also if batches of another source come between theirs."""
    batches = make(tables[which], batch_size=batch_size, steps=120 // batch_size + 8)
    drawn = {table.name: [] for table in tables[which]}
    for number in range(len(batches)):
        queries = batch_texts(batches[number], learnt)[:batch_size]
        drawn[batches[number].source] += [int(text.split()[1]) for text in queries]
    for table in tables[which]:
        rows, n = drawn[table.name], len(table)
        epochs = [tuple(rows[i : i + n]) for i in range(0, len(rows) - n + 1, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs) >= 3


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
    texts, ids, starts = [name, "b"] * n, np.arange(2 * n) // 2, np.arange(0, 2 * n + 1, 2)
    return Table(name, False, texts, ids, starts, config.Source(**{"path": name} | source))


SIZES = [pairs("40", 40), pairs("400", 400), pairs("1000", 1000)]
# 100 ids of 30 languages.
NWAY = Table("nway", True, ["a"] * 3000, np.arange(3000) // 30, np.arange(0, 3001, 30))
WEIGHED = [pairs("a", 40, weight=3.0), pairs("b", 4000, weight=0.0), pairs("c", 9)]
# Two files of one source of weight 2, and another source of weight 1.
FILES = [pairs(name, n, path="folder", weight=2.0) for name, n in (("a", 30), ("b", 90))]


@pytest.mark.parametrize(
    "mixed, fields, shares",
    [
        pytest.param(SIZES, {"source_alpha": 0.0}, [1, 1, 1], id="alpha 0"),
        pytest.param(SIZES, {"source_alpha": 0.5}, [2, 40**0.5, 10], id="alpha 0.5"),
        pytest.param(SIZES, {"source_alpha": 1.0}, [2, 20, 50], id="alpha 1"),
        # An n-way table counts half its texts.
        pytest.param([NWAY, pairs("p", 500)], {"source_alpha": 1.0}, [3, 1], id="nway"),
        pytest.param(WEIGHED, {"sampling": "weights"}, [3, 0, 1], id="weights"),
        pytest.param([*FILES, pairs("c", 9)], {"sampling": "weights"}, [1, 3, 2], id="files"),
    ],
)
def test_sampling(make, mixed, fields, shares):
    """A chi-square test: 0.1 % of right orders fail it by chance, and wrong ones are far away."""
    batches = make(mixed, batch_size=1, steps=3000, **fields)
    drawn = np.bincount(batches.order, minlength=len(mixed))
    expected = 3000 * np.array(shares) / sum(shares)
    some = expected > 0
    statistic = ((drawn - expected)[some] ** 2 / expected[some]).sum()
    assert (drawn[~some] == 0).all() and statistic < {2: 10.8, 3: 13.8}[some.sum()]
    assert batches[0].source == mixed[batches.order[0]].name


def test_tokens_are_counted_as_they_are_drawn(make, learnt):
    """A large source of weight 1 counts a third of a small one of weight 3; one of 0 not at all."""
    batches = make(WEIGHED, batch_size=1, steps=3000, sampling="weights")
    counts = batches.token_counts(300)
    a, b, c = (learnt.encode(name).ids[0] for name in "abc")
    everything = 2 * 2 * (40 + 4000 + 9)  # Each item is two texts of a letter and EOS.
    assert counts.sum() == pytest.approx(everything)
    # The texts are the name of the source and b, so the letter b is half of the letters.
    assert counts[b] == pytest.approx(everything / 4)
    assert 2.5 < counts[a] / counts[c] < 3.5
    batches.order[:] = len(WEIGHED)  # A stream gives all batches.
    assert not batches.token_counts(300).any()


def test_sampling_without_a_weight(make):
    with pytest.raises(ValueError, match="sources: expected a weight above 0, got only 0"):
        make(WEIGHED[1:2], sampling="weights")


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


def test_ids_of_texts():
    """They are the same in every process, so these numbers stay."""
    assert text_id("Meer") == 4418219060739749500
    assert text_id("n", "7") == 8097823846689690154
    assert text_id("a", "bc") != text_id("ab", "c") != text_id("abc")
    ids = {text_id(str(i)) for i in range(100_000)}
    assert len(ids) == 100_000 and min(ids) >= 0 and max(ids) < 2**63
