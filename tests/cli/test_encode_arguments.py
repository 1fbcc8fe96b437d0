"""Sizes and texts that `encode` and `stream` accept, from NumPy and torch too."""

import numpy as np
import pytest
import torch

from mlembed.cli import encode
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
def test_sizes_must_be_whole_numbers(encoder, size):
    for name in ("dim", "exit", "rank"):
        for call in (encoder.encode, encoder.stream):
            with pytest.raises(ValueError, match=f"{name}: expected a whole number, got "):
                call(TEXTS[:3], **{name: size})


def test_texts_must_be_a_sequence(encoder):
    for texts in (iter(TEXTS), None, 3):
        for call in (encoder.encode, encoder.exits):
            with pytest.raises(ValueError, match="texts: expected a sequence, got .*stream"):
                call(texts)
    for call in (encoder.exits, encoder.encode):
        with pytest.raises(ValueError, match="texts: expected a sequence of texts, got one str"):
            call("abc")
    with pytest.raises(ValueError, match="texts: expected an iterable of texts, got NoneType"):
        encoder.stream(None)
    with pytest.raises(ValueError, match="prompt: expected a text, got int"):
        encoder.encode(TEXTS, prompt=3)


class Loaded(Exception):
    """Ends the command once it has passed on the arguments of the load."""


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("device", [("cpu",), ("cpu", "cpu")], ids=len)
def test_command_compiles_in_the_process_that_encodes(device, asked, monkeypatch):
    def load(model, where, dtype, compile):
        raise Loaded(compile)

    monkeypatch.setattr(encode.signal, "signal", lambda *args: None)
    monkeypatch.setattr(Encoder, "load", load)
    with pytest.raises(Loaded) as loaded:
        encode.main("model", ("a text",), device=device, compile=asked)
    assert loaded.value.args == (asked and len(device) == 1,)
