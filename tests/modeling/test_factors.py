"""Factors of the vocabulary: against torch's SVD in float64, cached, and read back as saved."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import odd_shape, random_model, randomise
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3Model

from mlembed import config
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling import vocabulary as vocabulary_module
from mlembed.modeling.transformer import num_parameters
from mlembed.modeling.vocabulary import cached_factors, factorise, warn_beyond_break_even

CFG = odd_shape(num_hidden_layers=1)
NESTED = replace(CFG, ranks=(3, 7, 11))


def falling(V, D, seed=0):
    """Return a table with a falling spectrum, like trained ones, and Zipf counts of its tokens."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(V, D, generator=generator) * torch.logspace(0, -2, D)
    counts = 10_000 // torch.arange(1, V + 1)
    return table, counts[torch.randperm(V, generator=generator)]


def misses(table, U, W):
    """Return |E_v - U_v W|^2 of each token, in float64."""
    return (table.double() - U.double() @ W.double()).square().sum(1)


# ---- the factorisation ----


# V > D like vocabularies, V < D, V = D.
@pytest.mark.parametrize("shape", [(101, 24), (7, 24), (24, 24)], ids=str)
def test_factorise_is_the_best_approximation(shape):
    table, _ = falling(*shape)
    full = min(shape)
    U, s, Vh = torch.linalg.svd(table.double(), full_matrices=False)
    for rank in (1, full // 2, full):
        left, right = factorise(table, rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        assert left.dtype == right.dtype == torch.float32
        best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        torch.testing.assert_close((left @ right).double(), best, rtol=0, atol=1e-5)
        # Best directions first, orthonormal: slices of lower rank are the best of that rank.
        norms = left.norm(dim=0).double()
        torch.testing.assert_close(norms, s[:rank], rtol=1e-4, atol=1e-5)
        identity = torch.eye(rank)
        torch.testing.assert_close(right @ right.T, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(left @ right, table, rtol=0, atol=1e-5)


def test_factorise_of_a_table_of_low_rank():
    # Rank 3 in a table of width 24: rank 3 is exact, and the empty directions are not NaN.
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(101, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    for rank in (3, 24):
        left, right = factorise(table, rank)
        torch.testing.assert_close(left @ right, table, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_arguments_stay_as_they_are(dtype):
    table, counts = (x.to(dtype) for x in falling(31, 8))
    before = table.clone(), counts.clone()
    U, W = factorise(table, 5, counts)
    assert U.dtype == W.dtype == torch.float32
    assert torch.equal(table, before[0]) and torch.equal(counts, before[1])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_chunks_of_rows_do_not_matter(weighted, monkeypatch):
    table, counts = falling(101, 24)
    given = counts if weighted else None
    U, W = factorise(table, 11, given)
    for elements in (1, 24 * 100, 24 * 7):  # a row at a time, all but one, seven
        monkeypatch.setattr(vocabulary_module, "ELEMENTS", elements)
        left, right = factorise(table, 11, given)
        torch.testing.assert_close(left, U, rtol=0, atol=1e-6)
        torch.testing.assert_close(right, W, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_lower_ranks_are_the_first_columns(weighted):
    table, counts = falling(101, 24)
    given = counts if weighted else None
    whole = factorise(table, 24, given)
    for rank in (1, 11):
        U, W = factorise(table, rank, given)
        assert torch.equal(W, whole[1][:rank])
        torch.testing.assert_close(U, whole[0][:, :rank], rtol=0, atol=1e-6)


def test_weighted_is_the_svd_of_the_weighted_table():
    """U W is C^(-1/2) times the best rank-r approximation of C^(1/2) E, by torch's SVD."""
    table, counts = falling(101, 24)
    root = (counts.double() + 1).sqrt()[:, None]
    left, s, right = torch.linalg.svd(root * table.double(), full_matrices=False)
    for rank in (1, 11, 24):
        U, W = factorise(table, rank, counts)
        best = left[:, :rank] * s[:rank] @ right[:rank] / root
        torch.testing.assert_close(U.double() @ W.double(), best, rtol=0, atol=1e-5)
        error = (root.square()[:, 0] * misses(table, U, W)).sum().sqrt()
        assert abs(error - s[rank:].square().sum().sqrt()) < 1e-6 * s[0]
        torch.testing.assert_close(W @ W.T, torch.eye(rank), rtol=0, atol=1e-5)
        signs = W.gather(1, W.abs().argmax(1, keepdim=True))
        assert (signs > 0).all()
        # Each of W's rows is torch's singular vector, with its own sign.
        cosines = (W.double() * right[:rank]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)


def test_signs_do_not_depend_on_the_solver(monkeypatch):
    table, counts = falling(101, 24)
    want = factorise(table, 11, counts)
    eigh = torch.linalg.eigh

    def turned(gram):
        values, vectors = eigh(gram)
        return values, vectors * (1 - 2 * (torch.arange(len(values)) % 2))

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    assert all(torch.equal(a, b) for a, b in zip(factorise(table, 11, counts), want, strict=True))


def test_frequent_tokens_are_nearer():
    table, counts = falling(101, 24)
    plain, weighted = factorise(table, 6), factorise(table, 6, counts)
    often = counts.argsort(descending=True)[:10]
    before, after = (misses(table, *factors) for factors in (plain, weighted))
    assert after[often].sum() < 0.8 * before[often].sum()
    assert after.sum() > before.sum()
    # Tokens that are nearly all of the text, up to the rank in number, are exact.
    counts = torch.zeros(101)
    counts[often[:6]] = 1e9
    few = misses(table, *factorise(table, 6, counts))
    assert few[often[:6]].max() < 1e-6 < 1e-2 * before[often[:6]].min()
    assert few.max() <= table.double().square().sum(1).max()


@pytest.mark.parametrize("count", [0, 7, 2.5])
def test_equal_counts_equal_none(count):
    table, _ = falling(101, 24)
    U, W = factorise(table, 11)
    left, right = factorise(table, 11, torch.full((101,), count))
    torch.testing.assert_close(left, U, rtol=0, atol=1e-6)
    torch.testing.assert_close(right, W, rtol=0, atol=1e-6)


def test_errors_of_factorise():
    table, counts = falling(31, 8)
    for rank in (0, 9):
        with pytest.raises(ValueError, match=rf"rank: expected 1..8 .*, got {rank}"):
            factorise(table, rank)
    for odd in (counts[:-1], counts[:, None]):
        with pytest.raises(ValueError, match="counts: expected a number for each of 31 tokens"):
            factorise(table, 3, odd)
    for bad in (-1, float("nan"), float("inf")):
        wrong = counts.double()
        wrong[5] = bad
        with pytest.raises(ValueError, match="counts: expected finite numbers of 0 or more"):
            factorise(table, 3, wrong)
    table[30, 7] = float("nan")
    with pytest.raises(ValueError, match="expected finite numbers"):
        factorise(table, 3)


# ---- the cache ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder of factors, which does not exist yet."""
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "factors"


@pytest.fixture
def computed(monkeypatch) -> list:
    """One entry for each factorisation that was computed."""
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: calls.append(1) or eigh(gram))
    return calls


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_computed_once(dtype, cache, computed):
    table, counts = falling(101, 24)
    table = table.to(dtype)
    want = factorise(table, 11, counts)
    computed.clear()
    for _ in range(3):
        U, W = cached_factors(table.clone(), 11, counts.clone())
        assert len(computed) == 1 and same((U, W), want)
        U.zero_(), W.zero_()  # the caller may change its copy
    assert len(list(cache.iterdir())) == 1


def test_any_change_is_another_entry(cache, computed, monkeypatch):
    table, counts = falling(101, 24)
    other, more = table.clone(), counts.clone()
    other[100, 23] = torch.nextafter(other[100, 23], torch.tensor(9.0))
    more[100] += 1
    half = table.bfloat16()
    some_counts = (counts, more, counts.float(), torch.zeros_like(counts))
    arguments = [
        # The last two tables have the same bytes.
        *((x, 11) for x in (table, other, table.view(24, 101), half, half.view(torch.float16))),
        (table, 10),
        *((table, 11, x) for x in some_counts),
    ]
    for i, some in enumerate(arguments, 1):
        cached_factors(*some)
        assert len(computed) == i
    results = [cached_factors(*some) for some in arguments]
    assert len(computed) == len(arguments) == len(list(cache.iterdir()))
    assert all(same(got, factorise(*a)) for got, a in zip(results, arguments, strict=True))
    computed.clear()
    monkeypatch.setattr(vocabulary_module, "VERSION", vocabulary_module.VERSION + 1)
    cached_factors(table, 11)
    assert len(computed) == 1


def test_damaged_file_is_replaced(cache, computed):
    table, counts = falling(101, 24)
    want = tuple(x.clone() for x in cached_factors(table, 11, counts))
    (file,) = cache.glob("*/*.safetensors")
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(UserWarning, match="is not what was written; it is built again"):
        assert same(cached_factors(table, 11, counts), want)
    assert same(cached_factors(table, 11, counts), want) and len(computed) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("failing", ["mkdir", "write_bytes"])
def test_unwritable_cache_is_a_warning(failing, tmp_path, cache, computed, monkeypatch):
    """A file in the folder's place, or disks that are full, that of temporary files as well."""
    table, counts = falling(101, 24)
    want = factorise(table, 11, counts)
    if failing == "mkdir":
        (tmp_path / "cache").write_text("mine")
    else:

        def full(path, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    computed.clear()
    for count in (1, 2):
        with pytest.warns(UserWarning, match="factors could not be stored"):
            assert same(cached_factors(table, 11, counts), want)
        assert len(computed) == count
    assert not list(cache.glob("*"))
    assert failing != "mkdir" or (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("variable", ["", "~/own", None])
def test_cache_is_under_home(variable, tmp_path, monkeypatch):
    assert not Path(os.environ["MLEMBED_CACHE"]).is_relative_to(Path.home())  # that of the tests
    monkeypatch.setenv("HOME", str(tmp_path))
    if variable is None:
        monkeypatch.delenv("MLEMBED_CACHE")
    else:
        monkeypatch.setenv("MLEMBED_CACHE", variable)
    cached_factors(falling(31, 8)[0], 3)
    place = "own" if variable else ".cache/mlembed"
    assert len(list((tmp_path / place / "factors").iterdir())) == 1


# ---- load ----


def save_by_transformers(directory):
    hf = randomise(Qwen3Model(Qwen3Config(**hf_config.hf_config(CFG))))
    table, counts = falling(101, 24)
    hf.embed_tokens.weight.data = table
    hf.save_pretrained(directory)
    return table, counts


def test_load_factorises_once_with_counts(tmp_path, cache, computed):
    table, counts = save_by_transformers(tmp_path / "hf")
    for given in (None, counts):
        want = factorise(table, 11, given)
        computed.clear()
        for _ in range(2):
            vocabulary = pretrained.load(str(tmp_path / "hf"), NESTED, given).embed_tokens
            assert same((vocabulary.U, vocabulary.W), want) and len(computed) == 1
    assert len(list(cache.iterdir())) == 2
    with pytest.raises(ValueError, match="counts: expected a number for each of 101 tokens"):
        pretrained.load(str(tmp_path / "hf"), NESTED, counts[:-1])
    pretrained.load(str(tmp_path / "hf"), CFG, counts[:-1])  # a plain table does not need them
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_factors_stay_as_they_are(dtype, tmp_path, cache, computed):
    """Trained factors are not an SVD: loading does not rotate, reorder or weight them."""
    model = random_model(NESTED)
    with torch.no_grad():  # a factorisation would put this direction first
        model.embed_tokens.U[:, -1] *= 100
        for p in model.parameters():
            p.copy_(p.to(dtype))
    (tmp_path / "a").mkdir()
    pretrained.save(model, tmp_path / "a")
    saved = model.embed_tokens.U.detach(), model.embed_tokens.W.detach()
    _, counts = falling(101, 24)
    for given in (None, counts):
        again = pretrained.load(str(tmp_path / "a"), counts=given)
        assert again.cfg.ranks == NESTED.ranks
        assert same((again.embed_tokens.U, again.embed_tokens.W), saved)
    for rank in NESTED.ranks:
        lower = pretrained.load(str(tmp_path / "a"), replace(NESTED, ranks=(1, rank)))
        U, W = lower.embed_tokens.U, lower.embed_tokens.W
        assert same((U, W), (saved[0][:, :rank], saved[1][:rank]))
    plain = pretrained.load(str(tmp_path / "a"), CFG).embed_tokens.weight
    torch.testing.assert_close(plain, saved[0] @ saved[1], rtol=1e-6, atol=1e-5)
    stored = load_file(tmp_path / "a" / pretrained.FACTORS)
    assert same((stored["U"], stored["W"]), saved)
    assert not computed and not cache.exists()


# ---- break-even ----


def test_ranks_beyond_the_break_even_warn():
    """At Qwen3-0.6B's shape rank 1017 saves a little and 1018 costs a little."""
    qwen = config.Model(vocab_size=151_936, hidden_size=1024)
    for ranks, got in [((64, 1018), "1018"), ((64, 1018, 1024), "1018, 1024"), ((1024,), "1024")]:
        with pytest.warns(UserWarning) as caught:
            warn_beyond_break_even(replace(qwen, ranks=ranks))
        (message,) = (str(warning.message) for warning in caught)
        assert f"break-even 1017 of 151936 tokens by width 1024, got {got}:" in message
        assert "\n" not in message and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ranks in ((), (64,), (64, 512, 1017)):
            warn_beyond_break_even(replace(qwen, ranks=ranks))


@pytest.mark.parametrize(("V", "D"), [(101, 24), (24, 24), (30, 60), (2, 2), (6, 3)])
def test_break_even_agrees_with_num_parameters(V, D):
    plain = replace(CFG, vocab_size=V, hidden_size=D, exits=(), matryoshka_dims=())
    for rank in range(1, min(V, D) + 1):
        cfg = replace(plain, ranks=(rank,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_beyond_break_even(cfg)
        assert bool(caught) == (num_parameters(cfg) > num_parameters(plain)), rank


# ---- tokens of another model ----


@pytest.mark.parametrize("ranks", [(), (3, 7)], ids=str)
@pytest.mark.parametrize("width", [24, 5], ids="of {}".format)
def test_tokens_start_from_a_trained_table(ranks, width):
    """Rows by hand: an SVD in float64 of the centred table, weighted by the root of the counts."""
    cfg = odd_shape(num_hidden_layers=1, vocab_size=101, ranks=ranks)
    own = vocabulary_module.Vocabulary(cfg)
    table, counts = falling(101, width)
    vocabulary_module.start_from(own, table + 3.0, counts)
    share = (counts.double() + 1) / (counts + 1).sum()
    centred = table.double() - (share[:, None] * table).sum(0)
    root = (counts.double().sqrt() + 1).sqrt()
    right = torch.linalg.svd(root[:, None] * centred, full_matrices=False)[2]
    size = min(width, own.rows.shape[1])
    rows = (centred @ right[:size].T) * (1e-3 / (1e-3 + share))[:, None]
    rows /= (share[:, None] * rows.square()).sum(0).mean().sqrt()
    got = own.rows[:, :size].detach().double()
    got = got * (got * rows).sum(0).sign()  # The sign of a direction is arbitrary.
    torch.testing.assert_close(got, rows, rtol=1e-3, atol=1e-4)
    assert not own.rows[:, size:].any()
    if ranks:
        wide = torch.nn.functional.pad(own.rows, (0, cfg.hidden_size - ranks[-1]))
        torch.testing.assert_close(own.table(), wide, rtol=0, atol=1e-6)
