"""Model directories are data: nothing of theirs runs, and nothing outside of them is opened."""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from factories import tiny_encoder
from safetensors.torch import save_file

from mlembed.inference.encoder import Encoder
from mlembed.publishing.export import write_model
from mlembed.runtime import model_files
from mlembed.training.objective.teacher import Teacher

PAYLOAD = "open({!r}, 'w')\nclass T:\n    def __init__(self, *a, **k): pass\n    load = T = None\n"
CONFIG, TOKENIZER, SENTENCE = "config.json", "tokenizer_config.json", "sentence_bert_config.json"
DENSE = "2_Dense/config.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Return an export of width 8: a Transformer, a Pooling, a Dense and a Normalize."""
    encoder = tiny_encoder(matryoshka_dims=(8, 32))
    folder = tmp_path_factory.mktemp("written")
    write_model(folder, encoder, 8, 2, None)
    return folder


@pytest.fixture
def directory(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "model")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def modules(directory: Path, number: int, **changes: str) -> None:
    listed = json.loads((directory / "modules.json").read_text())
    listed[number] |= changes
    (directory / "modules.json").write_text(json.dumps(listed))


def test_an_export_passes(directory):
    model_files.check_model(directory)
    (directory / "modules.json").unlink()
    model_files.check_model(directory)


# ---- code ----


def older_library(directory: str, **options: object) -> None:
    """Import what modules.json names, like sentence-transformers before 6.0 does."""
    sys.path.insert(0, directory)
    try:
        for module in json.loads((Path(directory) / "modules.json").read_text()):
            path, _, name = module["type"].rpartition(".")
            getattr(__import__(path, fromlist=[name]), name)
    finally:
        sys.path.remove(directory)
    raise ValueError("opened")


@pytest.mark.parametrize("kind", ["payload.T", "sentence_transformers.payload.T", "os.system", ""])
def test_an_older_library_imports_nothing(kind, directory, tmp_path, monkeypatch):
    (directory / "payload.py").write_text(PAYLOAD.format(str(tmp_path / "ran")))
    fake = types.ModuleType("sentence_transformers")
    fake.SentenceTransformer = older_library
    fake.__path__ = [str(directory)]
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    for name in ("payload", "sentence_transformers.payload"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules(directory, 1, type=kind)
    with pytest.raises(ValueError, match=r"modules\.json: module 1: type: expected a module of"):
        Teacher.load(str(directory), "", torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (CONFIG, {"auto_map": {"AutoModel": "payload.T"}}, "auto_map: expected none"),
        (CONFIG, {"text_config": {"auto_map": {}}}, "auto_map: expected none"),
        (CONFIG, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (CONFIG, {"transformers_weights": "../x.safetensors"}, "transformers_weights"),
        (CONFIG, {"_attn_implementation": "some/kernel"}, "_attn_implementation: expected 'eager'"),
        (CONFIG, {"model_type": "rag"}, "model_type: expected 'albert', 'bert'"),
        (CONFIG, {"model_type": ["qwen3"]}, "model_type: expected"),
        (CONFIG, {"tokenizer_class": "payload.T"}, "tokenizer_class: expected a tokenizer of"),
        (TOKENIZER, {"tokenizer_class": "Trainer"}, "tokenizer_class: expected a tokenizer of"),
        (TOKENIZER, {"auto_map": {"AutoTokenizer": ["p.T", None]}}, "auto_map: expected none"),
        (TOKENIZER, {"processor_class": "ClapProcessor"}, "processor_class: expected none"),
        (TOKENIZER, {"vocab_file": "/etc/passwd"}, "vocab_file: expected a file of the model"),
        (TOKENIZER, {"tokenizer_file": "../x.json"}, "tokenizer_file: expected a file of"),
        (SENTENCE, {"model_args": {"trust_remote_code": True}}, "model_args: expected"),
        (SENTENCE, {"config_kwargs": {"attn_implementation": "a/b"}}, "config_kwargs: expected"),
        (SENTENCE, {"tokenizer_name_or_path": "../x"}, "tokenizer_name_or_path: expected"),
        (
            SENTENCE,
            {"modality_config": {"text": {"method": "save"}}},
            "text: method: expected 'for",
        ),
        (SENTENCE, {"transformer_task": "retrieval"}, "transformer_task: expected"),
        (
            DENSE,
            {"activation_function": "payload.T"},
            "activation_function: expected an activation",
        ),
        (DENSE, {"activation_function": "torch.hub.load"}, "activation_function: expected an act"),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "model_type: expec"),
    ],
)
def test_names_of_code_and_files_are_a_closed_list(file, changes, message, directory):
    edit(directory / file, **changes)
    with pytest.raises(ValueError, match=f"{file}: .*{message}|{file}: {message}"):
        model_files.check_model(directory)


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../..", ".hidden", "a\n", "2_Dense/"])
def test_modules_are_in_the_directory(path, directory):
    modules(directory, 2, path=path)
    with pytest.raises(ValueError, match="module 2: path: expected a folder of the model, got"):
        model_files.check_model(directory)


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "x.bin", 3])
def test_shards_are_in_the_directory(name, directory):
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="weight_map: expected names of files beside it, got"):
        model_files.check_model(directory)


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_other_kinds_of_models(name, directory):
    (directory / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}: expected an encoder of text"):
        model_files.check_model(directory)


# ---- files ----


@pytest.mark.parametrize("target", ["loop.json", "nothing.json"])
def test_a_link_that_leads_nowhere(directory, target):
    """A link to itself, or to nothing, is an error of the system that names the link."""
    (directory / "loop.json").symlink_to(target)
    with pytest.raises(OSError, match="loop.json"):
        model_files.check_files(directory)


def test_links(directory, tmp_path):
    """Links within the directory, and of the hub's cache to its blobs, are files of the model."""
    secret, weights = tmp_path / "secret", directory / "model.safetensors"
    secret.write_text("{}")
    (directory / "again.json").symlink_to(directory / CONFIG)
    (directory / ".hidden").symlink_to(secret)
    model_files.check_files(directory)
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    weights.rename(cache / "blobs" / "123")
    snapshot = shutil.copytree(directory, cache / "snapshots" / "456", symlinks=False)
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    model_files.check_files(snapshot)
    for name in ("extra.json", "1_Pooling/extra.json", "folder"):
        link = snapshot / name
        link.symlink_to(tmp_path if name == "folder" else secret)
        with pytest.raises(ValueError, match=f"{name}: expected a file of the model's directory"):
            Encoder.load(str(snapshot), "cpu")
        link.unlink()


def test_an_adapter(directory):
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: expected a model without an ad"):
        Encoder.load(str(directory), "cpu")


@pytest.mark.parametrize(
    "name",
    [CONFIG, TOKENIZER, "tokenizer.json", "model.safetensors", "modules.json", DENSE],
)
def test_pipes_directories_and_damage_name_the_file(name, directory):
    (directory / "mlembed_config.json").unlink()
    path = directory / name
    whole = path.read_bytes()
    for data in (None, "pipe", b"", whole[: len(whole) // 2], b"\xff" * 100, b"{" * 10**5):
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        if data is None:
            path.mkdir()
        elif data == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(data)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            Encoder.load(str(directory), "cpu")
        assert "\n" not in str(caught.value)


def test_many_files(directory, monkeypatch):
    monkeypatch.setattr(model_files, "MOST_FILES", 5)
    with pytest.raises(ValueError, match="expected a model of at most 5 files, got more"):
        model_files.check_files(directory)


# ---- sizes ----


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (CONFIG, "num_hidden_layers", 10**9),
        (CONFIG, "hidden_size", 2**40),
        (CONFIG, "vocab_size", 2**50),
        (CONFIG, "max_position_embeddings", 2**34),
        (DENSE, "out_features", 2**36),
        (DENSE, "in_features", 2**36),
    ],
)
def test_sizes_beyond_the_weights(file, key, value, directory):
    edit(directory / file, **{key: value})
    with pytest.raises(ValueError, match=f"{file}: {key}: expected at most .*, got {value}"):
        model_files.check_model(directory)


def test_a_header_of_a_gigabyte(directory):
    path = directory / "model.safetensors"
    with path.open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(10**9 + 8)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file: "):
        Encoder.load(str(directory), "cpu")


def test_a_missing_tensor_names_the_file(directory):
    path = directory / "2_Dense" / "model.safetensors"
    save_file({"other": torch.eye(2)}, path)
    with pytest.raises(ValueError, match=r"2_Dense/model\.safetensors: .*linear\.weight"):
        Encoder.load(str(directory), "cpu")
