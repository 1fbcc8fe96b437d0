"""Columns get roles by name, never by position alone, and are never dropped in silence."""

import gzip
import json

import pytest

from mlembed.config import Columns
from mlembed.data import tables
from mlembed.data.formats.roles import recognise
from tests.data.samples import items, jsonl, parquet, read, reports, table_of


def roles(**row):
    return recognise([row], Columns()).by_role()


# ---- by name ----


@pytest.mark.parametrize(
    "names, query, positive",
    [
        ("query positive", "query", "positive"),
        ("url query document id", "query", "document"),
        ("query response", "query", "response"),
        ("question context", "question", "context"),
        ("answer question", "question", "answer"),
        ("anchor pos neg", "anchor", "pos"),
        ("Anchor Positive", "Anchor", "Positive"),
        ("premise hypothesis", "premise", "hypothesis"),
        ("sentence_0 sentence_1", "sentence_0", "sentence_1"),
        ("sentence-A sentence-B", "sentence-A", "sentence-B"),
        ("question1 question2", "question1", "question2"),
        ("source target", "source", "target"),
        ("id en sw", "en", "sw"),
        ("deu eng", "deu", "eng"),
        ("zh-Hans pt_BR", "zh-Hans", "pt_BR"),
    ],
)
def test_pairs_by_name(names, query, positive):
    found = roles(**dict.fromkeys(names.split(), "x"))
    assert (found["query"], found["positive"]) == ((query,), (positive,))


@pytest.mark.parametrize(
    "names",
    [
        ["negative"],
        ["negatives"],
        ["hard_negatives"],
        ["neg_0", "neg_1"],
        ["neg0", "neg1"],
        ["negs"],
        ["negative1", "negative2"],
        ["negative_9", "negative_10"],
        ["negative_passages"],
        ["negative_ctxs", "hard_negative_ctxs"],
        ["rejected_response"],
        ["Hard Negative"],
    ],
)
def test_negatives_by_name(names):
    """They stand in the order of their numbers, however the file has them."""
    found = roles(query="a", positive="b", **dict.fromkeys(reversed(names), "x"))
    assert found["negatives"] == (tuple(names) if names[0][-1:].isdigit() else tuple(names[::-1]))


def test_unused_columns_are_named():
    found = recognise([dict.fromkeys(["url", "query", "pos", "pos_scores", "id"], "x")], Columns())
    assert found.unused == ("url", "pos_scores", "id")
    assert found.describe() == "query=query positive=pos; unused: url, pos_scores, id"


# ---- what is refused ----


@pytest.mark.parametrize(
    "row, words",
    [
        ({"title": "a", "body": "b"}, "expected columns query, positive"),
        ({"title": "a", "body": "b", "source": "web"}, "expected columns query, positive"),
        ({"input": "a", "output_summarize": "b", "output_predict": "c"}, "expected columns query"),
        ({"lang": "en", "text": "b"}, "expected columns query, positive"),
        ({"label": 1, "text": "b"}, "expected columns query, positive"),
        ({"question": "a", "context": "b", "answer": "c"}, "positive: expected one column, got"),
        ({"query": "a", "anchor": "b", "positive": "c"}, "query: expected one column, got"),
        ({"query": "a", "positive": "b", "score": 1, "similarity": 1}, "score: expected one col"),
        ({"query": "a", "positive": "b", "bad_answer": "c"}, "bad_answer: expected a column that"),
        ({"query": "a", "positive": "b", "instruction": "c"}, "instruction: expected a column"),
        ({"query": "a", "positive": "b", "is_duplicate": 1}, "is_duplicate: expected a column"),
        ({"query": "a", "positive": "b", "distractors": ["c"]}, "distractors: expected a column"),
        ({"query": "a", "positive": "b", "others": [{"text": "c"}]}, "others: expected a column"),
        ({"premise": "a", "hypothesis": "b", "label": 0}, "label: expected similarities, got clas"),
        ({"sentence1": "a", "sentence2": "b", "label": "entailment"}, "got classes: entailment"),
        ({"sentence1": "a", "sentence2": "b", "label": True}, "got classes: True"),
    ],
)
def test_what_cannot_be_meant(row, words):
    with pytest.raises(ValueError, match=words):
        recognise([row], Columns())


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [1], [1.0, 0.0], ["1", "0"], [-1, 1]])
def test_classes_are_not_similarities(labels, tmp_path):
    """A model must not learn from the pairs that do not follow."""
    texts = {f"premise {i}": label for i, label in enumerate(labels * 4)}
    rows = [{"premise": p, "hypothesis": f"so {p}", "label": label} for p, label in texts.items()]
    path = jsonl(tmp_path / "nli.jsonl", rows)
    with pytest.raises(ValueError, match=r"nli\.jsonl: label: expected similarities, got classes"):
        read(path)
    told = Columns(query="premise", positive="hypothesis", label=f"label={labels[0]}")
    found, report = read(path, columns=told)
    assert [texts[query] for query, _ in found] == [labels[0]] * 4
    assert report.by_label == 4 * (len(labels) - 1)


def test_labels_of_many_values_are_similarities(tmp_path):
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": i / 2} for i in range(11)]
    found, report = read(jsonl(tmp_path / "sts.jsonl", rows))
    assert [query for query, _ in found] == ["a8", "a9", "a10"] and report.scale == "0..5"


def test_new_columns_behind_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("mlembed.data.formats.layouts.PEEK", 2)
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(4)]
    rows[3] |= {"negative_1": "n", "url": "u"}
    path = jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=r"p\.jsonl:4: negative_1: expected a column of the first"):
        read(path)
    assert len(read(path, "skip")[0]) == 3


# ---- headers ----


@pytest.mark.parametrize(
    "lines, words",
    [
        (["how tall is it\t3776 m\t10 m", "how wide\t3 m\t4 m"], "how tall is it"),
        (["0\t100\t200", "1\t101\t201"], "'0'"),
        (["a text of more than forty characters in all\tb"] * 2, "a text of more than"),
    ],
)
def test_a_row_is_not_a_header(lines, words, tmp_path):
    path = tmp_path / "triples.tsv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"triples\.tsv:1: header: .*" + words):
        read(path)
    told = Columns(query="1", positive="2", negatives=("3",) if lines[0].count("\t") > 1 else ())
    found, report = read(path, header=False, columns=told)
    assert report.rows == 2 and found[0] == lines[0].split("\t")
    with pytest.raises(ValueError, match=r"columns\.query: expected one of 1, 2.*, got query"):
        read(path, header=False, columns=Columns(query="query", positive="2"))


def test_index_of_pandas(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(",query,positive\n0,a,b\n1,c,d\n")
    found, report = read(path)
    assert found == [["a", "b"], ["c", "d"]] and "unused: (index)" in report.roles


# ---- told ----


def test_told_columns(tmp_path):
    rows = [{"title": "a", "body": "b", "odd": ["c", "d"], "rate": 4.5, "answer": "x"}]
    path = jsonl(tmp_path / "p.jsonl", rows)
    told = Columns(query="title", positive="body", negatives=("odd",), score="rate")
    found, report = read(path, columns=told)
    assert found == [["a", "b", "c", "d"]]
    assert report.roles == "query=title positive=body negatives=odd score=rate; unused: answer"
    table = table_of(jsonl(tmp_path / "n.jsonl", [{"n": 1, "l": "en", "t": "a"}, {"n": 1, "l": "de",
        "t": "b"}]), columns=Columns(id="n", lang="l", text="t"))  # fmt: skip
    assert table.nway and items(table) == [["a", "b"]]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"query": "a"}, "columns.positive: expected a column beside the others"),
        ({"id": "a", "lang": "b"}, "columns.text: expected a column"),
        ({"id": "a", "lang": "b", "text": "c", "score": "d"}, "columns.score: expected none"),
        ({"query": "a", "positive": "b", "label": "c"}, "columns.label: expected COLUMN=VALUE"),
        ({"score": "c"}, "columns.query: expected a column"),
    ],
)
def test_incomplete_columns(fields, words):
    with pytest.raises(ValueError, match=words):
        Columns(**fields)


# ---- other layouts ----


@pytest.mark.parametrize(
    "line, want",
    [
        (["a", "b"], ["a", "b"]),
        (["a", "b", "c", "d"], ["a", "b", "c", "d"]),
        ({"set": {"query": "a", "pos": ["b"], "neg": ["c"]}}, ["a", "b", "c"]),
        ({"set": ["a", "b", "c"]}, ["a", "b", "c"]),
        ({"translation": {"en": "a", "de": "b"}}, ["a", "b"]),
        (
            {
                "query_id": 1,
                "query": "a",
                "positive_passages": [{"docid": "3", "title": "T", "text": "b"}],
                "negative_passages": [{"docid": "4", "title": "", "text": "c"}, {"text": "d"}],
            },
            ["a", "T b", "c", "d"],
        ),
        ({"query": "a", "pos": ["b"], "neg": [], "prompt": ""}, ["a", "b"]),
        ({"query": "a", "positive": "b", "prompt": "find: "}, ["find: a", "b"]),
    ],
)
@pytest.mark.parametrize("form", ["lines", "array", "indented"])
def test_layouts_of_json(line, want, form, tmp_path):
    text = {"lines": json.dumps(line), "array": json.dumps([line])}
    text["indented"] = json.dumps([line], indent=1)
    (tmp_path / "p.json").write_text(text[form])
    assert read(tmp_path / "p.json")[0] == [want]


def test_prompt_format(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"query": "q", "pos": ["p"], "prompt": "Find {it}"}])
    found, _ = read(path, prompt_format="Instruct: {}\nQuery: {}")
    assert found == [["Instruct: Find {it}\nQuery: q", "p"]]


@pytest.mark.parametrize(
    "kind, task",
    [("normal", "retrieval"), ("symmetric_class", "classification"), (None, "retrieval")],
)
def test_types_of_flag_embedding(kind, task, tmp_path):
    rows = [{"query": f"q{i}", "pos": ["p"], "neg": ["n"], "type": kind} for i in range(3)]
    assert table_of(jsonl(tmp_path / "p.jsonl", rows)).task == task
    path = jsonl(tmp_path / "q.jsonl", [*rows, *(rows[0] | {"type": t} for t in ("normal", "x"))])
    with pytest.raises(ValueError, match=r"q\.jsonl: type: expected one of normal"):
        table_of(path)
    assert table_of(path, task="clustering").task == "clustering"


def test_no_in_batch_negatives_by_name(tmp_path):
    rows = [{"query": "q", "pos": ["p"], "neg": ["n"]}]
    path = jsonl(tmp_path / "emotion-no_in_batch_neg.jsonl", rows)
    assert table_of(path).task == "classification"


# ---- scores ----


@pytest.mark.parametrize(
    "scores, scale, left",
    [
        ([0.85, 0.5, 1.0000001192092896], "0..1", [1, 0, 1]),  # a cosine in fp32 of equal texts
        ([0.85, -1e-7, 1.005], "0..1", [1, 0, 1]),
        ([5, 3.9, 4], "0..5", [1, 0, 1]),
        (["0.9", "1", "0.1"], "0..1", [1, 1, 0]),
    ],
)
def test_scale_of_scores(scores, scale, left, tmp_path):
    rows = [
        {"query": f"q{i}", "positive": f"p{i}", "score": score} for i, score in enumerate(scores)
    ]
    path = jsonl(tmp_path / "p.jsonl", rows)
    found, report = read(path)
    assert [query for query, _ in found] == [f"q{i}" for i, one in enumerate(left) if one]
    assert report.scale == scale and f"scores {scale}" in tables.describe(table_of(path), report)
    table = table_of(path, task="sts")
    assert table.scores.min() >= 0 and table.scores.max() <= 1


def test_margins_have_no_scale(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "score": s} for i, s in enumerate([0.3, 1.12])]
    with pytest.raises(ValueError, match=r"p\.jsonl: score: expected scores 0..1 or 0..5, got at"):
        read(jsonl(tmp_path / "p.jsonl", rows))


# ---- files ----


def test_unpaired_quotes_in_tsv(tmp_path):
    lines = [f"en {i}\tde {i}" for i in range(64)]
    lines[3], lines[40] = '"how do I\twie', 'he said "x"\t"er ""sagte"" x"'
    (tmp_path / "p.tsv").write_text("en\tde\n" + "\n".join(lines) + "\n")
    found, report = read(tmp_path / "p.tsv")
    assert len(found) == 64 and report.bad == 0
    assert found[3] == ['"how do I', "wie"] and found[40] == ['he said "x"', 'er "sagte" x']


def test_bad_lines_of_tsv_are_counted(tmp_path):
    lines = [f"en {i}\tde {i}" for i in range(64)]
    lines[3], lines[40] = "one cell", "three\tcells\tof it"
    (tmp_path / "p.tsv").write_text("en\tde\n" + "\n".join(lines) + "\n")
    found, report = read(tmp_path / "p.tsv", "skip")
    assert len(found) == 62 and report.bad == 2 and report.bad_rows[0].startswith(
        f"{tmp_path}/p.tsv:5: expected 2 cells"
    )  # fmt: skip


def test_utf_16_is_called_so(tmp_path):
    (tmp_path / "p.csv").write_bytes("query,positive\na,b\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"p\.csv: expected UTF-8, got UTF-16"):
        read(tmp_path / "p.csv")


@pytest.mark.parametrize("damage", ["cut", "not gzip"])
def test_damaged_compression(damage, tmp_path):
    rows = "".join(json.dumps({"query": f"q{i}", "positive": f"p{i}"}) + "\n" for i in range(5000))
    data = gzip.compress(rows.encode())
    data = data[: len(data) // 2] if damage == "cut" else rows.encode()
    (tmp_path / "p.jsonl.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"p\.jsonl\.gz: expected a whole gzip file"):
        read(tmp_path / "p.jsonl.gz")


def test_compressed_parallel_files(tmp_path):
    for code in ("en", "de"):
        (tmp_path / f"talk.{code}.gz").write_bytes(gzip.compress(f"{code} 1\n{code} 2\n".encode()))
    table = table_of(tmp_path / "talk")
    assert items(table) == [["de 1", "en 1"], ["de 2", "en 2"]] and table.task == "bitext"


def test_shards_are_one_source(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(40)]
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    parquet(tmp_path / "one" / "train.parquet", rows)
    for n in range(4):
        parquet(tmp_path / "many" / f"train-{n:05}-of-00004.parquet", rows[n * 10 : n * 10 + 10])
    parquet(tmp_path / "many" / "wmt14.parquet", rows[:3])
    parquet(tmp_path / "many" / "wmt15.parquet", rows[:2])
    (one,) = [table for table, _ in reports(tmp_path / "one")]
    many = [table for table, _ in reports(tmp_path / "many")]
    assert [table.name for table in many] == ["train", "wmt14", "wmt15"]
    assert items(many[0]) == items(one) and one.name == many[0].name


def test_cloned_repository(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(4)]
    (tmp_path / "repo" / "data").mkdir(parents=True)
    for split, part in (("train", rows[:3]), ("test", rows[3:])):
        parquet(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet", part)
    assert read(tmp_path / "repo")[0] == [["q0", "p0"], ["q1", "p1"], ["q2", "p2"]]
    assert read(tmp_path / "repo", split="test")[0] == [["q3", "p3"]]
