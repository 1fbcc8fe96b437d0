"""A step with the gradient cache equals the step of one big batch, in loss and every gradient, on
one process and on real gloo processes.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from factories import small_job, small_text
from processes import gloo_once

from mlembed.runtime.distributed import World
from mlembed.training import gradcache
from mlembed.training.gradcache import ActivationCost
from mlembed.training.objective.loss import loss_table, ranks_of, weights
from mlembed.training.step import LossSpec
from train import add_gradients, one_step

ALONE = World(0, 1, torch.device("cpu"))
OPTIONS = ["--optim.max-grad-norm", "1e9", "--steps", "4", "--seed", "3"]
SKIP = ["--depth.exits", "1", "2", "--depth.shares", "0.3", "0.7"]
ACCUMULATED = ["--loss.ranks", "all", "--gradient-accumulation-steps", "2", *SKIP]
# Two exits that share the last of three layers.
LAST = ["--model.num-hidden-layers", "3", "--model.exits", "2", "3", "--model.last-layers", "1"]
LAST += ["--depth.exits", "2", "3"]
DROPOUT = ["--model.dropout", "0.3"]
# Objective -> (arguments, the step). By this seed steps 0 and 3 are of pairs, 1 and 2 n-way.
OBJECTIVES = {
    "symmetric": ([], 0),
    "one way": (["--loss.directions", "query_to_doc"], 1),
    "skip": (SKIP, 3),
    "all ranks, accumulated": (ACCUMULATED, 0),
    # At this step no pack has a layer that all its texts skip, which the first would run even so.
    "layer dropout": ([*SKIP, "--depth.layer-dropout", "0.2"], 3),
    "last layers": (LAST, 3),
}
# Several packs, in different numbers on two processes.
PACKS = ["--pack-tokens", "23"]
KEEPS = ("none", "half", "all")


def job_of(folder, where, options, keep):
    """Set up a run. keep: which graphs the cache keeps, None for no cache."""
    cache = ["--gradient-cache"] if keep else []
    data = [str(folder / name) for name in ("pairs.jsonl", "nway.jsonl")]
    job = small_job(folder, data, *OPTIONS, *options, *cache, where=where)
    if keep == "none":
        job = replace(job, budget=1.0)
    if keep == "half":
        sizes = [
            gradcache.graph_bytes(job.cost, job.run.model, pack, 0) for pack in job.batches[0].packs
        ]
        job = replace(job, budget=sum(sizes) / 2)
    return job


def step(folder, where, options, number, keep=None):
    """Return loss_EM, gradients, forwards of this process and source of one step of train.py."""
    job = job_of(folder, where, options, keep)
    micro = job.run.gradient_accumulation_steps
    batches = [job.batches[number * micro + i] for i in range(micro)]
    gradients, forwards = {}, []

    def read(optimizer, args, kwargs):
        for name, p in job.model.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            gradients[name] = grad.detach().clone()

    job.optimizer.register_step_pre_hook(read)
    forward = type(job.engine).forward

    def counted(self, pack, **options):
        forwards.append(torch.is_grad_enabled())
        return forward(self, pack, **options)

    type(job.engine).forward = counted
    try:
        result = one_step(job, number, iter(batches))
    finally:
        type(job.engine).forward = forward
        job.saver.close()
    assert result.tokens == sum(batch.tokens for batch in batches)
    return result.losses["contrastive"], gradients, forwards, batches[0].source


SPREAD = {
    "ddp gather": [],
    "ddp ring": ["--loss.negatives-across", "ring"],
    "fsdp gather": ["--engine", "fsdp"],
    "fsdp ring": ["--engine", "fsdp", "--loss.negatives-across", "ring"],
}


def process(where, folder):
    """Return the steps of one process by case."""
    steps = {}
    for name, (options, number) in OBJECTIVES.items():
        for spread, more in SPREAD.items():
            for keep in ("half",) if where.size == 4 else (None, *KEEPS):
                plain = name in ("symmetric", "skip") and spread in ("ddp gather", "fsdp ring")
                if keep != "half" and not plain:
                    continue
                args = [*options, *more, *PACKS]
                steps[name, spread, keep] = step(folder, where, args, number, keep)
    for engine in ("ddp", "fsdp"):
        for keep in (None, *KEEPS):
            args = [*DROPOUT, *PACKS, "--engine", engine]
            steps["dropout", engine, keep] = step(folder, where, args, 0, keep)
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    small_text(folder, ragged=True)
    return folder


def plain(folder, options, number):
    """Return loss_EM, gradients and source of a step by autograd alone: one process, one graph."""
    job = job_of(folder, ALONE, options, None)
    run, model = job.run, job.model.train()
    micro = run.gradient_accumulation_steps
    table_EM, sources = torch.zeros(2, 2), []
    for i in range(micro):
        batch = job.batches[number * micro + i]
        assert len(batch.packs) == 1
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
    """Return a function of the objective's name that computes its step as one big batch."""

    @cache
    def big(name):
        options, number = OBJECTIVES[name]
        return plain(folder, options, number)

    return big


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request, folder):
    return gloo_once(request.param, process, folder)


def same(got, want, rtol=1e-5):
    """Compare gradients by name, each within rtol of its norm: fp32 sums in another order."""
    assert got.keys() == want.keys() and len(want) > 20
    for name, gradient in want.items():
        assert gradient.norm() > 0, name
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < rtol, (name, float(error))


# ---- one process ----


@pytest.mark.parametrize("keep", [None, *KEEPS])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_process_equals_one_big_batch(folder, big, name, keep):
    options, number = OBJECTIVES[name]
    want_EM, want, source = big(name)
    got_EM, got, forwards, again = step(folder, ALONE, [*options, *PACKS], number, keep)
    assert again == source and len(forwards) > 2
    torch.testing.assert_close(got_EM, want_EM, rtol=2e-6, atol=0)
    same(got, want)
    # Each pack is encoded once with a graph, and some are encoded without one before.
    packs, twice = forwards.count(True), forwards.count(False)
    expected = {None: twice == 0, "none": twice == packs, "all": twice == 0}
    assert expected.get(keep, 0 < twice < packs)


def test_objectives_are_of_both_kinds(big):
    assert {big(name)[2] for name in OBJECTIVES} == {"pairs", "nway"}


@pytest.mark.parametrize("keep", KEEPS)
def test_second_forward_draws_the_same_dropout(folder, keep):
    _, without, _, _ = step(folder, ALONE, PACKS, 0)
    want_EM, want, _, _ = step(folder, ALONE, [*DROPOUT, *PACKS], 0)
    got_EM, got, _, _ = step(folder, ALONE, [*DROPOUT, *PACKS], 0, keep)
    torch.testing.assert_close(got_EM, want_EM, rtol=2e-6, atol=0)
    same(got, want)
    change = want["norm.weight"] - without["norm.weight"]
    assert change.norm() > 0.1 * without["norm.weight"].norm()


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("keeps", [(True, True), (True, False, False), (False, False)], ids=str)
def test_only_the_last_backward_of_a_step_reduces(keeps, sync):
    """Gradients are reduced at most once, and only by the forward and backward that end a step."""
    weight = torch.ones(3, requires_grad=True)
    forwards, backwards = [], []

    class Engine:
        def backward(self, outputs, grads, sync):
            backwards.append(sync)
            torch.autograd.backward(outputs, grads)

    def forward(i, sync):
        forwards.append(sync)
        return (weight * (i + 1)).view(1, 1, 3)

    final = len(keeps) - 1
    gradcache.gradients(Engine(), forward, torch.sum, keeps, final, sync=sync)
    assert weight.grad.tolist() == [sum(range(1, len(keeps) + 1))] * 3
    assert backwards == [False] * (len(backwards) - 1) + [sync]
    if all(keeps):
        assert forwards == [sync] * len(keeps)
    else:
        assert forwards == [False] * (len(forwards) - 1) + [sync]


def test_seeded_dropout_leaves_other_draws():
    before = torch.get_rng_state()
    with gradcache.seeded_dropout((1, 2), 0.1, ALONE.device):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with gradcache.seeded_dropout((1, 2), 0.1, ALONE.device):
        assert torch.equal(torch.rand(3), first)
    with gradcache.seeded_dropout((1, 3), 0.1, ALONE.device):
        assert not torch.equal(torch.rand(3), first)


def test_each_process_draws_its_own_dropout(folder, monkeypatch):
    """Processes with the same texts have the same vectors, unless there is dropout."""

    def encode(engine, forward, loss, keeps, final, *, sync):
        vectors.extend(forward(i, False).detach() for i in range(len(keeps)))

    monkeypatch.setattr(gradcache, "gradients", encode)
    encoded = []
    for options in ([], DROPOUT):
        job = job_of(folder, ALONE, [*options, *PACKS], None)
        job.model.train()
        spec = LossSpec(None, weights(job.run), 1.0, (job.run.seed, 6, 0, 0, 0))
        for rank in (0, 1, 0):
            vectors = []
            other = replace(job, where=replace(ALONE, rank=rank))
            add_gradients(other, job.batches[0], spec, sync=True)
            encoded.append(torch.cat(vectors, dim=1))
        job.saver.close()
    plain, same_plain, _, first, second, again = encoded
    assert torch.equal(plain, same_plain)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.equal(first, plain)


# ---- several ----


def test_several_processes_equal_one_big_batch(processes, big):
    cases = [case for case in processes[0] if case[0] != "dropout"]
    assert len(cases) >= len(OBJECTIVES) * len(SPREAD)
    for case in cases:
        want_EM, want, source = big(case[0])
        parts = [steps[case] for steps in processes]
        assert {part[3] for part in parts} == {source}, case
        mean_EM = torch.stack([part[0] for part in parts]).mean(0)
        assert torch.allclose(mean_EM, want_EM, rtol=3e-6, atol=0), case
        for part in parts:
            same(part[1], want)


def test_processes_differ_in_their_forwards(processes):
    """Otherwise the test above would not show that they may."""
    counts = [[len(steps[case][2]) for steps in processes] for case in processes[0]]
    assert any(len(set(row)) > 1 for row in counts)


def test_dropout_in_processes(processes):
    gradients = {case: step[1] for case, step in processes[0].items() if case[0] == "dropout"}
    for engine in ("ddp", "fsdp"):
        for keep in KEEPS:
            for steps in processes:
                same(steps["dropout", engine, keep][1], gradients["dropout", engine, None])
    same(gradients["dropout", "fsdp", None], gradients["dropout", "ddp", None])


# ---- which graphs are kept ----


def test_largest_graphs_that_fit_are_kept(folder):
    """The final pack, which runs to full depth, keeps its graph only if all do."""
    job = job_of(folder, ALONE, [*SKIP, *PACKS], "none")
    packs = job.batches[3].packs
    sizes = [gradcache.graph_bytes(job.cost, job.run.model, pack, 0) for pack in packs]
    assert len(packs) > 2 and len(set(sizes)) > 1
    for share in (0.0, 0.3, 0.6, 0.9, 1.0, 2.0):
        budget = share * sum(sizes)
        keeps, recompute, final = gradcache.choose_graphs(job.run, job.cost, packs, budget)
        used = sum(size for size, keep in zip(sizes, keeps, strict=True) if keep)
        assert used <= budget and recompute == [0] * len(packs)
        assert packs[final].plan_at(2) is not None
        assert keeps[final] == all(keeps) == (share >= 1)
        left = [sizes[i] for i, keep in enumerate(keeps) if not keep and i != final]
        assert all(used + size > budget for size in left)


def test_graph_bytes(folder):
    job = job_of(folder, ALONE, SKIP, "all")
    (pack,) = job.batches[2].packs
    cost = ActivationCost(1000.0, 10.0, 1.0)
    deep, shallow = pack.plan_at(2).tokens, pack.plan_at(1).tokens
    assert deep < shallow
    assert gradcache.graph_bytes(cost, job.run.model, pack, 0) == 2000 + 10 * (deep + shallow)
    assert gradcache.graph_bytes(cost, job.run.model, pack, 1) == 1000 + shallow + 10 * deep
    assert gradcache.graph_bytes(cost, job.run.model, pack, 2) == deep + shallow


def test_budget_leaves_room_for_moments(folder, monkeypatch):
    job = job_of(folder, ALONE, [], "all")
    numbers = sum(p.numel() for p in job.model.parameters())
    monkeypatch.setattr(gradcache, "free_bytes", lambda device: 12.0 * numbers + 1000)
    assert gradcache.budget_bytes(job.run, job.model, ALONE.device) == pytest.approx(800)
    # Frozen weights have neither gradients nor moments; FSDP holds a copy of them.
    frozen = sum(p.numel() for p in job.model.layers.requires_grad_(False).parameters())
    for run, needs in ((job.run, 0), (replace(job.run, engine="fsdp"), 4.0 * frozen)):
        left = 12.0 * frozen - needs + 1000
        assert gradcache.budget_bytes(run, job.model, ALONE.device) == pytest.approx(0.8 * left)
    configured = replace(job.run, activation_gib=2.0)
    assert gradcache.budget_bytes(configured, job.model, ALONE.device) == 2 * 2**30
    monkeypatch.setattr(gradcache, "free_bytes", lambda device: 1.0)
    with pytest.raises(ValueError, match="activation_gib: expected memory beyond"):
        gradcache.budget_bytes(job.run, job.model, ALONE.device)


def test_free_bytes_is_of_this_machine():
    assert 2**24 < gradcache.free_bytes(ALONE.device) < 2**50


def test_selective_and_cache_share_the_budget(folder):
    """A graph that fits the budget alone recomputes nothing, a larger one some of its layers."""
    job = job_of(folder, ALONE, ["--activation-checkpointing", "selective", *PACKS], "none")
    packs = job.batches[0].packs
    sizes = [gradcache.graph_bytes(job.cost, job.run.model, pack, 0) for pack in packs]
    _, again, _ = gradcache.choose_graphs(job.run, job.cost, packs, max(sizes))
    assert again == [0] * len(packs)
    _, again, _ = gradcache.choose_graphs(job.run, job.cost, packs, 0.8 * max(sizes))
    assert again[sizes.index(max(sizes))] == 1
