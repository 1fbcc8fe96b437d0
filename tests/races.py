"""Races of commands for one directory: real processes that start within a second.

    outcomes = race([["train.py", ..], ["train.py", ..]], seed=0)

`check_one_wins` asserts what holds for all races: one command ends well, and each of the others
with status 1 and one line.
"""

import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE
from typing import Any

from processes import started


def race(
    commands: Sequence[Sequence[Any]], seed: int, within: float = 1.0, **options: Any
) -> list[tuple[int, str, str]]:
    """Start `python COMMAND` for each command, and return their status, stdout and stderr.

    Args:
        within: seconds in which all start, at times that `seed` draws.
        options: of subprocess.Popen.
    """
    rng, processes = random.Random(seed), []
    starts = sorted(rng.uniform(0, within) for _ in commands)
    order = rng.sample(range(len(commands)), len(commands))
    with ExitStack() as stack:
        begin = time.monotonic()
        for at, number in zip(starts, order, strict=True):
            time.sleep(max(0.0, begin + at - time.monotonic()))
            command = [sys.executable, *commands[number]]
            process = started(command, stdout=PIPE, stderr=PIPE, **options)
            processes.append((number, stack.enter_context(process)))
        ends = {number: process.communicate(timeout=600) for number, process in processes}
        codes = {number: process.returncode for number, process in processes}
    return [(codes[number], *ends[number]) for number in range(len(commands))]


def check_one_wins(outcomes: Sequence[tuple[int, str, str]], directory: Path) -> int:
    """Return the number of the command that ended well; the others must say why they did not.

    Nothing may be left next to `directory`, and none of the owner's files in it.
    """
    codes = [code for code, _, _ in outcomes]
    assert sorted(codes) == [0] + [1] * (len(codes) - 1), outcomes
    for code, _, err in outcomes:
        if code:
            lines = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and "Traceback" not in err, err
            assert (
                "expected no run at work in" in lines[0]
                or "which exists" in lines[0]
                or ("found files in it" in lines[0])
            ), err
            assert str(directory) in lines[0], err
    left = [*directory.parent.glob(".*.partial"), *directory.glob(".*")]
    assert not left, left
    return codes.index(0)
