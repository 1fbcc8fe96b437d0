"""Mistakes in the arguments of commands are errors of one line."""

from typing import Annotated

import pytest
import tyro

from mlembed.config import command_line


def function(
    texts: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    dim: int | None = None,
    top: int = 3,
    t: float = 0.5,
    dims: tuple[int, ...] = (),
):
    """Print arguments."""
    print(texts, dim, top, t)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --dim 1e3", "--dim: expected a whole number, got '1e3'"),
        ("a --top 1.0", "--top: expected a whole number, got '1.0'"),
        ("a --t x", "--t: expected a number, got 'x'"),
        ("a --dims 1e3 8", "--dims: expected numbers, got ['1e3', '8']"),
        ("a --tops 3", "Unrecognized options: --tops, 3 (near: --top)"),
        ("a --top", "Missing value for argument '--top'. Expected 1 values."),
    ],
)
def test_mistake_is_one_line(line, message, capsys):
    with pytest.raises(ValueError) as error:
        command_line.call(function, line.split(), "command")
    assert str(error.value) == message and tuple(capsys.readouterr()) == ("", "")


def test_function_is_called_with_its_own_streams(capsys):
    command_line.call(function, ["a", "b", "--dim", "8", "--t", "1"], "command")
    assert capsys.readouterr().out == "('a', 'b') 8 3 1.0\n"
    with pytest.raises(SystemExit) as end:
        command_line.call(function, ["--help"], "command")
    out = capsys.readouterr().out
    assert end.value.code == 0 and "usage: command" in out and "Print arguments." in out
