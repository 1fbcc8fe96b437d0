"""A bank of earlier documents: what it holds, that it survives a checkpoint, and the loss with it,
which is that of one `infonce` over all candidates."""

import dataclasses
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlembed.config import Loss, Model, Run
from mlembed.data.collate import Batch
from mlembed.runtime.distributed import World
from mlembed.training.objective.bank import Bank, Shard
from mlembed.training.objective.loss import loss_table
from mlembed_kernels import infonce

ALONE = World(0, 1, torch.device("cpu"))


def shard(n, first=0, counts=None, dtype=torch.float64, E=2, D=16):
    generator = torch.Generator().manual_seed(100 * n + first)
    vectors = torch.randn(E, n, D, generator=generator, dtype=dtype)
    return Shard(
        vectors, torch.arange(first, first + n), None if counts is None else torch.tensor(counts)
    )


def filled(bank, *micro_batches, source="x"):
    """Each micro-batch given, committed one by one."""
    for shards in micro_batches:
        bank.add(source, [bank.copied(one) for one in shards])
        bank.commit()
    return bank


def same(a, b):
    """Bit for bit."""
    if len(a) != len(b):
        return False
    for one, other in zip(a, b, strict=True):
        if (one.counts_E is None) != (other.counts_E is None):
            return False
        pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Shard)]
        if not all(
            x is None or (x.dtype == y.dtype and x.device == y.device and torch.equal(x, y))
            for x, y in pairs
        ):
            return False
    return True


# ---- what is held ----


def test_the_newest_whole_micro_batches_are_held():
    bank = Bank(10, host=False)
    batches = [
        [shard(2, 0), shard(1, 10)],
        [shard(3, 20), shard(1, 30)],
        [shard(2, 40), shard(2, 50)],
    ]
    filled(bank, *batches[:2])
    assert same(bank.shards("x"), [*batches[0], *batches[1]])  # 7 of 10
    filled(bank, batches[2])
    assert same(
        bank.shards("x"), [*batches[1], *batches[2]]
    )  # 11 were too many: 3 went, as a whole
    filled(bank, [shard(2, 60)])
    assert same(
        bank.shards("x"), [*batches[1], *batches[2], shard(2, 60)]
    )  # as many as there may be
    filled(bank, [shard(11, 70)])
    assert bank.shards("x") == []


def test_sources_do_not_meet():
    bank = filled(filled(Bank(4, host=False), [shard(4)]), [shard(3, 7)], source="y")
    assert same(bank.shards("x"), [shard(4)]) and same(bank.shards("y"), [shard(3, 7)])
    assert bank.shards("z") == []


def test_what_was_added_is_seen_when_committed_and_forgotten_when_discarded():
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
def test_a_copy_shares_no_memory(host):
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
    bank.add("0.1", [shard(1)])  # not of a step that was taken
    save_file(bank.state(), tmp_path / "bank.safetensors")
    again.add("a.b/c", [shard(1)])
    filled(again, [shard(1)], source="other")
    again.load(load_file(tmp_path / "bank.safetensors"), torch.device("cpu"))
    bank.discard()
    again.commit()
    for source in (*sources, "other"):
        assert same(bank.shards(source), again.shards(source))
        assert len(bank.shards(source)) == (0 if source == "other" else 26)
    for one in (bank, again):  # 39 documents of 40: which belong together shows as some leave
        filled(one, [shard(3, 50, dtype=dtype)], source="0.1")
    assert len(again.shards("0.1")) == 25 and same(bank.shards("0.1"), again.shards("0.1"))


def test_state_without_ids_is_refused():
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
    everything = torch.arange(PAIRS + DOCS)
    owner = torch.full((DOCS,), PAIRS - 1)
    owner[texts["target"]] = torch.arange(PAIRS)
    negatives = torch.full((PAIRS, DOCS - PAIRS), -1)
    negatives[-1] = torch.tensor([i for i in range(DOCS) if i not in texts["target"]])
    batch = Batch(
        packs=(), place=everything, doc_sizes=(DOCS,), source="x", owner=owner,
        negatives=negatives, has_negatives=negatives[:, 0] >= 0, rows=everything, **texts,
    )  # fmt: skip
    model = Model(hidden_size=16, num_hidden_layers=2, exits=(1, 2), matryoshka_dims=DIMS)
    torch.manual_seed(0)
    leaf = torch.randn(2, PAIRS + DOCS, 16, dtype=torch.float64, requires_grad=True)
    return (
        leaf,
        batch,
        Run(model=model, loss=Loss(directions="symmetric" if symmetric else "query_to_doc")),
    )


def with_gradient(leaf, loss_EM):
    weights_EM = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(loss_EM)
    return loss_EM.detach(), torch.autograd.grad((loss_EM * weights_EM).sum(), leaf)[0]


def in_one(leaf, texts, shards, symmetric):
    """One `infonce` over the batch's and the earlier documents."""
    queries, docs = leaf[:, :PAIRS], leaf[:, PAIRS:]
    counts = [
        torch.tensor([int((texts[f"{side}_depths"] >= e).sum()) for e in (1, 2)])
        for side in ("query", "doc")
    ]
    common = {"dims": DIMS, "query_ids": texts["query_ids"], "query_counts": counts[0]}
    loss_EM = infonce(
        queries,
        [docs, *(one.vectors_EnD for one in shards)],
        target=texts["target"],
        cand_ids=torch.cat([texts["doc_ids"], *(one.ids_n for one in shards)]),
        cand_counts=[
            counts[1],
            *(
                torch.full((2,), len(one)) if one.counts_E is None else one.counts_E
                for one in shards
            ),
        ],
        **common,
    )
    if symmetric:
        reverse_EM = infonce(
            docs[:, texts["target"]],
            queries,
            cand_ids=texts["query_ids"],
            cand_counts=counts[0],
            **common,
        )
        loss_EM = (loss_EM + reverse_EM) / 2
    return with_gradient(leaf, loss_EM)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("texts", [STAYING, LEAVING], ids=["staying", "leaving"])
def test_the_loss_is_that_of_all_candidates_at_once(texts, symmetric, host):
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
def test_an_earlier_document_counts_where_it_is_present(counts, counted):
    leaf, batch, run = given(STAYING)
    want = loss_table(leaf, batch, run, ALONE)
    counts = None if counts is None else torch.tensor(counts)
    near = Shard(leaf.detach()[:, 2:3], torch.tensor([99]), counts)
    got = loss_table(leaf, batch, run, ALONE, bank=filled(Bank(9, host=False), [near]))
    for a, b, counts_here in zip(got, want, counted, strict=True):
        assert (a > b + 0.05).all() if counts_here else torch.allclose(a, b, rtol=1e-12, atol=0)


def test_an_earlier_document_of_a_query_s_id_is_none_of_its_negatives():
    """Query 1's twin, at cosine 1 with it: under another id its loss is log(1 + exp(20 - 20 cos))
    or more, under its own only the other queries see it."""
    leaf, batch, run = given(STAYING)
    losses = []
    for number in (11, 99):
        twin = Shard(leaf.detach()[:, 1:2], torch.tensor([number]), None)
        bank = filled(Bank(9, host=False), [twin])
        losses.append(loss_table(leaf, batch, run, ALONE, bank=bank))
    assert (losses[1] > losses[0] + 0.05).all()


def test_a_batch_leaves_its_documents_in_the_bank():
    leaf, batch, run = given(LEAVING)
    bank = Bank(100, host=False)
    first = loss_table(leaf, batch, run, ALONE, bank=bank)
    assert torch.equal(first, loss_table(leaf, batch, run, ALONE)) and bank.shards("x") == []
    bank.commit()
    want = Shard(leaf.detach()[:, PAIRS:], LEAVING["doc_ids"], torch.tensor([8, 5]))
    assert same(bank.shards("x"), [want])
    other = dataclasses.replace(batch, source="y")
    assert torch.equal(loss_table(leaf, other, run, ALONE, bank=bank), first)


def test_one_slab_at_a_time_is_brought(monkeypatch):
    """From a host: in forward and again in backward, and none beside another."""
    right, brought, refs = Shard.to, [], []

    def to(self, like):
        assert not any(ref() is not None for ref in refs)
        moved = right(self, like)
        refs.append(weakref.ref(moved))
        brought.append(len(self))
        return moved

    monkeypatch.setattr(Shard, "to", to)
    leaf, batch, run = given(STAYING)
    loss = loss_table(leaf, batch, run, ALONE, bank=filled(Bank(100, host=True), *EARLIER)).sum()
    assert brought == [4, 3, 5, 1]
    loss.backward()
    assert brought == [4, 3, 5, 1] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_host_s_bank_is_a_device_s():
    leaf, batch, run = given(STAYING)
    leaf = leaf.detach().cuda().bfloat16().requires_grad_()
    found = []
    for host in (True, False):
        bank = Bank(100, host)
        for _ in range(3):
            loss_EM = loss_table(leaf, batch, run, ALONE, bank=bank)
            bank.commit()
        held = bank.shards("x")[0].vectors_EnD
        assert held.is_cuda != host and held.is_pinned() == host
        found.append(with_gradient(leaf, loss_EM))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
