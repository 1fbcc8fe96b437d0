"""`mlembed encode` as a user runs it: input and output, errors, processes and memory."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
from factories import write_encoder, write_jsonl

from mlembed.cli import encode
from mlembed.inference.encoder import WINDOW, Encoder
from mlembed.inference.vector_files import Quantiser
from tests.inference.test_encoder import build

TEXTS = [
    "Wednesday, May 4, 2050",
    "",
    "বুধবার, ৪ মে, ২০৫০ এবং আরও কয়েকটি শব্দ যা এই লেখাটিকে দীর্ঘ করে তোলে",
    "in 1 hour 🙂",
]
HEAD = [sys.executable, "-m", "mlembed", "encode"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("MLEMBED_TRACEBACK", None)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return replace(build(), prompts={"query": "q: "})


@pytest.fixture(scope="module")
def directory(encoder, tmp_path_factory) -> Path:
    path = write_encoder(encoder, tmp_path_factory.mktemp("model"))
    settings = path / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": encoder.prompts}))
    return path


def command(*arguments: str | Path | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess:
    words = "-m", "mlembed", "encode", *arguments
    return processes.run(*words, input=stdin, env=ENVIRONMENT, text=False)


def start(*arguments, stdout=None):
    """Start the command as a real process, with pipes to write to it and read its errors."""
    options = {"stdin": PIPE, "stdout": stdout, "stderr": PIPE, "text": False}
    return processes.started([*HEAD, *arguments], env=ENVIRONMENT, **options)


def good(*arguments: str | Path | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess:
    done = command(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done


def one_line(done: subprocess.CompletedProcess) -> str:
    """Return the error of a failed command: one line, status 1, no standard output."""
    message = done.stderr.decode()
    assert done.returncode == 1, message
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert done.stdout == b""
    return message


def test_prints_vectors_of_its_arguments(encoder, directory):
    texts = [TEXTS[0], "", TEXTS[3]]
    done = good(directory, *texts, "--dim", "5", "--exit", "2", "--rank", "7", "--prompt", "x: ")
    printed = np.array([line.split() for line in done.stdout.decode().splitlines()], dtype=float)
    want = encoder.encode(texts, 5, 2, 7, prompt="x: ")
    np.testing.assert_allclose(printed, want, rtol=0, atol=1e-5)
    assert done.stderr == b""


def test_closed_pipe_ends_the_command(directory):
    """`| head -1` closes it; the input here never ends."""
    with start(directory, "--exit", "1", "--dim", "2", stdout=PIPE) as process:
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            for _ in range(12):  # windows
                process.stdin.write(b"a\n" * WINDOW)
            raise AssertionError("all of it was read")
        assert process.wait(60) == 141 and process.stderr.read() == b""


def test_lines_to_npy(encoder, directory, tmp_path):
    # An empty line is a text; the last line ends without \\n.
    out = tmp_path / "vectors.npy"
    done = good(directory, "--out", out, "--prompt-name", "query", stdin="\n".join(TEXTS).encode())
    assert done.stdout == b"" and [path.name for path in tmp_path.iterdir()] == ["vectors.npy"]
    assert f"{out}: 4 x 24 float32, " in done.stderr.decode()
    vectors = np.load(out)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode_query(TEXTS), rtol=0, atol=1e-6)


def test_parquet_on_two_devices_and_reused_ranges(encoder, directory, tmp_path):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"id": range(4), "body": TEXTS}), source)
    options = ("--column", "body", "--precision", "int8")
    good(directory, "--input", source, *options, "--out", out, "--device", "cpu", "cpu")
    plain = encoder.encode(TEXTS)
    ranges = np.load(tmp_path / "out.parquet.ranges.npy")
    np.testing.assert_allclose(ranges, [plain.min(0), plain.max(0)], rtol=0, atol=1e-6)
    table = pq.read_table(out)
    assert table.schema.field("embedding").type == pa.list_(pa.int8(), 24)
    # A number on a step's edge may fall to either side of it.
    want = Quantiser("int8", ranges)(plain).astype(int)
    assert np.abs(np.array(table["embedding"].to_pylist()) - want).max() <= 1
    options = ("--precision", "int8", "--ranges", tmp_path / "out.parquet.ranges.npy")
    later = good(directory, TEXTS[3], *options).stdout.split()
    assert np.abs(np.array(later, dtype=int) - want[3]).max() <= 1


def test_json_lines_to_npy(encoder, directory, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, [{"text": text} for text in TEXTS])
    good(directory, "--input", source, "--out", out, "--dtype", "bfloat16", "--max-tokens", "9")
    vectors = np.load(out)
    wanted = encoder.encode(TEXTS)
    assert (vectors * wanted).sum(1).min() > 0.99 and np.abs(vectors - wanted).max() > 1e-4


def error_of(*arguments: str | Path | bytes) -> str:
    """Return the error of the command in this process: starting another takes seconds."""
    with pytest.raises(ValueError) as caught:
        tyro.cli(encode.main, args=[os.fsdecode(one) for one in arguments])
    return str(caught.value)


def test_text_of_ten_million_letters(encoder, directory):
    """Its end is cut before it is tokenised; memory and time stay bounded."""
    done = good(directory, stdin=b"a" * 10**7 + b"\n" + b"a" * 10**6 + b"\n")
    first, second = done.stdout.splitlines()
    assert first == second


@pytest.mark.parametrize("source", ["-", "/dev/zero"])
def test_line_without_end(source, directory):
    words = ["sh", "-c", 'yes | tr -d "\\n" | "$0" "$@"', *HEAD, directory, "--input", source]
    with processes.started(words, env=ENVIRONMENT, stderr=PIPE) as process:
        error = process.stderr.read()
    name = "standard input" if source == "-" else source
    assert error == f"error: {name}:1: expected lines of at most 64 MiB, got a longer one\n"


def test_invalid_utf8(encoder, directory, tmp_path):
    source, out = tmp_path / "a.txt", tmp_path / "out.npy"
    source.write_bytes(b"fine\r\n\xff\xfe broken\n")
    message = error_of(directory, "--input", source, "--out", out)
    assert f"{source}:2: expected UTF-8, got byte 0xff at 0" in message
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    done = good(directory, "--input", source, "--out", out, "--invalid", "replace")
    assert "invalid UTF-8: 2 bytes replaced by U+FFFD" in done.stderr.decode()
    want = encoder.encode(["fine", "\ufffd\ufffd broken"])
    np.testing.assert_allclose(np.load(out), want, rtol=0, atol=1e-6)
    assert "standard input:1: expected UTF-8" in one_line(command(directory, stdin=b"\xc3"))
    # Python hands arguments on as lone surrogates.
    assert "text 0: expected Unicode" in error_of(directory, b"\xff\xfe")


def test_mistakes_are_errors_before_any_work(directory, tmp_path):
    out, text, new = tmp_path / "vectors.npy", tmp_path / "a.txt", tmp_path / "new.npy"
    out.write_bytes(b"precious")
    text.write_bytes(b"a\n")
    nowhere = tmp_path / "nowhere"  # The model is not read yet.
    message = f"out: expected a new file, got {out}, which exists"
    assert message in one_line(command(nowhere, "a", "--out", out))
    cases = [
        ([nowhere, "a", "--input", text], "texts: expected some or --input, got both"),
        ([nowhere, "a", "--precision", "int8"], "expected --ranges or --out for int8, got neither"),
        ([nowhere, "a", "--max-tokens", "0"], "max-tokens: expected 1 or more, got 0"),
        ([nowhere, "--input", tmp_path / "x"], "input: expected a file, got "),
        ([nowhere, "a", "--out", "a.jsonl"], "expected a name that ends in .npy or .parquet"),
        ([nowhere, "a"], "expected a directory or a hub id"),
        ([directory, "a", "--dim", "99", "--out", new], "dim: expected 1..24 (the width), got 99"),
        ([directory, "a", "--device", "cuda:99"], "device: expected one of "),
        ([directory, "a", "--prompt-name", "x"], "prompt_name: expected one of query, got 'x'"),
    ]
    for arguments, message in cases:
        assert message in error_of(*arguments)
    assert out.read_bytes() == b"precious" and not new.exists()


class Loaded(Exception):
    """Ends the command once it has passed on the arguments of the load."""


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("device", [("cpu",), ("cpu", "cpu")], ids=len)
def test_command_compiles_in_the_process_that_encodes(device, compile, monkeypatch):
    def load(model, where, dtype, compile, *others):
        raise Loaded(compile)

    monkeypatch.setattr(Encoder, "load", load)
    with pytest.raises(Loaded) as loaded:
        encode.main("model", ("a text",), device=device, compile=compile)
    assert loaded.value.args == (compile and len(device) == 1,)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_nothing(directory, tmp_path, sent, status):
    with start(directory, "--out", tmp_path / "out.npy") as process:
        process.stdin.write(b"a line\n" * 100)
        process.stdin.flush()
        end = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and time.monotonic() < end:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".out.npy.")
        process.send_signal(sent)
        assert process.wait(60) == status
        line = f"got {sent.name}, stopping; a second signal stops at once"
        assert process.stderr.read().decode().strip() == line
        assert list(tmp_path.iterdir()) == []


# ---- several devices ----


def test_two_processes_equal_one(encoder):
    several = replace(encoder, max_tokens=40).on(["cpu", "cpu"])
    with pytest.raises(ValueError, match=r"expected `with encoder.on\(devices\)`"):
        several.encode(TEXTS)
    texts = TEXTS * 6
    with several as both:
        np.testing.assert_allclose(both.encode(texts), encoder.encode(texts), rtol=0, atol=1e-5)
        sizes = 5, [1, 2, 3] * 8
        want = encoder.encode(texts, *sizes)
        np.testing.assert_allclose(both.encode(texts, *sizes), want, rtol=0, atol=1e-5)
        (part,) = both.stream(iter(TEXTS), 5, 2, 3, precision="ubinary")
        np.testing.assert_array_equal(part, encoder.encode(TEXTS, 5, 2, 3, precision="ubinary"))
        want = encoder.encode(["q: a"])
        np.testing.assert_allclose(both.encode_query(["a"]), want, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="text 20: expected Unicode, got a lone surrogate"):
            both.encode([*texts[:20], "\ud800"])
        assert both.encode([]).shape == (0, 24)
        processes = both.workers.processes
        processes[1].kill()
        with pytest.raises(
            ChildProcessError, match="worker cpu: it was killed, most likely for memory"
        ):
            both.encode(texts)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_command(directory, sent):
    """Processes start for seconds, during which nobody tells them that the command is gone."""
    with start(directory, "--device", "cpu", "cpu") as process:
        end = time.monotonic() + 120
        while len(processes.session(process.pid)) < 4:  # and one that tracks shared memory
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, sent)
        assert process.wait(60) in (-sent, 128 + sent)
        end = time.monotonic() + 10  # less than a second on a machine that does nothing else
        while processes.session(process.pid):
            assert time.monotonic() < end, processes.session(process.pid)
            time.sleep(0.05)


# ---- memory ----


def peak_mib(directory: Path, lines: Path, out: Path) -> float:
    """Return the peak resident memory of the command, encoding lines to out."""
    words = [*HEAD, directory, "--input", lines, "--out", out, "--exit", "1"]
    process = subprocess.Popen(words, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is of other units elsewhere")
def test_memory_does_not_grow_with_lines(encoder, directory, tmp_path):
    """A list of a million lines would take 90 MiB, all vectors 92."""
    counts = 150_000, 1_000_000
    peaks = []
    for count in counts:
        lines, out = tmp_path / f"{count}.txt", tmp_path / f"{count}.npy"
        with lines.open("w") as file:
            file.writelines(f"line {i} of them, {i * 7919 % 10007}\n" for i in range(count))
        peaks.append(peak_mib(directory, lines, out))
    print(f"peaks of {counts} lines: {peaks} MiB")
    assert peaks[1] < peaks[0] + 50
    vectors = np.load(out, mmap_mode="r")
    assert vectors.shape == (1_000_000, 24)
    # Rows on both sides of the windows' bounds, and the last one.
    for i in (0, 32_767, 32_768, 500_000, 999_999):
        want = encoder.encode([f"line {i} of them, {i * 7919 % 10007}"], exit=1)[0]
        np.testing.assert_allclose(vectors[i], want, rtol=0, atol=1e-5)
