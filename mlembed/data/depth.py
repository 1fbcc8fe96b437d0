"""How deep texts run in training: depths of groups, layers that a text skips, exits with a loss.

All of it is drawn on the host, as a function of the random generator or the step that is handed in:
equal on all processes and after a resume.

Letters: G groups, N texts, L layers.
"""

import numpy as np

from .. import config


def drawn(
    tokens_G: np.ndarray,
    cfg: config.Depth,
    last: int,
    rng: np.random.Generator,
    least: int = 1,
) -> np.ndarray:
    """The depth that each group runs to -> int64 [G].

    Stratified: groups line up at random, and the depth of each is that of the share of tokens in
    which its middle lies, the deepest share first. So at every depth the tokens are its share of
    the batch up to half a group at either end, at each step, where independent draws would leave
    some steps, and processes, with more to do than others.

    Args:
        tokens_G: int [G], tokens of each group's texts.
        last: the model's layers, where all groups go without cfg.exits.
        least: so many groups at least run to the last layer.
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


def skip_probabilities(cfg: config.Depth, L: int, step: int, steps: int) -> np.ndarray:
    """p_max S(t) (2^(l / (L-1)) - 1) of layers l = 0..L-1 (LayerSkip, arXiv 2404.16710) -> [L]."""
    rising = 2 ** (np.arange(L) / max(L - 1, 1)) - 1
    scale = 1.0 if cfg.dropout_schedule == "constant" else 2 ** (step / steps) - 1
    return cfg.layer_dropout * scale * rising


def runs(
    texts: int, cfg: config.Depth, L: int, step: int, steps: int, rng: np.random.Generator
) -> np.ndarray | None:
    """bool [L, N], False where a text skips a layer; None where none does."""
    if not cfg.layer_dropout:
        return None
    p_L = skip_probabilities(cfg, L, step, steps)
    return rng.random((L, texts)) >= p_L[:, None]


def enabled(exits: tuple[int, ...], cfg: config.Depth, step: int, steps: int) -> tuple[int, ...]:
    """The exits that have a loss at this step, the last always (LayerSkip's curricula).

    rotational: of the others every `rotation`-th, beginning one further at each step. gradual: from
    the deepest on, one more at equal intervals, all of them once half of the steps are done.
    """
    *inner, last = exits
    if cfg.curriculum == "rotational":
        inner = [e for i, e in enumerate(inner) if i % cfg.rotation == step % cfg.rotation]
    elif cfg.curriculum == "gradual":
        count = min(len(inner), len(inner) * 2 * step // steps)
        inner = inner[len(inner) - count :]
    return (*inner, last)
