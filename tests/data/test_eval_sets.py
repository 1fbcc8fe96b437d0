"""Evaluation sets from files: every layout, and every mistake in one with its place."""

import gzip
import json
import shutil

import pytest

from mlembed.data import eval_sets
from tests.data.samples import beir, jsonl, parquet

WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]
STS = "sentence1,sentence2,score\n"


def files(path, **contents):
    """Write texts or bytes to files name.suffix, `_` standing for a dot."""
    path.mkdir(exist_ok=True)
    for name, content in contents.items():
        content = content if isinstance(content, bytes) else content.encode()
        (path / name.replace("_", ".")).write_bytes(content)
    return path


def read(path):
    return eval_sets.read(str(path))


# ---- line-aligned pairs ----


def tatoeba(path):
    for lang, form in {"deu": "x{}x", "fra": "le {} {}"}.items():
        other = "".join(form.format(w, w[::-1]) + "\n" for w in WORDS)
        name = f"tatoeba_{lang}-eng"
        files(path, **{f"{name}_{lang}": other, f"{name}_eng": "\n".join(WORDS)})
    return path


def test_tatoeba(tmp_path):
    (task,) = read(tatoeba(tmp_path / "tat"))
    assert task.name == "tat" and set(task.groups) == {("deu", ""), ("fra", "")} and task.tatoeba
    a, b = task.groups["fra", ""]
    assert [task.texts[i] for i in b] == WORDS
    assert [task.texts[i] for i in a] == [f"le {w} {w[::-1]}" for w in WORDS]


@pytest.mark.parametrize("lines", ["", "one\n", "a\n" * 11])
def test_tatoeba_of_unequal_length(lines, tmp_path):
    directory = files(tatoeba(tmp_path / "tat"), **{"tatoeba_deu-eng_deu": lines})
    words = "deu: expected as many lines as tatoeba.deu-eng.eng.* got {} and 10"
    with pytest.raises(ValueError, match=words.format(lines.count("\n"))):
        read(directory)


def test_tatoeba_with_a_side_missing(tmp_path):
    directory = tatoeba(tmp_path / "tat")
    (directory / "tatoeba.deu-eng.deu").unlink()
    with pytest.raises(ValueError, match=r"expected tatoeba\.deu-eng\.deu beside it, found none"):
        read(directory)
    only = files(tmp_path / "only", **{"tatoeba_deu-eng_deu": "a\n"})
    with pytest.raises(ValueError, match=r"only: expected tatoeba\.xxx-eng\.eng, found none"):
        read(only)


def test_invalid_utf8(tmp_path):
    contents = {"tatoeba_deu-eng_eng": "sea\nsun\n", "tatoeba_deu-eng_deu": b"Meer\nOst\xff\n"}
    with pytest.raises(ValueError, match=r"deu-eng\.deu:2: expected UTF-8, got byte 0xff at 3"):
        read(files(tmp_path / "t", **contents))
    files(tmp_path, bad_csv=STS.encode() + b"\xe9,b,1\n")
    with pytest.raises(ValueError, match=r"bad\.csv:2: sentence1: expected UTF-8, got "):
        read(tmp_path / "bad.csv")


# ---- n-way tables ----

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
    rows = [{key if k == "id" else k: v for k, v in row.items()} for row in ROWS]
    (task,) = read((jsonl if suffix == "jsonl" else parquet)(tmp_path / f"n.{suffix}", rows))
    pairs = {
        group: [(task.texts[i], task.texts[j]) for i, j in zip(*sides, strict=True)]
        for group, sides in task.groups.items()
    }
    assert task.name == "n" and not task.tatoeba
    assert pairs.pop(("deu", "")) == [("Meer", "sea"), ("Sonne", "sun")]
    assert pairs == {("fra", ""): [("soleil", "sun")]}


def test_nway_kinds_are_apart():
    rows = [
        {"id": "1", "lang": lang, "text": f"{kind} {lang}", "kind": kind}
        for kind in ("date", "name")
        for lang in ("en", "de")
    ]
    task = eval_sets.nway("n", rows)
    english = {group: task.texts[b[0]] for group, (_, b) in task.groups.items()}
    assert english == {("de", "date"): "date en", ("de", "name"): "name en"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, ROWS[0] | {"text": "ocean"}], "n: expected one text .* another of '1' in eng"),
        (ROWS[:2] + ROWS[5:], "n: expected ids shared with eng, found none"),
    ],
)
def test_nway_errors(rows, message):
    with pytest.raises(ValueError, match=message):
        eval_sets.nway("n", rows)


def test_unknown_sources(tmp_path):
    with pytest.raises(ValueError, match=r"p\.jsonl: expected pairs with a score, "):
        read(jsonl(tmp_path / "p.jsonl", [{"query": "a", "positive": "b"}]))
    for name in ("nothing", "none.csv"):
        with pytest.raises(ValueError, match=f"{name}, which does not exist"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected tatoeba.*found none"):
        read(files(tmp_path / "empty"))


# ---- scored pairs, directories, names ----


def test_sts(tmp_path):
    long = "f" * 200_000  # more than the csv module takes by default
    content = f'\ufeff{STS[:-1]},x\n"a, b",c,4.5,1\n"d\ne",{long},0,2\n'
    (task,) = read(files(tmp_path, s_csv=content) / "s.csv")
    assert task.name == "s" and task.texts == ["a, b", "c", "d\ne", long]
    assert task.scores.tolist() == [4.5, 0.0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a,b,c\n1,2,3\n", r"s\.csv: expected columns query, positive .* got a, b, c"),
        (
            "sentence1,sentence2\n1,2\n",
            r"s\.csv: expected pairs with a score, .* positive=sentence2",
        ),
        (STS + "a,b,1\na,b,high\n", r"s\.csv:3: score: expected a number, got 'high'"),
        (STS + "a,b\n", r"s\.csv:2: expected 3 cells .*, got 2"),
        (STS + "a,b,\n", r"s\.csv:2: score: expected a number, got None"),
        (STS + "a,b,nan\n", r"s\.csv:2: score: expected a number, got 'nan'"),
        (STS, r"s\.csv: expected rows, found none"),
    ],
)
def test_sts_errors(content, message, tmp_path):
    files(tmp_path, s_csv=content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "s.csv")


def test_tasks_of_one_name(tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(jsonl(tmp_path / folder / "dev.jsonl", ROWS))
    assert len(eval_sets.read_all(paths[:1])) == 1
    with pytest.raises(ValueError, match="distinct file or directory names, got dev, dev"):
        eval_sets.read_all(paths)


# ---- BUCC ----


def bucc(path, splits=("dev", "test"), gold=("dev",), pair="de-en"):
    de, en = pair.split("-")
    for split in splits:
        ids = [f"{split}-{i}" for i in range(4)]
        for side in (de, en):
            lines = "".join(f"{side}-{key}\t{side} {key}\ttabs stay\n" for key in ids)
            files(path, **{f"{pair}_{split}_{side}": lines})
        if split in gold:
            pairs = f"{de}-{ids[2]}\t{en}-{ids[1]}\n{de}-{ids[0]}\t{en}-{ids[3]}\n"
            files(path, **{f"{pair}_{split}_gold": pairs})
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
    (task,) = read(bucc(tmp_path / "b", splits, gold))
    assert task.name == "b" and task.splits == {"de": (tuned, reported)}
    for part, split in zip(task.parts["de"], (tuned, reported), strict=True):
        assert task.texts[part.source][1] == f"de {split}-1\ttabs stay"
        assert task.texts[part.target][1] == f"en {split}-1\ttabs stay"
        assert part.gold.tolist() == [[0, 3], [2, 1]]
    assert len(task.texts) == 8 * len({tuned, reported})  # no text that is not scored


def test_bucc_of_several_languages(tmp_path):
    (task,) = read(bucc(bucc(tmp_path / "b"), pair="zh-en"))
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
        read(tmp_path / "b")
    with pytest.raises(ValueError, match=r"expected de-en\.dev\.gold or .*training\.gold"):
        read(bucc(tmp_path / "t", gold=("test",)))


# ---- a pool ----

UN = {
    "un_en-de_en": "sea\nsun\n",
    "un_en-de_de": "Meer\nSonne\n",
    "un_en-fr_en": "moon\n",
    "un_en-fr_fr": "lune\n",
    "pool_de": "Mehr\nSonne\nMehr\n\n",
}


def test_un(tmp_path):
    (task,) = read(files(tmp_path / "un", **UN))
    assert task.name == "un" and list(task.sides) == ["de", "fr"]
    side = task.sides["de"]
    assert (side.queries, side.answers) == (["sea", "sun"], ["Meer", "Sonne"])
    assert list(side.others()) == ["Mehr", "Mehr", ""]  # without lines that are answers
    assert list(side.others()) == ["Mehr", "Mehr", ""]  # and again
    assert list(task.sides["fr"].others()) == []
    texts = ["sea", "sun", "Meer", "Sonne", "Mehr", "Mehr", "", "moon", "lune"]
    assert list(task.texts) == texts == list(task.texts) and len(task.texts) == len(texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"un_en-fr_fr": "a\nb\n"}, r"un\.en-fr\.en: expected as many lines as un\.en-fr\.fr"),
        ({"un_en-fr_fr": None}, r"un\.en-fr\.en: expected un\.en-fr\.fr beside it"),
        ({"un_en-fr_es": "luna\n"}, r"un\.en-fr\.es: expected \.en or \.fr at its end"),
        ({"un_ru-fr_ru": "x\n", "un_ru-fr_fr": "x\n"}, "expected one file towards fr, got another"),
    ],
)
def test_un_errors(change, message, tmp_path):
    contents = {name: text for name, text in (UN | change).items() if text is not None}
    with pytest.raises(ValueError, match=message):
        read(files(tmp_path / "un", **contents))


# ---- other forms of the same ----


def test_sts_in_every_form(tmp_path):
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i / 2} for i in range(4)]
    names = dict(zip(rows[0], ("anchor", "positive", "similarity_score"), strict=True))
    renamed = [{names[key]: value for key, value in row.items()} for row in rows]
    jsonl(tmp_path / "a.jsonl", rows)
    parquet(tmp_path / "b.parquet", renamed)
    (tmp_path / "c.json").write_text(json.dumps(rows))
    lines = ["sentence1\tsentence2\tlabel", *(f"a{i}\tb{i}\t{i / 2}" for i in range(4))]
    (tmp_path / "d.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("a.jsonl", "b.parquet", "c.json", "d.tsv.gz"):
        (task,) = eval_sets.read(str(tmp_path / name))
        assert task.name == name[0] and task.scores.tolist() == [0, 0.5, 1, 1.5]
        assert task.texts == [side + str(i) for i in range(4) for side in "ab"]


def test_bitext_without_english(tmp_path):
    rows = [
        {"id": i, "lang": lang, "text": f"{lang} {i}"} for i in range(3) for lang in ("de", "fr")
    ]
    (task,) = eval_sets.read(jsonl(tmp_path / "n.jsonl", rows))
    assert list(task.groups) == [("fr", "")]
    pairs = [{"de": f"de {i}", "fr": f"fr {i}", "id": i} for i in range(3)]
    (other,) = eval_sets.read(jsonl(tmp_path / "p.jsonl", pairs))
    assert list(other.groups) == [("fr", "")] and other.texts == task.texts


# ---- rows that are left out ----


@pytest.mark.parametrize(
    "rows, bad, error",
    [
        ([{"sentence1": f"a{i}", "sentence2": "b", "score": i} for i in range(4)],
         {"sentence1": "x", "sentence2": "y", "score": "high"}, ":2: score: expected a number"),
        ([{"sentence1": f"a{i}", "sentence2": "b", "score": i} for i in range(4)],
         {"sentence1": 3, "sentence2": "y", "score": 1}, ":2: sentence1: expected text, got 3"),
        ([{"id": i, "lang": lang, "text": f"{lang} {i}"} for i in "abc" for lang in ("de", "en")],
         {"id": "a", "lang": "de", "text": "again"}, "x: expected one text of an id"),
        ([{"id": i, "lang": lang, "text": f"{lang} {i}"} for i in "abc" for lang in ("de", "en")],
         {"id": "d", "lang": "de", "text": ""}, ":2: text: expected text, got ''"),
        ([{"de": f"de {i}", "fr": f"fr {i}"} for i in range(3)], ["a", 3], ":2: expected an obj"),
    ],
)  # fmt: skip
def test_bad_rows_of_tables(rows, bad, error, tmp_path):
    (want,) = read(jsonl(tmp_path / "x.jsonl", rows))
    path = jsonl(tmp_path / "x.jsonl", [rows[0], bad, *rows[1:]])
    with pytest.raises(ValueError, match=error):
        read(path)
    with pytest.warns(UserWarning, match=f"x: 1 bad rows left out, first .*{error}"):
        (task,) = eval_sets.read(path, "skip")
    assert task.texts == want.texts


def test_compressed_directories(tmp_path):
    """Every layout of files by name, compressed or in part."""
    for make in (tatoeba, beir, lambda path: files(path, **UN), bucc):
        directory = make(tmp_path / "same")
        (want,) = read(directory)
        texts = list(want.texts)
        for number, path in enumerate(p for p in sorted(directory.rglob("*")) if p.is_file()):
            if number % 3 != 1:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
        (task,) = read(directory)
        assert list(task.texts) == texts and task.name == want.name
        shutil.rmtree(directory)
