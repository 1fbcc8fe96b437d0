"""Every cell scored as bytes and bits, against full matrices of integers."""

import numpy as np
import pytest
import torch
from grid_tasks import ndcg, score_cells, size
from sentence_transformers import quantize_embeddings

from mlembed.cli import encode
from mlembed.evaluation import results, scores, tables
from mlembed.evaluation.charts import mean_score
from mlembed.evaluation.grid import Grid, score_grid
from mlembed.inference.encoder import Encoder
from mlembed.publishing.export import export
from mlembed.publishing.model_card import Origin


def quantised_as(name, unit, largest):
    """Return codes as integers in float64, by NumPy alone."""
    if name == "binary":
        return np.where(unit > 0, 1.0, -1.0)
    return np.round(unit.astype(np.float64) * 127 / largest).clip(-128, 127)


def test_codes_of_every_cell(encoder, searched, tasks):
    """Scores of codes are those that full matrices of integers give; other scores do not change."""
    beir, un, bucc = searched
    every, sizes = [beir, un, bucc, *tasks], ([4, 32], [3], [8])
    cells = score_cells(encoder, every, *sizes, precisions=("int8", "binary"))
    for cell, plain in zip(cells, score_cells(encoder, every, *sizes), strict=True):
        reached = []
        for task in (beir, tasks[1]):
            sides = [task.queries, list(task.documents())] if task is beir else [task.texts]
            sides = [encoder.encode(side, *size(cell)) for side in sides]
            largest = max(np.abs(side).max() for side in sides)
            reached.append(largest)
            for name in ("int8", "binary"):
                coded = [quantised_as(name, side, largest) for side in sides]
                # Signs stay integers, whose products are equal to the last bit.
                if name == "int8":
                    coded = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in coded]
                if task is beir:
                    want = ndcg(beir, *coded)
                else:
                    want = scores.score_sts(task, torch.from_numpy(coded[0]))["score"]
                got = cell["scores"][task.name][name]["score"]
                # Rounding of fp32 orders documents of nearly equal cosine, as bytes have many.
                assert got == pytest.approx(want, abs=1e-6 if name == "binary" else 0.01)
        low, high = cell["int8_range"]
        assert high >= 126.5 / 127 * max(reached) * (1 - 1e-6) and low == -high * 128.5 / 126.5
        for task in every:
            codes = {name: cell["scores"][task.name].pop(name) for name in ("int8", "binary")}
            assert codes["int8"].keys() == codes["binary"].keys() and "score" in codes["int8"]
        del cell["int8_range"]
        assert cell == plain


def test_tables_of_codes(encoder, tasks):
    scored = score_grid(encoder, tasks, [4, 32], [3], [8], precisions=("int8", "binary"))
    assert (
        scored.precisions == ["int8", "binary"]
        and Grid(score_cells(encoder, tasks)).precisions == []
    )
    lines = scored.table().splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["int8,", "binary,"]
    for name, line in zip(("int8", "binary"), lines[4:], strict=True):
        want = [f"{mean_score(cell, name):.1f}" for cell in scored.cells]
        assert line.split()[-2:] == want
    head, _, row = scored.markdown().splitlines()
    titles, words = (line.strip("| ").split(" | ") for line in (head, row))
    assert dict(zip(titles, words, strict=True))["32 wide, binary"] == want[1]


def test_export_has_the_ranges_of_its_size(encoder, tasks, tmp_path, capsys):
    """And `encode` takes them for the width that it was exported at."""
    sizes = ([8, 32], [3], [8])
    tables.write_report(tmp_path, score_grid(encoder, tasks, *sizes, precisions=("int8",)), {})
    grid = results.read_grid(tmp_path / "grid.json")
    low, high = grid["cells"][0]["int8_range"]
    export(encoder, tmp_path / "narrow", 8, source=Origin("run", grid=grid))
    ranges = np.load(tmp_path / "narrow" / "int8_ranges.npy")
    assert ranges.dtype == np.float32 and ranges.shape == (2, 8)
    assert (ranges == np.float32([[low], [high]])).all()
    narrow = Encoder.load(str(tmp_path / "narrow"), "cpu")
    texts = ["sea land", "sun", "moon river hill"]
    encode.main(str(tmp_path / "narrow"), texts, precision="int8", out=str(tmp_path / "v.npy"))
    want = quantize_embeddings(narrow.encode(texts), "int8", ranges=ranges)
    assert (np.load(tmp_path / "v.npy") == want).all()
    assert f"ranges: {tmp_path}/narrow/int8_ranges.npy" in capsys.readouterr().err
    assert not (tmp_path / "v.npy.ranges.npy").exists()
    # A shorter vector has ranges of its own.
    options = {"dim": 4, "precision": "int8", "out": str(tmp_path / "short.npy")}
    encode.main(str(tmp_path / "narrow"), texts, **options)
    assert (tmp_path / "short.npy.ranges.npy").exists()
    # Neither another depth nor a run that was not scored as bytes has any.
    for name, exit, cells in (("shallow", 1, grid["cells"]), ("plain", 3, [])):
        export(encoder, tmp_path / name, 8, exit, source=Origin("run", grid={"cells": cells}))
        assert not (tmp_path / name / "int8_ranges.npy").exists()


@pytest.mark.parametrize("wrong", [[1], [2, 1], ["a", 1], [float("nan"), 1], {}, 3])
def test_wrong_range_of_a_report(wrong, encoder, tasks, tmp_path):
    scored = score_grid(encoder, tasks, [8], [3], [8], costs=False)
    scored.cells[0]["int8_range"] = wrong
    tables.write_report(tmp_path, scored, {})
    with pytest.raises(ValueError, match=r"cells\[0\]\.int8_range: expected a least and"):
        results.read_grid(tmp_path / "grid.json")
