"""Pack token lists end to end, and split texts into packs of even work.

A pack is ordered by the depth to which its texts run, deepest first, then by length: the texts that
reach a layer are a prefix of the pack, so texts that exit cost no copy. A step's queries and
documents share packs: the model is the same for both.

Letters: N texts, T packed tokens, L layers.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mlembed_kernels import AttentionPlan, TokenIndex

from ..runtime import transfer


@dataclass(frozen=True)
class SkipLayer:
    """The texts that run through a layer that others skip (LayerSkip's layer dropout).

    rows_T: int64, rows of their tokens in the pack. plan: attention among these texts.
    """

    rows_T: Tensor
    plan: AttentionPlan


@dataclass(frozen=True)
class PackedBatch:
    """N texts end to end, without padding, deepest first.

    ids_T: int64 [T], tokens. pos_T: int64 [T], position of each token in its text. token_index:
    where each distinct token occurs. live: (depth, plan) by rising depth; up to that layer
    attention follows the plan, of a prefix of the texts. skip_layers: by depth, the layers that
    some texts skip.
    """

    ids_T: Tensor
    pos_T: Tensor
    token_index: TokenIndex
    live: tuple[tuple[float, AttentionPlan], ...]
    skip_layers: dict[int, SkipLayer]

    @property
    def plan(self) -> AttentionPlan:
        """Attention among all texts."""
        return self.live[0][1]

    @property
    def cu_seqlens(self) -> Tensor:
        """Boundaries, int32 [N + 1]; text i is ids_T[cu_seqlens[i]:cu_seqlens[i + 1]]."""
        return self.plan.cu_seqlens

    def plan_at(self, depth: int) -> AttentionPlan | None:
        """Return the plan of the texts that run through layer `depth` (1..), None without any."""
        return next((plan for until, plan in self.live if depth <= until), None)

    def __len__(self) -> int:
        return self.plan.sequences

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the pack on a device, by one copy that the host does not wait for."""
        return transfer.moved(self, device)


def pack(
    texts: Sequence[np.ndarray],
    depths: np.ndarray | None = None,
    runs_LN: np.ndarray | None = None,
) -> PackedBatch:
    """Pack token arrays, one a text.

    Args:
        texts: integers, at least one a text.
        depths: int [N], the last layer of each text, falling; by default no text exits early.
        runs_LN: bool [L, N], False where a text skips a layer. If all would skip a layer, the first
            runs through it: gradients and reductions expect every layer.

    Raises:
        ValueError: no texts, a text without tokens, depths that rise or are below 1.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() < 1:
        raise ValueError(
            f"texts: expected one or more, each of one or more tokens, got lengths {lengths[:20]}"
        )
    bounds = np.concatenate([[0], lengths.cumsum()])
    live: list[tuple[float, AttentionPlan]] = [(np.inf, AttentionPlan.of(torch.from_numpy(bounds)))]
    if depths is not None:
        if len(depths) != len(lengths) or (np.diff(depths) > 0).any() or depths[-1] < 1:
            raise ValueError(f"depths: expected one a text, falling, from 1 on, got {depths[:20]}")
        live = [(int(depths[-1]), live[0][1])]
        for until in np.unique(depths)[1:]:
            prefix = bounds[: int((depths >= until).sum()) + 1]
            live.append((int(until), AttentionPlan.of(torch.from_numpy(prefix))))
    ids = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    positions = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths))
    packed = PackedBatch(ids, positions, TokenIndex.of(ids), tuple(live), {})
    if runs_LN is None:
        return packed
    return replace(packed, skip_layers=_skip_layers(packed, lengths, runs_LN))


def _skip_layers(
    batch: PackedBatch, lengths: np.ndarray, runs_LN: np.ndarray
) -> dict[int, SkipLayer]:
    layers = {}
    for depth, runs_N in enumerate(runs_LN, 1):
        plan = batch.plan_at(depth)
        if plan is None:
            break
        runs_N = runs_N[: plan.sequences].copy()
        runs_N[0] |= not runs_N.any()
        if runs_N.all():
            continue
        bounds = np.concatenate([[0], lengths[: len(runs_N)][runs_N].cumsum()])
        rows = torch.from_numpy(np.flatnonzero(np.repeat(runs_N, lengths[: len(runs_N)])))
        layers[depth] = SkipLayer(rows, AttentionPlan.of(torch.from_numpy(bounds)))
    return layers


# ---- which texts share a pack ----


def budgeted(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Return row numbers in packs of at most `max_tokens` tokens; a longer text is a pack alone.

    Rows are sorted by length, so texts of a pack have similar lengths and attention wastes nothing.
    """
    order = np.argsort(lengths, kind="stable")
    packs, begin, tokens = [], 0, 0
    for at, row in enumerate(order):
        if at > begin and tokens + lengths[row] > max_tokens:
            packs.append(order[begin:at])
            begin, tokens = at, 0
        tokens += int(lengths[row])
    return [*packs, order[begin:]] if len(order) else []


def even_shares(
    lengths: np.ndarray, depths: np.ndarray, shares: int, most: int | None = None
) -> list[np.ndarray]:
    """Return rising row numbers in shares of about equal tokens at every depth.

    Deepest first and then longest first, each row goes to the share with the fewest tokens so far
    and fewer than `most` rows (LPT), so shares are even once all rows of a depth and deeper are
    placed. `shares` rows of the greatest depth therefore go to as many shares.
    """
    if shares == 1:
        return [np.arange(len(lengths))]
    parts: list[list[int]] = [[] for _ in range(shares)]
    open_shares = [(0, share) for share in range(shares)]
    for row in np.lexsort((-lengths, -depths)).tolist():
        total, share = heapq.heappop(open_shares)
        parts[share].append(row)
        if most is None or len(parts[share]) < most:
            heapq.heappush(open_shares, (total + int(lengths[row]), share))
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def even_packs(lengths: np.ndarray, depths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Return row numbers in as few packs of at most `max_tokens` tokens as hold them, of about
    equal work, each deepest first, then shortest first. A longer text is a pack alone.
    """
    packs = [np.array([row]) for row in np.flatnonzero(lengths > max_tokens)]
    rest = np.flatnonzero(lengths <= max_tokens)
    count = -(-int(lengths[rest].sum()) // max_tokens)
    while len(rest):
        # Long texts that leave early come last and may no longer fit; then depths do not count.
        for order in (depths[rest], np.zeros(len(rest))):
            parts = [rest[part] for part in even_shares(lengths[rest], order, count)]
            if all(lengths[part].sum() <= max_tokens for part in parts):
                sort = (np.lexsort((lengths[part], -depths[part])) for part in parts)
                return packs + [part[at] for part, at in zip(parts, sort, strict=True)]
        count += 1
    return packs
