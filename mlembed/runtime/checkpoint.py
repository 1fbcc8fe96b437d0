"""Save and load checkpoints of training, atomically and with a hash of every file.

`checkpoints/step_00000500/` holds safetensors, written by torch.distributed.checkpoint, with the
shards of every process: `model.<name>`, `optimizer.<parameter>.<key>`, `rng.<device>.<rank>`, and
further tensors of the run. Next to them are the json files of a model directory, so that encode and
export read it, and `state.json`: the step, the number of processes, size and sha256 of every file.
A checkpoint is written under another name, flushed to disk, then renamed; then older ones are
deleted.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.fsdp import FSDPModule

from . import intact
from .files import SHARDS, flush
from .intact import STATE, complete, seal_of, sha256_of

FILE = 2**30  # Approximate bytes of a file, which is assembled in memory before it is written.

# A single process has no group. The filter is global, since filters of threads do not exist.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

# Processes wait for the slowest one to write, and notice at once if it dies.
WRITING = timedelta(days=7)

T = TypeVar("T")


# ---- saving ----


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int
) -> dict[str, Tensor]:
    """Return weights, the optimiser's moments and step counts, and this process's random state.

    The tensors are not copies; DTensors stay DTensors.

    Args:
        model: without DistributedDataParallel around it. Parameters that FSDP2 has gathered are
            resharded, since the optimiser refers to the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors[f"rng.cpu.{rank}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state()
    return tensors


def path_of(directory: Path, step: int) -> Path:
    """Return the directory of a step's checkpoint."""
    return directory / f"step_{step:08d}"


class Saver:
    """Write the checkpoints of a run while training continues, one at a time.

    All processes construct, use and close it together. As a context manager it waits at its end for
    the checkpoint being written: gloo aborts if the process group ends first.

    Args:
        directory: `checkpoints`, shared by all processes; no other run writes there.
        rank, size: this process, and the number of processes.
        keep: number of checkpoints to keep, the new one included; that of `best` stays, too.
        about: further contents of each `state.json`, of the main process.
        saved: called by the main process when a checkpoint is complete.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        size: int,
        keep: int,
        about: dict[str, Any] | None = None,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory, self.rank, self.size, self.keep = directory, rank, size, keep
        self.about, self.saved = about or {}, saved
        self.best = 0
        # A group of its own, so that the writing thread's messages and training's do not mix.
        self.group = dist.new_group(backend="gloo", timeout=WRITING) if size > 1 else None
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def save(
        self, step: int, tensors: dict[str, Tensor], write_beside: Callable[[Path], None]
    ) -> None:
        """Write `step_<step>`, unless it is there already, and delete all but the `keep` newest
        and that of the step `best`.

        Waits for the checkpoint before it, then copies the tensors to host memory; once this
        returns, tensors may change.

        Args:
            tensors: by name. A DTensor is written in shards. Another tensor that several processes
                name must be equal on all of them; one process writes it.
            write_beside: writes config.json and the like into a directory, in the background of
                the main process.

        Raises:
            ValueError: the checkpoint before it could not be written; raised on all processes.
                Earlier checkpoints are untouched.
        """
        self.wait()
        form = torch.contiguous_format
        # Copies of DTensors are DTensors in host memory.
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=form)
            for name, tensor in tensors.items()
        }
        self.writing = self.thread.submit(self._write, step, copies, write_beside, self.best)

    def wait(self) -> None:
        """Wait until the checkpoint being written is on disk.

        Raises:
            ValueError: it could not be written. Raised once; later calls return immediately.
        """
        if (writing := self.writing) is not None:
            wait_for([writing])  # A call that is interrupted here can be repeated.
            self.writing = None
            writing.result()

    def close(self) -> None:
        """`wait`, then end the thread and its process group. Raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            if self.group is not None:
                dist.destroy_process_group(self.group)
                self.group = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except ValueError:
            if error is None:  # An error that ended the block comes first.
                raise

    def _write(
        self,
        step: int,
        tensors: dict[str, Tensor],
        write_beside: Callable[[Path], None],
        best: int,
    ) -> None:
        """Write a checkpoint; all processes call it together."""
        target = path_of(self.directory, step)
        partial = target.with_name(f".{target.name}.partial")
        try:
            if not self._on_main(lambda: _begin(target, partial, self.about.get("run"))):
                return
            with _one_line_failures():
                dcp.save(
                    tensors,  # type: ignore[arg-type]  # a dict is invariant
                    storage_writer=_Writer(str(partial), save_distributed=True),
                    process_group=self.group,
                    no_dist=self.size == 1,
                )
            files: dict[str, Any] = {}
            for written in self._everywhere(lambda: self._written(partial, write_beside)):
                files |= written
            state = {"step": step, "processes": self.size, "files": dict(sorted(files.items()))}
            self._on_main(lambda: _finish({**self.about, **state}, partial, target))
            self._on_main(self.saved)
        except (ValueError, RuntimeError) as error:  # gloo raises RuntimeError if a process dies.
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"{target}: could not be written: {error}") from error
        self._on_main(lambda: _prune(target, self.keep, path_of(self.directory, best)))

    def _written(self, partial: Path, write_beside: Callable[[Path], None]) -> dict[str, Any]:
        """Flush the files that this process wrote; return the size and sha256 of each.

        The main process writes the files next to the shards as well.
        """
        paths = list(partial.glob(f"shard-{self.rank + 1:05d}-*.safetensors"))
        if self.rank == 0:
            write_beside(partial)
            others = set(partial.rglob("*")) - set(partial.glob(SHARDS))
            paths += [path for path in others if path.is_file()]
        for path in paths:
            flush(path)
        sums = sha256_of(paths)
        return {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sum}
            for path, sum in zip(paths, sums, strict=True)
        }

    def _everywhere(self, what: Callable[[], T]) -> list[T]:
        """Return the results of `what()` on every process, in rank order.

        Raises:
            ValueError: it failed on one process; all processes raise it, so that none waits.
        """
        mine: tuple[T | None, str | None]
        cause = None
        try:
            mine = what(), None
        except Exception as error:
            known = isinstance(error, OSError | ValueError | SafetensorError)
            mine = None, str(error) if known else f"{type(error).__name__}: {error}"
            cause = error
        results: list[Any] = [mine]
        if self.group is not None:
            results = [None] * self.size
            dist.all_gather_object(results, mine, group=self.group)
        for _, reason in results:
            if reason is not None:
                raise ValueError(reason) from cause
        return [result for result, _ in results]

    def _on_main(self, what: Callable[[], T]) -> T | None:
        """Return the result of the main process's `what()` on all. Raises like `_everywhere`."""
        return self._everywhere(lambda: what() if self.rank == 0 else None)[0]


class _Writer(dcp.HuggingFaceStorageWriter):
    """Writer of several files a process, each of about FILE bytes and one kind (model, rng, ..)."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Assign tensors to files; the main process calls it with the plans of all processes."""
        sizes = {
            item.index.fqn: item.tensor_data.properties.dtype.itemsize
            * item.tensor_data.size.numel()
            for plan in plans
            for item in plan.items
            if item.tensor_data is not None
        }
        files: dict[str, int] = {}
        last, room = "", 0
        for name in sorted(sizes):
            kind = name.partition(".")[0]
            new = kind != last or room < sizes[name]
            # Processes share a tensor, or the tensors, so each writes about one part of FILE.
            room = (FILE * len(plans) if new else room) - sizes[name]
            files[name] = max(files.values(), default=0) + new
            last = kind
        self.fqn_to_index_mapping = files
        return super().prepare_global_plan(plans)


def _begin(target: Path, partial: Path, run: str | None) -> bool:
    """Prepare the directory of a checkpoint; return False if the run has saved it before."""
    if (target / STATE).is_file():
        if run and (other := intact.state(target).get("run", run)) != run:
            raise ValueError(f"expected a new directory, got a checkpoint of run {other}")
        return False
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError("expected a new directory, got one with other files")
    remove_partials(target.parent)
    target.parent.mkdir(exist_ok=True)  # A run's directory that was deleted is an error.
    partial.mkdir()
    return True


def remove_partials(directory: Path) -> None:
    """Remove what killed processes left of checkpoints; only the owner of the run may call it."""
    for left in directory.glob(".step_*.partial"):
        shutil.rmtree(left)


def _finish(state: dict[str, Any], partial: Path, target: Path) -> None:
    """Write `state.json`, flush everything to disk, and give the checkpoint its name."""
    for name, file in state["files"].items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise ValueError(f"{name}: expected a directory that all processes share")
    text = json.dumps({**state, "sha256": seal_of(state)}, indent=1) + "\n"
    (partial / STATE).write_text(text, encoding="utf-8")
    flush(partial / STATE)
    for path in (*partial.rglob("*"), partial):
        if path.is_dir():
            flush(path)
    partial.rename(target)  # This replaces an empty directory, never a full one.
    flush(target.parent)


def _prune(newest: Path, keep: int, best: Path) -> None:
    """Delete all but the newest checkpoints, intact and damaged, and the best one.

    Raises ValueError if one that is to be deleted stays.

    Checkpoints of later steps than the run's newest are not its own, and stay.
    """
    damaged = sorted(newest.parent.glob("damaged_step_*"))
    own = [path for path in complete(newest.parent) if path.name <= newest.name]
    for old in (*(path for path in own[:-keep] if path != best), *damaged[:-keep]):
        try:  # The next `_begin` ends a deletion that is interrupted.
            shutil.rmtree(old.rename(old.with_name(f".step_{old.name}.partial")))
        except OSError as error:
            raise ValueError(f"{old}: could not be deleted: {error}") from None


@contextmanager
def _one_line_failures() -> Iterator[None]:
    """Raise torch.distributed.checkpoint's exception, a BaseException, as a ValueError."""
    try:
        yield
    except dcp.CheckpointException as error:
        failures = [f"process {rank}: {one}" for rank, (one, _) in error.failures.items()]
        raise ValueError("; ".join(failures)) from error


# ---- loading ----


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, size: int
) -> dict[str, Any]:
    """Load a model, its optimiser and this process's random state in place.

    Every process reads its own shards, independent of how many processes saved them. Random
    generators stay unchanged if another number of processes saved.

    Args:
        model: without DistributedDataParallel around it; values are converted to its dtypes.
        optimizer: optimiser of this model; gets state, in the saved dtypes, for the parameters that
            had state.

    Returns:
        the contents of `state.json`.

    Raises:
        ValueError: names or shapes differ from the model's; files that cannot be read.
    """
    state = intact.state(path)
    stored = _stored(path)
    into = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    moments: dict[str, list[str]] = {}
    for name in stored:
        if name.startswith("optimizer."):
            moments.setdefault(name.split(".", 1)[1].rpartition(".")[0], []).append(name)
    names = {p: name for name, p in model.named_parameters()}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        # These optimisers expect `step` on the device.
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            for name in moments.get(names[parameter], ()):
                made = _empty_state(parameter, stored[name], on_device)
                optimizer.state[parameter][name.rpartition(".")[2]] = made
                into[name] = made
    kinds = ("model.", "optimizer.")
    expected = {name for name in stored if name.startswith(kinds)}
    for name in sorted(expected | into.keys()):
        got = list(stored[name].size) if name in stored else "none"
        want = list(into[name].shape) if name in into else "none"
        if got != want:
            raise ValueError(f"{path}: {name}: expected shape {want}, got {got}")
    own = (f"rng.cpu.{rank}", f"rng.cuda.{rank}") if state.get("processes") == size else ()
    rng = {
        name: torch.empty(stored[name].size, dtype=torch.uint8) for name in own if name in stored
    }
    _load(path, {**into, **rng})
    for name, value in rng.items():
        if name.startswith("rng.cpu."):
            torch.set_rng_state(value)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(value)
    return state


def _empty_state(parameter: Tensor, stored: TensorStorageMetadata, on_device: bool) -> Tensor:
    """Return an empty moment, sharded like the parameter, or an empty step count."""
    if not stored.size:
        device = parameter.device if on_device else torch.device("cpu")
        return torch.zeros((), dtype=stored.properties.dtype, device=device)
    return torch.zeros_like(parameter, dtype=stored.properties.dtype, requires_grad=False)


def read(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the full tensors whose names begin with `prefix`, on the CPU; needs no process group.

    Raises:
        ValueError: files that are missing or cannot be read.
    """
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in _stored(path).items()
        if name.startswith(prefix)
    }
    _load(path, tensors)
    return tensors


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Return shape, dtype and shards of every tensor.

    A missing shard is a ValueError: torch would leave its elements unwritten.
    """
    try:
        tensors = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: could not be read: {error}") from None
    for name, one in tensors.items():
        assert isinstance(one, TensorStorageMetadata)
        if sum(chunk.sizes.numel() for chunk in one.chunks) != one.size.numel():
            raise ValueError(f"{path}: {name}: expected all of its shards, some are missing")
    return tensors  # type: ignore[return-value]  # The loop has narrowed the type.


def _load(path: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors in place; each process reads its own shards and waits for no other."""
    if into:
        try:
            with _one_line_failures():
                reader = dcp.HuggingFaceStorageReader(str(path))
                dcp.load(into, storage_reader=reader, no_dist=True)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{path}: could not be read: {error}") from error
