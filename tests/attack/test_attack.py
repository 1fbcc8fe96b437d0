"""The attack on a few rows, with and without a planted fault."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from processes import ROOT

from tests.attack import __main__ as attack
from tests.attack import messages
from tests.attack.scene import Scene

# A row that holds, and rows whose command leaves what no command may leave.
PLANT = """
import sys
from tests.attack import __main__ as attack, scene
from tests.attack.rows import Row, refused
from tests.attack.stock import CLI

def run(code):
    return lambda scene: (scene.run("-c", code), None)[1]

LEFT = "import os, time; os.fork() or (os.setsid(), time.sleep(99))"
REFUSAL = "import sys; sys.stderr.write('error: command: expected one of x, got y\\\\n'); "
attack.rows = lambda seed: [
    refused("held", "an unknown command", [*CLI, "traim"], ("command", "traim")),
    refused("status", "a refusal that succeeds", [*CLI, "--help"], ("help",)),
    Row("traceback", "an assertion", "1", run("assert False")),
    Row("file", "a file", "0", run("open('PWNED', 'w')")),
    Row("refusal", "a file and a refusal", "1", run(REFUSAL + "open('x', 'w'); sys.exit(1)")),
    Row("temporary", "a file in TMPDIR", "0", run("import tempfile as t; t.mkdtemp()")),
    Row("process", "a process", "0", run(LEFT)),
    Row("lines", "two errors", "1", run(REFUSAL * 2 + "sys.exit(1)")),
    Row("message", "an unknown one", "1", run("import sys; sys.exit('error: unheard of')")),
    Row("row", "an error in the row", "0", lambda scene: 1 / 0),
]
attack.stock_of = lambda folder: (folder / "stock").mkdir()
attack.warm = lambda: None
scene.GRACE = 0.3
sys.argv[1:] = ["--workers", "1"]
sys.exit(attack.main())
"""
FAULTS = "status traceback file refusal temporary process lines message row"


def attacked(*argv):
    """Run the attack and return its status, its lines and its errors."""
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / ".path"), str(ROOT)])}


def test_planted_faults_are_reported():
    """Each of nine planted faults is a fault, the row that holds is none, and the status is 1."""
    status, lines, err = attacked("-c", PLANT)
    verdicts = {x.split()[0]: x.split() for x in lines if "FAULT" in x or " ok " in x}
    assert status == 1, err
    assert [kind for kind, words in verdicts.items() if "FAULT" in words] == FAULTS.split(), lines
    assert "ok" in verdicts["held"]
    assert lines[-1] == "10 rows, 9 with a fault"


@pytest.mark.slow
def test_two_rows():
    """The script builds its inputs, runs N rows, and ends with its counts."""
    status, lines, err = attacked("-m", "tests.attack", "--n", "2", "--only", "train.py tiny --")
    assert (status, lines[-1]) == (0, "2 rows, 0 with a fault"), (lines, err)


def test_rows():
    """More than 300 different rows, of which the first N are of many kinds, drawn by the seed."""
    every = attack.rows(0)
    counts = Counter(row.kind for row in every)
    assert len(every) >= 300 and len(counts) == len(attack.FAMILIES)
    assert counts["races"] >= 60 and counts["kills"] >= 30
    drawn = [row.id for row in attack.select(0, 40, None)]
    assert len(set(drawn)) == 40 and drawn == [row.id for row in attack.select(0, 40, None)]
    assert drawn != [row.id for row in attack.select(1, 40, None)]
    assert len({id.partition(":")[0] for id in drawn}) == len(counts)
    assert all(row.kind == "kills" for row in attack.select(0, None, "kills"))


def test_outputs_are_bounded_by_their_names(tmp_path):
    scene = Scene(tmp_path / "row", tmp_path)
    (scene.work / "old").write_text("a")
    scene.before, scene.outputs = {"old": "100644 b"}, {"out"}
    (scene.work / "out").mkdir()
    (scene.work / "out/.model.partial").mkdir()
    (scene.work / "outside").touch()
    scene.close()
    assert scene.faults == ["changed: old, outside", "left: out/.model.partial"]


@pytest.mark.parametrize(
    "message, known",
    [
        ("error: command: expected one of train, data, got traim", True),
        ("error: top: expected more than 0, got -1", True),
        ("error: nobody has written this down", False),
    ],
)
def test_messages_have_entries(message, known):
    assert bool(messages.entries_of(message)) == known


def test_entries_are_not_so_wide_that_they_match_anything():
    assert not messages.entries_of("error: x")
    for text in messages.entries():
        assert sum(letter.isalpha() for letter in text.replace("..", "")) >= 8, text
