"""Every command refuses weights of real files that are not finite floating-point numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from factories import tiny_encoder, tiny_tokenizer, write_encoder, write_jsonl
from safetensors.torch import load_file, save_file

from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.inference.search import Funnel
from mlembed.modeling import pretrained, weight_checks

NAME = "layers.0.self_attn.q_proj.weight"
TEXTS = [f"{n} {thing}" for n in ("one", "two", "three", "four") for thing in ("cats", "dogs")]
RANGE = r"expected finite numbers of float32, up to 3\.403e\+38, got"
KINDS = "expected a weight of float16, bfloat16, float32, float64, got"


@pytest.fixture(scope="module")
def tokens():
    return tiny_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def good(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_encoder(tiny_encoder(tokens, ranks=(4, 8)), folder)


def spoilt(good, folder, change, name=NAME, file="model.safetensors"):
    """Copy a model directory with one changed weight."""
    shutil.copytree(good, folder)
    weights = load_file(folder / file)
    weights[name] = change(weights[name])
    save_file(weights, folder / file, metadata={"format": "pt"})
    return folder


def one(value):
    """Return a function that puts a value into a weight."""

    def change(weight):
        weight = weight.double() if abs(value) < torch.inf else weight.clone()
        weight.view(-1)[3] = value
        return weight

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one(torch.nan), f"{RANGE} nan"),
        (one(torch.inf), f"{RANGE} inf"),
        (one(-torch.inf), f"{RANGE} -inf"),
        (one(1e300), rf"{RANGE} 1e\+300"),
        (lambda x: x.int(), f"{KINDS} int32"),
        (lambda x: x > 0, f"{KINDS} bool: save quantised weights in one of these"),
        (lambda x: x.to(torch.complex64), f"{KINDS} complex64"),
        (lambda x: x.to(torch.int8), f"{KINDS} int8: save quantised weights in one of these"),
        (lambda x: x.to(torch.float8_e4m3fn), f"{KINDS} float8_e4m3fn: save quantised weights"),
    ],
)
def test_weight_is_refused_by_name(change, message, good, tmp_path):
    directory = spoilt(good, tmp_path / "bad", change)
    with pytest.raises(ValueError, match=f"bad/model.safetensors: {NAME}: {message}"):
        pretrained.load(str(directory))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read(kind, good, tmp_path):
    directory = spoilt(good, tmp_path / "cast", lambda x: x.to(kind))
    want, got = (pretrained.load(str(path)).state_dict()[NAME] for path in (good, directory))
    assert got.dtype == torch.float32 and torch.equal(got, want.to(kind).float())


def test_range_is_that_of_the_dtype_asked_for(good, tmp_path):
    directory = spoilt(good, tmp_path / "large", lambda x: one(1e5)(x).float())
    assert (
        pretrained.load(str(directory), dtype=torch.bfloat16).state_dict()[NAME].abs().max() > 9e4
    )
    message = f"{NAME}: expected finite numbers of float16, up to 6.55e"
    with pytest.raises(ValueError, match=message):
        pretrained.load(str(directory), dtype=torch.float16)


@pytest.mark.parametrize("name", "UW")
def test_factors_are_checked(name, good, tmp_path):
    directory = spoilt(good, tmp_path / "bad", one(torch.nan), name, pretrained.FACTORS)
    with pytest.raises(ValueError, match=f"{pretrained.FACTORS}: {name}: {RANGE} nan"):
        pretrained.load(str(directory))


def test_nothing_is_written(good, tmp_path):
    model = pretrained.load(str(good))
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match=f"^weight layers.1.mlp.up_proj.weight: {RANGE} nan"):
        pretrained.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_empty_weight_is_finite():
    assert weight_checks.check("x", torch.empty(0, 3)) is None


# ---- commands ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"query": text, "positive": f"{text}, too"} for text in TEXTS]
    (folder / "lines.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    nway = [{"id": i, "lang": x, "text": f"{t} {x}"} for i, t in enumerate(TEXTS) for x in "ab"]
    write_jsonl(folder / "nway.jsonl", nway)
    return folder, write_jsonl(folder / "pairs.jsonl", rows)


def commands(directory, good, out, data):
    folder, pairs = data
    lines = ("encode", directory, "--input", folder / "lines.txt", "--out", out / "v.npy")
    return {
        "encode": ("encode", directory, *TEXTS),
        "int8": (*lines, "--precision", "int8"),
        "binary": (*lines, "--precision", "binary"),
        "two devices": (*lines, "--device", "cpu", "cpu"),
        "mine": ("mine", directory, out / "mined.jsonl", "--data", pairs, "--top", "4",
                 "--negatives", "1"),
        "teacher": ("teacher", directory, out / "teacher", "--data", pairs),
        "prune": ("prune", directory, out / "small", "--width", "16"),
        "merge": ("merge", out / "merged", good, directory),
        "export": ("export", directory, out / "exported"),
        "evaluate": ("evaluate", directory, "--data", folder / "nway.jsonl"),
    }  # fmt: skip


NAMES = list(commands("", "", Path(), (Path(), "")))


@pytest.mark.parametrize("name", NAMES)
def test_command_refuses_a_weight(name, good, data, tmp_path):
    directory = spoilt(good, tmp_path / "bad", one(torch.nan))
    out = tmp_path / "out"
    out.mkdir()
    done = processes.run("-m", "mlembed", *commands(directory, good, out, data)[name])
    assert done.returncode == 1 and done.stdout == ""
    # mine and teacher describe the data first.
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {directory}/model.safetensors: {NAME}: expected finite numbers")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    "name",
    ["encode", "int8", "binary", "two devices", "mine", "teacher", "export", "prune"],
)
def test_command_refuses_vectors_of_zeros(name, good, data, tmp_path):
    """The last norm's weight is finite, and multiplies every vector by 0."""
    directory = spoilt(good, tmp_path / "zero", torch.zeros_like, "norm.weight")
    out = tmp_path / "out"
    out.mkdir()
    done = processes.run("-m", "mlembed", *commands(directory, good, out, data)[name])
    assert done.returncode == 1 and done.stdout == ""
    if name == "teacher":
        expected = "error: teacher: expected finite vectors that are not zero, got another for the"
    else:
        expected = "error: vectors: expected length one, got "
    assert done.stderr.splitlines()[-1].startswith(expected), done.stderr
    assert not list(out.iterdir())


def test_evaluation_without_a_score_has_status_1(good, data, tmp_path):
    directory = spoilt(good, tmp_path / "zero", torch.zeros_like, "norm.weight")
    arguments = commands(directory, good, tmp_path, data)["evaluate"]
    done = processes.run("-m", "mlembed", *arguments, "--out", tmp_path / "scores")
    assert done.returncode == 1 and "no score: 16 vectors are not of length one" in done.stdout
    assert "error: nway: expected vectors of length one, got 16 of another length" in done.stderr
    stored = json.loads((tmp_path / "scores" / "grid.json").read_text())
    assert stored["cells"][-1]["scores"]["nway"] == {"score": None, "not_unit": 16}


def test_text_is_numbered(good, tmp_path):
    """Overflow in half precision may spoil one vector of many."""
    encoder = Encoder.load(str(good), "cpu")
    number = int(tokenizer.tokenize(encoder.tokenizer, ["dogs"], 8)[0][0])
    with torch.no_grad():
        encoder.model.embed_tokens.U[number] = torch.nan
    want = "got 1 of 3 vectors of another length, the first of text 1: nan"
    for encode in (encoder.encode, lambda texts: list(encoder.stream(texts))):
        with pytest.raises(ValueError, match=want):
            encode(["cats", "dogs", "one"])
    with pytest.raises(ValueError, match="first of text 1: nan"):
        encoder.encode_widths(["cats", "dogs", "one"], [8, 16, None])
    assert np.isfinite(encoder.encode(["cats", "one"])).all()
    for stored in (True, False):
        with pytest.raises(ValueError, match="first of text 1: nan"):
            Funnel.build(encoder, ["cats", "dogs", "one"], (8, None, None), stored=stored)
    funnel = Funnel.build(encoder, ["cats", "one"], (8, None, None), stored=False)
    with pytest.raises(ValueError, match="first of text 1: nan"):
        funnel.search(["one", "dogs"], 1)
