"""How often the loops of a kernel run in a launch, and the bytes that it moves through memory.

One function a kernel, from the arguments of a launch. Instructions, products and bytes of a round
are counted in the compiler's output, so these functions hold what the sizes of a launch decide.
Bytes of memory are counted once, as if L2 kept everything that is used again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .launches import Run
from .sass import EXPONENTIALS, NESTED, OTHER, PRODUCTS

Loop = dict[str, float]  # kind of a region -> how often it runs, in all programs together


@dataclass(frozen=True)
class Work:
    """memory: bytes. loops: those with products, in the order of the source.

    loops is None for kernels without products, whose time is that of their bytes.
    """

    memory: float
    loops: tuple[Loop, ...] | None = None


class Arguments:
    """Constants, integers, shapes and lists of a launch, by the names of the kernel's arguments."""

    def __init__(self, run: Run) -> None:
        self.run, self.known = run, {**run.launch.arguments(), **run.sizes}
        self.programs = run.programs

    def __getattr__(self, name: str) -> Any:
        if name not in self.known:
            raise LookupError(f"{self.run.launch.name}: no argument {name}")
        return self.known[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.run.shapes[name]

    def size(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return math.prod(self.shape(name)) * self.bytes(name)

    def bytes(self, name: str) -> int:
        """Return the bytes of a number of a tensor."""
        kind = self.run.launch.signature[name].removeprefix("*")
        return {"fp32": 4, "i32": 4, "i64": 8, "i8": 1, "i1": 1, "u1": 1}.get(kind, 2)

    def column(self, name: str, column: int) -> list[int]:
        return [int(x) for x in self.values(name)[:, column].tolist()]

    def values(self, name: str) -> Tensor:
        values = self.run.lists.get(name)
        if values is None:
            raise LookupError(f"{self.run.launch.name}: {name} has no values")
        return values


def all_alike(rounds: float) -> Loop:
    """Return a loop without conditions."""
    return {PRODUCTS: rounds}


# ---- the loss ----


def pack(a: Arguments) -> Work:
    return Work(a.size("X") + a.size("PACKED") + a.size("U") + a.size("UNIT"))


def positive(a: Arguments) -> Work:
    return Work(2 * a.size("X") + 2 * a.size("U") + a.size("COS"))


def unpack(a: Arguments) -> Work:
    """Partners' rows are read as well, if there are pairs."""
    E, rows = a.shape("X")[0], a.run.grid[0] * a.BR
    gradients = 4 * (a.WN * bool(a.NARROW) + a.DP - a.WIDE)
    vectors = (1 + a.PAIRS) * a.DP * a.bytes("X") + a.D * a.bytes("OUT")
    return Work(E * rows * (gradients + vectors))


def merge(a: Arguments) -> Work:
    return Work(sum(map(a.size, ("NARROW", "WIDE", "OUT"))))


def exact(a: Arguments) -> Work:
    return Work(a.size("LSE"))  # its sums, and nothing else where none underflowed


def _sides(a: Arguments, rows: float, cols: float, width: int) -> float:
    return float(a.shape("X")[0] * (rows + cols) * width * a.bytes("X"))


def _narrow_width(a: Arguments) -> int:
    return int(a.STARTS[-1] + a.WIDTHS[-1])


def _row_blocks(a: Arguments) -> float:
    """Return the blocks of rows of one exit; ROWS is [splits, E, M, RP]."""
    return a.programs / math.prod(a.shape("ROWS")[:2])


def _special(a: Arguments) -> float:
    """Return the tiles with a positive or a dropped pair: of each block of rows, those of its own
    columns, or all tiles if there are keys or a matrix.
    """
    of_block = a.tiles if a.N_KEYS or a.MODE else max(1, a.BM // a.BN)
    return float(a.shape("X")[0] * _row_blocks(a) * of_block)


def narrow_forward(a: Arguments) -> Work:
    E, blocks = a.shape("X")[0], _row_blocks(a)
    memory = _sides(a, blocks * a.BM, a.SP, _narrow_width(a)) + a.size("COLS")
    return Work(memory, ({PRODUCTS: E * blocks * a.tiles, OTHER: _special(a)},))


def wide_forward(a: Arguments) -> Work:
    E, blocks = a.shape("X")[0], _row_blocks(a)
    memory = _sides(a, blocks * a.BM, a.SP, a.DP - a.FROM) + a.size("COLS")
    tiles, steps = E * blocks * a.tiles, (a.DP - a.FROM) // a.BK
    loop = {PRODUCTS: tiles * steps, EXPONENTIALS: tiles * len(a.ENDS), OTHER: tiles}
    return Work(memory, (loop | {NESTED: _special(a)},))


def narrow_backward(a: Arguments) -> Work:
    rows, cols = a.run.grid[0] * a.BM, a.tiles * a.BN
    memory = _sides(a, rows, cols, _narrow_width(a))
    memory += 8 * a.shape("X")[0] * rows * (_narrow_width(a) + a.M)
    return Work(memory, (all_alike(a.programs * a.tiles),))


def wide_backward(a: Arguments) -> Work:
    rows, cols, wide = a.tiles_m * a.BM, a.tiles_n * a.BN, len(a.ENDS)
    memory = _sides(a, rows, cols, a.DP - a.FROM)
    memory += sum(map(a.size, ("G", "ALONG_X", "ALONG_Y")))
    tiles = a.programs  # the compiler knows the steps of each
    return Work(memory, ({EXPONENTIALS: tiles * wide, OTHER: tiles},))


def product(a: Arguments) -> Work:
    rows, depth = (a.n_cols, a.n_rows) if a.SWAP else (a.n_rows, a.n_cols)
    width = a.DP - a.FROM
    of_one = depth * width * a.bytes("Y") + 8 * rows * width  # GRAD is read and written
    memory = a.size("G") + a.shape("Y")[0] * of_one
    return Work(memory, (all_alike(a.programs * depth / a.BK),))


# ---- attention ----


def _heads(a: Arguments, of_query: int, of_key: int, fp32: int = 0) -> float:
    """Return the bytes of a token: rows of query and key heads, and fp32 numbers of query heads."""
    rows = of_query * a.HQ + of_key * (a.HQ // a.GROUP)
    return float(rows * a.K * a.bytes("Q") + 4 * fp32 * a.HQ)


def packed_forward(a: Arguments) -> Work:
    return Work(sum(a.column("PACKS", 1)) * _heads(a, 2, 2), ())


def packed_backward(a: Arguments) -> Work:
    loops = () if a.GROUP == a.HEADS else (all_alike(a.programs * a.GROUP / a.HEADS),)
    return Work(sum(a.column("PACKS", 1)) * _heads(a, 3, 4), loops)


def apart_backward(a: Arguments) -> Work:
    return Work(a.size("CHECK"))  # and nothing else where no NaN was found


def _tiles(a: Arguments) -> list[tuple[int, int]]:
    """Return each tile's first position in its sequence, and the sequence's length."""
    firsts, begins, ends = (a.column("TILES", i) for i in range(3))
    return [(x - low, high - low) for x, low, high in zip(firsts, begins, ends, strict=True)]


def _of_long(a: Arguments, *heads: int) -> float:
    tokens = sum(min(a.TOKENS, n - first) for first, n in _tiles(a))
    return tokens * _heads(a, *heads)


def long_forward(a: Arguments) -> Work:
    """Keys that all queries of a tile see have a loop; the others are code without one."""
    blocks = sum((first if a.CAUSAL else n - 1) // a.BN for first, n in _tiles(a))
    return Work(_of_long(a, 2, 2, 1), (all_alike(blocks * a.HQ / a.HEADS),))


def queries_backward(a: Arguments) -> Work:
    """Keys that all queries of a tile see have a loop, and the others another one."""
    whole, masked = 0, 0
    for first, n in _tiles(a):
        free = (first if a.CAUSAL else n) // a.BN
        last = min(first + a.TOKENS, n) if a.CAUSAL else n
        whole, masked = whole + free, masked + -(-last // a.BN) - free
    loops = tuple(all_alike(blocks * a.HQ / a.HEADS) for blocks in (whole, masked))
    return Work(_of_long(a, 4, 2, 2), loops)


def keys_backward(a: Arguments) -> Work:
    """Each query head of the group is visited in blocks from a tile's first key on."""
    blocks = 0
    for first, n in _tiles(a):
        if a.CAUSAL:  # the kernel takes the tiles of a sequence from its other end
            first = (n - 1) // a.TOKENS * a.TOKENS - first
        blocks += -(-(n - first // a.BM * a.BM * a.CAUSAL) // a.BM)
    return Work(_of_long(a, 2, 4, 2), (all_alike(blocks * a.HQ),))


# ---- the optimiser ----


def adamw(a: Arguments) -> Work:
    return Work(2 * a.size("W") + a.size("G") + 2 * a.size("M") + 2 * a.size("V"))


# ---- the nested embedding ----


def project(a: Arguments) -> Work:
    """Rows of X are read once for each token, of which several parts may be written."""
    rows = len(a.values("IDS").unique()) if a.SPREAD else a.rows
    memory = rows * a.K * a.bytes("X") + a.size("W")
    whole = a.SPREAD or a.FILL
    memory += a.size("OUT") if whole else a.rows * a.N * a.bytes("OUT")
    return Work(memory, (all_alike(a.programs * -(-a.K // a.BK)),))


def sum_(a: Arguments) -> Work:
    read = int(a.values("COUNT").sum()) * a.N * a.bytes("X")
    return Work(read + a.size("OUT"))


def total(a: Arguments) -> Work:
    return Work(int(a.values("PARTS").sum()) * a.N * 4 + a.size("OUT"))


def gather(a: Arguments) -> Work:
    return Work(a.rows * a.N * (a.bytes("X") + a.bytes("OUT")))


MODELS: dict[str, Callable[[Arguments], Work]] = {
    f"_{function.__name__.rstrip('_')}_kernel": function
    for function in (
        pack, positive, unpack, merge, exact, narrow_forward, wide_forward, narrow_backward,
        wide_backward, product, packed_forward, packed_backward, apart_backward, long_forward,
        queries_backward, keys_backward, project, sum_, total, gather, adamw,
    )
}  # fmt: skip


def work_of(run: Run) -> Work | None:
    """Return the work of a launch, None of a kernel that no bench launches."""
    model = MODELS.get(run.launch.name)
    return model and model(Arguments(run))
