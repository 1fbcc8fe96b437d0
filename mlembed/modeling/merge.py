"""Merge models of one shape: soups of runs, or of the last checkpoints of one run.

Models are added one after the other. The current merge m, of weight W, and a model x, of weight w,
become

    m <- a m + b x      with t = w / (W + w), then W <- W + w

- soup: a = 1 - t, b = t, so that in the end m = sum_i w_i x_i / sum_i w_i (model soups, arXiv
  2203.05482, whose weights are equal).
- slerp: each tensor, flattened, is a vector; with cos Omega = <m, x> / (|m| |x|)

      a = sin((1 - t) Omega) / sin Omega,   b = sin(t Omega) / sin Omega

  which keeps the length of two vectors of equal length, unlike their mean. If sin Omega is under
  1e-6 or a tensor is all zero, a and b are the soup's. The result for more than two models depends
  on their order.

A nested vocabulary is a product: U W = (U G) (G^-1 W) for every G, so two models may have the same
table by factors whose averages mean nothing. Therefore the tables are merged, m = sum_i c_i U_i W_i
of rank up to k R, and the best approximation of rank R is stored, best directions first. Rank r is
then the best rank-r approximation of the merged table. It is not the merge of the models' tables of
rank r, which training made meaningful: the command reports the distance to it for each rank. If all
models have the same W, to the bit, W stays and U is merged: then every rank is exactly the merge of
that rank. A plain table counts as its factors of full rank, so a base model merges with its tune.

Exits, the last layers that they share, prefixes and ranks change no tensor but the vocabulary's:
those of one model are kept.

Sums are in float64. Memory holds the merge so far, one model, and the factors of all models.

Letters: V vocabulary, R rank, D width, k models.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from .. import config
from ..config.choices import Method, Pooling
from ..data import tokenizer
from . import hf_config, serving
from .automodel.choose import trunk_of
from .hf_config import NESTING
from .serving import Serving
from .transformer import Transformer
from .vocabulary import Fit, Tables, coefficients, factorise

# Fields of a configuration that may differ, as weights do not depend on them, and the nesting.
RUNTIME = {"attention", "dropout"}
NESTED = ("exits", "last_layers", "matryoshka_dims", "ranks")


def merge(
    models: Iterable[Transformer],
    weights: Sequence[float],
    method: Method = "soup",
    nesting: config.Model | None = None,
) -> tuple[Transformer, list[Fit]]:
    """Return the merged model, fp32 on the CPU, and the errors of its ranks ([] for a plain table).

    Args:
        models: one or more of the same configuration but for the nesting (NESTED), each requested
            after the one before it was merged.
        weights: 0 or more, one per model, not all 0; only their ratios count.
        nesting: the configuration whose nesting is kept; the first model's by default.

    Raises:
        ValueError: other weights, configurations that differ (with the keys).
    """
    weights = check_weights(weights)
    cfg = nesting
    merged: dict[str, Tensor] = {}
    tables = Tables()
    total = 0.0
    for model, weight in zip(models, weights, strict=True):
        cfg = cfg or model.cfg
        check_same_shape(cfg, model.cfg)
        state = {name: x.detach().cpu().double() for name, x in model.state_dict().items()}
        total += weight
        t = weight / total if total else 0.0
        if cfg.ranks:
            tables.add(*_factors(state), t, method)
        elif model.cfg.ranks:
            U, W = (state.pop(f"embed_tokens.{name}") for name in "UW")
            state["embed_tokens.weight"] = U @ W
        merged = {n: _combine(merged[n], x, t, method) if merged else x for n, x in state.items()}
    assert cfg is not None
    fits: list[Fit] = []
    if cfg.ranks:
        U, W = tables.factors(cfg.ranks[-1])
        fits = [tables.fit(U, W, rank) for rank in cfg.ranks]
        merged |= {"embed_tokens.U": U, "embed_tokens.W": W}
    model = trunk_of(dataclasses.replace(cfg, attention="auto", dropout=0.0))
    model.load_state_dict({name: x.float() for name, x in merged.items()})
    return model.eval(), fits


def check_weights(weights: Sequence[float]) -> list[float]:
    """Return the weights. ValueError unless all are 0..1e6, and one is at least 1e-6."""
    if not all(0 <= w <= 1e6 for w in weights) or max(weights, default=0) < 1e-6:
        got = " ".join(map(str, weights)) or "none"
        raise ValueError(f"weights: expected numbers of 0 or more, one above 0, got {got}")
    return [float(w) for w in weights]


def check_same_shape(one: config.Model, other: config.Model, where: str = "") -> None:
    """Raise ValueError with the keys in which two configurations differ, the nesting aside."""
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    if keys := [key for key in a if a[key] != b[key] and key not in {*RUNTIME, *NESTED}]:
        got = "; ".join(f"model.{key} {a[key]} and {b[key]}" for key in keys)
        raise ValueError(f"models: expected the same configuration, got {got}{where}")


def _factors(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Take a model's vocabulary out of `state`, fp32: its factors, or those of its table."""
    if "embed_tokens.weight" in state:
        table = state.pop("embed_tokens.weight")
        return factorise(table, table.shape[1])
    U, W = (state.pop(f"embed_tokens.{name}").float() for name in "UW")
    return U, W


def _combine(m: Tensor, x: Tensor, t: float, method: Method) -> Tensor:
    inner, m_square, x_square = (float((p * q).sum()) for p, q in ((m, x), (m, m), (x, x)))
    a, b = coefficients(inner, math.sqrt(m_square), math.sqrt(x_square), t, method)
    return a * m + b * x


# ---- directories ----


def shapes_and_serving(
    directories: Sequence[Path], pooling: Pooling | None, say: Callable[[str], object]
) -> tuple[config.Model, list[config.Model], Serving]:
    """Return the configuration of the merge, that of each model, and how the merge serves.

    Nesting and settings are those of the first directory that mlembed wrote, or of the first one; a
    directory that does not say how it is pooled is pooled like that one. The longest text is the
    shortest of all.

    Args:
        pooling: of that directory, if it does not say it.
        say: gets a line for each setting in which another directory differs.

    Raises:
        ValueError: configurations that differ beyond nesting, with the directories and keys.
    """
    ours = [directory for directory in directories if (directory / NESTING).is_file()]
    lead = (ours or directories)[0]
    cfg = hf_config.with_pooling(lead, pooling, say)
    served = serving.read(lead, cfg)
    shapes, lengths = [], []
    for directory in directories:
        shape = hf_config.from_checkpoint(directory, config.Model())
        if hf_config.stored_pooling(directory, shape) is None:
            shape = dataclasses.replace(shape, pooling=cfg.pooling)
        check_same_shape(cfg, shape, f" in {lead} and {directory}")
        other = serving.read(directory, shape)
        pairs = [(name, getattr(cfg, name), getattr(shape, name)) for name in NESTED]
        pairs = pairs if directory in ours else []
        pairs += [(name, value, vars(other)[name]) for name, value in vars(served).items()]
        for name, kept, value in pairs:
            if name == "prompts":
                kept, value = ({n: p for n, p in x.items() if p} for x in (kept, value))
            if kept != value and name != "max_length":
                say(f"{name}: {kept} of {lead} stays, {directory} has {value}")
        shapes.append(shape)
        lengths.append(other.max_length)
    return cfg, shapes, dataclasses.replace(served, max_length=min(lengths))


def shared_tokenizer(directories: Sequence[Path]) -> Tokenizer:
    """Return the tokenizer of all directories.

    Raises:
        ValueError: a directory without tokenizer, or tokenizers that differ (with the parts).
    """
    tokens = tokenizer.load(directories[0])
    for directory in directories[1:]:
        if parts := differing_parts(tokens, tokenizer.load(directory)):
            raise ValueError(
                f"models: expected the same tokenizer, got another {', '.join(parts)} in "
                f"{directory} than in {directories[0]}"
            )
    return tokens


def differing_parts(one: Tokenizer, other: Tokenizer) -> list[str]:
    """Return the parts in which two tokenizers differ, without parts that change no token ids."""
    a, b = (json.loads(tokens.to_str()) for tokens in (one, other))
    keys = (a.keys() | b.keys()) - {"truncation", "padding", "decoder", "version"}
    return sorted(key for key in keys if a.get(key) != b.get(key))
