"""Digests of what a run trains on, which each checkpoint holds, and their comparison.

A resumed run has to see the batches that the run began with. So a checkpoint records each source
(its items and the options that batches depend on), the texts and judgements of each evaluation set,
whose texts are held out of training, and the teacher.
"""

import hashlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import config
from ..data import sources
from ..data.batches import weights_of
from ..data.streams import name_of
from ..data.tables import Table
from ..modeling import hf_config
from ..runtime.cache import digest

# Keys of a configuration that say where and how data are read: the digests say what was read.
READING = ("data", "sources", "columns", "header", "bad_rows", "eval")
WHOLE = 2**26  # bytes of files up to which a sample of them is all of them
END = 2**16  # bytes of a sample at either end of a file

Record = dict[str, Any]  # {"data": [..], "eval": [..], "distill": [..]}, entries by "name"
Change = tuple[str, str, str]  # key, what was expected, what was found


# ---- recorded ----


def record(
    run: config.Run,
    read: Sequence[Table],
    streams: Sequence[config.Source],
    evaluation: Sequence[dict[str, Any]],
) -> Record:
    """Return the record of a run's data, with a JSON form.

    Args:
        read, streams: the sources, in the order of batches. evaluation: entries of `of_task`.
    """
    entries: list[dict[str, Any]] = [
        {"name": table.name, "items": f"{len(table)} rows", "sha256": table.sha256}
        | {"options": _options(table.source, table.task)}
        for table in read
    ]
    for source in streams:
        reading = (asdict(source.columns), source.header, source.prompt_format, run.bad_rows)
        files = sources.files_of(source)
        where = () if files else (source.path, source.subset, source.split)
        options = _options(source, sources.task_of(source)) | {"rows": source.rows}
        total = digest("stream", sample(files), *reading, *where)
        items = f"a stream of {len(files) or 'no'} files"
        entries.append(
            {"name": name_of(source), "items": items, "sha256": total, "options": options}
        )
    if run.sampling == "weights":  # The files of a source share its weight.
        for entry, weight in zip(entries, weights_of(run, read, streams), strict=True):
            entry["options"]["weight"] = weight
    return {"data": entries, "eval": list(evaluation)}


def _options(source: config.Source, task: str) -> dict[str, Any]:
    """Return the options of a source that its batches depend on beyond its items."""
    names = ("weight", "temperature", "num_negatives", "prompt", "document_prompt")
    return {"task": task, **{name: getattr(source, name) for name in names}}


def of_teacher(cfg: config.Distill) -> list[dict[str, Any]]:
    """Return the entry of the teacher's weights or stored vectors, which have to be there."""
    entries = []
    for key, source in (("teacher", cfg.teacher), ("embeddings", cfg.embeddings)):
        if source:
            place = hf_config.resolve(source) if key == "teacher" else Path(source)
            files = [path for path in place.rglob("*") if path.suffix in (".safetensors", ".npy")]
            items = f"{len(files)} files"
            entries.append({"name": key, "items": items, "sha256": sample(sorted(files))})
    return entries


def of_task(task: Any, texts: str) -> dict[str, Any]:
    """Return the entry of an evaluation set. texts: the sha256 of its texts."""
    notes: list[Any] = []
    arrays: list[np.ndarray] = []
    for field in fields(task):
        if field.name not in ("name", "texts"):
            _collect(getattr(task, field.name), notes, arrays)
    items = f"{len(task.texts)} texts"
    return {"name": task.name, "items": items, "sha256": digest(texts, *notes, arrays=arrays)}


def _collect(value: Any, notes: list[Any], arrays: list[np.ndarray]) -> None:
    """Take a value apart into arrays and notes with a JSON form; a path says nothing of texts."""
    if isinstance(value, np.ndarray):
        notes.append([value.dtype.str, list(value.shape)])
        arrays.append(np.ascontiguousarray(value))
    elif is_dataclass(value):
        _collect([getattr(value, field.name) for field in fields(value)], notes, arrays)
    elif isinstance(value, Mapping):
        _collect([part for item in value.items() for part in item], notes, arrays)
    elif isinstance(value, list | tuple):
        notes.append(len(value))
        for part in value:
            _collect(part, notes, arrays)
    elif not isinstance(value, Path):
        notes.append(str(value))


def sample(files: Sequence[Path]) -> str:
    """Return a digest of files' sizes and bytes: all bytes up to WHOLE, else END at either end."""
    sizes = [file.stat().st_size for file in files]
    if sum(sizes) <= WHOLE:
        return digest(files=files)
    total = hashlib.sha256(repr(sizes).encode())
    for path, size in zip(files, sizes, strict=True):
        with path.open("rb") as file:
            total.update(file.read(END))
            file.seek(max(0, size - END))
            total.update(file.read(END))
    return total.hexdigest()


# ---- compared ----


def compare(
    before: Record, now: Record, allowed: Iterable[str], say: Callable[[str], None]
) -> None:
    """Compare the record of a checkpoint with that of the run that resumes from it.

    Args:
        allowed: keys that may differ: `data.NAME`, `eval.NAME`, `data` or `eval` for all of them.
        say: gets a line about each difference that is allowed.

    Raises:
        ValueError: other differences, by key.
    """
    given = set(allowed)
    refused: list[tuple[str, str]] = []
    for key, want, got in _changes(before, now):
        if given & {key, key.partition(".")[0]}:
            say(f"data   {key}: {want} before, now {got}")
        else:
            refused.append((key, f"{key}: expected {want}, got {got}"))
    if refused:
        keys = " ".join(shlex.quote(key) for key in dict(refused))
        lines = "; ".join(line for _, line in refused)
        raise ValueError(
            f"--resume: {lines}. Restore what the run began with, or accept the change with "
            f"--allow-changed {keys}"
        )


def _changes(before: Record, now: Record) -> list[Change]:
    changes = []
    for kind in ("data", "eval", "distill"):
        old = {entry["name"]: entry for entry in before[kind]}
        new = {entry["name"]: entry for entry in now[kind]}
        if kind == "data":
            # Items at the same place may come from a file of another name.
            names = {
                a["name"]: b["name"]
                for a, b in zip(before[kind], now[kind], strict=False)
                if a["sha256"] == b["sha256"] and a["name"] not in new and b["name"] not in old
            }
            old = {names.get(name, name): entry for name, entry in old.items()}
        for name in dict.fromkeys([*old, *new]):
            a, b = old.get(name), new.get(name)
            key = f"{kind}.{name}"
            if a is None or b is None or a["sha256"] != b["sha256"]:
                changes.append((key, _items(a), _items(b)))
                continue
            was, is_ = a.get("options", {}), b.get("options", {})
            for option in sorted(was.keys() | is_.keys()):
                if (x := was.get(option)) != (y := is_.get(option)):
                    changes.append((key, f"{option} {x!r}", f"{option} {y!r}"))
        orders = [[name for name in one if name in old and name in new] for one in (old, new)]
        if kind == "data" and orders[0] != orders[1]:
            first, second = (" ".join(order) for order in orders)
            changes.append(("data", f"the order {first}", f"the order {second}"))
    return changes


def _items(entry: dict[str, Any] | None) -> str:
    return f"{entry['items']} (sha256 {entry['sha256'][:12]})" if entry else "no such source"
