"""Concurrent work in order: a thread one item ahead, and processes that keep their own state.

Both return results in the order of the items, and hold only the items in progress.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .process import shield_children

if TYPE_CHECKING:
    import torch

A = TypeVar("A")
B = TypeVar("B")
# Jobs at once in a process: one runs on the device while the next one is prepared.
LANES = 2
# Seconds in which a process has to answer after its start, and to end before it is terminated.
STARTING = 600.0
ENDING = 10.0


def ahead(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Yield `function(item)` in order, computing the next one in a thread.

    The caller's thread iterates over `items`, so that no thread is left waiting for input.
    """
    future: Future[B] | None = None
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            previous, future = future, thread.submit(function, item)
            if previous is not None:
                yield previous.result()
        if future is not None:
            yield future.result()


class Workers:
    """Processes, each with a function of its own, `make(*arguments)`.

    They are spawned, so `make`, arguments, items and results are pickled, and a script that starts
    them runs its code under `if __name__ == "__main__":`.

    with Workers(make, [("cuda:0",), ("cuda:1",)], ["cuda:0", "cuda:1"]) as workers:
        for result in workers.map(items): ...

    Up to LANES threads of a process call its function at once, which has to lock what they share.

    Raises:
        ValueError: raised by a function.
        ChildProcessError: a function raised another error, or a process died; names the process.
    """

    def __init__(
        self,
        make: Callable[..., Callable[[Any], Any]],
        arguments: Sequence[tuple[Any, ...]],
        names: Sequence[str],
    ) -> None:
        self.make, self.arguments, self.names = make, arguments, names
        self.processes: list[Any] = []
        self._lanes: list[tuple[int, Connection]] = []
        # Serialises `join`: only one waiter is notified when a process dies.
        self._join_lock = threading.Lock()
        self._free: queue.Queue[tuple[int, Connection]] = queue.Queue()

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        try:
            for number, arguments in enumerate(self.arguments):
                pipes = [context.Pipe() for _ in range(LANES)]
                ends = [child for _, child in pipes]
                work = (_EndWithParent(), self.make, arguments, ends)
                process = context.Process(target=_serve, args=work, daemon=True)
                self.processes.append(process)
                self._lanes += [(number, parent) for parent, _ in pipes]
                with shield_children():
                    process.start()
                for end in ends:  # Only the child holds them, so that a crash is detected.
                    end.close()
            for lane in self._lanes:
                self._answer(lane, STARTING)
                self._free.put(lane)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        idle = self._free.qsize() == len(self._lanes)
        if idle:  # Processes end when their pipes are closed.
            for _number, lane in self._lanes:
                lane.close()
        for process in self.processes:
            if process.pid is None:
                continue
            process.join(ENDING if idle else 0)
            if process.is_alive():
                process.kill()
                process.join()
        if not idle:
            for _number, lane in self._lanes:
                lane.close()
        self.processes, self._lanes, self._free = [], [], queue.Queue()

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the results of the items, in order.

        Ctrl-C, or an exit by a signal, terminates the processes and the items in progress.
        """
        if not self._lanes:
            raise ValueError("workers: expected a call inside `with`, got one outside")
        pending: deque[Future[Any]] = deque()
        threads = ThreadPoolExecutor(len(self._lanes))
        try:
            for item in items:
                pending.append(threads.submit(self._ask, item))
                if len(pending) > len(self._lanes):
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        except (KeyboardInterrupt, SystemExit):
            for process in self.processes:
                process.kill()
            raise
        finally:  # Waits for items in progress, so that all lanes are free again.
            threads.shutdown(cancel_futures=True)

    def _ask(self, item: Any) -> Any:
        lane = self._free.get()
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                lane[1].send(item)
            return self._answer(lane, None)
        finally:
            self._free.put(lane)

    def _answer(self, lane: tuple[int, Connection], seconds: float | None) -> Any:
        number, connection = lane
        name = self.names[number]
        try:
            if seconds is not None and not connection.poll(seconds):
                raise ChildProcessError(f"worker {name}: no answer after {seconds:.0f} s")
            good, answer = connection.recv()
        except (EOFError, ConnectionResetError):
            with self._join_lock:
                self.processes[number].join(ENDING)
                status = self.processes[number].exitcode
            reason = f"worker {name}: it died, exit status {status}"
            if status == -signal.SIGKILL:
                reason = (
                    f"worker {name}: it was killed, most likely for memory: try fewer devices, or "
                    "a lower --max-tokens"
                )
            elif seconds is not None:
                reason += (
                    "; start processes from a file that runs its code under "
                    'if __name__ == "__main__":'
                )
            raise ChildProcessError(reason) from None
        if good:
            return answer
        kind, reason = answer
        if kind == "ValueError":
            raise ValueError(reason)
        raise ChildProcessError(f"worker {name}: {kind}: {reason}")


def _result(future: Future[Any]) -> Any:
    """Wait in parts, since a signal that comes just before a wait does not end it."""
    while not future.done():
        wait([future], timeout=1.0)
    return future.result()


def device_of(name: str) -> "torch.device":
    """Return the device auto (CUDA if available), cpu, cuda or cuda:0 .. ValueError otherwise."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:0 .., got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {name}")
    return device


# ---- in the process ----


def end_with_parent(parent: int) -> None:
    """End this process soon after the process that started it, however that ends.

    parent: this process's parent, which may be a fork server of the process that started it.
    """
    starter = multiprocessing.parent_process()  # None in a spawned process that still starts.

    def watch() -> None:
        while os.getppid() == parent and (starter is None or starter.is_alive()):
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _EndWithParent:
    """Argument of a spawned process; reading it calls `end_with_parent`, before slow imports."""

    def __reduce__(self) -> tuple[Any, ...]:
        return end_with_parent, (os.getpid(),)


def _serve(
    _: None,
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    lanes: list[Connection],
) -> None:
    """Answer until the parent closes its end, or is killed."""
    try:
        function = make(*arguments)
    except Exception as error:
        for lane in lanes:
            lane.send(_failure(error))
        return
    threads = [threading.Thread(target=_answers, args=(function, lane)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answers(function: Callable[[Any], Any], lane: Connection) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        lane.send((True, None))
        while True:
            item = lane.recv()
            try:
                answer = True, function(item)
            except Exception as error:
                lane.send(_failure(error))
            else:
                lane.send(answer)


def _failure(error: Exception) -> tuple[bool, tuple[str, str]]:
    kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
    return False, (kind, str(error))
