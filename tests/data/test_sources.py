"""Files to tables: real files, and each mistake in them by file and line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed import config
from mlembed.data import sources
from mlembed.data.cldr import normalise
from mlembed.data.formats import readers
from mlembed.data.tables import text_id
from mlembed.runtime import cache

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "train"


def read(path, **options):
    """Tables of a plain entry; fields of the source and arguments of the reading by name."""
    fields = {k: options.pop(k) for k in list(options) if k in config.Source.__dataclass_fields__}
    return [table for table, _ in reports(path, fields, **options)]


def reports(path, fields=None, **options):
    return sources.read(config.Source(path=str(path), **(fields or {})), **options)


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
    (table,) = read(jsonl(tmp_path / "p.jsonl", PAIRS))
    assert table.name == "p" and not table.nway and len(table) == 4
    assert items(table) == WANT
    assert table.starts.dtype == table.ids.dtype == np.int64
    # one eins | two zwei drei vier | zwei two | 2 zwei: three pairs are linked by "zwei" and "two"
    linked = [table.ids[i] for i in (2, 3, 6, 7, 8, 9)]
    assert set(linked) == {text_id("two")}  # never each other's negatives
    alone = table.ids[[0, 4, 5]].tolist()
    assert alone == [text_id("one"), text_id("drei"), text_id("vier")]
    assert table.ids[1] == table.ids[0]


def test_a_negative_that_is_a_positive_elsewhere_is_known_as_such(tmp_path):
    rows = [
        {"query": "q", "positive": "a", "negatives": ["b", "c"]},
        {"query": "q", "positive": "b"},
        {"query": "r", "positive": "c"},
    ]
    (table,) = read(jsonl(tmp_path / "p.jsonl", rows))
    of = dict(zip(table.texts, table.ids.tolist(), strict=True))
    assert of["q"] == of["a"] == of["b"] != of["c"] == of["r"]


def test_pairs_parquet_is_the_same_table(tmp_path):
    (a,) = read(jsonl(tmp_path / "p.jsonl", PAIRS))
    columns = {name: [row.get(name) for row in PAIRS] for name in ("positive", "query")}
    columns["negatives"] = pa.array([r.get("negatives") for r in PAIRS], pa.list_(pa.string()))
    columns["other"] = [None] * 4
    (b,) = read(parquet(tmp_path / "p.parquet", **columns))
    assert (a.texts, a.ids.tolist()) == (b.texts, b.ids.tolist())
    assert a.starts.tolist() == b.starts.tolist()


def test_any_script_line_end_and_blank_line(tmp_path):
    lines = [
        '{"query": "ሰላም", "positive": "👋 \\u00e9"}',
        "",
        '{"positive": "b\\nc", "query": " a "}',
    ]
    (tmp_path / "p.jsonl").write_bytes("\r\n".join(lines).encode())
    (table,) = read(str(tmp_path / "p.jsonl"))
    assert items(table) == [["ሰላም", "👋 é"], [" a ", "b\nc"]]


def test_score_threshold(tmp_path):
    scores = [0.79, 0.8, 1, None, 0.0]
    rows = [{"query": f"q{i}", "positive": f"p{i}", "score": s} for i, s in enumerate(scores)]
    (table,) = read(jsonl(tmp_path / "s.jsonl", rows))
    assert [item[0] for item in items(table)] == ["q1", "q2", "q3"]
    with pytest.raises(ValueError, match=r"low\.jsonl: expected pairs with a score of 0\.8"):
        read(jsonl(tmp_path / "low.jsonl", rows[:1]))


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
    (table,) = read(jsonl(tmp_path / "n.jsonl", rows))
    assert table.nway and items(table) == [["sea", "Meer", "mer"], ["seven", "sieben"]]
    assert table.ids.tolist() == [text_id("n", "a")] * 3 + [text_id("n", "7")] * 2


@pytest.mark.parametrize("column", ["id", "verse_id"])
def test_nway_parquet(column, tmp_path):
    columns = {column: [1, 2, 1, 2], "lang": list("eedd"), "text": ["a", "b", "c", "d"]}
    (table,) = read(parquet(tmp_path / "n.parquet", **columns))
    assert table.nway and items(table) == [["a", "c"], ["b", "d"]]


def test_nway_without_translations(tmp_path):
    rows = [{"id": i, "lang": "en", "text": "x"} for i in range(3)]
    with pytest.raises(ValueError, match=r"n\.jsonl: expected ids with two texts or more"):
        read(jsonl(tmp_path / "n.jsonl", rows))


# ---- directories ----


def test_a_directory_is_its_files_in_order(tmp_path):
    jsonl(tmp_path / "b.jsonl", PAIRS)
    parquet(tmp_path / "a.parquet", query=["x"], positive=["y"])
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "sub").mkdir()
    assert [table.name for table in read(str(tmp_path))] == ["a", "b"]


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl, which does not exist"):
        read(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"expected \.jsonl, .* files in .*, found none"):
        read(str(tmp_path))
    (tmp_path / "a.txt").write_text("{}")
    with pytest.raises(ValueError, match=r"expected \.jsonl, .*, got .*a\.txt"):
        read(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_jsonl(content, tmp_path):
    (tmp_path / "e.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"e\.jsonl: expected rows, found none"):
        read(str(tmp_path / "e.jsonl"))


def test_empty_and_broken_parquet(tmp_path):
    nothing = pa.array([], pa.string())
    with pytest.raises(ValueError, match=r"e\.parquet: expected rows, found none"):
        read(parquet(tmp_path / "e.parquet", query=nothing, positive=nothing))
    for content in (b"", b"PAR1", b'{"query": "a", "positive": "b"}\n'):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.parquet"):
            read(str(tmp_path / "x.parquet"))


def test_damaged_parquet(tmp_path):
    """A sound footer over damaged pages: what a broken download or disk leaves."""
    path = tmp_path / "x.parquet"
    parquet(path, query=["a"] * 500, positive=[f"b{i}" for i in range(500)])
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\0" * 200 + whole[220:])
    with pytest.raises(ValueError, match=r"x\.parquet"):
        read(str(path))


def test_of_a_directory_one_kind_of_files_is_read(tmp_path):
    """A csv beside parquet describes it; .json files are the last, as they are settings, too."""
    (tmp_path / "a.json").write_text('{"query": "json", "positive": "b"}\n')
    assert [items(table) for table in read(tmp_path)] == [[["json", "b"]]]
    (tmp_path / "about.tsv").write_text("query\tpositive\ntsv\tb\n")
    assert [items(table) for table in read(tmp_path)] == [[["tsv", "b"]]]
    jsonl(tmp_path / "c.jsonl", PAIRS)
    with pytest.warns(UserWarning, match=r"about\.tsv left out, beside \.jsonl and \.parquet"):
        assert [table.name for table in read(tmp_path)] == ["c"]


def test_names(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    assert [t.name for t in read(path, name="mine")] == ["mine"]
    jsonl(tmp_path / "q.jsonl", PAIRS)
    assert [t.name for t in read(tmp_path, name="mine")] == ["mine/p", "mine/q"]
    source = config.Source(path=path, prompt="x")
    assert sources.read(source)[0][0].source is source
    assert sources.of("a/b") == config.Source(path="a/b")


def test_the_built_in_text():
    train = sources.cldr_tables()[0].slice(0, 500).to_pylist()
    (table,) = read("cldr")
    assert (table.name, table.nway, table.task) == ("cldr", False, "retrieval")
    assert items(table)[:500] == [[row["query"], row["positive"]] for row in train]


# ---- tasks, scores ----


def test_tasks(tmp_path):
    plain = jsonl(tmp_path / "p.jsonl", PAIRS)
    rows = [{"id": "1", "lang": lang, "text": lang} for lang in ("en", "de")]
    nway = jsonl(tmp_path / "n.jsonl", rows)
    assert read(plain)[0].task == "retrieval" and read(nway)[0].task == "bitext"
    assert read(plain, task="bitext")[0].task == "bitext"
    assert read(nway, task="retrieval")[0].task == "retrieval"
    for task in ("sts", "clustering", "classification"):
        with pytest.raises(ValueError, match=rf"n\.jsonl: task: expected .* got {task}"):
            read(nway, task=task)
    with pytest.raises(ValueError, match=r"p\.jsonl:1: score: expected a number for sts, got None"):
        read(plain, task="sts")


@pytest.mark.parametrize("task", ["clustering", "classification"])
def test_tasks_that_need_negatives(task, tmp_path):
    rows = [{"query": "a", "positive": "b", "negatives": ["c"]}, {"query": "d", "positive": "e"}]
    path = jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(
        ValueError, match=rf"p\.jsonl:2: negatives: expected .* for {task}, got none"
    ):
        read(path, task=task)
    ((table, report),) = reports(path, {"task": task}, bad_rows="skip")
    assert items(table) == [["a", "b", "c"]] and report.bad == 1


@pytest.mark.parametrize("most", [1, 5])
def test_scores_of_sts_are_kept_on_one_scale(most, tmp_path):
    """One score above 1 anywhere makes all of them 0..5."""
    scores = [0.25, 0.0, 1.0, 0.5] if most == 1 else [1.25, 0, 0.75, 0.5]
    rows = [{"sentence1": f"{i}", "sentence2": "b", "score": s} for i, s in enumerate(scores)]
    (table,) = read(jsonl(tmp_path / "s.jsonl", rows), task="sts")
    assert len(table) == 4 and table.scores.dtype == np.float32
    assert table.scores == pytest.approx([s / most for s in scores])
    assert read(jsonl(tmp_path / "p.jsonl", PAIRS))[0].scores is None


def test_score_threshold_of_the_longer_scale(tmp_path):
    scores = [5, 4, 3.99, 1.0, None, 0.9]
    rows = [{"query": f"q{i}", "positive": f"p{i}", "score": s} for i, s in enumerate(scores)]
    ((table, report),) = reports(jsonl(tmp_path / "s.jsonl", rows))
    assert [item[0] for item in items(table)] == ["q0", "q1", "q4"] and report.by_score == 3


# ---- duplicates, cap, what is counted ----


def test_exact_pairs_count_once(tmp_path):
    rows = [("a", "b"), ("a", "c"), ("a", "b"), ("b", "a"), ("A", "b"), ("a ", "b"), ("b", "a")]
    path = jsonl(tmp_path / "p.jsonl", [{"query": q, "positive": p} for q, p in rows])
    ((table, report),) = reports(path)
    assert items(table) == [["a", "b"], ["a", "c"], ["b", "a"], ["A", "b"], ["a ", "b"]]
    assert (report.rows, report.items, report.duplicates) == (7, 5, 2)


def test_exact_rows_of_nway_tables_count_once(tmp_path):
    rows = [
        ("1", "en", "a"),
        ("1", "de", "a"),
        ("1", "en", "a"),
        ("2", "en", "b"),
        ("2", "en", "b"),
    ]
    path = jsonl(
        tmp_path / "n.jsonl", [dict(zip(("id", "lang", "text"), r, strict=True)) for r in rows]
    )
    ((table, report),) = reports(path)
    assert items(table) == [["a", "a"]]
    assert (report.duplicates, report.alone, report.items) == (2, 1, 1)


@pytest.mark.parametrize("nway", [False, True])
def test_cap(nway, tmp_path):
    """So many of what is left, always the same ones, of a source of another name others."""
    if nway:
        rows = [{"id": i, "lang": x, "text": f"{i}{x}"} for x in "ab" for i in range(200)]
        rows += [{"id": i, "lang": "a", "text": f"{i}a"} for i in range(200, 300)]
    else:
        rows = [{"query": f"{i}", "positive": f"{i}p"} for i in range(200)] * 2
        rows += [{"query": f"{i}", "positive": "p", "score": 0.1} for i in range(100)]
    path = jsonl(tmp_path / "p.jsonl", rows)
    ((whole, _),), ((some, report),) = reports(path), reports(path, {"cap": 50})
    assert len(whole) == 200 and len(some) == report.items == 50 and report.by_cap == 150
    places = [items(whole).index(item) for item in items(some)]
    assert places == sorted(places) and places != list(range(50))
    assert 20 < np.mean(places) < 180  # from all over
    assert items(read(path, cap=50)[0]) == items(some)
    assert items(read(path, cap=50, name="other")[0]) != items(some)
    assert items(read(path, cap=200)[0]) == items(whole) == items(read(path, cap=999)[0])


# ---- keeping evaluation out ----


def test_held_out_texts_take_their_pairs_along(tmp_path):
    rows = [
        {"query": "Sea", "positive": "Meer"},
        {"query": "clean", "positive": "sauber", "negatives": ["dirty", " MEER "]},
        {"query": "a", "positive": "b", "negatives": ["c"]},
        {"query": "ﬁ", "positive": "x"},
    ]
    held_out = {normalise("meer"), normalise("FI")}
    ((table, report),) = reports(jsonl(tmp_path / "p.jsonl", rows), held_out=held_out)
    assert items(table) == [["a", "b", "c"]] and report.held_out == 8
    assert table.ids.tolist() == [text_id("a"), text_id("a"), text_id("c")]


def test_held_out_texts_of_nway_items_go_alone(tmp_path):
    texts = {"1": ["a", "b", "c"], "2": ["d", "a"], "3": ["e", "f"]}
    rows = [{"id": k, "lang": t, "text": t} for k, ts in texts.items() for t in ts]
    ((table, report),) = reports(jsonl(tmp_path / "n.jsonl", rows), held_out={"a"})
    assert items(table) == [["b", "c"], ["e", "f"]]
    assert (report.held_out, report.alone) == (2, 1)
    assert table.ids.tolist() == [text_id("n", "1")] * 2 + [text_id("n", "3")] * 2


def test_nothing_left(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PAIRS[:2])
    for bad_rows in ("error", "skip"):
        with pytest.raises(ValueError, match=r"p\.jsonl: expected pairs without texts of the eval"):
            read(path, held_out={"eins", "two"}, bad_rows=bad_rows)
    assert len(read(path, held_out={"other"})[0]) == 2
    (tmp_path / "b.jsonl").write_text('{"query": "a"}\n[]\n')
    with pytest.raises(ValueError, match=r"found none; 2 bad ones, first .*b\.jsonl:1: exp"):
        read(tmp_path / "b.jsonl", bad_rows="skip")


# ---- mixtures ----


def expanded(*data, given=()):
    return sources.expand(config.Run(data=data, sources=given))


def mixture(path, *entries):
    path.write_text(json.dumps({"sources": entries}, indent=1))
    return str(path)


def test_mixtures_are_replaced_by_their_sources(tmp_path):
    (tmp_path / "deep").mkdir()
    here = [jsonl(tmp_path / "deep" / f"{name}.jsonl", PAIRS) for name in "pq"]
    for code in ("en", "de"):
        (tmp_path / "deep" / f"talk.{code}").write_text("a\n")
    path = mixture(
        tmp_path / "deep" / "mix.json",
        {"path": "p.jsonl", "task": "retrieval", "prompt": "Q: ", "weight": 2, "cap": 5},
        {"path": here[1], "corpus": "docs.jsonl", "num_negatives": 3},
        *({"path": name} for name in ("cldr", "org/name", "talk", "gone.csv")),
    )
    first = config.Source(path="x")
    run = expanded("cldr", path, "y.parquet", given=(first,))
    assert run.data == ("cldr", "y.parquet")
    assert run.sources == (
        first,
        config.Source(path=here[0], task="retrieval", prompt="Q: ", weight=2.0, cap=5),
        config.Source(path=here[1], corpus=str(tmp_path / "deep" / "docs.jsonl"), num_negatives=3),
        config.Source(path="cldr"),
        config.Source(path="org/name"),
        config.Source(path=str(tmp_path / "deep" / "talk")),
        config.Source(path=str(tmp_path / "deep" / "gone.csv")),  # missing there, and told so
    )
    assert expanded(path).data == () and sources.expand(run) == run


@pytest.mark.parametrize(
    "content", ['{"query": "a", "positive": "b"}\n{"query": "c", "positive": "d"}', "[]"]
)
def test_json_files_of_rows_are_no_mixtures(content, tmp_path):
    (tmp_path / "p.json").write_text(content)
    for path in (str(tmp_path / "p.json"), str(tmp_path / "none.json")):
        assert expanded(path, "cldr").data == (path, "cldr")


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"sources": [\n{"path": "a"},\n]}', r":3: invalid JSON"),
        (
            '{\n"sources": [{"path": "a", "promt": "x"}]}',
            r"\[0\]: no such key 'promt' \(near: prom",
        ),
        ('{"sources": [{"path": "a"}, {"path": "b", "cap": "3"}]}', r"\[1\]: cap: expected int"),
        ('{"sources": [{"path": "a", "cap": -1}]}', r"\[0\]: source a: cap: expected 0 or more"),
        ('{"sources": [{"path": "a", "task": "x"}]}', r"\[0\]: task: expected Literal"),
        ('{"sources": [{"path": 3}]}', r"\[0\]: path: expected str, got 3"),
        ('{"sources": [{"name": "a"}]}', r"\[0\]: path: expected one, got none"),
        ('{"sources": ["a"]}', r"\[0\]: expected an object, got str"),
        ('{"sources": []}', "sources: expected at least one, got none"),
        ('{"sources": {"path": "a"}}', r'expected {"sources": \[..\]}, got sources'),
        ('{"source": []}', r'expected {"sources": \[..\]}, got source'),
        ('{"sources": [{"path": "a"}], "soruces": 1}', r"no such key 'soruces' \(near: sources\)"),
    ],
)
def test_malformed_mixtures(content, words, tmp_path):
    (tmp_path / "mix.json").write_text(content)
    with pytest.raises(ValueError, match=rf"mix\.json.*{words}"):
        expanded(str(tmp_path / "mix.json"))


# ---- large sources ----


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Every source is large; the folder of their texts."""
    monkeypatch.setattr(sources, "BIG", 0)
    monkeypatch.setattr(cache, "CHUNK", 3)
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


def many(path):
    """A pair table and an n-way table with something of all that is left out."""
    rows = [
        {
            "query": f"q{i % 40}",
            "positive": f"p{i % 50}",
            "negatives": [f"n{j}" for j in range(i % 3)],
        }
        | {"score": (i % 10) / 5 if i % 4 else None}
        for i in range(300)
    ]
    nway = [{"id": i % 37, "lang": f"l{i % 7}", "text": f"t{i % 60}"} for i in range(400)]
    rows[0] |= {"query_lang": "eng", "positive_lang": "deu"}
    return [jsonl(path / "p.jsonl", rows), jsonl(path / "n.jsonl", nway)]


def same(a, b):
    assert (a.name, a.nway, a.task, a.source) == (b.name, b.nway, b.task, b.source)
    assert list(a.texts) == list(b.texts) and a.ids.tolist() == b.ids.tolist()
    assert a.starts.tolist() == b.starts.tolist()
    assert (a.scores is None) == (b.scores is None)
    assert a.scores is None or a.scores.tolist() == b.scores.tolist()


@pytest.mark.parametrize("fields", [{}, {"cap": 20}])
@pytest.mark.parametrize("held_out", [frozenset(), {"q1", "p3", "t5", "t6"}])
def test_large_tables_are_the_same(fields, held_out, large, tmp_path, monkeypatch):
    for path in many(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(sources, "BIG", 2**26)
            ((want, counted),) = reports(path, fields, held_out=held_out)
        for _ in range(2):  # written, then found
            ((table, report),) = reports(path, fields, held_out=held_out)
            assert isinstance(table.texts, cache.Texts) and isinstance(table.ids, np.memmap)
            same(table, want)
            assert report == counted
            middle = len(want.texts) // 2
            assert table.texts[middle] == want.texts[middle] and table.texts[-1] == want.texts[-1]
            assert table.texts[2:9] == want.texts[2:9]
            assert pickle.loads(pickle.dumps(table.texts))[1] == want.texts[1]
    assert len(list(large.iterdir())) == 2
    assert {p.name for entry in large.iterdir() for p in entry.iterdir()} == {
        *("texts.arrow", "ids.npy", "starts.npy", "about.json", cache.WHOLE)
    }


def test_large_scores(large, tmp_path):
    rows = [{"sentence1": f"{i}", "sentence2": "b", "score": i / 10} for i in range(9)]
    path = jsonl(tmp_path / "s.jsonl", rows)
    for _ in range(2):
        (table,) = read(path, task="sts")
        assert table.scores == pytest.approx([i / 10 for i in range(9)])
        assert table.scores.dtype == np.float32 and table.task == "sts"


def test_a_second_reading_does_not_read_rows(large, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    (table,) = read(path)

    def refused(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(readers, "of_file", refused)
    same(read(path)[0], table)
    assert read(path, prompt="x")[0].source.prompt == "x"  # which changes no text


def test_what_changes_a_table_changes_its_key(large, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    changes = [{}, {"name": "x"}, {"cap": 2}, {"task": "bitext"}, {"held_out": {"eins"}}]
    for n, change in enumerate([*changes, {"bad_rows": "skip"}], 1):
        read(path, **change)
        assert len(list(large.iterdir())) == n
    jsonl(tmp_path / "p.jsonl", PAIRS[:3])
    assert len(read(path)[0]) == 3 and len(list(large.iterdir())) == 7
    for _ in range(2):
        assert len(read(path, held_out={"eins"})[0]) == 2


@pytest.mark.parametrize("name", ["texts.arrow", "ids.npy", "about.json", cache.WHOLE])
def test_damaged_entries_are_made_again(name, large, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    want = items(read(path)[0])
    (entry,) = large.iterdir()
    (entry / name).write_bytes((entry / name).read_bytes()[:-9])
    assert items(read(path)[0]) == want and [p.name for p in large.iterdir()] == [entry.name]


def test_a_malformed_large_source_leaves_nothing(large, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [*PAIRS, {"query": "a"}])
    with pytest.raises(ValueError, match=r"p\.jsonl:5: positive"):
        read(path)
    assert not list(large.iterdir())
    ((table, report),) = reports(path, bad_rows="skip")
    assert len(table) == 4 and report.bad == 1
    ((_, again),) = reports(path, bad_rows="skip")
    assert again.bad_rows == [f"{path}:5: positive: expected text, got None"]


def test_a_cache_that_cannot_be_written(large, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    monkeypatch.setenv("MLEMBED_CACHE", path)
    with pytest.warns(UserWarning, match="text could not be stored"):
        assert items(read(path)[0]) == WANT


# A table of where its texts come from lies there as well.
@pytest.mark.filterwarnings("ignore:.* left out, beside")
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
def test_every_shared_file_reads():
    tables = read(str(SHARED))
    assert len(tables) == len([*SHARED.glob("*.parquet"), *SHARED.glob("*.jsonl")])
    for table in tables:
        assert len(table) > 0 and len(table.texts) >= 2 * len(table), table.name
        assert table.starts[-1] == len(table.texts) and (np.diff(table.starts) >= 2).all()
