"""Figures of a report: scores over exit and width, score against cost, curves, and step times.

Cells are those of grid.json: {"dim", "exit", "rank", "parameters", ..., "scores"}. Figures are as
wide as a phone. Numbers, markers, dashes and hatches show the differences that colours show. The
same figure gives the same bytes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, get_args

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..config.choices import Stored

WIDTH = 3.6  # Inches: 346 CSS pixels, so that text keeps its size on a phone.
SIZE = 8.6  # Points of the smallest text: 11 pixels on a phone that shows 336 of the 346.
PAPER, INK, SOFT, GRID, BLUE = "#ffffff", "#1f2328", "#57606a", "#d8dee4", "#0072b2"
OKABE_ITO = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#999999")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "|||")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # Weights of linear red, green, blue.
TALL = 12  # Exits up to which the labels of a heat map have two lines.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # It comes with matplotlib.
    "font.size": SIZE,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "text.parse_math": False,  # A name with two dollar signs is a name.
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "mlembed",  # Ids are the same in every process.
    "svg.fonttype": "path",
}
styled = rc_context(STYLE)  # Decorates each function that draws or saves a figure.


# ---- files ----


@styled
def svg(figure: Figure) -> str:
    """Return a figure as SVG, without prolog, metadata or background."""
    file = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    # Labels are comments, too, and XML does not allow control characters there.
    document = re.sub(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", file.getvalue().decode("utf-8")
    )
    return document[document.index("<svg") :]  # The prolog names a file on another machine.


@styled
def save_png(figure: Figure, path: Path) -> None:
    """Write a figure at 200 dots an inch."""
    figure.savefig(path, format="png", dpi=200, facecolor=PAPER)


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(fill(title, 52))
    return figure, figure.subplots()


# ---- the grid ----


def mean_score(cell: Mapping[str, Any], precision: str = "") -> float:
    """Return the mean over tasks, in percent; nan where a task has no score.

    precision: int8 or binary, for the score of codes instead of float32 vectors.
    """
    tasks = list(cell["scores"].values())
    if precision:
        tasks = [task.get(precision, {"score": None}) for task in tasks]
    scores = [task["score"] for task in tasks]
    scores = [float("nan") if score is None else score for score in scores]
    return 100 * float(np.mean(scores)) if scores else float("nan")


def precisions(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what else than float32 vectors of the cells are scored in: int8, binary."""
    tasks = [task for cell in cells for task in cell["scores"].values()]
    return [name for name in get_args(Stored) if any(name in task for task in tasks)]


def score_range(cells: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the lowest and highest score; (0, 100) without a score."""
    scores = [score for cell in cells if np.isfinite(score := mean_score(cell))]
    return (min(scores), max(scores)) if scores else (0.0, 100.0)


def rank_name(rank: int | None) -> str:
    """Return what a vocabulary is called."""
    return f"vocabulary rank {rank}" if rank else "plain vocabulary"


def millions(count: float) -> str:
    """Return a count of parameters, to three digits or more."""
    return f"{count / 1e6:,.{0 if count >= 1e8 else 2}f} M"


def heat_map(cells: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write `score_map` as a PNG."""
    save_png(score_map(cells, title), path)


@styled
def score_map(
    cells: Sequence[dict[str, Any]], title: str, limits: tuple[float, float] | None = None
) -> Figure:
    """Draw the mean score (%) over exit (down) and width (across), a heat map for each rank.

    Args:
        limits: scores at the ends of the colours; by default those of `cells`.
    """
    by_rank: dict[int | None, list[dict[str, Any]]] = {}
    for cell in cells:
        by_rank.setdefault(cell["rank"], []).append(cell)
    exits = [len({cell["exit"] for cell in some}) for some in by_rank.values()]
    heights = [0.85 + (0.36 * max(2, e) if e <= TALL else 0.2 * e) for e in exits]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
    axes = figure.subplots(len(by_rank), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (rank, some) in zip(axes[:, 0], by_rank.items(), strict=True):
        _heat(axis, some, limits or score_range(cells))
        axis.set_title(f"{rank_name(rank)}: score (%)")
    figure.suptitle(fill(title, 52))
    return figure


def _heat(axis: Axes, cells: Sequence[dict[str, Any]], limits: tuple[float, float]) -> None:
    exits, dims = (sorted({cell[key] for cell in cells}) for key in ("exit", "dim"))
    scores = np.full((len(exits), len(dims)), np.nan)
    for cell in cells:
        scores[exits.index(cell["exit"]), dims.index(cell["dim"])] = mean_score(cell)
    low, high = limits[0], max(limits[1], limits[0] + 1e-9)
    colours = colormaps["cividis"]
    axis.imshow(scores, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="none")
    # "48.8" is 2.2 em wide, "48" 1.3 em.
    cell_ems = 72 * 0.74 * WIDTH / len(dims) / SIZE
    form = "{:.1f}" if cell_ems > 2.3 else "{:.0f}" if cell_ems > 1.4 else ""
    for (row, column), value in np.ndenumerate(scores):
        text, ink = "–", INK
        if np.isfinite(value):
            luminance = np.power(colours((value - low) / (high - low))[:3], 2.2) @ LUMINANCE
            text, ink = form.format(value), "#fefefe" if luminance < 0.18 else "#010101"
        axis.text(column, row, text, ha="center", va="center", color=ink)
    every = max(1, int(np.ceil(1.2 / cell_ems)))
    upright = cell_ems < 0.7 * len(str(dims[-1])) + 0.2
    labels = [str(dim) for dim in dims[::every]]
    axis.set_xticks(range(0, len(dims), every), labels, rotation=90 if upright else 0)
    parameters = {cell["exit"]: millions(cell["parameters"]) for cell in cells}
    between = "\n" if len(exits) <= TALL else "  "
    labels = [f"{exit}{between}{parameters[exit]}" for exit in exits]
    axis.set_yticks(range(len(exits)), labels, linespacing=0.95)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("width")
    axis.set_ylabel("exit (layers),\nparameters" if len(exits) < 4 else "exit (layers), parameters")


# ---- quality against cost ----


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the Pareto front of (cost, quality): indices, cheapest first.

    Of equal points the first is on the front; points with NaN or infinity are not.
    """
    finite = [i for i, point in enumerate(points) if np.isfinite(point).all()]
    best: list[int] = []
    for i in sorted(finite, key=lambda i: (points[i][0], -points[i][1], i)):
        if not best or points[i][1] > points[best[-1]][1]:
            best.append(i)
    return best


@styled
def pareto(points: Sequence[tuple[float, float]], cost: str, title: str) -> Figure:
    """Draw score (%) over cost, and the Pareto front.

    Args:
        points: (cost, score), at least one of them finite and with a cost above 0.
        cost: label of the horizontal axis.
    """
    figure, axis = _figure(2.9, title)
    x, y = np.array([point for point in points if np.isfinite(point).all()]).T
    axis.scatter(x, y, s=14, facecolors="none", edgecolors=SOFT, linewidths=0.8, label="cell")
    best = np.array([points[i] for i in front(points)]).T
    axis.plot(*best, "-D", color=BLUE, markersize=4.5, linewidth=1.1, label="Pareto front")
    axis.set_xscale("log")
    axis.set_xlim(x.min() / 1.25, x.max() * 1.15)
    spread = max(y.max() - y.min(), 1.0)
    axis.set_ylim(y.min() - 0.08 * spread, y.max() + 0.08 * spread)
    _round_ticks(axis.xaxis)
    axis.grid(True)
    axis.set_xlabel(cost)
    axis.set_ylabel("score (%)")
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.5)
    return figure


def _round_ticks(axis: Axis) -> None:
    """Write out a few round numbers on a logarithmic axis, however short it is."""
    low, high = axis.get_view_interval()
    subs = (1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


# ---- training ----

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]  # name -> steps [n], values [n]


@styled
def lines(
    series: Series,
    value: str,
    title: str,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """Draw values over steps, a line for each series.

    Args:
        value: label of the vertical axis.
        log: make the vertical axis logarithmic, for values above 0.
        limits, steps: ends of the axes, the same in figures to be compared.
    """
    rows = -(-len(series) // 4) if len(series) > 1 else 0
    figure, axis = _figure(2.5 + 0.17 * rows, title)
    for i, (name, (x, y)) in enumerate(series.items()):
        shade = colormaps["cividis"](0.6 * i / max(1, len(series) - 1))
        look: dict[str, Any] = {"color": shade if len(series) > 1 else BLUE, "linewidth": 1.2}
        look |= {"linestyle": DASHES[i % len(DASHES)], "marker": "o" if len(x) == 1 else None}
        axis.plot(x, y, markersize=3, label=name, **look)
    if limits and limits[0] < limits[1]:
        axis.set_ylim(*limits)
    together = np.concatenate([x for x, _ in series.values()])
    first, last = steps or (together.min(), together.max())
    axis.set_xlim(*((first, last) if first < last else (first - 1, first + 1)))
    if log:
        axis.set_yscale("log")
        _round_ticks(axis.yaxis)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.grid(True)
    axis.set_xlabel("step")
    axis.set_ylabel(value)
    if rows:
        form = {"ncols": -(-len(series) // rows), "handlelength": 2.2, "columnspacing": 1.0}
        figure.legend(loc="outside lower center", **form)
    return figure


@styled
def stages(steps: np.ndarray, ms: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draw the milliseconds of a step by stage, stacked, over the run.

    Args:
        steps: [n], at least one, rising.
        ms: label of a stage -> [n], in the order in which they are stacked and listed.
    """
    figure, axis = _figure(2.5 + 0.19 * len(ms), title)
    half = np.diff(steps) / 2 if len(steps) > 1 else np.array([0.5])
    edges = np.concatenate([steps[:1] - half[:1], steps[:-1] + half[: len(steps) - 1]])
    widths = np.diff([*edges, steps[-1] + half[-1]])
    base = np.zeros(len(steps))
    for i, (label, values) in enumerate(ms.items()):
        look: dict[str, Any] = {"hatch": HATCHES[i % len(HATCHES)], "align": "edge", "label": label}
        look |= {"color": OKABE_ITO[i % len(OKABE_ITO)], "edgecolor": "#010101", "linewidth": 0.4}
        axis.bar(edges, values, widths, base, **look)
        base = base + values
    axis.set_xlabel("step")
    axis.set_ylabel("ms a step")
    axis.set_xlim(edges[0], edges[-1] + widths[-1])
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.legend(loc="outside lower center", handlelength=2.2)
    return figure
