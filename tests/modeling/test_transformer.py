"""The packed transformer against transformers' own Qwen3, at every exit, pooling and rank."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import randomise
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from mlembed import config
from mlembed.data.packing import PackedBatch, pack
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.transformer import Transformer, num_parameters
from mlembed_kernels import infonce

# A prime vocabulary; heads x head_dim = 40 is not the width 24; two query heads a key head; a
# theta that is nobody's default; a rank (11) that is no power of two.
CFG = config.Model(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=37,
    rope_theta=700.0,
    max_position_embeddings=512,
    exits=(1, 2, 4),
    matryoshka_dims=(5, 12, 24),
)
NESTED = replace(CFG, ranks=(3, 11, 20))
# One token, two, a prime, and 300: beyond 256 attention takes another path on the CPU.
LENGTHS = (17, 1, 300, 2, 5)
ALL_EXITS = (1, 2, 3, 4)


def build(cfg: config.Model) -> Transformer:
    return randomise(Transformer(cfg))


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, CFG.vocab_size, n) for n in lengths]


def as_transformers(model: Transformer, rank: int | None = None) -> Qwen3Model:
    """The same weights in transformers' class, every name matched."""
    hf = Qwen3Model(Qwen3Config(**hf_config.hf_config(model.cfg))).eval()
    weights = {n: w for n, w in model.state_dict().items() if not n.startswith("embed_tokens.")}
    weights["embed_tokens.weight"] = model.embed_tokens.table(rank).detach()
    hf.load_state_dict(weights, strict=True)
    return hf


@torch.no_grad()
def hf_exits(hf: Qwen3Model, ids: list[np.ndarray], pooling: str) -> Tensor:
    """Every layer's pooled output of a batch padded on the right -> [L, N, D]."""
    longest = max(map(len, ids))
    tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
    mask = torch.zeros(len(ids), longest, dtype=torch.int64)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = torch.from_numpy(text)
        mask[row, : len(text)] = 1
    out = hf(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    # The last of hidden_states is normed already, those before are not; the first is the table's.
    layers = [*(hf.norm(x) for x in out.hidden_states[1:-1]), out.last_hidden_state]
    pooled = []
    for x in layers:
        rows = [x[i, : len(text)] for i, text in enumerate(ids)]
        pick = {"last": lambda r: r[-1], "cls": lambda r: r[0], "mean": lambda r: r.mean(0)}
        pooled.append(torch.stack([pick[pooling](r) for r in rows]))
    return torch.stack(pooled)


@pytest.fixture(scope="module")
def nested() -> Transformer:
    return build(NESTED)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_equals_transformers_at_every_exit(causal, pooling):
    model = build(replace(CFG, causal=causal, pooling=pooling))
    ids = texts()
    with torch.no_grad():
        ours = model(pack(ids), exits=ALL_EXITS)
    theirs = hf_exits(as_transformers(model), ids, pooling)
    assert ours.shape == (4, len(ids), 24) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # The exits are four different things, so equality above says something at each.
    if not (causal and pooling == "cls"):
        assert (ours[1:] - ours[:-1]).abs().amax((1, 2)).min() > 0.1


# (Hq, Hkv): no grouping, by two, by three, all queries on one key head.
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (3, 1)], ids=str)
def test_equals_transformers_for_grouped_queries(heads):
    cfg = replace(CFG, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=6)
    model = build(cfg)
    ids = texts((7, 1, 13))
    with torch.no_grad():
        ours = model(pack(ids), exits=ALL_EXITS)
    torch.testing.assert_close(
        ours, hf_exits(as_transformers(model), ids, "last"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_equals_each_text_alone(causal, pooling):
    model = build(replace(CFG, causal=causal, pooling=pooling))
    ids = texts((5, 1, 29, 2, 2))
    with torch.no_grad():
        together = model(pack(ids), exits=ALL_EXITS)
        alone = torch.cat([model(pack([text]), exits=ALL_EXITS) for text in ids], dim=1)
        order = [3, 0, 4, 2, 1]
        moved = model(pack([ids[i] for i in order]), exits=ALL_EXITS)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved, together[:, order], rtol=0, atol=1e-5)


def test_causal_and_bidirectional_differ():
    # Same weights: the first token sees the rest of the text in one of them only.
    ids = texts((9,))
    changed = [ids[0].copy()]
    changed[0][-1] = (changed[0][-1] + 1) % CFG.vocab_size
    moves = {}
    for causal in (True, False):
        model = build(replace(CFG, causal=causal, pooling="cls"))
        with torch.no_grad():
            moves[causal] = (model(pack(ids)) - model(pack(changed))).abs().max().item()
    assert moves[True] == 0 and moves[False] > 0.01


def test_exits_asked_for_alone_equal_those_of_one_pass(nested):
    batch = pack(texts((5, 1, 29)))
    with torch.no_grad():
        joint = nested(batch, exits=ALL_EXITS)
        torch.testing.assert_close(nested(batch), joint[[0, 1, 3]], rtol=0, atol=0)
        for exit in ALL_EXITS:
            alone = nested(batch, exits=[exit])
            torch.testing.assert_close(alone[0], joint[exit - 1], rtol=0, atol=0)


@pytest.mark.parametrize("exit", ALL_EXITS)
@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_exit_equals_the_model_cut_there(cfg, exit):
    model = build(cfg)
    small = pretrained.cut(model, exit, None)
    batch = pack(texts((5, 1, 29)))
    assert len(small.layers) == small.cfg.num_hidden_layers == exit
    assert small.cfg.exits == tuple(sorted({e for e in (1, 2, 4) if e < exit} | {exit}))
    with torch.no_grad():
        cut, whole = small(batch, exits=[exit]), model(batch, exits=[exit])
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)


# One column, a trained rank, one between trained ranks, the stored one.
@pytest.mark.parametrize("rank", [1, 11, 13, 20])
def test_rank_equals_the_merged_table_and_the_cut(nested, rank):
    ids = texts((5, 1, 29))
    with torch.no_grad():
        got = nested(pack(ids), exits=ALL_EXITS, rank=rank)
        U, W = nested.embed_tokens.U.double(), nested.embed_tokens.W.double()
        merged = (U[:, :rank] @ W[:rank]).float()
        torch.testing.assert_close(nested.embed_tokens.table(rank), merged, rtol=0, atol=1e-5)
        plain = Transformer(replace(NESTED, ranks=()))
        shared = {n: w for n, w in nested.state_dict().items() if "embed_tokens" not in n}
        plain.load_state_dict({**shared, "embed_tokens.weight": merged})
        torch.testing.assert_close(got, plain(pack(ids), exits=ALL_EXITS), rtol=0, atol=1e-5)
        small = pretrained.cut(nested, 4, rank)
        assert small.embed_tokens.U.shape == (101, rank) and small.cfg.ranks[-1] == rank
        torch.testing.assert_close(small(pack(ids), exits=ALL_EXITS), got, rtol=0, atol=0)
        # And through transformers, which knows only the table.
        theirs = hf_exits(as_transformers(nested, rank), ids, "last")
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-5)


def test_a_cut_keeps_the_smaller_ranks(nested):
    small = pretrained.cut(nested, 2, 11)
    assert small.cfg.ranks == (3, 11) and small.cfg.exits == (1, 2)
    batch = pack(texts((5, 1, 29)))
    with torch.no_grad():
        torch.testing.assert_close(
            small(batch, exits=[1], rank=3), nested(batch, exits=[1], rank=3), rtol=0, atol=0
        )


def test_a_cut_is_a_copy(nested):
    before = {n: w.clone() for n, w in nested.state_dict().items()}
    small = pretrained.cut(nested, 2, 3)
    with torch.no_grad():
        for weight in small.parameters():
            weight.fill_(torch.nan)
    assert all(torch.equal(w, before[n]) for n, w in nested.state_dict().items())


@pytest.mark.parametrize("exit", [None, 1, 3, 4])
@pytest.mark.parametrize("rank", [None, 1, 11, 20])
def test_num_parameters_counts_what_a_cut_holds(nested, exit, rank):
    small = pretrained.cut(nested, exit or 4, rank)
    assert num_parameters(NESTED, exit, rank) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("exit", [None, 1, 4])
def test_num_parameters_of_a_plain_table(exit):
    small = pretrained.cut(build(CFG), exit or 4, None)
    assert num_parameters(CFG, exit) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_a_training_step_reaches_every_parameter(cfg, pooling):
    # Bidirectional, since a causal first token (cls) sees only itself. Initial weights, as at step
    # one of a run; queries and documents in one pack.
    torch.manual_seed(0)
    model = Transformer(replace(cfg, pooling=pooling, causal=False))
    exits_END = model(pack(texts((5, 9, 3, 11, 2, 7))), exits=ALL_EXITS)
    infonce(exits_END[:, :3], exits_END[:, 3:], dims=CFG.matryoshka_dims).mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_gradient_stays_within_the_rank_and_the_exits():
    model = build(NESTED)
    exits_END = model(pack(texts((5, 9, 3, 11))), exits=(1, 2), rank=3)
    infonce(exits_END[:, :2], exits_END[:, 2:], dims=(24,)).mean().backward()
    U, W = model.embed_tokens.U.grad, model.embed_tokens.W.grad
    assert (U[:, 3:] == 0).all() and (W[3:] == 0).all()
    assert U[:, :3].abs().max() > 0 and W[:3].abs().min() > 0
    # Layers past the last exit are not run at all.
    assert all(p.grad is None for layer in model.layers[2:] for p in layer.parameters())
    assert all(p.grad is not None for layer in model.layers[:2] for p in layer.parameters())


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_gradients_equal_those_of_transformers(pooling):
    # On texts of one length, so that the other side needs no padding.
    model = build(replace(CFG, pooling=pooling, causal=False))
    hf = as_transformers(model)
    ids = texts((11, 11, 11, 11))
    cotangent = torch.randn(4, 24, generator=torch.Generator().manual_seed(5))
    (model(pack(ids), exits=[4])[0] * cotangent).sum().backward()
    tokens = torch.from_numpy(np.stack(ids))
    hidden = hf(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    pooled = {"last": hidden[:, -1], "cls": hidden[:, 0], "mean": hidden.mean(1)}[pooling]
    (pooled * cotangent).sum().backward()
    theirs = dict(hf.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight.grad, theirs[name].grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_float64_model(pooling):
    cfg = replace(NESTED, pooling=pooling)
    model, narrow = build(cfg).double(), build(cfg)
    ids = texts((5, 1, 29))
    got = model(pack(ids), exits=ALL_EXITS)
    assert got.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(
            got.float(), narrow(pack(ids), exits=ALL_EXITS), rtol=0, atol=1e-5
        )
    got.square().sum().backward()
    assert all(p.grad.dtype == torch.float64 for p in model.parameters())
    # Wider than fp32 all the way: a text's value alone and packed differ by float64's rounding.
    with torch.no_grad():
        alone = torch.cat([model(pack([text]), exits=ALL_EXITS) for text in ids], dim=1)
    torch.testing.assert_close(alone, got, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_bf16_autocast_stays_near_fp32_and_returns_it(pooling):
    model = build(replace(NESTED, pooling=pooling))
    batch = pack(texts((5, 1, 29)))
    with torch.no_grad():
        plain = model(batch, exits=ALL_EXITS)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch, exits=ALL_EXITS)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(plain, half, dim=-1).min() > 0.995


def test_initial_spread_of_the_vocabulary():
    # The product of the factors starts as wide as a plain table would: 0.02 an entry.
    torch.manual_seed(0)
    wide = replace(NESTED, vocab_size=2003, hidden_size=128, matryoshka_dims=(), ranks=(8, 64))
    product = Transformer(wide).embed_tokens.table()
    table = Transformer(replace(wide, ranks=())).embed_tokens.table()
    assert table.std().item() == pytest.approx(0.02, rel=0.02)
    assert product.std().item() == pytest.approx(0.02, rel=0.05)


# ---- dropout ----

DROPS = replace(NESTED, dropout=0.4)


def drawn(model: Transformer, seed: int = 1, recompute: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model(pack(texts((5, 1, 29))), exits=ALL_EXITS, recompute=recompute)


def test_dropout_is_off_in_evaluation(nested):
    model = build(DROPS)
    assert not model.training
    assert torch.equal(drawn(model), drawn(nested))
    model.train()
    a, b, again = drawn(model, 1), drawn(model, 2), drawn(model, 1)
    assert torch.equal(a, again) and not torch.allclose(a, b, atol=0.1)
    # Without dropout the mode is no matter.
    assert torch.equal(drawn(build(NESTED).train()), drawn(nested))


def test_dropout_scales_what_it_keeps():
    """Of what attention and the MLP add, each entry by itself: nothing of it, or 1 / (1 - p)."""
    layer = build(DROPS).train().layers[0]
    whole = build(NESTED).layers[0]
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
        kept = share > 0.5
        assert kept.float().mean().item() == pytest.approx(0.6, abs=0.02)
        torch.testing.assert_close(share, kept / 0.6, rtol=1e-2, atol=1e-3)


def gradients(model: Transformer, recompute: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(4, 3, 24, generator=torch.Generator().manual_seed(3))
    (drawn(model, recompute=recompute) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [1, 4])
def test_what_is_recomputed_drops_the_same(recompute):
    model = build(DROPS).train()
    want, got = gradients(model), gradients(model, recompute)
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("lean", [False, True])
def test_dropout_in_compiled_blocks(lean):
    """Forward and backward drop the same: on the way to an exit a step is what the gradient says.
    And compiled halves follow the mode."""
    torch._dynamo.reset()
    model = build(DROPS).double()
    plain = drawn(model).detach()
    model.compile_blocks("aot_eager", lean=lean)
    model.train()
    for recompute in (0, 2):
        found = gradients(model, recompute)
        generator = torch.Generator().manual_seed(4)
        steps = {n: torch.randn(g.shape, generator=generator).double() for n, g in found.items()}
        weights = torch.randn(4, 3, 24, generator=torch.Generator().manual_seed(3))
        ends = []
        for size in (1e-6, -1e-6):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.add_(size * steps[name])
            ends.append((drawn(model, recompute=recompute) * weights).sum().item())
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.sub_(size * steps[name])
        slope = sum((g * steps[name]).sum().item() for name, g in found.items())
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)
    model.eval()
    torch.testing.assert_close(drawn(model).detach(), plain, rtol=0, atol=1e-12)
    assert not torch.allclose(drawn(model.train()).detach(), plain, atol=0.1)


# ---- narrow weights ----


def test_norms_and_rotations_of_bf16_weights_are_fp32():
    """As FSDP2 hands them over: position 4000 has no fraction in bf16."""
    model, narrow = build(CFG), build(CFG).bfloat16()
    positions = torch.tensor([0, 1, 4000, 4001])
    for a, b in zip(model.rotation(positions), narrow.rotation(positions), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)
    assert model.double().rotation(positions)[0].dtype == torch.float64
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = narrow.norm.weight.float()
    want = F.rms_norm(x.float(), (24,), weight, CFG.rms_norm_eps)
    assert torch.equal(narrow.norm(x), want)
    with torch.no_grad():
        batch = pack(texts((5, 1, 29)))
        got, want = narrow(batch, exits=ALL_EXITS), build(CFG)(batch, exits=ALL_EXITS)
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got, want, dim=-1).min() > 0.99


def test_packing_keeps_texts_apart():
    batch = pack([np.array([5, 6, 7]), np.array([8]), np.array([9, 5])])
    assert isinstance(batch, PackedBatch) and len(batch) == 3
    assert batch.ids_T.tolist() == [5, 6, 7, 8, 9, 5]
    assert batch.pos_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.plan.max_seqlen == 3
    assert batch.cu_seqlens.dtype == torch.int32 and batch.ids_T.dtype == torch.int64


def test_attention_by_name_is_what_is_asked_for():
    batch = pack(texts())
    auto, sdpa = build(CFG), build(replace(CFG, attention="sdpa"))
    assert torch.equal(auto(batch), sdpa(batch))  # on the CPU
    for name in ("varlen", "flash_attn", "xformers"):
        with pytest.raises(ValueError, match=f"impl: {name} needs CUDA, got cpu"):
            build(replace(CFG, attention=name))(batch)


def test_errors(nested):
    batch = pack(texts((3, 2)))
    table = build(CFG)
    wrong = [
        (nested, {"exits": [5]}, "exit: expected at most the depth 4, got 5"),
        (nested, {"exits": [1, 9]}, "exit: expected at most the depth 4, got 9"),
        (nested, {"exits": [0]}, "exit: expected rising"),
        (nested, {"exits": []}, "exit: expected rising"),
        (nested, {"exits": [2, 1]}, "exit: expected rising"),
        (nested, {"rank": 21}, r"rank: expected 1\.\.20 \(the stored rank\), got 21"),
        (nested, {"rank": 0}, r"rank: expected 1\.\.20 \(the stored rank\), got 0"),
        (table, {"rank": 11}, "rank: expected none .*plain table.* got 11"),
    ]
    for model, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(batch, **options)


def test_errors_of_a_cut(nested):
    wrong = [
        (nested, 5, None, r"exit: expected 1\.\.4 \(the depth\), got 5"),
        (nested, 0, None, r"exit: expected 1\.\.4 \(the depth\), got 0"),
        (nested, 4, 21, r"rank: expected 1\.\.20 \(the stored rank\), got 21"),
        (nested, 4, 0, r"rank: expected 1\.\.20 \(the stored rank\), got 0"),
        (build(CFG), 4, 11, "rank: expected none .*plain table.* got 11"),
    ]
    for model, exit, rank, message in wrong:
        with pytest.raises(ValueError, match=message):
            pretrained.cut(model, exit, rank)


def test_errors_of_packing():
    for wrong in ([], [np.array([1, 2]), np.array([], dtype=np.int64)]):
        with pytest.raises(ValueError, match="each of one or more tokens"):
            pack(wrong)


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
@pytest.mark.parametrize("exits", [(4,), (1, 3)], ids=str)
def test_encoding_ends_behind_the_attention_of_the_last_layer(pooling, exits):
    """There, of the deepest exit, only rows that are pooled are computed; the vectors are those
    with a graph. What other texts run less deep, or skip, changes nothing of it."""
    model = build(replace(NESTED, pooling=pooling)).double().eval()
    seen: dict[int, int] = {}
    for depth, layer in enumerate(model.layers, 1):
        layer.mlp.register_forward_hook(
            lambda _, given, out, depth=depth: seen.update({depth: len(given[0])})
        )
    ordered = texts(LENGTHS)
    runs_LN = np.ones((4, len(ordered)), dtype=bool)
    runs_LN[3, 1] = False
    for batch in (pack(ordered), pack(ordered, np.array([4, 4, 3, 2, 1]))):
        want = model(batch, exits=exits).detach()
        with torch.inference_mode():
            got = model(batch, exits=exits)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        there = batch.work_at(exits[-1])
        assert seen[exits[-1]] == (there.tokens if pooling == "mean" else there.sequences)
        assert seen[1] == sum(LENGTHS) or exits[-1] == 1
    batch = pack(ordered, runs_LN=runs_LN)
    with torch.inference_mode():
        got = model(batch, exits=(4,))
    torch.testing.assert_close(got, model(batch, exits=(4,)).detach(), rtol=0, atol=1e-12)
    # Otherwise all rows are: hooks see every token, and a pass without a graph rounds and drops as
    # one with it does.
    with torch.no_grad():
        model(pack(ordered), exits=exits)
    assert seen[exits[-1]] == sum(LENGTHS)
    seen.clear()
    with torch.inference_mode():
        model.train()(pack(ordered), exits=exits)
    assert seen[exits[-1]] == sum(LENGTHS)
