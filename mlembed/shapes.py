"""Shapes of models: of published ones by name, and of a checkpoint on disk or on the hub."""

import dataclasses
import json
from dataclasses import fields
from pathlib import Path

from .config import Model
from .strict import from_dict

NESTING = "mlembed_config.json"  # what a model directory of ours says of its nesting


def resolve(source: str) -> Path:
    """A local directory as it is; otherwise a hub id, of which only safetensors and json are taken.

    Raises:
        ValueError: neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"model: expected a directory or a hub id, got {source}, which is neither")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's client raises many kinds, all of them "not to be had"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"model: {source} is no local directory, and the hub did not give it: {reason}"
        ) from None


def from_checkpoint(directory: Path, model: Model) -> Model:
    """`model` with the shape of a Qwen3 checkpoint, exits and prefixes by their default rules and
    ranks as far as the width allows; for a directory that mlembed saved, exactly what was saved.
    What computes attention is always `model`'s: it belongs to a machine, not to weights.

    Raises:
        ValueError: no config.json, another architecture, or a variant that `model.py` has not.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"init: expected a checkpoint directory with config.json, got {directory}")
    if (nesting := directory / NESTING).is_file():
        stored = json.loads(nesting.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or "model" not in stored:
            raise ValueError(f"{nesting}: expected an object with key 'model', found none")
        saved = from_dict(Model, stored["model"], str(nesting))
        return dataclasses.replace(saved, attention=model.attention)
    hf = json.loads(path.read_text(encoding="utf-8"))
    if hf.get("model_type") != "qwen3":
        raise ValueError(f"{path}: expected model_type 'qwen3', got {hf.get('model_type')!r}")
    rotary = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rotary
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    layers = hf.get("layer_types")  # transformers 4 wrote none, but three keys that mean the same
    first = hf.get("max_window_layers", 28)
    sliding = hf.get("use_sliding_window") and first < hf.get("num_hidden_layers", 32)
    windows = "sliding_attention" in layers if layers else bool(sliding)
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: expected hidden_act 'silu', got {hf['hidden_act']!r}")
    if kind != "default" or windows or hf.get("attention_bias"):
        raise ValueError(
            f"{path}: expected plain rotary positions, full attention and no attention bias, got "
            f"rope_type {kind!r}, sliding windows {windows}, bias {hf.get('attention_bias')}"
        )
    same = [f.name for f in fields(Model) if f.name in hf and f.name != "rope_theta"]
    theta = rotary.get("rope_theta") or hf.get("rope_theta") or 10_000.0  # Qwen3's own default
    return dataclasses.replace(
        model,
        **{name: hf[name] for name in same},
        rope_theta=float(theta),
        causal=hf.get("is_causal", True),
        exits=(),
        matryoshka_dims=(),
        ranks=tuple(rank for rank in model.ranks if rank <= hf["hidden_size"]),
    )
