"""Find NaN and infinities of a step on the device, name the first, and advise on memory."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import config
from ..data.collate import Batch
from ..modeling.transformer import Transformer
from ..runtime.distributed import World, any_process
from .engine import local

GIB = 2**30

# ---- NaN and infinity ----


def agree(numbers: Iterable[Tensor], stop: bool, where: World) -> Tensor:
    """Return whether a number of any process is not finite, and whether any process is to stop:
    fp32 [2] on the device, 1 for yes and 0 for no. All processes call it.
    """
    finite = torch.stack([x.isfinite().all().to(where.device) for x in numbers]).all()
    answers = torch.stack([1 - finite.float(), torch.full_like(finite, stop, dtype=torch.float32)])
    if where.size > 1:
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
    return answers


class Check:
    """Whether the numbers of a step are finite, which the host reads after the step.

    step: the step's number. losses: loss_EM of each term. norms: norm of this process's part of
    each gradient, by parameter. stop: whether any process is to stop, once `bad` has been called.
    """

    stop = False

    def __init__(
        self, step: int, answers: Tensor, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]
    ) -> None:
        """answers: what `agree` returned."""
        self.step, self.losses, self.norms = step, losses, norms
        # The copy goes to pinned memory.
        self._answers, self._copied = answers.to("cpu", non_blocking=True), None
        if answers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def bad(self, model: Transformer, where: World) -> str | None:
        """Name the first tensor that is not finite, in the order weights, losses, gradients.

        The call waits for the step's update. All processes call it and agree on whether there is
        one and whether it is a weight. Each names the weight or the loss of its own, and all the
        same gradient.

        Returns:
            None if all numbers are finite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        found, self.stop = map(bool, self._answers.tolist())
        if not found:
            return None
        weight = bad_weight(model)
        gradient = bad_gradient(self.norms)
        if any_process(weight is not None, where):
            return weight or "weight on another process"
        for name, loss_EM in self.losses.items():
            if bad := bad_loss(loss_EM, model.cfg.exits, model.cfg.matryoshka_dims):
                return f"{name} {bad}"
        return gradient or "gradient norm"


def bad_loss(loss_EM: Tensor, exits: Sequence[int], dims: Sequence[int]) -> str | None:
    """Name the first entry of loss_EM [E, M] that is not finite; None if all are."""
    bad = (~loss_EM.isfinite()).nonzero().tolist()
    if not bad:
        return None
    e, m = bad[0]
    return f"loss of exit {exits[e]} at width {dims[m]} ({loss_EM[e, m].item()})"


def bad_weight(model: nn.Module) -> str | None:
    """Name the first parameter that is not finite; of a sharded one this process sees its shard."""
    name = bad_tensor(dict(model.named_parameters()))
    return name and f"weight {name}"


def bad_tensor(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that is not finite, without a copy of it; None if all are.

    The call waits for the device. Integers are finite.
    """
    for name, tensor in tensors.items():
        part = local(tensor.detach())
        floats = part.is_floating_point() and part.numel() > 0
        # NaN is both the least and the most.
        if floats and not torch.stack(part.aminmax()).isfinite().all():
            return name
    return None


def non_finite_advice(bad: str, step: int) -> str:
    """Return what to try after a step with a number that is not finite, whose name is `bad`.

    step: from 0. A rate can only be the cause once it has changed the weights.
    """
    if bad.startswith("weight"):
        return (
            "the update before it made it so: continue from the last checkpoint with a lower "
            "--optim.lr"
        )
    skip = "--non-finite skip leaves such steps out"
    if step:
        return f"the weights are those before the step. Try a lower --optim.lr; {skip}"
    return (
        "no step has changed the weights yet: try --precision fp32, a higher --loss.temperature, "
        f"or another --init; {skip}"
    )


def bad_gradient(norms: Mapping[str, Tensor]) -> str | None:
    """Name the first parameter whose gradient's norm is not finite on any process; all call it.

    norms: by parameter, each at least 0.
    """
    names = list(norms)
    bad = (~torch.stack(list(norms.values())).isfinite()).nonzero()
    first = torch.tensor(int(bad[0]) if len(bad) else len(names))
    if dist.is_initialized():
        # NCCL reduces device memory only, and gradients may be in host memory.
        first = first.cuda() if dist.get_backend() == "nccl" else first
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return f"gradient of {names[int(first)]}" if first < len(names) else None


# ---- batches that teach nothing ----


def contrastive_alone(run: config.Run) -> bool:
    """Return whether the contrastive loss is the only term of a run's loss."""
    return run.distill.learns == run.distill.contrastive


def teaches_nothing(batch: Batch) -> bool:
    """Return whether the contrastive loss of a batch, on the host, is zero: all texts are of one
    group, or all scores of this process are equal.
    """
    if batch.scores is not None:
        return bool((batch.scores == batch.scores[0]).all())
    ids = torch.cat([batch.query_ids, batch.doc_ids])
    own = batch.task in ("clustering", "classification")
    return not own and bool((ids == ids[0]).all())


# ---- memory, and processes that were killed for it ----


@contextmanager
def loader_errors() -> Iterator[None]:
    """Tell in one line what ended a loader's worker.

    Raises:
        ValueError: a worker was killed, or raised ValueError.
    """
    try:
        yield
    except (RuntimeError, ValueError, ConnectionError, EOFError) as error:
        text = str(error)
        # torch puts the traceback of the worker before the reason.
        if text.startswith("Caught ValueError in DataLoader worker"):
            raise ValueError(text.rpartition("\nValueError: ")[2].strip()) from None
        lost = re.search(r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed)", text)
        if lost or isinstance(error, ConnectionError | EOFError):
            # The loader's destructor fails as well, and would print a traceback.
            sys.unraisablehook = lambda unraisable: None
            raise ValueError(
                "loader: a process that prepares batches was killed, most likely for memory; "
                "continue with --resume and fewer --loader-workers"
            ) from None
        raise


def oom_advice(
    error: Exception, run: config.Run, step: int, tokens: int, graphs: float, free: float
) -> str:
    """Return which option to lower after `out_of_memory`, and to which value.

    The step lacks the bytes of the failed request minus the free ones. A smaller budget for graphs
    has to give up that and a tenth more.

    Args:
        tokens: tokens of the largest pack of the step.
        graphs: budget of the step's graphs in bytes, inf without one.
        free: bytes that were free when the request failed.
    """
    request = _requested(str(error))
    missing = max(request - free, 0.1 * request)
    if run.gradient_cache and graphs > 1.1 * missing:
        gib = max(graphs - 1.1 * missing, 2**20) / GIB
        option = f"--activation-gib {gib:.3g} (was {graphs / GIB:.3g}), which keeps fewer graphs"
    elif run.gradient_cache:
        option = f"--pack-tokens {max(tokens // 2, 1)} (the largest pack had {tokens})"
    else:
        option = (
            f"--gradient-cache, whose graphs take one pack of {tokens} tokens at a time, then "
            f"--pack-tokens {max(tokens // 2, 1)} to halve that"
        )
    return (
        f"memory: out of memory at step {step}, which asked for {request / GIB:.3g} GiB and is "
        f"short by at least {missing / GIB:.3g} GiB; try {option}"
    )


def _requested(message: str) -> float:
    """Parse the bytes of the failed request from torch's message; 0 if it has none."""
    match = re.search(r"allocate (?:memory: you tried to allocate )?([\d.]+) ?(\w+)", message)
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}
    return float(match[1]) * units.get(match[2], 1) if match else 0.0
