"""Files to tables to batches: real files, each mistake by file and line, and an order of batches
that any process can draw alone."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from mlembed import config, data, tokenizer
from mlembed.data import Batches, Table, text_id
from mlembed.distributed import World

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "train"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def items(table):
    bounds = zip(table.starts[:-1], table.starts[1:], strict=True)
    return [table.texts[begin:end] for begin, end in bounds]


# ---- pair tables ----

PAIRS = [
    {"query": "one", "positive": "eins"},
    {"query": "two", "positive": "zwei", "negatives": ["drei", "vier"]},
    {"query": "zwei", "positive": "two", "negatives": []},
    {"query": "2", "positive": "zwei", "negatives": None},
]
WANT = [["one", "eins"], ["two", "zwei", "drei", "vier"], ["zwei", "two"], ["2", "zwei"]]


def test_pairs_jsonl(tmp_path):
    (table,) = data.read(jsonl(tmp_path / "p.jsonl", PAIRS))
    assert table.name == "p" and not table.nway and len(table) == 4
    assert items(table) == WANT
    assert table.starts.dtype == table.ids.dtype == np.int64
    assert table.ids[1] == table.ids[3] == text_id("zwei")  # never each other's negatives
    assert len(set(table.ids.tolist())) == 3


def test_pairs_parquet_is_the_same_table(tmp_path):
    (a,) = data.read(jsonl(tmp_path / "p.jsonl", PAIRS))
    columns = {name: [row.get(name) for row in PAIRS] for name in ("positive", "query")}
    columns["negatives"] = pa.array([r.get("negatives") for r in PAIRS], pa.list_(pa.string()))
    columns["other"] = [None] * 4
    (b,) = data.read(parquet(tmp_path / "p.parquet", **columns))
    assert (a.texts, a.ids.tolist()) == (b.texts, b.ids.tolist())
    assert a.starts.tolist() == b.starts.tolist()


def test_any_script_line_end_and_blank_line(tmp_path):
    lines = [
        '{"query": "ሰላም", "positive": "👋 \\u00e9"}',
        "",
        '{"positive": "b\\nc", "query": " a "}',
    ]
    (tmp_path / "p.jsonl").write_bytes("\r\n".join(lines).encode())
    (table,) = data.read(str(tmp_path / "p.jsonl"))
    assert items(table) == [["ሰላም", "👋 é"], [" a ", "b\nc"]]


def test_score_threshold(tmp_path):
    scores = [0.79, 0.8, 1, None, 0.0]
    rows = [{"query": f"q{i}", "positive": f"p{i}", "score": s} for i, s in enumerate(scores)]
    (table,) = data.read(jsonl(tmp_path / "s.jsonl", rows))
    assert [item[0] for item in items(table)] == ["q1", "q2", "q3"]
    with pytest.raises(ValueError, match=r"low\.jsonl: expected pairs with a score of 0\.8"):
        data.read(jsonl(tmp_path / "low.jsonl", rows[:1]))


# ---- n-way tables ----


def test_nway(tmp_path):
    rows = [
        {"id": "a", "lang": "en", "text": "sea"},
        {"id": "b", "lang": "en", "text": "alone"},
        {"id": 7, "lang": "en", "text": "seven"},
        {"id": "a", "lang": "de", "text": "Meer"},
        {"id": "7", "lang": "de", "text": "sieben"},
        {"id": "a", "lang": "fr", "text": "mer"},
    ]
    (table,) = data.read(jsonl(tmp_path / "n.jsonl", rows))
    assert table.nway and items(table) == [["sea", "Meer", "mer"], ["seven", "sieben"]]
    assert table.ids.tolist() == [text_id("n", "a"), text_id("n", "7")]


@pytest.mark.parametrize("column", ["id", "verse_id"])
def test_nway_parquet(column, tmp_path):
    columns = {column: [1, 2, 1, 2], "lang": list("eedd"), "text": ["a", "b", "c", "d"]}
    (table,) = data.read(parquet(tmp_path / "n.parquet", **columns))
    assert table.nway and items(table) == [["a", "c"], ["b", "d"]]


def test_nway_without_translations(tmp_path):
    rows = [{"id": i, "lang": "en", "text": "x"} for i in range(3)]
    with pytest.raises(ValueError, match=r"n\.jsonl: expected ids with two texts or more"):
        data.read(jsonl(tmp_path / "n.jsonl", rows))


# ---- directories ----


def test_a_directory_is_its_files_in_order(tmp_path):
    jsonl(tmp_path / "b.jsonl", PAIRS)
    parquet(tmp_path / "a.parquet", query=["x"], positive=["y"])
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "sub").mkdir()
    assert [table.name for table in data.read(str(tmp_path))] == ["a", "b"]


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl, which does not exist"):
        data.read(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"expected \.jsonl or \.parquet files .* found none"):
        data.read(str(tmp_path))
    (tmp_path / "a.txt").write_text("{}")
    with pytest.raises(ValueError, match=r"expected \.jsonl or \.parquet, got .*a\.txt"):
        data.read(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_jsonl(content, tmp_path):
    (tmp_path / "e.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"e\.jsonl: expected rows, found none"):
        data.read(str(tmp_path / "e.jsonl"))


def test_empty_and_broken_parquet(tmp_path):
    nothing = pa.array([], pa.string())
    with pytest.raises(ValueError, match=r"e\.parquet: expected rows, found none"):
        data.read(parquet(tmp_path / "e.parquet", query=nothing, positive=nothing))
    for content in (b"", b"PAR1", b'{"query": "a", "positive": "b"}\n'):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.parquet"):
            data.read(str(tmp_path / "x.parquet"))


def test_damaged_parquet(tmp_path):
    """A sound footer over damaged pages: what a broken download or disk leaves."""
    path = tmp_path / "x.parquet"
    parquet(path, query=["a"] * 500, positive=[f"b{i}" for i in range(500)])
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\0" * 200 + whole[220:])
    with pytest.raises(ValueError, match=r"x\.parquet"):
        data.read(str(path))


# ---- malformed rows ----

GOOD = b'{"query": "a", "positive": "b"}'


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"query": "a", "positive": ', "not json"),
        (b"query,positive", "not json"),
        (b'{"query": "\xff\xfe", "positive": "b"}', "not UTF-8"),
        (b'["a", "b"]', "expected an object, got list"),
        (b"3", "expected an object, got int"),
        (b"null", "expected an object, got NoneType"),
        (b'{"query": "a"}', "positive: expected text, got None"),
        (b'{"query": "a", "positive": ""}', "positive: expected text, got ''"),
        (b'{"query": " \\t", "positive": "b"}', "query: expected text"),
        (b'{"query": 3, "positive": "b"}', "query: expected text, got 3"),
        (b'{"query": ["a"], "positive": "b"}', "query: expected text"),
        (b'{"query": "a", "positive": "b", "negatives": "c"}', "negatives: expected a list"),
        (b'{"query": "a", "positive": "b", "negatives": ["c", ""]}', "negatives: expected a list"),
        (b'{"query": "a", "positive": "b", "negatives": ["c", 3]}', "negatives: expected a list"),
        (b'{"query": "a", "positive": "b", "negatives": {"c": 1}}', "negatives: expected a list"),
        (b'{"query": "a", "positive": "b", "score": "0.9"}', "score"),
        (b'{"query": "a", "positive": "b", "score": [1]}', "score"),
        # json may hold half a surrogate pair, which is no text and no tokenizer takes it.
        (b'{"query": "\\ud83d", "positive": "b"}', "query"),
        (b'{"query": "a", "positive": "b", "negatives": ["\\ud83d"]}', "negatives"),
        (b'{"query": ' + b"1" * 5000 + b', "positive": "b"}', ""),  # more digits than Python reads
    ],
)
def test_malformed_pair_rows_are_named_by_line(line, words, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(ValueError) as caught:
        data.read(str(tmp_path / "p.jsonl"))
    assert f"{tmp_path}/p.jsonl:3: " in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize(
    "line, words",
    [
        ({"id": "1", "lang": "de"}, "text: expected text, got None"),
        ({"id": "1", "lang": "de", "text": "\n"}, "text: expected text"),
        ({"id": None, "lang": "de", "text": "a"}, "id: expected text, got None"),
        ({"id": 1.5, "lang": "de", "text": "a"}, "id: expected text, got 1.5"),
        ({"id": "1", "lang": 3, "text": "a"}, "lang: expected text, got 3"),
        ({"query": "a", "positive": "b"}, "id: expected text, got None"),
    ],
)
def test_malformed_nway_rows_are_named_by_line(line, words, tmp_path):
    path = jsonl(tmp_path / "n.jsonl", [{"id": "1", "lang": "en", "text": "a"}, line])
    with pytest.raises(ValueError) as caught:
        data.read(path)
    assert f"{path}:2: " in str(caught.value) and words in str(caught.value)


def test_unknown_columns_are_listed(tmp_path):
    jsonl(tmp_path / "u.jsonl", [{"anchor": "a", "positive": "b"}])
    parquet(tmp_path / "u.parquet", anchor=["a"], positive=["b"])
    for path in (tmp_path / "u.jsonl", tmp_path / "u.parquet"):
        with pytest.raises(ValueError) as caught:
            data.read(str(path))
        assert f"{path}:1: expected columns query, positive" in str(caught.value)
        assert "got anchor, positive" in str(caught.value)


@pytest.mark.parametrize(
    "columns, words",
    [
        (dict(query=["a", None], positive=["b", "c"]), "query: expected text, got None"),
        (dict(query=["a", ""], positive=["b", "c"]), "query: expected text, got ''"),
        (dict(query=["a", "b"], positive=["b", "c"], score=["1", "x"]), "score"),
        (dict(query=["a", "b"], positive=["b", "c"], negatives=[None, ["d", None]]), "negatives"),
        (dict(id=[1, None], lang=["a", "b"], text=["b", "c"]), "id: expected text, got None"),
    ],
)
def test_malformed_parquet_rows_are_named_by_row(columns, words, tmp_path):
    path = parquet(tmp_path / "p.parquet", **columns)
    with pytest.raises(ValueError) as caught:
        data.read(path)
    row = 1 if words == "score" else 2  # a text as a score is wrong from the first row on
    assert f"{path}:{row}: " in str(caught.value) and words in str(caught.value)


# ---- keeping evaluation out ----


def test_without_drops_whole_pairs(tmp_path):
    rows = [
        {"query": "Sea", "positive": "Meer"},
        {"query": "clean", "positive": "sauber", "negatives": ["dirty", " MEER "]},
        {"query": "a", "positive": "b", "negatives": ["c"]},
        {"query": "ﬁ", "positive": "x"},
    ]
    (table,) = data.read(jsonl(tmp_path / "p.jsonl", rows))
    clean, dropped = data.without(table, {data.normalise("meer"), data.normalise("FI")})
    assert items(clean) == [["a", "b", "c"]] and dropped == 8
    assert clean.ids.tolist() == [text_id("b")]
    assert (clean.name, clean.nway) == ("p", False)


def test_without_drops_texts_of_nway_items(tmp_path):
    texts = {"1": ["a", "b", "c"], "2": ["d", "a"], "3": ["e", "f"]}
    rows = [{"id": k, "lang": t, "text": t} for k, ts in texts.items() for t in ts]
    (table,) = data.read(jsonl(tmp_path / "n.jsonl", rows))
    clean, dropped = data.without(table, {"a"})
    assert items(clean) == [["b", "c"], ["e", "f"]] and dropped == 3
    assert clean.ids.tolist() == [text_id("n", "1"), text_id("n", "3")]


def test_without_may_leave_nothing_or_everything(tmp_path):
    (table,) = data.read(jsonl(tmp_path / "p.jsonl", PAIRS[:2]))
    gone, dropped = data.without(table, {"eins", "two"})
    assert gone is None and dropped == len(table.texts)
    same, dropped = data.without(table, {"other"})
    assert dropped == 0 and same.texts == table.texts
    assert same.ids.tolist() == table.ids.tolist()


# ---- batches ----


@pytest.fixture(scope="module")
def tables():
    """17 pairs of which two share a positive, with 0 to 3 negatives; 11 ids of 2 to 4 texts."""
    texts, starts, ids = [], [0], []
    for i in range(17):
        positive = f"positive {min(i, 15)}"
        texts += [f"query {i}", positive, *(f"negative {i} {j}" for j in range(i % 4))]
        starts.append(len(texts))
        ids.append(text_id(positive))
    pairs = Table("pairs", False, texts, np.array(starts), np.array(ids))
    texts, starts = [], [0]
    for i in range(11):
        texts += [f"id {i} language {j}" for j in range(2 + i % 3)]
        starts.append(len(texts))
    ids = np.array([text_id("nway", str(i)) for i in range(11)])
    return [pairs, Table("nway", True, texts, np.array(starts), ids)]


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
    bounds = batch.packed.cu_seqlens.tolist()
    return [
        learnt.decode(batch.packed.ids_T[begin:end].tolist())
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def same(a, b):
    tensors = ("ids_T", "pos_T", "cu_seqlens")
    return (
        all(torch.equal(getattr(a.packed, n), getattr(b.packed, n)) for n in tensors)
        and a.packed.max_seqlen == b.packed.max_seqlen
        and torch.equal(a.pair_ids, b.pair_ids)
        and torch.equal(a.doc_ids, b.doc_ids)
        and (a.doc_sizes, a.source) == (b.doc_sizes, b.source)
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
        assert batch.pair_ids.tolist() == [text_id(t) for t in positives]
        assert batch.doc_ids.tolist() == [text_id(t) for t in positives + negatives]
        assert batch.doc_sizes == (4 + len(negatives),)
        assert batch.pair_ids.dtype == batch.doc_ids.dtype == torch.int64
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
        for query, positive, pair_id in zip(texts[:4], texts[4:], batch.pair_ids, strict=True):
            (_, i, _, a), (_, j, _, b) = query.split(), positive.split()
            assert i == j and a != b
            assert pair_id == text_id("nway", i)
            ordered[i, a, b] += 1
        assert batch.doc_ids.tolist() == batch.pair_ids.tolist()
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
        assert sum((t[:each] for t in split), []) == texts[:4]
        assert sum((t[each : 2 * each] for t in split), []) == texts[4:8]
        assert sum((t[2 * each :] for t in split), []) == texts[8:]
        # What every process knows of the others: equal everywhere, process by process.
        sizes = tuple(len(t) - each for t in split)
        for part in parts:
            assert part.source == one.source
            assert torch.equal(part.pair_ids, one.pair_ids)
            assert part.doc_sizes == sizes
            assert torch.equal(part.doc_ids, parts[0].doc_ids)
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
        Table(str(n), False, ["a", "b"] * n, np.arange(0, 2 * n + 1, 2), np.arange(n))
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
    packed = batches[0].packed
    assert packed.max_seqlen == 3
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


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
def test_every_shared_file_reads():
    tables = data.read(str(SHARED))
    assert len(tables) == len([*SHARED.glob("*.parquet"), *SHARED.glob("*.jsonl")])
    for table in tables:
        assert len(table) > 0 and len(table.texts) >= 2 * len(table), table.name
        assert table.starts[-1] == len(table.texts) and (np.diff(table.starts) >= 2).all()
