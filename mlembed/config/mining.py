"""Options of mining hard negatives."""

from dataclasses import dataclass
from typing import Literal

from .strict import positive


@dataclass(frozen=True)
class Options:
    """Options of mining, in the order in which `inference/mining.py` applies them."""

    top: int = 100
    """Candidates of a query."""
    skip: int = 0
    """Drop this many of the nearest candidates."""
    relative_margin: float = 0.05
    """A negative scores below its positive by at least this share of the positive's score."""
    absolute_margin: float = 0.0
    """A negative scores below its positive by at least this much."""
    max_score: float = 1.0
    """Highest score of a negative."""
    negatives: int = 24
    """Negatives of a query."""
    short: Literal["keep", "discard"] = "keep"
    """Keep or discard queries that get fewer negatives."""
    pick: Literal["top", "random"] = "top"
    """Pick the nearest of the remaining candidates, or random ones."""
    dim: int | None = None
    """Width of the vectors that make the shortlist; full by default."""
    exit: int | None = None
    """Depth of the vectors that make the shortlist; full by default."""
    rank: int | None = None
    """Vocabulary rank of the vectors that make the shortlist; full by default."""
    rescore: bool = False
    """Score the shortlist again at full size."""
    seed: int = 0
    """Seed of random picks."""

    def check(self) -> None:
        """Raise ValueError for a value out of its range."""
        for name in ("top", "negatives"):
            positive(name, getattr(self, name))
        for name in ("skip", "relative_margin", "absolute_margin", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.skip + self.negatives > self.top:
            raise ValueError(
                f"top: expected at least skip + negatives, {self.skip + self.negatives}, "
                f"got {self.top}"
            )
        if not -1 <= self.max_score <= 1:
            raise ValueError(f"max_score: expected -1..1 (a cosine), got {self.max_score}")
