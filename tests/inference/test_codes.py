"""Codes against sentence-transformers' on the same ranges, and their products against integers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import quantize_embeddings

from mlembed.inference.codes import Coder, symmetric_range
from mlembed.inference.search import Nearest, nearest


def unit(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator) + 0.3, dim=-1)


@pytest.mark.parametrize("d", [7, 48, 384])
def test_int8_is_rounding_to_sentence_transformers_codes(d):
    vectors = unit(300, d)
    largest = float(vectors.abs().max())
    low, high = symmetric_range(largest)
    ranges = np.repeat(np.float32([[low], [high]]), d, axis=1)
    theirs = quantize_embeddings(vectors.numpy(), "int8", ranges=ranges)
    rounded = np.round(vectors.numpy().astype(np.float64) * 127 / largest)
    # fp32 may round a number that lies between two steps to the other one.
    assert np.abs(theirs - rounded).max() <= 1 and (theirs != rounded).mean() < 1e-4
    assert np.abs(theirs).max() == 127
    coder = Coder("int8")
    got = coder(vectors)
    assert coder.reached() == {"largest": largest}
    want = F.normalize(torch.from_numpy(theirs).double(), dim=-1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-7)
    # Later vectors keep the range of the first, and their larger numbers are cut to it.
    coder = Coder("int8", largest / 2)
    assert F.cosine_similarity(coder(vectors), vectors).min() < 0.999
    assert coder.reached() == {"largest": largest / 2}


def test_binary_is_hamming_distance():
    a, b = unit(20, 13), unit(30, 13, seed=1)
    a[3, 2] = 0.0
    bits = [np.unpackbits(quantize_embeddings(x.numpy(), "ubinary"), axis=1) for x in (a, b)]
    distance = (bits[0][:, None] != bits[1][None]).sum(-1)
    coder = Coder("binary")
    assert ((coder(a) @ coder(b).T).numpy() == 13 - 2 * distance).all() and coder.reached() == {}


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_nearest_by_codes(precision):
    """The range is that of the queries and the first documents, and equal scores rank by row."""
    queries, documents = unit(9, 24), unit(60, 24, seed=1)
    found = Nearest(9, 5, Coder(precision))
    for part in documents.split(25):
        found.add(queries, part)
    coder = Coder(precision)
    coder.fit(queries, documents[:25])
    want = nearest(coder(queries), coder(documents), 5)
    assert torch.equal(found.rows, want[1])
    torch.testing.assert_close(found.scores, want[0])
    assert not torch.equal(found.rows, nearest(queries, documents, 5)[1])
    assert found.coder.largest == coder.largest
    found = Nearest(9, 5, Coder(precision))
    found.add(queries, torch.full_like(documents, torch.nan))
    assert found.not_unit == 60
