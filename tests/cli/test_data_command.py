"""The dry run of training data, as a command."""

import json
import subprocess
import sys
from pathlib import Path

from tests.data.samples import jsonl

ROOT = Path(__file__).parents[2]


def data(*args):
    command = [sys.executable, "-m", "mlembed", "data", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_dry_run(tmp_path):
    rest = {"url": "u", "query_lang": "en"}
    rows = [{"query": f"q {i % 9}", "positive": "p" * (50 - i % 9)} | rest for i in range(12)]
    good = jsonl(tmp_path / "good.jsonl", [*rows, {"query": "", "positive": "p"}])
    (tmp_path / "bad.csv").write_text("title,body\na,b\nc,d\n")
    (tmp_path / "header.tsv").write_text("how tall is it\t3 m\n")
    done = data(good, tmp_path / "bad.csv", tmp_path / "header.tsv", "--bad-rows", "skip")
    assert done.returncode == 1 and "2 of 3 sources refused" in done.stderr
    line = "9 pairs, 18 texts, retrieval; query=query positive=positive query_lang=query_lang; "
    assert f"{line}unused: url; left out: 1 bad rows, 3 duplicates" in done.stdout
    assert "languages: en 12" in done.stdout and "longest 50" in done.stdout
    assert f"q 0 | {'p' * 50}" in done.stdout
    assert f"refused: {tmp_path}/bad.csv: expected columns query, positive" in done.stdout
    assert f"refused: {tmp_path}/header.tsv:1: header: expected names of columns" in done.stdout

    told = ("--columns.query", "title", "--columns.positive", "body")
    done = data(tmp_path / "bad.csv", *told, "--json")
    (line,) = done.stdout.splitlines()
    assert done.returncode == 0 and json.loads(line)["report"]["items"] == 2


def test_what_training_refuses_is_refused(tmp_path):
    """The end of a stream, and prompts."""
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(1200)]
    jsonl(tmp_path / "stream.jsonl", [*rows, {"query": "q"}])
    nway = [{"id": str(i), "lang": code, "text": f"{code}{i}"} for i in range(9) for code in "ab"]
    jsonl(tmp_path / "nway.jsonl", nway)
    listed = [
        {"path": "stream.jsonl", "streaming": True, "name": "a"},
        {"path": "nway.jsonl", "streaming": True, "name": "b"},
        {"path": "nway.jsonl", "prompt": "query: ", "name": "c"},
    ]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": listed}))
    done = data(tmp_path / "mixture.json")
    assert done.returncode == 1 and "3 of 3 sources refused" in done.stderr
    assert "stream.jsonl:1201: positive: expected text, got None" in done.stdout
    assert "nway.jsonl: expected pairs for a stream, got an n-way table" in done.stdout
    assert "source c: prompt: expected that of documents, '', " in done.stdout


def test_texts_of_the_evaluation(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(4)]
    held_out = [{"sentence1": "Q1", "sentence2": "other", "score": 1}]
    done = data(jsonl(tmp_path / "p.jsonl", rows), "--eval", jsonl(tmp_path / "e.jsonl", held_out))
    assert "3 pairs" in done.stdout and "2 texts of the evaluation" in done.stdout
