"""Full disks: each command names its file in one line, leaves nothing, and works the next time."""

import json

import processes
import pytest
from factories import SMALL, small_text, tiny_encoder, write_encoder, write_jsonl

CODE = """
import resource, runpy, sys
most = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
sys.argv = sys.argv[2:]
if sys.argv[0] == "mlembed":
    runpy.run_module("mlembed", run_name="__main__", alter_sys=True)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def limited(most, *argv):
    """Run a command that can write files of at most `most` bytes."""
    return processes.run("-c", CODE, most, *argv)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return a folder with a model, text, and scores without a report."""
    folder = tmp_path_factory.mktemp("given")
    small_text(folder)
    write_encoder(tiny_encoder(), folder / "model")
    rows = [{"query": f"a {i}", "positive": f"b {i}"} for i in range(300)]
    write_jsonl(folder / "pairs.jsonl", rows)
    (folder / "lines.txt").write_text("one two\n" * 2000)
    scored = folder / "scored"
    dev = folder / "dev.jsonl"
    done = processes.run(
        "-m", "mlembed", "evaluate", folder / "model", "--data", dev, "--out", scored
    )
    assert done.returncode == 0, done.stderr
    return folder


COMMANDS = {
    "export": ("export MODEL OUT", 5_000),
    "prune": ("prune MODEL OUT --width 16", 5_000),
    "merge": ("merge OUT MODEL MODEL", 5_000),
    "teacher": ("teacher MODEL OUT --data PAIRS", 10_000),
    "mine": ("mine MODEL OUT.jsonl --data PAIRS", 10_000),
    "encode": ("encode MODEL --input LINES --out OUT.npy --precision int8", 10_000),
    "ranges": ("encode MODEL a b --out OUT.npy --precision int8", 383),
    "evaluate": ("evaluate MODEL --data DEV --out OUT", 3_000),
    "report": ("report SCORED --out OUT", 10_000),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_leaves_nothing(name, given, tmp_path):
    text, most = COMMANDS[name]
    names = {"MODEL": "model", "PAIRS": "pairs.jsonl", "DEV": "dev.jsonl"}
    names |= {"LINES": "lines.txt", "SCORED": "scored"}
    words = [str(given / names[word]) if word in names else word for word in text.split()]
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    target = next(word for word in words if word.startswith(str(tmp_path)))
    done = limited(most, "mlembed", *words)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and line.startswith(f"error: {target}: could not be written: ")
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
    assert processes.run("-m", "mlembed", *words).returncode == 0


def test_report_next_to_scores_is_all_or_nothing(given):
    before = sorted(given.rglob("*"))
    done = limited(10_000, "mlembed", "report", given / "scored")
    page = given / "scored" / "report.html"
    assert done.returncode == 1 and done.stderr.startswith(f"error: {page}: could not be written: ")
    assert sorted(given.rglob("*")) == before
    assert processes.run("-m", "mlembed", "report", given / "scored").returncode == 0
    assert page.is_file()


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_run_names_the_log_that_is_full(tracker, tmp_path):
    """Whole lines stay, and the run continues where it was."""
    args = [
        "train.py",
        "tiny",
        *SMALL,
        "--compile",
        "off",
        "--data",
        *small_text(tmp_path),
        "--eval",
    ]
    args += ["--steps", "30", "--save-every", "0", "--tracker", tracker, "--output-dir", tmp_path]
    done = limited(5_000, *args)
    run = tmp_path / "tiny"
    full = run / ("metrics.jsonl" if tracker == "none" else "tensorboard")
    assert done.returncode == 1, done.stderr
    assert f"error: {full}: could not be written: File too large" in done.stderr
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 2 and all(line.endswith("\n") and json.loads(line) for line in lines)


@pytest.mark.parametrize("command", ["encode MODEL one two", "data PAIRS"])
def test_standard_output_that_is_full_is_named(command, given):
    names = {"MODEL": "model", "PAIRS": "pairs.jsonl"}
    words = [str(given / names[word]) if word in names else word for word in command.split()]
    done = limited(60, "mlembed", *words)
    assert (done.returncode, done.stderr) == (1, "error: standard output: File too large\n")
