"""Merge models of one shape: weights, and vocabularies as the tables that they stand for."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from .. import config
from ..data import tokenizer
from .transformer import Transformer
from .vocabulary import Fit, Method, Tables, between

PLACE = {"attention", "dropout"}  # of a configuration: no matter of the weights


def merge(
    models: Iterable[Transformer], weights: Sequence[float], method: Method = "soup"
) -> tuple[Transformer, list[Fit]]:
    """-> the merged model, fp32 on the CPU, and what became of each rank (none of a plain table).

    Args:
        models: one or more of the same configuration, each asked for when the one before it is
            done with.
        weights: 0 or more, one a model, not all 0; they count relative to their sum.

    Raises:
        ValueError: other weights, configurations that differ (with the keys).
    """
    weights = checked(weights)
    cfg: config.Model | None = None
    state: dict[str, Tensor] = {}
    tables = Tables()
    total = 0.0
    for model, weight in zip(models, weights, strict=True):
        own = {name: x.detach().cpu().double() for name, x in model.state_dict().items()}
        U, W = (own.pop(f"embed_tokens.{name}", None) for name in "UW")
        total += weight
        t = weight / total if total else 0.0
        if cfg is None:
            cfg, state, t = model.cfg, own, 1.0
        else:
            same_shape(cfg, model.cfg)
            state = {name: _between(m, own[name], t, method) for name, m in state.items()}
        if U is not None and W is not None:
            tables.add(U.float(), W.float(), t, method)
    assert cfg is not None
    fits: list[Fit] = []
    if cfg.ranks:
        U, W = tables.factors(cfg.ranks[-1])
        fits = [tables.fit(U, W, rank) for rank in cfg.ranks]
        state |= {"embed_tokens.U": U, "embed_tokens.W": W}
    made = Transformer(dataclasses.replace(cfg, attention="auto", dropout=0.0))
    made.load_state_dict({name: x.float() for name, x in state.items()})
    return made.eval(), fits


def checked(weights: Sequence[float]) -> list[float]:
    """ValueError for weights that are not numbers of 0 or more, one above 0."""
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        got = " ".join(map(str, weights)) or "none"
        raise ValueError(f"weights: expected numbers of 0 or more, one above 0, got {got}")
    return [float(w) for w in weights]


def same_shape(one: config.Model, other: config.Model) -> None:
    """ValueError with the keys in which two configurations differ."""
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    if odd := [key for key in a if a[key] != b[key] and key not in PLACE]:
        got = "; ".join(f"model.{key} {a[key]} and {b[key]}" for key in odd)
        raise ValueError(f"models: expected the same configuration, got {got}")


def _between(m: Tensor, x: Tensor, t: float, method: Method) -> Tensor:
    inner, of_m, of_x = (float((p * q).sum()) for p, q in ((m, x), (m, m), (x, x)))
    a, b = between(inner, math.sqrt(of_m), math.sqrt(of_x), t, method)
    return a * m + b * x


# ---- from directories to a directory ----


def common(directories: Sequence[Path]) -> tuple[Tokenizer, int | None]:
    """The tokenizer of all, and the least of the lengths that they allow, None where none says.

    Raises:
        ValueError: none there, or another than the first's (with its differing parts).
    """
    tokens = tokenizer.load(directories[0])
    for directory in directories[1:]:
        if odd := different(tokens, tokenizer.load(directory)):
            raise ValueError(
                f"models: expected the same tokenizer, got another {', '.join(odd)} in {directory} "
                f"than in {directories[0]}"
            )
    lengths = [tokenizer.max_length(directory) for directory in directories]
    return tokens, min(filter(None, lengths), default=None)


def different(one: Tokenizer, other: Tokenizer) -> list[str]:
    """Parts in which two tokenizers differ; how they cut and pad does not count."""
    a, b = (json.loads(tokens.to_str()) for tokens in (one, other))
    return sorted(
        key
        for key in a.keys() | b.keys()
        if key not in ("truncation", "padding") and a.get(key) != b.get(key)
    )
