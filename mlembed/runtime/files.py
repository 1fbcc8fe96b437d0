"""Atomic files and directories, and JSON and YAML files whose errors name the line.

A file or directory is written under a name of this process's own next to its place, flushed to
disk, and renamed: other processes, and the next one after a crash, see all of it or nothing.
"""

import itertools
import json
import math
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    import numpy as np

PARTIAL, PART = ".partial", 50  # Suffix of temporary names; characters of the name in them.
SHARDS = "shard-*.safetensors"  # Weights of a training checkpoint (checkpoint.py).
LARGEST = 100_000_000  # Bytes of the largest text file that is read as a whole.
DEEPEST = 100  # Levels of lists and objects in each other.
KINDS_OF_FILE = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
KINDS_OF_VALUE = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "an object",
    list: "a list",
}


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
def writing(target: Path) -> Iterator[None]:
    """Raise errors of writing in the block as a ValueError that names `target`."""
    try:
        yield
    except (ChildProcessError, BrokenPipeError):  # OSErrors of workers and of standard output.
        raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{target}: could not be written: {reason}") from None


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
    partial = _partial(target)
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
    finally:  # A signal may come right after the directory is made.
        shutil.rmtree(partial, ignore_errors=True)


def _partial(target: Path) -> Path:
    """Return a new name for what becomes `target`."""
    return target.with_name(f".{target.name[:PART]}.{uuid.uuid4().hex[:8]}{PARTIAL}")


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
    partial, old = _partial(target), _partial(target)
    missing = [path for path in target.parents if not path.exists()]
    try:
        with writing(target):
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
                if old.exists():
                    old.rename(target)
                else:
                    check_new(target, "directory")  # Another process may have been first.
                raise
            flush(target.parent)
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


def append(path: Path, text: str) -> None:
    """Append to a file, which may be new: all of `text` or nothing of it.

    Raises:
        ValueError: writing failed (disk full).
    """
    with writing(path), path.open("ab", buffering=0) as file:
        size, left = file.tell(), text.encode()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def save_array(path: Path, array: "np.ndarray") -> None:
    """Write an .npy file. On a full disk `np.save` may lose the last block without an error.

    Raises:
        OSError: the disk is full.
    """
    import numpy as np

    array = np.asarray(array, order="C")
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


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


# ---- JSON and YAML of others ----


def check_regular(path: Path, most: int | None = None) -> None:
    """Check that `path` is a file that can be read to its end.

    A pipe, a socket or a device could block for ever, or never end.

    Raises:
        ValueError: `path` does not exist, is not a regular file, or has more than `most` bytes.
    """
    try:
        about = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(about.st_mode):
        kind = KINDS_OF_FILE.get(stat.S_IFMT(about.st_mode), "another kind")
        raise ValueError(f"{path}: expected a regular file, got {kind}")
    if most is not None and about.st_size > most:
        raise ValueError(f"{path}: expected at most {most:,} bytes, got {about.st_size:,}")


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """Return the bytes of a regular file. ValueError as in `check_regular`."""
    check_regular(path, most)
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """Return the text of a regular file, without a byte-order mark. ValueError if it has none."""
    try:
        return read_bytes(path).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {error.start}: {error.reason}") from None


def read_json(path: Path, strict: bool = True) -> Any:
    """Return the value of a JSON file: `parse_json` of `read_text`."""
    return parse_json(read_text(path), path, strict=strict)


def read_object(path: Path, strict: bool = True) -> dict[str, Any]:
    """Return the object of a JSON file. ValueError for another value, and as in `read_json`."""
    return check_object(read_json(path, strict), path)


def check_object(value: Any, where: Path | str) -> dict[str, Any]:
    """Return `value` if it is a JSON object. ValueError, which begins with `where`, otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {value!r:.60}")
    return value


def parse_json(text: str, path: Path, line: int = 0, strict: bool = True) -> Any:
    """Return the value of a JSON text that someone else may have written.

    Args:
        path, line: place of the text, for errors; the line is that of a file of several texts.
        strict: reject NaN and infinity, which JSON does not have and Python's library writes,
            integers of more than 40 digits, and lone surrogates, which cannot be printed.

    Raises:
        ValueError: invalid JSON; a key that repeats, of which readers take different values;
            nesting beyond 100 levels.
    """
    numbers = {"parse_constant": _constant, "parse_float": _float, "parse_int": _integer}
    options: dict[str, Any] = numbers if strict else {}
    where = f"{path}:{line}" if line else str(path)
    try:
        value = json.loads(text, object_pairs_hook=_distinct, **options)
        _check(value, strict)
    except json.JSONDecodeError as error:
        place = f"{path}:{max(1, line) + error.lineno - 1}"
        raise ValueError(f"{place}: invalid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where}: invalid JSON: nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: expected Unicode text, got a lone surrogate") from None
    except ValueError as error:
        raise ValueError(f"{where}: invalid JSON: {error}") from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"expected distinct keys, got {twice!r:.60} twice")
    return value


def _integer(digits: str) -> int:
    if len(digits) > 40:
        raise ValueError(f"expected at most 40 digits, got a number of {len(digits)}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _constant(digits)


def _constant(name: str) -> float:
    raise ValueError(f"expected finite numbers, got {name:.60}")


def _check(value: Any, strict: bool) -> None:
    level = [value]
    for _ in range(DEEPEST):
        lower = []
        for item in level:
            if isinstance(item, dict):
                lower += [*item, *item.values()]
            elif isinstance(item, list):
                lower += item
            elif strict and isinstance(item, str) and not item.isascii():
                item.encode()
        if not lower:
            return
        level = lower
    raise RecursionError


def field(path: Path, values: dict[str, Any], key: str, kind: type, default: Any = ...) -> Any:
    """Return the value of `key` in a JSON object, of the given type.

    Args:
        kind: int, float, bool, str, dict or list; an integer is also a float, and no bool is an
            integer.
        default: value in place of null or a missing key, which are errors without it.

    Raises:
        ValueError: a value of another type, with the file, key and value.
    """
    value = values.get(key)
    if value is None and default is not ...:
        return default
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool) and kind is not bool:
        got = f"{value!r:.60}" if key in values else "none"
        raise ValueError(f"{path}: {key}: expected {KINDS_OF_VALUE[kind]}, got {got}")
    return float(values[key]) if kind is float else value


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
        return yaml.load(read_text(path), Loader)  # noqa: S506
    except RecursionError:
        raise ValueError(f"{path}: invalid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: invalid YAML: {getattr(error, 'problem', error)}") from None
