"""States of a plan's items: one line of JSON in items.jsonl when an item begins and when it ends.

A call that is killed leaves an item that began and did not end. An item is tried TRIES times if it
was cut short or died with its call; one that failed by itself is tried again only with other
sources, or if it is asked for.
"""

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import lines_of
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
        """Append a record at once, and whole: the line is one write."""
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"time": stamp, "item": item, "state": state, "sources": self.sources, **values}
        with (self.folder / FILE).open("ab", buffering=0) as file:
            file.write(ended(self.folder / FILE) + json.dumps(record).encode() + b"\n")
            os.fsync(file.fileno())
        self.see(record)

    def of(self, name: str) -> Tried:
        return self.tried.get(name, Tried())

    def open(self, name: str) -> bool:
        """Return whether an item is still to be run."""
        tried = self.of(name)
        if tried.state == FAILED:
            return tried.sources != self.sources
        return tried.state == OPEN or (tried.state == CUT and tried.tries < TRIES)

    def next(self, items: Sequence[Item], left: float) -> Item | None:
        """Return the first open item that fits, whose predecessor has ended."""
        for item in items:
            waits = (
                item.after and self.open(item.after) and any(i.name == item.after for i in items)
            )
            if self.open(item.name) and not waits and item.least <= left:
                return item
        return None


def ended(path: Path) -> bytes:
    """Return a line feed if a killed process left half a line, else nothing."""
    text = path.read_bytes() if path.exists() else b""
    return b"\n" if text and not text.endswith(b"\n") else b""
