"""Configurations of transformers for style transformers: which ones run, their sizes, and cuts.

A configuration is the text of a `config.json`, the field `architecture` of `config.Model`.
transformers is imported only to build a model.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ... import config
from ...runtime.files import field
from ...runtime.model_files import check_architecture, objects

# Encoders that see a whole text unless their configuration says otherwise.
BIDIRECTIONAL = (
    *("bert", "camembert", "electra", "ernie", "eurobert", "modernbert", "mpnet", "nomic_bert"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
)
# Encoders whose table of positions begins after the row of the padding token.
OFFSET = "camembert", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"
REQUIRED = "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"
# Scalings of rotary positions that depend on the longest text of a batch.
BATCH_DEPENDENT = "dynamic", "longrope"
# Names of the norm after the last layer.
NORMS = "norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f"
NAME = "model.architecture"


class OtherVectorsError(ValueError):
    """A trunk whose vectors are not those of transformers."""


def shape(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `config.Model` that a config.json determines.

    Raises:
        ValueError: an architecture that `check` rejects, a missing or mistyped size.
    """
    check(str(path), hf)
    if missing := [name for name in REQUIRED if hf.get(name) is None]:
        raise ValueError(
            f"{path}: expected {', '.join(REQUIRED)} of a {hf['model_type']}, got none of "
            f"{', '.join(missing)}"
        )
    sizes = {name: field(path, hf, name, int) for name in REQUIRED}
    width, heads, kind = sizes["hidden_size"], sizes["num_attention_heads"], hf["model_type"]
    offset = 1 + field(path, hf, "pad_token_id", int, 1) if kind in OFFSET else 0
    both_ways = kind in BIDIRECTIONAL or bool(hf.get("use_bidirectional_attention"))
    return {
        **sizes,
        "style": "transformers",
        "num_key_value_heads": field(path, hf, "num_key_value_heads", int, heads) or heads,
        "head_dim": field(path, hf, "head_dim", int, 0) or max(1, width // max(1, heads)),
        "intermediate_size": field(path, hf, "intermediate_size", int, 4 * width),
        "max_position_embeddings": field(path, hf, "max_position_embeddings", int, 512) - offset,
        "position_offset": offset,
        "causal": field(path, hf, "is_causal", bool, not both_ways),
        "architecture": json.dumps(hf),
    }


def check(place: str, hf: dict[str, Any]) -> None:
    """Check that a configuration names an encoder of text that packed attention can run.

    Raises:
        ValueError: it begins with `place`: an unknown architecture, code of the model's own,
            cross-attention, soft caps, rotary positions that depend on other texts of the batch.
    """
    check_architecture(place, hf)
    for key in ("is_encoder_decoder", "add_cross_attention"):
        if hf.get(key):
            raise ValueError(f"{place}: {key}: expected self-attention alone, got cross-attention")
    if hf.get("attn_logit_softcapping") is not None:
        got = hf["attn_logit_softcapping"]
        raise ValueError(
            f"{place}: attn_logit_softcapping: expected attention without a soft cap, got {got}"
        )
    for part in objects(hf):
        kind = part.get("rope_type", part.get("type"))
        if kind in BATCH_DEPENDENT:
            raise ValueError(
                f"{place}: rope_type: expected rotary positions that depend on a text alone, got "
                f"{kind!r}"
            )


def read(cfg: config.Model) -> dict[str, Any]:
    """Return the configuration of a shape, as deep as the shape.

    Raises:
        ValueError: not an object that `check` accepts, other sizes than the shape's.
    """
    try:
        hf = json.loads(cfg.architecture)
    except json.JSONDecodeError as error:
        raise ValueError(f"{NAME}: expected JSON, got {error}") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{NAME}: expected an object, got {type(hf).__name__}")
    check(NAME, hf)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if hf.get(name) != getattr(cfg, name):
            raise ValueError(
                f"model.{name}: expected {hf.get(name)!r:.80}, as in {NAME}, got "
                f"{getattr(cfg, name)}"
            )
    return hf


def cut(cfg: config.Model, layers: Sequence[int]) -> str:
    """Return the architecture of a shape with some of its layers, numbered from 1 on.

    Lists with an entry for each layer, like `layer_types`, are cut with the layers. An older
    configuration has a rule instead, from which transformers makes the list.
    """
    hf = read(cfg)
    types = getattr(_config(hf), "layer_types", None)
    if types:
        hf = hf | {"layer_types": list(types)}
    lists = {
        key: [value[layer - 1] for layer in layers]
        for key, value in hf.items()
        if "layer" in key and isinstance(value, list) and len(value) == cfg.num_hidden_layers
    }
    return json.dumps(hf | lists | {"num_hidden_layers": len(layers)})


# ---- models without weights ----


def _config(hf: dict[str, Any]) -> Any:
    """Return transformers' configuration. ValueError if transformers rejects it."""
    from transformers import CONFIG_MAPPING

    try:
        # Configurations change the values that they are given.
        return CONFIG_MAPPING[hf["model_type"]].from_dict(deepcopy(hf))
    # Configurations raise errors of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{NAME}: rejected by transformers: {reason:.300}") from None


def build(cfg: config.Model, attention: str = "mlembed") -> Any:
    """Return transformers' model of a shape without weights: parameters are on the meta device.

    Dropout is `cfg.dropout`, and 0 of attention's probabilities. Buffers, like the frequencies of
    rotary positions, have their values.

    Args:
        attention: a name in transformers' registry of attention functions.

    Raises:
        ValueError: an architecture that does not use the registry, or has no dropout to set.
    """
    import torch
    from transformers import AutoModel

    from ..attention_interface import register

    register()
    hf_config = _config(read(cfg))
    kind, dropouts = hf_config.model_type, 0
    for key, value in hf_config.to_dict().items():
        if "drop" in key and isinstance(value, float | int):
            setattr(hf_config, key, 0.0 if "att" in key else cfg.dropout)
            dropouts += "att" not in key
    if cfg.dropout and not dropouts:
        raise ValueError(f"model.dropout: expected 0, as {kind} has none, got {cfg.dropout}")
    with torch.device("meta"):
        model: Any = AutoModel.from_config(
            hf_config, attn_implementation=attention, dtype=torch.float32
        )
    if not model._supports_attention_backend:
        raise ValueError(
            f"{NAME}: expected an architecture that takes its attention from transformers' "
            f"registry, got {kind}"
        )
    _compute_buffers(model)
    return model


def _compute_buffers(model: Any) -> None:
    """Give a model on the meta device its buffers, like transformers before it loads weights.

    Raises:
        ValueError: transformers does not compute one.
    """
    import torch

    with torch.device("cpu"), torch.no_grad():
        for place, module in model.named_modules():
            if not any(buffer is not None for buffer in module._buffers.values()):
                continue
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    unset = torch.nan if buffer.is_floating_point() else 0
                    module._buffers[name] = torch.full_like(buffer, unset, device="cpu")
            model._init_weights(module)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and buffer.isnan().any():
                    raise ValueError(f"{NAME}: transformers leaves {place}.{name} without a value")


@dataclass(frozen=True)
class Places:
    """Names of a model's modules: the table of tokens, the list of layers, the norm after them."""

    table: str
    layers: str
    norm: str | None

    @staticmethod
    def of(model: Any, depth: int) -> "Places":
        """Find the modules of a model of `depth` layers.

        Raises:
            ValueError: not exactly one list of `depth` layers, or a table of another width.
        """
        from torch import nn

        kind = model.config.model_type
        lists = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        ]
        # A layer may hold lists of its own.
        lists = [name for name in lists if not any(name.startswith(f"{one}.") for one in lists)]
        if len(lists) != 1:
            got = ", ".join(lists) or "none"
            raise ValueError(f"{NAME}: expected one list of {depth} layers in {kind}, got {got}")
        table = model.get_input_embeddings()
        width = getattr(table, "embedding_dim", None)
        scaled = type(table) is nn.Embedding or hasattr(table, "embed_scale")
        if width != model.config.hidden_size or not scaled:
            raise ValueError(
                f"{NAME}: expected a table of tokens of width {model.config.hidden_size} in "
                f"{kind}, got {type(table).__name__} of width {width}"
            )
        beside = lists[0].rpartition(".")[0]
        norms = [f"{beside}.{norm}".removeprefix(".") for norm in NORMS]
        names = {module: name for name, module in model.named_modules()}
        here = names.values()
        return Places(names[table], lists[0], next((norm for norm in norms if norm in here), None))


@cache
def numbers(cfg: config.Model) -> tuple[tuple[int, ...], int, int]:
    """Return the numbers of parameters of each layer, and of all else but the vocabulary; and the
    weights of the last layer's matrices.
    """
    model = build(cfg)
    model.pooler = None
    places = Places.of(model, cfg.num_hidden_layers)
    layers = list(model.get_submodule(places.layers))
    counts = tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    matrices = sum(p.numel() for p in layers[-1].parameters() if p.ndim > 1)
    whole = sum(p.numel() for p in model.parameters()) - cfg.vocab_size * cfg.hidden_size
    widths = (cfg.hidden_size, *cfg.dense)
    dense = sum(before * after for before, after in pairwise(widths))
    return counts, whole - sum(counts) + dense, matrices
