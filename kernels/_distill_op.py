"""`distill`'s sums over tiles as one node that torch.compile and CUDA graphs can carry."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backward, _forward
from ._forward import Kept, fill, groups_and_chunks
from ._nest import Nest, Packed, nest_of, pack, padded, unpack
from ._partition_op import counts_of

MODES = {"mse": 2, "kl": 3}
PAIR_BYTES = 8  # the teacher's matrix in fp32, and its entropy's terms


class _Teacher:
    """The teacher's matrix of a chunk of rows, and the entropies of its rows."""

    def __init__(self, q: Tensor, c: Tensor, temperature: float, kind: str) -> None:
        one = (q.shape[1],)
        self.nest = nest_of(one)
        self.x = pack(q[None], self.nest, counts_of(None, q[None]))
        self.y = pack(c[None], self.nest, counts_of(None, c[None]))
        self.temperature, self.kind = temperature, kind

    def kept(self, rows: slice, columns: Tensor) -> tuple[Kept, Tensor]:
        """columns: int32 [1], how many are present."""
        SP = self.y.x.shape[1]
        out = torch.empty(rows.stop - rows.start, SP, dtype=torch.float32, device=self.x.x.device)
        fill(out, self.x, self.y, self.nest, rows.start, self.x.u, 0)
        entropy = out.new_zeros(len(out))
        if self.kind == "kl":
            absent = torch.arange(SP, device=out.device) >= columns
            out.div_(self.temperature).masked_fill_(absent, -torch.inf)
            out.sub_(out.amax(1, keepdim=True)).exp_()
            out.div_(out.sum(1, keepdim=True))
            entropy = torch.special.entr(out).sum(1)
        return Kept(None, None, None, out, rows.start, MODES[self.kind]), entropy


def _plan(
    x: Tensor, y: Tensor, nest: Nest, exit_bytes: int, pair_bytes: int, alike: bool, workspace: int
) -> tuple[list[slice], list[slice]]:
    """Exits together, only where the teacher's matrix is the same for all, and rows at a time."""
    E, RP, SP = x.shape[0], padded(x.shape[1]), padded(y.shape[1])
    groups, chunks = groups_and_chunks(
        E if alike else 1, RP, exit_bytes, pair_bytes * SP, workspace
    )
    return groups if alike else [slice(e, e + 1) for e in range(E)], chunks


@torch.library.custom_op("mlembed::distill", mutates_args=())
def distill_op(
    x: Tensor,
    y: Tensor,
    teacher_x: Tensor,
    teacher_y: Tensor,
    row_counts: Tensor | None,
    col_counts: Tensor | None,
    dims: list[int],
    kind: str,
    temperature: float,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """sum_j (s - t)^2 or sum_j p s, fp32 [E, M, R], and the entropy of p, fp32 [E, R]."""
    nest, (E, R, _) = nest_of(tuple(dims)), x.shape
    nx, ny = counts_of(row_counts, x), counts_of(col_counts, y)
    sums = torch.empty(E, len(dims), R, dtype=torch.float32, device=x.device)
    entropies = torch.empty(E, R, dtype=torch.float32, device=x.device)
    teacher = _Teacher(teacher_x, teacher_y, temperature, kind)
    one = torch.ones(E, len(dims), dtype=torch.float32, device=x.device)
    linear = (padded(R) + padded(y.shape[1])) * nest.width * x.element_size()
    alike = row_counts is None and col_counts is None
    groups, chunks = _plan(x, y, nest, linear, PAIR_BYTES, alike, workspace)
    for group in groups:
        px, py = pack(x[group], nest, nx[group]), pack(y[group], nest, ny[group])
        for rows in chunks:
            kept, entropy = teacher.kept(rows, ny[group][:1])
            tiles = _forward.Tiles(px, py, nest, one[group], one[group], kept)
            here = slice(rows.start, min(rows.stop, R))
            sums[group, :, here] = tiles.sums(rows, False)[0][..., here]
            entropies[group, here] = entropy[: here.stop - here.start]
    return sums, entropies


@distill_op.register_fake
def _(x, y, teacher_x, teacher_y, row_counts, col_counts, dims, kind, temperature, workspace):  # type: ignore[no-untyped-def]
    E, R, _ = x.shape
    sums = x.new_empty(E, len(dims), R, dtype=torch.float32)
    return sums, x.new_empty(E, R, dtype=torch.float32)


@torch.library.custom_op("mlembed::distill_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    y: Tensor,
    teacher_x: Tensor,
    teacher_y: Tensor,
    row_counts: Tensor | None,
    col_counts: Tensor | None,
    dsums: Tensor,
    dims: list[int],
    kind: str,
    temperature: float,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    nest, (E, R, D), S = nest_of(tuple(dims)), x.shape, y.shape[1]
    nx, ny = counts_of(row_counts, x), counts_of(col_counts, y)
    dx = torch.empty(E, R, D, dtype=x.dtype, device=x.device)
    dy = torch.empty(E, S, D, dtype=y.dtype, device=y.device)
    teacher = _Teacher(teacher_x, teacher_y, temperature, kind)
    one = torch.ones(E, len(dims), dtype=torch.float32, device=x.device)
    slope = dsums * (2.0 if kind == "mse" else 1.0)  # d (s - t)^2 = 2 (s - t) ds
    factor = _backward.largest(slope)
    linear = (padded(R) + padded(S)) * nest.width * (4 + x.element_size())
    pair_bytes = PAIR_BYTES + x.element_size() * (len(dims) - nest.narrow)
    alike = row_counts is None and col_counts is None
    groups, chunks = _plan(x, y, nest, linear, pair_bytes, alike, workspace)
    for group in groups:
        px, py = pack(x[group], nest, nx[group]), pack(y[group], nest, ny[group])
        none = torch.zeros_like(slope[group])
        sides = _backward.Sides.of(none, slope[group], one[group], factor[group])
        tiles = _backward.Tiles(px, py, nest, one[group], Kept(None, None, None), sides, None)
        for rows in chunks:
            tiles.kept = teacher.kept(rows, ny[group][:1])[0]
            tiles.add(rows, slice(0, padded(S)))
        f = factor[group]
        unpack(dx[group], tiles.dx, tiles.along_x, f, px, py, nest, None)
        unpack(dy[group], tiles.dy, tiles.along_y, f, py, px, nest, None)
    return dx, dy


@_backward_op.register_fake
def _(x, y, *others):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.dims, ctx.kind, ctx.temperature, ctx.workspace = inputs
    ctx.save_for_backward(*tensors)


def _grads(ctx, dsums, dentropy):  # type: ignore[no-untyped-def]
    options = ctx.dims, ctx.kind, ctx.temperature, ctx.workspace
    return *_backward_op(*ctx.saved_tensors, dsums, *options), *(None,) * 8


distill_op.register_autograd(_grads, setup_context=_setup)
