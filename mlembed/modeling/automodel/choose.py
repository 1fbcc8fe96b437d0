"""Choose the trunk of a shape."""

from ... import config
from ..transformer import Transformer


def trunk_of(cfg: config.Model) -> Transformer:
    """Return a trunk with random weights, on the default device.

    Raises:
        ValueError: an architecture of transformers that style transformers does not support.
    """
    if cfg.style != "transformers":
        return Transformer(cfg)
    # The import of transformers takes seconds.
    from .trunk import AutoTransformer

    return AutoTransformer(cfg)
