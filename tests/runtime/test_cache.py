"""Entries of the disk cache are complete or absent, and built once."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from mlembed.runtime import cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def writes(text, before=lambda: None):
    def build(directory):
        before()
        (directory / "a").write_text(text)

    return build


def content(directory):
    return (directory / "a").read_text()


def fails(directory):
    raise AssertionError("built again")


def test_entry_is_built_once(home):
    assert cache.cached("kind", "key", writes("one"), content) == "one"
    assert cache.cached("kind", "key", fails, content) == "one"
    assert cache.cached("kind", "other", writes("two"), content) == "two"
    assert cache.cached("else", "key", writes("three"), content) == "three"
    assert sorted(p.name for p in (home / "kind").iterdir()) == ["key", "other"]


KEY = "0123456789abcdef" * 4
# Opens an entry and uses it until a line arrives.
USER = """
import sys
from mlembed.runtime import cache

build = lambda directory: (directory / "a").write_text("built")
print(cache.cached("kind", sys.argv[1], build, lambda d: (d / "a").read_text()), flush=True)
sys.stdin.readline()
"""
# Opens the entries that lines name, and says of each how often this process built it.
RACER = """
import sys
from mlembed.runtime import cache

for line in sys.stdin:
    built = []
    def build(directory):
        built.append((directory / "a").write_text("one"))
    print(cache.cached("kind", line.strip(), build, lambda d: (d / "a").read_text()), len(built))
    sys.stdout.flush()
"""
BUILDER = """
import sys, time
from pathlib import Path
from mlembed.runtime import cache

def build(directory):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (directory / "a").write_text("one")

print("ready", flush=True)
sys.stdin.readline()
print(cache.cached("kind", "key", build, lambda d: (d / "a").read_text()))
"""


def test_processes_build_an_entry_once(home, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", BUILDER, str(log)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    three = [subprocess.Popen(command, **pipes) for _ in range(3)]
    assert [one.stdout.readline() for one in three] == ["ready\n"] * 3
    for one in three:
        one.stdin.write("\n")
        one.stdin.flush()
    assert [one.communicate()[0] for one in three] == ["one\n"] * 3
    assert log.read_text() == "built\n"
    assert [p.name for p in (home / "kind").iterdir()] == ["key"]


def test_ten_races_for_a_damaged_entry(home):
    """Two processes that find the same damage at once build the entry once, in every race."""
    command = [sys.executable, "-W", "ignore", "-c", RACER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    two = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for number in range(10):
        cache.cached("kind", f"{number}", writes("one"), content)
        (home / "kind" / f"{number}" / "a").write_text("two")
        for one in two:
            one.stdin.write(f"{number}\n")
            one.stdin.flush()
        assert sorted(one.stdout.readline() for one in two) == ["one 0\n", "one 1\n"]
    for one in two:
        one.communicate()
    assert len(list((home / "kind").iterdir())) == 10 and not list((home / "locks").iterdir())


@pytest.mark.parametrize("damaged", [False, True])
def test_first_of_two_writers_wins(damaged, home, monkeypatch):
    """Another machine does not see the lock; both open what it wrote."""
    monkeypatch.setattr(cache, "_building", lambda kind, key: contextlib.nullcontext())
    if damaged:
        cache.cached("kind", "key", writes("zero"), content)
        (home / "kind" / "key" / "a").write_text("longer than it was")

    def other():
        assert cache.cached("kind", "key", writes("theirs"), content) == "theirs"

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert cache.cached("kind", "key", writes("mine", other), content) == "theirs"
    assert len(warned) == 2 * damaged
    assert [p.name for p in (home / "kind").iterdir()] == ["key"]


DAMAGE = {
    "a is not what was written": lambda entry: (entry / "a").write_text("oNe"),
    "a is missing": lambda entry: (entry / "a").unlink(),
    "b is surplus": lambda entry: (entry / "b").touch(),
    "a: expected a regular file, got a device": lambda entry: link(entry / "a"),
    "no list    ": lambda entry: link(entry / cache.WHOLE),
    "no list": lambda entry: (entry / cache.WHOLE).unlink(),
    "no list ": lambda entry: (entry / cache.WHOLE).write_text("{}"),
    "no list  ": lambda entry: (entry / cache.WHOLE).write_text("[" * 100_000),
    "no list   ": lambda entry: (entry / cache.WHOLE).write_text('{"a": 3}'),
    "does not open": lambda entry: list_files(entry, (entry / "a").write_bytes(b"\xff")),
}


def link(path):
    """Make a file endless."""
    path.unlink()
    path.symlink_to("/dev/zero")


def list_files(entry, _):
    """Write a correct list of files, as a faulty build would."""
    files = {"a": cache.digest(files=[entry / "a"])}
    (entry / cache.WHOLE).write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("problem", DAMAGE)
def test_damaged_entry_is_built_again(problem, home):
    cache.cached("kind", "key", writes("one"), content)
    DAMAGE[problem](home / "kind" / "key")
    with pytest.warns(UserWarning, match=problem.strip()) as warned:
        assert cache.cached("kind", "key", writes("two"), content) == "two"
    assert len(warned) == 1
    assert cache.cached("kind", "key", fails, content) == "two"
    assert [p.name for p in (home / "kind").iterdir()] == ["key"]


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && shift 0 && exec "$@"'


def test_read_only_cache(home):
    """A whole entry is used; another one is built elsewhere, with a warning."""
    cache.cached("kind", KEY, writes("one"), content)
    (home / "kind" / KEY / cache.LOCK).unlink()
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, str(home)]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and the right to mount a directory read-only")
    for key, out, warned in ((KEY, "one\n", 0), ("0" * 64, "built\n", 1)):
        done = subprocess.run(
            [*mount, sys.executable, "-c", USER, key], capture_output=True, text=True, input="\n"
        )
        assert done.stdout == out and done.stderr.count("Warning") == warned, done.stderr


def test_entry_deleted_before_it_is_opened_is_built_again(home):
    cache.cached("kind", "key", writes("one"), content)
    calls = []

    def deleted_at_first(directory):
        if not calls:
            calls.append(shutil.rmtree(directory))
        return content(directory)

    assert cache.cached("kind", "key", writes("two"), deleted_at_first) == "two"


def test_leftovers_of_a_killed_build_are_removed(home):
    """A running build keeps its own."""
    (home / "locks").mkdir(parents=True)
    (home / "locks" / f"kind-{'1' * 64}").touch()
    (home / "kind" / f".partial-{'2' * 64}-abc_1").mkdir(parents=True)
    code = USER.replace("lambda directory: (directory", "lambda d: print(input()) or (d")
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    two = [subprocess.Popen([*command, key], **pipes) for key in (KEY, "3" * 64)]
    while len(list(home.glob("kind/.partial-*/*"))) < 2:
        time.sleep(0.01)
    two[0].send_signal(signal.SIGKILL)
    two[0].wait()
    cache.remove_leftovers.cache_clear()
    cache.cached("other", "4" * 64, writes("one"), content)
    assert [p.name for p in (home / "locks").iterdir()] == [f"kind-{'3' * 64}"]
    assert [p.name[:12] for p in (home / "kind").iterdir()] == [".partial-333"]
    out, _ = two[1].communicate(b"go\n")
    assert out == b"go\nbuilt\n" and not list((home / "locks").iterdir())


def test_entry_in_use_is_not_removed(home):
    command = [sys.executable, "-c", USER, KEY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as user:
        assert user.stdout.readline() == "built\n"
        (entry,) = cache.entries()
        assert entry.in_use and not entry.remove() and entry.path.is_dir()
        user.communicate("\n")
    (entry,) = cache.entries()
    assert not entry.in_use and entry.remove() and not entry.remove()
    assert not list((home / "kind").iterdir())


def test_failed_build_leaves_nothing(home):
    def half(directory):
        (directory / "a").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.cached("kind", "key", half, content)
    assert not list((home / "kind").iterdir())


def test_full_disk_is_a_warning(home):
    """The second attempt is in a temporary directory."""
    tries = []

    def fails_once():
        tries.append(1)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="kind could not be stored, .* No space left"):
        assert cache.cached("kind", "key", writes("a", fails_once), content) == "a"
    assert not list((home / "kind").iterdir())


def test_digest_depends_on_values_and_contents(tmp_path):
    for name, text in (("a", "xy"), ("b", "z"), ("c", "x"), ("d", "yz")):
        (tmp_path / name).write_text(text)
    a, b, c, d = (tmp_path / name for name in "abcd")
    made = [cache.digest(1), cache.digest(1, "2"), cache.digest(1, 2), cache.digest("12")]
    made += [cache.digest(1, files=files) for files in ([a], [a, b], [b, a], [c, d], [a, b, b])]
    assert len(set(made)) == len(made)
    a.rename(tmp_path / "e")
    assert cache.digest(1, files=[tmp_path / "e"]) == made[4]
    one, two = np.arange(3, dtype=np.int8), np.arange(2, dtype=np.int8)
    made = [cache.digest(1, arrays=arrays) for arrays in ([one], [two], [one, two], [two, one], [])]
    assert len(set(made)) == 5 and made[0] == cache.digest(1, arrays=[one.copy()])
