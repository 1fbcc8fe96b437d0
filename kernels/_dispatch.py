"""Choose the implementation of a call, its launch options, and its specification.

Values on a device are not inspected, which would wait for the device.
"""

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Configs = dict[str, dict[str, int]]  # a kernel's name -> its launch options
P = ParamSpec("P")
T = TypeVar("T")


def check_impl(impl: str, impls: tuple[str, ...] = IMPLS) -> None:
    if impl not in impls:
        raise ValueError(f"impl: expected one of {impls}, got {impl!r}")


def use_triton(impl: str, x: Tensor, dots: bool = True) -> bool:
    """Return whether `impl` means Triton for this tensor.

    "auto" is Triton on CUDA for the dtypes that it supports; "triton" never falls back. Without
    CUDA only Triton's interpreter runs it (TRITON_INTERPRET=1, set before this module and triton
    are imported). The interpreter multiplies the bits of bf16 as integers, so kernels with `dots`
    reject bf16 there.

    Raises:
        ValueError: unknown, or "triton" where it cannot run.
    """
    check_impl(impl)
    if impl == "auto":
        return x.is_cuda and x.dtype in DTYPES
    if impl == "triton" and x.dtype not in DTYPES:
        raise ValueError(f"impl: triton supports fp32, bf16 and fp16, got {x.dtype}")
    if impl == "triton" and not (x.is_cuda or INTERPRETED):
        raise ValueError(f"impl: triton needs CUDA (or TRITON_INTERPRET=1), got {x.device}")
    if impl == "triton" and dots and not x.is_cuda:
        check_interpreted(x.dtype)
    return impl == "triton"


def check_interpreted(dtype: torch.dtype, whose: str = "") -> None:
    if dtype == torch.bfloat16:
        raise ValueError(
            f"impl: triton's interpreter does not support bf16 products, got {whose}{dtype}"
        )


def options_of(
    half: Configs, fp32: Configs, name: str, dtype: torch.dtype, dots: bool = True
) -> dict[str, Any]:
    """Return a copy of a kernel's launch options; `dots` adds the precision of its products."""
    wide = dtype == torch.float32
    # A product in fp32 is three tf32 ones.
    precision = {"PRECISION": "tf32x3" if wide else "ieee"} if dots else {}
    return {**(fp32 if wide else half)[name], **precision}


def reference_of(public: Callable[P, T]) -> Callable[P, T]:
    """Return the specification of a public function, which is the function by "reference"."""
    signature = inspect.signature(public)
    parameters = list(signature.parameters.values())
    parameters = parameters[: [p.name for p in parameters].index("impl")]

    @wraps(public)
    def reference(*args: P.args, **kwargs: P.kwargs) -> T:
        return public(*args, **{**kwargs, "impl": "reference"})  # type: ignore[arg-type]

    vars(reference)["__signature__"] = signature.replace(parameters=parameters)
    reference.__name__ = f"{public.__name__}_ref"
    reference.__doc__ = f'Compute the specification of `{public.__name__}`: impl="reference".'
    return reference
