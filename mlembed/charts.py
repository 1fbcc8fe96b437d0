"""What a grid of scores looks like: cells {"dim", "exit", "rank", "parameters", .., "scores"}."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def mean_score(cell: dict[str, Any]) -> float:
    """Mean over tasks, in percent."""
    return 100 * float(np.mean([task["score"] for task in cell["scores"].values()]))


def heat_map(cells: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A heat map for each rank: exits down, widths across, score in each cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = list(dict.fromkeys(cell["rank"] for cell in cells))
    exits, dims = (sorted({cell[key] for cell in cells}) for key in ("exit", "dim"))
    at = {(cell["rank"], cell["exit"], cell["dim"]): cell for cell in cells}
    top = max(mean_score(cell) for cell in cells)
    figure, axes = plt.subplots(
        1,
        len(ranks),
        figsize=(1.8 + len(ranks) * (1.0 + 0.6 * len(dims)), 1.9 + 0.75 * len(exits)),
        squeeze=False,
        layout="constrained",
    )
    for axis, rank in zip(axes[0], ranks, strict=True):
        scores = np.array([[mean_score(at[rank, e, d]) for d in dims] for e in exits])
        image = axis.imshow(scores, vmin=0, vmax=top, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(scores):
            shade = "white" if value < 0.6 * top else "black"
            axis.text(
                column, row, f"{value:.1f}", ha="center", va="center", color=shade, fontsize=9
            )
        sizes = [at[rank, e, dims[0]]["parameters"] / 1e6 for e in exits]
        axis.set_xticks(range(len(dims)), [f"{d}\n{4 * d} B" for d in dims])
        axis.set_yticks(
            range(len(exits)), [f"{e}\n{s:.2f} M" for e, s in zip(exits, sizes, strict=True)]
        )
        axis.set_title(f"vocabulary rank {rank}" if rank else "plain vocabulary")
        axis.set_xlabel("width, bytes a vector")
    axes[0][0].set_ylabel("exit (layers), parameters")
    figure.colorbar(image, ax=axes[0], label="score (%)")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
