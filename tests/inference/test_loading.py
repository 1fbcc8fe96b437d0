"""Loading: directories, tokenizers, prompts, weights, devices."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import write_encoder

from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained
from mlembed.publishing.export import export
from tests.inference.test_encoder import CUTS, HOSTILE, MAX_LENGTH, TEXTS, assert_near, build, unit


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build()


@pytest.fixture(scope="module")
def directory(encoder, tmp_path_factory) -> Path:
    return write_encoder(encoder, tmp_path_factory.mktemp("model"))


# ---- directories ----


def test_load(encoder, directory):
    loaded = Encoder.from_pretrained(str(directory), "cpu")
    assert loaded.max_length == MAX_LENGTH and loaded.model.cfg == encoder.model.cfg
    assert not loaded.model.training
    texts = TEXTS + HOSTILE
    for cut in CUTS:
        np.testing.assert_array_equal(loaded.encode(texts, *cut), encoder.encode(texts, *cut))


def test_load_of_a_run(encoder, directory, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="expected a finished run with model/, found none"):
        Encoder.load(str(tmp_path), "cpu")
    (tmp_path / "model").symlink_to(directory)
    loaded = Encoder.load(str(tmp_path), "cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), encoder.encode(TEXTS))


def test_load_without_a_tokenizer(encoder, tmp_path):
    pretrained.save(encoder.model, tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer: expected .*tokenizer.json"):
        Encoder.load(str(tmp_path), "cpu")


# ---- prompts ----


@pytest.fixture(scope="module")
def prompted(encoder, tmp_path_factory) -> Path:
    """A directory with prompts in the form that sentence-transformers reads."""
    path = tmp_path_factory.mktemp("prompted") / "model"
    export(encoder, path)
    settings = json.loads((path / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "Instruct: find.\nQuery: ", "document": "text: ", "none": None}
    (path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return path


def test_prompts_of_sentence_transformers(prompted):
    from sentence_transformers import SentenceTransformer

    encoder = Encoder.load(str(prompted), "cpu")
    assert encoder.prompts["query"] == "Instruct: find.\nQuery: " and encoder.prompts["none"] == ""
    sentence = SentenceTransformer(str(prompted), device="cpu", local_files_only=True)
    plain = encoder.encode(TEXTS)
    pairs = [
        (encoder.encode_query(TEXTS), sentence.encode_query(TEXTS)),
        (encoder.encode_document(TEXTS), sentence.encode_document(TEXTS)),
        (encoder.encode(TEXTS, prompt="x y"), sentence.encode(TEXTS, prompt="x y")),
        (encoder.encode(TEXTS, prompt_name="none"), plain),
    ]
    for ours, theirs in pairs:
        assert_near(ours, theirs)
    for ours, _ in pairs[:3]:
        assert np.abs(ours - plain).max() > 0.01
    raw = encoder.encode_exits(TEXTS, [3], prompt="x y")[0].numpy()
    assert_near(unit(raw), pairs[2][0])
    named = encoder.encode_query(TEXTS, prompt_name="document")
    np.testing.assert_array_equal(named, encoder.encode_document(TEXTS))


def test_unknown_prompts(encoder):
    named = replace(encoder, prompts={"query": "q: ", "title": ""})
    with pytest.raises(ValueError, match="expected one of query, title, got 'querry'"):
        named.encode(TEXTS, prompt_name="querry")
    with pytest.raises(ValueError, match="prompt: expected prompt or prompt_name, got both"):
        named.encode(TEXTS, prompt_name="query", prompt="x")
    with pytest.raises(ValueError, match="expected one of none, as the model has no prompts"):
        encoder.encode(TEXTS, prompt_name="query")
    # Without prompts of their own, queries and documents are texts.
    np.testing.assert_array_equal(encoder.encode_query(TEXTS, 5), encoder.encode(TEXTS, 5))
    np.testing.assert_array_equal(named.encode_document(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize("prompts", [["a"], {"query": 3}])
def test_malformed_prompts(directory, tmp_path, prompts):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": prompts}))
    with pytest.raises(ValueError, match="prompts: expected texts by name"):
        Encoder.load(str(tmp_path), "cpu")


# ---- weights, devices, precisions ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_weights_give_fp32_vectors(encoder, directory, dtype):
    half = Encoder.load(str(directory), "cpu", dtype)
    assert {w.dtype for w in half.model.parameters()} == {getattr(torch, dtype)}
    for cut in CUTS:
        vectors = half.encode(TEXTS, *cut)
        assert vectors.dtype == np.float32
        assert_near(np.linalg.norm(vectors, axis=1), 1, 1e-6)
        assert (vectors * encoder.encode(TEXTS, *cut)).sum(1).min() > 0.99
    assert half.encode_exits(TEXTS).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpu",), "device: expected auto, cpu, cuda or cuda:0 .., got 'tpu'"),
        (("meta",), "device: expected auto"),
        (("cuda:99",), r"device: expected one of \d+ GPUs, got cuda:99"),
        (("cpu", "int8"), "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_unknown_devices_and_dtypes(directory, arguments, message):
    with pytest.raises(ValueError, match=message):
        Encoder.load(str(directory), *arguments)
    if arguments[0] != "cpu":
        with pytest.raises(ValueError, match=message):
            Encoder.load(str(directory), "cpu").on(["cpu", arguments[0]])
