"""Models from and to directories that Hugging Face libraries read: safetensors, no remote code.

A directory holds `config.json` and `model.safetensors` as any Qwen3 model has them, the vocabulary
merged into one table, and beside these what keeps the nesting: `mlembed_config.json` (exits,
prefixes, ranks) and `mlembed_factors.safetensors` (U and W), which other libraries ignore.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import config
from .model import Transformer

FACTORS = "mlembed_factors.safetensors"


def hf_config(cfg: config.Model) -> dict[str, Any]:
    """The `config.json` of this shape as Qwen3, readable by transformers 4 and 5.

    transformers 5 reads `rope_parameters`, 4 reads `rope_theta` and would otherwise fall back to
    10,000 without a word, so both are written.
    """
    return {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_position_embeddings,
        "max_window_layers": cfg.num_hidden_layers,
        "layer_types": ["full_attention"] * cfg.num_hidden_layers,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "sliding_window": None,
        "use_sliding_window": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": False,
        "is_causal": cfg.causal,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint (one file or shards), names without a leading `model.`."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: expected model.safetensors, found none")
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                weights[name.removeprefix("model.")] = tensors.get_tensor(name)
    return weights


def factorise(table: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of [V, D] -> U diag(s) [V, R] and V^T [R, D], best directions first (ML-Embed).

    From the D x D Gram matrix in float64, as V is far larger than D: E^T E = Q s^2 Q^T gives
    W = Q_r^T and U = E Q_r.
    """
    _, basis = torch.linalg.eigh(table.double().T @ table.double())
    W = basis.flip(-1)[:, :rank].T
    return (table.double() @ W.T).float(), W.float().contiguous()


def load(source: str, cfg: config.Model | None = None) -> Transformer:
    """A Transformer from a directory that mlembed saved, or from any Qwen3 checkpoint.

    Args:
        source: directory or hub id.
        cfg: shape and nesting. By default what the directory's `mlembed_config.json` says, or else
            the checkpoint's shape with the default exits and prefixes and a plain vocabulary.

    Raises:
        ValueError: no such checkpoint, another architecture, missing or misshapen weights.
    """
    directory = config.resolve(source)
    cfg = cfg or config.from_checkpoint(directory, config.Model())
    weights = read_weights(directory)
    weights.pop("lm_head.weight", None)
    table = weights.pop("embed_tokens.weight", None)
    if table is None:
        raise ValueError(f"{directory}: expected embed_tokens.weight, found none")
    if not cfg.ranks:
        weights["embed_tokens.weight"] = table
    elif (directory / FACTORS).is_file():
        with safe_open(directory / FACTORS, framework="pt") as tensors:
            U, W = tensors.get_tensor("U"), tensors.get_tensor("W")
        # Another library may have trained the table on since; a sample of its rows tells.
        fits = (len(U), W.shape[1]) == table.shape
        some = slice(None, None, max(1, len(table) // 64))
        if not fits or not torch.allclose(U[some] @ W, table[some].float(), rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{directory}: expected the factors of {FACTORS} to give embed_tokens.weight, they "
                "do not: remove that file to factorise the table anew"
            )
        weights["embed_tokens.U"] = U[:, : cfg.ranks[-1]]
        weights["embed_tokens.W"] = W[: cfg.ranks[-1]]
    else:
        U, W = factorise(table, cfg.ranks[-1])
        weights["embed_tokens.U"], weights["embed_tokens.W"] = U, W
    model = Transformer(cfg)
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        got = list(weights[name].shape) if name in weights else "none"
        want = list(own[name].shape) if name in own else "none"
        if got != want:
            raise ValueError(f"{directory}: {name}: expected shape {want}, got {got}")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def cut(model: Transformer, exit: int, rank: int | None) -> Transformer:
    """A copy that ends at layer `exit` with vocabulary rank `rank`: nesting makes both a slice."""
    cfg = model.cfg
    cfg.check(exit=exit, rank=rank)
    exits = (*(e for e in cfg.exits if e < exit), exit)
    ranks = cfg.ranks if rank is None else (*(r for r in cfg.ranks if r < rank), rank)
    small = Transformer(replace(cfg, num_hidden_layers=exit, exits=exits, ranks=ranks))
    weights = model.state_dict()
    if ranks:
        weights["embed_tokens.U"] = weights["embed_tokens.U"][:, : ranks[-1]]
        weights["embed_tokens.W"] = weights["embed_tokens.W"][: ranks[-1]]
    small.load_state_dict({name: weights[name] for name in small.state_dict()})
    return small


def save(model: Transformer, directory: Path) -> None:
    """Write config.json, model.safetensors (table merged) and, beside them, the nesting."""
    cfg = model.cfg
    weights = {n: w.detach().float().cpu().contiguous() for n, w in model.state_dict().items()}
    if cfg.ranks:
        factors = {n: weights.pop(f"embed_tokens.{n}") for n in ("U", "W")}
        weights["embed_tokens.weight"] = factors["U"] @ factors["W"]
        save_file(factors, directory / FACTORS, metadata={"format": "pt"})
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    hf = json.dumps(hf_config(cfg), indent=2) + "\n"
    (directory / "config.json").write_text(hf, encoding="utf-8")
    # What computes attention is left out: a model trained by flash_attn also loads on a laptop.
    shape = {key: value for key, value in config.to_dict(cfg).items() if key != "attention"}
    nesting = {"model": shape}
    (directory / config.NESTING).write_text(json.dumps(nesting, indent=2) + "\n", encoding="utf-8")
