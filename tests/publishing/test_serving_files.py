"""Exports read like text-embeddings-inference, vLLM and llama.cpp read them, by their sources.

No server runs here. The functions take only the files and keys that a server takes, and compute its
vectors with the trunk of transformers.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import KINDS, MAX_LENGTH, TEXTS, build, read_json
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from mlembed.publishing import export as exporting

DIMS = (5, 12, 24)
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


def write(kind: str, out: Path, dim: int, exit: int = 2):
    """Write an export of one kind, unchecked; return its encoder and our vectors of TEXTS."""
    encoder = build(kind)
    out.mkdir()
    exporting.write_model(out, encoder, dim, exit, 3)
    return encoder, encoder.encode(TEXTS, dim, exit, 3)


def states(out: Path, ids: list[list[int]]) -> list[Tensor]:
    """Return the last hidden states of each text, computed alone, fp32 [S, D]."""
    model = AutoModel.from_pretrained(out, local_files_only=True, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([one])).last_hidden_state[0] for one in ids]


def dense(out: Path, paths: list[str], vector: Tensor) -> Tensor:
    """Apply Dense modules in their order."""
    for path in paths:
        weights = load_file(out / path / "model.safetensors")
        vector = F.linear(vector, weights["linear.weight"], weights.get("linear.bias"))
        if read_json(out / path / "config.json")["activation_function"] == TANH:
            vector = vector.tanh()
    return vector


PICK = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "last": lambda x: x[-1]}


def assert_near(vectors: list[Tensor], ours: np.ndarray) -> None:
    unit = F.normalize(torch.stack(vectors), dim=-1).numpy()
    np.testing.assert_allclose(unit, ours, rtol=0, atol=1e-5)


# ---- text-embeddings-inference ----


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
    layers = []
    for module in read_json(out / "modules.json"):
        require(module, idx=int, name=str, path=str, type=str)
        package, _, kind = module["type"].rpartition(".")
        assert package == "sentence_transformers.models"
        assert kind in ("Transformer", "Pooling", "Dense", "Normalize")
        if kind == "Dense":
            layer = read_json(out / module["path"] / "config.json")
            require(layer, in_features=int, out_features=int, bias=bool)
            assert layer["activation_function"] in (TANH, IDENTITY)
            layers.append((load_file(out / module["path"] / "model.safetensors"), layer))
    return {"model": model, "pool": pool, "limit": limit["max_seq_length"], "dense": layers}


@pytest.mark.parametrize("kind", KINDS)
def test_text_embeddings_inference_can_read_it(kind, tmp_path):
    out = tmp_path / "out"
    encoder, ours = write(kind, out, 5)
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
    eos = router["model"]["eos_token_id"]
    assert {one[-1] for one in ids} == {eos} and max(map(len, ids)) == MAX_LENGTH
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        table = "embed_tokens" if cfg.style == "qwen3" else "embeddings.word_embeddings"
        assert weights.get_slice(f"{table}.weight").get_shape() == [cfg.vocab_size, 24]
    both_ways = cfg.style == "qwen3" and not cfg.causal
    assert router["model"].get("use_bidirectional_attention", False) == both_ways
    paths = [module["path"] for module in read_json(out / "modules.json")]
    paths = [path for path in paths if path.endswith("Dense")]
    assert_near([dense(out, paths, PICK[router["pool"]](x)) for x in states(out, ids)], ours)


# ---- vLLM ----

VLLM = {"Qwen3Model", "BertModel", "XLMRobertaModel"}  # *Model is converted to an embedding model


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_can_read_it(kind, dim, tmp_path):
    out = tmp_path / "out"
    encoder, _ = write(kind, out, dim)
    model, modules = read_json(out / "config.json"), read_json(out / "modules.json")
    (architecture,) = model["architectures"]
    assert architecture in VLLM
    # Qwen3 looks both ways if is_causal is false.
    assert model.get("is_causal", False) == encoder.model.cfg.causal
    # Both keys, or its limit is max_position_embeddings.
    limit = read_json(out / "sentence_bert_config.json")
    assert limit == {"max_seq_length": MAX_LENGTH, "do_lower_case": False}
    # The first value that is true names the pooling.
    (path,) = (m["path"] for m in modules if m["type"] == "sentence_transformers.models.Pooling")
    pooling = read_json(out / path / "config.json")
    first = next(key for key, value in pooling.items() if value is True)
    name = first.removeprefix("pooling_mode_").partition("_")[0].replace("lasttoken", "last")
    folders = [m["path"] for m in modules if m["type"] == "sentence_transformers.models.Dense"]
    reader = AutoTokenizer.from_pretrained(out, local_files_only=True)
    ids = reader(TEXTS, truncation=True, max_length=limit["max_seq_length"])["input_ids"]
    full = [dense(out, folders, PICK[name](x)) for x in states(out, ids)]
    # A request may name one of these widths, to which it cuts before it normalises.
    assert model["matryoshka_dimensions"] == [d for d in DIMS if d <= dim]
    for width in model["matryoshka_dimensions"]:
        assert_near([vector[:width] for vector in full], encoder.encode(TEXTS, width, 2, 3))


def test_other_widths_are_named(tmp_path):
    write("qwen3", tmp_path / "out", 7)
    assert read_json(tmp_path / "out" / "config.json")["matryoshka_dimensions"] == [5, 7]


# ---- llama.cpp ----

# Architectures that its converter knows, and how the names of their weights begin, which it maps.
LLAMA_CPP = {
    "Qwen3Model": ("embed_tokens.", "layers.", "norm."),
    "BertModel": ("embeddings.", "encoder.layer.", "pooler.dense."),
    "XLMRobertaModel": ("embeddings.", "encoder.layer.", "pooler.dense."),
}


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("bert", "qwen3 both ways")]
)
def test_llama_cpp_can_convert_it(kind, tmp_path):
    """llama.cpp has no Dense modules, so the client cuts, and no pooler; its Qwen3 is causal."""
    out = tmp_path / "out"
    encoder, _ = write(kind, out, 24)
    model, modules = read_json(out / "config.json"), read_json(out / "modules.json")
    (architecture,) = model["architectures"]
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        assert all(name.startswith(LLAMA_CPP[architecture]) for name in weights.keys())
    assert not any(module["type"].endswith(".Dense") for module in modules)
    (path,) = (m["path"] for m in modules if m["type"] == "sentence_transformers.models.Pooling")
    pooling = read_json(out / path / "config.json")
    names = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
    name = next(ours for key, ours in names.items() if pooling[f"pooling_mode_{key}"])
    assert model["is_causal"] if architecture == "Qwen3Model" else "is_causal" not in model
    reader = Tokenizer.from_file(str(out / "tokenizer.json"))
    # It does not read the limit.
    texts = [text for text in TEXTS if len(reader.encode(text).ids) <= MAX_LENGTH]
    full = [PICK[name](x) for x in states(out, [reader.encode(text).ids for text in texts])]
    for width in DIMS:
        assert_near([vector[:width] for vector in full], encoder.encode(texts, width, 2, 3))
