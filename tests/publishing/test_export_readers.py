"""Exports in other versions and programs, and damage that the export's own check detects.

Other versions of sentence-transformers and transformers run in a Python of their own, which
`make test-readers` sets up.
"""

import json
import os
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import CORNERS, KINDS, MAX_LENGTH, TEXTS, build, read_json
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.publishing import probes
from mlembed.publishing.export import export
from mlembed.publishing.probes import PROBES

READERS = [path for path in os.environ.get("MLEMBED_READERS", "").split(os.pathsep) if path]
PROMPTS = {"query": "Instruct: find\nQuery: "}
SCRIPT = Path(__file__).parents[1] / "readers" / "read.py"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return replace(build(), prompts={"query": "Query: "})


# ---- other versions ----


@cache
def version(python: str, package: str) -> tuple[int, ...]:
    """Return major and minor of a package's version in another Python."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split(".")[:2]))


@pytest.mark.skipif(not READERS, reason="other versions: make test-readers")
@pytest.mark.parametrize("python", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_other_versions_read_the_same(kind, python, tmp_path):
    if kind == "qwen3 both ways" and version(python, "transformers") < (5, 2):
        pytest.skip("transformers before 5.2 has no Qwen3 that looks both ways; the card says so")
    encoder = replace(build(kind), prompts=PROMPTS)
    outs = []
    for i, corner in enumerate(CORNERS):
        outs.append(tmp_path / f"corner_{i}")
        export(encoder, outs[-1], *corner)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, SCRIPT, tmp_path / "texts.json", tmp_path / "read.npz", *outs],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    versions = json.loads(done.stdout.splitlines()[-1])
    arrays = np.load(tmp_path / "read.npz")
    for i, (dim, exit, rank) in enumerate(CORNERS):
        ours = encoder.encode(TEXTS, dim, exit, rank)
        prompted = [[prompt + text for text in TEXTS] for prompt in ("", PROMPTS["query"])]
        # Readers before 5.4 strip the space around a text.
        if version(python, "sentence-transformers") < (5, 4):
            prompted = [[text.strip() for text in texts] for texts in prompted]
        worst = [
            np.abs(arrays[f"{name}_{i}"] - encoder.encode(texts, dim, exit, rank)).max()
            for name, texts in zip(("st", "query"), prompted, strict=True)
        ]
        print(f"{kind} {(dim, exit, rank)} {versions}: {worst[0]:.1e}, prompted {worst[1]:.1e}")
        assert max(worst) < 1e-5
        # transformers alone: a state for each token, pooled here.
        tokens = [len(t) for t in encoder.tokenizer.encode_batch(TEXTS)]
        tokens = [min(n, MAX_LENGTH) for n in tokens]
        states = torch.from_numpy(arrays[f"tf_{i}"]).split(tokens)
        pooling = encoder.model.cfg.pooling
        if pooling == "pooler":
            continue  # its dense layer is in sentence-transformers' module
        by_pooling = {"last": lambda x: x[-1], "cls": lambda x: x[0], "mean": lambda x: x.mean(0)}
        pick = by_pooling[pooling]
        alone = F.normalize(torch.stack([pick(x)[:dim] for x in states]), dim=-1).numpy()
        np.testing.assert_allclose(alone, ours, rtol=0, atol=1e-5)


# ---- damage that the check detects ----


OTHER = {"linear.weight": torch.eye(24)[1:6].contiguous()}
PROMPTS_OF = "config_sentence_transformers.json"
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}
DAMAGE = {  # file, and a change of its JSON or its weights
    "no EOS": ("tokenizer.json", lambda c: c.update(post_processor=None)),
    "rope": ("config.json", lambda c: c["rope_parameters"].update(rope_theta=701.0)),
    "a weight": ("model.safetensors", lambda w: w["norm.weight"][0].mul_(1.001)),
    "a layer too many": ("config.json", lambda c: c.update(TWO_LAYERS)),
    "other coordinates": ("2_Dense/model.safetensors", lambda w: w.update(OTHER)),
    "all coordinates": ("modules.json", lambda c: c.pop(2)),
    "not normalised": ("modules.json", lambda c: c.pop()),
    "mean pooling": ("1_Pooling/config.json", lambda c: c.update(MEAN)),
    "length": ("sentence_bert_config.json", lambda c: c.update(max_seq_length=MAX_LENGTH - 1)),
    "prompt": (PROMPTS_OF, lambda c: c["prompts"].update(query="q: ")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_detects(encoder, damage, tmp_path):
    export(encoder, tmp_path / "out", 5, 1, 3)
    assert probes.check(tmp_path / "out", encoder, 5, 1, 3).worst < 1e-5
    name, change = DAMAGE[damage]
    path = tmp_path / "out" / name
    content = load_file(path) if path.suffix == ".safetensors" else read_json(path)
    change(content)
    path.unlink()  # weights are mapped from it, and safetensors before 0.8 would cut the file
    if path.suffix == ".safetensors":
        save_file(content, path, metadata={"format": "pt"})
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="expected"), probes.quiet():
        probes.check(tmp_path / "out", encoder, 5, 1, 3)


def test_probes_have_many_lengths(encoder):
    lengths = [len(t) for t in tokenizer.tokenize(encoder.tokenizer, PROBES, 10_000)]
    assert min(lengths) == 1 and len(set(lengths)) >= 6
    assert len(set("".join(PROBES))) > 60  # letters, of several scripts


def test_plain_shares_fp32_weights(encoder):
    before = {name: weight.clone() for name, weight in encoder.model.state_dict().items()}
    plain = probes.plain(encoder.model)
    for name, weight in encoder.model.state_dict().items():
        assert plain.state_dict()[name].data_ptr() == weight.data_ptr(), name
    plain.double()  # like `noise`, which leaves the model as it was
    for name, weight in encoder.model.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, before[name]), name


def test_noise_is_the_error_of_fp32():
    def noise(encoder: Encoder) -> float:
        expected = encoder.encode(PROBES)
        size = encoder.model.cfg.num_hidden_layers
        return probes.noise(encoder, PROBES, expected, 24, size, 11)

    usual = noise(build())
    assert 0 < usual < 1e-5
    sharp = build(num_hidden_layers=8, exits=(8,))
    with torch.no_grad():
        for name, weight in sharp.model.named_parameters():
            if "q_norm" in name:
                weight.mul_(30)  # attention that is nearly a choice turns over with the last bit
    assert 10 * usual < noise(sharp) < 4e-3
    # An error that large is no noise: it would hide a wrong reader.
    assert probes.noise(sharp, PROBES, -sharp.encode(PROBES), 24, 8, 11) == 0.0
