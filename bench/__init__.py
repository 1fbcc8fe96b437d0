"""Benchmarks: `python -m bench NAME` measures this checkout, without an installation.

The folder `kernels/` next to this one is imported as mlembed_kernels, even where another copy is
installed. `python -m pytest -p bench` does the same for the kernels' tests.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


class _Beside:
    """Finds mlembed_kernels in the folder next to this one, when it is imported and not before.

    Its modules come from that folder alone: a finder of an installed copy would add files that the
    folder does not have.
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "mlembed_kernels":
            folder = ROOT / "kernels"
            return spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
        if not name.startswith("mlembed_kernels."):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


sys.meta_path.insert(0, _Beside)


def named(name: str) -> ModuleType:
    """Import the bench of this name: bench/NAME.py or bench/NAME/bench.py.

    A bench has CASES (harness.Case by name), BASELINES (speed-ups are printed against them), gate
    and targets; and either build and spot, with which worker.py times its providers, or rows, which
    takes the times itself. Optional: DEVICES, TESTS (patterns below tests/kernels/), OURS, REPEATS,
    BREAKDOWN, COLUMNS with cells, numbers, stages; SWEEP with SWEEP_CASE and CANDIDATES.
    """
    folder = (ROOT / "bench" / name).is_dir()
    return import_module(f"bench.{name}.bench" if folder else f"bench.{name}")
