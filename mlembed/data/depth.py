"""Draw how deep each text runs in training, and which layers it skips.

Everything is drawn on the host from the random generator that the caller passes, so draws are equal
on all processes and after a resume.

Letters: G groups, N texts, L layers.
"""

import numpy as np

from .. import config


def draw_depths(
    tokens_G: np.ndarray,
    cfg: config.Depth,
    last: int,
    rng: np.random.Generator,
    least: int = 1,
) -> np.ndarray:
    """Return the layer after which each group leaves, int64 [G].

    The draw is stratified: groups line up at random, deepest share first, and a group gets the
    depth of the share in which the middle of its tokens lies. At every step and depth the tokens
    match the depth's share of the batch up to half a group at either end; independent draws would
    give some steps, and some processes, more work than others.

    Args:
        tokens_G: int [G], tokens of each group's texts.
        last: number of layers; without cfg.exits every group runs to the last one.
        least: minimum number of groups that run to the last layer.
    """
    if not cfg.exits:
        return np.full(len(tokens_G), last, dtype=np.int64)
    exits = np.array(cfg.exits[::-1], dtype=np.int64)
    shares = np.array(cfg.shares[::-1] or [1 / len(exits)] * len(exits))
    order = rng.permutation(len(tokens_G))
    tokens = tokens_G[order]
    middles = (tokens.cumsum() - tokens / 2) / tokens.sum()
    depths = np.empty(len(tokens_G), dtype=np.int64)
    depths[order] = exits[np.searchsorted(shares.cumsum()[:-1], middles, side="right")]
    depths[order[:least]] = last
    return depths


def skip_probabilities(cfg: config.Depth, L: int) -> np.ndarray:
    """Return p_max (2^(l / (L-1)) - 1) for layers l = 0..L-1 (LayerSkip, arXiv 2404.16710): [L]."""
    return cfg.layer_dropout * (2 ** (np.arange(L) / max(L - 1, 1)) - 1)


def draw_runs(texts: int, cfg: config.Depth, L: int, rng: np.random.Generator) -> np.ndarray | None:
    """Return bool [L, N], False where a text skips a layer, or None without layer dropout."""
    if not cfg.layer_dropout:
        return None
    return rng.random((L, texts)) >= skip_probabilities(cfg, L)[:, None]
