"""Atomic files and directories, and JSON and YAML files whose errors name the line.

A file or directory is written under a name of this process's own next to its place, flushed to
disk, and renamed: other processes, and the next one after a crash, see all of it or nothing.
"""

import itertools
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

PARTIAL, PART = ".partial", 50  # Suffix of temporary names; characters of the name in them.
ELSEWHERE = ChildProcessError, BrokenPipeError  # OSErrors of workers and of standard output.
SHARDS = "shard-*.safetensors"  # Weights of a training checkpoint (checkpoint.py).


# ---- names that must be free ----


def check_new(path: Path, kind: str = "file", key: str = "out") -> None:
    """Check that `path` is free to be written.

    Args:
        kind: "file", or "directory", which may exist if it is empty.
        key: the option that the error names.

    Raises:
        ValueError: `path` exists, or no directory can be made for it.
    """
    taken = path.is_symlink() or not path.is_dir() or path.is_mount() or any(path.iterdir())
    empty = kind == "directory" and not taken
    if os.path.lexists(path) and not empty:
        raise ValueError(f"{key}: expected a new {kind}, got {path}, which exists")
    parent = next(above for above in path.absolute().parents if above.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"{key}: cannot create {path}: {parent} is not a writable directory")


def free_name(path: Path) -> Path:
    """Return `path`, or `path`_1, `path`_2 .., the first at which nothing is."""
    names = (path.with_name(f"{path.name}{f'_{i}' if i else ''}") for i in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


# ---- atomic writes ----


@contextmanager
def atomic_file(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a name to write to, in a directory that goes; the file becomes `target` on success.

    Missing parents are made. The file has the mode that the process's umask gives a new file.

    Args:
        replace: overwrite an existing `target`, which is an error otherwise.

    Raises:
        ValueError: `target` exists, before or after the block; writing failed (disk full).
    """
    if not replace:
        check_new(target)
    with _folder(target) as folder:
        partial = folder / target.name
        yield partial
        flush(partial)
        if replace:
            partial.replace(target)
        else:
            _place(partial, target)
        flush(target.parent)


@contextmanager
def atomic_files(target: Path) -> Iterator[Path]:
    """Yield a directory for the file `target.name` and others, which succeed together.

    They move to the directory of `target`, `target` first. If one fails, none stays there.

    Raises:
        ValueError: one of the files exists there; writing failed (disk full).
    """
    check_new(target)
    placed = list[Path]()
    with _folder(target) as folder:
        yield folder
        paths = sorted(folder.iterdir(), key=lambda path: (path.name != target.name, path))
        for path in paths:
            flush(path)
        try:
            for path in paths:
                _place(path, target.with_name(path.name))
                placed.append(target.with_name(path.name))
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise
        flush(target.parent)


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """Yield a temporary directory next to `target`. Raises ValueError if writing fails."""
    prefix = f".{target.name[:PART]}."
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(PARTIAL, prefix, target.parent) as folder:
            yield Path(folder)
    except ELSEWHERE:
        raise
    except (OSError, SafetensorError) as error:
        raise _not_written(target, error) from None


def _place(partial: Path, target: Path) -> None:
    """Give a finished file its name. ValueError if another file has it."""
    try:
        try:
            os.link(partial, target)  # Unlike a rename, it never replaces a file.
        except FileExistsError:
            raise
        except OSError:  # The file system has no hard links: reserve the name, then replace.
            os.close(os.open(target, os.O_CREAT | os.O_EXCL))
            partial.replace(target)
    except FileExistsError:
        check_new(target)
        raise


@contextmanager
def atomic_directory(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a directory to write into, which becomes `target` if the block succeeds.

    Its files get the modes that the process's umask gives new files.

    Args:
        replace: remove an existing `target` on success; a full one is an error otherwise.

    Raises:
        ValueError: `target` exists, before or after the block, and is not an empty directory;
            writing failed (disk full).
    """
    if not replace:
        check_new(target, "directory")
    partial, old = (
        target.with_name(f".{target.name[:PART]}.{uuid.uuid4().hex[:8]}{PARTIAL}") for _ in "no"
    )
    missing = [path for path in target.parents if not path.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        _set_modes(partial)
        for path in sorted(partial.rglob("*")):
            flush(path)
        if replace and target.exists():
            target.rename(old)
        try:
            partial.rename(target)  # This replaces an empty directory, never a full one.
        except OSError:
            check_new(target, "directory")  # Another process may have been first.
            raise
        flush(target.parent)
    except ELSEWHERE:
        raise
    except (OSError, SafetensorError) as error:
        raise _not_written(target, error) from None
    finally:
        for path in (partial, old):
            shutil.rmtree(path, ignore_errors=True)
        for path in missing:  # Parents made here go again, unless they hold something by now.
            with suppress(OSError):
                path.rmdir()


def remove_partials(directory: Path) -> None:
    """Remove what killed processes left in a directory that this process owns."""
    for path in directory.glob(f".*.????????{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _not_written(target: Path, error: Exception) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ValueError(f"{target}: could not be written: {reason}")


def _set_modes(directory: Path) -> None:
    """Give files the mode that a new file has here: safetensors lets only their owner read them."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        probe = Path(folder) / "probe"
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    for path in directory.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically. ValueError if it could not be written."""
    with atomic_file(path, replace=True) as partial:
        partial.write_text(text, encoding="utf-8")


def reserve(file: IO[bytes], size: int) -> None:
    """Reserve the first `size` bytes of a file on disk. OSError if the disk is full.

    Without space, writing to a mapping of the file would end the process by SIGBUS.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- JSON and YAML ----


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        ValueError: no such file, invalid UTF-8 or invalid JSON, with its place.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {error.start}: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from None


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file, of which only what JSON can hold is accepted.

    Raises:
        ValueError: no such file, invalid YAML, a key that repeats, or a plain value that YAML takes
            for something that it does not look like: `no` for false, a date, 1:30 for 90.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Loads plain values strictly."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        for place, key in enumerate(keys):
            if not isinstance(key, str) or key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise ValueError(f"{path}:{line}: expected distinct names as keys, got {key!r}")
        values = [loader.construct_object(value, deep=True) for _, value in node.value]
        return dict(zip(keys, values, strict=True))

    def scalar(loader: Any, node: Any) -> Any:
        kind = node.tag.rpartition(":")[2]
        plain = kind != "timestamp" and ":" not in node.value
        if kind == "bool":
            plain = node.value.lower() in ("true", "false")
        if not plain:
            line = node.start_mark.line + 1
            raise ValueError(
                f"{path}:{line}: expected text in quotes, got {node.value}, which YAML takes for a "
                f'{kind}: write "{node.value}"'
            )
        return getattr(loader, f"construct_yaml_{kind}")(node)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    for kind in ("bool", "int", "float", "timestamp"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", scalar)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {error.start}: {error.reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: invalid YAML: {getattr(error, 'problem', error)}") from None
