"""Cards for which bounds are computed: every assumption about their rates is here.

A bound is the time that one resource needs if nothing else takes any. Clocks, rates and bandwidths
are of data sheets and of measurements that LOG.md names; no bound is a measured time.
"""

from dataclasses import dataclass

# Shares of the bandwidth on paper that a kernel reaches: of L2 assumed, of memory that of a copy
# that was measured on an H200 (4247 of 4800 GB/s, 2026-11-20).
L2_REACHED = 0.75
MEMORY_REACHED = 4247 / 4800
RESOURCES = "tensor", "exponentials", "issue", "l2", "memory"


@dataclass(frozen=True)
class Machine:
    """A card. Rates are of one multiprocessor and clock, unless their names say otherwise."""

    name: str
    memory_gbs: float  # on paper
    multiprocessors: int = 132
    ghz: float = 1.755  # under a load of matrix products
    fma: int = 2048  # dense bf16 and fp16: m64n128k16 in 64 clocks
    special: int = 16  # exponentials
    schedulers: int = 4  # warp instructions
    l2_bytes_clk: int = 5120  # from L2 to all multiprocessors; documented for an A100, assumed here
    registers: int = 65536
    shared: int = 228 * 1024  # bytes, of which each program takes 1024 more than it asks for
    warps: int = 64

    def programs(self, warps: int, registers: int, shared: int) -> int:
        """Return the programs that a multiprocessor holds at once."""
        of_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // of_warp // warps
        return min(by_registers, self.shared // (shared + 1024), self.warps // warps)

    def bounds(self, cost: dict[str, float]) -> dict[str, float]:
        """Return milliseconds by resource. cost: clocks of a multiprocessor, or bytes."""
        clock = self.ghz * 1e6
        rates = dict.fromkeys(RESOURCES[:3], self.multiprocessors * clock)
        rates["l2"] = self.l2_bytes_clk * clock * L2_REACHED
        rates["memory"] = self.memory_gbs * 1e6 * MEMORY_REACHED
        return {name: cost[name] / rate for name, rate in rates.items()}


H100 = Machine("H100 SXM", 3350)
H200 = Machine("H200", 4800)
MACHINES = H100, H200
