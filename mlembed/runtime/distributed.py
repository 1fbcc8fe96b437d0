"""One process or `torchrun`: rank and size, gather with gradient, waiting, and a clean end."""

import gc
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .failures import Failures

# torch 2.13 renamed these two, and warns of the older names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class World:
    """Rank of a process among `size`, and its device; rank 0 writes and prints.

    store: the group's, None for one process. Workers of a loader get a World without it.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = field(default=None, compare=False, repr=False)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def __reduce__(self) -> tuple[Any, ...]:
        return World, (self.rank, self.size, self.device)


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the group that torchrun's environment describes, if any, and leave it at the end.

    Keep models and losses local to a function called inside, and close savers there: gloo aborts
    if graphs that used the group are alive when it is destroyed. `_release` removes some of them.
    If the block fails on one of several processes, `Failures` ends all of them.

    Raises:
        ValueError: `device` is cuda, and there is no CUDA device.
    """
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device for 'cuda', got none")
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    where = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(where)
    if size == 1:
        yield World(rank, size, where)
        return
    store, *_ = next(dist.rendezvous("env://"))
    backend = "nccl" if kind == "cuda" else "gloo"
    part = fresh(store, rank, size)
    failures = Failures(part, rank, size)
    try:
        # Without its device NCCL would guess it in the first collective, and warn.
        own = where if kind == "cuda" else None
        dist.init_process_group(backend, store=part, rank=rank, world_size=size, device_id=own)
        yield World(rank, size, where, part)
    except BaseException as error:
        failures.end(error)
    finally:
        failures.close()
        if dist.is_initialized():
            _release()
            dist.destroy_process_group()


def _release() -> None:
    """Delete references to the process group, so that `destroy_process_group` ends it.

    A DistributedDataParallel that outlives the group would end it in the destructor of its reducer,
    which holds Python's lock while it joins gloo's thread, which waits for that lock to free a
    tensor. So replicas that are still alive lose their reducer here.
    """
    gc.collect()
    for replica in gc.get_objects():
        if type(replica) is DistributedDataParallel:
            for name in ("logger", "reducer"):
                vars(replica).pop(name, None)  # A replica whose construction failed has none.


def gather(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the rows of every process, in rank order, with gradients to all of them.

    Args:
        x: [E, n, D], n = sizes[rank].
        sizes: rows of each process, known to all processes (no extra communication).

    Returns:
        [E, size, D] of each process. The backward sums each row's gradients over processes.
    """
    if len(sizes) == 1:
        return [x]
    # Collectives move equal shapes: shorter shards are padded with rows that are cut off again.
    filled = F.pad(x, (0, 0, 0, max(sizes) - x.shape[1])).contiguous()
    shards = _Gather.apply(filled, len(sizes)).unbind()
    return [shard[:, :n] for shard, n in zip(shards, sizes, strict=True)]


class _Gather(torch.autograd.Function):
    """Gather [E, n, D] of equal shapes -> [processes, E, n, D]; reduce-scatter the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        whole = x.new_empty(size * x.shape[0], *x.shape[1:])
        all_gather(whole, x)
        return whole.view(size, *x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (whole,) = gradients
        own = whole.new_empty(whole.shape[1:])
        reduce_scatter(own, whole.flatten(0, 1).contiguous(), op=dist.ReduceOp.SUM)
        return own, None


def any_process(flag: bool, where: World) -> bool:
    """Return whether the flag is set on any process; Ctrl-C may reach only one of them."""
    if where.size == 1:
        return flag
    shared = torch.tensor([float(flag)], device=where.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


@contextmanager
def main_works(where: World, what: str) -> Iterator[None]:
    """Hold the other processes at the end of the block until the main process has left it, too.

    The main process evaluates and exports alone, while NCCL ends a run whose collective takes ten
    minutes (gloo: thirty). So the others ask the store instead, for as long as it takes. If the
    main process fails or dies, `Failures` or its launcher ends them.

    what: names the work, once in a run.
    """
    yield
    if where.store is None:
        return
    if where.main:
        where.store.set(f"done/{what}", "")
    while not where.store.check([f"done/{what}"]):
        time.sleep(0.05)


def together(where: World, what: str) -> None:
    """Wait until all processes are here, for as long as it takes, unlike in a collective.

    what: names the place, once in a run.
    """
    if where.store is None:
        return
    where.store.add(f"arrived/{what}", 1)
    while where.store.add(f"arrived/{what}", 0) < where.size:
        time.sleep(0.05)


def fresh(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Return a part of the store, shared by all processes, that no earlier attempt wrote to.

    torchrun keeps one store over restarts, which may hold addresses of processes that died. So the
    main process draws a name and answers questions of the others; each question carries a random
    name, so its answer is new, and so is the acknowledgement of that answer.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        name = store.get(f"answer/{question}").decode()
        store.set(f"{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    for other in range(1, size):
        while not store.check([f"{name}/{other}"]):
            store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
            time.sleep(0.01)
    return dist.PrefixStore(name, store)


def broadcast(number: int, where: World) -> int:
    """Return the main process's number (int64) on all processes."""
    if where.size == 1:
        return number
    shared = torch.tensor([number], dtype=torch.int64, device=where.device)
    dist.broadcast(shared, src=0)
    return int(shared.item())


def broadcast_text(text: str, where: World) -> str:
    """Return the main process's text on all processes."""
    if where.size == 1:
        return text
    shared = [text]
    dist.broadcast_object_list(shared, src=0, device=where.device)
    return shared[0]
