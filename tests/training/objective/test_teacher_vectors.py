"""Vectors of a teacher that are zero or not finite are refused before training."""

import re

import numpy as np
import pytest
import torch
from factories import small_job, tiny_encoder, tiny_tokenizer, write_encoder, write_jsonl

from mlembed.data import sources
from mlembed.training.objective.teacher import StoredVectors, Teacher, bad_rows, store

ROWS = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(12)]
DISTIL = ("--distill.features", 1, "--distill.align", "projection")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, the same with a last norm of zeros, and pairs."""
    folder = tmp_path_factory.mktemp("teacher")
    write_jsonl(folder / "pairs.jsonl", ROWS)
    encoder = tiny_encoder(tiny_tokenizer(row["query"] for row in ROWS))
    write_encoder(encoder, folder / "good")
    with torch.no_grad():
        encoder.model.norm.weight.zero_()
    write_encoder(encoder, folder / "zero")
    return folder


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_bad_rows(kind):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 7)).astype(kind)
    vectors[3], vectors[4] = 0, -0.0
    vectors[5, 6], vectors[9, 0], vectors[39, 3] = np.nan, np.inf, -np.inf
    vectors[7] = [0, 0, 0, 0, 0, 0, -np.finfo(kind).smallest_subnormal]
    vectors[8] = np.finfo(kind).max
    assert bad_rows(vectors).tolist() == [3, 4, 5, 9, 39]
    assert not bad_rows(vectors[:0]).size


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_stored_row_is_named(folder, value, tmp_path):
    tables = sources.tables_of([str(folder / "pairs.jsonl")])
    store(Teacher.load(str(folder / "good"), "", torch.device("cpu")), tables, tmp_path / "out")
    vectors = np.load(tmp_path / "out" / "vectors.npy", mmap_mode="r+")
    vectors[17] = value
    vectors.flush()
    message = f"teacher: {tmp_path}/out/vectors.npy: expected finite vectors that are not zero"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}, got another in row 17$"):
        StoredVectors.open(str(tmp_path / "out")).check()
    with pytest.raises(ValueError, match="got another in row 17"):
        options = ("--distill.embeddings", tmp_path / "out", *DISTIL)
        small_job(tmp_path, [str(folder / "pairs.jsonl")], *options)


def test_live_teacher_of_zeros(folder, tmp_path):
    data = [str(folder / "pairs.jsonl")]
    small_job(tmp_path, data, "--distill.teacher", folder / "good", *DISTIL).saver.close()
    with pytest.raises(ValueError, match="that are not zero, got another for the text '[0-9]+ "):
        small_job(tmp_path, data, "--distill.teacher", folder / "zero", *DISTIL)
