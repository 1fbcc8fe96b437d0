"""What is written is there whole or not at all."""

import pytest

from mlembed.runtime import files


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ---- atomic_directory ----


def test_success_appears_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with files.atomic_directory(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("a")
        (partial / "b.txt").write_text("b")
        assert not target.exists()
    assert names(target) == ["b.txt", "sub"] and (target / "sub" / "a.txt").read_text() == "a"
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_an_exception_inside_leaves_nothing(error, tmp_path):
    with pytest.raises(error, match="half way"), files.atomic_directory(tmp_path / "t") as p:
        (p / "a.txt").write_text("a")
        raise error("half way")
    assert names(tmp_path) == []


def test_an_existing_target_is_refused_and_untouched(tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    file.write_text("precious")
    for target in (full, file):
        entered = False
        with (
            pytest.raises(ValueError, match="expected nothing there yet, found something"),
            files.atomic_directory(target),
        ):
            entered = True
        assert not entered
    assert names(tmp_path) == ["file", "full"] and names(full) == ["mine.txt"]
    assert file.read_text() == (full / "mine.txt").read_text() == "precious"


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "t"
    with (
        pytest.raises(ValueError, match="could not be written"),
        files.atomic_directory(target) as partial,
    ):
        (partial / "a.txt").write_text("a")
        target.mkdir()
        (target / "theirs.txt").write_text("precious")
    assert names(tmp_path) == ["t"] and names(target) == ["theirs.txt"]


def test_an_empty_target_is_filled(tmp_path):
    (tmp_path / "t").mkdir()
    with files.atomic_directory(tmp_path / "t") as partial:
        (partial / "a.txt").write_text("a")
    assert names(tmp_path / "t") == ["a.txt"]


def test_what_a_killed_run_left_is_replaced(tmp_path):
    left = tmp_path / ".t.partial"
    left.mkdir()
    (left / "old.txt").write_text("old")
    with files.atomic_directory(tmp_path / "t") as partial:
        (partial / "new.txt").write_text("new")
    assert names(tmp_path) == ["t"] and names(tmp_path / "t") == ["new.txt"]


def test_an_os_error_becomes_one_about_the_target(tmp_path):
    with (
        pytest.raises(ValueError, match=r"t: could not be written: .*No such file"),
        files.atomic_directory(tmp_path / "t") as partial,
    ):
        (partial / "none" / "a.txt").write_text("a")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("a file where a directory is needed")
    with (
        pytest.raises(ValueError, match="could not be written"),
        files.atomic_directory(tmp_path / "file" / "t"),
    ):
        pass
    assert names(tmp_path) == ["file"]


# ---- write_text ----


def test_write_text(tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "one é\n")
    files.write_text(path, "two é\n")
    assert path.read_bytes() == "two é\n".encode() and names(tmp_path) == ["a.json"]


def test_write_text_that_fails_keeps_the_old_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: could not be written"):
        files.write_text(tmp_path / "none" / "a.json", "x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "in.txt").write_text("old")
    with pytest.raises(ValueError, match="d: could not be written"):
        files.write_text(tmp_path / "d", "x")
    assert names(tmp_path) == ["d"] and (tmp_path / "d" / "in.txt").read_text() == "old"
