"""The loss over exits and prefixes for SentenceTransformerTrainer, plain and with gradient cache.

    loss = Matryoshka3dLoss(model, matryoshka_dims=[384, 192, 96], exits=[4, 8, 12])
    SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss).train()

One forward pass pools all exits, and one call of `mlembed_kernels.infonce` returns the loss of all
exits and prefixes. With one exit and one prefix the loss is that of MultipleNegativesRankingLoss.

Letters: E exits, M prefixes, N rows, D width.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import sentence_transformers
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from mlembed_kernels import infonce

from ..runtime.distributed import gather
from .exits import Exits

NEEDS = "6.0"  # the first version with CachedLossMixin
if Version(sentence_transformers.__version__) < Version(NEEDS):
    raise ImportError(
        f"sentence-transformers: expected {NEEDS} or newer, got {sentence_transformers.__version__}"
    )

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.losses import (  # noqa: E402
    CachedLossMixin,
    has_static_embedding_input,
)
from sentence_transformers.base.losses.merged_forward import embed_columns  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402

CITATION = """
@inproceedings{zhang2026mlembed,
    title={ML-Embed: Inclusive and Efficient Embeddings for a Multilingual World},
    author={Zhang and Liao and Yu and Di and Wang},
    booktitle={ICML},
    year={2026},
    eprint={2605.15081},
    archivePrefix={arXiv}
}
"""


class Matryoshka3dLoss(nn.Module):
    """InfoNCE at every exit and prefix, for rows of an anchor, a positive and any hard negatives.

    The trainer logs the loss of each exit and prefix, times its weight, as `exit4_dim96`; their sum
    is the loss, as for MatryoshkaLoss. Candidates of an anchor are the positives and hard negatives
    of all rows, with `gather_across_devices` those of all processes.

    Under DistributedDataParallel columns that differ in length alone share one forward pass. The
    third dimension, vocabulary rank, needs the models of mlembed.
    """

    weights_EM: Tensor

    def __init__(
        self,
        model: SentenceTransformer,
        matryoshka_dims: Sequence[int],
        exits: Sequence[int] | None = None,
        *,
        matryoshka_weights: Sequence[float] | None = None,
        exit_weights: Sequence[float] | None = None,
        scale: float = 20.0,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        gather_across_devices: bool = False,
        impl: str = "auto",
    ) -> None:
        """Check the arguments against the model.

        Args:
            model: begins with a Transformer if there are exits. The trainer wraps it later.
            matryoshka_dims: prefix widths, in any order.
            exits: numbers of layers, in any order; the largest is the model's depth. None: the
                model's output alone.
            matryoshka_weights, exit_weights: weight of each width and of each exit, by default 1.
            scale: 1 / temperature.
            directions, partition_mode: those of MultipleNegativesRankingLoss, and of `infonce`.
            gather_across_devices: candidates come from all processes, with gradient. Directions
                other than query_to_doc then compute the loss of all rows in every process.
            impl: of `infonce`: "triton", "reference", or "auto".

        Raises:
            ValueError: an argument that does not fit the model.
        """
        super().__init__()
        self.model = model
        self.matryoshka_dims, wide = _weighted(
            "matryoshka_dims", matryoshka_dims, matryoshka_weights
        )
        self.width = model.get_embedding_dimension()
        if not 1 <= self.matryoshka_dims[0] <= self.matryoshka_dims[-1] <= (self.width or math.inf):
            raise ValueError(
                f"matryoshka_dims: expected widths in 1..{self.width}, got {list(matryoshka_dims)}"
            )
        self.exits, self._nested = None, None
        deep: tuple[float, ...] = (1.0,)
        if exits is not None:
            self.exits, deep = _weighted("exits", exits, exit_weights)
            self._nested = _NestedModel(model, self.exits)
        weights_EM = torch.tensor([[e * m for m in wide] for e in deep])
        self.register_buffer("weights_EM", weights_EM, persistent=False)
        self.scale, self.impl = scale, impl
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.gather_across_devices = gather_across_devices

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted loss of each exit and prefix, whose sum is the loss.

        Raises:
            ValueError: less than two columns, or a model in DataParallel.
        """
        columns = self._columns(sentence_features)
        with self._joined():
            vectors = self._embed(columns)
        return self._named(self._table(vectors))

    def _columns(self, sentence_features: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return features by column, without lengths of prompts if the pooling ignores them."""
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(f"columns: expected an anchor and a positive, got {len(columns)}")
        if any(isinstance(module, nn.DataParallel) for module in _wrappers(self.model)):
            raise ValueError("model: expected one GPU a process (torchrun), got DataParallel")
        if all(getattr(module, "include_prompt", True) for module in self.model.modules()):
            return [{k: v for k, v in x.items() if k != "prompt_length"} for x in columns]
        return columns

    def _embed(self, columns: list[dict[str, Any]]) -> list[Tensor]:
        """Return vectors [N, E D] of each column.

        DistributedDataParallel prepares its reducer for one forward pass. Otherwise anchors, which
        may be shorter, have a pass of their own without the padding of documents.
        """
        wrappers = _wrappers(self.model)
        one_pass = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in wrappers)
        return embed_columns(self.model, columns, separate_first=not one_pass)

    def _joined(self) -> Any:
        return nullcontext() if self._nested is None else self._nested.joined()

    def _table(self, vectors: list[Tensor]) -> Tensor:
        """Return the weighted losses [E, M] of this process's rows. vectors: [N, E D] by column."""
        anchors, docs = vectors[0], torch.stack(vectors[1:], 1)
        N, per_row = docs.shape[:2]
        first = 0
        if self.gather_across_devices and dist.is_initialized():
            docs = _gathered(docs)
            if self.directions == ("query_to_doc",):
                first = dist.get_rank() * N
            else:
                anchors = _gathered(anchors)
        rows = torch.arange(len(docs), device=docs.device)
        joint = self.partition_mode == "joint"
        loss_EM = infonce(
            self._by_exit(anchors),
            self._by_exit(docs.flatten(0, 1)),
            dims=self.matryoshka_dims,
            temperature=1 / self.scale,
            target=rows[first : first + len(anchors)] * per_row,
            owner=rows.repeat_interleave(per_row),
            directions=self.directions,
            partition_mode=self.partition_mode,
            # MultipleNegativesRankingLoss joins both sums, each with the positive in it.
            count_positive_twice=joint and {"query_to_doc", "doc_to_query"} <= {*self.directions},
            impl=self.impl,
        )
        return loss_EM * self.weights_EM.to(loss_EM)

    def _by_exit(self, vectors: Tensor) -> Tensor:
        """[N, E D] -> [E, N, D]."""
        E = len(self.weights_EM)
        # Without a hook that the model lost, E parts of one vector would pass for exits.
        assert not self.width or vectors.shape[1] == E * self.width, "a hook did not run"
        return vectors.unflatten(1, (E, -1)).transpose(0, 1).contiguous()

    def _named(self, loss_EM: Tensor) -> dict[str, Tensor]:
        prefixes = [f"exit{exit}_" for exit in self.exits] if self.exits else [""]
        names = [f"{prefix}dim{dim}" for prefix in prefixes for dim in self.matryoshka_dims]
        return dict(zip(names, loss_EM.flatten().unbind(), strict=True))

    def get_config_dict(self) -> dict[str, Any]:
        """Return the arguments, for the model card."""
        return {
            "matryoshka_dims": self.matryoshka_dims,
            "exits": self.exits,
            "weights": self.weights_EM.tolist(),
            "scale": self.scale,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper whose objective this is, for the model card."""
        return CITATION


class CachedMatryoshka3dLoss(CachedLossMixin, Matryoshka3dLoss):
    """Matryoshka3dLoss with a gradient cache (GradCache, arXiv 2101.06983).

    Only one mini-batch has a graph at a time, so that batches of any size fit. Loss and gradients
    are those of the whole batch, for one more forward pass.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        matryoshka_dims: Sequence[int],
        exits: Sequence[int] | None = None,
        *,
        mini_batch_size: int = 32,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        """Check the arguments against the model.

        Args:
            model, matryoshka_dims, exits, options: those of Matryoshka3dLoss.
            mini_batch_size: texts of a column that are embedded at a time.
            show_progress_bar: show bars over mini-batches.

        Raises:
            ValueError: an argument that does not fit the model, or static embeddings, which cannot
                be embedded in mini-batches.
        """
        super().__init__(model, matryoshka_dims, exits, **options)
        if has_static_embedding_input(model):
            raise ValueError("model: expected a Transformer for mini-batches, got StaticEmbedding")
        self.mini_batch_size, self.show_progress_bar = mini_batch_size, show_progress_bar

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted loss of each exit and prefix; the backward embeds the texts again.

        Raises:
            ValueError: less than two columns, or a model in DataParallel.
        """
        loss = self.forward_cached(self._columns(sentence_features), labels)
        # The cached loss is one number without a table: its first entry takes all of its gradient.
        first = nn.functional.one_hot(torch.tensor(0), self._losses.numel())
        carried = first.view_as(self._losses).to(self._losses) * (loss - loss.detach())
        return self._named(self._losses + carried)

    def embed_minibatch(self, *args: Any, **kwargs: Any) -> Any:
        """Return vectors [n, E D] of a mini-batch, and the state of its random numbers."""
        with self._joined():
            return super().embed_minibatch(*args, **kwargs)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the batch, after its backward pass if asked for.

        reps: vectors [n, E D] of each column's mini-batches.
        """
        loss_EM = self._table([torch.cat(column) for column in reps])
        self._losses = loss_EM.detach()
        loss = loss_EM.sum()
        if with_backward:
            loss.backward()
            return loss.detach()
        return loss


class _NestedModel:
    """A SentenceTransformer whose embeddings are those of several exits, inside of `joined`.

    Exits pass through the modules after the Transformer, pooling and others, like the output.
    """

    def __init__(self, model: SentenceTransformer, depths: tuple[int, ...]) -> None:
        if not isinstance(model[0], Transformer):
            first = type(model[0]).__name__
            raise ValueError(f"exits: expected a model that begins with a Transformer, got {first}")
        *inner, last = depths
        trunk: Any = model[0].auto_model
        depth = trunk.config.get_text_config().num_hidden_layers
        if last != depth:
            raise ValueError(f"exits: expected the last to be the depth, {depth}, got {last}")
        self.exits = Exits(trunk, inner)
        self.after = [*model][1:]
        self.features: dict[str, Any] = {}
        self.vectors: list[Tensor] | None = None
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Make each forward pass inside the block return sentence_embedding [N, E D]."""
        try:
            with self.exits.pooled(self._pool) as self.vectors:
                yield
        finally:
            self.features, self.vectors = {}, None

    def _begin(self, model: nn.Module, args: tuple[dict[str, Any], ...]) -> None:
        if self.vectors is not None:
            self.features = args[0]

    def _pool(self, states: Tensor) -> Tensor:
        features = {**self.features, "token_embeddings": states}
        for module in self.after:
            features = module(features)
        return features["sentence_embedding"]

    def _end(self, model: nn.Module, args: Any, output: dict[str, Any]) -> None:
        if self.vectors is None:
            return
        output["sentence_embedding"] = torch.cat([*self.vectors, output["sentence_embedding"]], 1)
        self.vectors.clear()


def _weighted(
    name: str, sizes: Sequence[int], weights: Sequence[float] | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return sizes in rising order, and their weights."""
    given = [1.0] * len(sizes) if weights is None else list(weights)
    if not sizes or len({*sizes}) < len(sizes) or len(given) != len(sizes):
        raise ValueError(
            f"{name}: expected different numbers, and a weight for each or no weights, "
            f"got {list(sizes)} and {weights}"
        )
    pairs = sorted(zip(sizes, given, strict=True))
    return tuple(int(size) for size, _ in pairs), tuple(float(weight) for _, weight in pairs)


def _wrappers(model: Any) -> list[nn.Module]:
    """Return what the trainer calls, then what DDP and torch.compile wrap, the model last."""
    chain = [model]
    while inner := getattr(chain[-1], "_orig_mod", None) or getattr(chain[-1], "module", None):
        chain.append(inner)
    return chain


def _gathered(x: Tensor) -> Tensor:
    """Return the rows [N, ..] of all processes, which have equally many, with gradient."""
    parts = gather(x.flatten(1)[None], [len(x)] * dist.get_world_size())
    return torch.cat(parts, 1)[0].unflatten(1, x.shape[1:])
