"""Modes of all files that a run and the commands write: those of new files under the umask."""

import stat

import processes
import pytest
from factories import SMALL, small_text, tiny_encoder, write_encoder, write_jsonl

CODE = """
import os, runpy, sys
os.umask(int(sys.argv[1], 8))
sys.argv = sys.argv[2:]
if sys.argv[0] == "mlembed":
    runpy.run_module("mlembed", run_name="__main__", alter_sys=True)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "umask", ["027", *(pytest.param(umask, marks=pytest.mark.slow) for umask in ("022", "077"))]
)
def test_files_follow_the_umask(umask, tmp_path, request):
    data, model = small_text(tmp_path), tmp_path / "model"
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"query": "a b", "positive": "c"}] * 2)
    write_encoder(tiny_encoder(), model)
    given = set(tmp_path.rglob("*"))

    def run(*argv):
        cache = tmp_path / "cache"
        env = processes.on_path() | {"MLEMBED_CACHE": str(cache)}
        done = processes.run("-c", CODE, umask, *argv, env=env)
        assert done.returncode == 0, done.stderr[-2000:]

    options = ["--steps", "2", "--save-every", "1", "--compile", "off", "--profile", "1"]
    options += ["--model.ranks", "8", "16", "--output-dir", tmp_path / "runs"]
    run("train.py", "tiny", *SMALL, *options, "--data", *data, "--eval", tmp_path / "dev.jsonl")
    formats = ["sentence-transformers", *(["onnx"] if umask == "022" else [])]
    run("mlembed", "export", model, tmp_path / "out" / "export", "--format", *formats)
    run("mlembed", "prune", model, tmp_path / "out" / "prune", "--width", "16")
    run("mlembed", "merge", tmp_path / "out" / "merge", model, model)
    run("mlembed", "teacher", model, tmp_path / "out" / "teacher", "--data", pairs)
    run("mlembed", "mine", model, tmp_path / "out" / "m.jsonl", "--data", *data[:1])
    vectors = ["encode", model, "a b", "b a", "--precision", "int8", "--out"]
    for name in ("v.npy", "v.parquet"):
        run("mlembed", *vectors, tmp_path / "out" / name)
    scored = tmp_path / "out" / "scores"
    run("mlembed", "evaluate", model, "--data", tmp_path / "dev.jsonl", "--out", scored)
    run("mlembed", "report", scored)
    run("mlembed", "report", tmp_path / "runs" / "tiny", "--out", tmp_path / "out" / "report")
    written = set(tmp_path.rglob("*")) - given
    assert len(written) > 100
    kinds = {path.name for path in written}
    assert {"grid.png", "v.npy.ranges.npy", "metrics.jsonl", "report.html", "keys.npy"} <= kinds
    for path in written:
        new = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == new & ~int(umask, 8), path
