"""A run resumed on other data, another shape, other or damaged checkpoints, another length."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests import factories

from .rows import Row, named, shown
from .scene import Scene
from .stock import RESUME, TEXT, same_run, take_stopped

RUN = "runs/tiny"


def lines(work: Path, name: str) -> list[str]:
    return (work / name).read_text().splitlines(keepends=True)


def change(name: str, edit: Callable[[list[str]], list[str]], work: Path) -> None:
    """Edit the lines of a file."""
    (work / name).write_text("".join(edit(lines(work, name))))


def emus(text: str) -> str:
    return text.replace("cats", "emus")


def plain(line: str) -> str:
    """Return a pair without its negatives."""
    return json.dumps(json.loads(line) | {"negatives": []}) + "\n"


HELD_OUT = [
    json.dumps({"id": "x", "lang": lang, "text": "one cats ."}) + "\n"
    for lang in ("eng", "deu", "fra")
]
# The file, the source that the refusal names, and what becomes of its lines.
DATA: dict[str, tuple[str, str, Callable[[list[str]], list[str]]]] = {
    "half of the pairs": ("pairs.jsonl", "pairs", lambda x: x[: len(x) // 2]),
    "one pair less": ("pairs.jsonl", "pairs", lambda x: x[:-1]),
    "one pair more": ("pairs.jsonl", "pairs", lambda x: [*x, emus(x[0])]),
    "pairs in another order": ("pairs.jsonl", "pairs", lambda x: x[::-1]),
    "other texts": ("pairs.jsonl", "pairs", lambda x: list(map(emus, x))),
    "one letter": ("pairs.jsonl", "pairs", lambda x: [x[0].replace("one", "One", 1), *x[1:]]),
    "no negatives": ("pairs.jsonl", "pairs", lambda x: list(map(plain, x))),
    "one letter of translations": ("nway.jsonl", "nway", lambda x: [emus(x[0]), *x[1:]]),
    "translations without the last": ("nway.jsonl", "nway", lambda x: x[:-3]),
    "an evaluation that holds out training text": ("dev.jsonl", "", lambda x: [*x, *HELD_OUT]),
}
KEYS = {
    "--seed 5": "seed",
    "--batch-size 4": "batch_size",
    "--optim.lr 1e-4": "optim.lr",
    "--model.dropout 0.2": "model.dropout",
    "--max-length 16": "max_length",
    "--loss.temperature 0.1": "loss.temperature",
    "--save-every 3": "save_every",
    "--steps 20": "steps",
    "--model.intermediate-size 64": "model.intermediate_size",
    "--model.intermediate-size 64 --allow-changed model.intermediate_size": "intermediate_size",
    "--model.hidden-size 16 --model.matryoshka-dims 8 16 --allow-changed model.hidden_size "
    "model.matryoshka_dims": "model.hidden_size",
    "--model.no-causal --allow-changed model.causal": "model.causal",
    "--model.rope-theta 500 --allow-changed model.rope_theta": "model.rope_theta",
    "--model.ranks 8 --allow-changed model.ranks": "model.ranks",
    "--steps 3 --allow-changed steps": "steps",
    "--steps 5 --allow-changed steps": "steps",
    "--allow-changed stepz": "stepz",
    "--allow-changed data.nowhere": "nowhere",
}
CONFIGS = {
    "a list": "[]",
    "null": "null",
    "a string": '"x"',
    "nothing": "",
    "half": None,
    "an unknown key": '{"stepz": 1}',
    "steps: '12'": '{"steps": "12"}',
    "steps: 1e999": '{"steps": 1e999}',
    "optim: a list": '{"optim": []}',
    "optim.lr: NaN": '{"optim": {"lr": NaN}}',
    "invalid UTF-8": b'{"name": "\xff"}',
    "a million brackets": "[" * 1_000_000,
    "20,000 nested objects": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "a number of 10,000 digits": '{"steps": ' + "9" * 10_000 + "}",
    "a lone surrogate": '{"name": "\\ud800"}',
    "a key twice": '{"steps": 12, "steps": 13}',
}
METRICS = {
    "a line that is a list": "[1, 2]",
    "a line that is a number": "3",
    "a line without step": '{"kind": "train"}',
    "a step that is a string": '{"step": "3", "kind": "train"}',
    "a line that is not JSON": "{",
    "a line of invalid UTF-8": b'{"\xff": 1}',
    "a line without kind": '{"step": 3}',
}
SPOILED = ("model.safetensors", "state.json", "mlembed_config.json", "tokenizer.json", "shard-*")


def rows(seed: int) -> Iterator[Row]:
    for label, (file, source, edit) in DATA.items():
        spoil = partial(change, file, edit)
        attack = partial(spoiled, spoil, (source,))
        yield row(f"data changed: {label}", f"1, names {source or 'data'}", attack)
    yield row("changed data that is allowed", "0, goes to the end", allowed)
    for options, key in KEYS.items():
        words = [*RESUME, *options.split()]
        yield row(f"with {options}", f"1, names {key}", partial(spoiled, None, (key,), argv=words))
    for label, text in CONFIGS.items():
        spoil = partial(spoil_config, text)
        yield row(
            f"config.json: {label}",
            "1, names config.json",
            partial(spoiled, spoil, ("config.json",)),
        )
    for label, text in METRICS.items():
        spoil = partial(spoil_metrics, text)
        yield row(
            f"metrics.jsonl: {label}",
            "1, names its line",
            partial(spoiled, spoil, ("metrics.jsonl:3",)),
        )
    for label, spoil in CHECKPOINTS.items():
        yield row(label, "1, names checkpoints", partial(spoiled, spoil, ("checkpoint",)))
    for name, kind in (("other", "seed"), ("narrow", "width")):
        attack = partial(spoiled, partial(foreign, name), ("checkpoint",), take=f"runs/{name}")
        yield row(f"the checkpoints of a run of another {kind}", "1, names checkpoints", attack)
    for how in ("cut", "flipped", "missing", "empty", "a directory"):
        for pattern in SPOILED:
            attack = partial(damaged, pattern, how, seed)
            yield row(f"newest checkpoint: {pattern} {how}", "the one before, bit-equal", attack)
    yield row("a finished run of 12 steps to 16", "0, 16 steps", extended)
    yield row("a finished run again", "0, nothing to do", finished)
    yield row("a finished run to 11 steps", "1, names steps", partial(finished, steps=11))
    yield row(
        "an empty model/", "the same run", partial(healed, lambda run: (run / "model").mkdir())
    )
    yield row(
        "a file of the user's in the run",
        "the same run",
        partial(healed, lambda run: (run / "notes").touch()),
    )
    yield row("a run that vanishes", "1, names the run", vanished)


def row(input: str, expected: str, attack: Callable[[Scene], str | None]) -> Row:
    return Row("resume", input, expected, attack)


def spoiled(
    spoil: Callable[[Path], None] | None,
    names: tuple[str, ...],
    scene: Scene,
    argv: list[str] = RESUME,
    take: str = TEXT[0],
) -> None:
    """Resume what must not be resumed: a refusal that changes nothing."""
    scene.take(*TEXT, take)
    take_stopped(scene)
    if spoil:
        spoil(scene.work)
    named(scene, scene.run(*argv), *names)


def spoil_config(text: str | bytes | None, work: Path) -> None:
    path = work / RUN / "config.json"
    old = path.read_bytes()
    new = old[: len(old) // 2] if text is None else text
    path.write_bytes(new.encode(errors="surrogatepass") if isinstance(new, str) else new)


def spoil_metrics(text: str | bytes, work: Path) -> None:
    path = work / RUN / "metrics.jsonl"
    old = path.read_bytes().splitlines(keepends=True)
    new = text.encode() if isinstance(text, str) else text
    path.write_bytes(b"".join([*old[:2], new + b"\n", *old[2:]]))


def checkpoints(work: Path) -> list[Path]:
    return sorted((work / RUN / "checkpoints").glob("step_*"))


def no_states(work: Path) -> None:
    for path in checkpoints(work):
        (path / "state.json").unlink()


def renamed(work: Path) -> None:
    newest = checkpoints(work)[-1]
    for path in checkpoints(work)[:-1]:
        shutil.rmtree(path)
    newest.rename(newest.with_name("step_00000010"))


def foreign(run: str, work: Path) -> None:
    """Replace the checkpoints by one of a run of another seed, or of another shape."""
    for path in checkpoints(work):
        shutil.rmtree(path)
    others = sorted((work / "runs" / run / "checkpoints").glob("step_*"))
    others[0].rename(work / RUN / "checkpoints" / others[0].name)


def none_whole(work: Path) -> None:
    for path in checkpoints(work):
        for shard in path.glob("*.safetensors"):
            shard.write_bytes(shard.read_bytes()[:-8])


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "no state.json in any checkpoint": no_states,
    "no checkpoint is whole": none_whole,
    "checkpoints/ is gone": lambda work: shutil.rmtree(work / RUN / "checkpoints"),
    "checkpoints/ is empty": lambda work: [shutil.rmtree(path) for path in checkpoints(work)],
    "checkpoints/ is a file": lambda work: (
        shutil.rmtree(work / RUN / "checkpoints"),
        (work / RUN / "checkpoints").touch(),
    ),
    "the only checkpoint renamed to step 10": renamed,
}


def allowed(scene: Scene) -> None:
    """Resume on changed data, as --allow-changed permits."""
    scene.take(*TEXT)
    take_stopped(scene)
    change("pairs.jsonl", lambda x: [y.replace("cats", "emus") for y in x], scene.work)
    scene.outputs = {"runs"}
    ended = scene.run(*RESUME, "--allow-changed", "data.pairs")
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    steps = [line["step"] for line in factories.loss_trace(scene.work / RUN)]
    scene.check(steps == list(range(1, 13)), f"steps {steps}")


def damaged(pattern: str, how: str, seed: int, scene: Scene) -> str:
    """Damage a file of the newest checkpoint: the run resumes from the one before it."""
    scene.take(*TEXT)
    take_stopped(scene)
    newest = checkpoints(scene.work)[-1]
    files = sorted(newest.glob(pattern))
    if not files:
        return f"no {pattern}"
    path, content = files[0], bytearray(files[0].read_bytes())
    path.unlink()
    if how == "a directory":
        path.mkdir()
    elif how != "missing":
        if how == "flipped":
            content[random.Random(seed).randrange(len(content))] ^= 1
        path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(how)])
    scene.outputs = {"runs"}
    ended = scene.run(*RESUME)
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    scene.check("damaged" in ended.out + ended.err, "no line names the damaged checkpoint")
    same_run(scene)
    return shown(ended)


def extended(scene: Scene) -> None:
    """Train a finished run for four steps more."""
    scene.take(*TEXT, RUN)
    scene.outputs = {"runs"}
    ended = scene.run(*RESUME, "--steps", "16", "--allow-changed", "steps")
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    trace, want = (factories.loss_trace(path / RUN) for path in (scene.work, scene.stock))
    scene.check([line["step"] for line in trace] == list(range(1, 17)), f"{len(trace)} steps")
    scene.check(trace[:12] == want, "another trace")
    saved = json.loads((scene.work / RUN / "config.json").read_text())
    scene.check(saved["steps"] == 16, f"config.json says {saved['steps']} steps")


def finished(scene: Scene, steps: int = 12) -> None:
    """Resume a run that has finished."""
    scene.take(*TEXT, RUN)
    more = [] if steps == 12 else ["--steps", steps, "--allow-changed", "steps"]
    ended = scene.run(*RESUME, *more)
    if steps == 12:
        scene.check(ended.status == 0, f"status {ended.status}, expected 0")
        scene.check("nothing to do" in ended.out, "does not say that there is nothing to do")
    else:
        named(scene, ended, "steps")


def healed(spoil: Callable[[Path], None], scene: Scene) -> None:
    """Resume a run next to something that does not matter."""
    scene.take(*TEXT)
    spoil(take_stopped(scene))
    scene.outputs = {"runs"}
    ended = scene.run(*RESUME)
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    same_run(scene)


def vanished(scene: Scene) -> None:
    """Delete the directory of a run that trains."""
    scene.take(*TEXT)
    run = take_stopped(scene)
    scene.outputs = {"runs"}
    command = scene.start(*RESUME)
    command.until(lambda: (run / "checkpoints/step_00000008").exists())
    run.rename(run.with_name("gone"))
    named(scene, command.wait(), "runs/tiny")
