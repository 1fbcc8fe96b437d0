"""Two steps beside both done by hand, on vectors of each size on its own."""

import numpy as np
import pytest
from factories import randomise

from mlembed import config
from mlembed.data import tokenizer
from mlembed.inference import search
from mlembed.inference.encoder import Encoder
from mlembed.inference.search import Funnel
from mlembed.modeling.transformer import Transformer

WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]
RNG = np.random.default_rng(0)
DOCUMENTS = [" ".join(RNG.choice(WORDS, 6)) for _ in range(90)]
QUERIES = [" ".join(RNG.choice(WORDS, 3)) for _ in range(7)]
SMALL, FULL = (4, 1, 4), (24, 3, 8)


def build(depth: int = 3) -> Encoder:
    learnt = tokenizer.train(WORDS * 5, 300)
    cfg = config.Model(
        vocab_size=learnt.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        exits=(1, depth),
        matryoshka_dims=(4, 32),
        ranks=(4, 8),
    )
    return Encoder(randomise(Transformer(cfg)), learnt, 32)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build()


def by_hand(encoder, small, full, shortlist, k, before=("", "")):
    """(rows, scores, the shortlists) of each query."""
    queries, documents = (
        [prompt + text for text in texts]
        for prompt, texts in zip(before, (QUERIES, DOCUMENTS), strict=True)
    )
    cosines = [
        encoder.encode(queries, *size) @ encoder.encode(documents, *size).T
        for size in (small, full)
    ]
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
def test_both_steps(encoder, stored, small, full, monkeypatch):
    monkeypatch.setattr(search, "CHUNK", 32)
    built = Funnel.build(encoder, DOCUMENTS, small, full, stored=stored)
    found = built.search(QUERIES, k=5, shortlist=12)
    rows, cosines, listed = by_hand(encoder, small, full, 12, 5)
    assert found.rows_QK.tolist() == rows.tolist()
    np.testing.assert_allclose(found.scores_QK, cosines, atol=1e-5)
    narrow, wide = small[0], full[0] or 32
    assert found.scanned == pytest.approx((90 * narrow + 12 * wide) / (90 * wide))
    assert found.encoded == (1 if stored else len(np.unique(listed)) / 90)
    again = built.search(QUERIES[::-1], k=5, shortlist=12)
    assert again.rows_QK.tolist() == rows[::-1].tolist() and again.encoded == found.encoded


def test_it_is_another_search_than_either(encoder):
    """Else the tests above could compare one thing with itself."""
    funnelled = by_hand(encoder, SMALL, FULL, 12, 5)[0].tolist()
    assert funnelled != by_hand(encoder, SMALL, SMALL, 12, 5)[0].tolist()
    assert funnelled != by_hand(encoder, FULL, FULL, 12, 5)[0].tolist()


def test_documents_are_encoded_when_first_shortlisted(encoder):
    """Only new ones, and vectors stay with their documents."""
    built = Funnel.build(encoder, DOCUMENTS, SMALL, FULL, stored=False)
    encoded = [built.search(QUERIES[:2], 3, 10).encoded, built.search(QUERIES, 3, 10).encoded]
    assert 0 < encoded[0] < encoded[1] < 1 and built.full.encoded_N.sum() == round(90 * encoded[1])
    rows = by_hand(encoder, SMALL, FULL, 10, 3)[0]
    assert built.search(QUERIES, 3, 10).rows_QK.tolist() == rows.tolist()
    whole = built.search(QUERIES, 3, 90)  # all of them, in the order in which they came
    assert whole.encoded == 1
    assert whole.rows_QK.tolist() == by_hand(encoder, FULL, FULL, 90, 3)[0].tolist()


def test_a_shortlist_of_all_is_a_full_search(encoder):
    found = Funnel.build(encoder, DOCUMENTS, SMALL, FULL).search(QUERIES, 6, 1000)
    assert found.rows_QK.tolist() == by_hand(encoder, FULL, FULL, 90, 6)[0].tolist()
    assert found.scanned > 1
    assert Funnel.build(encoder, DOCUMENTS, SMALL).search([]).rows_QK.shape == (0, 10)


def test_prompts(encoder):
    before = ("sun sun ", "tree ")
    own = Encoder(
        encoder.model,
        encoder.tokenizer,
        32,
        prompts=dict(zip(("query", "document"), before, strict=True)),
    )
    for stored in (True, False):
        built = Funnel.build(own, DOCUMENTS, SMALL, FULL, stored=stored)
        want = by_hand(encoder, SMALL, FULL, 12, 5, before)[0].tolist()
        assert built.search(QUERIES, 5, 12).rows_QK.tolist() == want
        plain = Funnel.build(own, DOCUMENTS, SMALL, FULL, stored=stored, prompts={})
        assert plain.search(QUERIES, 5, 12).rows_QK.tolist() != want


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
def test_sizes(text, size):
    assert search.size_of(text) == size


@pytest.mark.parametrize("text", ["a", "4:1:2:3", "-4", "4;1", "4.0"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match=f"funnel: expected DIM:EXIT:RANK.*got '{text}'"):
        search.size_of(text)


def test_errors(encoder):
    with pytest.raises(ValueError, match=r"dim: expected 1\.\.32"):
        Funnel.build(encoder, DOCUMENTS, (33, 1, 4))
    with pytest.raises(ValueError, match="exit: expected"):
        Funnel.build(encoder, DOCUMENTS, SMALL, (32, 9, 4))
    with pytest.raises(ValueError, match="documents, got none"):
        Funnel.build(encoder, [], SMALL)
    built = Funnel.build(encoder, DOCUMENTS, SMALL)
    for k, shortlist in ((11, 10), (0, 10), (1, 0)):
        with pytest.raises(ValueError, match="shortlist: expected at least"):
            built.search(QUERIES, k, shortlist)
