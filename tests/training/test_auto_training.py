"""`train.py elastic --init` of models of transformers: training, resuming, encoding, exports."""

import json
import shutil

import auto_models
import numpy as np
import processes
import pytest
from factories import loss_trace, small_text
from sentence_transformers import SentenceTransformer

from mlembed import config
from mlembed.inference.encoder import Encoder
from mlembed.training.arguments import parse

DENSE = {"modernbert": (), "embeddinggemma": (48, 32)}
TEXTS = ["Wednesday, May 4, 2050", "", "one two three " * 9]


def run(*args):
    done = processes.run(*args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", params=DENSE)
def trained(request, tmp_path_factory):
    """Return the source's directory, arguments of four steps, and the directory of their run."""
    home = tmp_path_factory.mktemp(request.param)
    source = auto_models.write(request.param, home / "source", DENSE[request.param])
    args = ["elastic", "--init", source, "--data", small_text(home)[0], "--eval"]
    args += ["--model.exits", 2, 4, "--model.last-layers", 1, "--model.ranks", 8, 16, "--steps", 4]
    args += ["--batch-size", 8, "--save-every", 2, "--tracker", "none", "--output-dir", home]
    args += ["--precision", "fp32", "--gradient-cache", "--activation-gib", 2e-5]
    args += ["--activation-checkpointing", "selective", "--name", "run", "--log-every", 1]
    assert f"teach  {source}: " in (out := run("train.py", *args))
    assert "encoded by mlembed in fp32 packs" in out
    return source, args, home / "run"


def test_a_resumed_run_repeats_its_steps(trained, tmp_path):
    _, args, whole = trained
    shutil.copytree(whole, tmp_path / "run")
    for gone in ("model", "checkpoints/step_00000004"):
        shutil.rmtree(tmp_path / "run" / gone)
    moved = "--output-dir", tmp_path, "--allow-changed", "output_dir"
    run("train.py", *args, *moved, "--resume")
    assert loss_trace(tmp_path / "run")[-2:] == loss_trace(whole)[2:]
    for name in ("model.safetensors", "mlembed_factors.safetensors"):
        resumed, before = ((folder / "model" / name) for folder in (tmp_path / "run", whole))
        assert resumed.read_bytes() == before.read_bytes()


def test_exports_are_of_the_same_architecture(trained, tmp_path):
    source, _, whole = trained
    ours = Encoder.load(str(whole), "cpu")
    assert ours.model.cfg.style == "transformers"
    run("-m", "mlembed", "export", whole, tmp_path / "out", "--dim", 8, "--exit", 2, "--rank", 8)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")
    )
    assert (after["model_type"], after["num_hidden_layers"]) == (before["model_type"], 2)
    assert after["architectures"] == before["architectures"]
    assert after["layer_types"] == [before["layer_types"][i] for i in (0, 3)]
    sentences = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    want = ours.encode(TEXTS, 8, 2, 8)
    np.testing.assert_allclose(sentences.encode(TEXTS), want, rtol=0, atol=1e-5)
    again = Encoder.load(str(tmp_path / "out"), "cpu")
    np.testing.assert_allclose(again.encode(TEXTS), want, rtol=0, atol=1e-5)
    line = run("-m", "mlembed", "encode", whole, TEXTS[0], "--dim", 8, "--exit", 2, "--rank", 8)
    np.testing.assert_allclose(np.array(line.split(), float), want[0], rtol=0, atol=1e-5)
    with ours.on(["cpu"]) as worker:
        np.testing.assert_allclose(worker.encode(TEXTS, 8, 2, 8), want, rtol=0, atol=1e-6)


def test_style_of_a_model_that_has_one_of_its_own(tmp_path):
    source = auto_models.write("qwen3", tmp_path / "source")
    made = parse(["elastic", "--init", str(source), "--data", small_text(tmp_path)[0]])
    assert made.model.style == "qwen3" and not made.model.architecture
    args = ["elastic", "--init", str(source), "--model.style", "transformers"]
    made = parse([*args, "--data", small_text(tmp_path)[0]])
    assert made.model.style == "transformers" and "Qwen3Model" in made.model.architecture
    with pytest.raises(ValueError, match="model.architecture: expected that of init"):
        parse(["tiny", "--model.style", "transformers"])
    with pytest.raises(ValueError, match="expected qwen3 or bert to prune, got transformers"):
        from mlembed.modeling.prune import pruned_config

        pruned_config(config.Model(**vars(made.model)), (1, 2), 16, 20)
