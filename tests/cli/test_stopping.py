"""A signal ends a command with status 128 and its number and leaves nothing half written: real
processes, held up while they write.
"""

import os
import signal
import sys
import time
from subprocess import DEVNULL, PIPE

import processes
import pytest
from factories import WORDS, small_text, tiny_encoder, tiny_tokenizer, write_encoder

FLUSH = "mlembed.runtime.files.flush"
COMMANDS = {
    "export": (["export", "MODEL", "OUT"], "mlembed.publishing.probes.check", "SIGTERM"),
    "prune": (["prune", "MODEL", "OUT", "--width", "16"], FLUSH, "SIGHUP"),
    "merge": (["merge", "OUT", "MODEL", "MODEL"], FLUSH, "SIGINT"),
    "mine": (["mine", "MODEL", "OUT.jsonl", "--data", "PAIRS"], FLUSH, "SIGTERM"),
    "teacher": (["teacher", "EXPORTED", "OUT", "--data", "PAIRS"], FLUSH, "SIGTERM"),
    "encode": (["encode", "MODEL", "a", "--out", "OUT.npy"], FLUSH, "SIGUSR1"),
    "evaluate": (
        ["evaluate", "MODEL", "--data", "DEV", "--out", "OUT"],
        "mlembed.evaluation.tables.write_report",
        "SIGTERM",
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = write_encoder(tiny_encoder(tiny_tokenizer(WORDS)), folder / "model")
    exported = folder / "exported"
    done = processes.run("-m", "mlembed", "export", model, exported)
    assert done.returncode == 0, done.stderr
    pairs, _ = small_text(folder)
    return {"MODEL": model, "EXPORTED": exported, "PAIRS": pairs, "DEV": folder / "dev.jsonl"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_leaves_nothing(places, tmp_path, command):
    words, function, name = COMMANDS[command]
    words = [str(places.get(word, word)) for word in words]
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    with processes.forked("-m", "mlembed", *words, slow=(function, 1, 60)) as child:
        child.wait_for(processes.HELD_UP)
        number = getattr(signal, name)
        os.kill(child.pid, number)
        assert child.status() == 128 + number, child.text("stderr")
        line = f"got {name}, stopping; a second signal stops at once"
        assert child.text("stderr").strip().splitlines()[-1] == line
        assert "Traceback" not in child.text("stderr")
    assert not list(tmp_path.iterdir())
    done = processes.run("-m", "mlembed", *words)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seconds", [0.5, 1.5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("words", "status"), [(["-m", "mlembed", "export"], 143), (["train.py", "tiny"], 130)]
)
def test_a_signal_during_imports(places, tmp_path, words, status, seconds):
    """The import of torch takes seconds."""
    if words[-1] == "export":
        words = [*words, places["MODEL"], tmp_path / "out"]
    else:
        words = [*words, "--output-dir", tmp_path]
    command = [sys.executable, *words]
    with processes.started(command, stdout=DEVNULL, stderr=PIPE) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == status, err
    assert err == "got SIGTERM, stopping; a second signal stops at once\n"
    assert not list(tmp_path.iterdir())
