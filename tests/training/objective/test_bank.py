"""Memory bank: what it holds, its checkpoints, and the loss with it, which equals that of one
`infonce` over all candidates.
"""

import dataclasses
import weakref

import pytest
import torch
from factories import tiny_run
from objective_truth import ALONE
from safetensors.torch import load_file, save_file

from mlembed.config import Loss
from mlembed.data.collate import Batch
from mlembed.training.objective.bank import Bank, Shard
from mlembed.training.objective.loss import loss_table
from mlembed_kernels import infonce


def shard(n, first=0, counts=None, dtype=torch.float64, E=2, D=16):
    generator = torch.Generator().manual_seed(100 * n + first)
    vectors = torch.randn(E, n, D, generator=generator, dtype=dtype)
    counts = None if counts is None else torch.tensor(counts)
    return Shard(vectors, torch.arange(first, first + n), counts)


def filled(bank, *micro_batches, source="x"):
    """Add and commit each micro-batch."""
    for shards in micro_batches:
        bank.add(source, [bank.copied(one) for one in shards])
        bank.commit()
    return bank


def same(a, b):
    """Return whether two lists of shards have equal bits, dtypes and devices."""
    pairs = zip(a, b, strict=True) if len(a) == len(b) else [(None, None)]
    return all(x is not None and fields(x) == fields(y) for x, y in pairs)


def fields(shard):
    tensors = (getattr(shard, field.name) for field in dataclasses.fields(Shard))
    return [None if x is None else (x.dtype, x.device, x.tolist()) for x in tensors]


# ---- what is held ----


def test_newest_micro_batches_stay():
    bank = Bank(10, host=False)
    first, second = [shard(2, 0), shard(1, 10)], [shard(3, 20), shard(1, 30)]
    third = [shard(2, 40), shard(2, 50)]
    filled(bank, first, second)
    assert same(bank.shards("x"), [*first, *second])
    # Of 11 documents the oldest micro-batch leaves as a whole.
    filled(bank, third)
    assert same(bank.shards("x"), [*second, *third])
    # Ten documents may stay.
    filled(bank, [shard(2, 60)])
    assert same(bank.shards("x"), [*second, *third, shard(2, 60)])
    filled(bank, [shard(11, 70)])
    assert bank.shards("x") == []


def test_sources_are_separate():
    bank = filled(filled(Bank(4, host=False), [shard(4)]), [shard(3, 7)], source="y")
    assert same(bank.shards("x"), [shard(4)]) and same(bank.shards("y"), [shard(3, 7)])
    assert bank.shards("z") == []


def test_commit_and_discard():
    bank = Bank(100, host=False)
    bank.add("x", [shard(2)])
    bank.add("x", [shard(3)])
    bank.add("y", [shard(4)])
    assert bank.shards("x") == bank.shards("y") == [] and bank.state() == {}
    bank.commit()
    assert same(bank.shards("x"), [shard(2), shard(3)]) and same(bank.shards("y"), [shard(4)])
    before = bank.state()
    bank.add("x", [shard(5)])
    bank.discard()
    bank.commit()
    assert bank.state().keys() == before.keys()


@pytest.mark.parametrize("host", [False, True])
def test_copy_shares_no_memory(host):
    whole = torch.randn(2, 6, 16, requires_grad=True)
    view = Shard(whole[:, 1:3], torch.arange(6)[1:3], torch.tensor([2, 1]))
    copy = Bank(10, host).copied(view)
    assert not copy.vectors_EnD.requires_grad and copy.vectors_EnD.is_contiguous()
    for field in dataclasses.fields(Shard):
        old, new = getattr(view, field.name), getattr(copy, field.name)
        assert torch.equal(old, new)
        assert old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
        assert new.untyped_storage().nbytes() == new.numel() * new.element_size()


# ---- checkpoints ----


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_survives_a_file(host, dtype, tmp_path):
    """Names with dots and slashes, more than ten micro-batches, and what follows is the same."""
    sources = ("", "a.b/c.jsonl", "a.b/c", "0.1")
    bank, again = Bank(40, host), Bank(40, host)
    for source in sources:
        for n in range(13):
            counts = (2, 1) if n % 2 else None
            filled(bank, [shard(2, n, counts, dtype), shard(1, n, None, dtype)], source=source)
    # A micro-batch of a step that is not taken yet.
    bank.add("0.1", [shard(1)])
    save_file(bank.state(), tmp_path / "bank.safetensors")
    again.add("a.b/c", [shard(1)])
    filled(again, [shard(1)], source="other")
    again.load(load_file(tmp_path / "bank.safetensors"), torch.device("cpu"))
    bank.discard()
    again.commit()
    for source in (*sources, "other"):
        assert same(bank.shards(source), again.shards(source))
        assert len(bank.shards(source)) == (0 if source == "other" else 26)
    # At 39 documents of 40 the oldest micro-batch leaves as a whole.
    for one in (bank, again):
        filled(one, [shard(3, 50, dtype=dtype)], source="0.1")
    assert len(again.shards("0.1")) == 25 and same(bank.shards("0.1"), again.shards("0.1"))


def test_state_without_ids():
    with pytest.raises(ValueError, match="x.0.0.vectors: expected its ids"):
        Bank(1, host=False).load({"x.0.0.vectors": torch.zeros(1, 1, 1)})


# ---- the loss ----

DIMS = (3, 16)
PAIRS, DOCS = 5, 8
LEAVING = {
    "target": torch.tensor([1, 0, 2, 5, 6]),
    "query_depths": torch.tensor([2, 2, 2, 1, 1]),
    "doc_depths": torch.tensor([2, 2, 2, 2, 2, 1, 1, 1]),
    "query_ids": torch.tensor([10, 11, 12, 13, 14]),
    "doc_ids": torch.tensor([11, 10, 12, 20, 21, 13, 14, 22]),
}
STAYING = {
    "target": torch.arange(PAIRS),
    "query_depths": torch.full((PAIRS,), 2),
    "doc_depths": torch.full((DOCS,), 2),
    "query_ids": torch.tensor([10, 11, 10, 12, 13]),
    "doc_ids": torch.tensor([10, 11, 10, 12, 13, 20, 12, 21]),
}
# Their ids are those of some queries, too; some have left at the second exit.
EARLIER = [[shard(4, 9, (4, 2)), shard(3, 30)], [shard(5, 12, (4, 0)), shard(1, 40, (1, 1))]]


def given(texts, symmetric=True):
    """Return vectors, batch and run of these ids, depths and targets."""
    rows = torch.arange(PAIRS + DOCS)
    owner = torch.full((DOCS,), PAIRS - 1)
    owner[texts["target"]] = torch.arange(PAIRS)
    negatives = torch.full((PAIRS, DOCS - PAIRS), -1)
    negatives[-1] = torch.tensor([i for i in range(DOCS) if i not in texts["target"]])
    batch = Batch(
        packs=(), place=rows, doc_sizes=(DOCS,), source="x", owner=owner,
        negatives=negatives, has_negatives=negatives[:, 0] >= 0, rows=rows, **texts,
    )  # fmt: skip
    shape = {"hidden_size": 16, "exits": (1, 2), "matryoshka_dims": DIMS}
    run = tiny_run(shape, loss=Loss(directions="symmetric" if symmetric else "query_to_doc"))
    torch.manual_seed(0)
    leaf = torch.randn(2, PAIRS + DOCS, 16, dtype=torch.float64, requires_grad=True)
    return leaf, batch, run


def with_gradient(leaf, loss_EM):
    weights_EM = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(loss_EM)
    return loss_EM.detach(), torch.autograd.grad((loss_EM * weights_EM).sum(), leaf)[0]


def in_one(leaf, texts, shards, symmetric):
    """Return the loss of one `infonce` over the batch's and the earlier documents."""
    queries, docs, exits = leaf[:, :PAIRS], leaf[:, PAIRS:], torch.tensor([[1], [2]])
    counts, doc_counts = ((texts[f"{side}_depths"] >= exits).sum(1) for side in ("query", "doc"))
    earlier = [torch.full((2,), len(x)) if x.counts_E is None else x.counts_E for x in shards]
    common = {"dims": DIMS, "query_ids": texts["query_ids"], "query_counts": counts}
    loss_EM = infonce(
        queries,
        [docs, *(one.vectors_EnD for one in shards)],
        target=texts["target"],
        cand_ids=torch.cat([texts["doc_ids"], *(one.ids_n for one in shards)]),
        cand_counts=[doc_counts, *earlier],
        **common,
    )
    if symmetric:
        anchors = {"cand_ids": texts["query_ids"], "cand_counts": counts}
        loss_EM = (loss_EM + infonce(docs[:, texts["target"]], queries, **anchors, **common)) / 2
    return with_gradient(leaf, loss_EM)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("texts", [STAYING, LEAVING], ids=["staying", "leaving"])
def test_loss_equals_one_infonce(texts, symmetric, host):
    leaf, batch, run = given(texts, symmetric)
    bank = filled(Bank(100, host), *EARLIER)
    shards = [one for batch_ in EARLIER for one in batch_]
    want, gradient = in_one(leaf, texts, shards, symmetric)
    got = with_gradient(leaf, loss_table(leaf, batch, run, ALONE, bank=bank))
    assert torch.allclose(got[0], want, rtol=1e-12, atol=0)
    assert (got[1] - gradient).norm() / gradient.norm() < 1e-13
    without, _ = in_one(leaf, texts, [], symmetric)
    assert ((want - without) > 1e-3).all()


@pytest.mark.parametrize(
    "counts, counted",
    [(None, [True, True]), ((1, 0), [True, False]), ((0, 0), [False, False])],
    ids=str,
)
def test_earlier_documents_count_at_their_exits(counts, counted):
    leaf, batch, run = given(STAYING)
    want = loss_table(leaf, batch, run, ALONE)
    counts = None if counts is None else torch.tensor(counts)
    near = Shard(leaf.detach()[:, 2:3], torch.tensor([99]), counts)
    got = loss_table(leaf, batch, run, ALONE, bank=filled(Bank(9, host=False), [near]))
    for a, b, counts_here in zip(got, want, counted, strict=True):
        assert (a > b + 0.05).all() if counts_here else torch.allclose(a, b, rtol=1e-12, atol=0)


def test_bank_skips_same_id():
    """Under query 1's id its twin is a negative of the other queries only."""
    leaf, batch, run = given(STAYING)
    losses = []
    for number in (11, 99):
        twin = Shard(leaf.detach()[:, 1:2], torch.tensor([number]), None)
        bank = filled(Bank(9, host=False), [twin])
        losses.append(loss_table(leaf, batch, run, ALONE, bank=bank))
    assert (losses[1] > losses[0] + 0.05).all()


def test_batch_adds_its_documents():
    leaf, batch, run = given(LEAVING)
    bank = Bank(100, host=False)
    first = loss_table(leaf, batch, run, ALONE, bank=bank)
    assert torch.equal(first, loss_table(leaf, batch, run, ALONE)) and bank.shards("x") == []
    bank.commit()
    want = Shard(leaf.detach()[:, PAIRS:], LEAVING["doc_ids"], torch.tensor([8, 5]))
    assert same(bank.shards("x"), [want])
    other = dataclasses.replace(batch, source="y")
    assert torch.equal(loss_table(leaf, other, run, ALONE, bank=bank), first)


def test_one_shard_at_a_time_is_copied(monkeypatch):
    """From the host, in forward and again in backward, each freed before the next."""
    right, copied, refs = Shard.to, [], []

    def to(self, like):
        assert not any(ref() is not None for ref in refs)
        moved = right(self, like)
        refs.append(weakref.ref(moved))
        copied.append(len(self))
        return moved

    monkeypatch.setattr(Shard, "to", to)
    leaf, batch, run = given(STAYING)
    loss = loss_table(leaf, batch, run, ALONE, bank=filled(Bank(100, host=True), *EARLIER)).sum()
    assert copied == [4, 3, 5, 1]
    loss.backward()
    assert copied == [4, 3, 5, 1] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_banks_on_host_and_device_are_equal():
    leaf, batch, run = given(STAYING)
    leaf = leaf.detach().cuda().bfloat16().requires_grad_()
    results = []
    for host in (True, False):
        bank = Bank(100, host)
        for _ in range(3):
            loss_EM = loss_table(leaf, batch, run, ALONE, bank=bank)
            bank.commit()
        vectors = bank.shards("x")[0].vectors_EnD
        assert vectors.is_cuda != host and vectors.is_pinned() == host
        results.append(with_gradient(leaf, loss_EM))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
