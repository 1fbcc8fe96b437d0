"""Distillation of hidden states against autograd of its formula, with every engine, on one process
and on two, and which teachers it takes.
"""

import re
from dataclasses import replace

import pytest
import torch
from factories import small_job, small_text, tiny_encoder, tiny_tokenizer, write_encoder
from processes import gloo_once

from mlembed.config import Distill
from mlembed.data.packing import pack
from mlembed.runtime.distributed import World
from mlembed.training import gradcache
from mlembed.training.objective.loss import weights
from mlembed.training.step import total_loss
from train import one_step

ALONE = World(0, 1, torch.device("cpu"))
SHAPE = {
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "exits": (2, 4),
}
OPTIONS = ["--distill.contrastive", "0", "--distill.logits", "1", "--distill.exits", "all"]
OPTIONS += [
    "--optim.max-grad-norm",
    "1e9",
    "--steps",
    "4",
    "--pack-tokens",
    "23",
    "--optim.lr",
    "1e-5",
]
OPTIONS += ["--model.vocab-size", "300", "--model.num-hidden-layers", "4"]
OPTIONS += ["--model.exits", "2", "4"]
CASES = {
    "last layers": ["--model.last-layers", "1"],
    "all layers": ["--model.last-layers", "0"],
    "leaving": ["--model.last-layers", "1", "--depth.exits", "2", "4"],
}
WEIGHT = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with text, a student and a teacher of one shape and tokenizer."""
    folder = tmp_path_factory.mktemp("hidden")
    small_text(folder, ragged=True)
    tokens = tiny_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        write_encoder(tiny_encoder(tokens, 32, seed=seed, **SHAPE), folder / name)
    return folder


def job_of(folder, where, options, keep=None):
    cache = ["--gradient-cache"] if keep else []
    args = ["--init", folder / "student", "--distill.teacher", folder / "teacher"]
    args += ["--distill.hidden", WEIGHT, *OPTIONS, *options, *cache]
    job = small_job(folder, [str(folder / "pairs.jsonl")], *args, where=where)
    if keep == "none":
        job = replace(job, budget=1.0)
    if keep == "half":
        packs = job.batches[0].packs
        sizes = [gradcache.graph_bytes(job.cost, job.run.model, pack, 0) for pack in packs]
        job = replace(job, budget=sum(sizes) / 2)
    return job


def step(folder, where, options, keep=None):
    """Return the tables and gradients of the first step."""
    job, gradients = job_of(folder, where, options, keep), {}

    def read(optimizer, args, kwargs):
        for name, p in job.model.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            gradients[name] = grad.detach().clone()

    job.optimizer.register_step_pre_hook(read)
    result = one_step(job, 0, iter([job.batches[0]]))
    job.saver.close()
    return result.losses, gradients


def formula(folder, options):
    """Return the term of the first batch, text by text, and gradients of the loss by autograd."""
    job = job_of(folder, ALONE, options)
    run, model, batch = job.run, job.model.train(), job.batches[0]
    layer = 4 - run.model.last_layers
    outputs, ours, wanted = [], [], []
    trunk = job.teacher.model.trunk.model

    def kept(states):
        return layer, lambda x_TD: states.append(x_TD) or x_TD

    for packed in batch.packs:
        states = []
        outputs.append(model(packed, tap=kept(states)))
        # All texts of a pack may leave before the layer.
        for i, text in enumerate(split(packed.ids_T, packed)):
            here = split(states[0], packed) if states else []
            if i < len(here):
                with torch.no_grad():
                    trunk(pack([text.numpy()]), exits=[4], tap=kept(wanted))
                ours.append(here[i])
    parts = [
        ((h - t).square().sum(1) / t.square().sum(1)).mean()
        for h, t in zip(ours, wanted, strict=True)
    ]
    hidden = torch.stack(parts).mean()
    vectors = job.teacher.encode(batch.texts)
    terms = job.distiller.tables(
        torch.cat(outputs, dim=1), replace(batch, teacher_ND=vectors), run, ALONE
    )
    (total_loss(run, weights(run), terms) + WEIGHT * hidden).backward()
    job.saver.close()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters()}


def split(x, packed):
    """Return the rows of each text of a pack of which x has rows, in order."""
    bounds = packed.cu_seqlens.tolist()
    return [x[i:j] for i, j in zip(bounds, bounds[1:], strict=False) if j <= len(x)]


def assert_equal(losses, gradients, want):
    hidden, want_gradients = want
    assert hidden > 0.01
    torch.testing.assert_close(losses["hidden"][-1], hidden.expand(2), rtol=1e-5, atol=0)
    assert not losses["hidden"][:-1].any()
    for name, grad in want_gradients.items():
        most = 2e-5 * grad.abs().max().item() + 1e-8
        torch.testing.assert_close(gradients[name], grad, rtol=0, atol=most, msg=name)


@pytest.fixture(scope="module")
def wanted(folder):
    return {name: formula(folder, options) for name, options in CASES.items()}


@pytest.mark.parametrize("keep", [None, "none", "half", "all"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_autograd_of_the_formula(folder, wanted, name, keep):
    assert_equal(*step(folder, ALONE, CASES[name], keep), wanted[name])


def process(where, folder):
    cases = [(name, engine) for name in CASES for engine in ("ddp", "fsdp")]
    return {
        (name, engine): step(folder, where, [*CASES[name], "--engine", engine], "half")
        for name, engine in cases
    }


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(folder, wanted, name, engine):
    found = [results[name, engine] for results in gloo_once(2, process, folder)]
    mean = {"hidden": torch.stack([losses["hidden"] for losses, _ in found]).mean(0)}
    for _, gradients in found:
        assert_equal(mean, gradients, wanted[name])


def test_another_term_is_needed():
    with pytest.raises(ValueError, match=r"distill: expected weights of 0 or more, one above 0"):
        Distill(teacher="model", contrastive=0.0, hidden=1.0)


# ---- teachers ----


def test_a_teacher_of_another_width(folder):
    tokens = tiny_tokenizer()
    wide = tiny_encoder(tokens, **SHAPE, hidden_size=48, matryoshka_dims=(48,))
    write_encoder(wide, folder / "wide")
    with pytest.raises(ValueError, match=r"distill.hidden: .*, got .*wide with 4 qwen3 layers of "):
        job_of(folder, ALONE, ["--distill.teacher", folder / "wide"])


def test_a_teacher_with_another_tokenizer(folder):
    other = tiny_encoder(tiny_tokenizer(["zebra", "yak"]), **SHAPE)
    write_encoder(other, folder / "other")
    with pytest.raises(ValueError, match="with another tokenizer than the model"):
        job_of(folder, ALONE, ["--distill.teacher", folder / "other"])


@pytest.mark.parametrize(
    "more", [{"prompt": "query: "}, {"keep": True}, {"teacher": "", "embeddings": "vectors"}]
)
def test_options_that_exclude_it(more):
    with pytest.raises(ValueError, match=r"distill\.hidden: expected 0 with .*, got 1\.0"):
        Distill(**{"teacher": "model", "hidden": 1.0, "logits": 1.0, **more})


# ---- first layers, before training ----


def fitted(folder, where, *options):
    """Return the weights, by name, after the stage of first layers on a quarter of four steps."""
    job = job_of(folder, where, [*CASES["last layers"], "--distill.first-layers", "0.5", *options])
    job.saver.close()
    return {name: p.detach().clone() for name, p in job.model.named_parameters()}


def test_first_layers_learn_the_teachers_states(folder, capfd):
    before = fitted(folder, ALONE, "--distill.first-layers", "0")
    capfd.readouterr()
    options = "--steps", "60", "--optim.lr", "3e-3", "--optim.freeze-tokens"
    after = fitted(folder, ALONE, *options)
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {n for n in before if n.startswith(("layers.0.", "embed_tokens.W"))}
    (line,) = [x for x in capfd.readouterr().out.splitlines() if x.startswith("fit ")]
    errors = re.findall(r"([\d.]+) to ([\d.]+) at rank (\d+)", line)
    assert [rank for *_, rank in errors] == ["8", "16"]
    for first, last, _ in errors:
        assert float(last) < 0.8 * float(first)


def first_step(folder, where):
    return fitted(folder, where, "--steps", "2", "--optim.warmup-steps", "0")


def test_first_layers_of_two_processes_are_those_of_one(folder):
    want = first_step(folder, ALONE)
    for found in gloo_once(2, two_fits, folder):
        for name, p in want.items():
            torch.testing.assert_close(found[name], p, rtol=0, atol=1e-6, msg=name)


def two_fits(where, folder):
    return first_step(folder, where)


def test_first_layers_need_hidden_states():
    with pytest.raises(ValueError, match=r"distill.first_layers: expected 0 without .*, got 0.3"):
        Distill(teacher="model", logits=1.0, first_layers=0.3)


def test_first_layers_change_no_weights_below_adapters(folder):
    with pytest.raises(
        ValueError, match=r"distill.first_layers: expected 0 with lora.rank, .* 0.5"
    ):
        fitted(folder, ALONE, "--lora.rank", "2")


def test_first_layers_without_ranks_are_said_to_be_left_out(folder, capfd):
    before = fitted(folder, ALONE, "--distill.first-layers", "0", "--model.ranks")
    capfd.readouterr()
    after = fitted(folder, ALONE, "--model.ranks")
    assert all(torch.equal(p, before[name]) for name, p in after.items())
    assert (
        "fit    no first layers before training: the vocabulary has no ranks"
        in capfd.readouterr().out
    )
