"""Files and directories that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

SHARDS = "shard-*.safetensors"  # weights of a training checkpoint (checkpoint.py)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A directory to write into that appears as `target` only if the block succeeds.

    Raises:
        ValueError: `target` exists and is not an empty directory; writing failed (disk full).
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target}: expected nothing there yet, found something; nothing was written"
        )
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    missing = [path for path in target.parents if not path.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            flush(path)
        partial.rename(target)  # replaces an empty directory, never a full one
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{target}: could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for path in missing:  # made on the way; those that now hold something stay
            with suppress(OSError):
                path.rmdir()


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a small file as a whole: a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{path}: could not be written: {error}") from None
