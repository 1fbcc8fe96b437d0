"""The low-rank nested vocabulary: module, factorisation, and sums of tables given by factors.

Letters: T packed tokens, V vocabulary, R rank, D width.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mlembed_kernels import TokenIndex, embed

from .. import config
from ..config.choices import Method
from ..runtime import cache


class Vocabulary(nn.Module):
    """Token embedding U[ids, :r] W[:r] (ranks given) or a plain table `weight` (no ranks)."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.ranks = cfg.ranks
        V, D = cfg.vocab_size, cfg.hidden_size
        if self.ranks:
            self.U = nn.Parameter(torch.empty(V, self.ranks[-1]))
            self.W = nn.Parameter(torch.empty(self.ranks[-1], D))
        else:
            self.weight = nn.Parameter(torch.empty(V, D))

    @property
    def rows(self) -> nn.Parameter:
        """The numbers of each token: U [V, R], or the plain table [V, D]."""
        return self.U if self.ranks else self.weight

    def forward(
        self, ids_T: Tensor, rank: int | None, token_index: TokenIndex | None = None
    ) -> Tensor:
        """Return the embeddings [T, D] in the weights' dtype, or autocast's."""
        if self.ranks:
            rank = self.ranks[-1] if rank is None else rank
            return embed(ids_T, self.U, self.W, rank, token_index=token_index)
        V = len(self.weight)
        if token_index is not None and not 0 <= token_index.lowest <= token_index.highest < V:
            got = f"{token_index.lowest}..{token_index.highest}"
            raise ValueError(f"ids: expected tokens in 0..{V - 1}, got {got}")
        rows_TD = F.embedding(ids_T, self.weight)
        if torch.is_autocast_enabled(ids_T.device.type):
            return rows_TD.to(torch.get_autocast_dtype(ids_T.device.type))
        return rows_TD

    def table(self, rank: int | None = None) -> Tensor:
        """Return the merged table E(r) [V, D]. ValueError for a rank that is not stored."""
        if not self.ranks:
            return self.weight.clone()
        rank = self.ranks[-1] if rank is None else rank
        ids = torch.arange(len(self.U), device=self.U.device)
        return embed(ids, self.U, self.W, rank, impl="reference")


def warn_beyond_break_even(cfg: config.Model) -> None:
    """Warn about ranks at which U and W hold more numbers than a plain table.

    R (V + D) > V D, so beyond the break-even V D / (V + D), a little less than D.
    """
    V, D = cfg.vocab_size, cfg.hidden_size
    most = V * D // (V + D)
    if beyond := [str(rank) for rank in cfg.ranks if rank > most]:
        warnings.warn(
            f"model.ranks: expected at most the break-even {most} of {V} tokens by width {D}, got "
            f"{', '.join(beyond)}: these factors hold more than the plain table; remove them, or "
            "all ranks to train the table itself",
            stacklevel=2,
        )


# ---- factorisation ----

VERSION = 2  # Version of the cached factors: raise it with `factorise` or the file's format.
FILE = "factors.safetensors"
ELEMENTS = 2**23  # Elements of a table in float64 at once: 64 MiB.


def principal_directions(gram_DD: Tensor, rank: int | None = None) -> Tensor:
    """Return eigenvectors [rank, D] of a symmetric matrix, largest eigenvalues first; all if None.

    The sign of an eigenvector is arbitrary: its largest component is made positive.
    """
    W = torch.linalg.eigh(gram_DD)[1].flip(-1)[:, :rank].T.contiguous()
    return W * W.gather(1, W.abs().argmax(1, keepdim=True)).sign()


def factorise(table: Tensor, rank: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return U [V, R] and W [R, D] of the truncated SVD of E [V, D], fp32 (ML-Embed).

    Minimises sum_v c_v |E_v - U_v W|^2, with c_v = counts_v + 1, or 1 without counts: frequent
    tokens are approximated better, and rare ones still count. For orthonormal rows W the best U_v
    is E_v W^T, for any c_v, and the error is sum_v c_v |E_v|^2 - tr(W G W^T) with
    G = sum_v c_v E_v^T E_v = E^T C E, least for the eigenvectors of G of the largest eigenvalues:
    those of the SVD of sqrt(C) E. The first r columns and rows are therefore the factors of rank r.

    G [D, D] is summed in float64 by chunks of rows, since V is far larger than D.

    Args:
        table: [V, D], any floating dtype.
        rank: 1..D.
        counts: [V], how often each token occurs, int or float.

    Raises:
        ValueError: another rank, counts that are not V numbers of 0 or more, NaN or infinite
            numbers in the table.
    """
    V, D = table.shape
    if not 1 <= rank <= D:
        raise ValueError(f"rank: expected 1..{D} (the table's width), got {rank}")
    gram_DD = torch.zeros(D, D, dtype=torch.float64)
    root_V1 = _token_weights(counts, V).sqrt()[:, None]
    step = max(1, ELEMENTS // D)
    chunks = [slice(begin, begin + step) for begin in range(0, V, step)]
    for rows in chunks:
        E = table[rows].to(torch.float64, copy=True).mul_(root_V1[rows])
        gram_DD.addmm_(E.T, E)
    if not gram_DD.isfinite().all():
        raise ValueError("embed_tokens.weight: expected finite numbers, got NaN or infinite ones")
    W = principal_directions(gram_DD, rank)
    U = torch.empty(V, rank, dtype=torch.float32)
    for rows in chunks:
        U[rows] = table[rows].double() @ W.T
    return U, W.float()


def _token_weights(counts: Tensor | None, V: int) -> Tensor:
    """Return c_v in float64 [V], see `factorise`."""
    if counts is None:
        return torch.ones(V, dtype=torch.float64)
    if counts.shape != (V,):
        got = list(counts.shape)
        raise ValueError(f"counts: expected a number for each of {V} tokens, got shape {got}")
    if not (counts.isfinite() & (counts >= 0)).all():
        raise ValueError("counts: expected finite numbers of 0 or more, got others")
    return counts.double() + 1


def cached_factors(table: Tensor, rank: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `factorise(table, rank, counts)`, from disk if an earlier call has computed it.

    The key in the cache depends on every bit of the arguments. Raises the ValueErrors of
    `factorise`; a cache that cannot be written is a warning.
    """
    given = [x.detach().cpu().contiguous() for x in (table, counts) if x is not None]
    kinds = [(str(x.dtype), list(x.shape)) for x in given]
    arrays = [x.view(-1).view(torch.uint8).numpy() for x in given]  # NumPy lacks bf16.
    key = cache.digest(VERSION, rank, kinds, arrays=arrays)
    factors = functools.cache(lambda: factorise(table, rank, counts))

    def build(directory: Path) -> None:
        U, W = factors()
        (directory / FILE).write_bytes(save({"U": U, "W": W}))

    def read(directory: Path) -> tuple[Tensor, Tensor]:
        tensors = load_file(directory / FILE)
        return tensors["U"], tensors["W"]

    try:
        return cache.cached("factors", key, build, read, f"table {list(table.shape)}, rank {rank}")
    except OSError:
        # Neither the cache nor the temporary directory has room, or somebody deleted the entry.
        return factors()


# ---- tokens of another model ----

RARE = 1e-3  # The frequency at which a token weighs half (Arora et al., ICLR 2017).


@torch.no_grad()
def start_from(vocabulary: Vocabulary, table: Tensor, counts: Tensor) -> None:
    """Start the tokens of a model of random weights from those of a trained, usually wider one.

    Rows are the principal coordinates of the trained table around the mean token of the text, the
    largest first, each weighted by a / (a + f) for its frequency f: frequent tokens tell little. A
    mean over a text of these rows finds translations, if the trained model is multilingual.
    Directions are weighted by the root of the frequency. Coordinates that the trained table lacks,
    and those beyond the rank, are zeros. A coordinate of the text has a root mean square of one:
    the first steps of many random layers would hide smaller numbers.

    Args:
        table: [V, D] of the trained model. counts: [V], how often each token occurs.

    Raises:
        ValueError: what `factorise` raises.
    """
    rows_VR = vocabulary.rows.zero_()
    width = min(rows_VR.shape[1], table.shape[1])
    share_V1 = ((counts.double() + 1) / (counts.double() + 1).sum()).float()[:, None]
    centred = table.float() - (share_V1 * table.float()).sum(0)
    U = cached_factors(centred, width, counts.sqrt())[0] * (RARE / (RARE + share_V1))
    rows_VR[:, :width] = U / (share_V1 * U.square()).sum(0).mean().sqrt()
    if vocabulary.ranks:
        vocabulary.W.copy_(torch.eye(*vocabulary.W.shape))


# ---- sums of tables, for merge.py ----

PARALLEL = 1e-6  # Least sin Omega of two tensors that span a plane.
ROWS = 2**16  # Rows of factors in float64 at once.


def coefficients(inner: float, m: float, x: float, t: float, method: Method) -> tuple[float, float]:
    """Return a and b of m <- a m + b x (merge.py) from <m, x>, |m|, |x| and t in 0..1."""
    if method == "slerp" and m * x > 0:
        angle = math.acos(max(-1.0, min(1.0, inner / (m * x))))
        if (sine := math.sin(angle)) > PARALLEL:
            return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
    return 1 - t, t


@dataclasses.dataclass(frozen=True)
class Fit:
    """Relative error |stored - wanted| / |wanted| (Frobenius) of a stored rank r.

    table_error: wanted is the merged table of full rank. rank_error: wanted is the merge of the
    models' tables of rank r.
    """

    rank: int
    table_error: float
    rank_error: float


class Tables:
    """A table sum_i c_i U_i W_i, held as its factors: no V x D table is ever built.

    Inner products of tables: <U W, U' W'> = sum of (U^T U') * (W W'^T), elementwise.
    """

    def __init__(self) -> None:
        self.terms: list[tuple[Tensor, Tensor]] = []  # fp32 [V, R], [R, D]
        self.c: list[float] = []

    def add(self, U: Tensor, W: Tensor, t: float, method: Method) -> None:
        """Go `t` of the way from the current table to U W."""
        if not self.c:
            self.terms, self.c = [(U, W)], [1.0]
            return
        with_new = [_inner(*term, U, W) for term in self.terms]
        square = sum(
            p * q * _inner(*one, *other)
            for p, one in zip(self.c, self.terms, strict=True)
            for q, other in zip(self.c, self.terms, strict=True)
        )
        inner = sum(c * new for c, new in zip(self.c, with_new, strict=True))
        lengths = math.sqrt(max(0.0, square)), math.sqrt(_inner(U, W, U, W))
        a, b = coefficients(inner, *lengths, t, method)
        self.terms.append((U, W))
        self.c = [*(a * c for c in self.c), b]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return U [V, rank] and W [rank, D], fp32, of the best approximation of the sum.

        Best directions come first. If all terms of the sum have the same W, U W is exactly the sum,
        for each rank.

        With A = [U_1, .., U_k] and B = [c_1 W_1; ..; c_k W_k] the sum is E = A B, and W are the
        eigenvectors of E^T E = B^T (A^T A) B of the largest eigenvalues, U = A (B W^T), like in
        `factorise`. Float64 loses singular values under 1e-8 of the largest; so does a table in
        fp32.
        """
        terms = [(c, *UW) for c, UW in zip(self.c, self.terms, strict=True) if c]
        if all(torch.equal(W, terms[0][2]) for _, _, W in terms):
            U = sum((c * U.double() for c, U, _ in terms), torch.zeros((), dtype=torch.float64))
            return U[:, :rank].float(), terms[0][2][:rank].clone()
        B = torch.cat([c * W.double() for c, _, W in terms])
        A = torch.cat([U for _, U, _ in terms], dim=1)
        W = principal_directions(B.T @ _gram(A, A) @ B, rank)
        BW = B @ W.T
        U = torch.cat([rows.double() @ BW for rows in A.split(ROWS)])
        return U.float(), W.float()

    def fit(self, U: Tensor, W: Tensor, rank: int) -> Fit:
        """Return the errors of U[:, :rank] W[:rank]."""

        def error(most: int | None) -> float:
            pairs = zip(self.c, self.terms, strict=True)
            wanted = [(c, U[:, :most], W[:most]) for c, (U, W) in pairs if c]
            return _distance((U[:, :rank], W[:rank]), wanted)

        return Fit(rank, error(None), error(rank))


def _gram(A: Tensor, B: Tensor) -> Tensor:
    """Return A^T B in float64, summed by chunks of rows."""
    total = torch.zeros(A.shape[1], B.shape[1], dtype=torch.float64)
    for a, b in zip(A.split(ROWS), B.split(ROWS), strict=True):
        total.addmm_(a.double().T, b.double())
    return total


def _inner(U: Tensor, W: Tensor, other_U: Tensor, other_W: Tensor) -> float:
    """Return <U W, U' W'>."""
    return float((_gram(U, other_U) * (W.double() @ other_W.double().T)).sum())


def _distance(
    stored: tuple[Tensor, Tensor], wanted: Sequence[tuple[float, Tensor, Tensor]]
) -> float:
    """Return |U W - sum_i c_i U_i W_i| / |sum_i c_i U_i W_i|.

    Computed by chunks of rows: a difference of inner products would lose half of the digits.
    """
    W, Ws = stored[1].double(), [W.double() for _, _, W in wanted]
    chunk = max(1, ROWS * 16 // W.shape[1])
    missed = whole = 0.0
    for begin in range(0, len(stored[0]), chunk):
        rows = slice(begin, begin + chunk)
        E = sum(
            (c * (U[rows].double() @ W) for (c, U, _), W in zip(wanted, Ws, strict=True)),
            torch.zeros((), dtype=torch.float64),
        )
        missed += float((stored[0][rows].double() @ W - E).square().sum())
        whole += float(E.square().sum())
    return math.sqrt(missed / whole) if whole else math.sqrt(missed)
