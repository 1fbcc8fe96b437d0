"""Print the oldest versions that pyproject.toml admits, as constraints for pip.

python floors.py > floors.txt

torch and triton are left out. A second torch costs three gigabytes of CUDA libraries from PyPI, so
constraints.txt pins both; the oldest triton compiles the kernels in `make test-toolchains`.
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
PINNED = ("torch", "triton")
EXTRAS = ("lora", "mteb", "onnx")


def floors() -> dict[str, str]:
    """Return the lowest version of each dependency and of each library of EXTRAS, by name."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    named = project["dependencies"] + [
        line for extra in EXTRAS for line in project["optional-dependencies"][extra]
    ]
    pairs = [re.split(">=|;", line)[:2] for line in named]
    return {name: version for name, version in pairs if name not in PINNED}


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in floors().items()))
