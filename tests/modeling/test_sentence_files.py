"""Directories of sentence-transformers: each key is followed as the library does, or refused."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, sentence_files
from mlembed.publishing.export import export
from mlembed.runtime import model_files
from tests.factories import tiny_encoder

TEXTS = ["THE Quick Brown FOX", "wednesday, May 4", ""]
MEAN = {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}
SETTINGS, BERT = "config_sentence_transformers.json", "sentence_bert_config.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    encoder = tiny_encoder(matryoshka_dims=(8, 32))
    encoder.prompts = {"query": "query: ", "document": ""}
    out = tmp_path_factory.mktemp("sentence") / "model"
    export(encoder, out)
    return out


@pytest.fixture
def directory(exported, tmp_path):
    """Return a directory of sentence-transformers without files of ours."""
    for path in exported.rglob("*"):
        if path.is_file() and path.name != hf_config.NESTING:
            copy = tmp_path / path.relative_to(exported)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_as_the_library(directory):
    expected = SentenceTransformer(str(directory), device="cpu").encode(TEXTS)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    got = Encoder.load(str(directory), "cpu").encode(TEXTS)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-5)
    return got


@pytest.mark.parametrize(
    "file, changes",
    [
        (BERT, {"do_lower_case": True}),
        (BERT, {"max_seq_length": 3}),
        (BERT, {"unpad_inputs": False}),
        (SETTINGS, {"truncate_dim": 8}),
        (SETTINGS, {"default_prompt_name": "query"}),
        (SETTINGS, {"similarity_fn_name": "dot"}),
        ("1_Pooling/config.json", MEAN),
    ],
)
def test_each_key_is_followed(file, changes, directory):
    edit(directory / file, **changes)
    same_as_the_library(directory)


def test_keys_change_vectors(directory):
    """Each of the keys above that can change vectors does so, or the test above holds nothing."""
    before = same_as_the_library(directory)
    for changes in ({"do_lower_case": True}, {"max_seq_length": 3, "do_lower_case": False}):
        edit(directory / BERT, **changes)
        assert np.abs(same_as_the_library(directory) - before).max() > 1e-3
    edit(directory / SETTINGS, default_prompt_name="query")
    assert np.abs(same_as_the_library(directory) - before).max() > 1e-3


def test_width_of_an_export(exported, tmp_path):
    """An export of a smaller width has that width by default, here and there."""
    encoder = Encoder.load(str(exported), "cpu")
    export(encoder, tmp_path / "small", dim=8)
    small = same_as_the_library(tmp_path / "small")
    assert small.shape == (3, 8)
    again = Encoder.load(str(tmp_path / "small"), "cpu")
    assert again.encode(TEXTS, dim=32).shape == (3, 32)
    export(again, tmp_path / "again")
    np.testing.assert_allclose(same_as_the_library(tmp_path / "again"), small, atol=1e-6)


def test_export_says_the_same(directory, tmp_path_factory):
    edit(directory / SETTINGS, default_prompt_name="query", truncate_dim=8)
    edit(directory / BERT, do_lower_case=True)
    before = same_as_the_library(directory)
    out = tmp_path_factory.mktemp("again") / "model"
    export(Encoder.load(str(directory), "cpu"), out)
    np.testing.assert_allclose(same_as_the_library(out), before, atol=1e-6)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        (SETTINGS, {"surprise": 1}, "expected only .*, got surprise, not followed"),
        (SETTINGS, {"model_type": "SparseEncoder"}, "model_type: expected 'SentenceTransformer'"),
        (SETTINGS, {"similarity_fn_name": "euclidean"}, "similarity_fn_name: expected 'cosine'"),
        (SETTINGS, {"default_prompt_name": "passage"}, "default_prompt_name: expected one of the"),
        (SETTINGS, {"prompts": ["a"]}, "prompts: expected texts by name"),
        (SETTINGS, {"truncate_dim": 64}, "truncate_dim: expected 1 to 32, got 64"),
        (BERT, {"tokenizer_args": {"use_fast": False}}, "tokenizer_args: expected"),
        (BERT, {"query_length": 32}, "query_length: expected None, got 32"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt: expected True"),
        (
            "1_Pooling/config.json",
            {"word_embedding_dimension": 16},
            "word_embedding_dimension: exp",
        ),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "expected one pooling"),
    ],
)
def test_what_is_not_followed(file, changes, words, directory):
    edit(directory / file, **changes)
    with pytest.raises(ValueError, match=words):
        Encoder.load(str(directory), "cpu")


@pytest.mark.parametrize(
    "modules, words",
    [
        (
            [{"type": "payload.T", "path": ""}],
            "module 0: type: expected a module of sentence_transformers .* got 'payload.T'",
        ),
        (
            [{"type": "sentence_transformers.models.CNN", "path": ""}],
            "expected a module of sentence_transformers that only computes",
        ),
        ([{"type": "sentence_transformers.models.Normalize", "x": 1}], "expected only .*, got x"),
        ({"type": "x"}, "expected a list of modules"),
    ],
)
def test_modules_are_a_closed_list(modules, words, directory):
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=words):
        Encoder.load(str(directory), "cpu")


def test_keys_of_the_library(directory):
    """Every key that the installed library saves is in the tables."""
    SentenceTransformer(str(directory), device="cpu").save(str(directory / "saved"))
    for name, keys in (
        (SETTINGS, sentence_files.SETTINGS),
        (BERT, sentence_files.TRANSFORMER),
        ("1_Pooling/config.json", sentence_files.POOLING),
    ):
        assert json.loads((directory / "saved" / name).read_text()).keys() <= keys.keys()
    for module in json.loads((directory / "saved" / "modules.json").read_text()):
        assert module.keys() <= {*model_files.MODULE_KEYS}
    assert Encoder.load(str(directory / "saved"), "cpu").encode(TEXTS).shape == (3, 32)
