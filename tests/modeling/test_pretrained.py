"""Directories: what mlembed writes it reads back to the bit; and what transformers writes."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

import mlembed.runtime.checkpoint
from mlembed import config
from mlembed.data.packing import pack
from mlembed.modeling import pretrained
from mlembed.modeling.hf_config import NESTING, from_checkpoint, resolve
from mlembed.modeling.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# As in test_model.py: prime vocabulary, heads x head_dim unlike the width, an odd theta.
CFG = config.Model(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=37,
    rope_theta=700.0,
    max_position_embeddings=64,
    exits=(1, 3),
    matryoshka_dims=(5, 12, 24),
)
NESTED = replace(CFG, ranks=(3, 11), causal=False, pooling="mean")
IDS = [np.arange(n) * 7 % 101 for n in (1, 5, 23)]
ALL_EXITS = (1, 2, 3)


def hf_config(**changes) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=37,
        max_position_embeddings=64,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, **changes},
    )


@torch.no_grad()
def hf_exits(hf: Qwen3Model) -> Tensor:
    """Last token of every layer, one text at a time -> [L, N, D]."""
    texts = []
    for ids in IDS:
        out = hf(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True)
        layers = [*(hf.norm(x) for x in out.hidden_states[1:-1]), out.last_hidden_state]
        texts.append(torch.stack([x[0, -1] for x in layers]))
    return torch.stack(texts, dim=1)


@torch.no_grad()
def our_exits(model: Transformer, rank: int | None = None) -> Tensor:
    return model(pack(IDS), exits=ALL_EXITS, rank=rank)


def edit(directory: Path, **changes) -> None:
    """Change keys of a config.json; None removes one."""
    path = directory / "config.json"
    stored = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    stored = {key: value for key, value in stored.items() if value is not None}
    path.write_text(json.dumps(stored), encoding="utf-8")


# ---- our own directories ----


@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_round_trip_is_exact(cfg, tmp_path):
    model = randomise(Transformer(cfg))
    pretrained.save(model, tmp_path)
    again = pretrained.load(str(tmp_path))
    assert again.cfg == cfg
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(after[name], weight), name
    # And a second trip writes the same bytes.
    (tmp_path / "b").mkdir()
    pretrained.save(again, tmp_path / "b")
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_weights_are_copies_and_none_are_drawn(tmp_path):
    model = randomise(Transformer(NESTED))
    pretrained.save(model, tmp_path)
    before = torch.get_rng_state()
    again = pretrained.load(str(tmp_path))
    small = pretrained.cut(again, 1, 3)
    assert torch.equal(torch.get_rng_state(), before)  # random weights take longer than reading
    with torch.no_grad():
        for weight in small.parameters():
            assert weight.requires_grad and weight.is_contiguous()
            weight.zero_()
        for file in tmp_path.glob("*.safetensors"):  # mapped to memory while it is read
            file.write_bytes(bytes(file.stat().st_size))
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_weights_in_half_precision(tmp_path):
    model = randomise(Transformer(NESTED))
    pretrained.save(model, tmp_path)
    half = pretrained.load(str(tmp_path), dtype=torch.bfloat16).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(half[name], weight.bfloat16()), name


def test_what_computes_attention_is_not_saved(tmp_path):
    pretrained.save(Transformer(replace(CFG, attention="flash_attn")), tmp_path)
    assert "attention" not in json.loads((tmp_path / NESTING).read_text())["model"]
    assert pretrained.load(str(tmp_path)).cfg == CFG


def rewrite(path, weights):
    """Write weights that are mapped from the same file, which safetensors before 0.8 would cut."""
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


def test_factors_of_another_table_are_refused(tmp_path):
    """As when another library trained the merged table on and saved it in place."""
    pretrained.save(randomise(Transformer(NESTED)), tmp_path)
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


def test_a_float64_model_is_saved_in_fp32(tmp_path):
    model = randomise(Transformer(NESTED))
    pretrained.save(model.double(), tmp_path)
    again = pretrained.load(str(tmp_path)).state_dict()
    assert all(torch.equal(again[n], w.float()) for n, w in model.state_dict().items())


@pytest.mark.parametrize("cfg", [CFG, replace(NESTED, causal=True)], ids=["table", "factors"])
def test_transformers_reads_what_we_write(cfg, tmp_path):
    model = randomise(Transformer(replace(cfg, pooling="last")))
    pretrained.save(model, tmp_path)
    hf = AutoModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert isinstance(hf, Qwen3Model) and next(hf.parameters()).dtype == torch.float32
    torch.testing.assert_close(our_exits(model), hf_exits(hf), rtol=0, atol=1e-5)


def test_files_and_keys(tmp_path):
    model = randomise(Transformer(NESTED))
    pretrained.save(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "mlembed_config.json",
        "mlembed_factors.safetensors",
    }
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


def test_stored_factors_keep_their_order(tmp_path):
    # A new SVD of the merged table would give other factors at a lower rank: the learnt ones stay.
    model = randomise(Transformer(NESTED))
    pretrained.save(model, tmp_path)
    again = pretrained.load(str(tmp_path))
    for rank in (1, 3, 11):
        assert torch.equal(our_exits(again, rank), our_exits(model, rank))
    lower = pretrained.load(str(tmp_path), replace(NESTED, ranks=(3,)))
    assert torch.equal(our_exits(lower), our_exits(model, 3))
    # And a plain table can be asked for.
    plain = pretrained.load(str(tmp_path), replace(NESTED, ranks=()))
    torch.testing.assert_close(our_exits(plain), our_exits(model), rtol=0, atol=1e-5)


# ---- training checkpoints ----


def in_shards(model: Transformer, directory: Path, monkeypatch) -> Path:
    """A checkpoint of several files, with more in it than weights."""
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
def test_a_training_checkpoint_is_read_exactly(cfg, dtype, tmp_path, monkeypatch):
    model = randomise(Transformer(cfg)).to(dtype)
    path = in_shards(model, tmp_path, monkeypatch)
    assert len(list(path.glob("shard-*.safetensors"))) > 9
    assert not list(path.glob("model*.safetensors"))
    again = pretrained.load(str(path))
    assert again.cfg == cfg
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(after[name], weight.float()), name
    next(path.glob("shard-00001-model-00003-*")).unlink()
    refused(path, "expected")


def test_a_training_checkpoint_at_other_ranks(tmp_path, monkeypatch):
    path = in_shards(model := randomise(Transformer(NESTED)), tmp_path / "factors", monkeypatch)
    lower = pretrained.load(str(path), replace(NESTED, ranks=(3,)))
    assert torch.equal(our_exits(lower), our_exits(model, 3))
    plain = pretrained.load(str(path), replace(NESTED, ranks=()))
    torch.testing.assert_close(our_exits(plain), our_exits(model), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"embed_tokens.U: expected shape \[101, 20\]"):
        pretrained.load(str(path), replace(NESTED, ranks=(3, 20)))
    path = in_shards(model := randomise(Transformer(CFG)), tmp_path / "table", monkeypatch)
    factors = pretrained.load(str(path), replace(CFG, ranks=(3, 24)))
    torch.testing.assert_close(our_exits(factors), our_exits(model), rtol=0, atol=1e-4)


# ---- transformers' directories ----


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
    torch.testing.assert_close(our_exits(model), hf_exits(body), rtol=0, atol=1e-5)


def test_reads_a_bidirectional_checkpoint(tmp_path):
    hf = randomise(Qwen3Model(hf_config(is_causal=False)))
    hf.save_pretrained(tmp_path)
    model = pretrained.load(str(tmp_path))
    assert not model.cfg.causal
    torch.testing.assert_close(our_exits(model), hf_exits(hf), rtol=0, atol=1e-5)


def test_reads_bf16_as_fp32(tmp_path):
    hf = randomise(Qwen3Model(hf_config())).to(torch.bfloat16)
    hf.save_pretrained(tmp_path)
    weights = pretrained.load(str(tmp_path)).state_dict()
    for name, weight in hf.state_dict().items():
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], weight.float())


def test_reads_the_keys_of_transformers_4(tmp_path):
    # Version 4 wrote rope_theta at the top, rope_scaling null, and no rope_parameters.
    hf = randomise(Qwen3Model(hf_config()))
    hf.save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters=None, rope_theta=700)
    model = pretrained.load(str(tmp_path))
    assert model.cfg.rope_theta == 700.0
    torch.testing.assert_close(our_exits(model), hf_exits(hf), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [24, 11])
def test_a_plain_checkpoint_is_factorised_on_request(rank, tmp_path):
    hf = randomise(Qwen3Model(hf_config()))
    hf.save_pretrained(tmp_path)
    model = pretrained.load(str(tmp_path), replace(CFG, ranks=(3, rank)))
    U, s, Vh = torch.linalg.svd(hf.embed_tokens.weight.detach().double(), full_matrices=False)
    for r in (3, rank):
        best = (U[:, :r] * s[:r]) @ Vh[:r]
        with torch.no_grad():
            got = model.embed_tokens.table(r)
        torch.testing.assert_close(got.double(), best, rtol=0, atol=1e-5)
        hf.embed_tokens.weight.data = best.float()
        torch.testing.assert_close(our_exits(model, r), hf_exits(hf), rtol=0, atol=1e-4)


# ---- errors ----


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    randomise(Qwen3Model(hf_config())).save_pretrained(tmp_path)
    return tmp_path


def refused(directory: Path | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained.load(str(directory))


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "expected a directory or a hub id")
    refused("./nowhere", "expected a directory or a hub id")
    refused(tmp_path, "expected a checkpoint directory with config.json")


def test_another_architecture(tmp_path):
    qwen2 = Qwen2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    Qwen2Model(qwen2).save_pretrained(tmp_path)
    refused(tmp_path, "expected model_type 'qwen3', 'bert', .* got 'qwen2'")


def test_a_run_stands_for_its_finished_model(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    refused(tmp_path, "expected a finished run with model/")
    (tmp_path / "model").mkdir()
    pretrained.save(model := randomise(Transformer(NESTED)), tmp_path / "model")
    assert torch.equal(our_exits(pretrained.load(str(tmp_path))), our_exits(model))
    assert from_checkpoint(resolve(str(tmp_path)), config.Model()) == NESTED


@pytest.mark.parametrize(("mode", "pooling"), [("lasttoken", "last"), ("mean", "mean")])
def test_a_decoder_pools_as_its_sentence_transformers_modules_say(mode, pooling, checkpoint):
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    assert pretrained.load(str(checkpoint)).cfg.pooling == pooling
    types = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "LSTM")]
    (checkpoint / "modules.json").write_text(json.dumps([{"path": "", "type": t} for t in types]))
    refused(checkpoint, "expected Transformer, Pooling, at most one Dense and Normalize, .*LSTM")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},  # the key of older files
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"attention_bias": True},
    ],
    ids=["yarn_5", "yarn_4", "linear_old", "sliding", "bias"],
)
def test_variants_that_the_model_lacks(change, checkpoint):
    edit(checkpoint, **change)
    refused(checkpoint, "expected plain rotary positions, full attention and no attention bias")


@pytest.mark.parametrize(
    "change",
    [
        # transformers 4 wrote no layer_types: from layer 1 on, these windows are in force.
        {
            "layer_types": None,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        {"hidden_act": "gelu"},
    ],
    ids=["sliding_4", "activation"],
)
def test_variants_that_would_pass_unnoticed(change, checkpoint):
    edit(checkpoint, **change)
    refused(checkpoint, "expected")


def test_yarn_as_transformers_writes_it(tmp_path):
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 700.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    }
    Qwen3Model(hf_config(rope_parameters=yarn)).save_pretrained(tmp_path)
    refused(tmp_path, "rope_type 'yarn'")


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, "expected model.safetensors, found none")


def test_missing_surplus_and_misshapen_weights(checkpoint):
    path = checkpoint / "model.safetensors"
    whole = load_file(path)
    gate = "layers.1.mlp.gate_proj.weight"
    variants = [
        ({n: w for n, w in whole.items() if n != gate}, rf"{gate}: .* \[37, 24\], got none"),
        ({**whole, gate: whole[gate].T.contiguous()}, rf"{gate}: .* \[37, 24\], got \[24, 37\]"),
        ({**whole, "layers.1.bias": torch.zeros(3)}, r"layers.1.bias: expected shape none"),
        (
            {n: w for n, w in whole.items() if n != "embed_tokens.weight"},
            "expected embed_tokens.weight, found none",
        ),
    ]
    for weights, message in variants:
        rewrite(path, weights)
        refused(checkpoint, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 103}, r"embed_tokens.weight: expected shape \[103, 24\], got \[101, 24\]"),
        ({"num_hidden_layers": 4}, r"layers.3.\S+: expected shape \[.*\], got none"),
        ({"num_hidden_layers": 2}, r"layers.2.\S+: expected shape none, got"),
        ({"head_dim": 12}, r"layers.0.self_attn.\S+: expected shape"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(change, message, checkpoint):
    edit(checkpoint, **change)
    refused(checkpoint, message)


def test_stored_rank_too_small(tmp_path):
    pretrained.save(randomise(Transformer(NESTED)), tmp_path)
    with pytest.raises(ValueError, match=r"embed_tokens.U: expected shape \[101, 20\]"):
        pretrained.load(str(tmp_path), replace(NESTED, ranks=(3, 20)))


def test_config_that_is_no_json(checkpoint):
    (checkpoint / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError):
        pretrained.load(str(checkpoint))


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_never_read(checkpoint, tmp_path):
    sprung = tmp_path / "sprung"
    (checkpoint / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Trap(sprung)))
    refused(checkpoint, "expected model.safetensors, found none but model.bin, a pickle")
    # Under the right name it is still no safetensors file.
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(Exception, match="(?i)header"):
        pretrained.load(str(checkpoint))
    assert not sprung.exists()
    pickle.loads((checkpoint / "model.bin").read_bytes()).close()
    assert sprung.exists()  # the trap works
