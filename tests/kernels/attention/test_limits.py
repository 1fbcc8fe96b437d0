"""Packed attention by Triton, except its values: sequences stay apart, rows that take no part are
not read, any layout, torch's operators and graphs, errors.
"""

from functools import cache

import pytest
import torch
from attention_truth import (
    DEVICE,
    DTYPES,
    HALF,
    LENGTHS,
    batch,
    bounds,
    cotangent,
    inputs,
    on,
    rows_of,
    run,
    same_bits,
    triton,
)
from pairwise import all_pairs
from torch import Tensor

from mlembed_kernels import AttentionPlan, _dispatch, attention

pytest.importorskip("triton", reason="needs triton, which is not installed")

both_masks = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def clean(dtype: torch.dtype, causal: bool, heads: tuple[int, int]) -> dict[str, Tensor]:
    qkv, do = batch(dtype, heads=heads)
    return run(qkv, LENGTHS, causal, do=do)


# ---- a sequence and its neighbours ----

# fp32 has tiles of one head, half precision of two.
SORTS = [(torch.float32, (1, 1)), (HALF, (2, 1))]
both_sorts = pytest.mark.parametrize(("dtype", "heads"), SORTS, ids=str)


@both_sorts
@pytest.mark.parametrize("changed", [(1, 3), (2, 5), (0, 4)], ids=str)
def test_other_numbers_change_no_other_sequence(changed, dtype, heads):
    causal = (dtype == HALF) == (changed[0] == 1)
    qkv, do = batch(dtype, heads=heads)
    rows = rows_of(LENGTHS, changed).to(DEVICE)
    other = [torch.where(rows[:, None, None], 3 - 2 * x, x) for x in (*qkv, do)]
    before, after = clean(dtype, causal, heads), run(other[:3], LENGTHS, causal, do=other[3])
    same_bits(after, before, ~rows)
    assert (after["out"][rows] != before["out"][rows]).any()


@both_sorts
@both_masks
def test_result_does_not_depend_on_the_batch(causal, dtype, heads):
    """Sequences of all three kinds, each next to the others and alone."""
    lengths = [66, 513, 3]
    qkv, do = batch(dtype, lengths, heads)
    together, begin = run(qkv, lengths, causal, do=do), 0
    for n in lengths:
        rows = slice(begin, begin + n)
        alone = run([x[rows].clone() for x in qkv], [n], causal, do=do[rows].clone())
        same_bits({name: x[rows] for name, x in together.items()}, alone)
        begin += n


# In q, k, v or what comes back: a whole sequence of it, or one number of its last token. Of a last
# key's infinities one makes its only score -inf, a weight of nought and no NaN that could be seen.
POISONS = [
    (name, number, whole, causal)
    for name in ("q", "k", "v", "do")
    for number, whole, causal in (
        (torch.nan, True, True),
        (torch.nan, False, False),
        (torch.inf, False, True),
        (-torch.inf, False, True),
        (-torch.inf, True, False),
    )
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("name", "number", "whole", "causal"), POISONS, ids=str)
def test_nan_stays_in_its_sequence(name, number, whole, causal):
    """0 x NaN is NaN: a weight of nought is no barrier."""
    heads = (2, 1) if whole else (1, 1)
    qkv, do = batch(heads=heads)
    x = {"q": qkv[0], "k": qkv[1], "v": qkv[2], "do": do}[name]
    for spoilt in ((1, 3), (0, 2, 5))[: 1 + (whole and name in "kv")]:
        rows = rows_of(LENGTHS, spoilt).to(DEVICE)
        last = [sum(LENGTHS[: i + 1]) - 1 for i in spoilt]
        bad = x.clone()
        if whole:
            bad[rows] = number
        else:
            bad[last, -1, 2] = number
        q, k, v, back = (bad if y is x else y for y in (*qkv, do))
        got = run([q, k, v], LENGTHS, causal, do=back)
        same_bits(got, clean(HALF, causal, heads), ~rows)
        assert not all(y[rows].isfinite().all() for y in got.values())
        if name != "do" and number != number:  # the last token sees its whole sequence
            assert got["out"][last, -1].isnan().any(-1).all()


@both_masks
def test_infinity_that_weighs_nothing(causal):
    """A token whose only score is -inf has weights of 0 / 0, and no product of its own shows it."""
    lengths = [2, 1, 3]
    (q, k, v), do = batch(lengths=lengths, heads=(1, 1))
    rows = rows_of(lengths, [1]).to(DEVICE)
    want = run([q, k, v], lengths, causal, do=do)
    bad = q.clone()
    bad[rows, 0, 2] = -torch.inf * k[rows, 0, 2].sign()
    got = run([bad, k, v], lengths, causal, do=do)
    same_bits(got, want, ~rows)
    assert got["out"][rows].isnan().all()


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (4, 1)], ids=str)
def test_nan_of_one_head(heads, name):
    """It reaches its head's output, and gradients of the keys that all heads of the group read."""
    lengths, causal = [3, 5, 2], name in "kv"
    qkv, do = batch(lengths=lengths, heads=heads)
    given = dict(zip(("q", "k", "v", "do"), (*qkv, do), strict=True))
    want = run(qkv, lengths, causal, do=do)
    rows = rows_of(lengths, [1]).to(DEVICE)
    for head in {0, given[name].shape[1] - 1}:
        bad = given[name].clone()
        bad[rows, head] = torch.nan
        *poisoned, back = {**given, name: bad}.values()
        same_bits(run(poisoned, lengths, causal, do=back), want, ~rows)


@both_masks
def test_nan_in_fp32(causal):
    """Every token that sees it has it: a maximum that ignores NaN must not hide it."""
    qkv, do = batch(torch.float32, heads=(1, 1))
    for at in (0, 1, 2):
        poisoned = [x.clone() for x in qkv]
        seen = torch.zeros(sum(LENGTHS), dtype=torch.bool, device=DEVICE)
        for i in (1, 3):
            first, last = sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])
            poisoned[at][first, 0, 3] = torch.nan
            seen[first : first + 1 if at == 0 else last] = True
        got = run(poisoned, LENGTHS, causal, do=do)
        rows = rows_of(LENGTHS, (1, 3)).to(DEVICE)
        same_bits(got, clean(torch.float32, causal, (1, 1)), ~rows)
        assert got["out"][seen].isnan().any(-1).all()


@pytest.mark.parametrize("fp32", [False, True], ids=["", "fp32"])
@both_masks
def test_nan_in_long_neighbour(causal, fp32, monkeypatch):
    """Blocks of keys and of queries end behind their sequence, on either side."""
    lengths = [66, 67, 65]
    if fp32:  # as on a GPU, whose tiles in fp32 have 16 tokens
        from mlembed_kernels.attention import _forward

        monkeypatch.setattr(_forward, "INTERPRETED", False)
        lengths = [18, 17, 3, 20]
    qkv, do = batch(torch.float32 if fp32 else HALF, lengths, (1, 1))
    rows = rows_of(lengths, (1,)).to(DEVICE)[:, None, None]
    nothing = [x.masked_fill(rows, torch.nan) for x in (*qkv, do)]
    got = run(nothing[:3], lengths, causal, do=nothing[3])
    same_bits(got, run(qkv, lengths, causal, do=do), ~rows[:, 0, 0])


# ---- inactive sequences ----


@pytest.mark.parametrize(("n", "causal", "sort"), all_pairs([0, 1, 2, 4, 5], [True, False], SORTS))
def test_a_prefix_is_a_batch_of_its_own(n, causal, sort):
    """Layer-skip attention. For n = 1, 2, 5 the prefix ends within a tile of the batch."""
    dtype, heads = sort
    qkv, do = batch(dtype, heads=heads)
    T = sum(LENGTHS[:n])
    wanted = run([x[:T].clone() for x in qkv], LENGTHS[:n], causal, do=do[:T].clone())
    for x in (*qkv, do):
        x[T:] = torch.nan
    cu = bounds(LENGTHS)[: n + 1]
    options = {"cu_seqlens": cu, "plan": AttentionPlan.of(cu).to(DEVICE)}
    got = run([x[:T] for x in qkv], LENGTHS, causal, do=do[:T], **options)
    same_bits(got, wanted)
    assert got["out"].isfinite().all()


# By flags: within tiles of several, whole tiles, a long one next to another; none, all.
ACTIVE = {
    "ends_of_tiles": ([1, 0, 1, 1, 0, 1], True),
    "middle_of_tiles": ([0, 1, 0, 0, 1, 0], True),
    "middle_of_tiles_seen": ([0, 1, 0, 0, 1, 0], False),
    "whole_tiles": ([0, 0, 0, 1, 0, 0], False),
    "none": ([0] * 6, False),
    "all": ([1] * 6, True),
    "prefix": ([1, 1, 0, 0, 0, 0], False),
    "longer_prefix": ([1, 1, 1, 1, 0, 0], True),
    "longest_prefix": ([1, 1, 1, 1, 1, 0], False),
}


# Each by one sort of tiles; by both in `make test-all`.
ACTIVE_BY = [
    pytest.param(*case, *sort, id=f"{name}-{sort[0]}", marks=[pytest.mark.slow] * ((i + j) % 2))
    for i, (name, case) in enumerate(ACTIVE.items())
    for j, sort in enumerate(SORTS)
]


@pytest.mark.parametrize(("flags", "causal", "dtype", "heads"), ACTIVE_BY)
def test_inactive_rows_are_unread_and_zero(flags, causal, dtype, heads):
    causal = causal == (dtype == HALF)
    qkv, do = batch(dtype, heads=heads)
    active = torch.tensor(flags, dtype=torch.bool, device=DEVICE)
    here = rows_of(LENGTHS, [i for i, flag in enumerate(flags) if flag]).to(DEVICE)
    poisoned = [torch.where(here[:, None, None], x, torch.nan) for x in (*qkv, do)]
    got = run(poisoned[:3], LENGTHS, causal, active=active, do=poisoned[3])
    for x, all_active in zip(got.values(), clean(dtype, causal, heads).values(), strict=True):
        assert (x[~here] == 0).all()
        # A kernel of its own, compiled to its own order of sums.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x[here], all_active[here], rtol=4 * eps, atol=16 * eps)
    if flags == sorted(flags, reverse=True):  # the same as a count, of any shape of one
        shape, size = ((), torch.int64) if causal else ((1,), torch.int32)
        count = torch.full(shape, sum(flags), dtype=size, device=DEVICE)
        same_bits(run(poisoned[:3], LENGTHS, causal, active=count, do=poisoned[3]), got)


@both_masks
def test_inactive_long_sequence(causal):
    """Tiles of odd groups begin with two masked blocks, of which nothing is read."""
    lengths = [530, 2, 515]
    qkv, do = batch(lengths=lengths, heads=(3, 1))
    here = rows_of(lengths, [1, 2]).to(DEVICE)
    poisoned = [torch.where(here[:, None, None], x, torch.nan) for x in (*qkv, do)]
    active = torch.tensor([False, True, True], device=DEVICE)
    got = run(poisoned[:3], lengths, causal, active=active, do=poisoned[3])
    want = run([x[here] for x in qkv], lengths[1:], causal, do=do[here])
    eps = torch.finfo(HALF).eps
    for name, x in got.items():
        assert (x[~here] == 0).all()
        torch.testing.assert_close(x[here], want[name], rtol=4 * eps, atol=16 * eps)


# ---- calls ----


@every_dtype
@both_masks
def test_two_calls_same_bits(causal, dtype):
    lengths = [1500, 3, 700, 64, 90] if DEVICE == "cuda" else [66, 3]
    qkv, do = batch(dtype, lengths, (4, 2) if DEVICE == "cuda" else (1, 1))
    same_bits(*(run(qkv, lengths, causal, do=do) for _ in range(2)))


def fused(T: int, H: int, K: int, extra: int = 0) -> list[Tensor]:
    """q, k, v as slices of one projection, with numbers between its rows where there is `extra`."""
    whole = torch.randn(T, (H + 2) * K + extra, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.unflatten(1, (-1, K)) for x in whole[:, : (H + 2) * K].split([H * K, K, K], 1))
    return [q, k, v]


def on_device(x: Tensor) -> Tensor:
    """Return x in half precision, with its strides and storage offset."""
    storage = torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0)
    return storage.to(DEVICE, HALF).as_strided(x.shape, x.stride(), x.storage_offset())


def layouts() -> dict[str, list[Tensor]]:
    T, H, K = sum(SPREAD), 2, 16
    random = torch.Generator().manual_seed(0)

    def x(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    flat = x(2 * T * H * K)
    return {
        "fused": fused(T, H, K),
        "fused_odd_rows": fused(T, H, K, extra=3),  # rows that 16 bytes do not divide
        "stacked": list(x(T, 3, H, K).unbind(1)),
        "stacked_first": list(x(3, T, H, K).unbind(0)),
        "unlike_rows": [x(T, H + n, K)[:, :H] for n in (1, 2, 4)],
        "heads_first": [x(H, T, K).transpose(0, 1) for _ in range(3)],
        "width_first": [x(T, K, H).transpose(1, 2) for _ in range(3)],
        "every_other_number": [x(T, H, 2 * K)[..., ::2] for _ in range(3)],
        "every_other_token": [x(2 * T, H, K)[1::2] for _ in range(3)],
        "some_heads": [x(T, H + 1, K)[:, 1:] for _ in range(3)],
        "one_key_head_for_all": [x(T, H, K), *(x(T, 1, K).expand(T, H, K) for _ in range(2))],
        "one_token_for_all": [x(1, H, K).expand(T, H, K) for _ in range(3)],
        "one_number_for_all": [x(1, 1, 1).expand(T, H, K) for _ in range(3)],
        "overlapping": [flat.as_strided((T, H, K), (K, K, 1)) for _ in range(3)],
        "not_from_16_bytes": [flat[1 : 1 + T * H * K].view(T, H, K) for _ in range(3)],
    }


SPREAD = [2, 66]  # a tile of short ones, tiles of a longer one
TAKEN_AS_THEY_ARE = (
    "fused", "stacked", "stacked_first", "every_other_token", "some_heads", "unlike_rows",
)  # fmt: skip
# The queries of the last two are contiguous.
UNCOPIED = *TAKEN_AS_THEY_ARE, "one_key_head_for_all", "not_from_16_bytes"
LAYOUTS = layouts()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    odd = [on_device(x) for x in LAYOUTS[name]]
    lengths = SPREAD if name in TAKEN_AS_THEY_ARE else [64, 4]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in odd]
    do = cotangent(plain[0].shape, plain[0])
    same_bits(run(odd, lengths, do=do), run(plain, lengths, do=do))


@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_of_a_projection_are_not_copied(name):
    from mlembed_kernels.attention._op import _side_by_side

    for x in map(on_device, LAYOUTS[name][:1]):
        assert (_side_by_side(x).data_ptr() == x.data_ptr()) == (name in UNCOPIED)


def test_layouts_of_the_cotangent():
    qkv, do = batch(lengths=SPREAD)
    T, H, K = do.shape
    stripes = torch.zeros(T, 2 * H * K, device=DEVICE, dtype=HALF)[:, : H * K].view(T, H, K)
    for odd in (
        torch.ones((), device=DEVICE, dtype=HALF).expand_as(do),  # of out.sum()
        do[:1].expand_as(do),
        do.transpose(0, 1).contiguous().transpose(0, 1),
        stripes.copy_(do),
    ):
        same_bits(run(qkv, SPREAD, do=odd), run(qkv, SPREAD, do=odd.contiguous()))
    q, k, v = (x.requires_grad_() for x in qkv)
    out = triton(q, k, v, cu_seqlens=bounds(SPREAD), causal=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    want = run(qkv, SPREAD, do=torch.ones_like(do))
    assert all(torch.equal(g, want[n]) for g, n in zip(grads, ("dq", "dk", "dv"), strict=True))


def test_the_layout_of_what_comes_out():
    qkv = [x.to(DEVICE).requires_grad_() for x in fused(sum(SPREAD), 2, 16)]
    out = triton(*qkv, cu_seqlens=bounds(SPREAD), causal=True)
    assert out.is_contiguous()
    assert all(g.is_contiguous() for g in torch.autograd.grad(out.square().sum(), qkv))


def test_one_token_of_a_fused_projection():
    """How far its row is from the next means nothing."""
    odd = [on_device(x)[5:6] for x in fused(9, 2, 16, extra=3)]
    same_bits(run(odd, [1]), run([x.clone() for x in odd], [1]))


def test_no_second_derivative():
    """None is there; that must not pass for zero."""
    qkv = [x.requires_grad_() for x in on(DEVICE, HALF, inputs([3], (1, 1)))]
    out = triton(*qkv, cu_seqlens=bounds([3]), causal=True)
    grads = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        grads[0].sum().backward()


@both_masks
@pytest.mark.parametrize("active", [None, 0, [False] * 0], ids=["", "count", "flags"])
def test_no_sequences(active, causal):
    qkv = [torch.zeros(0, H, 16, device=DEVICE) for H in (4, 2, 2)]
    if active is not None:
        active = torch.tensor(active, device=DEVICE, dtype=torch.bool if active == [] else None)
    got = run(qkv, [], causal, active=active)
    assert [tuple(x.shape) for x in got.values()] == [(0, H, 16) for H in (4, 4, 2, 2)]


def test_saved_memory():
    """Inputs, output, one fp32 number a row and head, and the lists: nothing of n x n."""
    lengths = [3, 66, 5]
    qkv = [x.requires_grad_() for x in on(DEVICE, torch.float16, inputs(lengths, (2, 1)))]
    T, saved = sum(lengths), {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = triton(*qkv, cu_seqlens=bounds(lengths), causal=True)
    plan = AttentionPlan.of(bounds(lengths)).buffer
    want = sum(x.numel() * 2 for x in (*qkv, out)) + 4 * 2 * T + 4 * plan.numel()
    assert sum(saved.values()) == want
    assert torch.autograd.grad(out.sum(), qkv)


# ---- errors before any launch ----


def wrong() -> dict[str, tuple[dict, str]]:
    """Return changes to a batch of 2 + 3 + 66 tokens, and the errors that they cause."""
    cu = [0, 2, 5, 71]
    q, k, v = (torch.zeros(71, H, 16) for H in (4, 2, 2))
    wide = {n: [torch.zeros(71, H, n) for H in (4, 2, 2)] for n in (8, 24, 136, 144)}
    meta = torch.zeros(71, 2, 16, device="meta")
    changes: dict[str, tuple[dict, str]] = {
        "falling": ({"cu_seqlens": [0, 5, 2, 71]}, r"rising .*got \[5, 2\] at 1"),
        "empty_sequence": ({"cu_seqlens": [0, 2, 2, 71]}, r"no sequence is empty.* got \[2, 2\]"),
        "not_from_0": ({"cu_seqlens": [1, 2, 5, 71]}, "expected 0 = first"),
        "not_to_the_end": ({"cu_seqlens": [0, 2, 5, 70]}, "the last to be T = 71, got 70"),
        "beyond_the_end": ({"cu_seqlens": [0, 2, 5, 72]}, "the last to be T = 71, got 72"),
        "floats": ({"cu_seqlens": [0.0, 2.0, 5.0, 71.0]}, "cu_seqlens: expected integers"),
        "two_axes": ({"cu_seqlens": [cu]}, "cu_seqlens: expected integers"),
        "heads": ({"q": torch.zeros(71, 3, 16)}, "expected Hkv to divide Hq, got 2 and 3"),
        "no_heads": ({"k": k[:, :0], "v": v[:, :0]}, "expected Hkv to divide Hq, got 0 and 4"),
        "unlike_tokens": ({"k": k[:70], "v": v[:70]}, "q, k, v: expected"),
        "unlike_widths": ({"q": torch.zeros(71, 4, 32)}, "q, k, v: expected"),
        "no_tokens_axis": ({"q": q[0]}, "q, k, v: expected"),
        "unlike_values": ({"v": v[:, :1]}, "q, k, v: expected"),
        "dtypes": ({"k": k.half()}, "expected one dtype, got .*float32, .*float16, .*float32"),
        "double": (
            {n: x.double() for n, x in zip("qkv", (q, k, v), strict=True)},
            "triton supports",
        ),
        "integers": ({n: x.int() for n, x in zip("qkv", (q, k, v), strict=True)}, "floating dtype"),
        "devices": ({"v": meta}, "expected one device, got cpu, cpu, meta"),
        "plan_of_other_tokens": ({"plan": [0, 2, 5, 80]}, "the last to be T = 71|plan: expected"),
        "plan_of_other_sequences": ({"plan": [0, 5, 71]}, "plan: expected .* got"),
        "plan_of_other_boundaries": ({"plan": [0, 3, 5, 71]}, "plan: expected that of cu_seqlens"),
        "plan_elsewhere": ({"plan": "meta"}, "plan: expected .*cpu.* got .*meta"),
        "too_few_flags": ({"active": torch.ones(2).bool()}, r"active: expected bool \[3\]"),
        "flags_of_tokens": ({"active": torch.ones(71).bool()}, r"active: expected bool \[3\]"),
        "flags_as_integers": ({"active": torch.ones(3).long()}, "active: .* got torch.int64"),
        "a_flag": ({"active": torch.tensor(True)}, "active: expected"),
        "a_part": ({"active": torch.tensor(0.5)}, "active: .* got torch.float32"),
        "flags_elsewhere": ({"active": torch.ones(3, device="meta").bool()}, "active: .* on meta"),
    }
    for n, x in wide.items():
        changes[f"K_{n}"] = (dict(zip("qkv", x, strict=True)), f"multiples of 16, got K = {n}")
    if DEVICE == "cpu":
        half = {n: x.bfloat16() for n, x in zip("qkv", (q, k, v), strict=True)}
        changes["bf16_interpreted"] = (half, "interpreter does not support bf16")
    return changes


WRONG = wrong()
TRITON_ONLY = {"double", "bf16_interpreted", *(name for name in WRONG if name.startswith("K_"))}
IMPLS = [(n, i) for n in WRONG for i in ("triton", "sdpa") if i == "triton" or n not in TRITON_ONLY]


@pytest.mark.parametrize(("name", "impl"), IMPLS)
def test_wrong_arguments(name, impl, monkeypatch):
    from mlembed_kernels.attention import _backends, _op

    change, message = WRONG[name]
    if name == "plan_of_other_boundaries" and DEVICE == "cuda":
        pytest.skip("boundaries on a device are not compared")
    given = {n: torch.zeros(71, H, 16) for n, H in zip("qkv", (4, 2, 2), strict=True)}
    given = {**given, "cu_seqlens": [0, 2, 5, 71], **change}
    given["cu_seqlens"] = torch.tensor(given["cu_seqlens"])
    if "plan" in given:
        elsewhere = given["plan"] == "meta"
        plan = AttentionPlan.of(torch.tensor([0, 2, 5, 71] if elsewhere else given["plan"]))
        given["plan"] = plan.to("meta") if elsewhere else plan.to(DEVICE)
    if DEVICE == "cuda":
        given = {
            n: x.cuda() if isinstance(x, Tensor) and x.device.type == "cpu" else x
            for n, x in given.items()
        }
        message = message.replace("cpu", "cuda(:0)?")
    monkeypatch.setattr(_op, "run", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(_backends, "sdpa", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        attention(**given, causal=True, impl=impl)


def test_triton_on_cpu_needs_interpreter(monkeypatch):
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    qkv = [torch.zeros(5, H, 16) for H in (4, 2, 2)]
    with pytest.raises(ValueError, match="impl: triton needs CUDA"):
        triton(*qkv, cu_seqlens=bounds([5]), causal=True)
