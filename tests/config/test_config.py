"""Command lines, config.json and shapes of checkpoints, and the errors of each mistake."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from transformers import Qwen3Config

from mlembed import config
from mlembed.config import Depth, Loss, Model, Optim, Run, recipes, strict
from mlembed.modeling import hf_config
from mlembed.training import arguments

# ---- recipes and overrides ----


def test_recipes_parse_to_themselves():
    assert arguments.parse(["tiny"]) == recipes.tiny()
    assert recipes.tiny().model.exits == (1, 2, 4)


@pytest.mark.parametrize(
    "line, dotted, value",
    [
        ("--optim.lr 1e-3", "optim.lr", 1e-3),
        ("--optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("batch-size=8", "batch_size", 8),
        ("--model.exits 1 2 4", "model.exits", (1, 2, 4)),
        ("--data a b", "data", ("a", "b")),
        ("--eval", "eval", ()),
        ("--model.no-causal", "model.causal", False),
        ("--model.ranks", "model.ranks", ()),
        ("--model.matryoshka-dims 8 192", "model.matryoshka_dims", (8, 192)),
        ("--model.matryoshka_dims 8 192", "model.matryoshka_dims", (8, 192)),
        ("--optim.betas 0.8 0.9", "optim.betas", (0.8, 0.9)),
        ("--loss.directions query_to_doc", "loss.directions", "query_to_doc"),
        ("--loss.matryoshka-weights ml-embed", "loss.matryoshka_weights", "ml-embed"),
        ("--resume", "resume", True),
        ("--steps 3", "steps", 3),
        ("--name x.y", "name", "x.y"),
    ],
)
def test_override_changes_only_its_field(line, dotted, value):
    run = arguments.parse(["tiny", *line.split()])
    actual = run
    for part in dotted.split("."):
        actual = getattr(actual, part)
    assert actual == value and type(actual) is type(value)
    before, after = strict.to_dict(recipes.tiny()), strict.to_dict(run)
    assert set(strict.differences(before, after)) <= {dotted}


def test_many_overrides_at_once():
    line = (
        "tiny --steps 7 --data lang=en/part.parquet b --model.num-hidden-layers 2 --model.exits 1 2"
        " --optim.warmup-ratio 0 --model.no-causal --model.pooling mean"
    )
    run = arguments.parse(line.split())
    # A path with an equals sign, as in partitioned data, is not an override.
    assert (run.steps, run.data) == (7, ("lang=en/part.parquet", "b"))
    assert (run.optim.warmup_ratio, run.model.exits) == (0.0, (1, 2))
    assert (run.model.causal, run.model.pooling) == (False, "mean")


def test_unknown_recipe_names_the_near_one():
    with pytest.raises(ValueError, match=r"a name that --help lists .*near: tiny.*got 'tyni'"):
        arguments.parse(["tyni"])


@pytest.mark.parametrize(
    "key, near",
    [
        ("--optim.lrr", "optim.lr"),
        ("--lr", "optim.lr"),
        ("--model.exit", "model.exits"),
        ("--matryoshka_dims", "model.matryoshka_dims"),
        ("--step", "steps"),
        ("--model.matryoshka-dim=8", "model.matryoshka_dims"),
        ("optim.lrr=1", "optim.lr"),
    ],
)
def test_unknown_key_names_near_ones(key, near):
    with pytest.raises(ValueError, match=f"no such key.*near: .*{re.escape(near)}"):
        arguments.parse(["tiny", key, "1"])


@pytest.mark.parametrize(
    "line, word",
    [
        ("--optim.lr fast", "optim.lr"),
        ("--steps 1.5", "steps"),
        ("--steps", "steps"),
        ("--optim.betas 0.9", "optim.betas"),
        ("--loss.exit-weights heavy", "loss.exit-weights"),
        ("--model.pooling max", "model.pooling"),
        ("--model.no-such", "model.no-such"),
        ("stray", "stray"),
        ("--steps 0", "^steps: expected"),
        ("--model.exits 1 2", "^model.exits: expected"),
        ("--data", "data: expected"),
    ],
)
def test_wrong_values_are_errors(line, word, capsys):
    with pytest.raises(ValueError, match=word):
        arguments.parse(["tiny", *line.split()])
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize(
    "line, code, words",
    [
        ("--help", 0, recipes.RECIPES),
        ("-h", 0, recipes.RECIPES),
        ("", 2, recipes.RECIPES),
        ("qwen3 --help", 0, ["--optim.lr"]),  # needs no checkpoint
    ],
)
def test_help(line, code, words, capsys):
    with pytest.raises(SystemExit) as exit:
        arguments.parse(line.split())
    printed = capsys.readouterr().out
    assert exit.value.code == code and all(word in printed for word in words)


def test_flat_keys_are_exactly_the_fields():
    keys = strict.flat_keys(Run)
    assert len(keys) == len(set(keys))
    assert {"steps", "optim.lr", "model.exits", "loss.temperature"} <= set(keys)
    assert not {"optim", "model", "loss"} & set(keys)


# ---- config.json ----


@pytest.mark.parametrize(
    "run",
    [
        recipes.tiny(),
        recipes.qwen3(),
        Run(),
        Run(model=Model(causal=False, pooling="mean"), optim=Optim(betas=(0.5, 0.6)), eval=()),
        # The checkpoint may be gone; the resolved shape is in the file.
        dataclasses.replace(recipes.tiny(), init="./gone"),
    ],
)
def test_config_json_round_trip(run, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(strict.to_dict(run)))
    assert config.load(path) == run == arguments.parse([str(path)])
    assert hash(config.load(path)) == hash(run)  # Tuples are tuples again.
    again = arguments.parse([str(path), "--name", "again", "--steps", "9"])
    assert again == dataclasses.replace(run, name="again", steps=9)


def test_integer_is_read_as_a_float():
    stored = strict.to_dict(recipes.tiny())
    stored["optim"]["lr"] = 1
    run = strict.from_dict(Run, stored, "here")
    assert run.optim.lr == 1.0 and type(run.optim.lr) is float


@pytest.mark.parametrize(
    "dotted, value, words",
    [
        ("stepz", 3, ["stepz", "near", "steps"]),
        ("optim.lrr", 3, ["optim", "lrr", "near", "lr"]),
        ("model.exit", 3, ["model", "exit", "near", "exits"]),
        ("steps", "3", ["steps", "expected int", "'3'"]),
        ("steps", True, ["steps", "expected int", "True"]),
        ("steps", 3.0, ["steps", "expected int", "3.0"]),
        ("resume", 1, ["resume", "expected bool"]),
        ("name", None, ["name", "expected str", "None"]),
        ("data", "cldr", ["data", "expected tuple", "cldr"]),
        ("data", [1], ["data", "expected str", "1"]),
        ("model", 3, ["model", "expected an object", "int"]),
        ("optim.lr", True, ["lr", "expected float"]),
        ("optim.betas", [0.9], ["betas", "expected 2 values", "got 1"]),
        ("loss.exit_weights", "heavy", ["exit_weights", "uniform", "depth", "heavy"]),
        ("model.attention", "flash", ["attention", "flash_attn", "'flash'"]),
        ("model.exits", [1, "4"], ["exits", "expected int", "'4'"]),
        ("model.exits", [1, 5], ["exits", "depth", "4", "5"]),
    ],
)
def test_load_is_strict(dotted, value, words, tmp_path):
    stored = inner = strict.to_dict(recipes.tiny())
    *parts, key = dotted.split(".")
    for part in parts:
        inner = inner[part]
    inner[key] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError) as error:
        config.load(path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_load_names_a_missing_file_and_the_line_of_bad_json(tmp_path):
    for load in (config.load, lambda path: arguments.parse([str(path)])):
        with pytest.raises(ValueError, match=r"none\.json: no such file"):
            load(tmp_path / "none.json")
    path = tmp_path / "config.json"
    path.write_text('{\n"steps": 3,\n"name" "x"\n}')
    with pytest.raises(ValueError, match=r"config\.json:3: invalid JSON"):
        config.load(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: expected an object, got list"):
        config.load(path)


def test_differences_name_dotted_keys():
    a = strict.to_dict(recipes.tiny())
    b = strict.to_dict(arguments.parse(["tiny", "--optim.lr", "1", "--steps", "3", "--data", "x"]))
    assert sorted(strict.differences(a, b)) == ["data", "optim.lr", "steps"]
    assert list(strict.differences(a, a)) == []
    a, b = {"a": {"b": 1}, "c": 1}, {"a": {"b": 1, "d": 2}}
    assert sorted(strict.differences(a, b)) == ["a.d", "c"]


def test_fields_of_a_machine():
    """A resumed run may change these keys, and no other."""
    run = strict.to_dict(Run())
    assert set(strict.differences(run, strict.without_machine(Run()))) == {
        *("compile", "activation_checkpointing", "activation_gib", "gradient_cache", "engine"),
        *("cpu_offload", "non_finite", "allow_changed", "resume", "loader_workers", "profile"),
        *("model.attention", "loss.negatives_across", "loss.bank_on"),
    }


# ---- defaults and limits ----


@pytest.mark.parametrize(
    "depth, exits",
    [
        (1, (1,)),
        (2, (1, 2)),
        (5, (1, 2, 4, 5)),
        (28, (1, 2, 4, 8, 16, 24, 28)),
        (48, (1, 2, 4, 8, 16, 24, 32, 40, 48)),
        (60, (1, 2, 4, 8, 16, 24, 32, 40, 48, 60)),
    ],
)
def test_default_exits(depth, exits):
    assert Model(num_hidden_layers=depth).exits == exits


@pytest.mark.parametrize(
    "width, dims",
    [
        (4, (4,)),
        (8, (8,)),
        (9, (8, 9)),
        (192, (8, 16, 32, 64, 128, 192)),
        (1024, (8, 16, 32, 64, 128, 256, 512, 1024)),
    ],
)
def test_default_prefixes(width, dims):
    assert Model(hidden_size=width).matryoshka_dims == dims and Model().ranks == ()


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "intermediate_size")


@pytest.mark.parametrize(
    "cls, fields, message",
    [
        *((Model, {name: size}, "expected") for name in SIZES for size in (0, -2)),
        (Model, dict(matryoshka_dims=(8, 512)), "matryoshka_dims: .*hidden_size 256, got 512"),
        (Model, dict(matryoshka_dims=(8, 128)), "matryoshka_dims: .*end at hidden_size 256"),
        (Model, dict(matryoshka_dims=(8, 8, 256)), "model.matryoshka_dims: expected rising"),
        (Model, dict(matryoshka_dims=(0, 256)), "matryoshka_dims: expected more than 0, got 0"),
        (Model, dict(exits=(1, 5)), "model.exits: .*depth num_hidden_layers 4, got 5"),
        (Model, dict(exits=(1, 2)), "model.exits: .*end at the last layer 4"),
        (Model, dict(exits=(1, 1, 4)), "model.exits: expected rising"),
        (Model, dict(exits=(-1, 4)), "model.exits: expected more than 0, got -1"),
        (Model, dict(ranks=(8, 257)), "model.ranks: .*256, got 257"),
        (Model, dict(ranks=(8, 128), vocab_size=100), "model.ranks: .*100, got 128"),
        (Model, dict(ranks=(16, 8)), "model.ranks: expected rising"),
        (Model, dict(ranks=(0,)), "model.ranks: expected more than 0, got 0"),
        (Model, dict(num_key_value_heads=3), "num_key_value_heads: expected a divisor .* 4, got 3"),
        (Model, dict(head_dim=63), "model.head_dim: expected an even number, got 63"),
        (Model, dict(dropout=1.0), "model.dropout: expected less than 1"),
        (Loss, dict(temperature=0.0), "loss.temperature: expected 0.0001 or more"),
        (
            Loss,
            dict(temperature=float("nan")),
            "loss.temperature: expected 0.0001 or more, got nan",
        ),
        (Loss, dict(num_negatives=-1), "loss.num_negatives: expected 0 or more, got -1"),
        (Loss, dict(memory_bank=-1), "loss.memory_bank: expected 0 or more, got -1"),
        (
            Loss,
            dict(memory_bank=512, ranks="all"),
            "loss.ranks: expected one rank a step with a memory",
        ),
        (Depth, dict(exits=(1, 4), shares=(0.5,)), "depth.shares: expected one for each"),
        (Depth, dict(exits=(1, 4), shares=(0.5, 0.6)), "depth.shares: expected positive"),
        (Depth, dict(exits=(1, 4), shares=(1.0, 0.0)), "depth.shares: expected positive"),
        (Depth, dict(layer_dropout=1.0), "depth.layer_dropout: expected less than 1, got 1.0"),
        (Depth, dict(layer_dropout=-0.1), "depth.layer_dropout"),
        (Run, dict(depth=Depth(exits=(1, 2))), "depth.exits: expected some of model.exits"),
        (Run, dict(depth=Depth(exits=(3, 4))), "depth.exits: expected some of model.exits"),
        (Run, dict(depth=Depth(exits=(4, 1))), "depth.exits: expected rising"),
        (Run, dict(depth=Depth(exits=(1, 9))), "depth.exits: expected at most"),
        (Optim, dict(lr=0.0), "optim.lr: expected 1e-12 or more"),
        (Optim, dict(max_grad_norm=0.0), "optim.max_grad_norm: expected 1e-12 or more"),
        (Optim, dict(min_lr_ratio=1.5), "optim.min_lr_ratio: expected at most 1, got 1.5"),
        (Optim, dict(warmup_ratio=-0.1), "optim.warmup_ratio: expected 0 or more, got -0.1"),
        (Run, dict(steps=0), "steps: expected more than 0, got 0"),
        (Run, dict(batch_size=0), "batch_size: expected more than 0, got 0"),
        (Run, dict(gradient_accumulation_steps=0), "gradient_accumulation_steps: expected more"),
        (Run, dict(log_every=0), "log_every: expected more than 0"),
        (Run, dict(keep_checkpoints=0), "keep_checkpoints: expected more than 0"),
        (Run, dict(max_length=1), "max_length: expected 2 or more, got 1"),
        (Run, dict(max_length=513), "max_length: .*max_position_embeddings 512, got 513"),
        (Run, dict(data=()), "data: expected at least one source"),
        *((Run, dict(name=name), "name: expected a plain") for name in ("", "a/b", ".", "..")),
        *((Run, dict(name=name), "name: expected a pl") for name in ("a\nb", "\udcff", 201 * "x")),
        (Run, dict(optim=Optim(weights="bf16"), engine="fsdp"), "optim.weights: expected fp32"),
        (Run, dict(cpu_offload=True), "engine: expected fsdp with cpu_offload, got ddp"),
        (Run, dict(loss=Loss(memory_bank=1023)), "at least the 1024 documents .*, got 1023"),
        (Run, dict(allow_changed=("steps", "optim.lrr")), "allow_changed: no such key optim.lrr"),
        (Run, dict(activation_gib=-1.0), "activation_gib: expected 0 or more, got -1.0"),
    ],
)
def test_impossible_values_are_errors(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


@pytest.mark.parametrize("name, most", [("dim", 256), ("exit", 4), ("rank", 16)])
def test_sizes_of_a_shape(name, most):
    shape = Model(ranks=(8, 16))
    for size in (None, 1, most):
        shape.check(**{name: size})
    for size in (0, most + 1):
        with pytest.raises(ValueError, match=rf"{name}: expected 1\.\.{most} .*, got {size}"):
            shape.check(**{name: size})
    with pytest.raises(ValueError, match="rank: expected none for a plain vocabulary table, got 8"):
        Model().check(rank=8)


def test_limits_are_allowed():
    model = Model(exits=(4,), matryoshka_dims=(256,), ranks=(256,))
    assert (model.exits, model.matryoshka_dims, model.ranks) == ((4,), (256,), (256,))
    optim = Optim(min_lr_ratio=0.0, warmup_ratio=1.0)
    assert (optim.min_lr_ratio, optim.warmup_ratio) == (0.0, 1.0)
    assert Loss(num_negatives=0).num_negatives == 0
    assert [Run(max_length=length).max_length for length in (2, 512)] == [2, 512]
    assert Run(loss=Loss(memory_bank=1024), engine="fsdp", cpu_offload=True).activation_gib == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.tiny().steps = 3


# ---- checkpoints ----

SHAPE = dict(vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, head_dim=32, intermediate_size=96)
SHAPE |= dict(max_position_embeddings=128, rms_norm_eps=1e-5)


def qwen3_directory(path, **changes):
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    Qwen3Config(**SHAPE | changes, rope_parameters=rope).save_pretrained(path)
    return path


def our_directory(path, stored):
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (path / hf_config.NESTING).write_text(json.dumps(stored))
    return path


def test_shape_of_a_transformers_checkpoint(tmp_path):
    directory = qwen3_directory(tmp_path)
    model = hf_config.from_checkpoint(directory, Model(ranks=(8, 16), pooling="mean"))
    for name, value in SHAPE.items():
        assert getattr(model, name) == value, name
    assert model.rope_theta == 1_000_000.0 and type(model.rope_theta) is float
    assert model.causal and model.pooling == "mean" and model.ranks == (8, 16)
    assert model.exits == (1, 2, 3) and model.matryoshka_dims == (8, 16, 32, 64)
    qwen3_directory(tmp_path, is_causal=False)
    assert hf_config.from_checkpoint(directory, Model()).causal is False


def test_missing_checkpoints_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"expected a checkpoint directory with config\.json"):
        hf_config.from_checkpoint(tmp_path, Model())
    for source in (str(tmp_path / "none"), "./none", "just_a_name", "a/b/c"):
        with pytest.raises(ValueError, match="neither"):
            hf_config.resolve(source)


def test_our_directory_gives_what_was_saved(tmp_path):
    saved = Model(exits=(3, 4), matryoshka_dims=(5, 256), ranks=(7, 9), pooling="cls")
    our_directory(tmp_path, {"model": strict.to_dict(saved)})
    assert hf_config.from_checkpoint(tmp_path, Model()) == saved
    our_directory(tmp_path, {"model": {"exitz": [1]}})
    with pytest.raises(ValueError, match=f"{hf_config.NESTING}.*exitz.*near.*exits"):
        hf_config.from_checkpoint(tmp_path, Model())
    our_directory(tmp_path, {})
    with pytest.raises(ValueError, match=hf_config.NESTING):
        hf_config.from_checkpoint(tmp_path, Model())


@pytest.mark.parametrize("stored", [{"attention": "flash_attn"}, {}])
def test_attention_backend_is_not_the_checkpoints(stored, tmp_path):
    """It belongs to a machine: a model loads where the package that trained it is missing."""
    our_directory(tmp_path, {"model": stored})
    assert hf_config.from_checkpoint(tmp_path, Model()).attention == "auto"
    assert hf_config.from_checkpoint(tmp_path, Model(attention="sdpa")).attention == "sdpa"
    args = ["tiny", "--init", str(tmp_path), "--model.attention", "varlen", "--optim.lr=1e-5"]
    assert arguments.parse(args).model.attention == "varlen"


def test_a_shape_that_is_refused_names_its_file(tmp_path, monkeypatch):
    """A directory called `model`, as the fields are, is no reason to leave out the file."""
    monkeypatch.chdir(tmp_path)
    folder = Path("model")
    folder.mkdir()
    (folder / "mlembed_config.json").write_text('{"model": {"head_dim": -2}}')
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model/mlembed_config.json: model.head_dim: expected"):
        hf_config.from_checkpoint(folder, Model())


def test_tiny_asks_for_a_rate_of_trained_weights(tmp_path):
    our_directory(tmp_path, {"model": {}})
    with pytest.raises(ValueError, match=r"optim\.lr: expected a rate for the trained weights"):
        arguments.parse(["tiny", "--init", str(tmp_path)])
    assert arguments.parse(["tiny", "--init", str(tmp_path), "optim.lr=2e-3"]).optim.lr == 2e-3


def test_keys_override_the_shape_of_init(tmp_path):
    wide = dict(hidden_size=1024, vocab_size=2000, max_position_embeddings=4096)
    directory = qwen3_directory(tmp_path, **wide)
    run = arguments.parse(["qwen3", "--init", str(directory), "--model.exits", "1", "3"])
    assert run.init == str(directory)
    assert run.model.hidden_size == 1024 and run.model.num_hidden_layers == 3
    assert run.model.exits == (1, 3) and run.model.ranks == recipes.qwen3().model.ranks
    assert run.model.matryoshka_dims == (8, 16, 32, 64, 128, 256, 512, 1024)
    assert run.optim == recipes.qwen3().optim


def test_init_may_be_smaller_than_the_recipe(tmp_path):
    """Its width is below the recipe's ranks, and its positions are below the max_length."""
    directory = qwen3_directory(tmp_path)
    keys = ["--model.ranks", "8", "16", "--max_length", "32"]
    run = arguments.parse(["qwen3", "--init", str(directory), *keys])
    assert (run.model.ranks, run.max_length, run.model.hidden_size) == ((8, 16), 32, 64)
