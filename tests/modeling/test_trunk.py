"""The trunk as training runs it: compiled, checkpointed, with texts that leave and texts that skip
layers, against transformers' Qwen3 and against every text alone, cut off at its depth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import randomise
from pairwise import all_pairs
from torch import Tensor

from mlembed.data.packing import pack
from mlembed.modeling.transformer import Transformer
from mlembed.training.gradcache import ActivationCost
from tests.modeling.test_transformer import ALL_EXITS, CFG, NESTED, as_transformers, hf_exits, texts

# Falling depths, some at no exit, and lengths that hurt: one token, two, a prime, a long one.
DEPTHS = np.array([4, 4, 3, 2, 2, 1, 1])
LENGTHS = (7, 1, 19, 2, 40, 1, 5)
COUNTED = {"backend": 0}


def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
    """A backend that compiles nothing and counts graphs."""
    COUNTED["backend"] += 1
    return graph.forward


def build(cfg=NESTED, backend=None, dtype=torch.float32, lean=False) -> Transformer:
    model = randomise(Transformer(cfg)).to(dtype)
    if backend is not None:
        torch._dynamo.reset()
        model.compile_blocks(backend, lean=lean)
    return model


# ---- against transformers ----


# (backend, lean, recompute)
WAYS = [
    *((None, False, n) for n in (0, 2, 4)),
    *(("aot_eager", False, n) for n in (0, 4)),
    *(("aot_eager", True, n) for n in (0, 2)),
]


# Each way by one of the vocabularies, each backend by both; the rest in `make test-all`.
RUNS = [
    pytest.param(cfg, way, id=f"{name}-{way}", marks=[pytest.mark.slow] * ((i + j) % 2))
    for i, (name, cfg) in enumerate((("table", CFG), ("factors", NESTED)))
    for j, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("cfg", "way"), RUNS)
def test_equals_transformers_however_it_is_run(cfg, way):
    backend, lean, recompute = way
    model = build(cfg, backend, lean=lean)
    ids = texts()
    got = model(pack(ids), exits=ALL_EXITS, recompute=recompute)
    assert got.requires_grad
    theirs = hf_exits(as_transformers(model), ids, "last")
    torch.testing.assert_close(got.detach(), theirs, rtol=0, atol=1e-5)


def test_equals_transformers_compiled_to_machine_code():
    model = build(NESTED, "inductor", lean=True)
    for lengths in ((17, 1, 30), (5, 9)):
        ids = texts(lengths)
        got = model(pack(ids), exits=ALL_EXITS, recompute=1)
        torch.testing.assert_close(
            got.detach(), hf_exits(as_transformers(model), ids, "last"), rtol=0, atol=1e-5
        )
        got.square().mean().backward()
    plain = build(NESTED)
    for lengths in ((17, 1, 30), (5, 9)):
        plain(pack(texts(lengths)), exits=ALL_EXITS).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n)


@pytest.mark.parametrize("lean", [False, True])
def test_token_counts_do_not_compile_anew(lean):
    """One graph a half for training and one for inference, whatever the batch or the layer."""
    model = build(NESTED, counting, lean=lean)
    COUNTED["backend"] = 0
    lengths = [(3, 4), (17, 1, 30), (64,), (2, 2, 2, 2, 9), (2, 1), (31, 33), (5,) * 20]
    for some in lengths:
        model(pack(texts(some)), exits=ALL_EXITS).sum().backward()
    first = COUNTED["backend"]
    depths = [
        np.array([4] * (len(some) - len(some) // 2) + [2] * (len(some) // 2)) for some in lengths
    ]
    for some, deep in zip(lengths, depths, strict=True):
        model(pack(texts(some), deep), exits=ALL_EXITS, recompute=2).sum().backward()
    assert first <= 2 and COUNTED["backend"] == first
    with torch.inference_mode():
        for some in lengths:
            model(pack(texts(some)))
    # One row is no matrix to the compiler: the only number of them with graphs of its own. Of one
    # text it is what the last layer ends with.
    assert COUNTED["backend"] <= first + 3
    model(pack(texts((1,)))).sum().backward()
    model(pack(texts((1,)))).sum().backward()
    assert COUNTED["backend"] <= first + 5


# ---- texts that leave ----


def alone(model, ids, depth, runs_L, exits) -> list[Tensor]:
    """One text by itself through the layers it runs: its pooled vector at each exit it reaches."""
    batch = pack([ids])
    cos_sin = model.rotation(batch.pos_T)
    x_TD, found = model.embed_tokens(batch.ids_T, None), []
    for layer in range(depth):
        if runs_L[layer]:
            x_TD = model.block(model.layers[layer], x_TD, cos_sin, batch.plan)
        if layer + 1 in exits:
            normed = model.norm(x_TD)
            found.append(
                {"last": normed[-1], "cls": normed[0], "mean": normed.mean(0)}[POOL(model)]
            )
    return found


def POOL(model):  # noqa: N802
    return model.cfg.pooling


def cotangents(exits) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(exits), len(LENGTHS), 24, generator=generator, dtype=torch.float64)


def skipped(seed=0) -> np.ndarray:
    runs_LN = np.random.default_rng(seed).random((4, len(LENGTHS))) < 0.7
    runs_LN[:, 0] = True  # where all would skip a layer the first does not
    return runs_LN


LEAVING = all_pairs(
    [True, False],
    ["last", "mean", "cls"],
    [(1, 2, 3, 4), (2, 4), (4,), (1,)],
    [False, True],
    [0, 2, 4],
)


@pytest.mark.parametrize(("causal", "pooling", "exits", "skip", "recompute"), LEAVING)
def test_leaving_equals_every_text_alone(causal, pooling, exits, skip, recompute):
    """The contract: embeddings and all parameters' gradients, in float64."""
    model = build(replace(NESTED, pooling=pooling, causal=causal), dtype=torch.float64)
    ids = texts(LENGTHS)
    runs_LN = skipped() if skip else np.ones((4, len(LENGTHS)), dtype=bool)
    w_END = cotangents(exits)
    got = model(pack(ids, DEPTHS, runs_LN), exits=exits, recompute=recompute)
    (got * w_END).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    total = torch.zeros((), dtype=torch.float64)
    for i, (text, depth) in enumerate(zip(ids, DEPTHS.tolist(), strict=True)):
        found = alone(model, text, depth, runs_LN[:, i], exits)
        for e, vector in enumerate(found):
            torch.testing.assert_close(got[e, i], vector, rtol=0, atol=1e-12)
            total = total + (vector * w_END[e, i]).sum()
        assert (got[len(found) :, i] == 0).all()
    total.backward()
    for name, p in model.named_parameters():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        mine = torch.zeros_like(p) if gradients[name] is None else gradients[name]
        torch.testing.assert_close(
            mine, want, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_leaving_in_a_compiled_trunk():
    ids, exits = texts(LENGTHS), ALL_EXITS
    results = []
    for backend, lean in ((None, False), ("aot_eager", False), ("aot_eager", True)):
        model = build(NESTED, backend, torch.float64, lean)
        got = model(pack(ids, DEPTHS, skipped()), exits=exits, recompute=2)
        (got * cotangents(exits)).sum().backward()
        results.append([got.detach(), *(p.grad for p in model.parameters())])
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
        torch.testing.assert_close(c, a, rtol=0, atol=1e-12)


def test_nobody_left_is_computed():
    """Each layer sees the tokens of those that are there, in the memory where they lie."""
    model = build()
    seen, copies = [], []
    before, after = model._before, model._after
    last = []

    def watched(layer, x_TD, *rest):
        seen.append(len(x_TD))
        if last:
            copies.append(
                last[-1].untyped_storage().data_ptr() != x_TD.untyped_storage().data_ptr()
            )
        return before(layer, x_TD, *rest)

    def kept(layer, x_TD, out):
        assert len(x_TD) == len(out) == seen[-1]
        last.append(after(layer, x_TD, out))
        return last[-1]

    model._before, model._after = watched, kept
    model(pack(texts(LENGTHS), DEPTHS), exits=(1, 3, 4)).sum().backward()
    there = [
        sum(n for n, d in zip(LENGTHS, DEPTHS, strict=True) if d >= layer) for layer in (1, 2, 3, 4)
    ]
    assert seen == there and there[0] > there[1] > there[2] > there[3]
    assert not any(copies)


def test_what_leaves_reaches_nobody():
    """NaN in a text that leaves: the others' vectors and gradients are what they are without it."""
    model = build(replace(CFG, vocab_size=102))
    ids = texts(LENGTHS)
    ids[-1] = np.array([101] * LENGTHS[-1])
    results = []
    for poison in (1.0, torch.nan):
        model.zero_grad()
        with torch.no_grad():
            model.embed_tokens.weight[101] = poison
        got = model(pack(ids, DEPTHS), exits=(2, 4))
        got[:, :-1].sum().backward()
        assert (got[:, -1] == 0).all()  # it ran one layer, to no exit
        results.append([got.detach(), *(p.grad.clone() for p in model.layers[2:].parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- what is kept for the backward ----


def saved_bytes(model, batch, recompute) -> int:
    """All memory that a forward keeps, weights aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in known:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model(batch, exits=(4,), recompute=recompute)
    del out
    return sum(found.values())


WIDE = replace(
    NESTED, hidden_size=64, matryoshka_dims=(64,), intermediate_size=160, ranks=(20,), exits=(4,)
)


# Each way to run by one dtype; by both in `make test-all`.
PROBED = [
    pytest.param(bf16, how, marks=[pytest.mark.slow] * ((i + j) % 2))
    for i, bf16 in enumerate((False, True))
    for j, how in enumerate([(None, False), ("aot_eager", False), ("aot_eager", True)])
]


@pytest.mark.parametrize(("bf16", "how"), PROBED)
def test_the_probe_foresees_what_is_kept(bf16, how):
    """Blocks and inputs, within what else a forward keeps (rotation, pooling, embedding)."""
    model = build(WIDE, how[0], lean=how[1]).train()
    kept = ActivationCost.measure(model, bf16)
    batch = pack(texts((32,) * 32))  # dense attention, as on CPUs, keeps what grows with lengths
    T, L = 1024, 4
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    for recompute in range(L + 1):
        with autocast:
            got = saved_bytes(model, batch, recompute)
        foreseen = (L - recompute) * (kept.fixed + T * kept.per_token) + recompute * T * kept.input
        other = T * (2 * 4 * CFG.head_dim + 8 * 20 + 4 * WIDE.hidden_size + 64)
        assert foreseen <= got * 1.01 and got <= foreseen + other
    assert kept.input < 0.2 * kept.per_token


def test_lean_blocks_keep_products_alone():
    """Per token, of widths D, F and heads: x, q k v before and q k behind their norms, attention's
    output, its projection, gate and up. Dense attention's own, the same in both, aside."""
    D, F_ = WIDE.hidden_size, WIDE.intermediate_size
    q, kv = (n * WIDE.head_dim for n in (WIDE.num_attention_heads, WIDE.num_key_value_heads))
    plain, lean = (
        ActivationCost.measure(build(WIDE, "aot_eager", lean=x), True).per_token
        for x in (False, True)
    )
    assert plain - lean == pytest.approx(2 * (2 * D + F_), rel=0.1)  # normed twice, silu(gate) up
    assert lean >= 2 * (2 * D + 2 * q + 3 * kv + 2 * F_)


def test_as_many_blocks_as_the_budget_asks():
    kept = ActivationCost(fixed=10, per_token=100, input=8)
    deep = pack([np.zeros(5, int), np.zeros(3, int)], np.array([4, 2]))
    one = pack([np.zeros(2, int)])
    tokens = [10, 10, 7, 7]  # of both packs at each layer
    whole = [20 + 100 * t for t in tokens]
    light = [8 * t for t in tokens]
    for recompute in range(5):
        need = sum(light[:recompute]) + sum(whole[recompute:])
        assert kept.blocks([deep, one], 4, need) == recompute
        if recompute:
            more = sum(light[: recompute - 1]) + sum(whole[recompute - 1 :])
            assert kept.blocks([deep, one], 4, more - 1) == recompute
    assert kept.blocks([deep, one], 4, 0) == 4


def test_layers_that_texts_leave_keep_less():
    """Half of the tokens leave half way: a quarter less is kept; shares hold layer by layer."""
    model = build(WIDE)
    ids = texts((40,) * 20)
    whole, half = (saved_bytes(model, pack(ids, np.repeat([4, deep], 10)), 0) for deep in (4, 2))
    assert half / whole == pytest.approx(0.75, abs=0.02)


# ---- tokens ----


def test_tokens_that_the_vocabulary_has_not():
    for cfg in (CFG, NESTED):
        model = build(cfg)
        for wrong in (101, -1):
            with pytest.raises(ValueError, match=rf"ids: expected .*0\.\.100.*got .*{wrong}"):
                model(pack([np.array([1, wrong, 2])]))
