"""Tasks of evaluation: texts and what is known of them, without how they are read or scored.

Every task has a name and `texts`, all text in it, on which nothing may be trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .formats import beir, readers


class Reread:
    """Texts that are read from disk each time they are iterated."""

    def __init__(self, read: Callable[[], Iterator[str]]) -> None:
        self._read, self._count = read, sum(1 for _ in read())

    def __iter__(self) -> Iterator[str]:
        return self._read()

    def __len__(self) -> int:
        return self._count


@dataclass
class Bitext:
    """Groups of aligned texts: (language, kind) -> int64 rows of `texts` on either side.

    tatoeba: whether the languages are those of LASER's files, for which means over sets of
    languages are published.
    """

    name: str
    texts: list[str] = field(default_factory=list)
    groups: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    tatoeba: bool = False


@dataclass
class STS:
    """Scored pairs: pair i is texts[2 i], texts[2 i + 1], its score scores[i] (fp64)."""

    name: str
    texts: list[str]
    scores: np.ndarray


@dataclass(frozen=True)
class Part:
    """One split of one language: rows of `texts` on either side, and gold, int64 [pairs, 2], which
    lists the pairs of rows within source and target that are translations.
    """

    source: slice
    target: slice
    gold: np.ndarray


@dataclass
class Mining:
    """For each language the part that tunes a threshold and the part that is reported, which are
    the same if only one has gold. splits: the names of both.
    """

    name: str
    texts: list[str] = field(default_factory=list)
    parts: dict[str, tuple[Part, Part]] = field(default_factory=dict)
    splits: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """Texts of one language and their translations, to be found among all of these and the lines of
    a pool.
    """

    queries: list[str]
    answers: list[str]
    pool: Path | None

    def others(self) -> Iterator[str]:
        """Yield the lines of the pool, without lines that equal an answer."""
        known = set(self.answers)
        lines = readers.plain_lines(self.pool) if self.pool else iter(())
        return (line for line in lines if line not in known)


@dataclass
class Pool:
    """Texts by target language whose translations are to be found in a pool."""

    name: str
    sides: dict[str, Side]
    texts: Reread = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Reread(self._texts)

    def _texts(self) -> Iterator[str]:
        for side in self.sides.values():
            yield from side.queries
            yield from side.answers
            yield from side.others()


@dataclass
class Retrieval:
    """Queries, documents on disk, and judgements of pairs of them.

    queries: those that have judgements. order_N: int64, each document's position when all are
    sorted by id, which breaks ties. judged: int64 [judgements, 3] of query, document, relevance, by
    rising query and document; judged documents that the corpus lacks are N, N + 1, ..
    own_Q: int64, the document of a query's own id, or -1. It is not an answer (ArguAna's queries
    are in its corpus). left_out: numbers of the corpus's rows that are no documents, from 0.
    """

    name: str
    queries: list[str]
    corpus: Path
    order_N: np.ndarray
    judged: np.ndarray
    own_Q: np.ndarray
    left_out: frozenset[int] = frozenset()
    texts: Reread = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Reread(self._texts)

    def documents(self) -> Iterator[str]:
        """Yield the documents as they are encoded: title and text."""
        return (beir.titled(title, text) for _, title, text in self._documents())

    def _documents(self) -> Iterator[tuple[str, str, str]]:
        return beir.documents(self.corpus, self.left_out)

    def _texts(self) -> Iterator[str]:
        yield from self.queries
        for _, title, text in self._documents():
            yield beir.titled(title, text)
            if title:  # The passage may also occur without its title.
                yield text


Task = Bitext | STS | Mining | Pool | Retrieval
