"""What a report looks like: figures of cells {"dim", "exit", "rank", "parameters", .., "scores"}
and of what a run logged.

Figures are as wide as a phone and tall, of one font that matplotlib brings along, and told apart
without colour: by printed numbers, markers, dashes and hatches. `png` is for paper; `svg` has two
sides, for light and for dark pages. The same figure gives the same bytes.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

WIDTH = 3.6  # inches: 346 CSS pixels, so that text keeps its size on a phone
SIZE = 8.6  # points, of the smallest text: 11 pixels on a phone 360 wide, which shows 336 of 346
PAPER, INK, SOFT, GRID, BLUE, PALE = (
    "#ffffff",
    "#1f2328",
    "#57606a",
    "#d8dee4",
    "#0072b2",
    "#9fc7e2",
)
SHADES = 13  # of cividis; neither end that paper swallows
RAMP = [to_hex(colormaps["cividis"](0.6 * i / (SHADES - 1))) for i in range(SHADES)]
DARK = {  # colours of the dark side
    PAPER: "#15181d",
    INK: "#e6e9ed",
    SOFT: "#a8b1bb",
    GRID: "#363d47",
    BLUE: "#56b4e9",
    PALE: "#2c5878",
    **{RAMP[i]: to_hex(colormaps["cividis"](1 - 0.6 * i / (SHADES - 1))) for i in range(SHADES)},
}
TALL = 12  # exits of a heat map whose labels have two lines
ON_DARK, ON_LIGHT = "#fefefe", "#010101"  # numbers on a heat map: the same on both sides
OKABE_ITO = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#999999")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "|||")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "axes.titlesize": 9,
    "axes.labelsize": SIZE,
    "xtick.labelsize": SIZE,
    "ytick.labelsize": SIZE,
    "legend.fontsize": SIZE,
    "text.parse_math": False,  # a name with two dollars is a name
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "mlembed",  # names inside are then the same each time
    "svg.fonttype": "path",
}


# ---- files ----


@contextmanager
def style() -> Iterator[None]:
    """Figures are drawn and saved inside this."""
    with rc_context(STYLE):
        yield


def png(figure: Figure) -> bytes:
    """For paper: light, 200 dots an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, facecolor=PAPER)
    return file.getvalue()


def svg(figure: Figure) -> tuple[str, str]:
    """(light, dark), both without a background."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    light = file.getvalue().decode("utf-8")
    light = light[light.index("<svg") :]  # the prolog names a file on another machine
    # In one pass: what one colour becomes may be another of the light side.
    return light, re.sub("#[0-9a-f]{6}", lambda found: DARK.get(found[0], found[0]), light)


def contrast(a: str, b: str) -> float:
    """1..21, of two colours, as WCAG 2 has it."""

    def luminance(colour: str) -> float:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# ---- the grid ----


def mean_score(cell: dict[str, Any]) -> float:
    """Mean over tasks, in percent; nan where one has no score."""
    scores = [task["score"] for task in cell["scores"].values()]
    scores = [float("nan") if score is None else score for score in scores]
    return 100 * float(np.mean(scores)) if scores else float("nan")


def heat_map(cells: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write `score_map` as a PNG."""
    with style():
        path.write_bytes(png(score_map(cells, title)))


def score_map(cells: Sequence[dict[str, Any]], title: str) -> Figure:
    """A heat map for each rank, one below the other: exits down, widths across, scores inside."""
    ranks = list(dict.fromkeys(cell["rank"] for cell in cells))
    with style():
        heights = [_heat_height([c for c in cells if c["rank"] == rank]) for rank in ranks]
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
        axes = figure.subplots(len(ranks), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axis, rank in zip(axes[:, 0], ranks, strict=True):
            _heat(axis, [c for c in cells if c["rank"] == rank], score_range(cells))
            axis.set_title(f"{rank_name(rank)}: score (%)")
        figure.suptitle(fill(title, 52), fontsize=9)
        return figure


def heat(cells: Sequence[dict[str, Any]], limits: tuple[float, float]) -> Figure:
    """The heat map of one rank's cells; colours span the scores `limits`."""
    figure = Figure(figsize=(WIDTH, _heat_height(cells)), layout="constrained")
    _heat(figure.subplots(), cells, limits)
    return figure


def score_range(cells: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Lowest and highest score; 0, 100 where there is none."""
    scores = [score for cell in cells if np.isfinite(score := mean_score(cell))]
    return (min(scores), max(scores)) if scores else (0.0, 100.0)


def rank_name(rank: int | None) -> str:
    """What a vocabulary is called."""
    return f"vocabulary rank {rank}" if rank else "plain vocabulary"


def millions(count: float) -> str:
    """Parameters, to three figures or more."""
    return f"{count / 1e6:,.{0 if count >= 1e8 else 2}f} M"


def _heat_height(cells: Sequence[dict[str, Any]]) -> float:
    exits = len({cell["exit"] for cell in cells})
    return 0.85 + (0.36 * max(2, exits) if exits <= TALL else 0.2 * exits)


def _heat(axis: Axes, cells: Sequence[dict[str, Any]], limits: tuple[float, float]) -> None:
    exits, dims = (sorted({cell[key] for cell in cells}) for key in ("exit", "dim"))
    scores = np.full((len(exits), len(dims)), np.nan)
    sizes = {cell["exit"]: cell["parameters"] for cell in cells}
    for cell in cells:
        scores[exits.index(cell["exit"]), dims.index(cell["dim"])] = mean_score(cell)
    low, high = limits
    high = max(high, low + 1e-9)
    colours = colormaps["cividis"]
    axis.imshow(scores, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="none")
    wide = 72 * 0.74 * WIDTH / len(dims) / SIZE  # ems, of a cell; "48.8" is 2.2 of them, "48" 1.3
    form = "{:.1f}" if wide > 2.3 else "{:.0f}" if wide > 1.4 else ""
    for (row, column), value in np.ndenumerate(scores):
        there = np.isfinite(value)
        shade = to_hex(colours((value - low) / (high - low))) if there else PAPER
        ink = max((ON_DARK, ON_LIGHT), key=lambda colour: contrast(colour, shade))
        axis.text(
            column,
            row,
            "–" if not there else form.format(value),
            ha="center",
            va="center",
            color=ink if there else INK,
        )
    upright = wide < 0.7 * len(str(dims[-1])) + 0.2
    every = max(1, int(np.ceil(1.2 / wide)))  # where there are too many, some are named
    axis.set_xticks(
        range(0, len(dims), every),
        [str(dim) for dim in dims[::every]],
        rotation=90 if upright else 0,
    )
    between = "\n" if len(exits) <= TALL else "  "
    axis.set_yticks(
        range(len(exits)), [f"{e}{between}{millions(sizes[e])}" for e in exits], linespacing=0.95
    )
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("width")
    axis.set_ylabel("exit (layers),\nparameters" if len(exits) < 4 else "exit (layers), parameters")


# ---- quality against cost ----


LISTED = 12  # of a Pareto front: a list that is taller than its figure is not read


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Pareto front of (cost, quality): indices, cheapest first, of points that no other beats in
    one and equals in the other. Of equal ones the first; points that are not finite are not on
    it."""
    finite = [i for i, point in enumerate(points) if np.isfinite(point).all()]
    found: list[int] = []
    for i in sorted(finite, key=lambda i: (points[i][0], -points[i][1], i)):
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def pareto(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    cost: str,
    shown: str,
    head: str = "",
) -> Figure:
    """Score (%) over cost, both axes named; the front is numbered, and listed below by names, at
    most LISTED of it.

    Args:
        points: (cost, score), at least one of them finite and of a cost above 0.
        names: of points, as long as `head`, which is what stands above them in the list.
        cost: name of the horizontal axis.
        shown: how a cost is printed, such as "{:.0f} ms".
    """
    best = front(points)
    at = np.unique(np.linspace(0, len(best) - 1, min(LISTED, len(best))).round().astype(int))
    listed = [best[i] for i in at]
    x, y = np.array([p for p in points if np.isfinite(p).all()]).T
    key = 0.27 + 0.17 * len(listed)
    figure = Figure(figsize=(WIDTH, 2.6 + key), layout="constrained")
    axis, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": [2.6, key]})
    axis.set_xscale("log")
    axis.scatter(x, y, s=14, facecolors="none", edgecolors=SOFT, linewidths=0.8, label="cell")
    line = np.array([points[i] for i in best]).T
    axis.plot(*line, "-D", color=BLUE, markersize=4.5, linewidth=1.1, label="Pareto front")
    axis.set_xlim(x.min() / 1.25, x.max() * 1.15)
    spread = max(y.max() - y.min(), 1.0)
    axis.set_ylim(y.min() - 0.08 * spread, y.max() + 0.12 * spread)
    _round_ticks(axis.xaxis, *axis.get_xlim())
    axis.grid(True)
    axis.set_xlabel(cost)
    axis.set_ylabel("score (%)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, handlelength=1.5)
    figure.draw_without_rendering()  # now places on the page are known
    last = np.full(2, -np.inf)
    halo = [withStroke(linewidth=2, foreground=PAPER)]  # over lines and circles
    for number, i in enumerate(listed, 1):
        place = axis.transData.transform(points[i]) * 72 / figure.dpi
        if np.abs(place - last).max() >= 10:  # points; where numbers would meet, one is enough
            axis.annotate(
                str(number),
                points[i],
                (-3, 3),
                textcoords="offset points",
                ha="right",
                va="bottom",
                path_effects=halo,
            )
            last = place
    rows = [
        f"{n:>2} {names[i]} {shown.format(points[i][0]):>10} {points[i][1]:>6.1f}"
        for n, i in enumerate(listed, 1)
    ]
    rows.insert(0, f"   {head:<{len(names[best[0]])}} {'cost':>10} {'score':>6}")
    below.axis("off")
    below.text(
        0.5,
        1,
        "\n".join(rows),
        va="top",
        ha="center",
        family="DejaVu Sans Mono",
        transform=below.transAxes,
        linespacing=1.35,
    )
    return figure


def _round_ticks(axis: Axis, low: float, high: float) -> None:
    """A few round numbers on a logarithmic axis from low to high, written out."""
    tens = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [m * 10.0**ten for ten in tens for m in steps if low <= m * 10.0**ten <= high]
        if len(ticks) >= 3:  # the coarsest that gives enough
            break
    else:  # so near that the axis is almost linear
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 7)] if ticks else [low]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


# ---- languages ----


def groups(scores: Mapping[str, Sequence[float]]) -> Figure:
    """Mean score (%) of each group of languages as a bar, in the order given, each of them as a
    stroke; no group is empty."""
    names = list(scores)
    means = [float(np.mean(scores[name])) for name in names]
    figure = Figure(figsize=(WIDTH, 0.75 + 0.21 * len(names)), layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(names))
    axis.barh(rows, means, color=PALE, height=0.72)
    for row, name in enumerate(names):
        values = scores[name]
        axis.scatter(
            values,
            np.full(len(values), row),
            marker="|",
            s=45,
            color=INK,
            linewidths=0.7,
        )
    for row, mean in enumerate(means):
        axis.annotate(
            f"{mean:.1f}",
            (1, row),
            (3, 0),
            xycoords=axis.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
        )
    short = [name if len(name) < 23 else f"{name[:21]}…" for name in names]
    counts = [len(scores[name]) for name in names]
    axis.set_yticks(rows, [f"{name} ({n})" for name, n in zip(short, counts, strict=True)])
    axis.set_ylim(len(names) - 0.4, -0.6)
    top = max([max(values) for values in scores.values()] + [1.0])
    axis.set_xlim(1.03 * min(0.0, *(min(values) for values in scores.values())), 1.03 * top)
    axis.tick_params(axis="y", length=0)
    axis.grid(True, axis="x")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("score (%); | a language")
    return figure


# ---- training ----

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]  # name -> steps [n], values [n]


def lines(
    series: Series,
    value: str,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """Values over steps, a line each; `value` names the vertical axis.

    Args:
        log: a logarithmic vertical axis, for values above 0.
        limits, steps: the ends of the axes, where several figures are to be compared.
    """
    rows = -(-len(series) // 4) if len(series) > 1 else 0
    figure = Figure(figsize=(WIDTH, 2.3 + 0.17 * rows), layout="constrained")
    axis = figure.subplots()
    for i, (name, (x, y)) in enumerate(series.items()):
        shade = RAMP[round((SHADES - 1) * i / max(1, len(series) - 1))]
        axis.plot(
            x,
            y,
            color=shade if len(series) > 1 else BLUE,
            linestyle=DASHES[i % len(DASHES)],
            linewidth=1.2,
            marker="o" if len(x) == 1 else None,
            markersize=3,
            label=name,
        )
    if limits and limits[0] < limits[1]:
        axis.set_ylim(*limits)
    ends = steps or _ends([x for x, _ in series.values()])
    axis.set_xlim(*(ends if ends[0] < ends[1] else (ends[0] - 1, ends[0] + 1)))
    if log:
        axis.set_yscale("log")
        _round_ticks(axis.yaxis, *axis.get_ylim())
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.grid(True)
    axis.set_xlabel("step")
    axis.set_ylabel(value)
    if rows:
        figure.legend(
            loc="outside lower center",
            ncols=-(-len(series) // rows),
            handlelength=2.2,
            columnspacing=1.0,
        )
    return figure


def _ends(values: Sequence[np.ndarray]) -> tuple[float, float]:
    together = np.concatenate(list(values))
    return float(together.min()), float(together.max())


def stages(
    steps: np.ndarray,
    ms: Mapping[str, np.ndarray],
    means: Mapping[str, float],
    said: Mapping[str, str],
) -> Figure:
    """Milliseconds of a step by stage: stacked over steps, and below it the means.

    Args:
        steps: [n], at least one.
        ms: stage -> [n], in the order in which they are stacked and listed.
        means, said: of each stage, and what is printed beside it.
    """
    listed = 0.45 + 0.22 * len(ms)
    figure = Figure(figsize=(WIDTH, 2.4 + listed), layout="constrained")
    over, mean = figure.subplots(2, 1, gridspec_kw={"height_ratios": [2.0, listed]})
    base = np.zeros(len(steps))
    half = np.diff(steps) / 2 if len(steps) > 1 else np.array([0.5])
    edges = np.concatenate([steps[:1] - half[:1], steps[:-1] + half[: len(steps) - 1]])
    edges = np.concatenate([edges, steps[-1:] + half[-1:]])
    for i, name in enumerate(ms):
        look: dict[str, Any] = {
            "facecolor": OKABE_ITO[i % len(OKABE_ITO)],
            "hatch": HATCHES[i % len(HATCHES)],
            "edgecolor": ON_LIGHT,
            "linewidth": 0.4,
        }
        over.stairs(base + ms[name], edges, baseline=base, fill=True, **look)
        base = base + ms[name]
        mean.barh(i, means[name], height=0.72, **look)
        mean.annotate(
            said[name],
            (means[name], i),
            (3, 0),
            textcoords="offset points",
            va="center",
        )
    over.set_xlabel("step")
    over.set_ylabel("ms a step")
    over.set_xlim(edges[0], edges[-1])
    over.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    mean.set_yticks(range(len(ms)), list(ms))
    mean.set_ylim(len(ms) - 0.4, -0.6)
    mean.set_xlim(0, 1.6 * max(means.values()) or 1.0)
    mean.xaxis.set_major_locator(MaxNLocator(4))
    mean.tick_params(axis="y", length=0)
    mean.set_xlabel("mean, ms a step")
    return figure
