"""Save and find training state. A checkpoint is complete or it is not there.

`checkpoints/step_00000500/` is a model directory like any other (export and encode read it) plus
`training.safetensors` (optimiser moments, random state) and `state.json`. It is written under
another name, flushed to disk, then renamed; only then are older ones deleted.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TRAINING = "training.safetensors"
STATE = "state.json"


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


def save(
    directory: Path,
    step: int,
    write_model: Callable[[Path], None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write `directory/step_<step>` and delete all but the `keep` newest.

    Args:
        write_model: writes the model and its tokenizer into a directory.
        keep: how many to keep, the new one included.

    Raises:
        ValueError: it could not be written; earlier checkpoints are untouched.
    """
    target = directory / f"step_{step:08d}"
    if (target / STATE).is_file():  # saved already, by the same step of the same run
        return target
    tensors = {f"optimizer.{n}": t for n, t in optimizer_tensors(model, optimizer).items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    with atomic_directory(target) as partial:
        write_model(partial)
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, partial / TRAINING)
        (partial / STATE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
    for old in complete(directory)[:-keep]:
        (old / STATE).unlink()  # first: a deletion that is interrupted leaves nothing complete
        shutil.rmtree(old)
    return target


def complete(directory: Path) -> list[Path]:
    """All checkpoints in a directory, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step_*/{STATE}"))


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Give optimiser and random generators their saved state; -> the contents of `state.json`."""
    tensors = load_file(path / TRAINING)
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"optimizer.{names[parameter]}."
            found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            optimizer.state[parameter] = {
                key: value.to(parameter.device)  # step, too: a fused optimiser has it there
                for key, value in found.items()
            }
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>.<key>` tensors (moments and step counts)."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
