"""Named ranges in a trace of some steps: torch.profiler's, and NVTX's on CUDA."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

WARM_UP = 3  # steps before the first that is traced
_tracing = False


def span(name: str) -> AbstractContextManager[object]:
    """Return a context that is a named range while steps are traced, and nothing otherwise."""
    return _range(name) if _tracing else nullcontext()


@contextmanager
def _range(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(torch.cuda.nvtx.range(name))
        stack.enter_context(record_function(name))
        yield


class Spans:
    """Ranges one after another: `next` ends a range and begins the next, `close` ends the last."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names, self.open = iter(names), ExitStack()

    def next(self) -> None:
        """Begin the next range, if there is another name."""
        self.open.close()
        if (name := next(self.names, None)) is not None:
            self.open.enter_context(span(name))

    def close(self) -> None:
        """End the range that is open, if any."""
        self.open.close()


@contextmanager
def trace(steps: int, path: Path | None) -> Iterator[Callable[[], None]]:
    """Trace `steps` steps after WARM_UP others, fewer if the block ends, and write Chrome's JSON.

    Args:
        steps: 0 traces nothing.
        path: file to write, None on processes that write none.

    Yields:
        what to call at the end of each step.
    """
    global _tracing
    if not steps:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        global _tracing
        _tracing = False
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    # The profiler's own start disturbs the last step of the warm-up alone.
    plan = schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=steps, repeat=1)
    _tracing = True
    try:
        with torch.profiler.profile(
            activities=activities, schedule=plan, on_trace_ready=write
        ) as profile:
            yield profile.step
    finally:
        _tracing = False
