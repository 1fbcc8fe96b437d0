"""Train a 3D-Matryoshka text encoder: one run, top to bottom.

    python train.py tiny                              # on the built-in text, two CPU cores
    python train.py tiny --data a.jsonl b.parquet --eval tatoeba_dir --name mine
    python train.py tiny --resume                     # go on from the last checkpoint
    python train.py runs/tiny/config.json --name again
    torchrun --nproc_per_node 8 train.py qwen3 --init DIR --data DIR

A run's directory: config.json, metrics.jsonl, tensorboard/, checkpoints/step_*, report/, model/.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mlembed import arguments, checkpoint, config, data, evaluate, log, pretrained, tokenizer
from mlembed.activations import Kept, recomputed
from mlembed.depth import enabled
from mlembed.distributed import World, any_process, world
from mlembed.encode import Encoder
from mlembed.export import export
from mlembed.loss import loss_table, ranks_of, weights
from mlembed.model import Transformer, num_parameters
from mlembed.optim import adamw, learning_rate, to_weights
from mlembed.pack import PackedBatch
from mlembed_kernels.attention import WIDTHS

# ---- the run's directory ----


def find_run(run: config.Run) -> tuple[Path, Path | None]:
    """-> (directory, checkpoint to go on from). A directory that holds another run is refused."""
    directory = Path(run.output_dir) / run.name
    saved = directory / "config.json"
    if not run.resume:
        if directory.exists() and any(directory.iterdir()):
            raise ValueError(
                f"{directory}: expected no run there yet, found one; "
                "go on with it by --resume, or choose another --name"
            )
        return directory, None
    if not saved.is_file():
        raise ValueError(f"{directory}: expected a run to resume, found none")
    before, now = (resumable(r) for r in (config.load(saved), run))
    if differing := sorted(config.differences(before, now)):
        raise ValueError(
            f"--resume: expected the configuration of {saved}, got other values for "
            + ", ".join(differing)
        )
    return directory, next(reversed(checkpoint.complete(directory / "checkpoints")), None)


def resumable(run: config.Run) -> dict[str, Any]:
    """What has to be the same to go on with a run. What fits a machine has not: the next one may
    lack an attention or a compiler, or have less memory."""
    plain = config.Run()
    return config.to_dict(
        replace(
            run,
            resume=False,
            model=replace(run.model, attention="auto"),
            compile=plain.compile,
            activation_checkpointing=plain.activation_checkpointing,
            activation_gib=plain.activation_gib,
        )
    )


# ---- text, tokenizer, model ----


def read_text(run: config.Run, say: Any) -> tuple[list[data.Table], list[Any]]:
    """-> (training tables without any text of the evaluation, evaluation tasks)."""
    tasks = evaluate.read_all(run.eval)
    held_out = {data.normalise(text) for task in tasks for text in task.texts}
    tables = []
    for source in run.data:
        for table in data.read(source):
            clean, dropped = data.without(table, held_out)
            if clean is None:
                raise ValueError(f"{table.name}: expected training text, all of it is evaluation's")
            kind = "n-way ids" if clean.nway else "pairs"
            note = f", {dropped} texts of the evaluation left out" if dropped else ""
            say(f"train  {table.name}: {len(clean)} {kind}, {len(clean.texts)} texts{note}")
            tables.append(clean)
    for task in tasks:
        say(f"eval   {task.name}: {len(task.texts)} texts")
    return tables, tasks


def text_to_ids(run: config.Run, found: Path | None, tables: list[data.Table]) -> Tokenizer:
    """The tokenizer of a checkpoint of this run, of `init`, or one learnt from the text."""
    if found or run.init:
        return tokenizer.load(found or config.resolve(run.init))
    return tokenizer.train((t for table in tables for t in table.texts), run.model.vocab_size)


def build(
    run: config.Run, found: Path | None, learnt: Tokenizer, batches: data.Batches, where: World
) -> Transformer:
    """The model of a checkpoint of this run, of `init`, or with random weights."""
    torch.manual_seed(run.seed)
    if found:
        return pretrained.load(str(found), config.from_checkpoint(found, run.model))
    if not run.init:
        return Transformer(replace(run.model, vocab_size=learnt.get_vocab_size()))
    counts = None
    if run.init_factors == "frequency":
        counts = torch.from_numpy(batches.token_counts(run.model.vocab_size))
    if not where.main:  # a table is factorised once, and found in the cache by the others
        any_process(False, where)
    model = pretrained.load(run.init, run.model, counts)
    if where.main:
        any_process(False, where)
    return model


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


# ---- one run ----


@dataclass(frozen=True)
class Job:
    """A run with everything it was built into."""

    run: config.Run
    where: World
    directory: Path
    out: log.Log
    tasks: list[Any]
    batches: data.Batches
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    kept: Kept | None

    @property
    def model(self) -> Transformer:
        return self.encoder.model


def train(run: config.Run, where: World) -> int:
    """-> exit status: 0 finished, 130 stopped by a signal after saving."""
    directory, found = find_run(run)
    start = json.loads((found / checkpoint.STATE).read_text())["step"] if found else 0
    out = log.Log(directory, where.main)
    out.say(log.header(where.device))
    if (directory / "model").exists():
        out.say(f"{directory} is finished: nothing to do")
        return 0
    job = set_up(run, where, directory, found, out)
    any_process(False, where)  # all have looked at the directory before one writes to it
    out.open(run.tracker, start)
    if where.main:  # only now, so that a mistake in the arguments leaves nothing behind
        directory.mkdir(parents=True, exist_ok=True)
        resolved = json.dumps(config.to_dict(replace(run, resume=False)), indent=2)
        checkpoint.write_text(directory / "config.json", resolved + "\n")
    if start == 0:
        score(job, 0)
    done = optimise(job, start)
    if done == run.steps and where.main:
        finish(job)
    out.close()
    return 0 if done == run.steps else 130


def set_up(run: config.Run, where: World, directory: Path, found: Path | None, out: log.Log) -> Job:
    """Read the text, build or load the model, restore what a checkpoint holds; say what runs."""
    tables, tasks = read_text(run, out.say)
    learnt = text_to_ids(run, found, tables)
    batches = data.Batches(tables, learnt, run, where)
    model = build(run, found, learnt, batches, where).to(where.device)
    to_weights(model, run.optim)
    if where.main:
        pretrained.warn_beyond_break_even(model.cfg)
    run = replace(run, model=model.cfg)
    optimizer = adamw(model, run.optim)
    if found:
        checkpoint.restore(found, model, optimizer)
    half = bf16(run, where.device)
    compiled = run.compile == "on" or (run.compile == "auto" and where.device.type == "cuda")
    if compiled:
        model.compile_blocks(lean=run.activation_checkpointing == "selective")
    encoder = Encoder(model, learnt, run.max_length, bf16=half)
    if run.model.attention != "auto":  # one that is not to be had says so before the run begins
        encoder.exits(["a text"])
    kept = Kept.by(model, half) if run.activation_checkpointing == "selective" else None
    out.say(
        f"model  {num_parameters(run.model) / 1e6:.2f} M parameters, exits {run.model.exits}, "
        f"widths {run.model.matryoshka_dims}, ranks {run.model.ranks or 'none'}"
    )
    out.say(f"run    {what_runs(run, where, half, compiled)}")
    return Job(run, where, directory, out, tasks, batches, encoder, optimizer, kept)


def what_runs(run: config.Run, where: World, half: bool, compiled: bool) -> str:
    """Processes, precision, and by what each expensive operation is computed."""
    cuda = where.device.type == "cuda"
    attention = run.model.attention
    if attention == "auto":
        attention = "triton" if cuda and run.model.head_dim in WIDTHS else "sdpa"
    weights = " of bf16 weights, rounded stochastically" if run.optim.weights == "bf16" else ""
    again = {
        "none": "nothing",
        "block": "all blocks",
        "selective": f"blocks beyond {run.activation_gib:g} GiB"
        + (" and what is element-wise" if compiled else ""),
    }[run.activation_checkpointing]
    return (
        f"{where.size} x {where.device.type}, {'bf16 autocast' if half else 'fp32'}{weights}; "
        f"attention by {attention}, "
        f"infonce and embed by {'triton' if cuda else 'their PyTorch references'}, "
        f"blocks {'compiled' if compiled else 'eager'}, recomputed: {again}"
    )


def optimise(job: Job, start: int) -> int:
    """Steps start..steps-1, with logs, checkpoints and scores as configured; -> steps done.

    A signal ends the run after the step in hand, saved; a second one ends it at once.
    """
    run, where, model = job.run, job.where, job.model
    stop: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    micro_batches = range(
        start * run.gradient_accumulation_steps, run.steps * run.gradient_accumulation_steps
    )
    workers = 2 if where.device.type == "cuda" else 0
    loader = DataLoader(
        Subset(job.batches, micro_batches),
        batch_size=None,
        generator=torch.Generator(),  # a resumed run makes it anew: it may draw from no other
        num_workers=workers,
        worker_init_fn=ignore_interrupt,
    )
    feed = iter(loader)
    ddp = DistributedDataParallel(model) if where.size > 1 else None
    tokens, clock = 0, time.perf_counter()
    with tqdm(total=run.steps, initial=start, disable=not where.main, desc=run.name) as bar:
        for step in range(start, run.steps):
            result = one_step(job, step, feed, ddp)
            tokens += result.tokens
            done = step + 1
            bar.update()
            if done % run.log_every == 0 or done == run.steps:
                rate = tokens / (time.perf_counter() - clock)
                loss = record(job, done, result, rate)
                bar.set_postfix_str(f"loss {loss:.3f}, {rate / 1e3:.1f}k tokens/s")
                tokens, clock = 0, time.perf_counter()
            if run.eval_every and done % run.eval_every == 0 and done < run.steps:
                score(job, done)  # before saving: what is saved has been logged
                tokens, clock = 0, time.perf_counter()
            stopped = any_process(bool(stop), where)
            if stopped or done == run.steps or (run.save_every and done % run.save_every == 0):
                save(job, done)
            if stopped and done < run.steps:
                job.out.say(f"stopped after step {done}, saved; go on with --resume")
                return done
    for number, handler in before.items():
        signal.signal(number, handler)
    return run.steps


@dataclass(frozen=True)
class Step:
    """What a step gave: the exits that had a loss, loss_EM of this process at them and what each
    entry weighs, the queries of all processes at each, gradient norm, tokens of all processes."""

    exits: tuple[int, ...]
    loss_EM: Tensor
    weight_EM: Tensor
    queries: list[int]
    norm: Tensor
    tokens: int


def one_step(
    job: Job, step: int, feed: Iterator[data.Batch], ddp: DistributedDataParallel | None
) -> Step:
    """One optimiser step."""
    run, where = job.run, job.where
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(step, run)
    exits = enabled(run.model.exits, run.depth, step, run.steps)
    weight_EM = weights(run, exits).to(where.device)
    ranks = ranks_of(run, step)
    micro_batches = run.gradient_accumulation_steps
    table_EM, tokens, queries = torch.zeros_like(weight_EM), 0, [0] * len(exits)
    for left in reversed(range(micro_batches)):
        batch = next(feed)
        packs = [pack.to(where.device) for pack in batch.packs]
        for rank, share in ranks:
            # Gradients are reduced over processes once a step, with its last backward.
            last = not left and rank == ranks[-1][0]
            with nullcontext() if last or not ddp else ddp.no_sync():
                exits_END = forward(job, packs, ddp or job.model, exits, rank)
                loss_EM = loss_table(exits_END, batch, run, where, exits) * share / micro_batches
                (weight_EM * loss_EM).sum().backward()
            table_EM += loss_EM.detach()
        tokens += batch.tokens * where.size
        here = [int((batch.query_depths >= exit).sum()) for exit in exits]
        queries = [so_far + n for so_far, n in zip(queries, here, strict=True)]
    norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), run.optim.max_grad_norm)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return Step(exits, table_EM, weight_EM, queries, norm, tokens)


def forward(
    job: Job,
    packs: list[PackedBatch],
    model: torch.nn.Module,
    exits: tuple[int, ...],
    rank: int | None,
) -> Tensor:
    """exits_END of all packs, one after the other."""
    device, half = job.where.device.type, job.encoder.bf16
    again = recomputed(job.run, job.kept, packs)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        parts = [model(pack, exits=exits, rank=rank, recompute=again) for pack in packs]
    exits_END = torch.cat(parts, dim=1)
    # On CUDA the loss's products are bf16 ones as well.
    return exits_END.bfloat16() if half and device == "cuda" else exits_END


def record(job: Job, step: int, result: Step, rate: float) -> float:
    """Log the losses of a step, averaged over processes; -> the weighted loss.

    Raises:
        ValueError: the loss or the gradient is no longer a finite number.
    """
    table_EM = result.loss_EM
    if job.where.size > 1:
        torch.distributed.all_reduce(table_EM)
        table_EM = table_EM / job.where.size
    loss, gradient = (result.weight_EM * table_EM).sum().item(), result.norm.item()
    if not math.isfinite(loss) or not math.isfinite(gradient):
        raise ValueError(
            f"loss: expected finite numbers, got loss {loss} and gradient norm {gradient} "
            f"at step {step}; a lower --optim.lr may help"
        )
    shape, run = job.run.model, job.run
    losses = {
        f"exit_{exit}": {f"dim_{dim}": x for dim, x in zip(shape.matryoshka_dims, row, strict=True)}
        for exit, row in zip(result.exits, table_EM.tolist(), strict=True)
    }
    values = {
        "loss": loss,
        "grad_norm": gradient,
        "lr": learning_rate(step - 1, run),
        "rank": ranks_of(run, step - 1)[-1][0],
        "tokens_per_second": rate,
        # Of those that run as deep: each is a negative of the others.
        "queries": {f"exit_{e}": n for e, n in zip(result.exits, result.queries, strict=True)},
        "losses": losses,
    }
    job.out.metrics(step, "train", values)
    return loss


def save(job: Job, step: int) -> None:
    """A checkpoint, written by the main process."""

    def write_model(directory: Path) -> None:
        pretrained.save(job.model, directory)
        tokenizer.save(job.encoder.tokenizer, directory, job.run.max_length)

    if job.where.main:
        checkpoints, keep = job.directory / "checkpoints", job.run.keep_checkpoints
        checkpoint.save(checkpoints, step, write_model, job.model, job.optimizer, keep)


def score(job: Job, step: int) -> None:
    """Score the full size (the whole grid comes at the end)."""
    if not job.tasks or not job.where.main:
        return
    shape = job.run.model
    job.model.eval()
    (cell,) = evaluate.grid(
        job.encoder, job.tasks, shape.matryoshka_dims[-1:], shape.exits[-1:], shape.ranks[-1:]
    )
    job.model.train()
    percent = evaluate.mean_score(cell)
    job.out.metrics(step, "eval", {"score": percent, "tasks": cell["scores"]})
    job.out.say(f"step {step}: score {percent:.1f} % at full size")


def finish(job: Job) -> None:
    """Score the grid, write report/ and model/, and say how to go on."""
    run, directory, out = job.run, job.directory, job.out
    job.model.eval()
    if job.tasks:
        began = time.perf_counter()
        cells = evaluate.grid(job.encoder, job.tasks, progress=True)
        first = [line for line in out.lines() if line["kind"] == "eval" and line["step"] == 0]
        untrained = first[0]["tasks"] if first else {}
        extra = {"run": config.to_dict(run), "commit": log.commit(), "untrained": untrained}
        evaluate.write_report(directory / "report", cells, extra)
        out.say(f"\n{evaluate.table(cells)}\n\n{evaluate.by_kind(cells[-1]['scores'], untrained)}")
        spent = time.perf_counter() - began
        out.say(f"\nreport  {directory}/report: grid.json, grid.png (scored in {spent:.0f} s)")
    worst = export(job.encoder, directory / "model")
    dim, exit = (nested[-2:][0] for nested in (run.model.matryoshka_dims, run.model.exits))
    here, python = Path.cwd(), Path(sys.executable)
    python = python.relative_to(here) if python.is_relative_to(here) else python
    out.say(
        f"model   {directory}/model: sentence-transformers and transformers open it, "
        f"vectors within {worst:.0e}\n"
        f'encode  {python} -m mlembed.encode {directory} "Wednesday, May 4, 2050"\n'
        f"export  {python} -m mlembed.export {directory} OUT --dim {dim} --exit {exit}"
    )


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the run decides when its loaders end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> int:
    run = arguments.parse(sys.argv[1:])
    with world(run.device) as where:
        return train(run, where)


if __name__ == "__main__":
    with log.one_line_errors():
        status = main()
    sys.exit(status)
