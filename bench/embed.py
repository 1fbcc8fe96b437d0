"""The nested embedding of a batch's tokens: cases, their FLOPs and bytes, peers, gate, targets.

Letters: T tokens, n distinct ones, V rows of the vocabulary, R columns stored, r of them in use,
D width. The tokens follow Zipf's law, exponent 1, frequencies scattered over the rows.

LOG.md has the arithmetic. TFLOP/s count 2 n r D products forward and 4 n r D backward for every
provider, also if it computes more (a gather first: T rows; the table rebuilt: V rows). Bytes are
those of the rows in use, of x and dx, and of dense dU and dW, each in its own dtype. The larger of
the two times is the floor: bytes, in all cases here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import TokenIndex
from mlembed_kernels.embedding.embed import embed, embed_ref

from . import harness
from .harness import BACKWARD, EPS32, FORWARD, TRAIN, Apart, Leaves, Tensors, differentiated
from .report import Row, Targets

NAMES = "x", "dU", "dW"
PRODUCTS = {FORWARD: 1.0, BACKWARD: 2.0, TRAIN: 3.0}
TESTS = ("embedding/*",)
BREAKDOWN = "step", "masters"
BASELINES = "rebuild_embedding", "rebuild", "eager"


@cache
def stream(T: int, V: int) -> Tensor:
    """Return int64 [T], tokens by Zipf's law: frequency 1 / rank, ranks scattered over the rows."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    ranks = torch.multinomial(weights, T, replacement=True, generator=generator)
    return torch.randperm(V, generator=generator)[ranks]


class Factors(Leaves):
    """U and W, the tokens, and the gradient of their rows."""

    def __init__(self, U: Tensor, W: Tensor, ids: Tensor, dx: Tensor) -> None:
        super().__init__()
        self.stacked = U.requires_grad_(), W.requires_grad_()
        self.ids, self.dx = ids, dx


@dataclass(frozen=True, kw_only=True)
class Case(harness.Case):
    """A batch and a vocabulary. masters: factors in fp32, products in half precision."""

    V: int
    D: int
    R: int
    rank: int
    T: int = 73_419  # of the batch that was measured on 2026-11-20
    masters: bool = False
    providers: tuple[str, ...] = ("ours", "rebuild_embedding", "rebuild", "eager", "compiled")

    @property
    def distinct(self) -> int:
        return TokenIndex.of(stream(self.T, self.V)).distinct

    @property
    def about(self) -> str:
        dtype = "fp32, products bf16" if self.masters else "bf16"
        return (
            f"T = {self.T} (n = {self.distinct} distinct) of V = {self.V}, D = {self.D}, "
            f"rank {self.rank} of {self.R}, factors {dtype}"
        )

    def toy(self) -> "Case":
        """Return the case in seconds, on any device."""
        rank = min(self.rank, 24) if self.rank > 64 else 5
        return replace(self, V=97, D=48, R=24, rank=rank, T=150)

    def inputs(self, device: torch.device, seed: int) -> Factors:
        """Return factors that give x unit variance. The tokens are the same for every seed."""
        generator = torch.Generator(device).manual_seed(seed)
        half = harness.dtype_on(device)
        dtype = torch.float32 if self.masters else half

        def normal(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            x = torch.randn(rows, columns, generator=generator, device=device, dtype=dtype)
            return x.mul_(scale)

        U = normal(self.V, self.R, dtype)
        W = normal(self.R, self.D, dtype, self.rank**-0.5)
        return Factors(U, W, stream(self.T, self.V).to(device), normal(self.T, self.D, half))

    def flops(self, mode: str) -> float:
        """Return 2 n r D forward, 4 n r D backward."""
        return PRODUCTS[mode] * 2 * self.distinct * self.rank * self.D

    def nbytes(self, mode: str) -> float:
        """Return n r + r D of factors and T D forward; backward the same, and V R + R D."""
        factor = 4 if self.masters else 2
        read = factor * self.rank * (self.distinct + self.D) + 2 * self.T * self.D
        written = factor * self.R * (self.V + self.D)
        return float({FORWARD: read, BACKWARD: read + written, TRAIN: 2 * read + written}[mode])


# The most telling first, as the last ones are skipped when time runs out.
CASES = {
    case.name: case
    for case in (
        Case(name="step", V=151_936, D=1024, R=512, rank=512),
        Case(name="masters", V=151_936, D=1024, R=512, rank=512, masters=True),
        Case(name="rank64", V=151_936, D=1024, R=512, rank=64),
        Case(name="lealla", V=501_153, D=128, R=64, rank=64, masters=True),
    )
}


# ---- steps ----


def rebuild(ids: Tensor, U: Tensor, W: Tensor, rank: int) -> Tensor:
    """Rebuild the table and index it, like the public ML-Embed code."""
    return (U[:, :rank] @ W[:rank])[ids]


def rebuild_embedding(ids: Tensor, U: Tensor, W: Tensor, rank: int) -> Tensor:
    return F.embedding(ids, U[:, :rank] @ W[:rank])


PEERS = {"rebuild": rebuild, "rebuild_embedding": rebuild_embedding, "eager": embed_ref}


def build(name: str, case: Case, like: Factors, smoke: bool) -> tuple[Apart, str | None]:
    ids, device = like.ids, like.dx.device
    function: Callable[..., Tensor] = PEERS.get(name, embed_ref)
    if name == "ours":
        index = TokenIndex.of(stream(case.T, case.V)).to(device)
        function = partial(embed, impl="triton", token_index=index)
    elif name == "compiled":
        function = torch.compile(embed_ref, backend="aot_eager" if smoke else "inductor")

    def step(U: Tensor, W: Tensor) -> Tensor:
        with torch.autocast(device.type, like.dx.dtype, enabled=case.masters):
            return function(ids, U, W, case.rank)

    def prepare(inputs: Factors) -> tuple[Tensors, Tensors]:
        return inputs.stacked, (inputs.dx,)

    return Apart(step, prepare, None if name == "ours" else partial(spot, case)), None


# ---- right or not ----


@dataclass(frozen=True)
class Check:
    """A difficult shape: one token, a token that fills the batch, primes, ranks next to a tile."""

    name: str
    ids: tuple[int, ...]
    V: int = 499
    R: int = 192
    D: int = 320
    rank: int = 192
    masters: bool = False
    fp32: bool = False

    @property
    def about(self) -> str:
        return f"T {len(self.ids)}, V {self.V}, D {self.D}, rank {self.rank} of {self.R}"

    def toy(self) -> "Check":
        ids = tuple(i % 31 for i in self.ids[:70])
        return replace(self, ids=ids, V=31, R=24, D=min(self.D, 48), rank=min(self.rank, 24))


def checks() -> Iterator[Check]:
    ids = tuple(stream(3001, 499).tolist())
    yield Check("stream", ids, fp32=True)
    yield Check("masters", ids, masters=True)
    yield Check("rank 1", ids, rank=1)
    yield Check("rank 64", ids, rank=64)
    yield Check("rank 65", ids, rank=65, fp32=True)
    yield Check("unaligned rows", ids, R=67, rank=67, D=301)
    yield Check("one token", (498,))
    yield Check("one token only", (3,) * 5003)
    yield Check("every row", tuple(range(499)))


def floor_of(dtype: torch.dtype) -> float:
    """Return an error, relative to the truth's size, that rounding explains.

    Half a step for a sum of dx, rounded before its products, half a step for the result, and the
    error of fp32 sums.
    """
    return torch.finfo(dtype).eps + 64 * EPS32


def verdict(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Compare output and gradients with float64 on the same bits."""
    generator = torch.Generator(device).manual_seed(17)
    shapes = (check.V, check.R), (check.R, check.D), (len(check.ids), check.D)
    U, W, dx = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    dx = dx.to(dtype)
    if not check.masters:
        U, W = U.to(dtype), W.to(dtype)
    ids = torch.tensor(check.ids, device=device)
    reference = partial(embed_ref, ids, rank=check.rank)
    truth = differentiated(reference, (U.double(), W.double()), dx.double())
    # Autocast to fp32 does not exist, and warns.
    half = check.masters and dtype != torch.float32
    with torch.autocast(device.type, dtype, enabled=half):
        eager = differentiated(reference, (U, W), dx)
        harness.poison(device)
        kernel = partial(embed, ids, rank=check.rank, impl="triton")
        got, again = (differentiated(kernel, (U, W), dx) for _ in "ab")
    return harness.verdict(NAMES, [floor_of(dtype)] * 3, got, again, eager, truth)


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    half = harness.dtype_on(device)
    return harness.gate(harness.trials(checks(), verdict, half, device, smoke))


TOKENS = 64  # whose x and dU are computed in float64
COLUMNS_OF_W = 64  # whose dW is


def spot(case: Case, inputs: Factors, mode: str, got: Tensors) -> dict[str, Any]:
    """Compare some tokens and columns with float64: the most frequent, rare and absent tokens."""
    U, W = (x.detach() for x in inputs.stacked)
    ids, dx, rank = inputs.ids, inputs.dx, case.rank
    absent = torch.ones(case.V, dtype=torch.bool)
    absent[stream(case.T, case.V)] = False
    present = TokenIndex.of(stream(case.T, case.V)).ids_n.long()
    every = present[torch.linspace(0, len(present) - 1, TOKENS).long()].unique()
    unused = absent.nonzero()[:, 0][:: max(case.V // 8, 1)]
    tokens = torch.cat([every, unused]).to(U.device)
    places = torch.isin(ids, tokens).nonzero()[:, 0]
    local = torch.full((case.V,), 0, device=U.device)
    local[tokens] = torch.arange(len(tokens), device=U.device)
    columns = slice(0, case.D, max(case.D // COLUMNS_OF_W, 1))

    def by_hand(wide: bool) -> dict[str, Tensor]:
        u, w, d = (x.double() if wide else x for x in (U[tokens], W, dx))
        rows = partial(embed_ref, local[ids[places]], rank=rank)
        x, dU, _ = differentiated(rows, (u, w), d[places])
        if mode == FORWARD:
            return {"x": x}
        if wide:  # sums the rows of dx that share a token, then one product
            s = torch.zeros(case.V, len(range(case.D)[columns]), dtype=d.dtype, device=U.device)
            s.index_add_(0, ids, d[:, columns])
            dW = torch.zeros_like(w[:, columns])
            dW[:rank] = U[:, :rank].double().T @ s
        else:
            everything = partial(embed_ref, ids, rank=rank)
            dW = differentiated(everything, (U, w[:, columns]), d[:, columns])[2]
        return {"x": x, "dU": dU, "dW": dW}

    with torch.autocast(U.device.type, dx.dtype, enabled=case.masters):
        eager = by_hand(False)
    truth = by_hand(True)
    mine = dict(zip(NAMES, (x.detach() for x in got), strict=False))
    parts = {"x": mine["x"][places]}
    if mode != FORWARD:
        parts |= {"dU": mine["dU"][tokens], "dW": mine["dW"][:, columns]}
    three = {name: (x, eager[name], truth[name]) for name, x in parts.items()}
    return harness.spot_check(three, floor_of(dx.dtype), dx.dtype)


# ---- targets ----

TIMES = 5.0  # as fast as the table's rebuild
PEAK_MIB = 64  # of temporaries
ABOVE_BYTES = 1.5  # times the floor of bytes


def targets(rows: list[Row]) -> list[Row]:
    """Compare with the targets, which are required of `step` and aimed at in the other cases."""
    targets = Targets(rows)
    for name in CASES:
        mine, aim, at = targets.row(name, "ours", TRAIN), name != "step", f"{name}, {TRAIN}"
        if mine is None:
            continue
        for baseline in ("rebuild_embedding", "rebuild"):
            if (row := targets.row(name, baseline, TRAIN)) is not None:
                targets.add(f"{at}: times {baseline}", row["ms"] / mine["ms"], ">=", TIMES, aim)
        if mine.get("peak_mib") is not None:
            targets.add(f"{at}: MiB of temporaries", mine["peak_mib"], "<=", PEAK_MIB, aim)
        above = 1 / mine["copy_share"]
        targets.add(f"{at}: time / floor of bytes", above, "<=", ABOVE_BYTES, aim=True)
    return targets.listed


# ---- launch configurations ----

SWEEP_CASE = "step"
SWEEP = {"embedding._op": TRAIN}
# Options that differ from the present entry.
CANDIDATES: dict[str, list[dict[str, int | None]]] = {
    "project": [
        {"maxnreg": None}, {"num_stages": 2}, {"BK": 32}, {"BK": 32, "num_stages": 4},
        {"BN": 256, "maxnreg": None}, {"BN": 256, "num_stages": 4, "maxnreg": None},
        {"BM": 64, "BN": 256, "maxnreg": None}, {"BM": 64, "num_warps": 4, "maxnreg": None},
        {"BM": 64, "BN": 64, "num_warps": 4, "maxnreg": None},
    ],
    "sum": [
        {"AHEAD": 1}, {"AHEAD": 2}, {"AHEAD": 8}, {"BM": 8}, {"BM": 4, "BN": 512},
        {"BM": 8, "BN": 512}, {"BM": 32, "BN": 128}, {"BM": 4, "BN": 1024, "AHEAD": 2},
        {"num_warps": 8},
    ],
    "total": [{"BP": 16}, {"BP": 64}, {"BN": 64}, {"BN": 256}, {"num_warps": 8}],
    "gather": [{"BM": 4, "BN": 512}, {"BM": 32}, {"BN": 512}, {"num_warps": 8}],
}  # fmt: skip
