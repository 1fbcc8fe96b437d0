"""On-disk cache for results that are computed once: text, tokens, vocabulary factors.

An entry is a directory $MLEMBED_CACHE/KIND/KEY (by default under ~/.cache/mlembed); its key is a
digest of everything that it is made from. It is built under another name and renamed once it is
complete, so that a process sees all of an entry or nothing.
"""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from .files import flush

T = TypeVar("T")
WHOLE = "whole.json"  # Sizes, or digests, of an entry's files; written last.


def cached(
    kind: str,
    key: str,
    build: Callable[[Path], None],
    open: Callable[[Path], T],
    digests: bool = False,
) -> T:
    """Return `open(directory)` of an entry, which `build(directory)` writes if it is missing.

    An entry whose files are missing or damaged is replaced. If the cache cannot be written, that is
    a warning, and the entry is built in a temporary directory that is removed when the process
    ends. On one machine one process builds an entry while others wait; two machines that share a
    cache may build it at the same time, and the first to end wins.

    Args:
        digests: compare every byte of an entry with what was written, not only the sizes of files.
    """
    home = Path(os.path.expanduser(os.environ.get("MLEMBED_CACHE") or "~/.cache/mlembed"))
    place = home / kind / key
    if _is_whole(place, digests):
        with suppress(FileNotFoundError):  # Another process may delete it at any time.
            return open(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _lock(home / "locks" / f"{kind}-{key}"):
            if not _is_whole(place, digests):
                with tempfile.TemporaryDirectory(prefix=".partial-", dir=place.parent) as partial:
                    _build(Path(partial) / key, build, digests)
                    _put(Path(partial) / key, place, digests)
            with suppress(FileNotFoundError):
                return open(place)
    except OSError as error:
        warnings.warn(
            f"{place}: {kind} could not be stored, and will be computed again: {error}",
            stacklevel=2,
        )
    place = Path(tempfile.mkdtemp(prefix="mlembed-")) / key
    atexit.register(shutil.rmtree, place.parent, ignore_errors=True)
    _build(place, build, digests)
    return open(place)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an entry's lock, so that only one process of this machine builds it.

    The lock ends with its holder, however that ends. On file systems without locks nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with suppress(NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(directory: Path, build: Callable[[Path], None], digests: bool) -> None:
    directory.mkdir()
    build(directory)
    marks = {path.name: _mark(path, digests) for path in directory.iterdir()}
    (directory / WHOLE).write_text(json.dumps(marks) + "\n", encoding="utf-8")
    for path in [*directory.iterdir(), directory]:
        flush(path)


def _put(made: Path, place: Path, digests: bool) -> None:
    """Rename an entry to its place. It replaces a damaged entry, but not a complete one."""
    if place.exists() and not _is_whole(place, digests):
        with suppress(FileNotFoundError):  # Another process has replaced it.
            place.rename(made.with_name("damaged"))  # Removed with the temporary directory.
    try:
        made.rename(place)
        flush(place.parent)
    except OSError:
        if not _is_whole(place, digests):  # Otherwise another process has written the same entry.
            raise


def _is_whole(place: Path, digests: bool) -> bool:
    try:
        marks = json.loads((place / WHOLE).read_text(encoding="utf-8"))
        return all(_mark(place / name, digests) == mark for name, mark in marks.items())
    except (OSError, ValueError, AttributeError):
        return False


def _mark(path: Path, digests: bool) -> int | str:
    """Return what an entry's list says of a file: its size, or a digest of its bytes."""
    return digest(files=[path]) if digests else path.stat().st_size


def digest(*notes: Any, files: Iterable[Path] = (), arrays: Iterable[Any] = ()) -> str:
    """Return the sha256 of values with a json form, contents of files, and bytes of arrays."""
    total = hashlib.sha256(json.dumps(notes).encode())
    for path in files:
        with path.open("rb") as file:
            total.update(f"\n{path.stat().st_size}\n".encode())
            while block := file.read(2**22):
                total.update(block)
    for array in arrays:
        total.update(f"\n{array.nbytes}\n".encode())
        total.update(array.data)
    return total.hexdigest()
