"""Texts passed around against texts gathered, between real gloo processes, and against one process;
what a process holds and sends meanwhile; `pairwise_lse`'s gradients by hand."""

import dataclasses
import importlib.util
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from processes import gloo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlembed import config
from mlembed.data import batches
from mlembed.data.collate import Batch
from mlembed.training.objective import candidates
from mlembed.training.objective.bank import Bank
from mlembed.training.objective.loss import loss_table, weights
from mlembed_kernels.similarity.pairwise_lse import pairwise_lse, pairwise_lse_backward
from tests.runtime.test_distributed import ALONE, training

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


# ---- what one process is asked for ----


def step(where, number, dtype, symmetric, skip, across, bank=None):
    """-> (loss_EM, gradients, the batch) as train.py does."""
    run, tables, learnt, model = training(dtype, symmetric, skip)
    run = dataclasses.replace(run, loss=dataclasses.replace(run.loss, negatives_across=across))
    batch = batches.Batches(tables, learnt, run, where)[number]
    wrapped = DistributedDataParallel(model) if where.size > 1 else model
    exits_END = torch.cat([wrapped(pack, rank=4) for pack in batch.packs], dim=1)
    loss_EM = loss_table(exits_END, batch, run, where, bank=bank)
    (weights(run) * loss_EM).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss_EM.detach(), gradients, batch


def with_bank(where, symmetric, across, host):
    """Four steps, of which one is skipped -> (loss and gradients of each, bank's state)."""
    bank = Bank(CAPACITY, host)
    found = []
    for number in range(4):
        dtype, skip = torch.float64, True
        found.append(step(where, number, dtype, symmetric, skip, across, bank)[:2])
        bank.discard() if number == 1 else bank.commit()
    return found, bank.state()


N, D = 32, 2048  # documents of each process and their width, for what is held and sent
SLAB = 4 * N * D


def wide(where, across, symmetric):
    """A process's texts, one to a shard of SLAB bytes, -> a loss of them."""
    ids = torch.arange(N * where.size)
    deep = torch.ones_like(ids)
    batch = Batch(
        (), torch.arange(2 * N), torch.arange(N), ids, deep, ids, deep, (N,) * where.size, "x",
        torch.arange(N), torch.zeros(N, 0).long(), ids < 0, torch.arange(2 * N),
    )  # fmt: skip
    shape = config.Model(hidden_size=D, num_hidden_layers=1, exits=(1,), matryoshka_dims=(D,))
    run = config.Run(
        model=shape,
        loss=config.Loss(
            negatives_across=across, directions="symmetric" if symmetric else "query_to_doc"
        ),
    )
    generator = torch.Generator().manual_seed(where.rank)
    exits_END = torch.randn(1, 2 * N, D, generator=generator).requires_grad_()
    return lambda: loss_table(exits_END, batch, run, where).sum()


class Held(TorchDispatchMode):
    """The most bytes that tensors made meanwhile took at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: x for key, x in self.live.items() if not x[0].expired()}
        self.most = max(self.most, sum(n for _, n in self.live.values()))
        return out


def held(where, across):
    loss = wide(where, across, symmetric=False)
    with Held() as forward:
        total = loss()
    with Held() as backward:
        total.backward()
    return forward.most, backward.most


def told(where, symmetric):
    """Of one loss: what is sent (bytes), waited for and computed, in this order."""
    events = []
    right = dist.batch_isend_irecv, candidates.pairwise_lse, candidates.pairwise_lse_backward

    class Waited:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            self.work.wait()

    def exchange(operations):
        sent = [op.tensor for op in operations if op.op is dist.isend]
        assert len(sent) == 1 and len(operations) == 2
        events.append(sent[0].numel() * sent[0].element_size())
        return [Waited(work) for work in right[0](operations)]

    def computed(function, *args, **kwargs):
        events.append("compute")
        return function(*args, **kwargs)

    dist.batch_isend_irecv = exchange
    candidates.pairwise_lse, candidates.pairwise_lse_backward = (
        partial(computed, f) for f in right[1:]
    )
    try:
        total = wide(where, "ring", symmetric)()
        forward, events = events, []
        total.backward()
    finally:
        dist.batch_isend_irecv, candidates.pairwise_lse, candidates.pairwise_lse_backward = right
    return forward, events


def process(where):
    """Return what one process found, by case."""
    found = {"held": {across: held(where, across) for across in ("gather", "ring")}}
    found["told"] = {symmetric: told(where, symmetric) for symmetric in (True, False)}
    for name, symmetric, skip, number in CASES:
        for across in ("gather", "ring"):
            got = step(where, number, DTYPES[name], symmetric, skip, across)
            found[name, symmetric, skip, number, across] = got[:2]
            found["batch", skip, number] = got[2].source, got[2].doc_sizes
    for symmetric in (True, False):
        for mode in MODES if symmetric else MODES[1:2]:
            found["bank", symmetric, *mode] = with_bank(where, symmetric, *mode)
    return found


@pytest.fixture(scope="module")
def found():
    """Return what each of 2 and of 4 processes found, by their number."""
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
def test_passing_around_is_gathering(found, size, case):
    """On every process the same loss, and every gradient after averaging; and as of one process."""
    loss, gradients = alone(*case)
    parts = []
    for process in found[size]:
        passed, gathered = process[*case, "ring"], process[*case, "gather"]
        assert torch.allclose(passed[0], gathered[0], rtol=LOSS[case[0]], atol=0)
        assert_gradients(passed[1], gathered[1], GRADIENT[case[0]])
        assert_gradients(passed[1], gradients, GRADIENT[case[0]])
        parts.append(passed[0])
    assert torch.allclose(torch.stack(parts).mean(0), loss, rtol=LOSS[case[0]], atol=0)


@sizes
def test_batches_are_of_both_kinds_and_unequal_shares(found, size):
    """Otherwise the test above would say little about shards of different sizes."""
    for skip in (True, False):
        seen = [found[size][0]["batch", skip, number] for number in NUMBERS["fp64"]]
        assert {source for source, _ in seen} == {"pairs", "nway"}
        assert any(len(set(doc_sizes)) > 1 for _, doc_sizes in seen)


def test_one_process_passes_nothing_around():
    want = alone("fp64", True, True, 0)
    got = step(ALONE, 0, torch.float64, True, True, "ring")
    assert torch.equal(got[0], want[0])


# ---- what is held, what is sent ----


def test_no_process_holds_more_than_two_processes_texts(found):
    """Four processes' shards are as many as two's but for the second buffer; gathered they are two
    more, as this instrument sees."""
    of = {
        (size, across): torch.tensor([process["held"][across] for process in found[size]])
        for size in SIZES
        for across in ("gather", "ring")
    }
    more = {
        across: (of[4, across].amax(0) - of[2, across].amin(0)) / SLAB
        for across in ("gather", "ring")
    }
    assert (more["gather"] > 1.95).all(), more
    assert (more["ring"] < 1.05).all(), more


@sizes
@pytest.mark.parametrize("symmetric", [True, False])
def test_messages(found, size, symmetric):
    """Of a step: the shard in each round but the last, before computing with the one in hand and
    waited for after; in forward the columns' sums, in backward these with their slopes beside the
    shard, and its gradient, which come home."""
    sums, slopes = 4 * N, 2 * 4 * N
    forward, backward = [], []
    for hop in range(size):
        last = hop == size - 1
        waiting = ["wait", "wait"]
        forward += [] if last else [SLAB]
        forward += ["compute"]
        if symmetric:
            forward += [*(waiting if hop else []), sums]
        forward += [] if last else waiting
        backward += [] if last else [SLAB, *([slopes] if symmetric else [])]
        backward += ["compute", *(waiting if hop else []), SLAB]
        backward += [] if last else waiting * (1 + symmetric)
    forward += waiting if symmetric else []
    backward += waiting
    for process in found[size]:
        assert process["told"][symmetric] == (forward, backward)


# ---- with a bank ----


@cache
def bank_alone(symmetric):
    return with_bank(ALONE, symmetric, "gather", host=False)


@sizes
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_bank_of_many_processes_is_one_process_s(found, size, mode):
    want, state = bank_alone(True)
    for number, (loss, gradients) in enumerate(want):
        parts = [process["bank", True, *mode][0][number] for process in found[size]]
        got = torch.stack([part[0] for part in parts]).mean(0)
        assert torch.allclose(got, loss, rtol=1e-12, atol=0)
        for part in parts:
            assert_gradients(part[1], gradients, 1e-12)
    ids = torch.cat([x for name, x in state.items() if name.endswith("ids")])
    kept = found[size][0]["bank", True, *mode][1]
    got = torch.cat([x for name, x in kept.items() if name.endswith("ids")])
    assert torch.equal(got.sort().values, ids.sort().values) and len(ids) > 16


@sizes
def test_a_bank_is_not_only_of_the_symmetric_loss(found, size):
    for number, (loss, gradients) in enumerate(bank_alone(False)[0]):
        parts = [process["bank", False, *MODES[1]][0][number] for process in found[size]]
        got = torch.stack([part[0] for part in parts]).mean(0)
        assert torch.allclose(got, loss, rtol=1e-12, atol=0)
        for part in parts:
            assert_gradients(part[1], gradients, 1e-12)


def test_a_bank_changes_the_loss():
    """Or the tests above would compare losses without one."""
    steps = [loss for loss, _ in bank_alone(True)[0]]
    without = [step(ALONE, n, torch.float64, True, True, "gather")[0] for n in range(4)]
    assert torch.equal(steps[0], without[0])
    assert sum(not torch.allclose(a, b) for a, b in zip(steps, without, strict=True)) >= 2


@sizes
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_banks_are_equal_everywhere(found, size, mode):
    """Bit for bit on all processes, and however the documents came."""
    want = found[size][0]["bank", True, *MODES[0]][1]
    for process in found[size]:
        got = process["bank", True, *mode][1]
        assert got.keys() == want.keys() and len(got)
        assert all(torch.equal(got[name], x) for name, x in want.items())


# ---- partition's gradients by hand ----

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
def test_partition_backward_is_autograd_s(impl, name):
    options = OPTIONS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if impl == "triton" else torch.float64
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 13, generator=generator, dtype=dtype).to(device) for n in (5, 7))
    scale = torch.tensor([[8.0, 9.0], [10.0, 11.0]], dtype=dtype, device=device)
    options = {
        name: value.to(device)
        if isinstance(value, torch.Tensor)
        else tuple(key.to(device) for key in value)
        if isinstance(value, tuple)
        else value
        for name, value in options.items()
    }
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


def test_partition_backward_refuses_what_partition_refuses():
    x = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="impl: expected one of .*got 'fast'"):
        pairwise_lse_backward(
            x, x, (x, None, None), (x, None, None), dims=(1,), scale=x[0], impl="fast"
        )
