"""The directory of a run, and the checkpoint that it resumes from."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import config
from ..config import strict
from ..runtime import checkpoint, files, lock
from ..runtime.distributed import World, broadcast, broadcast_text


@contextmanager
def owned(run: config.Run, where: World, say: Any) -> Iterator[Callable[[], None]]:
    """Own the run's directory until the end of the block; all processes call it.

    The main process holds the lock. Yields a function for it, which raises ValueError once the
    directory was deleted or taken over; it does nothing on the other processes. A restarted run
    waits for the end of its earlier attempt, which may have died on another machine.

    Raises:
        ValueError: another run is at work in the directory; raised on all processes.
    """
    directory, reason = Path(run.output_dir) / run.name, ""
    with ExitStack() as stack:
        check: Callable[[], None] | None = None
        if where.main:
            patience = 2 * lock.STALE if restarted() else 0.0
            try:
                check = stack.enter_context(lock.owned(directory, patience, say))
                files.remove_partials(directory)
            except OSError as error:
                reason = f"{error.filename}: {error.strerror}"
            except ValueError as error:
                reason = str(error)
        if reason := broadcast_text(reason, where):
            raise ValueError(reason)
        yield check or (lambda: None)


def restarted() -> bool:
    """Return whether torchrun (`--max-restarts`) or SLURM (`--requeue`) started this run again."""
    counts = (os.environ.get(f"{by}_RESTART_COUNT") for by in ("TORCHELASTIC", "SLURM"))
    return any(int(count or 0) > 0 for count in counts)


def find_run(run: config.Run, where: World, say: Any) -> tuple[Path, Path | None]:
    """Return the run's directory, and the newest intact checkpoint if it resumes.

    A restart by torchrun (`--max-restarts`) or SLURM resumes a run that exists, like `--resume`.

    Raises:
        ValueError: the directory holds a run and `resume` is off; it holds none and `resume` is on;
            keys differ from the saved configuration that neither fit a machine nor are allowed to.
    """
    directory = Path(run.output_dir) / run.name
    saved = directory / "config.json"
    if restarted() and not saved.is_file():
        return directory, None
    if not run.resume and not restarted():
        if directory.exists() and any(path.name[0] != "." for path in directory.iterdir()):
            raise ValueError(
                f"{directory}: expected a new directory, found files in it; "
                "resume its run with --resume, or choose another --name"
            )
        return directory, None
    if not saved.is_file():
        raise ValueError(f"{directory}: expected a run to resume, got no config.json")
    before, now = (strict.without_machine(r) for r in (config.load(saved), run))
    changed = set(strict.differences(before, now)) - set(run.allow_changed)
    if changed:
        raise ValueError(
            f"--resume: expected the configuration of {saved}, got other values for "
            f"{', '.join(sorted(changed))}; --allow-changed KEY .. accepts them"
        )
    checkpoints = directory / "checkpoints"
    newest = checkpoint.newest(checkpoints, say, set_aside=True) if where.main else None
    step = broadcast(-1 if newest is None else step_of(newest), where)
    return directory, None if step < 0 else checkpoints / f"step_{step:08d}"


def step_of(path: Path | None) -> int:
    """Return 500 for a checkpoint `step_00000500`, 0 for None."""
    return int(path.name.removeprefix("step_")) if path else 0


def write_config(run: config.Run, directory: Path, start: int) -> None:
    """Write the run's config.json; keep one that differs as `config_until_<start>.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    plain = replace(run, resume=False, allow_changed=(), profile=0)
    resolved = json.dumps(strict.to_dict(plain), indent=2) + "\n"
    if path.is_file() and (before := path.read_text(encoding="utf-8")) != resolved:
        files.write_text(directory / f"config_until_{start}.json", before)
    files.write_text(path, resolved)
