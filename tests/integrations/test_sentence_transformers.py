"""The loss for SentenceTransformerTrainer next to sentence-transformers' own losses."""

import itertools
import re
import warnings
from functools import partial

import processes
import pytest
import torch
from datasets import Dataset
from sentence_models import ROWS, features, tiny_sentence_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard

from mlembed.integrations.sentence_transformers import CachedMatryoshka3dLoss, Matryoshka3dLoss

DIMS, EXITS = [32, 8, 16], [4, 1, 2]
LOSSES = {
    "plain": Matryoshka3dLoss,
    "cached": partial(CachedMatryoshka3dLoss, mini_batch_size=3),
}
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def step(model, loss, columns=None):
    """Return the loss, its cells, and the gradients of a step."""
    model.zero_grad()
    cells = loss(columns or features(model), None)
    total = sum(cells.values()) if isinstance(cells, dict) else cells
    total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()), cells, grads


def assert_same_step(one, other, tol=2e-5):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[2].keys() == other[2].keys() and one[2]
    for name, grad in one[2].items():
        torch.testing.assert_close(grad, other[2][name], rtol=tol, atol=tol, msg=name)


# ---- values ----


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "directions, mode",
    [
        (ALL[:1], "joint"),
        (ALL[:2], "joint"),
        (ALL[:2], "per_direction"),
        (ALL, "joint"),
    ],
)
def test_last_exit_equals_their_matryoshka_loss(folder, kind, directions, mode):
    model = tiny_sentence_model(folder / "bert")
    options = {"directions": directions, "partition_mode": mode, "scale": 14.0}
    weights = [1.0, 0.5, 2.0]
    theirs = MultipleNegativesRankingLoss(model, **options)
    theirs = step(model, MatryoshkaLoss(model, theirs, DIMS, weights))
    ours = LOSSES[kind](model, DIMS, matryoshka_weights=weights, **options)
    assert_same_step(step(model, ours), theirs)


@pytest.mark.parametrize("style, after", [("bert", True), ("qwen3", False), ("modernbert", False)])
def test_each_exit_is_the_loss_of_the_model_cut(folder, style, after):
    """Exits pass through what follows the pooling, here a matrix."""
    torch.manual_seed(0)
    dense = [Dense(32, 24)] * after
    model = tiny_sentence_model(folder / style, style, dense)
    dims = [24, 8]
    columns = features(model)
    with torch.no_grad():
        cells = Matryoshka3dLoss(model, dims, EXITS, exit_weights=[1, 2, 3])(columns)
    assert list(cells) == [f"exit{e}_dim{d}" for e, d in itertools.product((1, 2, 4), (8, 24))]
    for exit, weight in zip((4, 1, 2), (1, 2, 3), strict=True):
        cut = tiny_sentence_model(folder / f"{style}{exit}", style, dense, num_hidden_layers=exit)
        trunk, full = cut[0].auto_model, model[0].auto_model
        assert not trunk.load_state_dict(full.state_dict(), strict=False).missing_keys
        with torch.no_grad():
            expected = Matryoshka3dLoss(cut, dims)(columns)
        for dim, cell in expected.items():
            assert float(cells[f"exit{exit}_{dim}"]) == pytest.approx(weight * float(cell)), exit


@pytest.mark.parametrize("style", ["bert", "qwen3"])
def test_cached_equals_plain(folder, style):
    model = tiny_sentence_model(folder / style, style)
    steps = [step(model, make(model, DIMS, EXITS)) for make in LOSSES.values()]
    assert_same_step(*steps)
    plain, cached = ({k: float(x.detach()) for k, x in cells.items()} for _, cells, _ in steps)
    assert plain == pytest.approx(cached, rel=1e-5)
    with torch.no_grad():
        evaluated = LOSSES["cached"](model, DIMS, EXITS)(features(model))
    assert not any(cell.requires_grad for cell in evaluated.values())
    assert float(sum(evaluated.values())) == pytest.approx(steps[0][0], rel=1e-5)


def test_cached_draws_the_same_dropout_twice(folder):
    """Each column is one mini-batch, so that both losses draw masks in one order."""
    gradients = []
    for make in (Matryoshka3dLoss, partial(CachedMatryoshka3dLoss, mini_batch_size=99)):
        model = tiny_sentence_model(folder / "bert").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        torch.manual_seed(1)
        columns = features(model, {name: ROWS[name] for name in ("anchor", "positive")})
        gradients.append(step(model, make(model, DIMS, EXITS), columns))
    assert_same_step(*gradients)


# ---- the trainer ----


def train(folder, make, out, **options):
    """Train three steps; return the trainer."""
    model = tiny_sentence_model(folder / "bert")
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "optim": "sgd"}
    settings |= {"learning_rate": 0.1, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    settings |= {"disable_tqdm": True, "save_strategy": "no"}
    args = SentenceTransformerTrainingArguments(str(out), **settings | options)
    rows = Dataset.from_dict({name: texts * 3 for name, texts in ROWS.items()})
    loss = make(model, DIMS, EXITS)
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows.select(range(8)), loss=loss
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", LOSSES)
def test_the_trainer_logs_each_exit_and_prefix(folder, kind, tmp_path):
    trainer = train(folder, LOSSES[kind], tmp_path, learning_rate=0.02)
    names = [f"exit{e}_dim{d}" for e in (1, 2, 4) for d in (8, 16, 32)]
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 3
    for line in logs:
        assert sum(line[name] for name in names) == pytest.approx(line["loss"], abs=1e-3)
    assert logs[-1]["loss"] < logs[0]["loss"]
    scored = trainer.evaluate()
    assert scored["eval_loss"] > 0
    trainer.model.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert type(trainer.loss).__name__ in card and "zhang2026mlembed" in card
    assert '"matryoshka_dims": [' in card
    # Hooks stay silent in a model that is used.
    vectors = trainer.model.encode(["one two"], show_progress_bar=False)
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(["one two"])
    assert vectors.shape == (1, 32) and (abs(vectors - again) < 1e-6).all()


def test_trains_in_bf16(folder, tmp_path):
    half, full = (
        [x["loss"] for x in train(folder, Matryoshka3dLoss, tmp_path, bf16=b).state.log_history[:3]]
        for b in (True, False)
    )
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


def test_trains_adapters_of_peft(folder):
    import peft

    model = tiny_sentence_model(folder / "bert")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    plain, cached = (step(model, make(model, DIMS, EXITS)) for make in LOSSES.values())
    assert all("lora" in name for name in plain[2]) and len(plain[2]) == 8
    assert_same_step(plain, cached)


def test_compiles_once(folder):
    model = tiny_sentence_model(folder / "shallow", num_hidden_layers=2)
    loss = Matryoshka3dLoss(model, DIMS, [1, 2])
    eager = step(model, loss)
    counter = CompileCounter()
    loss.model = torch.compile(model, backend=counter)
    compiled = step(model, loss)
    assert_same_step(compiled, eager, tol=0)
    count = counter.frame_count
    assert count > 0
    step(model, loss)
    assert counter.frame_count == count


# ---- several processes ----


def train_with(where, folder, out, kind, options):
    """Train in this process, or in one of a gloo group; return weights and losses."""
    # accelerate still calls it by a name that torch 2.13 replaced.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    make = partial(LOSSES[kind], gather_across_devices=True, directions=options.pop("directions"))
    trainer = train(folder, make, out, **options)
    weights = {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}
    return weights, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "kind, directions", [("plain", ALL[:1]), ("cached", ALL[:1]), ("plain", ALL)]
)
def test_two_processes_equal_one(folder, tmp_path, kind, directions):
    options = {"directions": directions}
    alone, logs = train_with(
        None, folder, tmp_path, kind, options | {"per_device_train_batch_size": 8}
    )
    both = processes.gloo(2, train_with, folder, tmp_path, kind, options)
    for weights, _ in both:
        for name, x in alone.items():
            torch.testing.assert_close(weights[name], x, rtol=1e-4, atol=1e-5, msg=name)
    start = tiny_sentence_model(folder / "bert").state_dict()
    assert max(float((alone[name] - x).abs().max()) for name, x in start.items()) > 1e-2
    for line, other in zip(logs, both[0][1], strict=True):
        assert {k: v for k, v in line.items() if "dim" in k} == pytest.approx(
            {k: v for k, v in other.items() if "dim" in k}, rel=1e-3
        )


def sharded_step(where, folder, kind):
    """Return the loss and all gradients of a step of this process's rows, by FSDP2."""
    model = tiny_sentence_model(folder / "bert")
    loss = LOSSES[kind](model, DIMS, EXITS, gather_across_devices=True)
    for part in (*model[0].auto_model.encoder.layer, model):
        fully_shard(part)
    half = slice(where.rank * 4, where.rank * 4 + 4)
    rows = {name: texts[half] for name, texts in ROWS.items()}
    total, _, grads = step(model, loss, features(model, rows))
    return total, {}, {name: grad.full_tensor() for name, grad in grads.items()}


@pytest.mark.parametrize("kind", LOSSES)
def test_shards_of_two_processes_equal_one(folder, kind):
    model = tiny_sentence_model(folder / "bert")
    alone = step(model, Matryoshka3dLoss(model, DIMS, EXITS))
    both = processes.gloo(2, sharded_step, folder, kind)
    assert sum(total for total, *_ in both) / 2 == pytest.approx(alone[0], rel=1e-5)
    for _, _, grads in both:
        assert_same_step((0.0, {}, grads), (0.0, {}, alone[2]))


def passes_of_a_step(where, folder):
    """Return forward passes and gradients of steps under DDP: prompts, then columns that differ."""
    model = tiny_sentence_model(folder / "bert")
    loss = Matryoshka3dLoss(model, DIMS, EXITS, gather_across_devices=True)
    loss.model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    half = slice(where.rank * 4, where.rank * 4 + 4)
    columns = features(model, {name: texts[half] for name, texts in ROWS.items()})
    for length, column in enumerate(columns):
        column["prompt_length"] = length
    one = step(model, loss, columns)
    counts = [len(passes)]
    columns[0]["task"] = "query"
    several = step(model, loss, columns)
    return [*counts, len(passes) - 1], one[2], several[2]


def test_columns_share_a_pass_under_ddp(folder):
    model = tiny_sentence_model(folder / "bert")
    alone = step(model, Matryoshka3dLoss(model, DIMS, EXITS))
    for counts, *both in processes.gloo(2, passes_of_a_step, folder):
        assert counts == [1, 3]
        for grads in both:
            assert_same_step((0.0, {}, grads), (0.0, {}, alone[2]))


# ---- errors ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"matryoshka_dims": [8, 33]}, r"matryoshka_dims: expected widths in 1..32, got \[8, 33\]"),
        ({"matryoshka_dims": [8, 8]}, r"matryoshka_dims: expected different numbers, and a weight"),
        ({"exits": [1, 2]}, "exits: expected the last to be the depth, 4, got 2"),
        ({"exits": [0, 4]}, r"exits: expected rising numbers in 1..3 before the last layer"),
        ({"exits": [2, 4], "exit_weights": [1.0]}, "exits: expected different numbers, and"),
    ],
)
def test_wrong_arguments_are_errors(folder, options, message):
    model = tiny_sentence_model(folder / "bert")
    with pytest.raises(ValueError, match=message):
        Matryoshka3dLoss(model, **{"matryoshka_dims": [8]} | options)


def test_wrong_models_are_errors(folder):
    model = tiny_sentence_model(folder / "bert")
    loss = Matryoshka3dLoss(model, DIMS)
    with pytest.raises(ValueError, match="columns: expected an anchor and a positive, got 1"):
        loss(features(model)[:1])
    loss.model = nn.DataParallel(model)
    with pytest.raises(ValueError, match=r"model: expected one GPU a process \(torchrun\)"):
        loss(features(model))
    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=32)])
    with pytest.raises(ValueError, match="begins with a Transformer, got StaticEmbedding"):
        Matryoshka3dLoss(static, [8], [1])
    with pytest.raises(ValueError, match="mini-batches, got StaticEmbedding"):
        CachedMatryoshka3dLoss(static, [8])
    assert set(Matryoshka3dLoss(static, [8])(features(static))) == {"dim8"}


@pytest.mark.parametrize("module", ["sentence_transformers", "exits"])
def test_an_old_library_is_refused_at_import(module):
    library = {"exits": "transformers"}.get(module, module)
    code = f"import importlib, {library}; from mlembed.integrations import {module} as ours; "
    code += f"{library}.__version__ = '5.3.9'; importlib.reload(ours)"
    done = processes.run("-c", code)
    assert done.returncode == 1
    name = library.replace("_", "-")
    assert re.search(rf"ImportError: {name}: expected \d.\d or newer, got 5.3.9", done.stderr)
