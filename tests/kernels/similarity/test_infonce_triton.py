"""The nested contrastive loss by Triton against float64, in Triton's interpreter without a GPU.

Vectors that hurt, layouts and pieces are tests of its parts: test_pairwise_lse.py, test_cosine.py.
"""

import math
from functools import partial

import loss_truth
import pytest
import torch
from loss_truth import ALL, CASES, DEVICE, TWICE, K, Q, masked, results, vectors
from torch import Tensor

from mlembed_kernels import _dispatch, infonce, infonce_ref

pytest.importorskip("triton")

# Interpreted, a tile takes milliseconds: cases that treat exits equally have one exit.
DIMS = loss_truth.DIMS if DEVICE == "cuda" else (3, 11)
ONE_EXIT = {
    *("default", "more_queries", "one_by_one", "all_ids", "doc_to_doc_owner", "symmetric_ids"),
    *("one_positive_for_two", "margin_all", "negatives_of_the_documents"),
}
ALL_EXITS = {
    *("negatives_alone", "temperature_of_prefix", "near_symmetric", "candidates_leave_near"),
    "everything",
}
SLOW = {"temperature_of_both", "leaving_all", "all_have_left_near"}
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name in CASES
    if DEVICE == "cuda" or name in ONE_EXIT | ALL_EXITS | SLOW
]
by_triton = partial(infonce, impl="triton")


@pytest.fixture(autouse=True)
def tiles(request: pytest.FixtureRequest) -> None:
    if request.node.originalname not in ("test_shapes", "test_two_calls_same_bits"):
        request.getfixturevalue("large_tiles")


def inputs(queries: int = Q, candidates: int = 7, exits: int = 1, **options) -> dict:
    q, c = loss_truth.pair(queries, candidates, E=exits)
    if "negatives" in options:
        options["negatives"] = options["negatives"][:exits]
    prefixes = options.get("temperature")
    if isinstance(prefixes, Tensor) and prefixes.shape[-1:] == (len(loss_truth.DIMS),):
        options["temperature"] = prefixes[..., -len(DIMS) :]
    return {"q": q, "c": c, "dims": DIMS, **options}


def check(given: dict, dtype: torch.dtype = torch.float32, terms: float = 0.0) -> dict:
    temperature = torch.as_tensor(given.get("temperature", 0.05)).min().item()
    how = {"dtype": dtype, "temperature": temperature, "terms": terms}
    got = loss_truth.check("triton", infonce, loss_truth.infonce, given, **how)
    assert got["output 0"].dtype == torch.float32
    return got


@pytest.mark.parametrize("name", NAMES)
def test_equals_truth(name):
    queries, candidates, options = CASES[name]
    exits = 1 if name in ONE_EXIT and DEVICE == "cpu" else loss_truth.E
    check(inputs(queries, candidates, exits, **options))


# One query; rows and columns about a tile's 64 and 128; primes; prefixes that are all narrow, that
# are not powers of two, that end in the middle of a tile; vectors wider than the last prefix.
SHAPES = {
    "one_query": (1, 129, 13, (3, 11), 1, {"directions": ALL}),
    "below_and_above": (127, 129, 128, (8, 16, 32, 64, 128), 1, {}),
    "above": (129, 131, 323, (320,), 1, loss_truth.SYMMETRIC),
    "below": (61, 127, 101, (7, 24, 100), 3, {"directions": ALL[:2], "count_positive_twice": True}),
}


@pytest.mark.parametrize(("Q", "C", "D", "dims", "E", "options"), SHAPES.values(), ids=SHAPES)
def test_shapes(Q, C, D, dims, E, options):
    q, c = vectors(E, Q, D, seed=1), vectors(E, C, D, seed=2)
    c[:, :Q] += q  # Positives resemble their queries.
    check({"q": q, "c": c, "dims": dims, "temperature": 0.02, **options})


@pytest.mark.parametrize("dtype", loss_truth.HALVES, ids=str)
def test_half_precision(dtype):
    # Gradients of all directions and of own negatives are rounded before they are summed.
    queries, candidates, options = CASES["symmetric_negatives"]
    check(inputs(queries, candidates, **options), dtype)


# ---- numbers that hurt ----


@pytest.mark.parametrize("directions", [ALL[:1], ALL[:2], ALL], ids=len)
def test_cosines_of_minus_one_at_temperature_001(directions):
    """Positives, and negatives of query_to_doc and doc_to_query, are as far away as can be: each is
    exp(-200) of the largest, and the loss is still the log of their number.
    """
    q = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    given = {"q": q, "c": -q, "dims": (1, 2), "temperature": 0.01, "directions": directions}
    got = check(given, terms=2.0)
    want = {1: math.log(2), 2: math.log(3), 4: 200 + math.log(2)}[len(directions)]
    assert got["output 0"].tolist() == [pytest.approx([want, want], rel=1e-6)]


def test_far_positive_and_near_negatives():
    q = torch.tensor([[[1.0], [-3.0]]])
    given = {"q": q, "c": torch.tensor([[[-2.0], [5.0]]]), "dims": (1,), "temperature": 0.01}
    got = check(given, terms=1.0)
    assert got["output 0"].item() == pytest.approx(200, rel=1e-6)


def test_near_copies_at_temperature_001():
    # Cosines near 1, logits near 100; five near copies compete with the positives.
    q = vectors(1, 13, 61, seed=3)
    c = q + 1e-2 * vectors(1, 13, 61, seed=4)
    c = torch.cat([c, q[:, :5] + 2e-2 * vectors(1, 5, 61, seed=5)], dim=1)
    # Gradients are differences of nearly parallel vectors.
    got = check({"q": q, "c": c, "dims": (61,), "temperature": 0.01}, terms=1.0)
    assert got["output 0"].item() > 0.01


@pytest.mark.parametrize("side", ["q", "c"])
def test_nan_stays_at_its_exit(side):
    given = inputs(exits=2, directions=ALL[:2])
    given |= {name: given[name].float().to(DEVICE).requires_grad_() for name in "qc"}
    with torch.no_grad():
        given[side][1, 2, 4] = torch.nan  # Behind prefix 3.
    loss = by_triton(**given)
    assert loss[0].isfinite().all() and loss[1].isnan().tolist() == [d > 4 for d in DIMS]
    for g in torch.autograd.grad(loss.sum(), (given["q"], given["c"])):
        assert g[0].isfinite().all() and g[1].isnan().any()


# ---- empty sums ----

ONE_ID = {"query_ids": torch.zeros(Q).long(), "cand_ids": torch.zeros(7).long()}
NO_TARGET = {"directions": ALL[:2], "target": torch.full((Q,), -1)}
EMPTY = {
    "no_negatives": inputs(**ONE_ID),
    "no_negatives_in_any_direction": inputs(**ONE_ID, directions=ALL),
    "no_positives": inputs(**NO_TARGET),
    "no_positives_near": inputs(**NO_TARGET, false_negative_margin=0.1),
    **{
        f"{n}_queries_{m}_candidates": inputs(n, m, directions=ALL, target=torch.full((n,), -1))
        for n, m in ((0, 7), (Q, 0), (0, 0))
    },
}


@pytest.mark.parametrize("given", EMPTY.values(), ids=EMPTY)
def test_empty_sums_are_zero(given):
    got = results(by_triton, given, torch.float32, DEVICE)
    assert all((x == 0).all() for x in got.values())


# ---- calls ----


def test_pieces_equal_whole():
    given = inputs(**masked(), directions=ALL[:2], owner=loss_truth.OWNER)

    def of_pieces(c: Tensor, **rest) -> Tensor:
        return by_triton(c=list(c.split((3, 0, 4), dim=1)), **rest)

    got, want = (results(f, given, torch.float32, DEVICE) for f in (of_pieces, by_triton))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-5)


def test_two_calls_same_bits():
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
    """One graph, without a break, forward and backward."""
    given = inputs(3, 5, **options, negatives=vectors(1, 3, K, 13, seed=3))
    given["false_negative_margin"] = 0.1
    given |= {"query_ids": torch.arange(3), "cand_ids": torch.arange(1, 6), "dims": (11,)}

    def loss(**inputs) -> Tensor:
        return 2 * infonce(**inputs, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (results(f, given, torch.float32, DEVICE) for f in (compiled, loss))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs")
@pytest.mark.parametrize("options", [{}, TWICE], ids=["one_direction", "twice"])
def test_captured_in_a_graph(options):
    """A replay gives the bits of a call for other values in the same memory."""
    given = {n: loss_truth.on(DEVICE, x) for n, x in inputs(130, 300, **options).items()}
    leaves = [given[name].half().requires_grad_() for name in "qc"]
    given.pop("target", None)  # its values are looked at only on a CPU

    def run() -> list[Tensor]:
        loss_EM = by_triton(**given | dict(zip("qc", leaves, strict=True)))
        return [loss_EM.detach(), *torch.autograd.grad(loss_EM.sum(), leaves)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    with torch.no_grad():
        for x in leaves:
            x.mul_(torch.linspace(0.5, 2.0, x.shape[1], device=DEVICE)[:, None]).add_(0.1)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))


def test_triton_on_cpu_needs_interpreter(monkeypatch):
    q, c = loss_truth.pair(dtype=torch.float32)
    assert torch.equal(infonce(q, c, dims=DIMS), infonce_ref(q, c, dims=DIMS))
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl: triton needs CUDA"):
        by_triton(q=q, c=c, dims=DIMS)
