"""Atomic files and directories, names that must be free, and JSON."""

import os
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlembed.runtime import files


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ---- names that must be free ----


def test_check_new(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("nowhere")
    files.check_new(tmp_path / "new" / "er")
    files.check_new(tmp_path / "empty", "directory")
    taken = [(name, "file") for name in ("file", "empty", "link")]
    taken += [(name, "directory") for name in ("file", "full", "link")]
    for name, kind in taken:
        message = f"to: expected a new {kind}, got {tmp_path / name}, which exists"
        with pytest.raises(ValueError, match=message):
            files.check_new(tmp_path / name, kind, "to")
    with pytest.raises(ValueError, match="out: cannot create .*new: .*file is not a writable"):
        files.check_new(tmp_path / "file" / "new")


# ---- atomic_file ----


def write(target, text="new", error=None, **options):
    with files.atomic_file(target, **options) as partial:
        partial.write_text(text)
        assert not target.exists() or target.read_text() != text
        if error:
            raise error


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_file_appears_complete_with_the_mode_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "deep" / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "a").read_text() == "new"
    assert names(tmp_path / "deep") == ["a"]
    assert stat.S_IMODE((tmp_path / "deep" / "a").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    "error, message",
    [
        (KeyboardInterrupt("half way"), "^half way"),
        (ChildProcessError("half way"), "^half way"),
        (ValueError("half way"), "^half way"),
        (OSError("disk full"), "a: could not be written: disk full"),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("replace", [False, True])
def test_failed_file_leaves_nothing(error, message, replace, tmp_path):
    kind = ValueError if type(error) is OSError else type(error)
    with pytest.raises(kind, match=message):
        write(tmp_path / "a", error=error, replace=replace)
    assert names(tmp_path) == []


def test_file_replaces_only_on_request(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(ValueError, match="expected a new file"):
        write(target)
    assert target.read_text() == "old"
    write(target, replace=True)
    assert target.read_text() == "new" and names(tmp_path) == ["a"]


def test_file_that_appears_meanwhile_stays(tmp_path):
    target = tmp_path / "a"
    with pytest.raises(ValueError, match="expected a new file"), files.atomic_file(target) as path:
        path.write_text("ours")
        target.write_text("theirs")
    assert target.read_text() == "theirs" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_file_that_appears_at_the_last_moment_stays(links, tmp_path, monkeypatch):
    """Between the last look and the rename, on file systems with and without hard links."""
    target = tmp_path / "a"

    def late(source, place):
        target.write_text("theirs")
        if not links:
            raise PermissionError("no hard links here")
        return link(source, place)

    link = os.link
    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ValueError, match=f"expected a new file, got {target}, which exists"):
        write(target, "ours")
    assert target.read_text() == "theirs" and names(tmp_path) == ["a"]


def test_file_appears_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *paths: os.unlink(tmp_path / "none"))
    write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


def test_files_appear_together_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "b"
    with files.atomic_files(target) as partial:
        for name in "abc":
            (partial / name).write_text(name)
        assert not target.exists()
    assert names(target.parent) == ["a", "b", "c"]
    target.unlink()
    words = f"expected a new file, got {target.with_name('a')}, which exists"
    with pytest.raises(ValueError, match=words), files.atomic_files(target) as partial:
        for name in "abc":
            (partial / name).write_text("new")
    assert names(target.parent) == ["a", "c"] and target.with_name("a").read_text() == "a"


def test_writers_of_one_file_do_not_meet(tmp_path):
    target = tmp_path / "a"
    with files.atomic_file(target, replace=True) as first:
        write(target, "second", replace=True)
        first.write_text("first")
    assert target.read_text() == "first"


def test_file_and_its_name_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path.name, path.exists())))
    write(tmp_path / "a")
    with files.atomic_directory(tmp_path / "d") as partial:
        (partial / "b").touch()
    assert flushed == [("a", True), (tmp_path.name, True), ("b", True), (tmp_path.name, True)]


def test_write_text_replaces_or_keeps(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one é\n", "two é\n"):
        files.write_text(path, text)
        assert path.read_bytes() == text.encode()
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="d: could not be written"):
        files.write_text(tmp_path / "d", "x")
    assert names(tmp_path) == ["a.json", "d"]


# ---- atomic_directory ----


def test_directory_appears_complete(tmp_path):
    target = tmp_path / "deep" / "target"
    with files.atomic_directory(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a" and names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_failed_directory_leaves_nothing(error, tmp_path):
    with pytest.raises(error, match="half way"), files.atomic_directory(tmp_path / "x" / "t") as p:
        (p / "a.txt").write_text("a")
        raise error("half way")
    assert names(tmp_path) == []


@pytest.mark.parametrize("first", [True, False])
def test_directory_of_another_stays(first, tmp_path):
    """If it is there at first, or appears meanwhile."""
    target = tmp_path / "t"

    def appear():
        target.mkdir()
        (target / "theirs.txt").write_text("precious")

    if first:
        appear()
    words = f"out: expected a new directory, got {target}, which exists"
    with pytest.raises(ValueError, match=words), files.atomic_directory(target) as partial:
        assert not first
        (partial / "a.txt").write_text("a")
        appear()
    assert names(tmp_path) == ["t"] and names(target) == ["theirs.txt"]


def test_empty_directory_is_filled(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / ".t.partial").mkdir()
    (tmp_path / ".t.partial" / "mine.txt").write_text("a user's")
    with files.atomic_directory(tmp_path / "t") as partial:
        (partial / "new.txt").write_text("new")
    assert names(tmp_path) == [".t.partial", "t"] and names(tmp_path / "t") == ["new.txt"]
    assert names(tmp_path / ".t.partial") == ["mine.txt"]


def test_writers_of_one_directory_do_not_meet(tmp_path):
    """The first to end wins; the other says so, and removes its own files only."""
    words = f"out: expected a new directory, got {tmp_path / 't'}, which exists"
    with pytest.raises(ValueError, match=words), files.atomic_directory(tmp_path / "t") as first:
        (first / "a").write_text("first")
        with files.atomic_directory(tmp_path / "t") as second:
            (second / "a").write_text("second")
        assert (first / "a").read_text() == "first"
    assert names(tmp_path) == ["t"] and (tmp_path / "t" / "a").read_text() == "second"


@pytest.mark.parametrize("error", [None, OSError("disk full")])
def test_directory_replaces_on_request(error, tmp_path):
    write(tmp_path / "t" / "old")
    with suppress(ValueError), files.atomic_directory(tmp_path / "t", replace=True) as partial:
        (partial / "new").touch()
        if error:
            raise error
    assert names(tmp_path) == ["t"] and names(tmp_path / "t") == ["old" if error else "new"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_directory_replaces_neither_links_nor_files(kind, tmp_path):
    target = tmp_path / "t"
    (tmp_path / "empty").mkdir()
    target.symlink_to("empty") if kind == "link" else target.touch()
    words = f"out: expected a new directory, got {target}, which exists"
    with pytest.raises(ValueError, match=words), files.atomic_directory(target):
        raise AssertionError("refused before the block")
    assert names(tmp_path) == ["empty", "t"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_of_a_directory_follow_the_umask(umask, tmp_path):
    """safetensors writes files that only their owner can read."""
    before = os.umask(umask)
    try:
        with files.atomic_directory(tmp_path / "t") as partial:
            (partial / "sub").mkdir()
            for path in (partial / "a.safetensors", partial / "sub" / "b.safetensors"):
                save_file({"x": torch.ones(2)}, path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    files_at = dict.fromkeys(("a.safetensors", "b.safetensors"), 0o666 & ~umask)
    assert modes == {**files_at, "t": 0o777 & ~umask, "sub": 0o777 & ~umask}


def test_failed_write_names_the_directory(tmp_path):
    words = "t: could not be written: .*No such file"
    with pytest.raises(ValueError, match=words), files.atomic_directory(tmp_path / "t") as partial:
        (partial / "none" / "a.txt").write_text("a")
    assert names(tmp_path) == []


# ---- JSON ----


@pytest.mark.parametrize(
    "data, message",
    [
        (None, r"a\.json: no such file"),
        (b'{\n"steps": 3,\n"name" "x"\n}', r"a\.json:3: invalid JSON: Expecting ':'"),
        (b'{"a": "\xff"}', r"a\.json: invalid UTF-8 at byte 7"),
    ],
)
def test_read_json_names_the_place(data, message, tmp_path):
    path = tmp_path / "a.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        files.read_json(path)


def test_read_json(tmp_path):
    (tmp_path / "a.json").write_text('{"é": [1]}', encoding="utf-8")
    assert files.read_json(tmp_path / "a.json") == {"é": [1]}


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 32)])
def test_save_array_is_read_by_numpy(shape, tmp_path):
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    for one in (array, array.T):
        files.save_array(tmp_path / "a.npy", one)
        again = np.load(tmp_path / "a.npy")
        assert again.dtype == one.dtype and np.array_equal(again, one)


def test_save_array_notices_that_its_last_byte_is_missing(tmp_path):
    """np.save does not, as of numpy 2.3."""
    resource = pytest.importorskip("resource")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (383, most[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.save_array(tmp_path / "a.npy", np.ones((2, 32), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ('{"a": 1, "b": 2, "a": 3}', "expected distinct keys, got 'a' twice"),
        ("[1e999]", "expected finite numbers, got 1e999"),
        ("[NaN]", "expected finite numbers, got NaN"),
        ("1" * 5000, "expected at most 40 digits, got a number of 5000"),
        ('["\\ud800"]', "lone surrogate"),
        ("", "invalid JSON"),
    ],
)
def test_odd_json_is_one_line(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json(:1)?: .*{message}") as caught:
        files.read_json(path)
    assert len(str(caught.value)) < 300


def test_lenient_json(tmp_path):
    """Files of runs may hold NaN; a byte-order mark is left out."""
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": NaN}', encoding="utf-8")
    assert files.read_object(path, strict=False)["a"] != 0
    with pytest.raises(ValueError, match=r"a\.json:7: invalid JSON"):
        files.parse_json("{", path, line=7)
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON object, got \[\]"):
        files.check_object([], path)


def test_only_regular_files_are_read(tmp_path, monkeypatch):
    """Opening a pipe would wait for a writer, and reading a device would not end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "dir").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = ((pipe, "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path / "dir", "a directory"))
    for path, kind in places:
        with pytest.raises(ValueError, match=f"{path}: expected a regular file, got {kind}"):
            files.read_json(path)
    with pytest.raises(ValueError, match="loop: Too many levels"):
        files.read_json(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b"123")
    with pytest.raises(ValueError, match="large: expected at most 2 bytes, got 3"):
        files.read_bytes(tmp_path / "large", 2)


@pytest.mark.parametrize(
    ("kind", "good", "odd"),
    [
        (int, 3, (True, 3.0, "3", [3])),
        (float, 3, (False, "3", None)),
        (bool, True, (1, "true")),
        (str, "a", (1, ["a"])),
        (dict, {}, ([], "a")),
        (list, [], ({}, "a")),
    ],
)
def test_fields_have_types(kind, good, odd):
    path = Path("a.json")
    value = files.field(path, {"k": good}, "k", kind)
    assert value == good and type(value) is kind
    assert files.field(path, {"k": None}, "k", kind, "default") == "default"
    for one in odd:
        with pytest.raises(ValueError, match="a.json: k: expected (an?|true|text) ?.*, got "):
            files.field(path, {"k": one}, "k", kind)
    with pytest.raises(ValueError, match="a.json: k: expected .*, got none"):
        files.field(path, {}, "k", kind)
