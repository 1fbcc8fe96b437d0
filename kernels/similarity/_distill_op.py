"""The sums over tiles of `distill` as one node that torch.compile and CUDA graphs can carry."""

import torch
from torch import Tensor, library

from . import _lse_backward, _lse_forward, _lse_logs
from ._bands import bands_of, pack, padded, unpack
from ._tiles import KL, MSE, TileMask, chunks, counts_of, fill, groups

MODES = {"mse": MSE.value, "kl": KL.value}
PAIR_BYTES = 8  # the teacher's matrix in fp32, and its entropy's terms


class _Teacher:
    """The teacher's vectors, packed, and what it says of a chunk of rows."""

    def __init__(self, q: Tensor, c: Tensor, temperature: float, kind: str) -> None:
        self.bands = bands_of((q.shape[1],))
        self.x = pack(q[None], self.bands, counts_of(None, q[None]))
        self.y = pack(c[None], self.bands, counts_of(None, c[None]))
        self.temperature, self.kind = temperature, kind

    def matrix(self, rows: slice, columns: Tensor) -> tuple[TileMask, Tensor]:
        """Return the chunk's matrix, for tiles, and the entropies of its rows.

        columns: int32 [1], how many are present.
        """
        SP = self.y.x.shape[1]
        out = torch.empty(rows.stop - rows.start, SP, dtype=torch.float32, device=self.x.x.device)
        fill(out, self.x, self.y, self.bands, rows.start, self.x.u, 0)
        entropy = out.new_zeros(len(out))
        if self.kind == "kl":
            absent = torch.arange(SP, device=out.device) >= columns
            out.div_(self.temperature).masked_fill_(absent, -torch.inf)
            out.sub_(out.amax(1, keepdim=True)).exp_()
            out.div_(out.sum(1, keepdim=True))
            entropy = torch.special.entr(out).sum(1)
        return TileMask(pair=out, pair_row=rows.start, mode=MODES[self.kind]), entropy


@library.custom_op("mlembed::distill", mutates_args=())
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
    """Return sum_j (s - t)^2 or sum_j p s, fp32 [E, M, R], and p's entropy, fp32 [E, R]."""
    with torch.cuda.device_of(x):  # Triton launches on the current device.
        bands, (E, R, _) = bands_of(tuple(dims)), x.shape
        nx, ny = counts_of(row_counts, x), counts_of(col_counts, y)
        sums = torch.empty(E, len(dims), R, dtype=torch.float32, device=x.device)
        entropies = torch.empty(E, R, dtype=torch.float32, device=x.device)
        teacher = _Teacher(teacher_x, teacher_y, temperature, kind)
        one = torch.ones(E, len(dims), dtype=torch.float32, device=x.device)
        RP, SP = padded(R), padded(y.shape[1])
        whole = (RP + SP) * bands.width * x.element_size() + PAIR_BYTES * RP * SP
        # Where candidates leave, the teacher's probabilities differ by exit.
        for group in groups(E, whole if col_counts is None else workspace, workspace):
            px, py = pack(x[group], bands, nx[group]), pack(y[group], bands, ny[group])
            for rows in chunks(RP, PAIR_BYTES * SP, workspace):
                mask, entropy = teacher.matrix(rows, ny[group][:1])
                tiles = _lse_forward.Tiles(px, py, bands, one[group], mask)
                _lse_logs.merge(tiles.sums(rows, False)[0], sums[group], None, 0.0, rows.start)
                real = slice(rows.start, min(rows.stop, R))
                entropies[group, real] = entropy[: real.stop - real.start]
                # The next chunk's matrix takes their place in the workspace.
                del mask, tiles
        return sums, entropies


@distill_op.register_fake
def _(x, y, *others):  # type: ignore[no-untyped-def]
    (E, R, _), dims = x.shape, others[4]
    sums = x.new_empty(E, len(dims), R, dtype=torch.float32)
    return sums, x.new_empty(E, R, dtype=torch.float32)


@library.custom_op("mlembed::distill_backward", mutates_args=())
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
    with torch.cuda.device_of(x):
        bands, (E, R, D), S = bands_of(tuple(dims)), x.shape, y.shape[1]
        nx, ny = counts_of(row_counts, x), counts_of(col_counts, y)
        dx = torch.empty(E, R, D, dtype=x.dtype, device=x.device)
        dy = torch.empty(E, S, D, dtype=y.dtype, device=y.device)
        teacher = _Teacher(teacher_x, teacher_y, temperature, kind)
        one = torch.ones(E, len(dims), dtype=torch.float32, device=x.device)
        slope = dsums * (2.0 if kind == "mse" else 1.0)  # d (s - t)^2 = 2 (s - t) ds
        factor = _lse_backward.largest(one, slope)
        RP, SP = padded(R), padded(S)
        wide_bytes = x.element_size() * (len(dims) - bands.narrow)
        whole = (RP + SP) * bands.width * (4 + x.element_size())
        whole += (PAIR_BYTES + wide_bytes) * RP * SP
        for group in groups(E, whole if col_counts is None else workspace, workspace):
            px, py = pack(x[group], bands, nx[group]), pack(y[group], bands, ny[group])
            none = torch.zeros_like(slope[group])
            sides = _lse_backward.Sides.of(none, slope[group], one[group], factor[group])
            tiles = _lse_backward.Tiles(px, py, bands, one[group], TileMask(), (sides, None))
            f = factor[group]
            row_bytes = (PAIR_BYTES + wide_bytes * len(f)) * SP
            for rows in chunks(RP, row_bytes, workspace):
                tiles.mask = teacher.matrix(rows, ny[group][:1])[0]
                tiles.narrow(rows)
                of_x = tiles.dx, tiles.wide(rows, SP), tiles.along_x, f
                unpack(dx[group], of_x, px, py, bands, None, rows.start)
            unpack(dy[group], (*tiles.dy, tiles.along_y, f), py, px, bands, None)
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
