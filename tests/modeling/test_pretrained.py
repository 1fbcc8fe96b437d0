"""Model directories: exact round trips, training checkpoints, and transformers' Qwen3."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import assert_same_model, odd_shape, random_model, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_truth import assert_equals_transformers
from transformers import AutoModel, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import mlembed.runtime.checkpoint
from mlembed import config
from mlembed.data.packing import pack
from mlembed.modeling import pretrained
from mlembed.modeling.hf_config import NESTING, from_checkpoint, resolve
from mlembed.modeling.hf_config import hf_config as write_config
from mlembed.modeling.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CFG = odd_shape(exits=(1, 3), matryoshka_dims=(5, 12, 24))
NESTED = replace(CFG, ranks=(3, 11), causal=False, pooling="mean")
IDS = [np.arange(n) * 7 % 101 for n in (1, 5, 23)]
ALL_EXITS = (1, 2, 3)


def hf_config(**changes) -> Qwen3Config:
    return Qwen3Config(**write_config(CFG) | {"use_cache": True} | changes)


@torch.no_grad()
def our_exits(model: Transformer, rank: int | None = None) -> Tensor:
    return model(pack(IDS), exits=ALL_EXITS, rank=rank)


def edit(directory: Path, **changes) -> None:
    """Change keys of a config.json; None removes a key."""
    path = directory / "config.json"
    stored = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    stored = {key: value for key, value in stored.items() if value is not None}
    path.write_text(json.dumps(stored), encoding="utf-8")


# ---- our own directories ----


@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_round_trip_is_exact(cfg, tmp_path):
    model = random_model(cfg)
    pretrained.save(model, tmp_path)
    again = pretrained.load(str(tmp_path))
    assert_same_model(again, model)
    assert again.dtype == torch.float32
    # Saving again writes the same bytes.
    (tmp_path / "b").mkdir()
    pretrained.save(again, tmp_path / "b")
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_loading_copies_and_draws_nothing(tmp_path):
    model = random_model(NESTED)
    pretrained.save(model, tmp_path)
    before = torch.get_rng_state()
    again = pretrained.load(str(tmp_path))
    small = pretrained.cut(again, 1, 3)
    # Drawing random weights would take longer than reading.
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for weight in small.parameters():
            assert weight.requires_grad and weight.is_contiguous()
            weight.zero_()
        for file in tmp_path.glob("*.safetensors"):  # reading maps it to memory
            file.write_bytes(bytes(file.stat().st_size))
    assert_same_model(again, model)


def test_dtypes(tmp_path):
    """Files hold fp32, from which another dtype is loaded."""
    model = random_model(NESTED).double()
    pretrained.save(model, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = pretrained.load(str(tmp_path), dtype=dtype).state_dict()
        assert all(torch.equal(again[n], w.to(dtype)) for n, w in model.state_dict().items())


def test_attention_is_not_saved(tmp_path):
    pretrained.save(Transformer(replace(CFG, attention="flash_attn")), tmp_path)
    assert "attention" not in json.loads((tmp_path / NESTING).read_text())["model"]
    assert pretrained.load(str(tmp_path)).cfg == CFG


def rewrite(path, weights):
    """Replace a file by weights that are mapped from it; safetensors before 0.8 would cut it."""
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


def test_factors_of_another_table(tmp_path):
    """Another library may train the merged table and save it in place."""
    pretrained.save(random_model(NESTED), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["embed_tokens.weight"] += 0.01
    rewrite(tmp_path / "model.safetensors", weights)
    with pytest.raises(ValueError, match="expected the factors .* remove that file"):
        pretrained.load(str(tmp_path))
    (tmp_path / pretrained.FACTORS).unlink()
    table = pretrained.load(str(tmp_path)).embed_tokens.table()
    rank = NESTED.ranks[-1]
    best = torch.linalg.svd(weights["embed_tokens.weight"].double()).S[rank:].norm()
    assert (table - weights["embed_tokens.weight"]).norm() <= 1.01 * best + 1e-5


@pytest.mark.parametrize("cfg", [CFG, replace(NESTED, causal=True)], ids=["table", "factors"])
def test_transformers_reads_what_we_write(cfg, tmp_path):
    model = random_model(replace(cfg, pooling="last"))
    pretrained.save(model, tmp_path)
    hf = AutoModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert isinstance(hf, Qwen3Model) and next(hf.parameters()).dtype == torch.float32
    assert_equals_transformers(model, hf)


def test_files_and_keys(tmp_path):
    model = random_model(NESTED)
    pretrained.save(model, tmp_path)
    names = {"config.json", "model.safetensors"}
    names |= {"mlembed_config.json", "mlembed_factors.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    # transformers 4 reads only the first, transformers 5 only the second.
    assert stored["rope_theta"] == 700.0
    assert stored["rope_parameters"] == {"rope_type": "default", "rope_theta": 700.0}
    assert stored["model_type"] == "qwen3" and stored["architectures"] == ["Qwen3Model"]
    assert stored["layer_types"] == ["full_attention"] * 3
    assert stored["is_causal"] is False and stored["head_dim"] == 10
    nesting = json.loads((tmp_path / "mlembed_config.json").read_text(encoding="utf-8"))["model"]
    assert nesting["ranks"] == [3, 11] and nesting["exits"] == [1, 3]
    assert nesting["pooling"] == "mean"
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}  # transformers refuses files without
        merged = tensors.get_tensor("embed_tokens.weight")
    factors = load_file(tmp_path / "mlembed_factors.safetensors")
    assert factors["U"].shape == (101, 11) and factors["W"].shape == (11, 24)
    torch.testing.assert_close(merged, factors["U"] @ factors["W"], rtol=1e-6, atol=1e-6)


# ---- training checkpoints ----


def in_shards(model: Transformer, directory: Path, monkeypatch) -> Path:
    """Write a checkpoint of several files, with more than weights."""
    monkeypatch.setattr(mlembed.runtime.checkpoint, "FILE", 1000)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = mlembed.runtime.checkpoint.training_tensors(model, optimizer, 0)
    with mlembed.runtime.checkpoint.Saver(directory, 0, 1, 1) as saver:
        saver.save(7, tensors, lambda path: pretrained.describe(model.cfg, path))
    return directory / "step_00000007"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_training_checkpoint_is_exact(cfg, dtype, tmp_path, monkeypatch):
    model = random_model(cfg).to(dtype)
    path = in_shards(model, tmp_path, monkeypatch)
    assert len(list(path.glob("shard-*.safetensors"))) > 9
    assert not list(path.glob("model*.safetensors"))
    again = pretrained.load(str(path))
    assert_same_model(again, model.float())
    assert again.dtype == torch.float32
    next(path.glob("shard-00001-model-00003-*")).unlink()
    raises(path, "expected")


def test_training_checkpoint_at_other_ranks(tmp_path, monkeypatch):
    path = in_shards(model := random_model(NESTED), tmp_path / "factors", monkeypatch)
    lower = pretrained.load(str(path), replace(NESTED, ranks=(3,)))
    assert torch.equal(our_exits(lower), our_exits(model, 3))
    plain = pretrained.load(str(path), replace(NESTED, ranks=()))
    torch.testing.assert_close(our_exits(plain), our_exits(model), rtol=0, atol=1e-5)
    pretrained.save(model, tmp_path / "factors")
    for where in (path, tmp_path / "factors"):
        with pytest.raises(ValueError, match=r"embed_tokens.U: expected shape \[101, 20\]"):
            pretrained.load(str(where), replace(NESTED, ranks=(3, 20)))
    path = in_shards(model := random_model(CFG), tmp_path / "table", monkeypatch)
    factors = pretrained.load(str(path), replace(CFG, ranks=(3, 24)))
    torch.testing.assert_close(our_exits(factors), our_exits(model), rtol=0, atol=1e-4)


# ---- directories of transformers ----


@pytest.mark.parametrize("shards", [False, True], ids=["one_file", "sharded"])
@pytest.mark.parametrize("kind", [Qwen3Model, Qwen3ForCausalLM])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_reads_what_transformers_writes(kind, tied, shards, tmp_path):
    hf = randomise(kind(hf_config(tie_word_embeddings=tied)))
    hf.save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == shards
    model = pretrained.load(str(tmp_path))
    body = hf.model if kind is Qwen3ForCausalLM else hf
    assert model.cfg.rope_theta == 700.0 and model.cfg.ranks == () and model.cfg.causal
    assert model.cfg.exits == (1, 2, 3)  # the default rule: 1, 2, 4, .. and the last layer
    assert_equals_transformers(model, body)


# Version 4 wrote rope_theta at the top, rope_scaling null, and no rope_parameters.
VERSION_4 = {"rope_parameters": None, "rope_theta": 700}


@pytest.mark.parametrize("causal, changes", [(False, {}), (True, VERSION_4)])
def test_reads_other_keys_of_the_config(causal, changes, tmp_path):
    hf = randomise(Qwen3Model(hf_config(is_causal=causal)))
    hf.save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    model = pretrained.load(str(tmp_path))
    assert model.cfg.causal == causal and model.cfg.rope_theta == 700.0
    assert_equals_transformers(model, hf)


def test_reads_bf16_as_fp32(tmp_path):
    hf = randomise(Qwen3Model(hf_config())).to(torch.bfloat16)
    hf.save_pretrained(tmp_path)
    weights = pretrained.load(str(tmp_path)).state_dict()
    for name, weight in hf.state_dict().items():
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], weight.float())


# ---- errors ----


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    randomise(Qwen3Model(hf_config())).save_pretrained(tmp_path)
    return tmp_path


def raises(directory: Path | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained.load(str(directory))


def test_no_directory(tmp_path):
    raises(tmp_path / "nowhere", "expected a directory or a hub id")
    raises("./nowhere", "expected a directory or a hub id")
    raises(tmp_path, "expected a checkpoint directory with config.json")


def test_run_is_its_finished_model(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    raises(tmp_path, "expected a finished run with model/")
    (tmp_path / "model").mkdir()
    pretrained.save(model := random_model(NESTED), tmp_path / "model")
    assert torch.equal(our_exits(pretrained.load(str(tmp_path))), our_exits(model))
    assert from_checkpoint(resolve(str(tmp_path)), config.Model()) == NESTED


@pytest.mark.parametrize(("mode", "pooling"), [("lasttoken", "last"), ("mean", "mean")])
def test_pooling_of_sentence_transformers_modules(mode, pooling, checkpoint):
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    assert pretrained.load(str(checkpoint)).cfg.pooling == pooling
    types = [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "LayerNorm")
    ]
    (checkpoint / "modules.json").write_text(
        json.dumps([{"path": "1_Pooling", "type": t} for t in types])
    )
    raises(
        checkpoint, "expected Transformer, Pooling, at most one Dense and Normalize, .*LayerNorm"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},  # the key of older files
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        # transformers 4 wrote no layer_types: windows begin at layer 1.
        {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1},
        {"attention_bias": True},
    ],
    ids=["yarn_5", "yarn_4", "linear_old", "sliding", "sliding_4", "bias"],
)
def test_unsupported_variants(change, checkpoint):
    edit(checkpoint, **change)
    raises(checkpoint, "expected plain rotary positions, full attention and no attention bias")


def test_wrong_weights(checkpoint):
    path = checkpoint / "model.safetensors"
    whole = load_file(path)
    gate, table = "layers.1.mlp.gate_proj.weight", "embed_tokens.weight"
    turned = whole[gate].T.contiguous()
    for change, message in (
        ({gate: None}, rf"{gate}: .* \[37, 24\], got none"),
        ({gate: turned}, rf"{gate}: .* \[37, 24\], got \[24, 37\]"),
        ({"layers.1.bias": torch.zeros(3)}, r"layers.1.bias: expected shape none"),
        ({table: None}, "expected embed_tokens.weight, found none"),
    ):
        rewrite(path, {name: w for name, w in (whole | change).items() if w is not None})
        raises(checkpoint, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 103}, r"embed_tokens.weight: expected shape \[103, 24\], got \[101, 24\]"),
        ({"num_hidden_layers": 4}, "num_hidden_layers: expected at most 3, the layers in the"),
        ({"num_hidden_layers": 2}, r"layers.2.\S+: expected shape none, got"),
        ({"head_dim": 12}, r"layers.0.self_attn.\S+: expected shape"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
        ({"hidden_act": "gelu"}, "expected hidden_act 'silu', got 'gelu'"),
    ],
)
def test_config_of_other_weights(change, message, checkpoint):
    edit(checkpoint, **change)
    raises(checkpoint, message)


def test_malformed_config(checkpoint):
    (checkpoint / "config.json").write_text("{", encoding="utf-8")
    raises(checkpoint, r"config\.json:1: invalid JSON")


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_never_read(checkpoint, tmp_path):
    sprung = tmp_path / "sprung"
    (checkpoint / "model.safetensors").unlink()
    raises(checkpoint, "expected model.safetensors, found none$")
    for name in ("pytorch_model.bin", "model.pt", "model.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Trap(sprung)))
    raises(checkpoint, "expected model.safetensors, found none but model.bin, a pickle")
    # With the right name it is still not a safetensors file.
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(Exception, match="(?i)header"):
        pretrained.load(str(checkpoint))
    assert not sprung.exists()
    pickle.loads((checkpoint / "model.bin").read_bytes()).close()
    assert sprung.exists()  # the trap works
