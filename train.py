"""Train a 3D-Matryoshka text encoder: one run, top to bottom.

    python train.py tiny                              # on the built-in text, two CPU cores
    python train.py tiny --data a.jsonl b.parquet --eval tatoeba_dir --name mine
    python train.py tiny --resume                     # go on from the last checkpoint
    python train.py gte-base-unsupervised --data mixture.json
    python train.py runs/tiny/config.json --name again
    torchrun --nproc_per_node 8 train.py qwen3 --init DIR --data DIR --engine fsdp --gradient-cache

A run's directory: config.json, metrics.jsonl, tensorboard/, checkpoints/step_*, report/, model/.
"""

import sys

from mlembed.runtime.errors import one_line_errors
from mlembed.training import arguments

# A mistake in the arguments is answered before torch is imported, which takes seconds.
if __name__ == "__main__":
    with one_line_errors():
        RUN = arguments.parse(sys.argv[1:])

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from mlembed import config
from mlembed.config import strict
from mlembed.data import tokenizer
from mlembed.data.collate import Batch
from mlembed.evaluation import charts, grid, tables
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained
from mlembed.publishing.export import export
from mlembed.runtime import checkpoint, log
from mlembed.runtime.distributed import World, any_process, world
from mlembed.training import gradcache, guards, resume, setup
from mlembed.training.objective.loss import loss_table, ranks_of, weights
from mlembed.training.optim import learning_rate
from mlembed.training.setup import BANK, DISTILLER, Job, batches_of, loader, set_up
from mlembed.training.step import Pass, Step, Terms, source_of, update, weighted


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
        tokens = max(pack.plan.tokens for pack in job.batches[batches_of(run, step)[0]].packs)
        free = gradcache.free_bytes(job.where.device)
        reason = guards.oom_advice(error, run, step + 1, tokens, job.budget, free)
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
    exits = run.model.exits
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


def add_gradients(job: Job, batch: Batch, one: Pass, draw: tuple[int, int], sync: bool) -> Terms:
    """Forward, loss and backward of a micro-batch at one rank -> its share of each loss_EM."""
    run, where, half = job.run, job.where, job.bf16
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
        tokenizer.save(job.tokenizer, directory, job.run.max_length)

    tensors = checkpoint.training_tensors(job.model, job.optimizer, job.where.rank)
    if job.bank is not None:
        tensors |= {BANK + name: x for name, x in job.bank.state().items()}
    if job.distiller is not None:
        tensors |= {DISTILLER + name: x for name, x in job.distiller.state().items()}
    job.saver.save(step, tensors, write_beside)


def whole(job: Job) -> Encoder | None:
    """On the main process, an encoder with all the weights; all processes call it."""
    model = job.engine.whole()
    if model is None:
        return None
    prompts = setup.prompts(job.run)
    return Encoder(model, job.tokenizer, job.run.max_length, bf16=job.bf16, prompts=prompts)


def score(job: Job, step: int) -> None:
    """Score the full size (the whole grid comes at the end)."""
    if not job.tasks or (encoder := whole(job)) is None:
        return
    shape = job.run.model
    full = shape.matryoshka_dims[-1:], shape.exits[-1:], shape.ranks[-1:]
    (cell,) = grid.score_grid(encoder, job.tasks, *full, costs=False).cells
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
        scored = grid.score_grid(encoder, job.tasks, progress=sys.stderr.isatty())
        first = [line for line in out.lines() if line["kind"] == "eval" and line["step"] == 0]
        untrained = first[0]["tasks"] if first else {}
        extra = {"run": strict.to_dict(run), "commit": log.commit(), "untrained": untrained}
        extra |= {"texts_by_language": job.languages, "device": log.device_name(job.where.device)}
        tables.write_report(directory / "report", scored, extra)
        by_kind = tables.by_kind(scored.cells[-1]["scores"], untrained)
        out.say(f"\n{scored.table()}\n\n{by_kind}")
        spent = time.perf_counter() - began
        out.say(f"\nreport  {directory}/report: grid.json, grid.png (scored in {spent:.0f} s)")
    worst = export(encoder, directory / "model", source=str(directory))
    dim, exit = (nested[-2:][0] for nested in (run.model.matryoshka_dims, run.model.exits))
    here, python = Path.cwd(), Path(sys.executable)
    python = python.relative_to(here) if python.is_relative_to(here) else python
    out.say(
        f"model   {directory}/model: sentence-transformers and transformers open it, "
        f"vectors within {worst:.0e}\n"
        f'encode  {python} -m mlembed encode {directory} "Wednesday, May 4, 2050"\n'
        f"export  {python} -m mlembed export {directory} OUT --dim {dim} --exit {exit}\n"
        f"page    {python} -m mlembed report {directory}"
    )


if __name__ == "__main__":
    with one_line_errors(), world(RUN.device) as where:
        status = train(RUN, where)
    sys.exit(status)
