"""Token lists to packed batches: flat rows of tokens and the boundaries between texts.

A pack is ordered by the depth that its texts run to, deepest first, and by length: those that are
there at a layer are a prefix of it, so leaving costs nothing and copies nothing. A step's queries
and documents have packs of their own, each with as much to do as the others.

Letters: N texts, T packed tokens, L layers.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mlembed_kernels import AttentionPlan, TokenIndex


@dataclass(frozen=True)
class SkipLayer:
    """Those that run through a layer which others skip (LayerSkip's dropout): no prefix.

    rows_T: int64, their tokens' rows. work: what attention has to compute among them.
    """

    rows_T: Tensor
    plan: AttentionPlan


@dataclass(frozen=True)
class PackedBatch:
    """N texts end to end, without padding, deepest first.

    ids_T: int64 [T] tokens. pos_T: int64 [T] position of each token in its own text.
    token_index: where each distinct token is, listed on the host once.
    live: (depth, work) by rising depth: up to that layer attention has that work, of a prefix of
    the texts. kept: of layers that some of these skip, by depth.
    """

    ids_T: Tensor
    pos_T: Tensor
    token_index: TokenIndex
    live: tuple[tuple[float, AttentionPlan], ...]
    kept: dict[int, SkipLayer]

    @property
    def plan(self) -> AttentionPlan:
        """Of all texts."""
        return self.live[0][1]

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [N + 1]; text i is ids_T[cu_seqlens[i]:cu_seqlens[i + 1]]."""
        return self.plan.cu_seqlens

    def work_at(self, depth: int) -> AttentionPlan | None:
        """Of the texts that run through layer `depth` (1..), if any do."""
        return next((plan for until, plan in self.live if depth <= until), None)

    def __len__(self) -> int:
        return self.plan.sequences

    def to(self, device: torch.device) -> "PackedBatch":
        kept = {
            depth: SkipLayer(some.rows_T.to(device, non_blocking=True), some.plan.to(device))
            for depth, some in self.kept.items()
        }
        return replace(
            self,
            ids_T=self.ids_T.to(device, non_blocking=True),
            pos_T=self.pos_T.to(device, non_blocking=True),
            token_index=self.token_index.to(device),
            live=tuple((until, plan.to(device)) for until, plan in self.live),
            kept=kept,
        )


def pack(
    texts: Sequence[np.ndarray],
    depths: np.ndarray | None = None,
    runs_LN: np.ndarray | None = None,
) -> PackedBatch:
    """int arrays, one a text, each of at least one token -> PackedBatch.

    Args:
        depths: int [N], the last layer of each text, falling; by default all run as far as there
            are layers.
        runs_LN: bool [L, N], False where a text skips a layer; all run through it by default. Where
            all would skip one, the first does not: gradients and reductions expect every layer.

    Raises:
        ValueError: no texts, a text without tokens (there would be nothing to pool), depths that
            rise or begin below 1.
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
        live = [(int(until), live[0][1]) for until in depths[-1:]]
        for until in np.unique(depths)[1:]:
            there = int((depths >= until).sum())
            live.append((int(until), AttentionPlan.of(torch.from_numpy(bounds[: there + 1]))))
    ids = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    positions = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths))
    packed = PackedBatch(ids, positions, TokenIndex.of(ids), tuple(live), {})
    if runs_LN is None:
        return packed
    return replace(packed, kept=_kept(packed, lengths, runs_LN))


def _kept(batch: PackedBatch, lengths: np.ndarray, runs_LN: np.ndarray) -> dict[int, SkipLayer]:
    kept = {}
    for depth, runs_N in enumerate(runs_LN, 1):
        plan = batch.work_at(depth)
        if plan is None:
            break
        runs_N = runs_N[: plan.sequences].copy()
        runs_N[0] |= not runs_N.any()
        if runs_N.all():
            continue
        bounds = np.concatenate([[0], lengths[: len(runs_N)][runs_N].cumsum()])
        rows = np.flatnonzero(np.repeat(runs_N, lengths[: len(runs_N)]))
        kept[depth] = SkipLayer(torch.from_numpy(rows), AttentionPlan.of(torch.from_numpy(bounds)))
    return kept


# ---- how texts are shared out ----


def budgeted(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row numbers in packs of at most `max_tokens` tokens (a longer text is a pack of its own).

    Rows are sorted by length, so that texts of a pack are alike and attention wastes nothing.
    """
    order = np.argsort(lengths, kind="stable")
    packs, begin, tokens = [], 0, 0
    for at, row in enumerate(order):
        if at > begin and tokens + lengths[row] > max_tokens:
            packs.append(order[begin:at])
            begin, tokens = at, 0
        tokens += int(lengths[row])
    return [*packs, order[begin:]] if len(order) else []


def shared_out(
    lengths: np.ndarray, depths: np.ndarray, shares: int, most: int | None = None
) -> list[np.ndarray]:
    """Row numbers, rising, in shares with as many tokens, at every depth.

    Deepest first and then longest first, each row goes to the share that has fewest tokens yet and
    fewer than `most` rows (LPT): once all of a depth and deeper are given out, shares are even
    there. So `shares` rows of the deepest are on as many shares.
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


def packs(lengths: np.ndarray, depths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row numbers in as few packs of at most `max_tokens` tokens as hold them (a longer text is
    alone), alike in work, each deepest first, then shortest first."""
    found = [np.array([row]) for row in np.flatnonzero(lengths > max_tokens)]
    rest = np.flatnonzero(lengths <= max_tokens)
    count = -(-int(lengths[rest].sum()) // max_tokens)
    while len(rest):
        # Long texts that leave early come last, and may not fit any more: then depths do not count.
        for order in (depths[rest], np.zeros(len(rest))):
            parts = [rest[part] for part in shared_out(lengths[rest], order, count)]
            if all(lengths[part].sum() <= max_tokens for part in parts):
                sort = (np.lexsort((lengths[part], -depths[part])) for part in parts)
                return found + [part[at] for part, at in zip(parts, sort, strict=True)]
        count += 1
    return found
