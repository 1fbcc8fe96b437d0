"""Argument checks for the loss. Device values are not inspected, to avoid a synchronisation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import use_triton

DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


def check_dims(dims: tuple[int, ...], D: int) -> None:
    if not dims or list(dims) != sorted(set(dims)) or dims[0] < 1 or dims[-1] > D:
        raise ValueError(f"dims: expected rising widths in 1..{D}, got {dims}")


def check_vectors(
    q: Tensor,
    pieces: list[Tensor],
    dims: tuple[int, ...],
    negatives: Tensor | None,
    negatives_mask: Tensor | None,
    impl: str,
) -> None:
    if not q.is_floating_point():
        raise ValueError(f"q, c: expected a floating dtype, got {q.dtype}")
    if not pieces:
        raise ValueError("c: expected a tensor or at least one piece, got none")
    others = [("c", "[E, C, D]", c) for c in pieces]
    if negatives is not None:
        others.append(("negatives", "[E, Q, K, D]", negatives))
    for name, letters, x in others:
        axes = letters.count(",") + 1
        fits = q.ndim == 3 and x.ndim == axes
        fits = fits and (q.shape[0], q.shape[2]) == (x.shape[0], x.shape[-1])
        if not fits or (axes == 4 and x.shape[1] != q.shape[1]):
            raise ValueError(
                f"q, {name}: expected [E, Q, D] and {letters}, "
                f"got {list(q.shape)} and {list(x.shape)}"
            )
        if q.dtype != x.dtype or q.device != x.device:
            raise ValueError(
                f"q, {name}: expected one dtype and device, got "
                f"{q.dtype} on {q.device} and {x.dtype} on {x.device}"
            )
    check_dims(dims, q.shape[2])
    use_triton(impl, q)
    if negatives_mask is None:
        return
    shape = None if negatives is None else negatives.shape[1:3]
    if negatives_mask.shape != shape or negatives_mask.dtype != torch.bool:
        raise ValueError(
            f"negatives_mask: expected bool {shape and list(shape)} with negatives, "
            f"got {negatives_mask.dtype} {list(negatives_mask.shape)}"
        )


def check_objective(
    directions: tuple[str, ...], partition_mode: str, count_positive_twice: bool, negatives: bool
) -> None:
    unknown = [name for name in directions if name not in DIRECTIONS]
    if unknown or len(set(directions)) < len(directions):
        raise ValueError(f"directions: expected some of {DIRECTIONS}, each once, got {directions}")
    if not directions and not negatives:
        raise ValueError("directions: expected at least one where there are no negatives, got ()")
    if partition_mode not in ("joint", "per_direction"):
        raise ValueError(
            f"partition_mode: expected 'joint' or 'per_direction', got {partition_mode!r}"
        )
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            "partition_mode: expected 'joint' with query_to_query or doc_to_doc, which do not "
            "contain the positive, got 'per_direction'"
        )
    if partition_mode == "per_direction" and negatives and "query_to_doc" not in directions:
        raise ValueError(
            "directions: expected query_to_doc, which negatives belong to per direction, "
            f"got {directions}"
        )
    twice = {"query_to_doc", "doc_to_query"} <= set(directions) and partition_mode == "joint"
    if count_positive_twice and not twice:
        raise ValueError(
            "count_positive_twice: expected query_to_doc and doc_to_query in one joint sum, "
            f"got {directions}, {partition_mode!r}"
        )


def check_targets(Q: int, C: int, target: Tensor | None) -> None:
    if target is None:
        if Q > C:
            raise ValueError(f"target: needed when Q > C, got none with Q = {Q}, C = {C}")
    # On another device, a target outside means that the query has no positive.
    elif target.device.type == "cpu" and target.numel():
        low, high = int(target.min()), int(target.max())
        if high >= C or low < -1:
            raise ValueError(f"target: expected -1..{C - 1}, got {low}..{high}")


def piece_counts(counts: Tensor | Sequence[Tensor] | None, pieces: int) -> list[Tensor | None]:
    """Return candidates' counts for each piece."""
    if counts is None:
        return [None] * pieces
    given = [counts] if isinstance(counts, Tensor) else list(counts)
    if len(given) != pieces:
        raise ValueError(f"cand_counts: expected {pieces}, one a piece, got {len(given)}")
    return [*given]


def check_integers(n: int, device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and (x.shape != (n,) or x.is_floating_point() or x.device != device):
            raise ValueError(
                f"{name}: expected [{n}] integers on {device}, "
                f"got {list(x.shape)} {x.dtype} on {x.device}"
            )


def scale_of(temperature: float | Tensor, like: Tensor, E: int, M: int) -> Tensor:
    """Return 1 / temperature as [E, M] in fp32 (float64 for float64)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        return torch.full((E, M), 1 / temperature, dtype=wide, device=like.device)
    if temperature.device != like.device or not temperature.is_floating_point():
        raise ValueError(
            f"temperature: expected floating numbers on {like.device}, "
            f"got {temperature.dtype} on {temperature.device}"
        )
    if temperature.ndim > 2 or any(
        have not in (1, want) for have, want in zip(temperature.shape[::-1], (M, E), strict=False)
    ):
        raise ValueError(
            f"temperature: expected to expand to [{E}, {M}], got {list(temperature.shape)}"
        )
    if temperature.device.type == "cpu" and not (temperature > 0).all():
        raise ValueError(f"temperature: expected positive numbers, got {temperature.tolist()}")
    return (1 / temperature.to(wide)).expand(E, M)
