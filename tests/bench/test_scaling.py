"""Scaling on paper: formulas against hand arithmetic, a simulated ring, and the bytes that the
loss sends; plans that fit.
"""

import re
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from factories import tiny_shape

from bench import scaling
from bench.train_step import cases
from mlembed import config
from mlembed.data.collate import collate
from mlembed.modeling.transformer import Transformer, num_parameters
from mlembed.runtime import distributed
from mlembed.runtime.distributed import World
from mlembed.training import lora
from mlembed.training.objective import candidates
from mlembed.training.objective.loss import loss_table

A = scaling.Assumed()
SMALL = scaling.MODELS["0.6B"]
PLANS = list(scaling.plans(A))


# ---- models ----


def test_shapes_are_the_public_ones():
    """The cards count a plain table of 151,936 rows."""
    totals = 596_049_920, 1_720_574_976, 4_022_468_096, 7_568_405_504
    for m, total in zip(scaling.MODELS.values(), totals, strict=True):
        D = m.hidden_size
        assert num_parameters(replace(m, ranks=())) == total
        assert num_parameters(m) == total - 151_936 * D + 512 * (151_936 + D)


def test_matrices_are_those_of_a_model():
    assert scaling.matrices(SMALL) == 28 * 15_728_640  # 440.4 M, as train_step counts
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16, "intermediate_size": 96}
    small = config.Model(num_attention_heads=4, num_key_value_heads=2, **shape)
    with torch.device("meta"):
        layers = Transformer(small).layers
    assert scaling.matrices(small) == sum(p.numel() for p in layers.parameters() if p.ndim > 1)


def test_bytes_of_a_token_are_those_of_the_log():
    assert scaling.token_bytes(SMALL) == 28 * 45_224


# ---- bytes between GPUs ----


def simulated(n, size, gather):
    """Return the numbers that each of n processes sends around a ring to sum (and gather)."""
    sent = [0] * n
    held = [[1] * n for _ in range(n)]  # contributions to each chunk, chunk = size / n
    for hop in range(n - 1):
        moves = [((i + 1) % n, (i - hop) % n, held[i][(i - hop) % n]) for i in range(n)]
        for i, (to, chunk, count) in enumerate(moves):
            held[to][chunk] += count
            sent[i] += size // n
    owned = [(i + 1) % n for i in range(n)]
    assert all(held[i][owned[i]] == n for i in range(n))
    for hop in range(n - 1 if gather else 0):
        for i in range(n):
            to, chunk = (i + 1) % n, (owned[i] - hop) % n
            held[to][chunk] = n
            sent[i] += size // n
    assert not gather or all(count == n for chunks in held for count in chunks)
    assert len(set(sent)) == 1
    return sent[0]


@pytest.mark.parametrize("n", [2, 8, 64])
def test_weights_send_what_a_ring_sends(n):
    P = num_parameters(SMALL)
    each = n * 1000
    reduced, both = (simulated(n, each, gather) / each for gather in (False, True))
    assert scaling.weight_bytes(SMALL, n, "ddp") == (0.0, pytest.approx(both * 4 * P))
    first, last = scaling.weight_bytes(SMALL, n, "fsdp")
    assert last == pytest.approx(reduced * 4 * P)
    assert first == pytest.approx((both - reduced) * 2 * P)


@pytest.mark.parametrize("across", ["gather", "ring"])
def test_candidates_send_what_the_loss_sends(across, monkeypatch):
    """Count the bytes that one of four processes sends in a step, in bf16."""
    n, pairs, sent = 4, 3, []

    def exchange(where, mine, theirs):
        sent.append(mine.nbytes)
        theirs.copy_(mine)
        return []

    def all_gather(whole, x):
        sent.append((n - 1) * x.nbytes)  # as a ring does it
        whole.copy_(x.repeat(n, *[1] * (x.ndim - 1)))

    def reduce_scatter(own, whole, op):
        sent.append((n - 1) * own.nbytes)
        own.copy_(whole.view(n, *own.shape).sum(0))

    monkeypatch.setattr(candidates, "_exchange", exchange)
    monkeypatch.setattr(distributed, "all_gather", all_gather)
    monkeypatch.setattr(distributed, "reduce_scatter", reduce_scatter)
    m = config.Model(hidden_size=32, exits=(1, 4), matryoshka_dims=(8, 32))
    run = config.Run(model=m, loss=config.Loss(directions="query_to_doc", negatives_across=across))
    groups = [[2 * i, 2 * i + 1] for i in range(n * pairs)]
    text = [np.array([i, i + 1]) for i in range(2 * n * pairs)]
    full = np.full(n * pairs, 4)
    ids = np.arange(len(text))
    batch = collate(groups, text.__getitem__, ids, full, None, size=n, max_tokens=100)
    exits_END = torch.randn(2, 2 * pairs, 32, requires_grad=True)
    where = World(0, n, torch.device("cpu"))
    loss_table(exits_END.bfloat16(), batch, run, where).sum().backward()
    assert sum(sent) == scaling.candidate_bytes(m, n, across, pairs)
    assert exits_END.grad.abs().sum() > 0


def test_links():
    assert scaling.rate(8, "gather", A) == scaling.rate(8, "ring", A) == 0.8 * 450e9
    assert scaling.rate(16, "gather", A) == 0.8 * 8 * 50e9  # all cards of a node
    assert scaling.rate(16, "ring", A) == 0.8 * 50e9  # one
    fast = replace(A, network_gbs=100.0)
    assert scaling.rate(16, "gather", fast) == 0.8 * 450e9  # no more than NVLink brings to them


# ---- FLOPs ----


def test_flops_by_hand_and_as_train_step_counts():
    one = replace(A, pairs=1, query_tokens=2.0, doc_tokens=3.0)
    seen = 3 + 6
    plain = 6 * 440_401_920 * 5 + 14 * 28 * 16 * 128 * seen
    assert scaling.encode_flops(SMALL, one, 0.0) == plain
    more = 2 * 440_401_920 * 5 + 4 * 28 * 16 * 128 * seen
    assert scaling.encode_flops(SMALL, one, 1.0) == plain + more
    # Queries by 8 times as many documents at 7 exits: 4 products of 2 D each.
    assert scaling.loss_flops(SMALL, 8, 100) == 4 * 2 * 7 * 100 * 800 * 1024
    case = cases.CASES["step"]
    n = cases.lengths(case)
    work = cases.stage_work(case)
    mine = 6 * scaling.matrices(SMALL) * sum(n)
    assert mine == work["products"][0]


# ---- memory and time ----


def test_state_by_hand():
    P = num_parameters(SMALL)
    assert scaling.state_bytes(SMALL, 1, "ddp") == (4 + 4 + 8) * P
    assert scaling.state_bytes(SMALL, 8, "ddp") == (4 + 4 + 4 + 8) * P
    assert scaling.state_bytes(SMALL, 8, "fsdp") == (4 + 4 + 8) * P / 8 + (2 + 4) * P


def test_adapters_are_those_of_a_model():
    small = tiny_shape(num_hidden_layers=3, ranks=(4, 8))
    model = Transformer(small)
    lora.attach(model, config.Lora(rank=5), 0)
    named = dict(model.named_parameters())
    pairs = [p for name, p in named.items() if ".lora_" in name]
    assert scaling.adapters(small, 5) == sum(p.numel() for p in pairs)
    assert scaling.parameters(small, 5) == sum(p.numel() for p in named.values())
    assert scaling.trained(small, 5) == sum(p.numel() for p in named.values() if p.requires_grad)
    assert scaling.trained(small, 0) == num_parameters(small)


def test_adapters_by_hand():
    m = scaling.MODELS["4B"]
    # 36 layers: q and o of 2560 + 4096, k and v of 2560 + 1024, three of 2560 + 9728.
    own = 16 * 36 * (2 * 6656 + 2 * 3584 + 3 * 12_288)
    t, P = own + (151_936 + 2560) * 512, num_parameters(m) + own
    assert scaling.adapters(m, 16) == own == 33_030_144
    assert scaling.state_bytes(m, 1, "ddp", 16) == 2 * (P - t) + 16 * t
    assert scaling.state_bytes(m, 8, "ddp", 16) == 2 * (P - t) + 20 * t
    assert scaling.state_bytes(m, 8, "fsdp", 16) == (4 * P + 12 * t) / 8 + 2 * P + 4 * t
    assert scaling.weight_bytes(m, 8, "ddp", 16) == (0, 2 * 7 / 8 * 4 * t)
    assert scaling.weight_bytes(m, 8, "fsdp", 16) == (7 / 8 * 2 * P, 7 / 8 * 4 * t)
    assert scaling.graph_bytes(m, 10, 0, 16) == 2 * own + 10 * (
        scaling.token_bytes(m) + 36 * 7 * 16 * 2
    )
    less = scaling.encode_flops(m, A, 1.0) - scaling.encode_flops(m, A, 1.0, 16)
    assert less == (2 * scaling.matrices(m) - 8 * own) * scaling.tokens(A)


def test_adapters_fit_one_gpu():
    for name in ("4B", "8B"):
        (whole, tuned) = (scaling.plan(name, 1, "ddp", "gather", A, rank) for rank in (0, 16))
        assert tuned.fits and tuned.again == 0 and tuned.held <= (78 - 6) * scaling.GIB
        assert whole.fits == (name == "4B") and tuned.state < whole.state / 6
        assert not whole.fits or whole.again > 0 and tuned.encode_s < whole.encode_s


def test_plans_fit():
    assert {p.fits for p in PLANS} == {True, False} and len(PLANS) == 4 * 3 * 2 * 2
    limit = (A.memory_gib - A.reserved_gib) * scaling.GIB
    for p in PLANS:
        m = scaling.MODELS[p.model]
        if not p.fits:
            assert p.overlapped_s == 0.0 == p.encode_s and p.candidates > 0
            for again in range(m.num_hidden_layers + 1):
                graph = scaling.graph_bytes(m, scaling.LEAST, again)
                assert p.state + p.loss + graph > limit
            continue
        assert p.held <= limit and scaling.LEAST <= p.pack <= A.pack_tokens
        assert p.packs * p.pack >= scaling.tokens(A) > (p.packs - 1) * p.pack
        assert p.kept <= p.packs and p.kept != p.packs - 1 or p.packs <= 2
        if p.again:  # with a layer less, too little would fit
            graph = scaling.graph_bytes(m, scaling.LEAST, p.again - 1)
            assert p.state + p.loss + graph > limit
        assert 0 < p.overlapped_s <= p.apart_s and p.alone_s <= p.overlapped_s * (1 + 1e-9)


def test_more_is_never_less():
    by = {(p.model, p.gpus, p.engine, p.across): p for p in PLANS}
    for (model, n, engine, across), p in by.items():
        if n == scaling.GPUS[-1]:
            continue
        more = by[model, n * 8, engine, across]
        assert more.weights > p.weights and more.candidates > p.candidates
        assert more.loss >= p.loss and (engine == "ddp" or more.state < p.state)
        if p.fits and more.fits:
            assert more.loss_s > p.loss_s and more.weights_s > p.weights_s
            if (more.pack, more.kept, more.again) == (p.pack, p.kept, p.again):
                assert more.overlapped_s > p.overlapped_s or engine == "fsdp"
    for a, b in zip(scaling.MODELS, list(scaling.MODELS)[1:], strict=False):
        assert by[a, 8, "fsdp", "ring"].overlapped_s < by[b, 8, "fsdp", "ring"].overlapped_s
    slow = scaling.plan("0.6B", 64, "ddp", "ring", replace(A, network_gbs=5.0))
    assert slow.apart_s > by["0.6B", 64, "ddp", "ring"].apart_s


def test_one_gpu_sends_nothing():
    (p,) = {p.engine: p for p in scaling.plans(A, [1]) if p.model == "0.6B"}.values()
    assert p.engine == "ddp" and p.weights == p.candidates == 0.0
    assert p.apart_s == p.overlapped_s == p.alone_s


def test_step_that_keeps_all_graphs_encodes_once():
    few = replace(A, pairs=64)
    p = scaling.plan("0.6B", 8, "fsdp", "gather", few)
    assert p.kept == p.packs and p.again == 0
    rate = A.ceiling_tflops * 1e12 * A.reached
    assert p.encode_s == pytest.approx(scaling.encode_flops(SMALL, few, 0.0) / rate)


# ---- what is printed ----


def test_tables_are_labelled(capsys, monkeypatch):
    scaling.main([])
    printed = capsys.readouterr().out
    assert printed.startswith(scaling.LABEL + "\n") and printed.count(scaling.LABEL) == 7
    for f in fields(scaling.Assumed):
        assert re.search(rf"^  {f.name} \d", printed, re.MULTILINE), f.name
    for name in scaling.MODELS:
        assert re.search(rf"^{re.escape(name)}: \d+ M parameters", printed, re.MULTILINE)
    assert printed.count("GPUs: fits") == 16 and "no room" in printed
    assert all(len(line.split()) >= 3 for line in printed.splitlines() if line)
    monkeypatch.setattr(sys, "argv", ["x"])
    scaling.main(["--gpus", "16", "--memory-gib", "1", "--pairs", "8"])
    printed = capsys.readouterr().out
    assert printed.count("16 GPUs: fits neither engine") == 4 and "memory_gib 1:" in printed


def test_wrong_assumption_is_one_line(capsys):
    for args, said in (
        (["--pairs", "0"], "pairs: expected more than 0, got 0"),
        (["--gpus", "0"], "--gpus: expected 1 or more, got 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            scaling.main(args)
        assert caught.value.code == 2 and said in capsys.readouterr().err
