"""Concurrent work: order, items in progress, errors of processes, and processes that die."""

import os
import signal
import threading
import time

import pytest

from mlembed.runtime import workers
from mlembed.runtime.workers import Workers, ahead


def counted(items, drawn):
    """Yield items, listing those that were drawn."""
    for item in items:
        drawn.append(item)
        yield item


def test_ahead_is_one_ahead_and_in_order():
    main, drawn, computed = threading.get_ident(), [], []

    def source():
        for item in counted(range(6), drawn):
            assert threading.get_ident() == main
            yield item

    def function(i):
        assert threading.get_ident() != main
        computed.append(i)
        return i * i

    for number, square in enumerate(ahead(function, source())):
        assert square == number**2 and len(drawn) == min(number + 2, 6)
    assert computed == drawn == list(range(6))
    assert list(ahead(function, [])) == []


def test_ahead_computes_meanwhile_and_passes_errors_on():
    begun = threading.Event()

    def function(i):
        if i == 2:
            raise ValueError("expected another number, got 2")
        if i == 1:
            begun.set()
        return i

    results = ahead(function, range(9))
    assert next(results) == 0
    assert begun.wait(10)
    assert next(results) == 1
    with pytest.raises(ValueError, match="got 2"):
        next(results)


# ---- processes ----


class Echo:
    """A function of a process, which counts its calls and fails on demand."""

    def __init__(self, name: str) -> None:
        if name == "broken":
            raise ValueError("expected a device, got none")
        if name == "gone":
            os._exit(1)  # Like a script that starts processes without a guard.
        self.name, self.lock, self.calls = name, threading.Lock(), 0

    def __call__(self, item):
        with self.lock:
            self.calls += 1
        if item == "wrong":
            raise ValueError("expected a text, got wrong")
        if item == "fault":
            raise KeyError("fault")
        if item == "die":
            os._exit(7)
        if isinstance(item, float):
            time.sleep(item)
        return item, self.name, os.getpid()


@pytest.fixture(scope="module")
def pair():
    with Workers(Echo, [("a",), ("b",)], ["a", "b"]) as both:
        yield both


def test_results_are_in_order_and_of_both(pair):
    # The first item takes longest; the last is larger than a pipe's buffer.
    items = [0.5, *range(30), b"x" * 3_000_000]
    results = list(pair.map(items))
    assert [item for item, _, _ in results] == items
    assert {name for _, name, _ in results} == {"a", "b"}
    processes = {pid for _, _, pid in results}
    assert len(processes) == 2 and os.getpid() not in processes
    assert list(pair.map([])) == []


def test_few_items_are_drawn_in_advance(pair):
    drawn = []
    for number, _ in enumerate(pair.map(counted(range(40), drawn))):
        assert len(drawn) <= number + 2 * workers.LANES + 2


def test_processes_survive_errors(pair):
    with pytest.raises(ValueError, match="^expected a text, got wrong$"):
        list(pair.map([1, "wrong", 2, 3, 4, 5, 6]))
    with pytest.raises(ChildProcessError, match="^worker [ab]: KeyError: 'fault'$"):
        list(pair.map(["fault"]))
    assert [item for item, _, _ in pair.map(range(9))] == list(range(9))


def test_closed_map_stops(pair):
    results = pair.map(iter(range(10**9)))
    assert next(results)[0] == 0
    results.close()
    assert next(pair.map([5]))[0] == 5


def test_dead_process_is_an_error(pair):
    """The last test of the pair, which loses a process here."""
    with pytest.raises(ChildProcessError, match="^worker [ab]: it died, exit status 7$"):
        list(pair.map([1, 2, "die", 3, 4, 5]))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("broken", ValueError, "expected a device, got none"),
        ("gone", ChildProcessError, 'died, exit status 1; .* from a file .* == "__main__":$'),
    ],
)
def test_failed_start_leaves_nothing(name, error, message):
    both = Workers(Echo, [(name,)], [name])
    with pytest.raises(error, match=message):
        both.__enter__()
    assert both.processes == []
    with pytest.raises(ValueError, match="expected a call inside `with`, got one outside"):
        list(both.map([1]))


@pytest.fixture
def interruptible():
    """Handle Ctrl-C, which processes of pytest-xdist ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_ends_processes(interruptible):
    with Workers(Echo, [("a",)], ["a"]) as one:
        (process,) = one.processes
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(one.map([60.0]))
        assert time.monotonic() - begun < 30 and not process.is_alive()
