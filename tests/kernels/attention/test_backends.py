"""Attention by libraries: errors for missing ones, and calls compared with the reference on CPUs,
through stand-ins with the libraries' own signatures.
"""

import importlib.util
import sys
import types

import pytest
import torch
from attention_truth import assert_as_exact, bounds, inputs, on, results
from pairwise import all_pairs
from torch import Tensor

from mlembed_kernels import AttentionPlan, attention, attention_ref
from mlembed_kernels.attention import _backends

LENGTHS = [3, 1, 97, 64, 2]
PACKAGES = {"flash_attn": "flash_attn", "xformers": "xformers"}
NAMED = ("varlen", "flash_attn", "xformers")
both_masks = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
HEADS = [(2, 2), (4, 2), (3, 1)]
every_heads = pytest.mark.parametrize("heads", HEADS, ids=str)
every_window = pytest.mark.parametrize("window", [{}, {"window": 5}], ids=["all", "window"])


def missing(name: str) -> bool:
    return name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None


# ---- torch's dense attention, which every machine has ----


@both_masks
@every_heads
@pytest.mark.parametrize("active", [None, [True, False, True, True, False], 2], ids=str)
def test_sdpa_of_active_sequences(active, heads, causal):
    qkv = inputs(LENGTHS, heads)
    options = {"cu_seqlens": bounds(LENGTHS), "causal": causal, "scale": 0.2}
    if active is not None:
        options["active"] = torch.tensor(active)
    truth = results(attention_ref, qkv, **options)
    got = results(lambda *x, **o: attention(*x, impl="sdpa", **o), qkv, **options)
    for name, want in truth.items():
        torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-12)


# ---- missing libraries ----


@pytest.mark.parametrize("impl", NAMED)
def test_library_needs_cuda(impl):
    q, k, v = (x.bfloat16() for x in inputs(LENGTHS))
    with pytest.raises(ValueError, match=f"impl: {impl} needs CUDA, got cpu"):
        attention(q, k, v, cu_seqlens=bounds(LENGTHS), causal=True, impl=impl)


@pytest.mark.parametrize(
    ("impl", "line"),
    [
        ("flash_attn", "pip install --no-build-isolation 'flash-attn>=2.8'"),
        ("xformers", "pip install 'mlembed[xformers]'"),
    ],
)
def test_missing_package(impl, line, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[impl], None)
    monkeypatch.setitem(sys.modules, f"{PACKAGES[impl]}.ops", None)
    with pytest.raises(ValueError, match=f"impl: {impl} needs the package") as caught:
        getattr(_backends, f"_{impl}")()
    assert line in str(caught.value)


def test_old_torch(monkeypatch):
    # torch 2.10: the module is there, without a factor on the scores.
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError

    for old in (types.SimpleNamespace(varlen_attn=varlen_attn), None):
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
        with pytest.raises(ValueError, match="impl: varlen needs torch 2.11 or newer, got"):
            _backends._varlen.__wrapped__()


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it lies on a GPU: what is asked before anything is launched."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("impl", NAMED)
def test_unsupported_inputs(impl):
    def call(dtype: torch.dtype, K: int, lengths: list[int]) -> None:
        q, k, v = (x.to(dtype).as_subclass(OnCuda) for x in inputs(lengths, K=K))
        getattr(_backends, impl)(q, k, v, AttentionPlan.of(bounds(lengths)), 1.0, True)

    with pytest.raises(
        ValueError, match=f"impl: {impl} supports torch.bfloat16.*, got torch.float64"
    ):
        call(torch.float64, 64, LENGTHS)
    if impl != "xformers":
        with pytest.raises(
            ValueError, match=f"impl: {impl} supports torch.bf?.*, got torch.float32"
        ):
            call(torch.float32, 64, LENGTHS)
    for K in (12, 264):
        with pytest.raises(
            ValueError, match=f"impl: {impl} supports heads of 8 to 256.* got K = {K}"
        ):
            call(torch.float16, K, LENGTHS)
    with pytest.raises(ValueError, match=f"impl: {impl} needs one or more sequences, got none"):
        call(torch.float16, 64, [])


# ---- calls ----


def same(causal: bool, heads: tuple[int, int], impl: str, **local: int) -> None:
    """`impl`, its library replaced, equals the reference: boundaries, scale, mask and heads."""
    qkv = inputs(LENGTHS, heads)
    plan = AttentionPlan.of(bounds(LENGTHS))

    def call(q, k, v):
        return getattr(_backends, impl)(q, k, v, plan, 0.3, causal, **local)

    options = {"scale": 0.3, "causal": causal, **local}
    truth = results(attention_ref, qkv, cu_seqlens=bounds(LENGTHS), **options)
    for name, got in results(call, qkv).items():
        torch.testing.assert_close(got, truth[name], rtol=1e-10, atol=1e-12)


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(_backends, "_check", lambda *_: None)
    return monkeypatch


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    scale: float,
    causal: bool,
    sides: tuple[int, int] = (-1, -1),
) -> Tensor:
    """sides: numbers of tokens that a token sees before and after itself, -1 for all."""
    assert cu.dtype == torch.int32 and cu.is_contiguous()
    assert sides[1] in ((0, -1, sides[0]) if causal else (sides[0],))
    window = None if sides[0] < 0 else sides[0] + 1
    return attention_ref(q, k, v, cu_seqlens=cu, scale=scale, causal=causal, window=window)


@both_masks
@every_heads
@every_window
@pytest.mark.parametrize("grouped", [False, True], ids=["2.11", "2.12"])
def test_call_of_varlen(grouped, window, heads, causal, anywhere):
    def attend(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size):
        assert cu_q is cu_k or torch.equal(cu_q, cu_k)
        assert max_q == max_k == 97 and type(max_q) is int
        assert q.shape[1] % k.shape[1] == 0
        return reference(q, k, v, cu_q, scale, window_size[1] == 0, window_size)

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1)):  # fmt: skip
        assert query.shape == key.shape
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    def of_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
                block_table=None, num_splits=None):  # fmt: skip
        assert enable_gqa
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    chosen = of_2_12 if grouped else of_2_11
    anywhere.setitem(
        sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=chosen)
    )
    found = _backends._varlen.__wrapped__()
    assert found == (chosen, grouped)
    anywhere.setattr(_backends, "_varlen", lambda: found)
    same(causal, heads, "varlen", **window)


def test_torch_has_varlen():
    attend, grouped = _backends._varlen()
    assert attend.__module__ == "torch.nn.attention.varlen" and type(grouped) is bool


@both_masks
@every_heads
@every_window
def test_call_of_flash_attn(window, heads, causal, anywhere):
    # flash-attn 2.8.3.
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               dropout_p=0.0, softmax_scale=None, causal=False,
                               window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False,
                               block_table=None):  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == 97
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        return reference(q, k, v, cu_seqlens_q, softmax_scale, causal, window_size)

    stand_in = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    anywhere.setitem(sys.modules, "flash_attn", stand_in)
    same(causal, heads, "flash_attn", **window)


class Blocks:
    def __init__(self, q_seqinfo, k_seqinfo, _batch_sizes=None):
        assert q_seqinfo.seqstart_py == k_seqinfo.seqstart_py  # all that kernels ask of the lists
        assert q_seqinfo.max_seqlen == 97 and q_seqinfo.seqstart is k_seqinfo.seqstart
        self.cu_seqlens = q_seqinfo.seqstart


class CausalBlocks(Blocks):
    pass


@both_masks
@every_heads
def test_call_of_xformers(heads, causal, anywhere):
    # xformers 0.0.35.
    def seqleninfo(seqstart, max_seqlen, min_seqlen, seqstart_py):
        return types.SimpleNamespace(**locals())

    def attend(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.shape == key.shape == value.shape and query.ndim == 4 and len(query) == 1
        causal = type(attn_bias) is CausalBlocks
        out = reference(query[0], key[0], value[0], attn_bias.cu_seqlens, scale, causal)
        return out[None]

    attn_bias = types.SimpleNamespace(
        _SeqLenInfo=seqleninfo, BlockDiagonalMask=Blocks, BlockDiagonalCausalMask=CausalBlocks
    )
    fmha = types.SimpleNamespace(attn_bias=attn_bias, memory_efficient_attention=attend)
    anywhere.setattr(_backends, "_xformers", lambda: fmha)
    same(causal, heads, "xformers")


@both_masks
@pytest.mark.skipif(missing("xformers"), reason="xformers is not installed")
def test_mask_of_xformers(causal):
    attn_bias = _backends._xformers().attn_bias
    cu_seqlens = bounds(LENGTHS)
    mask = _backends._block_diagonal(attn_bias, AttentionPlan.of(cu_seqlens), causal)
    kind = attn_bias.BlockDiagonalCausalMask if causal else attn_bias.BlockDiagonalMask
    theirs = kind.from_seqlens(LENGTHS, device=torch.device("cpu"))
    assert type(mask) is type(theirs)
    assert torch.equal(mask.q_seqinfo.seqstart, theirs.q_seqinfo.seqstart)
    assert mask.q_seqinfo.seqstart.dtype == theirs.q_seqinfo.seqstart.dtype
    assert mask.q_seqinfo.max_seqlen == theirs.q_seqinfo.max_seqlen
    mask.q_seqinfo.seqstart_py = cu_seqlens.tolist()  # what only drawing it needs
    sequence_T = torch.repeat_interleave(torch.tensor(LENGTHS))
    sees = sequence_T[:, None] == sequence_T
    sees = sees.tril() if causal else sees
    drawn = mask.materialize((1, 1, len(sees), len(sees)))[0, 0]
    assert torch.equal(drawn == 0, sees) and (drawn[~sees] == -torch.inf).all()


# ---- on a GPU ----

HALVES = [torch.bfloat16, torch.float16]
ON_CUDA = all_pairs(NAMED, [48, 64, 128], HALVES, HEADS, [True, False])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("impl", "K", "dtype", "heads", "causal"), ON_CUDA)
def test_on_cuda(impl, K, dtype, heads, causal):
    if missing(impl):
        pytest.skip(f"{impl} is not installed")
    lengths = [*LENGTHS, 300]
    qkv = on("cuda", dtype, inputs(lengths, heads, K))
    options = {"cu_seqlens": bounds(lengths), "causal": causal}
    got = results(lambda *x, **o: attention(*x, impl=impl, **o), qkv, **options)
    assert_as_exact(got, qkv, lengths, causal=causal)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("impl", NAMED)
def test_no_call_waits_for_the_device(impl, no_wait):
    if missing(impl):
        pytest.skip(f"{impl} is not installed")
    q, k, v = (x.requires_grad_() for x in on("cuda", torch.bfloat16, inputs(LENGTHS, K=64)))
    cu_seqlens = bounds(LENGTHS)
    plan = AttentionPlan.of(cu_seqlens).to(q.device)

    def step() -> None:
        cu = plan.cu_seqlens
        attention(q, k, v, cu_seqlens=cu, causal=True, impl=impl, plan=plan).sum().backward()

    step()  # loads and allocates
    torch.cuda.synchronize()
    with no_wait():
        step()
