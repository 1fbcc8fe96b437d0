"""States of a plan's items: one line of JSON in items.jsonl when an item begins and when it ends.

A call that is killed leaves an item that began and did not end. An item is tried TRIES times if it
was cut short or died with its call; one that failed by itself is tried again only with other
sources, or if it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import append, lines_of
from .plan import Item

FILE = "items.jsonl"
TRIES = 4
DONE, FAILED, CUT, OPEN = "done", "failed", "cut", "open"


@dataclass
class Tried:
    """An item's history: its last state, how often it began, and a note on its last end."""

    state: str = OPEN
    tries: int = 0
    note: str = ""
    seconds: float | None = None
    sources: str = ""


@dataclass
class State:
    """The items of a folder. `sources` is the hash of the present ones."""

    folder: Path
    sources: str
    tried: dict[str, Tried] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, sources: str) -> "State":
        state = cls(folder, sources)
        for record in lines_of(folder / FILE):
            state.see(record)
        return state

    def see(self, record: dict[str, Any]) -> None:
        tried = self.tried.setdefault(record["item"], Tried())
        if record["state"] == "again":
            self.tried[record["item"]] = Tried()
        elif record["state"] == "begin":
            tried.state, tried.note, tried.tries = CUT, "died with its call", tried.tries + 1
        else:
            tried.state, tried.note = record["state"], record.get("note", "")
            tried.seconds = record.get("seconds")
        tried.sources = record.get("sources", "")

    def write(self, item: str, state: str, **values: Any) -> None:
        record = {"item": item, "state": state, "sources": self.sources, **values}
        append(self.folder / FILE, record)
        self.see(record)

    def of(self, name: str) -> Tried:
        return self.tried.get(name, Tried())

    def open(self, name: str) -> bool:
        """Return whether an item is still to be run."""
        tried = self.of(name)
        if tried.state == FAILED:
            return tried.sources != self.sources
        return tried.state == OPEN or (tried.state == CUT and tried.tries < TRIES)

    def next(self, items: Sequence[Item], left: float, ran: Sequence[str] = ()) -> Item | None:
        """Return the first open item that fits into `left` seconds, None if there is none.

        Items that `ran` in this call wait for the next one, and items wait for their predecessor.
        """
        names = {item.name for item in items}
        for item in items:
            waits = item.name in ran or (item.after in names and self.open(item.after))
            if self.open(item.name) and not waits and item.least <= left:
                return item
        return None
