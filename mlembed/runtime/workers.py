"""Work beside: a thread one ahead, and processes that each keep what they were made with.

Both keep the order of what they are given, and hold no more than what is under way.
"""

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Self, TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")
LANES = 2  # jobs at once in a process: while one is on the device the other is made ready
STARTING = 600.0  # seconds that a process has to say that it is there
ENDING = 10.0  # and to end by itself, before it is made to


def ahead(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """function of each item, in order, the next one in a thread while the last is worked with.

    Items are drawn by the caller's thread: what waits for input is not left behind in a thread.
    """
    coming: Future[B] | None = None
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            last, coming = coming, thread.submit(function, item)
            if last is not None:
                yield last.result()
        if coming is not None:
            yield coming.result()


class Workers:
    """Processes, each with a function of its own: make(*arguments). They are spawned, so what makes
    the function, its arguments, items and results are pickled, and a script that starts them guards
    what it runs by its `__name__`, as such scripts do.

    with Workers(make, [("cuda:0",), ("cuda:1",)], ["cuda:0", "cuda:1"]) as workers:
        for result in workers.map(items): ...

    Up to LANES threads of a process are in its function at once: it has its own locks.

    Raises:
        ValueError: as a function raised it.
        ChildProcessError: anything else that it raised, or a process that died; by name.
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
        self._burial = threading.Lock()  # of two who wait for a process one would hear nothing
        self._free: queue.Queue[tuple[int, Connection]] = queue.Queue()

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        try:
            for number, own in enumerate(self.arguments):
                pipes = [context.Pipe() for _ in range(LANES)]
                theirs = [there for _, there in pipes]
                process = context.Process(target=_serve, args=(self.make, own, theirs), daemon=True)
                self.processes.append(process)
                self._lanes += [(number, here) for here, _ in pipes]
                process.start()
                for there in theirs:  # the process's alone, so that its death is heard of
                    there.close()
            for lane in self._lanes:
                self._answer(lane, STARTING)
                self._free.put(lane)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        begun = [process for process in self.processes if process.pid is not None]
        idle = self._free.qsize() == len(self._lanes)
        if idle:  # they end when they hear that nothing comes any more
            for _number, lane in self._lanes:
                lane.close()
        for process in begun:
            process.join(ENDING if idle else 0)
            if process.is_alive():
                process.terminate()
                process.join()
        if not idle:
            for _number, lane in self._lanes:
                lane.close()
        self.processes, self._lanes, self._free = [], [], queue.Queue()

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """What the processes make of the items, in order. Ctrl-C, or an exit by a signal, while it
        waits ends the processes, and with them what is under way."""
        if not self._lanes:
            raise ValueError("workers: expected `with`, got a call outside of it")
        under_way: deque[Future[Any]] = deque()
        threads = ThreadPoolExecutor(len(self._lanes))
        try:
            for item in items:
                under_way.append(threads.submit(self._ask, item))
                if len(under_way) > len(self._lanes):
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except (KeyboardInterrupt, SystemExit):
            for process in self.processes:
                process.terminate()
            raise
        finally:  # what is under way is waited for, so that the lanes are free again
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
        number, here = lane
        name = self.names[number]
        try:
            if seconds is not None and not here.poll(seconds):
                raise ChildProcessError(f"worker {name}: not there after {seconds:.0f} s")
            good, answer = here.recv()
        except (EOFError, ConnectionResetError):
            with self._burial:
                self.processes[number].join(ENDING)
                status = self.processes[number].exitcode
            what = f"worker {name}: it died, exit status {status}"
            if seconds is not None:
                what += (
                    "; what starts processes is to be a file, which guards what it runs by "
                    'if __name__ == "__main__":'
                )
            raise ChildProcessError(what) from None
        if good:
            return answer
        kind, reason = answer
        if kind == "ValueError":
            raise ValueError(reason)
        raise ChildProcessError(f"worker {name}: {kind}: {reason}")


def device_of(name: str) -> torch.device:
    """auto (CUDA where there is one), cpu, cuda or cuda:0 .. ValueError for what is not there."""
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


def _serve(
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    lanes: list[Connection],
) -> None:
    """Answers until the other end is gone, also where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this
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
