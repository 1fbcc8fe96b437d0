"""The loss in Triton, except its values: sizes, memory, graphs, operators."""

import math

import pytest
import torch
from live_memory import Live, without_kernels
from torch import Tensor, library

from mlembed_kernels import infonce, infonce_ref

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair(E: int, Q: int, C: int, D: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, c = (torch.randn(E, n, D, generator=generator) for n in (Q, C))
    c[:, : min(Q, C)] += q[:, : min(Q, C)]
    return q.to(DEVICE).requires_grad_(), c.to(DEVICE).requires_grad_()


# Rows far beyond a tile; the widths of models (LEALLA-large's, F2LLM's pruned ones, Qwen3's), with
# prefixes that fill neither a step of 64 columns nor a tile.
SIZES = {
    "rows_300": (1, 300, 300, 16, (8, 16)),
    "rows_1000": (1, 1000, 1000, 16, (8, 16)),
    "width_320": (1, 5, 7, 320, (8, 64, 320)),
    "width_896": (1, 5, 7, 896, (8, 16, 32, 64, 128, 256, 512, 896)),
    "width_1024": (1, 3, 5, 1024, (8, 128, 1024)),
    "two_exits": (2, 3, 5, 1024, (8, 128, 1024)),
    "width_2560": (1, 3, 4, 2560, (2560,)),
    "prefixes_of_40": (1, 5, 7, 200, (40, 80, 120, 160, 200)),
}


SECONDS = {name: pytest.mark.slow for name in ("rows_1000", "two_exits", "width_2560")}
SIZES = [pytest.param(*size, id=n, marks=SECONDS.get(n, ())) for n, size in SIZES.items()]


@pytest.mark.parametrize(("E", "Q", "C", "D", "dims"), SIZES)
def test_sizes(E, Q, C, D, dims):
    q, c = pair(E, Q, C, D)
    results = []
    for x, y, loss in (
        (q.double(), c.double(), infonce_ref),
        (q, c, infonce_ref),
        (q, c, lambda *a, **k: infonce(*a, **k, impl="triton")),
    ):
        out = loss(x, y, dims=dims)
        results.append((out, *torch.autograd.grad(out.sum(), (q, c))))
    for truth, eager, ours in zip(*results, strict=True):
        errors = [(v.double() - truth).abs().max().item() for v in (eager, ours)]
        # exp(z - log sum): both are up to 20, known to half a step of fp32 there each.
        floor = 2 * torch.finfo(torch.float32).eps * 20 * truth.abs().max().item()
        assert errors[1] <= errors[0] + floor, (errors, floor)


# Options, and bytes that a pair needs in the forward pass (a number of fp32 for 64 rows where
# columns are summed; the byte that says whether it is too similar) and in the backward pass (a
# number of fp32, and that byte).
MATRICES = {
    "rows": ({}, 0, 4),
    "both": ({"directions": ("query_to_doc", "doc_to_query")}, 4 / 64, 4),
    "near": ({"false_negative_margin": 0.1}, 1, 4 + 1),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_fit_workspace(name, monkeypatch):
    """Queries and exits come in turn where the workspace holds 128 queries of one exit, the least
    there is.
    """
    without_kernels(monkeypatch)
    options, *sizes = MATRICES[name]
    q, c = pair(4, 700, 1000, 130)  # packed as 768 and 1024 rows of 192 numbers
    forward, backward = (int(size * 128 * 1024) for size in sizes)

    def of_pairs(shape: tuple[int, ...]) -> bool:
        return shape[-1:] == (1024,) and math.prod(shape) > 1024

    def loss(workspace: int) -> Tensor:
        workspace = max(1, workspace)
        return infonce(q, c, dims=(130,), workspace=workspace, impl="triton", **options)

    with Live() as made:
        loss(forward)
    assert forward // 2 <= made.most(of_pairs) <= 1.1 * forward
    # An exit is packed while the one before still is; twice so where exits judge pairs.
    packed = 192 * 4 * (768 + 1024) * (4 if name == "near" else 2)
    assert 0 < made.most(lambda shape: shape[-1:] == (192,)) <= packed
    out = loss(backward)
    with Live() as made:
        torch.autograd.grad(out.sum(), (q, c))
    assert backward <= made.most(of_pairs) <= 1.1 * backward


cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")


def step(q: Tensor, c: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    options = {"directions": ("query_to_doc", "doc_to_query"), "false_negative_margin": 0.1}
    loss = infonce(
        q, c, dims=(8, 200), temperature=temperature, query_ids=ids, cand_ids=ids, **options
    )
    return loss, *torch.autograd.grad(loss.sum(), (q, c, temperature))


@cuda_only
def test_host_does_not_wait(no_wait):
    q, c = pair(2, 130, 130, 200)
    given = q, c, torch.arange(130, device=DEVICE), torch.tensor(0.05, device=DEVICE)
    given[3].requires_grad_()
    step(*given)  # compiles
    with no_wait():
        step(*given)


@cuda_only
def test_in_a_cuda_graph():
    q, c = pair(2, 130, 130, 200)
    given = q, c, torch.arange(130, device=DEVICE), torch.tensor(0.05, device=DEVICE)
    given[3].requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*given)
    with torch.no_grad():
        q += 0.1 * c  # other numbers in the same places
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(*given), strict=True))


def test_operators_pass_opcheck(large_tiles):
    from mlembed_kernels.similarity._cosine_op import cosine_op
    from mlembed_kernels.similarity._distill_op import distill_op
    from mlembed_kernels.similarity._lse_op import pairwise_lse_op

    x, y = pair(1, 5, 6, 24)
    scale = torch.full((1, 1), 20.0, device=DEVICE, requires_grad=True)
    at, many = torch.arange(5, device=DEVICE), torch.rand(1, 5, 3, 24, device=DEVICE)
    masks = None, None, None, None, None
    tx, ty = torch.rand(5, 8, device=DEVICE), torch.rand(6, 8, device=DEVICE)
    for op, args in (
        (pairwise_lse_op, (x, y, scale, at, *masks, [24], True, 1 << 20)),
        (cosine_op, (x, many.requires_grad_(), [24])),
        (distill_op, (x, y, tx, ty, None, None, [24], "kl", 0.05, 1 << 20)),
    ):
        assert set(library.opcheck(op, args).values()) == {"SUCCESS"}
