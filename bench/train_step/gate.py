"""The gate of a step: loss and every gradient of small models against float64.

The truth runs each text alone through the layers up to its depth, with a loss of whole matrices, on
the host and by the kernels' references. Eager's error is that of the same in the dtype of ours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlembed import config
from mlembed.data.collate import Batch, collate
from mlembed.data.packing import PackedBatch, pack
from mlembed.modeling.transformer import Transformer
from mlembed.runtime import transfer
from mlembed.runtime.distributed import World
from mlembed.training.objective.loss import loss_table, weights

from .. import harness
from ..harness import CPU, EPS32, dtype_name, judged
from .peers import dense, liger_halves

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """A difficult batch: texts of one token and of more than a tile, several packs, early exits.

    again: layers that the backward recomputes; of the others, point-wise results.
    max_tokens: of a pack. heads: Hq, Hkv, K.
    """

    name: str
    pairs: int = 8
    negatives: int = 2
    longest: int = 150
    skips: bool = False
    again: int = 0
    liger: bool = False
    max_tokens: int = 700
    symmetric: bool = False
    heads: tuple[int, int, int] = (4, 2, 64)
    width: int = 256
    ranks: tuple[int, ...] = ()

    @property
    def about(self) -> str:
        Hq, Hkv, K = self.heads
        count = self.pairs * (2 + self.negatives)
        return f"{count} texts, D {self.width}, {Hq}/{Hkv} heads of {K}, ranks {self.ranks}"

    def toy(self) -> "Check":
        heads = 2, 2 // (self.heads[0] // self.heads[1]), 16
        ranks = tuple(r // 8 for r in self.ranks)
        few = replace(self, pairs=4, longest=9, max_tokens=40)
        return replace(few, width=32, heads=heads, ranks=ranks)

    @property
    def run(self) -> config.Run:
        Hq, Hkv, K = self.heads
        D = self.width
        model = config.Model(
            vocab_size=499, hidden_size=D, num_hidden_layers=4, num_attention_heads=Hq,
            num_key_value_heads=Hkv, head_dim=K, intermediate_size=2 * D, exits=(1, 2, 4),
            matryoshka_dims=(8, D // 2, D), ranks=self.ranks,
        )  # fmt: skip
        directions: Any = "symmetric" if self.symmetric else "query_to_doc"
        loss = config.Loss(directions=directions, matryoshka_weights="ml-embed")
        return config.Run(model=model, loss=loss, pack_tokens=self.max_tokens)


def checks() -> Iterator[Check]:
    yield Check("whole")
    yield Check("skipping", skips=True)
    yield Check("nested, skipping, recomputed", skips=True, again=3, ranks=(32, 64))
    yield Check("thin, both directions", symmetric=True, heads=(8, 8, 16), width=128, negatives=0)
    yield Check("by Liger", liger=True)


def texts(check: Check) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the tokens of queries, positives and negatives, and the depth of each group.

    Some texts occur more than once.
    """
    rng = np.random.default_rng(5)
    count = check.pairs * (2 + check.negatives)
    sizes = rng.integers(2, check.longest, count)
    sizes[: count // 4] = rng.integers(1, 5, count // 4)
    rows = [rng.integers(0, 499, n) % rng.integers(1, 500) for n in sizes]
    depths = np.full(check.pairs, 4)
    if check.skips:
        depths[1:] = rng.choice([1, 2, 4], check.pairs - 1)
        depths[-1] = 1
    return rows, depths


def made(check: Check, device: torch.device, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(replace(check.run.model, dropout=dropout))
    with torch.no_grad():
        # Norms become unlike 1, scores unlike 0.
        for weight in model.parameters():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
            if weight.ndim > 1:
                weight.mul_(2)
    return model.to(device)


@cache
def alone(check: Check, dtype: torch.dtype) -> tuple[Tensor, Gradients]:
    """Return loss and gradients, text by text on the host: the truth in float64, else eager's."""
    run, (rows, depths) = check.run, texts(check)
    half = dtype == torch.bfloat16
    model = made(check, CPU).to(torch.float32 if half else dtype)
    n = check.negatives
    of_rows = [*depths, *depths, *np.repeat(depths, n)]
    exits = run.model.exits
    vectors = []
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        for row, depth in zip(rows, of_rows, strict=True):
            some = tuple(e for e in exits if e <= depth)
            x_ED = model(pack([row]).to(CPU), exits=some)[:, 0]
            deeper = x_ED.new_zeros(len(exits) - len(some), x_ED.shape[1])
            vectors.append(torch.cat([x_ED, deeper]))
    exits_END = torch.stack(vectors, dim=1)
    if half:
        exits_END = exits_END.bfloat16()
    loss_EM = dense(exits_END, check.pairs, run, torch.from_numpy(depths))
    loss = (weights(run).to(loss_EM.dtype) * loss_EM).sum()
    return differentiated(loss, model)


def packed(check: Check, device: torch.device) -> tuple[Tensor, Gradients]:
    """Return loss and gradients as training computes them: in packs, compiled, by the kernels.

    Raises Missing if the check needs Liger's functions and they are missing.
    """
    model = made(check, device)
    if check.liger:
        model._before, model._after = liger_halves(device)
    else:
        compile_for(model, device, lean=check.again > 0)
    batch = batch_of(check).to(device)
    half = device.type == "cuda"
    loss = packed_loss(model, check.run, batch, batch.packs, check.again, half)
    return differentiated(loss, model)


def packed_loss(
    model: Any,
    run: config.Run,
    batch: Batch,
    packs: Sequence[PackedBatch],
    again: int,
    half: bool,
    mark: Callable[[str], None] = lambda stage: None,
) -> Tensor:
    """Return the loss as train.py computes it in one process.

    Args:
        again: layers to recompute. half: under bf16 autocast; on a GPU the loss takes bf16 exits.
        mark: is called with "loss" and "blocks" as they begin, forward and backward.
    """
    device: torch.device = model.device
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        exits_END = torch.cat([model(some, recompute=again) for some in packs], dim=1)
    exits_END = exits_END.bfloat16() if half and device.type == "cuda" else exits_END
    mark("loss")
    if exits_END.requires_grad:
        exits_END.register_hook(lambda grad: mark("blocks"))
    loss_EM = loss_table(exits_END, batch, run, World(0, 1, device))
    return (transfer.moved(weights(run), device) * loss_EM).sum()


def compile_for(model: Transformer, device: torch.device, lean: bool = False) -> None:
    """Compile the blocks, after clearing what other models compiled: the cache has a limit."""
    if device.type == "cuda":
        torch._dynamo.reset()
    model.compile_blocks("inductor" if device.type == "cuda" else "aot_eager", lean=lean)


def batch_of(check: Check) -> Batch:
    rows, depths = texts(check)
    P, n = check.pairs, check.negatives
    groups = [[i, P + i, *range(2 * P + i * n, 2 * P + (i + 1) * n)] for i in range(P)]
    numbers, most = np.arange(len(rows)), check.max_tokens
    return collate(groups, rows.__getitem__, numbers, depths, None, max_tokens=most)


def differentiated(loss: Tensor, model: Transformer) -> tuple[Tensor, Gradients]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach().cpu(), {n: x.cpu() for n, x in zip(names, gradients, strict=True)}


Computed = Callable[[Check, torch.device], tuple[Tensor, Gradients]]


def verdict(check: Check, device: torch.device, compute: Computed = packed) -> dict[str, Any]:
    """Compare loss and gradients with float64.

    Floor, of the truth's size: two steps of the dtype, as the largest of thousands of errors
    depends on the order of sums; an fp32 logit is known to its step over the temperature.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    got_loss, got = compute(check, device)
    eager_loss, eager = alone(check, dtype)
    truth_loss, truth = alone(check, torch.float64)
    parts = {"loss": judged(got_loss, eager_loss, truth_loss, floor_of(check, dtype))}
    for name, x in got.items():
        parts[name] = judged(x, eager[name], truth[name], floor_of(check, dtype))
    return summary(parts, dtype)


def floor_of(check: Check, dtype: torch.dtype) -> float:
    return 2 * torch.finfo(dtype).eps + 64 * EPS32 / check.run.loss.temperature


def summary(parts: dict[str, dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    """Return `ok`, the loss's errors and those of the worst gradient."""
    ok, loss = all(part["ok"] for part in parts.values()), parts.pop("loss")
    worst = max(parts, key=lambda name: (not parts[name]["ok"], parts[name]["rms"]))
    labels = {"ok": ok, "dtype": dtype_name(dtype), "loss": loss}
    return {**labels, "gradients": {"worst": worst, **parts[worst]}}


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    def trials() -> Iterator[harness.Trial]:
        for check in checks():
            check = check.toy() if smoke else check
            yield {"check": check.name, "shape": check.about}, partial(verdict, check, device)

    return harness.gate(trials())
