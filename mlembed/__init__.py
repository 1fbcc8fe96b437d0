"""Multilingual text embeddings that nest in width, depth and vocabulary rank.

`from mlembed import Encoder` loads a model and encodes texts.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.encoder import Encoder

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Encoder` when it is asked for: torch takes seconds, and commands need it late."""
    if name == "Encoder":
        from .inference.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
