"""Adapters by peft: frozen weights keep every bit, merged ones are the adapted model, and the files
that other libraries read.
"""

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import processes
import pytest
import torch
from factories import loss_trace, odd_shape, random_model, randomise, small_text, tiny_encoder
from peft import PeftModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel

from mlembed import config
from mlembed.data.packing import pack
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.transformer import Transformer
from mlembed.publishing.export import export
from mlembed.runtime import checkpoint
from mlembed.runtime.distributed import World
from mlembed.runtime.log import Log
from mlembed.training import lora, resume
from mlembed.training.arguments import parse
from mlembed.training.setup import set_up
from train import one_step

TEXTS = ["one cats of 3", "4 : two dogs", "Wednesday, May 4, 2050", "a"]
BATCH = pack([np.arange(1, 6), np.arange(40, 43), np.array([7])])
BERT = {"style": "bert", "causal": False, "num_key_value_heads": 2, "pooling": "cls"}
# Runs: the shape of their source, and their options.
RUNS = {
    "nested": ({}, ["--lora.rank", 4, "--model.ranks", 8, 16]),
    "bert": (
        BERT,
        [
            "--lora.rank",
            3,
            "--lora.alpha",
            3,
            "--lora.targets",
            "q_proj",
            "down_proj",
            "--model.ranks",
        ],
    ),
}
STEPS = 4
# Dropout, gradients by the cache, and recomputed layers, all of which draw or run again.
OPTIONS = ["--model.dropout", 0.1, "--gradient-cache", "--activation-gib", 1e-6]
OPTIONS += ["--activation-checkpointing", "block"]


def adapted(style="qwen3", seed=0, rank=3, **changes):
    """Return a model whose adapters are not zero, and the model before it was adapted."""
    before = random_model(odd_shape(style, **changes))
    model = random_model(odd_shape(style, **changes))
    cfg = config.Lora(rank=rank, alpha=5)
    lora.attach(model, cfg, seed)
    return model, before, cfg


# ---- the model ----


@pytest.mark.parametrize("style", ["qwen3", "bert"])
def test_new_adapters_change_nothing(style):
    ranks = () if style == "bert" else (3, 11)
    model, before, _ = adapted(style, ranks=ranks, exits=(1, 3))
    torch.testing.assert_close(model(BATCH), before(BATCH), rtol=0, atol=2e-6)
    named = dict(model.named_parameters())
    for name, weight in pretrained.merged(named, 0.0).items():
        assert torch.equal(weight, before.get_parameter(name)), name
    trained = {name for name, p in named.items() if p.requires_grad}
    vocabulary = {"embed_tokens.U", "embed_tokens.W"} if ranks else set()
    assert trained == vocabulary | {name for name in named if ".lora_" in name}
    linear = sum(type(module) is nn.Linear for module in before.modules())
    assert len(trained) == 2 * linear + len(vocabulary)
    again = adapted(style, ranks=ranks)[0].state_dict()
    other = adapted(style, ranks=ranks, seed=1)[0].state_dict()
    for name in trained - vocabulary:
        assert torch.equal(again[name], named[name])
        assert torch.equal(other[name], named[name]) == ("lora_B" in name)


@pytest.mark.parametrize("style", ["qwen3", "bert"])
def test_merged_weights_are_the_adapted_model(style):
    model, before, cfg = adapted(style, exits=(1, 2, 3))
    randomise(model)
    weights = pretrained.merged(model.state_dict(), cfg.scale)
    merged = Transformer(model.cfg).eval()
    merged.load_state_dict(weights)
    torch.testing.assert_close(merged(BATCH), model(BATCH), rtol=1e-5, atol=1e-5)
    assert (merged(BATCH) - before(BATCH)).abs().max() > 0.1


def test_targets_are_ends_of_names():
    model = random_model(odd_shape())
    lora.attach(model, config.Lora(rank=2, targets=("v_proj", "layers.1.mlp.up_proj")), 0)
    found = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "_A." in name}
    assert found == {*(f"layers.{i}.self_attn.v_proj" for i in range(3)), "layers.1.mlp.up_proj"}


@pytest.mark.parametrize("target", ["q_prj", "proj", "pooler", "embed_tokens", "norm"])
def test_target_without_a_layer(target):
    model = random_model(odd_shape("bert"))
    message = (
        "lora.targets: expected names of linear layers (down_proj, k_proj, o_proj, q_proj, "
        f"up_proj, v_proj), got '{target}', which matches none"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.attach(model, config.Lora(rank=2, targets=("q_proj", target)), 0)
    assert all(p.requires_grad for p in model.parameters())


def test_peft_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora.rank: expected the package peft \(pip install"):
        lora.attach(random_model(odd_shape()), config.Lora(rank=2), 0)


def test_configuration():
    assert (config.Lora(rank=8).alpha, config.Lora(rank=8).scale, config.Lora().scale) == (16, 2, 0)
    with pytest.raises(ValueError, match=r"lora.rank: expected 1 or more with lora.alpha or"):
        config.Lora(targets=("q_proj",))
    with pytest.raises(ValueError, match=r"init: expected a checkpoint to adapt with lora.rank"):
        config.Run(lora=config.Lora(rank=8))


# ---- one step ----


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Directories that a run starts from, by the run's name, and text."""
    home = tmp_path_factory.mktemp("sources")
    for name, (shape, _) in RUNS.items():
        export(tiny_encoder(exits=(1, 2), **shape), home / name)
    small_text(home)
    return home


def gradients(sources, folder, *options, ranks=()):
    """Return the gradients of one step, and the run's parts."""
    args = ["tiny", "--init", sources / "nested", "--data", sources / "pairs.jsonl"]
    args += ["--lora.rank", 4, "--optim.lr", 1e-4, "--batch-size", 8, "--model.ranks", *ranks]
    args += ["--precision", "fp32", "--pack-tokens", 23, "--tracker", "none", *options]
    run = replace(parse([str(arg) for arg in args]), eval=())
    folder.mkdir(exist_ok=True)
    where = World(0, 1, torch.device("cpu"))
    job, found = set_up(run, where, folder, None, Log(folder, True)), {}

    def read(optimizer, *_):
        found.update(
            {n: p.grad.clone() for n, p in job.model.named_parameters() if p.requires_grad}
        )

    with torch.no_grad():
        randomise_adapters(job.model)
    job.optimizer.register_step_pre_hook(read)
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    one_step(job, 0, iter([job.batches[0]]))
    job.saver.close()
    for name, p in job.model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    return found, job


def randomise_adapters(model):
    """Give B numbers, as a gradient to A is zero while B is."""
    for name, weight in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        ["--gradient-cache", "--activation-gib", 1e-7],
        ["--gradient-cache", "--activation-checkpointing", "block", "--activation-gib", 1],
        ["--activation-checkpointing", "selective", "--activation-gib", 1e-4],
    ],
    ids=["gradient cache", "block", "selective"],
)
def test_gradients_of_less_memory(sources, tmp_path, options):
    want, _ = gradients(sources, tmp_path / "one")
    got, _ = gradients(sources, tmp_path / "two", *options)
    assert got.keys() == want.keys() and len(want) == 28
    for name, gradient in want.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, (name, error)


def test_frozen_bf16_weights_and_fp32_adapters(sources, tmp_path):
    options = ["--optim.weights", "bf16", "--precision", "auto"]
    _, job = gradients(sources, tmp_path / "run", *options, ranks=(16,))
    kinds = {
        (".lora_" in name, p.requires_grad, p.ndim > 1, p.dtype)
        for name, p in job.model.named_parameters()
    }
    half, full = torch.bfloat16, torch.float32
    assert kinds == {
        (True, True, True, full), (False, True, True, half),
        (False, False, True, half), (False, False, False, full),
    }  # fmt: skip
    whole = job.engine.full_model()
    assert not any(".lora_" in name for name, _ in whole.named_parameters())
    assert whole.layers[0].mlp.up_proj.weight.dtype == full


# ---- a run ----


@pytest.fixture(scope="module", params=list(RUNS))
def run(request, sources):
    """Return a finished run, its arguments and its output."""
    _, options = RUNS[request.param]
    args = ["tiny", "--init", sources / request.param, "--data", sources / "pairs.jsonl"]
    args += [
        "--eval",
        "--tracker",
        "none",
        "--precision",
        "fp32",
        "--steps",
        STEPS,
        "--log-every",
        1,
    ]
    args += ["--batch-size", 8, "--save-every", 2, "--optim.lr", 1e-2, *options, *OPTIONS]
    args += ["--output-dir", sources, "--name", f"run-{request.param}"]
    done = processes.run("train.py", *args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return sources / f"run-{request.param}", args, done.stdout


def saved(path):
    return path / "checkpoints" / f"step_{STEPS:08d}"


def test_frozen_weights_keep_every_bit(run):
    directory, _, _ = run
    cfg = config.load(directory / "config.json")
    source = pretrained.load(cfg.init, cfg.model).state_dict()
    stored = checkpoint.read(saved(directory), "model.")
    frozen = {n: w for n, w in stored.items() if not re.search(r"lora_|embed_tokens\.[UW]", n)}
    assert len(frozen) == len(source) - 2 * bool(cfg.model.ranks)
    for name, weight in frozen.items():
        plain = name.removeprefix("model.").replace(".base_layer", "")
        assert torch.equal(weight, source[plain]), name
    for name in ("U", "W") if cfg.model.ranks else ():
        assert not torch.equal(stored[f"model.embed_tokens.{name}"], source[f"embed_tokens.{name}"])
    assert all(w.abs().max() > 0 for n, w in stored.items() if "lora_B" in n)


def test_exports_are_the_adapted_model(run):
    """At every exit: the directory model/, and the checkpoint, whose readers merge it."""
    directory, _, _ = run
    cfg = config.load(directory / "config.json")
    model = pretrained.load(cfg.init, cfg.model)
    lora.attach(model, cfg.lora, 1)
    stored = checkpoint.read(saved(directory), "model.")
    model.load_state_dict({name.removeprefix("model."): w for name, w in stored.items()})
    merged = Encoder.load(str(directory), "cpu")
    want = replace(merged, model=model.eval()).encode_exits(TEXTS)
    before = Encoder.load(cfg.init, "cpu").encode_exits(TEXTS, exits=cfg.model.exits)
    assert want.shape[0] == 2 and (want - before).abs().max() > 1e-2
    for place in (directory, saved(directory)):
        got = Encoder.load(str(place), "cpu").encode_exits(TEXTS)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_resumed_bit_for_bit(run, tmp_path):
    directory, args, _ = run
    copy = shutil.copytree(directory, tmp_path / directory.name)
    for name in ("model", "adapter", "report", f"checkpoints/step_{STEPS:08d}"):
        shutil.rmtree(copy / name, ignore_errors=True)
    args = [*args[: args.index("--output-dir")], "--output-dir", tmp_path, "--name", copy.name]
    args += ["--resume", "--allow-changed", "output_dir"]
    done = processes.run("train.py", *args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert loss_trace(copy) == loss_trace(directory) and len(loss_trace(copy)) == STEPS
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (copy / file).read_bytes() == (directory / file).read_bytes()


def test_other_adapters_do_not_resume(run):
    _, args, _ = run
    args = [str(arg) for arg in [*args, "--resume", "--lora.rank", 5, "--steps", STEPS + 1]]
    where = World(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"other values for .*lora.rank.*; another --name begins"):
        resume.find_run(parse(args), where, print)
    with pytest.raises(ValueError, match=r"allow_changed: expected no key of the model, its adapt"):
        parse([*args, "--allow-changed", "lora.rank"])


def test_checkpoint_needs_rank_and_alpha(run, tmp_path):
    copy = shutil.copytree(saved(run[0]), tmp_path / "step")
    path = copy / pretrained.ADAPTERS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank": 0}))
    with pytest.raises(ValueError, match=r"adapters.json: rank: expected 1 or more, got 0"):
        pretrained.read_weights(copy)
    path.unlink()
    with pytest.raises(ValueError, match=r"adapters.json: "):
        pretrained.read_weights(copy)


# ---- other libraries ----


def test_adapter_opens_in_libraries(run):
    """On the original model: sentence-transformers in two ways, and peft on transformers."""
    directory, _, out = run
    cfg = config.load(directory / "config.json")
    want = SentenceTransformer(str(directory / "model"), device="cpu").encode(TEXTS)
    opened = SentenceTransformer(str(directory / "adapter"), device="cpu")
    np.testing.assert_allclose(opened.encode(TEXTS), want, rtol=0, atol=1e-5)
    base = SentenceTransformer(cfg.init, device="cpu")
    assert np.abs(base.encode(TEXTS) - want).max() > 1e-3
    base.load_adapter(str(directory / "adapter"))
    np.testing.assert_allclose(base.encode(TEXTS), want, rtol=0, atol=1e-5)
    alone = AutoModel.from_pretrained(cfg.init).eval()
    adapted = PeftModel.from_pretrained(alone, str(directory / "adapter")).eval()
    ids = {"input_ids": torch.arange(3, 12)[None]}
    merged = AutoModel.from_pretrained(directory / "model").eval()
    with torch.inference_mode():
        torch.testing.assert_close(
            adapted(**ids).last_hidden_state, merged(**ids).last_hidden_state, rtol=0, atol=1e-5
        )
    assert f"adapter {directory}/adapter: opens in peft and sentence-transformers, on" in out


def test_adapter_holds_the_adapters_alone(run):
    directory, _, _ = run
    cfg = config.load(directory / "config.json")
    tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
    adapters = [name for name in tensors if re.search(r"\.lora_[AB]\.weight$", name)]
    table = {"base_model.model.embed_tokens.weight"} if cfg.model.ranks else set()
    assert {*tensors} - {*adapters} == table and len(adapters) == (28 if table else 8)


def test_model_card_and_log(run):
    directory, _, out = run
    card = (directory / "model" / "README.md").read_text()
    if "nested" in directory.name:
        assert "(LoRA) of rank 4 and alpha 8 on all linear layers, and the factors of the" in card
        assert "rank 4, alpha 8, 14 layers; the vocabulary's factors are trained, too" in out
        assert "rate   optim.lr 0.01 is high" in out
    else:
        assert "(LoRA) of rank 3 and alpha 3 on q_proj, down_proj. They are merged" in card
        assert "M trained: rank 3, alpha 3, 4 layers; all else frozen" in out
        assert "rate   " not in out


def test_adapters_of_a_checkpoint(run, sources):
    """transformers cannot open a training checkpoint, so that adapter/ would be of no use."""
    assert lora.of_checkpoint(str(saved(run[0]))) and not lora.of_checkpoint(str(run[0]))
    assert not lora.of_checkpoint("some/model-of-the-hub")
    shape = hf_config.from_checkpoint(saved(run[0]), config.Model())
    assert pretrained.load(str(saved(run[0])), shape).cfg.exits == (1, 2)
