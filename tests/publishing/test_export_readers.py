"""Exports in other versions and programs, and damage that the export's own check detects.

Other versions of sentence-transformers and transformers run in a Python of their own, which
`make test-readers` sets up. text-embeddings-inference is not run: the files are checked for what
its source requires.
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
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


# ---- text-embeddings-inference, by its source ----


def read_like_the_router(out: Path) -> dict:
    """Return what its router and candle backend read.

    KeyError for a missing key, TypeError for a type that they reject. They know no activations and
    module types but these.
    """

    def require(content: dict, **kinds: type) -> None:
        for key, kind in kinds.items():
            if type(content[key]) is not kind and not (kind is float and type(content[key]) is int):
                raise TypeError(f"{key}: expected {kind.__name__}, got {content[key]!r}")

    model = read_json(out / "config.json")
    require(model, architectures=list, model_type=str, max_position_embeddings=int)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    require(model, **dict.fromkeys((*sizes, "intermediate_size"), int), hidden_act=str)
    if model["model_type"] == "qwen3":
        require(model, attention_bias=bool, num_key_value_heads=int, rms_norm_eps=float)
        require(model, rope_theta=float, use_sliding_window=bool, eos_token_id=int)
        if not model["is_causal"]:
            require(model, use_bidirectional_attention=bool)
    else:
        require(model, hidden_dropout_prob=float, type_vocab_size=int, initializer_range=float)
        require(model, layer_norm_eps=float, pad_token_id=int)
    assert not model["architectures"][0].endswith(("Classification", "MaskedLM"))
    pooling = read_json(out / "1_Pooling" / "config.json")
    require(pooling, pooling_mode_cls_token=bool, pooling_mode_mean_tokens=bool)
    names = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    pool = next(ours for key, ours in names.items() if pooling.get(f"pooling_mode_{key}"))
    limit = read_json(out / "sentence_bert_config.json")
    require(limit, max_seq_length=int)
    prompts = read_json(out / "config_sentence_transformers.json")["prompts"]
    assert all(type(one) is str for pair in prompts.items() for one in pair)
    dense = []
    for module in read_json(out / "modules.json"):
        require(module, idx=int, name=str, path=str, type=str)
        package, _, kind = module["type"].rpartition(".")
        assert package == "sentence_transformers.models"
        assert kind in ("Transformer", "Pooling", "Dense", "Normalize")
        if kind == "Dense":
            layer = read_json(out / module["path"] / "config.json")
            require(layer, in_features=int, out_features=int, bias=bool)
            tanh, identity = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
            assert layer["activation_function"] in (tanh, identity)
            dense.append((load_file(out / module["path"] / "model.safetensors"), layer))
    return {"model": model, "pool": pool, "limit": limit["max_seq_length"], "dense": dense}


@pytest.mark.parametrize("kind", KINDS)
def test_text_embeddings_inference_can_read_it(kind, tmp_path):
    encoder, out = build(kind), tmp_path / "out"
    export(encoder, out, 5, 1, 3)
    router = read_like_the_router(out)
    cfg = encoder.model.cfg
    assert router["limit"] == MAX_LENGTH
    assert router["pool"] == {"pooler": "cls"}.get(cfg.pooling, cfg.pooling)
    assert len(router["dense"]) == (2 if cfg.pooling == "pooler" else 1)
    for weights, layer in router["dense"]:
        shape = [layer["out_features"], layer["in_features"]]
        assert list(weights["linear.weight"].shape) == shape
        assert ("linear.bias" in weights) == layer["bias"]
    assert router["dense"][-1][1]["out_features"] == 5
    # Its own tokenizer: padding off, cut at the limit; the last id stays EOS.
    reader = Tokenizer.from_file(str(out / "tokenizer.json"))
    reader.no_padding()
    reader.enable_truncation(router["limit"])
    ids = [reader.encode(text).ids for text in TEXTS]
    eos = router["model"].get("eos_token_id", ids[0][-1])
    assert {one[-1] for one in ids} == {eos} and max(map(len, ids)) == MAX_LENGTH
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        table = "embed_tokens" if cfg.style == "qwen3" else "embeddings.word_embeddings"
        assert weights.get_slice(f"{table}.weight").get_shape() == [cfg.vocab_size, 24]
    both_ways = cfg.style == "qwen3" and not cfg.causal
    assert router["model"].get("use_bidirectional_attention", False) == both_ways


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
