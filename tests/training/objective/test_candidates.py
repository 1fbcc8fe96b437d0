"""The ring against gathering, between real gloo processes and against one process; what a process
holds and sends meanwhile; the bank between processes; `pairwise_lse_backward`.
"""

import importlib.util
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from factories import tiny_run
from live_memory import Live
from objective_truth import ALONE, training
from processes import gloo
from torch.nn.parallel import DistributedDataParallel

from mlembed import config
from mlembed.data import batches
from mlembed.data.collate import Batch
from mlembed.training.objective import candidates
from mlembed.training.objective.bank import Bank
from mlembed.training.objective.loss import loss_table, weights
from mlembed_kernels.similarity.pairwise_lse import pairwise_lse, pairwise_lse_backward

SIZES = (2, 4)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
NUMBERS = {"fp32": (1,), "fp64": (0, 1, 2)}
CASES = [
    (name, symmetric, skip, number)
    for name in DTYPES
    for symmetric in (True, False)
    for skip in (True, False)
    for number in NUMBERS[name]
]
MODES = [("gather", False), ("ring", False), ("gather", True), ("ring", True)]  # (across, on host)
CAPACITY = 30  # documents: of each source one micro-batch


# ---- what one process does ----


def step(where, number, dtype, symmetric, skip, across, bank=None):
    """Return loss_EM, gradients and the batch of a step, as train.py computes it."""
    run, tables, tokens, model = training(dtype, symmetric, skip, negatives_across=across)
    batch = batches.Batches(tables, tokens, run, where)[number]
    wrapped = DistributedDataParallel(model) if where.size > 1 else model
    exits_END = torch.cat([wrapped(pack, rank=4) for pack in batch.packs], dim=1)
    loss_EM = loss_table(exits_END, batch, run, where, bank=bank)
    (weights(run) * loss_EM).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss_EM.detach(), gradients, batch


def with_bank(where, symmetric, across, host):
    """Return loss and gradients of four steps, of which the second is skipped, and the bank."""
    bank = Bank(CAPACITY, host)
    steps = []
    for number in range(4):
        steps.append(step(where, number, torch.float64, symmetric, True, across, bank)[:2])
        bank.discard() if number == 1 else bank.commit()
    return steps, bank.state()


N, D = 32, 2048  # documents of each process and their width
SHARD = 4 * N * D  # bytes


def wide(where, across, symmetric):
    """Return a function that computes a loss of one shard of SHARD bytes on each process."""
    ids = torch.arange(N * where.size)
    deep = torch.ones_like(ids)
    batch = Batch(
        (), torch.arange(2 * N), torch.arange(N), ids, deep, ids, deep, (N,) * where.size, "x",
        torch.arange(N), torch.zeros(N, 0).long(), ids < 0, torch.arange(2 * N),
    )  # fmt: skip
    shape = {"hidden_size": D, "num_hidden_layers": 1, "exits": (1,), "matryoshka_dims": (D,)}
    directions = "symmetric" if symmetric else "query_to_doc"
    run = tiny_run(shape, loss=config.Loss(negatives_across=across, directions=directions))
    generator = torch.Generator().manual_seed(where.rank)
    exits_END = torch.randn(1, 2 * N, D, generator=generator).requires_grad_()
    return lambda: loss_table(exits_END, batch, run, where).sum()


def memory(where, across):
    """Return the most bytes that forward and backward held."""
    loss = wide(where, across, symmetric=False)
    with Live() as forward:
        total = loss()
    with Live() as backward:
        total.backward()
    return forward.most(), backward.most()


def events(where, symmetric):
    """Return what a loss and its backward send (bytes), wait for and compute, in order."""
    log = []
    right = dist.batch_isend_irecv, candidates.pairwise_lse, candidates.pairwise_lse_backward

    class Waited:
        def __init__(self, work):
            self.work = work

        def wait(self):
            log.append("wait")
            self.work.wait()

    def exchange(operations):
        sent = [op.tensor for op in operations if op.op is dist.isend]
        assert len(sent) == 1 and len(operations) == 2
        log.append(sent[0].numel() * sent[0].element_size())
        return [Waited(work) for work in right[0](operations)]

    def computed(function, *args, **kwargs):
        log.append("compute")
        return function(*args, **kwargs)

    dist.batch_isend_irecv = exchange
    candidates.pairwise_lse, candidates.pairwise_lse_backward = (
        partial(computed, f) for f in right[1:]
    )
    try:
        total = wide(where, "ring", symmetric)()
        forward, log = log, []
        total.backward()
    finally:
        dist.batch_isend_irecv, candidates.pairwise_lse, candidates.pairwise_lse_backward = right
    return forward, log


def process(where):
    """Return the results of one process by case."""
    results = {"memory": {across: memory(where, across) for across in ("gather", "ring")}}
    results["events"] = {symmetric: events(where, symmetric) for symmetric in (True, False)}
    for name, symmetric, skip, number in CASES:
        for across in ("gather", "ring"):
            got = step(where, number, DTYPES[name], symmetric, skip, across)
            results[name, symmetric, skip, number, across] = got[:2]
            results["batch", skip, number] = got[2].source, got[2].doc_sizes
    for symmetric in (True, False):
        for mode in MODES if symmetric else MODES[1:2]:
            results["bank", symmetric, *mode] = with_bank(where, symmetric, *mode)
    return results


@pytest.fixture(scope="module")
def results():
    """Return the results of each of 2 and of 4 processes, by their number."""
    return {size: gloo(size, process) for size in SIZES}


# ---- loss and gradients ----

sizes = pytest.mark.parametrize("size", SIZES)
LOSS = {"fp32": 2e-6, "fp64": 1e-12}
GRADIENT = {"fp32": 1e-5, "fp64": 1e-13}


def assert_gradients(got, want, most):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.norm() > 0, name
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < most, (name, error)


@cache
def alone(name, symmetric, skip, number):
    return step(ALONE, number, DTYPES[name], symmetric, skip, "gather")[:2]


@sizes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ring_equals_gathering(results, size, case):
    """Every process has the loss and the averaged gradients of gathering and of one process."""
    loss, gradients = alone(*case)
    parts = []
    for process in results[size]:
        passed, gathered = process[*case, "ring"], process[*case, "gather"]
        assert torch.allclose(passed[0], gathered[0], rtol=LOSS[case[0]], atol=0)
        assert_gradients(passed[1], gathered[1], GRADIENT[case[0]])
        assert_gradients(passed[1], gradients, GRADIENT[case[0]])
        parts.append(passed[0])
    assert torch.allclose(torch.stack(parts).mean(0), loss, rtol=LOSS[case[0]], atol=0)


@sizes
def test_batches_have_both_kinds_and_unequal_shares(results, size):
    """Otherwise the test above would say little about shards of different sizes."""
    for skip in (True, False):
        seen = [results[size][0]["batch", skip, number] for number in NUMBERS["fp64"]]
        assert {source for source, _ in seen} == {"pairs", "nway"}
        assert any(len(set(doc_sizes)) > 1 for _, doc_sizes in seen)


def test_ring_of_one_process():
    want = alone("fp64", True, True, 0)
    got = step(ALONE, 0, torch.float64, True, True, "ring")
    assert torch.equal(got[0], want[0])


# ---- memory and messages ----


def test_ring_holds_two_processes_texts(results):
    """Four processes hold one shard more than two, the second buffer; gathering holds two more."""
    for across, least, most in (("gather", 1.95, torch.inf), ("ring", -torch.inf, 1.05)):
        two, four = (
            torch.tensor([process["memory"][across] for process in results[size]]) for size in SIZES
        )
        more = (four.amax(0) - two.amin(0)) / SHARD
        assert (more > least).all() and (more < most).all(), (across, more)


@sizes
@pytest.mark.parametrize("symmetric", [True, False])
def test_messages(results, size, symmetric):
    """Each round but the last sends its shard before it computes, and waits for the next after.

    Forward also sends the columns' sums, backward these with their slopes, and the gradients.
    """
    sums, slopes = 4 * N, 2 * 4 * N
    forward, backward = [], []
    for hop in range(size):
        last = hop == size - 1
        waiting = ["wait", "wait"]
        forward += [] if last else [SHARD]
        forward += ["compute"]
        if symmetric:
            forward += [*(waiting if hop else []), sums]
        forward += [] if last else waiting
        backward += [] if last else [SHARD, *([slopes] if symmetric else [])]
        backward += ["compute", *(waiting if hop else []), SHARD]
        backward += [] if last else waiting * (1 + symmetric)
    forward += waiting if symmetric else []
    backward += waiting
    for process in results[size]:
        assert process["events"][symmetric] == (forward, backward)


# ---- with a bank ----


@cache
def bank_alone(symmetric):
    return with_bank(ALONE, symmetric, "gather", host=False)


@sizes
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_bank_of_several_processes_equals_one(results, size, mode):
    want, state = bank_alone(True)
    for number, (loss, gradients) in enumerate(want):
        parts = [process["bank", True, *mode][0][number] for process in results[size]]
        got = torch.stack([part[0] for part in parts]).mean(0)
        assert torch.allclose(got, loss, rtol=1e-12, atol=0)
        for part in parts:
            assert_gradients(part[1], gradients, 1e-12)
    ids = torch.cat([x for name, x in state.items() if name.endswith("ids")])
    stored = results[size][0]["bank", True, *mode][1]
    got = torch.cat([x for name, x in stored.items() if name.endswith("ids")])
    assert torch.equal(got.sort().values, ids.sort().values) and len(ids) > 16


@sizes
def test_bank_of_one_direction(results, size):
    for number, (loss, gradients) in enumerate(bank_alone(False)[0]):
        parts = [process["bank", False, *MODES[1]][0][number] for process in results[size]]
        got = torch.stack([part[0] for part in parts]).mean(0)
        assert torch.allclose(got, loss, rtol=1e-12, atol=0)
        for part in parts:
            assert_gradients(part[1], gradients, 1e-12)


def test_bank_changes_the_loss():
    """Otherwise the tests above would compare losses without a bank."""
    steps = [loss for loss, _ in bank_alone(True)[0]]
    without = [step(ALONE, n, torch.float64, True, True, "gather")[0] for n in range(4)]
    assert torch.equal(steps[0], without[0])
    assert sum(not torch.allclose(a, b) for a, b in zip(steps, without, strict=True)) >= 2


@sizes
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_banks_are_equal_on_all_processes(results, size, mode):
    """Bit for bit, however the documents came."""
    want = results[size][0]["bank", True, *MODES[0]][1]
    for process in results[size]:
        got = process["bank", True, *mode][1]
        assert got.keys() == want.keys() and len(got)
        assert all(torch.equal(got[name], x) for name, x in want.items())


# ---- gradients of pairwise_lse ----

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
OPTIONS = {
    "plain": {},
    "columns": {"columns": True},
    "positive": {"positive": torch.tensor([0, 6, -1, 6, 2])},
    "all": {
        "columns": True,
        "positive": torch.tensor([0, 6, -1, 6, 2]),
        "row_keys": (torch.tensor([0, 1, 2, 1, 9]), torch.tensor([3, 3, 3, 4, 4])),
        "col_keys": (torch.tensor([1, 0, 8, 8, 2, 1, 5]), torch.tensor([3, 4, 5, 5, 5, 5, 5])),
        "row_counts": torch.tensor([5, 3]),
        "col_counts": torch.tensor([6, 4]),
    },
    "ceiling": {"ceiling": torch.tensor([[0.1, 0.0, 0.2, -0.1, 0.3]] * 2)},
    "nothing_kept": {
        "columns": True,
        "row_keys": (torch.ones(5).long(),),
        "col_keys": (torch.ones(7).long(),),
    },
}


@pytest.mark.parametrize(
    "impl, name",
    [
        *(("reference", name) for name in OPTIONS),
        *(pytest.param("triton", name, marks=triton) for name in ("all", "ceiling")),
    ],
)
def test_pairwise_lse_backward_equals_autograd(impl, name):
    options = OPTIONS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if impl == "triton" else torch.float64
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 13, generator=generator, dtype=dtype).to(device) for n in (5, 7))
    scale = torch.tensor([[8.0, 9.0], [10.0, 11.0]], dtype=dtype, device=device)
    options = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), options)
    options |= {"dims": (3, 11), "impl": impl}
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    outputs = pairwise_lse(*leaves[:2], scale=leaves[2], **options)
    slopes = [
        None if out is None else torch.randn(out.shape, generator=generator, dtype=dtype).to(device)
        for out in outputs
    ]
    pairs = [(out, d) for out, d in zip(outputs, slopes, strict=True) if out is not None]
    want = torch.autograd.grad([out for out, _ in pairs], leaves, [d for _, d in pairs])
    outputs = tuple(None if out is None else out.detach() for out in outputs)
    with torch.no_grad():
        got = pairwise_lse_backward(x, y, outputs, tuple(slopes), scale=scale, **options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_pairwise_lse_backward_checks_impl():
    x = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="impl: expected one of .*got 'fast'"):
        pairwise_lse_backward(
            x, x, (x, None, None), (x, None, None), dims=(1,), scale=x[0], impl="fast"
        )
