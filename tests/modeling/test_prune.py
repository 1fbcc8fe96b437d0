"""Pruning against slices by independent loops, and of models whose pruned parts are zero."""

from dataclasses import replace

import numpy as np
import processes
import pytest
import torch
from factories import assert_same_model, odd_shape, random_model, write_encoder, write_jsonl
from transformer_truth import read_by_transformers
from transformers import Qwen3Config, Qwen3Model

from mlembed.cli.prune import main
from mlembed.config import shapes
from mlembed.data import tokenizer
from mlembed.data.packing import pack
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.prune import Selection, choose, prune, pruned_config, sample, spread, target
from mlembed.modeling.transformer import num_parameters

CFG = odd_shape(num_hidden_layers=5, exits=(1, 3, 5), matryoshka_dims=(5, 12, 24))
NESTED = replace(CFG, ranks=(3, 11))
BERT = odd_shape("bert", num_hidden_layers=5, exits=(1, 3, 5), pooling="mean")
STYLES = pytest.mark.parametrize("cfg", [CFG, NESTED, BERT], ids=["table", "factors", "bert"])
IDS = [np.arange(n) * 7 % 101 for n in (1, 5, 23)]
UNITS = tuple(
    torch.randperm(37, generator=torch.Generator().manual_seed(i))[:19].sort().values
    for i in range(3)
)
SMALL = Selection((1, 2, 4), torch.tensor([0, 1, 4, 5, 7, 11, 13, 17, 18, 22, 23]), UNITS)


@torch.no_grad()
def exits(model):
    return model(pack(IDS))


# ---- slices ----


@STYLES
@pytest.mark.parametrize("batches", [None, [pack(IDS)]], ids=["first", "activation"])
def test_pruning_to_the_same_shape_changes_nothing(cfg, batches):
    model = random_model(cfg)
    assert_same_model(prune(model, choose(model, range(1, 6), 24, 37, batches)), model)


@STYLES
def test_pruned_weights_are_slices(cfg):
    model = random_model(cfg)
    bert = cfg is BERT
    d = torch.arange(24) if bert else SMALL.width_D
    small = prune(model, replace(SMALL, width_D=d))
    assert small.cfg.hidden_size == len(d) and small.cfg.intermediate_size == 19
    whole, got = model.state_dict(), small.state_dict()
    want = {}
    for name, x in whole.items():
        if name.startswith("layers."):
            _, old, part = name.split(".", 2)
            if old not in "013":
                continue
            new = "013".index(old)
            f = UNITS[new]
            if part in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
                x = x[f][:, d]
            elif part == "mlp.up_proj.bias":
                x = x[f]
            elif part == "mlp.down_proj.weight":
                x = x[d][:, f]
            elif part == "self_attn.o_proj.weight" or "layernorm" in part:
                x = x[d]
            elif not bert and "proj" in part:
                x = x[:, d]
            name = f"layers.{new}.{part}"
        elif name == "norm.weight":
            x = x[d]
        elif name in ("embed_tokens.weight", "embed_tokens.W"):
            x = x[:, d]
        want[name] = x
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def test_bert_keeps_its_width():
    with pytest.raises(ValueError, match="width: expected 24 of a BERT.*got 12"):
        choose(random_model(BERT), [1], 12, 37)


@STYLES
@pytest.mark.parametrize("exit", [1, 2, 3, 5])
def test_first_layers_equal_a_cut(cfg, exit):
    model = random_model(cfg)
    small = prune(model, choose(model, range(1, exit + 1), 24, 37))
    assert_same_model(small, pretrained.cut(model, exit, cfg.ranks[-1] if cfg.ranks else None))


def test_exits_and_prefixes():
    """Layers that are not the first ones have the default exits."""
    assert pruned_config(CFG, (1, 3, 5), 24, 37).exits == (1, 2, 3)
    assert pruned_config(CFG, (2, 3), 24, 37).exits == (1, 2)
    assert pruned_config(CFG, (1, 2), 24, 37).exits == (1, 2)
    assert pruned_config(CFG, (1, 2, 3, 4), 24, 37).exits == (1, 3, 4)
    assert pruned_config(CFG, (1,), 13, 37).matryoshka_dims == (5, 12, 13)
    assert pruned_config(CFG, (1,), 12, 37).matryoshka_dims == (5, 12)
    assert pruned_config(CFG, (1,), 1, 37).matryoshka_dims == (1,)


@pytest.mark.parametrize(
    ("layers", "exits", "last"),
    [
        ((1, 2, 4, 5), (3, 4), 2),  # the layers of exit 4
        ((1, 4, 5), (3,), 2),
        ((2, 4, 5), (3,), 2),
        ((1, 3, 4, 5), (4,), 2),
        ((4, 5), (1, 2), 0),
        ((1, 2, 5), (1, 2, 3), 0),
    ],
)
def test_last_layers_that_stay(layers, exits, last):
    """Exits go on ending with the last layers if these and another one are selected."""
    model = random_model(replace(NESTED, exits=(3, 5), last_layers=2))
    small = prune(model, choose(model, layers, 24, 37))
    assert (small.cfg.exits, small.cfg.last_layers) == (exits, last)
    if layers == (1, 2, 4, 5):
        assert_same_model(small, pretrained.cut(model, 4, None))


@pytest.mark.parametrize(("width", "ranks"), [(11, (3, 11)), (7, (3,)), (2, ())])
def test_ranks_up_to_the_new_width(width, ranks):
    model = random_model(NESTED)
    small = prune(model, Selection((1,), torch.arange(width), (torch.arange(37),)))
    assert small.cfg.ranks == ranks
    rank = ranks[-1] if ranks else 11
    U, W = (model.state_dict()[f"embed_tokens.{name}"].double() for name in "UW")
    want = U[:, :rank] @ W[:rank, :width]
    torch.testing.assert_close(small.embed_tokens.table().double(), want, rtol=0, atol=1e-5)


# ---- parts that are zero ----


@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
def test_zero_coordinates_go_first(cfg):
    live = torch.tensor([0, 2, 3, 7, 8, 12, 13, 14, 20, 21, 22])
    model = random_model(cfg)
    dead = torch.ones(24, dtype=torch.bool)
    dead[live] = False
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("embed_tokens.weight", "embed_tokens.W"):
                weight[:, dead] = 0
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[dead] = 0
    assert exits(model)[..., dead].abs().max() == 0
    assert torch.equal(choose(model, range(1, 6), 11, 37, [pack(IDS)]).width_D, live)


@pytest.mark.parametrize("cfg", [CFG, BERT], ids=["qwen3", "bert"])
def test_zero_units_go_first(cfg):
    model = random_model(cfg)
    live = [torch.randperm(37, generator=torch.Generator().manual_seed(i))[:9] for i in range(5)]
    with torch.no_grad():
        for layer, units in zip(model.layers, live, strict=True):
            dead = torch.ones(37, dtype=torch.bool)
            dead[units] = False
            layer.mlp.down_proj.weight[:, dead] = 0
    selection = choose(model, range(1, 6), 24, 9, [pack(IDS)])
    for units, want in zip(selection.units, live, strict=True):
        assert units.tolist() == sorted(want.tolist())
    torch.testing.assert_close(exits(prune(model, selection)), exits(model), rtol=1e-4, atol=1e-5)


# ---- scores ----


def test_activation_scores_are_means_over_tokens():
    """Scores from the hidden states of transformers' model."""
    model = random_model(CFG)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):  # the stream of trained models grows
            layer.mlp.down_proj.weight *= 3.0**i
    hf = Qwen3Model(Qwen3Config(**hf_config.hf_config(CFG))).eval()
    hf.load_state_dict(model.state_dict())
    outputs, inner = [], [[] for _ in range(5)]
    hf.layers[-1].register_forward_hook(lambda m, a, out: outputs.append(out))
    for i, layer in enumerate(hf.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: inner[i].append(a[0]))
    sums = np.zeros((6, 24))
    units = np.zeros((5, 37))
    with torch.no_grad():
        for ids in IDS:
            out = hf(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True)
            stream = [*out.hidden_states[:5], outputs[-1]]
            sums += np.stack([x[0].abs().double().sum(0).numpy() for x in stream])
            units += np.stack([x[-1][0].abs().double().sum(0).numpy() for x in inner])
    width_D = (sums / sums.sum(1, keepdims=True)).sum(0)
    batches = [pack(IDS[:2]), pack(IDS[2:])]
    for width in (1, 4, 13, 18, 22, 10):
        selection = choose(model, (2, 5), width, 7, batches)
        assert selection.width_D.tolist() == sorted(np.argsort(-width_D)[:width].tolist())
    for got, layer in zip(selection.units, (1, 4), strict=True):
        columns = model.layers[layer].mlp.down_proj.weight.detach().double().norm(dim=0).numpy()
        want = np.argsort(-units[layer] / 29 * columns)[:7]
        assert got.tolist() == sorted(want.tolist())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="expected text for pruning by activation, got none"):
        choose(model, (2, 5), 10, 7, [])


def test_first_is_the_prefix():
    selection = choose(random_model(CFG), (1, 4), 7, 5)
    assert selection.width_D.tolist() == list(range(7))
    assert [units.tolist() for units in selection.units] == [list(range(5))] * 2


def test_layers_are_evenly_spaced():
    assert spread(28, 28) == tuple(range(1, 29))
    assert spread(28, 1) == (1,)
    assert spread(28, 2) == (1, 28)
    assert spread(28, 8) == (1, 5, 9, 13, 16, 20, 24, 28)
    for layers in (1, 2, 3, 7, 12, 28, 36):
        for count in range(2, layers + 1):
            places = spread(layers, count)
            steps = np.diff(places)
            assert places[0] == 1 and places[-1] == layers and len(places) == count
            assert steps.min() >= 1 and steps.max() - steps.min() <= 1
    for count in (0, 29):
        with pytest.raises(ValueError, match=f"layers: expected 1..28 .*, got {count}"):
            spread(28, count)


# ---- published shapes ----

SOURCE = shapes.SHAPES["ml-embed-0.6b"]


@pytest.mark.parametrize("size", ["80m", "160m", "330m", "0.6b"])
def test_f2llm_shapes_are_pruned_from_the_largest(size):
    """Shapes of F2LLM-v2 (arXiv 2603.19223), which has these totals of parameters."""
    wanted = target(SOURCE, f"ml-embed-{size}")
    layers = spread(28, wanted.num_hidden_layers)
    cfg = pruned_config(SOURCE, layers, wanted.hidden_size, wanted.intermediate_size)
    assert num_parameters(cfg) == num_parameters(shapes.SHAPES[f"ml-embed-{size}"])


@pytest.mark.parametrize(
    ("cfg", "shape", "reason"),
    [
        (SOURCE, "ml-embed-4b", "num_attention_heads: expected 32, as ml-embed-4b has"),
        (replace(SOURCE, head_dim=64), "ml-embed-80m", "head_dim: expected 128.*got 64"),
        (SOURCE, "gte-base", "style: expected bert"),
        (replace(CFG, num_attention_heads=16), "ml-embed-80m", "vocab_size: .*151936.*got 101"),
        (SOURCE, "ml-embed-80", "shape: expected one of .*ml-embed-80m.*got 'ml-embed-80'"),
    ],
)
def test_shapes_that_do_not_fit(cfg, shape, reason):
    with pytest.raises(ValueError, match=reason):
        target(cfg, shape)


def test_mlp_wider_than_the_source():
    wanted = target(SOURCE, "ml-embed-1.7b")
    with pytest.raises(ValueError, match="ffn: expected 1..3072"):
        pruned_config(SOURCE, spread(28, 28), 1024, wanted.intermediate_size)


# ---- the command ----

TEXTS = ["Wednesday, May 4, 2050", "mercredi 4 mai 2050", "один два три четыре пять", "a b c d"]


def write_pairs(path, queries, positives):
    pairs = zip(queries, positives, strict=True)
    return write_jsonl(path, ({"query": query, "positive": positive} for query, positive in pairs))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model and its tokenizer, and pairs of texts."""
    path = tmp_path_factory.mktemp("prune")
    tokens = tokenizer.train(TEXTS * 2, 290)
    model = random_model(replace(NESTED, vocab_size=tokens.get_vocab_size()))
    write_encoder(Encoder(model, tokens, 24), path / "model")
    write_pairs(path / "pairs.jsonl", TEXTS[::2], TEXTS[1::2])
    return path


def test_command_writes_what_others_read(source, tmp_path, capsys):
    out, data = tmp_path / "out", (str(source / "pairs.jsonl"),)
    main(str(source / "model"), out, layers=3, width=12, ffn=16, data=data, device="cpu")
    printed = capsys.readouterr().out
    small = Encoder.load(str(out), "cpu")
    assert f"{num_parameters(small.model.cfg):,} parameters of" in printed
    assert "layers 1 3 5 of 5" in printed and "by activation" in printed
    assert small.max_length == 24
    assert small.model.cfg.exits == (1, 2, 3) and small.model.cfg.ranks == (3, 11)
    # The same selection from the same texts in one pack: their order does not matter.
    whole = Encoder.load(str(source / "model"), "cpu")
    ids = tokenizer.tokenize(whole.tokenizer, TEXTS, 24)
    selection = choose(whole.model, (1, 3, 5), 12, 16, [pack(ids)])
    assert_same_model(small.model, prune(whole.model, selection))
    theirs = read_by_transformers(out, TEXTS, "last")
    np.testing.assert_allclose(theirs, small.encode(TEXTS), rtol=0, atol=1e-5)


def test_command_keeps_the_first_without_data(source, tmp_path, capsys):
    main(str(source / "model"), tmp_path / "out", width=12, ffn=16, device="cpu")
    assert "by first" in capsys.readouterr().out
    whole = pretrained.load(str(source / "model"))
    want = prune(whole, choose(whole, range(1, 6), 12, 16))
    assert_same_model(pretrained.load(str(tmp_path / "out")), want)


def test_sample_draws_from_all_files(source, tmp_path):
    """Every text once, or N of them, the same ones for a seed."""
    encoder = Encoder.load(str(source / "model"), "cpu")
    queries = [[f"{i} {j}" for j in range(count)] for i, count in enumerate((3, 1, 5))]
    files = [
        write_pairs(tmp_path / f"{i}.jsonl", some, [f"{text} one" for text in some])
        for i, some in enumerate(queries)
    ]

    def texts(count, seed):
        limits = encoder.max_length, encoder.max_tokens
        ids = []
        for batch in sample(encoder.tokenizer, *limits, files, count, seed):
            bounds = batch.plan.cu_seqlens.tolist()
            ids += [batch.ids_T[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
        return sorted(ids)

    each = [text for some in queries for text in some]
    each += [f"{text} one" for text in each]
    everything = sorted(encoder.tokenizer.encode(text).ids for text in each)
    assert texts(100, 0) == everything
    some = texts(7, 0)
    assert len(some) == 7 and all(text in everything for text in some)
    assert some == texts(7, 0) != texts(7, 1)


def test_train_py_trains_a_pruned_model(source, tmp_path):
    main(str(source / "model"), tmp_path / "out", keep_layers=(2, 5), width=12, device="cpu")
    args = [
        "tiny",
        "--init",
        tmp_path / "out",
        "--optim.lr",
        1e-4,
        "--steps",
        1,
        "--data",
        source / "pairs.jsonl",
    ]
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
        ({"texts": 0, "data": ("pairs.jsonl",)}, "texts: expected more than 0, got 0"),
    ],
)
def test_errors_write_nothing(source, tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(source)
    with pytest.raises(ValueError, match=reason):
        main("model", tmp_path / "out", device="cpu", **options)
    assert not list(tmp_path.iterdir())


def test_existing_directory_stays(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out: expected a new directory"):
        main(str(source / "model"), tmp_path, layers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
