"""One model of several of the same shape: soups of runs, or of the last checkpoints of one.

python -m mlembed.merge OUT runs/a runs/b [--method slerp] [--weights 1 3]
python -m mlembed.merge OUT runs/a/checkpoints/step_*

Models are taken up one after the other; what is merged so far, m, with weight W, becomes

    m <- a m + b x      with t = w / (W + w), then W <- W + w

- soup, weighted: a = 1 - t, b = t, so that in the end m = sum_i w_i x_i / sum_i w_i (model soups,
  arXiv 2203.05482; equal weights for soup).
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
from typing import Annotated, Literal

import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor

from . import config, pretrained, shapes
from .data import tokenizer
from .model import Transformer
from .runtime import log
from .runtime.files import atomic_directory

Method = Literal["soup", "weighted", "slerp"]
PARALLEL = 1e-6  # sin Omega under which two tensors have no plane between them
ROWS = 2**16  # rows of factors in float64 at once
PLACE = {"attention", "dropout"}  # of a configuration: no matter of the weights


@dataclasses.dataclass(frozen=True)
class Fit:
    """Of a stored rank r: |stored - wanted| / |wanted| (Frobenius), wanted being the merged table
    of full rank, and the merge of the models' tables of rank r."""

    rank: int
    of_table: float
    of_rank: float


def between(inner: float, m: float, x: float, t: float, method: Method) -> tuple[float, float]:
    """a and b of a m + b x, see above.

    Args:
        inner: <m, x>. m, x: |m|, |x|. t: 0..1, how far towards x.
    """
    if method == "slerp" and m * x > 0:
        angle = math.acos(max(-1.0, min(1.0, inner / (m * x))))
        if (across := math.sin(angle)) > PARALLEL:
            return math.sin((1 - t) * angle) / across, math.sin(t * angle) / across
    return 1 - t, t


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


# ---- the vocabulary's factors ----


class Tables:
    """sum_i c_i U_i W_i, by its factors: no V x D table is ever built.

    Inner products of tables: <U W, U' W'> = sum of (U^T U') * (W W'^T), elementwise.
    """

    def __init__(self) -> None:
        self.factors_of: list[tuple[Tensor, Tensor]] = []  # fp32 [V, R], [R, D]
        self.c: list[float] = []

    def add(self, U: Tensor, W: Tensor, t: float, method: Method) -> None:
        """Go `t` of the way to U W."""
        if not self.c:
            self.factors_of, self.c = [(U, W)], [1.0]
            return
        with_new = [inner(*own, U, W) for own in self.factors_of]
        of_m = sum(
            p * q * inner(*one, *other)
            for p, one in zip(self.c, self.factors_of, strict=True)
            for q, other in zip(self.c, self.factors_of, strict=True)
        )
        along = sum(c * new for c, new in zip(self.c, with_new, strict=True))
        lengths = math.sqrt(max(0.0, of_m)), math.sqrt(inner(U, W, U, W))
        a, b = between(along, *lengths, t, method)
        self.factors_of.append((U, W))
        self.c = [*(a * c for c in self.c), b]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """U [V, rank] and W [rank, D], fp32: the best approximation of the sum, best directions
        first; exactly the sum, rank by rank, where all that count have one W.

        With A = [U_1, .., U_k] and B = [c_1 W_1; ..; c_k W_k] the sum is E = A B, and W are the
        eigenvectors of E^T E = B^T (A^T A) B of the largest eigenvalues, U = A (B W^T), as in
        `pretrained.factorise`. Of singular values under 1e-8 of the largest, float64 finds only
        that they are small, which is beyond what fp32 holds of the table.
        """
        used = [(c, *UW) for c, UW in zip(self.c, self.factors_of, strict=True) if c]
        if all(torch.equal(W, used[0][2]) for _, _, W in used):
            U = sum((c * U.double() for c, U, _ in used), torch.zeros((), dtype=torch.float64))
            return U[:, :rank].float(), used[0][2][:rank].clone()
        B = torch.cat([c * W.double() for c, _, W in used])
        A = torch.cat([U for _, U, _ in used], dim=1)
        W = torch.linalg.eigh(B.T @ gram(A, A) @ B)[1].flip(-1)[:, :rank].T.contiguous()
        W *= W.gather(1, W.abs().argmax(1, keepdim=True)).sign()
        onto = B @ W.T
        U = torch.cat([some.double() @ onto for some in A.split(ROWS)])
        return U.float(), W.float()

    def fit(self, U: Tensor, W: Tensor, rank: int) -> Fit:
        """How near U[:, :rank] W[:rank] is."""

        def error(most: int | None) -> float:
            each = zip(self.c, self.factors_of, strict=True)
            wanted = [(c, U[:, :most], W[:most]) for c, (U, W) in each if c]
            return distance((U[:, :rank], W[:rank]), wanted)

        return Fit(rank, error(None), error(rank))


def gram(A: Tensor, B: Tensor) -> Tensor:
    """A^T B in float64, by chunks of rows."""
    total = torch.zeros(A.shape[1], B.shape[1], dtype=torch.float64)
    for a, b in zip(A.split(ROWS), B.split(ROWS), strict=True):
        total.addmm_(a.double().T, b.double())
    return total


def inner(U: Tensor, W: Tensor, other_U: Tensor, other_W: Tensor) -> float:
    """<U W, U' W'>."""
    return float((gram(U, other_U) * (W.double() @ other_W.double().T)).sum())


def distance(
    stored: tuple[Tensor, Tensor], wanted: Sequence[tuple[float, Tensor, Tensor]]
) -> float:
    """|U W - sum_i c_i U_i W_i| / |sum_i c_i U_i W_i|, chunk by chunk of rows: a difference of
    inner products would lose half of the digits."""
    V = len(stored[0])
    W, of = stored[1].double(), [W.double() for _, _, W in wanted]
    rows = max(1, ROWS * 16 // W.shape[1])
    missed = whole = 0.0
    for begin in range(0, V, rows):
        some = slice(begin, begin + rows)
        E = sum(
            (c * (U[some].double() @ W) for (c, U, _), W in zip(wanted, of, strict=True)),
            torch.zeros((), dtype=torch.float64),
        )
        missed += float((stored[0][some].double() @ W - E).square().sum())
        whole += float(E.square().sum())
    return math.sqrt(missed / whole) if whole else math.sqrt(missed)


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


def main(
    out: Annotated[Path, tyro.conf.Positional],
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    method: Method | None = None,
    weights: tuple[float, ...] = (),
    t: float | None = None,
) -> None:
    """Merge models of one shape and tokenizer into one.

    Args:
        out: new directory, which train.py --init, encode, export and transformers read.
        models: two or more runs, model directories or training checkpoints.
        method: soup: their mean; weighted: by weights; slerp: on the sphere, tensor by tensor, one
            model after the other. By default weighted where weights are given, else soup.
        weights: one a model, 0 or more; they count relative to their sum.
        t: of slerp of two, instead of weights: how far from the first to the second, 0..1.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new directory, got {out}, which exists")
    if len(models) < 2:
        raise ValueError(f"models: expected two or more, got {len(models)}")
    method = method or ("weighted" if weights else "soup")
    counts = shares(method, len(models), weights, t)
    directories = [shapes.resolve(model) for model in models]
    tokens, length = common(directories)
    merged, fits = merge((pretrained.load(str(at)) for at in directories), counts, method)
    most = merged.cfg.max_position_embeddings
    with atomic_directory(out) as partial:
        pretrained.save(merged, partial)
        tokenizer.save(tokens, partial, min(length or most, most))
    of = " ".join(f"{weight / sum(counts):.3g}" for weight in counts)
    print(f"{out}: {method} of {len(models)} models, weights {of}")
    for fit in fits:
        print(
            f"rank {fit.rank}: {fit.of_table:.2%} off the merged table, "
            f"{fit.of_rank:.2%} off the merge of this rank's tables"
        )


def shares(method: Method, models: int, weights: Sequence[float], t: float | None) -> list[float]:
    """Weights, one a model.

    Raises:
        ValueError: weights or t that the method has not, or of another number of models.
    """
    if (method == "weighted") > bool(weights) or (method == "soup" and weights):
        given = "some" if weights else "none"
        raise ValueError(
            f"weights: expected some with weighted, none with soup, got {given}, {method}"
        )
    if weights and len(weights) != models:
        raise ValueError(f"weights: expected one for each of {models} models, got {len(weights)}")
    if t is None:
        return checked(weights or [1.0] * models)
    if method != "slerp" or models != 2 or weights:
        raise ValueError(
            f"t: expected only with slerp of two models without weights, got {method} of {models}"
            f"{' with weights' if weights else ''}"
        )
    if not 0 <= t <= 1:
        raise ValueError(f"t: expected 0..1, got {t}")
    return [1 - t, t]


if __name__ == "__main__":
    with log.one_line_errors():
        tyro.cli(main, prog="python -m mlembed.merge")
