"""The entries of docs/troubleshooting.md, and the messages that the attack provoked.

An entry is a message in the first column of a table, between backticks, in which `..` and words
like FILE stand for any text.
"""

import re
from collections.abc import Iterable
from functools import cache

from .rows import Result
from .scene import ROOT

PAGE = "docs/troubleshooting.md"
ANY = ["FILE", "DIR", "KEY", "NAME", "PLACE", "OPTION", "STEP", "N", "X", "Y"]
# Below this line are messages of GPUs, clusters and the network, which the attack does not provoke.
APART = "<!-- not provoked by make attack -->"


@cache
def entries() -> dict[str, re.Pattern]:
    """Return the pattern of each entry, by its text."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    found = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    texts = [entry for cell in found for entry in re.findall(r"`([^`]+)`", cell)]
    return {text: pattern(text) for text in texts}


def pattern(text: str) -> re.Pattern:
    """Return the pattern of an entry's text."""
    pieces = re.split(rf"\.\.\.?|\b(?:{'|'.join(ANY)})\b", text)
    return re.compile(".*".join(re.escape(piece) for piece in pieces))


def entries_of(message: str) -> list[str]:
    """Return the entries that describe a message."""
    return [text for text, pattern in entries().items() if pattern.search(message)]


def unprovoked(results: Iterable[Result]) -> list[str]:
    """Return entries that no row provoked, but for those of the last section."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    apart = text.partition(APART)[2]
    seen = {entry for result in results for entry in result.entries}
    return [entry for entry in entries() if entry not in seen and f"`{entry}`" not in apart]
