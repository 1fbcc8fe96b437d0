"""Triton's interpreter at less cost: Python takes the same time around operations of any size."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True, scope="session")
def faster_interpreter() -> Iterator[None]:
    """Spare a quarter of the interpreter's time. It patches Triton's language at every call of a
    device function, although the patch holds until the launch ends, and builds a table of dtypes
    for each one that it looks up.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    numpy_dtype = interpreter._get_np_dtype
    patched: set[int] = set()
    dtypes: dict[str, Any] = {}

    def launch_afresh(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch_language(function)

    def look_up(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = numpy_dtype(dtype)
        return dtypes[dtype.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter, "_get_np_dtype", look_up)
        yield


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the loss tiles of 128 x 128, to which a few texts are padded in any case. For tests that
    are not about the edges of tiles.
    """
    if not INTERPRETED:
        return
    for name in ("_lse_forward", "_lse_logs", "_lse_backward", "_tiles"):
        module = importlib.import_module(f"mlembed_kernels.similarity.{name}")
        for table in (module.CONFIGS, module.CONFIGS_FP32):
            for kernel, options in table.items():
                steps = {"BK": 64} if "BK" in options else {}
                large = {**options, "BM": 128, "BN": 128, **steps}
                monkeypatch.setitem(table, kernel, large)


@pytest.fixture
def no_wait() -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which waiting for CUDA raises, which the context tries first."""

    @contextmanager
    def context() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):
                torch.ones(1, device="cuda").item()
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context
