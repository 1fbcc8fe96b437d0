"""Multilingual text embeddings that nest in width, depth and vocabulary rank.

`from mlembed import Encoder` loads a model and encodes texts.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.encoder import Encoder


def _version_in(folder: Path) -> str:
    """Return the version in a folder's _version.py, "" without that file. It is read as text, since
    importing mlembed_kernels imports torch, which takes seconds.
    """
    file = folder / "_version.py"
    return file.read_text().rpartition("= ")[2].strip().strip('"') if file.is_file() else ""


# A wheel has a copy of the file of kernels/, a checkout has the file itself.
_HERE = Path(__file__).parent
__version__ = _version_in(_HERE) or _version_in(_HERE.parent / "kernels")
__all__ = ["Encoder", "__version__"]

_SPEC = find_spec("mlembed_kernels")
_FOUND = _version_in(Path(_SPEC.origin).parent) if _SPEC and _SPEC.origin else ""
if __version__ != _FOUND:
    raise ImportError(
        f"mlembed_kernels: expected version {__version__}, got {_FOUND or 'none'}: mlembed "
        "contains its kernels; uninstall mlembed-kernels and reinstall mlembed"
    )


def __getattr__(name: str) -> Any:
    """Import `Encoder` when it is asked for: torch takes seconds, and commands need it late."""
    if name == "Encoder":
        from .inference.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
