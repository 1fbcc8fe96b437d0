"""Write a run's report: one HTML page that needs nothing else, and its figures as SVG.

mlembed report RUN [--out DIR]
"""

from pathlib import Path
from typing import Annotated

import tyro

from ..runtime.files import atomic_directory, atomic_files


def main(run: Annotated[Path, tyro.conf.Positional], /, out: str = "") -> None:
    """Write a run's report: one HTML page that needs nothing else, and its figures as SVG.

    Args:
        run: directory of train.py, or of evaluate's --out.
        out: new directory; by default report.html and report_*.svg are written next to grid.json,
            unless an earlier report is there.
    """
    from ..evaluation import report_page, results

    read = results.read(run)
    target = Path(out) if out else read.directory
    paths = [target / "report.html", *sorted(target.glob("report_*.svg"))]
    if earlier := [path for path in paths if path.exists() or path.is_symlink()]:
        more = f" and {len(earlier) - 1} more" if earlier[1:] else ""
        raise ValueError(
            f"out: expected a directory without a report, got {earlier[0]}{more}; remove that or "
            "use --out"
        )
    with atomic_directory(target) if out else atomic_files(paths[0]) as partial:
        figures = report_page.write(read, partial)
    print(f"{target / 'report.html'}, and {figures} figures as SVG next to it")
