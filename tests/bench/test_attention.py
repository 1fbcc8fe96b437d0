"""Attention's bench: FLOPs and bytes, peers that compute attention, a gate that can fail."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import harness, report
from bench.attention import bench, cases, peers
from bench.attention import gate as checked
from bench.attention.peers import Batch, Packed
from bench.harness import CPU
from mlembed_kernels.attention.attention import attention_ref

TINY = cases.Case(name="tiny", mix="mid", lengths=(3, 1, 9, 6), Hq=4, Hkv=2, K=8)
MODES = harness.FORWARD, harness.BACKWARD, harness.TRAIN


# ---- cases ----


@pytest.mark.parametrize("causal", [True, False])
def test_flops_and_bytes_are_counted(causal):
    case = replace(TINY, causal=causal)
    pairs = sum(1 for n in case.lengths for q in range(n) for k in range(n) if k <= q or not causal)
    assert case.pairs == pairs and case.exponentials() == 4 * pairs
    assert case.flops("fwd") == 2 * 2 * 4 * 8 * pairs  # q k' and p v, a product and a sum
    assert case.flops("bwd") == 5 * 2 * 4 * 8 * pairs
    inputs = case.inputs(CPU, 0)
    q, k, v = inputs.stacked
    out, dq, dk, dv = inputs.dout, *inputs.stacked
    half = torch.bfloat16.itemsize / q.itemsize
    assert case.nbytes("fwd") == half * sum(x.nbytes for x in (q, k, v, out))
    assert case.nbytes("bwd") == half * sum(x.nbytes for x in (q, k, v, out, dq, dk, dv))
    for count in (case.flops, case.nbytes):
        assert count("fwd+bwd") == count("fwd") + count("bwd")
    floors = case.floors("fwd", 788, 4247)
    assert floors["products"] == pytest.approx(case.flops("fwd") / 788e12 * 1e3)
    assert floors["bytes"] == pytest.approx(case.nbytes("fwd") / 4247e9 * 1e3)


def test_sequences_that_left_do_not_count():
    case = replace(TINY, gone=0.4)  # 1.6 of four
    rest = replace(TINY, lengths=TINY.lengths[:2])
    assert case.alive == 2
    for mode in MODES:
        assert case.flops(mode) == rest.flops(mode) and case.nbytes(mode) == rest.nbytes(mode)


def test_lengths_are_those_that_were_measured():
    tokens = {name: sum(lengths) for name, lengths in cases.MIXES.items()}
    assert tokens == {"short": 49748, "mid": 69466, "long": 65536, "very_long": 65536}
    assert max(cases.MIXES["short"]) == 128 and max(cases.MIXES["mid"]) == 512
    assert cases.CASES["skip"].alive == 307 and cases.CASES["skip_short"].alive == 1229


def test_log_has_these_numbers(log_rows):
    table = log_rows("attention: FLOPs and bytes", cases.CASES)
    assert [row[0] for row in table] == list(cases.CASES)
    for name, *numbers in table:
        case, numbers = cases.CASES[name], list(map(float, numbers))
        wanted = [case.tokens]
        for mode in ("fwd", "bwd"):
            floors = case.floors(mode, 788, 4247)
            wanted += [case.flops(mode) / 1e9, case.nbytes(mode) / 1e6]
            wanted += [floors["products"], floors["bytes"]]
        wanted.append(case.exponentials() / (16 * 132 * 1.8e9) * 1e3)
        assert numbers == pytest.approx(wanted, abs=0.51, rel=0), name
        for i in (3, 4, 7, 8, 9):
            assert numbers[i] == pytest.approx(wanted[i], abs=0.00051), name


def test_toys_stay_like_their_cases():
    for name, case in cases.CASES.items():
        assert case.name == name and case.providers[0] == "ours"
        assert case.providers[1] in ("varlen", "alone")
        small = case.toy()
        assert small.causal == case.causal and small.modes == case.modes
        assert f"T = {case.tokens}, {case.Hq}/{case.Hkv} heads" in case.about
        assert (0 < small.alive < len(small.lengths)) == (case.gone > 0)


# ---- providers ----


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    """Use fp32, which shows small errors; a toy run uses fp16."""
    monkeypatch.setattr(harness, "dtype_on", lambda device: torch.float32)


@pytest.fixture
def tiny():
    """Return inputs, and their batch for peers."""
    return TINY.inputs(CPU, 1), Batch.of(TINY.lengths, TINY.causal, 2, CPU)


def truth(case, inputs, lengths=None, **options):
    """Return out, dq, dk, dv of the specification."""
    cu = F.pad(torch.tensor(lengths or case.lengths).cumsum(0), (1, 0))
    qkv = [x.detach()[: cu[-1]] for x in inputs.stacked]
    function = partial(attention_ref, cu_seqlens=cu, causal=case.causal, **options)
    return harness.differentiated(function, qkv, inputs.dout[: cu[-1]])


def in_every_mode(step, inputs):
    """Return out, dq, dk, dv, after comparing the modes."""
    everything = step(inputs, True)
    apart = [*step(inputs, False), *step.backward(inputs)()]
    for a, b in zip(everything, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    return everything


def close(got, want):
    assert len(got) == len(want)
    for name, a, b in zip(checked.NAMES, got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["short", "skip", "long_bert"])
def test_ours_and_sdpa_are_attention(name):
    case = cases.CASES[name].toy()
    inputs = case.inputs(CPU, 3)
    want = truth(case, inputs, case.lengths[: case.alive])
    got = {}
    for provider in cases.SKIPPING if case.gone else ("ours", "sdpa"):
        step, _ = bench.build(provider, case, inputs, True)
        got[provider] = in_every_mode(step, inputs)
    close(got["ours"], want)
    if not case.gone:
        close(got["sdpa"], want)
        return
    for a, b in zip(got["ours"], got["alone"], strict=True):
        assert torch.equal(a, b)
    close(got["whole"], truth(case, inputs))
    flags = torch.arange(len(case.lengths)) < case.alive
    close(got["active"], truth(case, inputs, active=flags))
    close([x[: case.tokens] for x in got["active"]], want)


def test_prefix_is_a_view_or_a_copy():
    case = cases.CASES["skip"].toy()
    inputs = case.inputs(CPU, 3)
    for copied in (False, True):
        leaves, grads = bench.prefix(case.tokens, copied, inputs)
        for part, of in zip((*leaves, *grads), (*inputs.stacked, inputs.dout), strict=True):
            assert torch.equal(part, of[: case.tokens]) and len(part) < len(of)
            assert (part.data_ptr() == of.data_ptr()) != copied


def test_repeated_heads_are_the_same_attention(tiny):
    inputs, batch = tiny
    (q, k, v), grads = peers.repeated(2)(inputs)
    assert k.shape == v.shape == q.shape and k.is_leaf and k.requires_grad
    out = attention_ref(q, k, v, cu_seqlens=batch.cu, causal=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grads)
    close((out, dq, *(x.unflatten(1, (2, 2)).sum(2) for x in (dk, dv))), truth(TINY, inputs))
    assert checked.spot(TINY, inputs, "bwd", (dq, dk, dv))["near"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
def test_flex_masks_by_sequence(causal):
    case = replace(TINY, causal=causal, K=16)
    inputs = case.inputs(CPU, 1)
    batch = Batch.of(case.lengths, causal, 2, CPU)
    out = peers.flex(batch, True).function(*(x.detach() for x in inputs.stacked))
    close([out], truth(case, inputs)[:1])


def test_flash_attention_packages_get_their_arguments(monkeypatch, tiny):
    (inputs, batch), seen = tiny, []

    def library(name):
        """Return a package; version 4 returns the sums too."""

        def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, causal, **sizes):
            assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
            assert sizes == {"max_seqlen_q": 9, "max_seqlen_k": 9}
            seen.append(name)
            out = attention_ref(q, k, v, cu_seqlens=cu_seqlens_q, causal=causal)
            return (out, None) if name == "flash_attn.cute" else out

        return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, __name__=name)

    modules = {"flash_attn": "flash_attn", "fa4": "flash_attn.cute", "fa3": "flash_attn_interface"}
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(harness.importlib, "import_module", library)
    for provider, module in modules.items():
        peer = peers.PEERS[provider](batch, True)
        close(in_every_mode(harness.Apart(peer.function, bench.whole), inputs), truth(TINY, inputs))
        assert set(seen) == {module} and not seen.clear()
    empty = lambda name: SimpleNamespace(__name__=name)  # noqa: E731
    monkeypatch.setattr(harness.importlib, "import_module", empty)
    with pytest.raises(harness.Missing, match="flash_attn has no flash_attn_varlen_func"):
        peers.flash_attn(batch, True)  # version 4 alone makes the folder too


def test_xformers_gets_groups(monkeypatch, tiny):
    inputs, batch = tiny

    class Mask:
        @staticmethod
        def from_seqlens(lengths, device):
            assert lengths == list(TINY.lengths)
            return "causal"

    def memory_efficient_attention(q, k, v, attn_bias):
        assert attn_bias == "causal" and q.shape == k.shape == (1, 19, 2, 2, 8)
        q, k, v = (x[0].flatten(1, 2) for x in (q, k, v))
        return attention_ref(q, k, v, cu_seqlens=batch.cu, causal=True).view(1, 19, 2, 2, 8)

    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    bias = SimpleNamespace(BlockDiagonalCausalMask=Mask)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(harness.importlib, "import_module", lambda n: bias if "bias" in n else ops)
    peer = peers.xformers(batch, True)
    close(in_every_mode(harness.Apart(peer.function, bench.whole), inputs), truth(TINY, inputs))


def test_peers_without_a_gpu_are_missing():
    case = cases.CASES["short"].toy()
    for name in set(peers.PEERS) - set(peers.ANYWHERE):
        with pytest.raises(harness.Missing, match="needs CUDA"):
            bench.build(name, case, case.inputs(CPU, 0), True)


def test_rope_and_qk_norm(tiny):
    inputs, _ = tiny
    step, note = bench.build("rope_qk_norm", TINY, inputs, True)
    q, k, *gradients = step(inputs, True)
    assert "no attention" in note and len(gradients) == 4
    position = torch.cat([torch.arange(n) for n in TINY.lengths])
    for got, x in zip((q, k), inputs.stacked, strict=False):
        x = x.detach() * (x.detach().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        pairs = torch.complex(x[..., :4], x[..., 4:])
        angle = torch.outer(position, 1e4 ** (-torch.arange(4) / 4))
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(got, torch.cat([pairs.real, pairs.imag], -1))


# ---- right or not ----


def test_gate_fails(wrong, faulty, monkeypatch, assert_verdicts):
    monkeypatch.setattr(checked, "attention", faulty(attention_ref, 1.0001, 1e-6))
    verdicts = list(bench.gate(CPU, True))
    assert_verdicts(verdicts, len(list(checked.checks())), wrong == "nothing")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False])
def test_spot_check_fails(mode, causal, monkeypatch):
    case = replace(TINY, causal=causal)
    inputs = case.inputs(CPU, 1)
    names = {"fwd": ["out"], "bwd": ["dq", "dk", "dv"], "fwd+bwd": [*checked.NAMES]}[mode]
    everything = dict(zip(checked.NAMES, truth(case, inputs), strict=True))
    got = [everything[name] for name in names]
    found = checked.spot(case, inputs, mode, got)
    assert found["ok"] and found["near"] and list(found["rms"]) == names
    for i, name in enumerate(names):
        other = [x.clone() for x in got]
        other[i][-1, -1, -1] += 0.01
        found = checked.spot(case, inputs, mode, other)
        assert not found["ok"] and not found["near"] and not found[name]["ok"]
        other[i][-1, -1, -1] = torch.nan
        assert not checked.spot(case, inputs, mode, other)["near"]
    monkeypatch.setattr(checked, "MOST", 8)  # only some rows of the sequence of 9
    monkeypatch.setattr(checked, "ROWS", 5)
    assert checked.spot(case, inputs, mode, got)["ok"]


def test_wrong_peer_has_no_time(monkeypatch, tiny):
    inputs, _ = tiny

    def half(batch, smoke):
        right = peers.sdpa(batch, smoke).function
        return peers.Peer(lambda q, k, v: right(q, k, v.detach() + 0 * v))  # dv is 0

    monkeypatch.setitem(peers.PEERS, "sdpa", half)
    step, _ = bench.build("sdpa", TINY, inputs, True)
    harness.rotating(step, [inputs], "fwd")(0)
    with pytest.raises(RuntimeError, match=r"computes something else, .*'dv': 1.0"):
        harness.rotating(step, [inputs], "bwd")


def test_packed_inputs_have_no_views():
    inputs = Packed(*(torch.ones(5, h, 4) for h in (2, 1, 1, 2)))
    assert len(inputs.all()) == 3 and inputs.nbytes() == 4 * 5 * 4 * 4


# ---- targets ----


def test_targets_need_both_numbers_and_green():
    def row(case, provider, ms, mode="fwd", **others):
        at = {"case": case, "provider": provider, "mode": mode, "ms": ms}
        return {**at, "copy_share": 0.5, **others}

    def met(*rows):
        return [(t["value"], t["limit"], t["met"]) for t in bench.targets(rows)]

    assert met(row("mid", "ours", 1.0, green=True)) == []
    assert met(row("mid", "ours", 1.0, green=False), row("mid", "varlen", 2.0)) == []
    assert met(row("mid", "ours", 1.0, green=True), row("mid", "varlen", 2.0)) == [
        *[(2.0, ">= 1.6", True), (2.0, "aim >= 2.5", False)]
    ]
    skip = bench.targets([row("skip", "ours", 1.06, green=True), row("skip", "alone", 1.0)])
    assert [(t["target"], t["met"]) for t in skip] == [
        ("skip, fwd: time / that of the rest alone", False)
    ]
    assert met(
        row("short", "ours", 0.5, "bwd", green=True), row("short", "varlen", 2.0, "bwd")
    ) == [*[(4.0, ">= 3", True), (4.0, "aim >= 6", False), (2.0, "aim <= 1.5", False)]]
    long = bench.targets([row("long", "ours", 1.0, green=True), row("long", "fa3", 0.9)])
    assert [(t["target"], t["met"]) for t in long] == [("long, fwd: times FA3", True)]


# ---- through the worker ----


@pytest.mark.slow
def test_toy_cases_and_the_sweep_finish(make_worker, records, monkeypatch):
    monkeypatch.undo()  # in fp16, like a toy run
    made = make_worker("attention", smoke=True)
    for name in ("mid", "skip_short", "short_bert", "very_long"):
        made.case(name)
    made.sweep("mid")
    every = records()
    rows = [r for r in every if r["kind"] == "row"]
    assert {r["status"] for r in rows} == {"ran", "absent"} and "ms" not in rows[0]
    mine = [r for r in rows if r["provider"] == "ours"]
    assert len(mine) == 8 and all(r["green"] and r["spot"]["ok"] for r in mine)
    assert {r["provider"] for r in rows if r["status"] == "absent"} <= set(peers.PEERS)
    sweeps = [r for r in every if r["kind"] == "sweep"]
    assert [(r["kernel"], r["mode"]) for r in sweeps] == [
        *[("middle_forward_64", "fwd")] * 2,  # the present entry and one candidate
        *[("keys_backward_64", "bwd")] * 2,
    ]
    assert all(r["status"] == "ran" and r["right"] for r in sweeps)


@pytest.mark.slow
def test_times_become_targets(make_worker, records, monkeypatch):
    few = {"short": ("ours", "sdpa", "rope_qk_norm"), "skip": ("ours", "alone")}
    toys = {name: replace(cases.CASES[name].toy(), providers=few[name]) for name in few}
    monkeypatch.setattr(bench, "CASES", toys)
    monkeypatch.setattr(bench, "BREAKDOWN", ())
    quick = lambda q, k, v, impl, plan, **options: attention_ref(q, k, v, **options)  # noqa: E731
    monkeypatch.setattr(bench, "attention", quick)
    made = make_worker("attention")
    for name in toys:
        made.case(name)
    rows = records("row")
    assert len(rows) == 3 * 3 + 2 * 2 and all(r["ms"] > 0 for r in rows)
    for row in rows:
        gbs = toys[row["case"]].nbytes(row["mode"]) / row["ms"] / 1e6
        assert row["copy_share"] == pytest.approx(gbs / 3.0) and row["sets"] == 1
    ms = {(r["case"], r["provider"], r["mode"]): r["ms"] for r in rows}
    ratio = {t["target"]: t["value"] for t in bench.targets(rows)}
    for mode in ("fwd", "bwd"):
        skipped = ratio[f"skip, {mode}: time / that of the rest alone"]
        assert skipped == pytest.approx(ms["skip", "ours", mode] / ms["skip", "alone", mode])
        above = ratio[f"short, {mode}: time / floor of bytes"]
        floor = toys["short"].nbytes(mode) / 3.0 / 1e6
        assert above == pytest.approx(ms["short", "ours", mode] / floor)
    printed = report.table([r for r in rows if r["case"] == "skip"], "bwd", None, bench.BASELINES)
    assert printed.splitlines()[1].endswith("x varlen  x varlen_gqa  x alone")
    assert f"{1 / ratio['skip, bwd: time / that of the rest alone']:.2f}" in printed
