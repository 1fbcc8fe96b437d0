"""Documents of earlier batches, kept as further negatives (MoCo's queue, arXiv 1911.05722).

A bank is replicated: all processes hold the same bits in the same order, so that a checkpoint of
one is a checkpoint of all, whatever their number.

Letters: E exits, n documents, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """One process's documents in one micro-batch, deepest first.

    vectors_EnD: [E, n, D] raw, without a graph. ids_n: int64 [n]. counts_E: int64 [E], how many
    of them are present at each exit; None: all.
    """

    vectors_EnD: Tensor
    ids_n: Tensor
    counts_E: Tensor | None

    def __len__(self) -> int:
        return len(self.ids_n)

    def to(self, like: Tensor) -> "Shard":
        """On another tensor's device, vectors in its dtype."""
        device, counts = like.device, self.counts_E
        return Shard(
            self.vectors_EnD.to(device, like.dtype, non_blocking=True),
            self.ids_n.to(device, non_blocking=True),
            None if counts is None else counts.to(device, non_blocking=True),
        )


@dataclass
class Bank:
    """Per source the newest whole micro-batches of at most `capacity` documents together.

    Older ones are dropped as a whole, first in, first out; one that alone has more than `capacity`
    documents leaves nothing, neither itself nor what was there.

    capacity: documents, of each source. host: keep them in host memory (pinned, where there is a
    CUDA device) instead of where they come from.
    """

    capacity: int
    host: bool
    _held: dict[str, list[tuple[Shard, ...]]] = field(default_factory=dict)
    _pending: list[tuple[str, tuple[Shard, ...]]] = field(default_factory=list)

    def shards(self, source: str) -> list[Shard]:
        """Of all committed micro-batches of a source, oldest first, processes in rank order."""
        return [shard for batch in self._held.get(source, ()) for shard in batch]

    def copied(self, shard: Shard) -> Shard:
        """A copy that shares no memory with the batch's tensors, where this bank keeps its own."""
        counts = None if shard.counts_E is None else self._copied(shard.counts_E)
        return Shard(self._copied(shard.vectors_EnD), self._copied(shard.ids_n), counts)

    def _copied(self, x: Tensor) -> Tensor:
        pin = self.host and torch.cuda.is_available()
        device = torch.device("cpu") if self.host else x.device
        out = torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=pin)
        return out.copy_(x.detach(), non_blocking=True)

    def add(self, source: str, shards: Sequence[Shard]) -> None:
        """One micro-batch, as `copied` returned it, in rank order; not seen before `commit`."""
        self._pending.append((source, tuple(shards)))

    def commit(self) -> None:
        """From now on what was added is seen: the step was taken."""
        for source, batch in self._pending:
            held = self._held.setdefault(source, [])
            held.append(batch)
            while sum(len(shard) for old in held for shard in old) > self.capacity:
                held.pop(0)
        self._pending.clear()

    def discard(self) -> None:
        """Forget what was added: the step was skipped."""
        self._pending.clear()

    def state(self) -> dict[str, Tensor]:
        """What is committed: `<source>.<micro-batch>.<process>.vectors`, `.ids` and `.counts`."""
        if self.host and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to pinned memory may be under way
        tensors: dict[str, Tensor] = {}
        for source, batches in self._held.items():
            for number, batch in enumerate(batches):
                for process, shard in enumerate(batch):
                    name = f"{source}.{number}.{process}"
                    tensors[f"{name}.vectors"] = shard.vectors_EnD
                    tensors[f"{name}.ids"] = shard.ids_n
                    if shard.counts_E is not None:
                        tensors[f"{name}.counts"] = shard.counts_E
        return tensors

    def load(self, tensors: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Hold what `state` returned and nothing else.

        Args:
            device: where a bank that is not on the host keeps it; by default where it is.
        """
        found: dict[str, dict[int, dict[int, Shard]]] = {}
        for name, vectors in tensors.items():
            source, number, process, kind = name.rsplit(".", 3)  # sources may have dots as well
            if kind != "vectors":
                continue
            rest = [tensors.get(f"{source}.{number}.{process}.{key}") for key in ("ids", "counts")]
            if rest[0] is None:
                raise ValueError(f"{name}: expected its ids beside it, got none")
            parts = [x if x is None or self.host else x.to(device) for x in (vectors, *rest)]
            batch = found.setdefault(source, {}).setdefault(int(number), {})
            batch[int(process)] = self.copied(Shard(*parts))  # type: ignore[arg-type]
        self._pending.clear()
        self._held = {
            source: [
                tuple(shard for _, shard in sorted(b.items())) for _, b in sorted(all_.items())
            ]
            for source, all_ in found.items()
        }
