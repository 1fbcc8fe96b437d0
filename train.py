"""Train a 3D-Matryoshka text encoder: one run, top to bottom.

    python train.py tiny                              # on the built-in text, two CPU cores
    python train.py tiny --data a.jsonl b.parquet --eval tatoeba_dir --name mine
    python train.py tiny --resume                     # continue from the last checkpoint
    python train.py gte-base-unsupervised --data mixture.json
    python train.py runs/tiny/config.json --name again
    torchrun --nproc_per_node 8 train.py qwen3 --init DIR --data DIR --engine fsdp --gradient-cache

A run's directory: config.json, metrics.jsonl, tensorboard/, checkpoints/step_*, report/, model/.
"""

import sys

from mlembed.runtime import process

# A signal, and a mistake in the arguments, is answered before torch is imported, which takes
# seconds.
if __name__ == "__main__":
    process.begin(saves=True)

from mlembed.runtime.errors import one_line_errors, out_of_memory, printable
from mlembed.training import arguments

if __name__ == "__main__":
    with one_line_errors():
        RUN = arguments.parse(sys.argv[1:])

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mlembed import config
from mlembed.config import strict
from mlembed.data import tokenizer
from mlembed.data.collate import Batch
from mlembed.data.formats.layouts import SINGLE
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained, serving
from mlembed.modeling.flops import Flops, training_flops
from mlembed.runtime import checkpoint, files, log, profiling, transfer
from mlembed.runtime.distributed import World, any_process, broadcast, main_works, world
from mlembed.training import average, best, gradcache, guards, lora, resume
from mlembed.training.objective import hidden, quantise, score_teacher
from mlembed.training.objective.loss import loss_table, ranks_of, weights
from mlembed.training.optim import set_rates
from mlembed.training.setup import BANK, DISTILLER, Job, batches_of, loader, set_up
from mlembed.training.step import (
    LossSpec,
    Rates,
    Step,
    Terms,
    record,
    source_of,
    speed_line,
    total_loss,
    update,
)


def train(run: config.Run, where: World) -> int:
    """Train one run and return its exit status: 0 finished, 130 stopped by a signal and saved."""
    log.check_tracker(run.tracker)
    out = log.Log(Path(run.output_dir) / run.name, where.main)
    # From before the set-up to the end, no other run writes to the directory.
    with resume.owned(run, where, out.say) as out.check:
        return train_owned(run, where, out)


def train_owned(run: config.Run, where: World, out: log.Log) -> int:
    """Train one run in a directory that it owns, and return its exit status."""
    directory, resume_from = resume.find_run(run, where, out.say)
    start = resume.step_of(resume_from)
    out.say(log.header(where.device))
    if resume.is_finished(run, directory):
        out.say(f"{directory} is finished: nothing to do")
        return 0
    job = set_up(run, where, directory, resume_from, out)
    # A score that a signal ended is made up for. A signal up to here leaves no new files, so that
    # the same command may start again.
    scored = score(job, start) if lacks_score(job, start) else None
    # No process writes to the directory before all have read it, and none writes before `set_up`
    # has found the arguments to be right.
    any_process(False, where)
    with process.hold_signals():
        if where.main:
            out.check()
            # First, as an old model/ under a config.json of more steps would be a finished run.
            if resume_from and start < job.run.steps:
                resume.set_aside_end(directory, resume_from, out.say)
            job.saver.about["run"] = resume.write_config(run, directory, start)
        out.open(run.tracker, start)
        if scored:
            out.metrics(start, "eval", scored)
        # The saver finishes its checkpoint before the process group, or the process, ends.
        with job.saver:
            done = optimise(job, start)
        stopped = any_process(process.stopping(), where)
    for source, count in job.idle.items():
        out.say(f"idle   source {source}: {count} batches taught nothing")
    if not stopped:
        take_best(job, done)
        if average.take(job.optimizer):
            out.say(f"ema    report and model have weights averaged with decay {run.optim.ema}")
        with main_works(where, "finish"), process.interruptible():
            finish(job)
    else:
        out.say(f"stopped and saved after step {done}; continue with --resume")
    out.close()
    return 130 if stopped else 0


def optimise(job: Job, start: int) -> int:
    """Run steps start..steps-1, log, save and score as configured, and return the steps done.

    A signal ends the run after the current step, of several processes up to two steps later, and
    saves it. The caller holds signals.
    """
    run, where, out = job.run, job.where, job.out
    job.saver.best, over = best.judge(run, out, where)
    if over:
        return start
    with guards.loader_errors():
        feed = iter(loader(job, start))
    job.stages.begin()
    rates, logged, checks = Rates(job), start, list[guards.Check]()
    # A log file keeps every bar that a terminal overwrites.
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    options = {"desc": printable(run.name), "disable": not where.main, "mininterval": seconds}
    trace = job.directory / f"trace_{start}.json" if where.main else None
    bar = tqdm(total=run.steps, initial=start, **options)
    with profiling.trace(run.profile, trace) as end_of_step, bar:
        for step in range(start, run.steps):
            result = guarded(job, step, feed)
            end_of_step()
            rates.add(result)
            done = step + 1
            bar.update()
            last = done == run.steps
            logs = last or done % run.log_every == 0
            due = run.eval_every and done % run.eval_every == 0
            scores = run.keep_best if last else due
            saves = last or (run.save_every and done % run.save_every == 0)
            # These wait for the device in any case.
            if (logs or scores or saves) and settle(job) and logs:
                speed = rates.take()
                loss = record(job, done, result, speed, job.stages.take(done - logged))
                bar.set_postfix_str(f"loss {loss:.3f}, {speed_line(speed)}")
                logged = done
            if scores:
                # Score before saving, so that a saved step has logged its score.
                if scored := score(job, done):
                    out.metrics(done, "eval", scored)
                job.saver.best, over = best.judge(run, out, where)
                saves = saves or over or job.saver.best == done
                job.stages.begin()
                rates.begin()
                logged = done
            # Processes agree in the check of a step, which the next one reads if nobody has.
            checks = [*checks[-1:], result.check]
            stopped = any(check.stop for check in checks) if where.size > 1 else process.stopping()
            if scores:  # The main process may have scored for hours.
                stopped = any_process(process.stopping(), where)
            if saves or stopped:
                settle(job)
                save(job, done)
            if stopped or over:
                return done
    return run.steps


def take_best(job: Job, done: int) -> None:
    """Load the weights of the best score, if they are not the last step's."""
    if (step := job.saver.best) not in (0, done):
        path = best.checkpoint_of(step, job.saver.directory, job.where)
        checkpoint.restore(path, job.model, job.optimizer, job.where.rank, job.where.size)
    if step:
        job.out.say(f"best   step {step} of {done}, by {job.run.keep_best}")


def guarded(job: Job, step: int, feed: Iterator[Batch]) -> Step:
    """Run one optimiser step; advise if memory runs out.

    Raises:
        ValueError: out of memory; what `loader_errors` and `settle` raise.
    """
    run = job.run
    try:
        return one_step(job, step, feed)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        tokens = max(pack.plan.tokens for pack in job.batches[batches_of(run, step)[0]].packs)
        free = gradcache.free_bytes(job.where.device)
        reason = guards.oom_advice(error, run, step + 1, tokens, job.budget, free)
        raise ValueError(reason) from None


def settle(job: Job) -> bool:
    """Read the check of the last step, if nobody has, and return False if the step was left out.

    The next step calls it before its loss, so a bad step is reported before another update.

    Raises:
        ValueError: NaN or infinity, unless the configuration skips such steps.
    """
    if not job.unread:
        return True
    check, run = job.unread.pop(), job.run
    step, bad = check.step, check.bad(job.model, job.where)
    if job.bank is not None:
        job.bank.commit() if bad is None else job.bank.discard()
    if bad is None:
        return True
    source, weight = source_of(job, step), bad.startswith("weight")
    job.out.metrics(step + 1, "skipped", {"source": source, "bad": bad})
    if run.non_finite == "skip" and not weight:
        job.out.say(f"skipped step {step + 1}, source {source}: non-finite {bad}")
        return False
    if not weight:
        # The step left weights and moments unchanged.
        save(job, step)
    raise ValueError(
        f"non-finite {bad} at step {step + 1}, source {source}; "
        f"{guards.non_finite_advice(bad, step)}"
    )


def one_step(job: Job, step: int, feed: Iterator[Batch]) -> Step:
    """Add the gradients of all micro-batches and ranks, then update the weights once."""
    run, where, engine = job.run, job.where, job.engine
    set_rates(job.optimizer, step, run)
    weight_EM, ranks = transfer.moved(weights(run), where.device), ranks_of(run, step)
    micro_batches = run.gradient_accumulation_steps
    losses: Terms = {}
    targets: list[hidden.Target] = []
    flops, tokens, queries = Flops(), 0, [0] * len(run.model.exits)
    engine.begin()
    for left in reversed(range(micro_batches)):
        with job.stages.of("data"), guards.loader_errors():
            batch = next(feed).to(where.device)
        count_idle(job, batch, step)
        if job.teacher is not None:
            with job.stages.of("teacher"):
                vectors, targets = taught(job, batch)
            batch = replace(batch, teacher_ND=vectors)
        for rank, share in ranks:
            seed = run.seed, 6, step, left, rank or 0
            spec = LossSpec(rank, weight_EM, share / micro_batches, seed)
            # Processes average their gradients once a step, in its last backward.
            sync = not left and rank == ranks[-1][0]
            terms, work = add_gradients(job, batch, spec, sync, targets)
            flops += work
            for name, loss_EM in terms.items():
                losses[name] = losses.get(name, 0) + loss_EM
        tokens += batch.tokens
        for e, exit in enumerate(run.model.exits):
            queries[e] += int((batch.host.query_depths >= exit).sum())
    with job.stages.of("optimizer"):
        norm, check = update(job, step, losses)
    job.unread.append(check)
    return Step(losses, queries, norm, tokens, flops, check)


def taught(job: Job, batch: Batch) -> tuple[Tensor, list[hidden.Target]]:
    """Return the teacher's vectors of a batch, and its hidden states if these are distilled."""
    assert job.teacher is not None and batch.texts is not None
    if not job.run.distill.hidden:
        return job.teacher.encode(batch.texts, queries=len(batch.target)), []
    return hidden.read(job.teacher, batch, job.run.model, job.where)


def count_idle(job: Job, batch: Batch, step: int) -> None:
    """Count a batch that teaches nothing, and say so the first time for each source."""
    contrastive = guards.contrastive_alone(job.run) and job.bank is None
    if contrastive and guards.teaches_nothing(batch.host):
        job.idle[batch.source] += 1
        if job.idle[batch.source] == 1:
            job.out.say(
                f"idle   step {step + 1}, source {batch.source}: texts of one group, or equal "
                "scores, in a batch, which teaches nothing; a larger --batch-size may help"
            )


def add_gradients(
    job: Job, batch: Batch, spec: LossSpec, sync: bool, targets: Sequence[hidden.Target] = ()
) -> tuple[Terms, Flops]:
    """Forward, loss and backward of a micro-batch, which is on the device, at one rank.

    Args:
        sync: whether this is the last backward of the step, which averages over processes.
        targets: the teacher's hidden states for each pack, if these are distilled.

    Returns:
        loss_EM of each term, times the share of this pass, and the operations of the model.
    """
    run, where, half = job.run, job.where, job.bf16
    device, p = where.device, run.model.dropout
    packs = batch.packs
    keeps, recompute, final = gradcache.choose_graphs(run, job.cost, packs, job.budget)
    shares: Terms = {}

    def forward(i: int, sync: bool) -> Tensor:
        seed = *spec.seed, where.rank, i
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        with job.stages.of("forward"), autocast, gradcache.seeded_dropout(seed, p, device):
            tap = targets[i].tap(spec.share * run.distill.hidden) if targets else None
            return job.engine.forward(
                packs[i], rank=spec.rank, recompute=recompute[i], tap=tap, sync=sync
            )

    def tables(exits_END: Tensor) -> Terms:
        terms = {}
        if run.distill.contrastive and batch.task != SINGLE:
            terms["contrastive"] = loss_table(exits_END, batch, run, where, job.bank)
        if run.distill.scores:
            terms["scores"] = score_teacher.table(exits_END, batch, run, where)
        if job.distiller is not None:
            terms |= job.distiller.tables(exits_END, batch, run, where)
        return terms

    def loss(exits_END: Tensor) -> Tensor:
        # The forward keeps the device busy, and the bank is to hold the last step's documents.
        settle(job)
        # On CUDA the products of the loss are in bf16, too.
        exits_END = exits_END.bfloat16() if half and device.type == "cuda" else exits_END
        with job.stages.of("loss"):
            terms = quantise.mixed(tables, exits_END, run.loss)
            if targets:
                terms["hidden"] = hidden.table(targets, spec.weight_EM)
        shares.update({name: loss_EM.detach() * spec.share for name, loss_EM in terms.items()})
        return spec.share * total_loss(run, spec.weight_EM, terms)

    # The stage's time excludes forward and loss, which run inside.
    with job.stages.of("backward", traced=False):
        gradcache.gradients(job.engine, forward, loss, keeps, final, sync=sync)
    work = Flops()
    for pack, kept, again in zip(batch.host.packs, keeps, recompute, strict=True):
        options: dict[str, Any] = {"keeps": kept, "recompute": again, "frozen": run.lora.rank > 0}
        work += training_flops(run.model, pack, spec.rank, **options)
    return shares, work


def save(job: Job, step: int) -> None:
    """Write a checkpoint of all that the next step depends on; all processes call it.

    Raises:
        ValueError: a number of it is not finite on some process. Earlier checkpoints stay.
    """
    job.out.check()

    def write_model_files(directory: Path) -> None:
        # After a power failure no saved step may lack its line.
        job.out.flush()
        pretrained.describe(job.run.model, directory)
        tokenizer.save(job.tokenizer, directory, job.serving.max_length)
        serving.write(job.serving, directory)
        if job.run.lora.rank:
            lora.write_scale(directory, job.run.lora)

    tensors = checkpoint.training_tensors(job.model, job.optimizer, job.where.rank)
    if job.bank is not None:
        tensors |= {BANK + name: x for name, x in job.bank.state().items()}
    if job.distiller is not None:
        tensors |= {DISTILLER + name: x for name, x in job.distiller.state().items()}
    bad = guards.bad_tensor(tensors)
    if any_process(bad is not None, job.where):
        raise ValueError(
            f"checkpoint: expected finite numbers after step {step}, got others in "
            f"{bad or 'a tensor of another process'}: continue from the last checkpoint with a "
            "lower --optim.lr"
        )
    job.saver.save(step, tensors, write_model_files)


def full_encoder(job: Job) -> Encoder | None:
    """Return an encoder with all weights on the main process, else None; all processes call it."""
    model = job.engine.full_model()
    if model is None:
        return None
    return Encoder(model, job.tokenizer, bf16=job.bf16, **vars(job.serving))


def score(job: Job, step: int) -> dict[str, Any] | None:
    """Score the full size, print the mean and return what to log; `finish` scores the whole grid.

    Returns:
        None without an evaluation, on other processes, and where a signal ended the scoring.
    """
    from mlembed.evaluation import charts, grid

    if not job.tasks:
        return None
    with main_works(job.where, f"score {step}"), average.swapped(job.optimizer):
        encoder = full_encoder(job)
        if encoder is None or process.stopping():
            return None
        shape = job.run.model
        full = shape.matryoshka_dims[-1:], shape.exits[-1:], shape.ranks[-1:]
        with process.interruptible():
            (cell,) = grid.score_grid(encoder, job.tasks, *full, costs=False).cells
            percent = charts.mean_score(cell)
            job.out.say(f"step {step}: score {percent:.1f} % at full size")
            return {"score": percent, "tasks": cell["scores"]}
    return None


def lacks_score(job: Job, step: int) -> bool:
    """Return, on all processes, whether the step at which the run starts lacks its score."""
    due = job.run.eval_every and step < job.run.steps and step % job.run.eval_every == 0
    lines = job.out.lines() if step and due and job.where.main else []
    logged = any(line["kind"] == "eval" and line["step"] == step for line in lines)
    return step == 0 or bool(broadcast(bool(due and not logged), job.where))


def finish(job: Job) -> None:
    """Score the grid, write report/, adapter/ and model/, and print the next commands."""
    from mlembed.evaluation import grid, tables
    from mlembed.publishing.export import export

    run, directory, out = job.run, job.directory, job.out
    out.check()
    adapters = lora.parts(job.engine.full_weights()) if run.lora.rank else {}
    if (encoder := full_encoder(job)) is None:
        return
    if job.tasks:
        began = time.perf_counter()
        kinds = quantise.scored(run.loss)
        scored = grid.score_grid(encoder, job.tasks, progress=sys.stderr.isatty(), precisions=kinds)
        scores = [line for line in out.lines() if line["kind"] == "eval" and line["step"] == 0]
        untrained = scores[0]["tasks"] if scores else {}
        extra = {"run": strict.to_dict(run), "commit": log.commit(), "untrained": untrained}
        extra |= {"texts_by_language": job.languages, "device": log.device_name(job.where.device)}
        with files.atomic_directory(directory / "report", replace=True) as partial:
            tables.write_report(partial, scored, extra)
        by_kind = tables.by_kind(scored.cells[-1]["scores"], untrained)
        out.say(f"\n{scored.table()}\n\n{by_kind}")
        seconds = time.perf_counter() - began
        out.say(f"\nreport  {directory}/report: grid.json, grid.png (scored in {seconds:.0f} s)")
    if adapters:
        write_adapter(job, encoder, adapters)
    worst = export(encoder, directory / "model", source=str(directory)).worst
    dim, exit = (nested[-2:][0] for nested in (run.model.matryoshka_dims, run.model.exits))
    cwd, python = Path.cwd(), Path(sys.executable)
    python = python.relative_to(cwd) if python.is_relative_to(cwd) else python
    command, named = f"{shlex.quote(str(python))} -m mlembed", shlex.quote(str(directory))
    out.say(
        f"model   {directory}/model: opens in sentence-transformers and transformers, "
        f"vectors within {worst:.0e}\n"
        f'encode  {command} encode {named} "Wednesday, May 4, 2050"\n'
        f"export  {command} export {named} OUT --dim {dim} --exit {exit}\n"
        f"page    {command} report {named}"
    )


def write_adapter(job: Job, encoder: Encoder, adapters: dict[str, Tensor]) -> None:
    """Write adapter/, which peft, transformers and sentence-transformers open on `init`."""
    from mlembed.publishing.export import write_sentence_transformers

    init, target = job.run.init, job.directory / "adapter"
    if lora.of_checkpoint(init):
        job.out.say(f"adapter not written, as only mlembed opens {init}, a training checkpoint")
        return
    with files.atomic_directory(target, replace=True) as partial:
        lora.write(partial, encoder.model, adapters, job.run)
        tokenizer.save(job.tokenizer, partial, encoder.max_length)
        write_sentence_transformers(partial, encoder, encoder.full_size()[0])
    job.out.say(f"adapter {target}: opens in peft and sentence-transformers, on {init}")


if __name__ == "__main__":
    with one_line_errors(), world(RUN.device) as where:
        status = train(RUN, where)
    sys.exit(status)
