"""Multilingual text embeddings that nest in width, depth and vocabulary rank."""

__version__ = "0.1.0"
