"""On-disk cache for results that are computed once: text, tokens, vocabulary factors.

An entry is a directory $MLEMBED_CACHE/KIND/KEY (by default under ~/.cache/mlembed); its key is a
digest of everything that it is made from. It is built under another name and renamed once it is
complete, so that a process sees all of an entry or nothing. Before a process uses an entry it
compares every byte with the digests that were written with it, which takes 1.2 s a GB.

The kernel's locks on open files, which end with their process, say who is at work: the process
that builds an entry locks `locks/KIND-KEY`, and all that use it share a lock on KIND/KEY/.lock.
Leftovers of a build that was killed are removed by the next process, and entries by
`mlembed cache --clear`, only under the lock that nobody else holds.
"""

import atexit
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .files import check_regular, flush, read_object

T = TypeVar("T")
WHOLE = "whole.json"  # {"source": .., "files": {name: digest}}; written last.
LOCK = ".lock"  # Its modification time is when the entry was last opened.
LOCKS = "locks"
KEY = re.compile(r"[0-9a-f]{64}")
PARTIAL = re.compile(rf"\.partial-({KEY.pattern})-[^-]+")  # A directory of the build of a key.
HELD: list[int] = []  # Open files with the locks of the entries that this process uses.


def home() -> Path:
    """Return the directory of the cache."""
    return Path(os.path.expanduser(os.environ.get("MLEMBED_CACHE") or "~/.cache/mlembed"))


class Unusable(Exception):
    """An entry that is missing, or damaged, with what is wrong with it."""


def cached(
    kind: str,
    key: str,
    build: Callable[[Path], None],
    open: Callable[[Path], T],
    source: str = "",
) -> T:
    """Return `open(directory)` of an entry, which `build(directory)` writes if it is missing.

    An entry that is not what was written, or that does not open, is a warning and is replaced. If
    the cache cannot be written, that is a warning, and the entry is built in a temporary directory
    that is removed when the process ends. On one machine one process builds an entry while others
    wait; two machines that share a cache may build it at the same time, and the first to end wins.

    Args:
        source: what the entry is made from, for the list of entries.
    """
    place = home() / kind / key
    remove_leftovers(home())
    with suppress(Unusable):
        return _use(place, open)
    damaged: os.stat_result | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _building(kind, key):
            try:
                return _use(place, open)  # Another process may have built it by now.
            except Unusable as problem:
                with suppress(FileNotFoundError):
                    damaged = place.stat()
                    warnings.warn(f"{place}: {problem}; it is built again", stacklevel=2)
            prefix = f".partial-{key}-"
            with tempfile.TemporaryDirectory(prefix=prefix, dir=place.parent) as partial:
                _build(Path(partial) / key, build, source)
                _put(Path(partial) / key, place, damaged)
            with suppress(Unusable):
                return _use(place, open)
    except OSError as error:
        warnings.warn(
            f"{place}: {kind} could not be stored, and will be computed again: {error}",
            stacklevel=2,
        )
    place = Path(tempfile.mkdtemp(prefix="mlembed-")) / key
    atexit.register(shutil.rmtree, place.parent, ignore_errors=True)
    _build(place, build, source)
    return open(place)


# ---- whole entries ----


def _use(place: Path, open: Callable[[Path], T]) -> T:
    """Return `open(place)` of a whole entry, whose lock this process shares until it ends.

    Raises:
        Unusable: the entry is missing, is not what was written, or does not open.
    """
    try:
        handle = _lock_of(place, fcntl.LOCK_SH)
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    try:
        if problem := _problem(place):
            raise Unusable(problem)
        value = open(place)
    except Unusable:
        os.close(handle)
        raise
    # Each library raises exceptions of its own.
    except Exception as error:
        os.close(handle)
        raise Unusable(f"does not open ({' '.join(str(error).split())})") from None
    with suppress(OSError):  # The entry belongs to another user.
        os.utime(handle)
    HELD.append(handle)
    return value


def _build(directory: Path, build: Callable[[Path], None], source: str) -> None:
    directory.mkdir()
    build(directory)
    files = {path.name: digest(files=[path]) for path in directory.iterdir()}
    about = json.dumps({"source": source, "files": files})
    (directory / WHOLE).write_text(about + "\n", encoding="utf-8")
    (directory / LOCK).touch()
    for path in [*directory.iterdir(), directory]:
        flush(path)


def _put(made: Path, place: Path, damaged: os.stat_result | None) -> None:
    """Rename an entry to its place. It replaces a damaged entry, but not a whole one."""
    with suppress(FileNotFoundError):  # There is none, or another process has replaced it.
        if damaged and os.path.samestat(damaged, place.stat()) or _problem(place):
            place.rename(made.with_name("damaged"))  # Removed with the temporary directory.
    try:
        made.rename(place)
        flush(place.parent)
    except OSError:
        if _problem(place):  # Otherwise another process has written the same entry.
            raise


def _about(place: Path) -> dict[str, Any]:
    """Return what an entry says of itself, {} if it cannot be read."""
    try:
        return read_object(place / WHOLE)
    except ValueError:
        return {}


def _problem(place: Path) -> str:
    """Return why an entry is not what was written, "" if every byte is."""
    files = _about(place).get("files")
    if not isinstance(files, dict) or not files:
        return f"has no list of its files in {WHOLE}"
    try:
        names = {path.name for path in place.iterdir()} - {WHOLE, LOCK}
        if odd := sorted(names ^ files.keys()):
            return f"{odd[0]} {'is surplus' if odd[0] in names else 'is missing'}"
        for name, stored in files.items():
            check_regular(place / name)  # A device has no end.
            if digest(files=[place / name]) != stored:
                return f"{name} is not what was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error).removeprefix(f"{place}/")
    return ""


# ---- locks ----


def _lock_of(place: Path, how: int) -> int:
    """Return an open file with a lock of an entry.

    Raises:
        Unusable: there is no entry.
        OSError: the lock is held by another process, if `how` is not to wait.
    """
    while True:
        path = place / LOCK
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, NotADirectoryError):
            raise Unusable("is missing") from None
        except OSError:  # The cache is read-only.
            path = path if path.exists() else place
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if _locked(handle, path, how):
            return handle


def _locked(handle: int, path: Path, how: int) -> bool:
    """Lock an open file. Return False, and close it, if it is no longer at its path.

    On a file system without locks nobody waits.

    Raises:
        OSError: the lock is held by another process, or cannot be, if `how` is not to wait.
    """
    try:
        fcntl.flock(handle, how)
    except OSError:
        if how & fcntl.LOCK_NB:
            os.close(handle)
            raise
    with suppress(OSError):
        if os.path.samestat(os.fstat(handle), path.stat()):
            return True
    os.close(handle)
    return False


@contextmanager
def _building(kind: str, key: str, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold an entry's lock, so that only one process of this machine builds it.

    Raises:
        OSError: the cache cannot be written; another process builds, if `how` is not to wait.
    """
    path = home() / LOCKS / f"{kind}-{key}"
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if _locked(handle, path, how):
            break
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@functools.cache
def remove_leftovers(cache: Path) -> None:
    """Remove what builds left behind that were killed, once a process."""
    builds = {tuple(path.name.rsplit("-", 1)) for path in cache.glob(f"{LOCKS}/*-*")}
    for path in cache.glob("*/.partial-*"):
        if match := PARTIAL.fullmatch(path.name):
            builds.add((path.parent.name, match[1]))
    for kind, key in builds:
        with suppress(OSError), _building(kind, key, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for path in (cache / kind).glob(f".partial-{key}-*"):
                shutil.rmtree(path, ignore_errors=True)


# ---- the list of entries ----


@dataclass(frozen=True)
class Entry:
    """An entry of the cache. size: bytes. used: seconds of the epoch when it was last opened.
    source: what it was made from, "" if that is unknown.
    """

    kind: str
    path: Path
    size: int
    used: float
    source: str

    @property
    def in_use(self) -> bool:
        """Whether a running process uses the entry, or its file system cannot tell."""
        if not (self.path / LOCK).exists():
            return False
        try:
            os.close(_lock_of(self.path, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except (OSError, Unusable):
            return True
        return False

    def remove(self) -> bool:
        """Remove the entry unless a running process uses it. Return whether it was removed."""
        try:
            handle = _lock_of(self.path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (OSError, Unusable):
            return False
        folder = Path(tempfile.mkdtemp(prefix=f".partial-{self.path.name}-", dir=self.path.parent))
        try:
            # A process that waits for the lock finds that the entry is gone.
            self.path.rename(folder / self.path.name)
        finally:
            os.close(handle)
            shutil.rmtree(folder, ignore_errors=True)
        return True


def entries() -> list[Entry]:
    """Return the entries of the cache by kind, those first that were not used for longest."""
    found = []
    for path in home().glob("*/*"):
        if not KEY.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        files = [file.lstat() for file in path.iterdir()]
        used = (path / LOCK if (path / LOCK).exists() else path).stat().st_mtime
        source = str(_about(path).get("source") or "")
        found.append(Entry(path.parent.name, path, sum(f.st_size for f in files), used, source))
    return sorted(found, key=lambda entry: (entry.kind, entry.used))


# ---- digests ----


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
