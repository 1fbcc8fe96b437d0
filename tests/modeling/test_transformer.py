"""The packed transformer of both styles against transformers' models: exits, poolings, ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_truth import (
    ALL_EXITS,
    LENGTHS,
    SHAPES,
    STYLE_POOLINGS,
    as_transformers,
    assert_equals_transformers,
    build,
    hf_exits,
    texts,
)

from mlembed.data.packing import pack
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer, num_parameters
from mlembed_kernels import infonce

NESTED = SHAPES["qwen3"]
CFG = replace(NESTED, ranks=())
SHORT = (5, 1, 29)
every_style = pytest.mark.parametrize("style", SHAPES)
every_pooling = pytest.mark.parametrize(("style", "pooling"), STYLE_POOLINGS)
# The styles' poolings, and Qwen3's without the causal mask.
KINDS = [
    pytest.param(replace(SHAPES[style], pooling=pooling, causal=causal), id=f"{style}-{pooling}{i}")
    for style, pooling in STYLE_POOLINGS
    for i, causal in enumerate([False] if style == "bert" else [True, False])
]


@pytest.fixture(scope="module")
def nested() -> Transformer:
    return build(NESTED)


# ---- against transformers ----


@pytest.mark.parametrize("cfg", KINDS)
def test_equals_transformers_at_every_exit(cfg):
    model = build(replace(cfg, ranks=()))
    ids = texts()
    with torch.no_grad():
        ours = model(pack(ids), exits=ALL_EXITS)
        assert torch.equal(model(pack(ids)), ours[[0, 1, 3]])  # the trained exits
    theirs = hf_exits(as_transformers(model), ids, cfg.pooling)
    assert ours.shape == (4, len(ids), 24) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # Exits differ from each other, so that equality means something at each.
    if not (cfg.causal and cfg.pooling == "cls"):
        assert (ours[1:] - ours[:-1]).abs().amax((1, 2)).min() > 0.1


# (Hq, Hkv): no groups, groups of two and of three, all queries with one key head.
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (3, 1)], ids=str)
def test_equals_transformers_for_grouped_queries(heads):
    model = build(replace(CFG, num_attention_heads=heads[0], num_key_value_heads=heads[1]))
    assert_equals_transformers(model, as_transformers(model))


@every_pooling
def test_gradients_equal_those_of_transformers(style, pooling):
    """Texts of one length, so that transformers' model needs no padding. Its Qwen3 is fp32 only."""
    dtype, atol = (torch.float64, 1e-10) if style == "bert" else (torch.float32, 1e-4)
    cfg = replace(SHAPES[style], pooling=pooling, causal=False, ranks=())
    model = build(cfg, dtype=dtype)
    hf = as_transformers(model).to(dtype)
    ids = texts((11, 11, 11, 11))
    cotangent = torch.randn(4, 24, generator=torch.Generator().manual_seed(5))
    (model(pack(ids), exits=[4])[0] * cotangent).sum().backward()
    tokens = torch.from_numpy(np.stack(ids))
    hidden = hf(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    pooled = {"last": hidden[:, -1], "cls": hidden[:, 0], "mean": hidden.mean(1)}.get(pooling)
    pooled = hf.pooler(hidden) if pooled is None else pooled
    (pooled * cotangent).sum().backward()
    theirs = dict(hf.named_parameters())
    for name, weight in model.named_parameters():
        want = theirs[pretrained.hf_name(name, cfg)].grad
        text = f"gradient of {name}"
        torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=atol, msg=text)


@every_style
# One column, a trained rank, one between trained ranks, the stored one.
@pytest.mark.parametrize("rank", [1, 11, 13, 20])
def test_rank_equals_the_merged_table_and_the_cut(style, rank):
    cfg = SHAPES[style]
    model, ids = build(cfg), texts(SHORT)
    with torch.no_grad():
        got = model(pack(ids), exits=ALL_EXITS, rank=rank)
        U, W = model.embed_tokens.U.double(), model.embed_tokens.W.double()
        merged = (U[:, :rank] @ W[:rank]).float()
        torch.testing.assert_close(model.embed_tokens.table(rank), merged, rtol=0, atol=1e-5)
        small = pretrained.cut(model, 4, rank)
        assert small.embed_tokens.U.shape == (101, rank) and small.cfg.ranks[-1] == rank
        torch.testing.assert_close(small(pack(ids), exits=ALL_EXITS), got, rtol=0, atol=0)
        theirs = hf_exits(as_transformers(model, rank), ids, cfg.pooling)
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-5)


# ---- packs and exits ----


@pytest.mark.parametrize("cfg", [CFG, *SHAPES.values()], ids=["table", *SHAPES])
@pytest.mark.parametrize("exit", ALL_EXITS)
def test_exit_equals_the_model_cut_there(cfg, exit):
    model = build(cfg)
    small = pretrained.cut(model, exit, None)
    batch = pack(texts(SHORT))
    assert len(small.layers) == small.cfg.num_hidden_layers == exit
    assert small.cfg.exits == tuple(sorted({e for e in (1, 2, 4) if e < exit} | {exit}))
    with torch.no_grad():
        cut, whole = small(batch, exits=[exit]), model(batch, exits=[exit])
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)


def test_cut_keeps_the_smaller_ranks(nested):
    small = pretrained.cut(nested, 2, 11)
    assert small.cfg.ranks == (3, 11) and small.cfg.exits == (1, 2)
    batch = pack(texts(SHORT))
    with torch.no_grad():
        cut, whole = (model(batch, exits=[1], rank=3) for model in (small, nested))
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)


@every_pooling
@pytest.mark.parametrize(("exit", "rank"), [(None, None), (1, 20), (3, 1), (None, 11), (4, None)])
def test_num_parameters_counts_a_cut(style, pooling, exit, rank):
    for cfg in (replace(SHAPES[style], pooling=pooling, ranks=r) for r in ((3, 11, 20), ())):
        some = rank if cfg.ranks else None
        small = pretrained.cut(build(cfg), exit or 4, some)
        assert num_parameters(cfg, exit, some) == sum(p.numel() for p in small.parameters())


# ---- training ----


@every_pooling
@pytest.mark.parametrize("ranks", [(), (3, 11, 20)], ids=["table", "factors"])
def test_training_step_reaches_every_parameter(style, pooling, ranks):
    """From initial weights; bidirectional, since a causal first token sees only itself."""
    torch.manual_seed(0)
    model = Transformer(replace(SHAPES[style], pooling=pooling, causal=False, ranks=ranks)).double()
    exits_END = model(pack(texts((5, 9, 3, 11, 2, 7))), exits=ALL_EXITS)
    infonce(exits_END[:, :3], exits_END[:, 3:], dims=CFG.matryoshka_dims).mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        if name.endswith("k_proj.bias"):  # adds the same to all scores of a query
            assert weight.grad.abs().max() < 1e-12
        else:
            assert weight.grad.abs().max() > 1e-9, name
        if name == "embed_places.segments.weight":  # texts have the first segment
            assert (weight.grad[1:] == 0).all()


def test_gradient_stays_within_the_rank_and_the_exits():
    model = build(NESTED)
    exits_END = model(pack(texts((5, 9, 3, 11))), exits=(1, 2), rank=3)
    infonce(exits_END[:, :2], exits_END[:, 2:], dims=(24,)).mean().backward()
    U, W = model.embed_tokens.U.grad, model.embed_tokens.W.grad
    assert (U[:, 3:] == 0).all() and (W[3:] == 0).all()
    assert U[:, :3].abs().max() > 0 and W[:3].abs().min() > 0
    # Layers after the last exit do not run.
    assert all(p.grad is None for layer in model.layers[2:] for p in layer.parameters())
    assert all(p.grad is not None for layer in model.layers[:2] for p in layer.parameters())


@every_style
def test_initial_weights(style):
    """Products of the vocabulary's factors start with the spread of a plain table."""
    torch.manual_seed(0)
    wide = {"vocab_size": 2003, "hidden_size": 120, "matryoshka_dims": (), "ranks": (8, 64)}
    if style == "bert":
        wide["head_dim"] = 30
    cfg = replace(SHAPES[style], **wide)
    model = Transformer(cfg)
    assert model.embed_tokens.table().std().item() == pytest.approx(0.02, rel=0.05)
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name
            continue
        std = 64**-0.5 if name == "embed_tokens.W" else 0.02
        if style == "qwen3" and name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= 8**0.5
        assert weight.std().item() == pytest.approx(std, rel=0.2), name


# ---- dtypes ----


@every_pooling
def test_autocast_stays_near_fp32(style, pooling):
    model = build(replace(SHAPES[style], pooling=pooling, layer_norm_eps=1e-12))
    batch = pack(texts(SHORT))
    with torch.no_grad():
        plain = model(batch, exits=ALL_EXITS)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch, exits=ALL_EXITS)
    assert half.dtype == torch.float32
    if style == "qwen3" or pooling in ("pooler", "mean"):  # BERT's rows themselves are bf16
        assert not torch.equal(half, half.bfloat16().float())
    assert F.cosine_similarity(plain, half, dim=-1).min() > 0.995


@every_style
def test_bf16_matrices_train_under_autocast(style):
    """Matrices in bf16, norms and biases in fp32, like in bf16 training."""
    model = build(SHAPES[style])
    for p in model.parameters():
        if p.ndim > 1:
            p.data = p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pack(texts(SHORT)), exits=ALL_EXITS)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_norms_and_rotations_of_bf16_weights_are_fp32():
    """FSDP2 passes bf16 weights; position 4000 has no fraction in bf16."""
    model, narrow = build(CFG), build(CFG, dtype=torch.bfloat16)
    positions = torch.tensor([0, 1, 4000, 4001])
    for a, b in zip(model.rotation(positions), narrow.rotation(positions), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = F.rms_norm(x.float(), (24,), narrow.norm.weight.float(), CFG.rms_norm_eps)
    assert torch.equal(narrow.norm(x), want)
    with torch.no_grad():
        batch = pack(texts(SHORT))
        got, want = narrow(batch, exits=ALL_EXITS), model(batch, exits=ALL_EXITS)
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got, want, dim=-1).min() > 0.99
    assert model.double().rotation(positions)[0].dtype == torch.float64


# ---- dropout ----


def draw(model: Transformer, seed: int = 1, recompute: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model(pack(texts(SHORT)), exits=ALL_EXITS, recompute=recompute)


def gradients(model: Transformer, recompute: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(4, 3, 24, generator=torch.Generator().manual_seed(3))
    (draw(model, recompute=recompute) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def dropping(style: str = "qwen3") -> Transformer:
    return build(replace(SHAPES[style], dropout=0.4))


@every_style
def test_dropout_is_for_training(style):
    model, plain = dropping(style), build(SHAPES[style])
    assert torch.equal(draw(model), draw(plain))
    model.train()
    a, b, again = draw(model, 1), draw(model, 2), draw(model, 1)
    assert torch.equal(a, again) and not torch.allclose(a, b, atol=0.1)
    # Without dropout the mode does not matter.
    assert torch.equal(draw(plain.train()), draw(plain.eval()))


def test_dropout_drops_what_layers_add():
    """Each entry that attention and the MLP add is 0 or 1 / (1 - p) times as large."""
    layer, whole = dropping().train().layers[0], build(NESTED).layers[0]
    x_TD, out_THK = torch.zeros(500, 24), torch.randn(500, 4, 10)
    for silent in ("mlp.down_proj", "self_attn.o_proj"):
        for one in (layer, whole):
            torch.nn.init.zeros_(one.get_submodule(silent).weight)
        if silent == "self_attn.o_proj":
            weight = torch.randn(24, 37)
            x_TD = torch.randn(500, 24)
            for one in (layer, whole):
                one.mlp.down_proj.weight.data = weight
        share = (layer.after(x_TD, out_THK) - x_TD) / (whole.after(x_TD, out_THK) - x_TD)
        stays = share > 0.5
        assert stays.float().mean().item() == pytest.approx(0.6, abs=0.02)
        torch.testing.assert_close(share, stays / 0.6, rtol=1e-2, atol=1e-3)


def test_dropout_of_berts_embedding():
    model, words = dropping("bert"), torch.ones(500, 24)
    positions = torch.zeros(500, dtype=torch.int64)
    assert (model.embed_places(words, positions) != 0).all()
    dropped = model.train().embed_places(words, positions) == 0
    assert 0.3 < dropped.float().mean() < 0.5


@every_style
@pytest.mark.parametrize("recompute", [1, 4])
def test_recomputation_drops_the_same(style, recompute):
    model = dropping(style).train()
    want, got = gradients(model), gradients(model, recompute)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lean", [False, True])
def test_dropout_in_compiled_blocks(lean):
    """Forward and backward drop the same: finite differences agree with the gradient. Compiled
    halves follow the mode.
    """
    torch._dynamo.reset()
    model = dropping().double()
    plain = draw(model).detach()
    model.compile_blocks("aot_eager", lean=lean)
    model.train()
    weights = torch.randn(4, 3, 24, generator=torch.Generator().manual_seed(3))
    for recompute in (0, 2):
        grads = gradients(model, recompute)
        generator = torch.Generator().manual_seed(4)
        steps = {n: torch.randn(g.shape, generator=generator).double() for n, g in grads.items()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        ends = []
        for size in (1e-6, -1e-6):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(before[name] + size * steps[name])
            ends.append((draw(model, recompute=recompute) * weights).sum().item())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
        slope = sum((g * steps[name]).sum().item() for name, g in grads.items())
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)
    model.eval()
    torch.testing.assert_close(draw(model).detach(), plain, rtol=0, atol=1e-12)
    assert not torch.allclose(draw(model.train()).detach(), plain, atol=0.1)


# ---- encoding ----


@every_pooling
@pytest.mark.parametrize("exits", [(4,), (1, 3)], ids=str)
def test_encoding_ends_after_the_last_attention(style, pooling, exits):
    """After the attention of the last layer only pooled rows are computed; vectors equal those
    with a graph, also next to texts that end before or skip layers.
    """
    model = build(replace(SHAPES[style], pooling=pooling), dtype=torch.float64)
    rows: dict[int, int] = {}
    for depth, layer in enumerate(model.layers, 1):
        layer.mlp.register_forward_hook(
            lambda _, inputs, out, depth=depth: rows.update({depth: len(inputs[0])})
        )
    ordered = texts(LENGTHS)
    for batch in (pack(ordered), pack(ordered, np.array([4, 4, 3, 2, 1]))):
        want = model(batch, exits=exits).detach()
        with torch.inference_mode():
            got = model(batch, exits=exits)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        plan = batch.plan_at(exits[-1])
        assert rows[exits[-1]] == (plan.tokens if pooling == "mean" else plan.sequences)
        assert rows[1] == sum(LENGTHS) or exits[-1] == 1
    runs_LN = np.ones((4, len(ordered)), dtype=bool)
    runs_LN[3, 1] = False
    batch = pack(ordered, runs_LN=runs_LN)
    with torch.inference_mode():
        got = model(batch, exits=(4,))
    torch.testing.assert_close(got, model(batch, exits=(4,)).detach(), rtol=0, atol=1e-12)
    # In other modes all rows are computed: hooks see every token, and rounding is that of training.
    with torch.no_grad():
        model(pack(ordered), exits=exits)
    assert rows[exits[-1]] == sum(LENGTHS)
    rows.clear()
    with torch.inference_mode():
        model.train()(pack(ordered), exits=exits)
    assert rows[exits[-1]] == sum(LENGTHS)


# ---- errors ----


def test_attention_by_name():
    batch = pack(texts())
    auto, sdpa = build(CFG), build(replace(CFG, attention="sdpa"))
    assert torch.equal(auto(batch), sdpa(batch))  # on the CPU
    for name in ("varlen", "flash_attn", "xformers"):
        with pytest.raises(ValueError, match=f"impl: {name} needs CUDA, got cpu"):
            build(replace(CFG, attention=name))(batch)


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        ((3, 20), {"exits": [5]}, "exit: expected at most the depth 4, got 5"),
        ((3, 20), {"exits": [1, 9]}, "exit: expected at most the depth 4, got 9"),
        ((3, 20), {"exits": [0]}, "exit: expected rising"),
        ((3, 20), {"exits": []}, "exit: expected rising"),
        ((3, 20), {"exits": [2, 1]}, "exit: expected rising"),
        ((3, 20), {"rank": 21}, r"rank: expected 1\.\.20 \(the stored rank\), got 21"),
        ((3, 20), {"rank": 0}, r"rank: expected 1\.\.20 \(the stored rank\), got 0"),
        ((), {"rank": 11}, "rank: expected none for a plain .*table, got 11"),
    ],
)
def test_errors(ranks, options, message):
    model = build(replace(CFG, ranks=ranks))
    with pytest.raises(ValueError, match=message):
        model(pack(texts((3, 2))), **options)
    if "rank" in options:
        with pytest.raises(ValueError, match=message):
            pretrained.cut(model, 4, options["rank"])


@pytest.mark.parametrize("exit", [0, 5])
def test_cut_outside_the_depth(nested, exit):
    with pytest.raises(ValueError, match=rf"exit: expected 1\.\.4 \(the depth\), got {exit}"):
        pretrained.cut(nested, exit, None)


def test_texts_beyond_the_position_table():
    with pytest.raises(ValueError, match="at most 300 tokens .*got 301"):
        build(SHAPES["bert"])(pack(texts((4, 301))))


@pytest.mark.parametrize("ranks", [(), (3, 20)], ids=["table", "factors"])
@pytest.mark.parametrize("token", [101, -1])
def test_tokens_outside_the_vocabulary(ranks, token):
    with pytest.raises(ValueError, match=rf"ids: expected .*0\.\.100.*got .*{token}"):
        build(replace(CFG, ranks=ranks))(pack([np.array([1, token, 2])]))
