"""Exports as their users open them: sentence-transformers and transformers, both the real ones."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from export_models import CORNERS, MAX_LENGTH, TEXTS, build, tokens_of
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Model

from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained
from mlembed.publishing import export as exporting
from mlembed.publishing.export import export


@pytest.fixture(scope="module")
def tokens():
    return tokens_of("qwen3")


@pytest.fixture(scope="module")
def encoder(tokens) -> Encoder:
    return build(tokens=tokens)


@pytest.fixture(scope="module")
def smallest(encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "smallest"
    export(encoder, out, 5, 1, 3)
    return out


def read(path: Path) -> dict | list:
    return json.loads(path.read_text(encoding="utf-8"))


def by_sentence_transformers(out: Path) -> np.ndarray:
    model = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    # Batches of three: sorted by length inside, padded differently, some not at all.
    return model.encode(TEXTS, batch_size=3, convert_to_numpy=True, show_progress_bar=False)


@torch.no_grad()
def by_transformers(out: Path, pooling: str, dim: int) -> np.ndarray:
    """As a user without sentence-transformers would: pool, cut, normalise by hand."""
    model = AutoModel.from_pretrained(out, local_files_only=True).eval()
    assert isinstance(model, Qwen3Model) and model.dtype == torch.float32
    reader = AutoTokenizer.from_pretrained(out, local_files_only=True)
    tokens = reader(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == MAX_LENGTH
    hidden = model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    vectors = []
    for row, mask in zip(hidden, tokens["attention_mask"].bool(), strict=True):
        kept = row[mask]
        pooled = {"last": kept[-1], "mean": kept.mean(0), "cls": kept[0]}[pooling]
        vectors.append(pooled[:dim] / pooled[:dim].norm())
    return torch.stack(vectors).numpy()


def agree(encoder: Encoder, out: Path, dim: int, exit: int, rank: int | None) -> None:
    ours = encoder.encode(TEXTS, dim, exit, rank)
    theirs = by_sentence_transformers(out)
    assert theirs.shape == (len(TEXTS), dim)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    # Not only as cosines: the vectors themselves have length one.
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, rtol=0, atol=1e-5)
    alone = by_transformers(out, encoder.model.cfg.pooling, dim)
    np.testing.assert_allclose(alone, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("corner", CORNERS, ids=str)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_readers_agree_at_the_corners(tokens, pooling, corner, tmp_path):
    encoder = build(tokens=tokens, pooling=pooling)
    worst = export(encoder, tmp_path / "out", *corner)
    assert 0 <= worst < 1e-5
    agree(encoder, tmp_path / "out", *corner)


# Attention to both sides, the first token's pooling, a vocabulary without ranks; each once in full
# size and once cut.
@pytest.mark.parametrize(
    ("changes", "corner"),
    [
        ({"causal": False, "pooling": "mean"}, (24, 3, 11)),
        ({"causal": False, "pooling": "mean"}, (5, 1, 3)),
        ({"causal": False, "pooling": "last"}, (5, 3, 3)),
        ({"causal": False, "pooling": "cls"}, (12, 2, 7)),
        ({"ranks": ()}, (24, 3, None)),
        ({"ranks": ()}, (5, 1, None)),
    ],
    ids=str,
)
def test_readers_agree_on_other_kinds(tokens, changes, corner, tmp_path):
    encoder = build(tokens=tokens, **changes)
    export(encoder, tmp_path / "out", *corner)
    agree(encoder, tmp_path / "out", *corner)


def test_defaults_are_the_full_size(encoder, tmp_path):
    export(encoder, tmp_path / "out")
    assert not (tmp_path / "out" / "2_Dense").exists()
    np.testing.assert_allclose(
        by_sentence_transformers(tmp_path / "out"), encoder.encode(TEXTS), rtol=0, atol=1e-5
    )
    again = Encoder.load(str(tmp_path / "out"), "cpu")
    for name, weight in encoder.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


# ---- what is written ----


def test_files(smallest):
    files = {str(path.relative_to(smallest)) for path in smallest.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "mlembed_config.json",
        "mlembed_factors.safetensors",
    }


def test_modules_have_the_names_of_5_0(smallest):
    # Later versions map these; versions before 5.4 know no newer ones.
    assert read(smallest / "modules.json") == [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(
            [
                ("", "Transformer"),
                ("1_Pooling", "Pooling"),
                ("2_Dense", "Dense"),
                ("3_Normalize", "Normalize"),
            ]
        )
    ]
    dense = read(smallest / "2_Dense" / "config.json")
    assert (dense["in_features"], dense["out_features"], dense["bias"]) == (24, 5, False)
    weight = load_file(smallest / "2_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(weight, torch.eye(5, 24))


def test_sentence_transformers_settings(smallest):
    # text-embeddings-inference needs max_seq_length where the file exists, and prompts that are
    # strings; an older reader only warns about a newer version, so the oldest is named.
    assert read(smallest / "sentence_bert_config.json") == {
        "max_seq_length": MAX_LENGTH,
        "do_lower_case": False,
    }
    settings = read(smallest / "config_sentence_transformers.json")
    assert settings["model_type"] == "SentenceTransformer"
    assert settings["__version__"]["sentence_transformers"] == "5.0.0"
    assert settings["prompts"].keys() == {"query", "document"}
    assert all(isinstance(prompt, str) for prompt in settings["prompts"].values())
    assert settings["default_prompt_name"] is None
    assert settings["similarity_fn_name"] == "cosine"
    assert "truncate_dim" not in settings


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_pooling_is_one_of_six_booleans(tokens, pooling, tmp_path):
    export(build(tokens=tokens, pooling=pooling), tmp_path / "out", 5, 1, 3)
    stored = read(tmp_path / "out" / "1_Pooling" / "config.json")
    modes = {key: value for key, value in stored.items() if key.startswith("pooling_mode_")}
    true = {"last": "lasttoken", "mean": "mean_tokens", "cls": "cls_token"}[pooling]
    assert len(modes) == 6 and all(type(value) is bool for value in modes.values())
    assert [key for key, value in modes.items() if value] == [f"pooling_mode_{true}"]
    assert stored["word_embedding_dimension"] == 24 and stored["include_prompt"] is True


def test_config_is_cut_and_says_rope_twice(encoder, smallest):
    stored = read(smallest / "config.json")
    assert stored["model_type"] == "qwen3" and stored["architectures"] == ["Qwen3Model"]
    assert stored["num_hidden_layers"] == 1 and stored["layer_types"] == ["full_attention"]
    assert stored["rope_theta"] == 700.0
    assert stored["rope_parameters"] == {"rope_type": "default", "rope_theta": 700.0}
    assert stored["vocab_size"] == encoder.tokenizer.get_vocab_size()
    weights = load_file(smallest / "model.safetensors")
    assert {name.split(".")[1] for name in weights if name.startswith("layers.")} == {"0"}
    with torch.no_grad():
        merged = encoder.model.embed_tokens.table(3)
    torch.testing.assert_close(weights["embed_tokens.weight"], merged, rtol=0, atol=1e-6)


def test_tokenizer_is_portable(encoder, smallest):
    stored = read(smallest / "tokenizer_config.json")
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no newer
    assert stored["model_max_length"] == MAX_LENGTH and stored["padding_side"] == "right"
    assert stored["eos_token"] == tokenizer.EOS and stored["pad_token"] == tokenizer.PAD
    assert read(smallest / "special_tokens_map.json") == {
        "eos_token": tokenizer.EOS,
        "pad_token": tokenizer.PAD,
    }
    reader = AutoTokenizer.from_pretrained(smallest, local_files_only=True)
    assert isinstance(reader, PreTrainedTokenizerFast)
    theirs = reader(TEXTS, truncation=True)["input_ids"]
    ours = tokenizer.tokenize(encoder.tokenizer, TEXTS, MAX_LENGTH)
    assert theirs == [text.tolist() for text in ours]
    assert {text[-1] for text in theirs} == {reader.eos_token_id}
    lengths = {len(text) for text in theirs}
    assert 1 in lengths and MAX_LENGTH in lengths and len(lengths) >= 6


def test_reload_keeps_the_nesting(encoder, tmp_path):
    # Factors lie beside the merged table: what is left of exits and ranks can be cut again.
    out = tmp_path / "out"
    export(encoder, out, 12, 2, 7)
    factors = load_file(out / "mlembed_factors.safetensors")
    assert factors["U"].shape[1] == 7 and factors["W"].shape[0] == 7
    again = Encoder.load(str(out), "cpu")
    assert again.model.cfg.ranks == (3, 7) and again.model.cfg.exits == (1, 2)
    assert again.max_length == MAX_LENGTH
    for dim, exit, rank in [(12, 2, 7), (5, 1, 3), (12, 2, 1)]:
        np.testing.assert_array_equal(
            again.encode(TEXTS, dim, exit, rank), encoder.encode(TEXTS, dim, exit, rank)
        )
    export(again, tmp_path / "twice", 5, 1, 3)
    np.testing.assert_allclose(
        by_sentence_transformers(tmp_path / "twice"),
        encoder.encode(TEXTS, 5, 1, 3),
        rtol=0,
        atol=1e-5,
    )


def test_prompts_go_by_name(tokens, tmp_path):
    prompts = {"query": "Instruct: find\nQuery: ", "sts": "vergleiche: "}
    encoder = replace(build(tokens=tokens), prompts=prompts)
    export(encoder, tmp_path / "out", 12, 2, 7)
    assert read(tmp_path / "out" / "config_sentence_transformers.json")["prompts"] == {
        "query": "Instruct: find\nQuery: ",
        "document": "",  # MTEB asks for both
        "sts": "vergleiche: ",
    }
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    again = Encoder.load(str(tmp_path / "out"), "cpu")
    assert again.prompts["query"] == prompts["query"]
    for ours in (encoder, again):
        np.testing.assert_allclose(
            theirs.encode_query(TEXTS), ours.encode_query(TEXTS, 12, 2, 7), rtol=0, atol=1e-5
        )
        np.testing.assert_allclose(
            theirs.encode_document(TEXTS), ours.encode_document(TEXTS, 12, 2, 7), rtol=0, atol=1e-5
        )
        named = theirs.encode(TEXTS, prompt_name="sts")
        by_name = ours.encode(TEXTS, 12, 2, 7, prompt_name="sts")
        np.testing.assert_allclose(named, by_name, rtol=0, atol=1e-5)
    assert np.abs(named - theirs.encode_query(TEXTS)).max() > 1e-2  # prompts count


def test_large_weights_are_split(encoder, tmp_path):
    out = tmp_path / "out"
    export(encoder, out)
    whole = load_file(out / "model.safetensors")
    most = max(w.numel() * 4 for w in whole.values()) + 1000  # the largest tensor is the table
    exporting.split(out, most)
    assert not (out / "model.safetensors").exists()
    files = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    found = {file.name: load_file(file) for file in files}
    for weights in found.values():
        assert sum(w.numel() * 4 for w in weights.values()) <= most
    index = read(out / "model.safetensors.index.json")
    assert index["weight_map"] == {name: file for file, some in found.items() for name in some}
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(w.numel() * 4 for w in whole.values())
    agree(encoder, out, 24, 3, 11)
    np.testing.assert_array_equal(
        Encoder.load(str(out), "cpu").encode(TEXTS), encoder.encode(TEXTS)
    )


# ---- refusals ----


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a directory, hidden files included."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")
    }


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ((0, None, None), r"dim: expected 1\.\.24 \(the width\), got 0"),
        ((25, None, None), r"dim: expected 1\.\.24 \(the width\), got 25"),
        ((None, 0, None), "exit: expected"),
        ((None, 4, None), r"exit: expected 1\.\.3 \(the depth\), got 4"),
        ((None, None, 0), r"rank: expected 1\.\.11 \(the stored rank\), got 0"),
        ((None, None, 12), r"rank: expected 1\.\.11 \(the stored rank\), got 12"),
    ],
)
def test_cuts_that_the_model_lacks(encoder, cut, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(encoder, tmp_path / "out", *cut)
    assert tree(tmp_path) == {}


def test_rank_of_a_plain_table(tokens, tmp_path):
    with pytest.raises(ValueError, match="rank: expected none .*plain table"):
        export(build(tokens=tokens, ranks=()), tmp_path / "out", rank=3)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("gguf", r"got gguf, which llama\.cpp makes .* convert_hf_to_gguf\.py .*out"),
        ("tflite", "format: expected sentence-transformers or onnx, got tflite"),
    ],
)
def test_formats_that_there_are_not(encoder, format, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(encoder, tmp_path / "out", formats=("onnx", format))
    assert tree(tmp_path) == {}


def test_an_occupied_place_stays_untouched(encoder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = tree(tmp_path)
    for name in ("out", "file"):
        with pytest.raises(ValueError, match="expected a new directory"):
            export(encoder, tmp_path / name)
    with pytest.raises(ValueError, match="could not be written"):
        export(encoder, tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"out: expected .* a name of its own, got \."):
        export(encoder, Path())
    assert tree(tmp_path) == before


def test_empty_places_are_used(encoder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.partial").mkdir()  # what a killed export left
    (tmp_path / ".empty.partial" / "junk").write_text("junk")
    export(encoder, tmp_path / "empty", 5, 1, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert (tmp_path / "empty" / "modules.json").is_file()
    assert not (tmp_path / "empty" / "junk").exists()
    export(encoder, tmp_path / "new" / "deep", 5, 1, 3)
    assert (tmp_path / "new" / "deep" / "modules.json").is_file()


def test_a_failed_export_leaves_nothing(tokens, tmp_path):
    # Fails in the last check, with all files written: the tokenizer knows more tokens than the
    # model has rows.
    broken = build(tokens=tokens, vocab_size=60)
    with pytest.raises((ValueError, IndexError)):
        export(broken, tmp_path / "out", 5, 1, 3)
    assert tree(tmp_path) == {}


def test_a_failed_export_leaves_no_parents(tokens, tmp_path):
    broken = build(tokens=tokens, vocab_size=60)
    with pytest.raises((ValueError, IndexError)):
        export(broken, tmp_path / "new" / "out", 5, 1, 3)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("where", ["norm.weight", "embed_tokens.U"])
def test_not_a_number_is_never_exported(tokens, where, tmp_path):
    # A diverged run; and (U) only the padding token's row, which our packed texts never read but
    # a reader that pads may.
    broken = build(tokens=tokens)
    with torch.no_grad():
        weight = broken.model.get_parameter(where)
        weight[tokens.token_to_id(tokenizer.PAD)] = torch.nan
        if where == "norm.weight":
            weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="expected the model's own vectors within"):
        export(broken, tmp_path / "out", 5, 1, 3)
    assert tree(tmp_path) == {}


def test_a_bf16_encoder_is_checked_in_fp32(encoder, tmp_path):
    worst = export(replace(encoder, bf16=True), tmp_path / "out", 5, 1, 3)
    assert worst < 1e-5


def test_an_encoder_whose_attention_has_no_fp32(tokens, tmp_path):
    varlen = build(tokens=tokens, attention="varlen")  # half precision on CUDA alone
    assert export(varlen, tmp_path / "out", 5, 1, 3) < 1e-5
    assert varlen.model.cfg.attention == "varlen"  # of the encoder itself nothing changes
    assert Encoder.load(str(tmp_path / "out"), "cpu").model.cfg.attention == "auto"


# ---- the command ----


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("MLEMBED_TRACEBACK", None)
    return processes.run("-m", "mlembed", "export", *arguments, env=environment)


@pytest.fixture
def model_directory(encoder, tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    pretrained.save(encoder.model, path)
    tokenizer.save(encoder.tokenizer, path, MAX_LENGTH)
    return path


def test_command(encoder, model_directory, tmp_path):
    out = tmp_path / "out"
    done = command(model_directory, out, "--dim", "5", "--exit", "1", "--rank", "3")
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and "sentence-transformers and transformers" in done.stdout
    agree(encoder, out, 5, 1, 3)


def test_command_says_in_one_line_what_is_wrong(model_directory, tmp_path):
    out = tmp_path / "out"
    for arguments, message in [
        ((model_directory, out, "--exit", "9"), "exit: expected 1..3 (the depth), got 9"),
        ((tmp_path / "nowhere", out), "expected a directory or a hub id"),
        ((model_directory, model_directory), "expected a new directory"),
    ]:
        done = command(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr
    assert not out.exists()


def test_readers_may_differ_by_four_times_our_own_error(encoder):
    """An error above 1e-3 allows nothing: it would hide a reader that is wrong."""
    size = 5, 1, 3
    exact = replace(encoder, model=exporting.plain(encoder.model).double()).encode(TEXTS, *size)
    for off, allowed in ((9e-4, 3.6e-3), (1.1e-3, 0.0), (float("nan"), 0.0)):
        got = exporting.noise(encoder, TEXTS, exact + off, *size)
        assert got == pytest.approx(allowed, rel=1e-3), off
