"""Log-sum-exps of pairs against float64; Triton runs under its interpreter without a GPU."""

import math

import loss_truth
import pytest
import torch
from live_memory import Live
from loss_truth import DEVICE, assert_as_exact, impls, results, rounded, triton, vectors
from loss_truth import check as check_truth
from torch import Tensor

from mlembed_kernels.similarity.pairwise_lse import pairwise_lse, pairwise_lse_ref

# Different, so that no axis passes for another; the last prefix leaves some width unread.
E, R, S, D = 3, 5, 7, 13
DIMS = (3, 11)
HUGE = 1 << 40


OF_TILES = (
    "test_shapes",
    "test_shapes_with_ceilings_and_counts",
    "test_workspace",
    "test_cosines_of_minus_one_at_temperature_001",
    "test_two_calls_same_bits",
)


@pytest.fixture(autouse=True)
def tiles(request: pytest.FixtureRequest) -> None:
    if request.node.originalname not in OF_TILES:
        request.getfixturevalue("large_tiles")


def keys(*columns: tuple[list[int], list[int]], dtype: torch.dtype = torch.int64) -> dict:
    rows, cols = zip(*columns, strict=True)
    return {
        "row_keys": [torch.tensor(x, dtype=dtype) for x in rows],
        "col_keys": [torch.tensor(x, dtype=dtype) for x in cols],
    }


ONE = ([0, 1, 2, 1, 9], [1, 0, 8, 8, 2, 1, 5])
TWO = ([3, 3, 3, 4, 4], [3, 4, 5, 5, 5, 5, 5])
# Equal in their lower halves only, as hashes of texts may be.
THREE = ([HUGE, HUGE + 1, 7, -1, HUGE], [0, 1, HUGE, HUGE + 1, HUGE - 1, -1, 7])
POSITIVE = {"positive": torch.tensor([0, 6, -1, 6, 2])}  # two rows share one, one has none
# Negative, just outside, and beyond what 32 bits hold.
OUTSIDE = {"positive": torch.tensor([-9, S, -HUGE, HUGE + 3, 4])}
COUNTS = {"row_counts": torch.tensor([5, 3, 2]), "col_counts": torch.tensor([6, 4, 1])}


def ceiling(*values: float) -> dict:
    """One value a row, the exits a little apart."""
    steps = 0.05 * torch.arange(E, dtype=torch.float64)[:, None]
    return {"ceiling": torch.tensor(values, dtype=torch.float64) - steps}


def judged_by_some() -> dict:
    """Exit 2, the deepest, decides for rows 0 and 3 only, exit 1 for row 1 as well; none for 2."""
    x = ceiling(0.1, 0.0, 0.2, -0.1, 0.3)["ceiling"]
    x[2, [1, 4]] = torch.inf
    x[1, 4] = torch.inf
    x[:, 2] = torch.inf
    return {"ceiling": x}


CASES: dict[str, dict] = {
    "plain": {},
    "columns": {"columns": True},
    "positive": POSITIVE,
    "positive_columns": {**POSITIVE, "columns": True},
    "positive_outside": {**OUTSIDE, "columns": True},
    "positive_int32": {"positive": POSITIVE["positive"].int(), "columns": True},
    "one_key": {**keys(ONE), "columns": True},
    "two_keys": {**keys(ONE, TWO), **POSITIVE, "columns": True},
    "three_keys": {**keys(TWO, THREE, ONE), "columns": True},
    "int32_keys": {**keys(ONE, TWO, dtype=torch.int32), "columns": True},
    "all_dropped": {**keys(([4] * R, [4] * S)), **POSITIVE, "columns": True},
    "row_and_column_dropped": {**keys(([1, 0, 0, 0, 0], [1] * 6 + [0])), "columns": True},
    "ceiling": ceiling(0.1, -0.2, 0.4, 0.0, 0.2),
    "ceiling_of_some": {**judged_by_some(), **POSITIVE},
    "ceiling_of_none": ceiling(*[math.inf] * R),
    "ceiling_below_all": {**ceiling(0.1, -math.inf, 0.4, -2.0, math.inf), **POSITIVE},
    "counts": {**COUNTS, "columns": True},
    "counts_positive": {**COUNTS, **POSITIVE, "columns": True},
    "counts_none": {
        "row_counts": torch.tensor([5, 2, 0]),
        "col_counts": torch.tensor([7, 0, 0]),
        **POSITIVE,
        "columns": True,
    },
    "counts_of_rows": {"row_counts": torch.tensor([4, 4, 1]), "columns": True},
    "counts_of_columns": {"col_counts": torch.tensor([7, 3, 3]).int(), "columns": True},
    "counts_ceiling": {**COUNTS, **judged_by_some()},
    "everything": {**COUNTS, **POSITIVE, **keys(ONE, TWO), **judged_by_some()},
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def scales(E: int, M: int, temperature: float = 0.05) -> Tensor:
    """1 / t, unlike each other."""
    return torch.linspace(0.5, 1, E * M, dtype=torch.float64).view(E, M) / temperature


def inputs(R: int = R, S: int = S, D: int = D, dims=DIMS, E: int = E, temperature=0.05, **options):
    x, y = vectors(E, R, D, seed=1), vectors(E, S, D, seed=2)
    return {"x": x, "y": y, "dims": dims, "scale": scales(E, len(dims), temperature), **options}


def on_device(**options) -> dict:
    """Return inputs of one exit in fp32, where Triton runs."""
    given = {n: loss_truth.on(DEVICE, x) for n, x in inputs(**{"E": 1, **options}).items()}
    return given | {name: given[name].float() for name in ("x", "y", "scale")}


def check(impl: str, inputs: dict, **how) -> dict:
    return check_truth(impl, pairwise_lse, loss_truth.pairwise_lse, inputs, **how)


# Triton skips cases that others contain: ceilings of all, counts of one side.
SECONDS = "ceiling", "ceiling_of_none", "counts", "counts_of_rows"
BOTH = [
    pytest.param(options, impl, id=f"{name}-{impl}", marks=[*marks, *[pytest.mark.slow] * late])
    for name, options in CASES.items()
    for impl, marks, late in (("reference", [], 0), ("triton", [triton.mark], name in SECONDS))
]


@pytest.mark.parametrize(("options", "impl"), BOTH)
def test_equals_truth(impl, options):
    # Triton has one exit in cases that treat exits equally, for time's sake.
    exits = not {"ceiling", "row_counts", "col_counts"}.isdisjoint(options)
    check(impl, inputs(E=E if exits or impl == "reference" else 1, **options))


@pytest.mark.parametrize("only", [0, 1, 2], ids=["rows", "columns", "cosines"])
@pytest.mark.parametrize("name", ["two_keys", "counts_positive"])
@impls
def test_gradients_of_each_output(impl, name, only):
    got = check(impl, inputs(E=1 if name == "two_keys" else E, **CASES[name]), only=only)
    assert all(got[f"gradient of {x}"].abs().max() > 0.01 for x in "xy")
    assert bool((got["gradient of scale"] != 0).any()) == (only < 2)  # cosines have no temperature


# Rows and columns about a tile's 16, 64 and 128; one row, one column; primes. Widths: prefixes that
# fill tiles, are not powers of two, are all narrow, all wide, or one of each; and embeddings wider
# than their last prefix.
SHAPES = {
    "one_pair": (1, 1, 5, (2, 5), 1),
    "one_row": (1, 129, 24, (8, 24), 1),
    "one_column": (127, 1, 24, (7, 23), 1),
    "a_tile": (64, 64, 64, (16, 64), 1),
    "two_tiles": (128, 128, 32, (32,), 1),
    "below_and_above": (127, 129, 40, (3, 17, 33), 1),
    "above_and_below": (129, 127, 131, (130,), 1),
    "narrow_and_wide": (65, 31, 323, (8, 16, 32, 64, 128, 320), 1),
    "wide_first": (17, 131, 200, (129, 197), 1),
    "three_exits": (67, 37, 150, (7, 24, 100, 149), 3),
    "three_row_tiles": (257, 3, 70, (5, 70), 1),
    "three_column_tiles": (3, 263, 70, (61, 67), 1),
}


def of_shape(R: int, S: int) -> dict:
    """Return a positive for most rows, and keys many of which match another row's."""
    rows, cols = torch.arange(R), torch.arange(S)
    return {
        "positive": (rows * 5 + 2) % (S + 1) - 1,
        "row_keys": [rows % 11, rows // 3],
        "col_keys": [cols % 13, cols // 2],
    }


# The shape with three exits has ceilings in the test below.
FEW = [
    pytest.param(*shape, id=name, marks=[pytest.mark.slow] * (name == "three_exits"))
    for name, shape in SHAPES.items()
]


@triton
@pytest.mark.parametrize(("R", "S", "D", "dims", "E"), FEW)
def test_shapes(R, S, D, dims, E):
    check("triton", inputs(R, S, D, dims, E, **of_shape(R, S), columns=True))


@triton
@pytest.mark.parametrize(
    "name",
    [pytest.param("narrow_and_wide", marks=pytest.mark.slow), "three_row_tiles", "three_exits"],
)
def test_shapes_with_ceilings_and_counts(name):
    R, S, D, dims, E = SHAPES[name]
    counts = {
        "row_counts": torch.tensor([R, R // 2, 3][:E]),
        "col_counts": torch.tensor([S, (S + 1) // 2, 2][:E]),
    }
    highest = torch.linspace(-0.2, 0.5, E * R, dtype=torch.float64).view(E, R)
    highest[-1, ::5] = torch.inf
    check("triton", inputs(R, S, D, dims, E, **of_shape(R, S), **counts, ceiling=highest))


@triton
@pytest.mark.parametrize("name", ["two_keys", "everything"])
@pytest.mark.parametrize("dtype", loss_truth.HALVES, ids=str)
def test_half_precision(dtype, name):
    exits = E if name == "everything" else 1
    check("triton", inputs(R, S, 150, (8, 149), exits, **CASES[name]), dtype=dtype)


# ---- merging ----


@impls
def test_chunks_merge(impl):
    """Rows merge by logaddexp, columns side by side, cosines by their sum. The second chunk is
    empty, and in the first no pair of some rows counts.
    """
    whole = inputs(**keys(ONE, TWO), **POSITIVE, columns=True, E=1)
    whole["col_counts"] = torch.tensor([6])
    dtype, device = (torch.float32, DEVICE) if impl == "triton" else (torch.float64, "cpu")

    def merged(x, y, scale, sizes, positive, col_keys, col_counts, **rest):
        start, rows, cols, own = 0, torch.tensor(-1e30, device=x.device), [], 0
        for size in sizes:
            chunk = slice(start, start + size)
            part = pairwise_lse(
                x,
                y[:, chunk],
                scale=scale,
                positive=positive - start,
                col_keys=[key[chunk] for key in col_keys],
                col_counts=(col_counts - start).clamp(0, size),
                impl=impl,
                **rest,
            )
            # The gradient of logaddexp(-inf, -inf) is NaN.
            rows = torch.logaddexp(rows, part[0].clamp(min=-1e30))
            cols, own = [*cols, part[1]], own + part[2]
            start += size
        return rows, torch.cat(cols, dim=2), own

    got = results(merged, {**whole, "sizes": (2, 0, 5)}, dtype, device)
    want = results(merged, {**whole, "sizes": (7,)}, dtype, device)
    tolerance = 1e-11 if impl == "reference" else 2e-5
    loss_truth.assert_same(got, want, tolerance, tolerance)


@triton
@pytest.mark.parametrize("near", [False, True])
def test_workspace(near):
    """The smallest workspace takes exits and 128 rows in turn, of 130 x 35 pairs of two exits."""
    R, S = 130, 35
    given = inputs(R, S, 133, (8, 130), 2, **of_shape(R, S), columns=not near)
    if near:
        given["ceiling"] = torch.full((2, R), 0.1, dtype=torch.float64)
    given = rounded(given, torch.float32)

    def run(**rest):
        return pairwise_lse(**rest, workspace=1, impl="triton")

    with Live() as made:
        got = results(run, given, torch.float32, DEVICE)
    # A pair has an fp32 number of the wide prefix's gradient, and a byte if there are ceilings.
    pairs = made.most(lambda shape: shape[-1:] == (128,) and math.prod(shape) > 2 * 128)
    assert 0 < pairs <= 128 * 128 * (4 + near)
    allowed = results(pairwise_lse_ref, given, torch.float32)
    assert_as_exact(got, allowed, results(loss_truth.pairwise_lse, given), 0.05)


# ---- the same text on both sides ----


@impls
def test_rows_and_columns_are_one_tensor(impl):
    itself = {"row_keys": [torch.arange(R)], "col_keys": [torch.arange(R)]}
    given = {**inputs(E=1), **itself, "columns": True}
    del given["y"]

    def twice(f):
        return lambda x, **rest: f(x=x, y=x, **rest)

    got = check_truth(impl, twice(pairwise_lse), twice(loss_truth.pairwise_lse), given)
    # z is symmetric, so that rows and columns are the same numbers.
    torch.testing.assert_close(got["output 0"], got["output 1"], rtol=1e-6, atol=1e-5)


# ---- numbers that hurt ----


@pytest.mark.parametrize("n", [2, 70])
@impls
def test_cosines_of_minus_one_at_temperature_001(impl, n):
    """exp(-200) underflows fp32, and a sum of such terms must still have its logarithm."""
    x = torch.arange(1.0, n + 1)[None, :, None] * torch.tensor([1.0, 0.0])
    given = {"x": x, "y": -x, "dims": (1, 2), "scale": torch.full((1, 2), 100.0), "columns": True}
    # The gradient is that of parallel vectors: 0, a difference of terms of 1 / t.
    got = check(impl, given, temperature=0.01, terms=3.0)
    want = torch.full((1, 2, n), math.log(n) - 100, dtype=torch.float64)
    for out in ("output 0", "output 1"):
        torch.testing.assert_close(got[out].double().cpu(), want, rtol=1e-6, atol=0)


@impls
def test_one_row_far_from_all_others_near(impl):
    """Row 0 is opposite to all columns but its positive, the other rows resemble them: row 0 has
    sums of exp(-100), and adds nothing to columns' sums of exp(100).
    """
    x = torch.ones(1, 66, 2) + 1e-3 * vectors(1, 66, 2).float()
    x[:, 0] *= -1
    y = torch.ones(1, 5, 2)
    given = {"x": x, "y": y, "dims": (2,), "scale": torch.full((1, 1), 100.0), "columns": True}
    # Nearly parallel vectors have small gradients, of terms a thousand times as large.
    near = {"temperature": 0.01, "terms": 66.0}
    check(impl, {**given, "positive": torch.arange(66)}, **near)
    check(impl, {**given, "y": -y}, **near)


@pytest.mark.parametrize("temperature", [0.02, 0.01, 0.003])
@impls
def test_low_temperatures_of_random_vectors(impl, temperature):
    # Cosines of some 0.1 in width 70: sums about exp(-1 / t) of the largest possible, whose terms,
    # some or all, underflow fp32 at exp(-87).
    check(
        impl,
        inputs=inputs(67, 5, 70, (3, 70), 1, temperature, columns=True),
        temperature=temperature,
    )


@impls
def test_lengths_from_1e_minus_9_to_1e_9(impl):
    given = inputs(columns=True, **POSITIVE)
    given["x"] = given["x"] * torch.logspace(-9, 9, E * R, dtype=torch.float64).view(E, R, 1)
    given["y"] = given["y"] * torch.logspace(9, -9, E * S, dtype=torch.float64).view(E, S, 1)
    given = rounded(given, torch.float32)

    # A gradient is inversely as long as its vector: it is compared in units of the vector.
    def run(f):
        def of_factors(x, y, **rest):
            return f(x=x * given["x"].to(x), y=y * given["y"].to(y), **rest)

        return of_factors

    units = {**given, "x": torch.ones_like(given["x"]), "y": torch.ones_like(given["y"])}
    check_truth(impl, run(pairwise_lse), run(loss_truth.pairwise_lse), units)


@impls
def test_zero_prefixes(impl):
    """A zero prefix has cosine 0 and the gradient of a product, so that a dead unit can recover."""
    given = inputs(**POSITIVE, columns=True)
    given["x"][:, 1, :3] = 0
    given["x"][1, 2] = 0
    given["y"][:, 6, :3] = 0
    given["y"][2, 0] = 0
    got = check(impl, given)
    assert got["gradient of x"][1, 2].abs().max() > 0
    assert (got["output 2"][0, 0, [1, 3]] == 0).all()


@impls
def test_a_copy_has_cosine_one(impl):
    """Rows and columns hold exact copies, up to a factor of two."""
    x = vectors(1, R, D).float()
    given = {**inputs(**keys(ONE), E=1), "x": x, "y": torch.cat([x, 2 * x[:, :2]], dim=1)}
    check(impl, {**given, **POSITIVE, "columns": True})


@pytest.mark.parametrize("side", ["x", "y"])
@impls
def test_nan_stays_in_its_pairs(impl, side):
    """A NaN shows at its exit, from its prefix on, in all its pairs and no other."""
    given = on_device(E=E, **POSITIVE)
    given[side][1, 2, 4] = torch.nan  # Behind prefix 3.
    rows, cols, own = pairwise_lse(**given, columns=True, impl=impl)
    bad = torch.zeros(E, len(DIMS), R, S, dtype=torch.bool)
    bad[1, 1:, *((2, slice(None)) if side == "x" else (slice(None), 2))] = True
    counted = bad.clone()
    for i, j in enumerate(POSITIVE["positive"].tolist()):
        assert torch.equal(own[:, :, i].isnan().cpu(), bad[:, :, i, j] & (j >= 0))
        if j >= 0:
            counted[:, :, i, j] = False  # A dropped pair may show or not.
    for out, axis in ((rows, 3), (cols, 2)):
        assert (out.isnan().cpu() >= counted.any(axis)).all()
        assert (out.isnan().cpu() <= bad.any(axis)).all()


@impls
def test_empty_sums_have_zero_gradients(impl):
    given = on_device(**CASES["all_dropped"])
    leaves = [given[name].requires_grad_() for name in ("x", "y", "scale")]
    rows, cols, _ = pairwise_lse(**given, impl=impl)
    assert (rows == -torch.inf).all() and (cols == -torch.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(rows.sum() + cols.sum(), leaves))


@pytest.mark.parametrize(("rows", "columns"), [(0, 7), (5, 0), (0, 0)])
@impls
def test_empty_sides(impl, rows, columns):
    none = {"positive": torch.full((rows,), -1), "columns": True}
    none |= {"row_keys": [torch.arange(rows)], "col_keys": [torch.arange(columns)]}
    got = check(impl, inputs(rows, columns, E=1, **none))
    assert (got["output 0"] == -torch.inf).all() and (got["output 1"] == -torch.inf).all()


# ---- calls ----


LAYOUTS = {  # x and y: [2, R, D] and [2, S, D]
    "transposed_and_expanded": lambda new: (
        new(D, R, 2).permute(2, 1, 0),
        new(1, S, D).expand(2, -1, -1),
    ),
    "sliced_and_exits_inside": lambda new: (
        new(2, 2 * R, D + 5)[:, 1::2, 3:-2],
        new(S, 2, D).transpose(0, 1),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@impls
def test_strides(impl, layout):
    odd = layout(lambda *shape: vectors(*shape).float().to(DEVICE))
    rest = {"dims": DIMS, "scale": scales(2, len(DIMS)).float().to(DEVICE), "columns": True}

    def both(*xy: Tensor) -> Tensor:
        return torch.cat(pairwise_lse(*xy, **rest, impl=impl)[:2], dim=2)

    loss_truth.assert_strides_ignored(both, *odd)


@impls
def test_gradients_of_one_input(impl):
    given = on_device(**CASES["two_keys"])

    def gradients(*names: str) -> tuple[Tensor, ...]:
        leaves = {n: given[n].clone().requires_grad_() for n in names}
        rows, cols, _ = pairwise_lse(**{**given, **leaves}, impl=impl)
        return torch.autograd.grad(rows.exp().sum() + cols[..., 1:].sum(), list(leaves.values()))

    for name, want in zip(("x", "y", "scale"), gradients("x", "y", "scale"), strict=True):
        assert torch.equal(gradients(name)[0], want)


@impls
def test_two_calls_same_bits(impl):
    # Large enough for all multiprocessors of a GPU.
    R, S = (1300, 700) if DEVICE == "cuda" else (67, 31)
    given = inputs(R, S, 150, (8, 149), 1, **of_shape(R, S), columns=True)
    a, b = (
        results(lambda **rest: pairwise_lse(**rest, impl=impl), given, torch.float32, DEVICE)
        for _ in range(2)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_auto_is_reference_for_float64():
    given = inputs(**CASES["everything"])
    for got, want in zip(pairwise_lse(**given), pairwise_lse_ref(**given), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="columns: expected False with ceilings"):
        pairwise_lse(**inputs(**CASES["ceiling"]), columns=True)
    with pytest.raises(ValueError, match="impl: expected one of"):
        pairwise_lse(**inputs(), impl="fast")
    with pytest.raises(ValueError, match="impl: triton supports fp32, bf16 and fp16"):
        pairwise_lse(**inputs(), impl="triton")
    if DEVICE == "cpu":
        with pytest.raises(
            ValueError, match="impl: triton's interpreter does not support bf16 products"
        ):
            half = {name: inputs()[name].bfloat16() for name in ("x", "y")}
            pairwise_lse(**{**inputs(), **half}, impl="triton")
