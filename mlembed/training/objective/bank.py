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
class Slab:
    """One process's documents in one micro-batch, deepest first.

    vectors_EnD: [E, n, D] raw, without a graph. ids_n: int64 [n]. counts_E: int64 [E], how many
    of them are present at each exit; None: all.
    """

    vectors_EnD: Tensor
    ids_n: Tensor
    counts_E: Tensor | None

    def __len__(self) -> int:
        return len(self.ids_n)

    def to(self, like: Tensor) -> "Slab":
        """On another tensor's device, vectors in its dtype."""
        device, counts = like.device, self.counts_E
        return Slab(
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
    _held: dict[str, list[tuple[Slab, ...]]] = field(default_factory=dict)
    _pending: list[tuple[str, tuple[Slab, ...]]] = field(default_factory=list)

    def slabs(self, source: str) -> list[Slab]:
        """Of all committed micro-batches of a source, oldest first, processes in rank order."""
        return [slab for batch in self._held.get(source, ()) for slab in batch]

    def copied(self, slab: Slab) -> Slab:
        """A copy that shares no memory with the batch's tensors, where this bank keeps its own."""
        counts = None if slab.counts_E is None else self._copied(slab.counts_E)
        return Slab(self._copied(slab.vectors_EnD), self._copied(slab.ids_n), counts)

    def _copied(self, x: Tensor) -> Tensor:
        pin = self.host and torch.cuda.is_available()
        device = torch.device("cpu") if self.host else x.device
        out = torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=pin)
        return out.copy_(x.detach(), non_blocking=True)

    def add(self, source: str, slabs: Sequence[Slab]) -> None:
        """One micro-batch, as `copied` returned it, in rank order; not seen before `commit`."""
        self._pending.append((source, tuple(slabs)))

    def commit(self) -> None:
        """From now on what was added is seen: the step was taken."""
        for source, batch in self._pending:
            held = self._held.setdefault(source, [])
            held.append(batch)
            while sum(len(slab) for old in held for slab in old) > self.capacity:
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
                for process, slab in enumerate(batch):
                    name = f"{source}.{number}.{process}"
                    tensors[f"{name}.vectors"] = slab.vectors_EnD
                    tensors[f"{name}.ids"] = slab.ids_n
                    if slab.counts_E is not None:
                        tensors[f"{name}.counts"] = slab.counts_E
        return tensors

    def load(self, tensors: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Hold what `state` returned and nothing else.

        Args:
            device: where a bank that is not on the host keeps it; by default where it is.
        """
        found: dict[str, dict[int, dict[int, Slab]]] = {}
        for name, vectors in tensors.items():
            source, number, process, kind = name.rsplit(".", 3)  # sources may have dots as well
            if kind != "vectors":
                continue
            rest = [tensors.get(f"{source}.{number}.{process}.{key}") for key in ("ids", "counts")]
            if rest[0] is None:
                raise ValueError(f"{name}: expected its ids beside it, got none")
            parts = [x if x is None or self.host else x.to(device) for x in (vectors, *rest)]
            batch = found.setdefault(source, {}).setdefault(int(number), {})
            batch[int(process)] = self.copied(Slab(*parts))  # type: ignore[arg-type]
        self._pending.clear()
        self._held = {
            source: [tuple(slab for _, slab in sorted(b.items())) for _, b in sorted(all_.items())]
            for source, all_ in found.items()
        }
