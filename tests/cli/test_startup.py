"""Help and mistakes in arguments are answered before the large libraries are imported."""

import json
import subprocess
import sys

import pytest
from processes import ROOT

from mlembed.__main__ import COMMANDS

HEAVY = {"torch", "numpy", "scipy", "pyarrow", "matplotlib", "transformers", "datasets", "faiss"}

# Runs a script or a module like Python does, then prints status, imported modules, CPU seconds.
PROBE = """
import json, resource, runpy, sys
command = sys.argv[1:]
sys.argv, status = command, 0
try:
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    status = end.code
usage = resource.getrusage(resource.RUSAGE_SELF)
print()
print(json.dumps([status, list(sys.modules), usage.ru_utime + usage.ru_stime]))
"""


def probe(*command: str) -> tuple[int, str, set[str], float]:
    """Run a command in a fresh process. Return status, output, imported packages, CPU seconds."""
    words = [sys.executable, "-c", PROBE, *command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    out, _, last = done.stdout.rstrip("\n").rpartition("\n")
    status, modules, seconds = json.loads(last)
    return status, out + done.stderr, {name.partition(".")[0] for name in modules}, seconds


# A command, its status, a word of its output and the CPU seconds it should stay below.
ANSWERS = [
    (["mlembed"], 0, "usage: mlembed COMMAND", 0.5),
    (["mlembed", "--help"], 0, "usage: mlembed COMMAND", 0.5),
    (["mlembed", "encoed"], 1, "error: command: expected one of train, data", 0.5),
    *((["mlembed", name, "--help"], 0, "usage: ", 1.0) for name in COMMANDS),
    (["mlembed", "encode"], 1, "error: Missing from mlembed encode: ", 0.5),
    (["mlembed", "encode", "x", "--dims", "3"], 1, "--dims, 3 (near: --dim)", 0.5),
    (
        ["mlembed", "encode", "x", "--dim", "1e3"],
        1,
        "error: --dim: expected a whole number, got '1e3'",
        0.5,
    ),
    (["mlembed", "encode", "x", "a", "--max-tokens", "0"], 1, "max-tokens: expected 1", 0.5),
    (["mlembed", "mine", "x", "y", "--data", "z", "--top", "0"], 1, "top: expected more", 0.5),
    *(
        (head + arguments, status, word, 0.5)
        for head in (["train.py"], ["mlembed", "train"])
        for arguments, status, word in (
            ([], 2, "usage: python train.py"),
            (["tyni"], 1, "near: tiny"),
            (["tiny", "--optim.lrr", "1"], 1, "no such key (near: optim.lr"),
            (["tiny", "--steps", "many"], 1, "error: --steps: expected a whole number, got 'many'"),
            (["tiny", "--steps", "0"], 1, "error: steps: expected more than 0, got 0"),
        )
    ),
]


@pytest.mark.parametrize(
    ("command", "status", "word", "seconds"),
    ANSWERS,
    ids=lambda x: " ".join(x) if type(x) is list else "",
)
def test_answer_needs_no_large_library(command, status, word, seconds):
    code, text, packages, took = probe(*command)
    assert code == status and word in text, text
    assert not packages & HEAVY
    assert took < 2 * seconds  # A machine that is busy otherwise may be slow.


def test_encoder_is_imported_when_asked_for():
    code = (
        "import sys, mlembed; assert 'torch' not in sys.modules; "
        "from mlembed import Encoder; from mlembed.inference import encoder; "
        "assert Encoder is encoder.Encoder and Encoder.from_pretrained is Encoder.load"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(ImportError, match="cannot import name 'Encodr'"):
        from mlembed import Encodr  # noqa: F401
