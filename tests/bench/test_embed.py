"""The nested embedding's bench: FLOPs and bytes, peers, and a gate that can fail."""

from dataclasses import replace

import pytest
import torch

from bench import embed as bench
from bench import harness, report
from bench.harness import CPU
from mlembed_kernels.embedding.embed import embed_ref

TINY = bench.Case(name="tiny", V=31, R=12, D=10, rank=7, T=60)


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    monkeypatch.setattr(harness, "dtype_on", lambda device: torch.float32)


def truth(inputs, dtype=torch.float32):
    """Return x, dU and dW of the specification."""
    leaves = [x.detach().to(dtype) for x in inputs.stacked]
    return harness.differentiated(lambda u, w: embed_ref(inputs.ids, u, w, 7), leaves, inputs.dx)


@pytest.mark.parametrize("masters", [False, True])
def test_flops_and_bytes_are_counted(masters):
    case = replace(TINY, masters=masters)
    inputs = case.inputs(CPU, 0)
    n = len(set(inputs.ids.tolist()))
    assert case.distinct == n < case.T
    assert case.flops("fwd") == 2 * n * 7 * 10 and case.flops("bwd") == 4 * n * 7 * 10
    factor, half = 4 if masters else 2, 2
    U, W = inputs.stacked
    rows, columns = U.detach()[:n, :7].numel(), W.detach()[:7].numel()
    forward = factor * (rows + columns) + half * inputs.dx.numel()
    assert case.nbytes("fwd") == forward
    assert case.nbytes("bwd") == forward + factor * (U.numel() + W.numel())
    for count in (case.flops, case.nbytes):
        assert count("fwd+bwd") == count("fwd") + count("bwd")
    floors = case.floors("fwd", 788, 4247)
    assert floors["products"] == pytest.approx(case.flops("fwd") / 788e12 * 1e3)
    assert floors["bytes"] == pytest.approx(case.nbytes("fwd") / 4247e9 * 1e3)


def test_tokens_follow_zipfs_law():
    ids = bench.stream(73_419, 151_936)
    counts = ids.bincount(minlength=151_936).sort(descending=True).values
    harmonic = sum(1 / rank for rank in range(1, 151_937))
    for rank in (1, 10, 100):
        assert counts[rank - 1].item() == pytest.approx(73_419 / harmonic / rank, rel=0.3)
    assert 20_000 < (counts > 0).sum() < 24_000
    assert ids.double().mean().item() == pytest.approx(151_936 / 2, rel=0.2)  # scattered


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("name", bench.CASES["step"].providers)
def test_every_provider_computes_the_same(name, masters, monkeypatch):
    monkeypatch.undo()  # in fp16, like a toy run
    case = replace(TINY, masters=masters)
    inputs = case.inputs(CPU, 1)
    step, note = bench.build(name, case, inputs, True)
    assert note is None
    got = step(inputs, True)
    assert got[0].dtype == inputs.dx.dtype
    assert [x.dtype for x in got[1:]] == [inputs.stacked[0].dtype] * 2
    for x, t in zip(got, truth(inputs, torch.float64), strict=True):
        assert (x.double() - t).abs().max() <= 4e-3 * t.abs().max()
    assert bench.spot(case, inputs, "fwd+bwd", got)["near"]


def test_wrong_peer_has_no_time(monkeypatch):
    inputs = TINY.inputs(CPU, 1)
    half = lambda ids, U, W, rank: embed_ref(ids, U, W.detach() + 0 * W, rank)  # noqa: E731
    monkeypatch.setitem(bench.PEERS, "eager", half)  # dW is 0
    step, _ = bench.build("eager", TINY, inputs, True)
    harness.rotating(step, [inputs], "fwd")(0)
    with pytest.raises(RuntimeError, match=r"computes something else, .*'dW': 1.0"):
        harness.rotating(step, [inputs], "fwd+bwd")(0)


def test_gate_fails(wrong, faulty, monkeypatch, assert_verdicts):
    monkeypatch.setattr(bench, "embed", faulty(embed_ref, 1.01, 3e-6))
    verdicts = list(bench.gate(CPU, True))
    assert_verdicts(verdicts, len(list(bench.checks())), wrong == "nothing")


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_spot_check_fails(mode):
    case = replace(TINY, V=200)  # some rows have no token
    inputs = case.inputs(CPU, 1)
    got = truth(inputs)[: 1 if mode == "fwd" else 3]
    assert bench.spot(case, inputs, mode, got)["ok"]
    absent = sorted(set(range(200)) - set(inputs.ids.tolist()))[0]
    # The most frequent token; an absent row; beyond the rank; the last column of the check.
    places = [(0, 0, 0), (1, absent, 0), (1, inputs.ids[0], 11), (2, 11, 0), (2, 0, 9)]
    for i, row, column in places[: 1 if mode == "fwd" else None]:
        for value in (0.5, torch.nan):
            other = [x.clone() for x in got]
            other[i][row, column] += value
            found = bench.spot(case, inputs, mode, other)
            assert not found["ok"] and not found["near"] and not found[bench.NAMES[i]]["ok"]


def test_targets_need_both_numbers_and_green():
    def row(case, provider, ms, mode="fwd+bwd", **others):
        at = {"case": case, "provider": provider, "mode": mode, "ms": ms}
        return {**at, "copy_share": 0.5, **others}

    found = bench.targets([row("step", "ours", 1.0, green=True)])
    assert [(t["limit"], t["met"]) for t in found] == [("aim <= 1.5", False)]
    assert bench.targets([row("step", "ours", 1.0, green=False), row("step", "rebuild", 9.0)]) == []
    assert bench.targets([row("step", "ours", 1.0, "fwd", green=True)]) == []
    mine = {"green": True, "peak_mib": 70.0}
    peers = row("step", "rebuild", 9.0), row("step", "rebuild_embedding", 4.0)
    found = bench.targets([row("step", "ours", 1.0, **mine), *peers])
    assert [(t["value"], t["limit"], t["met"]) for t in found] == [
        *[(4.0, ">= 5", False), (9.0, ">= 5", True)],
        *[(70.0, "<= 64", False), (2.0, "aim <= 1.5", False)],
    ]
    aims = bench.targets([row("lealla", "ours", 1.0, **mine), row("lealla", "rebuild", 9.0)])
    assert all(t["limit"].startswith("aim") for t in aims) and len(aims) == 3


def test_toys_stay_like_their_cases():
    for name, case in bench.CASES.items():
        assert case.name == name and case.providers[:2] == ("ours", "rebuild_embedding")
        small = case.toy()
        assert small.masters == case.masters and small.modes == case.modes
        assert small.rank <= small.R and (small.rank < small.R) == (case.rank == 64)
        assert f"rank {case.rank} of {case.R}" in case.about


@pytest.mark.slow
def test_toy_cases_and_the_sweep_finish(make_worker, records, monkeypatch):
    monkeypatch.undo()  # in fp16, like a toy run
    made = make_worker("embed", smoke=True)
    for name in ("step", "lealla"):
        made.case(name)
    for name in ("step", "masters"):  # fp32 factors use the table of half precision
        made.sweep(name)
    every = records()
    rows = [r for r in every if r["kind"] == "row"]
    assert {r["status"] for r in rows} == {"ran"} and "ms" not in rows[0]
    mine = [r for r in rows if r["provider"] == "ours"]
    assert len(mine) == 4 and all(r["green"] and r["spot"]["ok"] for r in mine)
    sweeps = [r for r in every if r["kind"] == "sweep"]
    assert [(r["kernel"], r["mode"]) for r in sweeps] == [("gather", "fwd+bwd")] * 4
    assert all(r["status"] == "ran" and r["right"] for r in sweeps)


def test_times_become_targets(make_worker, records, monkeypatch):
    toy = replace(bench.CASES["step"].toy(), providers=("ours", "rebuild", "eager"))
    monkeypatch.setattr(bench, "CASES", {"step": toy})
    monkeypatch.setattr(bench, "BREAKDOWN", ())
    quick = lambda ids, U, W, rank, impl, token_index: embed_ref(ids, U, W, rank)  # noqa: E731
    monkeypatch.setattr(bench, "embed", quick)
    make_worker("embed").case("step")
    rows = records("row")
    assert len(rows) == 3 * 2 and all(r["ms"] > 0 for r in rows)
    ms = {(r["provider"], r["mode"]): r["ms"] for r in rows}
    targets = {t["target"]: t["value"] for t in bench.targets(rows)}
    times = ms["rebuild", "fwd+bwd"] / ms["ours", "fwd+bwd"]
    assert targets["step, fwd+bwd: times rebuild"] == pytest.approx(times)
    floor = toy.nbytes("fwd+bwd") / 3.0 / 1e6
    above = targets["step, fwd+bwd: time / floor of bytes"]
    assert above == pytest.approx(ms["ours", "fwd+bwd"] / floor)
    printed = report.table(rows, "fwd+bwd", None, bench.BASELINES)
    assert printed.splitlines()[1].endswith("x rebuild_embedding  x rebuild  x eager")
