"""The reference of the nested contrastive loss against its formula in float64, and invariants.

test_infonce_triton.py tests Triton, test_infonce_published.py losses of other systems.
"""

import math

import loss_truth
import pytest
import torch
import torch.nn.functional as F
from loss_truth import ALL, CASES, DIMS, OWNER, C, D, E, K, Q, assert_same, masked, pair, vectors
from torch import Tensor

from mlembed_kernels import infonce, infonce_ref

cases = pytest.mark.parametrize(("queries", "candidates", "options"), CASES.values(), ids=CASES)


def inputs(queries: int, candidates: int, options: dict) -> dict:
    q, c = pair(queries, candidates)
    return {"q": q, "c": c, "dims": DIMS, **options}


def with_gradients(
    q: Tensor, c: Tensor, autocast: bool = False, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, dq, dc; `autocast` is around the forward pass, like in a training step."""
    q, c = (x.detach().clone().requires_grad_() for x in (q, c))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_EM = infonce(q, c, **options)
    # Different weights, so that no exit or prefix passes for another.
    weights = torch.arange(1.0, loss_EM.numel() + 1).view_as(loss_EM).to(loss_EM.dtype)
    return loss_EM.detach(), *torch.autograd.grad((loss_EM * weights).sum(), (q, c))


# ---- the formula ----


@cases
def test_equals_formula(queries, candidates, options):
    all_inputs = inputs(queries, candidates, options)
    got = loss_truth.results(infonce_ref, all_inputs)
    assert got["output 0"].shape == (E, len(DIMS)) and got["output 0"].dtype == torch.float64
    # Gradients are of the size of 1 / temperature.
    assert_same(got, loss_truth.results(loss_truth.infonce, all_inputs))


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("name", ["default", "all_ids", "symmetric_negatives", "leaving_all"])
def test_temperatures(name, temperature):
    queries, candidates, options = CASES[name]
    all_inputs = inputs(queries, candidates, {**options, "temperature": temperature})
    got = infonce(**all_inputs)
    torch.testing.assert_close(got, loss_truth.infonce(**all_inputs), rtol=1e-11, atol=1e-12)


def test_default_temperature():
    q, c = pair()
    assert torch.equal(infonce(q, c, dims=DIMS), infonce(q, c, dims=DIMS, temperature=0.05))


def by_hand(q, c, dims, temperature, target, query_ids, cand_ids) -> list:
    """Compute query_to_doc one number at a time: a check of the truth itself."""
    q, c, target = q.tolist(), c.tolist(), target.tolist()
    table = []
    for exit_q, exit_c in zip(q, c, strict=True):
        losses = []
        for d in dims:
            rows = []
            for i, a in enumerate(exit_q):
                if target[i] < 0:
                    continue
                logits = {}
                for j, b in enumerate(exit_c):
                    if query_ids[i] != cand_ids[j] or j == target[i]:
                        dot = math.fsum(x * y for x, y in zip(a[:d], b[:d], strict=True))
                        logits[j] = dot / (math.hypot(*a[:d]) * math.hypot(*b[:d])) / temperature
                total = math.log(math.fsum(map(math.exp, logits.values())))
                rows.append(total - logits[target[i]])
            losses.append(math.fsum(rows) / len(rows))
        table.append(losses)
    return table


def test_the_truth_is_the_formula():
    q, c = pair()
    want = torch.tensor(by_hand(q, c, DIMS, 0.05, **masked()), dtype=torch.float64)
    got = loss_truth.infonce(q, c, dims=DIMS, **masked())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


WITHOUT = {  # Values that mean the same as leaving an option out, if that is not None.
    "directions": ("query_to_doc",),
    "partition_mode": "joint",
    "count_positive_twice": False,
    "margin": 0.0,
    "temperature": 0.05,
}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, (queries, candidates, options) in CASES.items()
        for option in options
        # More queries than candidates need targets, directions=() needs negatives.
        if not (option == "target" and queries > candidates)
        and not (option == "negatives" and not options.get("directions", True))
    ],
)
def test_every_option_changes_its_case(name, option):
    """Otherwise the comparisons above would pass without it."""
    queries, candidates, options = CASES[name]
    less = {**options, option: WITHOUT.get(option)}
    if option in ("query_ids", "cand_ids"):
        less |= {"query_ids": None, "cand_ids": None}
    if option == "negatives":
        less |= {"negatives_mask": None}
    if option in ("directions", "partition_mode"):
        less |= {"count_positive_twice": False}
    full = loss_truth.infonce(**inputs(queries, candidates, options))
    other = loss_truth.infonce(**inputs(queries, candidates, less))
    assert (full - other).abs().max() > 1e-6


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_fp32_as_exact_as_eager(temperature):
    # 67 candidates of width 61. Near copies as positives put logits at the top of their range,
    # 1 / temperature, where fp32 steps are widest.
    q = vectors(1, 31, 61, seed=3).float()
    c = vectors(1, 67, 61, seed=4).float()
    c[:, :31] = q + 0.3 * c[:, :31]

    def eager(q: Tensor, c: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(
                F.cosine_similarity(q[0, :, None, :d], c[0, None, :, :d], dim=-1) / temperature,
                torch.arange(31),
            )
            for d in (7, 61)
        ]
        return torch.stack(losses)[None]

    truth = loss_truth.results(eager, {"q": q, "c": c})
    allowed = loss_truth.results(eager, {"q": q, "c": c}, torch.float32)
    options = {"dims": (7, 61), "temperature": temperature}
    got = loss_truth.results(infonce_ref, {"q": q, "c": c, **options}, torch.float32)
    loss_truth.assert_as_exact(got, allowed, truth, temperature)


# ---- in pieces ----

SPLITS = {"halves": (3, 4), "an_empty_one": (3, 0, 4), "empty_first": (0, 7), "singles": (1,) * 7}


# Each case has one of the splits; `make test-all` runs the rest.
SPLIT = [
    pytest.param(name, split, marks=[pytest.mark.slow] * bool((i + j) % len(SPLITS)))
    for i, name in enumerate(n for n, case in CASES.items() if case[:2] == (Q, C))
    for j, split in enumerate(SPLITS)
]


@pytest.mark.parametrize(("name", "split"), SPLIT)
def test_pieces_equal_whole(name, split):
    sizes = SPLITS[split]
    all_inputs = inputs(*CASES[name])
    given = {**all_inputs}
    if "cand_counts" in given:
        start, counts = 0, []
        for size in sizes:
            counts.append((given["cand_counts"] - start).clamp(0, size))
            start += size
        given["cand_counts"] = counts

    def of_pieces(c: Tensor, **options) -> Tensor:
        return infonce_ref(c=list(c.split(sizes, dim=1)), **options)

    got = loss_truth.results(of_pieces, given)
    assert_same(got, loss_truth.results(infonce_ref, all_inputs))


@pytest.mark.parametrize("name", ["default", "all_ids", "symmetric", "near_negative_margin"])
def test_texts_leave_each_piece(name):
    # The second piece's first texts outlive the first piece's last ones: no single count says that.
    options = {**CASES[name][2], "query_counts": torch.tensor([5, 5, 3])}
    counts = [torch.tensor(n) for n in ([3, 2, 1], [0, 0, 0], [4, 3, 3])]
    all_inputs = {**inputs(Q, C, options), "cand_counts": counts}

    def of_pieces(function):
        return lambda c, **rest: function(c=list(c.split((3, 0, 4), dim=1)), **rest)

    got = loss_truth.results(of_pieces(infonce_ref), all_inputs)
    want = loss_truth.results(of_pieces(loss_truth.infonce), all_inputs)
    assert_same(got, want)


# ---- invariants ----


@pytest.mark.parametrize("d", DIMS)
def test_prefix_alone_equals_its_column(d):
    q, c = pair()
    options = masked()
    joint = infonce(q, c, dims=DIMS, **options)[:, DIMS.index(d)]
    alone, dq, dc = with_gradients(q, c, dims=(d,), **options)
    torch.testing.assert_close(alone[:, 0], joint, rtol=1e-13, atol=1e-13)
    # What lies beyond the prefix is not read and gets no gradient.
    cut = infonce(q[..., :d], c[..., :d], dims=(d,), **options)
    torch.testing.assert_close(alone, cut, rtol=1e-13, atol=1e-13)
    assert (dq[..., d:] == 0).all() and (dc[..., d:] == 0).all()


@pytest.mark.parametrize("d", DIMS)
def test_length_invariance(d):
    q, c = pair()
    loss, dq, dc = with_gradients(q, c, dims=(d,), **masked())
    factor_q = torch.logspace(-3, 3, E * Q, dtype=torch.float64).view(E, Q, 1)
    factor_c = torch.logspace(3, -3, E * C, dtype=torch.float64).view(E, C, 1)
    scaled = infonce(q * factor_q, c * factor_c, dims=(d,), **masked())
    torch.testing.assert_close(scaled, loss, rtol=1e-11, atol=1e-12)
    # So the loss has no slope along a vector: x . dx = 0 for every row of every exit.
    for x, dx in ((q, dq), (c, dc)):
        along = (x * dx).sum(-1).abs()
        assert (along <= 1e-12 * (x.norm(dim=-1) * dx.norm(dim=-1)) + 1e-13).all()
    if d > 1:
        assert dq.abs().max() > 0.01


def test_permutation():
    q, c = pair()
    options = {**masked(), "directions": ALL, "owner": OWNER, "false_negative_margin": 0.1}
    loss, dq, dc = with_gradients(q, c, dims=DIMS, **options)
    rows, columns = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([6, 2, 0, 4, 1, 3, 5])
    where, whose = columns.argsort(), rows.argsort()  # old -> new
    owner = OWNER[columns]
    moved = {
        **options,
        "target": torch.where(options["target"] < 0, -1, where[options["target"]])[rows],
        "query_ids": options["query_ids"][rows],
        "cand_ids": options["cand_ids"][columns],
        "owner": torch.where(owner < 0, -1, whose[owner]),
    }
    loss2, dq2, dc2 = with_gradients(q[:, rows], c[:, columns], dims=DIMS, **moved)
    torch.testing.assert_close(loss2, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dq2, dq[:, rows], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dc2, dc[:, columns], rtol=1e-11, atol=1e-12)


# ---- edges ----


@pytest.mark.parametrize("name", ["default", "all", "symmetric_negatives", "near_doc_to_doc"])
def test_no_row_has_a_positive(name):
    options = {**CASES[name][2], "target": torch.full((Q,), -1)}
    got = loss_truth.results(infonce, inputs(Q, C, options))
    assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize("directions", [ALL[:1], ALL[:2], ALL], ids=len)
def test_no_negative_is_left(directions):
    # One id for all: only the positive remains, log(1) = 0, and nothing to learn.
    ids = {"query_ids": torch.zeros(Q, dtype=torch.int64), "cand_ids": torch.zeros(C).long()}
    got = loss_truth.results(infonce, inputs(Q, C, {**ids, "directions": directions}))
    assert all((x == 0).all() for x in got.values())


def test_empty_inputs():
    options = {"dims": DIMS, "directions": ALL}
    none = torch.zeros(0, dtype=torch.int64)
    q, c = pair()
    for inputs_ in (
        {"q": q[:, :0], "c": c},
        {"q": q[:, :0], "c": c[:, :0]},
        {"q": q, "c": c[:, :0], "target": torch.full((Q,), -1)},
        {"q": q[:, :0], "c": c, "negatives": vectors(E, 0, K, D)},
        {"q": q[:, :0], "c": c, "query_ids": none, "cand_ids": torch.arange(C)},
        {"q": q, "c": c, "negatives": vectors(E, Q, 0, D), "target": torch.full((Q,), -1)},
    ):
        got = loss_truth.results(infonce, {**inputs_, **options})
        assert all((x == 0).all() for x in got.values())
    one = loss_truth.results(infonce, {"q": q, "c": c, "negatives": vectors(E, Q, 0, D), **options})
    del one["gradient of negatives"]
    assert_same(one, loss_truth.results(infonce, {"q": q, "c": c, **options}))


def zeroed() -> dict:
    """A dead unit can make a short prefix exactly zero, in a query, its positive or a negative."""
    q, c, own = *pair(), vectors(E, Q, K, D, seed=3)
    q[:, 1, :3] = 0
    c[:, 2, :3] = 0
    c[:, 6] = 0
    own[:, 0, 1] = 0
    return {"q": q, "c": c, "negatives": own, "dims": DIMS, "directions": ALL}


def test_a_zero_prefix_has_cosine_zero():
    assert_same(
        loss_truth.results(infonce, zeroed()),
        loss_truth.results(loss_truth.infonce, zeroed()),
    )
    # Query 1 against candidates 0..4 at prefix 3: all cosines are equal.
    loss = infonce(zeroed()["q"][:, 1:2], pair()[1][:, :Q], dims=(3,), temperature=0.01)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(Q)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_zero_prefix_is_finite(dtype):
    got = loss_truth.results(infonce, zeroed(), dtype)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("directions", [ALL[:1], ALL], ids=len)
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_nan_shows(side, directions):
    q, c = pair(dtype=torch.float32)
    # Coordinate 4 of exit 1: prefixes 1 and 3 and exit 0 do not read it, all others do.
    (q if side == "query" else c)[1, 2, 4] = torch.nan
    loss = infonce(q, c, dims=DIMS, directions=directions)
    assert loss[0].isfinite().all() and loss[1, :2].isfinite().all() and loss[1, 2:].isnan().all()


# "everything" reads the queries in several places, each of whose gradients is rounded before they
# are summed: four halves of a step.
@pytest.mark.parametrize(("name", "steps"), [("default", 0), ("everything", 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_fp32(dtype, name, steps):
    all_inputs = loss_truth.rounded({**inputs(*CASES[name]), "temperature": 0.01}, dtype)
    half = loss_truth.results(infonce, all_inputs, dtype)
    full = loss_truth.results(infonce, all_inputs, torch.float32)
    assert half["output 0"].dtype == torch.float32
    assert torch.equal(half.pop("output 0"), full.pop("output 0"))
    for gradient in half:
        assert half[gradient].dtype == dtype
        want = full[gradient].to(dtype)
        atol = steps * torch.finfo(dtype).eps * want.abs().max().item()
        torch.testing.assert_close(half[gradient], want, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_changes_nothing(dtype):
    q, c = pair(dtype=dtype)
    options = {"dims": DIMS, "directions": ALL, "temperature": 0.01, "false_negative_margin": 0.1}
    plain = with_gradients(q, c, **options)
    inside = with_gradients(q, c, autocast=True, **options)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, inside, strict=True))


def test_reference_by_name():
    q, c = pair()
    assert torch.equal(infonce(q, c, dims=DIMS, impl="reference"), infonce_ref(q, c, dims=DIMS))


# ---- errors ----

ZEROS = torch.zeros(E, Q, K, D, dtype=torch.float64)
MASK = torch.ones(Q, K, dtype=torch.bool)
WRONG = {
    "impl": ({"impl": "cuda"}, r"impl: expected one of \('auto', 'triton', 'reference'\)"),
    "impl_float64": (
        {"impl": "triton"},
        "impl: triton supports fp32, bf16 and fp16, got torch.float64",
    ),
    "no_piece": ({"c": []}, "c: expected a tensor or at least one piece"),
    "dims_none": ({"dims": ()}, "dims: expected rising"),
    "dims_falling": ({"dims": (8, 3)}, "dims: expected rising"),
    "dims_twice": ({"dims": (3, 3)}, "dims: expected rising"),
    "dims_zero": ({"dims": (0, 3)}, "dims: expected rising"),
    "dims_too_wide": ({"dims": (3, D + 1)}, rf"dims: expected rising widths in 1\.\.{D}"),
    "directions": ({"directions": ("query_to_doc", "x")}, "directions: expected some of"),
    "direction_twice": ({"directions": ("query_to_doc",) * 2}, "directions: .* each once"),
    "no_direction": ({"directions": ()}, "directions: expected at least one"),
    "partition_mode": ({"partition_mode": "both"}, "partition_mode: expected 'joint' or"),
    "query_to_query_alone": (
        {"directions": (ALL[0], ALL[2]), "partition_mode": "per_direction"},
        "partition_mode: expected 'joint' with",
    ),
    "doc_to_doc_alone": (
        {"directions": (ALL[0], ALL[3]), "partition_mode": "per_direction"},
        "partition_mode: expected 'joint' with",
    ),
    "negatives_of_no_direction": (
        {"directions": ALL[1:2], "partition_mode": "per_direction", "negatives": ZEROS},
        "directions: expected query_to_doc",
    ),
    "twice_of_one": ({"count_positive_twice": True}, "count_positive_twice: expected query_to_doc"),
    "twice_per_direction": (
        {**loss_truth.SYMMETRIC, "count_positive_twice": True},
        "count_positive_twice: expected",
    ),
    "temperature_zero": ({"temperature": 0.0}, "temperature: expected a positive"),
    "temperature_negative": ({"temperature": -1.0}, "temperature: expected a positive"),
    "temperature_nan": ({"temperature": math.nan}, "temperature: expected a positive"),
    "temperatures_zero": ({"temperature": torch.zeros(E, 1)}, "temperature: expected positive"),
    "temperatures_nan": ({"temperature": torch.tensor(math.nan)}, "temperature: expected positive"),
    "temperatures_integer": ({"temperature": torch.tensor(1)}, "temperature: expected floating"),
    "temperatures_elsewhere": (
        {"temperature": torch.ones(E, 1, device="meta")},
        "temperature: expected floating numbers on cpu",
    ),
    "temperatures_of_exits": (
        {"temperature": torch.ones(E)},
        rf"temperature: expected to expand to \[{E}, {len(DIMS)}\], got \[{E}\]",
    ),
    "temperatures_3d": ({"temperature": torch.ones(1, 1, 1)}, "temperature: expected to expand"),
    "target_short": ({"target": torch.zeros(Q - 1).long()}, rf"target: expected \[{Q}\] integers"),
    "target_floating": ({"target": torch.zeros(Q)}, rf"target: expected \[{Q}\] integers"),
    "target_elsewhere": ({"target": torch.zeros(Q, device="meta").long()}, "target: .* on cpu"),
    "target_large": ({"target": torch.full((Q,), C)}, rf"target: expected -1\.\.{C - 1}, got {C}"),
    "target_below": ({"target": torch.full((Q,), -2)}, "target: expected -1"),
    "one_id": ({"query_ids": torch.arange(Q)}, "query_ids, cand_ids: expected both or neither"),
    "other_id": ({"cand_ids": torch.arange(C)}, "query_ids, cand_ids: expected both or neither"),
    "ids_short": (
        {"query_ids": torch.arange(Q), "cand_ids": torch.arange(C - 1)},
        rf"cand_ids: expected \[{C}\] integers on cpu, got \[{C - 1}\]",
    ),
    "ids_swapped": (
        {"query_ids": torch.arange(C), "cand_ids": torch.arange(Q)},
        rf"query_ids: expected \[{Q}\]",
    ),
    "owner": ({"owner": torch.arange(Q)}, rf"owner: expected \[{C}\] integers"),
    "query_counts": ({"query_counts": torch.arange(E + 1)}, rf"query_counts: expected \[{E}\]"),
    "cand_counts": ({"cand_counts": torch.ones(E)}, rf"cand_counts: expected \[{E}\] integers"),
    "cand_counts_of_pieces": (
        {"cand_counts": [torch.zeros(E).long()] * 2},
        "cand_counts: expected 1, one a piece, got 2",
    ),
    "negatives_3d": ({"negatives": ZEROS[0]}, r"q, negatives: expected \[E, Q, D\] and \[E, Q, K"),
    "negatives_of_others": ({"negatives": ZEROS[:, 1:]}, "q, negatives: expected"),
    "negatives_narrow": ({"negatives": ZEROS[..., 1:]}, "q, negatives: expected"),
    "negatives_float": ({"negatives": ZEROS.float()}, "q, negatives: expected one dtype"),
    "mask_alone": ({"negatives_mask": MASK}, "negatives_mask: expected bool None with negatives"),
    "mask_short": (
        {"negatives": ZEROS, "negatives_mask": MASK[1:]},
        rf"negatives_mask: expected bool \[{Q}, {K}\]",
    ),
    "mask_integer": (
        {"negatives": ZEROS, "negatives_mask": MASK.long()},
        "negatives_mask: expected bool",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(options, message):
    q, c = pair()
    with pytest.raises(ValueError, match=message):
        infonce(**{"q": q, "c": c, "dims": DIMS, **options})


def test_wrong_vectors():
    q, c = pair()
    wrong = [
        (q[0], c, r"q, c: expected \[E, Q, D\] and \[E, C, D\]"),
        (q, c[0], "q, c: expected"),
        (q, [c, c[..., :-1]], "q, c: expected"),  # unlike widths
        (q[:1], c, "q, c: expected"),  # unlike exits
        (q.float(), c, "q, c: expected one dtype and device"),
        (q, c.to("meta"), "q, c: expected one dtype and device"),
        (*pair(C, Q), "target: needed when Q > C"),
        (q.long(), c.long(), "q, c: expected a floating dtype, got torch.int64"),
    ]
    for a, b, message in wrong:
        with pytest.raises(ValueError, match=message):
            infonce(a, b, dims=DIMS)
