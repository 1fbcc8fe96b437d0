"""Figures: numbers where they belong, contrast, the same bytes each time."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from mlembed.evaluation import charts


def cell(exit=1, dim=8, rank=None, score=0.5):
    size = {"parameters": 10_000 * exit, "bytes_per_vector": 4 * dim}
    return {"exit": exit, "dim": dim, "rank": rank, **size, "scores": {"a": {"score": score}}}


def contrast(a, b):
    """Return WCAG 2's contrast of two colours, 1 to 21."""
    luminance = []
    for colour in (a, b):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminance.append(float(linear @ (0.2126, 0.7152, 0.0722)))
    return (max(luminance) + 0.05) / (min(luminance) + 0.05)


def apart(boxes):
    return all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """A glyph that the font lacks, a layout that fails, an axis without a range."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_colours_are_legible():
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=5e-3)
    for text in (charts.INK, charts.SOFT):
        assert contrast(text, charts.PAPER) >= 4.5
    series = {str(i): (np.arange(2.0), np.arange(2.0) + i) for i in range(13)}
    lines = charts.lines(series, "loss", "").axes[0].lines
    for mark in (charts.BLUE, *(line.get_color() for line in lines)):
        assert contrast(mark, charts.PAPER) >= 3


def test_page_colours_are_legible():
    style = (Path(charts.__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+):(#\w{6})", style))
    assert set(re.findall(r"var\(--(\w+)\)", style)) == set(colours)
    for name in ("paper", "ink", "soft"):
        assert colours[name] == getattr(charts, name.upper())
    for text in ("ink", "soft"):
        assert contrast(colours[text], colours["card"]) >= 4.5
    assert min(contrast(colours["bar"], colours[name]) for name in ("track", "paper")) >= 3


# ---- heat maps ----


def test_score_map_scores():
    exits, dims = (4, 1, 2), (8, 64, 16, 32)
    cells = [cell(e, d, 16, score=(10 * e + d) / 110) for e in exits for d in dims]
    axis = charts.score_map(cells, "").axes[0]
    assert axis.get_title() == "vocabulary rank 16: score (%)"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["8", "16", "32", "64"]
    assert [t.get_text() for t in axis.get_yticklabels()] == [f"{e}\n0.0{e} M" for e in (1, 2, 4)]
    (image,) = axis.images
    for text in axis.texts:
        column, row = text.get_position()
        wanted = (10 * (1, 2, 4)[row] + (8, 16, 32, 64)[column]) / 1.1
        assert text.get_text() == f"{wanted:.1f}"
        shade = image.cmap(image.norm(image.get_array()[row, column]))
        assert contrast(text.get_color(), shade) >= 4.5
    assert len(axis.texts) == 12 and image.get_clim() == charts.score_range(cells)


def test_score_map_missing_scores():
    cells = [cell(1, 8), cell(2, 16, score=None), cell(2, 8, score=float("nan"))]
    axis = charts.score_map(cells, "").axes[0]
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts == {(0, 0): "50.0", (1, 0): "–", (0, 1): "–", (1, 1): "–"}
    assert charts.score_range([cell(score=None)]) == (0, 100)


@pytest.mark.parametrize("count, text", [(8, "50.0"), (12, "50"), (40, "")])
def test_score_map_of_many_widths(count, text):
    figure = charts.score_map([cell(1, 128 * (i + 1)) for i in range(count)], "", (0, 100))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert {each.get_text() for each in axis.texts} == {text}
    for row in (axis.get_xticklabels(), axis.texts if text else []):
        assert apart([each.get_window_extent() for each in row])
    label = axis.yaxis.label.get_window_extent()
    assert label.y0 >= 0 and label.y1 <= figure.bbox.y1  # a map of one exit is low


def test_score_map_of_many_exits_fits_on_a_page():
    assert charts.score_map([cell(e) for e in range(1, 37)], "").get_figheight() < 9


def test_smallest_text_is_11_pixels_on_a_phone():
    shown = (360 - 24) / (96 * charts.WIDTH)  # of a page 360 wide with its padding
    assert charts.SIZE * 96 / 72 * shown >= 11
    for figure in (charts.score_map([cell()], "T"), charts.pareto([(1.0, 2.0)], "cost", "T")):
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        assert len(texts) >= 5 and {text.get_fontsize() for text in texts} == {charts.SIZE}


def test_heat_map_file(tmp_path):
    cells = [cell(1, d, rank) for rank in (2, 4, 8) for d in (8, 16)]
    for name in ("a.png", "b.png"):
        charts.heat_map(cells, tmp_path / name, "a task $x_$ and <y>")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 200 * charts.WIDTH < image.height


def test_mean_score():
    assert charts.mean_score({"scores": {"a": {"score": 0.25}, "b": {"score": 0.75}}}) == 50
    assert np.isnan(charts.mean_score({"scores": {"a": {"score": None}, "b": {"score": 0.75}}}))
    assert np.isnan(charts.mean_score({"scores": {}}))


# ---- quality against cost ----


@pytest.mark.parametrize("seed", range(5))
def test_front(seed):
    rng = np.random.default_rng(seed)
    points = [tuple(map(float, p)) for p in rng.integers(0, 6, size=(30, 2))]
    points += [(float("nan"), 9.0), (0.0, float("nan"))]
    finite = [p for p in points if np.isfinite(p).all()]

    def beaten(point):
        return any(o[0] <= point[0] and o[1] >= point[1] and o != point for o in finite)

    best = charts.front(points)
    assert [points[i] for i in best] == sorted({p for p in finite if not beaten(p)})
    assert all(points.index(points[i]) == i for i in best)  # the first of equal points
    assert charts.front([(1.0, float("nan"))]) == [] == charts.front([])


@pytest.mark.parametrize(
    "costs",
    [(0.5, 2.0), (5.0,), (1.07,), (1e-4,), (1.0, 1.01), (1e-3, 1e6), (48, 96, 768), (100, 150)],
)
def test_pareto_has_a_few_round_ticks(costs):
    points = [*((cost, 50.0 + i) for i, cost in enumerate(costs)), (max(costs), 40.0)]
    figure = charts.pareto([*points, (float("nan"), 90.0)], "cost", "Title")
    (axis,) = figure.axes
    assert axis.lines[0].get_xydata().tolist() == [list(point) for point in points[:-1]]
    assert axis.collections[0].get_offsets().tolist() == [list(point) for point in points]
    low, high = axis.get_xlim()
    assert low < min(costs) <= max(costs) < high
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert 1 <= len(ticks) <= 9 and len(set(ticks)) == len(ticks)
    figure.draw_without_rendering()
    labels = [t for t in axis.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert apart([label.get_window_extent() for label in labels])
    assert all(float(label.get_text().replace(",", "")) > 0 for label in labels)
    assert axis.get_xlabel() == "cost" and axis.get_ylabel() == "score (%)"


# ---- training ----


def test_lines_differ_without_colour():
    x = np.arange(3.0)
    series = {f"dim {2**i}": (x, 2.0 + i + x) for i in range(8)}
    figure = charts.lines(series, "loss", "Title", log=True, limits=(1, 20), steps=(0, 2))
    (axis,) = figure.axes
    dashes = [str(line._dash_pattern) for line in axis.lines]
    assert len(set(zip(dashes, (line.get_color() for line in axis.lines), strict=True))) == 8
    assert all(a != b for a, b in zip(dashes, dashes[1:], strict=False))
    assert axis.get_yscale() == "log" and axis.get_ylim() == (1, 20) and axis.get_xlim() == (0, 2)
    assert [text.get_text() for text in figure.legends[0].texts] == list(series)


def test_one_point_is_visible():
    figure = charts.lines({"": (np.array([7.0]), np.array([3.0]))}, "score (%)", "")
    (axis,) = figure.axes
    assert axis.lines[0].get_marker() == "o" and axis.get_xlim() == (6, 8)
    assert all(float(tick).is_integer() for tick in axis.get_xticks())
    charts.svg(figure)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stages_stack(count):
    steps = np.array([10.0, 20.0, 40.0, 45.0, 100.0])[:count]
    ms = {"forward": np.full(count, 3.0), "<loss>": np.full(count, 1.0)}
    figure = charts.stages(steps, ms, "")
    (axis,) = figure.axes
    first, second = axis.containers
    assert [bar.get_height() for bar in first] == [3.0] * count
    assert [(bar.get_y(), bar.get_height()) for bar in second] == [(3.0, 1.0)] * count
    assert first[0].get_hatch() != second[0].get_hatch()
    edges = [bar.get_x() for bar in first] + [first[-1].get_x() + first[-1].get_width()]
    assert (edges[0], edges[-1]) == axis.get_xlim()
    assert all(a < step < b for a, step, b in zip(edges, steps, edges[1:], strict=False))
    ends = [bar.get_x() + bar.get_width() for bar in first]
    assert ends == pytest.approx(edges[1:])
    assert [text.get_text() for text in figure.legends[0].texts] == list(ms)
    charts.svg(figure)


# ---- files ----


def test_svg_bytes_are_the_same_in_another_process():
    script = (
        "from mlembed.evaluation import charts; import sys; "
        "print(charts.svg(charts.pareto([(1.0, 2.0), (2.0, 3.0)], 'cost', 'A $ & <b> $')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    here = charts.svg(charts.pareto([(1.0, 2.0), (2.0, 3.0)], "cost", "A $ & <b> $"))
    assert done.stdout.strip() == here.strip(), done.stderr
    assert here.startswith("<svg") and "<dc:date>" not in here and "<b>" not in here
