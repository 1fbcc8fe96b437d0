"""Make one self-contained HTML page of a run's results, and its figures as PNG.

python -m mlembed report RUN [--out DIR]
"""

from pathlib import Path
from typing import Annotated

import tyro

from ..runtime.files import atomic_directory


def main(run: Annotated[Path, tyro.conf.Positional], /, out: str = "") -> None:
    """Make one self-contained HTML page of a run's results, and its figures as PNG.

    Args:
        run: directory of train.py, or of evaluate's --out.
        out: new directory; by default report.html and report_*.png are written next to grid.json,
            which must not have any yet.
    """
    from ..evaluation.report_page import write
    from ..evaluation.results import read

    results = read(run)
    target = Path(out) if out else results.directory
    paths = [target / "report.html", *sorted(target.glob("report_*.png"))]
    if existing := [path for path in paths if path.exists() or path.is_symlink()]:
        more = f" and {len(existing) - 1} more" if existing[1:] else ""
        raise ValueError(
            f"out: expected no report there yet, got {existing[0]}{more}; remove it or use --out"
        )
    if out:
        with atomic_directory(target) as partial:
            summary = write(results, partial)
    else:
        target.mkdir(parents=True, exist_ok=True)
        summary = write(results, target)
    print(f"{target / 'report.html'}: {summary}")
