"""Draw docs/nesting.svg from the table in docs/demo.md: score over width, depth and rank.

python docs/nesting.py [OUT.svg]
"""

import re
import sys
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROW = re.compile(r"^ *(\d+) +(\d+) +([\d.]+M)((?: +\d+\.\d)+)$", re.MULTILINE)
# Text stays text, and equal input gives an equal file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "mlembed", "font.family": "sans-serif"}


def read(page: str) -> tuple[list[int], dict[int, dict[int, tuple[str, list[float]]]]]:
    """Return the widths, and {rank: {exit: (parameters, score at each width)}}."""
    heading = re.search(r"^rank +exit +params +(.+)$", page, re.MULTILINE)
    if heading is None:
        raise ValueError("docs/demo.md: expected a table with columns rank, exit, params, got none")
    table: dict[int, dict[int, tuple[str, list[float]]]] = {}
    for rank, exit, parameters, scores in ROW.findall(page):
        by_exit = table.setdefault(int(rank), {})
        by_exit[int(exit)] = parameters, [float(score) for score in scores.split()]
    return [int(width) for width in heading[1].split()], table


def draw(widths: list[int], table: dict[int, dict[int, tuple[str, list[float]]]]) -> Figure:
    """Return one heat map for each rank, depths as rows and widths as columns."""
    numbers = np.array([[scores for _, scores in rows.values()] for rows in table.values()])
    figure = Figure(figsize=(9.2, 2.5), layout="constrained")
    figure.suptitle("score (%) of one trained model at 45 sizes", fontsize=11)
    for axes, (rank, rows) in zip(figure.subplots(1, len(table)), table.items(), strict=True):
        axes.imshow(
            [scores for _, scores in rows.values()],
            cmap="YlGnBu",
            vmin=numbers.min() - 1,
            vmax=numbers.max() + 5,
            aspect="auto",
        )
        for y, (_, scores) in enumerate(rows.values()):
            for x, score in enumerate(scores):
                axes.text(x, y, f"{score:.1f}", ha="center", va="center", fontsize=9)
        layers = [f"{exit} layer{'s' * (exit > 1)}\n{size}" for exit, (size, _) in rows.items()]
        axes.set_yticks(range(len(rows)), layers, fontsize=8)
        axes.set_xticks(range(len(widths)), [str(width) for width in widths], fontsize=9)
        axes.set_xlabel("width of the vector", fontsize=9)
        axes.set_title(f"vocabulary rank {rank}", fontsize=10)
        axes.tick_params(length=0)
    return figure


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "nesting.svg"
    with rc_context(STYLE):
        figure = draw(*read((HERE / "demo.md").read_text(encoding="utf-8")))
        figure.savefig(out, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
