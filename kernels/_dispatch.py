"""What a caller of the loss can get wrong, said by name: expected and got.

Values that live on a device are not looked into, which would wait for it.
"""

import os

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")


def use_triton(impl: str, x: Tensor, dots: bool = True) -> bool:
    """Which implementation `impl` means for this tensor.

    "auto" is Triton on CUDA for the dtypes it has; by name it never falls back. Without CUDA only
    Triton's interpreter runs it (TRITON_INTERPRET=1, set before this and triton are imported), and
    that takes a bf16 tl.dot for one of integers: refused where the kernels have `dots`.

    Raises:
        ValueError: unknown, or "triton" where it cannot be.
    """
    check_impl(impl)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if impl == "auto":
        return x.is_cuda and x.dtype in dtypes
    if impl == "triton" and x.dtype not in dtypes:
        raise ValueError(f"impl: triton has fp32, bf16 and fp16, got {x.dtype}")
    if impl == "triton" and not (x.is_cuda or INTERPRETED):
        raise ValueError(f"impl: triton needs CUDA (or TRITON_INTERPRET=1), got {x.device}")
    if impl == "triton" and dots and not x.is_cuda and x.dtype == torch.bfloat16:
        raise ValueError(f"impl: triton's interpreter has no bf16 products, got {x.dtype}")
    return impl == "triton"
