"""The proof's picture: score against parameters, and against bytes of a vector."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import COMPETITORS

# Text stays text, and equal input gives an equal file.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "mlembed", "font.family": "sans-serif"}
COLOURS = {
    "ours": "#1d6fb8",
    "cut": "#8a8a8a",
    "start": "#9bc3e6",
    "peer": "#c8642b",
    "corner": "#3b8f4a",
}


def save(proof: dict[str, Any], path: Path) -> None:
    """Write the picture of a proof's JSON object as SVG."""
    with rc_context(STYLE):
        draw(proof).savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def draw(proof: dict[str, Any]) -> Figure:
    """Return two charts: depths and ranks at full width, and widths at full depth and rank."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for who in (name for name in COMPETITORS if name in proof["cells"]):
        cells = proof["cells"][who]
        widest = max(cell["dim"] for cell in cells)
        deepest = max(cell["exit"] for cell in cells)
        name = COMPETITORS[who]
        for small in (False, True):
            line = [c for c in cells if c["dim"] == widest and c["small"] == small]
            mark(left, line, who, "" if small and who != "corner" else name)
        whole = [c for c in cells if c["exit"] == deepest and not c["small"]]
        mark(right, whole, who, "", "bytes_per_vector")
    corners(left, proof)
    left.set_xlabel("parameters (millions)", fontsize=9)
    left.set_ylabel("percent of the source's score", fontsize=9)
    right.set_xlabel("bytes a vector, all layers", fontsize=9)
    right.set_xscale("log", base=2)
    ticks = sorted({c["bytes_per_vector"] for some in proof["cells"].values() for c in some})
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    left.legend(fontsize=8, frameon=False, loc="center")
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.margins(y=0.1)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def mark(
    axes: Axes, cells: list[dict[str, Any]], who: str, label: str, x: str = "parameters"
) -> None:
    """Draw a competitor's cells as one line of points."""
    if cells:
        scale = 1e6 if x == "parameters" else 1
        points = sorted((cell[x] / scale, cell["percent"]) for cell in cells)
        xs, ys = zip(*points, strict=True)
        # matplotlib leaves labels with an underscore out of the legend.
        axes.plot(xs, ys, "o-", color=COLOURS[who], markersize=4, label=label or "_")


def corners(axes: Axes, proof: dict[str, Any]) -> None:
    """Name the sizes of full width at the points of ours, or else of the source."""
    for size, of in proof["sizes"].items():
        cell = of.get("ours") or of["cut"]
        if size != "half the width":
            at = cell["parameters"] / 1e6, cell["percent"]
            axes.annotate(
                size, at, xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center"
            )
