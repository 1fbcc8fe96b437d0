"""The directory of a run, and the checkpoint that it resumes from."""

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .. import config
from ..config import strict
from ..modeling import hf_config
from ..runtime import checkpoint, files, intact, lock, log
from ..runtime.distributed import World, broadcast, broadcast_text, main_works
from . import provenance
from .provenance import READING

IDENTITY = "run.json"  # The run's id, and whether it has saved a checkpoint.


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
                checkpoint.remove_partials(directory / "checkpoints")
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
    A finished run is not resumed, unless its number of steps changes.

    Raises:
        ValueError: the directory holds a run and `resume` is off; it holds none and `resume` is on;
            keys differ from the saved configuration that neither fit a machine nor are allowed to;
            no checkpoint is left where one was saved, or the newest is not the run's; a broken line
            of metrics.jsonl.
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
    before = config.load(saved)
    if is_finished(run, directory):
        _check_config(run, before, saved)
        return directory, None
    logged = log.lines(directory / log.METRICS)
    path = _newest(directory / "checkpoints", where, say)
    if path is None:
        _check_never_saved(directory, logged)
        _check_config(run, before, saved)
        return directory, None
    _check_checkpoint(run, before, path)
    return directory, path


def _newest(checkpoints: Path, where: World, say: Any) -> Path | None:
    """Return the newest intact checkpoint, which the main process finds; all raise its error."""
    newest, reason = None, ""
    with main_works(where, "check"):  # It reads every byte.
        if where.main:
            try:
                newest = intact.newest(checkpoints, say, set_aside=True)
            except (OSError, ValueError) as error:
                reason = str(error)
    if reason := broadcast_text(reason, where):
        raise ValueError(reason)
    step = broadcast(-1 if newest is None else step_of(newest), where)
    return None if step < 0 else checkpoint.path_of(checkpoints, step)


def step_of(path: Path | None) -> int:
    """Return 500 for a checkpoint `step_00000500`, 0 for None."""
    return int(path.name.removeprefix("step_")) if path else 0


def is_finished(run: config.Run, directory: Path) -> bool:
    """Return whether the directory holds the model of a run of as many steps or epochs as `run`."""
    if not (directory / "model" / "config.json").is_file():
        return False
    before = config.load(directory / "config.json")
    return (before.steps, before.epochs) == (run.steps, run.epochs)


# ---- checks ----


def _check_config(run: config.Run, before: config.Run, where: Path, ignore: Any = ()) -> None:
    """Compare the configuration with the saved one, but for the keys `ignore`."""
    a, b = (strict.without_machine(one) for one in (before, run))
    changed = set(strict.differences(a, b)) - set(run.allow_changed) - set(ignore)
    changed -= {key for key in changed if key.partition(".")[0] in ignore}
    if not changed:
        return
    fixed = any(key == "tokenizer" or key.startswith(("model.", "lora.")) for key in changed)
    advice = "another --name begins a new run" if fixed else "--allow-changed KEY .. accepts them"
    raise ValueError(
        f"--resume: expected the configuration of {where}, got other values for "
        f"{', '.join(sorted(changed))}; {advice}"
    )


def _check_never_saved(directory: Path, logged: list[dict[str, Any]]) -> None:
    """Check that a run without a checkpoint never saved one, so that it may start from step 0.

    A run of an earlier version does not tell; its logged steps count as saved.
    """
    identity = _identity(directory)
    if identity.get("saved") or not identity and any(line["step"] > 0 for line in logged):
        raise ValueError(
            f"{directory / 'checkpoints'}: expected the checkpoint that this run saved, found "
            "none; restore it, or begin a new run with another --name"
        )


def _check_checkpoint(run: config.Run, before: config.Run, path: Path) -> None:
    """Check that a checkpoint is this run's and of its step, shape and configuration."""
    state = intact.state(path)
    if state["step"] != step_of(path):
        raise ValueError(
            f"{path}: expected the checkpoint of step {step_of(path)}, got that of step "
            f"{state['step']}; remove it, or rename it to step_{state['step']:08d}"
        )
    own, other = _identity(path.parents[1]).get("id"), state.get("run")
    if own and other and own != other:
        raise ValueError(
            f"{path}: expected a checkpoint of this run, whose id is {own}, got one of run "
            f"{other}; move it out of the directory"
        )
    if "config" in state:
        saved = strict.from_dict(config.Run, state["config"], str(path / intact.STATE))
        _check_config(run, saved, path / intact.STATE, ignore=READING)
    else:
        _check_config(run, before, path.parents[1] / "config.json")
    shape = hf_config.from_checkpoint(path, run.model)
    # A tokenizer may have fewer tokens than the configuration asks for.
    other_shape = [
        f"{field.name} {getattr(shape, field.name)} instead of {getattr(run.model, field.name)}"
        for field in fields(shape)
        if field.name != "vocab_size"
        and getattr(shape, field.name) != getattr(run.model, field.name)
    ]
    if other_shape:
        raise ValueError(f"{path}: expected the run's shape, got {', '.join(other_shape)}")
    if not run.epochs:
        check_steps(run.steps, step_of(path))


def check_record(path: Path, about: dict[str, Any], allowed: Iterable[str], say: Any) -> None:
    """Compare what a run trains on, and for how many steps, with what a checkpoint holds of it.

    Args:
        about: what this run's checkpoints will hold: its config, steps and digests.
        allowed, say: as in `provenance.compare`.

    Raises:
        ValueError: other data, that are not allowed; fewer steps than are done.
    """
    state, done = intact.state(path), step_of(path)
    check_steps(about["steps"], done)
    if "digests" in state:
        provenance.compare(state["digests"], about["digests"], allowed, say)
    else:
        say(f"data   not compared: {path.name} is of an earlier version and holds no digests")
    if (before := state.get("steps", about["steps"])) != about["steps"]:
        say(
            f"steps  {before} became {about['steps']}: the rate from step {done + 1} on is that of "
            f"a schedule of {about['steps']} steps"
        )


def check_steps(steps: int, done: int) -> None:
    """Raise ValueError if a run of `steps` steps has done more."""
    if steps < done:
        raise ValueError(f"steps: expected at least the {done} that are done, got {steps}")


# ---- written ----


def write_config(run: config.Run, directory: Path, start: int) -> str:
    """Write the run's config.json and return its id, a new one for a new run.

    A config.json that differs is kept as `config_until_<start>.json`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    resolved = json.dumps(as_saved(run), indent=2) + "\n"
    if path.is_file() and (before := path.read_text(encoding="utf-8")) != resolved:
        files.write_text(files.free_name(directory / f"config_until_{start}.json"), before)
    files.write_text(path, resolved)
    if not (identity := _identity(directory)):
        saved = checkpoint.path_of(directory / "checkpoints", start)
        known = intact.state(saved).get("run") if start else None
        identity = {"id": known or secrets.token_hex(8), "saved": start > 0}
        _write_identity(directory, identity)
    return str(identity["id"])


def as_saved(run: config.Run) -> dict[str, Any]:
    """Return a configuration as it is saved: without the options of one start."""
    return strict.to_dict(replace(run, resume=False, allow_changed=(), profile=0))


def mark_saved(directory: Path) -> None:
    """Record that the run has saved a checkpoint, so that it never begins again without one."""
    identity = _identity(directory)
    if identity and not identity.get("saved"):
        _write_identity(directory, {**identity, "saved": True})


def set_aside_end(directory: Path, resume_from: Path, say: Any) -> None:
    """Rename report/, adapter/ and model/ of the end that a checkpoint's run came to and now goes
    beyond.
    """
    end = intact.state(resume_from).get("steps", step_of(resume_from))
    # model/ marks a finished run, so it goes last.
    for name in ("report", "adapter", "model"):
        path = directory / name
        if path.is_dir() and any(path.iterdir()):
            aside = path.rename(files.free_name(directory / f"{name}_until_{end}"))
            say(f"kept   {name}/ of step {end} as {aside.name}/")


def _identity(directory: Path) -> dict[str, Any]:
    """Return {"id", "saved"} of a run, {} for a run that has none yet."""
    path = directory / IDENTITY
    if not path.is_file():
        return {}
    identity = files.read_json(path)
    if not isinstance(identity, dict) or not isinstance(identity.get("id"), str):
        raise ValueError(f"{path}: expected an object with the run's id, got another value")
    return identity


def _write_identity(directory: Path, identity: dict[str, Any]) -> None:
    files.write_text(directory / IDENTITY, json.dumps(identity) + "\n")
