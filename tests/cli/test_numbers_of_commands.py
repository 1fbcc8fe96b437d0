"""Every numeric option of every command refuses numbers that are not finite or out of range."""

import dataclasses
import inspect
import signal
import typing
from importlib import import_module

import pytest
import tyro
from factories import tiny_encoder, tiny_tokenizer, write_encoder, write_jsonl

from mlembed.__main__ import COMMANDS
from mlembed.config.mining import Options

# Arguments that each command needs next to the option; {m} is a model, {o} a new path.
NEEDED = {
    "encode": "{m} a_text",
    "evaluate": "{m} --data {d}",
    "export": "{m} {o}",
    "merge": "{o} {m} {m}",
    "prune": "{m} {o} --data {p}",
    "mine": "{m} {o}.jsonl --data {p}",
}


def options():
    """Yield command, option, and whether it is an integer, for each number of each command."""
    for name in COMMANDS.keys() - {"train"}:  # Its options are the configuration's fields.
        hints = typing.get_type_hints(import_module(f"mlembed.cli.{name}").main)
        hints |= typing.get_type_hints(Options) if Options in hints.values() else {}
        for option, hint in hints.items():
            for kind in {hint, *typing.get_args(hint)} & {int, float}:
                yield name, option, kind is int


OPTIONS = sorted(options())


def test_all_numbers_are_found():
    assert {name for name, _, _ in OPTIONS} == NEEDED.keys() and len(OPTIONS) > 25
    mine = {option for name, option, _ in OPTIONS if name == "mine"}
    assert mine == {
        f.name for f in dataclasses.fields(Options) if f.type in (int, float, int | None)
    }
    assert inspect.isfunction(import_module("mlembed.cli.train").main)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    texts = [f"{i} cats" for i in range(9)]
    rows = [{"query": text, "positive": f"{text} too"} for text in texts]
    nway = [{"id": i, "lang": x, "text": f"{t} {x}"} for i, t in enumerate(texts) for x in "ab"]
    return {
        "m": write_encoder(tiny_encoder(tiny_tokenizer(texts), ranks=(4, 8)), folder / "model"),
        "o": folder / "new",
        "d": write_jsonl(folder / "nway.jsonl", nway),
        "p": write_jsonl(folder / "pairs.jsonl", rows),
    }


@pytest.mark.parametrize(("name", "option", "whole"), OPTIONS)
def test_number_out_of_range(name, option, whole, paths):
    line = NEEDED[name] + " --method slerp" * (option == "t")
    values = [-3, 2**70] + ([] if whole else ["nan", "inf", "-inf", "1e400"])
    main, before = import_module(f"mlembed.cli.{name}").main, signal.getsignal(signal.SIGTERM)
    for value in values:
        # A merge has as many weights as models.
        numbers = [str(value)] * (1 + (option == "weights"))
        words = [*line.format(**paths).split(), f"--{option.replace('_', '-')}", *numbers]
        try:
            with pytest.raises(ValueError) as error:
                tyro.cli(main, args=words)
        finally:
            signal.signal(signal.SIGTERM, before)
        named = str(error.value).partition(": expected ")[0]
        assert named.replace("-", "_") == option, error.value
        assert not paths["o"].exists()
