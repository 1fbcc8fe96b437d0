"""Merging against plain loops over whole tables, which the code never builds."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import assert_same_model, odd_shape, random_model, write_encoder
from transformer_truth import read_by_transformers

from mlembed.cli.merge import main, shares
from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained
from mlembed.modeling.merge import merge
from mlembed.modeling.transformer import Transformer
from mlembed.modeling.vocabulary import Tables, coefficients
from mlembed.runtime import checkpoint

SIZES = {"num_hidden_layers": 2, "exits": (1, 2), "matryoshka_dims": (5, 12, 24)}
CFG = odd_shape(**SIZES)
NESTED = replace(CFG, ranks=(1, 3, 7))
BERT = odd_shape("bert", num_hidden_layers=2, ranks=(3, 7))
SHAPES = pytest.mark.parametrize("cfg", [CFG, NESTED, BERT], ids=["table", "factors", "bert"])


def state(model) -> dict[str, np.ndarray]:
    """Return weights in float64, a nested vocabulary as its table."""
    weights = {name: x.detach().double().numpy() for name, x in model.state_dict().items()}
    if "embed_tokens.U" in weights:
        U, W = weights.pop("embed_tokens.U"), weights.pop("embed_tokens.W")
        weights["embed_tokens.weight"] = U @ W
    return weights


def low_rank(table: np.ndarray, rank: int) -> np.ndarray:
    """Return the best approximation, by LAPACK's SVD of the whole table."""
    X, S, Y = np.linalg.svd(table, full_matrices=False)
    return X[:, :rank] * S[:rank] @ Y[:rank]


def close(got: np.ndarray, want: np.ndarray, name: str = "") -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max(), err_msg=name)


def agrees(merged: Transformer, want: dict[str, np.ndarray]) -> None:
    got = state(merged)
    assert got.keys() == want.keys()
    for name, x in want.items():
        if name == "embed_tokens.weight" and merged.cfg.ranks:
            x = low_rank(x, merged.cfg.ranks[-1])
        close(got[name], x, name)


# ---- soups ----


@SHAPES
@pytest.mark.parametrize("method", ["soup", "slerp"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_merge_of_equal_models_is_that_model(cfg, method, count):
    model = random_model(cfg)
    merged, fits = merge([model] * count, [2.0] * count, method)
    assert_same_model(merged, model)
    assert [fit.rank for fit in fits] == list(cfg.ranks)
    assert all(fit.rank_error < 1e-6 for fit in fits) and (not fits or fits[-1].table_error < 1e-6)


@SHAPES
@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1), (3, 1), (0.2, 0.5, 0.1), (0, 1, 1), (1, 0)])
def test_soup_is_the_weighted_mean(cfg, weights):
    models = [random_model(cfg, seed) for seed in range(len(weights))]
    merged, _ = merge(iter(models), weights)
    states = [state(model) for model in models]
    for name, x in states[0].items():
        x *= weights[0]
        for other, weight in zip(states[1:], weights[1:], strict=True):
            x += weight * other[name]
        x /= sum(weights)
    agrees(merged, states[0])


def test_models_stay_as_they_are():
    models = [random_model(NESTED, seed) for seed in range(2)]
    merge(models, [1, 1])
    for seed, model in enumerate(models):
        assert_same_model(model, random_model(NESTED, seed))


# ---- slerp ----


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Rotate a to b in the plane of both, with lengths from the two sides of the triangle."""
    cosine = (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())
    angle = math.atan2(math.sqrt(1 - cosine * cosine), cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@SHAPES
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_of_two(cfg, t):
    one, other = random_model(cfg, 0), random_model(cfg, 1)
    merged, _ = merge([one, other], [1 - t, t], "slerp")
    a, b = state(one), state(other)
    agrees(merged, {name: slerp(a[name], b[name], t) for name in a})
    if t in (0.0, 1.0):  # factors too, to the bit
        assert_same_model(merged, other if t else one)


@SHAPES
def test_slerp_of_several_is_a_chain(cfg):
    """The intermediate tables of a nested vocabulary have full rank: only the last is cut."""
    models = [random_model(cfg, seed) for seed in range(4)]
    weights = (1, 3, 0.5, 2)
    merged, _ = merge(models, weights, "slerp")
    want = state(models[0])
    for i in range(1, 4):
        t = weights[i] / sum(weights[: i + 1])
        new = state(models[i])
        want = {name: slerp(want[name], new[name], t) for name in want}
    agrees(merged, want)


@pytest.mark.parametrize(
    ("inner", "m", "x"),
    [(1.0, 1.0, 1.0), (-6.0, 2.0, 3.0), (0.0, 0.0, 2.0), (1 - 1e-14, 1.0, 1.0), (6.0000001, 2, 3)],
    ids=["parallel", "opposite", "zero", "nearly", "rounded"],
)
def test_slerp_of_parallel_vectors_is_linear(inner, m, x):
    assert coefficients(inner, m, x, 0.25, "slerp") == (0.75, 0.25)


def test_slerp_is_continuous_at_the_linear_limit():
    angle = 2e-6
    a, b = coefficients(math.cos(angle), 1.0, 1.0, 0.25, "slerp")
    assert (a, b) != (0.75, 0.25)
    np.testing.assert_allclose([a, b], [0.75, 0.25], rtol=0, atol=1e-9)


# ---- a nested vocabulary ----


@pytest.mark.parametrize("count", [2, 3, 5])  # 5 x 7 > 24: more directions than the width has
def test_each_rank_is_the_best_of_the_merged_table(count):
    """Errors agree with whole tables. The best for the merged table is not nearest to the merge of
    the rank's own tables, but no matrix of rank R is that for all ranks.
    """
    models = [random_model(NESTED, seed) for seed in range(count)]
    merged, fits = merge(models, [1] * count)
    U, W = (merged.state_dict()[f"embed_tokens.{name}"].double().numpy() for name in "UW")
    parts = [
        tuple(m.state_dict()[f"embed_tokens.{name}"].double().numpy() for name in "UW")
        for m in models
    ]
    table = sum(u @ w for u, w in parts) / count
    np.testing.assert_allclose(W @ W.T, np.eye(7), rtol=0, atol=1e-5)
    assert all(w[np.abs(w).argmax()] > 0 for w in W)
    for fit, rank in zip(fits, (1, 3, 7), strict=True):
        stored = U[:, :rank] @ W[:rank]
        close(stored, low_rank(table, rank))
        by_rank = sum(u[:, :rank] @ w[:rank] for u, w in parts) / count
        assert fit.rank == rank
        for got, want in ((fit.table_error, table), (fit.rank_error, by_rank)):
            error = np.linalg.norm(stored - want) / np.linalg.norm(want)
            np.testing.assert_allclose(got, error, rtol=1e-5)
        # Nearer to the merged table than the best of this rank for the merge of the rank's tables.
        cut = low_rank(by_rank, rank)
        assert np.linalg.norm(stored - table) <= np.linalg.norm(cut - table) + 1e-9
        assert np.linalg.norm(cut - by_rank) <= np.linalg.norm(stored - by_rank) + 1e-9
    assert fits[0].table_error > fits[1].table_error > fits[2].table_error > 0.1
    assert fits[0].rank_error > 0.1


def test_models_with_one_basis_merge_rank_by_rank():
    """If all have the same W, rank r is the merge of the tables of rank r."""
    models = [random_model(NESTED, seed) for seed in range(3)]
    with torch.no_grad():
        for model in models[1:]:
            model.embed_tokens.W.copy_(models[0].embed_tokens.W)
    merged, fits = merge(models, [1, 2, 1])
    assert torch.equal(merged.embed_tokens.W, models[0].embed_tokens.W)
    for rank in range(1, 8):
        got, a, b, c = (m.embed_tokens.table(rank).detach().numpy() for m in (merged, *models))
        close(got, (a + 2 * b + c) / 4)
    assert all(fit.rank_error < 1e-6 for fit in fits)
    assert fits[0].table_error > 0.1


def test_inner_products_table_errors_in_chunks(monkeypatch):
    monkeypatch.setattr("mlembed.modeling.vocabulary.ROWS", 13)
    models = [random_model(NESTED, seed) for seed in range(3)]
    tables = Tables()
    for t, model in zip((1.0, 0.4, 0.3), models, strict=True):
        e = model.embed_tokens
        tables.add(e.U.detach(), e.W.detach(), t, "slerp")
    want = state(models[0])["embed_tokens.weight"]
    for t, model in zip((0.4, 0.3), models[1:], strict=True):
        want = slerp(want, state(model)["embed_tokens.weight"], t)
    U, W = tables.factors(7)
    close((U.double() @ W.double()).numpy(), low_rank(want, 7))
    error = np.linalg.norm(low_rank(want, 7) - want) / np.linalg.norm(want)
    np.testing.assert_allclose(tables.fit(U, W, 7).table_error, error, rtol=1e-5)


# ---- errors ----


@pytest.mark.parametrize("weights", [(), (0, 0), (1, -1), (1, math.nan), (1, math.inf)])
def test_weights_that_are_not_shares(weights):
    models = [random_model(CFG, seed) for seed in range(len(weights))]
    with pytest.raises(ValueError, match="weights: expected numbers of 0 or more, one above 0"):
        merge(models, weights)


def test_models_of_other_exits():
    """Exits and the last layers that they share are those of the first model."""
    cfg = replace(CFG, exits=(2,), last_layers=1)
    merged, _ = merge([random_model(cfg), random_model(CFG, 1)], [1.0, 0.0])
    assert_same_model(merged, random_model(cfg))


def test_error_names_the_keys_that_differ():
    other = random_model(replace(CFG, intermediate_size=38, causal=False))
    with pytest.raises(ValueError, match="intermediate_size 37 and 38; model.causal True and"):
        merge([random_model(CFG), other], [1, 1])
    merged, _ = merge([random_model(CFG), random_model(replace(CFG, dropout=0.1))], [1, 1])
    assert merged.cfg == CFG  # weights do not depend on dropout


def test_shares_of_the_command():
    assert shares("soup", 3, (), None) == [1, 1, 1]
    assert shares("soup", 2, (1, 3), None) == [1, 3]
    assert shares("slerp", 2, (), None) == [1, 1]
    assert shares("slerp", 2, (), 0.25) == [0.75, 0.25]
    assert shares("slerp", 3, (1, 2, 3), None) == [1, 2, 3]
    for args, reason in {
        ("soup", 3, (1, 1), None): "weights: expected one for each of 3 models, got 2",
        ("soup", 2, (), 0.5): "t: expected only with slerp of two",
        ("slerp", 3, (), 0.5): "t: expected only with slerp of two.* got slerp of 3",
        ("slerp", 2, (1, 1), 0.5): "without weights.* with weights",
        ("slerp", 2, (), 1.5): "t: expected 0..1, got 1.5",
    }.items():
        with pytest.raises(ValueError, match=reason):
            shares(*args)


# ---- the command ----


TEXTS = ["Wednesday, May 4, 2050", "mercredi 4 mai 2050", "один два три четыре пять", "a b c d"]


@pytest.fixture(scope="module")
def tokens():
    return tokenizer.train(TEXTS * 2, 290)


def write_model(directory, cfg, tokens, seed=0, length=24) -> str:
    model = random_model(replace(cfg, vocab_size=tokens.get_vocab_size()), seed)
    return str(write_encoder(Encoder(model, tokens, length), directory))


@SHAPES
def test_command_writes_what_others_read(cfg, tokens, tmp_path, capsys):
    paths = [
        write_model(tmp_path / name, cfg, tokens, seed, length)
        for seed, (name, length) in enumerate([("a", 24), ("b", 20), ("c", 30)])
    ]
    out = tmp_path / "deep" / "out"
    main(out, tuple(paths), method="slerp", weights=(2, 1, 1))
    printed = capsys.readouterr().out
    assert "slerp of 3 models, weights 0.5 0.25 0.25" in printed
    assert len(re.findall(r"rank \d+: [\d.]+% from the merged table", printed)) == len(cfg.ranks)
    merged = Encoder.load(str(out), "cpu")
    assert merged.max_length == 20
    want, _ = merge([pretrained.load(path) for path in paths], (2, 1, 1), "slerp")
    assert_same_model(merged.model, want)
    theirs = read_by_transformers(out, TEXTS, cfg.pooling)
    np.testing.assert_allclose(theirs, merged.encode(TEXTS), rtol=0, atol=1e-5)


def test_runs_and_training_checkpoints(tokens, tmp_path):
    """Merge a run's last checkpoints, which a shell's `step_*` lists, and its finished model."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    cfg = replace(NESTED, vocab_size=tokens.get_vocab_size())

    def write_shape(path):
        pretrained.describe(cfg, path)
        tokenizer.save(tokens, path, 24)

    models = [random_model(cfg, seed) for seed in range(3)]
    for step, model in enumerate(models[:2], 1):
        optimizer = torch.optim.AdamW(model.parameters())
        with checkpoint.Saver(run / "checkpoints", 0, 1, keep=2) as saver:
            saver.save(step, checkpoint.training_tensors(model, optimizer, 0), write_shape)
    write_model(run / "model", NESTED, tokens, 2)
    (run / "metrics.jsonl").write_text("")
    steps = tuple(map(str, sorted((run / "checkpoints").glob("step_*"))))
    assert len(steps) == 2
    main(tmp_path / "out", (*steps, str(run)))
    want, _ = merge(models, [1, 1, 1])
    assert_same_model(pretrained.load(str(tmp_path / "out")), want)


def test_errors_write_nothing(tokens, tmp_path):
    other = tokenizer.train([*TEXTS, "something else altogether, else something"] * 2, 290)
    a = write_model(tmp_path / "a", CFG, tokens)
    b = write_model(tmp_path / "b", replace(CFG, causal=False), tokens)
    c = write_model(tmp_path / "c", CFG, other)
    with pytest.raises(ValueError, match="same tokenizer, got another model in .*c than in .*a"):
        main(tmp_path / "out", (a, c))
    with pytest.raises(ValueError, match="models: expected two or more, got 1"):
        main(tmp_path / "out", (a,))
    with pytest.raises(ValueError, match="got model.causal True and False in .*a and .*b"):
        main(tmp_path / "out", (a, b))
    with pytest.raises(ValueError, match="out: expected a new directory, got .*a, which exists"):
        main(tmp_path / "a", (a, a))
    with pytest.raises(ValueError, match="nowhere"):
        main(tmp_path / "out", (a, str(tmp_path / "nowhere")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert json.loads((tmp_path / "a" / "mlembed_config.json").read_text())
