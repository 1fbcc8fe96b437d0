"""Find the checkpoints of a run, and verify that their files are those that were written."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .files import free_name

STATE = "state.json"
NAME = re.compile("step_[0-9]{8}")


def complete(directory: Path) -> list[Path]:
    """Return all checkpoints in a directory, oldest first."""
    return [path for path in _named(directory) if (path / STATE).is_file()]


def _named(directory: Path) -> list[Path]:
    """Return what has a checkpoint's name, by rising step; a copy of another name is left alone."""
    return sorted(path for path in directory.glob("step_*") if NAME.fullmatch(path.name))


def newest(
    directory: Path, say: Callable[[str], None] = print, set_aside: bool = False
) -> Path | None:
    """Return the newest checkpoint whose files match their hashes, or None without a checkpoint.

    It reads every byte, so only the main process should call it.

    Args:
        say: called with a line about each damaged checkpoint that is newer.
        set_aside: rename these to `damaged_step_..`, so that their steps can be saved again.

    Raises:
        ValueError: all checkpoints are damaged; none is renamed.
    """
    bad: list[tuple[Path, str]] = []
    good = None
    for path in reversed(_named(directory)):
        if (what := damage(path)) is None:
            good = path
            break
        bad.append((path, what))
    if good is None and bad:
        lines = "; ".join(f"{path.name}/{what}" for path, what in bad)
        raise ValueError(
            f"{directory}: expected an intact checkpoint, all are damaged: {lines}; restore one, "
            "or begin a new run with another --name"
        )
    if good is None:
        return None
    for path, what in bad:
        note = ""
        if set_aside:
            aside = path.rename(free_name(path.with_name(f"damaged_{path.name}")))
            note = f", renamed to {aside.name}"
        say(f"{path} is damaged{note}; {good.name} is used instead. {what}")
    return good


def state(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's `state.json`."""
    contents: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return contents


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None.

    Checked are the hash of `state.json`, and whether files are missing, surplus (shards that would
    be read), or of another size or content.
    """
    try:
        state = json.loads((path / STATE).read_bytes())
        seal = state.pop("sha256")
    except FileNotFoundError:
        return f"{STATE}: no such file"
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        return f"{STATE}: expected the json that was written, got other text ({error})"
    if seal != (actual := seal_of(state)):
        return f"{STATE}: expected sha256 {seal} of its contents, got {actual}"
    if type(state.get("step")) is not int or not isinstance(state.get("files"), dict):
        return f"{STATE}: expected a step and files, got neither or one"
    wrong, whole = [], {}
    for name, file in state["files"].items():
        if not (path / name).is_file():
            wrong.append(f"{name}: no such file")
        elif (size := (path / name).stat().st_size) != file["bytes"]:
            wrong.append(f"{name}: expected {file['bytes']} bytes, got {size}")
        else:
            whole[path / name] = file["sha256"]
    for file, sum in zip(whole, sha256_of(whole), strict=True):
        if sum != whole[file]:
            name = file.relative_to(path).as_posix()
            wrong.append(f"{name}: expected sha256 {whole[file]}, got {sum}")
    surplus = {file.name for file in path.glob("*.safetensors")} - state["files"].keys()
    wrong += [f"{name}: not a file of this checkpoint" for name in sorted(surplus)]
    return "; ".join(wrong) or None


def seal_of(state: dict[str, Any]) -> str:
    """Return the sha256 of the contents of `state.json`."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def sha256_of(paths: Iterable[Path]) -> list[str]:
    """Return the sha256 of every file, reading several at once."""

    def one(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(one, paths))
