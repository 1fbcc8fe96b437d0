"""Model wrappers for one process, DDP and FSDP2, and when gradients are reduced.

    engine.begin()
    forward(.., sync=False), backward(.., sync=False)    any number, each process its own
    forward(.., sync=True),  backward(.., sync=True)     once, the last: reduces the gradients
    engine.norm(engine.norms());  optimizer.step();  engine.zero()

Processes may differ in how many packs they have and in which graphs they keep, so nothing between
`begin` and the last backward communicates: `begin` gathers weights, and the last backward, which
has to reach every layer, averages gradients over processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
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
from ..modeling import pretrained
from ..modeling.automodel.choose import trunk_of
from ..modeling.transformer import Transformer
from ..runtime.distributed import World


class Engine:
    """One process with the whole model; the base of the engines of several processes.

    model: the model, in training mode. Its parameters are what to optimise. scale: alpha / rank of
    its adapters, 0 without them.
    """

    scale = 0.0

    def __init__(self, model: Transformer, where: World) -> None:
        self.model, self.where = model.train(), where

    @staticmethod
    def of(model: Transformer, run: config.Run, where: World, half: bool) -> "Engine":
        """Wrap the model as configured; all processes call it with a model of equal shape.

        With ddp all weights become those of the main process. With fsdp each process keeps its
        shard of its own weights, so these have to be equal. half: run under bf16 autocast.

        Raises:
            ValueError: fsdp with one process.
        """
        engine: Engine
        if run.engine == "fsdp":
            engine = Sharded(model, where, half, run.cpu_offload)
        else:
            engine = Replicated(model, where) if where.size > 1 else Engine(model, where)
        engine.scale = run.lora.scale
        return engine

    def begin(self) -> None:
        """Prepare a step, before its first forward; all processes call it."""

    def forward(self, pack: PackedBatch, *, sync: bool, **options: Any) -> Tensor:
        """Return exits_END as Transformer.forward does, with or without a graph.

        options: of Transformer.forward. sync: the backward of this forward is this process's last
        in the step.
        """
        return self.model(pack, **options)

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], *, sync: bool) -> None:
        """Add the gradients of sum(outputs * grads) to the parameters' gradients.

        sync: average the step's gradients over processes. It is then the last backward of the step,
        all outputs are of forwards with sync, and a text of the last one runs to full depth.
        """
        torch.autograd.backward(outputs, grads)

    def norms(self) -> dict[str, Tensor]:
        """Return the norm of this process's part of each gradient, 0-dim, by parameter.

        Norms are fp32, float64 of float64.
        """
        named = self.model.named_parameters()
        grads = {name: local(p.grad) for name, p in named if p.grad is not None}
        norms: dict[str, Tensor] = {}
        # torch computes norms of equal dtypes together.
        for dtype in dict.fromkeys(grad.dtype for grad in grads.values()):
            some = {name: grad for name, grad in grads.items() if grad.dtype == dtype}
            wide = torch.promote_types(dtype, torch.float32)
            each = torch._foreach_norm(list(some.values()), 2, wide)
            norms.update(zip(some, each, strict=True))
        return {name: norms[name] for name in grads}

    def norm(self, norms: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of all gradients, 0-dim and equal on all processes; all call it.

        norms: what `norms` returned.
        """
        return torch.linalg.vector_norm(torch.stack(list(norms.values())))

    def zero(self) -> None:
        """Drop the gradients at the end of a step."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def full_weights(self) -> dict[str, Tensor] | None:
        """Return all weights by name, on the main process and between steps.

        All processes call it; all but the main one get None.
        """
        return dict(self.model.state_dict()) if self.where.main else None

    def full_model(self) -> Transformer | None:
        """Return the model with all its weights, adapters merged, where `full_weights` returns."""
        if self.scale:
            return self._merged()
        return self.model if self.where.main else None

    def _merged(self) -> Transformer | None:
        """Return a model of the full weights, which shares those that have no adapters."""
        weights = self.full_weights()
        if weights is None:
            return None
        with torch.device("meta"):
            model = trunk_of(self.model.cfg)
        model.load_state_dict(pretrained.merged(weights, self.scale), assign=True)
        return model.eval()


class Replicated(Engine):
    """DistributedDataParallel: each process has all weights, gradients are all-reduced."""

    def __init__(self, model: Transformer, where: World) -> None:
        super().__init__(model, where)
        # Buffers are constants, and each forward would communicate to send them.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name, _ in model.named_buffers()]
        )
        self.replica = DistributedDataParallel(model)

    def begin(self) -> None:
        # After the first step DDP orders its buckets by that step's gradients, and processes agree
        # on the order in their next forward with a graph. That forward may come before the loss
        # communicates on one process and after it on another, so they agree here.
        self.replica.reducer._rebuild_buckets()

    def forward(self, pack: PackedBatch, *, sync: bool, **options: Any) -> Tensor:
        # DDP decides in a forward whether its backward reduces.
        self.replica.require_backward_grad_sync = sync
        return self.replica(pack, **options)


class Sharded(Engine):
    """FSDP2: each process has an fp32 shard of every parameter, gradient and moment.

    During a step all processes hold all weights, in bf16 under autocast, and all gradients, until
    the last backward has reduced them layer by layer. Freeing weights between layers would gather
    them again in every forward, and processes differ in how many forwards they run.
    """

    def __init__(self, model: Transformer, where: World, half: bool, offload: bool) -> None:
        if where.size == 1:
            raise ValueError("engine: expected several processes (torchrun) for fsdp, got one")
        super().__init__(model, where)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            # Gradients also accumulate in this dtype.
            reduce_dtype=torch.float32 if half else None,
            # The tables of rotations stay fp32.
            cast_forward_inputs=False,
        )
        # On the CPU the shards are in host memory already.
        on_host = offload and where.device.type != "cpu"
        options: dict[str, Any] = dict(
            mesh=init_device_mesh(where.device.type, (where.size,)),
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy() if on_host else OffloadPolicy(),
            reshard_after_forward=False,
        )
        # The last layers that run at every exit stay with the root, which is reduced once, after
        # the whole backward.
        once = model.cfg.num_hidden_layers - model.cfg.last_layers
        for layer in model.layers[:once]:
            fully_shard(layer, **options)
        self.root: FSDPModule = fully_shard(model, **options)
        self.parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        for part in self.parts:
            part.set_unshard_in_backward(False)

    def begin(self) -> None:
        for part in self.parts:
            part.unshard()

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], *, sync: bool) -> None:
        # In one backward FSDP2 reduces a layer once for each of its forwards, so the backward that
        # reduces takes one output alone.
        first = len(outputs) - 1 if sync else len(outputs)
        if first:
            self._communicate(False)
            torch.autograd.backward(outputs[:first], grads[:first])
        if sync:
            self._communicate(True)
            torch.autograd.backward(outputs[first:], grads[first:])

    def _communicate(self, last: bool) -> None:
        """Set whether the next backward reduces gradients, and frees weights and buffers."""
        self.root.set_requires_gradient_sync(last)
        self.root.set_reshard_after_backward(last)
        self.root.set_is_last_backward(last)

    def norm(self, norms: Mapping[str, Tensor]) -> Tensor:
        own = super().norm(norms)
        square = own.double().square().to(self.where.device)
        dist.all_reduce(square)
        return square.sqrt().to(own.dtype)

    def full_weights(self) -> dict[str, Tensor] | None:
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            # Collectives need the shard on the device of the process group.
            shard = parameter.detach().to(self.where.device)
            assert isinstance(shard, DTensor), "expected sharded weights, as between steps"
            full = shard.full_tensor()
            if self.where.main:
                weights[name] = full
        return weights if self.where.main else None

    def full_model(self) -> Transformer | None:
        return self._merged()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
