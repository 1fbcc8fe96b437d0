"""The low-rank nested vocabulary: module, factorisation, and inner products of its tables."""

import dataclasses
import hashlib
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mlembed_kernels import TokenIndex, embed

from .. import config
from ..runtime.files import flush


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

    def forward(
        self, ids_T: Tensor, rank: int | None, token_index: TokenIndex | None = None
    ) -> Tensor:
        """-> [T, D] in the weights' dtype, or autocast's."""
        if self.ranks:
            rank = self.ranks[-1] if rank is None else rank
            return embed(ids_T, self.U, self.W, rank, token_index=token_index)
        V = len(self.weight)
        if token_index is not None and not 0 <= token_index.lowest <= token_index.highest < V:
            found = f"{token_index.lowest}..{token_index.highest}"
            raise ValueError(f"ids: expected tokens in 0..{V - 1}, got {found}")
        rows_TD = F.embedding(ids_T, self.weight)
        if torch.is_autocast_enabled(ids_T.device.type):
            return rows_TD.to(torch.get_autocast_dtype(ids_T.device.type))
        return rows_TD

    def table(self, rank: int | None = None) -> Tensor:
        """The merged table E(r) [V, D]. ValueError for a rank that is not stored."""
        if not self.ranks:
            return self.weight.clone()
        rank = self.ranks[-1] if rank is None else rank
        ids = torch.arange(len(self.U), device=self.U.device)
        return embed(ids, self.U, self.W, rank, impl="reference")


Method = Literal["soup", "slerp"]
PARALLEL = 1e-6  # sin Omega under which two tensors have no plane between them
ROWS = 2**16  # rows of factors in float64 at once


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


CACHED = 1  # version of what `factorise` computes and how the cache holds it
CHUNK = 2**23  # elements of a table in float64 at once: 64 MiB


# ---- the vocabulary's factors ----


def factorise(table: Tensor, rank: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Truncated SVD of E [V, D] -> U [V, R] and W [R, D] in fp32, best directions first (ML-Embed).

    Minimises sum_v c_v |E_v - U_v W|^2, with c_v = counts_v + 1, or 1 without counts: the more
    often a token occurs, the nearer it is kept, and none is given up. For rows W that are
    orthonormal the best U_v is E_v W^T, whatever c_v, and what it misses is
    sum_v c_v |E_v|^2 - tr(W G W^T) with G = sum_v c_v E_v^T E_v = E^T C E, least for the
    eigenvectors of G of the largest eigenvalues: those of the SVD of sqrt(C) E. The first r
    columns and rows are therefore the factors of rank r.

    G [D, D] is summed in float64 by chunks of rows, as V is far larger than D. An eigenvector's
    sign is arbitrary: its largest component is made positive.

    Args:
        table: [V, D], any floating dtype.
        rank: 1..D.
        counts: [V], how often each token occurs, int or float.

    Raises:
        ValueError: another rank, counts that are not V numbers of 0 or more, a table with
            infinities or NaN.
    """
    V, D = table.shape
    if not 1 <= rank <= D:
        raise ValueError(f"rank: expected 1..{D} (the table's width), got {rank}")
    gram_DD = torch.zeros(D, D, dtype=torch.float64)
    root_V1 = _checked(counts, V).sqrt()[:, None]
    rows = max(1, CHUNK // D)
    for begin in range(0, V, rows):
        some = slice(begin, begin + rows)
        E = table[some].to(torch.float64, copy=True).mul_(root_V1[some])
        gram_DD.addmm_(E.T, E)
    if not gram_DD.isfinite().all():
        raise ValueError("embed_tokens.weight: expected finite numbers, found others")
    W = torch.linalg.eigh(gram_DD)[1].flip(-1)[:, :rank].T.contiguous()
    W *= W.gather(1, W.abs().argmax(1, keepdim=True)).sign()
    U = torch.empty(V, rank, dtype=torch.float32)
    for begin in range(0, V, rows):
        some = slice(begin, begin + rows)
        U[some] = table[some].double() @ W.T
    return U, W.float()


def _checked(counts: Tensor | None, V: int) -> Tensor:
    """c_v in float64 [V], see `factorise`."""
    if counts is None:
        return torch.ones(V, dtype=torch.float64)
    if counts.shape != (V,):
        got = list(counts.shape)
        raise ValueError(f"counts: expected a number for each of {V} tokens, got shape {got}")
    if not (counts.isfinite() & (counts >= 0)).all():
        raise ValueError("counts: expected finite numbers of 0 or more, found others")
    return counts.double() + 1


def cached_factors(table: Tensor, rank: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`factorise`, computed once: later calls, in any process, read the result from disk.

    It is kept in $MLEMBED_CACHE/factors, by default ~/.cache/mlembed/factors, under a name that
    depends on every bit of the arguments. A file that is damaged is replaced; one that cannot be
    written is a warning. ValueErrors are those of `factorise`.
    """
    V, D = table.shape
    given = [table] if counts is None else [table, counts]
    key = _digest(f"factors {CACHED}, rank {rank}", *given)
    home = os.path.expanduser(os.environ.get("MLEMBED_CACHE") or "~/.cache/mlembed")
    path = Path(home) / "factors" / f"{key}.safetensors"
    if (found := _read_factors(path, (V, rank, D))) is not None:
        return found
    U, W = factorise(table, rank, counts)
    try:
        _write_factors(path, U, W)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"{path}: factors of the vocabulary could not be kept there, and will be computed "
            f"again: {error}",
            stacklevel=2,
        )
    return U, W


def _read_factors(path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor] | None:
    """U [V, R] and W [R, D] of a cached file, shape being (V, R, D); None where it has not them."""
    V, R, D = shape
    try:
        with safe_open(path, framework="pt") as tensors:
            U, W = tensors.get_tensor("U"), tensors.get_tensor("W")
            digest = (tensors.metadata() or {}).get("digest")
    except (OSError, SafetensorError, RuntimeError):  # torch's own, if the file goes meanwhile
        return None
    whole = U.shape == (V, R) and W.shape == (R, D) and digest == _digest(path.stem, U, W)
    return (U, W) if whole else None


def _write_factors(path: Path, U: Tensor, W: Tensor) -> None:
    """As a whole, whoever else writes it: in a directory of this process's own, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as partial:
        file = Path(partial) / path.name
        save_file({"U": U, "W": W}, file, metadata={"digest": _digest(path.stem, U, W)})
        flush(file)
        file.replace(path)
    flush(path.parent)


def _digest(note: str, *tensors: Tensor) -> str:
    """sha256 of a note and of tensors' dtypes, shapes and bytes."""
    total = hashlib.sha256(note.encode())
    for tensor in tensors:
        total.update(f"\n{tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        total.update(flat.view(torch.uint8).numpy().data)  # numpy knows bytes, but no bf16
    return total.hexdigest()


def warn_beyond_break_even(cfg: config.Model) -> None:
    """UserWarning where ranks are so high that U and W hold more than a plain table would.

    R (V + D) > V D, so beyond the break-even V D / (V + D), a little less than D.
    """
    V, D = cfg.vocab_size, cfg.hidden_size
    most = V * D // (V + D)
    if beyond := [str(rank) for rank in cfg.ranks if rank > most]:
        warnings.warn(
            f"model.ranks: expected at most the break-even {most} of {V} tokens by width {D}, got "
            f"{', '.join(beyond)}: these factors hold more than the plain table; leave them out, "
            "or all ranks for the table itself",
            stacklevel=2,
        )
