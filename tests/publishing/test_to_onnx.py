"""The ONNX graph in onnxruntime: every kind of model, shapes that the trace did not have."""

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import processes
import pytest
from export_models import CORNERS, KINDS, MAX_LENGTH, TEXTS, build
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mlembed.publishing import probes, to_onnx
from mlembed.publishing.export import export

BOTH = ("sentence-transformers", "onnx")


def session(out: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(out / "onnx" / "model.onnx")


def feed(out: Path, texts: list[str]) -> dict[str, np.ndarray]:
    reader = AutoTokenizer.from_pretrained(out, local_files_only=True)
    return dict(reader(texts, padding=True, truncation=True, return_tensors="np"))


def agree(encoder, out: Path, corner) -> None:
    """Compare batches of one text, of one token, of more than the trace had, padded and not."""
    graph = session(out)
    ours = encoder.encode(TEXTS, *corner)
    for rows in ([0], [1], [12], [0, 13], range(len(TEXTS)), [0, 0, 0, 0]):
        some = [TEXTS[row] for row in rows]
        (vectors,) = graph.run(["sentence_embedding"], feed(out, some))
        np.testing.assert_allclose(vectors, ours[list(rows)], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("graphs") / "smallest"
    assert export(build(), out, 5, 1, 3, formats=BOTH).worst < 1e-5
    return out


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] if kind in ("minilm", "xlm-roberta") else [])
        for kind in KINDS
        if kind != "qwen3"
    ],
)
def test_onnxruntime_agrees(kind, tmp_path):
    # The longest text fills the table of positions, where there is one.
    encoder = build(kind, max_position_embeddings=MAX_LENGTH)
    out, corner = tmp_path / "out", (5, 2, 3)
    assert export(encoder, out, *corner, formats=BOTH).worst < 1e-5
    agree(encoder, out, corner)
    graph = session(out)
    named = {one.name: (one.type, one.shape) for one in graph.get_inputs()}
    tokens = "tensor(int64)", ["batch", "sequence"]
    assert named == {"input_ids": tokens, "attention_mask": tokens}
    named = {one.name: (one.type, one.shape) for one in graph.get_outputs()}
    assert named == {
        "last_hidden_state": ("tensor(float)", ["batch", "sequence", 24]),
        "sentence_embedding": ("tensor(float)", ["batch", 5]),
    }
    # Other readers pool the states of texts themselves.
    tokens = feed(out, TEXTS)
    hidden, vectors = graph.run(None, tokens)
    lengths = tokens["attention_mask"].sum(1)
    pooled = {
        "last": lambda: hidden[range(len(TEXTS)), lengths - 1],
        "cls": lambda: hidden[:, 0],
        "mean": lambda: (hidden * tokens["attention_mask"][..., None]).sum(1) / lengths[:, None],
    }
    if encoder.model.cfg.pooling in pooled:
        pooled = pooled[encoder.model.cfg.pooling]()[:, :5]
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        np.testing.assert_allclose(pooled, vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "corner",
    [*CORNERS[:2], *(pytest.param(corner, marks=pytest.mark.slow) for corner in CORNERS[2:])],
    ids=str,
)
def test_corners(corner, smallest, tmp_path):
    encoder, out = build(), smallest
    if corner != (5, 1, 3):
        out = tmp_path / "out"
        assert export(encoder, out, *corner, formats=("onnx",)).worst < 1e-5
    agree(encoder, out, corner)


def test_file_is_plain_onnx_without_local_paths(smallest):
    path = smallest / "onnx" / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    stored = onnx.load(path)
    opsets = {one.domain: one.version for one in stored.opset_import}
    assert opsets[""] == to_onnx.OPSET >= 17
    assert {node.domain for node in stored.graph.node} == {""}  # no functions of a package
    here = str(Path(__file__).parents[2]).encode()
    assert b"site-packages" not in path.read_bytes() and here not in path.read_bytes()
    assert [one.name for one in path.parent.iterdir()] == ["model.onnx"]


def test_large_weights_go_to_their_own_file(smallest, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(smallest, out, ignore=shutil.ignore_patterns("onnx"))
    to_onnx.write(out, most_inline=1000)
    files = {path.name: path.stat().st_size for path in (out / "onnx").iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx_data"}
    weights = sum(w.nbytes for w in load_file(out / "model.safetensors").values())
    assert files["model.onnx_data"] > 0.9 * weights
    moved = out.rename(tmp_path / "moved")
    agree(build(), moved, (5, 1, 3))
    to_onnx.quantise(moved)
    assert len(list((moved / "onnx").glob("model_quantized*"))) == 2
    graph = onnxruntime.InferenceSession(moved / to_onnx.INT8_FILE)
    (vectors,) = graph.run(["sentence_embedding"], feed(moved, TEXTS))
    cosines = (vectors * build().encode(TEXTS, 5, 1, 3)).sum(1)
    assert 0.99 < cosines.min() < 1 - 1e-6


# ---- int8 ----


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> Path:
    """An export with an int8 graph; its pooler and its cut are Dense modules."""
    out = tmp_path_factory.mktemp("int8") / "out"
    report = export(build("bert"), out, 5, 2, 3, formats=("onnx-int8",))
    assert report.worst < 1e-5 and 0.99 < report.int8_cosine < 1 - 1e-6
    assert f"int8 graph with them are at least {report.int8_cosine:.4f}" in report.describe()
    assert "(`onnx/model_quantized.onnx` has weights" in (out / "README.md").read_text()
    return out


def test_int8_graph_has_integers_for_the_trunk_and_the_vocabulary(int8):
    names = {path.name for path in (int8 / "onnx").iterdir()}
    assert names == {"model.onnx", "model_quantized.onnx"}
    plain, small = (onnx.load(int8 / "onnx" / name) for name in sorted(names))
    # Six products with weights in each of two layers.
    assert [node.op_type for node in small.graph.node].count("MatMulInteger") == 12
    floats = {w.name for w in small.graph.initializer if w.data_type == onnx.TensorProto.FLOAT}
    assert len([name for name in floats if re.match(r"dense\.[01]\S*weight", name)]) == 2
    after = {weight.name: weight for weight in small.graph.initializer}
    rows = [
        weight for weight in plain.graph.initializer if weight.data_type == onnx.TensorProto.FLOAT
    ]
    rows = [weight for weight in rows if len(weight.dims) == 2 and "dense." not in weight.name]
    assert len(rows) == 12 + 3
    for weight in rows:
        assert weight.name not in after, weight.name
        stored = onnx.numpy_helper.to_array(after[f"{weight.name}_quantized"])
        scales = onnx.numpy_helper.to_array(after[f"{weight.name}_scale"])
        # A product has a scale for each column, and 7 bits.
        if "embeddings" in weight.name:
            assert scales.size == 1 and stored.dtype in (np.int8, np.uint8)
        else:
            assert scales.size == weight.dims[1] and np.abs(stored).max() <= 64


def test_check_detects_a_broken_int8_graph(int8, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(int8, out)
    small = onnx.load(out / to_onnx.INT8_FILE)
    scale = next(w for w in small.graph.initializer if w.name.endswith("_scale"))
    broken = np.full_like(onnx.numpy_helper.to_array(scale), np.nan)
    scale.CopyFrom(onnx.numpy_helper.from_array(broken, scale.name))
    onnx.save(small, out / to_onnx.INT8_FILE)
    with pytest.raises(ValueError, match="model_quantized.onnx: expected cosines above 0, got nan"):
        probes.check(out, build("bert"), 5, 2, 3)


# ---- errors ----


def test_check_detects_a_wrong_graph(smallest, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(smallest, out)
    stored = onnx.load(out / "onnx" / "model.onnx")
    norm = next(w for w in stored.graph.initializer if w.name.endswith("encoder.norm.weight"))
    weight = onnx.numpy_helper.to_array(norm).copy()
    weight[0] *= 1.001
    norm.CopyFrom(onnx.numpy_helper.from_array(weight, norm.name))
    onnx.save(stored, out / "onnx" / "model.onnx")
    with pytest.raises(ValueError, match="onnxruntime: expected the model's own vectors"):
        probes.check(out, build(), 5, 1, 3)


def test_missing_package(tmp_path):
    # A process of its own, in which the import fails.
    script = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from export_models import build\n"
        "from mlembed.publishing.export import export\n"
        "from mlembed.runtime.errors import one_line_errors\n"
        "with one_line_errors():\n"
        f"    export(build(), Path({str(tmp_path / 'out')!r}), formats=['onnx'])"
    )
    done = processes.run("-c", script)
    assert done.returncode == 1
    assert done.stderr.startswith("error: format onnx: expected onnxscript")
    assert "pip install 'mlembed[onnx]'" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
