"""The directory of a run, and the checkpoint that it resumes from."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import config
from ..config import strict
from ..runtime import files, intact
from ..runtime.distributed import World, broadcast


def find_run(run: config.Run, where: World, say: Any) -> tuple[Path, Path | None]:
    """Return the run's directory, and the newest intact checkpoint if it resumes.

    A restart by torchrun (`--max-restarts`) or SLURM resumes a run that exists, like `--resume`.

    Raises:
        ValueError: the directory holds a run and `resume` is off; it holds none and `resume` is on;
            keys differ from the saved configuration that neither fit a machine nor are allowed to.
    """
    directory = Path(run.output_dir) / run.name
    saved = directory / "config.json"
    counts = (os.environ.get(f"{by}_RESTART_COUNT") for by in ("TORCHELASTIC", "SLURM"))
    restarted = any(int(count or 0) > 0 for count in counts)
    if restarted and not saved.is_file():
        return directory, None
    if not run.resume and not restarted:
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
    newest = intact.newest(checkpoints, say, set_aside=True) if where.main else None
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
