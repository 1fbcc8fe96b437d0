"""Single texts: sources without pairs, from which distillation alone learns."""

import gzip

import numpy as np
import pytest
import torch
from factories import SMALL, metrics, small_text, tiny_tokenizer

import train
from mlembed import config
from mlembed.data import sources, tables
from mlembed.data.batches import Batches, steps_of
from mlembed.data.tokens import tokenise
from mlembed.inference import mining
from mlembed.runtime.distributed import World
from mlembed.training.arguments import parse
from mlembed.training.objective.teacher import Teacher, store
from tests.data.samples import batch_texts, jsonl, mistake, parquet, reports, same_table, table_of

TEXTS = [f"text {i}, of « {'many ' * (i % 5)}» words" for i in range(21)]
WHERE = World(0, 1, torch.device("cpu"))


def lines(path, texts=TEXTS):
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def run_of(**changes):
    return config.Run(**{"batch_size": 4, "steps": 6} | changes)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return table_of(lines(tmp_path_factory.mktemp("texts") / "one.txt"))


# ---- files ----


def test_every_form_is_the_same_table(tmp_path, table):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n\n".join(TEXTS).encode()))
    jsonl(tmp_path / "b.jsonl", [{"text": text, "url": "u"} for text in TEXTS])
    jsonl(tmp_path / "c.jsonl", [{"content": text} for text in TEXTS])
    parquet(tmp_path / "d.parquet", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    lines(tmp_path / "e.csv", ["text", *(f'"{text}"' for text in TEXTS)])
    told = {"c.jsonl": config.Columns(text="content")}
    for path in sorted(tmp_path.iterdir()):
        one = table_of(path, name="one", columns=told.get(path.name, config.Columns()))
        same_table(one, table)
    assert list(table.texts) == TEXTS and table.task == "texts" and len(table) == 21


def test_large_file_is_stored(tmp_path, table, monkeypatch):
    monkeypatch.setattr(sources, "BIG", 1)
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        stored = table_of(lines(tmp_path / "one.txt"))
        assert isinstance(stored.texts, tables.StoredTexts)
        same_table(stored, table)


def test_title_comes_before_its_text(tmp_path):
    rows = [{"_id": "1", "title": "A", "text": "b"}, {"_id": "2", "title": "", "text": "c"}]
    ((table, report),) = reports(jsonl(tmp_path / "corpus.jsonl", rows))
    assert list(table.texts) == ["A b", "c"]
    assert report.roles == "text=text title=title; unused: _id"


def test_what_is_left_out_is_said(tmp_path):
    path = lines(tmp_path / "x.txt", ["a", "b", "a", "", "C", "d", "e"])
    ((table, report),) = reports(path, held_out={"c"}, cap=3)
    assert len(table) == 3 and tables.describe(table, report) == (
        "3 single texts, for distillation alone; text=text; unused: none; left out: "
        "1 texts of the evaluation, 1 duplicates, 1 beyond the cap"
    )
    bad = jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": 7}, {"text": "b"}])
    assert mistake(bad) == f"{bad}:2: text: expected text, got 7"
    ((table, report),) = reports(bad, "skip")
    assert list(table.texts) == ["a", "b"] and report.bad == 1


def test_notes_beside_data_are_not_data(tmp_path):
    jsonl(tmp_path / "p.jsonl", [{"query": "q", "positive": "p"}])
    lines(tmp_path / "README.txt")
    assert table_of(tmp_path).texts == ["q", "p"]
    (tmp_path / "p.jsonl").unlink()
    assert len(table_of(tmp_path).texts) == len(TEXTS)


@pytest.mark.parametrize(
    "row, fields, error",
    [
        ({"text": "a", "label": 1}, {}, "expected columns query, positive .*got text, label;"),
        ({"text": "a", "negatives": ["b"]}, {}, "expected columns .*got text, negatives;"),
        ({"text": "a", "others": ["b"]}, {}, "others: .*its values are lists of texts"),
        ({"text": "a", "lang": "de"}, {}, "expected columns query, positive .*--columns.text"),
        ({"text": "a"}, {"task": "sts"}, "task: expected auto for single texts, got sts"),
        ({"text": "a"}, {"corpus": "c"}, "corpus: expected pairs of ids, got text=text"),
        ({"text": "a"}, {"columns": config.Columns(text="b")}, "columns.text: .*of text, got b"),
        ({"text": "a"}, {"prompt": "p"}, "prompt: expected that of documents, '', as each text"),
    ],
)
def test_what_cannot_be_meant(tmp_path, row, fields, error):
    path = jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(ValueError, match=error):
        tokenise(table_of(path, **fields), tiny_tokenizer(), 8)


def test_where_pairs_are_needed(tmp_path, table):
    with pytest.raises(ValueError, match="pairs of a query and a document .* got single texts"):
        mining.gather([table])
    path = lines(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="expected pairs for a stream, got single texts"):
        list(sources.items(config.Source(str(path), streaming=True)))


# ---- batches ----


def test_groups_of_two_texts_use_up_the_table(table):
    learnt = tiny_tokenizer(TEXTS)
    batches = Batches([table], learnt, run_of(epochs=1), WHERE)
    assert steps_of(run_of(epochs=1), [table]) == 3  # 10.5 groups, 4 a batch
    drawn = [batch_texts(batches[i], learnt) for i in range(6)]
    assert all(len(texts) == 8 for texts in drawn)
    flat = [text for texts in drawn for text in texts]
    # A batch of the next epoch's texts too is ordered as one, so an epoch is known by its counts.
    assert {flat.count(text) for text in TEXTS} == {2, 3} and flat.count(TEXTS[0]) >= 2
    assert len(set(flat[:16])) == 16
    for batch in (batches[i] for i in range(6)):
        assert batch.task == "texts" and len(batch.target) == 4 and not batch.negatives.numel()


# ---- training ----


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, table):
    """Vectors of a static model for the texts and for pairs, queries with a prompt of their own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    home = tmp_path_factory.mktemp("vectors")
    tokens = tiny_tokenizer(TEXTS)
    weights = torch.randn(tokens.get_vocab_size(), 32, generator=torch.Generator().manual_seed(0))
    static = StaticEmbedding(tokens, embedding_weights=weights.numpy())
    SentenceTransformer(modules=[static]).save_pretrained(str(home / "static"))
    model = Teacher.load(str(home / "static"), "find: ", torch.device("cpu"))
    pairs = small_text(home)[0]
    both = [table, *(t for t, _ in sources.read(config.Source(pairs)))]
    distinct = {text for t in both for text in t.texts}
    # A text that may be a query or a document has a vector as each.
    count = store(model, both, home / "out", "fp32")
    assert count == len(distinct) + len(table.texts)
    return home


def trained(tmp_path, vectors, *options):
    lines(tmp_path / "texts.txt")
    data = [str(tmp_path / "texts.txt"), str(vectors / "pairs.jsonl")]
    run = parse(
        [
            "tiny",
            *SMALL,
            "--steps",
            "8",
            "--output-dir",
            str(tmp_path),
            "--name",
            "r",
            "--seed",
            "1",
        ]
        + ["--eval", "--tracker", "none", "--save-every", "0", "--data", *data, *options]
    )
    assert train.train(run, WHERE) == 0
    return metrics(tmp_path / "r", "train")


def test_distillation_learns_from_single_texts(tmp_path, vectors):
    distil = ("--distill.features", "1", "--distill.logits", "1", "--distill.exits", "all")
    logged = trained(tmp_path, vectors, "--distill.embeddings", str(vectors / "out"), *distil)
    assert {line["source"] for line in logged} == {"texts", "pairs"}
    for line in logged:
        assert set(line["distilled"]) == {"features", "logits"}
        assert bool(line["losses"]) == (line["source"] == "pairs") and np.isfinite(line["loss"])
    of_texts = [line["loss"] for line in logged if line["source"] == "texts"]
    assert of_texts[-1] < of_texts[0]


def test_contrastive_loss_alone_is_refused(tmp_path, vectors):
    with pytest.raises(ValueError, match="data: expected pairs, .* got single texts in texts; "):
        trained(tmp_path, vectors)
