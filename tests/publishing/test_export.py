"""Exports as their users open them: the real sentence-transformers and transformers."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from export_models import (
    CORNERS,
    MAX_LENGTH,
    TEXTS,
    build,
    files_below,
    read_json,
    tokens_of,
)
from factories import write_encoder
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, Qwen3Model

from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.publishing import export as exporting
from mlembed.publishing import probes
from mlembed.publishing.export import export

SMALLEST = 5, 1, 3


@pytest.fixture(scope="module")
def tokens():
    return tokens_of("qwen3")


@pytest.fixture(scope="module")
def encoder(tokens) -> Encoder:
    return build(tokens=tokens)


@pytest.fixture(scope="module")
def smallest(encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "smallest"
    export(encoder, out, *SMALLEST)
    return out


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def by_sentence_transformers(out: Path) -> np.ndarray:
    model = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    # Batches of three: sorted by length inside, padded differently, some not at all.
    return model.encode(TEXTS, batch_size=3, convert_to_numpy=True, show_progress_bar=False)


@torch.no_grad()
def by_transformers(out: Path, pooling: str, dim: int) -> np.ndarray:
    """Pool, cut and normalise by hand, like a user without sentence-transformers."""
    model = AutoModel.from_pretrained(out, local_files_only=True).eval()
    assert isinstance(model, Qwen3Model) and model.dtype == torch.float32
    reader = AutoTokenizer.from_pretrained(out, local_files_only=True)
    tokens = reader(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == MAX_LENGTH
    hidden = model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    vectors = []
    for row, mask in zip(hidden, tokens["attention_mask"].bool(), strict=True):
        states = row[mask]
        pooled = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]
        vectors.append(pooled[:dim] / pooled[:dim].norm())
    return torch.stack(vectors).numpy()


def agree(encoder: Encoder, out: Path, dim: int, exit: int, rank: int | None) -> None:
    ours = encoder.encode(TEXTS, dim, exit, rank)
    theirs = by_sentence_transformers(out)
    assert theirs.shape == (len(TEXTS), dim)
    close(theirs, ours)
    # Vectors themselves have length one, not only their cosines.
    close(np.linalg.norm(theirs, axis=1), np.ones(len(TEXTS)))
    close(by_transformers(out, encoder.model.cfg.pooling, dim), ours)


# Each corner of the two usual poolings; then bidirectional attention, pooling by the first token
# and a vocabulary without ranks, each once at full size and once cut.
@pytest.mark.parametrize(
    ("changes", "corner"),
    [
        *(({"pooling": pooling}, corner) for pooling in ("last", "mean") for corner in CORNERS),
        ({"causal": False, "pooling": "mean"}, (24, 3, 11)),
        ({"causal": False, "pooling": "mean"}, SMALLEST),
        ({"causal": False, "pooling": "last"}, (5, 3, 3)),
        ({"causal": False, "pooling": "cls"}, (12, 2, 7)),
        ({"ranks": ()}, (24, 3, None)),
        ({"ranks": ()}, (5, 1, None)),
        ({"exits": (2, 3), "last_layers": 1}, (12, 2, 7)),
    ],
    ids=str,
)
def test_readers_agree(tokens, changes, corner, tmp_path):
    encoder = build(tokens=tokens, **changes)
    assert 0 <= export(encoder, tmp_path / "out", *corner).worst < 1e-5
    agree(encoder, tmp_path / "out", *corner)


@pytest.mark.parametrize("kind", ["bert", "minilm", "xlm-roberta"])
def test_exits_that_end_with_the_last_layer(kind, tmp_path):
    """Layers 1 and 3 are an ordinary model of two layers, whose exits end with its last one."""
    encoder, out = build(kind, exits=(2, 3), last_layers=1), tmp_path / "out"
    assert export(encoder, out, 12, 2, 7).worst < 1e-5
    vectors = encoder.encode(TEXTS, 12, 2, 7)
    close(by_sentence_transformers(out), vectors)
    again = Encoder.load(str(out), "cpu")
    assert (again.model.cfg.exits, again.model.cfg.last_layers) == ((2,), 1)
    close(again.encode(TEXTS, 12), vectors)


def test_defaults_are_the_full_size(encoder, tmp_path):
    export(encoder, tmp_path / "out")
    assert not (tmp_path / "out" / "2_Dense").exists()
    close(by_sentence_transformers(tmp_path / "out"), encoder.encode(TEXTS))
    again = Encoder.load(str(tmp_path / "out"), "cpu")
    for name, weight in encoder.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


# ---- files ----


def test_files(smallest):
    files = {name for name, content in files_below(smallest).items() if content is not None}
    assert files == {
        *("README.md", "config.json", "model.safetensors", "modules.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("sentence_bert_config.json", "config_sentence_transformers.json"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        *("mlembed_config.json", "mlembed_factors.safetensors"),
    }


def test_modules_have_the_names_of_5_0(smallest):
    # Later versions map these; versions before 5.4 know no newer names.
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules["3_Normalize"] = "Normalize"
    assert read_json(smallest / "modules.json") == [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules.items())
    ]
    dense = read_json(smallest / "2_Dense" / "config.json")
    assert (dense["in_features"], dense["out_features"], dense["bias"]) == (24, 5, False)
    weight = load_file(smallest / "2_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(weight, torch.eye(5, 24))


def test_sentence_transformers_settings(smallest):
    # text-embeddings-inference needs max_seq_length if the file exists, and prompts that are
    # strings; an older reader warns of a newer version, so the oldest is named.
    limit = {"max_seq_length": MAX_LENGTH, "do_lower_case": False}
    assert read_json(smallest / "sentence_bert_config.json") == limit
    settings = read_json(smallest / "config_sentence_transformers.json")
    assert settings["__version__"].pop("sentence_transformers") == "5.0.0"
    assert settings["__version__"].keys() == {"transformers", "pytorch"}
    del settings["__version__"]
    assert settings == {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_pooling_is_one_of_six_booleans(tokens, pooling, tmp_path):
    exporting.write_sentence_transformers(tmp_path, build(tokens=tokens, pooling=pooling), 5)
    stored = read_json(tmp_path / "1_Pooling" / "config.json")
    modes = {key: value for key, value in stored.items() if key.startswith("pooling_mode_")}
    true = {"last": "lasttoken", "mean": "mean_tokens", "cls": "cls_token"}[pooling]
    assert len(modes) == 6 and all(type(value) is bool for value in modes.values())
    assert [key for key, value in modes.items() if value] == [f"pooling_mode_{true}"]
    assert stored["word_embedding_dimension"] == 24 and stored["include_prompt"] is True


def test_config_and_weights_are_cut(encoder, smallest):
    stored = read_json(smallest / "config.json")
    assert stored["num_hidden_layers"] == 1 and stored["layer_types"] == ["full_attention"]
    assert stored["vocab_size"] == encoder.tokenizer.get_vocab_size()
    weights = load_file(smallest / "model.safetensors")
    assert {name.split(".")[1] for name in weights if name.startswith("layers.")} == {"0"}
    with torch.no_grad():
        merged = encoder.model.embed_tokens.table(3)
    torch.testing.assert_close(weights["embed_tokens.weight"], merged, rtol=0, atol=1e-6)


def test_tokenizer_is_portable(encoder, smallest):
    stored = read_json(smallest / "tokenizer_config.json")
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no newer
    reader = AutoTokenizer.from_pretrained(smallest, local_files_only=True)
    theirs = reader(TEXTS, truncation=True)["input_ids"]
    ours = tokenizer.tokenize(encoder.tokenizer, TEXTS, MAX_LENGTH)
    assert theirs == [text.tolist() for text in ours]
    lengths = {len(text) for text in theirs}
    assert {1, MAX_LENGTH} <= lengths and len(lengths) >= 6


def test_reload_keeps_the_nesting(encoder, tmp_path):
    # Factors lie next to the merged table: the exits and ranks that remain can be cut again.
    out = tmp_path / "out"
    export(encoder, out, 12, 2, 7)
    factors = load_file(out / "mlembed_factors.safetensors")
    assert factors["U"].shape[1] == 7 and factors["W"].shape[0] == 7
    again = Encoder.load(str(out), "cpu")
    assert again.model.cfg.ranks == (3, 7) and again.model.cfg.exits == (1, 2)
    assert again.max_length == MAX_LENGTH
    for size in [(12, 2, 7), SMALLEST, (12, 2, 1)]:
        np.testing.assert_array_equal(again.encode(TEXTS, *size), encoder.encode(TEXTS, *size))
    export(again, tmp_path / "twice", *SMALLEST)
    close(by_sentence_transformers(tmp_path / "twice"), encoder.encode(TEXTS, *SMALLEST))


def test_prompts_are_written(tokens, tmp_path):
    prompts = {"query": "Instruct: find\nQuery: ", "sts": "vergleiche: "}
    export(replace(build(tokens=tokens), prompts=prompts), tmp_path / "out", 12, 2, 7)
    stored = read_json(tmp_path / "out" / "config_sentence_transformers.json")["prompts"]
    assert stored == {**prompts, "document": ""}  # MTEB asks for both
    assert Encoder.load(str(tmp_path / "out"), "cpu").prompts == stored


def test_large_weights_are_split(encoder, tmp_path):
    out = tmp_path / "out"
    export(encoder, out)
    whole = {name: weight.clone() for name, weight in load_file(out / "model.safetensors").items()}
    exporting.split(out, (out / "model.safetensors").stat().st_size)
    assert (out / "model.safetensors").exists()  # as it is not larger
    most = max(w.numel() * 4 for w in whole.values()) + 1000  # the largest tensor is the table
    exporting.split(out, most)
    assert not (out / "model.safetensors").exists()
    files = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    shards = {file.name: load_file(file) for file in files}
    for weights in shards.values():
        assert sum(w.numel() * 4 for w in weights.values()) <= most
        assert all(torch.equal(weight, whole[name]) for name, weight in weights.items())
    index = read_json(out / "model.safetensors.index.json")
    assert index["weight_map"] == {name: file for file, some in shards.items() for name in some}
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(w.numel() * 4 for w in whole.values())
    agree(encoder, out, 24, 3, 11)
    again = Encoder.load(str(out), "cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 25}, r"dim: expected 1\.\.24 \(the width\), got 25"),
        ({"exit": 4}, r"exit: expected 1\.\.3 \(the depth\), got 4"),
        ({"rank": 12}, r"rank: expected 1\.\.11 \(the stored rank\), got 12"),
        ({"formats": ("onnx", "gguf")}, r"got gguf, .*llama\.cpp .*convert_hf_to_gguf\.py .*out"),
        (
            {"formats": ("onnx", "x")},
            "format: expected sentence-transformers, onnx or onnx-int8, got x",
        ),
    ],
)
def test_errors_write_nothing(encoder, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(encoder, tmp_path / "out", **options)
    assert files_below(tmp_path) == {}


def test_occupied_place_stays_untouched(encoder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = files_below(tmp_path)
    for name in ("out", "file", "file/below"):
        with pytest.raises(ValueError, match=str(tmp_path / name)):
            export(encoder, tmp_path / name)
    with pytest.raises(ValueError, match=r"out: expected .* a name of its own, got \."):
        export(encoder, Path())
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("where", ["norm.weight", "embed_tokens.U"])
def test_nan_is_never_exported(tokens, where, tmp_path):
    # A diverged run; and (U) the row of the padding token alone, which packed texts never read but
    # a reader that pads may.
    broken = build(tokens=tokens)
    with torch.no_grad():
        weight = broken.model.get_parameter(where)
        weight[tokens.token_to_id(tokenizer.PAD)] = torch.nan
        if where == "norm.weight":
            weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"^weight {where}: expected finite numbers .* got nan"):
        export(broken, tmp_path / "out", *SMALLEST)
    assert files_below(tmp_path) == {}


def test_bf16_encoder_is_checked_in_fp32(encoder, tmp_path):
    assert export(replace(encoder, bf16=True), tmp_path / "out", *SMALLEST).worst < 1e-5


def test_attention_without_fp32(tokens, tmp_path):
    varlen = build(tokens=tokens, attention="varlen")  # half precision on CUDA alone
    assert export(varlen, tmp_path / "out", *SMALLEST).worst < 1e-5
    assert varlen.model.cfg.attention == "varlen"  # the encoder stays as it was
    assert Encoder.load(str(tmp_path / "out"), "cpu").model.cfg.attention == "auto"


# ---- the command ----


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("MLEMBED_TRACEBACK", None)
    return processes.run("-m", "mlembed", "export", *arguments, env=environment)


def test_command(encoder, tmp_path):
    model, out = write_encoder(encoder, tmp_path / "model"), tmp_path / "out"
    done = command(model, out, "--dim", "5", "--exit", "1", "--rank", "3")
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and "sentence-transformers and transformers" in done.stdout
    agree(encoder, out, *SMALLEST)


def test_command_errors_are_one_line(encoder, tmp_path):
    model, out = write_encoder(encoder, tmp_path / "model"), tmp_path / "out"
    for arguments, message in [
        ((model, out, "--exit", "9"), "exit: expected 1..3 (the depth), got 9"),
        ((tmp_path / "nowhere", out), "expected a directory or a hub id"),
        ((model, model), str(model)),
    ]:
        done = command(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr
    assert not out.exists()


def test_readers_may_differ_by_four_times_our_own_error(encoder):
    """An error above 1e-3 allows nothing: it would hide a wrong reader."""
    exact = replace(encoder, model=probes.plain(encoder.model).double())
    exact = exact.encode(TEXTS, *SMALLEST)
    for error, allowed in ((9e-4, 3.6e-3), (1.1e-3, 0.0), (float("nan"), 0.0)):
        got = probes.noise(encoder, TEXTS, exact + error, *SMALLEST)
        assert got == pytest.approx(allowed, rel=1e-3), error
