"""Streams: an endless order that any process restores by reading, after any other reading."""

import multiprocessing
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from mlembed import config
from mlembed.data import sources, streams, tokenizer
from mlembed.data.batches import Batches, steps_of
from mlembed.data.streams import Stream
from mlembed.runtime.distributed import World
from tests.data.samples import batch_texts, equal, jsonl, reports, source

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
ROWS = 43  # a prime: windows of 10 leave 3, batches straddle windows and epochs


def rows_of(n):
    """Pairs of which each fifth shares its positive with the one before, with 0 to 3 negatives."""
    return [
        {
            "query": f"query {i}",
            "positive": f"positive {i - (i % 5 == 4)}",
            "negatives": [f"negative {i} {j}" for j in range(i % 4)],
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("streams") / "some.jsonl", rows_of(ROWS))


def stream(path, seed=0, number=0, window=10):
    return Stream(source(path, streaming=True), seed, number, window=window)


def numbers(items):
    return [int(item.query.split()[1]) for item in items]


def order_by_hand(n, W, count, seed=0, number=0):
    """The order of the module's docstring, with the whole source in memory."""
    order, epoch = [], 0
    while len(order) < count:
        for w in range(-(-n // W)):
            items = list(range(n))[w * W : (w + 1) * W]
            rng = np.random.default_rng([seed, streams.WINDOWS, number, epoch, w])
            order += [items[i] for i in rng.permutation(len(items))]
        epoch += 1
    return order[:count]


# ---- the order ----


@pytest.mark.parametrize("W", [1, 7, 43, 44, 100])
@pytest.mark.parametrize("B", [1, 8, 43, 100])
def test_order(path, W, B):
    some = stream(path, 5, 3, W)
    want = order_by_hand(ROWS, W, 3 * ROWS + 2 * B, seed=5, number=3)
    batches = len(want) // B
    got = [numbers(some.items(k * B, B)[0]) for k in range(batches)]
    assert got == [want[k * B : (k + 1) * B] for k in range(batches)]
    assert some.length == ROWS


def test_any_position_after_any_other(path):
    """Forward past an unknown end, back, and across the end."""
    some = stream(path)
    for begin in (25, 3, 300, 41, 0, 86, 43, 30, 1000, 0):
        items, ids = some.items(begin, 9)
        fresh_items, fresh_ids = stream(path).items(begin, 9)
        assert items == fresh_items and ids.tolist() == fresh_ids.tolist()


def test_memory_and_reads(path):
    """A stream holds the windows of its last batch, and going forward reads nothing twice."""
    some = stream(path)
    for k in range(40):
        some.items(k * 4, 4)
        assert sum(map(len, some.windows.values())) <= 20
    reads = []
    some._read, read = lambda: reads.append(1) or read(), some._read
    for k in range(40, 40 + 3 * ROWS // 4):
        some.items(k * 4, 4)
    assert len(reads) <= 4


@pytest.mark.parametrize("n, got", [(20, "got 20"), (30, "got 30 or more"), (24, "got 24")])
def test_changed_source(tmp_path, n, got):
    some = stream(jsonl(tmp_path / "x.jsonl", rows_of(23)))
    some.items(0, 30)
    jsonl(tmp_path / "x.jsonl", rows_of(n))
    with pytest.raises(ValueError, match=f"expected the 23 items of the first epoch, {got}"):
        for k in range(20):
            some.items(30 + k * 5, 5)


def test_ids_of_linked_texts(path):
    """Ids are equal for texts that pairs of the touched windows link, and only for those."""
    some = stream(path, window=20)
    for begin in (0, 15, 38, 60):
        items, ids = some.items(begin, 12)
        texts = [text for item in items for text in item.texts]
        assert len(texts) == len(ids) and ids.dtype == np.int64
        of_text = dict(zip(texts, ids.tolist(), strict=True))
        assert [of_text[text] for text in texts] == ids.tolist()
        groups = {text: text for text in texts}
        for item in items:
            groups[item.query] = item.positive
        assert len({(groups[t], i) for t, i in of_text.items()}) == len(set(groups.values()))
        assert len(set(of_text.values())) == len(set(groups.values()))


# ---- other processes ----


def first(some, at, queue):
    queue.put(numbers(some.items(at, 10)[0]))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_process_reads_for_itself(tmp_path, start):
    """A forked process shares its parent's file position and must not use it. The file is longer
    than a read-ahead buffer.
    """
    some = stream(jsonl(tmp_path / "long.jsonl", rows_of(3000)), window=100)
    want = order_by_hand(3000, 100, 3100)
    assert numbers(some.items(0, 70)[0]) == want[:70]
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    child = context.Process(target=first, args=(some, 1520, queue))
    child.start()
    assert queue.get(timeout=60) == want[1520:1530]
    child.join()
    assert numbers(some.items(70, 3000)[0]) == want[70:3070]
    assert pickle.loads(pickle.dumps(some)).reader is None and some.process == os.getpid()


# ---- batches ----


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train([f"query positive negative {i}" for i in range(9)], 300)


@pytest.fixture
def make(path, learnt, monkeypatch):
    monkeypatch.setattr(streams, "WINDOW", 10)

    def make(rank=0, size=1, tables=(), fields=None, path=path, held_out=frozenset(), **run):
        run = config.Run(**{"batch_size": 4, "steps": 40} | run)
        some = source(path, streaming=True, **{"rows": ROWS} | (fields or {}))
        where = World(rank, size, CPU)
        return Batches(tables, learnt, run, where, streams=[some], held_out=held_out)

    return make


@pytest.fixture
def tables(tmp_path):
    other = jsonl(tmp_path / "other.jsonl", rows_of(17))
    return [table for table, _ in reports(other)]


def test_batches_follow_the_order(make, learnt):
    batches = make()
    want = order_by_hand(ROWS, 10, 160)
    rows = rows_of(ROWS)
    for number in range(40):
        texts = batch_texts(batches[number], learnt)
        chosen = [rows[i] for i in want[number * 4 : number * 4 + 4]]
        assert sorted(texts[:4]) == sorted(row["query"] for row in chosen)
        assert sorted(texts[8:]) == sorted(text for row in chosen for text in row["negatives"])
        for query, positive in zip(texts[:4], texts[4:8], strict=True):
            assert positive == rows[int(query.split()[1])]["positive"]
        assert batches[number].source == "some"


def test_prompts_and_truncation(make, learnt):
    fields = {"prompt": "ask: ", "document_prompt": "read: "}
    texts = batch_texts(make(fields=fields)[0], learnt)
    assert all(text.startswith("ask: query") for text in texts[:4])
    assert all(text.startswith(("read: positive", "read: negative")) for text in texts[4:])
    for packed in make(max_length=3)[0].packs:
        ends = packed.cu_seqlens[1:].long() - 1
        assert packed.plan.max_seqlen == 3
        assert (packed.ids_T[ends] == learnt.token_to_id(tokenizer.EOS)).all()


@pytest.mark.parametrize("workers, start", [(0, None), (1, "fork"), (4, "fork"), (2, "spawn")])
def test_workers_and_resume(make, tables, workers, start):
    batches = make(tables=tables)
    want = [batches[i] for i in range(40)]
    assert {batch.source for batch in want} == {"some", "other"}
    # A resumed run begins in the midst. (Fresh processes take seconds, so only it has them.)
    for data, begin in ((batches, 0), (make(tables=tables), 23))[start == "spawn" :]:
        assert [stream.window for stream in data.streams] == [10]
        options = {"num_workers": workers, "multiprocessing_context": start}
        got = list(DataLoader(Subset(data, range(begin, 40)), batch_size=None, **options))
        assert len(got) == 40 - begin and all(map(equal, want[begin:], got))


def test_stream_continues_between_batches_of_a_table(make, tables, learnt):
    batches = make(tables=tables)
    of_stream = [batch for batch in (batches[i] for i in range(40)) if batch.source == "some"]
    want = order_by_hand(ROWS, 10, 4 * len(of_stream), number=1)  # the second source
    assert 10 < len(of_stream) < 40
    for k, batch in enumerate(of_stream):
        queries = Counter(batch_texts(batch, learnt)[:4])
        assert queries == Counter(f"query {i}" for i in want[4 * k : 4 * k + 4])


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_ids_of_drawn_texts(make, learnt, negatives):
    batches = make(fields={"num_negatives": negatives})
    for number in range(12):
        batch = batches[number]
        texts = batch_texts(batch, learnt)
        items, ids = Stream(batches.streams[0].source, 0, 0).items(number * 4, 4)
        every = [text for item in items for text in item.texts]
        of_text = dict(zip(every, ids.tolist(), strict=True))
        assert batch.query_ids.tolist() == [of_text[text] for text in texts[:4]]
        assert batch.doc_ids.tolist() == [of_text[text] for text in texts[4:]]
        assert len(texts) == 8 + sum(min(negatives, len(item.negatives)) for item in items)


def test_number_of_rows(make, tables):
    """Epochs and sampling by size or by exhaustion need `rows`."""
    for sampling in ("alpha", "exhaust"):
        with pytest.raises(ValueError, match=r"some.jsonl: rows: expected .* got 0"):
            make(tables=tables, fields={"rows": 0}, sampling=sampling)
    make(tables=tables, fields={"rows": 0}, sampling="weights")
    run = config.Run(epochs=2.0, batch_size=4, gradient_accumulation_steps=2)
    assert steps_of(run, tables, [source("x.jsonl", rows=43)]) == 15  # 2 (17 + 43) / 8
    with pytest.raises(ValueError, match="x.jsonl: rows: expected .* for epochs"):
        steps_of(run, tables, [source("x.jsonl")])


def test_bad_rows(make, tmp_path):
    path = jsonl(tmp_path / "bad.jsonl", [*rows_of(12), {"query": "", "positive": "x"}])
    fields = {"path": path, "fields": {"rows": 12}, "steps": 9}
    assert len(make(**fields, bad_rows="skip")[4].query_ids) == 4
    batches = make(**fields)
    assert len(batches[0].query_ids) == 4
    with pytest.raises(ValueError, match="bad.jsonl:13: query: expected text, got ''"):
        batches[2]


def test_held_out_texts(make, learnt):
    batches = make(steps=20, held_out={"query 7", "positive 20"})
    drawn = {text for i in range(20) for text in batch_texts(batches[i], learnt)}
    assert not drawn & {"query 7", "positive 7", "query 20"}
    assert "query 8" in drawn and batches.streams[0].length == ROWS - 2


def test_name_and_task(tmp_path):
    assert streams.name_of(source("a/b.c.jsonl")) == "b.c"
    assert streams.name_of(source("org/set-v1.5", subset="de")) == "set-v1.5-de"
    assert streams.name_of(source("a/b.jsonl", name="own")) == "own"
    for code in ("de", "fr"):
        (tmp_path / f"talks.{code}").write_text("eins\nzwei\n", encoding="utf-8")
    assert sources.task_of(source(tmp_path / "talks")) == "bitext"
    path = jsonl(tmp_path / "b.jsonl", [{"query": "q", "positive": "p", "score": 1}])
    assert sources.task_of(source(path)) == "retrieval"
    assert sources.task_of(source(path, task="sts")) == "sts"
    typed = {"query": "q", "pos": ["p"], "neg": ["n"], "type": "symmetric_class"}
    path = jsonl(tmp_path / "c.jsonl", [typed])
    stream = streams.Stream(source(path, rows=7), 0, 0)
    assert stream.task == "classification"
    line = "streamed, 7 rows as declared, classification; query=query positive=pos negatives=neg"
    assert sources.describe_stream(source(path, rows=7)) == f"{line} type=type; unused: none"


def test_rows_are_counted_once(tmp_path, capfd):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(5)] + [
        {"query": "", "positive": 3}
    ]
    stream = streams.Stream(source(jsonl(tmp_path / "s.jsonl", rows)), 0, 0, "skip")
    for batch in range(4):
        stream.items(3 * batch, 3)
    said = capfd.readouterr().err
    assert said == "stream s: 6 rows read, 5 pairs; left out: 1 bad rows\n"
