"""Prunes, merges and exports of a directory serve like it: opened by sentence-transformers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_encoder
from sentence_transformers import SentenceTransformer

from mlembed.cli import export, merge, prune
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.transformer import Transformer
from mlembed.publishing.export import export as publish

PROMPTS = {"query": "ask: ", "document": "", "title": "title: "}
TEXTS = ["Wednesday, May 4, 2050", "", "THE FOX", "один два три", "one two three " * 9]
SHAPE = {"pooling": "cls", "num_hidden_layers": 3, "matryoshka_dims": (8, 16, 32), "exits": (1, 3)}
SETTINGS, LENGTH = "config_sentence_transformers.json", "sentence_bert_config.json"


def write(out: Path, seed: int = 0, dim: int | None = None, foreign: bool = False, **shape) -> str:
    """Write a directory with prompts and a default one; a foreign one has none of our files."""
    encoder = tiny_encoder(seed=seed, **SHAPE | shape)
    publish(replace(encoder, prompts=PROMPTS, default_prompt_name="title"), out, dim)
    if foreign:
        (out / hf_config.NESTING).unlink()
    return str(out)


def tune(source: str, out: Path, amount: float = 0.01, **shape) -> str:
    """Write a model whose weights differ a little from those of another, with its own nesting."""
    before = Encoder.load(source, "cpu")
    model = Transformer(replace(before.model.cfg, **shape)).eval()
    if model.cfg.ranks:
        model = pretrained.load(source, model.cfg)
    else:
        model.load_state_dict(before.model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(amount * torch.randn(weight.shape, generator=generator))
    publish(replace(before, model=model), out)
    return str(out)


def library(directory: Path | str) -> SentenceTransformer:
    return SentenceTransformer(str(directory), device="cpu")


def close(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def serves(out: Path, width: int = 32) -> Encoder:
    """Return our encoder of a directory that sentence-transformers reads with equal vectors."""
    theirs, ours = library(out), Encoder.load(str(out), "cpu")
    assert theirs.max_seq_length == 24 and theirs.prompts == PROMPTS
    for options in ({}, *({"prompt_name": name} for name in PROMPTS), {"prompt": "x "}):
        vectors = theirs.encode(TEXTS, **options)
        assert vectors.shape == (len(TEXTS), width)
        close(ours.encode(TEXTS, **options), vectors)
    np.testing.assert_allclose(ours.encode_query(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(
        ours.encode_document(TEXTS), theirs.encode_document(TEXTS), atol=1e-5
    )
    assert np.abs(ours.encode(TEXTS) - ours.encode(TEXTS, prompt="")).max() > 1e-2
    return ours


def card(out: Path) -> str:
    """Return a model card, which names no place of this machine."""
    text = (out / "README.md").read_text()
    assert str(out.parent) not in text
    return text


# ---- prune ----


@pytest.mark.parametrize(
    ("dim", "options", "width"),
    [(None, {}, 32), (16, {}, 16), (16, {"width": 24}, 16), (16, {"width": 12}, 12)],
)
def test_a_pruned_directory_serves_like_its_source(dim, options, width, tmp_path, capsys):
    source, out = write(tmp_path / "source", dim=dim), tmp_path / "small"
    prune.main(source, out, layers=2, ffn=40, device="cpu", **options)
    small = serves(out, width)
    assert small.model.cfg.num_hidden_layers == 2 and small.model.cfg.pooling == "cls"
    assert small.model.cfg.hidden_size == options.get("width", 32)
    assert "sentence-transformers " in capsys.readouterr().out
    assert "layers 1 3 of 3" in card(out) and "texts of up to 24 tokens" in card(out)
    assert "prune source small --keep-layers 1 3 --width" in card(out)


# ---- merge ----


@pytest.mark.parametrize("method", ["soup", "slerp"])
@pytest.mark.parametrize("ranks", [(), (4, 16)], ids=["table", "factors"])
def test_a_base_merges_with_its_tune(method, ranks, tmp_path, capsys):
    """A base of other hands has no exits, widths and ranks; those of the tune stay."""
    base = write(tmp_path / "base", foreign=True)
    tuned = tune(base, tmp_path / "tune", exits=(2, 3), matryoshka_dims=(16, 32), ranks=ranks)
    capsys.readouterr()
    merge.main(tmp_path / "out", (base, tuned), method=method)
    assert capsys.readouterr().err == ""
    cfg = serves(tmp_path / "out").model.cfg
    assert (cfg.exits, cfg.matryoshka_dims, cfg.ranks) == ((2, 3), (16, 32), ranks)
    a, b, merged = (
        Encoder.load(path, "cpu").model for path in (base, tuned, str(tmp_path / "out"))
    )
    for name, weight in merged.named_parameters():
        if "embed_tokens" not in name and method == "soup":
            want = (a.get_parameter(name) + b.get_parameter(name)) / 2
            torch.testing.assert_close(weight, want, rtol=0, atol=1e-6)
    if method == "soup":
        want = (a.embed_tokens.table() + b.embed_tokens.table()) / 2
        X, S, Y = torch.linalg.svd(want.double(), full_matrices=False)
        most = cfg.ranks[-1] if ranks else 32
        best = X[:, :most] * S[:most] @ Y[:most]
        torch.testing.assert_close(merged.embed_tokens.table().double(), best, atol=1e-5, rtol=0)
    assert f"{method.capitalize()} of base (weight 0.5), tune (weight 0.5)." in card(
        tmp_path / "out"
    )


def test_order_and_number_of_bases_do_not_matter(tmp_path):
    base = write(tmp_path / "base", foreign=True)
    tuned = tune(base, tmp_path / "tune", exits=(2, 3), ranks=(4, 16))
    merge.main(tmp_path / "one", (base, base, tuned))
    merge.main(tmp_path / "other", (tuned, base, base))
    one, other = (Encoder.load(str(tmp_path / name), "cpu") for name in ("one", "other"))
    assert one.model.cfg == other.model.cfg and one.model.cfg.ranks == (4, 16)
    close(one.encode(TEXTS), other.encode(TEXTS))


def test_a_nested_vocabulary_merges_into_a_table(tmp_path):
    """The first model that mlembed wrote has a table, the second factors."""
    one = write(tmp_path / "one")
    two = tune(one, tmp_path / "two", ranks=(4, 16))
    merge.main(tmp_path / "out", (one, two), weights=(1, 3))
    a, b, merged = (Encoder.load(str(tmp_path / n), "cpu").model for n in ("one", "two", "out"))
    want = a.embed_tokens.table() / 4 + b.embed_tokens.table() * 3 / 4
    torch.testing.assert_close(merged.embed_tokens.table(), want, rtol=0, atol=1e-6)
    assert merged.cfg.ranks == ()


def test_what_the_others_have_is_said(tmp_path, capsys):
    one = write(tmp_path / "one", dim=16)
    two = tune(write(tmp_path / "base"), tmp_path / "two", exits=(1, 2, 3))
    settings = Path(two) / SETTINGS
    settings.write_text(settings.read_text().replace("ask: ", "find: "))
    merge.main(tmp_path / "out", (one, two))
    lines = capsys.readouterr().err.splitlines()
    serves(tmp_path / "out", 16)
    assert f"exits: (1, 3) of {one} stays, {two} has (1, 2, 3)" in lines
    assert f"width: 16 of {one} stays, {two} has None" in lines
    assert any(line.startswith("prompts: {'query': 'ask: '") for line in lines) and len(lines) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pooling": "mean"}, "got model.pooling cls and mean in .*one and .*two"),
        ({"intermediate_size": 40}, "model.intermediate_size 48 and 40 in .*one and .*two"),
        ({"num_hidden_layers": 2, "exits": (2,)}, "model.num_hidden_layers 3 and 2"),
    ],
)
@pytest.mark.parametrize("foreign", [False, True])
def test_models_that_do_not_merge(changes, reason, foreign, tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", foreign=foreign, **changes)
    with pytest.raises(ValueError, match=reason):
        merge.main(tmp_path / "out", (one, two))
    assert not (tmp_path / "out").exists()


# ---- export says the same ----


def test_every_key_of_the_source_comes_back(tmp_path):
    """A directory that sentence-transformers itself wrote, exported and saved by it again."""
    source = write(tmp_path / "first", foreign=True)
    before = SentenceTransformer(source, device="cpu", similarity_fn_name="dot")
    before.save(str(tmp_path / "source"))
    export.main(str(tmp_path / "source"), tmp_path / "out")
    library(tmp_path / "out").save(str(tmp_path / "again"))
    for name in (SETTINGS, LENGTH, "modules.json", "1_Pooling/config.json"):
        files = [tmp_path / place / name for place in ("source", "again")]
        assert json.loads(files[0].read_text()) == json.loads(files[1].read_text()), name


def test_a_directory_without_normalize_stays_so(tmp_path):
    source = Path(write(tmp_path / "source", foreign=True))
    modules = json.loads((source / "modules.json").read_text())
    (source / "modules.json").write_text(json.dumps(modules[:-1]))
    export.main(str(source), tmp_path / "out", format=("sentence-transformers", "onnx"))
    before, after = library(source), library(tmp_path / "out")
    np.testing.assert_allclose(after.encode(TEXTS), before.encode(TEXTS), rtol=1e-4, atol=1e-5)
    assert np.abs(np.linalg.norm(after.encode(TEXTS), axis=1) - 1).max() > 0.1
    # A dot product of such vectors is no cosine, so these are normalised.
    settings = json.loads((source / SETTINGS).read_text())
    (source / SETTINGS).write_text(json.dumps(settings | {"similarity_fn_name": "dot"}))
    assert Encoder.load(str(source), "cpu").normalize


def test_roles_without_a_prompt_have_no_default_prompt(tmp_path):
    source = Path(write(tmp_path / "source"))
    settings = json.loads((source / SETTINGS).read_text()) | {"prompts": {"title": "title: "}}
    (source / SETTINGS).write_text(json.dumps(settings))
    ours, theirs = Encoder.load(str(source), "cpu"), library(source)
    np.testing.assert_allclose(ours.encode_query(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(
        ours.encode_document(TEXTS), theirs.encode_document(TEXTS), atol=1e-5
    )
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)
