"""Texts a second of `Encoder.encode` beside sentence-transformers' `encode`, by the same weights.

Cases are mixes of synthetic text of natural lengths. Weights are random, saved by `export` and read
by both: a Qwen3 of 0.6B's layers in bf16 on CUDA, on a CPU a small one in fp32. Modes are `full`
and `exit`, where ours stops at a third of the depth (8 of 28), which sentence-transformers cannot.
Its batches are 32 texts, as its `encode` has them by default, or 256.

Unlike the other benches this one takes times on a CPU too. Whoever is measured encodes all texts in
turn, round by round, so that other work on the machine meets all alike; ms is the median of a
round. A floor is that of the products: tokens times two FLOPs a weight of the layers, at what one
product of that shape reaches.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from mlembed import config
from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.modeling.transformer import Transformer
from mlembed.publishing.export import export

from . import harness, loader
from .worker import say

TESTS: tuple[str, ...] = ()
BASELINES = "sentence_transformers", "st_batch_256"
SWEEP: dict[str, str] = {}
WORKER = [sys.executable, "-m", "bench.encode"]
MODES = "full", "exit"
BATCH = {"sentence_transformers": 32, "st_batch_256": 256}
ALIKE = 1e-4  # of any coordinate of the toy model's vectors, in fp32
CPU_SHAPE = config.Model(
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1024,
    max_position_embeddings=512,
    exits=(2, 6),
    matryoshka_dims=(96, 384),
    ranks=(),
)
CUDA_SHAPE = replace(
    CPU_SHAPE,
    hidden_size=1024,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=3072,
    exits=(8, 28),
    matryoshka_dims=(128, 1024),
)


@dataclass(frozen=True)
class Case:
    """words: median, sigma of the log, least and most of a text. cpu, cuda: texts to encode."""

    name: str
    about: str
    words: tuple[float, float, int, int]
    cpu: int
    cuda: int
    rounds: int = 5
    toy: bool = False
    modes: tuple[str, ...] = MODES
    providers: tuple[str, ...] = ("ours", *BASELINES)


CASES = {
    case.name: case
    for case in (
        Case("short", "texts of about 15 tokens, queries and titles", (12, 0.5, 2, 60),
             1500, 30_000),
        Case("mid", "texts of about 100 tokens, paragraphs", (80, 0.6, 8, 380), 250, 6000),
    )
}  # fmt: skip


def toy(case: Case) -> Case:
    return replace(case, words=(5, 0.5, 1, 9), cpu=40, cuda=40, rounds=1, toy=True)


def about(case: Case) -> str:
    return case.about


# ---- what is encoded, and by what ----


def texts(case: Case, device: torch.device) -> list[str]:
    count = case.cuda if device.type == "cuda" else case.cpu
    return list(loader.texts(drawn(case), count, 1))


def drawn(case: Case) -> loader.Case:
    """The loader's text, of the lengths of this case."""
    return loader.Case("", "", 1, 0, case.words, 24 if case.toy else 2048, 1.0)


def shape(case: Case, device: torch.device) -> config.Model:
    if case.toy:
        small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
        small |= {"num_hidden_layers": 3, "exits": (1, 3), "matryoshka_dims": (8, 32)}
        return replace(CPU_SHAPE, **small)
    return CUDA_SHAPE if device.type == "cuda" else CPU_SHAPE


def saved(case: Case, device: torch.device, out: Path) -> Path:
    """A model of random weights with a tokenizer of the case's language, as `export` writes it."""
    read: Tokenizer = loader.learnt(drawn(case))
    cfg = replace(shape(case, device), vocab_size=read.get_vocab_size())
    torch.manual_seed(0)
    export(Encoder(Transformer(cfg).eval(), read, cfg.max_position_embeddings), out)
    return out


Call = Callable[[list[str]], np.ndarray]


def ours(directory: Path, device: torch.device) -> Encoder:
    """As the command has it: on CUDA in bf16, compiled."""
    cuda = device.type == "cuda"
    return Encoder.load(str(directory), str(device), "bfloat16" if cuda else "float32", cuda)


def theirs(directory: Path, device: torch.device) -> Any:
    from sentence_transformers import SentenceTransformer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return SentenceTransformer(
        str(directory), device=str(device), local_files_only=True, model_kwargs={"dtype": dtype}
    )


def calls(case: Case, directory: Path, device: torch.device) -> dict[tuple[str, str], Call]:
    """(provider, mode) -> texts to vectors."""
    encoder, sentence = ours(directory, device), theirs(directory, device)
    shallow = encoder.model.cfg.exits[0]

    def by_batches(batch: int) -> Call:
        return lambda some: sentence.encode(some, batch_size=batch, show_progress_bar=False)

    found: dict[tuple[str, str], Call] = {
        ("ours", "full"): encoder.encode,
        ("ours", "exit"): lambda some: encoder.encode(some, exit=shallow),
    }
    return found | {(name, "full"): by_batches(batch) for name, batch in BATCH.items()}


# ---- right, then fast ----


def gate(case: Case, directory: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """In fp32, whatever the device: ours are sentence-transformers' vectors, in the same order, and
    an exit's are those of a model cut there."""
    from sentence_transformers import SentenceTransformer

    some = texts(case, device)
    encoder = Encoder.load(str(directory), str(device))
    cut = directory.parent / f"{directory.name}-cut"
    export(encoder, cut, exit=encoder.model.cfg.exits[0])
    for mode, where, exit in (("full", directory, None), ("exit", cut, encoder.model.cfg.exits[0])):
        sentence = SentenceTransformer(str(where), device=str(device), local_files_only=True)
        want = sentence.encode(some, show_progress_bar=False)
        error = float(np.abs(encoder.encode(some, exit=exit) - want).max())
        check = f"{case.name}: {mode}: the vectors of sentence-transformers"
        yield {"check": check, "dtype": "float32", "ok": error < ALIKE, "error": error}


def ceiling(cfg: config.Model, device: torch.device) -> float:
    """FLOPs a second of one product as wide as the layers', the best of twenty."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = 16_384 if device.type == "cuda" else 2048
    a = torch.randn(rows, cfg.hidden_size, device=device, dtype=dtype)
    b = torch.randn(cfg.hidden_size, 2 * cfg.intermediate_size, device=device, dtype=dtype)
    took = []
    for _ in range(21):
        harness.synchronize(device)
        start = time.perf_counter()
        a @ b
        harness.synchronize(device)
        took.append(time.perf_counter() - start)
    return 2 * a.numel() * b.shape[1] / min(took[1:])


def flops(cfg: config.Model, layers: int) -> int:
    """Of one token's products in so many layers."""
    heads = 2 * cfg.num_attention_heads + 2 * cfg.num_key_value_heads
    weights = heads * cfg.head_dim * cfg.hidden_size + 3 * cfg.hidden_size * cfg.intermediate_size
    return 2 * layers * weights


def measure(
    case: Case, some: list[str], of: dict[tuple[str, str], Call], end: float, device: torch.device
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rounds of all in turn, after one of a few texts each, until they are done or time is."""
    took: dict[tuple[str, str], list[float]] = {key: [] for key in of}
    values: dict[tuple[str, str], float] = {}
    for key, call in of.items():
        values[key] = float(np.abs(call(some[:300])).sum(-1).mean())
    for _ in range(case.rounds):
        start = time.monotonic()
        for key, call in of.items():
            harness.synchronize(device)
            begin = time.perf_counter()
            call(some)
            took[key].append((time.perf_counter() - begin) * 1e3)
        if time.monotonic() + (time.monotonic() - start) > end:
            break
    found = {}
    for key, times in took.items():
        found[key] = {"value": values[key], "texts": len(some), "repeats": len(times)}
        if not case.toy:
            p20, ms, p80 = np.percentile(times, [20, 50, 80]).tolist()
            found[key] |= {"ms": ms, "p20": p20, "p80": p80, "texts_s": len(some) / ms * 1e3}
    return found


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On CUDA those of an H200, of other cards too, where they say less; else those of a CPU."""
    ms = {(r["case"], r["provider"], r["mode"]): r["ms"] for r in rows if r.get("ms")}
    cuda = any(row.get("device") == "cuda" for row in rows)
    found = []
    for name in CASES:
        mine = ms.get((name, "ours", "full"))
        base = ms.get((name, BASELINES[0], "full"))
        shallow = ms.get((name, "ours", "exit"))
        limit = 4.0 if cuda else 1.3
        if mine and base:
            what = f"{name}: texts a second over sentence-transformers'"
            met = base / mine >= limit
            found.append({"target": what, "value": base / mine, "limit": f">= {limit}", "met": met})
        if mine and shallow and cuda:
            what = f"{name}: exit 8 of 28 over the whole"
            met = mine / shallow >= 2.5
            found.append({"target": what, "value": mine / shallow, "limit": ">= 2.5", "met": met})
    return found


def table(
    rows: list[dict[str, Any]], mode: str, floors: dict[str, float] | None, baselines: Any
) -> str:
    """A line a provider; of the full depth how many times faster ours is than each."""
    head = (f"{mode:22}", "ms", "p20..p80", "texts/s", "tokens/s", "of floor", "ours x")
    lines = ["{} {:>9} {:>20} {:>9} {:>10} {:>9} {:>7}".format(*head)]
    here = [row for row in rows if row["mode"] == mode]
    mine = next((row.get("ms") for row in here if row["provider"] == "ours"), None)
    for row in here:
        if row.get("ms") is None:
            note = f"{row['provider']:22} {row['status']} {row.get('note') or ''}"
            lines.append(note.rstrip())
            continue
        spread = f"{row['p20']:.0f}..{row['p80']:.0f}"
        times = "-" if mine is None or row["provider"] == "ours" else f"{row['ms'] / mine:.2f}"
        numbers = f"{row['texts_s']:9,.0f} {row['tokens'] / row['ms'] * 1e3:10,.0f}"
        share = f"{row['floor_ms'] / row['ms']:.0%}"
        lines.append(
            f"{row['provider']:22} {row['ms']:9.0f} {spread:>20} {numbers} {share:>9} {times:>7}"
        )
    return "\n".join(lines)


# ---- in a process of its own, as bench/worker.py ----


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.encode", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("stages", nargs="+", help="gate, or a case")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--red", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say("environment", **harness.environment(device), cpus=os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        small = saved(toy(CASES["short"]), device, Path(folder) / "toy")
        whole = small
        if not args.smoke and args.stages != ["gate"]:
            whole = saved(CASES["short"], device, Path(folder) / "whole")
        for stage in args.stages:
            if stage == "gate":
                for verdict in gate(toy(CASES["short"]), small, device):
                    say("gate", **verdict)
            elif stage in CASES:
                shaped = toy(CASES[stage]) if args.smoke else CASES[stage]
                measured(shaped, whole, args, end, device)


def measured(
    case: Case, directory: Path, args: argparse.Namespace, end: float, device: torch.device
) -> None:
    """All providers at once, as they take turns: what fails takes the others with it."""
    try:
        of = calls(case, directory, device)
        keys = [key for key in of if ":".join((case.name, *key)) not in args.skip]
        of = {key: of[key] for key in keys}
        some = texts(case, device)
        read = tokenizer.load(directory)
        cfg = Encoder.load(str(directory), "cpu").model.cfg
        tokens = sum(map(len, tokenizer.tokenize(read, some, cfg.max_position_embeddings)))
        rate = ceiling(cfg, device)
        rows = measure(case, some, of, end - 20, device)
    except Exception as error:
        note = harness.reason(error)
        say("row", case=case.name, provider="ours", mode="full", status="failed", note=note)
        return
    for (provider, mode), row in rows.items():
        if not case.toy:
            layers = cfg.exits[0] if mode == "exit" else cfg.num_hidden_layers
            row |= {"tokens": tokens, "floor_ms": tokens * flops(cfg, layers) / rate * 1e3}
        at = {"case": case.name, "provider": provider, "mode": mode, "device": device.type}
        say("row", **at, status="ran", green=not args.red, note=None, **row)
    del of
    gc.collect()


if __name__ == "__main__":
    main()
