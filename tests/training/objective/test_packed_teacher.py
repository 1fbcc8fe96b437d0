"""Teachers that mlembed's trunk encodes against sentence-transformers, and teachers that it leaves
to sentence-transformers.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import small_job, tiny_encoder, write_encoder, write_jsonl
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    StaticEmbedding,
)
from teacher_models import QWEN_LENGTH, TEXTS, by_sentence_transformers, plain, sentence, trained
from tokenizers import Tokenizer

from mlembed.modeling.blocks import BertBlock
from mlembed.publishing.export import export
from mlembed.training.objective.packed_teacher import PackedTeacher
from mlembed.training.objective.sentence_teacher import SentenceTeacher
from mlembed.training.objective.teacher import Teacher

CPU = torch.device("cpu")
BERT = {"style": "bert", "causal": False, "num_key_value_heads": 2}


def dense(width: int, out: int, **options) -> Dense:
    """A tanh layer like LaBSE's pooler, or, without a bias, one that cuts vectors."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(out, width, generator=generator) * width**-0.5
    bias = torch.randn(out, generator=generator)
    return Dense(width, out, init_weight=weights, init_bias=bias, **options)


def cut(width: int, out: int) -> Dense:
    eye, identity = torch.eye(out, width), torch.nn.Identity()
    return Dense(width, out, bias=False, activation_function=identity, init_weight=eye)


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


# ---- directories that the trunk encodes ----


def exported(out: Path, dim: int | None = None, **shape) -> Path:
    """Export a model of ours; with ranks, its factors come along."""
    export(tiny_encoder(**shape), out, dim=dim)
    return out


def lower(out: Path) -> Path:
    sentence("qwen3", out)
    edit(out / "sentence_bert_config.json", do_lower_case=True)
    return out


def longer(out: Path) -> Path:
    """Sentence-transformers reads more tokens than the tokenizer's limit, beyond all positions."""
    sentence("qwen3", out)
    edit(out / "sentence_bert_config.json", max_seq_length=70)
    return out


def shorter(out: Path) -> Path:
    sentence("xlm-r", out)
    edit(out / "sentence_bert_config.json", max_seq_length=5)
    return out


KINDS = {
    "BERT mean, Normalize": lambda out: sentence("bert", out),
    "BERT mean": lambda out: sentence("bert", out, after=[]),
    "BERT cls": lambda out: sentence("bert", out, "cls", [Normalize()]),
    "BERT pooler": lambda out: sentence("bert", out, "cls", [dense(20, 20)]),
    "BERT pooler, cut, Normalize": lambda out: sentence(
        "bert", out, "cls", [dense(20, 20), cut(20, 9), Normalize()], truncate_dim=7
    ),
    "BERT cut": lambda out: sentence("bert", out, after=[cut(20, 9)]),
    "BERT truncate_dim": lambda out: sentence("bert", out, truncate_dim=7),
    "BERT last": lambda out: sentence("bert", out, "lasttoken"),
    "BERT dot": lambda out: sentence("bert", out, after=[], similarity_fn_name="dot"),
    "XLM-R mean": lambda out: sentence("xlm-r", out),
    "XLM-R of 5 tokens": shorter,
    "Qwen3 last": lambda out: sentence("qwen3", out),
    "Qwen3 last, Normalize": lambda out: sentence("qwen3", out, after=[Normalize()]),
    "Qwen3 mean": lambda out: sentence("qwen3", out, "mean", truncate_dim=5),
    "Qwen3 in lower case": lower,
    "Qwen3 of 70 tokens": longer,
    "plain XLM-R": lambda out: plain("xlm-r", out),
    "plain Qwen3": lambda out: plain("qwen3", out),
    "plain Qwen3 that generates": lambda out: plain("qwen3-lm", out),
    "ours": lambda out: exported(out, ranks=(8, 16)),
    "ours, narrow": lambda out: exported(out, dim=8),
    "ours, pooler": lambda out: exported(out, pooling="pooler", **BERT),
}


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_sentence_transformers(kind, tmp_path):
    directory = KINDS[kind](tmp_path / "model")
    packed = PackedTeacher.load(directory, None, CPU)
    library = SentenceTeacher.load(directory, None, CPU, "a test asks for it")
    assert (packed.pipeline, packed.note) == (library.pipeline, library.note)
    got = Teacher(packed, packed.width, "Ask: ").encode(TEXTS, queries=3).numpy()
    read = ["Ask: " + text for text in TEXTS[:3]] + TEXTS[3:]
    want = by_sentence_transformers(directory, read)
    assert got.shape == want.shape == (len(TEXTS), library.width)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_capitals_and_lengths_matter(tmp_path):
    """Two of the directories above would show nothing if their settings changed nothing."""
    usual, small = sentence("qwen3", tmp_path / "usual"), lower(tmp_path / "lower")
    texts = ["Ask", "one " * (QWEN_LENGTH + 5)]
    one, other, long = (
        by_sentence_transformers(d, texts) for d in (usual, small, longer(tmp_path / "long"))
    )
    assert np.abs(one - other)[0].max() > 1e-3 and np.abs(one - long)[1].max() > 1e-3


@pytest.mark.parametrize("style", ["bert", "qwen3"])
def test_ours_without_modules_is_pooled_as_it_says(style, tmp_path):
    bert = style == "bert"
    encoder = tiny_encoder(pooling="pooler", **BERT) if bert else tiny_encoder()
    directory = write_encoder(encoder, tmp_path / "model")
    packed = PackedTeacher.load(directory, None, CPU)
    library = SentenceTeacher.load(directory, None, CPU, "a test asks for it")
    pipeline = "Transformer, Pooling (cls), Dense" if bert else "Transformer, Pooling (lasttoken)"
    assert packed.pipeline == library.pipeline == pipeline
    got, want = (Teacher(x, x.width, "").encode(TEXTS) for x in (packed, library))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "pooler"])
def test_plain_models_are_pooled_as_asked(pooling, tmp_path):
    directory = plain("bert", tmp_path / "model")
    packed = PackedTeacher.load(directory, pooling, CPU)
    library = SentenceTeacher.load(directory, pooling, CPU, "a test asks for it")
    assert packed.pipeline == library.pipeline and packed.note == library.note == ""
    got, want = (Teacher(x, x.width, "").encode(TEXTS) for x in (packed, library))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_bf16_is_that_of_the_run(tmp_path, capsys):
    directory = sentence("bert", tmp_path / "model")
    full, half = (Teacher.load(str(directory), "", CPU, bf16=bf16) for bf16 in (False, True))
    error = (full.encode(TEXTS) - half.encode(TEXTS)).abs().max()
    assert 1e-4 < error < 0.05 and half.encode(TEXTS).dtype == torch.float32
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"query": t, "positive": t * 2} for t in "abcd"])
    options = ("--distill.teacher", directory, "--distill.features", 1, "--distill.align", "pca")
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        small_job(folder, [data], "--precision", precision, *options).saver.close()
        assert (
            "Pooling (mean), Normalize, width 20; encoded by mlembed in "
            f"{precision} packs, because it supports the model\n"
        ) in capsys.readouterr().out


def test_blocks_are_compiled_if_asked(tmp_path):
    directory = sentence("bert", tmp_path / "model")
    for compile in (False, True):
        made = PackedTeacher.load(directory, None, CPU, compile=compile)
        assert (made.trunk.model._before is not BertBlock.before) == compile


# ---- directories that it leaves to sentence-transformers ----


def static(out: Path) -> Path:
    words = StaticEmbedding(trained("bert").backend_tokenizer, embedding_dim=7)
    SentenceTransformer(modules=[words], device="cpu").save(str(out))
    return out


def renamed(out: Path) -> Path:
    """The settings of sentence-transformers under an older name."""
    sentence("xlm-r", out)
    (out / "sentence_bert_config.json").rename(out / "sentence_xlm-roberta_config.json")
    return out


def endless(out: Path) -> Path:
    """A tokenizer that ends texts in no token; mlembed would add one."""
    sentence("qwen3", out)
    edit(out / "tokenizer.json", post_processor=None)
    return out


def headed(out: Path) -> Path:
    sentence("bert", out)
    weights = load_file(out / "model.safetensors") | {"score.weight": torch.ones(1, 20)}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def wider(out: Path) -> Path:
    """A tokenizer with a token that the table has no row for."""
    sentence("bert", out)
    tokens = Tokenizer.from_file(str(out / "tokenizer.json"))
    tokens.add_tokens(["zzz"])
    tokens.save(str(out / "tokenizer.json"))
    return out


def contradictory(out: Path) -> Path:
    exported(out, pooling="mean")
    edit(out / "1_Pooling" / "config.json", pooling_mode="cls")
    return out


def elsewhere(out: Path) -> Path:
    """A folder of another name for the pooling, as nobody writes it."""
    sentence("bert", out)
    (out / "1_Pooling").rename(out / "pool")
    text = (out / "modules.json").read_text()
    (out / "modules.json").write_text(text.replace("1_Pooling", "pool"))
    return out


UNSUPPORTED = {
    "architecture": (
        lambda out: sentence("distilbert", out),
        "config.json: expected vocab_size, .* of a distilbert, got none of hidden_size",
    ),
    "static": (static, "its folder has no config.json"),
    "module": (
        lambda out: sentence("bert", out, after=[LayerNorm(20)]),
        "modules.json: expected Transformer, Pooling, at most one Dense and Normalize",
    ),
    "activation": (
        lambda out: sentence(
            "bert", out, "cls", [dense(20, 20, activation_function=torch.nn.GELU())]
        ),
        "2_Dense/config.json: expected a tanh layer",
    ),
    "order": (
        lambda out: sentence("bert", out, "cls", [Normalize(), dense(20, 20)]),
        "modules.json lists Transformer, Pooling, Normalize, Dense",
    ),
    "folder": (elsewhere, "modules.json lists Transformer, Pooling, Normalize"),
    "pooling": (
        lambda out: sentence("bert", out, "max"),
        "1_Pooling/config.json: expected one pooling",
    ),
    "two poolings": (contradictory, "mlembed_config.json says mean and 1_Pooling cls"),
    "old name": (renamed, "it has sentence_xlm-roberta_config.json"),
    "no EOS": (endless, "transformers tokenises '' differently"),
    "cut at the left": (
        lambda out: sentence("xlm-r", out, tokens={"truncation_side": "left"}),
        "transformers tokenises 'one two one two one ' differently",
    ),
    "more tokens": (wider, "its tokenizer has more than [0-9]+ tokens"),
    "a head": (headed, "mlembed's bert does not have the weight score.weight"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_others_are_encoded_by_sentence_transformers(name, tmp_path):
    make, reason = UNSUPPORTED[name]
    directory = make(tmp_path / "model")
    made = Teacher.load(str(directory), "", CPU)
    assert isinstance(made.model, SentenceTeacher)
    clause, why = made.model.encoder.split(", because ")
    assert clause == "encoded by sentence-transformers" and str(tmp_path) not in why
    assert re.search(reason, why), why
    texts = [text for text in TEXTS if text]
    want = by_sentence_transformers(directory, texts)
    np.testing.assert_allclose(made.encode(texts).numpy(), want, rtol=0, atol=1e-5)


def test_a_run_says_who_encodes(tmp_path, capsys):
    directory = sentence("distilbert", tmp_path / "model")
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"query": t, "positive": t * 2} for t in "abcd"])
    options = ("--distill.teacher", directory, "--distill.features", 1, "--distill.align", "pca")
    job = small_job(tmp_path, [data], *options, "--distill.keep")
    job.saver.close()
    assert len(job.teacher.kept) == 8  # It has encoded all texts to find their principal axes.
    assert (
        f"teach  {directory}: Transformer, Pooling (mean), width 20; encoded by "
        "sentence-transformers, because config.json: expected vocab_size"
    ) in capsys.readouterr().out


# ---- models that neither encodes ----


def test_another_pooling_than_the_directorys(tmp_path):
    directory = sentence("bert", tmp_path / "model")
    with pytest.raises(ValueError, match="^pooling: expected mean, as .*model says, got cls$"):
        Teacher.load(str(directory), "", CPU, "cls")
    directory = plain("qwen3", tmp_path / "plain")
    with pytest.raises(ValueError, match="^pooling: expected last, mean or cls of .*plain, got"):
        Teacher.load(str(directory), "", CPU, "pooler")


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "pooler.dense.bias"])
def test_missing_weights(name, tmp_path):
    """Transformers would draw random weights instead."""
    directory = plain("bert", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    del weights[name]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^teacher: .*model: .*expected .*none"):
        Teacher.load(str(directory), "", CPU, "pooler")


def test_weights_of_another_shape(tmp_path):
    directory = sentence("bert", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"] = torch.zeros(3)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^teacher: .*: expected shape \[20\], got \[3\]$"):
        Teacher.load(str(directory), "", CPU)


def test_weights_that_are_not_finite(tmp_path):
    directory = sentence("bert", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.safetensors: .*expected finite numbers"):
        Teacher.load(str(directory), "", CPU)


def test_damaged_settings(tmp_path):
    directory = sentence("bert", tmp_path / "model")
    for name in ("config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"):
        copy = shutil.copytree(directory, tmp_path / name.replace("/", "-"))
        (copy / name).write_text("{")
        with pytest.raises(ValueError, match=f"^teacher: .*{copy.name}.*") as caught:
            Teacher.load(str(copy), "", CPU)
        assert "\n" not in str(caught.value)
