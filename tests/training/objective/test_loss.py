"""The objective against its formula in plain Python, its weights, and the optimiser's schedule."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch

from mlembed import config
from mlembed.config import Loss, Model, Optim, Run
from mlembed.data.collate import Batch
from mlembed.data.packing import pack
from mlembed.modeling.transformer import Transformer
from mlembed.runtime.distributed import World
from mlembed.training.objective.loss import loss_table, ranks_of, sample_rank, weights
from mlembed.training.optim import adamw, learning_rate

ALONE = World(0, 1, torch.device("cpu"))
EXITS = ["uniform", "depth", "inverse", "log"]
PREFIXES = ["uniform", "ml-embed"]
LEAVING_NEGATIVES = torch.tensor([[3, 4], [-1, -1], [-1, -1], [-1, -1], [7, -1]])

# ---- weights ----


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("dims", [(256,), (8, 256), (7, 100, 256), ()])
def test_weights_sum_to_one(exits, prefixes, dims):
    run = Run(
        model=Model(exits=(1, 3, 4), matryoshka_dims=dims),
        loss=Loss(exit_weights=exits, matryoshka_weights=prefixes),
    )
    w_EM = weights(run)
    assert w_EM.shape == (3, len(run.model.matryoshka_dims)) and (w_EM > 0).all()
    assert abs(w_EM.double().sum().item() - 1) < 1e-6


def test_uniform_weights_are_equal():
    run = Run(model=Model(exits=(1, 4), matryoshka_dims=(8, 16, 256)))
    assert torch.allclose(weights(run), torch.full((2, 3), 1 / 6))


def test_depth_weights_are_in_proportion_to_depth():
    w_EM = weights(Run(model=Model(exits=(1, 2, 4)), loss=Loss(exit_weights="depth")))
    w_E = w_EM.sum(1)
    assert torch.allclose(w_E, torch.tensor([1.0, 2.0, 4.0]) / 7)


def test_ml_embed_weights():
    """w = 1 / (n sqrt(D / d)), n = 1 at the full width and one more at each smaller prefix."""
    dims = (8, 16, 64, 256)
    want = []
    for i, d in enumerate(dims):
        n = len(dims) - i
        want.append(1.0 / (n * math.sqrt(256 / d)))
    assert want[-1] == 1.0 and want[0] == pytest.approx(1 / (4 * math.sqrt(32)))
    run = Run(
        model=Model(exits=(2, 4), matryoshka_dims=dims), loss=Loss(matryoshka_weights="ml-embed")
    )
    for row in weights(run).tolist():
        assert row == pytest.approx([w / sum(want) / 2 for w in want], rel=1e-6)


def of_exits(rule, exits=None, **options):
    """Weights at exits 1, 2, 3 and 6, or some of them, of one prefix."""
    shape = Model(num_hidden_layers=6, exits=(1, 2, 3, 6), matryoshka_dims=(256,))
    return weights(Run(model=shape, loss=Loss(exit_weights=rule, **options)), exits)[:, 0].tolist()


BY_RULE = {
    "depth": [1, 2, 3, 6],
    "inverse": [1, 1 / 2, 1 / 3, 1],
    "log": [0.5906161, 0.4765053, 0.4190597, 1],  # 1 / (1 + ln 2), 1 / (1 + ln 3), 1 / (1 + ln 4)
    "custom": [3, 0, 5, 2],
}


@pytest.mark.parametrize("rule", BY_RULE)
def test_rules_of_exits(rule):
    """Raw, where weights are not normalised; otherwise in proportion. Of some exits, those's."""
    raw, custom = BY_RULE[rule], {"custom_exit_weights": (3.0, 0.0, 5.0, 2.0)}
    options = custom if rule == "custom" else {}
    assert of_exits(rule, normalise_weights=False, **options) == pytest.approx(raw, rel=1e-6)
    assert of_exits(rule, **options) == pytest.approx([w / sum(raw) for w in raw], rel=1e-6)
    some = of_exits(rule, (2, 6), normalise_weights=False, **options)
    assert some == pytest.approx([raw[1], raw[3]], rel=1e-6)
    total = raw[1] + raw[3]
    assert of_exits(rule, (2, 6), **options) == pytest.approx([raw[1] / total, raw[3] / total])


def test_uniform_weights_are_a_mean_over_exits_even_so():
    assert of_exits("uniform", normalise_weights=False) == [0.25] * 4
    assert of_exits("uniform", (2, 6), normalise_weights=False) == [0.5] * 2


def test_exits_that_all_weigh_nothing():
    with pytest.raises(ValueError, match=r"custom_exit_weights: expected one above 0.*\(1, 6\)"):
        of_exits("custom", (1, 6), custom_exit_weights=(0.0, 1.0, 1.0, 0.0))


@pytest.mark.parametrize(
    "rule, raw",
    [
        ("uniform", (1, 1, 1)),
        ("custom", (0.5, 0, 2)),
        # papers' own numbers for a full width of 1024
        ("ml-embed", (0.0179, 0.1667, 1)),
    ],
)
def test_rules_of_prefixes(rule, raw):
    dims = (8, 16, 32, 64, 128, 256, 512, 1024) if rule == "ml-embed" else (8, 16, 1024)
    options = {"custom_matryoshka_weights": (0.5, 0.0, 2.0)} if rule == "custom" else {}
    shape = Model(hidden_size=1024, exits=(4,), matryoshka_dims=dims)
    for normalise in (False, True):
        loss = Loss(matryoshka_weights=rule, normalise_weights=normalise, **options)
        got = weights(Run(model=shape, loss=loss))[0]
        total = got.sum().item()
        if rule == "ml-embed":
            assert total == pytest.approx(1.0 if normalise else 1.717, abs=1e-3)
            got = got[[1, 5, 7]]
        scale = got[2].item() / raw[2]
        assert got.tolist() == pytest.approx([w * scale for w in raw], abs=1e-4)
        assert normalise or scale == 1


# ---- the table of losses ----


def by_hand(queries, docs, dims, temperature, targets, query_ids, doc_ids):
    """InfoNCE with Python floats: [exit][prefix]."""
    table = []
    for exit_q, exit_d in zip(queries.tolist(), docs.tolist(), strict=True):
        row = []
        for d in dims:
            total = 0.0
            for i, q in enumerate(exit_q):
                logits = {}
                for j, c in enumerate(exit_d):
                    if j != targets[i] and doc_ids[j] == query_ids[i]:
                        continue
                    dot = sum(a * b for a, b in zip(q[:d], c[:d], strict=True))
                    length = math.hypot(*q[:d]) * math.hypot(*c[:d])
                    logits[j] = dot / length / temperature
                top = max(logits.values())
                total += top + math.log(sum(math.exp(x - top) for x in logits.values()))
                total -= logits[targets[i]]
            row.append(total / len(exit_q))
        table.append(row)
    return torch.tensor(table, dtype=torch.float64)


@pytest.fixture
def batch():
    """5 pairs, two with one id, 3 hard negatives of which one is another row's positive."""
    pair_ids = torch.tensor([10, 11, 10, 12, 13])
    doc_ids = torch.tensor([10, 11, 10, 12, 13, 20, 12, 21])
    packed = pack([np.array([1])] * 13)
    deep = torch.full((8,), 99)
    own = torch.arange(5)
    owners = torch.tensor([0, 1, 2, 3, 4, 0, 0, 4])
    negatives = torch.tensor([[5, 6], [-1, -1], [-1, -1], [-1, -1], [7, -1]])
    return Batch(
        (packed,), torch.arange(13), own, pair_ids, deep[:5], doc_ids, deep, (8,), "x",
        owners, negatives, negatives[:, 0] >= 0, torch.arange(13),
    )  # fmt: skip


def test_the_order_of_the_pack_is_undone(batch):
    """The same texts packed in another order, and the places that say so, give the same loss."""
    torch.manual_seed(0)
    run = Run(model=Model(exits=(2, 4), matryoshka_dims=(64, 256)))
    exits_END = torch.randn(2, 13, 256)
    order = torch.randperm(13)
    shuffled = dataclasses.replace(batch, place=order.argsort())
    want = loss_table(exits_END, batch, run, ALONE)
    got = loss_table(exits_END[:, order], shuffled, run, ALONE)
    assert torch.equal(got, want)


@pytest.fixture
def exits_END():
    torch.manual_seed(0)
    return torch.randn(2, 13, 16, dtype=torch.float64)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_loss_table_by_hand(batch, exits_END, symmetric, temperature):
    run = Run(
        model=Model(hidden_size=16, num_hidden_layers=2, exits=(1, 2), matryoshka_dims=(3, 8, 16)),
        loss=Loss(directions="symmetric" if symmetric else "query_to_doc", temperature=temperature),
    )
    got = loss_table(exits_END, batch, run, ALONE)
    queries, docs = exits_END[:, :5], exits_END[:, 5:]
    dims, ids, own = (3, 8, 16), batch.query_ids.tolist(), range(5)
    want = by_hand(queries, docs, dims, temperature, own, ids, batch.doc_ids.tolist())
    if symmetric:
        back = by_hand(docs[:, :5], queries, dims, temperature, own, ids, ids)
        want = (want + back) / 2
    assert got.dtype == torch.float64 and got.shape == (2, 3)
    assert torch.allclose(got, want, rtol=1e-12, atol=0)


def test_the_table_depends_on_the_directions(batch, exits_END):
    shape = Model(hidden_size=16, num_hidden_layers=2)
    one, both = (
        loss_table(
            exits_END,
            batch,
            Run(model=shape, loss=Loss(directions="symmetric" if s else "query_to_doc")),
            ALONE,
        )
        for s in (False, True)
    )
    assert (one - both).abs().min() > 1e-3


def test_gradients_reach_every_text(batch, exits_END):
    run = Run(model=Model(hidden_size=16, num_hidden_layers=2))
    leaf = exits_END.requires_grad_()
    loss_table(leaf, batch, run, ALONE).sum().backward()
    assert (leaf.grad.norm(dim=-1) > 0).all()
    assert torch.allclose((leaf.grad * leaf).sum(-1), torch.zeros(2, 13, dtype=torch.float64))


def test_perfect_vectors_lose_nothing(batch):
    """Each pair on its own axis, hard negatives on others; equal ids do not count."""
    axes = torch.eye(16)
    exits_END = torch.cat([axes[:5], axes[:5], axes[5:8]]).repeat(2, 1, 1)
    run = Run(model=Model(hidden_size=16, num_hidden_layers=2, matryoshka_dims=(16,)))
    assert loss_table(exits_END, batch, run, ALONE).max() < 1e-6


# ---- texts that leave ----


@pytest.mark.parametrize("symmetric", [True, False])
def test_only_those_that_are_there_count(symmetric, exits_END):
    """At each exit the loss is that of the groups that run as deep, alone; with targets anywhere.

    Of 5 pairs two leave at the first exit; documents are ordered deepest first.
    """
    query_depths = torch.tensor([2, 2, 2, 1, 1])
    doc_depths = torch.tensor([2, 2, 2, 2, 2, 1, 1, 1])
    query_ids = torch.tensor([10, 11, 12, 13, 14])
    doc_ids = torch.tensor([11, 10, 12, 20, 21, 13, 14, 22])
    target = torch.tensor([1, 0, 2, 5, 6])
    batch = Batch(
        (), torch.arange(13), target, query_ids, query_depths, doc_ids, doc_depths, (8,), "x",
        torch.tensor([1, 0, 2, 0, 0, 3, 4, 4]), LEAVING_NEGATIVES,
        LEAVING_NEGATIVES[:, 0] >= 0, torch.arange(13),
    )  # fmt: skip
    run = Run(
        model=Model(hidden_size=16, num_hidden_layers=2, exits=(1, 2), matryoshka_dims=(3, 16)),
        loss=Loss(directions="symmetric" if symmetric else "query_to_doc"),
    )
    leaf = exits_END.clone()
    leaf[1, [3, 4, 10, 11, 12]] = torch.nan  # who has left is not looked at
    got = loss_table(leaf, batch, run, ALONE)
    for e, (n, docs) in enumerate(((5, 8), (3, 5))):
        queries, cands = exits_END[e : e + 1, :n], exits_END[e : e + 1, 5 : 5 + docs]
        own, ids = target[:n].tolist(), query_ids[:n].tolist()
        common = (3, 16), 0.05
        want = by_hand(queries, cands, *common, own, ids, doc_ids[:docs].tolist())
        if symmetric:
            anchors = cands[:, target[:n]]
            back = by_hand(anchors, queries, *common, range(n), ids, ids)
            want = (want + back) / 2
        assert torch.allclose(got[e : e + 1], want, rtol=1e-12, atol=0)
    deepest = loss_table(leaf[1:], batch, run, ALONE, exits=(2,))
    assert torch.allclose(deepest, got[1:], rtol=1e-12, atol=0)


def test_weights_of_some_exits_sum_to_one():
    run = Run(model=Model(exits=(1, 2, 4)), loss=Loss(exit_weights="depth"))
    w_EM = weights(run, (2, 4))
    assert torch.allclose(w_EM.sum(1), torch.tensor([2.0, 4.0]) / 6)


# ---- rank sampling ----


def test_ranks_are_drawn_in_proportion():
    ranks, n = (32, 64, 128), 4000
    drawn = Counter(sample_rank(ranks, 3, step) for step in range(n))
    assert set(drawn) == set(ranks)
    for rank in ranks:
        p = rank / sum(ranks)
        assert abs(drawn[rank] / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_ranks_are_a_function_of_seed_and_step():
    ranks = (1, 2, 3, 4)
    first = [sample_rank(ranks, 5, step) for step in range(50)]
    np.random.seed(1)
    torch.manual_seed(1)
    assert [sample_rank(ranks, 5, step) for step in reversed(range(50))][::-1] == first
    assert [sample_rank(ranks, 6, step) for step in range(50)] != first
    assert all(type(rank) is int for rank in first)


def test_all_ranks_are_what_sampling_estimates():
    """Each step every rank, weighing what its probability is."""
    shape = Model(ranks=(4, 8, 16))
    every = ranks_of(Run(model=shape, loss=Loss(ranks="all")), 3)
    assert every == [(4, 4 / 28), (8, 8 / 28), (16, 16 / 28)]
    assert sum(share for _, share in every) == pytest.approx(1)
    drawn = Counter(ranks_of(Run(model=shape), step)[0][0] for step in range(4000))
    for rank, share in every:
        assert drawn[rank] / 4000 == pytest.approx(share, abs=4 * (share / 4000) ** 0.5)
    assert ranks_of(Run(model=shape), 3) == [(sample_rank((4, 8, 16), 0, 3), 1.0)]
    assert ranks_of(Run(loss=Loss(ranks="all")), 0) == [(None, 1.0)]  # a plain table


def test_no_ranks():
    assert sample_rank((), 0, 0) is None
    assert sample_rank((7,), 0, 0) == 7


# ---- optimiser ----


def schedule(steps, **optim):
    run = Run(steps=steps, optim=Optim(**optim))
    return [learning_rate(step, run) for step in range(steps)]


def test_schedule():
    rates = schedule(200, lr=2.0, warmup_ratio=0.1, min_lr_ratio=0.05)
    assert rates[:20] == pytest.approx([2.0 * (i + 1) / 20 for i in range(20)])
    assert rates[20] == pytest.approx(2.0)  # the top of the cosine
    assert all(a > b for a, b in zip(rates[20:-1], rates[21:], strict=True))
    assert rates[-1] == pytest.approx(0.1)
    for step in (50, 110, 180):
        phase = (step - 20) / 179
        want = 0.1 + (2.0 - 0.1) * (1 + math.cos(math.pi * phase)) / 2
        assert rates[step] == pytest.approx(want)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_schedule_at_its_edges(steps, warmup, floor):
    rates = schedule(steps, lr=1.0, warmup_ratio=warmup, min_lr_ratio=floor)
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates) and max(rates) == pytest.approx(1.0)
    if warmup == 0 and steps > 1:
        assert rates[0] == 1.0 and rates[-1] == pytest.approx(floor)


@pytest.mark.parametrize("ranks", [(), (4, 8)])
def test_every_parameter_in_exactly_one_group(ranks):
    model = Transformer(dataclasses.replace(Model(), num_hidden_layers=2, exits=(), ranks=ranks))
    cfg = config.Optim(lr=0.5, betas=(0.1, 0.2), weight_decay=0.3)
    optimizer = adamw(model, cfg)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name
    assert all(g["lr"] == 0.5 and g["betas"] == (0.1, 0.2) for g in optimizer.param_groups)
