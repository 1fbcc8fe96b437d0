"""Load and save models as directories for Hugging Face libraries: safetensors, no remote code.

A directory holds `config.json` and `model.safetensors` in the format of Qwen3, BERT, XLM-R or the
architecture that it began with, with the vocabulary merged into one table, and files that other
libraries ignore: `mlembed_config.json` (exits, prefixes, ranks), `mlembed_factors.safetensors` (U
and W), `mlembed_dense.safetensors` (linear layers after the pooling).
Training checkpoints (checkpoint.py) can be loaded, too: they hold shards with our own names and the
factors without a merged table.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import config
from ..config import strict
from ..runtime.files import SHARDS, read_object
from ..runtime.model_files import open_tensors, shapes
from . import sentence_files, weight_checks
from .automodel import architecture
from .automodel.choose import trunk_of
from .hf_config import NESTING, from_checkpoint, hf_config, resolve
from .transformer import Transformer
from .vocabulary import cached_factors

FACTORS, DENSE = "mlembed_factors.safetensors", "mlembed_dense.safetensors"
ADAPTERS = "mlembed_adapters.json"  # rank and alpha of a checkpoint's adapters
# Our modules and those of Hugging Face's BERT, XLM-R and RoBERTa, outside of and in layers.
OUTSIDE = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_places.positions": "embeddings.position_embeddings",
    "embed_places.segments": "embeddings.token_type_embeddings",
    "embed_places.norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
INSIDE = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
    "output_norm": "output.LayerNorm",
}
OURS = {theirs: ours for ours, theirs in (OUTSIDE | INSIDE).items()}
LORA = ".lora_"  # in the names of A and B: q_proj.lora_A.default.weight
# Prefixes of task heads, which are not part of the encoder.
HEADS = "cls.", "lm_head.", "classifier.", "qa_outputs."


def read_weights(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    own_names: Callable[[Iterable[str]], dict[str, str]] | None = None,
) -> dict[str, Tensor]:
    """Return an encoder's weights by our names, without task heads and buffers of positions.

    Reads one file, several, or a training checkpoint's shards.

    Args:
        dtype: dtype to which the weights will be cast.
        own_names: function from the files' names to ours, by name; `own_name` of each by default.

    Raises:
        ValueError: no weights, or only pickles, which run code when they are read; a weight of
            another dtype, or not finite (`weight_checks.check`).
    """
    if any(directory.glob(SHARDS)):
        # Importing torch.distributed takes a second.
        from ..runtime.checkpoint import read

        shards = read(directory, "model.")
        for name, tensor in shards.items():
            weight_checks.check(f"{directory}: {name}", tensor, dtype)
        weights = {name.removeprefix("model."): tensor for name, tensor in shards.items()}
        adapted = any(LORA in name for name in weights)
        return merged(weights, _scale(directory / ADAPTERS)) if adapted else weights
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        pickled = next((p.name for p in sorted(directory.glob("*.bin"))), None)
        why = f" but {pickled}, a pickle, which can run code: save it as safetensors first"
        raise ValueError(
            f"{directory}: expected model.safetensors, found none{why if pickled else ''}"
        )
    names = [name for file in files for name in shapes(file)]
    ours = own_names(names) if own_names else {n: own for n in names if (own := own_name(n))}
    weights = {}
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():
                if name in ours:
                    weights[ours[name]] = tensors.get_tensor(name)
                    weight_checks.check(f"{file}: {name}", weights[ours[name]], dtype)
    return weights


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return weights with adapters (training/lora.py) added to their matrices, by plain names.

    A matrix becomes W + scale B A in fp32; the other weights are not copies.
    """
    plain = {}
    for name, weight in weights.items():
        module, base, kind = name.partition(".base_layer.")
        if base and kind == "weight":
            A, B = (weights[f"{module}{LORA}{letter}.default.weight"].float() for letter in "AB")
            weight = weight.float() + scale * (B @ A)
        if LORA not in name:
            plain[f"{module}.{kind}" if base else name] = weight
    return plain


def _scale(path: Path) -> float:
    """Return alpha / rank of a checkpoint's adapters."""
    stored = read_object(path)
    for key in ("rank", "alpha"):
        strict.check_number(f"{path}: {key}", stored.get(key), least=1, most=2**20)
    return float(stored["alpha"] / stored["rank"])


def own_name(name: str) -> str | None:
    """Return our name for a weight of a Hugging Face file, None if the encoder does not include it.

    Unknown weights keep their names.
    """
    for prefix in ("model.", "bert.", "roberta."):
        name = name.removeprefix(prefix)
    if name.startswith(HEADS) or name.endswith("position_ids"):
        return None
    module, _, kind = name.rpartition(".")
    if module.endswith("LayerNorm"):  # Files converted from TensorFlow have its names.
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
    if module.startswith("encoder.layer."):
        layer, _, part = module.removeprefix("encoder.layer.").partition(".")
        return f"layers.{layer}.{OURS.get(part, part)}.{kind}"
    return f"{OURS.get(module, module)}.{kind}" if module else name


def hf_name(name: str, cfg: config.Model) -> str:
    """Return Hugging Face's name for a weight of ours."""
    if cfg.style == "qwen3":
        return name
    module, _, kind = name.rpartition(".")
    if module.startswith("layers."):
        _, layer, part = module.split(".", 2)
        return f"encoder.layer.{layer}.{INSIDE[part]}.{kind}"
    return f"{OUTSIDE[module]}.{kind}"


# ---- reading and writing directories ----


def load(
    source: str,
    cfg: config.Model | None = None,
    counts: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Load a model from a directory that mlembed saved, a training checkpoint included, or from a
    checkpoint of transformers or sentence-transformers. Of the latter, style transformers has to
    give the vectors of transformers for a probe.

    A tanh Dense module after [CLS] in the latter, like LaBSE's, replaces the encoder's own pooler
    (`sentence_files.read`). If `cfg` has ranks, a plain table is factorised once
    (`cached_factors`); saved factors stay as they are.

    Args:
        source: directory, finished run, or hub id.
        cfg: shape and nesting. By default those in the directory's `mlembed_config.json`, or else
            the checkpoint's shape with the default exits and prefixes and a plain vocabulary.
        counts: [V], how often each token occurs in the training text, to factorise a table.
        dtype: dtype of the weights; they are never all in memory in fp32 if it is narrower.

    Raises:
        ValueError: not a checkpoint, another architecture, missing or misshapen weights, pooling
            "pooler" without a pooler's weights, counts of another vocabulary.
    """
    directory = resolve(source)
    cfg = cfg or from_checkpoint(directory, config.Model())
    # Its modules tell the names of its weights.
    host: Any = None
    if cfg.style == "transformers":
        try:
            host = _empty(cfg)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
    weights = read_weights(directory, dtype, getattr(host, "own_names", None))
    if not any(directory.glob(SHARDS)):
        _choose_pooler(weights, directory, cfg)
        weights |= _dense_layers(directory, cfg)
    table = weights.pop("embed_tokens.weight", None)
    if table is None and "embed_tokens.U" not in weights:
        raise ValueError(f"{directory}: expected embed_tokens.weight, found none")
    if table is None:  # from a training checkpoint
        U, W = (weights.pop(f"embed_tokens.{name}") for name in "UW")
        if not cfg.ranks:
            weights["embed_tokens.weight"] = U.float() @ W.float()
    elif not cfg.ranks:
        weights["embed_tokens.weight"] = table
    elif (directory / FACTORS).exists():
        U, W = _saved_factors(directory, table)
    else:
        U, W = cached_factors(table, cfg.ranks[-1], counts)
    if cfg.ranks:
        weights["embed_tokens.U"] = U[:, : cfg.ranks[-1]]
        weights["embed_tokens.W"] = W[: cfg.ranks[-1]]
    _check_sizes(directory, cfg, weights)
    model = host or _empty(cfg)
    state = model.state_dict()
    for name in sorted(state.keys() | weights.keys()):
        got = list(weights[name].shape) if name in weights else "none"
        want = list(state[name].shape) if name in state else "none"
        if got != want:
            raise ValueError(f"{directory}: {name}: expected shape {want}, got {got}")
    model = _fill(model, weights, dtype)
    if host is not None and not (directory / NESTING).exists():
        from .automodel import probe  # The import of transformers takes seconds.

        probe.check(host, str(directory))
    return model


def _check_sizes(directory: Path, cfg: config.Model, weights: dict[str, Tensor]) -> None:
    """Compare the sizes in `cfg` with the weights, before a model of those sizes is built.

    ValueError, with the file of the sizes and the name of a weight, if they differ.
    """
    nesting = directory / NESTING
    path = nesting if nesting.exists() else directory / "config.json"
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    depth, D = len(layers), cfg.hidden_size
    if cfg.num_hidden_layers > depth:
        raise ValueError(
            f"{path}: num_hidden_layers: expected at most {depth}, the layers in the weights, "
            f"got {cfg.num_hidden_layers}"
        )
    rank = cfg.ranks[-1] if cfg.ranks else 0
    table = {"embed_tokens.U": [cfg.vocab_size, rank], "embed_tokens.W": [rank, D]}
    wanted = table if rank else {"embed_tokens.weight": [cfg.vocab_size, D]}
    if cfg.style == "bert":
        rows = cfg.position_offset + cfg.max_position_embeddings
        wanted["embed_places.positions.weight"] = [rows, D]
        wanted["embed_places.segments.weight"] = [cfg.type_vocab_size, D]
    if cfg.style != "transformers":
        heads, keys = cfg.num_attention_heads, cfg.num_key_value_heads
        wanted["layers.0.self_attn.q_proj.weight"] = [heads * cfg.head_dim, D]
        wanted["layers.0.self_attn.k_proj.weight"] = [keys * cfg.head_dim, D]
        wanted["layers.0.mlp.up_proj.weight"] = [cfg.intermediate_size, D]
    for name, want in wanted.items():
        got = list(weights[name].shape) if name in weights else "none"
        if got != want:
            raise ValueError(f"{path}: {name}: expected shape {want}, got {got}")


def _empty(cfg: config.Model) -> Transformer:
    """Return a model without weights: drawing random ones takes longer than reading others."""
    with torch.device("meta"):
        return trunk_of(cfg)


def _fill(
    model: Transformer, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> Transformer:
    """Give the model copies of `weights` on the CPU: tensors that were read are memory-mapped."""
    copies = {n: x.detach().to("cpu", dtype, copy=True).contiguous() for n, x in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model


def _choose_pooler(weights: dict[str, Tensor], directory: Path, cfg: config.Model) -> None:
    """Set the pooler in `weights` for `cfg`: the Dense module's, the encoder's, or none."""
    if cfg.pooling != "pooler":
        weights.pop("pooler.weight", None)
        weights.pop("pooler.bias", None)
        return
    # An export's Dense module repeats the weights of its encoder's pooler.
    ours = (directory / NESTING).exists()
    dense = None if ours else sentence_files.read(directory, cfg.hidden_size).pooler
    if dense is not None:
        file = dense / "model.safetensors"
        if not file.exists():
            raise ValueError(f"{dense}: expected model.safetensors, found none")
        with open_tensors(file) as tensors:
            for kind in ("weight", "bias"):
                name = f"linear.{kind}"
                weights[f"pooler.{kind}"] = tensors.get_tensor(name)
                weight_checks.check(f"{file}: {name}", weights[f"pooler.{kind}"])
    elif "pooler.weight" not in weights:
        raise ValueError(
            f"{directory}: expected the pooler's weights for model.pooling pooler, found none: "
            "choose model.pooling cls or mean"
        )


def _dense_layers(directory: Path, cfg: config.Model) -> dict[str, Tensor]:
    """Return the weights of the linear layers after the pooling."""
    if not cfg.dense:
        return {}
    places = [(directory / DENSE, f"dense.{i}.weight") for i in range(len(cfg.dense))]
    if not (directory / NESTING).exists():
        folders = sentence_files.read(directory, cfg.hidden_size).dense
        places = [(folder / "model.safetensors", "linear.weight") for folder in folders]
    weights = {}
    for i, (file, name) in enumerate(places):
        with open_tensors(file) as tensors:
            weights[f"dense.{i}.weight"] = tensors.get_tensor(name)
        weight_checks.check(f"{file}: {name}", weights[f"dense.{i}.weight"])
    return weights


def _saved_factors(directory: Path, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the saved U and W. ValueError if their product is not the merged table."""
    with open_tensors(directory / FACTORS) as tensors:
        stored = {name: tensors.get_tensor(name) for name in "UW"}
    for name, tensor in stored.items():
        weight_checks.check(f"{directory / FACTORS}: {name}", tensor)
    U, W = (tensor.float() for tensor in stored.values())
    # Another library may have trained the table since; a sample of its rows shows that.
    fits = (len(U), W.shape[1]) == table.shape
    rows = slice(None, None, max(1, len(table) // 64))
    if not fits or not torch.allclose(U[rows] @ W, table[rows].float(), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{directory}: expected the factors of {FACTORS} to give embed_tokens.weight, got "
            "another table: remove that file to factorise the table again"
        )
    return U, W


def cut(model: Transformer, exit: int, rank: int | None) -> Transformer:
    """Return a copy of the layers that `exit` runs, with vocabulary rank `rank`, a slice."""
    cfg = model.cfg
    cfg.check(exit=exit, rank=rank)
    exits = (*(e for e in cfg.exits if e < exit), exit)
    ranks = cfg.ranks if rank is None else (*(r for r in cfg.ranks if r < rank), rank)
    layers = cfg.layers_of(exit)
    hf = architecture.cut(cfg, layers) if cfg.architecture else ""
    shape = replace(cfg, num_hidden_layers=exit, exits=exits, ranks=ranks, architecture=hf)
    small = _empty(shape)
    weights = model.state_dict()
    if ranks:
        weights["embed_tokens.U"] = weights["embed_tokens.U"][:, : ranks[-1]]
        weights["embed_tokens.W"] = weights["embed_tokens.W"][: ranks[-1]]

    def source(name: str) -> str:
        """Return the name in the whole model."""
        if not name.startswith("layers."):
            return name
        _, layer, part = name.split(".", 2)
        return f"layers.{layers[int(layer)] - 1}.{part}"

    small = _fill(small, {name: weights[source(name)] for name in small.state_dict()})
    return small.train(model.training)


def save(model: Transformer, directory: Path) -> None:
    """Write config.json, model.safetensors (merged table, Hugging Face's names) and the nesting.

    Raises:
        ValueError: a weight, by name, is not finite.
    """
    cfg = model.cfg
    weights = {n: w.detach().float().cpu().contiguous() for n, w in model.state_dict().items()}
    for name, tensor in weights.items():
        weight_checks.check(f"weight {name}", tensor)
    if cfg.ranks:
        factors = {n: weights.pop(f"embed_tokens.{n}") for n in ("U", "W")}
        weights["embed_tokens.weight"] = factors["U"] @ factors["W"]
        save_file(factors, directory / FACTORS, metadata={"format": "pt"})
    if cfg.dense:
        dense = {
            f"dense.{i}.weight": weights.pop(f"dense.{i}.weight") for i in range(len(cfg.dense))
        }
        save_file(dense, directory / DENSE, metadata={"format": "pt"})
    auto: Any = model if cfg.style == "transformers" else None
    named = {auto.hf_name(n) if auto else hf_name(n, cfg): x for n, x in weights.items()}
    save_file(named, directory / "model.safetensors", metadata={"format": "pt"})
    describe(cfg, directory)


def describe(cfg: config.Model, directory: Path) -> None:
    """Write config.json and the nesting, without weights."""
    hf = json.dumps(hf_config(cfg), indent=2) + "\n"
    (directory / "config.json").write_text(hf, encoding="utf-8")
    # Without attention's implementation: a model trained with flash_attn also loads on a laptop.
    shape = {key: value for key, value in strict.to_dict(cfg).items() if key != "attention"}
    nesting = {"model": shape}
    (directory / NESTING).write_text(json.dumps(nesting, indent=2) + "\n", encoding="utf-8")
