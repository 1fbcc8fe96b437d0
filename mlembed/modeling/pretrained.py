"""Models from and to directories that Hugging Face libraries read: safetensors, no remote code.

A directory holds `config.json` and `model.safetensors` as any Qwen3, BERT or XLM-R model has them,
the vocabulary merged into one table, and beside these what keeps the nesting: `mlembed_config.json`
(exits, prefixes, ranks) and `mlembed_factors.safetensors` (U and W), which other libraries ignore.
A training checkpoint (checkpoint.py), which has the weights in shards under our own names and no
merged table, is read as well.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import config
from ..config import strict
from ..runtime.files import SHARDS
from .hf_config import NESTING, from_checkpoint, hf_config, resolve, sentence_pooling
from .transformer import Transformer
from .vocabulary import cached_factors

FACTORS = "mlembed_factors.safetensors"
# Modules of ours and of Hugging Face's BERT, XLM-R and RoBERTa: outside of layers, and in them.
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
HEADS = "cls.", "lm_head.", "classifier.", "qa_outputs."  # of tasks: not the encoder's


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of an encoder (one file, several, or a training checkpoint's shards) by our own
    names. Heads of tasks and buffers of positions, which are no weights, are left out.

    Raises:
        ValueError: none there; or only pickles, which run code when they are read.
    """
    if any(directory.glob(SHARDS)):
        from ..runtime.checkpoint import read  # with all of torch.distributed: a second

        found = read(directory, "model.")
        return {name.removeprefix("model."): tensor for name, tensor in found.items()}
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        pickled = next((p.name for p in sorted(directory.glob("*.bin"))), None)
        why = f" but {pickled}, a pickle, which can run code: save it as safetensors first"
        raise ValueError(
            f"{directory}: expected model.safetensors, found none{why if pickled else ''}"
        )
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if (ours := own_name(name)) is not None:
                    weights[ours] = tensors.get_tensor(name)
    return weights


def own_name(name: str) -> str | None:
    """Our name of a weight in a Hugging Face file; None for what is no part of the encoder; what
    no encoder of ours has keeps its name."""
    for prefix in ("model.", "bert.", "roberta."):
        name = name.removeprefix(prefix)
    if name.startswith(HEADS) or name.endswith("position_ids"):
        return None
    module, _, kind = name.rpartition(".")
    if module.endswith("LayerNorm"):  # as TensorFlow called them
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
    if module.startswith("encoder.layer."):
        layer, _, part = module.removeprefix("encoder.layer.").partition(".")
        return f"layers.{layer}.{OURS.get(part, part)}.{kind}"
    return f"{OURS.get(module, module)}.{kind}" if module else name


def hf_name(name: str, cfg: config.Model) -> str:
    """The name of a weight of ours as Hugging Face's model of that style has it."""
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
    """A Transformer from a directory that mlembed saved, a training checkpoint included, or from
    any Qwen3, BERT, RoBERTa or XLM-R checkpoint, as transformers or sentence-transformers saves it.

    Where the latter has a tanh Dense module behind [CLS], as LaBSE has, that is the pooler, and the
    encoder's own is not read (`shapes.sentence_pooling`). A table that is to have ranks is
    factorised, once (`cached_factors`); factors that mlembed saved are read as they are.

    Args:
        source: directory, a finished run's included, or hub id.
        cfg: shape and nesting. By default what the directory's `mlembed_config.json` says, or else
            the checkpoint's shape with the default exits and prefixes and a plain vocabulary.
        counts: [V], how often each token occurs in the text to come, where a table is factorised.
        dtype: of the model's weights, which are then never all there in fp32.

    Raises:
        ValueError: no such checkpoint, another architecture, missing or misshapen weights, pooling
            "pooler" of a checkpoint that has none, counts of another vocabulary.
    """
    directory = resolve(source)
    cfg = cfg or from_checkpoint(directory, config.Model())
    weights = read_weights(directory)
    if not any(directory.glob(SHARDS)):
        _choose_pooler(weights, directory, cfg)
    table = weights.pop("embed_tokens.weight", None)
    if table is None and "embed_tokens.U" not in weights:
        raise ValueError(f"{directory}: expected embed_tokens.weight, found none")
    if table is None:  # a training checkpoint
        U, W = (weights.pop(f"embed_tokens.{name}") for name in "UW")
        if not cfg.ranks:
            weights["embed_tokens.weight"] = U.float() @ W.float()
    elif not cfg.ranks:
        weights["embed_tokens.weight"] = table
    elif (directory / FACTORS).is_file():
        U, W = _saved_factors(directory, table)
    else:
        U, W = cached_factors(table, cfg.ranks[-1], counts)
    if cfg.ranks:
        weights["embed_tokens.U"] = U[:, : cfg.ranks[-1]]
        weights["embed_tokens.W"] = W[: cfg.ranks[-1]]
    model = _empty(cfg)
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        got = list(weights[name].shape) if name in weights else "none"
        want = list(own[name].shape) if name in own else "none"
        if got != want:
            raise ValueError(f"{directory}: {name}: expected shape {want}, got {got}")
    return _filled(model, weights, dtype)


def _empty(cfg: config.Model) -> Transformer:
    """One without weights: drawing random ones takes longer than reading those to come."""
    with torch.device("meta"):
        return Transformer(cfg)


def _filled(
    model: Transformer, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> Transformer:
    """With copies of `weights` on the CPU: what was read is the file itself, in memory."""
    own = {
        name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
        for name, tensor in weights.items()
    }
    model.load_state_dict(own, assign=True)
    return model


def _choose_pooler(weights: dict[str, Tensor], directory: Path, cfg: config.Model) -> None:
    """Leave in `weights` the pooler that `cfg` has: the Dense module's, the encoder's, or none."""
    if cfg.pooling != "pooler":
        weights.pop("pooler.weight", None)
        weights.pop("pooler.bias", None)
        return
    ours = (directory / NESTING).is_file()  # its modules are written from its weights
    dense = None if ours else sentence_pooling(directory, cfg.hidden_size)[1]
    if dense is not None:
        file = dense / "model.safetensors"
        if not file.is_file():
            raise ValueError(f"{dense}: expected model.safetensors, found none")
        with safe_open(file, framework="pt") as tensors:
            for kind in ("weight", "bias"):
                weights[f"pooler.{kind}"] = tensors.get_tensor(f"linear.{kind}")
    elif "pooler.weight" not in weights:
        raise ValueError(
            f"{directory}: expected the pooler's weights for model.pooling pooler, found none: "
            "choose model.pooling cls or mean"
        )


def _saved_factors(directory: Path, table: Tensor) -> tuple[Tensor, Tensor]:
    """U and W beside a merged table. ValueError where they give another."""
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
    return U, W


def cut(model: Transformer, exit: int, rank: int | None) -> Transformer:
    """A copy that ends at layer `exit` with vocabulary rank `rank`: nesting makes both a slice."""
    cfg = model.cfg
    cfg.check(exit=exit, rank=rank)
    exits = (*(e for e in cfg.exits if e < exit), exit)
    ranks = cfg.ranks if rank is None else (*(r for r in cfg.ranks if r < rank), rank)
    small = _empty(replace(cfg, num_hidden_layers=exit, exits=exits, ranks=ranks))
    weights = model.state_dict()
    if ranks:
        weights["embed_tokens.U"] = weights["embed_tokens.U"][:, : ranks[-1]]
        weights["embed_tokens.W"] = weights["embed_tokens.W"][: ranks[-1]]
    small = _filled(small, {name: weights[name] for name in small.state_dict()})
    return small.train(model.training)


def save(model: Transformer, directory: Path) -> None:
    """Write config.json, model.safetensors (table merged, names of Hugging Face) and, beside them,
    the nesting."""
    cfg = model.cfg
    weights = {n: w.detach().float().cpu().contiguous() for n, w in model.state_dict().items()}
    if cfg.ranks:
        factors = {n: weights.pop(f"embed_tokens.{n}") for n in ("U", "W")}
        weights["embed_tokens.weight"] = factors["U"] @ factors["W"]
        save_file(factors, directory / FACTORS, metadata={"format": "pt"})
    named = {hf_name(name, cfg): tensor for name, tensor in weights.items()}
    save_file(named, directory / "model.safetensors", metadata={"format": "pt"})
    describe(cfg, directory)


def describe(cfg: config.Model, directory: Path) -> None:
    """Write config.json and the nesting, which weights of this shape are beside."""
    hf = json.dumps(hf_config(cfg), indent=2) + "\n"
    (directory / "config.json").write_text(hf, encoding="utf-8")
    # What computes attention is left out: a model trained by flash_attn also loads on a laptop.
    shape = {key: value for key, value in strict.to_dict(cfg).items() if key != "attention"}
    nesting = {"model": shape}
    (directory / NESTING).write_text(json.dumps(nesting, indent=2) + "\n", encoding="utf-8")
