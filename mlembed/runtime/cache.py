"""What is computed once and read from disk afterwards, memory-mapped: text and tokens.

An entry is a directory $MLEMBED_CACHE/KIND/KEY (by default under ~/.cache/mlembed), the key a
digest of all that it is made from. It is written beside its place and renamed when it is whole, so
that of several processes each finds either nothing or all of it.
"""

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .files import flush

T = TypeVar("T")
WHOLE = "whole.json"  # an entry's files and their sizes, written last


def kept(kind: str, key: str, build: Callable[[Path], None], open: Callable[[Path], T]) -> T:
    """`open(directory)` of an entry, which `build(directory)` writes where there is none.

    An entry whose files are missing or of other sizes is replaced. Where the cache cannot be
    written, that is a warning, and the entry is made in a temporary directory that goes when the
    process ends. Of processes on one machine one builds an entry and the others wait for it; on
    several machines that share a cache two may build it at the same time: one's stays.
    """
    home = Path(os.path.expanduser(os.environ.get("MLEMBED_CACHE") or "~/.cache/mlembed"))
    place = home / kind / key
    if _is_whole(place):
        return open(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place):
            if not _is_whole(place):  # another process's by now
                with tempfile.TemporaryDirectory(prefix=".partial-", dir=place.parent) as partial:
                    _build(Path(partial) / key, build)
                    _put(Path(partial) / key, place)
    except OSError as error:
        warnings.warn(
            f"{place}: {kind} could not be kept there, and will be made again: {error}",
            stacklevel=2,
        )
        place = Path(tempfile.mkdtemp(prefix="mlembed-")) / key
        atexit.register(shutil.rmtree, place.parent, ignore_errors=True)
        _build(place, build)
    return open(place)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Of the processes of this machine one at a time is inside, for each place: eight that tokenise
    the same text beside each other take eight times as long. The lock goes with its holder, however
    that ends; where there are no locks, nobody waits."""
    lock = place.with_name(f".lock-{place.name}")
    with lock.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _build(directory: Path, build: Callable[[Path], None]) -> None:
    directory.mkdir()
    build(directory)
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    (directory / WHOLE).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    for path in [*directory.iterdir(), directory]:
        flush(path)


def _put(made: Path, place: Path) -> None:
    """Rename a whole entry to its place, in place of a damaged one but not of another's."""
    if place.exists() and not _is_whole(place):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            place.rename(made.with_name("damaged"))  # goes with the temporary directory
    try:
        made.rename(place)
        flush(place.parent)
    except OSError:
        if not _is_whole(place):  # whole: another process's, of the same key
            raise


def _is_whole(place: Path) -> bool:
    try:
        sizes = json.loads((place / WHOLE).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def digest(*notes: Any, files: Iterable[Path] = ()) -> str:
    """sha256 of values with a json form and of files' contents."""
    total = hashlib.sha256(json.dumps(notes).encode())
    for path in files:
        with path.open("rb") as file:
            total.update(f"\n{path.stat().st_size}\n".encode())
            while block := file.read(2**22):
                total.update(block)
    return total.hexdigest()
