"""Compiles for Hopper (sm_90a), without a GPU, every kernel that a call would launch.

    python tests/hopper.py CASE... -> one JSON object per kernel and specialisation

The host code runs as it is, on CPU tensors; a launch becomes a compilation with the same arguments.
Run without TRITON_INTERPRET: a process is either the interpreter or the compiler.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
seen: set[str] = set()


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return None


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", f.name], check=True, capture_output=True, text=True
        ).stdout
    return {key.lower(): int(re.search(rf"{key}:(\d+)", said)[1]) for key in ("REG", "STACK")}


def compile_instead(self: JITFunction, *args, grid, warmup=False, **kwargs):
    if not warmup:
        kernel = self.warmup(*args, grid=grid, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            ptx = kernel.asm["ptx"]
            row = {
                "kernel": self.fn.__name__,
                "constexprs": {
                    k: v for k, v in kwargs.items() if k.isupper() and not torch.is_tensor(v)
                },
                "warps": kwargs.get("num_warps"),
                "stages": kwargs.get("num_stages"),
                "target": re.search(r"\.target (\S+)", ptx)[1],
                "wgmma": ptx.count("wgmma.mma_async"),
                "mma": len(re.findall(r"\bmma\.sync", ptx)),
                "async_copies": ptx.count("cp.async"),
                "shared": kernel.metadata.shared,
                **resources(kernel.asm["cubin"]),
            }
            print(json.dumps(row), flush=True)
        return kernel
    return compiled(self, *args, grid=grid, warmup=True, **kwargs)


def partition(
    dtype: torch.dtype, dims: tuple[int, ...], columns: bool, masks: bool, n: int = 256
) -> None:
    """Forward and backward. Small: to the compiler only divisibility of sizes matters, and 1."""
    from mlembed_kernels._backward import backward
    from mlembed_kernels._forward import forward
    from mlembed_kernels._nest import nest_of
    from mlembed_kernels._tiles import Kept

    E, D = 2, dims[-1]
    x, y = torch.ones(E, n, D, dtype=dtype), torch.ones(E, n, D, dtype=dtype)
    kept = Kept(
        torch.zeros(n, dtype=torch.int32),
        torch.zeros(1, n, dtype=torch.int32) if masks else None,
        torch.zeros(1, n, dtype=torch.int32) if masks else None,
    )
    counts = torch.full((E,), n, dtype=torch.int32), torch.full((E,), n, dtype=torch.int32)
    ceiling = torch.zeros(E, n) if masks and not columns else None
    scale = torch.full((E, len(dims)), 20.0)
    common = x, y, nest_of(dims), scale, kept, counts, ceiling
    rows, cols, own = forward(*common, columns, 1 << 29)
    backward(*common, (rows, rows), (cols, cols) if columns else None, (own, own), 1 << 29)


def distill(dtype: torch.dtype, dims: tuple[int, ...], kind: str) -> None:
    from mlembed_kernels import _distill_op

    x, t = torch.ones(2, 256, dims[-1], dtype=dtype), torch.ones(256, 768, dtype=dtype)
    args = x, x, t, t, None, None
    options = list(dims), kind, 0.05, 1 << 29
    sums, _ = _distill_op.distill_op(*args, *options)
    _distill_op._backward_op(*args, sums, *options)


def cosine(dtype: torch.dtype, dims: tuple[int, ...], partners: int = 4) -> None:
    from mlembed_kernels import _cosine_op

    x, y = (
        torch.ones(2, 256, dims[-1], dtype=dtype),
        torch.ones(2, 256, partners, dims[-1], dtype=dtype),
    )
    out = _cosine_op.cosine_op(x, y, list(dims))
    _cosine_op._backward_op(x, y, *out, out[0], list(dims))


def attention(
    dtype: torch.dtype, heads: tuple[int, int], K: int, causal: bool, skip: bool = False,
    lengths: tuple[int, ...] = (48, 16, 192),
) -> None:  # fmt: skip
    """Short and longer sequences, forward and backward."""
    from mlembed_kernels import Work
    from mlembed_kernels._attention_backward import backward
    from mlembed_kernels._attention_forward import forward

    work = Work.of(torch.tensor([0, *lengths]).cumsum(0))
    q, k = (torch.ones(work.tokens, H, K, dtype=dtype) for H in heads)
    alive = torch.ones(work.tokens, dtype=torch.bool) if skip else None
    o, lse = forward(q, k, k, work, alive, 0.1, causal)
    backward(o, q, k, k, o, lse, work, alive, 0.1, causal)


def embed(factors: torch.dtype, dtype: torch.dtype, sizes: tuple[int, int, int], rank: int) -> None:
    """Forward and backward; sizes V, R, D. One token has several parts."""
    from mlembed_kernels import Occurrences, _embed_op

    V, R, D = sizes
    o = Occurrences.of(torch.cat([torch.zeros(48, dtype=torch.int64), torch.arange(V)]))
    U, W = torch.ones(V, R, dtype=factors), torch.ones(R, D, dtype=factors)
    x = _embed_op.forward(U, W, o, rank, dtype)
    for _embed_op.FILLERS in (1 << 30, 0):  # as for few tokens, and for many
        _embed_op.backward(x, U, W, o, rank, (True, True))


# Names: shape, what is asked for, dtype.
FULL = (8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = {"1024": FULL, "256": FULL[:6], "896": (*FULL[:7], 896), "plain": (1024,)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES: dict[str, tuple] = {}
for dtype_name, dtype in DTYPES.items():
    for shape, dims in SHAPES.items():
        for wanted in ("rows", "rows-masks", "both", "both-masks"):
            CASES[f"{shape}-{wanted}-{dtype_name}"] = (
                partition, dtype, dims, "both" in wanted, "masks" in wanted,
            )  # fmt: skip
    for kind in ("mse", "kl"):
        CASES[f"{kind}-{dtype_name}"] = (distill, dtype, FULL, kind)
    CASES[f"cosine-{dtype_name}"] = (cosine, dtype, FULL)
    for heads in ((16, 8), (12, 12), (12, 4), (32, 8)):
        for K in (32, 64, 96, 128):
            for causal in (True, False):
                name = f"attention-{heads[0]}-{heads[1]}-{K}{'-causal' * causal}-{dtype_name}"
                CASES[name] = (attention, dtype, heads, K, causal)
    CASES[f"attention-skip-{dtype_name}"] = (attention, dtype, (16, 8), 128, True, True)
    CASES[f"attention-one-{dtype_name}"] = (attention, dtype, (1, 1), 64, False, False, (1,))
    for rank in (1, 64, 65, 512):
        CASES[f"embed-{rank}-{dtype_name}"] = (embed, dtype, dtype, (256, 512, 1024), rank)
        if dtype != torch.float32:
            name = f"embed-{rank}-masters-{dtype_name}"
            CASES[name] = (embed, torch.float32, dtype, (256, 512, 1024), rank)
            CASES[f"embed-odd-masters-{dtype_name}"] = (
                embed, torch.float32, dtype, (257, 65, 131), 65,
            )  # fmt: skip
    CASES[f"embed-odd-{dtype_name}"] = (embed, dtype, dtype, (257, 65, 131), 65)
    # A size of 1 is another kernel: one tile of pairs, one partner, one token.
    CASES[f"one-{dtype_name}"] = (partition, dtype, FULL[:5], True, True, 128)
    CASES[f"one_partner-{dtype_name}"] = (cosine, dtype, FULL[:5], 1)

if __name__ == "__main__":
    triton.runtime.driver.set_active(Hopper())
    compiled = JITFunction.run
    JITFunction.run = compile_instead
    for name in sys.argv[1:] or CASES:
        function, *arguments = CASES[name]
        function(*arguments)
