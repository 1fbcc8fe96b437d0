"""The nested contrastive loss by Triton, in its interpreter where there is no GPU, against float64:
never further off than the reference in fp32 and a few roundings."""

import math

import loss_truth
import pytest
import torch
from loss_truth import ALL, CASES, DEVICE, TWICE, K, Q, assert_as_exact, masked, results, vectors
from torch import Tensor

from mlembed_kernels import _dispatch, infonce, infonce_ref

pytest.importorskip("triton")

# Interpreted, a tile takes milliseconds: one exit will do where exits are not told apart.
DIMS = loss_truth.DIMS if DEVICE == "cuda" else (3, 11)
ONE_EXIT = (
    "default",
    "more_queries",
    "one_by_one",
    "all_ids",
    "doc_to_doc_owner",
    "one_positive_for_two",
    "symmetric_ids",
    "margin_all",
    "negatives_of_the_documents",
)
ALL_EXITS = (
    "negatives_alone",
    "temperature_of_prefix",
    "near_symmetric",
    "candidates_leave_near",
    "everything",
)
SECONDS = ("temperature_of_both", "leaving_all", "all_have_left_near")
NAMES = [*ONE_EXIT, *ALL_EXITS, *(pytest.param(n, marks=pytest.mark.slow) for n in SECONDS)]
NAMES = list(CASES) if DEVICE == "cuda" else NAMES


@pytest.fixture(autouse=True)
def tiles(request: pytest.FixtureRequest) -> None:
    if request.node.originalname not in ("test_shapes", "test_two_calls_give_the_same_bits"):
        request.getfixturevalue("large_tiles")


def by_triton(**inputs) -> Tensor:
    return infonce(**inputs, impl="triton")


def inputs(queries: int = Q, candidates: int = 7, exits: int = 1, **options) -> dict:
    q, c = loss_truth.pair(queries, candidates, E=exits)
    if "negatives" in options:
        options["negatives"] = options["negatives"][:exits]
    prefixes = options.get("temperature")
    if isinstance(prefixes, Tensor) and prefixes.shape[-1:] == (len(loss_truth.DIMS),):
        options["temperature"] = prefixes[..., -len(DIMS) :]
    return {"q": q, "c": c, "dims": DIMS, **options}


def check(given: dict, dtype: torch.dtype = torch.float32, terms: float = 0.0) -> dict:
    given = loss_truth.rounded(given, dtype)
    temperature = given.get("temperature", 0.05)
    lowest = temperature.min().item() if isinstance(temperature, Tensor) else temperature
    got = results(by_triton, given, dtype, DEVICE)
    allowed = results(infonce_ref, given, dtype)
    want = results(loss_truth.infonce, given)
    assert got["output 0"].dtype == torch.float32
    assert_as_exact(got, allowed, want, lowest, dtype, terms)
    return got


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_truth(name):
    queries, candidates, options = CASES[name]
    exits = 1 if name in ONE_EXIT and DEVICE == "cpu" else loss_truth.E
    check(inputs(queries, candidates, exits, **options))


# One query; rows and columns about a tile's 64 and 128; primes; prefixes that are all narrow, that
# are not powers of two, that end in the middle of a tile; vectors that go on behind the last.
SHAPES = {
    "one_query": (1, 129, 13, (3, 11), 1, {"directions": ALL}),
    "below_and_above": (127, 129, 128, (8, 16, 32, 64, 128), 1, {}),
    "above": (129, 131, 323, (320,), 1, {"directions": ALL[:2], "partition_mode": "per_direction"}),
    "below": (61, 127, 101, (7, 24, 100), 3, {"directions": ALL[:2], "count_positive_twice": True}),
}


@pytest.mark.parametrize(("Q", "C", "D", "dims", "E", "options"), SHAPES.values(), ids=SHAPES)
def test_shapes(Q, C, D, dims, E, options):
    q, c = vectors(E, Q, D, seed=1), vectors(E, C, D, seed=2)
    c[:, :Q] += q  # positives resemble their queries
    check({"q": q, "c": c, "dims": dims, "temperature": 0.02, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as integers")
    # Gradients of all directions and of own negatives are rounded before they are summed.
    queries, candidates, options = CASES["symmetric_negatives"]
    check(inputs(queries, candidates, **options), dtype)


# ---- numbers that hurt ----


@pytest.mark.parametrize("directions", [ALL[:1], ALL[:2], ALL], ids=len)
def test_cosines_of_minus_one_at_temperature_001(directions):
    """Positives and negatives of query_to_doc and doc_to_query alike are as far as can be: each is
    exp(-200) of what is largest, and the loss is still log of their number."""
    q = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    given = {"q": q, "c": -q, "dims": (1, 2), "temperature": 0.01, "directions": directions}
    got = check(given, terms=2.0)
    want = {1: math.log(2), 2: math.log(3), 4: 200 + math.log(2)}[len(directions)]
    assert got["output 0"].tolist() == [pytest.approx([want, want], rel=1e-6)]


def test_the_positive_is_far_and_negatives_are_near():
    q = torch.tensor([[[1.0], [-3.0]]])
    given = {"q": q, "c": torch.tensor([[[-2.0], [5.0]]]), "dims": (1,), "temperature": 0.01}
    got = check(given, terms=1.0)
    assert got["output 0"].item() == pytest.approx(200, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.003])
def test_low_temperatures_of_random_vectors(temperature):
    # Cosines of some 0.1 in width 61, as at initialisation: exp((cos - 1) / t) underflows fp32.
    q, c = vectors(1, 31, 61, seed=3), vectors(1, 67, 61, seed=4)
    check({"q": q, "c": c, "dims": (5, 61), "temperature": temperature, "directions": ALL[:2]})


def test_near_copies_at_temperature_001():
    # Cosines near 1, logits near 100; five near copies compete with the positives.
    q = vectors(1, 13, 61, seed=3)
    c = q + 1e-2 * vectors(1, 13, 61, seed=4)
    c = torch.cat([c, q[:, :5] + 2e-2 * vectors(1, 5, 61, seed=5)], dim=1)
    # Differences of nearly parallel vectors.
    got = check({"q": q, "c": c, "dims": (61,), "temperature": 0.01}, terms=1.0)
    assert got["output 0"].item() > 0.01


def test_duplicates():
    """Every text twice, so that each query's positive has an equal, and each query as well."""
    q, c = loss_truth.pair(3, 3, E=1)
    given = {"q": torch.cat([q, q], 1), "c": torch.cat([c, 2 * c], 1), "dims": DIMS, **TWICE}
    check(given)


def test_zero_prefixes():
    given = inputs(negatives=vectors(1, Q, K, loss_truth.D, seed=3), **TWICE)
    given["q"][:, 1, :3] = 0
    given["c"][:, 2, :3] = 0
    given["c"][:, 6] = 0
    given["negatives"][:, 0, 1] = 0
    check(given)


@pytest.mark.parametrize("side", ["q", "c"])
def test_not_a_number(side):
    given = inputs(exits=2, directions=ALL[:2])
    given |= {name: given[name].float().to(DEVICE).requires_grad_() for name in "qc"}
    with torch.no_grad():
        given[side][1, 2, 4] = torch.nan  # behind prefix 3
    loss = by_triton(**given)
    bad = [d > 4 for d in DIMS]
    assert loss[0].isfinite().all() and loss[1].isnan().tolist() == bad
    # An exit without it learns as if there were none.
    for g in torch.autograd.grad(loss.sum(), (given["q"], given["c"])):
        assert g[0].isfinite().all() and g[1].isnan().any()


# ---- nothing to sum ----


@pytest.mark.parametrize("directions", [ALL[:1], ALL], ids=len)
def test_no_negative_is_left(directions):
    ids = {"query_ids": torch.zeros(Q).long(), "cand_ids": torch.zeros(7).long()}
    got = results(by_triton, inputs(**ids, directions=directions), torch.float32, DEVICE)
    assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize("margin", [None, 0.1])
def test_no_row_has_a_positive(margin):
    options = {"directions": ALL[:2], "target": torch.full((Q,), -1)}
    given = inputs(**options, false_negative_margin=margin)
    got = results(by_triton, given, torch.float32, DEVICE)
    assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize(("queries", "candidates"), [(0, 7), (Q, 0), (0, 0)])
def test_nothing_on_a_side(queries, candidates):
    given = inputs(queries, candidates, directions=ALL, target=torch.full((queries,), -1))
    got = results(by_triton, given, torch.float32, DEVICE)
    assert all((x == 0).all() for x in got.values())


# ---- how it is called ----


def test_pieces_equal_the_whole():
    given = inputs(**masked(), directions=ALL[:2], owner=loss_truth.OWNER)

    def of_pieces(c: Tensor, **rest) -> Tensor:
        return by_triton(c=list(c.split((3, 0, 4), dim=1)), **rest)

    got = results(of_pieces, given, torch.float32, DEVICE)
    want = results(by_triton, given, torch.float32, DEVICE)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("weights", ["sum", "random", "one"])
def test_cotangents(weights):
    """A sum's gradient is one number, expanded; most of one output's are zero."""
    given = inputs(directions=ALL[:2])
    q, c = given.pop("q"), given.pop("c")
    gradients = []
    for f, x in ((by_triton, torch.float32), (loss_truth.infonce, torch.float64)):
        leaves = [v.to(DEVICE if f is by_triton else "cpu", x).requires_grad_() for v in (q, c)]
        loss = f(q=leaves[0], c=leaves[1], **given)
        if weights == "sum":
            total = loss.sum()
        elif weights == "one":
            total = loss[0, -1]
        else:
            generator = torch.Generator().manual_seed(3)
            total = (loss * torch.randn(loss.shape, generator=generator).to(loss)).sum()
        gradients.append(torch.autograd.grad(total, leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_strides():
    """Queries transposed, candidates one tensor for both exits, own negatives every other one."""
    q = vectors(13, Q, 2).float().to(DEVICE).permute(2, 1, 0)
    c = vectors(1, 7, 13).float().to(DEVICE).expand(2, -1, -1)
    own = vectors(2, Q, 2 * K, 20).float().to(DEVICE)[:, :, 1::2, 2:15]
    odd = (q, c, own)
    assert not any(x.is_contiguous() for x in odd)
    outs = []
    for given in (odd, [x.contiguous() for x in odd]):
        leaves = [x.detach().requires_grad_() for x in given]
        loss = by_triton(q=leaves[0], c=leaves[1], negatives=leaves[2], dims=DIMS)
        outs.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_calls_give_the_same_bits():
    queries, candidates = (1300, 2700) if DEVICE == "cuda" else (31, 67)
    given = inputs(queries, candidates, **TWICE)
    a, b = (results(by_triton, given, torch.float32, DEVICE) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [{"directions": (ALL[0], ALL[3])}, pytest.param(TWICE, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiled(impl, options):
    """In one graph, without a break, forward and backward."""
    given = inputs(3, 5, **options, negatives=vectors(1, 3, K, 13, seed=3))
    given["false_negative_margin"] = 0.1
    given |= {"query_ids": torch.arange(3), "cand_ids": torch.arange(1, 6), "dims": (11,)}

    def loss(**inputs) -> Tensor:
        return 2 * infonce(**inputs, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = results(compiled, given, torch.float32, DEVICE)
    want = results(loss, given, torch.float32, DEVICE)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_on_a_cpu_by_name_only_and_only_interpreted(monkeypatch):
    q, c = loss_truth.pair(dtype=torch.float32)
    assert torch.equal(infonce(q, c, dims=DIMS), infonce_ref(q, c, dims=DIMS))
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl: triton needs CUDA"):
        by_triton(q=q, c=c, dims=DIMS)
