"""A step by the gradient cache is the step of one big batch: loss and every gradient, alone and on
real gloo processes."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from processes import gloo_once

from mlembed import config
from mlembed.runtime.distributed import World
from mlembed.runtime.log import Log
from mlembed.training import gradcache
from mlembed.training.arguments import parse
from mlembed.training.gradcache import ActivationCost
from mlembed.training.objective.loss import loss_table, ranks_of, weights
from mlembed.training.setup import set_up
from mlembed.training.step import Pass
from train import add_gradients, one_step

ALONE = World(0, 1, torch.device("cpu"))
SMALL = [
    *("--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.head-dim", "8"),
    *("--model.intermediate-size", "48", "--model.vocab-size", "400", "--model.exits", "1", "2"),
    *("--model.matryoshka-dims", "8", "32", "--model.ranks", "8", "16"),
    *("--batch-size", "8", "--precision", "fp32", "--max-length", "32", "--compile", "off"),
    *("--optim.max-grad-norm", "1e9", "--steps", "4", "--tracker", "none", "--seed", "3"),
]
SKIP = ["--depth.exits", "1", "2", "--depth.shares", "0.3", "0.7"]
DROPOUT = ["--model.dropout", "0.3"]
# What is asked for -> (arguments, the step). By this seed steps 0 and 3 are of pairs, 1, 2 n-way.
OBJECTIVES = {
    "symmetric": ([], 0),
    "one way": (["--loss.directions", "query_to_doc"], 1),
    "skip": (SKIP, 3),
    "all ranks, accumulated": (
        ["--loss.ranks", "all", "--gradient-accumulation-steps", "2", *SKIP],
        0,
    ),
    # A step at which no pack has a layer that all its texts would skip: the first runs it then.
    "layer dropout": ([*SKIP, "--depth.layer-dropout", "0.2"], 0),
}
# Packs of 40 tokens: several of queries, several of documents.
PACKS = ["--pack-tokens", "40"]
KEEPS = ("none", "half", "all")


def text(folder):
    """Pairs with hard negatives and an n-way table, as a run reads them."""
    numbers = [f"{a} {b}" for a in ("one", "two", "three") for b in ("cats", "dogs", "owls")]
    pairs = [
        {
            "query": f"{n} of {i}",
            "positive": f"{i} : {n}",
            "negatives": [f"{i + 1} : {n}"] * (i % 3),
        }
        for i in range(6)
        for n in numbers
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in pairs))
    rows = [
        {"id": n, "lang": lang, "text": f"{n} {mark}"}
        for n in numbers
        for lang, mark in (("eng", "."), ("deu", "! and more of it"), ("fra", "?"))
    ]
    (folder / "nway.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def job_of(folder, where, options, keep):
    """A run that is set up; `keep`: which graphs the cache keeps, None for no cache."""
    sources = [str(folder / "pairs.jsonl"), str(folder / "nway.jsonl")]
    args = ["tiny", *SMALL, "--data", *sources, "--eval", sources[1], *options]
    args += ["--gradient-cache"] if keep else []
    run = replace(parse(args), eval=())
    job = set_up(run, where, folder / "run", None, Log(folder, main=False))
    if keep == "none":
        job = replace(job, budget=1.0)
    if keep == "half":  # as measured: half of what the largest step of all would need
        number = 0
        packs = job.batches[number].packs
        sizes = [gradcache.graph_bytes(job.kept, pack, 0, 2) for pack in packs]
        job = replace(job, budget=sum(sizes) / 2)
    return job


def step(folder, where, options, number, keep=None):
    """-> (loss_EM, gradients by name, forwards of this process, source) of one step of train.py."""
    job = job_of(folder, where, options, keep)
    micro = job.run.gradient_accumulation_steps
    batches = [job.batches[number * micro + i] for i in range(micro)]
    found, forwards = {}, []

    def read(optimizer, args, kwargs):
        for name, p in job.model.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name] = grad.detach().clone()

    job.optimizer.register_step_pre_hook(read)
    whole = type(job.engine).forward

    def counted(self, pack, **options):
        forwards.append(torch.is_grad_enabled())
        return whole(self, pack, **options)

    type(job.engine).forward = counted
    try:
        result = one_step(job, number, iter(batches))
    finally:
        type(job.engine).forward = whole
        job.saver.close()
    # A process knows its own share, and counts the others' as equal ones.
    assert result.tokens == where.size * sum(batch.tokens for batch in batches)
    return result.losses["contrastive"], found, forwards, batches[0].source


SPREAD = {
    "ddp gather": [],
    "ddp ring": ["--loss.negatives-across", "ring"],
    "fsdp gather": ["--engine", "fsdp"],
    "fsdp ring": ["--engine", "fsdp", "--loss.negatives-across", "ring"],
}


def process(where, folder):
    """Return what one process found, by case."""
    found = {}
    for name, (options, number) in OBJECTIVES.items():
        for spread, more in SPREAD.items():
            for keep in ("half",) if where.size == 4 else (None, *KEEPS):
                plain = name in ("symmetric", "skip") and spread in ("ddp gather", "fsdp ring")
                if keep != "half" and not plain:
                    continue
                args = [*options, *more, *PACKS]
                found[name, spread, keep] = step(folder, where, args, number, keep)
    for engine in ("ddp", "fsdp"):
        for keep in (None, *KEEPS):
            args = [*DROPOUT, *PACKS, "--engine", engine]
            found["dropout", engine, keep] = step(folder, where, args, 0, keep)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text(folder)
    return folder


def plain(folder, options, number):
    """-> (loss_EM, gradients, source) of a step by autograd alone: one process, each side of a
    micro-batch one pack, everything in one graph."""
    job = job_of(folder, ALONE, options, None)
    run, model = job.run, job.model.train()
    micro = run.gradient_accumulation_steps
    table_EM, sources = torch.zeros(2, 2), []
    for i in range(micro):
        batch = job.batches[number * micro + i]
        assert len(batch.packs) == 2
        sources.append(batch.source)
        for rank, share in ranks_of(run, number):
            exits_END = torch.cat([model(pack, rank=rank) for pack in batch.packs], dim=1)
            loss_EM = loss_table(exits_END, batch, run, ALONE) * share / micro
            (weights(run) * loss_EM).sum().backward()
            table_EM += loss_EM.detach()
    job.saver.close()
    return table_EM, {name: p.grad for name, p in model.named_parameters()}, sources[0]


@pytest.fixture(scope="module")
def big(folder):
    """A step as one big batch."""

    @cache
    def big(name):
        options, number = OBJECTIVES[name]
        return plain(folder, options, number)

    return big


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, folder):
    return gloo_once(request.param, process, folder)


def same(got, want, rtol=1e-5):
    """Gradients by name, each within rtol of its norm: fp32 sums in another order."""
    assert got.keys() == want.keys() and len(want) > 20
    for name, gradient in want.items():
        assert gradient.norm() > 0, name
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < rtol, (name, float(error))


# ---- one process ----


@pytest.mark.parametrize("keep", [None, *KEEPS])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_alone_it_is_one_big_batch(folder, big, name, keep):
    options, number = OBJECTIVES[name]
    want_EM, want, source = big(name)
    got_EM, got, forwards, again = step(folder, ALONE, [*options, *PACKS], number, keep)
    assert again == source and len(forwards) > 2
    torch.testing.assert_close(got_EM, want_EM, rtol=2e-6, atol=0)
    same(got, want)
    packs = len(forwards) - forwards.count(False)  # each is encoded once with a graph
    second = forwards.count(False)
    assert {None: second == 0, "none": second == packs, "all": second == 0}.get(
        keep, 0 < second < packs
    )


def test_objectives_are_of_both_kinds(big):
    assert {big(name)[2] for name in OBJECTIVES} == {"pairs", "nway"}


@pytest.mark.parametrize("keep", KEEPS)
def test_dropout_is_drawn_again_alike(folder, keep):
    _, without, _, _ = step(folder, ALONE, PACKS, 0)
    want_EM, want, _, _ = step(folder, ALONE, [*DROPOUT, *PACKS], 0)
    got_EM, got, _, _ = step(folder, ALONE, [*DROPOUT, *PACKS], 0, keep)
    torch.testing.assert_close(got_EM, want_EM, rtol=2e-6, atol=0)
    same(got, want)
    change = want["norm.weight"] - without["norm.weight"]
    assert change.norm() > 0.1 * without["norm.weight"].norm()


def test_other_random_numbers_are_untouched_by_dropouts():
    before = torch.get_rng_state()
    with gradcache.drawing((1, 2), 0.1, ALONE.device):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with gradcache.drawing((1, 2), 0.1, ALONE.device):
        assert torch.equal(torch.rand(3), first)
    with gradcache.drawing((1, 3), 0.1, ALONE.device):
        assert not torch.equal(torch.rand(3), first)


def test_each_process_draws_its_own_dropout(folder, monkeypatch):
    """Processes that hold the same texts have the same vectors, unless there is dropout."""

    def encode(engine, forward, loss, keeps, final, *, sync):
        vectors.extend(forward(i, False).detach() for i in range(len(keeps)))

    monkeypatch.setattr(gradcache, "gradients", encode)
    found = []
    for options in ([], DROPOUT):
        job = job_of(folder, ALONE, [*options, *PACKS], None)
        job.model.train()
        one = Pass(0, job.run.model.exits, None, weights(job.run), 1.0)
        for rank in (0, 1, 0):
            vectors = []
            there = replace(job, where=replace(ALONE, rank=rank))
            add_gradients(there, job.batches[0], one, (0, 0), sync=True)
            found.append(torch.cat(vectors, dim=1))
        job.saver.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[3], found[5]) and not torch.equal(found[3], found[4])
    assert not torch.equal(found[3], found[0])


# ---- several ----


def test_processes_are_one_big_batch(found, big):
    cases = [case for case in found[0] if case[0] != "dropout"]
    assert len(cases) >= len(OBJECTIVES) * len(SPREAD)
    for case in cases:
        want_EM, want, source = big(case[0])
        parts = [process[case] for process in found]
        assert {part[3] for part in parts} == {source}, case
        mean_EM = torch.stack([part[0] for part in parts]).mean(0)
        torch.testing.assert_close(
            mean_EM, want_EM, rtol=3e-6, atol=0, msg=lambda said, case=case: f"{case}: {said}"
        )
        for part in parts:
            same(part[1], want)


def test_processes_differ_in_what_they_do(found):
    """Otherwise the test above would not show that they may."""
    counts = [[len(process[case][2]) for process in found] for case in found[0]]
    assert any(len(set(row)) > 1 for row in counts)


def test_dropout_in_processes(found):
    for engine in ("ddp", "fsdp"):
        want = found[0]["dropout", engine, None]
        for keep in KEEPS:
            for process in found:
                same(process["dropout", engine, keep][1], want[1])
    same(found[0]["dropout", "fsdp", None][1], found[0]["dropout", "ddp", None][1])


# ---- what is kept ----


def test_the_largest_that_fit_are_kept_and_the_final_one_is_of_full_depth(folder):
    job = job_of(folder, ALONE, [*SKIP, *PACKS], "none")
    packs = job.batches[3].packs
    sizes = [gradcache.graph_bytes(job.kept, pack, 0, 2) for pack in packs]
    assert len(packs) > 2 and len(set(sizes)) > 1
    for share in (0.0, 0.3, 0.6, 0.9, 1.0, 2.0):
        budget = share * sum(sizes)
        keeps, again, final = gradcache.keeping(job.run, job.kept, packs, budget)
        held = sum(size for size, kept in zip(sizes, keeps, strict=True) if kept)
        assert held <= budget and again == [0] * len(packs)
        assert packs[final].work_at(2) is not None
        assert keeps[final] == all(keeps) == (share >= 1)
        left = [
            s
            for i, (s, kept) in enumerate(zip(sizes, keeps, strict=True))
            if not kept and i != final
        ]
        assert all(held + size > budget for size in left)


def test_graph_bytes_are_what_blocks_keep(folder):
    job = job_of(folder, ALONE, SKIP, "all")
    (pack, _) = job.batches[2].packs
    kept = ActivationCost(1000.0, 10.0, 1.0)
    deep, shallow = pack.work_at(2).tokens, pack.work_at(1).tokens
    assert deep < shallow
    assert gradcache.graph_bytes(kept, pack, 0, 2) == 2000 + 10 * (deep + shallow)
    assert gradcache.graph_bytes(kept, pack, 1, 2) == 1000 + shallow + 10 * deep
    assert gradcache.graph_bytes(kept, pack, 2, 2) == deep + shallow


def test_the_probe_leaves_room_for_moments(folder, monkeypatch):
    job = job_of(folder, ALONE, [], "all")
    numbers = sum(p.numel() for p in job.model.parameters())
    monkeypatch.setattr(gradcache, "free_bytes", lambda device: 12.0 * numbers + 1000)
    assert gradcache.budget_bytes(job.run, job.model, ALONE.device) == pytest.approx(800)
    set_by_hand = replace(job.run, activation_gib=2.0)
    assert gradcache.budget_bytes(set_by_hand, job.model, ALONE.device) == 2 * 2**30
    monkeypatch.setattr(gradcache, "free_bytes", lambda device: 1.0)
    with pytest.raises(ValueError, match="activation_gib: expected memory beyond"):
        gradcache.budget_bytes(job.run, job.model, ALONE.device)


def test_free_bytes_is_of_this_machine():
    assert 2**24 < gradcache.free_bytes(ALONE.device) < 2**50


def test_selective_and_cache_share_the_budget(folder):
    """A graph that fits by itself is not recomputed within; one that does not, is in part."""
    job = job_of(folder, ALONE, ["--activation-checkpointing", "selective", *PACKS], "none")
    assert isinstance(job.run, config.Run)
    packs = job.batches[0].packs
    sizes = [gradcache.graph_bytes(job.kept, pack, 0, 2) for pack in packs]
    _, again, _ = gradcache.keeping(job.run, job.kept, packs, max(sizes))
    assert again == [0] * len(packs)
    _, again, _ = gradcache.keeping(job.run, job.kept, packs, 0.8 * max(sizes))
    assert again[sizes.index(max(sizes))] == 1
