"""Scores against hand computation, the grid against each cell alone, files and their mistakes, and
the command as users run it."""

import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mlembed import config, evaluate, pretrained, tokenizer
from mlembed.encode import Encoder
from mlembed.evaluate import STS, Bitext
from mlembed.model import Transformer

WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]
LANGS = {"deu": "x{}x", "fra": "le {} {}"}

# ---- scores ----


def test_accuracy_by_hand():
    """Rows at 0, 10 and 20 degrees against rows at 4, 6 and 90.

    There: 0 -> 4 right, 10 -> 6 right, 20 -> 6 wrong. Back: 4 -> 0 right, 6 -> 10 right,
    90 -> 20 right.
    """

    def at(*degrees):
        return torch.tensor(
            [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]
        )

    there, back = evaluate.accuracy(at(0, 10, 20), at(4, 6, 90))
    assert (there, back) == (pytest.approx(2 / 3), 1.0)
    assert evaluate.accuracy(at(4, 6, 90), at(0, 10, 20)) == (back, there)
    assert evaluate.accuracy(at(0, 90), at(90, 0)) == (0.0, 0.0)


def nearest(vectors, a, b):
    """Share of rows a whose nearest among rows b is their own, in Python floats."""
    right = 0
    for i, row in enumerate(a):
        cosines = [
            np.dot(vectors[row], vectors[other])
            / np.linalg.norm(vectors[row])
            / np.linalg.norm(vectors[other])
            for other in b
        ]
        right += int(np.argmax(cosines)) == i
    return right / len(a)


def test_bitext_means_over_languages_then_kinds():
    """A language that lacks a kind counts in the others only, and every kind weighs the same."""
    rng = np.random.default_rng(0)
    task = Bitext("t", [], {})
    groups = {("de", "date"): 7, ("fr", "date"): 3, ("de", "name"): 5}
    vectors = []
    for group, n in groups.items():
        first = len(vectors)
        english = rng.normal(size=(n, 6))
        vectors += [*(english + 0.9 * rng.normal(size=(n, 6))), *english]
        task.groups[group] = (first + np.arange(n), first + n + np.arange(n))
    vectors = np.array(vectors)
    there = {g: nearest(vectors, a, b) for g, (a, b) in task.groups.items()}
    back = {g: nearest(vectors, b, a) for g, (a, b) in task.groups.items()}
    both = {g: (there[g] + back[g]) / 2 for g in groups}
    assert len(set(both.values())) == 3 and there != back  # else the means could be mixed up
    date = (both["de", "date"] + both["fr", "date"]) / 2
    name = both["de", "name"]
    got = evaluate.score_bitext(task, torch.from_numpy(vectors * 3))
    assert got["score"] == pytest.approx((date + name) / 2)
    assert got["by_kind"] == pytest.approx({"date": date, "name": name})
    assert got["by_language"] == pytest.approx(
        {"de": (both["de", "date"] + both["de", "name"]) / 2, "fr": both["fr", "date"]}
    )
    for key, side in (("to_pivot", there), ("from_pivot", back)):
        mean = ((side["de", "date"] + side["fr", "date"]) / 2 + side["de", "name"]) / 2
        assert got[key] == pytest.approx(mean)


def test_bitext_without_kinds_has_no_by_kind():
    task = Bitext("t", [], {("de", ""): (np.arange(3), np.arange(3, 6))})
    got = evaluate.score_bitext(task, torch.eye(3).repeat(2, 1))
    assert got["by_kind"] == {} and got["score"] == 1.0 and got["by_language"] == {"de": 1.0}


def test_sts_is_spearman():
    """Without ties: 1 - 6 sum (rank difference)^2 / (n (n^2 - 1))."""
    rng = np.random.default_rng(0)
    n = 30
    vectors = rng.normal(size=(2 * n, 8))
    gold = rng.permutation(n) / 7
    cosines = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(vectors[0::2], vectors[1::2], strict=True)
    ]
    gaps = np.argsort(np.argsort(cosines)) - np.argsort(np.argsort(gold))
    want = 1 - 6 * (gaps**2).sum() / (n * (n**2 - 1))
    task = STS("s", ["x"] * 2 * n, gold)
    got = evaluate.score_sts(task, torch.from_numpy(vectors))
    assert got == {"score": pytest.approx(want)}
    assert abs(want) < 0.9
    order = np.sort(gold)[np.argsort(np.argsort(cosines))]
    perfect = evaluate.score_sts(STS("s", task.texts, order), torch.from_numpy(vectors))
    assert perfect["score"] == pytest.approx(1.0)


# ---- files ----


def tatoeba_directory(path):
    path.mkdir()
    for lang, form in LANGS.items():
        other = "".join(form.format(w, w[::-1]) + "\n" for w in WORDS)
        (path / f"tatoeba.{lang}-eng.{lang}").write_text(other, encoding="utf-8")
        (path / f"tatoeba.{lang}-eng.eng").write_text("\n".join(WORDS), encoding="utf-8")
    return path


def test_tatoeba(tmp_path):
    (task,) = evaluate.read(str(tatoeba_directory(tmp_path / "tat")))
    assert task.name == "tat" and set(task.groups) == {("deu", ""), ("fra", "")}
    a, b = task.groups["fra", ""]
    assert [task.texts[i] for i in b] == WORDS
    assert [task.texts[i] for i in a] == [f"le {w} {w[::-1]}" for w in WORDS]


def test_tatoeba_lines_end_where_files_say(tmp_path):
    """Other separators of Unicode occur inside sentences; an empty line is a sentence, too."""
    odd = ["a\u2028b", "c\x85d", "e\x0cf\x1cg", "", "h"]
    (tmp_path / "tatoeba.abc-eng.abc").write_bytes(("\r\n".join(odd) + "\r\n").encode())
    (tmp_path / "tatoeba.abc-eng.eng").write_text("1\n2\n3\n4\n5\n")
    (task,) = evaluate.read(str(tmp_path))
    a, b = task.groups["abc", ""]
    assert [task.texts[i] for i in a] == odd
    assert [task.texts[i] for i in b] == list("12345")


@pytest.mark.parametrize("lines", ["", "one\n", "a\n" * 11])
def test_tatoeba_of_unequal_length(lines, tmp_path):
    directory = tatoeba_directory(tmp_path / "tat")
    (directory / "tatoeba.deu-eng.deu").write_text(lines)
    with pytest.raises(ValueError) as caught:
        evaluate.read(str(directory))
    assert "tatoeba.deu-eng.deu: expected as many lines as tatoeba.deu-eng.eng" in str(caught.value)
    assert f"got {lines.count(chr(10))} and 10" in str(caught.value)


def test_tatoeba_with_a_side_missing(tmp_path):
    directory = tatoeba_directory(tmp_path / "tat")
    (directory / "tatoeba.deu-eng.deu").unlink()
    with pytest.raises(ValueError, match=r"expected tatoeba\.deu-eng\.deu beside it, found none"):
        evaluate.read(str(directory))
    only = tmp_path / "only"
    only.mkdir()
    (only / "tatoeba.deu-eng.deu").write_text("a\n")
    with pytest.raises(ValueError, match=r"only: expected tatoeba\.xxx-eng\.eng, found none"):
        evaluate.read(str(only))


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
    (task,) = evaluate.read(str(path))
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
    task = evaluate.nway("n", rows)
    assert {g: task.texts[b[0]] for g, (_, b) in task.groups.items()} == {
        ("de", "date"): "date en",
        ("de", "name"): "name en",
    }


def test_nway_errors(tmp_path):
    with pytest.raises(ValueError, match="n: expected English .* among the languages"):
        evaluate.nway("n", [row for row in ROWS if row["lang"] != "eng"])
    with pytest.raises(ValueError, match="n: expected ids shared with eng, found none"):
        evaluate.nway("n", ROWS[:2] + ROWS[5:])
    path = tmp_path / "p.jsonl"
    path.write_text('{"query": "a", "positive": "b"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl: expected an n-way table"):
        evaluate.read(str(path))
    with pytest.raises(ValueError, match="nothing, which does not exist"):
        evaluate.read(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"none\.csv, which does not exist"):
        evaluate.read(str(tmp_path / "none.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected tatoeba.*found none"):
        evaluate.read(str(tmp_path / "empty"))


def test_sts_csv(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text('sentence1,sentence2,score,x\n"a, b",c,4.5,1\n"d\ne",f,0,2\n', encoding="utf-8")
    (task,) = evaluate.read(str(path))
    assert task.name == "s" and task.texts == ["a, b", "c", "d\ne", "f"]
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
        ("sentence1,sentence2,score\n", r"s\.csv: expected rows, found none"),
        ("", r"s\.csv: expected rows, found none"),
    ],
)
def test_sts_csv_errors(content, message, tmp_path):
    (tmp_path / "s.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate.read(str(tmp_path / "s.csv"))


def test_a_directory_of_tasks(tmp_path):
    (tmp_path / "b.csv").write_text("sentence1,sentence2,score\na,b,1\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "notes.md").write_text("x")
    assert [task.name for task in evaluate.read(str(tmp_path))] == ["a", "b"]


# ---- the grid ----


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A small random model, saved as training saves it."""
    path = tmp_path_factory.mktemp("model")
    learnt = tokenizer.train(WORDS * 5, 300)
    cfg = config.Model(
        vocab_size=learnt.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        exits=(1, 3),
        matryoshka_dims=(4, 8, 32),
        ranks=(4, 8),
    )
    torch.manual_seed(0)
    pretrained.save(Transformer(cfg), path)
    tokenizer.save(learnt, path, 32)
    return path


@pytest.fixture(scope="module")
def encoder(directory):
    return Encoder.load(str(directory), "cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tatoeba_directory(tmp_path_factory.mktemp("tasks") / "tat")
    texts = [f"{a} {b}" for a in WORDS for b in WORDS[:4]]
    scores = np.random.default_rng(0).normal(size=len(texts) // 2)
    return [*evaluate.read(str(path)), STS("sts", texts, scores)]


@pytest.fixture(scope="module")
def cells(encoder, tasks):
    return evaluate.grid(encoder, tasks)


def alone(encoder, tasks, cell):
    found = {}
    for task in tasks:
        unit = encoder.encode(task.texts, cell["dim"], cell["exit"], cell["rank"])
        assert unit.shape == (len(task.texts), cell["dim"])
        score = evaluate.score_bitext if isinstance(task, Bitext) else evaluate.score_sts
        found[task.name] = score(task, torch.from_numpy(unit))
    return found


def test_grid_is_each_cell_alone(encoder, tasks, cells):
    keys = [(cell["rank"], cell["exit"], cell["dim"]) for cell in cells]
    assert keys == [(r, e, d) for r in (4, 8) for e in (1, 3) for d in (4, 8, 32)]
    for cell in cells:
        for name, scores in alone(encoder, tasks, cell).items():
            got = cell["scores"][name]
            assert got["score"] == pytest.approx(scores["score"], abs=1e-6)
            assert got.get("by_language") == pytest.approx(scores.get("by_language"))
    assert len({cell["scores"]["sts"]["score"] for cell in cells}) == len(cells)


def test_grid_of_chosen_sizes(encoder, tasks, cells):
    """Also ones that were never trained, and widths in any order."""
    chosen = evaluate.grid(encoder, tasks, dims=[32, 5], exits=[2, 3], ranks=[3, 8])
    assert len(chosen) == 8
    for cell in chosen:
        want = alone(encoder, tasks, cell)["sts"]["score"]
        assert cell["scores"]["sts"]["score"] == pytest.approx(want, abs=1e-6)
    (full,) = (c for c in chosen if (c["rank"], c["exit"], c["dim"]) == (8, 3, 32))
    assert full == cells[-1]


def test_costs(encoder, cells):
    for cell in cells:
        small = pretrained.cut(encoder.model, cell["exit"], cell["rank"])
        assert cell["parameters"] == sum(p.numel() for p in small.parameters())
        vector = encoder.encode(["sea"], cell["dim"], cell["exit"], cell["rank"])[0]
        assert cell["bytes_per_vector"] == vector.nbytes


def test_grid_of_a_plain_vocabulary(tasks):
    learnt = tokenizer.train(WORDS, 300)
    cfg = config.Model(
        vocab_size=learnt.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=16,
    )
    encoder = Encoder(Transformer(cfg).eval(), learnt, 16)
    cells = evaluate.grid(encoder, tasks[:1])
    assert [(c["rank"], c["exit"], c["dim"]) for c in cells] == [(None, 1, 8), (None, 1, 16)]
    assert cells[0]["parameters"] == sum(p.numel() for p in encoder.model.parameters())
    assert "table" in evaluate.table(cells)
    with pytest.raises(ValueError, match="rank: expected none"):
        evaluate.grid(encoder, tasks[:1], ranks=[4])


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(dims=[33]), r"dim: expected 1\.\.32 \(the width\), got 33"),
        (dict(dims=[0, 4]), r"dim: expected 1\.\.32"),
        (dict(exits=[4]), r"exit: expected 1\.\.3 \(the depth\), got 4"),
        (dict(exits=[0]), r"exit: expected 1\.\.3 \(the depth\), got 0"),
        (dict(ranks=[9]), r"rank: expected 1\.\.8 \(the stored rank\), got 9"),
        (dict(ranks=[0]), r"rank: expected 1\.\.8"),
    ],
)
def test_sizes_that_the_model_lacks(encoder, tasks, sizes, message):
    with pytest.raises(ValueError, match=message):
        evaluate.grid(encoder, tasks, **sizes)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "tatoeba.deu-eng.eng").write_text("sea\n")
    (tmp_path / "tatoeba.deu-eng.deu").write_bytes(b"Meer \xff\n")
    with pytest.raises(ValueError, match=r"tatoeba\.deu-eng\.deu: not UTF-8 at byte 5"):
        evaluate.read(str(tmp_path))
    (tmp_path / "bad.csv").write_bytes(b"sentence1,sentence2,score\n\xe9,b,1\n")
    with pytest.raises(ValueError, match=r"bad\.csv: not UTF-8 at byte 26"):
        evaluate.read(str(tmp_path / "bad.csv"))


def test_two_tasks_of_one_name(tmp_path):
    rows = [{"id": "1", "lang": lang, "text": lang} for lang in ("eng", "deu")]
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "dev.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, rows)))
    assert len(evaluate.read_all([str(files[0])])) == 1
    with pytest.raises(ValueError, match="distinct file or directory names, got dev, dev"):
        evaluate.read_all([str(file) for file in files])


# ---- showing ----


def test_mean_score_is_over_tasks(cells):
    for cell in cells:
        scores = [task["score"] for task in cell["scores"].values()]
        assert evaluate.mean_score(cell) == pytest.approx(100 * (scores[0] + scores[1]) / 2)


def test_table(cells):
    head, columns, sizes, *rows = evaluate.table(cells).splitlines()
    assert "score (%)" in head and columns.split() == ["rank", "exit", "params", "4", "8", "32"]
    assert sizes.split() == ["16B", "32B", "128B"]
    assert len(rows) == 4
    for row, begin in zip(rows, range(0, 12, 3), strict=True):
        rank, exit, parameters, *scores = row.split()
        group = cells[begin : begin + 3]
        assert (int(rank), int(exit)) == (group[0]["rank"], group[0]["exit"])
        assert parameters == f"{group[0]['parameters'] / 1e6:.2f}M"
        assert scores == [f"{evaluate.mean_score(cell):.1f}" for cell in group]
    assert len({len(row) for row in (columns, sizes, *rows)}) == 1  # columns stand under each other


def test_by_kind():
    now = {"cldr": {"score": 0.5, "by_kind": {"date": 0.25, "territory": 0.75}}}
    before = {"cldr": {"score": 0.125, "by_kind": {"date": 0.0}}}
    lines = evaluate.by_kind(now, before).splitlines()
    assert lines[0].split()[-2:] == ["trained", "untrained"]
    assert lines[1].split() == ["cldr", "50.0", "12.5"]
    assert lines[2].split() == ["date", "25.0", "0.0"]
    assert lines[3].split() == ["territory", "(unseen", "names)", "75.0"]
    assert len(evaluate.by_kind(now, {}).splitlines()) == 4


def test_report(cells, tmp_path):
    out = tmp_path / "deep" / "report"
    evaluate.write_report(out, cells, {"commit": "abc"})
    assert sorted(p.name for p in out.iterdir()) == ["grid.json", "grid.png"]
    assert json.loads((out / "grid.json").read_text()) == {"commit": "abc", "cells": cells}
    with Image.open(out / "grid.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 300 and image.height > 300
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50  # a heat map, not an empty page


def test_report_of_scores_that_are_all_zero(cells, tmp_path):
    none = [{**cell, "scores": {"t": {"score": 0.0}}} for cell in cells]
    evaluate.write_report(tmp_path, none, {})
    with Image.open(tmp_path / "grid.png") as image:
        image.verify()


# ---- the command ----


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "mlembed.evaluate", *map(str, args)], capture_output=True, text=True
    )


def test_command(directory, tmp_path, encoder):
    data = tatoeba_directory(tmp_path / "tat")
    out = tmp_path / "report"
    sizes = ["--dim", 8, 32, "--exit", 1, "--rank", 8]
    done = command(directory, "--data", data, *sizes, "--out", out)
    assert done.returncode == 0, done.stderr
    want = evaluate.grid(encoder, evaluate.read(str(data)), [8, 32], [1], [8])
    assert done.stdout.startswith(evaluate.table(want) + "\n")
    stored = json.loads((out / "grid.json").read_text())
    assert stored == {"model": str(directory), "data": [str(data)], "cells": want}
    with Image.open(out / "grid.png") as image:
        image.verify()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dim", "64"], "dim: expected 1..32 (the width), got 64"),
        (["--exit", "9"], "exit: expected 1..3 (the depth), got 9"),
        (["--rank", "16"], "rank: expected 1..8 (the stored rank), got 16"),
    ],
)
def test_command_refuses_sizes_that_the_model_lacks(args, message, directory, tmp_path):
    data = tatoeba_directory(tmp_path / "tat")
    done = command(directory, "--data", data, *args, "--out", tmp_path / "report")
    assert (done.returncode, done.stdout) == (1, "")
    # A progress bar may stand before it.
    assert done.stderr.replace("\r", "\n").splitlines()[-1] == f"error: {message}"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report").exists()


def test_command_refuses_an_existing_out(directory, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    done = command(directory, "--out", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: out: expected a new directory, got {out}, which exists\n"
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
