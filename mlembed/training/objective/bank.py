"""Memory bank: documents of earlier batches as further negatives (MoCo's queue, arXiv 1911.05722).

All processes hold the same bits in the same order, so the checkpoint of one process restores any
number of processes.

Letters: E exits, n documents, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """One process's documents in one micro-batch, deepest first.

    vectors_EnD: [E, n, D] raw, without a graph. ids_n: int64 [n]. counts_E: int64 [E], how many of
    them run to each exit; None: all.
    """

    vectors_EnD: Tensor
    ids_n: Tensor
    counts_E: Tensor | None

    def __len__(self) -> int:
        return len(self.ids_n)

    def to(self, like: Tensor) -> "Shard":
        """Copy to another tensor's device, vectors in its dtype."""
        device, counts = like.device, self.counts_E
        return Shard(
            # A change of dtype on the host would give pageable memory, whose copy waits.
            self.vectors_EnD.to(device, non_blocking=True).to(like.dtype),
            self.ids_n.to(device, non_blocking=True),
            None if counts is None else counts.to(device, non_blocking=True),
        )


@dataclass
class Bank:
    """The newest micro-batches of each source, with at most `capacity` documents together.

    Micro-batches leave as a whole, first in, first out. One of more than `capacity` documents
    leaves the bank of its source empty.

    capacity: documents of each source. host: store them in host memory (pinned if there is a CUDA
    device) instead of on their own device.
    """

    capacity: int
    host: bool
    _batches: dict[str, list[tuple[Shard, ...]]] = field(default_factory=dict)
    _pending: list[tuple[str, tuple[Shard, ...]]] = field(default_factory=list)

    def shards(self, source: str) -> list[Shard]:
        """Return the committed shards of a source, oldest first, processes in rank order."""
        return [shard for batch in self._batches.get(source, ()) for shard in batch]

    def copied(self, shard: Shard) -> Shard:
        """Copy a shard to where the bank stores it, into memory of its own."""
        counts = None if shard.counts_E is None else self._copied(shard.counts_E)
        return Shard(self._copied(shard.vectors_EnD), self._copied(shard.ids_n), counts)

    def _copied(self, x: Tensor) -> Tensor:
        pin = self.host and torch.cuda.is_available()
        device = torch.device("cpu") if self.host else x.device
        out = torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=pin)
        return out.copy_(x.detach(), non_blocking=True)

    def add(self, source: str, shards: Sequence[Shard]) -> None:
        """Add one micro-batch, `copied` and in rank order; it is visible after `commit`."""
        self._pending.append((source, tuple(shards)))

    def commit(self) -> None:
        """Make the added micro-batches visible: the step was taken."""
        for source, batch in self._pending:
            batches = self._batches.setdefault(source, [])
            batches.append(batch)
            while sum(len(shard) for old in batches for shard in old) > self.capacity:
                batches.pop(0)
        self._pending.clear()

    def discard(self) -> None:
        """Drop the added micro-batches: the step was skipped."""
        self._pending.clear()

    def state(self) -> dict[str, Tensor]:
        """Return committed tensors: <source>.<micro-batch>.<process>.vectors, .ids and .counts."""
        if self.host and torch.cuda.is_available():
            # Copies to pinned memory may still run.
            torch.cuda.synchronize()
        tensors: dict[str, Tensor] = {}
        for source, batches in self._batches.items():
            for number, batch in enumerate(batches):
                for process, shard in enumerate(batch):
                    name = f"{source}.{number}.{process}"
                    tensors[f"{name}.vectors"] = shard.vectors_EnD
                    tensors[f"{name}.ids"] = shard.ids_n
                    if shard.counts_E is not None:
                        tensors[f"{name}.counts"] = shard.counts_E
        return tensors

    def load(self, tensors: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Replace all shards by those that `state` returned.

        Args:
            device: where a bank that is not on the host stores them; by default where they are.

        Raises:
            ValueError: vectors without ids.
        """
        batches: dict[str, dict[int, list[Shard]]] = {}
        for source, number, process in sorted({_place(name) for name in tensors}):
            name = f"{source}.{number}.{process}"
            parts = [tensors.get(f"{name}.{part}") for part in ("vectors", "ids", "counts")]
            if parts[1] is None:
                raise ValueError(f"{name}.vectors: expected its ids in the checkpoint, got none")
            parts = [x if x is None or self.host else x.to(device) for x in parts]
            shard = self.copied(Shard(*parts))  # type: ignore[arg-type]
            batches.setdefault(source, {}).setdefault(number, []).append(shard)
        self._pending.clear()
        self._batches = {
            source: [tuple(shards) for shards in numbered.values()]
            for source, numbered in batches.items()
        }


def _place(name: str) -> tuple[str, int, int]:
    """Split the name of a tensor into source, which may contain dots, micro-batch and process."""
    source, number, process, _ = name.rsplit(".", 3)
    return source, int(number), int(process)
