"""Shapes of models: of published ones by name, and of a checkpoint on disk or on the hub."""

import dataclasses
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import config
from ..config import Model
from ..config.strict import from_dict
from ..runtime.files import read_json

NESTING = "mlembed_config.json"  # what a model directory of ours says of its nesting
BERTS = "bert", "roberta", "xlm-roberta"  # model_type of what style "bert" is
# What the hub is asked for: weights that run no code when read, and what tokenizers are made from.
TAKEN = ["*.json", "*.safetensors", "vocab.txt", "merges.txt", "*.model"]


# ---- of a checkpoint ----


def resolve(source: str) -> Path:
    """The model directory that `source` stands for: a run's finished model, a local directory as it
    is, or a hub id, of which only safetensors, json and vocabularies are taken.

    Raises:
        ValueError: none of them, or a run that is not finished.
    """
    path = Path(source)
    if (path / "metrics.jsonl").is_file():
        if not (path / "model" / "config.json").is_file():
            raise ValueError(
                f"{path}: expected a finished run with model/, found none; "
                f"a checkpoint {path}/checkpoints/step_* can be given instead"
            )
        return path / "model"
    if path.is_dir():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"model: expected a directory or a hub id, got {source}, which is neither")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=TAKEN))
    except Exception as error:  # the hub's client raises many kinds, all of them "not to be had"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"model: {source} is no local directory, and the hub did not give it: {reason}"
        ) from None


def from_checkpoint(directory: Path, model: Model) -> Model:
    """`model` with the shape of a Qwen3, BERT, RoBERTa or XLM-R checkpoint and ranks as far as the
    width allows; exits and prefixes as `model` has them, where it is as deep and wide or has but
    one, and else by their default rules. For a directory that mlembed saved, what was saved, and
    `model`'s ranks where that was a plain table. What computes attention and what is dropped in
    training are always `model`'s: they belong to a machine and to a run, not to weights.

    Pooling is what the directory's sentence-transformers modules say (`sentence_pooling`). Without
    them it is `model`'s, but for a BERT's "mean" where that is "last", a decoder's, and for a
    Qwen3's "last" where that is "pooler", which it has not.

    Raises:
        ValueError: no config.json, another architecture, or a variant that `model.py` or
            sentence-transformers' modules have and we have not.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"init: expected a checkpoint directory with config.json, got {directory}")
    if (nesting := directory / NESTING).is_file():
        stored = read_json(nesting)
        if not isinstance(stored, dict) or "model" not in stored:
            raise ValueError(f"{nesting}: expected an object with key 'model', found none")
        saved = from_dict(Model, stored["model"], str(nesting))
        most = min(saved.hidden_size, saved.vocab_size)
        ranks = saved.ranks or tuple(rank for rank in model.ranks if rank <= most)
        return dataclasses.replace(
            saved, attention=model.attention, dropout=model.dropout, ranks=ranks
        )
    hf = read_json(path)
    kind = hf.get("model_type")
    if kind not in ("qwen3", *BERTS):
        known = ", ".join(map(repr, ("qwen3", *BERTS)))
        raise ValueError(f"{path}: expected model_type {known}, got {kind!r}")
    shape = _bert_shape(path, hf) if kind in BERTS else _qwen3_shape(path, hf)
    said = sentence_pooling(directory, shape["hidden_size"])[0]
    if said == "pooler" and kind == "qwen3":
        raise ValueError(f"{directory}: expected no tanh Dense module behind a Qwen3, found one")
    unfit, usual = ("last", "mean") if kind in BERTS else ("pooler", "last")
    pooling: Any = said or (usual if model.pooling == unfit else model.pooling)
    most = min(shape["hidden_size"], shape["vocab_size"])
    return dataclasses.replace(
        model,
        **shape,
        pooling=pooling,
        exits=_nested(model.exits, shape.get("num_hidden_layers", model.num_hidden_layers)),
        matryoshka_dims=_nested(model.matryoshka_dims, shape["hidden_size"]),
        ranks=tuple(rank for rank in model.ranks if rank <= most),
    )


def _nested(given: tuple[int, ...], last: int) -> tuple[int, ...]:
    """Exits or prefixes of a shape that ends at `last`; none stand for the default ones."""
    if given[-1] == last:
        return given
    return (last,) if len(given) == 1 else ()


def _qwen3_shape(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
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
    return {
        **_required(path, hf, "vocab_size", "hidden_size"),
        **{name: hf[name] for name in same},
        "style": "qwen3",
        "rope_theta": float(theta),
        "causal": hf.get("is_causal", True),
    }


def _bert_shape(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """RoBERTa's positions begin behind its padding token's: a table of 514 rows has 512."""
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    shape = _required(path, hf, *sizes, "intermediate_size", "max_position_embeddings")
    pad = hf.get("pad_token_id")
    offset = 0 if hf["model_type"] == "bert" else 1 + (1 if pad is None else pad)
    wanted = {
        "hidden_act": ("gelu", hf.get("hidden_act", "gelu")),
        "position_embedding_type": ("absolute", hf.get("position_embedding_type", "absolute")),
        "is_decoder": (False, bool(hf.get("is_decoder"))),
        "add_cross_attention": (False, bool(hf.get("add_cross_attention"))),
        "embedding_size": (hf["hidden_size"], hf.get("embedding_size", hf["hidden_size"])),
    }
    for name, (want, got) in wanted.items():
        if want != got:
            raise ValueError(f"{path}: {name}: expected {want!r}, got {got!r}")
    heads = shape["num_attention_heads"]
    return {
        **shape,
        "style": "bert",
        "num_key_value_heads": heads,
        "head_dim": max(1, shape["hidden_size"] // max(1, heads)),
        "layer_norm_eps": hf.get("layer_norm_eps", 1e-12),
        "max_position_embeddings": shape["max_position_embeddings"] - offset,
        "position_offset": offset,
        "type_vocab_size": hf.get("type_vocab_size", 2),
        "causal": False,
    }


def sentence_pooling(directory: Path, width: int) -> tuple[str | None, Path | None]:
    """What the sentence-transformers modules in a directory, if any, do with a text's states: a
    pooling of ours or None, and the folder of a Dense module with the pooler's weights or None.

    [CLS] with a tanh Dense of width by width behind it, as LaBSE has it, is "pooler". Normalize
    adds nothing to vectors that are compared by their cosine.

    Raises:
        ValueError: another pooling, more than one, or other modules.
    """
    if not (directory / "1_Pooling" / "config.json").is_file():
        return None, None
    pooling = read_json(path := directory / "1_Pooling" / "config.json")
    modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    mode = pooling.get("pooling_mode") or "+".join(modes)
    ours = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
    named = mode.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
    if named not in ours:
        raise ValueError(f"{path}: expected one pooling, cls, mean or lasttoken, got {mode!r}")
    listed = read_json(directory / "modules.json") if (directory / "modules.json").is_file() else []
    names = [str(module.get("type", "")).rpartition(".")[2] for module in listed]
    dense = [directory / str(m["path"]) for m, n in zip(listed, names, strict=True) if n == "Dense"]
    odd = sorted(set(names) - {"Transformer", "Pooling", "Dense", "Normalize"})
    if odd or len(dense) > 1:
        raise ValueError(
            f"{directory}/modules.json: expected Transformer, Pooling, at most one Dense and "
            f"Normalize, got {', '.join(names)}"
        )
    if not dense:
        return ours[named], None
    layer = read_json(path := dense[0] / "config.json")
    activation = str(layer.get("activation_function", "Tanh")).rpartition(".")[2]
    fits = [layer.get("in_features"), layer.get("out_features")] == [width, width]
    if named != "cls" or activation != "Tanh" or not fits or not layer.get("bias", True):
        raise ValueError(
            f"{path}: expected a tanh layer of {width} x {width} with a bias behind cls pooling, "
            f"got {activation} of {layer.get('in_features')} x {layer.get('out_features')}, bias "
            f"{layer.get('bias', True)}, behind {named}"
        )
    return "pooler", dense[0]


def _required(path: Path, hf: dict[str, Any], *names: str) -> dict[str, Any]:
    if missing := [name for name in names if name not in hf]:
        raise ValueError(f"{path}: expected {', '.join(names)}, found no {', '.join(missing)}")
    return {name: hf[name] for name in names}


def hf_config(cfg: config.Model) -> dict[str, Any]:
    """The `config.json` of this shape as Qwen3, BERT or XLM-R, readable by transformers 4 and 5.

    XLM-R's positions are behind its padding token's, so `pad_token_id` says where they begin; no
    text may hold that token. Of Qwen3's rotary base transformers 5 reads `rope_parameters`; 4 reads
    `rope_theta` and would otherwise fall back to 10,000 without a word, so both are written.
    """
    return _bert_config(cfg) if cfg.style == "bert" else _qwen3_config(cfg)


def _bert_config(cfg: config.Model) -> dict[str, Any]:
    kind = ("XLMRobertaModel", "xlm-roberta") if cfg.position_offset else ("BertModel", "bert")
    return {
        "architectures": [kind[0]],
        "model_type": kind[1],
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "intermediate_size": cfg.intermediate_size,
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
        "use_cache": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _qwen3_config(cfg: config.Model) -> dict[str, Any]:
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
