"""Models from and to directories that Hugging Face libraries read. Safetensors only, no remote code.

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
NESTING = "mlembed_config.json"


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


def read_hf_config(directory: Path, cfg: config.Model) -> config.Model:
    """`cfg` with the shape of a Qwen3 checkpoint; exits and prefixes that are at their default
    rule are derived anew. ValueError for a directory that is not one, or another architecture."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.init: expected a checkpoint directory with config.json, got {directory}"
        )
    hf = json.loads(path.read_text(encoding="utf-8"))
    if hf.get("model_type") != "qwen3":
        raise ValueError(f"{path}: expected model_type 'qwen3', got {hf.get('model_type')!r}")
    rotary = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rotary
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    windowed = "sliding_attention" in (hf.get("layer_types") or [])
    if kind != "default" or windowed or hf.get("attention_bias"):
        raise ValueError(
            f"{path}: expected plain rotary positions, full attention and no attention bias, "
            f"got rope_type {kind!r}, layer_types {hf.get('layer_types')}, "
            f"attention_bias {hf.get('attention_bias')}"
        )
    shape = {
        name: hf[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "rms_norm_eps",
            "max_position_embeddings",
        )
    }
    plain = config.Model()
    defaults = config.Model(num_hidden_layers=cfg.num_hidden_layers, hidden_size=cfg.hidden_size)
    exits = () if cfg.exits == defaults.exits else cfg.exits
    dims = () if cfg.matryoshka_dims == defaults.matryoshka_dims else cfg.matryoshka_dims
    return replace(
        cfg,
        **shape,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope_theta=float(rotary.get("rope_theta") or hf.get("rope_theta") or plain.rope_theta),
        exits=exits,
        matryoshka_dims=dims,
    )


def resolve(source: str) -> Path:
    """A local directory as it is; otherwise a hub id, of which only safetensors and json are taken."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise ValueError(f"model: expected a directory or a hub id, got {source}, which is neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model: {source} is no local directory, and the hub did not give it: {reason}"
        ) from None


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint (single file or shards), without a leading `model.`, as stored."""
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
        cfg: nesting to give to a plain checkpoint (its shape fields are ignored). Without it, what
            the directory's `mlembed_config.json` says, or else the default rules and a plain table.

    Raises:
        ValueError: no such checkpoint, another architecture, missing or misshapen weights.
    """
    directory = resolve(source)
    nesting = directory / NESTING
    if cfg is None and nesting.is_file():
        stored = json.loads(nesting.read_text(encoding="utf-8"))
        cfg = config.from_dict(config.Model, stored["model"], str(nesting))
    else:
        cfg = read_hf_config(directory, cfg or config.Model())
    weights = read_weights(directory)
    table = weights.pop("embed_tokens.weight", None)
    weights.pop("lm_head.weight", None)
    if table is None:
        raise ValueError(f"{directory}: expected embed_tokens.weight, found none")
    if not cfg.ranks:
        weights["embed_tokens.weight"] = table
    elif (directory / FACTORS).is_file():
        with safe_open(directory / FACTORS, framework="pt") as tensors:
            for name in ("U", "W"):
                weights[f"embed_tokens.{name}"] = tensors.get_tensor(name)
    else:
        U, W = factorise(table.float(), cfg.ranks[-1])
        weights["embed_tokens.U"], weights["embed_tokens.W"] = U, W
    encoder = Transformer(cfg)
    own = encoder.state_dict()
    for name in own.keys() | weights.keys():
        got = list(weights[name].shape) if name in weights else "none"
        want = list(own[name].shape) if name in own else "none"
        if got != want:
            raise ValueError(f"{directory}: {name}: expected shape {want}, got {got}")
    encoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return encoder


def cut(encoder: Transformer, exit: int, rank: int | None) -> Transformer:
    """A copy that ends at layer `exit` with vocabulary rank `rank`: nesting makes both a slice."""
    cfg = encoder.cfg
    exits = (*(e for e in cfg.exits if e < exit), exit)
    config.check_rising("exit", exits, cfg.num_hidden_layers, "depth")
    ranks = cfg.ranks
    if rank is not None:
        if not ranks or not 1 <= rank <= ranks[-1]:
            stored = f"1..{ranks[-1]}" if ranks else "none (the vocabulary is a plain table)"
            raise ValueError(f"rank: expected {stored}, got {rank}")
        ranks = (*(r for r in ranks if r < rank), rank)
    small = Transformer(replace(cfg, num_hidden_layers=exit, exits=exits, ranks=ranks))
    weights = encoder.state_dict()
    if ranks:
        weights["embed_tokens.U"] = weights["embed_tokens.U"][:, : ranks[-1]]
        weights["embed_tokens.W"] = weights["embed_tokens.W"][: ranks[-1]]
    small.load_state_dict({name: weights[name] for name in small.state_dict()})
    return small


def save(encoder: Transformer, directory: Path) -> None:
    """Write config.json, model.safetensors (table merged) and, beside them, what keeps the nesting."""
    cfg = encoder.cfg
    weights = {n: w.detach().float().cpu().contiguous() for n, w in encoder.state_dict().items()}
    if cfg.ranks:
        factors = {n: weights.pop(f"embed_tokens.{n}") for n in ("U", "W")}
        weights["embed_tokens.weight"] = factors["U"] @ factors["W"]
        save_file(factors, directory / FACTORS, metadata={"format": "pt"})
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    hf = json.dumps(hf_config(cfg), indent=2) + "\n"
    (directory / "config.json").write_text(hf, encoding="utf-8")
    nesting = {"model": config.to_dict(replace(cfg, init=""))}
    (directory / NESTING).write_text(json.dumps(nesting, indent=2) + "\n", encoding="utf-8")
