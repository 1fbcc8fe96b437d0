"""What a run gave, as one HTML page that needs nothing else, and its figures as PNG.

python -m mlembed report RUN [--out DIR]
"""

from pathlib import Path
from typing import Annotated

import tyro

from ..evaluation.report_page import write
from ..evaluation.results import read
from ..runtime import files


def main(run: Annotated[Path, tyro.conf.Positional], /, out: str = "") -> None:
    """A run's report: one HTML page that needs nothing else, and its figures as PNG.

    Args:
        run: directory that train.py wrote, or that evaluate did with --out.
        out: new directory; by default report.html and report_*.png go beside grid.json, unless
            some are there.
    """
    found = read(run)
    target = Path(out) if out else found.directory
    there = [target / "report.html", *sorted(target.glob("report_*.png"))]
    if taken := [path for path in there if path.exists() or path.is_symlink()]:
        more = f" and {len(taken) - 1} more" if taken[1:] else ""
        raise ValueError(
            f"out: expected no report there yet, got {taken[0]}{more}; remove that or use --out"
        )
    if out:
        with files.atomic_directory(target) as partial:
            said = write(found, partial)
    else:
        target.mkdir(parents=True, exist_ok=True)
        said = write(found, target)
    print(f"{target / 'report.html'}: {said}")
