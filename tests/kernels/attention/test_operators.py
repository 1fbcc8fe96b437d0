"""Packed attention by Triton as torch's operator: compiled, in CUDA graphs, far apart in memory."""

import pytest
import torch
from attention_truth import (
    DEVICE,
    HALF,
    LENGTHS,
    batch,
    bounds,
    inputs,
    on,
    results,
    run,
    same_bits,
    triton,
)
from torch import Tensor, library

from mlembed_kernels import AttentionPlan

pytest.importorskip("triton", reason="needs triton, which is not installed")

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA: a device to wait for")


def test_operators_pass_opcheck():
    from mlembed_kernels.attention._op import attention_op

    lengths = [66]  # of short ones one output has nothing
    plan = AttentionPlan.of(bounds(lengths)).to(DEVICE)
    counts = [plan.tokens, plan.sequences, plan.max_seqlen, *plan.counts]
    q, k, v = (x.requires_grad_() for x in on(DEVICE, HALF, inputs(lengths, (2, 1))))
    for alive in (None, plan.alive_T(torch.tensor(1, device=DEVICE))):
        args = q, k, v, plan.buffer, alive, counts, 0.25, alive is None
        assert set(library.opcheck(attention_op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("by_count", [False, True], ids=["all", "count"])
def test_compiled(by_count):
    """One graph, without a break, forward and backward; a few of them for any number of tokens."""
    made: list[object] = []

    def backend(graph, example_inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def twice(q, k, v, **options) -> Tensor:
        return 2 * triton(q, k, v, causal=True, **options) + q

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    for lengths in ([3, 66], [5, 7, 2], [65, 4], [1, 2, 3, 4], [9, 80]):
        qkv, do = batch(HALF, lengths, (1, 1))
        options = {"cu_seqlens": bounds(lengths, DEVICE), "plan": AttentionPlan.of(bounds(lengths))}
        options["plan"] = options["plan"].to(DEVICE)
        if by_count:
            options["active"] = torch.tensor(len(lengths) - 1, device=DEVICE)
        got, want = (results(f, qkv, do=do, **options) for f in (compiled, twice))
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    assert len(made) <= 3, f"{len(made)} graphs for 5 batches"


def step(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, count: Tensor) -> tuple[Tensor, ...]:
    out = triton(q, k, v, cu_seqlens=plan.cu_seqlens, causal=True, plan=plan, active=count)
    return out, *torch.autograd.grad(out.square().sum(), (q, k, v))


@cuda_only
def test_host_does_not_wait(no_wait):
    qkv, _ = batch(torch.bfloat16)
    qkv = [x.requires_grad_() for x in qkv]
    plan = AttentionPlan.of(bounds(LENGTHS)).to(DEVICE)
    count = torch.tensor(4, device=DEVICE)
    flags = torch.tensor([True, False] * 3 + [True], device=DEVICE)
    for active in (count, flags, None):
        step(*qkv, plan, active)  # compiles
        with no_wait():
            step(*qkv, plan, active)


@cuda_only
def test_in_a_cuda_graph():
    """Captured once, replayed with another count."""
    qkv, _ = batch(torch.bfloat16)
    qkv = [x.requires_grad_() for x in qkv]
    plan = AttentionPlan.of(bounds(LENGTHS)).to(DEVICE)
    count = torch.tensor(7, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*qkv, plan, count)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*qkv, plan, count)
    for n in (2, 4, 0, 7):
        count.fill_(n)
        graph.replay()
        want = step(*qkv, plan, torch.tensor(n, device=DEVICE))
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
        assert (captured[0][sum(LENGTHS[:n]) :] == 0).all()


@cuda_only
def test_rows_far_apart():
    """Offsets beyond 2^31: rows of a tile are close together, tiles are not."""
    lengths, step = [64, 64, 64, 130], 1 << 23
    T = sum(lengths)
    if torch.cuda.mem_get_info()[0] < 3 * T * step:
        pytest.skip("needs 8 GB of device memory")
    whole = torch.empty(T, step, dtype=torch.bfloat16, device=DEVICE)
    qkv, _ = batch(torch.bfloat16, lengths)
    far = [
        whole[:, i * 64 : i * 64 + x[0].numel()].view(T, -1, 16).copy_(x) for i, x in enumerate(qkv)
    ]
    same_bits(run(far, lengths), run(qkv, lengths))


@cuda_only
def test_in_inductor():
    qkv, do = batch(torch.bfloat16)
    options = {"cu_seqlens": bounds(LENGTHS), "plan": AttentionPlan.of(bounds(LENGTHS)).to(DEVICE)}

    def doubled(q, k, v, **options) -> Tensor:
        return 2 * triton(q, k, v, causal=True, **options)

    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True)
    got, want = (results(f, qkv, do=do, **options) for f in (compiled, doubled))
    same_bits(got, want)
