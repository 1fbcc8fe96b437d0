"""Choose the trunk of a shape."""

from ... import config
from ..transformer import Transformer
from .trunk import AutoTransformer


def trunk_of(cfg: config.Model) -> Transformer:
    """Return a trunk with random weights, on the default device.

    Raises:
        ValueError: an architecture of transformers that style transformers does not support.
    """
    return AutoTransformer(cfg) if cfg.style == "transformers" else Transformer(cfg)
