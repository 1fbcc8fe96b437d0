"""Inner layers of a model of transformers as exits, pooled while the model runs.

    exits = Exits(trunk, (2, 4))
    with exits.pooled(pool) as pooled:             pool: states [N, S, D] -> vectors [N, D]
        states = trunk(**batch).last_hidden_state
    exits_END = torch.stack([*pooled, pool(states)])

Exit l is the model cut to its first l layers: the output of layer l, then the modules between the
model's last layer and its last hidden state, such as the final norm of a decoder. A hook pools each
exit as its layer ends. `output_hidden_states` keeps the states of all layers instead.

Letters: E exits, N texts, S tokens of a padded text, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..modeling.transformer import mode

NEEDS = "5.4"  # The oldest version that mlembed is tested with.
if Version(transformers.__version__) < Version(NEEDS):
    raise ImportError(f"transformers: expected {NEEDS} or newer, got {transformers.__version__}")

Pool = Callable[[Tensor], Tensor]


class Exits:
    """Hooks on some layers of a model; they act inside of `pooled` alone.

    The hooks stay on the model and see it through wrappers: DistributedDataParallel, torch.compile,
    adapters of peft, FSDP2.
    """

    def __init__(self, trunk: nn.Module, depths: Sequence[int]) -> None:
        """Find the model's layers and its final norm, by a forward pass of two tokens.

        Args:
            trunk: a model of transformers, not yet wrapped.
            depths: layers of each inner exit, rising, from 1 to one less than the model has.

        Raises:
            ValueError: a depth that the model does not have, or a model without a list of layers
                whose last output becomes its last hidden state, directly or by a norm.
        """
        layers = _layers(trunk)
        if list(depths) != sorted({*depths} & {*range(1, len(layers))}):
            raise ValueError(
                f"exits: expected rising numbers in 1..{len(layers) - 1} before the last layer, "
                f"{len(layers)}, got {list(depths)}"
            )
        self.tail = _tail(trunk, layers[-1])
        self.pool: Pool | None = None
        self.vectors: list[Tensor] = []
        for depth in depths:
            layers[depth - 1].register_forward_hook(self._leave)

    @contextmanager
    def pooled(self, pool: Pool) -> Iterator[list[Tensor]]:
        """Yield a list to which every forward pass inside the block adds a tensor for each exit.

        pool: states [N, S, D] -> vectors [N, D].
        """
        self.pool, self.vectors = pool, []
        try:
            yield self.vectors
        finally:
            self.pool = None

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self.pool is None:
            return
        states = _first(output)
        # Older transformers run hooks inside of a checkpoint, which counts what the layer saves.
        checkpoint = getattr(layer, "gradient_checkpointing", False)
        with saved_tensors_hooks(_same, _same) if checkpoint else nullcontext():
            for module in self.tail:
                states = module(states)
            self.vectors.append(self.pool(states))


def _layers(trunk: nn.Module) -> nn.ModuleList:
    """Return the outermost list of as many modules as the configuration has layers."""
    config: Any = trunk.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"exits: expected a list of {depth} layers, got none in {type(trunk).__name__}"
    )


def _tail(trunk: nn.Module, last: nn.Module) -> list[nn.Module]:
    """Return the modules that turn the last layer's output into the last hidden state, in order."""
    calls: list[tuple[nn.Module, Any, Any]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((module, args[0] if args else None, _first(output)))

    handles = [module.register_forward_hook(note) for module in trunk.modules()]
    device = next(trunk.parameters()).device
    try:
        with mode(trunk, training=False), torch.no_grad():
            final = trunk(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))[0]
    finally:
        for handle in handles:
            handle.remove()
    states = next(output for module, _, output in calls if module is last)
    tail: list[nn.Module] = []
    while states is not final:
        # Modules end after the modules in them, so that the last one is the outermost.
        after = [(module, out) for module, given, out in calls if given is states]
        after = [(module, out) for module, out in after if out is not states]
        if not after:
            raise ValueError(
                "exits: expected a model whose last hidden state is its last layer's output or a "
                f"norm of it, got {type(trunk).__name__}"
            )
        module, states = after[-1]
        tail.append(module)
    return tail


def _same(x: Tensor) -> Tensor:
    return x


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
