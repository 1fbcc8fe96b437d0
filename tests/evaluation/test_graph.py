"""`mlembed evaluate --graph`: scores of an ONNX graph next to those of the weights."""

import json
import re

import numpy as np
import pytest
from export_models import TRAINED_ON, build

from mlembed.cli import evaluate
from mlembed.inference import cost
from mlembed.publishing import to_onnx
from mlembed.publishing.export import write_model


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """An export with both graphs, and a directory of translations."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "out").mkdir()
    write_model(folder / "out", build(), 12, 2, 3)
    to_onnx.write(folder / "out")
    to_onnx.quantise(folder / "out")
    (folder / "tat").mkdir()
    for i, lang in enumerate(("deu", "eng")):
        lines = [f"{word} {n}" for n in range(8) for word in TRAINED_ON[i : i + 2]]
        (folder / "tat" / f"tatoeba.deu-eng.{lang}").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"LATENCY_S": 0.0, "PACKS_S": 0.0, "PACK": 2}.items():
        monkeypatch.setattr(cost, name, value)


def run(folder, graph, out, **options):
    data = (str(folder / "tat"),)
    evaluate.main(
        str(folder / "out"), data=data, graph=graph, out=str(out), device="cpu", **options
    )
    return json.loads((out / "grid.json").read_text())


def test_graph_of_the_weights_loses_nothing(scored, tmp_path, capsys):
    stored = run(scored, "onnx/model.onnx", tmp_path / "report")
    graph = stored["graph"]
    assert graph["file"] == "onnx/model.onnx" and graph["latency_ms"] > 0
    assert graph["bytes"] == (scored / "out" / "onnx" / "model.onnx").stat().st_size
    own = {(c["dim"], c["exit"], c["rank"]): c["scores"] for c in stored["cells"]}
    # The widths of training up to the exported one, at its depth and rank.
    assert [(c["dim"], c["exit"], c["rank"]) for c in graph["cells"]] == [(5, 2, 3), (12, 2, 3)]
    for cell in graph["cells"]:
        assert cell["scores"] == own[cell["dim"], 2, 3]
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(5|12) +([\d.]+) +([\d.]+) +([-\d.]+)$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["5", "12"] and {row[3] for row in rows} == {"0.0"}


def test_int8_graph_is_scored_by_its_own_vectors(scored, tmp_path, capsys):
    stored = run(scored, "onnx/model_quantized.onnx", tmp_path / "report", exit=(2,), rank=(3,))
    plain = (scored / "out" / "onnx" / "model.onnx").stat().st_size
    assert stored["graph"]["bytes"] < plain
    scores = [
        [cell["scores"]["tat"]["score"] for cell in cells]
        for cells in (stored["cells"][:2], stored["graph"]["cells"])
    ]
    losses = 100 * np.subtract(*scores)
    rows = re.findall(r"^ +(?:5|12) +[\d.]+ +[\d.]+ +([-\d.]+)$", capsys.readouterr().out, re.M)
    np.testing.assert_allclose([float(row) for row in rows], losses, rtol=0, atol=0.051)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph": "onnx/none.onnx"}, "graph: expected a file in .*out, got onnx/none.onnx"),
        ({"graph": "onnx/model.onnx", "exit": (1,)}, "graph: expected exit 2 and rank 3 to comp"),
        ({"graph": "onnx/model.onnx", "mteb": ("STS12",)}, "graph: expected --data, got --mteb"),
        ({"graph": "config.json"}, "config.json: expected an ONNX graph, got "),
    ],
)
def test_errors(scored, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(scored, out=tmp_path / "report", **options)
    assert list(tmp_path.iterdir()) == []
