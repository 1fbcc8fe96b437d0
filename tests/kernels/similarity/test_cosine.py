"""Cosines of given pairs against float64, by both implementations: Triton under its interpreter
where there is no GPU."""

import importlib.util

import loss_truth
import pytest
import torch
from loss_truth import DEVICE, assert_as_exact, results, rounded, vectors

from mlembed_kernels.similarity.cosine import cosine, cosine_ref

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
IMPLS = ["reference", pytest.param("triton", marks=triton)]
impls = pytest.mark.parametrize("impl", IMPLS)

# (E, R, K, D, dims): one of everything; one partner (as positives have); primes; more rows and
# partners than a tile has; prefixes of one coordinate, of no power of two, of many widths; vectors
# that go on behind the last prefix.
SHAPES = {
    "ones": (1, 1, 1, 1, (1,)),
    "one_partner": (2, 37, 1, 13, (1, 3, 11)),
    "primes": (3, 5, 7, 29, (5, 23)),
    "tiles": (1, 67, 3, 130, (64, 129)),
    "many_partners": (1, 3, 67, 24, (7, 24)),
    "many_prefixes": (1, 3, 2, 323, (8, 16, 32, 64, 128, 320)),
    "no_rows": (2, 0, 3, 13, (3, 11)),
    "no_partners": (2, 5, 0, 13, (3, 11)),
}


def inputs(
    E: int = 2, R: int = 5, K: int = 3, D: int = 13, dims: tuple[int, ...] = (3, 11)
) -> dict:
    return {"x": vectors(E, R, D, seed=1), "y": vectors(E, R, K, D, seed=2), "dims": dims}


def check(impl: str, given: dict, dtype: torch.dtype = torch.float32) -> dict:
    """Against the truth: the reference in float64, Triton in `dtype`."""

    def run(**rest):
        return cosine(**rest, impl=impl)

    if impl == "reference":
        got, want = results(run, given), results(loss_truth.cosine, given)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12)
        return got
    given = rounded(given, dtype)
    got, allowed = results(run, given, dtype, DEVICE), results(cosine_ref, given, dtype)
    assert {n: (x.shape, x.dtype) for n, x in got.items()} == {
        n: (x.shape, x.dtype) for n, x in allowed.items()
    }
    # Gradients are differences of terms of 1 / length, which in one dimension are equal.
    assert_as_exact(got, allowed, results(loss_truth.cosine, given), 1.0, dtype, terms=1.0)
    return got


@impls
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_truth(impl, shape):
    E, R, K, _, dims = shape
    got = check(impl, inputs(*shape))
    assert got["output 0"].shape == (E, len(dims), R, K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype):
    given = rounded(inputs(), dtype)
    got, want = (results(cosine_ref, given, x) for x in (dtype, torch.float32))
    assert torch.equal(got["output 0"], want["output 0"])
    for name in ("gradient of x", "gradient of y"):
        assert got[name].dtype == dtype and torch.equal(got[name], want[name].to(dtype))


@triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    check("triton", inputs(), dtype)


@impls
def test_zero_prefixes(impl):
    """Cosine 0, and the gradient of a product with the other's direction."""
    given = inputs()
    given["x"][0, 1, :3] = 0
    given["x"][1, 2] = 0
    given["y"][0, 1, 2, :3] = 0
    given["y"][1, 4, 1] = 0
    got = check(impl, given)
    cos = got["output 0"]
    assert (cos[0, 0, 1] == 0).all() and (cos[1, :, 2] == 0).all() and (cos[1, :, 4, 1] == 0).all()
    assert got["gradient of x"][1, 2].abs().max() > 0


@impls
def test_a_length_about_1e_minus_12(impl):
    """Up to there a vector counts as it is, from there on its length does not."""
    for length, unit in ((5e-13, 5e-13), (2e-12, 1.0)):
        x = torch.tensor([[[0.6, -0.8]]], device=DEVICE) * length
        y = torch.tensor([[[[3.0, -4.0]]]], device=DEVICE)
        got = cosine(x, y, dims=(2,), impl=impl).item()
        assert got == pytest.approx(unit, rel=1e-5)


@impls
def test_lengths_do_not_matter(impl):
    given = {n: x.float().to(DEVICE) if n in "xy" else x for n, x in inputs().items()}
    want = cosine(**given, impl=impl)
    given["x"] = given["x"] * torch.logspace(-9, 9, 5, device=DEVICE)[:, None]
    given["y"] = given["y"] * torch.logspace(9, -9, 5, device=DEVICE)[:, None, None]
    torch.testing.assert_close(cosine(**given, impl=impl), want, rtol=0, atol=1e-6)


@impls
def test_not_a_number_is_seen_by_its_pairs_only(impl):
    given = {n: x.float().to(DEVICE) if n in "xy" else x for n, x in inputs().items()}
    given["x"][0, 1, 4] = torch.nan  # behind prefix 3
    given["y"][1, 3, 2, 0] = torch.nan
    bad = torch.zeros(2, 2, 5, 3, dtype=torch.bool)
    bad[0, 1, 1] = bad[1, :, 3, 2] = True
    assert torch.equal(cosine(**given, impl=impl).isnan().cpu(), bad)


@impls
def test_strides(impl):
    x = vectors(13, 5, 2).float().to(DEVICE).permute(2, 1, 0)
    one = vectors(2, 1, 3, 13).float().to(DEVICE).expand(2, 5, 3, 13)  # the same for all rows
    some = vectors(2, 5, 6, 20).float().to(DEVICE)[:, :, 1::2, 2:15]
    for y in (one, some):
        assert not x.is_contiguous() and not y.is_contiguous()
        outs = []
        for pair in ((x, y), (x.contiguous(), y.contiguous())):
            leaves = [v.detach().requires_grad_() for v in pair]
            cos = cosine(*leaves, dims=(3, 11), impl=impl)
            outs.append([cos, *torch.autograd.grad(cos.sum(), leaves)])
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@impls
def test_two_calls_give_the_same_bits(impl):
    a, b = (
        results(lambda **rest: cosine(**rest, impl=impl), inputs(), torch.float32, DEVICE)
        for _ in range(2)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_auto_is_the_reference_for_float64():
    assert torch.equal(cosine(**inputs()), cosine_ref(**inputs()))
