"""Cases of the benches and of their gates, for launches.collect."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlembed_kernels import TokenIndex, infonce, stochastic_adamw
from mlembed_kernels.attention.attention import attention
from mlembed_kernels.embedding.embed import embed

from .. import embed as embedding
from ..attention import bench as attention_bench
from ..attention import gate as attention_gate
from ..attention.cases import SKIPPING
from ..attention.peers import Batch, Packed
from ..harness import CPU, Leaves, dtype_name
from ..infonce import bench as loss_bench
from ..infonce import gate as loss_gate
from ..train_step import bench as train_step
from ..train_step import gate as step_gate
from ..train_step.cases import Case, Texts
from .launches import MODE, empty, train

Named = Iterator[tuple[str, Callable[[], None]]]


def checks_of(bench: str, checks: Iterable[Any], run: Callable[[Any, torch.dtype], None]) -> Named:
    """Yield the checks of a gate in bf16 and, where they ask for it, in fp32."""
    for check in checks:
        for dtype in (torch.bfloat16, torch.float32)[: 1 + check.fp32]:
            name = f"{bench}-gate-{check.name}-{dtype_name(dtype)}"
            yield name.replace(", ", "-").replace(" ", "-"), partial(run, check, dtype)


# ---- infonce ----


def run_loss(case: Any) -> None:
    """Run a case of bench/infonce, forward and backward."""
    q, c = (empty(case.E, case.B, case.D) for _ in "qc")
    with MODE:
        loss_bench.ours(case)(Leaves(q, c), True)


def check_loss(check: loss_gate.Check, dtype: torch.dtype) -> None:
    q, c = (empty(check.E, n, check.D, dtype=dtype) for n in (check.Q, check.C))
    options: dict[str, Any] = {"dims": check.dims, "directions": check.directions}
    options |= {"partition_mode": check.partition_mode, "temperature": check.temperature}
    if check.masks:
        # No `target`, which takes the same kernels: the loss reads the values of a target that is
        # on the CPU, where a fake tensor claims to be.
        options["query_ids"] = empty(check.Q, dtype=torch.int64)
        options["cand_ids"] = empty(check.C, dtype=torch.int64)
    train(partial(infonce, **options, impl="triton"), q, c)


def loss_cases() -> Named:
    for case in loss_bench.CASES.values():
        yield f"infonce-{case.name}", partial(run_loss, case)
    yield from checks_of("infonce", loss_gate.checks(), check_loss)


# ---- attention ----


def run_attention(case: Any, provider: str) -> None:
    """Run a case of bench/attention, forward and backward."""
    step = attention_bench.ours(case, provider, CPU)
    heads = case.Hq, case.Hkv, case.Hkv, case.Hq
    inputs = Packed(*(empty(sum(case.lengths), H, case.K) for H in heads))
    with MODE:
        step(inputs, True)


def check_attention(check: attention_gate.Check, dtype: torch.dtype) -> None:
    batch = Batch.of(check.lengths, check.causal, check.Hq // check.Hkv, CPU)
    heads = check.Hq, check.Hkv, check.Hkv
    qkv = [empty(sum(check.lengths), H, check.K, dtype=dtype) for H in heads]
    active = empty(len(check.lengths), dtype=torch.bool) if check.skips else None
    options: dict[str, Any] = {"cu_seqlens": batch.cu, "plan": batch.plan, "active": active}
    train(partial(attention, **options, causal=check.causal, impl="triton"), *qkv)


def attention_cases() -> Named:
    for case in attention_bench.CASES.values():
        for provider in case.providers:
            if provider in SKIPPING:
                yield f"attention-{case.name}-{provider}", partial(run_attention, case, provider)
    yield from checks_of("attention", attention_gate.checks(), check_attention)


# ---- embed ----


def run_embed(case: Any) -> None:
    """Run a case of bench/embed.py, forward and backward."""
    factors = torch.float32 if case.masters else torch.bfloat16
    ids = embedding.stream(case.T, case.V)
    U, W = empty(case.V, case.R, dtype=factors), empty(case.R, case.D, dtype=factors)
    like = embedding.Factors(U, W, ids.to(CPU), empty(case.T, case.D))
    step, _ = embedding.build("ours", case, like, False)
    with MODE:
        step(like, True)


def check_embed(check: embedding.Check, dtype: torch.dtype) -> None:
    ids = torch.tensor(check.ids)
    index = TokenIndex.of(ids).to(CPU)
    ids = ids.to(CPU)
    factors = torch.float32 if check.masters else dtype

    def function(U: Tensor, W: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=check.masters):
            return embed(ids, U, W, check.rank, impl="triton", token_index=index)

    shapes = (check.V, check.R), (check.R, check.D)
    train(function, *(empty(*shape, dtype=factors) for shape in shapes))


def embed_cases() -> Named:
    for case in embedding.CASES.values():
        yield f"embed-{case.name}", partial(run_embed, case)
    yield from checks_of("embed", embedding.checks(), check_embed)


# ---- optimiser ----


def run_adamw(*shapes: tuple[int, ...]) -> None:
    """Step bf16 weights of these shapes."""
    weights, grads = ([empty(*shape) for shape in shapes] for _ in "wg")
    moments = [[empty(*shape, dtype=torch.float32) for shape in shapes] for _ in "mv"]
    scale, found, *steps = empty(2 + len(shapes), dtype=torch.float32).unbind()
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}
    with MODE:
        stochastic_adamw(
            weights, grads, *moments, steps, **options, seed=7, numbers=range(len(shapes)),
            grad_scale=scale, found_inf=found, impl="triton",
        )  # fmt: skip


def adamw_cases() -> Named:
    yield "adamw-step", partial(run_adamw, (151_669, 1024), (1024, 3072), (30_001, 1025))


# ---- whole models ----


def run_step(case: Case, deep: bool) -> None:
    """Run a training step. Blocks are not compiled: the kernels of inductor are not ours."""
    texts = Texts(case, CPU)
    texts.packs(deep)
    with MODE:
        step = train_step.ours(case, CPU, False, compiled=False, deep=deep)
        # Matrix products under autocast, and exits in half precision, as on a card.
        loss = partial(step.loss.func, **{**step.loss.keywords, "half": True})  # type: ignore
    # Depths, counts and rows are tensors of the host, which have values only outside of MODE.
    loss(step, texts).backward()


def step_cases() -> Named:
    table = step_gate.loss_table
    setattr(step_gate, "loss_table", lambda exits, *rest: table(exits.bfloat16(), *rest))  # noqa: B010
    for case in train_step.CASES.values():
        for provider in case.providers:
            if provider in ("ours", "full_depth"):
                deep = provider == "full_depth"
                yield f"train_step-{case.name}-{provider}", partial(run_step, case, deep)


def kernel_cases() -> dict[str, Callable[[], None]]:
    """Return the cases of the kernels' own benches, and of their gates, by name."""
    return dict([*loss_cases(), *attention_cases(), *embed_cases(), *adamw_cases()])


def bench_cases() -> dict[str, Callable[[], None]]:
    """Return every case of the benches that launches our kernels, by name.

    `encode` runs the model of `train_step` forward, `gradcache` in several packs: both launch only
    kernels that are here.
    """
    return {**kernel_cases(), **dict(step_cases())}
