"""The trunk in training: compiled, recomputed, with texts that end early or skip layers, against
transformers' models and against every text alone.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pairwise import all_pairs
from torch import Tensor
from transformer_truth import ALL_EXITS, SHAPES, alone, as_transformers, build, hf_exits, texts

from mlembed.data.packing import pack
from mlembed.training.gradcache import ActivationCost, graph_bytes

NESTED = SHAPES["qwen3"]
CFG = replace(NESTED, ranks=())
# Falling depths, some at no exit, and lengths that hurt: one token, two, a prime, a long one.
DEPTHS = np.array([4, 4, 3, 2, 2, 1, 1])
LENGTHS = (7, 1, 19, 2, 40, 1, 5)
every_style = pytest.mark.parametrize("style", SHAPES)


def skips() -> np.ndarray:
    """Return random layers to run; the first text runs all of them."""
    runs_LN = np.random.default_rng(0).random((4, len(LENGTHS))) < 0.7
    runs_LN[:, 0] = True
    return runs_LN


def cotangents(exits) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(exits), len(LENGTHS), 24, generator=generator, dtype=torch.float64)


def run(model, batch, exits, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the vectors and all gradients; parameters without gradient are an error."""
    model.zero_grad()
    got = model(batch, exits=exits, **options)
    (got * cotangents(exits)).sum().backward()
    return got.detach(), {n: p.grad for n, p in model.named_parameters()}


# ---- against transformers ----


def test_equals_transformers_compiled_to_machine_code():
    model, plain = build(NESTED, "inductor", lean=True), build(NESTED)
    for lengths in ((17, 1, 30), (5, 9)):
        ids = texts(lengths)
        got = model(pack(ids), exits=ALL_EXITS, recompute=1)
        theirs = hf_exits(as_transformers(model), ids, "last")
        torch.testing.assert_close(got.detach(), theirs, rtol=0, atol=1e-5)
        got.square().mean().backward()
        plain(pack(ids), exits=ALL_EXITS).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n)


@every_style
@pytest.mark.parametrize("lean", [False, True])
def test_token_counts_do_not_recompile(style, lean):
    """One graph per half for training and one for inference, for all batches and layers."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = build(SHAPES[style], backend, lean=lean)
    lengths = [(3, 4), (17, 1, 30), (64,), (2, 2, 2, 2, 9), (2, 1), (31, 33), (5,) * 20]
    for some in lengths:
        model(pack(texts(some)), exits=ALL_EXITS).sum().backward()
    first = len(graphs)
    for some in lengths:
        depths = np.array([4] * (len(some) - len(some) // 2) + [2] * (len(some) // 2))
        model(pack(texts(some), depths), exits=ALL_EXITS, recompute=2).sum().backward()
    assert first <= 2 and len(graphs) == first
    with torch.inference_mode():
        for some in lengths:
            model(pack(texts(some)))
    # One row is the only number with graphs of its own: the last layer of one text ends with it.
    assert len(graphs) <= first + 3
    for _ in range(2):
        model(pack(texts((1,)))).sum().backward()
    assert len(graphs) <= first + 5


# ---- texts that end early ----

ENDING = all_pairs(
    [("qwen3", True), ("qwen3", False), ("bert", False)],
    ["last", "mean", "cls", "pooler"],
    [(1, 2, 3, 4), (2, 4), (4,), (1,)],
    [False, True],
    [0, 2, 4],
)


@pytest.mark.parametrize(("kind", "pooling", "exits", "skip", "recompute"), ENDING)
def test_batch_equals_every_text_alone(kind, pooling, exits, skip, recompute):
    """Embeddings and all gradients, in float64. A Qwen3's "pooler" is "last"."""
    style, causal = kind
    pooling = "last" if (style, pooling) == ("qwen3", "pooler") else pooling
    offset = 2 if style == "bert" else 0
    cfg = replace(SHAPES[style], pooling=pooling, causal=causal, position_offset=offset)
    model = build(cfg, dtype=torch.float64)
    ids = texts(LENGTHS)
    runs_LN = skips() if skip else np.ones((4, len(LENGTHS)), dtype=bool)
    batch = pack(ids, DEPTHS, runs_LN)
    got, grads = run(model, batch, exits, recompute=recompute)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for i, (text, depth) in enumerate(zip(ids, DEPTHS.tolist(), strict=True)):
        vectors = alone(model, text, depth, runs_LN[:, i], exits)
        for e, vector in enumerate(vectors):
            torch.testing.assert_close(got[e, i], vector, rtol=0, atol=1e-12)
            total = total + (vector * cotangents(exits)[e, i]).sum()
        assert (got[len(vectors) :, i] == 0).all()
    total.backward()
    for name, p in model.named_parameters():
        if exits[-1] == 4:
            assert grads[name] is not None, f"{name}: processes wait for its gradient"
        want = torch.zeros_like(p) if p.grad is None else p.grad
        mine = torch.zeros_like(p) if grads[name] is None else grads[name]
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-11, msg=lambda m, n=name: n)


@every_style
def test_compiled_equals_eager(style):
    batch = pack(texts(LENGTHS), DEPTHS, skips())
    want, wanted = run(build(SHAPES[style], None, torch.float64), batch, ALL_EXITS, recompute=2)
    for lean in (False, True):
        model = build(SHAPES[style], "aot_eager", torch.float64, lean)
        got, grads = run(model, batch, ALL_EXITS, recompute=2)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-11)


def test_layers_see_only_texts_that_continue():
    """Each layer gets the rows of the texts that reach it, without a copy of them."""
    model = build(NESTED)
    rows, copies, outputs = [], [], []
    before, after = model._before, model._after

    def watch_before(layer, x_TD, *rest):
        rows.append(len(x_TD))
        if outputs:
            last = outputs[-1].untyped_storage().data_ptr()
            copies.append(last != x_TD.untyped_storage().data_ptr())
        return before(layer, x_TD, *rest)

    def watch_after(layer, x_TD, out):
        assert len(x_TD) == len(out) == rows[-1]
        outputs.append(after(layer, x_TD, out))
        return outputs[-1]

    model._before, model._after = watch_before, watch_after
    model(pack(texts(LENGTHS), DEPTHS), exits=(1, 3, 4)).sum().backward()
    tokens = [
        sum(n for n, d in zip(LENGTHS, DEPTHS, strict=True) if d >= layer) for layer in (1, 2, 3, 4)
    ]
    assert rows == tokens and tokens[0] > tokens[1] > tokens[2] > tokens[3]
    assert not any(copies)


def test_nan_of_an_ended_text_does_not_spread():
    """Vectors and gradients of other texts are the same with and without NaN."""
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
        assert (got[:, -1] == 0).all()  # it runs one layer and reaches no exit
        results.append([got.detach(), *(p.grad.clone() for p in model.layers[2:].parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- memory for the backward ----

WIDE = replace(
    NESTED, hidden_size=64, matryoshka_dims=(64,), intermediate_size=160, ranks=(20,), exits=(4,)
)


def saved_bytes(model, batch, recompute, exits=(4,)) -> int:
    """Return the bytes that a forward saves, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model(batch, exits=exits, recompute=recompute)
    del out
    return sum(sizes.values())


# Each way to run in one dtype; in both in `make test-all`.
PROBED = [
    pytest.param(bf16, how, marks=[pytest.mark.slow] * ((i + j) % 2))
    for i, bf16 in enumerate((False, True))
    for j, how in enumerate([(None, False), ("aot_eager", False), ("aot_eager", True)])
]


@pytest.mark.parametrize(("bf16", "how"), PROBED)
def test_activation_cost_predicts_saved_bytes(bf16, how):
    """Blocks and inputs, within what else a forward saves (rotation, pooling, embedding)."""
    model = build(WIDE, how[0], lean=how[1]).train()
    cost = ActivationCost.measure(model, bf16)
    batch = pack(texts((32,) * 32))  # dense attention, like on CPUs, saves more for longer texts
    T, L = 1024, 4
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    for recompute in range(L + 1):
        with autocast:
            got = saved_bytes(model, batch, recompute)
        predicted = (L - recompute) * (cost.fixed + T * cost.per_token) + recompute * T * cost.input
        other = T * (2 * 4 * CFG.head_dim + 8 * 20 + 4 * WIDE.hidden_size + 64)
        assert predicted <= got * 1.01 and got <= predicted + other
    assert cost.input < 0.2 * cost.per_token


@pytest.mark.parametrize("bf16", [False, True])
def test_activation_cost_of_bert(bf16):
    cost = ActivationCost.measure(build(SHAPES["bert"]).train(), bf16)
    assert cost.input == 24 * (2 if bf16 else 4)
    assert cost.per_token > 5 * cost.input


def test_lean_blocks_save_only_products():
    """Per token, of widths D, F and heads: x, q k v before and q k after their norms, attention's
    output, its projection, gate and up; and what dense attention saves, the same in both.
    """
    D, F_ = WIDE.hidden_size, WIDE.intermediate_size
    q, kv = (n * WIDE.head_dim for n in (WIDE.num_attention_heads, WIDE.num_key_value_heads))
    plain, lean = (
        ActivationCost.measure(build(WIDE, "aot_eager", lean=x), True).per_token
        for x in (False, True)
    )
    assert plain - lean == pytest.approx(2 * (2 * D + F_), rel=0.1)  # two norms, silu(gate) up
    assert lean >= 2 * (2 * D + 2 * q + 3 * kv + 2 * F_)


def test_last_layers_save_at_every_exit():
    """Half of the tokens end at exit 3: the first layer and the last two run all of them there, the
    second layer half, and so do the last two at exit 4.
    """
    cfg = replace(WIDE, exits=(3, 4), last_layers=2)
    model = build(cfg).train()
    cost = ActivationCost.measure(model, False)
    batch = pack(texts((32,) * 32), np.repeat([4, 3], 16))
    whole, half = 1024, 512
    saved = [(tokens, runs) for tokens, runs in ((whole, 1), (half, 1), *[(whole + half, 2)] * 2)]
    for recompute in range(5):
        got = saved_bytes(model, batch, recompute, (3, 4))
        predicted = graph_bytes(cost, cfg, batch, recompute)
        light = sum(tokens for tokens, _ in saved[:recompute]) * cost.input
        kept = sum(cost.fixed * n + cost.per_token * tokens for tokens, n in saved[recompute:])
        assert predicted == pytest.approx(light + kept)
        # The rows that the second layer reads are also read by the last layers at exit 3.
        shared = half * cost.input
        other = whole * (2 * 4 * CFG.head_dim + 8 * 20 + 8 * WIDE.hidden_size + 64)
        assert predicted - shared <= got * 1.01 and got <= predicted + other


def test_recomputed_blocks_fit_the_budget():
    cost = ActivationCost(fixed=10, per_token=100, input=8)
    deep = pack([np.zeros(5, int), np.zeros(3, int)], np.array([4, 2]))
    one = pack([np.zeros(2, int)])
    tokens = [10, 10, 7, 7]  # of both packs at each layer
    whole = [20 + 100 * t for t in tokens]
    light = [8 * t for t in tokens]
    for recompute in range(5):
        need = sum(light[:recompute]) + sum(whole[recompute:])
        assert cost.blocks(NESTED, [deep, one], need) == recompute
        if recompute:
            more = sum(light[: recompute - 1]) + sum(whole[recompute - 1 :])
            assert cost.blocks(NESTED, [deep, one], more - 1) == recompute
    assert cost.blocks(NESTED, [deep, one], 0) == 4


def test_ended_texts_save_nothing():
    """If half of the tokens end half way, a forward saves a quarter less."""
    model = build(WIDE)
    ids = texts((40,) * 20)
    whole, half = (saved_bytes(model, pack(ids, np.repeat([4, deep], 10)), 0) for deep in (4, 2))
    assert half / whole == pytest.approx(0.75, abs=0.02)
