"""Teachers against sentence-transformers and transformers, and stored vectors against teachers:
BERT and Qwen3 of random weights, with tokenizers of their own.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from factories import write_jsonl
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from teacher_models import (
    BERT_LENGTH,
    TEXTS,
    WORDS,
    by_sentence_transformers,
    plain,
    sentence,
    trained,
)
from transformers import AutoModel, AutoTokenizer

from mlembed.cli import teacher as command
from mlembed.config import Distill
from mlembed.data.tables import Table
from mlembed.training.objective import sentence_teacher, teacher
from mlembed.training.objective.packed_teacher import PackedTeacher
from mlembed.training.objective.sentence_teacher import SentenceTeacher
from mlembed.training.objective.teacher import StoredVectors, Teacher, store

CPU = torch.device("cpu")
QUERIES = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("teachers")
    asked = {"prompts": {"query": "ask: "}, "default_prompt_name": "query"}
    return {
        "bert": sentence("bert", home / "bert"),
        "qwen3": sentence("qwen3", home / "qwen3", **asked),
        "plain": plain("bert", home / "plain"),
    }


@pytest.fixture(scope="module")
def bert(saved) -> Teacher:
    return Teacher.load(str(saved["bert"]), "", CPU)


@pytest.fixture(scope="module")
def library(saved) -> SentenceTeacher:
    return SentenceTeacher.load(saved["bert"], None, CPU, "a test asks for it")


# ---- encoding ----


# One text at a time, a few, or all at once.
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("kind", ["bert", "qwen3", "plain"])
@pytest.mark.parametrize("way", ["packed", "sentence"])
def test_vectors_are_those_of_sentence_transformers(saved, kind, way, max_tokens, monkeypatch):
    monkeypatch.setattr(sentence_teacher, "MAX_TOKENS", max_tokens)
    if way == "packed":
        made = Teacher.load(str(saved[kind]), "ask ", CPU)
        assert isinstance(made.model, PackedTeacher)
        made.model.trunk.max_tokens = max_tokens
    else:
        model = SentenceTeacher.load(saved[kind], None, CPU, "")
        made = Teacher(model, model.width, "ask ")
    got = made.encode(TEXTS, queries=QUERIES)
    read = ["ask " + text for text in TEXTS[:QUERIES]] + TEXTS[QUERIES:]
    want = by_sentence_transformers(saved[kind], read)
    assert got.dtype == torch.float32 and got.shape == want.shape == (len(TEXTS), made.width)
    assert np.abs(got.numpy() - want).max() < 1e-5
    apart = torch.cdist(got.double(), got.double())
    # Texts have different vectors.
    assert (apart > 1e-3).sum() >= len(TEXTS) * (len(TEXTS) - 3)


def test_plain_model_is_pooled_by_its_mean(saved):
    """One text at a time, in plain transformers."""
    made = Teacher.load(str(saved["plain"]), "", CPU)
    read = AutoTokenizer.from_pretrained(saved["plain"])
    model = AutoModel.from_pretrained(saved["plain"]).eval()
    for text, got in zip(TEXTS, made.encode(TEXTS), strict=True):
        ids = read([text], truncation=True, return_tensors="pt")["input_ids"]
        want = model(ids).last_hidden_state[0].mean(0)
        assert torch.allclose(got, want, atol=1e-5)


def test_static_model(tmp_path):
    words = StaticEmbedding(trained("bert").backend_tokenizer, embedding_dim=7)
    SentenceTransformer(modules=[words], device="cpu").save(str(tmp_path / "static"))
    made = Teacher.load(str(tmp_path / "static"), "", CPU)
    texts = [text for text in TEXTS if text]
    want = by_sentence_transformers(tmp_path / "static", texts)
    assert np.abs(made.encode(texts).numpy() - want).max() < 1e-6


def test_pipeline(saved, bert):
    assert bert.pipeline == "Transformer, Pooling (mean), Normalize"
    assert Teacher.load(str(saved["plain"]), "", CPU).pipeline == "Transformer, Pooling (mean)"
    qwen3 = Teacher.load(str(saved["qwen3"]), "", CPU)
    assert qwen3.pipeline == "Transformer, Pooling (lasttoken)"


def test_only_modules_normalise(saved, bert):
    assert torch.allclose(bert.encode(TEXTS).norm(dim=1), torch.ones(len(TEXTS)))
    raw = Teacher.load(str(saved["qwen3"]), "", CPU).encode(WORDS).norm(dim=1)
    assert (raw - 1).abs().min() > 0.1


def test_batches_are_as_full_as_allowed(library, monkeypatch):
    monkeypatch.setattr(sentence_teacher, "MAX_TOKENS", 100)
    # Some are longer than the model reads.
    texts = ["one " * n for n in range(1, 30)]
    ids = library.model.tokenizer(texts)["input_ids"]
    lengths = [min(len(tokens), BERT_LENGTH) for tokens in ids]
    assert max(map(len, ids)) > BERT_LENGTH > min(lengths)
    batches = list(library._batches(texts))
    assert sorted(row for rows in batches for row in rows) == list(range(len(texts)))
    for rows, after in zip(batches, [*batches[1:], None], strict=True):
        longest = max(lengths[row] for row in rows)
        assert longest * len(rows) <= 100
        assert after is None or longest * (len(rows) + 1) > 100


def test_vectors_may_be_saved_for_a_backward(bert):
    t = bert.encode(WORDS)
    assert not t.is_inference() and not t.requires_grad
    w = torch.ones(len(WORDS), bert.width, requires_grad=True)
    (w * t).sum().backward()
    assert torch.equal(w.grad, t)


def test_each_text_is_encoded_once(bert, monkeypatch):
    seen = []
    encode = bert.model.encode

    def watched(texts, bar):
        seen.extend(texts)
        return encode(texts, bar)

    monkeypatch.setattr(bert.model, "encode", watched)
    bert.encode(["one", "two", "one"], queries=1)
    assert sorted(seen) == ["one", "two"]
    assert bert.encode([]).shape == (0, bert.width)


# ---- kept vectors ----


@pytest.fixture
def keeping(saved) -> Teacher:
    return Teacher.load(str(saved["bert"]), "ask ", CPU, keep=True)


def test_kept_vectors_are_rounded(saved, keeping):
    fresh = Teacher.load(str(saved["bert"]), "ask ", CPU).encode(TEXTS, queries=QUERIES)
    first = keeping.encode(TEXTS, queries=QUERIES)
    assert (first - fresh).abs().max() < 2**-11  # Coordinates are below 1.
    assert torch.equal(first, first.half().float()) and not torch.equal(first, fresh)


def test_kept_texts_are_not_encoded_again(keeping, monkeypatch):
    seen, encode = [], keeping.model.encode

    def watched(texts, bar):
        seen.append(list(texts))
        return encode(texts, bar)

    monkeypatch.setattr(keeping.model, "encode", watched)
    first = keeping.encode(["one", "two", "one"], queries=1)
    again = keeping.encode(["one", "two", "one"], queries=1)
    assert seen == [["ask one", "two", "one"]] and torch.equal(first, again)
    # A query without its prompt is another text, and a document with it the same.
    third = keeping.encode(["two", "one", "ask one"], queries=1)
    assert seen[1:] == [["ask two"]] and torch.equal(third[1:], first[[2, 0]])
    assert not third.is_inference() and third.dtype == torch.float32
    (bytes_each,) = {len(vector) for vector in keeping.kept.values()}
    assert len(keeping.kept) == 4 and bytes_each == 2 * keeping.width


def test_vectors_beyond_fp16_are_not_kept(keeping, monkeypatch):
    seen = []

    def large(texts, bar):
        seen.append(list(texts))
        scale = [1e5 if text == "large" else 1.0 for text in texts]
        return torch.tensor(scale)[:, None].expand(-1, keeping.width)

    monkeypatch.setattr(keeping.model, "encode", large)
    for _ in range(2):
        assert keeping.encode(["small", "large"])[:, 0].tolist() == [1, 1e5]
    assert seen == [["small", "large"], ["large"]]


def test_keeping_needs_a_teacher():
    with pytest.raises(ValueError, match="distill.keep: expected False without distill.teacher"):
        Distill(embeddings="somewhere", features=1.0, keep=True)


# ---- models that are not opened ----


def test_pickled_weights(saved, tmp_path):
    plain, bert = (shutil.copytree(saved[name], tmp_path / name) for name in ("plain", "bert"))
    weights = AutoModel.from_pretrained(plain).state_dict()
    (plain / "model.safetensors").unlink()
    torch.save(weights, plain / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"teacher: expected weights in safetensors in .*plain,"):
        Teacher.load(str(plain), "", CPU)
    # A module may have pickled weights, too.
    (bert / "2_Dense").mkdir()
    torch.save({}, bert / "2_Dense" / "pytorch_model.bin")
    modules = json.loads((bert / "modules.json").read_text())
    modules.append({"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (bert / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="expected weights in safetensors in .*2_Dense, got none"):
        Teacher.load(str(bert), "", CPU)


def test_code_of_a_model_is_not_run(saved, tmp_path):
    folder, ran = shutil.copytree(saved["plain"], tmp_path / "remote"), tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass M: pass\nclass C: pass\n")
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "own", "auto_map": {"AutoModel": "code.M", "AutoConfig": "code.C"}}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match="remote/config.json: model_type: expected .*, got 'own'"
    ) as caught:
        Teacher.load(str(folder), "", CPU)
    assert "\n" not in str(caught.value) and not ran.exists()


def test_code_of_a_module_is_not_run(saved, tmp_path):
    """sentence-transformers before 6.0 imports any module that a local modules.json names."""
    folder, ran = shutil.copytree(saved["bert"], tmp_path / "local"), tmp_path / "ran"
    (folder / "payload.py").write_text(f"open({str(ran)!r}, 'w')\nclass Module: pass\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "payload.Module"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(
        ValueError, match="local/modules.json: module 1: type: expected .*, got 'payload.Module'"
    ):
        Teacher.load(str(folder), "", CPU)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["./nothing", "nothing", "/no/such/dir"])
def test_missing_model(name):
    with pytest.raises(ValueError, match=f"teacher: expected a directory or a hub id, got {name}"):
        Teacher.load(name, "", CPU)


def test_unreachable_hub_id(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="teacher: nobody/nothing: not a local") as caught:
        Teacher.load("nobody/nothing", "", CPU)
    assert "\n" not in str(caught.value)


# ---- stored ----


def tables() -> list[Table]:
    """Return pairs with hard negatives, some texts in two roles, and an n-way table."""
    pairs = ["one", "two three", "four", "five", "one", "six", "two three"]
    nway = ["seven", "sieben", "one", "ein"]
    return [
        Table("pairs", False, pairs, np.arange(7), np.array([0, 3, 5, 7])),
        Table("nway", True, nway, np.array([1, 1, 2, 2]), np.array([0, 2, 4])),
    ]


# One, five and six are queries of pairs, two three, four and one documents; n-way texts are both.
AS_QUERIES = {"one", "five", "six", "seven", "sieben", "ein"}
AS_DOCUMENTS = {"two three", "four", "one", "seven", "sieben", "ein"}


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0), ("fp16", 2**-11)])
@pytest.mark.parametrize("prompt", ["", "ask "])
def test_stored_vectors_are_the_teachers(saved, tmp_path, prompt, dtype, error):
    made = Teacher.load(str(saved["bert"]), prompt, CPU)
    count = store(made, tables(), tmp_path / "out", dtype, {"model": "m"})
    distinct = len(AS_QUERIES) + len(AS_DOCUMENTS) if prompt else len(AS_QUERIES | AS_DOCUMENTS)
    assert count == distinct
    stored = StoredVectors.open(str(tmp_path / "out"))
    assert stored.width == made.width
    texts = [*sorted(AS_QUERIES), *sorted(AS_DOCUMENTS), "one"]
    got = stored.vectors(texts, queries=len(AS_QUERIES))
    want = made.encode(texts, queries=len(AS_QUERIES)).numpy()
    assert got.dtype == np.float32
    # Coordinates are below 1. Other batches change the last bits.
    assert np.abs(got - want).max() < error + 1e-6
    one = texts.index("one"), len(texts) - 1
    assert np.array_equal(got[one[0]], got[one[1]]) != bool(prompt)
    about = json.loads((tmp_path / "out" / "teacher.json").read_text())
    assert about == {
        "model": "m", "pipeline": made.pipeline, "prompt": prompt, "dtype": dtype,
        "width": made.width, "count": count,
    }  # fmt: skip
    assert stored.vectors([]).shape == (0, made.width)


@pytest.fixture
def stored(bert, tmp_path) -> StoredVectors:
    store(bert, tables(), tmp_path / "out")
    return StoredVectors.open(str(tmp_path / "out"))


def test_many_texts_are_stored_slice_by_slice(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "SLICE", 3)
    store(bert, tables(), tmp_path / "out", "fp32")
    texts = sorted(AS_QUERIES | AS_DOCUMENTS)
    got = StoredVectors.open(str(tmp_path / "out")).vectors(texts)
    assert np.abs(got - bert.encode(texts).numpy()).max() < 1e-6


def test_missing_text_is_named(stored, saved, tmp_path):
    with pytest.raises(ValueError, match=f"got none of the document {'x' * 60!r}$"):
        stored.vectors(["one", "x" * 100])
    prompted = Teacher.load(str(saved["bert"]), "ask ", CPU)
    store(prompted, tables(), tmp_path / "prompted")
    stored = StoredVectors.open(str(tmp_path / "prompted"))
    with pytest.raises(ValueError, match="got none of the query 'four'"):
        stored.vectors(["four"], queries=1)
    stored.vectors(["four"])


def test_processes_map_the_same_files(stored):
    assert isinstance(stored.vectors_ND, np.memmap) and isinstance(stored.keys, np.memmap)
    again = pickle.loads(pickle.dumps(stored))
    assert again.vectors_ND.filename == stored.vectors_ND.filename is not None
    assert again.keys.filename == stored.keys.filename is not None
    assert np.array_equal(again.vectors(["one"]), stored.vectors(["one"]))


def test_keys_are_sorted_and_distinct(stored):
    pairs = [tuple(pair) for pair in stored.keys.T.tolist()]
    assert pairs == sorted(set(pairs)) and len(pairs) == len(AS_QUERIES | AS_DOCUMENTS)


def test_keys_with_equal_halves():
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 4, (50, 2)).astype(np.uint64)
    keys, row_of, new = teacher._sorted(pairs)
    assert [tuple(key) for key in keys.T.tolist()] == sorted({tuple(p) for p in pairs.tolist()})
    assert np.array_equal(keys.T[row_of], pairs)
    firsts = {}
    for i, pair in enumerate(pairs.tolist()):
        firsts.setdefault(tuple(pair), i)
    assert np.flatnonzero(new).tolist() == sorted(firsts.values())


def test_store_writes_all_or_nothing(bert, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    with pytest.raises(ValueError, match="expected a new directory"):
        store(bert, tables(), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["a"]

    def fail(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr(bert.model, "encode", fail)
    with pytest.raises(RuntimeError, match="killed"):
        store(bert, tables(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_vectors_beyond_fp16(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Teacher, "encode", lambda self, texts, queries=0: torch.full((len(texts), self.width), 7e4)
    )
    with pytest.raises(ValueError, match="dtype: expected fp32"):
        store(bert, tables(), tmp_path / "out")
    store(bert, tables(), tmp_path / "out", "fp32")
    assert StoredVectors.open(str(tmp_path / "out")).vectors(["one"])[0, 0] == 7e4


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        *((name, None, f"expected {name} in ") for name in ("teacher.json", "vectors.npy")),
        ("keys.npy", None, "expected keys.npy in "),
        *(("teacher.json", content, "cannot read") for content in (b"{", b"{}", b"[]")),
        ("vectors.npy", "half", "cannot read"),
        ("keys.npy", b"", "cannot read"),
        ("keys.npy", "whole", "expected a vector for each key"),
    ],
)
def test_damaged_directories(stored, tmp_path, name, content, error):
    out = tmp_path / "out"
    vectors = (out / "vectors.npy").read_bytes()
    content = {"half": vectors[: len(vectors) // 2], "whole": vectors}.get(content, content)
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"teacher: .*{error}"):
        StoredVectors.open(str(out))


# ---- the command ----


def test_command(saved, bert, tmp_path):
    rows = [{"query": "one", "positive": "two"}, {"query": "three", "positive": "four five"}]
    data, out = write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    options = ["--data", data, "--dtype", "fp32", "--device", "cpu"]
    done = processes.run("-m", "mlembed", "teacher", saved["bert"], out, *options)
    assert done.returncode == 0, done.stderr
    assert "4 vectors of width 20, by Transformer, Pooling (mean), Normalize" in done.stdout
    texts = ["one", "two", "three", "four five"]
    got = StoredVectors.open(str(out)).vectors(texts, queries=2)
    assert np.abs(got - bert.encode(texts).numpy()).max() < 1e-6


def test_command_checks_out_first(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="out: expected a new directory"):
        command.main("nobody/nothing", tmp_path, data=("nothing",))
    assert (tmp_path / "a").read_text() == "mine"


def test_command_needs_stored_sources(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "one", "positive": "two"}])
    mixture = {"sources": [{"path": "pairs.jsonl", "streaming": True}]}
    data = (write_jsonl(tmp_path / "mixture.json", [mixture]),)
    with pytest.raises(ValueError, match="data: expected stored sources, got streams: .*pairs"):
        command.main("nobody/nothing", tmp_path / "out", data=data)


def test_roles_are_those_that_training_draws():
    """A text without its vector would end a run."""
    roles = set(teacher._roles(tables(), prompted=True))
    assert roles == {(t, True) for t in AS_QUERIES} | {(t, False) for t in AS_DOCUMENTS}
    roles = set(teacher._roles(tables(), prompted=False))
    assert roles == {(text, False) for text in AS_QUERIES | AS_DOCUMENTS}
