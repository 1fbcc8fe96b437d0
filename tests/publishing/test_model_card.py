"""Model cards: front matter for the hub, what a run recorded and nothing else, and snippets."""

import ast
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from export_models import KINDS, build
from huggingface_hub import ModelCard

from mlembed import config
from mlembed.config import strict
from mlembed.config.shapes import SHAPES, nested
from mlembed.publishing import model_card
from mlembed.publishing.export import export


def cell(rank, exit, dim):
    costs = {"parameters": 1000 * exit * rank, "bytes_per_vector": 4 * dim}
    costs |= {"latency_ms": 1.25 * exit}
    score = {"score": (dim + exit + rank) / 100, "by_language": {"am": 0.5}}
    return {"dim": dim, "exit": exit, "rank": rank, **costs, "scores": {"names": score}}


GRID = {
    "commit": "abc1234",
    "device": "cpu, 2 threads",
    "texts_by_language": {"de": 1200, "zh_Hant": 30, "hy": 4},
    "cells": [cell(rank, exit, dim) for rank in (3, 11) for exit in (1, 3) for dim in (5, 24)],
}
RUN = config.Run(
    name="second",
    output_dir="/home/somebody/runs",
    data=("cldr", "/home/somebody/secret/pairs.jsonl"),
    sources=(config.Source(path="owner/questions", prompt="Q: ", task="retrieval"),),
    init="owner/base-model",
    steps=77,
    optim=config.Optim(lr=3e-4),
)


def write_run(directory: Path, run: config.Run = RUN, grid: dict | None = GRID) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(strict.to_dict(run)), encoding="utf-8")
    if grid is not None:
        (directory / "report").mkdir()
        (directory / "report" / "grid.json").write_text(json.dumps(grid), encoding="utf-8")
    return directory


def card(encoder, source: Path | str, cut=(5, 1, 3), **options) -> ModelCard:
    origin = model_card.find_origin(str(source))
    formats = options.pop("formats", ("sentence-transformers",))
    text = model_card.write(encoder, model_card.Cut("small", *cut, formats), origin, **options)
    return ModelCard(text)


@pytest.fixture(scope="module")
def encoder():
    return build()


def test_front_matter(encoder, tmp_path):
    read = card(encoder, write_run(tmp_path / "run"), license="apache-2.0").data.to_dict()
    assert read["library_name"] == "sentence-transformers"
    assert read["pipeline_tag"] == "sentence-similarity"
    assert {*model_card.TAGS, "multilingual", "mlembed"} == set(read["tags"])
    assert read["license"] == "apache-2.0" and read["base_model"] == "owner/base-model"
    # The hub's codes have no scripts; they are those of training texts and of evaluations.
    assert read["language"] == ["multilingual", "am", "de", "hy", "zh"]


def test_unknown_origin(encoder, tmp_path):
    (tmp_path / "model").mkdir()
    for source in ("", tmp_path / "model", "owner/some-model"):
        read = card(encoder, source)
        matter = read.data.to_dict()
        for key in ("license", "language", "base_model", "datasets"):
            assert matter.get(key) is None, key
        assert "its training is not recorded" in read.text
        assert "these weights: not recorded" in read.text
        assert "## Scores\n\nNot recorded." in read.text
        assert "## Languages\n\nNot recorded." in read.text
        assert "config.json" not in read.text and "train.py" not in read.text
    assert "Exported from owner/some-model" in read.text


def test_layers_of_an_exit(tmp_path):
    text = card(build(), "").text
    assert "\n1 of 3 layers, width 5 of 24, vocabulary rank 3; " in text
    shared = build(exits=(2, 3), last_layers=1)
    text = card(shared, "", (5, 2, 3)).text
    assert "\n2 of 3 layers (the first 1 and the last 1), width 5 of 24" in text
    assert "\n3 of 3 layers, width 5 of 24" in card(shared, "", (5, 3, 3)).text


def test_sizes():
    cfg = nested(SHAPES["multilingual-e5-small"])
    table = model_card.sizes(cfg, 12, 256)
    assert table[0] == ["layers", "rank 64", "rank 128", "rank 256"]
    assert [row[0] for row in table[1:]] == ["3", "6", "9", "12"]
    # What its exports hold.
    assert table[2][1:] == ["26.87 M", "42.90 M", "74.95 M"] and table[4][3] == "85.60 M"
    # An exit that ends with the last layers holds no other exit.
    assert [row[0] for row in model_card.sizes(cfg, 6, 128)] == ["layers", "6"]
    assert model_card.sizes(cfg, 6, 64) == []
    plain = replace(cfg, last_layers=0, ranks=())
    assert [row[0] for row in model_card.sizes(plain, 9, None)] == ["layers", "3", "6", "9"]


def test_sizes_of_a_card():
    encoder = build()
    head, _, *table = rows(card(encoder, "", (24, 3, 11)).text, "Sizes")
    assert head == ["layers", "rank 3", "rank 11"] and [row[0] for row in table] == ["1", "3"]
    assert "## Sizes" not in card(encoder, "", (24, 1, 3)).text


def rows(text: str, title: str) -> list[list[str]]:
    """Cells of the first table below a heading."""
    part = text.split(f"## {title}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_scores_mark_the_cut(encoder, tmp_path):
    run = write_run(tmp_path / "run")
    head, _, *table = rows(card(encoder, run).text, "Scores")
    assert head == ["rank", "exit", "parameters", "ms a text", "5 wide", "24 wide"]
    assert table[0] == ["3", "1", "0.00 M", "1.25", "**9.0**", "28.0"]
    assert [row[:2] for row in table] == [["3", "1"], ["3", "3"], ["11", "1"], ["11", "3"]]
    assert table[-1][3:] == ["3.75", "19.0", "38.0"]
    # The stored rank is the highest.
    text = card(encoder, run, (24, 3, None)).text
    assert (
        rows(text, "Scores")[-1][-1] == "**38.0**" and len(re.findall(r"\*\*[\d.]+\*\*", text)) == 1
    )
    text = card(encoder, run, (6, 1, 3)).text  # a width between those scored
    assert "was not scored" in text and "**" not in text.split("## Scores")[1].split("## How")[0]


def test_scores_of_a_plain_table_and_an_older_report(tmp_path):
    encoder = build(ranks=())
    cells = [{**one, "rank": None} for one in GRID["cells"][:4]]
    cells = [{k: v for k, v in one.items() if k != "latency_ms"} for one in cells]
    text = card(encoder, write_run(tmp_path / "run", grid={"cells": cells}), (24, 1, None)).text
    head, _, *table = rows(text, "Scores")
    assert head == ["rank", "exit", "parameters", "5 wide", "24 wide"]
    assert table[0][0] == "table" and table[0][-1] == "**28.0**"
    assert "vocabulary table" in text and "--rank" not in text
    assert "of the training run: not recorded" in text


def test_how_it_was_made(encoder, tmp_path):
    run = write_run(tmp_path / "run")
    text = card(encoder, run, (5, 1, 3), formats=("sentence-transformers", "onnx")).text
    command = "python -m mlembed export runs/second small --dim 5 --exit 1 --rank 3"
    assert f"{command} --format sentence-transformers onnx\n" in text
    assert "training run: abc1234" in text and re.search(r"torch 2\.\d", text)
    assert "Began from owner/base-model." in text
    # The configuration in the card is the run's, without its place on that machine.
    (written,) = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
    (tmp_path / "again.json").write_text(written, encoding="utf-8")
    again = config.load(tmp_path / "again.json")
    assert again == replace(RUN, output_dir="runs", data=("cldr", "pairs.jsonl"))
    assert "somebody" not in text and "secret" not in text
    sources = rows(text, "How it was made")[2:]
    assert [row[0] for row in sources] == ["cldr", "pairs", "questions"]
    assert [row[2] for row in sources] == ["Unicode License V3", "not recorded", "not recorded"]


def test_languages_by_name(encoder, tmp_path):
    text = card(encoder, write_run(tmp_path / "run")).text
    part = text.split("## Languages\n")[1]
    assert "(3): German 1,200, Chinese (Traditional) 30, Armenian 4." in part
    assert "Scored in 1: Amharic." in part


def test_find_origin(tmp_path, monkeypatch):
    run = write_run(tmp_path / "runs" / "second")
    for part in ("model", "checkpoints/step_00000077"):
        (run / part).mkdir(parents=True)
        (run / part / "config.json").write_text('{"model_type": "qwen3"}')
    monkeypatch.chdir(tmp_path)
    for source in ("runs/second", "runs/second/model"):
        for path in (source, str(tmp_path / source)):
            origin = model_card.find_origin(path)
            assert origin.name == "second" and origin.grid == {**GRID, "untrained": {}}
    exported = tmp_path / "runs" / "second" / "cut"  # a model from elsewhere
    exported.mkdir()
    assert model_card.find_origin(str(exported)).run == {}
    (run / "report" / "grid.json").write_text("{")
    with pytest.raises(ValueError, match=r"grid\.json:1: invalid JSON"):
        model_card.find_origin(str(run))


def test_checkpoint_has_no_scores(encoder, tmp_path):
    step = write_run(tmp_path / "second") / "checkpoints" / "step_00000040"
    step.mkdir(parents=True)
    text = card(encoder, step).text
    assert "## Scores\n\nNot recorded." in text and "Scored in" not in text
    assert "mlembed export runs/second/checkpoints/step_00000040 small --dim" in text
    assert "training run: abc1234" in text and "German 1,200" in text


def test_odd_names_prompts_and_licences(encoder, tmp_path):
    prompts = {"query": "<query>: ", "tick": "a `b` "}
    cut = model_card.Cut('it"s \\ mine', 5, 1, 3, ("sentence-transformers",))
    licence = "my own: [all]"
    origin = model_card.find_origin(str(write_run(tmp_path / "run")))
    read = ModelCard(model_card.write(replace(encoder, prompts=prompts), cut, origin, licence))
    assert read.data.license == licence
    assert '- `query`: `"<query>: "`\n- `tick`: `` "a `b` " ``\n' in read.text
    (command,) = re.findall("python -m mlembed export (.*)", read.text)
    assert shlex.split(command)[1] == cut.name and shlex.split(command)[-1] == licence
    for snippet in re.findall(r"```python\n(.*?)\n```", read.text, re.DOTALL):
        strings = [n.value for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.Constant)]
        assert cut.name in strings


def test_base_model_of_a_second_stage(encoder, tmp_path):
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", replace(RUN, init=str(first)))
    assert card(encoder, second).data.base_model == "owner/base-model"
    third = write_run(tmp_path / "third", replace(RUN, init=str(tmp_path / "first" / "report")))
    assert card(encoder, third).data.base_model is None  # an unknown directory


ASKED = 'Instruct: "find"\nQuery: '


def run_snippets(text: str, count: int) -> list[np.ndarray]:
    snippets = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(snippets) == count
    results = []
    for snippet in snippets:
        space: dict = {}
        exec(snippet, space)
        results.append(np.asarray(space["vectors"]))
    return results


@pytest.mark.parametrize(
    ("prompt", "default"),
    [("", None), (ASKED, None), (ASKED, "title")],
    ids=["", "query", "default"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_snippets_run_and_agree(kind, prompt, default, tmp_path, monkeypatch):
    if prompt and kind != "qwen3":
        pytest.skip("prompts are the same of every kind")
    prompts = {default or "query": prompt} if prompt else {}
    encoder = replace(build(kind), prompts=prompts, default_prompt_name=default)
    formats = ("sentence-transformers", "onnx") if prompt else ("sentence-transformers",)
    export(encoder, tmp_path / "small", 5, 1, 3, formats=formats)
    monkeypatch.chdir(tmp_path)
    text = Path("small/README.md").read_text()
    assert ("without a name it takes `title`" in text) == bool(default)
    results = run_snippets(text, 4 if prompt else 3)
    texts = json.loads(f"[{model_card.TEXTS}]")
    ours = encoder.encode([prompt + text for text in texts], 5, 1, 3)
    for vectors in results:
        np.testing.assert_allclose(vectors, ours, rtol=0, atol=1e-5)


def test_snippets_name_the_hub_repository(encoder):
    cut = model_card.Cut("small", 5, 1, 3, ("onnx",), "me/small")
    text = model_card.write(encoder, cut, model_card.Origin())
    snippets = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets:
        assert snippet.count('"me/small"') == 1 and '"small"' not in snippet
    assert 'name = snapshot_download("me/small")\n' in snippets[2]
    assert "mlembed export MODEL small --dim 5" in text


def test_names_are_not_markup():
    """Names of others stay in their line, cell and block of code."""
    odd = "a|b\n# title <b>*x*</b> [l](u) \x1b[2J `c`"
    plain = model_card._plain(odd)
    assert plain == r"a\|b # title \<b\>\*x\*\</b\> \[l\](u) \u001b\[2J \`c\`".replace(
        r"\u001b", r"\\u001b"
    )
    assert "\n" not in model_card._code(odd)
    cut = model_card.Cut("out\n```", 8, 1, None, ("sentence-transformers",))
    assert "\n" not in model_card.command(cut, model_card.Origin("run"), "")
