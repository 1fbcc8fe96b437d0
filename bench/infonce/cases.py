"""Cases of the nested contrastive loss, with their FLOPs and bytes.

Letters: E exits, B queries, N candidates (B = N here), D width, M prefixes.

LOG.md has the arithmetic. TFLOP/s count products of all pairs, 2BND an exit: one forward, three
with backward, for every provider (one GEMM per prefix computes sum(dims) / D = 2 times that). A
backward without a stored S needs four, the floor of that design. Exponentials run on another unit,
whose ceiling is not measured, so no floor here contains them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import harness
from ..harness import TRAIN, Leaves

BOTH = "query_to_doc", "doc_to_query"
NESTED = 8, 16, 32, 64, 128, 256, 512, 1024
BREAKDOWN = ("reference",)  # cases in which ours is split into its kernels
STEPS = "eager", "gemm", "compile", "sentence_transformers", "eager_stacked"
PAIRS = "cut_cross_entropy", "inf_cl", "liger"  # one fused cross entropy per exit and prefix


@dataclass(frozen=True, kw_only=True)
class Case(harness.Case):
    E: int
    B: int
    D: int = 1024
    dims: tuple[int, ...] = NESTED
    directions: tuple[str, ...] = ("query_to_doc",)
    temperature: float = 0.05

    @property
    def both(self) -> bool:
        return len(self.directions) > 1

    @property
    def options(self) -> dict[str, Any]:
        """Return the arguments of `infonce`."""
        mode = "per_direction" if self.both else "joint"
        options = {"dims": self.dims, "temperature": self.temperature}
        return {**options, "directions": self.directions, "partition_mode": mode}

    @property
    def about(self) -> str:
        way = "both directions" if self.both else "one direction"
        prefixes = f"{self.dims[0]}..{self.dims[-1]} (M = {len(self.dims)})"
        return f"E = {self.E}, B = N = {self.B}, D = {self.D}, prefixes {prefixes}, {way}"

    def toy(self) -> "Case":
        """Return the case in seconds, on any device; the first one with a wide prefix too."""
        first = self.name in BREAKDOWN
        dims, modes = ((8, 144), self.modes) if first else ((8, 16), (TRAIN,))
        E, B = 2 if self.both else 1, 40 if self.name == "huge" else 24
        return replace(self, E=E, B=B, D=dims[-1], dims=dims, modes=modes)

    def inputs(self, device: torch.device, seed: int) -> Leaves:
        """Return normal vectors; a positive is its query plus another one."""
        generator = torch.Generator(device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": device}
        options["dtype"] = harness.dtype_on(device, torch.float32)
        q, c = (torch.randn(self.E, self.B, self.D, **options) for _ in "qc")
        return Leaves(q, c.add_(q))

    def flops(self, mode: str, gemms: int | None = None) -> float:
        """Return 2 B N D E for each product of all pairs: 1 forward, 3 with backward."""
        if gemms is None:
            gemms = 3 if mode == TRAIN else 1
        return gemms * 2.0 * self.B * self.B * self.D * self.E

    def nbytes(self, mode: str) -> float:
        """Return 2 (B + N) D E forward, three times that with backward."""
        return (3 if mode == TRAIN else 1) * 2.0 * 2 * self.B * self.D * self.E

    def exponentials(self) -> float:
        """Return E M B N, those of one pass."""
        return float(self.E * len(self.dims) * self.B * self.B)

    def floors(self, mode: str, tflops: float, gbs: float) -> dict[str, float]:
        floors = super().floors(mode, tflops, gbs)
        again = self.flops(mode, 4 if mode == TRAIN else 1) / tflops / 1e9
        return {"gemms": floors["products"], "recomputing": again, "bytes": floors["bytes"]}


# The most telling first, as the last ones are skipped when time runs out.
CASES = {
    case.name: case
    for case in (
        Case(name="reference", E=7, B=16384, providers=("ours", *STEPS, *PAIRS)),
        Case(name="both", E=7, B=16384, directions=BOTH, providers=("ours", *STEPS[:-1])),
        Case(name="small", E=1, B=4096, providers=("ours", "ours_graph", *STEPS[:-1], *PAIRS)),
        Case(name="labse", E=7, B=16384, D=256, dims=NESTED[:6], providers=("ours", *STEPS[:-1])),
        Case(name="e1", E=1, B=16384, providers=("ours", *STEPS[:-1])),
        # The size that siglip-kernel publishes, whose loss is another one: see peers.py.
        Case(
            name="siglip", E=1, B=65536, D=768, dims=(768,),
            providers=("ours", "siglip_kernel", "eager", "gemm"), modes=(TRAIN,),
        ),
        Case(name="huge", E=1, B=131072),
    )
}  # fmt: skip
