"""Inputs of the nested embedding, and its errors against float64 next to those of eager."""

import importlib

import torch
from torch import Tensor

from mlembed_kernels import embed
from mlembed_kernels.embedding.token_index import PART

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # bf16 is wrong in the interpreter
EPS32 = torch.finfo(torch.float32).eps
NAMES = "x", "dU", "dW"
DTYPES = torch.float32, HALF


def module():
    return importlib.import_module("mlembed_kernels.embedding._op")


def zipf(T: int, V: int) -> list[int]:
    weight = 1 / torch.arange(1, V + 1)
    generator = torch.Generator().manual_seed(1)
    return torch.multinomial(weight, T, replacement=True, generator=generator).tolist()


V, R, D = 401, 80, 160  # no multiples of a tile, but rows of 16 bytes; others in test_widths
# One token; a prime of them; every row of the table, so that tiles are full but the last; one token
# in many parts, and in as two steps of `total` sum; parts full, off by one, and of two
# tokens; first and last row only; a stream with all of it, whose parts fill three tiles.
TIMES = PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1, 1
IDS = {
    "one": [7],
    "prime": [(5 * i * i) % V for i in range(13)],
    "distinct": [(3 * i) % V for i in range(V)],
    "same": [3] * 1009,
    "parts": [token for token in range(5, -1, -1) for _ in range(TIMES[token])],
    "ends": [0, V - 1, V - 1, 0, V - 1],
    "stream": zipf(1200, V),
}
RANKS = 1, 64, 65, R
# Where the values are tried elsewhere: interpreted, a stream takes ten times as long.
SHORT = "stream" if DEVICE == "cuda" else "parts"


def factors(dtype: torch.dtype, V: int = V, R: int = R, D: int = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    U, W = torch.randn(V, R, generator=generator), torch.randn(R, D, generator=generator)
    return U.to(DEVICE, dtype), W.to(DEVICE, dtype)


def cotangent(ids: list[int] | Tensor, D: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(ids), D, generator=generator).to(DEVICE, dtype)


def run(ids, U: Tensor, W: Tensor, rank: int, dx: Tensor, impl: str = "triton", **options):
    """x, dU, dW by name."""
    ids = torch.as_tensor(ids, device=DEVICE)
    U, W = (x.detach().requires_grad_() for x in (U, W))
    x = embed(ids, U, W, rank, impl=impl, **options)
    return dict(zip(NAMES, (x.detach(), *torch.autograd.grad(x, (U, W), dx)), strict=True))


def as_exact(ids, U: Tensor, W: Tensor, rank: int, dx: Tensor) -> dict[str, Tensor]:
    """Within eager's error on the same bits, and a floor: a step of the dtype, half of it as a sum
    of dx is rounded before its product, half as that is; and some of fp32, in which sums are.
    """
    got, eager = (run(ids, U, W, rank, dx, impl) for impl in ("triton", "reference"))
    with torch.autocast(DEVICE, enabled=False):
        truth = run(ids, U.double(), W.double(), rank, dx.double(), "reference")
    floor = torch.finfo(dx.dtype).eps + 64 * EPS32
    for name in NAMES:
        assert got[name].dtype == eager[name].dtype and got[name].shape == eager[name].shape
        size = truth[name].abs().max().item()
        ours, theirs = ((g[name].double() - truth[name]).abs().max() for g in (got, eager))
        assert ours <= theirs + floor * size, (name, ours / size, theirs / size)
    return got


def summable(*tensors: Tensor) -> list[Tensor]:
    """Return whole numbers in the interpreter: numpy's sums of a row may depend on its place."""
    return [x if DEVICE == "cuda" else (4 * x).round() for x in tensors]


def same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in want:
        assert torch.equal(got[name], want[name]), name
