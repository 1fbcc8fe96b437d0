"""`--pooling`, and what commands say of a directory that does not tell how it is pooled."""

import json
import shutil

import numpy as np
import pytest
import torch
from factories import tiny_encoder, write_jsonl
from transformers import AutoModel, AutoTokenizer

from mlembed.cli import encode, evaluate, export, merge, mine, prune, teacher
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config
from mlembed.publishing.export import export as publish
from mlembed.training.objective.teacher import StoredVectors, Teacher

BERT = {"style": "bert", "causal": False, "num_key_value_heads": 2}
TEXTS = ["Wednesday, May 4, 2050", "", "one two three", "mercredi 4 mai 2050"]
POOLINGS = ["mean", "cls", "last", "pooler"]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """A directory of sentence-transformers that says its pooling: the pooler."""
    out = tmp_path_factory.mktemp("pooling") / "said"
    publish(tiny_encoder(pooling="pooler", **BERT), out)
    return out


@pytest.fixture(scope="module")
def plain(said):
    """The same weights as transformers alone writes them."""
    out = said.parent / "plain"
    out.mkdir()
    AutoModel.from_pretrained(said).save_pretrained(out)
    AutoTokenizer.from_pretrained(said).save_pretrained(out)
    pairs = [{"query": f"a{i}", "positive": f"b{i}"} for i in range(4)]
    write_jsonl(said.parent / "pairs.jsonl", pairs)
    texts = [(i, lang) for i in range(3) for lang in ("eng", "deu")]
    rows = [{"id": i, "lang": lang, "text": f"{i} {lang}"} for i, lang in texts]
    write_jsonl(said.parent / "nway.jsonl", rows)
    return out


def by_transformers(directory, pooling) -> np.ndarray:
    """Pool transformers' states of each text by hand."""
    model = AutoModel.from_pretrained(directory).eval()
    tokens = AutoTokenizer.from_pretrained(directory)
    vectors = []
    for text in TEXTS:
        with torch.no_grad():
            read = model(**tokens(text, truncation=True, return_tensors="pt"))
        states = read.last_hidden_state[0]
        vector = {
            "mean": states.mean(0),
            "cls": states[0],
            "last": states[-1],
            "pooler": read.pooler_output[0],
        }[pooling]
        vectors.append(vector / vector.norm())
    return torch.stack(vectors).numpy()


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_decides(pooling, plain):
    want = by_transformers(plain, pooling)
    close(Encoder.load(str(plain), "cpu", pooling=pooling).encode(TEXTS), want)


def test_the_library_warns_and_pools_by_mean(plain):
    with pytest.warns(UserWarning, match="pooled by mean: nothing in .*plain says how; --pooling"):
        encoder = Encoder.load(str(plain), "cpu")
    close(encoder.encode(TEXTS), by_transformers(plain, "mean"))


def commands(model, folder, out):
    """Return each command by name, as a function of further options."""
    pairs, nway = str(folder / "pairs.jsonl"), str(folder / "nway.jsonl")
    model, options = str(model), {"device": "cpu"}
    return {
        "encode": lambda **o: encode.main(model, ("a",), device=("cpu",), **o),
        "evaluate": lambda **o: evaluate.main(model, data=(nway,), exit=(2,), **options, **o),
        "mine": lambda **o: mine.main(model, out / "mined.jsonl", data=(pairs,), **options, **o),
        "export": lambda **o: export.main(model, out / "exported", **o),
        "teacher": lambda **o: teacher.main(model, out / "taught", data=(pairs,), **options, **o),
        "prune": lambda **o: prune.main(model, out / "pruned", layers=1, **options, **o),
        "merge": lambda **o: merge.main(out / "merged", (model, model), **o),
    }


NAMES = ["encode", "evaluate", "mine", "export", "teacher", "prune", "merge"]


@pytest.mark.parametrize("name", NAMES)
def test_commands_say_it_once(name, plain, tmp_path, capsys):
    capsys.readouterr()
    commands(plain, plain.parent, tmp_path)[name]()
    printed = capsys.readouterr().err
    assert printed.count("pooled by mean: nothing in") == 1 and "--pooling" in printed


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_silent_if_told(name, plain, tmp_path, capsys):
    commands(plain, plain.parent, tmp_path)[name](pooling="pooler")
    assert "pooled by" not in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_commands_refuse_a_contradiction(name, said, plain, tmp_path):
    with pytest.raises(ValueError, match="pooling: expected pooler, as .*said says, got mean"):
        commands(said, plain.parent, tmp_path)[name](pooling="mean")
    assert not list(tmp_path.iterdir())
    commands(said, plain.parent, tmp_path)[name](pooling="pooler")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_is_written_says_it(pooling, plain, tmp_path):
    export.main(str(plain), tmp_path / "out", pooling=pooling)
    want = by_transformers(plain, pooling)
    close(Encoder.load(str(tmp_path / "out"), "cpu").encode(TEXTS), want)
    # Other libraries read its modules alone.
    (tmp_path / "out" / hf_config.NESTING).unlink()
    close(Encoder.load(str(tmp_path / "out"), "cpu").encode(TEXTS), want)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_teacher_is_pooled_as_told(pooling, plain, tmp_path):
    rows = [{"query": TEXTS[0], "positive": TEXTS[2]}]
    data = write_jsonl(tmp_path / "texts.jsonl", rows)
    out = tmp_path / "taught"
    teacher.main(str(plain), out, data=(data,), dtype="fp32", device="cpu", pooling=pooling)
    vectors = StoredVectors.open(str(out)).vectors([TEXTS[0], TEXTS[2]])
    want = by_transformers(plain, pooling)[[0, 2]]
    close(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), want)


def test_the_base_of_a_tune_is_pooled_like_it(said, plain, tmp_path, capsys):
    """A plain base says nothing, so nothing contradicts the tune's pooler."""
    merge.main(tmp_path / "out", (str(plain), str(said)))
    assert "pooled" not in capsys.readouterr().err
    merged = Encoder.load(str(tmp_path / "out"), "cpu")
    assert merged.model.cfg.pooling == "pooler"
    close(merged.encode(TEXTS), by_transformers(plain, "pooler"))


def test_a_directory_of_ours_says_it(said, tmp_path):
    """mlembed_config.json names the pooling even without modules of sentence-transformers."""
    ours = shutil.copytree(said, tmp_path / "ours")
    (ours / "modules.json").unlink()
    shutil.rmtree(ours / "1_Pooling")
    assert json.loads((ours / hf_config.NESTING).read_text())["model"]["pooling"] == "pooler"
    assert Encoder.load(str(ours), "cpu").model.cfg.pooling == "pooler"
    with pytest.raises(ValueError, match="pooling: expected pooler"):
        Encoder.load(str(ours), "cpu", pooling="mean")
    # A teacher is opened by sentence-transformers, which would take the mean.
    taught = Teacher.load(str(ours), "", torch.device("cpu"))
    assert taught.note == "" and taught.pipeline == "Transformer, Pooling (cls), Dense"
    with pytest.raises(ValueError, match="pooling: expected pooler"):
        Teacher.load(str(ours), "", torch.device("cpu"), "mean")
