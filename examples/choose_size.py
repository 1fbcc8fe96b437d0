"""List the sizes of a run that score within a tolerance of the best, smallest first.

python examples/choose_size.py [RUN] [POINTS]

RUN is a run of train.py, or a directory that `mlembed evaluate --out` wrote.
"""

import json
import sys
from pathlib import Path
from statistics import mean


def main(run: str = "runs/tiny", points: str = "1") -> None:
    directory = Path(run)
    path = next((p for p in directory.rglob("grid.json")), None)
    if path is None:
        sys.exit(f"{run}: expected a directory with grid.json, got none")
    sizes = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        scores = [task["score"] for task in cell["scores"].values()]
        if scores and None not in scores:
            sizes.append((100 * mean(scores), cell))
    if not sizes:
        sys.exit(f"{path}: expected scores, got none")

    best = max(score for score, _ in sizes)
    enough = [(score, cell) for score, cell in sizes if score >= best - float(points)]
    enough.sort(key=lambda size: (size[1]["parameters"], size[1]["dim"]))
    print("score  exit  rank  width  parameters")
    for score, cell in enough:
        rank = cell["rank"] or "-"
        print(
            f"{score:5.1f}  {cell['exit']:4}  {rank:>4}  {cell['dim']:5}  {cell['parameters']:10,}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
