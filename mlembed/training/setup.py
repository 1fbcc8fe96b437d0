"""Build a run for `train.py`: read its text, load or make tokenizer, model and teacher.

All processes of a run call every function, with the same arguments.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Subset

from mlembed_kernels.attention.attention import WIDTHS

from .. import config
from ..data import sources, tokenizer
from ..data.batches import Batches, num_negatives, steps_of
from ..data.eval_sets import read_all
from ..data.formats.readers import normalise
from ..data.streams import name_of
from ..data.tables import Table, check_teaches, describe, hashed
from ..modeling import hf_config, pretrained, serving, vocabulary
from ..modeling.automodel.choose import trunk_of
from ..modeling.packed_forward import DeviceEncoder, progress_bar
from ..modeling.serving import Serving
from ..modeling.transformer import Transformer, num_parameters
from ..runtime import checkpoint, log, process
from ..runtime.distributed import World, main_works, together
from ..runtime.workers import end_with_parent
from . import best, gradcache, guards, lora, provenance, resume
from .engine import Engine
from .gradcache import ActivationCost
from .objective import first_layers, score_teacher
from .objective.bank import Bank
from .objective.distill import Distiller
from .objective.teacher import Teacher
from .objective.teaching import teachers
from .optim import optimizer_of, to_weights

BANK, DISTILLER = "bank.", "distiller."  # prefixes of their tensors' names in a checkpoint

# ---- text ----


@dataclass(frozen=True)
class Text:
    """Training text, which shares no text with the evaluation, and the evaluation's tasks.

    held_out: texts of the evaluation, normalised. languages: texts by language, of the tables whose
    rows name theirs. record: digests of all of it.
    """

    tables: list[Table]
    streams: list[config.Source]
    tasks: list[Any]
    held_out: frozenset[str]
    languages: dict[str, int]
    record: provenance.Record


def read_text(run: config.Run, say: Callable[[str], None]) -> Text:
    """Read all sources of a run, and `say` for each how many rows were left out, and why.

    Raises:
        ValueError: text that cannot be read, or that leaves nothing to train on; two sources of one
            name.
    """
    tasks = read_all(run.eval, run.bad_rows)
    texts, evaluation = set[str](), []
    for task in tasks:
        total = hashlib.sha256()
        for chunk in hashed(task.texts, total):
            texts.update(map(normalise, chunk))
        evaluation.append(provenance.of_task(task, total.hexdigest()))
    held_out = frozenset(texts)
    tables, streams, languages = [], [], Counter[str]()
    for source in sources.all_of(run):
        if source.streaming:
            streams.append(source)
            say(f"train  {name_of(source)}: {sources.describe_stream(source)}")
            continue
        for table, report in sources.read(source, bad_rows=run.bad_rows, held_out=held_out):
            tables.append(table)
            languages.update(report.languages)
            say(f"train  {table.name}: {describe(table, report)}")
            for bad in report.bad_rows:
                say(f"       bad row {bad}")
            if guards.contrastive_alone(run):
                negatives = num_negatives(run.loss, source, table.task) > 0
                alone = run.batch_size == 1 and not run.loss.memory_bank
                check_teaches(table, negatives, alone)
    names = [table.name for table in tables] + [name_of(source) for source in streams]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            "data: expected sources of different names (a mixture can name them), got several "
            f"{', '.join(twice)}"
        )
    if run.distill.scores:
        score_teacher.check(run, tables, streams)
    single = [table.name for table in tables if table.single]
    if single and not (run.distill.features or run.distill.logits):
        raise ValueError(
            f"data: expected pairs, from which the contrastive loss learns, got single texts in "
            f"{', '.join(single)}; with a teacher, distill.features and distill.logits learn from "
            "them"
        )
    for task in tasks:
        say(f"eval   {task.name}: {len(task.texts)} texts")
    record = provenance.record(run, tables, streams, evaluation)
    return Text(tables, streams, tasks, held_out, dict(sorted(languages.items())), record)


def prompts(run: config.Run) -> dict[str, str]:
    """Return the prompts of an encoder by name.

    Each source that has a prompt for its queries names it. `query` and `document` are the prompts
    that all sources share, "" if they differ.
    """
    every = sources.all_of(run)
    by_name = {name_of(source): source.prompt for source in every if source.prompt}
    for name, kinds in (
        ("query", {source.prompt for source in every}),
        ("document", {source.document_prompt for source in every}),
    ):
        by_name[name] = kinds.pop() if len(kinds) == 1 else ""
    return by_name


def serving_of(run: config.Run, resume_from: Path | None, cfg: config.Model) -> Serving:
    """Return how the trained model serves: like `init`, or like the checkpoint.

    Prompts of the training data go before those of `init`. Texts are as long as in training without
    `init`, or if `init` serves only shorter ones.
    """
    made, asked = prompts(run), has_prompts(run)
    if not run.init:
        return Serving(run.max_length, made)
    source = serving.read(hf_config.resolve(str(resume_from or run.init)), cfg)
    return replace(
        source,
        max_length=max(source.max_length, run.max_length),
        prompts=source.prompts | (made if asked else {}),
    )


def has_prompts(run: config.Run) -> bool:
    """Return whether a source of the training text has a prompt."""
    return any(source.prompt or source.document_prompt for source in sources.all_of(run))


def describe_serving(run: config.Run, served: Serving, cfg: config.Model) -> str:
    """Say how a tuned model serves, where this differs from `init`, and how it is trained."""
    directory = hf_config.resolve(run.init)
    source, stored = serving.read(directory, cfg), hf_config.stored_pooling(directory, cfg)
    parts = [f"texts of up to {served.max_length} tokens"]
    if served.max_length != source.max_length:
        parts[0] += f" (not {source.max_length}, as training has longer ones)"
    named = ", ".join(name for name, prompt in served.prompts.items() if prompt)
    if served.prompts != source.prompts:
        parts.append(f"prompts of the training data ({named or 'none that all sources share'})")
    elif named:
        parts.append(f"prompts {named}")
    if served.width:
        parts.append(f"vectors of width {served.width}")
    why = "" if stored == cfg.pooling else f" (not {stored}, as model.pooling says)"
    if stored is None:
        why = " (nothing there says how; --model.pooling decides)"
    parts.append(f"pooled by {cfg.pooling}{why}")
    without = ", without prompts" if named and not has_prompts(run) else ""
    return (
        f"{', '.join(parts)}, like {run.init}; trained on texts of up to {run.max_length} tokens"
        f"{without}"
    )


# ---- tokenizer, model, teacher ----


def load_tokenizer(run: config.Run, resume_from: Path | None, text: Text) -> Tokenizer:
    """Load the tokenizer of a checkpoint, of `init` or by name, or train one on the text."""
    if source := resume_from or run.init or run.tokenizer:
        key = "init" if run.init else "tokenizer"
        return tokenizer.load(hf_config.resolve(str(source), key))
    if not text.tables:
        raise ValueError("tokenizer: expected one, or init, where all text is streamed, got none")
    return tokenizer.train((t for table in text.tables for t in table.texts), run.model.vocab_size)


def build(
    run: config.Run, resume_from: Path | None, tokens: Tokenizer, batches: Batches, where: World
) -> Transformer:
    """Load the model of a checkpoint or of `init`, or make one with random weights."""
    torch.manual_seed(run.seed)
    if resume_from:
        shape = hf_config.from_checkpoint(resume_from, run.model)
        return pretrained.load(str(resume_from), shape)
    if run.init_tokens == "tokenizer":
        make = partial(build_on_tokens, run, batches)
    elif not run.init:
        size = tokens.get_vocab_size()
        # A published table may have more rows than its tokenizer has tokens.
        size = max(size, run.model.vocab_size) if run.tokenizer else size
        return trunk_of(replace(run.model, vocab_size=size))
    else:
        counts = None
        if run.init_factors == "frequency":
            counts = torch.from_numpy(token_weights(batches, tokens, run.model.vocab_size))
        make = partial(pretrained.load, run.init, run.model, counts)
    # The main process factorises the table; the others wait and read it from the cache.
    with main_works(where, "factorise"):
        model = make() if where.main else None
    return model if model is not None else make()


def token_weights(batches: Batches, tokens: Tokenizer, vocab_size: int) -> np.ndarray:
    """Return counts of tokens in the training text, plus as many in the tokenizer's own text.

    The latter, known of Unigram tokenizers, keeps tokens of languages that the former lacks.
    """
    counts = batches.token_counts(vocab_size)
    others = tokenizer.frequencies(tokens, vocab_size)
    return counts if others is None else counts + counts.sum() * others


def build_on_tokens(run: config.Run, batches: Batches) -> Transformer:
    """Make a model of random weights whose tokens start from those of the model in `tokenizer`.

    Raises:
        ValueError: all text is streamed, or what `pretrained.load` raises.
    """
    if not batches.tokens:
        raise ValueError("init_tokens: expected random if all sources are streams, got tokenizer")
    table = pretrained.load(run.tokenizer).embed_tokens.table().detach()
    model = Transformer(replace(run.model, vocab_size=len(table)))
    counts = torch.from_numpy(batches.token_counts(len(table)))
    vocabulary.start_from(model.embed_tokens, table, counts)
    return model


# ---- precision and attention ----


def bf16(run: config.Run, device: torch.device) -> bool:
    """Return whether to autocast to bf16: as configured, or if the device multiplies it natively.

    bf16 weights always need it, as they cannot be multiplied with fp32 vectors.
    """
    if run.optim.weights == "bf16":
        return True
    if run.precision != "auto":
        return run.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def compiles(run: config.Run, device: torch.device) -> bool:
    """Return whether to compile the blocks: as configured, or on CUDA."""
    return run.compile == "on" or (run.compile == "auto" and device.type == "cuda")


def try_attention(run: config.Run, model: Transformer, tokens: Tokenizer, half: bool) -> None:
    """Encode a text, so that an attention that this machine lacks fails before the run starts.

    Local layers also need one of the greatest length: not every attention supports their windows.
    """
    encoder = DeviceEncoder(model, tokens, run.max_length, bf16=half)
    texts = ["a text"]
    if run.model.style == "transformers":
        texts.append("a text " * run.max_length)
    ids = tokenizer.tokenize(tokens, texts, run.max_length)
    encoder.run(ids, list(run.model.exits), None, lambda v, _: v, progress_bar(None, False))


def describe_run(run: config.Run, where: World, half: bool, compiled: bool, budget: float) -> str:
    """Describe processes, precision, and the implementation of each expensive operation."""
    cuda = where.device.type == "cuda"
    attention: str = run.model.attention
    if attention == "auto":
        attention = "triton" if cuda and run.model.head_dim in WIDTHS else "sdpa"
        if attention == "triton" and run.model.style == "transformers":
            attention += " (by sdpa where a text is longer than a local layer's window)"
    weights = ", bf16 weights, rounded stochastically" if run.optim.weights == "bf16" else ""
    recomputed = {
        "none": "nothing",
        "block": "all blocks",
        "selective": f"blocks beyond {budget / 2**30:.3g} GiB"
        + (" and element-wise operations" if compiled else ""),
    }[run.activation_checkpointing]
    if run.gradient_cache:
        recomputed += f", encoded again: packs beyond {budget / 2**30:.3g} GiB of graphs"
    engine = f" by {run.engine}{', offloaded' if run.cpu_offload else ''}" * (where.size > 1)
    return (
        f"{where.size} x {where.device.type}{engine}, "
        f"{'bf16 autocast' if half else 'fp32'}{weights}; attention by {attention}, "
        "loss (pairwise_lse, cosine) and embed by "
        f"{'triton' if cuda else 'their PyTorch references'}, "
        f"blocks {'compiled' if compiled else 'eager'}, recomputed: {recomputed}"
    )


# ---- one run ----


@dataclass(frozen=True)
class Job:
    """A run and everything that it was built into.

    out: log and console. tasks: evaluation sets. languages: training texts by language, where rows
    name theirs. bf16: autocast. cost, budget: bytes of graphs, and how many may be kept (inf
    without a limit). unread: the check of the last step, until `settle` reads it. idle: batches
    that taught nothing, by source.
    """

    run: config.Run
    where: World
    directory: Path
    out: log.Log
    stages: log.Stages
    saver: checkpoint.Saver
    tasks: list[Any]
    languages: dict[str, int]
    batches: Batches
    tokenizer: Tokenizer
    serving: Serving
    engine: Engine
    optimizer: torch.optim.Optimizer
    bf16: bool
    cost: ActivationCost | None
    budget: float
    bank: Bank | None
    teacher: Teacher | None
    distiller: Distiller | None
    unread: list[guards.Check] = field(default_factory=list)
    idle: Counter[str] = field(default_factory=Counter)

    @property
    def model(self) -> Transformer:
        """The engine's model, whose parameters are trained."""
        return self.engine.model


def set_up(
    run: config.Run, where: World, directory: Path, resume_from: Path | None, out: log.Log
) -> Job:
    """Read the text, build or load the model, restore a checkpoint, and print what runs."""
    if workers_of(run, where):
        start_server()
    text = read_text(run, out.say)
    best.check(run, text.tasks)
    configured = resume.as_saved(run)
    if run.epochs:
        run = replace(run, steps=steps_of(run, text.tables, text.streams))
    tokens = load_tokenizer(run, resume_from, text)
    half, compiled = bf16(run, where.device), compiles(run, where.device)
    teacher, stored, distiller = teachers(
        run, text.tables, tokens, half, compiled, resume_from, where
    )
    digests = {**text.record, "distill": provenance.of_teacher(run.distill)}
    about = {"config": configured, "steps": run.steps, "digests": digests}
    if resume_from:
        resume.check_record(resume_from, about, run.allow_changed, out.say)
    batches = Batches(
        text.tables, tokens, run, where,
        streams=text.streams, teacher=stored, held_out=text.held_out,
    )  # fmt: skip
    model = build(run, resume_from, tokens, batches, where).to(where.device)
    run = replace(run, model=model.cfg)
    if not resume_from:
        first_layers.fit(model, teacher, run, batches, where, half, out.say)
    to_weights(model, run.optim)
    if run.lora.rank:
        lora.attach(model, run.lora, run.seed)
    if run.optim.freeze_tokens:
        model.embed_tokens.rows.requires_grad_(False)
    if where.main:
        vocabulary.warn_beyond_break_even(model.cfg)
    served = serving_of(run, resume_from, model.cfg)
    if compiled:
        model.compile_blocks(lean=run.activation_checkpointing == "selective")
    if run.model.attention != "auto":
        try_attention(run, model, tokens, half)
    limited = run.gradient_cache or run.activation_checkpointing == "selective"
    cost = ActivationCost.measure(model, half) if limited else None
    budget = gradcache.budget_bytes(run, model, where.device) if limited else math.inf
    # Reading may take hours longer on one process, and what follows has collectives.
    together(where, "set up")
    engine = Engine.of(model, run, where, half)
    optimizer = optimizer_of(model, run.optim, run.seed)
    bank = Bank(run.loss.memory_bank, run.loss.bank_on == "host") if run.loss.memory_bank else None
    if resume_from:
        checkpoint.restore(resume_from, model, optimizer, where.rank, where.size)
        if bank is not None:
            bank.load(_tensors(resume_from, BANK), where.device)
        if distiller is not None:
            distiller.load(_tensors(resume_from, DISTILLER))
    for name, count in zip(batches.names, batches.truncated, strict=False):
        if count:
            out.say(f"train  {name}: {count} texts cut to {run.max_length} tokens")
    for name, count in zip(batches.names, batches.short, strict=False):
        if count:
            out.say(f"train  {name}: {count} queries cut to {run.query_max_length} tokens")
    last = run.model.last_layers
    ends = f" that end with the last {last} layers" if last else ""
    frozen = ", tokens frozen" if run.optim.freeze_tokens else ""
    out.say(
        f"model  {num_parameters(run.model) / 1e6:.2f} M parameters, "
        f"exits {run.model.exits}{ends}, "
        f"widths {run.model.matryoshka_dims}, ranks {run.model.ranks or 'none'}{frozen}"
    )
    if teacher is not None:
        note = f", {teacher.note}" if teacher.note else ""
        what = f"{teacher.pipeline}, width {teacher.width}{note}"
        out.say(f"teach  {run.distill.teacher}: {what}; {teacher.model.encoder}")
    out.say(f"run    {describe_run(run, where, half, compiled, budget)}")
    if run.init and not resume_from:
        out.say(f"serve  {describe_serving(run, served, model.cfg)}")
    for line in lora.describe(model, run):
        out.say(line)
    saver = checkpoint.Saver(
        directory / "checkpoints", where.rank, where.size, run.keep_checkpoints,
        about, lambda: resume.mark_saved(directory),
    )  # fmt: skip
    return Job(
        run, where, directory, out, log.Stages(where.device), saver,
        text.tasks, text.languages, batches, tokens, served,
        engine, optimizer, half, cost, budget, bank, teacher, distiller,
    )  # fmt: skip


def _tensors(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in checkpoint.read(path, prefix).items()}


def loader(job: Job, start: int) -> DataLoader:
    """Return a loader of the micro-batches from step `start` on, with the configured workers."""
    run, workers = job.run, workers_of(job.run, job.where)
    return DataLoader(
        Subset(job.batches, range(batches_of(run, start)[0], batches_of(run, run.steps)[0])),
        batch_size=None,
        # A generator of its own: a resumed run makes it again and may draw from no other.
        generator=torch.Generator(),
        num_workers=workers,
        worker_init_fn=prepare_worker,
        pin_memory=job.where.device.type == "cuda",
        multiprocessing_context="forkserver" if workers else None,
    )


def workers_of(run: config.Run, where: World) -> int:
    """Return how many processes prepare batches."""
    return run.loader_workers if run.loader_workers >= 0 else 2 * (where.device.type == "cuda")


def start_server() -> None:
    """Start the process that a loader's workers are forked from; its imports take seconds.

    It is a new interpreter, because NCCL, CUDA and the threads of this process do not survive a
    fork. It and its workers inherit that signals are blocked: this process ends them.
    """
    forkserver.set_forkserver_preload(["mlembed.data.batches"])
    with process.shield_children():
        forkserver.ensure_running()


def batches_of(run: config.Run, step: int) -> range:
    """Return the numbers of a step's micro-batches."""
    count = run.gradient_accumulation_steps
    return range(step * count, (step + 1) * count)


def prepare_worker(worker: int) -> None:
    """Make a loader's worker end with the run, and tokenise in one thread.

    A signal that reaches all processes of a run leaves it alone: the run ends its workers.
    """
    end_with_parent(os.getppid())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
