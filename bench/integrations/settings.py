"""Settings of `bench integrations`; the command line is parsed before torch is imported."""

from dataclasses import dataclass

LOSSES = "Matryoshka2dLoss", "Matryoshka3dLoss", "CachedMatryoshka3dLoss"


@dataclass(frozen=True)
class Settings:
    """The training that all losses share."""

    model: str
    """Directory of a sentence-transformers model."""
    data: str
    """Pairs, .jsonl or .parquet with columns query and positive."""
    steps: int = 100
    batch_size: int = 32
    max_length: int = 32
    """Tokens of a text; longer texts are cut."""
    lr: float = 2e-5
    held_out: int = 256
    """Rows that no loss trains on."""
    every: int = 25
    """Steps between two held-out losses."""
    seed: int = 0
