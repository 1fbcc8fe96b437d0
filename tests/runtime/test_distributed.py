"""Real gloo processes against one: gathered rows and their gradients, the loss, the gradients of a
whole step, every objective.
"""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from objective_truth import (
    ALONE,
    HARD,
    OBJECTIVES,
    assert_close,
    ragged,
    run_of,
    table,
    texts,
    training,
)
from processes import gloo_once
from torch.nn.parallel import DistributedDataParallel

from mlembed.data import batches
from mlembed.runtime.distributed import any_process, broadcast, fresh, gather, world
from mlembed.training.objective.bank import Bank
from mlembed.training.objective.loss import loss_table, weights

SIZES = {2: [3, 1], 4: [2, 5, 1, 3]}  # rows of each process: unequal, one alone, the longest inside
GATHERED = (torch.float64, torch.float32, torch.bfloat16)
BATCHES = (0, 1, 2, 3)
OBJECTIVE_CASES = [
    (name, skip, across)
    for name, (_, options) in OBJECTIVES.items()
    for skip in (False, True)
    for across in ("gather", "ring")
    if across == "gather" or options.get("directions") != "gte"
]


def rows_and_weights(size):
    """Return the rows of all processes, and the weights of each process's loss."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, sum(SIZES[size]), 4, generator=generator, dtype=torch.float64)
    return rows, torch.randn(size, *rows.shape, generator=generator, dtype=torch.float64)


def gathered(where, dtype):
    """-> (what this process gathered, the gradient of its own rows)."""
    sizes = SIZES[where.size]
    rows, weights = (x.to(dtype) for x in rows_and_weights(where.size))
    begin = sum(sizes[: where.rank])
    own = rows[:, begin : begin + sizes[where.rank]].clone().requires_grad_()
    whole = torch.cat(gather(own, sizes), dim=1)
    (whole**2 * weights[where.rank]).sum().backward()
    return whole.detach(), own.grad


def step(where, number, dtype, symmetric, skip):
    """-> (loss_EM, gradients, source) of a batch, as train.py does."""
    run, tables, tokens, model = training(dtype, symmetric, skip)
    batch = batches.Batches(tables, tokens, run, where)[number]
    wrapped = DistributedDataParallel(model) if where.size > 1 else model
    exits_END = torch.cat([wrapped(pack, rank=4) for pack in batch.packs], dim=1)
    loss_EM = loss_table(exits_END, batch, run, where)
    (weights(run) * loss_EM).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss_EM.detach(), gradients, batch.source


def objective(where, name, skip, across):
    """-> (loss_EM, its gradient by text) of ragged groups, without a model."""
    task, options = OBJECTIVES[name]
    return table(ragged(skip), task, run_of(negatives_across=across, **options), where)


def with_bank(where, hard, across):
    """Return `objective` of the second of two batches of both directions."""
    run, bank = run_of(negatives_across=across, hard_negatives=hard), Bank(100, host=False)
    table(texts((2, 0, 1, 3), seed=1), "bitext", run, where, bank=bank)
    bank.commit()
    return table(ragged(skip=True), "bitext", run, where, bank=bank)


def process(where):
    """Return what one process found, by case."""
    found = {
        "gather": {dtype: gathered(where, dtype) for dtype in GATHERED},
        "broadcast": broadcast(7 + (1 << 40) + where.rank, where),
        "any": [any_process(flag, where) for flag in (False, where.rank > 0, where.main)],
        "world": (where.rank, where.size, where.main),
    }
    for case in product((torch.float32, torch.float64), (True, False), (False, True), BATCHES):
        dtype, symmetric, skip, number = case
        found[case] = step(where, number, dtype, symmetric, skip)
    for case in OBJECTIVE_CASES:
        found[case] = objective(where, *case)
    for hard in HARD:
        for across in ("gather", "ring"):
            found["bank", hard, across] = with_bank(where, hard, across)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request):
    """Return what each of 2 or 4 processes found."""
    return gloo_once(request.param, process)


# ---- gather ----


@pytest.mark.parametrize("dtype", GATHERED)
def test_gather_forward(found, dtype):
    rows, _ = rows_and_weights(len(found))
    for process in found:
        assert torch.equal(process["gather"][dtype][0], rows.to(dtype))


@pytest.mark.parametrize("dtype", GATHERED)
def test_gather_backward_sums_what_all_losses_ask(found, dtype):
    rows, weights = (x.to(dtype).double() for x in rows_and_weights(len(found)))
    rows.requires_grad_()
    sum((rows**2 * w).sum() for w in weights).backward()
    got = torch.cat([process["gather"][dtype][1] for process in found], dim=1)
    terms = sum((2 * rows * w).abs() for w in weights).detach()  # each rounded, and their sums
    assert got.dtype == dtype
    assert ((got - rows.grad).abs() <= 4 * torch.finfo(dtype).eps * terms).all()


def test_gather_alone_is_the_identity():
    x = torch.randn(2, 3, 4)
    assert gather(x, [3])[0] is x


# ---- a whole step ----

CASES = [
    pytest.param(dtype, symmetric, skip, number, id=f"{name}-{symmetric}-{skip}-{number}")
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64"))
    for symmetric in (True, False)
    for skip in (False, True)
    for number in BATCHES
]


@pytest.mark.parametrize("dtype, symmetric, skip, number", CASES)
def test_loss_is_the_single_process_loss(found, dtype, symmetric, skip, number):
    want, _, source = step(ALONE, number, dtype, symmetric, skip)
    parts = [process[dtype, symmetric, skip, number] for process in found]
    assert {part[2] for part in parts} == {source}
    got = torch.stack([part[0] for part in parts]).mean(0)
    assert got.shape == (2, 3)  # exits 1, 2; widths 8, 16, 32
    assert torch.allclose(got, want, rtol=2e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert max((part[0] - want).abs().max() for part in parts) > 1e-3  # each has its own queries


@pytest.mark.parametrize("dtype, symmetric, skip, number", CASES)
def test_gradients_are_the_single_process_gradients(found, dtype, symmetric, skip, number):
    """After DistributedDataParallel's averaging, on every process, for every parameter."""
    _, want, _ = step(ALONE, number, dtype, symmetric, skip)
    for process in found:
        got = process[dtype, symmetric, skip, number][1]
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            assert gradient.norm() > 0, name
            error = (got[name] - gradient).norm() / gradient.norm()
            # fp32 shows that rounding is all that differs; fp64, that nothing else does.
            assert error < (1e-5 if dtype == torch.float32 else 1e-13), (name, error)


# ---- every objective ----


def of_all(found, case):
    """Return the means over processes of losses and of gradients by text."""
    loss, gradient = (
        torch.stack(parts).mean(0) for parts in zip(*(p[case] for p in found), strict=True)
    )
    return loss, gradient


@pytest.mark.parametrize("name, skip, across", OBJECTIVE_CASES)
def test_an_objective_is_the_single_process_one(found, name, skip, across):
    """Groups have 0 to 4 hard negatives, so that processes hold different numbers of them."""
    assert_close(of_all(found, (name, skip, across)), objective(ALONE, name, skip, across))


@pytest.mark.parametrize("across", ["gather", "ring"])
@pytest.mark.parametrize("hard", HARD)
def test_an_objective_with_a_bank_is_the_single_process_one(found, hard, across):
    want = with_bank(ALONE, hard, across)
    assert_close(of_all(found, ("bank", hard, across)), want)
    without = objective(ALONE, f"bitext-{hard}", True, "gather")
    assert not torch.allclose(want[0], without[0], rtol=1e-3)


# ---- who is who ----


def test_any_process(found):
    assert [process["any"] for process in found] == [[False, True, True]] * len(found)
    assert any_process(True, ALONE) and not any_process(False, ALONE)


def test_broadcast(found):
    assert [process["broadcast"] for process in found] == [7 + (1 << 40)] * len(found)
    assert broadcast(5, ALONE) == 5


def test_world_in_processes(found):
    size = len(found)
    assert [process["world"] for process in found] == [(i, size, i == 0) for i in range(size)]


def test_a_restart_does_not_find_what_the_attempt_before_it_wrote():
    """One store for three attempts; processes arrive in any order, and old questions are there."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=10))
    for attempt in range(3):
        order = [(0, 1, 2), (2, 1, 0), (1, 0, 2)][attempt]
        with ThreadPoolExecutor(3) as threads:
            asked = {rank: threads.submit(fresh, store, rank, 3) for rank in order}
            own = {rank: future.result(timeout=20) for rank, future in asked.items()}
        assert not own[1].check(["address"])
        own[0].set("address", f"of attempt {attempt}")
        assert {part.get("address").decode() for part in own.values()} == {f"of attempt {attempt}"}


def test_world_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with world("cpu") as where:
        assert where == ALONE and where.main
        assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA device")
def test_cuda_without_a_device():
    with pytest.raises(ValueError, match="device: expected a CUDA device"), world("cuda"):
        pass
