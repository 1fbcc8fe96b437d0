"""Shapes read from checkpoints on disk or on the hub, and written as Hugging Face's config.json."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import config
from ..config import Model
from ..config.choices import Pooling
from ..config.strict import from_dict
from ..runtime.files import field, read_object
from ..runtime.model_files import check_files
from . import sentence_files
from .automodel import architecture

# The nesting (exits, prefixes, ranks) in a model directory of ours.
NESTING = "mlembed_config.json"
# Values of model_type for style "bert".
BERTS = "bert", "roberta", "xlm-roberta"
# Names of sizes in Hugging Face's files that are ours, too.
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "max_position_embeddings"),
)
# Files to download from the hub: weights that run no code when read, configurations, vocabularies.
DOWNLOADS = ["*.json", "*.safetensors", "vocab.txt", "merges.txt", "*.model"]


# ---- reading ----


def resolve(source: str, key: str = "model") -> Path:
    """Return the model directory of a finished run, a local directory, or a downloaded hub id.

    Args:
        key: the option that the error names.

    Raises:
        ValueError: none of them, or a run that is not finished.
    """
    path = Path(source)
    if (path / "metrics.jsonl").is_file():
        if not (path / "model" / "config.json").is_file():
            raise ValueError(
                f"{path}: expected a finished run with model/, found none; "
                f"use one of its checkpoints, {path}/checkpoints/step_*"
            )
        path = path / "model"
    if path.is_dir():
        check_files(path)
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{key}: expected a directory or a hub id, got {source}, which is neither")
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(source, allow_patterns=DOWNLOADS))
    except Exception as error:  # The hub's client raises many kinds of exceptions.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{key}: {source}: not a local directory, and not available on the hub: {reason}"
        ) from None
    check_files(path)
    return path


def from_checkpoint(directory: Path, model: Model, style: str = "") -> Model:
    """Return `model` with its shape replaced by a checkpoint's.

    For a checkpoint of transformers: Qwen3, BERT, RoBERTa and XLM-R have styles of their own unless
    `style` is "transformers", the style of all others. Exits and prefixes stay if they end at its
    depth and width; a single one becomes that depth or width; otherwise they get their defaults.
    Ranks above the width go. Pooling is that of the directory's sentence-transformers modules
    (`sentence_files.read`), else `model`'s, but "mean" instead of "last" for models that see the
    whole text, and "last" instead of "pooler" for others.

    For a directory of mlembed: the saved shape, with `model`'s ranks if it had none. Attention's
    implementation and dropout are always `model`'s: weights do not depend on them.

    Raises:
        ValueError: no config.json, another architecture, or a variant of it that mlembed does not
            support.
    """
    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"init: expected a checkpoint directory with config.json, got {directory}")
    try:
        if (nesting := directory / NESTING).exists():
            path = nesting
            return _own_shape(path, model)
        return _shape(path, model, style)
    except ValueError as error:
        # The checks of `Model` name the field alone.
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {reason}" if f"{directory}/" not in reason else reason) from None


def _own_shape(path: Path, model: Model) -> Model:
    stored = read_object(path)
    if "model" not in stored:
        raise ValueError(f"{path}: expected an object with key 'model', got another value")
    saved = from_dict(Model, stored["model"], str(path))
    most = min(saved.hidden_size, saved.vocab_size)
    ranks = saved.ranks or tuple(rank for rank in model.ranks if rank <= most)
    return dataclasses.replace(saved, attention=model.attention, dropout=model.dropout, ranks=ranks)


def _shape(path: Path, model: Model, style: str) -> Model:
    hf, directory = read_object(path), path.parent
    kind = hf.get("model_type")
    if kind not in ("qwen3", *BERTS) or style == "transformers":
        shape = architecture.shape(path, hf)
    else:
        shape = _bert_shape(path, hf) if kind in BERTS else _qwen3_shape(path, hf)
    bert, causal = shape["style"] == "bert", shape["causal"]
    files = sentence_files.read(directory, shape["hidden_size"])
    if files.pooling == "pooler" and not bert:
        raise ValueError(f"{directory}: expected {kind} without a tanh Dense module, got one")
    if files.dense and shape["style"] != "transformers":
        raise ValueError(
            f"{files.dense[0]}/config.json: expected a tanh layer after cls pooling, or one that "
            "cuts vectors, got a linear layer, which needs --model.style transformers"
        )
    unfit = {"last"} if bert else {"pooler"} if causal else {"last", "pooler"}
    usual = "last" if causal else "mean"
    pooling: Any = files.pooling or (usual if model.pooling in unfit else model.pooling)
    most = min(shape["hidden_size"], shape["vocab_size"])
    return dataclasses.replace(
        model,
        **{"architecture": ""} | shape,
        dense=_dense(files),
        pooling=pooling,
        exits=_nested(model.exits, shape.get("num_hidden_layers", model.num_hidden_layers)),
        matryoshka_dims=_nested(model.matryoshka_dims, shape["hidden_size"]),
        ranks=tuple(rank for rank in model.ranks if rank <= most),
    )


def stored_pooling(directory: Path, cfg: Model) -> str | None:
    """Return the pooling that a directory's files name, None if they do not."""
    if (directory / NESTING).is_file():
        return cfg.pooling
    return sentence_files.read(directory, cfg.hidden_size).pooling


def with_pooling(
    directory: Path, pooling: Pooling | None, say: Callable[[str], object], key: str = "pooling"
) -> Model:
    """Return a directory's shape with the pooling that is asked for, if the directory names none.

    Args:
        say: gets a sentence that tells the pooling if nobody does.
        key: the option, for messages.

    Raises:
        ValueError: another pooling than the directory's; see `from_checkpoint`.
    """
    cfg = from_checkpoint(directory, Model())
    stored = stored_pooling(directory, cfg)
    if pooling is None:
        if stored is None:
            say(unsaid(directory, cfg, key))
        return cfg
    if stored not in (pooling, None):
        raise ValueError(f"{key}: expected {stored}, as {directory} says, got {pooling}")
    return dataclasses.replace(cfg, pooling=pooling)


def unsaid(directory: Path, cfg: Model, key: str) -> str:
    """Return the sentence that tells the pooling of a directory that does not."""
    return f"pooled by {cfg.pooling}: nothing in {directory} says how; --{key} decides"


def _dense(files: sentence_files.SentenceFiles) -> tuple[int, ...]:
    """Return the output widths of the linear layers after the pooling."""
    return tuple(read_object(folder / "config.json")["out_features"] for folder in files.dense)


def _nested(sizes: tuple[int, ...], last: int) -> tuple[int, ...]:
    """Return exits or prefixes that end at `last`; () stands for the defaults."""
    if sizes[-1] == last:
        return sizes
    return (last,) if len(sizes) == 1 else ()


def _qwen3_shape(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
    rotary = field(path, hf, "rope_parameters", dict, {})
    scaling = field(path, hf, "rope_scaling", dict, None) or rotary
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    # transformers 4 wrote three other keys instead of layer_types.
    layers = field(path, hf, "layer_types", list, [])
    first = field(path, hf, "max_window_layers", int, 28)
    depth = field(path, hf, "num_hidden_layers", int, 32)
    sliding = field(path, hf, "use_sliding_window", bool, False) and first < depth
    windows = "sliding_attention" in layers if layers else sliding
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: expected hidden_act 'silu', got {hf['hidden_act']!r:.80}")
    if kind != "default" or windows or hf.get("attention_bias"):
        raise ValueError(
            f"{path}: expected plain rotary positions, full attention and no attention bias, got "
            f"rope_type {kind!r:.80}, sliding windows {windows}, bias "
            f"{hf.get('attention_bias')!r:.80}: --model.style transformers trains such models"
        )
    theta = field(path, hf, "rope_theta", float, Model.rope_theta)
    return {
        **_sizes(
            path, hf, ("vocab_size", "hidden_size"), (*SIZES, "num_key_value_heads", "head_dim")
        ),
        "style": "qwen3",
        "rms_norm_eps": field(path, hf, "rms_norm_eps", float, Model.rms_norm_eps),
        "rope_theta": field(path, rotary, "rope_theta", float, theta),
        "causal": field(path, hf, "is_causal", bool, True),
    }


def _bert_shape(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """Read BERT's shape; RoBERTa's positions begin after its padding token's: 514 rows hold 512."""
    shape = _sizes(path, hf, SIZES)
    pad = field(path, hf, "pad_token_id", int, 1)
    offset = 0 if hf["model_type"] == "bert" else 1 + pad
    wanted = {
        "hidden_act": ("gelu", hf.get("hidden_act", "gelu")),
        "position_embedding_type": ("absolute", hf.get("position_embedding_type", "absolute")),
        "is_decoder": (False, bool(hf.get("is_decoder"))),
        "add_cross_attention": (False, bool(hf.get("add_cross_attention"))),
        "embedding_size": (hf["hidden_size"], hf.get("embedding_size", hf["hidden_size"])),
    }
    for name, (want, got) in wanted.items():
        if want != got:
            raise ValueError(f"{path}: {name}: expected {want!r}, got {got!r:.80}")
    heads = shape["num_attention_heads"]
    return {
        **shape,
        "style": "bert",
        "num_key_value_heads": heads,
        "head_dim": max(1, shape["hidden_size"] // max(1, heads)),
        "layer_norm_eps": field(path, hf, "layer_norm_eps", float, 1e-12),
        "max_position_embeddings": shape["max_position_embeddings"] - offset,
        "position_offset": offset,
        "type_vocab_size": field(path, hf, "type_vocab_size", int, 2),
        "causal": False,
    }


def _sizes(
    path: Path, hf: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, int]:
    if missing := [name for name in required if name not in hf]:
        raise ValueError(
            f"{path}: expected {', '.join(required)}, got none of {', '.join(missing)}"
        )
    names = [*required, *(name for name in optional if hf.get(name) is not None)]
    return {name: field(path, hf, name, int) for name in names}


# ---- writing ----


def hf_config(cfg: config.Model) -> dict[str, Any]:
    """Return the `config.json` of a shape as Qwen3, BERT or XLM-R, for transformers 4 and 5.

    XLM-R's positions begin after its padding token's, so `pad_token_id` tells where they begin; no
    text may hold that token. Transformers 5 reads Qwen3's rotary base from `rope_parameters`, 4
    from `rope_theta` with a silent default of 10,000, so both are written.
    """
    if cfg.style == "transformers":
        return json.loads(cfg.architecture) | {"use_cache": False, "dtype": "float32"}
    return _bert_config(cfg) if cfg.style == "bert" else _qwen3_config(cfg)


def _common_config(cfg: config.Model, architecture: str, kind: str) -> dict[str, Any]:
    """Return the fields of `config.json` that are the same for Qwen3 and BERT."""
    return {
        "architectures": [architecture],
        "model_type": kind,
        **{name: getattr(cfg, name) for name in SIZES},
        "use_cache": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _bert_config(cfg: config.Model) -> dict[str, Any]:
    kind = ("XLMRobertaModel", "xlm-roberta") if cfg.position_offset else ("BertModel", "bert")
    return _common_config(cfg, *kind) | {
        "hidden_act": "gelu",
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": cfg.position_offset + cfg.max_position_embeddings,
        "type_vocab_size": cfg.type_vocab_size,
        "layer_norm_eps": cfg.layer_norm_eps,
        "position_embedding_type": "absolute",
        "pad_token_id": max(0, cfg.position_offset - 1),
        "is_decoder": False,
        "add_cross_attention": False,
    }


def _qwen3_config(cfg: config.Model) -> dict[str, Any]:
    return _common_config(cfg, "Qwen3Model", "qwen3") | {
        "num_key_value_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
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
        "is_causal": cfg.causal,
    }
