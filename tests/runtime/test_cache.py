"""Entries are whole or not there, whoever writes them; texts come back from files as from lists."""

import contextlib
import subprocess
import sys
import warnings

import pytest

from mlembed.runtime import cache as stored


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def writes(text, before=lambda: None):
    def build(directory):
        before()
        (directory / "a").write_text(text)

    return build


def content(directory):
    return (directory / "a").read_text()


def refuse(directory):
    raise AssertionError("built again")


def test_an_entry_is_built_once(cache):
    assert stored.kept("kind", "key", writes("one"), content) == "one"
    assert stored.kept("kind", "key", refuse, content) == "one"
    assert stored.kept("kind", "other", writes("two"), content) == "two"
    assert stored.kept("else", "key", writes("three"), content) == "three"
    assert sorted(p.name for p in (cache / "kind").iterdir()) == ["key", "other"]


BUILDER = """
import sys, time
from pathlib import Path
from mlembed.runtime import cache as stored

def build(directory):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (directory / "a").write_text("one")

print("ready", flush=True)
sys.stdin.readline()
print(stored.kept("kind", "key", build, lambda d: (d / "a").read_text()))
"""


def test_processes_of_a_machine_build_an_entry_once(cache, tmp_path):
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
    assert [p.name for p in (cache / "kind").iterdir()] == ["key"]


@pytest.mark.parametrize("damaged", [False, True])
def test_of_two_writers_the_first_to_end_stays(damaged, cache, monkeypatch):
    """What another one, on a machine that knows no lock of ours, wrote meanwhile is what both
    open."""
    monkeypatch.setattr(stored, "_alone", lambda place: contextlib.nullcontext())
    if damaged:
        stored.kept("kind", "key", writes("zero"), content)
        (cache / "kind" / "key" / "a").write_text("longer than it was")

    def other():
        assert stored.kept("kind", "key", writes("theirs"), content) == "theirs"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored.kept("kind", "key", writes("mine", other), content) == "theirs"
    assert [p.name for p in (cache / "kind").iterdir()] == ["key"]


def test_a_failed_build_leaves_nothing(cache):
    def fails(directory):
        (directory / "a").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        stored.kept("kind", "key", fails, content)
    assert not list((cache / "kind").iterdir())


def test_a_disk_that_is_full_is_a_warning(cache):
    """The second attempt is elsewhere, whatever failed in the first."""
    tries = []

    def fails_once():
        tries.append(1)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="kind could not be kept there, .* No space left"):
        assert stored.kept("kind", "key", writes("a", fails_once), content) == "a"
    assert not list((cache / "kind").iterdir())


def test_the_digest_is_of_values_and_contents(tmp_path):
    for name, text in (("a", "xy"), ("b", "z"), ("c", "x"), ("d", "yz")):
        (tmp_path / name).write_text(text)
    a, b, c, d = (tmp_path / name for name in "abcd")
    made = [stored.digest(1), stored.digest(1, "2"), stored.digest(1, 2), stored.digest("12")]
    made += [stored.digest(1, files=files) for files in ([a], [a, b], [b, a], [c, d], [a, b, b])]
    assert len(set(made)) == len(made)
    a.rename(tmp_path / "e")
    assert stored.digest(1, files=[tmp_path / "e"]) == made[4]
