"""Texts a second of `Encoder.encode` next to sentence-transformers' `encode`, on the same weights.

Cases are mixes of synthetic text of natural lengths. Weights are random, or those of MODEL=DIR, and
written as `export` writes them, for all to read: on CUDA Qwen3-0.6B's layers in bf16, on a CPU a
small model in fp32. In the mode `exit` ours stops early (8 of 28 layers, on a CPU half of them),
which sentence-transformers does not offer. Its batches are 32 texts, its default, or 256. On a CPU
the mode `bf16` has weights in bf16, and `onnx_int8` is the graph of `export --format onnx-int8`.

This bench takes times on a CPU too. Providers encode all texts in turn, round by round, so that
other work on the machine slows them equally; ms is the median of a round. The floor is that of the
products: tokens times two FLOPs a weight of the layers, at the rate of one product of that shape.
"""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlembed import config
from mlembed.config import shapes
from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.inference.onnx_encoder import OnnxEncoder
from mlembed.modeling.flops import layer_weights
from mlembed.modeling.transformer import Transformer
from mlembed.publishing import to_onnx
from mlembed.publishing.export import write_model

from . import harness, loader
from .report import Floors, Row, Targets

DEVICES = "cuda", "cpu"
BASELINES = "sentence_transformers", "st_batch_256"
INT8 = "onnx_int8"
BATCH = {"sentence_transformers": 32, "st_batch_256": 256}
ALIKE = 1e-4  # largest difference of a coordinate of the toy model's vectors, in fp32
LIMITS = {"cuda": 4.0, "cpu": 2.0}  # times as fast as sentence-transformers
EXITS = {"cuda": 2.5, "cpu": 1.9}  # times as fast as the whole model
CPU_SHAPE = config.Model(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
    head_dim=64, intermediate_size=1024, exits=(3, 6), matryoshka_dims=(96, 384),
)  # fmt: skip
CUDA_SHAPE = replace(
    shapes.SHAPES["ml-embed-0.6b"], max_position_embeddings=512,
    exits=(8, 28), matryoshka_dims=(128, 1024), ranks=(),
)  # fmt: skip
Call = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Case(harness.Case):
    """A mix of texts.

    words: as in the loader's case. cpu, cuda: how many texts to encode. model: a directory.
    """

    about: str
    words: loader.Words
    cpu: int
    cuda: int
    rounds: int = 5
    small: bool = False
    model: str = ""
    modes: tuple[str, ...] = ("full", "exit", "bf16")
    providers: tuple[str, ...] = ("ours", *BASELINES, INT8)

    def toy(self) -> "Case":
        return replace(self, words=(5, 0.5, 1, 9), cpu=40, cuda=40, rounds=1, small=True)

    @property
    def language(self) -> loader.Case:
        """Return the loader's case with text of these lengths."""
        return loader.Case(name="", words=self.words, items=24 if self.small else 2048)

    def texts(self, device: torch.device) -> list[str]:
        count = self.cuda if device.type == "cuda" else self.cpu
        return list(loader.texts(self.language, count, 1))


LINES = "texts of about 15 tokens, queries and titles", "texts of about 100 tokens, paragraphs"
CASES = {
    "short": Case(name="short", about=LINES[0], words=(12, 0.5, 2, 60), cpu=1500, cuda=30_000),
    "mid": Case(name="mid", about=LINES[1], words=(80, 0.6, 8, 380), cpu=250, cuda=6000),
}


# ---- models ----


def shape(case: Case, device: torch.device) -> config.Model:
    if not case.small:
        return CUDA_SHAPE if device.type == "cuda" else CPU_SHAPE
    small: dict[str, Any] = {"num_hidden_layers": 3, "exits": (1, 3), "matryoshka_dims": (8, 32)}
    return replace(CPU_SHAPE, **small, hidden_size=32, intermediate_size=64, head_dim=16)


def saved(case: Case, device: torch.device, out: Path) -> Path:
    """Export MODEL, or a model of random weights with a tokenizer of the case's language."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if case.model:
        encoder = Encoder.load(case.model, "cpu", say=lambda _: None)
        return written(encoder, out, encoder.model.cfg.num_hidden_layers)
    read = loader.learnt(case.language)
    cfg = replace(shape(case, device), vocab_size=read.get_vocab_size())
    torch.manual_seed(0)
    encoder = Encoder(Transformer(cfg).eval(), read, cfg.max_position_embeddings)
    return written(encoder, out, cfg.num_hidden_layers)


def written(encoder: Encoder, out: Path, exit: int) -> Path:
    out.mkdir()
    write_model(out, encoder, encoder.model.cfg.hidden_size, exit, None)
    return out


def sentence_transformer(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {"local_files_only": True, "model_kwargs": {"dtype": dtype}}
    return SentenceTransformer(str(directory), device=str(device), **options)


def calls(case: Case, directory: Path, device: torch.device) -> dict[tuple[str, str], Call]:
    """Return (provider, mode) -> texts to vectors; on CUDA in bf16, ours compiled.

    onnx_int8 is absent without the packages that write and run its graph.
    """
    cuda = device.type == "cuda"
    dtypes = {"full": torch.bfloat16} if cuda else {"full": torch.float32, "bf16": torch.bfloat16}
    both: dict[tuple[str, str], Call] = {}
    for mode, dtype in dtypes.items():
        encoder = Encoder.load(str(directory), str(device), harness.dtype_name(dtype), cuda)
        sentence = sentence_transformer(directory, device, dtype)
        both["ours", mode] = encoder.encode
        if mode == "full":
            both["ours", "exit"] = partial(encoder.encode, exit=shallow(case, encoder.model.cfg))
        for name, batch in BATCH.items():
            both[name, mode] = partial(sentence.encode, batch_size=batch, show_progress_bar=False)
    if not cuda and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        to_onnx.write(directory)
        to_onnx.quantise(directory)
        plain = Encoder.load(str(directory), "cpu")
        both[INT8, "full"] = OnnxEncoder.of(plain, directory / to_onnx.INT8_FILE).encode
    return both


def shallow(case: Case, cfg: config.Model) -> int:
    """Return the first exit, or half the depth of MODEL."""
    return max(1, cfg.num_hidden_layers // 2) if case.model else cfg.exits[0]


# ---- right or not ----


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    case = CASES["short"].toy()
    with tempfile.TemporaryDirectory() as folder:
        yield from compared(case, saved(case, device, Path(folder) / "toy"), device)


def compared(case: Case, directory: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare vectors with sentence-transformers' in fp32, and an exit with a model cut there."""
    some = case.texts(device)
    encoder = Encoder.load(str(directory), str(device))
    early, cut = shallow(case, encoder.model.cfg), directory.parent / f"{directory.name}-cut"
    written(encoder, cut, early)
    for mode, path, exit in (("full", directory, None), ("exit", cut, early)):
        sentence = sentence_transformer(path, device, torch.float32)
        want = sentence.encode(some, show_progress_bar=False)
        error = float(np.abs(encoder.encode(some, exit=exit) - want).max())
        check = f"{case.name}: {mode}: the vectors of sentence-transformers"
        yield {"check": check, "dtype": "float32", "ok": error < ALIKE, "error": error}


# ---- times ----


def ceiling(cfg: config.Model, device: torch.device, half: bool) -> float:
    """Return the FLOPs a second of one product as wide as the layers', the best of twenty."""
    dtype = torch.bfloat16 if half or device.type == "cuda" else torch.float32
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
    """Return the FLOPs of one token's products in some layers."""
    return 2 * layers * layer_weights(cfg)


def measure(
    case: Case,
    some: list[str],
    calls: dict[tuple[str, str], Call],
    end: float,
    device: torch.device,
) -> dict[tuple[str, str], Row]:
    """Warm every provider up with a few texts, then time rounds until time runs out."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    values = {key: float(np.abs(call(some[:300])).sum(-1).mean()) for key, call in calls.items()}
    for _ in range(case.rounds):
        start = time.monotonic()
        for key, call in calls.items():
            harness.synchronize(device)
            begin = time.perf_counter()
            call(some)
            times[key].append((time.perf_counter() - begin) * 1e3)
        if time.monotonic() + (time.monotonic() - start) > end:
            break
    rows = {}
    for key, took in times.items():
        rows[key] = {"value": values[key], "texts": len(some), "repeats": len(took)}
        if not case.small:
            timing = harness.summary(took)
            rows[key] |= {**asdict(timing), "texts_s": len(some) / timing.ms * 1e3}
    return rows


def rows(case: Case, device: torch.device, end: float, skip: set[str]) -> Iterator[tuple[str, Row]]:
    """Yield a row for every provider; an error fails them all, as they take turns."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            directory = saved(case, device, Path(folder) / "model")
            every = calls(case, directory, device)
            some, read = case.texts(device), tokenizer.load(directory)
            cfg = Encoder.load(str(directory), "cpu").model.cfg
            tokens = sum(map(len, tokenizer.tokenize(read, some, cfg.max_position_embeddings)))
            rates = {mode: ceiling(cfg, device, mode == "bf16") for mode in ("full", "bf16")}
            todo = {key: every[key] for key in every if ":".join((case.name, *key)) not in skip}
            measured = measure(case, some, todo, end - 20, device)
        except Exception as error:
            at = {"case": case.name, "provider": "ours", "mode": "full"}
            yield "row", {**at, "status": "failed", "note": harness.reason(error)}
            return
    for (provider, mode), row in measured.items():
        if not case.small:
            layers = shallow(case, cfg) if mode == "exit" else cfg.num_hidden_layers
            rate = rates["bf16" if mode == "bf16" else "full"]
            row |= {"tokens": tokens, "floor_ms": tokens * flops(cfg, layers) / rate * 1e3}
        at = {"case": case.name, "provider": provider, "mode": mode, "device": device.type}
        yield "row", {**at, "status": "ran", "note": None, **row}


COLUMNS = "texts/s", "tokens/s", "of floor"


def cells(rows: Sequence[Row], row: Row, floors: Floors) -> list[str]:
    tokens_s, share = row["tokens"] / row["ms"] * 1e3, row["floor_ms"] / row["ms"]
    return [f"{row['texts_s']:,.0f}", f"{tokens_s:,.0f}", f"{share:.0%}"]


def targets(rows: list[Row]) -> list[Row]:
    """Compare with the targets, of an H200 on CUDA, else of a CPU."""
    targets = Targets(rows)
    for name in CASES:
        for mode in ("full", "bf16"):
            mine, base = (targets.row(name, who, mode) for who in ("ours", BASELINES[0]))
            if mine is not None and base is not None:
                what = f"{name}, {mode}: texts a second over sentence-transformers'"
                targets.add(what, base["ms"] / mine["ms"], ">=", LIMITS[mine["device"]])
        whole, early = (targets.row(name, "ours", mode) for mode in ("full", "exit"))
        if whole is not None and early is not None:
            what = f"{name}: the early exit over the whole"
            targets.add(what, whole["ms"] / early["ms"], ">=", EXITS[whole["device"]])
    return targets.listed
