"""The loss's bench: FLOPs and bytes, peers that compute the same loss, a gate that can fail."""

import pytest
import torch
import torch.nn.functional as F

from bench import harness, report
from bench.harness import CPU, Leaves
from bench.infonce import bench, gate, peers
from bench.infonce.cases import CASES, PAIRS, STEPS
from mlembed_kernels import infonce


def test_flops_and_bytes():
    reference, both = CASES["reference"], CASES["both"]
    unit = 2 * 16384 * 16384 * 1024 * 7
    assert reference.flops("fwd") == both.flops("fwd") == unit
    assert reference.flops("fwd+bwd") == 3 * unit and reference.flops("fwd+bwd", 4) == 4 * unit
    assert reference.nbytes("fwd") == 2 * (2 * 7 * 16384 * 1024)  # q and c of two bytes each
    assert reference.nbytes("fwd+bwd") == 3 * reference.nbytes("fwd")
    assert reference.exponentials() == 7 * 8 * 16384**2
    floors = reference.floors("fwd+bwd", 788, 4247)
    assert floors["recomputing"] == pytest.approx(4 * unit / 788e12 * 1e3)


def test_log_has_these_numbers(log_rows):
    table = log_rows("infonce: FLOPs and bytes", CASES)
    assert [row[0] for row in table] == list(CASES)
    for name, *numbers in table:
        case = CASES[name]
        forward, train = (case.floors(mode, 788, 4247) for mode in ("fwd", "fwd+bwd"))
        wanted = [case.flops("fwd") / 1e12, case.nbytes("fwd") / 1e9]
        wanted += [forward["gemms"], forward["bytes"]]
        wanted += [train["gemms"], train["recomputing"], train["bytes"]]
        wanted += [case.exponentials() / 1e9, case.exponentials() / (16 * 132 * 1.8e9) * 1e3]
        assert list(map(float, numbers)) == pytest.approx(wanted, abs=0.0051), name


def toy_inputs(name, dtype=torch.float64):
    case = CASES[name].toy()
    return case, Leaves(*(x.detach().to(dtype) for x in case.inputs(CPU, 3).stacked))


def loss_and_gradients(step, inputs):
    inputs.clear()
    loss = step(inputs, True)
    if inputs.stacked[0].grad is not None:
        return loss, *(x.grad for x in inputs.stacked)
    return loss, *(torch.stack([view[i].grad for view in inputs.views]) for i in range(2))


def plain_loss(q, c):
    return F.cross_entropy(q @ c.T, torch.arange(len(q)))


@pytest.mark.parametrize("name", ["reference", "both"])
def test_peers_compute_the_loss(name):
    case, inputs = toy_inputs(name)
    q, c = (x.detach().requires_grad_() for x in inputs.stacked)
    wanted = infonce(q, c, **case.options).sum()
    wanted = wanted, *torch.autograd.grad(wanted, (q, c))
    assert set(STEPS) == set(peers.STEPS) and set(PAIRS) == set(peers.PAIRS)
    steps = {key: peers.build(key, case, q[0], True) for key in STEPS if key != "gemm"}
    if not case.both:
        steps["pairs"] = peers.by_pair(plain_loss, case.dims, case.temperature), None
    for key, (step, note) in steps.items():
        assert note is None
        tolerance = 1e-6 if key == "pairs" else 1e-12  # the sum of pairs is in fp32
        options = {"rtol": tolerance, "atol": tolerance, "check_dtype": False, "msg": key}
        for got, want in zip(loss_and_gradients(step, inputs), wanted, strict=True):
            torch.testing.assert_close(got, want, **options)


def test_missing_prefixes_and_packages_are_named(monkeypatch):
    def picky(case, smoke):
        def loss_of(q, c):
            if q.shape[1] == 8:
                raise RuntimeError("too narrow")
            return plain_loss(q, c)

        return loss_of

    case, inputs = toy_inputs("reference", torch.float32)
    monkeypatch.setitem(peers.PAIRS, "inf_cl", picky)
    with pytest.warns(UserWarning, match="prefix 8: too narrow"):
        step, note = peers.build("inf_cl", case, inputs.stacked[0][0].detach(), True)
    assert note == "without prefixes 8, which it cannot run"
    pairs = ((F.normalize(q) / case.temperature, F.normalize(c)) for q, c in inputs.views)
    want = sum(plain_loss(q, c) for q, c in pairs)
    torch.testing.assert_close(step(inputs, False), want.detach())
    for name in ("nowhere", "nowhere.at.all", "json.nothing"):
        with pytest.raises(harness.Missing, match="that is not installed"):
            harness.imported(name, "that")


def test_gemm_runs_in_chunks(monkeypatch):
    case, inputs = toy_inputs("reference", torch.float32)
    monkeypatch.setattr(peers, "CHUNK", 7)
    assert peers.gemm(case, True)(inputs, True) is None


@pytest.mark.parametrize("check", gate.checks(), ids=lambda check: check.name)
def test_eager_of_the_gate_is_the_loss(check):
    """A wrong eager loss would have a large error, and let any kernel pass."""
    check = check.toy()
    given = gate.masks(check, CPU)
    random = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    q, c = (torch.randn(2, n, check.D, **random) for n in (check.Q, check.C))
    got = gate.eager_table(q, c, check, given)
    options = {"directions": check.directions, "partition_mode": check.partition_mode, **given}
    options |= {"dims": check.dims, "temperature": check.temperature, "impl": "reference"}
    torch.testing.assert_close(got, infonce(q, c, **options), rtol=1e-11, atol=1e-12)


def test_gate_fails(wrong, faulty, monkeypatch, assert_verdicts):
    def reference(*args, **options):
        return infonce(*args, **options, impl="reference")

    monkeypatch.setattr(gate, "infonce", faulty(reference, 1.0001, 1e-7))
    verdicts = list(gate.gate(CPU, True))
    assert_verdicts(verdicts, len(list(gate.checks())), wrong == "nothing")


def test_spot_check_fails():
    case, inputs = toy_inputs("huge", torch.float32)
    loss_and_gradients(peers.eager_stacked(case, True), inputs)
    assert gate.spot(case, inputs, "fwd+bwd", None)["ok"]
    inputs.stacked[0].grad[0, case.B - 1, 3] += 1e-3
    assert not gate.spot(case, inputs, "fwd+bwd", None)["ok"]
    assert gate.spot(case, inputs, "fwd", None) is None


def test_targets_need_both_numbers_and_green():
    def row(case, ms, tflops=1.0, peak=100.0, green=True):
        at = {"case": case, "provider": "ours", "mode": "fwd+bwd", "green": green}
        return {**at, "ms": ms, "tflops": tflops, "peak_mib": peak}

    assert bench.targets([row("reference", 10.0)]) == []
    assert bench.targets([row("reference", 10.0), row("both", 13.5, green=False)]) == []
    both = bench.targets([row("reference", 10.0), row("both", 12.5)])
    assert [(t["value"], t["met"]) for t in both] == [(1.25, True)]
    huge = bench.targets([row("e1", 1.0, 400.0), row("huge", 64.0, 350.0, 3000.0)])
    assert [(t["limit"], t["met"]) for t in huge] == [(">= 0.9", False), ("< 2", False)]


def test_another_loss_has_no_speed_up():
    def row(provider, value, ms, note=None):
        at = {"case": "small", "mode": "fwd", "provider": provider, "note": note}
        numbers = {"ms": ms, "p20": ms, "p80": ms, "tflops": 1.0, "share": 0.1}
        numbers |= {"gbs": 1.0, "copy_share": 0.1}
        return {**at, **numbers, "value": value, "status": "ran"}

    rows = [row("eager", 10.0, 4.0), row("liger", 10.2, 2.0), row("inf_cl", 8.0, 1.0)]
    rows += [row("gemm", None, 0.5), row("cut_cross_entropy", 10.0, 1.0, "without prefixes 8")]
    assert [report.ratio(rows, r, "eager") for r in rows] == ["-", "2.00", "-", "-", "-"]
    assert "inf_cl: another loss: 8, eager 10" in report.table(rows, "fwd", None, bench.BASELINES)
