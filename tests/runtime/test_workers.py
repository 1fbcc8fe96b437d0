"""Work beside: order, what is under way, errors of a process, and one that dies."""

import os
import signal
import threading
import time

import pytest

from mlembed.runtime import workers
from mlembed.runtime.workers import Workers, ahead


def test_ahead_is_one_ahead_and_in_order():
    main, drawn, made = threading.get_ident(), [], []

    def source():
        for i in range(6):
            assert threading.get_ident() == main  # who waits for input is the caller
            drawn.append(i)
            yield i

    def function(i):
        assert threading.get_ident() != main
        made.append(i)
        return i * i

    for number, square in enumerate(ahead(function, source())):
        assert square == number**2
        assert len(drawn) == min(number + 2, 6)  # and no more
    assert made == drawn == list(range(6))
    assert list(ahead(function, [])) == []


def test_ahead_works_meanwhile():
    begun = threading.Event()

    def function(i):
        if i == 1:
            begun.set()
        return i

    found = ahead(function, [0, 1])
    assert next(found) == 0
    assert begun.wait(10)  # though nobody asked for it yet


def test_what_fails_in_the_thread_fails_where_it_is_asked_for():
    def function(i):
        if i == 2:
            raise ValueError("no 2")
        return i

    found = ahead(function, range(9))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="no 2"):
        next(found)


# ---- processes ----


class Own:
    """What a process is made with, in it."""

    def __init__(self, name: str) -> None:
        if name == "broken":
            raise ValueError("expected a device, got none")
        if name == "gone":
            os._exit(1)  # as what starts processes without a guard
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
    with Workers(Own, [("a",), ("b",)], ["a", "b"]) as both:
        yield both


def test_results_are_in_order_and_of_both(pair):
    # The first takes longest; and a large one, which no pipe holds at once.
    items = [0.5, *range(30), b"x" * 3_000_000]
    found = list(pair.map(items))
    assert [item for item, _, _ in found] == items
    assert {name for _, name, _ in found} == {"a", "b"}
    processes = {pid for _, _, pid in found}
    assert len(processes) == 2 and os.getpid() not in processes
    assert list(pair.map([])) == []


def test_no_more_is_drawn_than_is_under_way(pair):
    drawn = []

    def source():
        for i in range(40):
            drawn.append(i)
            yield i

    for number, _ in enumerate(pair.map(source())):
        assert len(drawn) <= number + 2 * workers.LANES + 2


def test_errors_come_with_their_reason_and_the_process_goes_on(pair):
    with pytest.raises(ValueError, match="^expected a text, got wrong$"):
        list(pair.map([1, "wrong", 2, 3, 4, 5, 6]))
    with pytest.raises(ChildProcessError, match="^worker [ab]: KeyError: 'fault'$"):
        list(pair.map(["fault"]))
    assert [item for item, _, _ in pair.map(range(9))] == list(range(9))


def test_who_stops_asking_waits_for_no_more(pair):
    found = pair.map(iter(range(10**9)))
    assert next(found)[0] == 0
    found.close()
    assert next(pair.map([5]))[0] == 5


def test_a_process_that_dies_is_an_error(pair):
    """The last one of the pair: it is not itself any more."""
    with pytest.raises(ChildProcessError, match="^worker [ab]: it died, exit status 7$"):
        list(pair.map([1, 2, "die", 3, 4, 5]))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("broken", ValueError, "expected a device, got none"),
        ("gone", ChildProcessError, 'died, exit status 1; .* a file, which .* == "__main__":$'),
    ],
)
def test_a_process_that_cannot_begin_is_an_error_and_nothing_stays(name, error, message):
    both = Workers(Own, [(name,)], [name])
    with pytest.raises(error, match=message):
        both.__enter__()
    assert both.processes == []
    with pytest.raises(ValueError, match="expected `with`, got a call outside of it"):
        list(both.map([1]))


@pytest.fixture
def interruptible():
    """Test processes that run side by side ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_who_interrupts_waits_for_nothing(interruptible):
    with Workers(Own, [("a",)], ["a"]) as one:
        (process,) = one.processes
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(one.map([60.0]))
        assert time.monotonic() - begun < 30 and not process.is_alive()
