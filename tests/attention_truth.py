"""Batches for packed attention, its results for them, and a test of their distance to float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlembed_kernels import attention, attention_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where impl="triton" runs
# Triton's interpreter multiplies the bits of bf16 as integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
NAMES = "out", "dq", "dk", "dv"
Qkv = Sequence[Tensor]


def inputs(
    lengths: list[int], heads: tuple[int, int] = (4, 2), K: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in float64; twice unit variance, so that softmax is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    return tuple(
        2 * torch.randn(T, H, K, generator=generator, dtype=torch.float64)
        for H in (heads[0], heads[1], heads[1])
    )


def on(device: str, dtype: torch.dtype, qkv: Qkv) -> list[Tensor]:
    return [x.to(device, dtype) for x in qkv]


def bounds(lengths: list[int], device: str | torch.device = "cpu") -> Tensor:
    """Return cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def cotangent(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like)


def results(
    function: Callable[..., Tensor], qkv: Qkv, *, do: Tensor | None = None, **options
) -> dict[str, Tensor]:
    """Return output and gradients of q, k, v for a fixed random cotangent."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = function(*leaves, **options)
    do = cotangent(out.shape, out) if do is None else do
    return dict(zip(NAMES, [out.detach(), *torch.autograd.grad(out, leaves, do)], strict=True))


def triton(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return attention(q, k, v, impl="triton", **options)


def run(qkv: Qkv, lengths: list[int], causal: bool = True, **options) -> dict[str, Tensor]:
    """Run Triton's attention, in fp32 unless the inputs are narrower."""
    if qkv[0].dtype == torch.float64:
        qkv = on(DEVICE, torch.float32, qkv)
    options = {"cu_seqlens": bounds(lengths), "causal": causal, **options}
    return results(triton, qkv, **options)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor], rows: slice | Tensor = slice(None)):
    for name in NAMES:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name][rows], b[name][rows]), name


def rows_of(lengths: list[int], chosen: Sequence[int]) -> Tensor:
    """bool [T]: tokens of the chosen sequences."""
    here = torch.zeros(len(lengths), dtype=torch.bool)
    here[list(chosen)] = True
    return here.repeat_interleave(torch.tensor(lengths))


def assert_as_exact(
    got: dict[str, Tensor], qkv: Qkv, lengths: list[int], *, cancels: bool = False, **options
) -> None:
    """Assert errors of at most the plain loop's in the same dtype on the same bits, and a few
    roundings: one of half precision, four of fp32 (sums in another order), and of what is fp32 in
    any dtype: a score near z, less the logarithm of a sum, is known to a step of z there; the
    gradient of scores is a difference, dp - delta, of numbers that may be larger than it.

    cancels: gradients are 0 except for the rounding of their summands.
    """
    dtype = got["out"].dtype
    options = {"cu_seqlens": bounds(lengths), **options}
    qkv = on("cpu", dtype, qkv)
    do = cotangent(qkv[0].shape, qkv[0])
    wide = on("cpu", torch.float64, [*qkv, do])
    truth = results(attention_ref, wide[:3], do=wide[3], **options)
    eager = results(attention_ref, qkv, do=do, **options)

    def largest(x: Tensor, y: Tensor) -> float:
        """Product of a head's token with a token of the head it reads."""
        y = y.repeat_interleave(x.shape[1] // y.shape[1], dim=1)
        return torch.einsum("thk,shk->hts", x, y).abs().max().item()

    q, k, v, do = wide
    factor = options.get("scale")
    factor = abs(q.shape[-1] ** -0.5 if factor is None else factor)
    z, dp = factor * largest(q, k), factor * largest(do, v)
    terms = {"dq": dp * k.abs().max().item(), "dk": dp * q.abs().max().item()}
    fine = torch.finfo(torch.float32).eps
    if dtype == torch.float32:
        step = fine * (4 + z * (1 if DEVICE == "cpu" else 4))  # products of three tf32 ones
    else:
        step = torch.finfo(dtype).eps + fine * z
    step_of_terms = torch.finfo(dtype).eps if cancels else 4 * fine
    for name, want in truth.items():
        a, b = got[name].double().cpu(), eager[name].double()
        assert got[name].dtype == dtype and a.shape == want.shape
        assert a.isfinite().all(), name
        floor = step * want.abs().max().item() + step_of_terms * terms.get(name, 0.0)
        error, allowed = ((x - want).abs().max().item() for x in (a, b))
        assert error <= allowed + floor, f"{name}: error {error}, eager {allowed}, floor {floor}"


# Sequences 0, 1, 2 share a tile and 4, 5 another, on either side of a long one.
LENGTHS = [3, 5, 2, 66, 1, 4]
HALF = torch.float16


def batch(
    dtype: torch.dtype = HALF, lengths: list[int] = LENGTHS, heads: tuple[int, int] = (2, 1)
) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v and the gradient of the output, on DEVICE."""
    qkv = on(DEVICE, dtype, inputs(lengths, heads))
    return qkv, cotangent(qkv[0].shape, qkv[0])
