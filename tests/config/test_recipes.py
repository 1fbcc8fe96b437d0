"""Every recipe trains from small local checkpoints, and its loss falls."""

import json
import math
import re
import shutil
from dataclasses import replace

import processes
import pytest
import torch
from factories import metrics, tiny_model, write_encoder, write_jsonl

from mlembed.config.recipes import GTE_STARTS, ML_EMBED_RATES, RECIPES
from mlembed.config.shapes import SHAPES, nested
from mlembed.data import tokenizer
from mlembed.data.batches import Batches
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained
from mlembed.runtime.distributed import World
from mlembed.training import setup
from mlembed.training.arguments import parse
from train import train

ALONE = World(0, 1, torch.device("cpu"))
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
THINGS = ("cats", "dogs", "owls", "bees")
TEXTS = [f"{a} {b}" for a in WORDS for b in THINGS]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write checkpoints of both styles, a teacher, pairs, an n-way table and a mixture."""
    folder = tmp_path_factory.mktemp("recipes")
    tokens = tokenizer.train(TEXTS, 300)
    shape = {"vocab_size": tokens.get_vocab_size(), "num_hidden_layers": 3, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024}
    bert = {"style": "bert", "causal": False, "pooling": "mean"}
    for name, style in (("qwen3", {}), ("bert", bert), ("teacher", bert)):
        model = tiny_model(len(name), **shape | style)
        write_encoder(Encoder(model, tokens, 64), folder / name)
    pairs = [
        {
            "query": text,
            "positive": f"{text.split()[1]} : {text.split()[0]}",
            "negatives": [f"{THINGS[i % 4]} : {word}" for word in WORDS if word not in text],
        }
        for i, text in enumerate(TEXTS)
    ]
    rows = [
        {"id": text, "lang": lang, "text": f"{text} {mark}"}
        for text in TEXTS
        for lang, mark in (("eng", "."), ("deu", "!"))
    ]
    for name, table in (("pairs", pairs), ("nway", rows), ("classes", pairs)):
        write_jsonl(folder / f"{name}.jsonl", table)
    first = {"path": "pairs.jsonl", "prompt": "Instruct: Find.\nQuery: "}
    second = {"path": "classes.jsonl", "task": "classification", "temperature": 0.1}
    (folder / "mixture.json").write_text(json.dumps({"sources": [first, second]}))
    return folder


def arguments(name, folder, out):
    """Return a command line of a recipe on our checkpoints, whose loss falls within STEPS."""
    style = "qwen3" if name.startswith(("ml-embed", "qwen3")) else "bert"
    data = "mixture.json" if name.endswith("stage2") else "pairs.jsonl"
    args = [name, "--name", name, "--output-dir", str(out), "--eval", "--tracker", "none"]
    args += ["--steps", str(STEPS), "--batch-size", "16", "--precision", "fp32"]
    args += ["--optim.lr", "3e-3", "--optim.warmup-steps", "1", "--log-every", "1"]
    if name == "tiny":
        return [*args, "--batch-size", "16", "--data", str(folder / data)]
    if name.startswith("lealla"):
        data = "nway.jsonl"
        args += ["--distill.teacher", str(folder / "teacher")]
    args += ["--data", str(folder / data)]
    if name == "lealla-mini":  # It has random layers, which the high rate would spoil.
        return [*args, "--tokenizer", str(folder / "teacher"), "--optim.lr", "5e-4"]
    return [*args, "--init", str(folder / style)]


def families():
    """Return all recipes; those that differ from an earlier one only by size are slow."""
    seen, params = set(), []
    for name in RECIPES:
        family = re.sub(r"-(small|base|large|[\d.]+[mb])", "", name)
        params.append(pytest.param(name, marks=[pytest.mark.slow] if family in seen else []))
        seen.add(family)
    return params


# The models are so narrow that a recipe's ranks hold more than a plain table.
@pytest.mark.filterwarnings("ignore:model.ranks. expected at most the break-even")
@pytest.mark.parametrize("name", families())
def test_recipe_trains(name, folder, tmp_path):
    run = parse(arguments(name, folder, tmp_path))
    assert run.steps == STEPS and run.epochs == 0
    assert train(run, ALONE) == 0
    losses = [line["loss"] for line in metrics(tmp_path / name, "train")]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert sum(losses[-2:]) < sum(losses[:2])
    assert (tmp_path / name / "model" / "model.safetensors").is_file()


# ---- recipes as configurations ----


def test_second_stage_starts_from_the_first(folder, tmp_path):
    """It loads weights, factors, tokenizer and prompts of the first."""
    first = parse(arguments("ml-embed-80m-stage1", folder, tmp_path))
    assert train(first, ALONE) == 0
    args = arguments("ml-embed-80m-stage2", folder, tmp_path)
    args[args.index("--init") + 1] = str(tmp_path / "ml-embed-80m-stage1")
    second = parse([*args, "--optim.lr", "1e-12"])
    assert second.model.ranks == first.model.ranks and second.model.style != "bert"
    assert [source.task for source in second.sources] == ["auto", "classification"]
    assert second.sources[0].prompt == "Instruct: Find.\nQuery: "
    assert train(second, ALONE) == 0
    one, two = (
        pretrained.load(str(tmp_path / f"ml-embed-80m-stage{i}" / "model")).state_dict()
        for i in (1, 2)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


def test_elastic_takes_everything_from_its_source(folder, tmp_path):
    run = parse(arguments("elastic", folder, tmp_path))
    source = hf_config.from_checkpoint(folder / "bert", RECIPES["tiny"]().model)
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "pooling", "style")
    assert [getattr(run.model, name) for name in names] == [getattr(source, n) for n in names]
    assert run.distill.teacher == run.init == str(folder / "bert")
    again = parse([*arguments("elastic", folder, tmp_path), "--model.exits", "2", "3"])
    assert again.model.exits == (2, 3)


@pytest.mark.filterwarnings("ignore:model.ranks. expected at most the break-even")
@pytest.mark.parametrize("ranks", [[], ["2", "4"]])
def test_frozen_tokens_stay(ranks, folder, tmp_path):
    args = [*arguments("elastic", folder, tmp_path), "--model.ranks", *ranks]
    run = parse([*args, "--init-factors", "uniform"])
    assert run.optim.freeze_tokens and train(run, ALONE) == 0
    before, after = (
        pretrained.load(str(path), run.model).state_dict()
        for path in (folder / "bert", tmp_path / "elastic" / "checkpoints" / f"step_{STEPS:08}")
    )
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert same == {f"embed_tokens.{'U' if ranks else 'weight'}"}


@pytest.mark.filterwarnings("ignore:model.ranks. expected at most the break-even")
def test_tokens_start_from_the_tokenizer_s_model_and_stay(folder, tmp_path):
    """A student has the teacher's tokens, in a shape of its own, before training and after."""
    run = parse([*arguments("lealla-mini", folder, tmp_path), "--model.num-hidden-layers", "4",
                 "--model.exits", "2", "4", "--seed", "3"])  # fmt: skip
    text = setup.read_text(run, lambda line: None)
    tokens = setup.load_tokenizer(run, None, text)
    batches = Batches(text.tables, tokens, run, ALONE)
    start, again = (setup.build(run, None, tokens, batches, ALONE) for _ in range(2))
    trained = pretrained.load(str(folder / "teacher")).embed_tokens.table()
    own = start.embed_tokens.U
    assert own.shape == (len(trained), 96) and start.cfg.vocab_size == len(trained)
    # Coordinates of rows around a mean: their distances, up to weights that fall with frequency.
    rare = torch.from_numpy(batches.token_counts(len(trained)) == 0).nonzero()[:, 0]
    assert len(rare) > 5
    ratio = torch.pdist(own[rare].detach()) / torch.pdist(trained[rare])
    torch.testing.assert_close(ratio, ratio.mean().expand(len(ratio)), rtol=1e-3, atol=0)
    assert all(
        torch.equal(a, b) for a, b in zip(start.parameters(), again.parameters(), strict=True)
    )
    assert train(run, ALONE) == 0
    after = pretrained.load(str(tmp_path / "lealla-mini" / "checkpoints" / f"step_{STEPS:08}"))
    assert torch.equal(after.embed_tokens.U, own)
    assert not torch.equal(after.embed_tokens.W, start.embed_tokens.W)


def test_tokens_need_a_model():
    with pytest.raises(ValueError, match="^init_tokens: expected random without a tokenizer, got"):
        parse(["tiny", "--init-tokens", "tokenizer"])


@pytest.mark.parametrize(
    ("source", "exits", "last", "dims", "ranks"),
    [
        ("multilingual-e5-small", (3, 6, 9, 12), 2, (48, 96, 192, 384), (64, 128, 256)),
        ("gte-large", (6, 12, 18, 24), 4, (128, 256, 512, 1024), ()),
        ("ml-embed-0.6b", (7, 14, 21, 28), 5, (128, 256, 512, 1024), (168, 336, 680)),
    ],
)
def test_nested_shapes(source, exits, last, dims, ranks):
    cfg = nested(SHAPES[source])
    assert (cfg.exits, cfg.last_layers) == (exits, last)
    assert (cfg.matryoshka_dims, cfg.ranks) == (dims, ranks)


@pytest.mark.parametrize("layers", range(1, 14))
def test_every_depth_can_be_nested(layers):
    source = replace(SHAPES["gte-small"], num_hidden_layers=layers, exits=(), ranks=())
    cfg = nested(source)
    assert cfg.exits[-1] == layers and cfg.exits[0] > cfg.last_layers


def test_recipes_have_the_published_numbers():
    for size in ("small", "base", "large"):
        run = RECIPES[f"lealla-{size}"]()
        nesting = {"exits": (), "matryoshka_dims": ()}
        shape = replace(SHAPES[f"lealla-{size}"], **nesting)
        assert replace(run.model, dropout=0.0, **nesting) == shape
        assert (run.loss.margin, run.loss.temperature, run.optim.lr) == (0.3, 0.01, 1e-4)
        assert RECIPES[f"lealla-{size}-3d"]().model.ranks[-1] == run.model.hidden_size // 2
        longest = 2 * run.batch_size * run.max_length
        assert longest / run.pack_tokens == (2 if size == "large" else 1)
    for size, (_, rate) in GTE_STARTS.items():
        first, second = (RECIPES[f"gte-{size}-{kind}"]() for kind in ("unsupervised", "supervised"))
        assert (first.batch_size, first.steps, first.max_length) == (16_384, 50_000, 128)
        assert (second.batch_size, second.loss.num_negatives, second.max_length) == (128, 15, 512)
        assert first.optim.lr == rate and second.optim.lr == pytest.approx(rate / 10)
        assert second.init == f"./runs/{first.name}" and second.source_alpha == 0.5
    for size in ML_EMBED_RATES:
        first, second = (RECIPES[f"ml-embed-{size}-stage{i}"]() for i in (1, 2))
        assert second.init == f"./runs/{first.name}"
        assert first.loss.hard_negatives == "separate" and first.epochs == 2


@pytest.mark.parametrize("name", RECIPES)
def test_docstrings_tell_the_origin_of_numbers(name):
    doc = " ".join((RECIPES[name].__doc__ or "").split())
    assert "ours" in doc.lower()
    assert name == "tiny" or "arXiv" in doc


# ---- a mixture with a teacher ----


def mixed(folder, out, *more):
    args = ["gte-small-supervised", "--init", str(folder / "bert"), "--output-dir", str(out)]
    args += ["--data", str(folder / "mixture.json"), str(folder / "nway.jsonl"), "--name", "mixed"]
    args += ["--eval", "--tracker", "none", "--steps", "8", "--batch-size", "8"]
    args += ["--precision", "fp32", "--log-every", "1", "--save-every", "4", "--model.dropout"]
    args += ["0.1", "--optim.lr", "1e-3", "--model.exits", "1", "3", "--distill.exits", "all"]
    args += ["--distill.teacher", str(folder / "teacher"), "--distill.between-exits", "1"]
    args += ["--distill.features", "1", "--distill.align", "projection", "--distill.logits", "1"]
    return [*args, "--distill.logit-form", "kl", *more]


def launched(args):
    done = processes.run("train.py", *args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def trace(run):
    keys = ("step", "loss", "grad_norm", "losses", "distilled")
    return [{key: line[key] for key in keys} for line in metrics(run, "train")]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed")
    launched(mixed(folder, out))
    return out / "mixed"


def test_resumed_distillation_equals_uninterrupted(whole, folder, tmp_path):
    """The projection, its moments, and the order of three sources are restored."""
    want = trace(whole)
    terms = {name for line in want for name in line["distilled"]}
    assert terms == {"features", "logits", "between_exits"}
    shutil.copytree(whole, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "model")
    shutil.rmtree(tmp_path / "mixed" / "checkpoints" / "step_00000008")
    options = ["--resume", "--loader-workers", "2", "--allow-changed", "output_dir"]
    launched(mixed(folder, tmp_path, *options))
    assert trace(tmp_path / "mixed") == want
    mine, theirs = (d / "model" / "model.safetensors" for d in (tmp_path / "mixed", whole))
    assert mine.read_bytes() == theirs.read_bytes()
