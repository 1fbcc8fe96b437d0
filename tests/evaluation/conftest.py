"""A small nested encoder, and tasks of each kind, for the tests of the grid."""

import numpy as np
import pytest
from factories import tiny_encoder, tiny_tokenizer, write_encoder
from grid_tasks import WORDS, beir_directory, bucc_directory, tatoeba_directory, un_directory

from mlembed.data import eval_sets
from mlembed.data.eval_tasks import STS
from mlembed.inference.encoder import Encoder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    shape = {"num_hidden_layers": 3, "exits": (1, 3), "matryoshka_dims": (4, 8, 32)}
    encoder = tiny_encoder(tiny_tokenizer(WORDS * 5), 32, **shape, ranks=(4, 8))
    return write_encoder(encoder, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(directory):
    return Encoder.load(str(directory), "cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tatoeba_directory(tmp_path_factory.mktemp("tasks") / "tat")
    texts = [f"{a} {b}" for a in WORDS for b in WORDS[:4]]
    gold = np.random.default_rng(0).normal(size=len(texts) // 2)
    return [*eval_sets.read(str(path)), STS("sts", texts, gold)]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A task of each kind that is searched or mined."""
    path = tmp_path_factory.mktemp("searched")
    directories = (beir_directory(path / "b"), un_directory(path / "u"), bucc_directory(path / "m"))
    return [task for directory in directories for task in eval_sets.read(str(directory))]
