"""Is a step right? Small models before anything is timed: loss and every gradient against float64.

The truth is each text alone, run through the layers up to its depth and no further, with a loss of
whole matrices. So it is also what layer-skip training promises. It and eager's error, of the same
computation in the dtype of ours, come from the host, by the kernels' references.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlembed import config
from mlembed.data.collate import Batch, collate
from mlembed.data.packing import pack
from mlembed.modeling.transformer import Transformer
from mlembed.runtime.distributed import World
from mlembed.training.objective.loss import loss_table, weights

from ..attention.cases import EPS32
from ..harness import Missing, judged, reason
from .peers import dense, liger_halves

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """A shape that hurts: texts of one token, of more than a tile, several packs, groups that
    leave, the first exit left by many at once."""

    name: str
    pairs: int = 8
    negatives: int = 2
    longest: int = 150
    skips: bool = False
    again: int = 0  # layers computed again in the backward; of the others what is element-wise
    liger: bool = False
    max_tokens: int = 700  # of a pack
    symmetric: bool = False
    heads: tuple[int, int, int] = (4, 2, 64)  # Hq, Hkv, K
    width: int = 256
    ranks: tuple[int, ...] = ()

    def toy(self) -> "Check":
        return replace(
            self,
            pairs=4,
            longest=9,
            max_tokens=40,
            width=32,
            heads=(2, 2 // (self.heads[0] // self.heads[1]), 16),
            ranks=tuple(r // 8 for r in self.ranks),
        )

    @property
    def run(self) -> config.Run:
        Hq, Hkv, K = self.heads
        model = config.Model(
            vocab_size=499,
            hidden_size=self.width,
            num_hidden_layers=4,
            num_attention_heads=Hq,
            num_key_value_heads=Hkv,
            head_dim=K,
            intermediate_size=2 * self.width,
            exits=(1, 2, 4),
            matryoshka_dims=(8, self.width // 2, self.width),
            ranks=self.ranks,
        )
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
    """Tokens of queries, positives and negatives, and the depth of each group. Some recur."""
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
        for weight in model.parameters():  # norms that are not 1, scores that are not 0
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
            if weight.ndim > 1:
                weight.mul_(2)
    return model.to(device)


@cache  # a check's truth is asked for by everything that is held to it
def alone(check: Check, dtype: torch.dtype) -> tuple[Tensor, Gradients]:
    """Loss and gradients, text by text on the host: in float64 the truth, in another dtype eager's
    (bf16: autocast)."""
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
            nobody = x_ED.new_zeros(len(exits) - len(some), x_ED.shape[1])
            vectors.append(torch.cat([x_ED, nobody]))
    exits_END = torch.stack(vectors, dim=1)
    if half:
        exits_END = exits_END.bfloat16()
    loss_EM = dense(exits_END, check.pairs, run, torch.from_numpy(depths))
    loss = (weights(run).to(loss_EM.dtype) * loss_EM).sum()
    return differentiated(loss, model)


def packed(check: Check, device: torch.device) -> tuple[Tensor, Gradients]:
    """The same as training computes it: in packs, compiled, by the kernels of the device.

    Raises:
        Missing: Liger's functions are asked for, and are not there.
    """
    model, run = made(check, device), check.run
    if check.liger:
        model._before, model._after = liger_halves(device)
    else:
        compile_for(model, device, lean=check.again > 0)
    batch = batch_of(check)
    half = device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
        parts = [model(some.to(device), recompute=check.again) for some in batch.packs]
    exits_END = torch.cat(parts, dim=1)
    exits_END = exits_END.bfloat16() if half else exits_END
    loss_EM = loss_table(exits_END, batch, run, World(0, 1, device))
    return differentiated((weights(run).to(device) * loss_EM).sum(), model)


def compile_for(model: Transformer, device: torch.device, lean: bool) -> None:
    if device.type == "cuda":
        torch._dynamo.reset()  # what other checks compiled counts towards its limit
    model.compile_blocks("inductor" if device.type == "cuda" else "aot_eager", lean=lean)


def batch_of(check: Check) -> Batch:
    rows, depths = texts(check)
    P, n = check.pairs, check.negatives
    groups = [[i, P + i, *range(2 * P + i * n, 2 * P + (i + 1) * n)] for i in range(P)]
    return collate(
        groups,
        lambda row: rows[row],
        np.arange(len(rows)),
        depths,
        None,
        max_tokens=check.max_tokens,
    )


def differentiated(loss: Tensor, model: Transformer) -> tuple[Tensor, Gradients]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    found = {name: x.cpu() for name, x in zip(names, gradients, strict=True)}
    return loss.detach().cpu(), found


Computed = Callable[[Check, torch.device], tuple[Tensor, Gradients]]


def verdict(check: Check, device: torch.device, compute: Computed = packed) -> dict[str, Any]:
    """An error up to eager's is right. Floor, of the truth's size: two steps of the dtype, as the
    largest of thousands of errors is another in another order of sums; an fp32 logit is known to
    its step over the temperature."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    got_loss, got = compute(check, device)
    eager_loss, eager = alone(check, dtype)
    truth_loss, truth = alone(check, torch.float64)
    floor = 2 * torch.finfo(dtype).eps + 64 * EPS32 / check.run.loss.temperature
    loss = judged(got_loss, eager_loss, truth_loss, floor)
    parts = {name: judged(x, eager[name], truth[name], floor) for name, x in got.items()}
    worst = max(parts, key=lambda name: (not parts[name]["ok"], parts[name]["rms"]))
    return {
        "ok": loss["ok"] and all(part["ok"] for part in parts.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "loss": loss,
        "gradients": {"worst": worst, **parts[worst]},
    }


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """One verdict for each check."""
    for check in checks():
        check = check.toy() if smoke else check
        at = {"check": check.name, "shape": about_check(check)}
        try:
            yield at | verdict(check, device)
        except Missing:
            continue
        except Exception as error:  # whatever it is, it is not right
            yield at | {"ok": False, "dtype": "-", "error": reason(error)}


def about_check(check: Check) -> str:
    Hq, Hkv, K = check.heads
    count = check.pairs * (2 + check.negatives)
    return f"{count} texts, D {check.width}, {Hq}/{Hkv} heads of {K}, ranks {check.ranks}"
