"""The step's bench: the least work of a step, trainers that take the same step, its gate."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import __main__ as command
from bench import harness, report
from bench.harness import CPU
from bench.train_step import bench, cases, peers
from bench.train_step import gate as checked
from mlembed import config
from mlembed.modeling.blocks import Block, rope
from mlembed.training.objective.loss import weights

ROOT = Path(__file__).parents[2]
TOYS = {name: case.toy() for name, case in cases.CASES.items()}


@pytest.fixture
def eager(monkeypatch):
    """Compile no blocks, which takes most of the time."""
    monkeypatch.setattr(bench.Transformer, "compile_blocks", lambda self, *_, **options: None)


# ---- as a user runs it ----


@pytest.mark.slow
def test_smoke_runs_everything_without_numbers(smoke):
    result, printed = smoke("train_step", "--skip-tests", "--case", "step")
    rows = result["ran"]["step"]["fwd+bwd"]
    assert list(rows) == list(bench.CASES["step"].providers)
    absent = {name for name, status in rows.items() if status == "absent"}
    assert absent <= {"ours_liger", "sentence_transformers", "padded"}
    assert set(rows.values()) <= {"ran", "absent"} and rows["ours"] == "ran"
    assert "stages step: ran: ours by stage" in printed and "sweep" not in printed


def test_peers_packages_are_imported_on_demand():
    code = """
import sys
for name in ("babel", "tyro", "datasets", "liger_kernel", "transformers", "sentence_transformers"):
    sys.modules[name] = None
import torch, bench.train_step.bench as bench
case = bench.CASES["step"].toy()
inputs = case.inputs(torch.device("cpu"), 0)
step = bench.ours(case, inputs.device, True, compiled=False)
assert step(inputs, True) > 0
for name in ("padded", "sentence_transformers", "ours_liger"):
    try:
        bench.build(name, case, inputs, True)
    except (bench.peers.Missing, ImportError, ValueError) as error:
        print(name, type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 6


def test_peer_without_its_library_is_missing(monkeypatch):
    inputs = TOYS["step"].inputs(CPU, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("padded", "sentence_transformers", "ours_liger"):
        with pytest.raises(harness.Missing, match="is not installed"):
            bench.build(name, TOYS["step"], inputs, True)


def test_nothing_to_sweep(make_worker, monkeypatch, capsys):
    make_worker("train_step", smoke=True).sweep("step")
    assert capsys.readouterr().out == ""
    args = command.argparse.Namespace(sweep=True, case=[], out=None, smoke=False, part=None)
    run = command.Run("train_step", args, 1e9)
    monkeypatch.setattr(run, "check", lambda: setattr(run, "path", Path("x")))
    run.measure(["step"])
    assert "nothing to sweep" in capsys.readouterr().out and run.records == []


# ---- the batch ----


def test_batch_is_the_measured_one():
    case = cases.CASES["step"]
    n = cases.lengths(case)
    assert len(n) == 576 and sum(n) == cases.tokens(case) == 73_419
    assert sum(n[:64]) == 1442 and max(n) == 512 and min(n) >= 5
    padded = 576 * 512 / 73_419
    assert padded == pytest.approx(4.0, abs=0.05)  # in the measurements
    rows = cases.groups(case)
    assert sorted(sum(rows, [])) == list(range(576)) and rows[1] == [1, 65, *range(135, 142)]
    batch, packs = cases.Texts(case, CPU).packs(False)
    assert batch.tokens == 73_419 and [len(pack) for pack in packs] == [576]
    assert cases.tokens(cases.CASES["lealla"]) == 390_630


def test_depths_take_equal_shares_of_the_tokens():
    case = cases.CASES["step_skip"]
    assert (cases.depths(cases.CASES["step"]) == 28).all()
    left = [cases.running(case, depth).sum() / 73_419 for depth in (1, 7, 8, 15, 22, 28)]
    assert left == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0.25], abs=0.02)
    texts = cases.Texts(case, CPU)
    assert texts.packs(True)[1][0].plan_at(28).tokens == 73_419
    assert texts.packs(False)[1][0].plan_at(28).tokens < 73_419 / 2
    assert texts.packs(False) is texts.packs(False)


def test_packs_hold_the_texts():
    case = TOYS["step_skip"]
    texts = cases.Texts(case, CPU)
    batch, packs = texts.packs(False)
    rows = []
    for pack in packs:
        rows += [part.tolist() for part in pack.ids_T.split(pack.cu_seqlens.diff().tolist())]
    rows = [rows[at] for at in batch.place.tolist()]
    queries = [group[0] for group in cases.groups(case)]
    deepest = sorted(queries, key=lambda i: -cases.depths(case)[i])  # stable
    assert rows[: case.pairs] == [texts.rows[i].tolist() for i in deepest]
    assert sorted(map(tuple, rows)) == sorted(tuple(row.tolist()) for row in texts.rows)


# ---- the least work ----


def test_work_by_hand():
    case = cases.CASES["step"]
    plan = cases.stage_work(case)
    T, S = 73_419, 28 * 73_419
    matrices = 28 * (1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072)
    assert matrices == 440_401_920
    assert plan["products"][0] == case.flops("fwd+bwd") == 6 * matrices * T
    assert plan["products"][1] == 3 * 2 * S * (
        (1024 + 4096) + (2048 + 1024) + (1024 + 6144) + (3072 + 1024)  # ins and outs, one by one
    )
    pairs = sum(n * (n + 1) // 2 for n in cases.lengths(case)) * 28
    assert pairs == 7_531_750 * 28
    assert plan["attention"] == (3.5 * 4 * 16 * 128 * pairs, 2 * (5 * 16 + 6 * 8) * 128 * S)
    assert plan["point-wise"] == (0, 2 * S * (17 * 1024 + 5 * 24 * 128 + 8 * 3072))
    assert plan["optimiser"] == (0, 40 * (151_936 * 1024 + matrices + 28 * (2048 + 256) + 1024))
    assert plan["loss"] == (7 * 6 * 64 * 512 * 1024, 7 * 6 * (64 + 512) * 1024)
    n = len(set(np.concatenate(cases.Texts(case, CPU).rows).tolist()))
    assert plan["embedding"] == (0, 4 * 1024 * (n + T + 151_936))
    nested = cases.stage_work(cases.CASES["step_nested"])["embedding"]
    factors = 4 * 512 * (n + 1024), 4 * 512 * (151_936 + 1024)
    assert nested == (6 * n * 512 * 1024, 2 * factors[0] + 4 * T * 1024 + factors[1])
    floors = case.floors("fwd+bwd", 788, 4247)
    assert floors["products"] == pytest.approx(6 * matrices * T / 788e9)
    assert floors["attention"] == pytest.approx(plan["attention"][1] / 4247e6)  # bytes decide
    assert case.nbytes("fwd+bwd") == sum(size for _, size in plan.values())


def test_work_of_a_bert_by_hand():
    thin = cases.stage_work(cases.CASES["lealla"])
    S, D, I = 24 * 390_630, 128, 512
    matrices = 24 * (4 * D * D + 2 * D * I)
    ins_and_outs = (D + 3 * D) + (D + D) + (D + I) + (I + D)
    assert thin["products"] == (6 * matrices * 390_630, 3 * 2 * S * ins_and_outs)
    forward = (3 * D) + (3 * D) + (I + I)  # two norms with their sums, GELU
    backward = (4 * D) + (4 * D) + (2 * I + I)
    assert thin["point-wise"] == (0, 2 * S * (forward + backward))


def test_texts_that_left_do_not_count():
    case = cases.CASES["step_skip"]
    skip = cases.stage_work(case)
    full = cases.stage_work(replace(case, run=cases.CASES["step"].run))
    share = sum(cases.running(case, d).sum() for d in range(1, 29)) / 28 / 73_419
    assert share == pytest.approx(0.625, abs=0.01)
    for stage in ("products", "point-wise"):
        ratios = [a / b for a, b in zip(skip[stage], full[stage], strict=True) if b]
        assert ratios == pytest.approx([share] * len(ratios))
    assert skip["loss"][0] < full["loss"][0] and skip["optimiser"] == full["optimiser"]


def test_log_has_these_numbers(log_rows):
    table = log_rows("train_step: FLOPs and bytes", cases.CASES)
    assert len(table) == 6 * len(cases.CASES)
    for name, stage, *numbers in table:
        products, size = cases.stage_work(cases.CASES[name])[stage]
        floor = cases.CASES[name].floors("fwd+bwd", 788, 4247)[stage]
        wanted = [products / 1e12, size / 1e9, floor]
        assert list(map(float, numbers)) == pytest.approx(wanted, abs=0.0051), (name, stage)


def test_peak_splits_into_activations_and_the_rest():
    """The forward has no gradients, the backward at most all of them."""
    assert bench.parted(5, 100, 700, 650, 90) == (695, 600)
    assert bench.parted(0, 100, 300, 650, 90) == (650, 460)
    case, inputs = TOYS["step"], TOYS["step"].inputs(CPU, 0)
    step = bench.ours(case, CPU, True, compiled=False)
    got = bench.numbers(case, step, inputs, 2.0)
    assert got["tokens_s"] == cases.tokens(case) / 2e-3
    assert got["mfu"] == pytest.approx(case.flops("fwd+bwd") / 2e-3 / 989.5e12)
    assert got["peak_mib"] is got["activation_mib"] is None  # on a CPU


# ---- the same step ----


def two_steps(name, case, inputs):
    """Return the losses of two steps, and the model."""
    step, _ = bench.build(name, case, inputs, True)
    return step(inputs, True).item(), step(inputs, True).item(), step.model


def test_variants_of_ours_take_the_same_step():
    case = TOYS["step_skip"]
    case = replace(case, run=replace(case.run, optim=replace(case.run.optim, lr=1e-2)))
    inputs = case.inputs(CPU, 0)
    first, second, model = two_steps("ours", case, inputs)
    wanted = dict(model.named_parameters())
    assert second < first - 0.01 and all(p.grad is None for p in wanted.values())
    for name in ("ours_eager", "ours_block", "ours_selective"):
        *losses, other = two_steps(name, case, inputs)
        assert losses == pytest.approx([first, second], rel=1e-4), name
        for key, p in other.named_parameters():
            torch.testing.assert_close(p, wanted[key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
    half = two_steps("ours_bf16", case, inputs)
    assert half[0] == pytest.approx(first, rel=0.02)
    assert {p.dtype for p in half[2].parameters() if p.ndim > 1} == {torch.bfloat16}
    full, _, _ = two_steps("full_depth", case, inputs)
    assert abs(full - first) > 1e-3  # all groups at all exits


def test_selective_recomputes_some():
    inputs = TOYS["step"].inputs(CPU, 0)
    step = bench.ours(TOYS["step"], CPU, True, keep="selective", compiled=False)
    run, kept = step.loss.keywords["run"], step.loss.keywords["kept"]
    budget = run.activation_gib * 2**30
    assert 0 < bench.layers_to_recompute(run, kept, inputs.packs(False)[1], budget) < 7


@pytest.mark.parametrize("name", ["step", "step_nested", "lealla"])
def test_padded_takes_our_step(name):
    pytest.importorskip("transformers")
    case = TOYS[name]
    inputs = case.inputs(CPU, 0)
    first, second, model = two_steps("ours_eager", case, inputs)
    *losses, other = two_steps("padded", case, inputs)
    assert losses[0] == pytest.approx(first, rel=1e-5, abs=1e-4)
    if not case.run.model.ranks:  # else it trains a table instead of factors
        assert losses[1] == pytest.approx(second, rel=1e-5, abs=1e-4)
        mine, theirs = (m.layers[-1].mlp.down_proj.weight for m in (model, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert other.is_gradient_checkpointing and other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["step", "lealla"])
def test_sentence_transformers_has_our_loss_at_the_last_exit(name):
    pytest.importorskip("sentence_transformers")
    case = TOYS[name]
    inputs = case.inputs(CPU, 0)
    step, note = bench.build("sentence_transformers", case, inputs, True)
    run = replace(case.run, model=replace(case.run.model, exits=case.run.model.exits[-1:]))
    other = replace(case, run=run)
    wanted = bench.ours(other, CPU, True, compiled=False)(other.inputs(CPU, 0), False)
    torch.testing.assert_close(step(inputs, True).float(), wanted, rtol=1e-4, atol=1e-4)
    assert "last layer only" in note and ("plain table" in note) == bool(run.model.ranks)


def test_columns_align_documents_with_queries():
    case = TOYS["step"]
    inputs = case.inputs(CPU, 0)
    columns = peers.columns(case, inputs)
    assert len(columns) == 2 + case.negatives
    for i, rows in enumerate(cases.groups(case)):
        for column, row in zip(columns, rows, strict=True):
            ids = column["input_ids"][i][column["attention_mask"][i].bool()]
            assert ids.tolist() == inputs.rows[row].tolist()


def test_liger_halves_compute_a_block():
    """torch's functions stand in for Liger's, with Liger's arguments."""

    def rms_norm(x, weight, eps, offset, casting, in_place):
        assert (offset, casting, in_place) == (0.0, "llama", False) and x.is_contiguous()
        return F.rms_norm(x, weight.shape, weight, eps)

    def rotated(q, k, cos, sin):
        assert q.ndim == 4 and cos.shape == (1, q.shape[2], q.shape[3])
        half = q.shape[3] // 2
        both = ((x[0].transpose(0, 1), cos[0, :, :half], sin[0, :, half:]) for x in (q, k))
        return tuple(rope(*x).transpose(0, 1)[None] for x in both)

    model = bench.fresh(TOYS["step"].run.model, CPU)
    batch = TOYS["step"].inputs(CPU, 0).packs(False)[1][0]
    layer, cos_sin = model.layers[0], model.rotation(batch.pos_T)
    x_TD = torch.randn(len(batch.ids_T), model.cfg.hidden_size)
    before, after = peers.halves(rms_norm, rotated, lambda a, b: F.silu(a) * b)
    got, want = before(layer, x_TD, *cos_sin), Block.before(layer, x_TD, *cos_sin)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(after(layer, x_TD, got[0]), Block.after(layer, x_TD, want[0]))


# ---- right or not ----


@pytest.mark.parametrize("wrong", ["nothing", "loss", "gradient", "nan", "raises"])
def test_gate_fails(wrong, monkeypatch, eager, assert_verdicts):
    right = checked.loss_table

    def faulty(exits_END, *args):
        if wrong == "raises":
            raise RuntimeError("out of resources")
        if wrong == "gradient":
            exits_END = exits_END.detach() + 1.01 * (exits_END - exits_END.detach())
        return right(exits_END, *args) * {"loss": 1.01, "nan": torch.nan}.get(wrong, 1.0)

    monkeypatch.setattr(checked, "loss_table", faulty)
    verdicts = list(checked.gate(CPU, True))
    names = [c.name for c in checked.checks() if not c.liger]
    assert [v["check"] for v in verdicts] == names
    assert_verdicts(verdicts, len(names), wrong == "nothing")


def test_gate_sees_a_text_that_runs_too_deep(monkeypatch, eager):
    right = checked.collate
    deep = lambda g, t, i, depths, *rest, **more: right(g, t, i, depths * 0 + 4, *rest, **more)  # noqa: E731
    monkeypatch.setattr(checked, "collate", deep)
    assert {v["check"]: v["ok"] for v in checked.gate(CPU, True)} == {
        "whole": True,
        "skipping": False,
        "nested, skipping, recomputed": False,
        "thin, both directions": True,
    }


def test_dense_loss_and_the_range_of_a_first_loss():
    model = TOYS["step"].run.model
    run = config.Run(model=model, loss=config.Loss(matryoshka_weights="ml-embed"))
    x = torch.randn(len(model.exits), 8 * 4, model.hidden_size, dtype=torch.float64)
    got = peers.dense(x, 8, run)
    q, docs = (F.normalize(part[2, :, :8], dim=-1) for part in (x[:, :8], x[:, 8:]))
    logits = q @ docs.T / 0.05
    one = (logits.logsumexp(1) - logits.diagonal()).mean()
    other = (logits[:, :8].logsumexp(0) - logits.diagonal()).mean()
    torch.testing.assert_close(got[2, 0], (one + other) / 2)
    assert weights(run).sum() == pytest.approx(1.0)
    for value, ok in ((5.0, True), (-1.0, False), (60.0, False), (float("nan"), False)):
        spot = bench.spot(cases.CASES["step"], None, "fwd+bwd", torch.tensor(value))
        assert spot["ok"] == ok


# ---- targets and the table ----


def row(case, provider, ms, tokens_s=1e5, peak=1024.0, activation=100.0, **others):
    at = {"case": case, "provider": provider, "mode": "fwd+bwd", "ms": ms, "p20": ms, "p80": ms}
    numbers = {"tokens_s": tokens_s, "mfu": 0.4, "share": 0.5, "value": 5.0, "status": "ran"}
    return {**at, **numbers, "peak_mib": peak, "activation_mib": activation, **others}


def test_targets_met_missed_and_absent():
    assert bench.targets([]) == [] == bench.targets([row("step", "padded", 1.0)])
    assert bench.targets([row("step", "ours", 1.0, green=False)]) == []
    rows = [row("step", "ours", 450.0, 163e3, 79 * 1024, green=True)]
    rows += [row("step", "ours_selective", 500.0, 147e3, 81 * 1024, green=True)]
    rows += [row("step", "sentence_transformers", 5000.0)]
    got = {(t["target"], t["limit"]): (round(t["value"], 3), t["met"]) for t in bench.targets(rows)}
    assert got == {
        ("step, ours: real tokens/s", ">= 150000"): (163e3, True),
        ("step, ours: real tokens/s", "aim >= 190000"): (163e3, False),
        ("step, ours: peak, GiB", "< 80"): (79.0, True),
        ("step, ours_selective: real tokens/s", ">= 150000"): (147e3, False),
        ("step, ours_selective: real tokens/s", "aim >= 190000"): (147e3, False),
        ("step, ours_selective: peak, GiB", "< 80"): (81.0, False),
        ("step, ours: times sentence-transformers", ">= 11"): (11.111, True),
        ("step, ours_selective: times sentence-transformers", ">= 11"): (10.0, False),
    }
    skip = [row("step_skip", "ours", 68.0, activation=64.0), row("step_skip", "full_depth", 100.0)]
    assert [(t["value"], t["met"]) for t in bench.targets(skip)] == [
        *[(0.68, True), (0.68, False), (0.64, True), (0.64, True)]
    ]
    thin = [row("lealla", "ours", 100.0), row("lealla", "sentence_transformers", 400.0)]
    assert [(t["limit"], t["met"]) for t in bench.targets(thin)] == [
        *[(">= 3", True), ("aim >= 6", False)]
    ]


def test_table():
    rows = [row("step", "ours", 450.0, green=True), row("step", "padded", 4500.0, note="padded")]
    rows += [{"case": "step", "provider": "ours_liger", "mode": "fwd+bwd", "status": "absent"}]
    floors, how = {"products": 246.2}, (bench.BASELINES, bench.COLUMNS, bench.cells)
    printed = report.table(rows, "fwd+bwd", floors, *how)
    lines = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert " ".join(lines["ours"]) == (
        "ours 450.0 450.0..450.0 100000 40.0% 50.0% 1.0 0.1 - 10.00 - -"
    )
    assert lines["ours_liger"] == ["ours_liger", "absent"] and "padded: padded" in printed
    assert "products 246.20 ms" in printed


# ---- through the worker ----


@pytest.mark.slow
def test_times_become_rows_stages_and_targets(make_worker, records, monkeypatch, eager):
    few = {"step": ("ours", "ours_eager"), "step_skip": ("ours", "full_depth")}
    toys = {name: replace(TOYS[name], providers=few[name]) for name in few}
    monkeypatch.setattr(bench, "CASES", toys)
    made = make_worker("train_step")
    for name in toys:
        made.case(name)
    every = records()
    rows = [r for r in every if r["kind"] == "row"]
    assert len(rows) == 4 and all(r["ms"] > 0 and r["status"] == "ran" for r in rows)
    for r in rows:
        case = toys[r["case"]]
        assert r["tokens_s"] == pytest.approx(cases.tokens(case) / r["ms"] * 1e3)
        tflops = case.flops("fwd+bwd") / r["ms"] / 1e9
        assert r["share"] == pytest.approx(tflops / 2.0) and r["sets"] == 1
        assert r["mfu"] == pytest.approx(tflops / 989.5) and r["repeats"] >= bench.REPEATS
        assert (r.get("green") is True) == (r["provider"] in bench.OURS)
    found = [r for r in every if r["kind"] == "stages"]
    assert [r["case"] for r in found] == ["step", "step_skip"]
    products = found[0]["stages"]["products"]
    assert products["ms"] > 0 and found[0]["green"]
    assert products["floor_ms"] == pytest.approx(toys["step"].floors("", 2.0, 3.0)["products"])
    assert "ours by stage" in report.stages(found[0], rows[0]["ms"])
    ratio = {t["target"]: t["value"] for t in bench.targets(rows)}
    share = ratio["step_skip: time / at full depth"]
    assert share == pytest.approx(rows[2]["ms"] / rows[3]["ms"])
