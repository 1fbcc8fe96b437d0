"""Encoding with a graph: the vectors are those of the weights.

XLM-R counts positions by its padding token, which the encoder therefore has to use.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from export_models import TEXTS, build

from mlembed.inference.encoder import Encoder
from mlembed.inference.onnx_encoder import OnnxEncoder
from mlembed.publishing import to_onnx
from mlembed.publishing.export import write_model

TITLE = {"prompts": {"title": "Title: "}, "default_prompt_name": "title"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Encoder, Path]:
    """An encoder read from an export of width 12, exit 2 and rank 3, and the path of its graph."""
    out = tmp_path_factory.mktemp("exported")
    write_model(out, replace(build("xlm-roberta"), **TITLE), 12, 2, 3)
    path = to_onnx.write(out)
    return Encoder.load(str(out), "cpu"), path


def test_vectors_are_those_of_the_weights(exported):
    encoder, path = exported
    graph = OnnxEncoder.of(encoder, path)
    assert (graph.default_prompt, graph.full_size()) == ("Title: ", (12, 2, 3))
    for options in ({}, {"dim": 5}, {"prompt": ""}):
        ours, theirs = encoder.encode(TEXTS, **options), graph.encode(TEXTS, **options)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    sizes = [(dim, 2, 3) for dim in (5, 12)]
    ours, theirs = encoder.encode_grid(TEXTS, sizes), graph.encode_grid(TEXTS, sizes)
    for size in sizes:
        np.testing.assert_allclose(theirs[size], ours[size], rtol=0, atol=1e-5)


def test_many_batches_keep_the_order(exported, monkeypatch):
    encoder, path = exported
    monkeypatch.setattr("mlembed.inference.onnx_encoder.MAX_TOKENS", 30)
    graph = OnnxEncoder.of(encoder, path)
    np.testing.assert_allclose(graph.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-5)


def test_sizes_that_the_graph_lacks(exported, tmp_path):
    encoder, path = exported
    graph = OnnxEncoder.of(encoder, path)
    with pytest.raises(ValueError, match=r"exit: expected \[2\], which the graph has, got \[1\]"):
        graph.encode(TEXTS, exit=1)
    with pytest.raises(ValueError, match="rank: expected 3, which the graph has, got 1"):
        graph.encode(TEXTS, rank=1)
    (tmp_path / "text.onnx").write_text("a text")
    with pytest.raises(ValueError, match="text.onnx: expected an ONNX graph, got .*"):
        OnnxEncoder.of(encoder, tmp_path / "text.onnx")
