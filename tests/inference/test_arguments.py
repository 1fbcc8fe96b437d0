"""Sizes and texts that `encode` and `stream` accept, from NumPy and torch too."""

import numpy as np
import pytest
import torch

from mlembed.inference.encoder import Encoder
from tests.inference.test_encoder import TEXTS, build


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build()


@pytest.mark.parametrize("make", [np.int64, np.array, torch.tensor])
def test_sizes_of_other_libraries(encoder, make):
    want = encoder.encode(TEXTS[:3], 5, 2, 7)
    np.testing.assert_array_equal(encoder.encode(TEXTS[:3], make(5), make(2), make(7)), want)
    (part,) = encoder.stream(TEXTS[:3], make(5), make(2), make(7))
    np.testing.assert_array_equal(part, want)
    if make is not np.int64:
        several = encoder.encode(TEXTS[:3], exit=make([1, 2, 3]))
        np.testing.assert_array_equal(several, encoder.encode(TEXTS[:3], exit=[1, 2, 3]))


@pytest.mark.parametrize("size", [True, 5.0, np.float32(5), "5", [5.0, 5, 5], {1: 5}, iter([5])])
@pytest.mark.parametrize("name", ["dim", "exit", "rank"])
def test_sizes_must_be_whole_numbers(encoder, name, size):
    for call in (encoder.encode, encoder.stream):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number, got "):
            call(TEXTS[:3], **{name: size})


def test_texts_must_be_a_sequence_of_strings(encoder):
    for call in (encoder.encode, encoder.encode_exits):
        for texts in (iter(TEXTS), None, 3):
            with pytest.raises(ValueError, match="texts: expected a sequence, got .*stream"):
                call(texts)
        with pytest.raises(ValueError, match="texts: expected a sequence of texts, got one str"):
            call("abc")
    with pytest.raises(ValueError, match="texts: expected an iterable of texts, got NoneType"):
        encoder.stream(None)
    with pytest.raises(ValueError, match="prompt: expected a string, got int"):
        encoder.encode(TEXTS, prompt=3)
