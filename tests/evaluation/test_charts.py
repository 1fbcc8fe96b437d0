"""Figures that are read right: numbers where they belong, contrast, the same bytes each time."""

import re
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from mlembed.evaluation import charts


def cell(exit=1, dim=8, rank=None, score=0.5, **more):
    scores = {"a": {"score": score}}
    size = {"parameters": 10_000 * exit, "bytes_per_vector": 4 * dim}
    return {"exit": exit, "dim": dim, "rank": rank, **size, "scores": scores, **more}


@pytest.fixture(autouse=True)
def style():
    with charts.style(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks, a layout that fails
        yield


# ---- contrast ----


@pytest.mark.parametrize(
    "a, b, ratio",
    [("#000000", "#ffffff", 21.0), ("#ffffff", "#777777", 4.48), ("#ff0000", "#ffffff", 4.00)],
)
def test_contrast_is_wcags(a, b, ratio):
    assert charts.contrast(a, b) == pytest.approx(ratio, abs=5e-3)
    assert charts.contrast(b, a) == charts.contrast(a, b)


@pytest.mark.parametrize("side", [lambda colour: colour, charts.DARK.__getitem__])
def test_theme_is_legible(side):
    paper = side(charts.PAPER)
    for text in (charts.INK, charts.SOFT):
        assert charts.contrast(side(text), paper) >= 4.5
    for mark in (charts.BLUE, *charts.RAMP):
        assert charts.contrast(side(mark), paper) >= 3
    assert charts.contrast(side(charts.INK), side(charts.PALE)) >= 4.5  # strokes on bars


def test_dark_side_is_one_to_one():
    """No two colours become one; what is on a colour of its own keeps its own."""
    assert len(set(charts.DARK.values())) == len(charts.DARK) == 6 + charts.SHADES
    assert not {charts.ON_DARK, charts.ON_LIGHT, *charts.OKABE_ITO} & set(charts.DARK)


def test_dark_lines_are_each_a_lines_own():
    series = {str(i): (np.arange(2.0), np.arange(2.0) + i) for i in range(charts.SHADES)}
    light, dark = charts.svg(charts.lines(series, "loss"))
    assert all(shade in light for shade in charts.RAMP)
    found = re.findall("#[0-9a-f]{6}", light), re.findall("#[0-9a-f]{6}", dark)
    for a, b in zip(*found, strict=True):
        assert b == charts.DARK.get(a, a)


# ---- heat maps ----


def test_heat_map_says_each_score_where_it_belongs():
    exits, dims = (4, 1, 2), (8, 64, 16, 32)
    cells = [cell(e, d, 16, score=(10 * e + d) / 110) for e in exits for d in dims]
    axis = charts.heat(cells, charts.score_range(cells)).axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["8", "16", "32", "64"]
    assert [t.get_text() for t in axis.get_yticklabels()] == [f"{e}\n0.0{e} M" for e in (1, 2, 4)]
    (image,) = axis.images
    for text in axis.texts:
        column, row = text.get_position()
        wanted = (10 * (1, 2, 4)[row] + (8, 16, 32, 64)[column]) / 1.1
        assert text.get_text() == f"{wanted:.1f}"
        shade = to_hex(image.cmap(image.norm(image.get_array()[row, column])))
        assert charts.contrast(text.get_color(), shade) >= 4.5
    assert len(axis.texts) == 12 and image.get_clim() == charts.score_range(cells)


def test_heat_map_of_holes():
    """A cell that is not there, and one whose score is null or NaN."""
    cells = [cell(1, 8), cell(2, 16, score=None), cell(2, 8, score=float("nan"))]
    axis = charts.heat(cells, charts.score_range(cells)).axes[0]
    said = {text.get_position(): text.get_text() for text in axis.texts}
    assert said == {(0, 0): "50.0", (1, 0): "–", (0, 1): "–", (1, 1): "–"}
    assert charts.score_range([cell(score=None)]) == (0, 100)


@pytest.mark.parametrize("count, said", [(8, "50.0"), (12, "50"), (40, "")])
def test_numbers_and_widths_of_a_heat_map_do_not_meet(count, said):
    cells = [cell(1, 128 * (i + 1)) for i in range(count)]
    figure = charts.heat(cells, (0, 100))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert {text.get_text() for text in axis.texts} == {said}
    for row in (axis.get_xticklabels(), axis.texts if said else []):
        boxes = [text.get_window_extent() for text in row]
        assert all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    label = axis.yaxis.label.get_window_extent()
    assert label.y0 >= 0 and label.y1 <= figure.bbox.y1  # one exit is low


def test_many_exits_fit_on_a_page():
    assert charts.heat([cell(e) for e in range(1, 37)], (0, 100)).get_figheight() < 9


def test_smallest_text_is_11_pixels_on_a_phone():
    shown = (360 - 24) / (96 * charts.WIDTH)  # of a page 360 wide with its padding
    sizes = [size for name, size in charts.STYLE.items() if "size" in name]
    assert min(sizes) * 96 / 72 * shown >= 11
    figure = charts.pareto([(1.0, 2.0), (2.0, 3.0)], ["a", "b"], "cost", "{:.0f}")
    texts = [text for axis in figure.axes for text in axis.texts]
    assert texts and all(text.get_fontsize() >= charts.SIZE for text in texts)


def test_heat_map_file(tmp_path):
    cells = [cell(1, d, rank) for rank in (2, 4, 8) for d in (8, 16)]
    charts.heat_map(cells, tmp_path / "a.png", "a task $x_$ and <y>")
    charts.heat_map(cells, tmp_path / "b.png", "a task $x_$ and <y>")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 200 * charts.WIDTH < image.height
    charts.heat_map([cell()], tmp_path / "one.png", "")  # one cell, a plain table


# ---- quality against cost ----


@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_nothing_beats(seed):
    rng = np.random.default_rng(seed)
    points = [tuple(map(float, p)) for p in rng.integers(0, 6, size=(30, 2))]
    points += [(float("nan"), 9.0), (0.0, float("nan"))]
    finite = [p for p in points if np.isfinite(p).all()]

    def beaten(point):
        return any(o[0] <= point[0] and o[1] >= point[1] and o != point for o in finite)

    found = [points[i] for i in charts.front(points)]
    assert found == sorted({p for p in finite if not beaten(p)})
    assert charts.front([(1.0, float("nan"))]) == [] == charts.front([])


@pytest.mark.parametrize(
    "costs", [(0.5, 2.0), (5.0,), (1.07,), (1.0, 1.01), (1e-3, 1e6), (48, 96, 768)]
)
def test_pareto_has_a_few_round_ticks(costs):
    points = [(cost, 50 + i) for i, cost in enumerate(costs)]
    figure = charts.pareto(points, [f"cell {i}" for i in range(len(costs))], "cost", "{:.0f} B")
    axis, below = figure.axes
    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 8 and len(set(ticks)) == len(ticks)
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in axis.get_xticklabels() if low <= t._x <= high]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    assert axis.get_xlabel() == "cost" and axis.get_ylabel() == "score (%)"
    (key,) = below.texts
    head, *rows = key.get_text().splitlines()
    assert head.split() == ["cost", "score"] and {len(row) for row in rows} == {len(head)}
    assert [row.split()[:3] for row in rows] == [
        [str(i + 1), "cell", str(i)] for i in range(len(costs))
    ]


def test_a_long_front_is_listed_in_part():
    points = [(1.0 + i, 50 + i / 2) for i in range(40)]
    axis, below = charts.pareto(points, [f"{i:>2}" for i in range(40)], "cost", "{:.0f}").axes
    _, *rows = below.texts[0].get_text().splitlines()
    named = [int(row.split()[1]) for row in rows]
    assert len(named) == charts.LISTED and named == sorted(set(named))
    assert (named[0], named[-1]) == (0, 39)
    assert all(points[named[int(text.get_text()) - 1]] == text.xy for text in axis.texts)


def test_one_small_cost_is_inside_its_axis():
    """A single cost has a range around it; matplotlib would warn of an empty one."""
    axis, below = charts.pareto([(1e-4, 50.0)], ["cell"], "cost", "{:.4f}").axes
    low, high = axis.get_xlim()
    assert low < 1e-4 < high
    assert below.texts[0].get_text().splitlines()[1].split() == ["1", "cell", "0.0001", "50.0"]


def test_warnings_of_figures_are_errors():
    axis = charts.lines({"": (np.array([7.0]), np.array([3.0]))}, "score (%)").axes[0]
    with pytest.raises(UserWarning, match="identical low and high xlims"):
        axis.set_xlim(1, 1)


# ---- languages and training ----


def test_groups_are_named_counted_and_averaged():
    figure = charts.groups({"Latin": [40.0, 60.0, 80.0], "a script of a very long name": [10.0]})
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["Latin (3)", "a script of a very lo… (1)"]
    assert [bar.get_width() for bar in axis.patches] == [60.0, 10.0]
    assert [text.get_text() for text in axis.texts] == ["60.0", "10.0"]
    bottom, top = axis.get_ylim()
    assert bottom > top  # the first group is above
    assert axis.get_xlim()[0] == 0
    (axis,) = charts.groups({"Latin": [-20.0, 10.0]}).axes  # a correlation may be below 0
    assert axis.get_xlim()[0] < -20


def test_lines_differ_without_colour():
    x = np.arange(3.0)
    series = {f"dim {2**i}": (x, 2.0 + i + x) for i in range(8)}
    figure = charts.lines(series, "loss", log=True, limits=(1, 20), steps=(0, 2))
    (axis,) = figure.axes
    looks = {
        (
            line.get_linestyle(),
            line._dash_pattern[1] and tuple(line._dash_pattern[1]),
            line.get_color(),
        )
        for line in axis.lines
    }
    assert len(looks) == 8
    near = [line._dash_pattern for line in axis.lines]
    assert all(a != b for a, b in zip(near, near[1:], strict=False))
    assert axis.get_yscale() == "log" and axis.get_ylim() == (1, 20) and axis.get_xlim() == (0, 2)
    assert [text.get_text() for text in figure.legends[0].texts] == list(series)


def test_one_point_is_seen():
    figure = charts.lines({"": (np.array([7.0]), np.array([3.0]))}, "score (%)")
    (axis,) = figure.axes
    assert axis.lines[0].get_marker() == "o" and axis.get_xlim() == (6, 8)
    assert all(float(tick).is_integer() for tick in axis.get_xticks())
    charts.png(figure)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stages_stack_to_the_whole(count):
    steps = 10.0 * np.arange(1, count + 1)
    ms = {"forward": np.full(count, 3.0), "<loss>": np.full(count, 1.0)}
    means, said = {"forward": 3.0, "<loss>": 1.0}, {"forward": "3 ms", "<loss>": "1 ms"}
    figure = charts.stages(steps, ms, means, said)
    over, mean = figure.axes
    first, second = over.patches
    assert first.get_data().values.tolist() == [3.0] * count
    assert second.get_data().values.tolist() == [4.0] * count
    assert second.get_data().baseline.tolist() == [3.0] * count
    edges = first.get_data().edges
    assert len(edges) == count + 1 and (edges[:-1] < steps).all() and (steps < edges[1:]).all()
    assert first.get_hatch() != second.get_hatch()
    assert [bar.get_width() for bar in mean.patches] == [3.0, 1.0]
    assert [text.get_text() for text in mean.texts] == ["3 ms", "1 ms"]
    charts.svg(figure)


# ---- files ----


def test_two_sides_of_one_figure():
    cells = [cell(e, d, 4, score=e * d / 40) for e in (1, 2) for d in (8, 16)]

    def drawn():
        return charts.svg(charts.heat(cells, charts.score_range(cells)))

    light, dark = drawn()
    assert drawn() == (light, dark) and light.startswith("<svg")
    assert charts.INK in light and charts.DARK[charts.INK] in dark
    assert not [colour for colour in charts.DARK if colour in dark]
    for colour in (charts.ON_DARK, charts.ON_LIGHT):  # numbers on the map's own colours
        assert light.count(colour) == dark.count(colour) > 0
    blank = re.compile("#[0-9a-f]{6}")
    assert blank.sub("", light) == blank.sub("", dark)


def test_mean_score():
    assert charts.mean_score({"scores": {"a": {"score": 0.25}, "b": {"score": 0.75}}}) == 50
    assert np.isnan(charts.mean_score({"scores": {"a": {"score": None}, "b": {"score": 0.75}}}))
    assert np.isnan(charts.mean_score({"scores": {}}))
