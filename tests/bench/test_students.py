"""`python -m bench students`: its text, its pieces, its pages, and the arithmetic about GPUs."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from proof_files import WORDS, sentences, write_data, write_model_directory

from bench.proof import on_paper, plan, students, students_page, tasks
from bench.proof.settings import Proof
from bench.scaling import Assumed
from mlembed import config
from mlembed.config.run import Run
from mlembed.data.batches import weights_of
from mlembed.data.sources import expand, tables_of
from mlembed.training.arguments import parse

ROOT = Path(__file__).parents[2]


def write_training_text(folder):
    """Write the files that the three mixtures name, each with texts of its own."""

    def write(name, rows):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")

    for name in students.TRANSLATIONS:
        texts = {lang: sentences(lang, name) for lang in WORDS}
        if name in ("opensource_guide", "tldr_parallel"):
            pairs = zip(texts["eng"], texts["fra"], strict=True)
            write(name, [{"query": a, "positive": b} for a, b in pairs])
        else:
            of = [(i, lang, text) for lang in WORDS for i, text in enumerate(texts[lang])]
            write(name, [{"id": str(i), "lang": lang, "text": text} for i, lang, text in of])
    for name in (*students.QUESTIONS, "tldr_commands", "nli_triplets", "sts_train"):
        pairs = zip(sentences("eng", f"{name}?"), sentences("deu", name), strict=True)
        rows = [{"query": a, "positive": b} for a, b in pairs]
        for i, row in enumerate(rows):
            if name == "sts_train":
                row["score"] = i / len(rows)
            elif name == "nli_triplets":
                row["negatives"] = [f"not {row['positive']}"] if i % 2 else []
        write(name, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a tiny model/ and data/."""
    folder = tmp_path_factory.mktemp("students")
    write_model_directory(folder / "model")
    write_data(folder / "data")
    write_training_text(folder / "data" / "train")
    return folder


@pytest.fixture
def proof(folder, tmp_path):
    return Proof(str(folder / "model"), str(folder / "data"), str(tmp_path / "out"), seeds=(0,))


# ---- training text ----


def test_mixture_of_translations_has_its_shares(proof):
    path = students.mixture(proof, students.LEALLA)
    run, tables = expand(Run(data=(path,), sampling="weights")), tables_of((path,))
    assert {table.task for table in tables} == {"bitext"} and len(tables) == 6
    shares = dict(zip((table.name for table in tables), weights_of(run, tables, []), strict=True))
    assert shares == pytest.approx(students.TRANSLATIONS) and sum(shares.values()) == 1


def test_stages_prompt_queries_and_documents(proof):
    """The first has the source's prompts alone, the second instructions and unprompted texts."""
    first, second = (
        {source.name or Path(source.path).stem: source for source in expand(run).sources}
        for run in (Run(data=(students.mixture(proof, stage),)) for stage in students.STAGES)
    )
    assert {(s.prompt, s.document_prompt) for s in first.values()} == {("query: ", "passage: ")}
    asked = {name for name, source in second.items() if source.prompt.startswith("Instruct: ")}
    assert asked == {*students.QUESTIONS, "nli_triplets", "tldr_commands"}
    assert {second[name].document_prompt for name in asked} == {"passage: "}
    plain = second.keys() - asked
    assert {name: second[name].task for name in plain} == {
        "sts_train": "sts",
        "opensource_guide": "bitext",
    }
    assert not any(second[name].prompt or second[name].document_prompt for name in plain)
    tables = tables_of((students.mixture(proof, "stage2"),))
    (entailed,) = (table for table in tables if table.name == "nli_triplets")
    assert entailed.task == "retrieval" and len(entailed.texts) > 60


def test_stages_have_the_shape_of_elastic(proof, monkeypatch):
    """The commands parse; the second starts from the first, and both learn from the source."""
    lines = {}
    monkeypatch.setattr(
        "bench.proof.training.run", lambda proof, name, arguments: lines.update({name: arguments})
    )
    monkeypatch.setattr("bench.proof.training.trained", lambda directory: {})
    for stage in students.STAGES:
        students.train_stage(proof, stage)
    first = parse(lines["stage1"])
    elastic = parse(["elastic", "--init", proof.model])
    assert first.model == elastic.model and first.init == first.distill.teacher == proof.model
    assert first.epochs == 2 and first.sampling == "exhaust" and first.optim.lr == 5e-5
    assert first.distill.feature_form == "ml-embed" and first.optim.freeze_tokens
    again = lines["stage2"]
    assert again[again.index("--init") + 1] == str(proof.runs / "stage1")
    assert again[again.index("--distill.teacher") + 1] == proof.model


def test_pieces_score_each_model_at_each_rank(proof):
    names = [piece.name for piece in students.pieces(proof)]
    mini = [f"lealla-mini@{rank}" for rank in (32, 64, 96)]
    assert names[:6] == ["text", "source@full", "lealla-mini", *mini]
    ranks = students.shape(proof).ranks
    assert ranks and names[6:] == [
        name
        for stage in students.STAGES
        for name in (stage, *(f"{stage}@{rank}" for rank in ranks))
    ]
    assert [piece.name for piece in plan.left(proof, students.pieces(proof))] == names


# ---- pages ----


def cells(rank, factor):
    """Return the cells of a scored piece: exits 2 and 4, widths 8 and 16."""
    return [
        {
            "exit": exit,
            "dim": dim,
            "rank": rank,
            "parameters": 1e5 * exit + 1e4 * (rank or 64),
            "bytes_per_vector": 4 * dim,
            "megabytes": 1.5,
            "texts_per_second": 100.0,
            "points": {kind: {"xx": factor * (10 * exit + dim)} for kind in tasks.KINDS},
        }
        for exit in (2, 4)
        for dim in (8, 16)
    ]


@pytest.fixture
def written(proof):
    """Return the JSON object and the page of scores that are made of sizes."""
    made = {"source@full": cells(None, 1.0), "lealla-mini@32": cells(32, 0.5)}
    made |= {"lealla-mini@64": cells(64, 0.9), "stage1@8": cells(8, 0.7)}
    for name, some in made.items():
        plan.finish(proof, plan.Piece(name, "", lambda proof: {}), {"cells": some})
    run = {"seconds": 90.0, "steps": 7, "tokens": 5000, "command": "python train.py x"}
    plan.finish(proof, plan.Piece("stage1", "", lambda proof: {}), {"training": run})
    students.write(proof)
    content = json.loads((proof.folder / "students.json").read_text())
    return content, (proof.folder / "students.md").read_text()


def test_page_shows_the_numbers_of_its_json(written, proof):
    content, text = written
    assert text == students_page.markdown(content) and "stage2" not in content["models"]
    assert [cell["rank"] for cell in content["models"]["lealla-mini"]] == [32] * 4 + [64] * 4
    rows = re.findall(r"^\| 4, 64, 16 \|.*$", text, re.MULTILINE)
    (row,) = ([part.strip() for part in row.strip("|").split("|")] for row in rows)
    assert row == ["4, 64, 16", "1.0 M", "2", "64", "100", *["50.4"] * 5]
    grid = text.partition("Tatoeba, rank 32:\n\n")[2].splitlines()[:4]
    assert grid[2:] == ["| 2 | 14.0 | 18.0 |", "| 4 | 24.0 | 28.0 |"]
    assert (
        "## ML-Embed, first stage" in text
        and "| ML-Embed, first stage | 1.5 | 7 | 0.01 M |" in text
    )
    assert "python -m bench students MODEL=DIR DATA=DIR OUT=DIR SEEDS=0" in text
    assert proof.model not in text and str(proof.folder) not in json.dumps(content)


def test_table_names_depths_at_both_ends_of_the_ranks(written):
    some = students_page.named(written[0]["models"]["lealla-mini"])
    sizes = [(cell["exit"], cell["rank"], cell["dim"]) for cell in some]
    assert sizes == [(4, 64, 16), (2, 64, 16), (4, 32, 16), (2, 32, 16), (2, 32, 8)]


# ---- GPUs on paper ----


def test_hours_on_paper_by_hand():
    """ML-Embed: 9 layers of 640 x (48 heads of 128 in all + 3 x 1536), six FLOPs a weight."""
    by_name = {line["name"]: line for line in on_paper.rows()}
    plain, taught = (line for name, line in by_name.items() if name.startswith("ml-embed"))
    weights = 9 * 640 * (2 * (16 + 8) * 128 + 3 * 1536)
    assert 6 * weights < plain["student_flops"] < 1.1 * 6 * weights
    teacher = 2 * 28 * 1024 * (2 * (16 + 8) * 128 + 3 * 3072)
    assert taught["teacher_flops"] == teacher and not plain["teacher_flops"]
    samples = 2 * (27e6 + 8.3e6)
    assert plain["tokens"] / samples == pytest.approx(24 + 8 * 139, rel=0.05)
    more = 3600 * (taught["floor_hours"] - plain["floor_hours"])
    assert more == pytest.approx(plain["tokens"] * teacher / (Assumed().ceiling_tflops * 1e12))
    assert plain["hours"] == pytest.approx(plain["floor_hours"] * 227 / 134.1)
    lealla = next(line for name, line in by_name.items() if name.startswith("lealla"))
    assert lealla["tokens"] < 500_000 * 2 * 4096 * 32
    assert lealla["floor_hours"] > lealla["tokens"] * lealla["student_flops"] / 788e12 / 3600


def test_table_on_paper_is_that_of_the_documentation():
    lines = on_paper.markdown(on_paper.rows())[1].splitlines()
    assert set(lines) <= set((ROOT / "docs" / "recipes.md").read_text().splitlines())


# ---- the whole command ----


@pytest.mark.slow
def test_whole_command(folder, tmp_path):
    out = tmp_path / "out"
    arguments = [f"MODEL={folder / 'model'}", f"DATA={folder / 'data'}", f"OUT={out}"]
    arguments += ["MINUTES=0.01", "LANGUAGES=deu", "OPTIONS=--max-length 24 --batch-size 8"]
    line = [sys.executable, "-m", "bench", "students", *arguments]
    done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    content = json.loads((out / "students.json").read_text())
    assert list(content["models"]) == ["source", "lealla-mini", "stage1", "stage2"]
    assert {run["steps"] > 0 for run in content["training"].values()} == {True}
    assert len(content["models"]["lealla-mini"]) == 4 * 4 * 3
    second = config.run.load(out / "runs" / "stage2" / "config.json")
    assert second.model.ranks == students.shape(replace(Proof(*[str(folder / "model")] * 3))).ranks
    again = subprocess.run([*line, "--list"], cwd=ROOT, text=True, capture_output=True)
    assert again.returncode == 0 and "left" not in again.stdout
