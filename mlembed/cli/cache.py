"""List what earlier calls stored (tokenised text, vocabulary factors), and clear it.

mlembed cache [KIND ..] [--older-than 30d] [--clear] [--json]
"""

import json as json_lines
import re
import time
from dataclasses import asdict
from typing import Annotated

import tyro

from ..config.choices import CacheKind

SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}


def main(
    kinds: Annotated[tuple[CacheKind, ...], tyro.conf.Positional] = (),
    /,
    clear: bool = False,
    older_than: str = "",
    json: bool = False,
) -> None:
    """List the entries of MLEMBED_CACHE with size, last use and what each is made from.

    An entry that a running process uses is never removed. A removed entry is computed again when it
    is needed.

    Args:
        kinds: kinds to list, all by default.
        clear: remove the entries instead.
        older_than: only entries that were last used longer ago, like 12h, 30d or 8w.
        json: print one JSON object an entry.
    """
    from ..runtime import cache

    age = _seconds(older_than)
    cache.remove_leftovers(cache.home())
    before = time.time() - age
    chosen = [e for e in cache.entries() if (not kinds or e.kind in kinds) and e.used <= before]
    removed = [clear and entry.remove() for entry in chosen]
    if json:
        for entry, gone in zip(chosen, removed, strict=True):
            in_use = not gone and entry.in_use
            facts = asdict(entry) | {"path": str(entry.path), "in_use": in_use, "removed": gone}
            print(json_lines.dumps(facts, ensure_ascii=False))
        return
    for entry, gone in zip(chosen, removed, strict=True):
        state = "removed" if gone else "in use" if entry.in_use else ""
        print(
            f"{entry.kind:<8} {_size(entry.size):>9}  {_when(entry.used)}  "
            f"{entry.path.name[:12]}  {state:<7}  {entry.source}".rstrip()
        )
    total = f"{cache.home()}: {len(chosen)} entries, {_size(sum(e.size for e in chosen))}"
    if clear:
        freed = sum(entry.size for entry, gone in zip(chosen, removed, strict=True) if gone)
        total = f"{total}; {sum(removed)} removed, {_size(freed)}"
    print(total)


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([hdw])", age or "0d")
    if match is None:
        raise ValueError(f"older-than: expected hours, days or weeks like 12h, 30d, 8w, got {age}")
    return int(match[1]) * SECONDS[match[2]]


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
