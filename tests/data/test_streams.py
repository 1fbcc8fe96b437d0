"""Streams: an endless order that any process finds by reading, whatever it has read before."""

import json
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
from tests.data.test_batches import each_text, same

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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("streams") / "some.jsonl", rows_of(ROWS))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(streams, "WINDOW", 10)


def source_of(path, **fields):
    return config.Source(path=path, streaming=True, **fields)


def numbers(items):
    return [int(item.query.split()[1]) for item in items]


def order_by_hand(n, W, count, seed=0, number=0):
    """Written down as the module's docstring says it, with the whole source in memory."""
    order, epoch = [], 0
    while len(order) < count:
        for w in range(-(-n // W)):
            own = list(range(n))[w * W : (w + 1) * W]
            rng = np.random.default_rng([seed, streams.WINDOWS, number, epoch, w])
            order += [own[i] for i in rng.permutation(len(own))]
        epoch += 1
    return order[:count]


# ---- the order ----


@pytest.mark.parametrize("W", [1, 7, 43, 44, 100])
@pytest.mark.parametrize("B", [1, 8, 43, 100])
def test_the_order_is_what_the_docstring_says(path, W, B):
    stream = Stream(source_of(path), 5, 3, window=W)
    want = order_by_hand(ROWS, W, 3 * ROWS + 2 * B, seed=5, number=3)
    batches = len(want) // B
    got = [numbers(stream.items(k * B, B)[0]) for k in range(batches)]
    assert got == [want[k * B : (k + 1) * B] for k in range(batches)]
    assert stream.length == ROWS


def test_each_epoch_is_every_item_once_and_windows_stay_near(path):
    stream = Stream(source_of(path), 0, 0, window=10)
    drawn = numbers(stream.items(0, 4 * ROWS)[0])
    epochs = [drawn[i : i + ROWS] for i in range(0, 4 * ROWS, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(i // 10 == place // 10 for place, i in enumerate(epochs[0]))


def test_seeds_and_sources_have_orders_of_their_own(path):
    orders = {
        tuple(numbers(Stream(source_of(path), seed, number, window=ROWS).items(0, ROWS)[0]))
        for seed in (0, 1)
        for number in (0, 1)
    }
    assert len(orders) == 4


def test_any_position_after_any_other(path):
    """Forward past an unknown end, back, across it: as if it were the first that is asked for."""
    stream = Stream(source_of(path), 0, 0, window=10)
    for begin in (25, 3, 300, 41, 0, 86, 43, 30, 1000, 0):
        alone = Stream(source_of(path), 0, 0, window=10)
        items, ids = stream.items(begin, 9)
        other, other_ids = alone.items(begin, 9)
        assert items == other and ids.tolist() == other_ids.tolist()


def test_an_end_that_is_a_windows_end(tmp_path):
    for n in (1, 10, 20):
        path = write(tmp_path / "x.jsonl", rows_of(n))
        for begin in (0, n - 1, n, 5 * n):
            stream = Stream(source_of(path), 0, 0, window=10)
            assert numbers(stream.items(begin, 7)[0]) == order_by_hand(n, 10, begin + 7)[begin:]


def test_what_is_held_is_what_the_last_batch_touched(path):
    stream = Stream(source_of(path), 0, 0, window=10)
    for k in range(40):
        stream.items(k * 4, 4)
        assert sum(map(len, stream.windows.values())) <= 20
    reads = []
    stream._read, read = lambda: reads.append(1) or read(), stream._read
    for k in range(40, 40 + 3 * ROWS // 4):
        stream.items(k * 4, 4)
    assert len(reads) <= 4  # once an epoch: nothing is read twice going forward


def test_a_source_that_changes_is_an_error(tmp_path):
    for n, said in ((20, "got 20"), (30, "got 30 or more"), (24, "got 24")):
        path = write(tmp_path / "x.jsonl", rows_of(23))
        stream = Stream(source_of(path), 0, 0, window=10)
        stream.items(0, 30)
        write(tmp_path / "x.jsonl", rows_of(n))
        with pytest.raises(ValueError, match=f"expected the 23 items .* first epoch, {said}"):
            for k in range(20):
                stream.items(30 + k * 5, 5)


# ---- ids ----


def test_ids_are_equal_where_pairs_link(path):
    """In all windows that a batch touches; otherwise as many ids as texts."""
    stream = Stream(source_of(path), 0, 0, window=20)
    for begin in (0, 15, 38, 60):
        items, ids = stream.items(begin, 12)
        of_text = {}
        at = iter(ids.tolist())
        for item in items:
            own = [(text, next(at)) for text in (item.query, item.positive, *item.negatives)]
            assert own[0][1] == own[1][1]
            for text, i in own:
                assert of_text.setdefault(text, i) == i
        assert next(at, None) is None and ids.dtype == np.int64
        groups = {text: text.split()[1] for text in of_text if text.startswith("positive")}
        for item in items:
            groups[item.query] = item.positive.split()[1]
        groups |= {text: text for text in of_text if text.startswith("negative")}
        assert len({(groups[t], i) for t, i in of_text.items()}) == len(set(groups.values()))
        assert len(set(of_text.values())) == len(set(groups.values()))


# ---- other processes ----


def first(stream, at, queue):
    queue.put(numbers(stream.items(at, 10)[0]))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_process_of_its_own_reads_for_itself(tmp_path, start):
    """A forked one shares the open file's position with its parent: both must not use it. (The
    file is longer than what is read of it at once.)"""
    path = write(tmp_path / "long.jsonl", rows_of(3000))
    stream = Stream(source_of(path), 0, 0, window=100)
    want = order_by_hand(3000, 100, 3100)
    assert numbers(stream.items(0, 70)[0]) == want[:70]
    there = multiprocessing.get_context(start)
    queue = there.Queue()
    child = there.Process(target=first, args=(stream, 1520, queue))
    child.start()
    assert queue.get(timeout=60) == want[1520:1530]
    child.join()
    assert numbers(stream.items(70, 3000)[0]) == want[70:3070]
    assert pickle.loads(pickle.dumps(stream)).reader is None and stream.process == os.getpid()


# ---- batches ----


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train(
        [f"{row['query']} {row['positive']} negative" for row in rows_of(9)], 300
    )


@pytest.fixture
def make(path, learnt, small):
    def make(rank=0, size=1, tables=(), fields=None, **run):
        run = config.Run(**{"batch_size": 4, "steps": 40} | run)
        source = source_of(path, **{"rows": ROWS} | (fields or {}))
        return Batches(tables, learnt, run, World(rank, size, CPU), streams=[source])

    return make


def test_batches_are_the_order_in_parts_of_the_batch_size(make, learnt):
    batches = make()
    want = order_by_hand(ROWS, 10, 160)
    for number in range(40):
        texts = each_text(batches[number], learnt)
        rows = want[number * 4 : number * 4 + 4]
        by = {i: rows_of(ROWS)[i] for i in rows}
        assert sorted(texts[:4]) == sorted(by[i]["query"] for i in rows)
        negatives = [text for i in rows for text in by[i]["negatives"]]
        assert sorted(texts[8:]) == sorted(negatives)
        for query, positive in zip(texts[:4], texts[4:8], strict=True):
            assert positive == by[int(query.split()[1])]["positive"]
        assert batches[number].source == "some"


def test_tokens_are_cut_and_have_prompts(make, learnt):
    fields = {"prompt": "ask: ", "document_prompt": "read: "}
    texts = each_text(make(fields=fields)[0], learnt)
    assert all(text.startswith("ask: query") for text in texts[:4])
    assert all(text.startswith(("read: positive", "read: negative")) for text in texts[4:])
    for packed in make(max_length=3)[0].packs:
        ends = packed.cu_seqlens[1:].long() - 1
        assert packed.plan.max_seqlen == 3
        assert (packed.ids_T[ends] == learnt.token_to_id(tokenizer.EOS)).all()


@pytest.fixture
def tables(tmp_path):
    other = write(tmp_path / "other.jsonl", rows_of(17))
    return [table for table, _ in sources.read(sources.of(other))]


@pytest.mark.parametrize("workers, start", [(0, None), (1, "fork"), (4, "fork"), (2, "spawn")])
def test_workers_and_resume_give_the_same_batches(make, tables, workers, start):
    batches = make(tables=tables)
    want = [batches[i] for i in range(40)]
    assert {batch.source for batch in want} == {"some", "other"}
    fresh = make(tables=tables)  # what a resumed run has: it goes on in the midst
    # Fresh processes take seconds to start: for one of the two.
    for data, begin in ((batches, 0), (fresh, 23))[start == "spawn" :]:
        for stream in data.streams:
            assert stream.window == 10
        loader = DataLoader(
            Subset(data, range(begin, 40)),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=start,
        )
        got = list(loader)
        assert len(got) == 40 - begin
        assert all(same(a, b) for a, b in zip(want[begin:], got, strict=True))


def test_batches_of_a_stream_go_on_between_those_of_a_table(make, tables, learnt):
    batches = make(tables=tables)
    own = [batch for batch in (batches[i] for i in range(40)) if batch.source == "some"]
    drawn = [each_text(batch, learnt)[:4] for batch in own]
    want = order_by_hand(ROWS, 10, 4 * len(own), number=1)  # the second source
    assert 10 < len(own) < 40
    for k, queries in enumerate(drawn):
        assert Counter(queries) == Counter(f"query {i}" for i in want[4 * k : 4 * k + 4])


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_ids_are_those_of_the_texts_that_are_drawn(make, learnt, negatives):
    batches = make(fields={"num_negatives": negatives})
    for number in range(12):
        batch = batches[number]
        texts = each_text(batch, learnt)
        items, ids = Stream(batches.streams[0].source, 0, 0).items(number * 4, 4)
        every = [t for item in items for t in (item.query, item.positive, *item.negatives)]
        of_text = dict(zip(every, ids.tolist(), strict=True))
        assert batch.query_ids.tolist() == [of_text[text] for text in texts[:4]]
        assert batch.doc_ids.tolist() == [of_text[text] for text in texts[4:]]
        assert len(texts) == 8 + sum(min(negatives, len(item.negatives)) for item in items)


@pytest.mark.parametrize("size", [2, 4])
def test_shares_together_are_the_single_process_batch(make, tables, learnt, size):
    whole = make(tables=tables)
    shares = [make(rank, size, tables) for rank in range(size)]
    each = 4 // size
    for number in range(12):
        texts = each_text(whole[number], learnt)
        parts = [batches[number] for batches in shares]
        split = [each_text(part, learnt) for part in parts]
        assert Counter(sum((t[:each] for t in split), [])) == Counter(texts[:4])
        assert Counter(sum((t[each:] for t in split), [])) == Counter(texts[4:])
        assert all(torch.equal(part.doc_ids, parts[0].doc_ids) for part in parts)
        assert sorted(parts[0].doc_ids.tolist()) == sorted(whole[number].doc_ids.tolist())


def test_rows_are_asked_for_where_they_count(make, tables):
    for fields in ({"sampling": "alpha"}, {"sampling": "exhaust"}):
        with pytest.raises(ValueError, match=r"some.jsonl: rows: expected how many .* got 0"):
            make(tables=tables, fields={"rows": 0}, **fields)
    make(tables=tables, fields={"rows": 0}, sampling="weights")
    run = config.Run(epochs=2.0, batch_size=4, gradient_accumulation_steps=2)
    assert steps_of(run, tables, [source_of("x.jsonl", rows=43)]) == 15  # 2 (17 + 43) / 8
    with pytest.raises(ValueError, match="x.jsonl: rows: expected how many .* for epochs"):
        steps_of(run, tables, [source_of("x.jsonl")])


def test_bad_rows_are_errors_when_they_are_read(tmp_path, learnt, small):
    path = write(tmp_path / "bad.jsonl", [*rows_of(12), {"query": "", "positive": "x"}])
    for policy in ("error", "skip"):
        run = config.Run(batch_size=4, steps=9, bad_rows=policy)
        source = source_of(path, rows=12)
        batches = Batches([], learnt, run, World(0, 1, CPU), streams=[source])
        assert len(batches[0].query_ids) == 4
        if policy == "skip":
            assert len(batches[4].query_ids) == 4
            continue
        with pytest.raises(ValueError, match="bad.jsonl:13: query: expected text, got ''"):
            batches[2]


def test_held_out_texts_are_left_out(path, learnt, small):
    run = config.Run(batch_size=4, steps=20)
    batches = Batches(
        [], learnt, run, World(0, 1, CPU), streams=[source_of(path, rows=ROWS)],
        held_out={"query 7", "positive 20"},
    )  # fmt: skip
    drawn = {text for i in range(20) for text in each_text(batches[i], learnt)}
    assert not drawn & {"query 7", "positive 7", "query 20"}
    assert "query 8" in drawn and batches.streams[0].length == ROWS - 2


def test_a_stream_has_a_name_and_a_task(tmp_path):
    assert streams.name_of(source_of("a/b.c.jsonl")) == "b.c"
    assert streams.name_of(source_of("org/set-v1.5", subset="de")) == "set-v1.5-de"
    assert streams.name_of(source_of("a/b.jsonl", name="own")) == "own"
    for code in ("de", "fr"):
        (tmp_path / f"talks.{code}").write_text("eins\nzwei\n", encoding="utf-8")
    assert streams.task_of(source_of(str(tmp_path / "talks"))) == "bitext"
    assert streams.task_of(source_of("a/b.jsonl")) == "retrieval"
    assert streams.task_of(source_of("a/b.jsonl", task="sts")) == "sts"
