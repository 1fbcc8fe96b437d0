"""`python -m bench proof`: scores by hand, languages of tuning, pieces that go on, and the page."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import write_jsonl
from proof_files import FLORES, sentences, write_data, write_model_directory
from scipy.stats import rankdata

from bench.proof import command, page, peer, picture, plan, report, scoring, tasks, training
from bench.proof.plan import Piece
from bench.proof.settings import Proof, check_settings, parse
from mlembed.config.run import Run
from mlembed.data.eval_tasks import Retrieval
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained

ROOT = Path(__file__).parents[2]
TUNED = ("deu",)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a tiny model/ and data/."""
    folder = tmp_path_factory.mktemp("proof")
    write_model_directory(folder / "model")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def scored(files):
    """Return the tasks, an encoder at rank 8 after scoring, and the result."""
    chosen = tasks.read(files / "data", TUNED, 20)
    encoder = scoring.load(files / "model", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "TEXTS", 4)
        result = scoring.score(encoder, chosen, [2, 4], [8, 16])
    return chosen, encoder, result


@pytest.fixture
def proof(files, tmp_path):
    return Proof(str(files / "model"), str(files / "data"), str(tmp_path / "out"), rank=8)


# ---- training text ----


def test_mixture_of_the_examples_has_the_files_that_the_docs_list():
    (sources,) = json.loads((ROOT / "examples/real_text.json").read_text()).values()
    assert sum(source["weight"] for source in sources) == pytest.approx(1)
    listed = (ROOT / "docs/data.md").read_text().partition("| training text |")[2]
    rows = [
        line.split("|")[1]
        for line in listed.partition("| evaluation |")[0].splitlines()[2:]
        if line
    ]
    names = [name.strip() for row in rows for name in row.split(",")]
    assert sorted(Path(source["path"]).stem for source in sources) == sorted(names)


# ---- scores ----


def vectors_of(encoder, texts, prompt=""):
    """Return vectors at exit 2, the first of the two, cut to width 8 and normalised."""
    rows = np.stack([encoder.by_text[prompt, text][0, :8].double().numpy() for text in texts])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def accuracy(encoder, a, b):
    """Return the mean accuracy of both directions, in percent, of every 30 // 20 pair."""
    rows = [i * 30 // 20 for i in range(20)]
    one, other = (vectors_of(encoder, [side[i] for i in rows]) for side in (a, b))
    cosines = one @ other.T
    right = [(cosines.argmax(axis) == np.arange(20)).mean() for axis in (0, 1)]
    return 100 * np.mean(right)


def spearman(encoder, path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    a, b = (vectors_of(encoder, [row[f"sentence{i}"] for row in rows]) for i in (1, 2))
    ranks = rankdata((a * b).sum(1)), rankdata([float(row["score"]) for row in rows])
    return 100 * np.corrcoef(*ranks)[0, 1]


def ndcg(encoder, folder):
    texts = {
        name: [json.loads(x)["text"] for x in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("queries", "corpus")
    }
    queries = vectors_of(encoder, texts["queries"], "query: ")
    cosines = queries @ vectors_of(encoder, texts["corpus"], "passage: ").T
    places = (cosines > cosines.diagonal()[:, None]).sum(1)
    return 100 * np.where(places < 10, 1 / np.log2(places + 2), 0).mean()


def test_score_is_the_mean_of_four_numbers_computed_by_hand(files, scored):
    _, encoder, result = scored
    cell = next(cell for cell in result["cells"] if (cell["dim"], cell["exit"]) == (8, 2))
    folder = files / "data" / "eval"
    english, french = (sentences(lang, "now") for lang in ("eng", "fra"))
    bitext = {
        f"{name} {code(lang)}": accuracy(encoder, sentences(lang, name), sentences("eng", name))
        for name, code, langs in (("flores", FLORES.get, ("fra", "tam")), ("tico", str, ("fra",)))
        for lang in langs
    }
    sts = {
        "en": np.mean(
            [spearman(encoder, folder / f"sts/stsb-en-{x}.csv") for x in ("dev", "test")]
        ),
        "fr": spearman(encoder, folder / "sts/stsb-fr-dev.csv"),
    }
    expected = {
        "tatoeba": {"fra": accuracy(encoder, french, english)},
        "bitext": bitext,
        "sts": sts,
        "retrieval": {"toy-dev": ndcg(encoder, folder / "retrieval/toy-dev")},
    }
    for kind, of in expected.items():
        assert cell["points"][kind] == pytest.approx(of, abs=1e-3), kind
    by_hand = np.mean([np.mean(list(of.values())) for of in expected.values()])
    assert tasks.score(cell["points"]) == pytest.approx(by_hand, abs=1e-3)
    latin = [*expected["tatoeba"].values(), bitext["flores fra_Latn"], bitext["tico fra"]]
    scripts = {"Latin": np.mean(latin), "Tamil": bitext["flores tam_Taml"]}
    assert tasks.bitext(cell["points"], "script") == pytest.approx(scripts, abs=1e-3)
    languages = {"French": scripts["Latin"], "Tamil": scripts["Tamil"]}
    assert tasks.bitext(cell["points"], "name") == pytest.approx(languages, abs=1e-3)


def test_costs_are_those_of_the_cut_model(scored):
    _, encoder, result = scored
    cfg = encoder.model.cfg
    assert cfg.ranks == (8,) and result["rank"] == 8
    count = sum(x.numel() for x in encoder.model.parameters())
    whole = result["cells"][-1]
    assert (whole["dim"], whole["exit"]) == (16, 4)
    assert whole["parameters"] == count and whole["megabytes"] == 4 * count / 1e6
    assert whole["bytes_per_vector"] == 64 and whole["texts_per_second"] > 0


def test_each_text_is_encoded_once(files, scored):
    chosen, encoder, result = scored
    every = {("", text) for task in chosen for text in task.texts if not is_retrieval(task)}
    for task in filter(is_retrieval, chosen):
        every |= {("query: ", text) for text in task.queries}
        every |= {("passage: ", text) for text in task.documents()}
    assert encoder.by_text.keys() == every and result["texts"] == len(every)
    ids = encoder.tokenizer.encode_batch([prompt + text for prompt, text in every])
    assert result["tokens"] == sum(min(len(one.ids), encoder.max_length) for one in ids)
    prompt, text = sorted(every)[-1]
    alone = Encoder.encode_exits(encoder, [text], [2, 4], 8, prompt=prompt)[:, 0]
    assert np.allclose(encoder.by_text[prompt, text], alone, atol=0.05 * alone.abs().max())


def is_retrieval(task):
    return isinstance(task, Retrieval)


# ---- languages of tuning, text of evaluation ----


def test_languages_of_tuning_are_left_out_in_every_spelling(files):
    every = tasks.read(files / "data")
    some = tasks.read(files / "data", TUNED)

    def languages(read):
        groups = {lang for task in read for lang, _ in getattr(task, "groups", ())}
        return groups | {task.name for task in read}

    left_out = languages(every) - languages(some)
    assert left_out == {"deu", "deu_Latn", "stsb-de-dev"}
    texts = {text for task in some for text in task.texts}
    assert not texts & {*sentences("deu", "now"), *sentences("deu", "flores")}
    with pytest.raises(ValueError, match="expected tatoeba in languages other than .* deu fra"):
        tasks.read(files / "data", ("deu", "fra"))


def test_training_text_may_not_share_a_text(files, tmp_path):
    every = tasks.read(files / "data")
    counts = tasks.check_disjoint(str(files / "data" / "train"), every)
    assert counts["training_texts"] == 120 and counts["shared"] == 0
    text = sentences("deu", "now")[3]
    rows = [{"query": "a query", "positive": f" {text.upper()}!!"}]
    path = tmp_path / "leak.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"leak: expected training text without .* got 1 .*TWO CATS"
    ):
        tasks.check_disjoint(str(path), every)


# ---- pieces ----


def cells(scored, factor):
    """Return a scored piece's content whose points are multiplied."""
    content = json.loads(json.dumps(scored[2]))
    for cell in content["cells"]:
        for of in cell["points"].values():
            of.update({name: factor * value for name, value in of.items()})
    return content


def test_stopped_command_continues_where_it_was(proof, scored, capsys):
    ran = []

    def run(name, stops=False):
        def of(proof):
            ran.append(name)
            if stops and ran.count(name) == 1:
                raise KeyboardInterrupt
            return cells(scored, 1.0)

        return of

    check_settings(proof)
    pieces = [
        Piece("cut@full", "a", run("cut@full")),
        Piece("cut@small", "b", run("cut@small", stops=True)),
        Piece("ours-0@full", "c", run("ours-0@full")),
    ]
    with pytest.raises(KeyboardInterrupt):
        command.prove(proof, plan.left(proof, pieces))
    assert [piece.name for piece in plan.left(proof, pieces)] == ["cut@small", "ours-0@full"]
    command.prove(proof, plan.left(proof, pieces))
    assert ran == ["cut@full", "cut@small", "cut@small", "ours-0@full"]
    assert plan.left(proof, pieces) == []
    names = {path.name for path in proof.folder.iterdir()}
    assert names == {"pieces", "settings.json", "proof.json", "proof.md", "proof.svg"}


def test_other_arguments_need_another_folder(proof):
    check_settings(proof)
    check_settings(replace(proof, source="a sentence"))
    with pytest.raises(ValueError, match=r"^MINUTES: expected 12.0, with which .*, got 5.0"):
        check_settings(replace(proof, minutes=5.0))


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["DATA=."], "MODEL: expected a directory"),
        (["MODEL=.", "DATA=nowhere", "OUT=x"], "DATA: expected a path that exists, got 'nowhere'"),
        (["MODEL=.", "DATA=.", "OUT=x", "PAIRS=0"], "PAIRS: expected a number above 0, got '0'"),
        (["MODEL=.", "DATA=.", "OUT=x", "SEEDS=a"], "SEEDS: expected numbers like 0,1, got 'a'"),
        (["MODEL=.", "DATA=.", "OUT=x", "STEPS=5"], "argument: expected NAME=VALUE of MODEL, "),
    ],
)
def test_wrong_arguments_are_one_line(arguments, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        parse(arguments)


def test_arguments_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parsed = parse(["MODEL=.", "DATA=.", "OUT=x", "SEEDS=3,1,3", "MINUTES=0.5", "RANK=8"])
    assert parsed.model == parsed.data == str(tmp_path) and parsed.out == str(tmp_path / "x")
    assert (parsed.seeds, parsed.minutes, parsed.rank) == ((3, 1), 0.5, 8)
    line = parsed.without_paths(["train.py", f"{tmp_path}/x/runs", "--data", f"{tmp_path}/train"])
    assert line == "train.py OUT/runs --data MODEL/train"


# ---- training ----


def test_time_of_a_run_is_that_of_its_steps(tmp_path):
    lines = [
        {"step": 2, "kind": "train", "stage_ms": {"forward": 300, "other": 200}, "rate": 50},
        {"step": 2, "kind": "eval"},
        {"step": 5, "kind": "train", "stage_ms": {"forward": 900, "other": 100}, "rate": 10},
    ]
    for line in lines:
        line["tokens_per_second"] = line.pop("rate", 0)
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    assert training.trained(tmp_path) == {"seconds": 4.0, "steps": 5, "tokens": 80}


def test_one_size_starts_from_the_layers_of_its_exit(proof):
    shape = Encoder.load(proof.model, say=print).model.cfg
    run = Run(model=replace(shape, exits=(2, 4), last_layers=1))
    path, exit, width = training.half_of_source(proof, run)
    assert (exit, width) == (2, shape.hidden_size)
    half = Encoder.load(str(path)).encode(["a text"])
    whole = pretrained.load(proof.model, run.model)
    nested = replace(Encoder.load(proof.model, say=print), model=whole.eval())
    np.testing.assert_allclose(half, nested.encode(["a text"], exit=2), atol=1e-6)


def test_peer_s_loss_is_of_every_scored_exit_and_width(files):
    """All widths at exits 1 to 4, each exit with weight 1, and nothing of the embedding layer."""
    student = peer.open_student(str(files / "model"), torch.device("cpu"), 24)
    features = student.preprocess(["see one cats here", "three owls"])
    labels = F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    got = peer.loss_of(student, 4, 16)([dict(features)], labels)
    mask = features["attention_mask"][..., None]
    with torch.no_grad():
        model = student[0].auto_model
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    expected = 0.0
    for exit in (1, 2, 3, 4):
        mean = (hidden[exit] * mask).sum(1) / mask.sum(1)
        for dim in (2, 4, 8, 16):
            expected += F.mse_loss(F.normalize(mean[:, :dim], dim=-1), labels[:, :dim]).item()
    assert got.item() == pytest.approx(expected, rel=1e-4)
    got.backward()
    trained = {name for name, weight in student.named_parameters() if weight.grad is not None}
    assert trained and not any("word_embeddings" in name for name in trained)


# ---- page ----


@pytest.fixture
def whole(proof, scored):
    """Return the JSON object of a proof whose pieces are made of one score, and its page."""
    training = {"seconds": 90.0, "steps": 7, "tokens": 5000, "command": "python train.py x"}
    factors = {"cut": 1.0, "ours-0": 0.98, "ours-1": 0.94, "peer-0": 0.5, "peer-1": 0.6}
    for model, factor in factors.items():
        for part in ("full", "small"):
            content = cells(scored, factor if part == "full" else 0.5 * factor)
            plan.finish(proof, Piece(f"{model}@{part}", "", lambda proof: {}), content)
        if model != "cut":
            plan.finish(proof, Piece(model, "", lambda proof: {}), {"training": training})
    command.write(proof)
    return json.loads((proof.folder / "proof.json").read_text())


def test_percents_compare_with_the_source_and_seeds_are_averaged(whole, scored):
    full = whole["sizes"]["full"]
    source = tasks.score(scored[2]["cells"][-1]["points"])
    assert full["cut"]["score"] == pytest.approx(source) and full["cut"]["percent"] == 100
    assert full["ours"]["percent"] == pytest.approx(96.0)
    assert full["ours"]["spread"] == pytest.approx(0.04 * source) and full["ours"]["seeds"] == 2
    assert full["peer"]["percent"] == pytest.approx(55.0)
    assert whole["sizes"]["rank 8"]["ours"]["percent"] == pytest.approx(48.0)
    assert "corner" not in full and whole["training"]["ours-1"]["steps"] == 7
    assert {c["small"] for c in whole["cells"]["ours"]} == {False, True}


def test_numbers_of_the_page_are_those_of_the_json(whole, proof):
    text = (proof.folder / "proof.md").read_text()
    assert text == page.markdown(whole)
    lines = text.partition("## Five sizes")[2].partition("\n\nPercent")[0].strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head[0] == "size" and [row[0] for row in rows] == list(whole["sizes"])
    titles = {title: name for name, title in report.COMPETITORS.items()}
    for row in rows:
        of = whole["sizes"][row[0]]
        for title, shown in zip(head[5:], row[5:], strict=True):
            cell = of[titles[title]]
            percent, points = map(float, re.findall(r"[\d.]+", shown)[:2])
            assert percent == round(cell["percent"], 1) and points == round(cell["score"], 1)
        cell = of["ours"]
        assert row[1:4] == [
            f"{cell['parameters'] / 1e6:.1f} M",
            f"{cell['megabytes']:.0f}",
            str(cell["bytes_per_vector"]),
        ]
    assert "German" not in text and "| Tamil | " in text and "| French | " in text
    assert whole["command"] == "python -m bench proof MODEL=DIR DATA=DIR OUT=DIR RANK=8"
    assert "| ours-0 | 1.5 | 7 | 0.01 M |" in text
    assert str(proof.folder) not in json.dumps(whole) and proof.model not in text


def test_picture_has_a_line_a_competitor(whole, proof):
    left, right = picture.draw(whole).axes
    labels = [line.get_label() for line in left.lines if not line.get_label().startswith("_")]
    assert labels == ["mlembed", "source, cut", "sentence-transformers"]
    ours = left.lines[0]
    cell = whole["sizes"]["full"]["ours"]
    assert ours.get_xydata()[-1] == pytest.approx([cell["parameters"] / 1e6, cell["percent"]])
    assert {text.get_text() for text in left.texts} == set(whole["sizes"]) - {"half the width"}
    assert len(right.lines) == 3 and "<svg" in (proof.folder / "proof.svg").read_text()


# ---- the whole command ----


def call(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "bench", "proof", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, cwd=ROOT, env=environment, text=True, **pipes)


@pytest.mark.slow
def test_whole_command_survives_a_kill(files, tmp_path):
    out, model = tmp_path / "out", files / "model"
    options = (
        f"--max-length 24 --batch-size 4 --optim.lr 1e-3 --compile off --distill.teacher {model} "
        "--distill.features 1 --model.exits 1 2 3 4 --model.ranks 4 8 --model.matryoshka-dims 8 16"
    )
    arguments = [f"MODEL={model}", f"DATA={files / 'data'}", f"OUT={out}", "RANK=4", "SEEDS=0"]
    arguments += ["MINUTES=0.01", "RECIPE=tiny", f"OPTIONS={options}"]
    first = call(arguments)
    end = time.monotonic() + 300
    while (
        not (out / "runs" / "ours-0" / "config.json").exists()
        and time.monotonic() < end
        and first.poll() is None
    ):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = out / "pieces" / "cut@small.json"
    written = done.stat().st_mtime_ns
    text, _ = call(arguments).communicate(timeout=600)
    assert "done  cut@small" in text and "left  ours-0: train tiny, seed 0" in text, text
    assert done.stat().st_mtime_ns == written
    content = json.loads((out / "proof.json").read_text())
    assert set(content["cells"]) == set(report.COMPETITORS)
    assert set(content["training"]) == {"ours-0", "corner", "peer-0"}
    for run in content["training"].values():
        assert run["seconds"] > 0 and run["steps"] > 0 and run["tokens"] > 0
    assert [len(content["cells"][who]) for who in ("cut", "ours", "peer", "corner")] == [32] * 3 + [
        1
    ]
    (corner,) = content["cells"]["corner"]
    assert (corner["dim"], corner["exit"], corner["rank"], corner["small"]) == (16, 2, 4, True)
    small = content["sizes"]["half the depth, rank 4"]
    assert small["corner"]["parameters"] == small["ours"]["parameters"]
    assert str(tmp_path) not in json.dumps(content)
