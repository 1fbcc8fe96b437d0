"""The nested embedding of a batch's tokens: its cases, its two numbers, its gate.

Letters: T tokens, n distinct ones, V rows of the vocabulary, R columns stored, r of them in use,
D width. The stream is Zipf's, exponent 1, frequencies scattered over the rows.

FLOPs. A token's row is r D products forward, twice that backward (dU and dW), needed once for each
distinct token: 2 n r D and 4 n r D. TFLOP/s count these, whatever a provider computes besides:
gathering first T rows, rebuilding the table V.

Bytes. Forward reads n r of U and r D of W and writes x, T D. Backward reads dx, T D, with n r of U
and r D of W again, and writes dU and dW as an optimiser wants them, dense: V R and R D. Factors in
their own dtype, x and dx in that of the products. Lists of tokens are less than 1 % of it.

The larger of the two times is the floor: bytes, in all cases here.
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

from .attention.bench import Checked
from .attention.cases import EPS32, dtype_on
from .harness import BACKWARD, FORWARD, TRAIN, Apart, Leaves, judged, poison, reason

Tensors = tuple[Tensor, ...]
NAMES = "x", "dU", "dW"


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    V: int
    D: int
    R: int
    rank: int
    T: int = 73_419  # of the batch that was measured on 2026-11-20
    masters: bool = False  # fp32 factors, products in half precision
    providers: tuple[str, ...] = ("ours", "rebuild_embedding", "rebuild", "eager", "compiled")
    modes: tuple[str, ...] = (TRAIN, FORWARD)

    @property
    def distinct(self) -> int:
        return TokenIndex.of(stream(self.T, self.V)).distinct


TESTS = ("embedding/*",)  # below tests/kernels/
# The most telling first: what time is left for shrinks from the end.
CASES = {
    case.name: case
    for case in (
        Case(name="step", V=151_936, D=1024, R=512, rank=512),
        Case(name="masters", V=151_936, D=1024, R=512, rank=512, masters=True),
        Case(name="rank64", V=151_936, D=1024, R=512, rank=64),
        Case(name="lealla", V=501_153, D=128, R=64, rank=64, masters=True),
    )
}
BREAKDOWN = "step", "masters"  # where ours is split into its kernels
BASELINES = "rebuild_embedding", "rebuild", "eager"  # speed-ups are printed against these
SWEEP_CASE = "step"  # where launch configurations are compared


def toy(case: Case) -> Case:
    """The same lines of code in seconds, on any device."""
    return replace(case, V=97, D=48, R=24, rank=min(case.rank, 24) if case.rank > 64 else 5, T=150)


@cache
def stream(T: int, V: int) -> Tensor:
    """int64 [T]: the token of rank k in frequency as often as 1 / k; which row it is, by chance."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    ranks = torch.multinomial(weights, T, replacement=True, generator=generator)
    return torch.randperm(V, generator=generator)[ranks]


# ---- the two numbers ----

PRODUCTS = {FORWARD: 1.0, BACKWARD: 2.0, TRAIN: 3.0}


def flops(case: Case, mode: str) -> float:
    """2 n r D forward, 4 n r D backward."""
    return PRODUCTS[mode] * 2 * case.distinct * case.rank * case.D


def nbytes(case: Case, mode: str) -> float:
    """Forward n r + r D of factors, T D; backward the same and V R + R D of their gradients."""
    factor = 4 if case.masters else 2
    read = factor * case.rank * (case.distinct + case.D) + 2 * case.T * case.D
    written = factor * case.R * (case.V + case.D)
    return float({FORWARD: read, BACKWARD: read + written, TRAIN: 2 * read + written}[mode])


def floors(case: Case, mode: str, tflops: float, gbs: float) -> dict[str, float]:
    """Milliseconds that no run can go under, at these ceilings."""
    return {
        "products": flops(case, mode) / tflops / 1e9,
        "bytes": nbytes(case, mode) / gbs / 1e6,
    }


def about(case: Case) -> str:
    dtype = "fp32, products bf16" if case.masters else "bf16"
    return (
        f"T = {case.T} (n = {case.distinct} distinct) of V = {case.V}, D = {case.D}, "
        f"rank {case.rank} of {case.R}, factors {dtype}"
    )


# ---- inputs and steps ----


class Factors(Leaves):
    """U and W, the tokens, and the gradient of what becomes of them."""

    def __init__(self, U: Tensor, W: Tensor, ids: Tensor, dx: Tensor) -> None:
        super().__init__()
        self.stacked = U.requires_grad_(), W.requires_grad_()
        self.ids, self.dx = ids, dx


def inputs(case: Case, device: torch.device, seed: int) -> Factors:
    """x of unit variance. All sets have the same tokens, which are counted on the host."""
    generator = torch.Generator(device).manual_seed(seed)
    half = dtype_on(device)
    dtype = torch.float32 if case.masters else half

    def normal(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        x = torch.randn(rows, columns, generator=generator, device=device, dtype=dtype)
        return x.mul_(scale)

    U = normal(case.V, case.R, dtype)
    W = normal(case.R, case.D, dtype, case.rank**-0.5)
    return Factors(U, W, stream(case.T, case.V).to(device), normal(case.T, case.D, half))


def prepare(inputs: Factors) -> tuple[Tensors, Tensors]:
    return inputs.stacked, (inputs.dx,)


def rebuild(ids: Tensor, U: Tensor, W: Tensor, rank: int) -> Tensor:
    """As the public ML-Embed code does it."""
    return (U[:, :rank] @ W[:rank])[ids]


def rebuild_embedding(ids: Tensor, U: Tensor, W: Tensor, rank: int) -> Tensor:
    return F.embedding(ids, U[:, :rank] @ W[:rank])


PEERS = {"rebuild": rebuild, "rebuild_embedding": rebuild_embedding, "eager": embed_ref}
NOTES = {"rebuild": "indexing; its gradient is added up by index_put"}


def build(name: str, case: Case, like: Factors, smoke: bool) -> tuple[Apart, str | None]:
    """A provider's step, and what has to be said of it, if anything."""
    ids, device = like.ids, like.dx.device
    function: Callable[..., Tensor] = PEERS.get(name, embed_ref)
    if name == "ours":
        o = TokenIndex.of(stream(case.T, case.V)).to(device)
        function = partial(embed, impl="triton", token_index=o)
    elif name == "compiled":
        function = torch.compile(embed_ref, backend="aot_eager" if smoke else "inductor")

    def step(U: Tensor, W: Tensor) -> Tensor:
        with torch.autocast(device.type, like.dx.dtype, enabled=case.masters):
            return function(ids, U, W, case.rank)

    if name == "ours":
        return Apart(step, prepare), None
    return Checked(step, prepare, partial(spot, case)), None  # type: ignore[arg-type]


# ---- right or not ----


@dataclass(frozen=True)
class Check:
    """A shape that hurts: one token, one token only, primes, ranks off by one from a tile."""

    name: str
    ids: tuple[int, ...]
    V: int = 499
    R: int = 192
    D: int = 320
    rank: int = 192
    masters: bool = False
    fp32: bool = False

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
    yield Check("rows of no 16 bytes", ids, R=67, rank=67, D=301)
    yield Check("one token", (498,))
    yield Check("one token only", (3,) * 5003)
    yield Check("every row", tuple(range(499)))


def differentiated(function: Callable[..., Tensor], U: Tensor, W: Tensor, dx: Tensor) -> Tensors:
    """x, dU, dW; also of who is timed without gradients."""
    leaves = U.detach().requires_grad_(), W.detach().requires_grad_()
    with torch.enable_grad():
        x = function(*leaves)
    return x.detach(), *torch.autograd.grad(x, leaves, dx.to(x.dtype))


def floor_of(dtype: torch.dtype) -> float:
    """Of the truth's size: half a step for a sum of dx, rounded before its products, half a step
    for the result; and what fp32 holds of a sum."""
    return torch.finfo(dtype).eps + 64 * EPS32


def verdict(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Output and gradients against float64 on the same bits; an error up to eager's is right."""
    generator = torch.Generator(device).manual_seed(17)
    shapes = (check.V, check.R), (check.R, check.D), (len(check.ids), check.D)
    U, W, dx = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    dx = dx.to(dtype)
    if not check.masters:
        U, W = U.to(dtype), W.to(dtype)
    ids = torch.tensor(check.ids, device=device)
    truth = differentiated(
        lambda U, W: embed_ref(ids, U, W, check.rank), U.double(), W.double(), dx.double()
    )
    # autocast has no fp32, and warns of it.
    half = check.masters and dtype != torch.float32
    with torch.autocast(device.type, dtype, enabled=half):
        eager = differentiated(lambda U, W: embed_ref(ids, U, W, check.rank), U, W, dx)
        poison(device)
        kernel = lambda U, W: embed(ids, U, W, check.rank, impl="triton")  # noqa: E731
        got, again = (differentiated(kernel, U, W, dx) for _ in "ab")
    parts = {
        name: judged(x, e, t, floor_of(dtype))
        for name, x, e, t in zip(NAMES, got, eager, truth, strict=True)
    }
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    ok = same and all(part["ok"] for part in parts.values())
    return {"ok": ok, "same_bits": same, "dtype": str(dtype).removeprefix("torch."), **parts}


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """One verdict for each check and dtype."""
    for check in checks():
        shape = f"T {len(check.ids)}, V {check.V}, D {check.D}, rank {check.rank} of {check.R}"
        for dtype in (dtype_on(device), torch.float32)[: 1 + check.fp32]:
            at = {"check": check.name, "shape": shape}
            try:
                yield at | verdict(check.toy() if smoke else check, dtype, device)
            except Exception as error:  # whatever it is, it is not right
                failed = {"ok": False, "dtype": str(dtype).removeprefix("torch.")}
                yield at | failed | {"error": reason(error)}


TOKENS = 64  # of which x and dU are formed in float64
COLUMNS = 64  # of dW
OTHER = 4  # steps of the dtype: a larger error is no rounding


def spot(case: Case, inputs: Factors, mode: str, got: Tensors) -> dict[str, Any]:
    """Some tokens and columns in float64: the most frequent token, rare ones, some that are not
    there. `ok` is for ours, as in the gate; `near` for others, who may round more.
    """
    U, W = (x.detach() for x in inputs.stacked)
    ids, dx, rank = inputs.ids, inputs.dx, case.rank
    absent = torch.ones(case.V, dtype=torch.bool)
    absent[stream(case.T, case.V)] = False
    present = TokenIndex.of(stream(case.T, case.V)).ids_n.long()
    every = present[torch.linspace(0, len(present) - 1, TOKENS).long()]
    tokens = torch.cat([every.unique(), absent.nonzero()[:, 0][:: max(case.V // 8, 1)]]).to(
        U.device
    )
    places = torch.isin(ids, tokens).nonzero()[:, 0]
    local = torch.full((case.V,), 0, device=U.device)
    local[tokens] = torch.arange(len(tokens), device=U.device)
    columns = slice(0, case.D, max(case.D // COLUMNS, 1))

    def by_hand(wide: bool) -> dict[str, Tensor]:
        u, w, d = (x.double() if wide else x for x in (U[tokens], W, dx))
        some = differentiated(
            lambda u, w: embed_ref(local[ids[places]], u, w, rank), u, w, d[places]
        )
        if mode == FORWARD:
            return {"x": some[0]}
        # Of all tokens: in float64 their rows once, summed before the products.
        if wide:
            s = torch.zeros(case.V, len(range(case.D)[columns]), dtype=d.dtype, device=U.device)
            s.index_add_(0, ids, d[:, columns])
            dW = torch.zeros_like(w[:, columns])
            dW[:rank] = U[:, :rank].double().T @ s
        else:
            whole = differentiated(
                lambda u, w: embed_ref(ids, u, w, rank), U, w[:, columns], d[:, columns]
            )
            dW = whole[2]
        return {"x": some[0], "dU": some[1], "dW": dW}

    with torch.autocast(U.device.type, dx.dtype, enabled=case.masters):
        eager = by_hand(False)
    truth = by_hand(True)
    mine = dict(zip(NAMES, (x.detach() for x in got), strict=False))
    parts = {"x": mine["x"][places]}
    if mode != FORWARD:
        parts |= {"dU": mine["dU"][tokens], "dW": mine["dW"][:, columns]}
    limit = max(OTHER * torch.finfo(dx.dtype).eps, 64 * EPS32)
    found: dict[str, Any] = {"ok": True, "near": True, "rms": {}}
    for name, x in parts.items():
        part = judged(x, eager[name], truth[name], floor_of(dx.dtype))
        found[name], found["rms"][name] = part, round(part["rms"], 7)
        found["ok"] &= part["ok"]
        found["near"] &= part["rms"] <= limit
    return found


# ---- targets ----

TIMES = 5.0  # as fast as the table's rebuild
PEAK_MIB = 64  # of temporaries
ABOVE_BYTES = 1.5  # times the floor of bytes


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for in `step`, and is aimed at in the others, forward and backward."""
    got = {
        (row["case"], row["provider"]): row
        for row in rows
        if row.get("ms") and row.get("green") is not False and row["mode"] == TRAIN
    }
    found = []
    for name in CASES:
        mine = got.get((name, "ours"))
        if mine is None:
            continue
        asked = "" if name == "step" else "aim "
        for baseline in ("rebuild_embedding", "rebuild"):
            if (row := got.get((name, baseline))) is not None:
                times = row["ms"] / mine["ms"]
                what = f"{name}, {TRAIN}: times {baseline}"
                found.append((what, times, f"{asked}>= {TIMES}", times >= TIMES))
        peak = mine.get("peak_mib")
        if peak is not None:
            what = f"{name}, {TRAIN}: MiB of temporaries"
            found.append((what, peak, f"{asked}<= {PEAK_MIB}", peak <= PEAK_MIB))
        above = 1 / mine["copy_share"]
        what = f"{name}, {TRAIN}: time / floor of bytes"
        found.append((what, above, f"aim <= {ABOVE_BYTES}", above <= ABOVE_BYTES))
    names = "target", "value", "limit", "met"
    return [dict(zip(names, values, strict=True)) for values in found]


# ---- launch configurations ----

SWEEP = {"embedding._op": TRAIN}  # module -> what is timed
# Beside the present entry, from which they take what they do not name.
CANDIDATES: dict[str, list[dict[str, int | None]]] = {
    "project": [
        {"maxnreg": None},
        {"num_stages": 2},
        {"BK": 32},
        {"BK": 32, "num_stages": 4},
        {"BN": 256, "maxnreg": None},
        {"BN": 256, "num_stages": 4, "maxnreg": None},
        {"BM": 64, "BN": 256, "maxnreg": None},
        {"BM": 64, "num_warps": 4, "maxnreg": None},
        {"BM": 64, "BN": 64, "num_warps": 4, "maxnreg": None},
    ],
    "sum": [
        {"AHEAD": 1},
        {"AHEAD": 2},
        {"AHEAD": 8},
        {"BM": 8},
        {"BM": 4, "BN": 512},
        {"BM": 8, "BN": 512},
        {"BM": 32, "BN": 128},
        {"BM": 4, "BN": 1024, "AHEAD": 2},
        {"num_warps": 8},
    ],
    "total": [{"BP": 16}, {"BP": 64}, {"BN": 64}, {"BN": 256}, {"num_warps": 8}],
    "gather": [{"BM": 4, "BN": 512}, {"BM": 32}, {"BN": 512}, {"num_warps": 8}],
}
