"""`mlembed score` and mining with a cross-encoder, against sentence-transformers' own `predict`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import small_job, tiny_encoder, tiny_tokenizer, write_encoder, write_jsonl
from sentence_transformers import CrossEncoder as Theirs
from teacher_models import cross_encoder

from mlembed.cli import mine, score
from mlembed.data.sources import tables_of
from mlembed.inference import cross_encoder as ours
from mlembed.inference.cross_encoder import CrossEncoder
from mlembed.inference.mining import Options, gather, select_negatives, write
from train import one_step

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def rows(count=24, seed=0):
    """Return pairs of distinct texts, two negatives each."""
    rng = np.random.default_rng(seed)

    def text(mark):
        return " ".join([*rng.choice(WORDS, rng.integers(2, 6)), mark])

    return [
        {"query": text(f"q{i}"), "positive": text(f"p{i}"), "negatives": [text(f"n{i}"), f"m{i}"]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    words = [f"{word} q1 p2 n3 m4" for word in WORDS]
    return cross_encoder(tmp_path_factory.mktemp("cross") / "model", words=words)


@pytest.fixture(scope="module")
def theirs(directory):
    return Theirs(str(directory), device="cpu", local_files_only=True)


def predicted(theirs, pairs, activation):
    """Score each pair alone, so that no padding takes part."""
    return np.array(
        [
            theirs.predict([pair], activation_fn=activation, show_progress_bar=False)[0]
            for pair in pairs
        ]
    )


def test_scores_are_those_of_sentence_transformers(directory, theirs):
    pairs = [(row["query"], row["positive"]) for row in rows()] + [
        ("", "one"),
        ("one", "one " * 99),
    ]
    model = CrossEncoder.load(str(directory), "cpu")
    for sigmoid, activation in ((False, torch.nn.Identity()), (True, torch.nn.Sigmoid())):
        got = model.scores(pairs, sigmoid)
        assert got.dtype == np.float32 and got.std() > 1e-3
        np.testing.assert_allclose(got, predicted(theirs, pairs, activation), rtol=0, atol=1e-5)


def test_command_writes_a_row_for_every_pair(directory, theirs, tmp_path, monkeypatch, capsys):
    """The file is what training reads: its scores reach the right texts, in blocks of any size."""
    given, out = rows(), tmp_path / "scored.jsonl"
    given[3]["negatives"] = []
    monkeypatch.setattr(ours, "BLOCK", 5)
    path = write_jsonl(tmp_path / "pairs.jsonl", given)
    score.main(str(directory), out, data=(path,), device="cpu")
    assert f"{out}: 70 scores of 24 pairs" in capsys.readouterr().out
    written = [json.loads(line) for line in out.read_text().splitlines()]
    for row, made in zip(given, written, strict=True):
        assert (made["query"], made["pos"], made["neg"]) == (
            row["query"], [row["positive"]], row["negatives"],
        )  # fmt: skip
        pairs = [(row["query"], document) for document in made["pos"] + made["neg"]]
        scores = made["pos_scores"] + made["neg_scores"]
        np.testing.assert_allclose(
            scores, predicted(theirs, pairs, torch.nn.Identity()), rtol=0, atol=1e-5
        )
    (table,) = tables_of((str(out),))
    assert table.scored == 23
    with pytest.raises(ValueError, match="expected a new file"):
        score.main(str(directory), out, data=(path,), device="cpu")


def test_run_learns_from_what_the_command_wrote(directory, tmp_path):
    out, pairs = tmp_path / "scored.jsonl", write_jsonl(tmp_path / "p.jsonl", rows())
    score.main(str(directory), out, data=(pairs,), device="cpu")
    job = small_job(tmp_path, [str(out)], "--distill.scores", "1", "--batch-size", "8")
    terms = one_step(job, 0, iter([job.batches[0]])).losses
    job.saver.close()
    assert (terms["scores"] > 0).all() and (terms["contrastive"] > 0).all()


@pytest.mark.parametrize(
    ("labels", "reason"), [(2, "expected a cross-encoder of one score, got 2")]
)
def test_other_models_are_refused(labels, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        CrossEncoder.load(str(cross_encoder(tmp_path / "many", labels)), "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        CrossEncoder.load(str(tmp_path / "empty"), "cpu")


def test_data_without_pairs_is_refused(directory, tmp_path):
    nway = [{"id": i, "lang": lang, "text": f"{i} {lang}"} for i in range(4) for lang in ("a", "b")]
    path = write_jsonl(tmp_path / "nway.jsonl", nway)
    with pytest.raises(ValueError, match="expected pairs to score, got an n-way table"):
        score.main(str(directory), tmp_path / "out.jsonl", data=(path,), device="cpu")
    assert not (tmp_path / "out.jsonl").exists()
    path = write_jsonl(tmp_path / "pairs.jsonl", rows(3))
    with pytest.raises(ValueError, match=r"expected a \.jsonl file"):
        score.main(str(directory), tmp_path / "out.csv", data=(path,), device="cpu")


# ---- mining ----


def test_cross_encoder_decides_what_is_mined(directory, theirs, tmp_path):
    """A loop over the shortlist of each query gives negatives of the same scores, in order."""
    given = [{**row, "negatives": []} for row in rows(40)]
    tokens = tiny_tokenizer([f"{row['query']} {row['positive']}" for row in given], 280)
    encoder = tiny_encoder(tokens, 32)
    options = Options(top=12, negatives=4, skip=1, relative_margin=1e-4)
    texts = gather(tables_of((write_jsonl(tmp_path / "p.jsonl", given),)))
    write(encoder, texts, options, tmp_path / "plain.jsonl")
    cross = CrossEncoder.load(str(directory), "cpu")
    write(encoder, texts, options, tmp_path / "judged.jsonl", cross=cross)
    documents = [row["positive"] for row in given]
    queries = encoder.encode([row["query"] for row in given])
    vectors = encoder.encode(documents)
    changed = 0
    for i, line in enumerate((tmp_path / "judged.jsonl").read_text().splitlines()):
        made = json.loads(line)
        near = [j for j in np.argsort(-(vectors @ queries[i]), kind="stable") if j != i][:12]
        pairs = [(given[i]["query"], documents[j]) for j in (*near, i)]
        *scores, own = predicted(theirs, pairs, torch.nn.Sigmoid())
        order = np.argsort(-np.array(scores), kind="stable")
        chosen, _ = select_negatives(np.array(scores)[order], own, options, i)
        # Documents that differ in unknown words alone have equal scores, in either order.
        score_of = {documents[j]: score for j, score in zip(near, scores, strict=True)}
        own_scores = [score_of[document] for document in made["negatives"]]
        np.testing.assert_allclose(own_scores, made["negative_scores"], rtol=0, atol=1e-5)
        assert made["positive_score"] == pytest.approx(own, abs=1e-5)
        np.testing.assert_allclose(
            made["negative_scores"], np.array(scores)[order][chosen], rtol=0, atol=1e-5
        )
        changed += bool(chosen.size) and made["negatives"] != [documents[j] for j in near[1:5]]
    assert changed > 10
    assert (tmp_path / "judged.jsonl").read_text() != (tmp_path / "plain.jsonl").read_text()


def test_command_mines_with_a_cross_encoder(directory, tmp_path, capsys):
    given = rows(12)
    tokens = tiny_tokenizer([row["query"] for row in given], 280)
    model = str(write_encoder(tiny_encoder(tokens, 32), tmp_path / "model"))
    data = (write_jsonl(tmp_path / "p.jsonl", given),)
    options = Options(top=6, negatives=2)
    mine.main(model, tmp_path / "m.jsonl", data=data, options=options, cross_encoder=str(directory))
    assert "12 queries of 12 pairs" in capsys.readouterr().out
    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        assert 0 < json.loads(line)["positive_score"] < 1
    with pytest.raises(ValueError, match="rescore: expected it without --cross-encoder"):
        mine.main(
            model, tmp_path / "n.jsonl", data=data, options=replace(options, rescore=True),
            cross_encoder=str(directory),
        )  # fmt: skip
