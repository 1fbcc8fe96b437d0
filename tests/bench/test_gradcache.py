"""The gradient cache's bench: overheads, one step for any budget, a gate that can fail."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from bench import gradcache as bench
from bench import report
from bench.harness import CPU
from bench.train_step import cases
from bench.train_step import gate as checked
from mlembed.modeling.transformer import Transformer
from mlembed.training.gradcache import ActivationCost

TOYS = {name: case.toy() for name, case in bench.CASES.items()}


@pytest.fixture
def eager(monkeypatch):
    """Compile no blocks, which takes most of the time."""
    monkeypatch.setattr(Transformer, "compile_blocks", lambda self, *_, **options: None)


@pytest.mark.slow
def test_smoke_runs_everything_without_numbers(smoke):
    result, printed = smoke("gradcache", "--skip-tests", "--case", "big")
    assert result["ran"] == {"big": {"fwd+bwd": {"within_budget": "ran", "none_kept": "ran"}}}
    assert "gate: 13 of 13 checks" in printed


def test_providers_are_known():
    names = {name for case in bench.CASES.values() for name in case.providers}
    assert names == {*bench.OURS, *bench.PEERS}
    assert set(bench.OVERHEADS) <= set(bench.CASES["fit"].providers) & set(bench.OURS)


# ---- the least work ----


def test_one_more_forward_by_hand():
    """fit: 49,967 tokens of 28 layers; 15,728,640 weights, 3072 columns of heads in each."""
    S, plan = 49_967 * 28, bench.again_work(bench.CASES["fit"])
    assert cases.tokens(bench.CASES["fit"]) == 49_967
    assert plan["products"][0] == 2 * 15_728_640 * S
    assert plan["point-wise"] == (0.0, 2 * (9 * 1024 + 2 * 3072 + 3 * 3072) * S)
    pairs = sum(n * (n + 1) / 2 for n in cases.lengths(bench.CASES["fit"])) * 28
    assert plan["attention"] == pytest.approx((4 * 16 * 128 * pairs, 2 * 2 * 3072 * S))
    floors = bench.CASES["fit"].floors("fwd+bwd", 788, 4247)
    plain = cases.floors_of(cases.stage_work(bench.CASES["fit"]), 788, 4247)
    assert {k: v for k, v in floors.items() if k != bench.AGAIN} == plain
    assert 1.3 < 1 + floors[bench.AGAIN] / sum(plain.values()) < 1.4


def test_log_has_these_numbers(log_rows):
    table = log_rows("gradcache: FLOPs and bytes", bench.CASES)
    table = {(row[0], row[1]): list(map(float, row[2:5])) for row in table}
    assert len(table) == 7 * len(bench.CASES)
    for name, case in bench.CASES.items():
        plain, again = cases.stage_work(case), bench.again_work(case).values()
        floors = {stage: max(a / 788e9, b / 4247e6) for stage, (a, b) in plain.items()}
        floors[bench.AGAIN] = sum(max(a / 788e9, b / 4247e6) for a, b in again)
        plain[bench.AGAIN] = tuple(sum(x) for x in zip(*again, strict=True))
        for stage, (products, size) in plain.items():
            wanted = [products / 1e12, size / 1e9, floors[stage]]
            assert table[name, stage] == pytest.approx(wanted, abs=0.0051), (name, stage)


def test_budgets_keep_what_the_cases_say():
    """Graphs have the log's 45,224 bytes a token and layer, and bf16 weights."""
    kept = ActivationCost(2 * 15_728_640, 45_224, 2048)
    for name, keep, packs, graphs in (("fit", "half", 4, 2), ("big", "budget", 164, 2)):
        case = bench.CASES[name]
        _, some = case.inputs(CPU, 0).packs(False)
        run = replace(case.run, gradient_cache=True)
        budget = bench.budget_of(keep, kept, some, run)
        keeps, again, _ = bench.gradcache.choose_graphs(run, kept, some, budget)
        assert (len(keeps), sum(keeps), sum(again)) == (packs, graphs, 0), name


# ---- the same step ----


def two_steps(name, case, inputs):
    step, _ = bench.build(name, case, inputs, True)
    return step(inputs, True).item(), step(inputs, True).item(), step


def test_cached_steps_are_the_plain_one(eager):
    case = TOYS["fit"]
    case = replace(case, run=replace(case.run, optim=replace(case.run.optim, lr=1e-2)))
    inputs = case.inputs(CPU, 0)
    assert len(inputs.packs(False)[1]) == 4
    first, second, plain = two_steps("uncached", case, inputs)
    wanted, twice = dict(plain.model.named_parameters()), {}
    assert second < first - 0.01
    for name in ("none_kept", "half_kept", "all_kept", "large_packs"):
        *losses, step = two_steps(name, case, inputs)
        assert losses == pytest.approx([first, second], rel=1e-4), name
        for key, p in step.model.named_parameters():
            torch.testing.assert_close(p, wanted[key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
            assert p.grad is None
        twice[name] = bench.numbers(case, step, inputs, 2.0)["again"]
    assert twice["none_kept"] == 1.0 and twice["all_kept"] == twice["large_packs"] == 0.0
    assert 0.3 < twice["half_kept"] < 0.7


def test_sentence_transformers_is_compared_with_itself():
    pytest.importorskip("sentence_transformers")
    case = TOYS["peer"]
    inputs = case.inputs(CPU, 0)
    cached, plain = (two_steps(name, case, inputs)[:2] for name in bench.PEERS)
    assert cached == pytest.approx(plain, rel=1e-4)


# ---- right or not ----


def few(monkeypatch):
    """Run two of the gate's checks, which suffice to see it fail."""
    some = [c for c in checked.checks() if c.name in ("whole", "nested, skipping, recomputed")]
    monkeypatch.setattr(checked, "checks", lambda: iter(some))


@pytest.mark.parametrize("wrong", ["nothing", "gradient", "pack", "raises"])
def test_gate_fails(wrong, monkeypatch, eager, assert_verdicts):
    few(monkeypatch)
    right, gradients = bench.loss_table, bench.gradcache.gradients

    def faulty(exits_END, *args):
        if wrong == "raises":
            raise RuntimeError("out of resources")
        if wrong == "gradient":
            exits_END = exits_END.detach() + 1.01 * (exits_END - exits_END.detach())
        return right(exits_END, *args)

    def forgetful(engine, forward, loss, keeps, final, **options):
        """Drop the gradients of one pack."""
        first = next(i for i in range(len(keeps)) if i != final)

        def partly(i, sync):
            out = forward(i, sync)
            return out * 1.0 if i != first else out.detach() + 0.0 * out

        gradients(engine, partly, loss, keeps, final, **options)

    monkeypatch.setattr(bench, "loss_table", faulty)
    if wrong == "pack":
        monkeypatch.setattr(bench.gradcache, "gradients", forgetful)
    found = list(bench.gate(CPU, True))
    assert len(found) == 7 and {v["check"].rpartition(", ")[2] for v in found} == {
        *("none kept", "half kept", "all kept", "drawn again")
    }
    held = [v for v in found if not v["check"].startswith("dropout")]
    assert_verdicts(held, 6, wrong == "nothing")


def test_gate_sees_dropout_that_is_not_repeated(monkeypatch, eager):
    few(monkeypatch)
    monkeypatch.setattr(bench.gradcache, "seeded_dropout", lambda *args: nullcontext())
    verdicts = {v["check"]: v["ok"] for v in bench.gate(CPU, True)}
    assert {check for check, ok in verdicts.items() if not ok} == {"dropout, drawn again"}


# ---- targets and the table ----


def row(case, provider, ms, value=5.0, **others):
    at = {"case": case, "provider": provider, "mode": "fwd+bwd", "ms": ms, "p20": ms, "p80": ms}
    numbers = {"again": 0.0, "peak_mib": 2048.0, "activation_mib": 1024.0, "hopper": True}
    return {**at, **numbers, "value": value, "status": "ran", "green": True, **others}


def test_targets_met_missed_and_absent():
    assert bench.targets([]) == [] == bench.targets([row("fit", "none_kept", 130.0)])
    rows = [row("fit", "uncached", 100.0), row("fit", "none_kept", 139.0, value=5.05)]
    rows += [row("fit", "all_kept", 111.0), row("fit", "half_kept", 150.0)]
    rows += [row("big", "within_budget", 1.0, budget_mib=1000.0)]
    rows += [row("peer", "uncached", 1.0), row("peer", "none_kept", 2.0)]
    got = {t["target"]: (round(t["value"], 3), t["limit"], t["met"]) for t in bench.targets(rows)}
    assert got == {
        "fit, none_kept: times the plain step": (1.39, "<= 1.4", True),
        "fit, all_kept: times the plain step": (1.11, "<= 1.1", False),
        "big, within_budget: peak of activations / budget": (1.024, "<= 1.25", True),
    }
    for other in ({"hopper": False}, {"green": False}, {"value": 6.0}, {"ms": None}):
        mine = [row("fit", "uncached", 100.0), {**row("fit", "none_kept", 130.0), **other}]
        assert bench.targets(mine) == [], other


def test_table():
    rows = [row("fit", "uncached", 200.0), row("fit", "none_kept", 260.0, again=1.0)]
    rows += [row("fit", "sentence_transformers", 2600.0, green=None, note="padded")]
    rows += [{"case": "fit", "provider": "all_kept", "mode": "fwd+bwd", "status": "failed"}]
    floors = {"products": 100.0, bench.AGAIN: 30.0}
    how = bench.BASELINES, bench.COLUMNS, bench.cells
    printed = report.table(rows, "fwd+bwd", floors, *how)
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    assert lines["none_kept"] == [
        *("260.0", "260.0..260.0", "1.30", "100%", "130.0", "50.0%", "2.0", "1.0", "-", "10.00")
    ]
    assert lines["uncached"][2:5] == ["-", "0%", "100.0"]
    assert lines["all_kept"] == ["failed"]
    assert lines["sentence_transformers"][2:6] == ["-", "-", "-", "-"]
    assert "products 100.00 ms" in printed and "sentence_transformers: padded" in printed


def test_times_become_rows(make_worker, records, monkeypatch, eager):
    toy = replace(TOYS["fit"], providers=("uncached", "none_kept"))
    monkeypatch.setattr(bench, "CASES", {"fit": toy})
    make_worker("gradcache").case("fit")
    rows = records("row")
    assert [r["provider"] for r in rows] == ["uncached", "none_kept"]
    assert all(r["ms"] > 0 and r["green"] and r["peak_mib"] is None for r in rows)
    assert [r["again"] for r in rows] == [0.0, 1.0] and bench.targets(rows) == []
    assert bench.overhead(rows, rows[1]) == pytest.approx(rows[1]["ms"] / rows[0]["ms"])
