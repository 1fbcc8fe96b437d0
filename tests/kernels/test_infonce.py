"""The nested contrastive loss against plain loops, finite differences and sentence-transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from mlembed_kernels import infonce

# E exits, Q queries, C candidates, D width: primes and unlike each other, so that no axis passes
# for another; prefixes include a single coordinate, where a cosine is only a sign.
E, Q, C, D = 2, 5, 7, 11
DIMS = (1, 3, 8, 11)


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of many lengths, as raw embeddings have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    lengths = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    return (x * lengths).to(dtype)


def pair(q: int = Q, c: int = C, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return vectors(E, q, D, seed=1, dtype=dtype), vectors(E, c, D, seed=2, dtype=dtype)


def by_hand(q, c, dims, temperature, target=None, query_ids=None, cand_ids=None) -> list:
    """The formula of the module's docstring, one number at a time."""
    q, c = q.tolist(), c.tolist()
    target = list(range(len(q[0]))) if target is None else target.tolist()
    table = []
    for exit_q, exit_c in zip(q, c, strict=True):
        losses = []
        for d in dims:
            rows = []
            for i, a in enumerate(exit_q):
                if target[i] < 0:
                    continue
                logits = []
                for j, b in enumerate(exit_c):
                    same = query_ids is not None and query_ids[i] == cand_ids[j]
                    if same and j != target[i]:
                        continue
                    dot = math.fsum(x * y for x, y in zip(a[:d], b[:d], strict=True))
                    cosine = dot / (math.hypot(*a[:d]) * math.hypot(*b[:d]))
                    logits.append((j, cosine / temperature))
                top = max(s for _, s in logits)
                total = top + math.log(math.fsum(math.exp(s - top) for _, s in logits))
                rows.append(total - dict(logits)[target[i]])
            losses.append(math.fsum(rows) / max(len(rows), 1))
        table.append(losses)
    return table


def with_gradients(
    q: Tensor, c: Tensor, autocast: bool = False, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dq, dc; `autocast` around the forward pass, as a training step has it."""
    q, c = (x.detach().clone().requires_grad_() for x in (q, c))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_EM = infonce(q, c, **options)
    # Unlike weights, so that no exit or prefix passes for another.
    weights = torch.arange(1.0, loss_EM.numel() + 1).view_as(loss_EM).to(loss_EM.dtype)
    return loss_EM.detach(), *torch.autograd.grad((loss_EM * weights).sum(), (q, c))


def masked() -> dict:
    """Query 0 has its own text twice among the candidates, queries 1 and 4 share a text, query 3
    has no positive, query 2's positive is not on the diagonal; id 60 is nobody's."""
    return {
        "target": torch.tensor([0, 1, 5, -1, 4]),
        "query_ids": torch.tensor([10, 11, 12, 13, 11]),
        "cand_ids": torch.tensor([10, 11, 60, 10, 11, 12, 13]),
    }


CASES = {
    "square": (Q, Q, {}),
    "more_candidates": (Q, C, {}),
    "more_queries": (C, Q, {"target": torch.tensor([0, 4, 2, 2, 1, 0, 3])}),
    "one_by_one": (1, 1, {}),
    "one_query": (1, C, {"target": torch.tensor([C - 1])}),
    "no_positive_for_some": (Q, C, {"target": torch.tensor([-1, 6, 0, -1, 2])}),
    "false_negatives": (Q, C, masked()),
}
cases = pytest.mark.parametrize(("queries", "candidates", "options"), CASES.values(), ids=CASES)


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.01])
@cases
def test_equals_the_loop(queries, candidates, options, temperature):
    q, c = pair(queries, candidates)
    got = infonce(q, c, dims=DIMS, temperature=temperature, **options)
    assert got.shape == (E, len(DIMS)) and got.dtype == torch.float64
    want = torch.tensor(by_hand(q, c, DIMS, temperature, **options), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_default_temperature():
    q, c = pair()
    want = torch.tensor(by_hand(q, c, DIMS, 0.05), dtype=torch.float64)
    torch.testing.assert_close(infonce(q, c, dims=DIMS), want, rtol=1e-11, atol=1e-12)


@cases
def test_gradcheck(queries, candidates, options):
    # Without prefix 1: there a cosine is a sign, flat wherever it can be differentiated.
    q, c = (x.requires_grad_() for x in pair(queries, candidates))
    assert torch.autograd.gradcheck(
        lambda a, b: infonce(a, b, dims=DIMS[1:], temperature=0.3, **options), (q, c)
    )


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_fp32_is_as_exact_as_eager(temperature):
    # 67 candidates of width 61 (primes above a tile's 64 / below it). Near copies as positives put
    # logits at the top of their range, 1 / temperature, where fp32 steps are widest.
    q = vectors(1, 31, 61, seed=3).float()
    c = vectors(1, 67, 61, seed=4).float()
    c[:, :31] = q + 0.3 * c[:, :31]
    dims = (7, 61)

    def eager(q: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, c = (x.detach().clone().requires_grad_() for x in (q, c))
        losses = [
            F.cross_entropy(
                F.cosine_similarity(q[0, :, None, :d], c[0, None, :, :d], dim=-1) / temperature,
                torch.arange(31),
            )
            for d in dims
        ]
        loss = torch.stack(losses)
        return loss.detach(), *torch.autograd.grad((loss * torch.tensor([1, 2])).sum(), (q, c))

    truth = eager(q.double(), c.double())
    got = with_gradients(q, c, dims=dims, temperature=temperature)
    for name, a, e, t in zip(("loss", "dq", "dc"), got, eager(q, c), truth, strict=True):
        # Floor: a logit near 1 / temperature is only known to half a step of fp32 there.
        floor = torch.finfo(torch.float32).eps / temperature * t.abs().max().item()
        error, allowed = ((x.double() - t).abs().max().item() for x in (a, e))
        assert error <= allowed + floor, f"{name}: error {error}, eager {allowed}, floor {floor}"


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
def test_cosines_ignore_length(d):
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


def test_permuting_rows_and_columns():
    q, c = pair()
    options = masked()
    loss, dq, dc = with_gradients(q, c, dims=DIMS, **options)
    rows, columns = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([6, 2, 0, 4, 1, 3, 5])
    where = columns.argsort()  # old column -> new column
    target = torch.where(options["target"] < 0, -1, where[options["target"]])[rows]
    moved = {
        "target": target,
        "query_ids": options["query_ids"][rows],
        "cand_ids": options["cand_ids"][columns],
    }
    loss2, dq2, dc2 = with_gradients(q[:, rows], c[:, columns], dims=DIMS, **moved)
    torch.testing.assert_close(loss2, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dq2, dq[:, rows], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dc2, dc[:, columns], rtol=1e-11, atol=1e-12)


def test_exits_do_not_mix():
    q, c = pair()
    both = infonce(q, c, dims=DIMS)
    for e in range(E):
        alone = infonce(q[e : e + 1], c[e : e + 1], dims=DIMS)
        torch.testing.assert_close(both[e : e + 1], alone, rtol=1e-13, atol=1e-13)


def test_another_copy_of_the_own_text_changes_nothing():
    q, c = pair(Q, Q)
    ids = torch.arange(Q)
    base = infonce(q, c, dims=DIMS, query_ids=ids, cand_ids=ids)
    copies = torch.cat([c, c], dim=1)
    # The copies are negatives for all but their owner: mask all of them for one query at a time.
    for i in range(Q):
        one = infonce(
            q[:, i : i + 1],
            copies,
            dims=DIMS,
            target=torch.tensor([i]),
            query_ids=torch.tensor([i]),
            cand_ids=torch.cat([ids, torch.full((Q,), i)]),
        )
        own = infonce(q[:, i : i + 1], c, dims=DIMS, target=torch.tensor([i]))
        torch.testing.assert_close(one, own, rtol=1e-12, atol=1e-12)
    unmasked = infonce(q, copies, dims=DIMS)
    assert (unmasked > base + 0.01).all()


def test_no_row_has_a_positive():
    q, c = pair()
    loss, dq, dc = with_gradients(q, c, dims=DIMS, target=torch.full((Q,), -1))
    assert (loss == 0).all() and (dq == 0).all() and (dc == 0).all()


def test_no_negative_is_left():
    # One id for all: only the positive remains, log(1) = 0, and nothing to learn.
    q, c = pair()
    ids = {"query_ids": torch.zeros(Q, dtype=torch.int64), "cand_ids": torch.zeros(C).long()}
    loss, dq, dc = with_gradients(q, c, dims=DIMS, **ids)
    for x in (loss, dq, dc):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_no_queries():
    q, c = vectors(E, 0, D), vectors(E, C, D)
    loss, dq, dc = with_gradients(q, c, dims=DIMS)
    assert (loss == 0).all() and dq.shape == q.shape and (dc == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_prefix_is_finite(dtype):
    # A dead unit can make a short prefix exactly zero, in a query, its positive or a negative.
    # Not fp16: normalize's gradient at zero is 1e12 times its input's, beyond fp16's range.
    q, c = pair(dtype=dtype)
    q[:, 1, :3] = 0
    c[:, 2, :3] = 0
    c[:, 6, :] = 0
    loss, dq, dc = with_gradients(q, c, dims=DIMS)
    assert loss.isfinite().all()
    assert dq.isfinite().all() and dc.isfinite().all()


@pytest.mark.parametrize("side", ["query", "candidate"])
def test_not_a_number_is_not_hidden(side):
    q, c = pair(dtype=torch.float32)
    # Coordinate 4 of exit 1: prefixes 1 and 3 and exit 0 stay clean, the others must say so.
    (q if side == "query" else c)[1, 2, 4] = torch.nan
    loss = infonce(q, c, dims=DIMS)
    assert loss[0].isfinite().all() and loss[1, :2].isfinite().all() and loss[1, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype):
    q, c = pair(dtype=dtype)
    loss, dq, dc = with_gradients(q, c, dims=DIMS, temperature=0.01)
    wide, wide_dq, wide_dc = with_gradients(q.float(), c.float(), dims=DIMS, temperature=0.01)
    assert loss.dtype == torch.float32 and dq.dtype == dc.dtype == dtype
    assert torch.equal(loss, wide)
    assert torch.equal(dq, wide_dq.to(dtype)) and torch.equal(dc, wide_dc.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_around_it_changes_nothing(dtype):
    q, c = pair(dtype=dtype)
    plain = with_gradients(q, c, dims=DIMS, temperature=0.01)
    inside = with_gradients(q, c, autocast=True, dims=DIMS, temperature=0.01)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, inside, strict=True))


def test_temperature_001_with_near_copies():
    # Cosines near 1 and logits near 100: exp(100) is no fp32 number, the difference to it is.
    q = vectors(1, 13, 61, seed=3).float()
    c = q + 1e-3 * vectors(1, 13, 61, seed=4).float()
    c = torch.cat([c, q[:, :5] + 2e-3 * vectors(1, 5, 61, seed=5).float()], dim=1)
    loss, dq, dc = with_gradients(q, c, dims=(61,), temperature=0.01)
    want = torch.tensor(by_hand(q, c, (61,), 0.01))
    assert want.item() > 0.1  # the five near copies really compete with the positives
    torch.testing.assert_close(loss, want, rtol=0, atol=2e-5)
    assert dq.isfinite().all() and dc.isfinite().all()


def test_reference_by_name():
    q, c = pair()
    assert torch.equal(infonce(q, c, dims=DIMS, impl="reference"), infonce(q, c, dims=DIMS))


# ---- sentence-transformers ----


class Embeddings(nn.Module):
    """Stands where sentence-transformers' losses expect a model: hands on vectors it is given."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return 61


# In float64 the two may differ by rounding only; in fp32 by a few units of logits up to 20.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_equals_sentence_transformers(temperature, negatives, dtype, tolerance):
    n, dims = 31, (5, 16, 61)
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(2 + negatives, n, 61, generator=generator, dtype=torch.float64)
    base[1] += base[0]
    columns = [x.to(dtype).requires_grad_() for x in base]

    model = Embeddings()
    ranking = MultipleNegativesRankingLoss(model, scale=1 / temperature)
    matryoshka = MatryoshkaLoss(model, ranking, list(dims))
    theirs = matryoshka([{"vectors": x} for x in columns], torch.empty(0))
    their_gradients = torch.autograd.grad(theirs, columns)

    candidates = torch.cat(columns[1:])  # positives, then each column of hard negatives
    loss_EM = infonce(columns[0][None], candidates[None], dims=dims, temperature=temperature)
    ours = loss_EM.sum()  # uniform weights there are ones
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(ours, columns), their_gradients, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- errors ----

WRONG = {
    "impl": ({"impl": "triton"}, "impl: expected one of"),
    "dims_none": ({"dims": ()}, "dims: expected rising"),
    "dims_falling": ({"dims": (8, 3)}, "dims: expected rising"),
    "dims_twice": ({"dims": (3, 3)}, "dims: expected rising"),
    "dims_zero": ({"dims": (0, 3)}, "dims: expected rising"),
    "dims_too_wide": ({"dims": (3, D + 1)}, rf"dims: expected rising widths in 1\.\.{D}"),
    "temperature_zero": ({"temperature": 0.0}, "temperature: expected a positive"),
    "temperature_negative": ({"temperature": -1.0}, "temperature: expected a positive"),
    "temperature_nan": ({"temperature": math.nan}, "temperature: expected a positive"),
    "target_short": ({"target": torch.zeros(Q - 1).long()}, rf"target: expected \[{Q}\]"),
    "target_large": ({"target": torch.full((Q,), C)}, rf"target: expected -1\.\.{C - 1}, got {C}"),
    "target_below": ({"target": torch.full((Q,), -2)}, "target: expected -1"),
    "one_id": ({"query_ids": torch.arange(Q)}, "both or neither"),
    "other_id": ({"cand_ids": torch.arange(C)}, "both or neither"),
    "ids_short": (
        {"query_ids": torch.arange(Q), "cand_ids": torch.arange(C - 1)},
        rf"expected \[{Q}\] and \[{C}\], got \[{Q}\] and \[{C - 1}\]",
    ),
    "ids_swapped": (
        {"query_ids": torch.arange(C), "cand_ids": torch.arange(Q)},
        "query_ids, cand_ids: expected",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        infonce(*pair(), **{"dims": DIMS, **options})


def test_wrong_vectors():
    q, c = pair()
    wrong = [
        (q[0], c, "q, c: expected"),
        (q, c[0], "q, c: expected"),
        (q, c[..., :-1], "q, c: expected"),  # unlike widths
        (q[:1], c, "q, c: expected"),  # unlike exits
        (q.float(), c, "expected one dtype and device"),
        (*pair(C, Q), "target: needed when Q > C"),
    ]
    for a, b, message in wrong:
        with pytest.raises(ValueError, match=message):
            infonce(a, b, dims=DIMS)


def test_integers_are_refused():
    x = torch.ones(E, Q, D, dtype=torch.int64)
    with pytest.raises(ValueError, match="int64"):
        infonce(x, x, dims=DIMS)
