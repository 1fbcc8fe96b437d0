"""JSON files of a model, of a run and of stored vectors with odd values at every key.

Each is either accepted, or an error of one line that names the file.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import tiny_encoder

from mlembed import config
from mlembed.config import strict
from mlembed.data import tokenizer
from mlembed.evaluation import results
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained, sentence_files
from mlembed.publishing import model_card
from mlembed.publishing.export import write_model
from mlembed.runtime import model_files

ODD: list[Any] = [
    *(None, True, 0, -5, 1.5, 2**40, 10**30, float("nan"), "32", "", "../x", "x\x1b[2J\n"),
    *([], [1, "a", None], {}, {"a": {"b": [1]}}),
]
BERT = {"style": "bert", "num_key_value_heads": 2, "causal": False, "pooling": "pooler"}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of a JSON value, then those in it; of a list the first two."""
    yield at
    parts = value.items() if isinstance(value, dict) else ()
    parts = list(enumerate(value))[:2] if isinstance(value, list) else parts
    for key, part in parts:
        yield from places(part, (*at, key))


def changed(value: Any, at: tuple[Any, ...], odd: Any) -> Any:
    """Return a JSON value with `odd` at a place."""
    if not at:
        return odd
    copy = value.copy()
    copy[at[0]] = changed(value[at[0]], at[1:], odd)
    return copy


def odd_values(path: Path, read: Callable[[], object]) -> int:
    """Put every odd value at every place of a file; return how many `read` accepts."""
    whole = path.read_text()
    value, accepted = json.loads(whole), 0
    for at in places(value):
        for odd in ODD:
            path.write_text(json.dumps(changed(value, at, odd)))
            try:
                read()
                accepted += 1
            except ValueError as error:
                line = str(error)
                assert path.name in line and len(line) < 1000, (at, odd, line)
            except Exception as error:
                raise AssertionError(f"{path.name}: {at}: {odd!r}: {error!r}") from error
    path.write_text(whole)
    read()
    return accepted


@pytest.fixture(scope="module", params=["qwen3", "bert"])
def directory(request, tmp_path_factory) -> Path:
    """Return an export of width 8, whose shape is read from `mlembed_config.json`."""
    shape = BERT if request.param == "bert" else {"ranks": (8, 16)}
    encoder = tiny_encoder(matryoshka_dims=(8, 32), **shape)
    encoder.prompts = {"query": "query: ", "document": ""}
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder, encoder, 8, 2, None)
    return folder


FILES = (
    *("config.json", "config_sentence_transformers.json", "modules.json", "mlembed_config.json"),
    *("sentence_bert_config.json", "special_tokens_map.json", "tokenizer_config.json"),
    *("1_Pooling/config.json", "2_Dense/config.json"),
)


@pytest.mark.parametrize("name", FILES)
def test_model(name, directory, tmp_path):
    """Every reader short of building: shape, sizes, tokenizer's settings, modules, the gate."""
    copy = shutil.copytree(directory, tmp_path / "model")
    if name != "mlembed_config.json":  # Without it, the shape is that of config.json.
        (copy / "mlembed_config.json").unlink()
    weights = pretrained.read_weights(copy)

    def read() -> None:
        cfg = hf_config.from_checkpoint(copy, config.Model(ranks=(16,)))
        cfg.check(1, 1)
        if name in ("config.json", "mlembed_config.json"):
            factors = {"embed_tokens.U": weights["embed_tokens.weight"][:, :16]}
            factors["embed_tokens.W"] = weights["embed_tokens.weight"][:16]
            pretrained._check_sizes(copy, cfg, weights | (factors if cfg.ranks else {}))
        sentence_files.read(copy, cfg.hidden_size)
        tokenizer.max_length(copy)
        tokenizer.eos_token(copy)
        tokenizer.settings(copy, "sentence_bert_config.json")
        model_files.check_model(copy)

    odd_values(copy / name, read)


def test_loading_stops_at_the_same_values(directory, tmp_path):
    """A model with what the readers accept can be built, and encodes."""
    copy = shutil.copytree(directory, tmp_path / "model")
    path = copy / "mlembed_config.json"
    value = json.loads(path.read_text())
    for key, odd in (
        ("num_hidden_layers", 10**9),
        ("hidden_size", 2**40),
        ("exits", list(range(1, 10**6))),
        ("max_position_embeddings", -5),
        ("max_position_embeddings", 2**50),
        ("head_dim", 2**20),
    ):
        path.write_text(json.dumps({"model": value["model"] | {key: odd}}))
        with pytest.raises(ValueError, match=r"mlembed_config\.json: ") as caught:
            Encoder.load(str(copy), "cpu")
        assert len(str(caught.value)) < 1000


# ---- a run ----

CELL = {"dim": 8, "exit": 1, "rank": None, "parameters": 9, "bytes_per_vector": 32}
MEASURED = {"latency_ms": 1.0, "texts_per_second": 9.0, "memory_mib": 1.0}
SCORES = {"dev": {"score": 0.5, "by_language": {"deu": 0.5}, "floats": {"ndcg": 0.5}}}


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "report").mkdir()
    saved = strict.to_dict(config.Run(data=("a.jsonl",), eval=("dev.jsonl",)))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    grid = {"cells": [CELL | MEASURED | {"scores": SCORES}], "commit": "1", "device": "cpu"}
    grid |= {"texts_by_language": {"deu": 3}, "untrained": {"dev": {"score": 0.1}}}
    (tmp_path / "report" / "grid.json").write_text(json.dumps(grid))
    lines = [{"step": 1, "kind": "train", "loss": 2.0}, {"step": 1, "kind": "eval", "score": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "report/grid.json"])
def test_model_card_of_a_run(name, run):
    encoder = tiny_encoder()
    cut = model_card.Cut("out", 8, 1, None, ("sentence-transformers",))

    def read() -> None:
        model_card.write(encoder, cut, model_card.find_origin(str(run)))

    if name == "config.json":  # A card takes longer than the reading of a configuration.
        accepted = odd_values(run / name, lambda: model_card.find_origin(str(run)))
    else:
        accepted = odd_values(run / name, read)
    assert accepted
    results.read(run)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 200 + "]" * 200, '{"a": 1, "a": 2}', "\ufeff[", '{"a": "\\ud800"}', ""],
)
def test_odd_documents(text, directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "model")
    for name in FILES[1:]:
        whole = (copy / name).read_text()
        (copy / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            model_files.check_model(copy)
            Encoder.load(str(copy), "cpu")
        assert "\n" not in str(caught.value)
        (copy / name).write_text(whole)
