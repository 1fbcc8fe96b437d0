"""Times of the references and of the packing on a CPU: `pytest bench --benchmark-only`.

For changes of the host's code, on any machine. Sizes are small, so that all take a minute.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import bench  # noqa: F401 (the kernels of this checkout)

pytest.importorskip("pytest_benchmark")

import torch  # noqa: E402

from bench.embed import stream  # noqa: E402
from bench.loader import CASES, batches, workshop  # noqa: E402
from mlembed.data.packing import pack  # noqa: E402
from mlembed_kernels import AttentionPlan, TokenIndex, infonce  # noqa: E402
from mlembed_kernels.attention.attention import attention  # noqa: E402
from mlembed_kernels.embedding.embed import embed  # noqa: E402
from mlembed_kernels.similarity.cosine import cosine  # noqa: E402
from mlembed_kernels.similarity.distill import distill  # noqa: E402
from mlembed_kernels.similarity.pairwise_lse import pairwise_lse  # noqa: E402

DIMS = 8, 32
N, T, V = 96, 512, 2000
LENGTHS = torch.tensor([0, *np.random.default_rng(0).integers(5, 120, 16)]).cumsum(0)
Steps = dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


def references() -> Steps:
    """Return each kernel's reference and its leaves."""
    scale, positive = torch.full((2, len(DIMS)), 20.0), torch.arange(N)
    both = normal(2, N, DIMS[-1]), normal(2, N, DIMS[-1])
    lse = partial(pairwise_lse, dims=DIMS, scale=scale, positive=positive, columns=True)
    teachers = {"teacher_q": normal(N, 32).detach(), "teacher_c": normal(N, 32).detach()}
    plan = AttentionPlan.of(LENGTHS)
    qkv = tuple(normal(int(LENGTHS[-1]), H, 32) for H in (4, 2, 2))
    heads = partial(attention, cu_seqlens=plan.cu_seqlens, plan=plan, causal=True)
    factors = normal(V, 32), normal(32, 48)
    return {
        "infonce": (partial(infonce, dims=DIMS, impl="reference"), both),
        "pairwise_lse": (partial(lse, impl="reference"), both),
        "distill": (partial(distill, dims=DIMS, kind="kl", **teachers, impl="reference"), both),
        "cosine": (partial(cosine, dims=DIMS, impl="reference"), (both[0], both[1][:, :, None])),
        "attention": (partial(heads, impl="reference"), qkv),
        "embed": (lambda U, W: embed(stream(T, V), U, W, 32, impl="reference"), factors),
    }


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("name", list(references()))
def test_reference(name: str, backward: bool, benchmark: Any) -> None:
    function, leaves = references()[name]

    def step() -> None:
        with torch.set_grad_enabled(backward):
            outs = function(*leaves)
            outs = (outs,) if isinstance(outs, torch.Tensor) else outs
            if backward:
                outs = tuple(out for out in outs if out is not None and out.requires_grad)
                torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])

    benchmark(step)


def test_attention_plan(benchmark: Any) -> None:
    benchmark(AttentionPlan.of, LENGTHS)


def test_token_index(benchmark: Any) -> None:
    benchmark(TokenIndex.of, stream(T, V))


def test_packing(benchmark: Any) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, V, n) for n in rng.integers(5, 120, 256)]
    benchmark(pack, rows)


@pytest.mark.parametrize("name", ["groups", "streamed"])
def test_loader(name: str, benchmark: Any) -> None:
    """Make one batch, the first of a small table or of a small file."""
    if name == "groups":
        pytest.importorskip("pyarrow")
    with workshop() as folder:
        data = batches(CASES[name].toy(), folder)
        benchmark(data.__getitem__, 0)
