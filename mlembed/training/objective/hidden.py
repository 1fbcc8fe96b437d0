"""Distillation of hidden states, token by token, from a teacher of the student's architecture.

    hidden  mean over texts and their tokens of |h - t|^2 / |t|^2

h and t are the states of one token before the last H layers of the student, on the way to its
deepest exit, and of the teacher, which may be deeper; H is `model.last_layers`, and t gets no
gradient. Each token teaches D numbers, where a text's vector teaches them once: a vocabulary of low
rank learns most from it.

The term needs no graph of its own. It adds its gradient to that of h while the backward passes,
which is the same with and without kept graphs, and for all engines.

Letters: T tokens of a pack, N texts of a batch, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ... import config
from ...data.collate import Batch
from ...data.packing import PackedBatch
from ...modeling.transformer import Tap
from ...runtime.distributed import World
from .packed_teacher import PackedTeacher
from .teacher import Teacher


class _Add(torch.autograd.Function):
    """x, gradient -> x, whose gradient grows by `gradient` in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return grad + gradient, None


@dataclass
class Target:
    """States that a pack's tokens are to have after a layer.

    states_TD: the teacher's. share_T: fp32, each token's part of the mean over all processes, times
    their number, since processes average. value: this pack's part of the term, once it was read.
    """

    layer: int
    states_TD: Tensor
    share_T: Tensor
    value: Tensor

    def tap(self, weight: float) -> tuple[int, Tap]:
        """Return the `tap` of a forward, whose backward adds the gradient of weight x term."""

        def read(x_TD: Tensor) -> Tensor:
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            with torch.autocast(x_TD.device.type, enabled=False):
                t_TD = self.states_TD[: len(x_TD)].to(wide)
                share_T = self.share_T[: len(x_TD)].to(wide) / t_TD.square().sum(1)
                off_TD = x_TD.detach().to(wide) - t_TD
                self.value = (share_T * off_TD.square().sum(1)).sum()
                if not torch.is_grad_enabled():
                    return x_TD
                gradient = (2 * weight * share_T)[:, None] * off_TD
                added: Tensor = _Add.apply(x_TD, gradient.to(x_TD.dtype))
            return added

        return self.layer, read


def table(targets: Sequence[Target], weight_EM: Tensor) -> Tensor:
    """Return the term as a table loss_EM, shaped like the weights, which has it at the last exit.

    Prefixes share it, and `total_loss` counts it once.
    """
    value = torch.stack([target.value for target in targets]).sum()
    loss_EM = value.new_zeros(weight_EM.shape)
    loss_EM[-1] = value
    return loss_EM


def check(run: config.Run, teacher: Teacher, tokens: Tokenizer) -> None:
    """Raise ValueError unless the teacher's hidden states can be those of the run's model.

    tokens: the student's tokenizer.
    """
    if not run.distill.hidden:
        return
    packed, model, source = teacher.model, run.model, run.distill.teacher
    name = f"distill.hidden: expected a teacher of the model's architecture, got {source}"
    if not isinstance(packed, PackedTeacher):
        raise ValueError(f"{name}, {packed.encoder}; 0 distils vectors alone")
    cfg = packed.trunk.model.cfg
    alike = cfg.style == model.style and cfg.hidden_size == model.hidden_size
    if not alike or cfg.num_hidden_layers < model.num_hidden_layers:
        raise ValueError(
            f"{name} with {cfg.num_hidden_layers} {cfg.style} layers of width {cfg.hidden_size} "
            f"for {model.num_hidden_layers} {model.style} layers of width {model.hidden_size}"
        )
    if packed.trunk.tokenizer.get_vocab() != tokens.get_vocab():
        raise ValueError(f"{name} with another tokenizer than the model")


@torch.no_grad()
def read(
    teacher: Teacher, batch: Batch, shape: config.Model, where: World
) -> tuple[Tensor, list[Target]]:
    """Encode a batch's packs by the teacher, which reads the student's tokens.

    Texts that end before the student's deepest exit have no term.

    Args:
        batch: on the teacher's device. shape: the student's.

    Returns:
        the teacher's vectors fp32 [N, Dt], queries then documents, and a target for each pack.
    """
    assert isinstance(teacher.model, PackedTeacher)
    vectors, targets = [], []
    host, depth = batch.host, shape.exits[-1]
    layer = depth - shape.last_layers
    above = teacher.model.trunk.model.cfg.num_hidden_layers - shape.last_layers
    texts = sum(int((depths >= depth).sum()) for depths in (host.query_depths, host.doc_depths))
    for pack in batch.packs:
        exits_END, states_TD = teacher.model.read(_whole(pack), above)
        vectors.append(exits_END[0])
        share_T = shares(pack, texts, where)
        targets.append(Target(layer, states_TD, share_T, share_T.new_zeros(())))
    return torch.cat(vectors)[batch.place], targets


def shares(pack: PackedBatch, texts: int, where: World) -> Tensor:
    """Return each token's part of the mean over the texts of all processes, times their number,
    since processes average: fp32 [T].
    """
    lengths = pack.cu_seqlens.diff()
    per_token = (where.size / max(1, texts)) / lengths.float()
    return per_token.repeat_interleave(lengths, output_size=pack.plan.tokens)


def _whole(pack: PackedBatch) -> PackedBatch:
    """Return the pack with all texts running through all layers."""
    return replace(pack, live=((math.inf, pack.plan),), skip_layers={})
