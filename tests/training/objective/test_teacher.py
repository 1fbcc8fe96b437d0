"""Teachers against sentence-transformers and transformers themselves, and stored vectors against
what was stored: BERT and Qwen3 of random weights, with tokenizers of their own."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from factories import randomise
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

from mlembed.cli import teacher as command
from mlembed.data import tables as sources
from mlembed.data.tables import Table
from mlembed.training.objective import teacher
from mlembed.training.objective.teacher import Stored, Teacher, store

CPU = torch.device("cpu")
WORDS = ["one two three", "four five", "ein zwei drei vier", "раз два три", "the quick brown fox"]
# No text of its own tokens, several scripts, words it has not seen, one beyond the model's length,
# and one that comes twice.
TEXTS = ["one", "", *WORDS, "two two", "比利时 fox", "one", "long " * 50, " space around \n"]
QUERIES = 3
BERT_LENGTH, QWEN_LENGTH = 16, 12


def trained(kind: str) -> PreTrainedTokenizerFast:
    """WordPiece with [CLS] and [SEP], padded right; or byte-level BPE with EOS, padded left."""
    if kind == "bert":
        read = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        read.pre_tokenizer = pre_tokenizers.Whitespace()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        read.train_from_iterator(
            WORDS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special)
        )
        read.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = dict(
            zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True)
        )
        return PreTrainedTokenizerFast(tokenizer_object=read, model_max_length=BERT_LENGTH, **names)
    read = Tokenizer(models.BPE())
    read.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    read.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    read.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=read,
        model_max_length=QWEN_LENGTH,
        padding_side="left",
        pad_token="<pad>",
        eos_token="<eos>",
    )


def plain(kind: str, out: Path) -> Path:
    """A directory of transformers alone."""
    read = trained(kind)
    if kind == "bert":
        shape = BertConfig(
            vocab_size=len(read), hidden_size=20, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=31, max_position_embeddings=BERT_LENGTH, pad_token_id=0,
        )  # fmt: skip
        model = BertModel(shape)
    else:
        shape = Qwen3Config(
            vocab_size=len(read), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, intermediate_size=37, pad_token_id=0,
            max_position_embeddings=64,
        )  # fmt: skip
        model = Qwen3Model(shape)
    randomise(model).save_pretrained(out)
    read.save_pretrained(out)
    return out


def sentence(kind: str, out: Path, **options) -> Path:
    """A directory of sentence-transformers: BERT by its mean, of length one; Qwen3 as it is."""
    words = Transformer(str(plain(kind, out.with_name(out.name + "-plain"))))
    width = words.get_embedding_dimension()
    pooling = Pooling(width, "mean" if kind == "bert" else "lasttoken")
    modules = [words, pooling, *([Normalize()] if kind == "bert" else [])]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(out))
    return out


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
    return Teacher.load(str(saved["bert"]), "", 100, CPU)


def by_sentence_transformers(path: Path, texts: list[str]) -> np.ndarray:
    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    return model.encode(texts, prompt="", batch_size=4, show_progress_bar=False)


# ---- encoding ----


# One text at a time; a few; all at once.
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("kind", ["bert", "qwen3", "plain"])
def test_vectors_are_those_of_sentence_transformers(saved, kind, max_tokens):
    made = Teacher.load(str(saved[kind]), "ask ", max_tokens, CPU)
    got = made.encode(TEXTS, queries=QUERIES)
    read = ["ask " + text for text in TEXTS[:QUERIES]] + TEXTS[QUERIES:]
    want = by_sentence_transformers(saved[kind], read)
    assert got.dtype == torch.float32 and got.shape == want.shape == (len(TEXTS), made.width)
    assert np.abs(got.numpy() - want).max() < 1e-5
    apart = torch.cdist(got.double(), got.double())
    assert (apart > 1e-3).sum() >= len(TEXTS) * (len(TEXTS) - 3)  # and not all the same


def test_a_plain_model_is_pooled_by_its_mean(saved):
    """By hand, and one text at a time."""
    made = Teacher.load(str(saved["plain"]), "", 64, CPU)
    read = AutoTokenizer.from_pretrained(saved["plain"])
    model = AutoModel.from_pretrained(saved["plain"]).eval()
    for text, got in zip(TEXTS, made.encode(TEXTS), strict=True):
        ids = read([text], truncation=True, return_tensors="pt")["input_ids"]
        want = model(ids).last_hidden_state[0].mean(0)
        assert torch.allclose(got, want, atol=1e-5)


def test_a_static_model_whose_tokenizer_is_a_bare_one(tmp_path):
    words = StaticEmbedding(trained("bert").backend_tokenizer, embedding_dim=7)
    SentenceTransformer(modules=[words], device="cpu").save(str(tmp_path / "static"))
    made = Teacher.load(str(tmp_path / "static"), "", 9, CPU)
    texts = [text for text in TEXTS if text]
    want = by_sentence_transformers(tmp_path / "static", texts)
    assert np.abs(made.encode(texts).numpy() - want).max() < 1e-6


def test_a_teacher_says_how_it_pools(saved, bert):
    assert bert.pipeline == "Transformer, Pooling (mean), Normalize"
    assert Teacher.load(str(saved["plain"]), "", 9, CPU).pipeline == "Transformer, Pooling (mean)"
    said = Teacher.load(str(saved["qwen3"]), "", 9, CPU).pipeline
    assert said == "Transformer, Pooling (lasttoken)"


def test_vectors_are_as_the_modules_leave_them(saved, bert):
    assert torch.allclose(bert.encode(TEXTS).norm(dim=1), torch.ones(len(TEXTS)))
    raw = Teacher.load(str(saved["qwen3"]), "", 100, CPU).encode(WORDS).norm(dim=1)
    assert (raw - 1).abs().min() > 0.1


def test_batches_are_as_full_as_allowed(bert):
    texts = ["one " * n for n in range(1, 30)]  # some beyond the model's length
    whole = bert.model.tokenizer(texts)["input_ids"]
    lengths = [min(len(ids), BERT_LENGTH) for ids in whole]
    assert max(len(ids) for ids in whole) > BERT_LENGTH > min(lengths)
    batches = list(bert._batches(texts))
    assert sorted(row for rows in batches for row in rows) == list(range(len(texts)))
    for rows, after in zip(batches, [*batches[1:], None], strict=True):
        longest = max(lengths[row] for row in rows)
        assert longest * len(rows) <= bert.max_tokens
        assert after is None or longest * (len(rows) + 1) > bert.max_tokens


def test_vectors_may_be_kept_for_a_backward(bert):
    t = bert.encode(WORDS)
    assert not t.is_inference() and not t.requires_grad
    w = torch.ones(len(WORDS), bert.width, requires_grad=True)
    (w * t).sum().backward()
    assert torch.equal(w.grad, t)


def test_nothing_to_encode(bert):
    assert bert.encode([]).shape == (0, bert.width)


def test_each_text_is_encoded_once(bert, monkeypatch):
    seen = []
    encode = bert.model.encode
    monkeypatch.setattr(
        bert.model,
        "encode",
        lambda texts, **options: seen.extend(texts) or encode(texts, **options),
    )
    bert.encode(["one", "two", "one"], queries=1)
    assert sorted(seen) == ["one", "two"]


# ---- what is not opened ----


def test_pickled_weights_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved["plain"], tmp_path / "plain")
    weights = AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"teacher: expected weights in safetensors in .*plain,"):
        Teacher.load(str(folder), "", 9, CPU)


def test_a_module_of_pickled_weights_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved["bert"], tmp_path / "bert")
    (folder / "2_Dense").mkdir()
    torch.save({}, folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected weights in safetensors in .*2_Dense, found"):
        Teacher.load(str(folder), "", 9, CPU)


def test_code_beside_weights_is_not_run(saved, tmp_path):
    folder = shutil.copytree(saved["plain"], tmp_path / "remote")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass M: pass\nclass C: pass\n")
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "own", "auto_map": {"AutoModel": "code.M", "AutoConfig": "code.C"}}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="teacher: .*remote could not be opened: ") as caught:
        Teacher.load(str(folder), "", 9, CPU)
    assert "\n" not in str(caught.value) and not ran.exists()


def test_a_module_beside_weights_is_not_run(saved, tmp_path):
    """sentence-transformers before 6.0 imports whatever a local modules.json names."""
    folder = shutil.copytree(saved["bert"], tmp_path / "local")
    ran = tmp_path / "ran"
    (folder / "payload.py").write_text(f"open({str(ran)!r}, 'w')\nclass Module: pass\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "payload.Module"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="teacher: .*local could not be opened: "):
        Teacher.load(str(folder), "", 9, CPU)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["./nothing", "nothing", "/no/such/dir"])
def test_nothing_there(name):
    with pytest.raises(ValueError, match=f"teacher: expected a directory or a hub id, got {name}"):
        Teacher.load(name, "", 9, CPU)


def test_a_hub_id_out_of_reach_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="teacher: nobody/nothing is no local") as caught:
        Teacher.load("nobody/nothing", "", 9, CPU)
    assert "\n" not in str(caught.value)


# ---- stored ----


def tables() -> list[Table]:
    """Pairs with hard negatives, some texts in two roles; and an n-way table."""
    pairs = ["one", "two three", "four", "five", "one", "six", "two three"]
    nway = ["seven", "sieben", "one", "ein"]
    return [
        Table("pairs", False, pairs, np.arange(7), np.array([0, 3, 5, 7])),
        Table("nway", True, nway, np.array([1, 1, 2, 2]), np.array([0, 2, 4])),
    ]


# Of the pairs: queries one, five, six; documents two three, four, one. All of the n-way table may
# be either.
AS_QUERIES = {"one", "five", "six", "seven", "sieben", "ein"}
AS_DOCUMENTS = {"two three", "four", "one", "seven", "sieben", "ein"}


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0), ("fp16", 2**-11)])
@pytest.mark.parametrize("prompt", ["", "ask "])
def test_stored_vectors_are_the_teachers(saved, tmp_path, prompt, dtype, error):
    made = Teacher.load(str(saved["bert"]), prompt, 64, CPU)
    count = store(made, tables(), tmp_path / "out", dtype, {"model": "m"})
    assert (
        count == len(AS_QUERIES) + len(AS_DOCUMENTS) if prompt else len(AS_QUERIES | AS_DOCUMENTS)
    )
    found = Stored.open(str(tmp_path / "out"))
    assert found.width == made.width
    texts = [*sorted(AS_QUERIES), *sorted(AS_DOCUMENTS), "one"]
    got = found.vectors(texts, queries=len(AS_QUERIES))
    want = made.encode(texts, queries=len(AS_QUERIES)).numpy()
    assert got.dtype == np.float32
    # Coordinates are below 1; the batches were others, which moves the last bits.
    assert np.abs(got - want).max() < error + 1e-6
    one = texts.index("one"), len(texts) - 1
    assert np.array_equal(got[one[0]], got[one[1]]) != bool(prompt)
    about = json.loads((tmp_path / "out" / "teacher.json").read_text())
    assert about == {
        "model": "m", "pipeline": made.pipeline, "prompt": prompt, "dtype": dtype,
        "width": made.width, "count": count,
    }  # fmt: skip
    assert found.vectors([]).shape == (0, made.width)


@pytest.fixture
def stored(bert, tmp_path) -> Stored:
    store(bert, tables(), tmp_path / "out")
    return Stored.open(str(tmp_path / "out"))


def test_many_texts_are_stored_slice_by_slice(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "SLICE", 3)
    store(bert, tables(), tmp_path / "out", "fp32")
    texts = sorted(AS_QUERIES | AS_DOCUMENTS)
    got = Stored.open(str(tmp_path / "out")).vectors(texts)
    assert np.abs(got - bert.encode(texts).numpy()).max() < 1e-6


def test_a_lost_text_is_named(stored, saved, tmp_path):
    with pytest.raises(ValueError, match=f"found none of the document {'x' * 60!r}$"):
        stored.vectors(["one", "x" * 100])
    prompted = Teacher.load(str(saved["bert"]), "ask ", 64, CPU)
    store(prompted, tables(), tmp_path / "prompted")
    found = Stored.open(str(tmp_path / "prompted"))
    with pytest.raises(ValueError, match="found none of the query 'four'"):
        found.vectors(["four"], queries=1)
    found.vectors(["four"])


def test_it_is_mapped_and_not_copied_to_other_processes(stored):
    assert isinstance(stored.vectors_ND, np.memmap) and isinstance(stored.keys, np.memmap)
    again = pickle.loads(pickle.dumps(stored))
    assert again.vectors_ND.filename == stored.vectors_ND.filename is not None
    assert again.keys.filename == stored.keys.filename is not None
    assert np.array_equal(again.vectors(["one"]), stored.vectors(["one"]))


def test_keys_are_sorted_and_distinct(stored):
    pairs = [tuple(pair) for pair in stored.keys.T.tolist()]
    assert pairs == sorted(set(pairs)) and len(pairs) == len(AS_QUERIES | AS_DOCUMENTS)


def test_pairs_of_equal_halves_are_told_apart():
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 4, (50, 2)).astype(np.uint64)
    keys, row_of, new = teacher._sorted(pairs)
    assert [tuple(key) for key in keys.T.tolist()] == sorted({tuple(p) for p in pairs.tolist()})
    assert np.array_equal(keys.T[row_of], pairs)
    firsts = {}
    for i, pair in enumerate(pairs.tolist()):
        firsts.setdefault(tuple(pair), i)
    assert np.flatnonzero(new).tolist() == sorted(firsts.values())


def test_nothing_is_overwritten_and_nothing_half_written_stays(bert, tmp_path, monkeypatch):
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


def test_what_fp16_cannot_hold_is_refused(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Teacher, "encode", lambda self, texts, queries=0: torch.full((len(texts), self.width), 7e4)
    )
    with pytest.raises(ValueError, match="dtype: expected fp32"):
        store(bert, tables(), tmp_path / "out")
    store(bert, tables(), tmp_path / "out", "fp32")
    assert Stored.open(str(tmp_path / "out")).vectors(["one"])[0, 0] == 7e4


def test_damaged_directories(stored, tmp_path):
    def damaged(name: str, content: bytes | None) -> str:
        copy = shutil.copytree(
            tmp_path / "out", tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"
        )
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        return str(copy)

    whole = (tmp_path / "out" / "vectors.npy").read_bytes()
    for name in ("teacher.json", "vectors.npy", "keys.npy"):
        with pytest.raises(ValueError, match=f"teacher: expected {name} in "):
            Stored.open(damaged(name, None))
    for name, content in (
        ("teacher.json", b"{"),
        ("teacher.json", b"{}"),
        ("teacher.json", b"[]"),
        ("vectors.npy", whole[: len(whole) // 2]),
        ("keys.npy", b""),
    ):
        with pytest.raises(ValueError, match="could not be read"):
            Stored.open(damaged(name, content))
    with pytest.raises(ValueError, match="expected a vector for each key"):
        Stored.open(damaged("keys.npy", whole))


# ---- the command ----


def test_the_command(saved, bert, tmp_path):
    rows = [{"query": "one", "positive": "two"}, {"query": "three", "positive": "four five"}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    options = ["--data", data, "--dtype", "fp32", "--device", "cpu"]
    done = processes.run("-m", "mlembed", "teacher", saved["bert"], out, *options)
    assert done.returncode == 0, done.stderr
    assert "4 vectors of width 20, by Transformer, Pooling (mean), Normalize" in done.stdout
    texts = ["one", "two", "three", "four five"]
    got = Stored.open(str(out)).vectors(texts, queries=2)
    assert np.abs(got - bert.encode(texts).numpy()).max() < 1e-6


def test_the_command_refuses_what_is_there_before_it_loads_anything(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="out: expected a new directory"):
        command.main("nobody/nothing", tmp_path, data=("nothing",))
    assert (tmp_path / "a").read_text() == "mine"


def test_the_command_refuses_streams(tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"query": "one", "positive": "two"}\n')
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"sources": [{"path": "pairs.jsonl", "streaming": True}]}))
    with pytest.raises(ValueError, match="data: expected stored sources, got streams: .*pairs"):
        command.main("nobody/nothing", tmp_path / "out", data=(str(mixture),))


def test_roles_are_those_that_training_draws():
    """A text that could not be found in training would end a run."""
    found = set(teacher._roles(tables(), prompted=True))
    assert found == {(t, True) for t in AS_QUERIES} | {(t, False) for t in AS_DOCUMENTS}
    assert set(teacher._roles(tables(), prompted=False)) == {
        (text, False) for text in AS_QUERIES | AS_DOCUMENTS
    }
    assert isinstance(tables()[0], sources.Table)
