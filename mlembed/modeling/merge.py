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
that rank.

Sums are in float64. Memory holds the merge so far, one model, and the factors of all models.

Letters: V vocabulary, R rank, D width, k models.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from .. import config
from ..config.choices import Method
from ..data import tokenizer
from .transformer import Transformer
from .vocabulary import Fit, Tables, coefficients

# Fields of a configuration on which weights do not depend.
RUNTIME = {"attention", "dropout"}


def merge(
    models: Iterable[Transformer], weights: Sequence[float], method: Method = "soup"
) -> tuple[Transformer, list[Fit]]:
    """Return the merged model, fp32 on the CPU, and the errors of its ranks ([] for a plain table).

    Args:
        models: one or more of the same configuration, each requested after the one before it was
            merged.
        weights: 0 or more, one per model, not all 0; only their ratios count.

    Raises:
        ValueError: other weights, configurations that differ (with the keys).
    """
    weights = check_weights(weights)
    cfg: config.Model | None = None
    merged: dict[str, Tensor] = {}
    tables = Tables()
    total = 0.0
    for model, weight in zip(models, weights, strict=True):
        state = {name: x.detach().cpu().double() for name, x in model.state_dict().items()}
        U, W = (state.pop(f"embed_tokens.{name}", None) for name in "UW")
        total += weight
        t = weight / total if total else 0.0
        if cfg is None:
            cfg, merged, t = model.cfg, state, 1.0
        else:
            check_same_shape(cfg, model.cfg)
            merged = {name: _combine(m, state[name], t, method) for name, m in merged.items()}
        if U is not None and W is not None:
            tables.add(U.float(), W.float(), t, method)
    assert cfg is not None
    fits: list[Fit] = []
    if cfg.ranks:
        U, W = tables.factors(cfg.ranks[-1])
        fits = [tables.fit(U, W, rank) for rank in cfg.ranks]
        merged |= {"embed_tokens.U": U, "embed_tokens.W": W}
    model = Transformer(dataclasses.replace(cfg, attention="auto", dropout=0.0))
    model.load_state_dict({name: x.float() for name, x in merged.items()})
    return model.eval(), fits


def check_weights(weights: Sequence[float]) -> list[float]:
    """Return the weights. ValueError unless all are 0..1e6, and one is at least 1e-6."""
    if not all(0 <= w <= 1e6 for w in weights) or max(weights, default=0) < 1e-6:
        got = " ".join(map(str, weights)) or "none"
        raise ValueError(f"weights: expected numbers of 0 or more, one above 0, got {got}")
    return [float(w) for w in weights]


def check_same_shape(one: config.Model, other: config.Model) -> None:
    """Raise ValueError with the keys in which two configurations differ."""
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    if keys := [key for key in a if a[key] != b[key] and key not in RUNTIME]:
        got = "; ".join(f"model.{key} {a[key]} and {b[key]}" for key in keys)
        raise ValueError(f"models: expected the same configuration, got {got}")


def _combine(m: Tensor, x: Tensor, t: float, method: Method) -> Tensor:
    inner, m_square, x_square = (float((p * q).sum()) for p, q in ((m, x), (m, m), (x, x)))
    a, b = coefficients(inner, math.sqrt(m_square), math.sqrt(x_square), t, method)
    return a * m + b * x


# ---- tokenizers of directories ----


def shared_tokenizer(directories: Sequence[Path]) -> tuple[Tokenizer, int | None]:
    """Return the tokenizer of all directories and their least maximal length, None if none has one.

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
    lengths = [tokenizer.max_length(directory) for directory in directories]
    return tokens, min(filter(None, lengths), default=None)


def differing_parts(one: Tokenizer, other: Tokenizer) -> list[str]:
    """Return the parts in which two tokenizers differ, truncation and padding aside."""
    a, b = (json.loads(tokens.to_str()) for tokens in (one, other))
    keys = (a.keys() | b.keys()) - {"truncation", "padding"}
    return sorted(key for key in keys if a.get(key) != b.get(key))
