"""What to score, read from files: every layout, and every mistake in one with its place."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed.data import eval_sets

WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]
LANGS = {"deu": "x{}x", "fra": "le {} {}"}


def tatoeba_directory(path):
    path.mkdir()
    for lang, form in LANGS.items():
        other = "".join(form.format(w, w[::-1]) + "\n" for w in WORDS)
        (path / f"tatoeba.{lang}-eng.{lang}").write_text(other, encoding="utf-8")
        (path / f"tatoeba.{lang}-eng.eng").write_text("\n".join(WORDS), encoding="utf-8")
    return path


def test_tatoeba(tmp_path):
    (task,) = eval_sets.read(str(tatoeba_directory(tmp_path / "tat")))
    assert task.name == "tat" and set(task.groups) == {("deu", ""), ("fra", "")}
    a, b = task.groups["fra", ""]
    assert [task.texts[i] for i in b] == WORDS
    assert [task.texts[i] for i in a] == [f"le {w} {w[::-1]}" for w in WORDS]


def test_tatoeba_lines_end_where_files_say(tmp_path):
    """Other separators of Unicode occur inside sentences; an empty line is a sentence, too."""
    odd = ["a\u2028b", "c\x85d", "e\x0cf\x1cg", "", "h"]
    (tmp_path / "tatoeba.abc-eng.abc").write_bytes(("\r\n".join(odd) + "\r\n").encode())
    (tmp_path / "tatoeba.abc-eng.eng").write_text("1\n2\n3\n4\n5\n")
    (task,) = eval_sets.read(str(tmp_path))
    a, b = task.groups["abc", ""]
    assert [task.texts[i] for i in a] == odd
    assert [task.texts[i] for i in b] == list("12345")


@pytest.mark.parametrize("lines", ["", "one\n", "a\n" * 11])
def test_tatoeba_of_unequal_length(lines, tmp_path):
    directory = tatoeba_directory(tmp_path / "tat")
    (directory / "tatoeba.deu-eng.deu").write_text(lines)
    with pytest.raises(ValueError) as caught:
        eval_sets.read(str(directory))
    assert "tatoeba.deu-eng.deu: expected as many lines as tatoeba.deu-eng.eng" in str(caught.value)
    assert f"got {lines.count(chr(10))} and 10" in str(caught.value)


def test_tatoeba_with_a_side_missing(tmp_path):
    directory = tatoeba_directory(tmp_path / "tat")
    (directory / "tatoeba.deu-eng.deu").unlink()
    with pytest.raises(ValueError, match=r"expected tatoeba\.deu-eng\.deu beside it, found none"):
        eval_sets.read(str(directory))
    only = tmp_path / "only"
    only.mkdir()
    (only / "tatoeba.deu-eng.deu").write_text("a\n")
    with pytest.raises(ValueError, match=r"only: expected tatoeba\.xxx-eng\.eng, found none"):
        eval_sets.read(str(only))


ROWS = [
    {"id": "1", "lang": "eng", "text": "sea"},
    {"id": "2", "lang": "eng", "text": "sun"},
    {"id": "1", "lang": "deu", "text": "Meer"},
    {"id": "2", "lang": "deu", "text": "Sonne"},
    {"id": "2", "lang": "fra", "text": "soleil"},
    {"id": "3", "lang": "fra", "text": "sans anglais"},
]


@pytest.mark.parametrize(
    "suffix, key", [("jsonl", "id"), ("parquet", "id"), ("parquet", "verse_id")]
)
def test_nway_tables(suffix, key, tmp_path):
    path = tmp_path / f"n.{suffix}"
    rows = [{key if k == "id" else k: v for k, v in row.items()} for row in ROWS]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    (task,) = eval_sets.read(str(path))
    pairs = {
        group: [(task.texts[i], task.texts[j]) for i, j in zip(*sides, strict=True)]
        for group, sides in task.groups.items()
    }
    assert task.name == "n" and pairs == {
        ("deu", ""): [("Meer", "sea"), ("Sonne", "sun")],
        ("fra", ""): [("soleil", "sun")],
    }


def test_nway_keeps_kinds_apart():
    rows = [
        {"id": "1", "lang": lang, "text": f"{kind} {lang}", "kind": kind}
        for kind in ("date", "name")
        for lang in ("en", "de")
    ]
    task = eval_sets.nway("n", rows)
    assert {g: task.texts[b[0]] for g, (_, b) in task.groups.items()} == {
        ("de", "date"): "date en",
        ("de", "name"): "name en",
    }


def test_nway_errors(tmp_path):
    with pytest.raises(ValueError, match="n: expected English .* among the languages"):
        eval_sets.nway("n", [row for row in ROWS if row["lang"] != "eng"])
    with pytest.raises(ValueError, match="n: expected one text .* another of '1' in eng"):
        eval_sets.nway("n", [*ROWS, ROWS[0] | {"text": "ocean"}])
    with pytest.raises(ValueError, match="n: expected ids shared with eng, found none"):
        eval_sets.nway("n", ROWS[:2] + ROWS[5:])
    path = tmp_path / "p.jsonl"
    path.write_text('{"query": "a", "positive": "b"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl: expected an n-way table"):
        eval_sets.read(str(path))
    with pytest.raises(ValueError, match="nothing, which does not exist"):
        eval_sets.read(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"none\.csv, which does not exist"):
        eval_sets.read(str(tmp_path / "none.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected tatoeba.*found none"):
        eval_sets.read(str(tmp_path / "empty"))


def test_sts_csv(tmp_path):
    path = tmp_path / "s.csv"
    long = "f" * 200_000  # more than the csv module takes by default
    path.write_text(f'sentence1,sentence2,score,x\n"a, b",c,4.5,1\n"d\ne",{long},0,2\n')
    (task,) = eval_sets.read(str(path))
    assert task.name == "s" and task.texts == ["a, b", "c", "d\ne", long]
    assert task.scores.tolist() == [4.5, 0.0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a,b,c\n1,2,3\n", r"s\.csv: expected columns sentence1, sentence2, score, no 'sentence1'"),
        ("sentence1,sentence2\n1,2\n", r"s\.csv: expected columns .* no 'score'"),
        ("sentence1,sentence2,score\na,b,1\na,b,high\n", r"s\.csv:3: score: .*number, got 'high'"),
        ("sentence1,sentence2,score\na,b\n", r"s\.csv:2: score: expected a number, got None"),
        ("score,sentence1,sentence2\n1,a,b\n2,c\n", r"s\.csv:3: .*sentence2.*got 'c', None"),
        ("sentence1,sentence2,score\na,b,nan\n", r"s\.csv:2: .*score: expected .*number"),
        ("sentence1,sentence2,score\na\rb,c,1\n", r"s\.csv:2: .*number, got None"),
        ("sentence1,sentence2,score\n", r"s\.csv: expected rows, found none"),
        ("", r"s\.csv: expected rows, found none"),
    ],
)
def test_sts_csv_errors(content, message, tmp_path):
    (tmp_path / "s.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        eval_sets.read(str(tmp_path / "s.csv"))


def test_a_directory_of_tasks(tmp_path):
    (tmp_path / "b.csv").write_text("sentence1,sentence2,score\na,b,1\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "notes.md").write_text("x")
    assert [task.name for task in eval_sets.read(str(tmp_path))] == ["a", "b"]


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "tatoeba.deu-eng.eng").write_text("sea\nsun\n")
    (tmp_path / "tatoeba.deu-eng.deu").write_bytes(b"Meer\nOst\xff\n")
    with pytest.raises(ValueError, match=r"tatoeba\.deu-eng\.deu: not UTF-8 at byte 8"):
        eval_sets.read(str(tmp_path))
    (tmp_path / "bad.csv").write_bytes(b"sentence1,sentence2,score\n\xe9,b,1\n")
    with pytest.raises(ValueError, match=r"bad\.csv: not UTF-8 at byte 26"):
        eval_sets.read(str(tmp_path / "bad.csv"))


def test_two_tasks_of_one_name(tmp_path):
    rows = [{"id": "1", "lang": lang, "text": lang} for lang in ("eng", "deu")]
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "dev.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, rows)))
    assert len(eval_sets.read_all([str(files[0])])) == 1
    with pytest.raises(ValueError, match="distinct file or directory names, got dev, dev"):
        eval_sets.read_all([str(file) for file in files])


def test_a_mark_at_the_start_is_no_text(tmp_path):
    (tmp_path / "tatoeba.abc-eng.abc").write_bytes("\ufeffa\n\ufeffb\n".encode())
    (tmp_path / "tatoeba.abc-eng.eng").write_text("1\n2\n")
    (task,) = eval_sets.read(str(tmp_path))
    assert task.texts == ["a", "\ufeffb", "1", "2"] and task.tatoeba
    (tmp_path / "s.csv").write_bytes("\ufeffsentence1,sentence2,score\na,b,1\n".encode())
    assert eval_sets.read(str(tmp_path / "s.csv"))[0].texts == ["a", "b"]


# ---- BUCC ----


def bucc(path, splits=("dev", "test"), gold=("dev",), pair="de-en"):
    path.mkdir(exist_ok=True)
    de, en = pair.split("-")
    for split in splits:
        ids = [f"{split}-{i}" for i in range(4)]
        for side in (de, en):
            lines = [f"{side}-{key}\t{side} {key}\ttabs stay" for key in ids]
            (path / f"{pair}.{split}.{side}").write_text("\n".join(lines) + "\n")
        if split in gold:
            pairs = [f"{de}-{ids[2]}\t{en}-{ids[1]}", f"{de}-{ids[0]}\t{en}-{ids[3]}"]
            (path / f"{pair}.{split}.gold").write_text("\n".join(pairs) + "\n")
    return path


@pytest.mark.parametrize(
    "splits, gold, tuned, reported",
    [
        (("dev", "test"), ("dev",), "dev", "dev"),  # as published: test has no gold
        (("dev", "test"), ("dev", "test"), "dev", "test"),
        (("training", "test"), ("training", "test"), "training", "test"),
        (("dev", "training"), ("dev", "training"), "dev", "training"),
        (("dev", "training", "test"), ("dev", "training", "test"), "dev", "test"),
        (("dev", "training"), ("training",), "training", "training"),
    ],
)
def test_bucc(splits, gold, tuned, reported, tmp_path):
    (task,) = eval_sets.read(str(bucc(tmp_path / "b", splits, gold)))
    assert task.name == "b" and task.splits == {"de": (tuned, reported)}
    for part, split in zip(task.parts["de"], (tuned, reported), strict=True):
        assert task.texts[part.source][1] == f"de {split}-1\ttabs stay"
        assert task.texts[part.target][1] == f"en {split}-1\ttabs stay"
        assert part.gold.tolist() == [[0, 3], [2, 1]]
    assert len(task.texts) == 8 * len({tuned, reported})  # nothing that is not scored


def test_bucc_of_several_languages(tmp_path):
    bucc(bucc(tmp_path / "b"), pair="zh-en")
    (task,) = eval_sets.read(str(tmp_path / "b"))
    assert list(task.parts) == ["de", "zh"]
    assert task.texts[task.parts["zh"][0].target][0] == "en dev-0\ttabs stay"


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("dev.de", "a\tb\nc\n", r"de-en\.dev\.de:2: expected id TAB text, got 'c'"),
        ("dev.en", "a\tb\na\tc\n", r"de-en\.dev\.en:2: id: expected a new one, got 'a' again"),
        ("dev.gold", "de-dev-0\ten-dev-9\n", r"gold:1: expected an id of de-en\.dev\.en, got 'en-"),
        ("dev.gold", "en-dev-0\ten-dev-1\n", r"gold:1: expected an id of de-en\.dev\.de, got 'en-"),
        ("dev.gold", "", r"de-en\.dev\.gold: expected lines, found none"),
        ("dev.de", None, r"expected de-en\.dev\.de, found none"),
        ("dev.gold", None, r"expected de-en\.dev\.gold or de-en\.training\.gold, found none"),
    ],
)
def test_bucc_errors(file, content, message, tmp_path):
    path = bucc(tmp_path / "b") / f"de-en.{file}"
    path.write_text(content) if content is not None else path.unlink()
    with pytest.raises(ValueError, match=message):
        eval_sets.read(str(tmp_path / "b"))


def test_bucc_needs_gold_to_tune_on(tmp_path):
    with pytest.raises(ValueError, match=r"expected de-en\.dev\.gold or .*training\.gold"):
        eval_sets.read(str(bucc(tmp_path / "b", gold=("test",))))


# ---- a pool ----


def un(path, pool=("Mehr", "Sonne", "Mehr", "")):
    path.mkdir()
    (path / "un.en-de.en").write_text("sea\nsun\n")
    (path / "un.en-de.de").write_text("Meer\nSonne\n")
    (path / "un.en-fr.en").write_text("moon\n")
    (path / "un.en-fr.fr").write_text("lune\n")
    if pool:
        (path / "pool.de").write_text("\n".join(pool) + "\n")
    return path


def test_un(tmp_path):
    (task,) = eval_sets.read(str(un(tmp_path / "un")))
    assert task.name == "un" and list(task.sides) == ["de", "fr"]
    side = task.sides["de"]
    assert (side.queries, side.answers) == (["sea", "sun"], ["Meer", "Sonne"])
    assert list(side.others()) == ["Mehr", "Mehr", ""]  # without what is an answer
    assert list(side.others()) == ["Mehr", "Mehr", ""]  # again
    assert list(task.sides["fr"].others()) == []
    texts = ["sea", "sun", "Meer", "Sonne", "Mehr", "Mehr", "", "moon", "lune"]
    assert list(task.texts) == texts == list(task.texts) and len(task.texts) == len(texts)


def test_un_errors(tmp_path):
    path = un(tmp_path / "a")
    (path / "un.en-fr.fr").write_text("lune\nsoleil\n")
    with pytest.raises(ValueError, match=r"un\.en-fr\.en: expected as many lines as un\.en-fr\.fr"):
        eval_sets.read(str(path))
    path = un(tmp_path / "b")
    (path / "un.en-fr.fr").unlink()
    with pytest.raises(ValueError, match=r"un\.en-fr\.en: expected un\.en-fr\.fr beside it"):
        eval_sets.read(str(path))
    path = un(tmp_path / "c")
    (path / "un.en-fr.es").write_text("luna\n")
    with pytest.raises(ValueError, match=r"un\.en-fr\.es: expected \.en or \.fr at its end"):
        eval_sets.read(str(path))
    path = un(tmp_path / "d")
    for side in ("ru", "fr"):
        (path / f"un.ru-fr.{side}").write_text("x\n")
    with pytest.raises(ValueError, match=r"expected one file towards fr, got another"):
        eval_sets.read(str(path))


# ---- BEIR ----

CORPUS = [
    {"_id": "d1", "title": "The sea", "text": "is wet."},
    {"_id": "d10", "title": "", "text": " the sun \n"},
    {"_id": 2, "text": "the moon"},
    {"_id": "é", "title": "only a title", "text": ""},
]
QUERIES = [{"_id": f"q{i}", "text": text} for i, text in enumerate(["sea?", "sun?", "moon?"])]
QRELS = "query-id\tcorpus-id\tscore\nq2\t2\t1\nq0\td10\t0\nq0\td1\t2\nq2\té\t-1\n"


def beir(path, corpus=CORPUS, queries=QUERIES, **splits):
    (path / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for split, content in (splits or {"test": QRELS}).items():
        (path / "qrels" / f"{split}.tsv").write_text(content, encoding="utf-8")
    return path


def test_beir(tmp_path):
    (task,) = eval_sets.read(str(beir(tmp_path / "b")))
    assert task.name == "b"
    assert task.queries == ["sea?", "moon?"]  # the other has no judgements
    documents = ["The sea is wet.", "the sun", "the moon", "only a title"]
    assert list(task.documents()) == documents
    # d1 < d10, and "2" before both; é after all.
    assert task.order_N.tolist() == [1, 2, 0, 3]
    assert task.judged.tolist() == [[0, 0, 2], [0, 1, 0], [1, 2, 1], [1, 3, -1]]
    # A titled passage is held out of training with its title and without.
    texts = [*task.queries, documents[0], "is wet.", *documents[1:], ""]
    assert sorted(task.texts) == sorted(texts) and len(task.texts) == len(texts)


def test_splits_of_beir(tmp_path):
    other = "query-id\tcorpus-id\tscore\nq1\td10\t1\n"
    path = beir(tmp_path / "b", test=QRELS, train=other)
    assert eval_sets.read(str(path))[0].queries == ["sea?", "moon?"]
    (task,) = eval_sets.read(str(path / "qrels" / "train.tsv"))
    assert (task.name, task.queries) == ("b-train", ["sun?"])
    assert eval_sets.read(str(beir(tmp_path / "one", dev=other)))[0].queries == ["sun?"]
    two = beir(tmp_path / "two", dev=QRELS, train=other)
    with pytest.raises(ValueError, match=r"expected qrels/test\.tsv, or one other .* got dev, tra"):
        eval_sets.read(str(two))
    # A directory of them, beside files.
    (tmp_path / "s.csv").write_text("sentence1,sentence2,score\na,b,1\n")
    (two / "qrels" / "dev.tsv").unlink()
    assert [task.name for task in eval_sets.read(str(tmp_path))] == ["b", "one", "s", "two"]


@pytest.mark.parametrize(
    "what, message",
    [
        (dict(corpus=["{"]), r"corpus\.jsonl:1: not json"),
        (dict(corpus=[{"text": "x"}]), r"corpus\.jsonl:1: _id: expected text, got None"),
        (dict(corpus=[*CORPUS, {"_id": "z"}]), r"corpus\.jsonl:5: text: expected text, got None"),
        (dict(corpus=[{"_id": "z", "title": 3, "text": ""}]), r":1: title: expected text, got 3"),
        (dict(corpus=[{"_id": "z", "text": "\ud83d"}]), r"corpus\.jsonl:1: text: expected text"),
        (dict(corpus=[*CORPUS, CORPUS[1]]), r"corpus\.jsonl:5: _id: .* new one, got 'd10' again"),
        (dict(queries=[*QUERIES, QUERIES[0]]), r"queries\.jsonl:4: _id: .* got 'q0' again"),
        (dict(queries=QUERIES[:2]), r"test\.tsv:2: query-id: .* id of queries\.jsonl, got 'q2'"),
        (dict(corpus=CORPUS[1:2], test=QRELS[:32]), r"test\.tsv: corpus-id: .* got '2' \.\."),
        (dict(test=QRELS + "q1\td1\n"), r"test\.tsv:6: expected query-id TAB corpus-id TAB score"),
        (dict(test=QRELS + "q1\td1\thigh\n"), r"test\.tsv:6: score: expected an integer, got 'hi"),
        (dict(test="q1\td1\t1\n"), r"test\.tsv:1: expected the header query-id, corpus-id, score"),
        (dict(test="query-id\tcorpus-id\tscore\n"), r"test\.tsv: expected judgements, found none"),
    ],
)
def test_beir_errors(what, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        eval_sets.read(str(beir(tmp_path / "b", **what)))


def test_judged_documents_that_the_corpus_lacks(tmp_path):
    """As in ArguAna: said, and never found."""
    path = beir(tmp_path / "b", corpus=CORPUS[:3])
    with pytest.warns(UserWarning, match=r"test\.tsv: judged documents .* lacks, .*: 1, first 'é'"):
        (task,) = eval_sets.read(str(path))
    assert task.judged.tolist() == [[0, 0, 2], [0, 1, 0], [1, 2, 1], [1, 3, -1]]
    assert len(task.order_N) == 3


def test_documents_of_a_querys_own_id(tmp_path):
    (task,) = eval_sets.read(
        str(beir(tmp_path / "b", corpus=[*CORPUS, {"_id": "q2", "text": "x"}]))
    )
    assert task.own_Q.tolist() == [-1, 4]


def test_beir_with_a_file_missing(tmp_path):
    for name in ("corpus", "queries"):
        path = beir(tmp_path / name)
        (path / f"{name}.jsonl").unlink()
        with pytest.raises(ValueError, match=rf"expected {name}\.jsonl, found none"):
            eval_sets.read(str(path))
    path = beir(tmp_path / "qrels")
    (path / "qrels" / "test.tsv").unlink()
    with pytest.raises(ValueError, match=r"expected qrels/test\.tsv.*got none"):
        eval_sets.read(str(path))
