"""Set before torch and triton load: one thread a test process (two run side by side), no network,
a cache of the tests' own, and Triton's interpreter where there is no GPU. Memory that a kernel
leaves unwritten reads NaN.
"""

import atexit
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in this process, not in more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "MLEMBED_CACHE" not in os.environ:  # in the processes that run side by side it is, by then
    os.environ["MLEMBED_CACHE"] = tempfile.mkdtemp(prefix="mlembed-")
    atexit.register(shutil.rmtree, os.environ["MLEMBED_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Its own library is compiled, or interpreted, for good when it is imported.
    assert "triton" not in sys.modules, "triton was imported before tests/conftest.py"
    os.environ["TRITON_INTERPRET"] = "1"

from limits import (  # noqa: E402, F401
    no_child_is_left,
    pytest_addoption,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_unconfigure,
)

PACKAGE = "mlembed_kernels"
# torch remembers which functions take the device of `with torch.device(...)`, by identity, at its
# first use: that has to be the true torch.empty.
with torch.device("cpu"):
    torch.empty(0)


def _filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make_filled(*args: object, **kwargs: object) -> torch.Tensor:
        x = make(*args, **kwargs)
        if torch.compiler.is_compiling():
            return x
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == PACKAGE and x.is_floating_point():
            with torch.no_grad():
                x.fill_(math.nan)
        return x

    return make_filled


# Made once: torch.compile remembers functions by identity, too.
ALLOCATORS = [
    (owner, name, _filled(getattr(owner, name)))
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]
]


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not torch.utils.deterministic, which does it everywhere: its switch also makes CUDA's own
    operators deterministic, and would hide that two calls differ.
    """
    with monkeypatch.context() as patch:
        for owner, name, filled in ALLOCATORS:
            patch.setattr(owner, name, filled)
        yield
