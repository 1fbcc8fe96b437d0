"""Train a 3D-Matryoshka text encoder: one run, top to bottom.

    python train.py tiny                              # on the built-in text, two CPU cores
    python train.py tiny --data a.jsonl b.parquet --eval tatoeba_dir --name mine
    python train.py tiny --resume                     # go on from the last checkpoint
    python train.py gte-base-unsupervised --data mixture.json
    python train.py runs/tiny/config.json --name again
    torchrun --nproc_per_node 8 train.py qwen3 --init DIR --data DIR --engine fsdp --gradient-cache

A run's directory: config.json, metrics.jsonl, tensorboard/, checkpoints/step_*, report/, model/.
"""

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mlembed import arguments, charts, config, evaluate, gradcache, guards, prepare, resume
from mlembed.activations import Kept
from mlembed.bank import Bank
from mlembed.config import strict
from mlembed.data import tokenizer
from mlembed.data.batches import Batches, steps_of
from mlembed.data.collate import Batch
from mlembed.data.depth import enabled
from mlembed.distill import Distiller, rows_of
from mlembed.encode import Encoder
from mlembed.engine import Engine
from mlembed.engine import first_bad as first_bad_gradient
from mlembed.export import export
from mlembed.loss import loss_table, ranks_of, weights
from mlembed.modeling import pretrained, vocabulary
from mlembed.modeling.transformer import Transformer, num_parameters
from mlembed.optim import adamw, learning_rate, to_weights
from mlembed.runtime import checkpoint, log
from mlembed.runtime.distributed import World, any_process, world
from mlembed.teacher import Teacher

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
    encoder: Encoder
    engine: Engine
    optimizer: torch.optim.Optimizer
    kept: Kept | None
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


def train(run: config.Run, where: World) -> int:
    """-> exit status: 0 finished, 130 stopped by a signal after saving."""
    log.check_tracker(run.tracker)
    out = log.Log(Path(run.output_dir) / run.name, where.main)
    directory, found = resume.find_run(run, where, out.say)
    start = resume.step_of(found)
    out.say(log.header(where.device))
    if (directory / "model").exists():
        out.say(f"{directory} is finished: nothing to do")
        return 0
    job = set_up(run, where, directory, found, out)
    any_process(False, where)  # all have looked at the directory before one writes to it
    if where.main:  # only now, so that a mistake in the arguments leaves nothing behind
        resume.write_config(run, directory, start)
    out.open(run.tracker, start)
    with job.saver:  # what is being written is on disk before the group, or the process, ends
        if start == 0:
            score(job, 0)
        done = optimise(job, start)
    if done == job.run.steps:
        finish(job)
    out.close()
    return 0 if done == job.run.steps else 130


def set_up(run: config.Run, where: World, directory: Path, found: Path | None, out: log.Log) -> Job:
    """Read the text, build or load the model, restore what a checkpoint holds; say what runs."""
    text = prepare.read_text(run, out.say)
    learnt = prepare.text_to_ids(run, found, text)
    if run.epochs:
        run = replace(run, steps=steps_of(run, text.tables, text.streams))
    teacher, stored, distiller = prepare.teachers(run, text, found, where)
    batches = Batches(
        text.tables,
        learnt,
        run,
        where,
        streams=text.streams,
        teacher=stored,
        held_out=text.held_out,
    )
    model = prepare.build(run, found, learnt, batches, where).to(where.device)
    to_weights(model, run.optim)
    if where.main:
        vocabulary.warn_beyond_break_even(model.cfg)
    run = replace(run, model=model.cfg)
    half = prepare.bf16(run, where.device)
    compiled = run.compile == "on" or (run.compile == "auto" and where.device.type == "cuda")
    if compiled:
        model.compile_blocks(lean=run.activation_checkpointing == "selective")
    prompts = prepare.prompts(run)
    encoder = Encoder(model, learnt, run.max_length, bf16=half, prompts=prompts)
    if run.model.attention != "auto":  # one that is not to be had says so before the run begins
        encoder.exits(["a text"])
    limited = run.gradient_cache or run.activation_checkpointing == "selective"
    kept = Kept.by(model, half) if limited else None
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
    out.say(f"run    {prepare.what_runs(run, where, half, compiled, budget)}")
    saver = checkpoint.Saver(
        directory / "checkpoints", where.rank, where.size, run.keep_checkpoints, run.save_async
    )
    stages = log.Stages(where.device)
    built = encoder, engine, optimizer, kept, budget, bank, teacher, distiller, saver, stages
    return Job(run, where, directory, out, text.tasks, batches, *built, text.languages)


def optimise(job: Job, start: int) -> int:
    """Steps start..steps-1, with logs, checkpoints and scores as configured; -> steps done.

    A signal ends the run after the step in hand, saved; a second Ctrl-C ends it at once.
    """
    run, where = job.run, job.where
    stop: list[float] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        # torchrun passes on what a terminal or SLURM has already sent to all: that is one signal.
        if stop and number == signal.SIGINT and time.monotonic() - stop[0] > 2:
            raise KeyboardInterrupt
        stop.append(time.monotonic())

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    feed = iter(loader(job, start))
    job.stages.begin()
    tokens, clock, logged = 0, time.perf_counter(), start
    often = 0.1 if sys.stderr.isatty() else 30.0  # seconds between bars; a log keeps each
    shown = {"desc": run.name, "disable": not where.main, "mininterval": often}
    with tqdm(total=run.steps, initial=start, **shown) as bar:
        for step in range(start, run.steps):
            result = guarded(job, step, feed)
            tokens += result.tokens
            done = step + 1
            bar.update()
            if result.bad is None and (done % run.log_every == 0 or done == run.steps):
                rate = tokens / (time.perf_counter() - clock)
                loss = record(job, done, result, rate, job.stages.take(done - logged))
                bar.set_postfix_str(f"loss {loss:.3f}, {rate / 1e3:.1f}k tokens/s")
                tokens, clock, logged = 0, time.perf_counter(), done
            if run.eval_every and done % run.eval_every == 0 and done < run.steps:
                score(job, done)  # before saving: what is saved has been logged
                job.stages.begin()
                tokens, clock, logged = 0, time.perf_counter(), done
            stopped = any_process(bool(stop), where)
            if stopped or done == run.steps or (run.save_every and done % run.save_every == 0):
                save(job, done)
            if stopped and done < run.steps:
                job.out.say(f"stopped after step {done}, saved; go on with --resume")
                return done
    for number, handler in before.items():
        signal.signal(number, handler)
    return run.steps


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


Terms = dict[str, Tensor]  # loss_EM by name: contrastive, and what is distilled


@dataclass(frozen=True)
class Step:
    """What a step gave: the exits that had a loss, by term loss_EM of this process at them and what
    each entry weighs, the queries of all processes at each, gradient norm, tokens of all processes,
    and the first tensor that was not finite, if any; then the step was left out."""

    exits: tuple[int, ...]
    losses: Terms
    weight_EM: Tensor
    queries: list[int]
    norm: Tensor
    tokens: int
    bad: str | None


def guarded(job: Job, step: int, feed: Iterator[Batch]) -> Step:
    """One optimiser step, whose failures say what to do.

    Raises:
        ValueError: out of memory; numbers that are not finite, by configuration.
    """
    run = job.run
    try:
        result = one_step(job, step, feed)
    except RuntimeError as error:
        if not guards.out_of_memory(error):
            raise
        tokens = max(pack.work.tokens for pack in job.batches[batches_of(run, step)[0]].packs)
        free = gradcache.free_bytes(job.where.device)
        reason = guards.advice(error, run, step + 1, tokens, job.budget, free)
        raise ValueError(reason) from None
    if result.bad is None:
        return result
    source = source_of(job, step)
    said = f"step {step + 1}, source {source}: {result.bad}"
    job.out.metrics(step + 1, "skipped", {"source": source, "bad": result.bad})
    if run.non_finite == "skip" and not result.bad.startswith("weight"):
        job.out.say(f"skipped {said}")
        return result
    if not result.bad.startswith("weight"):
        save(job, step)  # what the step left as it was
    raise ValueError(
        f"loss: expected finite numbers, got others at {said}; weights and moments are those "
        "before it. A lower --optim.lr may help, --non-finite skip leaves such steps out"
    )


def one_step(job: Job, step: int, feed: Iterator[Batch]) -> Step:
    """Gradients of all micro-batches and ranks, then one update."""
    run, where, engine = job.run, job.where, job.engine
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(step, run)
    exits = enabled(run.model.exits, run.depth, step, run.steps)
    weight_EM = weights(run, exits).to(where.device)
    ranks = ranks_of(run, step)
    micro_batches = run.gradient_accumulation_steps
    losses: Terms = {}
    tokens, queries = 0, [0] * len(exits)
    engine.begin()
    for left in reversed(range(micro_batches)):
        with job.stages.of("data"):
            batch = next(feed)
        if job.teacher is not None:
            assert batch.texts is not None
            with job.stages.of("teacher"):
                vectors = job.teacher.encode(batch.texts, queries=len(batch.target))
            batch = replace(batch, teacher_ND=vectors)
        for rank, share in ranks:
            # Gradients are reduced over processes once a step, with its last backward.
            sync = not left and rank == ranks[-1][0]
            one_pass = Pass(step, exits, rank, weight_EM, share / micro_batches)
            for name, loss_EM in add_gradients(
                job, batch, one_pass, (left, rank or 0), sync
            ).items():
                losses[name] = losses.get(name, 0) + loss_EM
        tokens += batch.tokens * where.size
        here = [int((batch.query_depths >= exit).sum()) for exit in exits]
        queries = [so_far + n for so_far, n in zip(queries, here, strict=True)]
    with job.stages.of("optimizer"):
        norm, bad = update(job, step, losses, exits)
    if job.bank is not None:
        job.bank.commit() if bad is None else job.bank.discard()
    return Step(exits, losses, weight_EM, queries, norm, tokens, bad)


def update(job: Job, step: int, losses: Terms, exits: tuple[int, ...]) -> tuple[Tensor, str | None]:
    """Clip and step, unless something is not finite; -> gradient norm, and what that was."""
    run, where, engine = job.run, job.where, job.engine
    norm = engine.norm()
    finite = bool(norm.isfinite() & torch.stack(list(losses.values())).isfinite().all())
    finite = finite and (job.distiller is None or job.distiller.finite())
    bad = None
    if any_process(not finite, where):
        bad = first_bad(job, losses, exits)
    else:
        engine.clip(norm, run.optim.max_grad_norm)
        job.optimizer.step()
    if job.distiller is not None:
        if bad is None:
            job.distiller.step(learning_rate(step, run), run.optim.max_grad_norm)
        else:
            job.distiller.discard()
    engine.zero()
    return norm, bad


def source_of(job: Job, step: int) -> str:
    """Where a step's texts are from."""
    numbers = (job.batches.order[number] for number in batches_of(job.run, step))
    return ", ".join(sorted({job.batches.names[number] for number in numbers}))


@dataclass(frozen=True)
class Pass:
    """What a pass of a step is about: exits with a loss, vocabulary rank, weights of the loss."""

    step: int
    exits: tuple[int, ...]
    rank: int | None
    weight_EM: Tensor
    share: float


def add_gradients(job: Job, batch: Batch, one: Pass, draw: tuple[int, int], sync: bool) -> Terms:
    """Forward, loss and backward of a micro-batch at one rank -> its share of each loss_EM."""
    run, where, half = job.run, job.where, job.encoder.bf16
    device, p = where.device, run.model.dropout
    packs = [pack.to(device) for pack in batch.packs]
    keeps, again, final = gradcache.keeping(run, job.kept, packs, job.budget)
    found: Terms = {}

    def forward(i: int, sync: bool) -> Tensor:
        seed = run.seed, 6, one.step, *draw, where.rank, i
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        with job.stages.of("forward"), autocast, gradcache.drawing(seed, p, device):
            return job.engine.forward(
                packs[i], exits=one.exits, rank=one.rank, recompute=again[i], sync=sync
            )

    def loss(exits_END: Tensor) -> Tensor:
        # On CUDA the loss's products are bf16 ones as well.
        exits_END = exits_END.bfloat16() if half and device.type == "cuda" else exits_END
        terms = {}
        with job.stages.of("loss"):
            if run.distill.contrastive:
                terms["contrastive"] = loss_table(exits_END, batch, run, where, one.exits, job.bank)
            if job.distiller is not None:
                terms |= job.distiller.tables(exits_END, batch, run, where, one.exits)
        found.update({name: loss_EM.detach() * one.share for name, loss_EM in terms.items()})
        return one.share * weighted(run, one.weight_EM, terms)

    with job.stages.of("backward"):  # less forward and loss, which it calls
        gradcache.gradients(job.engine, forward, loss, keeps, final, sync=sync)
    return found


def weighted(run: config.Run, weight_EM: Tensor, terms: Terms) -> Tensor:
    """The loss: terms by their weights, entries by theirs, which a term that only some exits have
    shares out among these."""
    total = weight_EM.new_zeros(())
    for name, loss_EM in terms.items():
        here_EM = weight_EM * rows_of(run.distill, name, len(weight_EM)).to(weight_EM)[:, None]
        here_EM = here_EM * (weight_EM.sum() / here_EM.sum().clamp(min=1e-30))
        total = total + getattr(run.distill, name) * (here_EM * loss_EM).sum()
    return total


def first_bad(job: Job, losses: Terms, exits: tuple[int, ...]) -> str:
    """What was not finite, in the order in which it was computed: weights, losses, gradients. All
    processes call it, and agree on whether it is weights; of these and of losses each sees its own.
    """
    gradient = first_bad_gradient(job.model)
    weight = guards.bad_weight(job.model)
    if any_process(weight is not None, job.where):
        return weight or "weight that another process holds"
    dims = job.run.model.matryoshka_dims
    named = ((name, guards.bad_loss(table, exits, dims)) for name, table in losses.items())
    loss = next((f"{bad} ({name})" for name, bad in named if bad), None)
    return loss or f"gradient of {gradient or 'nothing by itself, but their norm'}"


def record(job: Job, step: int, result: Step, rate: float, stage_ms: dict[str, float]) -> float:
    """Log the losses of a step, averaged over processes; -> the weighted loss."""
    losses, run = result.losses, job.run
    if job.where.size > 1:
        together = torch.stack(list(losses.values()))
        torch.distributed.all_reduce(together)
        losses = dict(zip(losses, together / job.where.size, strict=True))
    loss, gradient = weighted(run, result.weight_EM, losses).item(), result.norm.item()
    dims = run.model.matryoshka_dims
    by_term = {
        name: {
            f"exit_{exit}": {f"dim_{dim}": x for dim, x in zip(dims, row, strict=True)}
            for exit, row in zip(result.exits, loss_EM.tolist(), strict=True)
        }
        for name, loss_EM in losses.items()
    }
    contrastive = by_term.pop("contrastive", {})
    values = {
        "loss": loss,
        "grad_norm": gradient,
        "lr": learning_rate(step - 1, run),
        "rank": ranks_of(run, step - 1)[-1][0],
        "source": source_of(job, step - 1),
        "tokens_per_second": rate,
        "stage_ms": stage_ms,
        # Of those that run as deep: each is a negative of the others.
        "queries": {f"exit_{e}": n for e, n in zip(result.exits, result.queries, strict=True)},
        "losses": contrastive,
        **({"distilled": by_term} if by_term else {}),
    }
    job.out.metrics(step, "train", values)
    return loss


def save(job: Job, step: int) -> None:
    """A checkpoint of everything that the next step depends on; all processes call it."""

    def write_beside(directory: Path) -> None:
        pretrained.describe(job.run.model, directory)
        tokenizer.save(job.encoder.tokenizer, directory, job.run.max_length)

    tensors = checkpoint.training_tensors(job.model, job.optimizer, job.where.rank)
    if job.bank is not None:
        tensors |= {BANK + name: x for name, x in job.bank.state().items()}
    if job.distiller is not None:
        tensors |= {DISTILLER + name: x for name, x in job.distiller.state().items()}
    job.saver.save(step, tensors, write_beside)


def whole(job: Job) -> Encoder | None:
    """On the main process, an encoder with all the weights; all processes call it."""
    model = job.engine.whole()
    return replace(job.encoder, model=model) if model is not None else None


def score(job: Job, step: int) -> None:
    """Score the full size (the whole grid comes at the end)."""
    if not job.tasks or (encoder := whole(job)) is None:
        return
    shape = job.run.model
    full = shape.matryoshka_dims[-1:], shape.exits[-1:], shape.ranks[-1:]
    (cell,) = evaluate.grid(encoder, job.tasks, *full, costs=False)
    percent = charts.mean_score(cell)
    job.out.metrics(step, "eval", {"score": percent, "tasks": cell["scores"]})
    job.out.say(f"step {step}: score {percent:.1f} % at full size")


def finish(job: Job) -> None:
    """Score the grid, write report/ and model/, and say how to go on."""
    run, directory, out = job.run, job.directory, job.out
    if (encoder := whole(job)) is None:
        return
    if job.tasks:
        began = time.perf_counter()
        cells = evaluate.grid(encoder, job.tasks, progress=sys.stderr.isatty())
        first = [line for line in out.lines() if line["kind"] == "eval" and line["step"] == 0]
        untrained = first[0]["tasks"] if first else {}
        extra = {"run": strict.to_dict(run), "commit": log.commit(), "untrained": untrained}
        extra |= {"texts_by_language": job.languages, "device": log.device_name(job.where.device)}
        evaluate.write_report(directory / "report", cells, extra)
        out.say(f"\n{evaluate.table(cells)}\n\n{evaluate.by_kind(cells[-1]['scores'], untrained)}")
        spent = time.perf_counter() - began
        out.say(f"\nreport  {directory}/report: grid.json, grid.png (scored in {spent:.0f} s)")
    worst = export(encoder, directory / "model", source=str(directory))
    dim, exit = (nested[-2:][0] for nested in (run.model.matryoshka_dims, run.model.exits))
    here, python = Path.cwd(), Path(sys.executable)
    python = python.relative_to(here) if python.is_relative_to(here) else python
    out.say(
        f"model   {directory}/model: sentence-transformers and transformers open it, "
        f"vectors within {worst:.0e}\n"
        f'encode  {python} -m mlembed.encode {directory} "Wednesday, May 4, 2050"\n'
        f"export  {python} -m mlembed.export {directory} OUT --dim {dim} --exit {exit}\n"
        f"page    {python} -m mlembed.report {directory}"
    )


def ignore_signals(worker: int) -> None:
    """Ctrl-C, and SLURM's SIGTERM, reach every process; the run decides when its loaders end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main() -> int:
    run = arguments.parse(sys.argv[1:])
    with world(run.device) as where:
        return train(run, where)


if __name__ == "__main__":
    with log.one_line_errors():
        status = main()
    sys.exit(status)
