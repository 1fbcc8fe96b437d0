"""Options of mining hard negatives."""

from dataclasses import dataclass
from typing import Literal

from .model import DEEPEST, WIDEST
from .strict import SEED, check_numbers, number


@dataclass(frozen=True)
class Options:
    """Options of mining, in the order in which `inference/mining.py` applies them."""

    top: int = number(100, above=0, most=2**31)
    """Candidates of a query."""
    skip: int = number(0, least=0, most=2**31)
    """Drop this many of the nearest candidates."""
    relative_margin: float = number(0.05, least=0, most=10)
    """A negative scores below its positive by at least this share of the positive's score."""
    absolute_margin: float = number(0.0, least=0, most=2)
    """A negative scores below its positive by at least this much."""
    max_score: float = number(1.0, least=-1, most=1)
    """Highest score of a negative."""
    negatives: int = number(24, above=0, most=2**31)
    """Negatives of a query."""
    short: Literal["keep", "discard"] = "keep"
    """Keep or discard queries that get fewer negatives."""
    pick: Literal["top", "random"] = "top"
    """Pick the nearest of the remaining candidates, or random ones."""
    dim: int | None = number(None, above=0, most=WIDEST)
    """Width of the vectors that make the shortlist; full by default."""
    exit: int | None = number(None, above=0, most=DEEPEST)
    """Depth of the vectors that make the shortlist; full by default."""
    rank: int | None = number(None, above=0, most=WIDEST)
    """Vocabulary rank of the vectors that make the shortlist; full by default."""
    rescore: bool = False
    """Score the shortlist again at full size."""
    seed: int = number(0, **SEED)
    """Seed of random picks."""

    def check(self) -> None:
        """Raise ValueError for a value out of its range."""
        check_numbers(self)
        if self.skip + self.negatives > self.top:
            raise ValueError(
                f"top: expected at least skip + negatives, {self.skip + self.negatives}, "
                f"got {self.top}"
            )
