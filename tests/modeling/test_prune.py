"""Pruning: slices of weights, by loops that know nothing of the code's tables, and what stays the
same where what goes was nothing."""

import json
import math
from dataclasses import replace

import numpy as np
import processes
import pytest
import torch
from factories import randomise
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3Model

from mlembed import config
from mlembed.cli.prune import main
from mlembed.config import shapes
from mlembed.data import tokenizer
from mlembed.data.packing import pack
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.prune import Selection, choose, prune, pruned_config, sample, spread, target
from mlembed.modeling.transformer import Transformer, num_parameters

CFG = config.Model(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=37,
    rope_theta=700.0,
    max_position_embeddings=64,
    exits=(1, 3, 5),
    matryoshka_dims=(5, 12, 24),
)
NESTED = replace(CFG, ranks=(3, 11))
BERT = config.Model(
    style="bert",
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=6,
    intermediate_size=37,
    max_position_embeddings=64,
    causal=False,
    pooling="mean",
    exits=(1, 3, 5),
)
IDS = [np.arange(n) * 7 % 101 for n in (1, 5, 23)]
KEPT = Selection(
    (1, 2, 4),
    torch.tensor([0, 1, 4, 5, 7, 11, 13, 17, 18, 22, 23]),
    tuple(torch.randperm(37, generator=torch.Generator().manual_seed(i))[:19].sort().values
          for i in range(3)),
)  # fmt: skip
ALL = lambda cfg, layers: Selection(  # noqa: E731
    layers,
    torch.arange(cfg.hidden_size),
    (torch.arange(cfg.intermediate_size),) * len(layers),
)


def random(cfg, seed=0) -> Transformer:
    return randomise(Transformer(cfg), seed)


@torch.no_grad()
def exits(model, **options):
    return model(pack(IDS), **options)


def same(one: Transformer, other: Transformer) -> None:
    assert one.cfg == other.cfg
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- slices ----


@pytest.mark.parametrize("cfg", [CFG, NESTED, BERT], ids=["table", "factors", "bert"])
@pytest.mark.parametrize("by", ["first", "magnitude", "activation"])
def test_the_same_shape_is_the_same_model(cfg, by):
    model = random(cfg)
    batches = [pack(IDS)] if by == "activation" else []
    kept = choose(model, range(1, 6), 24, 37, by, batches)
    same(prune(model, kept), model)


@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_pruned_weights_are_slices(cfg):
    model = random(cfg)
    small = prune(model, KEPT)
    assert small.cfg.hidden_size == 11 and small.cfg.intermediate_size == 19
    own, got = model.state_dict(), small.state_dict()
    seen = set()
    for new, old in enumerate((0, 1, 3)):
        for name in own:
            if not name.startswith(f"layers.{old}."):
                continue
            rest = name.split(".", 2)[2]
            x, f = own[name].numpy(), KEPT.units[new].numpy()
            d = KEPT.width_D.numpy()
            if "q_norm" in rest or "k_norm" in rest:
                want = x
            elif "norm" in rest:
                want = x[d]
            elif rest in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
                want = x[np.ix_(f, d)]
            elif rest == "mlp.down_proj.weight":
                want = x[np.ix_(d, f)]
            elif rest == "self_attn.o_proj.weight":
                want = x[d]
            else:
                want = x[:, d]
            np.testing.assert_array_equal(got[f"layers.{new}.{rest}"].numpy(), want, rest)
            seen.add(f"layers.{new}.{rest}")
    outside = {"norm.weight": own["norm.weight"][KEPT.width_D]}
    if cfg.ranks:
        outside["embed_tokens.U"] = own["embed_tokens.U"]
        outside["embed_tokens.W"] = own["embed_tokens.W"][:, KEPT.width_D]
    else:
        outside["embed_tokens.weight"] = own["embed_tokens.weight"][:, KEPT.width_D]
    for name, want in outside.items():
        assert torch.equal(got[name], want), name
    assert seen | outside.keys() == got.keys()


def test_bert_loses_layers_and_units_with_their_biases():
    model = random(BERT)
    kept = Selection((1, 2, 4), torch.arange(24), KEPT.units)
    small = prune(model, kept)
    own, got = model.state_dict(), small.state_dict()
    for new, old in enumerate((0, 1, 3)):
        f = KEPT.units[new]
        for part, want in {
            "mlp.up_proj.weight": own[f"layers.{old}.mlp.up_proj.weight"][f],
            "mlp.up_proj.bias": own[f"layers.{old}.mlp.up_proj.bias"][f],
            "mlp.down_proj.weight": own[f"layers.{old}.mlp.down_proj.weight"][:, f],
            "mlp.down_proj.bias": own[f"layers.{old}.mlp.down_proj.bias"],
            "self_attn.o_proj.weight": own[f"layers.{old}.self_attn.o_proj.weight"],
        }.items():
            assert torch.equal(got[f"layers.{new}.{part}"], want), part
    with pytest.raises(ValueError, match="width: expected 24 of a BERT.*got 12"):
        choose(model, [1], 12, 37)


@pytest.mark.parametrize("cfg", [CFG, NESTED, BERT], ids=["table", "factors", "bert"])
@pytest.mark.parametrize("exit", [1, 2, 3, 5])
def test_the_first_layers_are_a_cut(cfg, exit):
    model = random(cfg)
    small = prune(model, ALL(cfg, tuple(range(1, exit + 1))))
    same(small, pretrained.cut(model, exit, cfg.ranks[-1] if cfg.ranks else None))


def test_layers_that_are_not_the_first_have_the_default_exits():
    assert pruned_config(CFG, (1, 3, 5), 24, 37).exits == (1, 2, 3)
    assert pruned_config(CFG, (2, 3), 24, 37).exits == (1, 2)
    assert pruned_config(CFG, (1, 2), 24, 37).exits == (1, 2)
    assert pruned_config(CFG, (1, 2, 3, 4), 24, 37).exits == (1, 3, 4)
    assert pruned_config(CFG, (1,), 13, 37).matryoshka_dims == (5, 12, 13)
    assert pruned_config(CFG, (1,), 12, 37).matryoshka_dims == (5, 12)
    assert pruned_config(CFG, (1,), 1, 37).matryoshka_dims == (1,)


@pytest.mark.parametrize(("width", "ranks"), [(11, (3, 11)), (7, (3,)), (2, ())])
def test_ranks_are_those_that_the_width_allows(width, ranks):
    model = random(NESTED)
    small = prune(model, Selection((1,), torch.arange(width), (torch.arange(37),)))
    assert small.cfg.ranks == ranks
    rank = ranks[-1] if ranks else 11
    U, W = (model.state_dict()[f"embed_tokens.{name}"].double() for name in "UW")
    want = U[:, :rank] @ W[:rank, :width]
    torch.testing.assert_close(small.embed_tokens.table().double(), want, rtol=0, atol=1e-5)


# ---- nothing lost where nothing was ----


@pytest.mark.parametrize("by", ["magnitude", "activation"])
@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_coordinates_that_are_always_zero_are_found_and_change_nothing(cfg, by):
    """The mean square of RMSNorm is over D' of D coordinates: D / D' times what it was, so that
    what it gives is sqrt(D' / D) times what it was, with eps D / D' times as large."""
    live = torch.tensor([0, 2, 3, 7, 8, 12, 13, 14, 20, 21, 22])
    model = random(cfg)
    dead = torch.ones(24, dtype=torch.bool)
    dead[live] = False
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("embed_tokens.weight", "embed_tokens.W"):
                weight[:, dead] = 0
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[dead] = 0
            if by == "magnitude" and name.endswith(("gate_proj.weight", "up_proj.weight")):
                weight[:, dead] *= 1e-3  # what reads them does not matter
            if by == "magnitude" and "self_attn" in name and weight.shape[-1] == 24:
                weight[:, dead] *= 1e-3
    kept = choose(model, range(1, 6), 11, 37, by, [pack(IDS)] if by == "activation" else [])
    assert torch.equal(kept.width_D, live)
    small = prune(model, kept)
    ratio = 24 / 11
    plain = exits(small)
    with torch.no_grad():
        for name, weight in small.named_parameters():
            if name.endswith(("layernorm.weight", "norm.weight")) and len(weight) == 11:
                weight *= math.sqrt(ratio)
    for module in small.modules():
        if isinstance(module, torch.nn.RMSNorm) and module.normalized_shape == (11,):
            module.eps *= ratio
    want = exits(model)
    assert want[..., dead].abs().max() == 0
    torch.testing.assert_close(exits(small), want[..., live], rtol=1e-4, atol=1e-5)
    assert (plain - want[..., live]).abs().max() > 0.1  # the factor is no trifle


@pytest.mark.parametrize("by", ["magnitude", "activation"])
@pytest.mark.parametrize("cfg", [CFG, BERT], ids=["qwen3", "bert"])
def test_units_that_add_nothing_are_found_and_change_nothing(cfg, by):
    model = random(cfg)
    live = [torch.randperm(37, generator=torch.Generator().manual_seed(i))[:9] for i in range(5)]
    with torch.no_grad():
        for layer, units in zip(model.layers, live, strict=True):
            dead = torch.ones(37, dtype=torch.bool)
            dead[units] = False
            layer.mlp.down_proj.weight[:, dead] = 0
    kept = choose(model, range(1, 6), 24, 9, by, [pack(IDS)] if by == "activation" else [])
    for units, want in zip(kept.units, live, strict=True):
        assert units.tolist() == sorted(want.tolist())
    torch.testing.assert_close(exits(prune(model, kept)), exits(model), rtol=1e-4, atol=1e-5)


# ---- what is kept ----


def test_activation_scores_are_means_over_tokens():
    """Against transformers' hidden states, which it gives itself."""
    model = random(CFG)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):  # the stream of trained models grows
            layer.mlp.down_proj.weight *= 3.0**i
    hf = Qwen3Model(Qwen3Config(**hf_config.hf_config(CFG))).eval()
    hf.load_state_dict(model.state_dict())
    behind_last, inner = [], [[] for _ in range(5)]
    hf.layers[-1].register_forward_hook(lambda m, a, out: behind_last.append(out))
    for i, layer in enumerate(hf.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: inner[i].append(a[0]))
    sums = np.zeros((6, 24))
    units = np.zeros((5, 37))
    with torch.no_grad():
        for ids in IDS:
            out = hf(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True)
            stream = [*out.hidden_states[:5], behind_last[-1]]
            sums += np.stack([x[0].abs().double().sum(0).numpy() for x in stream])
            units += np.stack([x[-1][0].abs().double().sum(0).numpy() for x in inner])
    of_width = (sums / sums.sum(1, keepdims=True)).sum(0)
    batches = [pack(IDS[:2]), pack(IDS[2:])]
    for width in (1, 4, 13, 18, 22, 10):
        kept = choose(model, (2, 5), width, 7, "activation", batches)
        assert kept.width_D.tolist() == sorted(np.argsort(-of_width)[:width].tolist())
    for got, layer in zip(kept.units, (1, 4), strict=True):
        columns = model.layers[layer].mlp.down_proj.weight.detach().double().norm(dim=0).numpy()
        want = np.argsort(-units[layer] / 29 * columns)[:7]
        assert got.tolist() == sorted(want.tolist())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_magnitude_scores_count_every_matrix_alike(cfg):
    model = random(cfg)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):  # sizes of matrices are not to matter
            layer.mlp.up_proj.weight *= 10.0**i
        if cfg.ranks:  # nor are W's rows alike, as their factors in U differ
            model.embed_tokens.U *= 3.0 ** -torch.arange(11)
    matrices = [model.embed_tokens.table().detach()]
    for layer in model.layers:
        a, m = layer.self_attn, layer.mlp
        matrices += [x.weight for x in (a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj)]
        matrices += [a.o_proj.weight.T, m.down_proj.weight.T]
    score = np.zeros(24)
    for x in matrices:
        squares = (x.detach().double().numpy() ** 2).sum(0)
        score += squares / squares.sum()
    for width in (1, 4, 13, 18, 22, 10):
        kept = choose(model, (3,), width, 7, "magnitude")
        assert kept.width_D.tolist() == sorted(np.argsort(-score)[:width].tolist())
    m = model.layers[2].mlp
    units = [
        m.gate_proj.weight[f].norm() * m.up_proj.weight[f].norm() * m.down_proj.weight[:, f].norm()
        for f in range(37)
    ]
    want = np.argsort(-torch.stack(units).detach().double().numpy())[:7]
    assert kept.units[0].tolist() == sorted(want.tolist())


def test_first_is_the_prefix():
    kept = choose(random(CFG), (1, 4), 7, 5)
    assert kept.width_D.tolist() == list(range(7))
    assert [units.tolist() for units in kept.units] == [list(range(5))] * 2


def test_layers_are_evenly_spaced():
    assert spread(28, 28) == tuple(range(1, 29))
    assert spread(28, 1) == (1,)
    assert spread(28, 2) == (1, 28)
    assert spread(28, 8) == (1, 5, 9, 13, 16, 20, 24, 28)
    for layers in (1, 2, 3, 7, 12, 28, 36):
        for keep in range(2, layers + 1):
            found = spread(layers, keep)
            steps = np.diff(found)
            assert found[0] == 1 and found[-1] == layers and len(found) == keep
            assert steps.min() >= 1 and steps.max() - steps.min() <= 1
    for keep in (0, 29):
        with pytest.raises(ValueError, match=f"layers: expected 1..28 .*, got {keep}"):
            spread(28, keep)


# ---- published shapes ----


@pytest.mark.parametrize(
    ("shape", "total"),
    [
        ("ml-embed-80m", 80_084_288),
        ("ml-embed-160m", 159_185_024),
        ("ml-embed-330m", 334_349_184),
        ("ml-embed-0.6b", 596_049_920),
    ],
)
def test_f2llm_shapes_have_the_published_totals(shape, total):
    """Of F2LLM-v2 (arXiv 2603.19223), pruned from the 0.6B's shape."""
    source = shapes.SHAPES["ml-embed-0.6b"]
    wanted = target(source, shape)
    layers = spread(28, wanted.num_hidden_layers)
    cfg = pruned_config(source, layers, wanted.hidden_size, wanted.intermediate_size)
    assert num_parameters(cfg) == total
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(cfg).parameters()) == total


def test_a_shape_of_other_heads_is_refused():
    source = shapes.SHAPES["ml-embed-0.6b"]
    with pytest.raises(ValueError, match="num_attention_heads: expected 32, as ml-embed-4b has"):
        target(source, "ml-embed-4b")
    with pytest.raises(ValueError, match="head_dim: expected 128.*got 64"):
        target(replace(source, head_dim=64), "ml-embed-80m")
    with pytest.raises(ValueError, match="style: expected bert"):
        target(source, "gte-base")
    with pytest.raises(ValueError, match="vocab_size: expected 151936.*got 101"):
        target(replace(CFG, num_attention_heads=16), "ml-embed-80m")
    with pytest.raises(
        ValueError, match="shape: expected one of .*ml-embed-80m.*got 'ml-embed-80'"
    ):
        target(source, "ml-embed-80")
    with pytest.raises(ValueError, match="ffn: expected 1..3072"):  # an MLP wider than the source's
        wanted = target(source, "ml-embed-1.7b")
        pruned_config(source, spread(28, 28), 1024, wanted.intermediate_size)


# ---- the command ----


TEXTS = ["Wednesday, May 4, 2050", "mercredi 4 mai 2050", "один два три четыре пять", "a b c d"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model directory with a tokenizer, and text."""
    path = tmp_path_factory.mktemp("prune")
    tokens = tokenizer.train(TEXTS * 2, 290)
    cfg = replace(NESTED, vocab_size=tokens.get_vocab_size())
    (path / "model").mkdir()
    pretrained.save(random(cfg), path / "model")
    tokenizer.save(tokens, path / "model", 24)
    rows = [{"query": TEXTS[i], "positive": TEXTS[(i + 1) % 4]} for i in range(0, 4, 2)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_prunes_and_others_read_it(source, tmp_path, capsys):
    out, data = tmp_path / "out", (str(source / "pairs.jsonl"),)
    main(str(source / "model"), out, layers=3, width=12, ffn=16, data=data, device="cpu")
    said = capsys.readouterr().out
    small = Encoder.load(str(out), "cpu")
    assert f"{num_parameters(small.model.cfg):,} parameters of" in said
    assert "layers 1 3 5 of 5" in said and "by activation" in said
    assert small.max_length == 24
    assert small.model.cfg.exits == (1, 2, 3) and small.model.cfg.ranks == (3, 11)
    # Of the model itself, by the same text: three packs or one, the order of texts is no matter.
    whole = Encoder.load(str(source / "model"), "cpu")
    ids = tokenizer.tokenize(whole.tokenizer, TEXTS, 24)
    kept = choose(whole.model, (1, 3, 5), 12, 16, "activation", [pack(ids)])
    same(small.model, prune(whole.model, kept))
    # By transformers.
    hf = AutoModel.from_pretrained(out, local_files_only=True).eval()
    reader = AutoTokenizer.from_pretrained(out, local_files_only=True)
    for text, ours in zip(TEXTS, small.encode(TEXTS), strict=True):
        with torch.no_grad():
            last = hf(**reader(text, return_tensors="pt")).last_hidden_state[0, -1]
        np.testing.assert_allclose((last / last.norm()).numpy(), ours, rtol=0, atol=1e-5)


def test_a_sample_is_of_all_texts_alike(source, tmp_path):
    """Of several files; every text once, or so many of them, the same for a seed."""
    encoder = Encoder.load(str(source / "model"), "cpu")
    files = []
    for i, count in enumerate((3, 1, 5)):
        rows = [{"query": f"{i} {j}", "positive": f"{i} {j} one"} for j in range(count)]
        files.append(str(tmp_path / f"{i}.jsonl"))
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def texts(**options):
        found = []
        for batch in sample(
            encoder.tokenizer, encoder.max_length, encoder.max_tokens, files, **options
        ):
            bounds = batch.plan.cu_seqlens.tolist()
            found += [batch.ids_T[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
        return sorted(found)

    each = [f"{i} {j}" for i, n in enumerate((3, 1, 5)) for j in range(n)]
    each += [f"{text} one" for text in each]
    everything = sorted(encoder.tokenizer.encode(text).ids for text in each)
    assert texts(texts=100, seed=0) == everything
    some = texts(texts=7, seed=0)
    assert len(some) == 7 and all(text in everything for text in some)
    assert some == texts(texts=7, seed=0) != texts(texts=7, seed=1)


def test_a_pruned_model_trains(source, tmp_path):
    main(str(source / "model"), tmp_path / "out", keep_layers=(2, 5), width=12, device="cpu")
    model = pretrained.load(str(tmp_path / "out")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokenizer.tokenize(tokenizer.load(tmp_path / "out"), TEXTS, 24)
    losses = []
    for _ in range(3):
        x = torch.nn.functional.normalize(model(pack(ids))[-1], dim=-1)
        loss = torch.nn.functional.cross_entropy(x[0::2] @ x[1::2].T / 0.05, torch.arange(2))
        loss = loss + sum(0 * p.sum() for p in model.parameters())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_train_py_goes_on_from_it(source, tmp_path):
    main(str(source / "model"), tmp_path / "out", layers=2, width=12, ffn=16, device="cpu")
    args = ["tiny", "--init", tmp_path / "out", "--steps", 1, "--data", source / "pairs.jsonl"]
    args += ["--eval", "--batch-size", 2, "--output-dir", tmp_path, "--name", "run"]
    done = processes.run("train.py", *args, "--tracker", "none")
    assert done.returncode == 0, done.stderr[-2000:]
    again = pretrained.load(str(tmp_path / "run"))
    assert again.cfg.num_hidden_layers == 2 and again.cfg.hidden_size == 12


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layers": 6}, r"layers: expected 1..5 \(the model's\), got 6"),
        ({"layers": 2, "keep_layers": (1, 2)}, "layers: expected none with keep_layers"),
        ({"keep_layers": (2, 1)}, "keep_layers: expected rising numbers"),
        ({"keep_layers": (1, 6)}, "keep_layers: expected at most the model's depth 5, got 6"),
        ({"width": 25}, "width: expected 1..24"),
        ({"width": 0}, "width: expected 1..24"),
        ({"ffn": 38}, "ffn: expected 1..37"),
        ({"by": "activation"}, "data: expected text for activation"),
        ({"by": "first", "data": ("pairs.jsonl",)}, "data: expected .* none otherwise"),
        ({"shape": "ml-embed-80m", "layers": 3}, "shape: expected no layers"),
        ({"shape": "ml-embed-80m"}, "shape: vocab_size: expected 151936"),
        ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl"),
        ({"texts": 0, "data": ("pairs.jsonl",)}, "texts: expected 1 or more"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    source, tmp_path, monkeypatch, options, reason
):
    monkeypatch.chdir(source)
    with pytest.raises(ValueError, match=reason):
        main("model", tmp_path / "out", device="cpu", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out: expected a new directory"):
        main(str(source / "model"), tmp_path, layers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
