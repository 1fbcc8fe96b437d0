"""How one or several processes hold a model, and when they talk about its gradients.

    engine.begin()
    any number of  forward(.., sync=False), backward(.., sync=False)    each process its own number
    one last       forward(.., sync=True),  backward(.., sync=True)     reduces, once a step
    engine.clip(engine.norm(), most);  optimizer.step();  engine.zero()

Processes may differ in how many packs they have and in which of them they keep graphs, so nothing
in between may communicate: weights are gathered in `begin`, gradients are averaged over processes
in the last backward, which has to reach every layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .. import config
from ..data.packing import PackedBatch
from ..modeling.transformer import Transformer
from ..runtime.distributed import World


class Engine:
    """One process with the whole model; what several do otherwise is in the classes below.

    model: the model, in training mode. Its parameters are what to optimise.
    """

    def __init__(self, model: Transformer, where: World) -> None:
        self.model, self.where = model.train(), where

    @staticmethod
    def of(model: Transformer, run: config.Run, where: World, half: bool) -> "Engine":
        """The configured one. All processes call it, with a model of equal shape on their device;
        the weights become those of the main process (ddp), or each keeps a shard of its own, which
        have to be equal (fsdp).

        Args:
            half: whether forwards run under bf16 autocast.

        Raises:
            ValueError: fsdp with one process.
        """
        if run.engine == "fsdp":
            return Sharded(model, where, half, run.cpu_offload)
        return Replicated(model, where) if where.size > 1 else Engine(model, where)

    def begin(self) -> None:
        """Before the first forward of a step; all processes call it."""

    def forward(
        self,
        pack: PackedBatch,
        *,
        exits: Sequence[int] | None,
        rank: int | None,
        recompute: int,
        sync: bool,
    ) -> Tensor:
        """exits_END as of Transformer.forward, with or without a graph.

        Args:
            sync: whether the backward of this forward is this process's last in the step.
        """
        return self.model(pack, exits=exits, rank=rank, recompute=recompute)

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], *, sync: bool) -> None:
        """Add the gradients of sum(outputs * grads) to the parameters'.

        Args:
            outputs: what `forward` gave. The last one's pack has a text of full depth if `sync`.
            sync: average what the step has accumulated over processes. Then all outputs are of
                forwards with sync, and it is the last backward of the step.
        """
        torch.autograd.backward(outputs, grads)

    def norm(self) -> Tensor:
        """Norm of the gradients of all parameters: a plain 0-dim tensor, equal on all processes,
        which all call it."""
        return torch.nn.utils.get_total_norm(self._grads())

    @torch.no_grad()
    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale the gradients in place to a norm of at most `max_norm`, `norm` being theirs."""
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # torch's clip_grads_with_norm_
        if grads := self._grads():
            torch._foreach_mul_(grads, factor.to(grads[0].device))

    def zero(self) -> None:
        """Drop the gradients, after the last backward, whether or not the optimiser used them."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def whole(self) -> Transformer | None:
        """On the main process, between steps, the model with all of its weights, for evaluation and
        export; all processes call it."""
        return self.model if self.where.main else None

    def _grads(self) -> list[Tensor]:
        """What this process holds of them, as plain tensors."""
        found = (parameter.grad for parameter in self.model.parameters())
        return [local(grad) for grad in found if grad is not None]


class Replicated(Engine):
    """DistributedDataParallel: each process has all weights, and gradients meet in all-reduces."""

    def __init__(self, model: Transformer, where: World) -> None:
        super().__init__(model, where)
        self.replica = DistributedDataParallel(model)

    def begin(self) -> None:
        # After the first step buckets follow the order of its gradients, and processes agree on it
        # in their next forward with a graph: which may come before the loss communicates on one and
        # after it on another. So here.
        self.replica.reducer._rebuild_buckets()

    def forward(self, pack: PackedBatch, *, sync: bool, **options: Any) -> Tensor:
        # Whether a backward reduces is decided in its forward.
        self.replica.require_backward_grad_sync = sync
        return self.replica(pack, **options)


class Sharded(Engine):
    """FSDP2: each process has a shard of every parameter, gradient and moment, in fp32.

    For a step all have all weights, in bf16 under autocast, and their gradients until the last
    backward has reduced them layer by layer. Freeing weights between layers would gather them anew
    in every forward, and processes have different numbers of these.
    """

    def __init__(self, model: Transformer, where: World, half: bool, offload: bool) -> None:
        if where.size == 1:
            raise ValueError("engine: expected several processes (torchrun) for fsdp, got one")
        super().__init__(model, where)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,  # where gradients accumulate as well
            cast_forward_inputs=False,  # rotations stay fp32
        )
        # Without a device beside it the host's memory is where shards are anyway.
        on_host = offload and where.device.type != "cpu"
        options: dict[str, Any] = dict(
            mesh=init_device_mesh(where.device.type, (where.size,)),
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy() if on_host else OffloadPolicy(),
            reshard_after_forward=False,
        )
        for layer in model.layers:
            fully_shard(layer, **options)
        self.root: FSDPModule = fully_shard(model, **options)
        self.parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        for part in self.parts:
            part.set_unshard_in_backward(False)

    def begin(self) -> None:
        for part in self.parts:
            part.unshard()

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], *, sync: bool) -> None:
        # A layer reduces once for each of its forwards in a backward: here it may be one alone.
        first = len(outputs) - 1 if sync else len(outputs)
        if first:
            self._communicate(False)
            torch.autograd.backward(outputs[:first], grads[:first])
        if sync:
            self._communicate(True)
            torch.autograd.backward(outputs[first:], grads[first:])

    def _communicate(self, last: bool) -> None:
        """Whether the next backward reduces gradients, and frees weights and buffers."""
        self.root.set_requires_gradient_sync(last)
        self.root.set_reshard_after_backward(last)
        self.root.set_is_last_backward(last)

    def norm(self) -> Tensor:
        grads = self._grads()
        square = torch.nn.utils.get_total_norm(grads).double().square().to(self.where.device)
        dist.all_reduce(square)
        return square.sqrt().to(grads[0].dtype)

    def whole(self) -> Transformer | None:
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            shard = parameter.detach().to(self.where.device)  # where collectives are
            assert isinstance(shard, DTensor), "expected shards: between steps"
            full = shard.full_tensor()
            if self.where.main:
                weights[name] = full
        if not self.where.main:
            return None
        with torch.device("meta"):
            model = Transformer(self.model.cfg)
        model.load_state_dict(weights, assign=True)
        return model.eval()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_bad(model: nn.Module) -> str | None:
    """The first parameter, in the model's order, with a gradient that is not finite on any process.

    All processes call it.
    """
    named = list(model.named_parameters())
    grads = [local(p.grad) for _, p in named if p.grad is not None]
    names = [name for name, p in named if p.grad is not None]
    bad = (i for i, grad in enumerate(grads) if not grad.isfinite().all())
    first = torch.tensor(next(bad, len(names)))
    if dist.is_initialized():
        if dist.get_backend() == "nccl":  # gradients may be in host memory
            first = first.cuda()
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return [*names, None][int(first)]
