"""The list of what is stored, and its clearing, as a command."""

import json
import os
import time

import processes
import pytest

from mlembed.runtime import cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*args):
    done = processes.run("-m", "mlembed", "cache", *args)
    assert not done.stderr or done.returncode, done.stderr
    return done


def store(kind, digit, source="", days=0):
    """Store an entry that was last used some days ago."""
    build = lambda directory: (directory / "a").write_text("x" * 1_000_000)  # noqa: E731
    cache.cached(kind, digit * 64, build, lambda entry: None, source)
    used = time.time() - 86400 * days
    os.utime(cache.home() / kind / (digit * 64) / cache.LOCK, (used, used))
    os.close(cache.HELD.pop())


def test_list_and_clear(home):
    assert run().stdout == f"{home}: 0 entries, 0.0 MB\n"
    store("text", "1", "pairs.jsonl", 40)
    store("text", "2", "new.jsonl")
    store("factors", "3", days=2)
    (home / "text" / "mine").mkdir()
    lines = run().stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["factors", "text", "text"]
    assert "1.0 MB" in lines[0] and "111111111111" in lines[1] and "pairs.jsonl" in lines[1]
    assert lines[-1] == f"{home}: 3 entries, 3.0 MB"
    assert run("tokens").stdout == f"{home}: 0 entries, 0.0 MB\n"

    (line,) = run("--older-than", "30d", "--clear", "text", "--json").stdout.splitlines()
    told = json.loads(line)
    assert told["removed"] and told["source"] == "pairs.jsonl" and told["kind"] == "text"
    assert run("text").stdout.endswith("1 entries, 1.0 MB\n")
    assert run("--clear").stdout.endswith("2 entries, 2.0 MB; 2 removed, 2.0 MB\n")
    assert [p.name for p in (home / "text").iterdir()] == ["mine"]


def test_entry_in_use_stays(home):
    store("text", "1")
    handle = cache._lock_of(home / "text" / ("1" * 64), cache.fcntl.LOCK_SH)
    out = run("--clear").stdout
    assert "in use" in out and out.endswith("1 entries, 1.0 MB; 0 removed, 0.0 MB\n")
    os.close(handle)


def test_wrong_age_is_an_error(home):
    done = run("--older-than", "30")
    assert done.returncode == 1
    assert done.stderr.startswith("error: older-than: expected hours, days or weeks")
