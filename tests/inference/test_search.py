"""Exact search against sorting by hand, and two stages against both stages by hand."""

import numpy as np
import pytest
import torch
from factories import tiny_encoder, tiny_tokenizer

from mlembed.inference import search
from mlembed.inference.encoder import Encoder
from mlembed.inference.search import Funnel, Nearest

WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]
RNG = np.random.default_rng(0)
DOCUMENTS = [" ".join(RNG.choice(WORDS, 6)) for _ in range(90)]
QUERIES = [" ".join(RNG.choice(WORDS, 3)) for _ in range(7)]
SMALL, FULL = (4, 1, 4), (24, 3, 8)


# ---- exact search ----


@pytest.mark.parametrize("chunk, block", [(100, 2**24), (7, 2**24), (1, 2**24), (13, 40)])
def test_nearest_is_a_stable_sort(chunk, block, monkeypatch):
    """Chunks and blocks have any size; of equal scores the lower rows, at the last place too."""
    monkeypatch.setattr(search, "BLOCK", block)
    monkeypatch.setattr(search, "CHUNK", chunk)
    whole = torch.randint(-1, 2, (56, 3), generator=torch.Generator().manual_seed(0)).float()
    real = torch.randn(56, 5, generator=torch.Generator().manual_seed(0))
    for vectors in (whole, real):
        queries, documents = vectors[:6], vectors[6:]
        products = (queries @ documents.T).numpy()
        for k in (1, 8, 50, 60):
            scores, rows = search.nearest(queries, documents, k)
            want = np.argsort(-products, axis=1, kind="stable")[:, :k]
            assert rows.tolist() == want.tolist()
            np.testing.assert_allclose(scores, np.take_along_axis(products, want, 1), atol=1e-5)


def test_vectors_that_are_not_of_length_one():
    """Queries count once, for any number of chunks."""
    vectors = torch.eye(5)[:, :4]
    vectors[1, 2], vectors[3, 0] = torch.nan, torch.inf
    assert search.not_unit(vectors) == 3
    vectors = vectors[:4]
    nearest = Nearest(4, 1)
    for documents in vectors.split(2):
        nearest.add(vectors, documents)
    assert nearest.not_unit == 4


def test_rank_again():
    scores = np.array([[0.5, 0.9, 0.5, 0.1]], np.float32)
    assert search.rank_again(scores, np.array([[7, 4, 3, 1]]), 3).tolist() == [[1, 2, 0]]


# ---- two stages ----


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    shape = {"num_hidden_layers": 3, "exits": (1, 3), "ranks": (4, 8)}
    return tiny_encoder(tiny_tokenizer(WORDS * 5), 32, **shape)


def by_hand(encoder, small, full, shortlist, k, before=("", "")):
    """Return rows, scores and the shortlist of each query."""
    queries = [before[0] + text for text in QUERIES]
    documents = [before[1] + text for text in DOCUMENTS]
    sizes = small, full
    cosines = [encoder.encode(queries, *s) @ encoder.encode(documents, *s).T for s in sizes]
    listed = np.argsort(-cosines[0], axis=1, kind="stable")[:, :shortlist]
    among = np.take_along_axis(cosines[1], listed, axis=1)
    order = np.argsort(-among, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(listed, order, 1), np.take_along_axis(among, order, 1), listed


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    "small, full",
    [
        (SMALL, FULL),  # two passes
        ((4, 1, 8), FULL),  # two exits of one pass
        ((4, 3, 8), FULL),  # a prefix
        ((8, None, None), (None, None, None)),
        ((4, 3, 4), (32, 3, 8)),
    ],
)
def test_funnel(encoder, stored, small, full, monkeypatch):
    monkeypatch.setattr(search, "CHUNK", 32)
    funnel = Funnel.build(encoder, DOCUMENTS, small, full, stored=stored)
    result = funnel.search(QUERIES, k=5, shortlist=12)
    rows, cosines, listed = by_hand(encoder, small, full, 12, 5)
    assert result.rows_QK.tolist() == rows.tolist()
    np.testing.assert_allclose(result.scores_QK, cosines, atol=1e-5)
    narrow, wide = small[0], full[0] or 32
    assert result.scanned == pytest.approx((90 * narrow + 12 * wide) / (90 * wide))
    assert result.encoded == (1 if stored else len(np.unique(listed)) / 90)
    again = funnel.search(QUERIES[::-1], k=5, shortlist=12)
    assert again.rows_QK.tolist() == rows[::-1].tolist() and again.encoded == result.encoded


def test_funnel_encodes_shortlisted_documents_once(encoder):
    funnel = Funnel.build(encoder, DOCUMENTS, SMALL, FULL, stored=False)
    rows, encode = [], funnel.full.encode
    funnel.full.encode = lambda new: [rows.extend(new), encode(new)][1]
    shares = [funnel.search(QUERIES[:n], 3, 10).encoded for n in (2, 7)]
    assert 0 < shares[0] < shares[1] < 1
    assert len(rows) == len(set(rows)) == round(90 * shares[1])
    whole = funnel.search(QUERIES, 3, 90)
    assert whole.encoded == 1 and len(rows) == len(set(rows)) == 90
    assert whole.rows_QK.tolist() == by_hand(encoder, FULL, FULL, 90, 3)[0].tolist()


def test_shortlist_of_all_is_a_full_search(encoder):
    funnel = Funnel.build(encoder, DOCUMENTS, SMALL, FULL)
    result = funnel.search(QUERIES, k=6, shortlist=1000)
    assert result.rows_QK.tolist() == by_hand(encoder, FULL, FULL, 90, 6)[0].tolist()
    assert result.scanned > 1 and funnel.search([]).rows_QK.shape == (0, 10)


@pytest.mark.parametrize("stored", [True, False])
def test_funnel_prompts(encoder, stored):
    before = "sun sun ", "tree "
    prompts = dict(zip(("query", "document"), before, strict=True))
    prompted = Encoder(encoder.model, encoder.tokenizer, 32, prompts=prompts)
    want = by_hand(encoder, SMALL, FULL, 12, 5, before)[0].tolist()
    for options, equal in (({}, True), ({"prompts": {}}, False)):
        funnel = Funnel.build(prompted, DOCUMENTS, SMALL, FULL, stored=stored, **options)
        assert (funnel.search(QUERIES, 5, 12).rows_QK.tolist() == want) == equal


@pytest.mark.parametrize(
    "text, size",
    [
        ("48:2:64", (48, 2, 64)),
        ("48", (48, None, None)),
        ("48::", (48, None, None)),
        (":2", (None, 2, None)),
        ("::64", (None, None, 64)),
    ],
)
def test_size_of(text, size):
    assert search.size_of(text) == size


@pytest.mark.parametrize("text", ["a", "4:1:2:3", "-4", "4;1", "4.0"])
def test_size_of_rejects(text):
    with pytest.raises(ValueError, match=f"funnel: expected DIM:EXIT:RANK.*got '{text}'"):
        search.size_of(text)


def test_funnel_errors(encoder):
    with pytest.raises(ValueError, match=r"dim: expected 1\.\.32"):
        Funnel.build(encoder, DOCUMENTS, (33, 1, 4))
    with pytest.raises(ValueError, match="exit: expected"):
        Funnel.build(encoder, DOCUMENTS, SMALL, (32, 9, 4))
    with pytest.raises(ValueError, match="documents, got none"):
        Funnel.build(encoder, [], SMALL)
    funnel = Funnel.build(encoder, DOCUMENTS, SMALL)
    for k, shortlist in ((11, 10), (0, 10), (1, 0)):
        with pytest.raises(ValueError, match="shortlist: expected at least"):
            funnel.search(QUERIES, k, shortlist)
