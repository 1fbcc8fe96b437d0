"""Entries of the disk cache are complete or absent, and built once."""

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

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


@pytest.mark.parametrize("damaged", [False, True])
def test_first_of_two_writers_wins(damaged, home, monkeypatch):
    """Another machine does not see the lock; both open what it wrote."""
    monkeypatch.setattr(cache, "_lock", lambda path: contextlib.nullcontext())
    if damaged:
        cache.cached("kind", "key", writes("zero"), content)
        (home / "kind" / "key" / "a").write_text("longer than it was")

    def other():
        assert cache.cached("kind", "key", writes("theirs"), content) == "theirs"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.cached("kind", "key", writes("mine", other), content) == "theirs"
    assert [p.name for p in (home / "kind").iterdir()] == ["key"]


@pytest.mark.parametrize("digests", [False, True])
def test_damage_is_found_by_sizes_or_digests(digests, home):
    cache.cached("kind", "key", writes("one"), content, digests)
    file = home / "kind" / "key" / "a"
    file.write_text("oNe")
    want = "new" if digests else "oNe"
    assert cache.cached("kind", "key", writes("new"), content, digests) == want
    file.unlink()
    assert cache.cached("kind", "key", writes("two"), content, digests) == "two"


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_text("{")])
def test_entry_without_its_list_of_files_is_built_again(change, home):
    cache.cached("kind", "key", writes("one"), content)
    change(home / "kind" / "key" / cache.WHOLE)
    assert cache.cached("kind", "key", writes("two"), content) == "two"


def test_entry_deleted_before_it_is_opened_is_built_again(home):
    cache.cached("kind", "key", writes("one"), content)
    calls = []

    def deleted_at_first(directory):
        if not calls:
            calls.append((directory / "a").unlink())
        return content(directory)

    assert cache.cached("kind", "key", writes("two"), deleted_at_first) == "two"


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
