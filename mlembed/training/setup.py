"""What a run is built from: text, tokenizer, model, teacher. `train.py` begins here.

Every function is called by all processes of a run, with the same arguments.
"""

import math
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Subset

from mlembed_kernels.attention.attention import WIDTHS

from .. import config
from ..data import sources, tokenizer
from ..data.batches import Batches, steps_of
from ..data.cldr import normalise
from ..data.eval_sets import read_all
from ..data.formats import layouts
from ..data.streams import name_of
from ..data.tables import MIN_SCORE, Table
from ..modeling import hf_config, pretrained, vocabulary
from ..modeling.packed_forward import DeviceEncoder, progress_bar
from ..modeling.transformer import Transformer, num_parameters
from ..runtime import checkpoint, log
from ..runtime.distributed import World, any_process
from . import gradcache
from .engine import Engine
from .gradcache import ActivationCost
from .objective.bank import Bank
from .objective.distill import Distiller
from .objective.teacher import Stored, Teacher
from .optim import adamw, to_weights

SAMPLE = 8192  # texts, and at least 8 a coordinate, whose vectors say where a teacher's lie


@dataclass(frozen=True)
class Text:
    """Training text, without any text of the evaluation, and what to score."""

    tables: list[Table]
    streams: list[config.Source]
    tasks: list[Any]
    held_out: frozenset[str]  # texts of the evaluation, normalised
    languages: dict[str, int]  # texts by language, of the tables whose rows name theirs


def read_text(run: config.Run, say: Callable[[str], None]) -> Text:
    """All sources of a run, each said with what was left out of it, and why.

    Raises:
        ValueError: text that cannot be read, or that leaves nothing to train on; two sources of one
            name.
    """
    tasks = read_all(run.eval)
    held_out = frozenset(normalise(text) for task in tasks for text in task.texts)
    tables, streams, languages = [], [], Counter[str]()
    for source in sources.all_of(run):
        if source.streaming:
            streams.append(source)
            say(f"train  {name_of(source)}: as it streams")
            continue
        for table, report in sources.read(source, bad_rows=run.bad_rows, held_out=held_out):
            tables.append(table)
            languages.update(report.languages)
            kind = "n-way ids" if table.nway else "pairs"
            of = f"{len(table)} {kind}, {len(table.texts)} texts, {table.task}"
            say(f"train  {table.name}: {of}{left_out(report)}")
            for bad in report.bad_rows:
                say(f"       bad row {bad}")
    names = [table.name for table in tables] + [name_of(source) for source in streams]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"data: expected sources of different names (a mixture can give them), got several "
            f"{', '.join(twice)}"
        )
    for task in tasks:
        say(f"eval   {task.name}: {len(task.texts)} texts")
    return Text(tables, streams, tasks, held_out, dict(sorted(languages.items())))


def left_out(report: layouts.Report) -> str:
    """What became of the rows of a source that are not trained on."""
    counts = {
        "bad rows": report.bad,
        "texts of the evaluation": report.held_out,
        "duplicates": report.duplicates,
        f"scored below {MIN_SCORE}": report.by_score,
        "without a translation": report.alone,
        "beyond the cap": report.by_cap,
    }
    said = [f"{count} {what}" for what, count in counts.items() if count]
    return f"; left out: {', '.join(said)}" if said else ""


def prompts(run: config.Run) -> dict[str, str]:
    """Prompts by name, as an encoder has them: of every source that has one before its queries, by
    its name; `query` and `document` where all sources have the same, otherwise empty."""
    every = sources.all_of(run)
    found = {name_of(source): source.prompt for source in every if source.prompt}
    for name, kinds in (
        ("query", {source.prompt for source in every}),
        ("document", {source.document_prompt for source in every}),
    ):
        found[name] = kinds.pop() if len(kinds) == 1 else ""
    return found


def text_to_ids(run: config.Run, found: Path | None, text: Text) -> Tokenizer:
    """The tokenizer of a checkpoint of this run, of `init`, a named one, or one learnt."""
    if given := found or run.init or run.tokenizer:
        return tokenizer.load(hf_config.resolve(str(given)))
    if not text.tables:
        raise ValueError("tokenizer: expected one, or init, where all text is streamed, got none")
    return tokenizer.train((t for table in text.tables for t in table.texts), run.model.vocab_size)


def build(
    run: config.Run, found: Path | None, learnt: Tokenizer, batches: Batches, where: World
) -> Transformer:
    """The model of a checkpoint of this run, of `init`, or with random weights."""
    torch.manual_seed(run.seed)
    if found:
        return pretrained.load(str(found), hf_config.from_checkpoint(found, run.model))
    if not run.init:
        size = learnt.get_vocab_size()
        if run.tokenizer:  # a checkpoint's table may have more rows than its tokenizer has tokens
            size = max(size, run.model.vocab_size)
        return Transformer(replace(run.model, vocab_size=size))
    counts = None
    if run.init_factors == "frequency":
        counts = torch.from_numpy(batches.token_counts(run.model.vocab_size))
    if not where.main:  # a table is factorised once, and found in the cache by the others
        any_process(False, where)
    model = pretrained.load(run.init, run.model, counts)
    if where.main:
        any_process(False, where)
    return model


def teachers(
    run: config.Run, text: Text, found: Path | None, where: World
) -> tuple[Teacher | None, Stored | None, Distiller | None]:
    """A teacher that encodes, or one whose vectors are stored, and what learns from either."""
    cfg = run.distill
    live = stored = sample_ND = None
    if cfg.teacher:
        live = Teacher.load(cfg.teacher, cfg.prompt, cfg.batch_tokens, where.device)
    if cfg.embeddings:
        stored = Stored.open(cfg.embeddings)
    either = live or stored
    if either and cfg.features and cfg.align == "pca" and not found:  # a checkpoint has it
        texts = sample(text, max(SAMPLE, 8 * either.width), run.seed)
        if live:
            sample_ND = live.encode(texts)
        elif stored:
            sample_ND = torch.from_numpy(stored.vectors(texts))
    return live, stored, Distiller.of(run, either.width if either else 0, sample_ND, where)


def sample(text: Text, most: int, seed: int) -> list[str]:
    """About so many training texts, of all tables in proportion, as a function of the seed.

    Raises:
        ValueError: no tables, as all text is streamed.
    """
    if not text.tables:
        raise ValueError(
            "distill.align: expected truncate or projection where all text is streamed"
        )
    rng = np.random.default_rng([seed, 7])
    texts: list[str] = []
    for table in text.tables:
        share = max(1, most * len(table.texts) // max(1, sum(len(t.texts) for t in text.tables)))
        rows = rng.choice(len(table.texts), size=min(share, len(table.texts)), replace=False)
        texts += [table.texts[int(row)] for row in np.sort(rows)]
    return texts


def bf16(run: config.Run, device: torch.device) -> bool:
    """Whether to autocast: on request, where the device multiplies bf16 natively, and always where
    the weights are bf16, which no fp32 vector can be multiplied with."""
    if run.optim.weights == "bf16":
        return True
    if run.precision != "auto":
        return run.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def describe_run(run: config.Run, where: World, half: bool, compiled: bool, budget: float) -> str:
    """Processes, precision, and by what each expensive operation is computed."""
    cuda = where.device.type == "cuda"
    attention = run.model.attention
    if attention == "auto":
        attention = "triton" if cuda and run.model.head_dim in WIDTHS else "sdpa"
    weights = " of bf16 weights, rounded stochastically" if run.optim.weights == "bf16" else ""
    again = {
        "none": "nothing",
        "block": "all blocks",
        "selective": f"blocks beyond {budget / 2**30:.3g} GiB"
        + (" and what is element-wise" if compiled else ""),
    }[run.activation_checkpointing]
    if run.gradient_cache:
        again += f", encoded again: packs beyond {budget / 2**30:.3g} GiB of graphs"
    spread = {1: ""}.get(where.size, f" by {run.engine}{', offloaded' if run.cpu_offload else ''}")
    return (
        f"{where.size} x {where.device.type}{spread}, "
        f"{'bf16 autocast' if half else 'fp32'}{weights}; "
        f"attention by {attention}, "
        "loss (pairwise_lse, cosine) and embed by "
        f"{'triton' if cuda else 'their PyTorch references'}, "
        f"blocks {'compiled' if compiled else 'eager'}, recomputed: {again}"
    )


BANK, DISTILLER = "bank.", "distiller."  # before the names of their tensors in a checkpoint

# ---- one run ----


@dataclass(frozen=True)
class Job:
    """A run with everything it was built into. budget: bytes for graphs, inf where none is set."""

    run: config.Run
    where: World
    directory: Path
    out: log.Log
    tasks: list[Any]
    batches: Batches
    tokenizer: Tokenizer
    bf16: bool  # autocast
    engine: Engine
    optimizer: torch.optim.Optimizer
    kept: ActivationCost | None
    budget: float
    bank: Bank | None
    teacher: Teacher | None
    distiller: Distiller | None
    saver: checkpoint.Saver
    stages: log.Stages
    languages: dict[str, int]  # training texts of each, where rows name theirs

    @property
    def model(self) -> Transformer:
        return self.engine.model


def set_up(run: config.Run, where: World, directory: Path, found: Path | None, out: log.Log) -> Job:
    """Read the text, build or load the model, restore what a checkpoint holds; say what runs."""
    text = read_text(run, out.say)
    learnt = text_to_ids(run, found, text)
    if run.epochs:
        run = replace(run, steps=steps_of(run, text.tables, text.streams))
    teacher, stored, distiller = teachers(run, text, found, where)
    batches = Batches(
        text.tables,
        learnt,
        run,
        where,
        streams=text.streams,
        teacher=stored,
        held_out=text.held_out,
    )
    model = build(run, found, learnt, batches, where).to(where.device)
    to_weights(model, run.optim)
    if where.main:
        vocabulary.warn_beyond_break_even(model.cfg)
    run = replace(run, model=model.cfg)
    half = bf16(run, where.device)
    compiled = run.compile == "on" or (run.compile == "auto" and where.device.type == "cuda")
    if compiled:
        model.compile_blocks(lean=run.activation_checkpointing == "selective")
    if run.model.attention != "auto":  # one that is not to be had says so before the run begins
        encoder = DeviceEncoder(model, learnt, run.max_length, bf16=half)
        ids = tokenizer.tokenize(learnt, ["a text"], run.max_length)
        encoder.run(ids, list(run.model.exits), None, lambda v, _: v, progress_bar(None, False))
    limited = run.gradient_cache or run.activation_checkpointing == "selective"
    kept = ActivationCost.by(model, half) if limited else None
    budget = gradcache.budget_bytes(run, model, where.device) if limited else math.inf
    engine = Engine.of(model, run, where, half)
    optimizer = adamw(model, run.optim)
    bank = Bank(run.loss.memory_bank, run.loss.bank_on == "host") if run.loss.memory_bank else None
    if found:
        checkpoint.restore(found, model, optimizer, where.rank, where.size)
        if bank is not None:
            held = checkpoint.read(found, BANK)
            bank.load({n.removeprefix(BANK): x for n, x in held.items()}, where.device)
        if distiller is not None:
            held = checkpoint.read(found, DISTILLER)
            distiller.load({n.removeprefix(DISTILLER): x for n, x in held.items()})
    for name, count in zip(batches.names, batches.truncated, strict=False):
        if count:
            out.say(f"train  {name}: {count} texts cut to {run.max_length} tokens")
    out.say(
        f"model  {num_parameters(run.model) / 1e6:.2f} M parameters, exits {run.model.exits}, "
        f"widths {run.model.matryoshka_dims}, ranks {run.model.ranks or 'none'}"
    )
    if teacher is not None:
        out.say(f"taught by {run.distill.teacher}: {teacher.pipeline}, width {teacher.width}")
    out.say(f"run    {describe_run(run, where, half, compiled, budget)}")
    saver = checkpoint.Saver(
        directory / "checkpoints", where.rank, where.size, run.keep_checkpoints
    )
    stages = log.Stages(where.device)
    built = learnt, half, engine, optimizer, kept, budget, bank, teacher, distiller, saver, stages
    return Job(run, where, directory, out, text.tasks, batches, *built, text.languages)


def loader(job: Job, start: int) -> DataLoader:
    """The micro-batches from step `start` on, made ready by as many processes as configured."""
    run, workers = job.run, job.run.loader_workers
    if workers < 0:
        workers = 2 if job.where.device.type == "cuda" else 0
    if workers:  # a tensor on its way is an open file, and a batch has dozens of them
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not fork
    return DataLoader(
        Subset(job.batches, range(batches_of(run, start)[0], batches_of(run, run.steps)[0])),
        batch_size=None,
        generator=torch.Generator(),  # a resumed run makes it anew: it may draw from no other
        num_workers=workers,
        worker_init_fn=ignore_signals,
    )


def batches_of(run: config.Run, step: int) -> range:
    """Numbers of a step's micro-batches."""
    count = run.gradient_accumulation_steps
    return range(step * count, (step + 1) * count)


def ignore_signals(worker: int) -> None:
    """Ctrl-C, and SLURM's SIGTERM, reach every process; the run decides when its loaders end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
