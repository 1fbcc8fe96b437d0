"""Sources to tables and streams: files, mixtures, and tables stored in the cache."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlembed import config
from mlembed.data import sources, tables
from mlembed.data.formats import layouts
from mlembed.data.tables import StoredTexts
from mlembed.runtime import cache
from tests.data.samples import (
    PAIRS,
    items,
    jsonl,
    mistake,
    parquet,
    read,
    reports,
    same_table,
    source,
    table_of,
)

# ---- files and directories ----


def test_directory(tmp_path):
    """Files of one kind, in order: a csv next to parquet describes it, json may be settings."""
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text('{"query": "json", "positive": "b"}\n')
    assert read(tmp_path)[0] == [["json", "b"]]
    (tmp_path / "about.tsv").write_text("query\tpositive\ntsv\tb\n")
    assert read(tmp_path)[0] == [["tsv", "b"]]
    jsonl(tmp_path / "c.jsonl", PAIRS)
    parquet(tmp_path / "b.parquet", query=["x"], positive=["y"])
    with pytest.warns(UserWarning, match=r"about\.tsv left out, beside \.jsonl and \.parquet"):
        assert [table.name for table, _ in reports(tmp_path)] == ["b", "c"]


def test_missing_files(tmp_path):
    assert re.search(r"expected \.jsonl, .* files in .*, found none", mistake(tmp_path))
    (tmp_path / "a.pdf").write_text("{}")
    assert re.search(r"expected \.jsonl, .*, got .*a\.pdf", mistake(tmp_path / "a.pdf"))


def test_empty_and_broken_parquet(tmp_path):
    path, nothing = tmp_path / "x.parquet", pa.array([], pa.string())
    parquet(path, query=nothing, positive=nothing)
    assert "x.parquet: expected rows, found none" in mistake(path)
    for content in (b"", b"PAR1", b'{"query": "a", "positive": "b"}\n'):
        path.write_bytes(content)
        assert "x.parquet: not parquet: " in mistake(path)
    # A sound footer over damaged pages, as a broken download or disk leaves it.
    parquet(path, query=["a"] * 500, positive=[f"b{i}" for i in range(500)])
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\0" * 200 + whole[220:])
    assert "x.parquet: not parquet: " in mistake(path)


def test_names(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    assert table_of(path, name="mine").name == "mine"
    jsonl(tmp_path / "q.jsonl", PAIRS)
    assert [t.name for t, _ in reports(tmp_path, name="mine")] == ["mine/p", "mine/q"]
    given = source(path, prompt="x")
    assert sources.read(given)[0][0].source is given


def test_built_in_text():
    train = sources.cldr_tables()[0].slice(0, 500).to_pylist()
    table = table_of("cldr")
    assert (table.name, table.nway, table.task) == ("cldr", False, "retrieval")
    assert items(table)[:500] == [[row["query"], row["positive"]] for row in train]


# ---- mixtures ----


def expanded(*data, given=()):
    return sources.expand(config.Run(data=data, sources=given))


def test_mixtures(tmp_path):
    deep = tmp_path / "deep"
    deep.mkdir()
    p, q = (jsonl(deep / f"{name}.jsonl", PAIRS) for name in "pq")
    for code in ("en", "de"):
        (deep / f"talk.{code}").write_text("a\n")
    listed = [
        {"path": "p.jsonl", "task": "retrieval", "prompt": "Q: ", "weight": 2, "cap": 5},
        {"path": q, "corpus": "docs.jsonl", "num_negatives": 3},
        *({"path": name} for name in ("cldr", "org/name", "talk", "gone.csv")),
    ]
    (deep / "mix.json").write_text(json.dumps({"sources": listed}, indent=1))
    first, path = source("x"), str(deep / "mix.json")
    run = expanded("cldr", path, "y.parquet", given=(first,))
    assert run.data == ("cldr", "y.parquet")
    assert run.sources == (
        first,
        source(p, task="retrieval", prompt="Q: ", weight=2.0, cap=5),
        source(q, corpus=str(deep / "docs.jsonl"), num_negatives=3),
        source("cldr"),
        source("org/name"),
        source(deep / "talk"),
        source(deep / "gone.csv"),  # `read` reports that it does not exist
    )
    assert expanded(path).data == () and sources.expand(run) == run
    assert sources.all_of(run) == [source("cldr"), source("y.parquet"), *run.sources]


@pytest.mark.parametrize(
    "content", ['{"query": "a", "positive": "b"}\n{"query": "c", "positive": "d"}', "[]"]
)
def test_json_rows_are_not_a_mixture(content, tmp_path):
    (tmp_path / "p.json").write_text(content)
    for path in (str(tmp_path / "p.json"), str(tmp_path / "none.json")):
        assert expanded(path, "cldr").data == (path, "cldr")


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"sources": [\n{"path": "a"},\n]}', r":3: invalid JSON"),
        ('{"sources": [{"path": "a", "promt": "x"}]}', r"\[0\]: no such key 'promt' \(near"),
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
        (b'{"sources": [\n"\xff"]}', ": invalid UTF-8 at byte 15"),
    ],
)
def test_malformed_mixtures(content, words, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "mix.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"mix\.json.*{words}"):
        expanded(str(tmp_path / "mix.json"))


YAML_MIXTURE = """
sources:
  - path: p.jsonl  # a comment
    prompt: "Q: "
    weight: 2
    streaming: true
    temperature: 0.05
    columns: {query: title, positive: body, negatives: [odd]}
  - {path: q.csv, header: false}
"""


def test_mixture_in_yaml(tmp_path):
    """YAML gives the sources that JSON gives."""
    (tmp_path / "mix.yaml").write_text(YAML_MIXTURE)
    columns = {"query": "title", "positive": "body", "negatives": ["odd"]}
    listed = [
        {"path": "p.jsonl", "prompt": "Q: ", "weight": 2, "streaming": True, "temperature": 0.05}
        | {"columns": columns},
        {"path": "q.csv", "header": False},
    ]
    (tmp_path / "mix.json").write_text(json.dumps({"sources": listed}))
    one, other = (expanded(str(tmp_path / f"mix.{kind}")).sources for kind in ("yaml", "json"))
    assert one == other and one[0].columns.negatives == ("odd",)


@pytest.mark.parametrize(
    "line, words",
    [
        ("name: no", r"mix\.yml:3: expected text in quotes, got no, which YAML takes for a bool"),
        ("name: 2024-05-01", r"mix\.yml:3: .* got 2024-05-01, .* a timestamp: write "),
        ("name: 1:30", r"mix\.yml:3: expected text in quotes, got 1:30, .* for a int"),
        ("path: b", r"mix\.yml:3: expected distinct names as keys, got 'path'"),
        ("on: b", r"mix\.yml:3: expected text in quotes, got on"),
        ("promt: b", r"mix\.yml: sources\[0\]: no such key 'promt'"),
        ("name: [a", r"mix\.yml:\d: invalid YAML"),
        ("name: !!python/name:os.system", r"mix\.yml:3: invalid YAML"),
    ],
)
def test_malformed_yaml(line, words, tmp_path):
    (tmp_path / "mix.yml").write_text(f"sources:\n  - path: a\n    {line}\n")
    with pytest.raises(ValueError, match=words):
        expanded(str(tmp_path / "mix.yml"))


# ---- large sources ----


@pytest.fixture
def large(tmp_path, monkeypatch):
    """The folder of stored texts, where every source counts as large."""
    monkeypatch.setattr(sources, "BIG", 0)
    monkeypatch.setattr(tables, "CHUNK", 3)
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


def many(path, kind):
    """Rows with something of all that is left out."""
    rows = [
        {
            "query": f"q{i % 40}",
            "positive": f"p{i % 50}",
            "negatives": [f"n{j}" for j in range(i % 3)],
            "score": (i % 10) / 2 if i % 4 or kind == "sts" else None,
        }
        for i in range(300)
    ]
    rows[0] |= {"query_lang": "eng", "positive_lang": "deu"}
    if kind == "nway":
        rows = [{"id": i % 37, "lang": f"l{i % 7}", "text": f"t{i % 60}"} for i in range(400)]
    return jsonl(path / "p.jsonl", rows)


@pytest.mark.parametrize("cap", [0, 20])
@pytest.mark.parametrize("held_out", [frozenset(), {"q1", "p3", "t5", "t6"}])
@pytest.mark.parametrize("kind", ["pairs", "sts", "nway"])
def test_large_tables_equal_small_ones(cap, held_out, kind, large, tmp_path, monkeypatch):
    path, task = many(tmp_path, kind), "sts" if kind == "sts" else "auto"
    with monkeypatch.context() as patch:
        patch.setattr(sources, "BIG", 2**26)
        ((want, counted),) = reports(path, held_out=held_out, cap=cap, task=task)
    for _ in range(2):  # written, then read
        ((table, report),) = reports(path, held_out=held_out, cap=cap, task=task)
        assert isinstance(table.texts, StoredTexts) and isinstance(table.ids, np.memmap)
        same_table(table, want)
        assert table.source == want.source
        assert report == counted
        assert table.texts[2:9] == want.texts[2:9]
    (entry,) = large.iterdir()
    names = {"texts.arrow", "ids.npy", "starts.npy", "about.json", cache.WHOLE, cache.LOCK}
    assert {p.name for p in entry.iterdir()} - {"scores.npy"} == names


def test_stored_tables_are_not_read_again(large, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    table = table_of(path)
    monkeypatch.setattr(sources, "_make", lambda *_: 1 / 0)
    same_table(table_of(path), table)
    assert table_of(path, prompt="x").source.prompt == "x"  # which changes no text


@pytest.mark.parametrize("name", ["ids.npy", "starts.npy", "texts.arrow", "about.json"])
def test_poisoned_table_is_read_again(name, large, tmp_path, monkeypatch):
    """Bytes change, the size stays."""
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "BIG", 2**26)
        want = table_of(path)
    table_of(path)
    (entry,) = large.iterdir()
    whole = (entry / name).read_bytes()
    half = len(whole) // 2
    (entry / name).write_bytes(whole[:half] + b"\xff" * (len(whole) - half))
    with pytest.warns(UserWarning, match=f"{name} is not what was written; it is built again"):
        same_table(table_of(path), want)
    assert (entry / name).read_bytes() == whole


def test_keys_of_stored_tables(large, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PAIRS)
    changes = [{}, {"name": "x"}, {"cap": 2}, {"task": "bitext"}, {"held_out": {"eins"}}]
    for n, change in enumerate([*changes, {"bad_rows": "skip"}], 1):
        read(path, **change)
        assert len(list(large.iterdir())) == n
    jsonl(tmp_path / "p.jsonl", PAIRS[:3])
    assert len(read(path)[0]) == 3 and len(list(large.iterdir())) == 7
    for _ in range(2):
        assert len(read(path, held_out={"eins"})[0]) == 2


def test_malformed_large_source(large, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [*PAIRS, {"query": "a"}])
    assert "p.jsonl:5: positive" in mistake(path) and not list(large.iterdir())
    for _ in range(2):
        found, report = read(path, "skip")
        assert len(found) == 4 and report.bad == 1
        assert report.bad_rows == [f"{path}:5: positive: expected text, got None"]


# ---- streams ----


def test_stream_reads_row_by_row(tmp_path):
    """The second row is not read before it is asked for."""
    path = jsonl(tmp_path / "p.jsonl", [{"query": "a", "pos": ["b", "c"], "neg": ["d"]}, {}])
    stream = sources.items(source(path))
    assert next(stream) == layouts.Item("a", "b", ["d"], None, f"{path}:1")
    assert next(stream).positive == "c"
    with pytest.raises(ValueError, match=r"p\.jsonl:2: query: expected text"):
        next(stream)


def test_stream_leaves_out_what_a_table_does(tmp_path):
    lines = [{"query": f"q{i}", "positive": f"p{i}", "score": i / 10} for i in range(11)]
    path = jsonl(tmp_path / "p.jsonl", [*lines, {"query": ""}])
    report = layouts.Report("p")
    stream = sources.items(source(path), bad_rows="skip", held_out={"p9"}, report=report)
    assert [item.query for item in stream] == ["q8", "q10"]
    found, whole = read(path, "skip", {"p9"})
    assert found == [["q8", "p8"], ["q10", "p10"]]
    for one in (report, whole):
        assert (one.rows, one.items, one.bad, one.held_out, one.by_score) == (12, 2, 1, 2, 8)


def test_stream_of_sts(tmp_path):
    lines = [{"sentence1": f"{i}", "sentence2": "b", "score": i / 4} for i in range(6)]
    stream = sources.items(source(jsonl(tmp_path / "p.jsonl", lines), task="sts"))
    assert [next(stream).score for _ in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match=r":6: score: expected a number 0\.\.1, got 1\.25"):
        next(stream)


def test_stream_of_a_directory(tmp_path):
    for name in "ba":
        jsonl(tmp_path / f"{name}.jsonl", [{"query": name, "positive": "x"}])
    assert [item.query for item in sources.items(source(tmp_path))] == ["a", "b"]


PAIR, NWAY = {"query": "a", "positive": "b"}, {"id": "1", "lang": "en", "text": "a"}


@pytest.mark.parametrize(
    "rows, fields, held_out, words",
    [
        ([NWAY], {}, (), "expected pairs for a stream, got an n-way"),
        ([PAIR], {"cap": 3}, (), "cap: expected 0 for a stream, got 3"),
        ([PAIR], {}, {"a"}, "expected pairs without .*, found none"),
        ([], {}, (), "expected rows, found none"),
    ],
)
def test_what_cannot_be_a_stream(rows, fields, held_out, words, tmp_path):
    some = source(jsonl(tmp_path / "p.jsonl", rows), **fields)
    with pytest.raises(ValueError, match=rf"p\.jsonl: {words}"):
        list(sources.items(some, held_out=held_out))


# ---- real text ----

SHARED = Path(__file__).parents[3] / "shared" / "data" / "train"


# A table that lists where the texts come from lies there as well.
@pytest.mark.filterwarnings("ignore:.* left out, beside")
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
def test_every_shared_file_reads():
    """All columns of real files are understood, or known to be unused."""
    found = reports(SHARED)
    assert len(found) == len([*SHARED.glob("*.parquet"), *SHARED.glob("*.jsonl")])
    for table, report in found:
        assert len(table) > 0 and len(table.texts) >= 2 * len(table), table.name
        assert report.roles.endswith(("unused: none", "unused: source")) and not report.bad


def test_a_mixture_that_nests_too_deep(tmp_path):
    path = tmp_path / "mixture.json"
    path.write_text('{"sources": ' + "[" * 200_000)
    with pytest.raises(ValueError, match=r"mixture\.json: invalid JSON: nested too deeply"):
        sources.expand(config.Run(data=(str(path),)))
