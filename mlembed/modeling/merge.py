"""One model of several of the same shape: soups of runs, or of the last checkpoints of one.

Models are taken up one after the other; what is merged so far, m, with weight W, becomes

    m <- a m + b x      with t = w / (W + w), then W <- W + w

- soup: a = 1 - t, b = t, so that in the end m = sum_i w_i x_i / sum_i w_i (model soups, arXiv
  2203.05482, whose weights are equal).
- slerp: each tensor, flattened, is a vector; with cos Omega = <m, x> / (|m| |x|)

      a = sin((1 - t) Omega) / sin Omega,   b = sin(t Omega) / sin Omega

  which keeps the length where both have the same one, as their mean would not. Where sin Omega is
  under 1e-6, or a tensor is all zero, the two are alike, or opposite, and a and b are the soup's.
  Of more than two models the result depends on their order: it is this chain.

A nested vocabulary is a product: U W = (U G) (G^-1 W) for every G, so two models may have the same
table by factors that average to nonsense. What is merged is the table, m = sum_i c_i U_i W_i, whose
rank is up to k R, and its best approximation of rank R is stored, best directions first. Rank r is
then the best rank-r approximation of the merged table. It is not the merge of the models' own
tables of rank r, which training made meaningful; how far it is from that is said for each rank.
Where all have the same W to the bit, and so after a merge with itself, W stays and U is merged:
then every rank is the merge of that rank, exactly.

Sums are in float64. There is one model in memory beside what is merged so far, and the factors of
all.

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
