"""Tuning keeps how a model serves: `train.py RECIPE --init DIR`, its checkpoints and its model."""

import json
import shutil
from dataclasses import replace

import numpy as np
import processes
import pytest
from factories import small_text, tiny_encoder, write_encoder
from sentence_transformers import SentenceTransformer

from mlembed import config
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, serving
from mlembed.modeling.serving import Serving
from mlembed.publishing.export import export
from mlembed.training import setup

PROMPTS = {"query": "ask: ", "document": "", "title": "title: "}
# Longer than the source serves, or than it is trained on.
TEXTS = ["WEDNESDAY, May 4, 2050", "", "one two three " * 3, "one two three " * 9]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A foreign directory: cls, 16 of 32 numbers, not normalised, 24 tokens, prompts."""
    out = tmp_path_factory.mktemp("tuning") / "source"
    encoder = replace(
        tiny_encoder(pooling="cls", matryoshka_dims=(16, 32)),
        prompts=PROMPTS,
        default_prompt_name="title",
        normalize=False,
    )
    export(encoder, out, dim=16)
    (out / hf_config.NESTING).unlink()
    length = out / "sentence_bert_config.json"
    length.write_text(json.dumps(json.loads(length.read_text()) | {"do_lower_case": True}))
    return out


@pytest.fixture(scope="module")
def tuned(source):
    """The source after a step with texts of up to 8 tokens: the run's directory and its output."""
    home = source.parent
    args = ["tiny", "--init", source, "--optim.lr", 1e-4, "--steps", 1, "--batch-size", 2]
    args += ["--data", small_text(home)[0], "--eval", "--max-length", 8, "--tracker", "none"]
    done = processes.run("train.py", *args, "--output-dir", home, "--name", "run")
    assert done.returncode == 0, done.stderr[-2000:]
    return home / "run", done.stdout + done.stderr


def test_libraries_are_quiet(tuned):
    assert "Default prompt name" not in tuned[1]


def test_one_line_says_how_the_model_serves(source, tuned):
    (line,) = [line for line in tuned[1].splitlines() if line.startswith("serve ")]
    assert line == (
        "serve  texts of up to 24 tokens, prompts query, title, vectors of width 16, pooled by "
        f"cls, like {source}; trained on texts of up to 8 tokens, without prompts"
    )


@pytest.mark.parametrize("place", ["", "checkpoints/step_00000001"])
def test_every_command_serves_it_like_the_source(source, tuned, place):
    encoder = Encoder.load(str(tuned[0] / place), "cpu")
    before = Encoder.load(str(source), "cpu")
    assert serving.of(encoder) == serving.of(before)
    assert encoder.max_length == 24 and encoder.encode(TEXTS).shape == (4, 16)
    assert encoder.model.cfg.pooling == "cls"


def test_libraries_serve_it_like_the_source(source, tuned):
    before, after = (
        SentenceTransformer(str(at), device="cpu") for at in (source, tuned[0] / "model")
    )
    assert after.max_seq_length == before.max_seq_length == 24
    assert (after.prompts, after.default_prompt_name) == (before.prompts, "title")
    assert [type(module) for module in after] == [type(module) for module in before]
    assert after[1].get_config_dict() == before[1].get_config_dict()
    ours = Encoder.load(str(tuned[0]), "cpu")
    for options in ({}, *({"prompt_name": name} for name in PROMPTS)):
        vectors = after.encode(TEXTS, **options)
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > 1e-3
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(ours.encode(TEXTS, **options), unit, rtol=0, atol=1e-5)
        # Tuning changed the model but little, so that another serving would differ by more.
        assert np.abs(vectors - before.encode(TEXTS, **options)).max() < 0.1
    lower = [text.lower() for text in TEXTS]
    np.testing.assert_allclose(after.encode(lower), after.encode(TEXTS), rtol=0, atol=1e-5)


def test_the_card_says_the_same(tuned):
    card = (tuned[0] / "model" / "README.md").read_text()
    assert "texts of up to 24 tokens" in card and '- `title`: `"title: "`' in card


def test_a_resumed_run_serves_like_its_checkpoint(source, tuned, tmp_path):
    run = config.load(tuned[0] / "config.json")
    step = tuned[0] / "checkpoints" / "step_00000001"
    gone = replace(run, init=str(tmp_path / "gone"))
    assert setup.serving_of(gone, step, run.model) == serving.of(Encoder.load(str(source), "cpu"))


# ---- what goes before the settings of the source ----


@pytest.fixture
def run(source):
    return config.Run(init=str(source), model=Encoder.load(str(source), "cpu").model.cfg)


def said(run, model=None):
    model = model or run.model
    return setup.describe_serving(run, setup.serving_of(run, None, model), model)


def test_longer_training_serves_longer_texts(run):
    longer = replace(run, max_length=32)
    assert setup.serving_of(longer, None, run.model).max_length == 32
    assert "texts of up to 32 tokens (not 24, as training has longer ones)" in said(longer)
    assert setup.serving_of(replace(run, max_length=23), None, run.model).max_length == 24


def test_prompts_of_the_data_go_first(run):
    mixture = (config.Source(path="a.jsonl", prompt="find: "),)
    prompted = replace(run, data=(), sources=mixture)
    served = setup.serving_of(prompted, None, run.model)
    assert served.prompts == {**PROMPTS, "query": "find: ", "a": "find: "}
    assert served.default_prompt_name == "title"
    assert "prompts of the training data (query, title, a)" in said(prompted)
    assert "without prompts" not in said(prompted) and "without prompts" in said(run)


def test_another_pooling_is_said(run):
    assert "pooled by mean (not cls, as model.pooling says)" in said(
        run, replace(run.model, pooling="mean")
    )


def test_a_plain_directory_does_not_say_how_it_is_pooled(run, source, tmp_path):
    plain = shutil.copytree(source, tmp_path / "plain")
    for name in ("modules.json", "1_Pooling/config.json"):
        (plain / name).unlink()
    assert "pooled by cls (nothing there says how; --model.pooling decides)" in said(
        replace(run, init=str(plain))
    )


def test_without_a_source_a_model_serves_what_it_was_trained_on():
    run = config.Run(max_length=48)
    assert setup.serving_of(run, None, run.model) == Serving(48, {"query": "", "document": ""})


def test_positions_bound_the_length(tmp_path):
    """A directory that promises more tokens than its model has positions."""
    out = write_encoder(tiny_encoder(max_position_embeddings=32), tmp_path / "model")
    content = json.dumps({"max_seq_length": 64})
    (out / "sentence_bert_config.json").write_text(content)
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            json.loads((out / "tokenizer_config.json").read_text()) | {"model_max_length": 99}
        )
    )
    assert Encoder.load(str(out), "cpu").max_length == 32
