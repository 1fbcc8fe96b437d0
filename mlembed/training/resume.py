"""A run's directory: new, or one to go on with, from the newest checkpoint that is whole."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import config
from ..config import strict
from ..runtime import checkpoint, files
from ..runtime.distributed import World, broadcast


def find_run(run: config.Run, where: World, say: Any) -> tuple[Path, Path | None]:
    """-> (directory, checkpoint to go on from). A directory that holds another run is refused.

    A restart by torchrun (`--max-restarts`) or SLURM goes on with what there is, as `resume` does.
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
                f"{directory}: expected no run there yet, found one; "
                "go on with it by --resume, or choose another --name"
            )
        return directory, None
    if not saved.is_file():
        raise ValueError(f"{directory}: expected a run to resume, found none")
    before, now = (fields_to_match(r) for r in (config.load(saved), run))
    differing = set(strict.differences(before, now)) - set(run.allow_changed)
    if differing:
        raise ValueError(
            f"--resume: expected the configuration of {saved}, got other values for "
            + ", ".join(sorted(differing))
            + "; --allow-changed KEY .. takes them"
        )
    checkpoints = directory / "checkpoints"
    newest = checkpoint.newest(checkpoints, say, set_aside=True) if where.main else None
    step = broadcast(-1 if newest is None else step_of(newest), where)
    return directory, None if step < 0 else checkpoints / f"step_{step:08d}"


def step_of(found: Path | None) -> int:
    """Steps that are done in a checkpoint `step_00000500`; 0 without one."""
    return int(found.name.removeprefix("step_")) if found else 0


def fields_to_match(run: config.Run) -> dict[str, Any]:
    """What has to be the same to go on with a run. What fits a machine has not: the next one may
    lack an attention or a compiler, have less memory, or be more of them."""
    plain = config.Run()
    machine = (
        *("compile", "activation_checkpointing", "activation_gib", "gradient_cache", "engine"),
        *("cpu_offload", "save_async", "non_finite", "allow_changed", "resume"),
        "loader_workers",
    )
    return strict.to_dict(
        replace(
            run,
            model=replace(run.model, attention="auto"),
            loss=replace(run.loss, negatives_across="gather", bank_on="device"),
            **{name: getattr(plain, name) for name in machine},
        )
    )


def write_config(run: config.Run, directory: Path, start: int) -> None:
    """The run's config.json; one that said otherwise until `start` is kept beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    plain = replace(run, resume=False, allow_changed=())
    resolved = json.dumps(strict.to_dict(plain), indent=2) + "\n"
    if path.is_file() and (before := path.read_text(encoding="utf-8")) != resolved:
        files.write_text(directory / f"config_until_{start}.json", before)
    files.write_text(path, resolved)
