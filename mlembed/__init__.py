"""Multilingual text embeddings that nest in width, depth and vocabulary rank.

`from mlembed import Encoder` loads a model and encodes texts.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.encoder import Encoder


def _version_in(folder: Path) -> str:
    """Return the version in a folder's _version.py, unless it has none: importing mlembed_kernels
    would import torch, which takes seconds.
    """
    file = folder / "_version.py"
    return file.read_text().rpartition("= ")[2].strip().strip('"') if file.is_file() else ""


def _kernels_version() -> str:
    """Return the version of the mlembed_kernels that an import finds, "none" without them."""
    spec = find_spec("mlembed_kernels")
    return (spec and spec.origin and _version_in(Path(spec.origin).parent)) or "none"


# A wheel has a copy of the file of kernels/, a checkout has the file itself.
_HERE = Path(__file__).parent
__version__ = _version_in(_HERE) or _version_in(_HERE.parent / "kernels")
__all__ = ["Encoder", "__version__"]

if (_found := _kernels_version()) != __version__:
    raise ImportError(
        f"mlembed_kernels: expected version {__version__}, got {_found}: mlembed contains its "
        "kernels; uninstall mlembed-kernels and reinstall mlembed"
    )


def __getattr__(name: str) -> Any:
    """Import `Encoder` when it is asked for: torch takes seconds, and commands need it late."""
    if name == "Encoder":
        from .inference.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
