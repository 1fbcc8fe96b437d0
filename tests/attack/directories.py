"""Model directories of other people: code, paths, links, odd JSON, damaged weights."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .rows import Row, harmless, named, refused, same_vectors
from .scene import Scene
from .stock import CLI, ENCODE, START, TEXT, WRITERS

FILES = (
    *("config.json", "mlembed_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "special_tokens_map.json"),
)
WHOLE: dict[str, str | bytes] = {
    "a list": "[1]",
    "null": "null",
    "a string": '"x"',
    "a number": "3",
    "nothing": "",
    "half an object": '{"a": ',
    "invalid UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "100,000 brackets": "[" * 100_000,
    "20,000 nested objects": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "a number of 10,000 digits": '{"a": ' + "9" * 10_000 + "}",
    "{}": "{}",
}
ODD: dict[str, Any] = {
    "null": None,
    "a string": "32",
    "a list": ["x"],
    "an object": {"a": 1},
    "true": True,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "1e9": 1_000_000_000,
    "2**70": 2**70,
    "NaN": float("nan"),
    "Infinity": float("inf"),
}
# Keys of files, whose odd values are refused or change nothing.
KEYS = {
    "mlembed_config.json": [
        *("model", "model.vocab_size", "model.hidden_size", "model.num_hidden_layers"),
        *("model.head_dim", "model.rms_norm_eps", "model.rope_theta", "model.exits"),
        *("model.max_position_embeddings", "model.pooling", "model.ranks"),
    ],
    "config.json": ["vocab_size", "hidden_size", "rope_scaling", "rope_parameters"],
    "tokenizer_config.json": ["model_max_length", "eos_token", "tokenizer_class"],
    "sentence_bert_config.json": ["max_seq_length", "do_lower_case"],
    "config_sentence_transformers.json": ["prompts", "default_prompt_name", "similarity_fn_name"],
    "1_Pooling/config.json": ["word_embedding_dimension", "pooling_mode_lasttoken"],
}
PAYLOAD = """
import pathlib
for folder in (pathlib.Path(__file__).parent, pathlib.Path.cwd()):
    (folder / "PWNED").touch()
class T:
    pass
"""
PLAIN = ("mlembed_config.json", "mlembed_factors.safetensors")
"""Files without which a directory is read as one of sentence-transformers."""


def rows(seed: int) -> Iterator[Row]:
    for file in FILES:
        for label, content in WHOLE.items():
            spoil = partial(replaced, file, content)
            yield either(f"{file}: {label}", (Path(file).name,), spoil)
    for file in (*FILES[:5], "model.safetensors", "mlembed_factors.safetensors"):
        yield either(f"{file}: a directory", (file,), partial(as_directory, file))
        yield either(f"{file}: a FIFO", (file,), partial(as_fifo, file))
        yield either(f"{file}: a link to itself", (file,), partial(as_loop, file))
    for file, keys in KEYS.items():
        # A value in turn for each key keeps the number of rows in bounds.
        for i, key in enumerate(keys):
            for j, (label, value) in enumerate(ODD.items()):
                if file == "mlembed_config.json" or (i + j) % 3 == 0:
                    spoil = partial(odd_key, file, key, value)
                    yield either(f"{file}: {key} {label}", (Path(file).name,), spoil)
    # Without our own files the same directory is read from those of others.
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "rms_norm_eps"):
        for label, value in ODD.items():
            spoil = partial(foreign, partial(odd_key, "config.json", key, value))
            yield foreign_row(f"config.json: {key} {label}", ("config.json",), spoil)
    for label, content in WHOLE.items():
        spoil = partial(foreign, partial(replaced, "config.json", content))
        yield foreign_row(f"config.json: {label}", ("config.json",), spoil)
    yield from weight_files()
    yield from payloads()


def either(input: str, names: tuple[str, ...], spoil: Callable[[Path], Any]) -> Row:
    """Return a row in which encode names the file, or gives the same vectors."""
    return harmless("directories", input, ENCODE, names, same_vectors, ("model",), spoil)


def foreign_row(input: str, names: tuple[str, ...], spoil: Callable[[Path], Any]) -> Row:
    """Return a row of a directory without our own files."""
    same = lambda scene: same_finite(scene)  # noqa: E731
    label = f"of others, {input}"
    return harmless("directories", label, ENCODE, names, same, ("model",), spoil)


def same_finite(scene: Scene) -> None:
    """Check that vectors are numbers: without our files there are no undisturbed ones."""
    scene.check("nan" not in scene.ended[-1].out, "vectors are not finite")


def foreign(spoil: Callable[[Path], Any], work: Path) -> None:
    for name in PLAIN:
        (work / "model" / name).unlink(missing_ok=True)
    spoil(work)


def replaced(file: str, content: str | bytes, work: Path) -> None:
    data = content.encode() if isinstance(content, str) else content
    (work / "model" / file).write_bytes(data)


def as_directory(file: str, work: Path) -> None:
    (work / "model" / file).unlink()
    (work / "model" / file).mkdir()


def as_fifo(file: str, work: Path) -> None:
    (work / "model" / file).unlink()
    os.mkfifo(work / "model" / file)


def as_loop(file: str, work: Path) -> None:
    (work / "model" / file).unlink()
    (work / "model" / file).symlink_to(Path(file).name)


def odd_key(file: str, key: str, value: Any, work: Path) -> None:
    """Set a key, dotted, of a JSON file."""
    path = work / "model" / file
    content = inner = json.loads(path.read_text())
    *above, last = key.split(".")
    for name in above:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(content))


# ---- weights ----


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HEADERS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header of 2**60 bytes": header(b"{}", 2**60),
    "a header of 90 MB that is not there": header(b"{}", 90_000_000),
    "a header that is a list": header(b"[]"),
    "a header that is not JSON": header(b"{{{{"),
    "a header of invalid UTF-8": header(b'{"\xff": 1}'),
    "a header of 100,000 brackets": header(b"[" * 100_000),
    "no tensors": header(b"{}"),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "offsets beyond the file": header(
        b'{"norm.weight":{"dtype":"F32","shape":[32],"data_offsets":[0,128]}}'
    ),
    "a shape of 2**62": header(
        b'{"norm.weight":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,128]}}'
    )
    + bytes(128),
    "an unknown dtype": header(
        b'{"norm.weight":{"dtype":"F31","shape":[32],"data_offsets":[0,128]}}'
    )
    + bytes(128),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
}


def weight_files() -> Iterator[Row]:
    """Yield rows of weights whose bytes are damaged."""
    for file in ("model.safetensors", "mlembed_factors.safetensors"):
        for label, content in HEADERS.items():
            yield either(f"{file}: {label}", (file,), partial(replaced, file, content))
        for cut in (1, 100, 5000):
            yield either(f"{file}: {cut} bytes cut", (file,), partial(shortened, file, cut))
        yield either(
            f"{file}: missing", (file,), lambda work, f=file: (work / "model" / f).unlink()
        )
    for name in ("train", "prune", "merge", "teacher", "mine", "evaluate", "export"):
        argv = [*START, "--init", "model", "--optim.lr", "2e-5", "--name", "new"]
        argv = argv if name == "train" else WRITERS[name]
        for label in ("empty", "a header of 2**60 bytes", "no tensors", "a git-lfs pointer"):
            yield refused(
                "directories",
                f"{name}, model.safetensors: {label}",
                argv,
                ("model.safetensors|embed_tokens",),
                (*TEXT, "model", "other"),
                partial(replaced, "model.safetensors", HEADERS[label]),
            )


def shortened(file: str, cut: int, work: Path) -> None:
    path = work / "model" / file
    path.write_bytes(path.read_bytes()[:-cut])


# ---- code, paths ----


def modules(entry: dict[str, Any], work: Path) -> None:
    """Change the second module of modules.json."""
    path = work / "model/modules.json"
    content = json.loads(path.read_text())
    content[1] |= entry
    path.write_text(json.dumps(content))


def with_payload(spoil: Callable[[Path], Any], work: Path) -> None:
    for folder in ("model", "model/1_Pooling"):
        for name in ("payload.py", "modeling_payload.py", "__init__.py"):
            (work / folder / name).write_text(PAYLOAD)
    spoil(work)


def dense(function: str, work: Path) -> None:
    """Add a Dense module with an activation function of any name."""
    path = work / "model/modules.json"
    content = json.loads(path.read_text())
    kind = "sentence_transformers.models.Dense"
    content.append({"idx": 3, "name": "3", "path": "3_Dense", "type": kind})
    path.write_text(json.dumps(content))
    folder = work / "model/3_Dense"
    folder.mkdir()
    values = {"in_features": 32, "out_features": 32, "bias": False}
    (folder / "config.json").write_text(json.dumps(values | {"activation_function": function}))


def auto_map(file: str, work: Path) -> None:
    path = work / "model" / file
    names = ("AutoConfig", "AutoModel", "AutoTokenizer")
    value = {name: "modeling_payload.T" for name in names}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": value}))


def secret(work: Path) -> None:
    """Put a file outside of the model that it must not reach."""
    (work / "secret").mkdir()
    shutil.copy(work / "model/1_Pooling/config.json", work / "secret/config.json")


def escape(path: str, work: Path) -> None:
    secret(work)
    modules({"path": path.replace("ABSOLUTE", str(work))}, work)


CODE: dict[str, Callable[[Path], Any]] = {
    "type payload.T": partial(modules, {"type": "payload.T"}),
    "type modeling_payload.T": partial(modules, {"type": "modeling_payload.T"}),
    "type os.system": partial(modules, {"type": "os.system"}),
    "type subprocess.Popen": partial(modules, {"type": "subprocess.Popen"}),
    "type sentence_transformers.SentenceTransformer": partial(
        modules, {"type": "sentence_transformers.SentenceTransformer"}
    ),
    "type sentence_transformers.util.import_from_string": partial(
        modules, {"type": "sentence_transformers.util.import_from_string"}
    ),
    "type 3": partial(modules, {"type": 3}),
    "type null": partial(modules, {"type": None}),
    "path ../secret": partial(escape, "../secret"),
    "path an absolute one": partial(escape, "ABSOLUTE/secret"),
    "path 3": partial(modules, {"path": 3}),
    "activation os.system": partial(dense, "os.system"),
    "activation payload.T": partial(dense, "payload.T"),
    "activation builtins.eval": partial(dense, "builtins.eval"),
    "activation torch.hub.load": partial(dense, "torch.hub.load"),
    "activation torch.nn.modules.os.system": partial(dense, "torch.nn.modules.os.system"),
}
READERS = {
    "encode": ENCODE,
    "teacher": WRITERS["teacher"],
    "distill": [
        *(*START, "--distill.teacher", "model", "--distill.features", "1", "--name", "new"),
    ],
}


def payloads() -> Iterator[Row]:
    """Yield rows of directories that name code, or files elsewhere."""
    for command, argv in READERS.items():
        for label, spoil in CODE.items():
            yield Row(
                "directories",
                f"{command}, modules.json: {label}",
                "1, names modules.json or Dense; runs nothing",
                partial(coded, argv, spoil),
            )
        for file in ("config.json", "tokenizer_config.json"):
            yield Row(
                "directories",
                f"{command}, auto_map in {file}",
                "runs nothing",
                partial(ignored, argv, partial(auto_map, file)),
            )
    for label, link in {
        "a link to /etc/passwd": "/etc/passwd",
        "a link to nothing": "/nowhere/at/all",
        "a link to /dev/zero": "/dev/zero",
        "a link to /dev/null": "/dev/null",
    }.items():
        for file in ("config.json", "tokenizer.json", "modules.json", "model.safetensors"):
            spoil = partial(linked, file, link)
            yield either(f"{file}: {label}", (file,), spoil)
    yield refused(
        "directories",
        "a file as a model",
        [*CLI, "encode", "texts.txt", "a"],
        ("texts.txt",),
        ("texts.txt",),
    )
    yield refused(
        "directories",
        "an empty directory",
        [*CLI, "encode", "empty", "a"],
        ("empty",),
        (),
        lambda work: (work / "empty").mkdir(),
    )
    yield refused(
        "directories", "/dev/null as a model", [*CLI, "encode", "/dev/null", "a"], ("/dev/null",)
    )


def coded(argv: list[str], spoil: Callable[[Path], Any], scene: Scene) -> None:
    """Try a directory that names code: a refusal, and nothing of it runs."""
    scene.take(*TEXT, "model")
    with_payload(spoil, scene.work)
    ended = scene.run(*argv)
    named(scene, ended)
    line = "".join(ended.errors)
    scene.check("modules.json" in line or "Dense" in line, "does not name the file")


def ignored(argv: list[str], spoil: Callable[[Path], Any], scene: Scene) -> None:
    """Try a directory that names code which nobody asks for."""
    scene.take(*TEXT, "model")
    with_payload(spoil, scene.work)
    scene.outputs = {"out", "runs/new"}
    ended = scene.run(*argv)
    scene.check(ended.status in (0, 1), f"status {ended.status}, expected 0 or 1")
    scene.check(not list(scene.work.rglob("PWNED")), "code of the directory ran")


def linked(file: str, target: str, work: Path) -> None:
    path = work / "model" / file
    path.unlink()
    path.symlink_to(target)
