"""Name the columns of a source by role, where their own names do not say it."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Columns:
    """Names of a source's columns by role; all empty: the names say it. Others stay unused.

    Pairs need query and positive, n-way tables id, lang and text, single texts text alone. Columns
    of a file without a header are named by number, from 1 on.
    """

    query: str = ""
    positive: str = ""
    """One text, or a list of texts, each of which makes a pair."""
    negatives: tuple[str, ...] = ()
    """Columns of one text or a list each."""
    score: str = ""
    """Similarity of query and positive, 0..1 or 0..5."""
    positive_scores: str = ""
    """A teacher's score of query and positive: a number, or a list as long as the positives."""
    negative_scores: str = ""
    """A teacher's scores of the query and its negatives, together with `positive_scores`."""
    label: str = ""
    """COLUMN=VALUE: only rows with this value are pairs, e.g. label=0 for entailment."""
    prompt: str = ""
    """Text to put before the query of its row."""
    id: str = ""
    lang: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if not self.given:
            return
        nway, single = bool(self.id or self.lang or self.text), self.given == {"text"}
        needed = ("text",) if single else ("id", "lang", "text") if nway else ("query", "positive")
        if missing := [name for name in needed if not getattr(self, name)]:
            raise ValueError(f"columns.{missing[0]}: expected a column beside the others, got none")
        if nway and (odd := [name for name in self.to_roles() if name not in needed]):
            raise ValueError(
                f"columns.{odd[0]}: expected none beside id, lang, text, got {self.to_roles()}"
            )
        if bool(self.positive_scores) != bool(self.negative_scores):
            raise ValueError(
                "columns: expected positive_scores and negative_scores or neither, got "
                f"{self.positive_scores or self.negative_scores} alone"
            )
        if self.label and not all(self.label.partition("=")):
            raise ValueError(f"columns.label: expected COLUMN=VALUE, got {self.label!r}")

    @property
    def given(self) -> set[str]:
        """Roles whose columns are named."""
        return set(self.to_roles())

    def to_roles(self) -> dict[str, Any]:
        """Return {role: column or columns} of those that are named."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name))}
