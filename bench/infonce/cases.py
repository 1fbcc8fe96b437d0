"""Cases of the contrastive loss, their FLOPs, bytes and floors; bench.py derives the formulas."""

from dataclasses import dataclass, replace

import torch

from ..harness import FORWARD, TRAIN, Leaves

BOTH = "query_to_doc", "doc_to_query"
NESTED = 8, 16, 32, 64, 128, 256, 512, 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    E: int
    B: int
    D: int = 1024
    dims: tuple[int, ...] = NESTED
    directions: tuple[str, ...] = ("query_to_doc",)
    providers: tuple[str, ...]
    modes: tuple[str, ...] = (TRAIN, FORWARD)
    temperature: float = 0.05

    @property
    def both(self) -> bool:
        return len(self.directions) > 1


BREAKDOWN = ("reference",)  # where ours is split into its kernels


def toy(case: Case) -> Case:
    """The same lines of code in seconds, on any device; the first with a wide prefix too."""
    first = case.name in BREAKDOWN
    dims, modes = ((8, 144), case.modes) if first else ((8, 16), (TRAIN,))
    E, B = 2 if case.both else 1, 40 if case.name == "huge" else 24
    return replace(case, E=E, B=B, D=dims[-1], dims=dims, modes=modes)


def flops(case: Case, mode: str, gemms: int | None = None) -> float:
    """2 B N D E for each product of all pairs: 1 forward, 3 with backward, or `gemms` of them."""
    if gemms is None:
        gemms = 3 if mode == TRAIN else 1
    return gemms * 2.0 * case.B * case.B * case.D * case.E


def nbytes(case: Case, mode: str) -> float:
    """2 (B + N) D E forward; with backward as much to read again, and to write."""
    return (3 if mode == TRAIN else 1) * 2.0 * 2 * case.B * case.D * case.E


def exponentials(case: Case) -> float:
    """E M B N in each pass."""
    return float(case.E * len(case.dims) * case.B * case.B)


def floors(case: Case, mode: str, tflops: float, gbs: float) -> dict[str, float]:
    """Milliseconds that no run can go under, at these ceilings."""
    again = 4 if mode == TRAIN else 1
    return {
        "gemms": flops(case, mode) / tflops / 1e9,
        "recomputing": flops(case, mode, again) / tflops / 1e9,
        "bytes": nbytes(case, mode) / gbs / 1e6,
    }


def dtype_on(device: torch.device) -> torch.dtype:
    """bf16; Triton's interpreter, which stands in on CPUs, has no right bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def inputs(case: Case, device: torch.device, seed: int) -> Leaves:
    """Raw vectors; positives as near as their query's own length away, the others at random."""
    generator = torch.Generator(device).manual_seed(seed)
    q, c = (
        torch.randn(
            case.E, case.B, case.D, generator=generator, device=device, dtype=dtype_on(device)
        )
        for _ in "qc"
    )
    return Leaves(q, c.add_(q))
