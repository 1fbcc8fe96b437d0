"""Cosines of given pairs against float64; Triton runs under its interpreter without a GPU."""

import loss_truth
import pytest
import torch
from loss_truth import DEVICE, impls, results, rounded, vectors
from loss_truth import check as check_truth

from mlembed_kernels.similarity.cosine import cosine, cosine_ref

# (E, R, K, D, dims): one of everything; one partner, like positives; primes; more rows and partners
# than a tile; prefixes of one coordinate, not powers of two, of many widths; vectors wider than the
# last prefix.
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


def on_device() -> dict:
    return {n: x.float().to(DEVICE) if n in "xy" else x for n, x in inputs().items()}


def check(impl: str, given: dict, dtype: torch.dtype = torch.float32) -> dict:
    # Gradients are differences of terms of 1 / length, which in one dimension are equal.
    how = {"temperature": 1.0, "terms": 1.0}
    return check_truth(impl, cosine, loss_truth.cosine, given, dtype, **how)


@impls
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_truth(impl, shape):
    E, R, K, _, dims = shape
    got = check(impl, inputs(*shape))
    assert got["output 0"].shape == (E, len(dims), R, K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_fp32(dtype):
    given = rounded(inputs(), dtype)
    got, want = (results(cosine_ref, given, x) for x in (dtype, torch.float32))
    assert torch.equal(got["output 0"], want["output 0"])
    for name in ("gradient of x", "gradient of y"):
        assert got[name].dtype == dtype and torch.equal(got[name], want[name].to(dtype))


@loss_truth.triton
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
@pytest.mark.parametrize(("length", "unit"), [(5e-13, 5e-13), (2e-12, 1.0)])
def test_vectors_above_1e_minus_12_are_normalised(impl, length, unit):
    x = torch.tensor([[[0.6, -0.8]]], device=DEVICE) * length
    y = torch.tensor([[[[3.0, -4.0]]]], device=DEVICE)
    assert cosine(x, y, dims=(2,), impl=impl).item() == pytest.approx(unit, rel=1e-5)


@impls
def test_length_invariance(impl):
    given = on_device()
    want = cosine(**given, impl=impl)
    given["x"] = given["x"] * torch.logspace(-9, 9, 5, device=DEVICE)[:, None]
    given["y"] = given["y"] * torch.logspace(9, -9, 5, device=DEVICE)[:, None, None]
    torch.testing.assert_close(cosine(**given, impl=impl), want, rtol=0, atol=1e-6)


@impls
def test_nan_stays_in_its_pairs(impl):
    given = on_device()
    given["x"][0, 1, 4] = torch.nan  # Behind prefix 3.
    given["y"][1, 3, 2, 0] = torch.nan
    bad = torch.zeros(2, 2, 5, 3, dtype=torch.bool)
    bad[0, 1, 1] = bad[1, :, 3, 2] = True
    assert torch.equal(cosine(**given, impl=impl).isnan().cpu(), bad)


@impls
def test_strides(impl):
    x = vectors(13, 5, 2).float().to(DEVICE).permute(2, 1, 0)
    one = vectors(2, 1, 3, 13).float().to(DEVICE).expand(2, 5, 3, 13)  # The same for all rows.
    some = vectors(2, 5, 6, 20).float().to(DEVICE)[:, :, 1::2, 2:15]
    for y in (one, some):
        loss_truth.assert_strides_ignored(lambda *xy: cosine(*xy, dims=(3, 11), impl=impl), x, y)


@impls
def test_two_calls_same_bits(impl):
    a, b = (
        results(lambda **rest: cosine(**rest, impl=impl), inputs(), torch.float32, DEVICE)
        for _ in range(2)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_auto_is_reference_for_float64():
    assert torch.equal(cosine(**inputs()), cosine_ref(**inputs()))
