"""Distilled similarities against plain float64 formulas, whole and in Triton's interpreter."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from live_memory import Live, without_kernels
from pairwise import all_pairs
from torch import Tensor

from mlembed_kernels import distill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("reference", "triton")


def vectors(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_hand(q, c, tq, tc, dims, kind, temperature, teacher_temperature, nq, nc) -> Tensor:
    """The docstring's formulas over the texts that are present, nothing masked."""
    losses = []
    for e, d in itertools.product(range(len(q)), dims):
        s = F.normalize(q[e, : nq[e], :d], dim=-1) @ F.normalize(c[e, : nc[e], :d], dim=-1).T
        t = F.normalize(tq[: nq[e]], dim=-1) @ F.normalize(tc[: nc[e]], dim=-1).T
        if kind == "mse":
            losses.append(((s - t) ** 2).mean())
        else:
            p, log_r = (t / teacher_temperature).softmax(-1), (s / temperature).log_softmax(-1)
            losses.append((p * (p.log() - log_r)).sum(-1).mean())
    return torch.stack(losses).view(len(q), len(dims))


# E, Q, C, D, teacher's width, dims, do texts leave: one narrow prefix; narrow and wide ones; a
# tile and one more row; a teacher wider and narrower than the student, not a multiple of 16.
SHAPES = {
    "small": (1, 3, 5, 11, 7, (11,), False),
    "nested": (2, 20, 33, 150, 40, (3, 8, 64, 150), False),
    "leaving": (3, 20, 33, 70, 140, (8, 70), True),
    "two_tiles": (1, 129, 130, 48, 16, (16, 48), False),
}
# The smallest workspace makes chunks of 128 rows: two for 129.
WORKSPACES = {"roomy": 1 << 29, "tight": 1}


@pytest.fixture(autouse=True)
def tiles(request: pytest.FixtureRequest) -> None:
    if request.node.originalname != "test_equals_formula":
        request.getfixturevalue("large_tiles")


@pytest.mark.parametrize(("name", "kind", "space"), all_pairs(SHAPES, ["mse", "kl"], WORKSPACES))
def test_equals_formula(name, kind, space, request):
    (E, Q, C, D, Dt, dims, leave), workspace = SHAPES[name], WORKSPACES[space]
    if space == "roomy":
        request.getfixturevalue("large_tiles")
    x = vectors(E, Q, D, seed=1), vectors(E, C, D, seed=2), vectors(Q, Dt, seed=3)
    x = *(v.float() for v in x), vectors(C, Dt, seed=4).float()
    nq, nc = ([n - 4 * e * leave for e in range(E)] for n in (Q, C))
    counts = {"query_counts": torch.tensor(nq), "cand_counts": torch.tensor(nc)} if leave else {}
    weights = torch.arange(1.0, E * len(dims) + 1).view(E, -1)
    results = []
    for impl, dtype in (("truth", torch.float64), *((i, torch.float32) for i in IMPLS)):
        q, c = (v.to(dtype).requires_grad_() for v in x[:2])
        t = torch.full((E, len(dims)), 0.05, dtype=dtype, requires_grad=True)
        if impl == "truth":
            loss = by_hand(*(q, c, x[2].double(), x[3].double()), dims, kind, 0.05, 0.02, nq, nc)
        else:
            loss = distill(
                *(q, c, *x[2:]),
                dims=dims,
                kind=kind,
                temperature=t,
                teacher_temperature=0.02,
                workspace=workspace,
                impl=impl,
                **counts,
            )
            assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad((loss * weights).sum(), (q, c))))
        assert all(v.isfinite().all() for v in results[-1])
    for truth, reference, triton in zip(*results, strict=True):
        top = truth.abs().max().item()
        error = [(v.double() - truth).abs().max().item() for v in (reference, triton)]
        # Logits up to 20, for KL also the teacher's up to 50, are known to half a step of fp32
        # there: how near it comes depends on how a processor's exponentials round.
        floor = torch.finfo(torch.float32).eps * (50 if kind == "kl" else 20) * top
        assert top > 0 and error[0] < 2 * floor and error[1] <= error[0] + floor, (error, floor)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_half_precision_of_wide_prefixes(kind):
    """Gradients err no more than those of the reference, and a rounding of fp16."""
    x = [vectors(1, n, 260, seed=n).half() for n in (5, 7)]
    teacher = [vectors(n, 24, seed=n).half() for n in (5, 7)]
    results = []
    for impl, dtype in (("reference", torch.float64), *((i, torch.float16) for i in IMPLS)):
        given = [v.to(dtype).requires_grad_() for v in x]
        how = {"dims": (130, 200, 260), "kind": kind, "impl": impl}
        loss = distill(*given, *(v.to(dtype) for v in teacher), **how)
        results.append(torch.autograd.grad(loss.sum(), given))
    for truth, reference, triton in zip(*results, strict=True):
        error = [(v.double() - truth).abs().max().item() for v in (reference, triton)]
        floor = torch.finfo(torch.float16).eps * truth.abs().max().item()
        assert error[1] <= error[0] + floor, (error, floor)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_matrices_fit_workspace(kind, monkeypatch):
    """Queries and exits come in turn where the workspace holds 128 queries of one exit, the least
    there is.
    """
    without_kernels(monkeypatch)
    # Packed as 768 and 1024 rows, the student's of 192 numbers, the teacher's of 48.
    q, c = (vectors(4, n, 130, seed=n).float().to(DEVICE) for n in (700, 1000))
    teacher = [vectors(n, 40, seed=n).float().to(DEVICE) for n in (700, 1000)]
    q.requires_grad_(), c.requires_grad_()
    # The teacher's number of fp32 and its entropy's term, and one of the gradient.
    forward, backward = (128 * 1024 * size for size in (8, 8 + 4))

    def of_pairs(shape: tuple[int, ...]) -> bool:
        return shape[-1:] == (1024,) and math.prod(shape) > 1024

    def loss(workspace: int) -> Tensor:
        how = {"dims": (130,), "kind": kind, "workspace": workspace, "impl": "triton"}
        return distill(q, c, *teacher, **how)

    with Live() as made:
        loss(forward)
    assert forward // 2 <= made.most(of_pairs) <= 1.01 * forward
    assert 0 < made.most(lambda shape: shape[-1:] == (192,)) <= 2 * 192 * 4 * (768 + 1024)
    out = loss(backward)
    with Live() as made:
        torch.autograd.grad(out.sum(), (q, c))
    assert backward // 2 <= made.most(of_pairs) <= 1.1 * backward


@pytest.mark.parametrize("impl", IMPLS)
def test_temperature_learns(impl):
    q, c, tq, tc = vectors(1, 4, 8, seed=1), vectors(1, 6, 8, seed=2), *vectors(2, 6, 8, seed=3)
    tq = tq[:4]

    def loss(t: float) -> Tensor:
        wide = impl == "reference"
        q_, c_, tq_, tc_ = (v if wide else v.float() for v in (q, c, tq, tc))
        temperature = torch.tensor(t, dtype=q_.dtype, requires_grad=True)
        out = distill(q_, c_, tq_, tc_, dims=(8,), kind="kl", temperature=temperature, impl=impl)
        return torch.stack([out.sum(), *torch.autograd.grad(out.sum(), temperature)]).detach()

    h = 1e-6 if impl == "reference" else 1e-3
    slope = (loss(0.3 + h)[0] - loss(0.3 - h)[0]) / (2 * h)
    assert math.isclose(loss(0.3)[1].item(), slope.item(), rel_tol=1e-6 if h < 1e-4 else 2e-3)


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("impl", IMPLS)
def test_deepest_exit_as_teacher(impl, kind):
    # Exit self-distillation: the teacher is the model's own last exit, at full width.
    q, c = vectors(2, 9, 16, seed=1).float(), vectors(2, 7, 16, seed=2).float()
    q.requires_grad_()
    loss = distill(q, c, q[-1], c[-1], dims=(8, 16), kind=kind, impl=impl)
    assert (loss[0] > 1e-3).all() and loss[1, 0] > 1e-3
    torch.testing.assert_close(loss[1, 1], torch.tensor(0.0), atol=2e-6, rtol=0)
    grad = torch.autograd.grad(loss[0].sum(), q)[0]
    assert grad[0].abs().max() > 0 and (grad[1] == 0).all()  # none to the teacher


def test_two_calls_same_bits():
    q, c = vectors(1, 70, 80, seed=1).float(), vectors(1, 50, 80, seed=2).float()
    q.requires_grad_()
    runs = []
    for _ in range(2):
        loss = distill(
            q, c, q[0], c[0, :, :40].repeat(1, 2), dims=(8, 80), kind="kl", impl="triton"
        )
        runs.append((loss, *torch.autograd.grad(loss.sum(), q)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled(impl):
    q, c = vectors(1, 5, 16, seed=1).float(), vectors(1, 6, 16, seed=2).float()

    def loss(x: Tensor) -> Tensor:
        return distill(x, c, q[0], c[0], dims=(8, 16), kind="kl", impl=impl).sum()

    x = (q * 0.5 + vectors(1, 5, 16, seed=3).float()).requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for f in (loss, compiled):
        x.grad = None
        value = f(x)
        value.backward()
        if f is loss:
            want = value.detach(), x.grad
    torch.testing.assert_close((value.detach(), x.grad), want, rtol=1e-5, atol=1e-6)


WRONG = {
    "kind": ({"kind": "cosine"}, "kind: expected one of"),
    "dims": ({"dims": (8, 99)}, "dims: expected rising widths"),
    "temperature": ({"temperature": 0.0}, "temperature: expected a positive"),
    "teacher_temperature": ({"teacher_temperature": -1.0}, "teacher_temperature: expected"),
    "counts": ({"query_counts": torch.ones(3, dtype=torch.int64)}, r"query_counts: expected \[2\]"),
    "teacher": ({"teacher_q": torch.ones(4, 3)}, "teacher_q, teacher_c: expected"),
    "teachers_width": ({"teacher_c": torch.ones(6, 4)}, r"expected \[E, Q, D\] and \[E, C, D\]"),
    "impl": ({"impl": "fast"}, "impl: expected one of"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(wrong, message):
    x = torch.ones(2, 5, 16)
    given = {"q": x, "c": torch.ones(2, 6, 16), "teacher_q": x[0, :, :3], "dims": (8, 16)}
    given |= {"teacher_c": torch.ones(6, 3)} | wrong
    with pytest.raises(ValueError, match=message):
        distill(**given)
