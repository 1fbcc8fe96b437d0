"""Sources that are read as they come: never stored, shuffled within windows.

A source gives the same items in the same order every epoch. Window w is items w W to (w + 1) W of
that order, the last one shorter; in epoch e its items are shuffled by a permutation that is a
function of (seed, source, e, w). The shuffled windows, epoch after epoch, are an endless order, of
which batch k is items k B to (k + 1) B.

So a stream's state is a function of a position, and is restored by reading: forward, by skipping
items; back, by beginning again. Each process, and each worker of a loader, reads for itself and
holds the windows of its last batch. The number of items, and with it the position within an epoch,
is known once an end was read.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import get_worker_info

from .. import config
from ..config.choices import BadRows
from . import sources, tables
from .formats import paths
from .formats.layouts import Item, Report
from .tokenizer import tokenize
from .tokens import Tokens

WINDOW = 8192  # items
WINDOWS = 6  # first number of the seed of a window's permutation


def name_of(source: config.Source) -> str:
    """Return a source's name in logs: its own, or that of its file, directory or data set."""
    path = Path(source.path)
    stem = paths.stem_of(path) if paths.is_data(path) else path.name
    return source.name or "-".join(filter(None, (stem, source.subset)))


class Stream:
    """One source as an endless order of items (see the module's docstring).

    Args:
        number: the source's among the run's, for its permutations.
        bad_rows, held_out: as in `sources.items`. window: items; 0: WINDOW.
    """

    def __init__(
        self,
        source: config.Source,
        seed: int,
        number: int,
        bad_rows: BadRows = "error",
        held_out: AbstractSet[str] = frozenset(),
        window: int = 0,
    ) -> None:
        self.source, self.seed, self.number = source, seed, number
        self.bad_rows, self.held_out, self.window = bad_rows, held_out, window or WINDOW
        self.task = sources.task_of(source)
        self.length: int | None = None  # items of an epoch
        self._forget()

    def _forget(self) -> None:
        """Drop the state of this process."""
        self.reader: Iterator[Item] | None = None
        self.report = Report(self.source.path)
        self.next = 0  # the window that the reader gives next
        self.windows: dict[int, list[Item]] = {}
        # Numbers of windows, the ids of their texts, and where each item's begin.
        self.linked: tuple[list[int], np.ndarray, np.ndarray] | None = None
        self.process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        local = ("reader", "next", "windows", "linked", "process", "report")
        return {k: v for k, v in self.__dict__.items() if k not in local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # ---- positions to items ----

    def items(self, begin: int, count: int) -> tuple[list[Item], np.ndarray]:
        """Return items [begin, begin + count) of the order, and the ids of their texts, int64: of
        the first item its query, its positive, its negatives, then those of the second, ..

        Ids are equal for texts that pairs link, among all items of the windows that are touched.

        Raises:
            ValueError: as `sources.items`; the number of items differs from the first epoch's.
        """
        # The open file of a forked process and its position are the parent's.
        if self.process != os.getpid():
            self._forget()
        parts: list[tuple[int, np.ndarray]] = []  # (window, places in it)
        while count:
            epoch, within = divmod(begin, self.length) if self.length else (0, begin)
            w, place = divmod(within, self.window)
            size = len(self._window(w))
            if self.length is not None and begin >= self.length and epoch == 0:
                # The end was read just now, so `begin` is in a later epoch.
                continue
            places = self._shuffled(epoch, w, size)[place : place + count]
            parts.append((w, places))
            begin, count = begin + len(places), count - len(places)
        touched = sorted({w for w, _ in parts})
        self.windows = {w: self.windows[w] for w in touched}
        items = [self.windows[w][i] for w, places in parts for i in places.tolist()]
        return items, self._ids(touched, parts)

    def _shuffled(self, epoch: int, w: int, size: int) -> np.ndarray:
        seed = [self.seed, WINDOWS, self.number, epoch, w]
        return np.random.default_rng(seed).permutation(size)

    def _window(self, w: int) -> list[Item]:
        """Return the items of a window as they come, none after the end of the source."""
        if w in self.windows:
            return self.windows[w]
        if self.reader is None or w < self.next:
            self.reader, self.next = self._read(), 0
        while self.next < w and self._advance(hold=False) == self.window:
            pass
        if self.next == w and self.reader is not None:
            self._advance(hold=True)
        return self.windows.get(w, [])

    def _read(self) -> Iterator[Item]:
        self.report = Report(name_of(self.source))
        return sources.items(
            self.source, bad_rows=self.bad_rows, held_out=self.held_out, report=self.report
        )

    def _advance(self, hold: bool) -> int:
        """Read the next window, to hold it or to skip it, and return its number of items."""
        assert self.reader is not None
        window = islice(self.reader, self.window)
        items = list(window) if hold else []
        size = len(items) if hold else sum(1 for _ in window)
        w, self.next = self.next, self.next + 1
        if hold:
            self.windows[w] = items
        ended, total = size < self.window, w * self.window + size
        if self.length and (total > self.length or ended and total < self.length):
            raise ValueError(
                f"source {self.source.path}: expected the {self.length} items of the first epoch, "
                f"got {total}{'' if ended else ' or more'}"
            )
        if ended:
            if self.length is None:
                self._say()
            self.reader, self.length = None, total
        return size

    def _say(self) -> None:
        """Print what became of the rows, once a run: by the first worker of the main process."""
        worker = get_worker_info()
        if os.environ.get("RANK", "0") == "0" and (worker is None or worker.id == 0):
            report = self.report
            counts = f"{report.rows} rows read, {report.items} pairs{tables.left_out(report)}"
            print(f"stream {report.name}: {counts}", file=sys.stderr, flush=True)

    # ---- their texts ----

    def _ids(self, touched: list[int], parts: list[tuple[int, np.ndarray]]) -> np.ndarray:
        if self.linked is None or self.linked[0] != touched:
            items = [item for w in touched for item in self.windows[w]]
            numbers = np.array([tables.text_id(text) for item in items for text in item.texts])
            starts = np.cumsum([0, *(len(item.texts) for item in items)])
            self.linked = touched, tables.linked(numbers, starts), starts
        _, ids, starts = self.linked
        before = np.cumsum([0, *(len(self.windows[w]) for w in touched)])
        at = np.concatenate([before[touched.index(w)] + places for w, places in parts])
        sizes = starts[at + 1] - starts[at]
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        return ids[np.repeat(starts[at], sizes) + within]

    def tokenise(
        self, texts: Sequence[str], queries: np.ndarray, tokenizer: Tokenizer, max_length: int
    ) -> Tokens:
        """Tokenise texts with their prompts; `queries` are the places of queries among them."""
        prompts = [self.source.document_prompt] * len(texts)
        for place in queries.tolist():
            prompts[place] = self.source.prompt
        ids = tokenize(tokenizer, [a + b for a, b in zip(prompts, texts, strict=True)], max_length)
        return Tokens(np.concatenate(ids), np.cumsum([0, *map(len, ids)]), truncated=0)
