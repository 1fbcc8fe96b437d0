"""The case `cpu`: a training step on a CPU next to sentence-transformers', the providers in turn.

It has the shape of multilingual-e5-small with random weights or, with MODEL=DIR, that of a model
and its weights. Matrices multiply in bf16 where the CPU does so natively, for all providers, whose
weights are fp32.

    ours                   the recipe elastic's shape, loss of every exit and width, all trained
    ours_frozen            the same with the numbers of tokens frozen, like in the recipe
    ours_flat              last layer and plain table alone, the work of sentence_transformers
    sentence_transformers  MatryoshkaLoss around MultipleNegativesRankingLoss, last layer alone
    st_matryoshka_2d       Matryoshka2dLoss with its defaults: the last layer and one drawn a step

Texts are tokenised before, and their packs and rectangles made. Work on the machine slows all
providers equally, as they take turns; ms is the median of a step. The share of matmul is the FLOPs
that a provider's own texts need over its time, at the measured rate of a large product.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from mlembed import config
from mlembed.config import shapes
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.flops import training_flops
from mlembed.modeling.transformer import Transformer
from mlembed.training.optim import optimizer_of
from mlembed.training.setup import bf16

from .. import harness
from ..harness import CPU, TRAIN
from ..report import Row, Targets
from . import peers
from .cases import Case, Lengths, Ours, Texts, Trained, tokens
from .gate import packed_loss

OURS = "ours", "ours_frozen", "ours_flat"
PEERS = "sentence_transformers", "st_matryoshka_2d"
LENGTHS: Lengths = 18, 0.5, 5, 48
TIMES = 3.0  # as fast as sentence-transformers


@dataclass(frozen=True, kw_only=True)
class CpuCase(Case):
    """A case that takes its own times. model: a directory, whose shape and weights count."""

    model: str = ""
    small: bool = False
    device: str = "cpu"
    providers: tuple[str, ...] = (*OURS, *PEERS)

    def toy(self) -> "CpuCase":
        toy = super().toy()
        assert isinstance(toy, CpuCase)
        return replace(toy, small=True)

    def floors(self, mode: str, tflops: float, gbs: float) -> dict[str, float]:
        """Return nothing: providers do different work, see the share of matmul."""
        return {}

    def rows(self, end: float, skip: set[str], tflops: float | None) -> Iterator[Row]:
        """Yield a row for every provider.

        Args:
            end: time.monotonic() at which rounds stop. skip: finished rows. tflops: of a product.
        """
        case = self.loaded()
        todo = [who for who in self.providers if f"{self.name}:{who}:{TRAIN}" not in skip]
        built: dict[str, tuple[Trained, Texts, str | None]] = {}
        for who in todo:
            at = {"case": self.name, "provider": who, "mode": TRAIN}
            try:
                built[who] = build(who, case, self.model)
            except harness.Missing as missing:
                yield {**at, "status": "absent", "note": str(missing)}
            except Exception as error:
                yield {**at, "status": "failed", "note": harness.reason(error)}
        values = {who: float(step(inputs, True)) for who, (step, inputs, _) in built.items()}
        calls = {who: harness.rotating(step, [inputs], TRAIN) for who, (step, inputs, _) in
                 built.items()}  # fmt: skip
        times = {} if self.small else in_turn(calls, end)
        for who, (_, inputs, note) in built.items():
            at = {"case": self.name, "provider": who, "mode": TRAIN, "device": "cpu"}
            row = {**at, "status": "ran", "note": note, "value": values[who]}
            yield row | numbers(inputs, times[who], tflops) if times else row

    def loaded(self) -> Case:
        """Return the case with the shape of MODEL in the recipe's nesting."""
        if not self.model:
            return self
        shape = hf_config.from_checkpoint(hf_config.resolve(self.model), config.Model())
        return replace(self, run=replace(self.run, model=shapes.nested(shape)))


def in_turn(calls: dict[str, harness.Call], end: float) -> dict[str, harness.Timing]:
    """Time calls in turn, one round to twenty; the last begins before `end`."""
    times: dict[str, list[float]] = {who: [] for who in calls}
    for number in range(20):
        if number and time.monotonic() > end:
            break
        for who, call in calls.items():
            times[who] += harness.timed(call, 1, CPU)
    return {who: harness.summary(took) for who, took in times.items()}


def numbers(inputs: Texts, timing: harness.Timing, tflops: float | None) -> Row:
    """Return times, tokens a second, and the share of the products' rate."""
    case = inputs.case
    packs = inputs.packs(False)[1]
    flops = sum(training_flops(case.run.model, pack, None).forward for pack in packs)
    rate = 3 * flops / timing.ms / 1e9
    row = {**asdict(timing), "tokens_s": tokens(case) / timing.ms * 1e3, "tflops": rate}
    return row | ({"share": rate / tflops} if tflops else {})


# ---- providers ----


def build(who: str, case: Case, model: str) -> tuple[Trained, Texts, str | None]:
    """Return a provider's step, its texts, and a note on what it does."""
    plain = replace(case.run.model, ranks=(), last_layers=0)
    flat = replace(plain, exits=plain.exits[-1:])
    run = replace(case.run, model=case.run.model if who in OURS[:2] else flat)
    case = replace(case, run=run)
    torch.manual_seed(0)
    start = pretrained.load(model, run.model) if model else Transformer(run.model)
    half = bf16(run, CPU)
    inputs = Texts(case, CPU)
    if who in OURS:
        if who == "ours_frozen":
            start.embed_tokens.rows.requires_grad_(False)
        return Ours(start, optimizer_of(start, run.optim), ours(run, half), 0), inputs, None
    made = peers.matryoshka_2d if who == PEERS[1] else peers.sentence_transformers
    trained, loss, note = made(case, start, cached=False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=run.optim.lr, fused=True)
    return Trained(trained, optimizer, autocast(loss, half), 0), inputs, note


def ours(run: config.Run, half: bool) -> Callable[[Trained, Texts], Tensor]:
    """Return the loss of train.py, without gradient cache and recomputation."""

    def loss(step: Trained, inputs: Texts) -> Tensor:
        batch, packs = inputs.packs(False)
        return packed_loss(step.model, run, batch, packs, 0, half)

    return loss


def autocast(
    loss: Callable[[Trained, Texts], Tensor], half: bool
) -> Callable[[Trained, Texts], Tensor]:
    """Return a peer's loss under bf16 autocast, like in its trainer with `bf16=True`."""

    def cast(step: Trained, inputs: Texts) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            return loss(step, inputs)

    return cast


CASE = CpuCase(
    name="cpu",
    run=config.Run(
        model=shapes.nested(shapes.SHAPES["multilingual-e5-small"]),
        loss=config.Loss(temperature=0.02),
        optim=config.Optim(lr=1e-5),
    ),
    pairs=64,
    queries=LENGTHS,
    docs=LENGTHS,
)


def targets(targets: Targets) -> None:
    """Add how many times as fast as sentence-transformers each of ours is."""
    theirs = targets.row(CASE.name, PEERS[0], TRAIN)
    for who in OURS:
        if theirs is not None and (mine := targets.row(CASE.name, who, TRAIN)) is not None:
            what = f"cpu, {who}: times sentence-transformers"
            targets.add(what, theirs["ms"] / mine["ms"], ">=", TIMES)
