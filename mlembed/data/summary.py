"""Summarise what training would understand of its data, for `mlembed data`."""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .. import config
from ..config.choices import BadRows
from . import sources, streams
from .formats.layouts import Report
from .tables import Table, check_teaches, describe, left_out
from .tokens import check_prompts

EXAMPLES = 3
SHOWN = 160  # characters of a text of an example
SAMPLED = 20_000  # texts, evenly spaced, whose lengths are taken


@dataclass
class Summary:
    """Facts about one source. lengths: percentiles, in tokens or characters. error: why
    training would refuse it, "" otherwise.
    """

    name: str
    line: str = ""
    error: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    examples: list[list[str]] = field(default_factory=list)

    def text(self, unit: str) -> str:
        """Return the summary as lines."""
        if self.error:
            return f"{self.name}\n  refused: {self.error}"
        parts = [f"{self.name}\n  {self.line}"]
        if languages := self.report["languages"]:
            most = Counter(languages).most_common(12)
            rest = len(languages) - len(most)
            more = f", {rest} more" if rest else ""
            parts.append(f"languages: {', '.join(f'{k} {n}' for k, n in most)}{more}")
        spread = ", ".join(f"{name} {length}" for name, length in self.lengths.items())
        parts.append(f"{unit} a text: {spread}")
        parts += [f"bad row {bad}" for bad in self.report["bad_rows"][:EXAMPLES]]
        for texts in self.examples:
            parts.append(" | ".join(_shown(text) for text in texts))
        return "\n  ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary for JSON."""
        return asdict(self)


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}.."


def summaries(
    run: config.Run, held_out: AbstractSet[str], bad_rows: BadRows, length: Callable[[str], int]
) -> Iterator[Summary]:
    """Yield the summary of each source of a run; a source that is refused says why.

    Args:
        held_out: normalised texts of the evaluation. length: of a text, in tokens or characters.
    """
    for source in sources.all_of(run):
        try:
            if source.streaming:
                name, line = streams.name_of(source), sources.describe_stream(source)
                report = Report(name)
                if sources.is_local(source):
                    # Training reads to the end, and may find a mistake there.
                    for _ in sources.items(
                        source, bad_rows=bad_rows, held_out=held_out, report=report
                    ):
                        pass
                yield Summary(name, f"{line}{left_out(report)}", report=asdict(report))
                continue
            for table, report in sources.read(source, bad_rows=bad_rows, held_out=held_out):
                check_prompts(table)
                check_teaches(table, source.num_negatives != 0)
                yield _summary(table, report, length)
        except (ValueError, OSError) as error:
            yield Summary(streams.name_of(source), error=str(error))


def _summary(table: Table, report: Report, length: Callable[[str], int]) -> Summary:
    step = max(1, len(table.texts) // SAMPLED)
    lengths = np.array([length(table.texts[i]) for i in range(0, len(table.texts), step)])
    names = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    spread = {name: int(np.percentile(lengths, q)) for name, q in names.items()}
    examples = [
        list(table.texts[int(table.starts[i]) : int(table.starts[i + 1])])
        for i in range(min(EXAMPLES, len(table)))
    ]
    return Summary(
        table.name, describe(table, report), "", asdict(report), spread, [e[:4] for e in examples]
    )
