"""One owner of a directory: the kernel's lock, heartbeats, and what a dead owner leaves behind."""

import errno
import fcntl
import json
import os
import platform
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from subprocess import PIPE

import pytest
from processes import on_path, started

from mlembed.runtime import lock

HOLD = """
import sys, time
from pathlib import Path
from mlembed.runtime import lock
if sys.argv[2:] == ["no locks"]:
    def flock(*args): raise OSError(38, "no locks")
    lock.fcntl.flock = flock
with lock.owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(600)
"""


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def holder(directory, *options):
    """Start a process that owns a directory."""
    command = [sys.executable, "-c", HOLD, directory, *options]
    with started(command, env=on_path(), stdout=PIPE) as process:
        assert process.stdout.readline() == "owned\n"
        yield process


def left_by(directory, age=0.0, **changes):
    """Write the files of an owner of another machine whose heartbeat is `age` seconds old."""
    elsewhere = {"host": "elsewhere", "boot": "another", "pid": 1, "since": "2026-01-02 03:04:05"}
    owner = replace(lock.Owner(), **elsewhere | changes)
    directory.mkdir(exist_ok=True)
    (directory / lock.LOCK).touch()
    path = directory / lock.OWNER
    path.write_text(json.dumps(vars(owner)))
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


# ---- one machine ----


@pytest.mark.parametrize("options", [(), ("no locks",)])
def test_second_is_refused_until_the_first_is_killed(options, tmp_path, request):
    if options:
        request.getfixturevalue("no_locks")
    run = tmp_path / "runs" / "a"
    with holder(run, *options) as process:
        words = f"expected no run at work in {run}, got pid {process.pid} on {platform.node()} "
        with pytest.raises(ValueError, match=f"^{words}since 20"), lock.owned(run):
            raise AssertionError("owned twice")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(run) == [lock.LOCK, lock.OWNER]
    with lock.owned(run) as check:
        check()
        assert json.loads((run / lock.OWNER).read_text())["pid"] == os.getpid()
    assert names(run) == []


def test_only_one_of_many_threads_owns(tmp_path):
    """Each opens the files by itself, like a process."""
    owners, refused, barrier = [], [], threading.Barrier(8)

    def own():
        barrier.wait()
        try:
            with lock.owned(tmp_path / "a"):
                owners.append(1)
                time.sleep(0.5)
        except ValueError:
            refused.append(1)

    threads = [threading.Thread(target=own) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 1 and len(refused) == 7


def test_directory_goes_unless_something_was_written(tmp_path):
    with pytest.raises(ValueError, match="half way"), lock.owned(tmp_path / "runs" / "a"):
        raise ValueError("half way")
    assert names(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with lock.owned(tmp_path / "empty"):
        pass
    with lock.owned(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "config.json").touch()
    assert names(tmp_path) == ["empty", "runs"] and names(tmp_path / "runs" / "a") == [
        "config.json"
    ]


def test_patient_start_waits_for_the_end(tmp_path):
    lines = []
    with holder(tmp_path) as process:
        threading.Timer(0.5, process.kill).start()
        with lock.owned(tmp_path, 60, lines.append):
            assert process.wait() == -signal.SIGKILL
    assert len(lines) == 1 and f"waiting for pid {process.pid} on " in lines[0]


# ---- other machines ----


@pytest.mark.parametrize("locks", [True, False])
def test_heartbeat_of_another_machine_decides(locks, tmp_path, request):
    if not locks:
        request.getfixturevalue("no_locks")
    left_by(tmp_path / "young", 20)
    words = "got pid 1 on elsewhere since 2026-01-02 03:04:05; without a heartbeat it counts as "
    with (
        pytest.raises(ValueError, match=f"{words}dead in (39|40) s"),
        lock.owned(tmp_path / "young"),
    ):
        raise AssertionError("owned twice")
    assert names(tmp_path / "young") == [lock.LOCK, lock.OWNER]
    for age in (61, -3600):  # The clock may have been set back.
        left_by(tmp_path / "old", age)
        with lock.owned(tmp_path / "old") as check:
            check()


def test_container_of_the_same_name_is_not_mistaken(tmp_path, no_locks):
    """Its process ids mean nothing here, even if a process of that id is dead."""
    same = {"host": platform.node(), "boot": lock._boot(), "pid": 2**22 + 1}
    left_by(tmp_path, namespace=1, **same)
    with pytest.raises(ValueError, match="it counts as dead in"), lock.owned(tmp_path):
        raise AssertionError("owned twice")
    left_by(tmp_path, namespace=lock._namespace(), **same)
    with lock.owned(tmp_path):
        pass


def test_owner_before_a_reboot_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 1.5)
    lines = []
    left_by(tmp_path, host=platform.node())
    with lock.owned(tmp_path, say=lines.append):
        assert len(lines) == 1


def test_living_machine_of_the_same_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 1.5)
    path, end = left_by(tmp_path, host=platform.node()), threading.Event()

    def beat():
        while not end.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="expected no run at work"), lock.owned(tmp_path):
            raise AssertionError("owned twice")
    finally:
        end.set()
        thread.join()


def test_owner_sends_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.owned(tmp_path):
        path = tmp_path / lock.OWNER
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime < 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert abs(time.time() - path.stat().st_mtime) < 5


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"pid": 1}', json.dumps(vars(lock.Owner()) | {"pid": "x"})]
)
def test_damaged_owner_counts_by_its_heartbeat(text, tmp_path):
    left_by(tmp_path).write_text(text)
    words = "got an unknown process; without a heartbeat it counts as dead in (59|60) s"
    with pytest.raises(ValueError, match=words), lock.owned(tmp_path):
        raise AssertionError("owned twice")
    os.utime(tmp_path / lock.OWNER, (0, 0))
    with lock.owned(tmp_path):
        pass


def test_owner_that_was_killed_before_it_wrote_is_dead(tmp_path):
    left_by(tmp_path).write_text("")
    with lock.owned(tmp_path) as check:
        check()
        assert f'"pid": {os.getpid()}' in (tmp_path / lock.OWNER).read_text()


def test_empty_owner_counts_by_its_heartbeat_without_locks(tmp_path, no_locks):
    left_by(tmp_path).write_text("")
    with pytest.raises(ValueError, match="got an unknown process"), lock.owned(tmp_path):
        raise AssertionError("owned twice")


# ---- a directory that is lost ----


def test_deleted_directory_is_noticed(tmp_path):
    run = tmp_path / "a"
    with lock.owned(run) as check:
        check()
        for name in names(run):
            (run / name).unlink()
        run.rmdir()
        words = f"{run}: expected the directory of this run, which was deleted"
        with pytest.raises(ValueError, match=words):
            check()
        run.mkdir()
        with pytest.raises(ValueError, match=words):
            check()
    assert names(tmp_path) == []


def test_owner_that_was_taken_over_is_told(tmp_path):
    with lock.owned(tmp_path) as check:
        (tmp_path / lock.OWNER).unlink()
        left_by(tmp_path)
        words = f"expected this run to own {tmp_path}, got pid 1 on elsewhere since .*, which took"
        with pytest.raises(ValueError, match=words):
            check()
    assert names(tmp_path) == [lock.OWNER]  # The other's file stays.


def test_full_disk_is_named(tmp_path, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    words = f"{tmp_path / lock.OWNER}: could not be written: No space left on device"
    with pytest.raises(ValueError, match=words), lock.owned(tmp_path):
        raise AssertionError("owned")
    assert lock.OWNER not in names(tmp_path)
