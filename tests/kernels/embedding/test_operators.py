"""The nested embedding by Triton as torch's operator: compiled, in CUDA graphs, on a device."""

import pytest
import torch
from embed_truth import (
    DEVICE,
    DTYPES,
    HALF,
    IDS,
    D,
    cotangent,
    factors,
    module,
    run,
    same_bits,
    zipf,
)
from torch import Tensor, library

from mlembed_kernels import TokenIndex, embed, embed_ref

pytest.importorskip("triton")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")


@pytest.mark.parametrize("name", ["stream", "prime"])
def test_operators_pass_opcheck(name):
    o = TokenIndex.of(torch.tensor(IDS[name])).to(DEVICE)
    U, W = (x.requires_grad_() for x in factors(torch.float32))
    args = U, W, o.buffer, list(o.counts), list(o.bounds), 65, HALF
    assert set(library.opcheck(module().embed_op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast):
    """One graph, without a break, forward and backward; a few of them for any number of tokens."""
    made: list[object] = []

    def backend(graph, example_inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def twice(ids, U, W, token_index) -> Tensor:
        return 2 * embed(ids, U, W, 65, impl="triton", token_index=token_index)

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    dtype = HALF if autocast else torch.float32
    V, D = 61, 48
    for T in (100, 151, 202, 253):
        ids = torch.tensor([*(token % V for token in IDS["stream"][:T]), *range(2, V)])
        o = TokenIndex.of(ids).to(DEVICE)
        ids, dx = ids.to(DEVICE), cotangent(ids, D, dtype)
        results = []
        for function in (compiled, twice):
            U, W = (x.requires_grad_() for x in factors(torch.float32, V=V, D=D))
            with torch.autocast(DEVICE, HALF, enabled=autocast):
                x = function(ids, U, W, o)
            results.append((x, *torch.autograd.grad(x, (U, W), dx)))
        assert results[0][0].dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(made) <= 3, f"{len(made)} graphs for 4 batches"


def step(ids: Tensor, U: Tensor, W: Tensor, token_index: TokenIndex) -> tuple[Tensor, ...]:
    x = embed(ids, U, W, 65, token_index=token_index)
    return x, *torch.autograd.grad(x.square().sum(), (U, W))


@cuda_only
def test_auto_is_triton_on_cuda():
    U, W = factors(torch.bfloat16)
    ids = IDS["stream"]
    dx = cotangent(ids, D, torch.bfloat16)
    same_bits(run(ids, U, W, 65, dx, "auto"), run(ids, U, W, 65, dx))


@cuda_only
def test_host_does_not_wait(no_wait):
    U, W = (x.requires_grad_() for x in factors(torch.bfloat16))
    ids = torch.tensor(IDS["stream"])
    o = TokenIndex.of(ids).to(DEVICE)
    given = ids.to(DEVICE), U, W, o
    step(*given)  # compiles
    with no_wait():
        step(*given)


@cuda_only
def test_in_a_cuda_graph():
    U, W = (x.requires_grad_() for x in factors(torch.bfloat16))
    ids = torch.tensor(IDS["stream"])
    given = ids.to(DEVICE), U, W, TokenIndex.of(ids).to(DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*given)
    with torch.no_grad():
        U += 1  # other numbers in the same places
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(*given), strict=True))


@cuda_only
def test_memory_on_the_device():
    """The measured step allocates nothing beyond inputs, outputs and 64 MiB."""
    T, many, rank = 73_419, 151_936, 512
    U, W = (x.requires_grad_() for x in factors(torch.bfloat16, V=many, R=rank, D=1024))
    ids = torch.tensor(zipf(T, many))
    o, ids = TokenIndex.of(ids).to(DEVICE), ids.to(DEVICE)
    dx = torch.ones(T, 1024, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2):  # the first makes the libraries' workspaces
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x = embed(ids, U, W, rank, token_index=o)
        dU, dW = torch.autograd.grad(x, (U, W), dx)
        most = torch.cuda.max_memory_allocated() - before - x.nbytes - dU.nbytes - dW.nbytes
        del x, dU, dW
    assert most <= 64 << 20


@cuda_only
def test_rows_far_apart():
    """Offsets beyond 2^31 numbers: of U, of x, of dx and of dU."""
    T, many, rank = 1 << 20, 1 << 21, 1100
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of device memory")
    U, W = factors(torch.bfloat16, V=1, R=rank, D=2100)
    U = U.expand(many, rank).contiguous().requires_grad_()
    W.requires_grad_()
    ids = torch.full((T,), many - 1)
    ids[: T // 2] = torch.arange(T // 2) * 4
    x = embed(ids.to(DEVICE), U, W, rank, impl="triton")
    want = embed_ref(torch.zeros(1, dtype=torch.int64, device=DEVICE), U[:1], W, rank)
    assert all(torch.equal(x[i], x[0]) for i in (1, T // 2, T - 1))
    torch.testing.assert_close(x[-1:], want)
    (dU,) = torch.autograd.grad(x, U, torch.ones_like(x[:1, :1]).expand_as(x))
    one = dU[4].float()
    torch.testing.assert_close(one, W.float().sum(1), rtol=1e-2, atol=0.5)
    torch.testing.assert_close(dU[-1].float(), one * (T - T // 2), rtol=1e-2, atol=1.0)


@cuda_only
def test_in_inductor():
    U, W = (x.requires_grad_() for x in factors(torch.bfloat16))
    ids = torch.tensor(IDS["stream"])
    given = ids.to(DEVICE), U, W, TokenIndex.of(ids).to(DEVICE)
    torch._dynamo.reset()
    got, want = torch.compile(step, fullgraph=True)(*given), step(*given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
