"""The trunk of style transformers: the layers of an AutoModel over packed text.

    arguments = what transformers' own forward passes to each layer, recorded without running one
    for each layer:  x = layer(x, arguments of the texts that are left)
    exit l of a text:  dense(pool(norm(x after layer l)))

The model's own forward runs on packed embeddings with a recorder in place of each layer. So what
surrounds the layers (norms and positions at the start, rotary positions, kinds of masks) is
transformers' own, of any architecture. Attention is ours, by transformers' registry.

Letters: N texts, T packed tokens, D width.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mlembed_kernels import AttentionPlan

from ... import config
from ...data.packing import PackedBatch, SkipLayer
from ..attention_interface import Forward
from ..blocks import Layer, wide
from ..transformer import Transformer
from .architecture import NAME, Places, build

# Prefixes of a checkpoint's task heads, pooler and old buffers, which the trunk lacks.
UNUSED = "cls.", "lm_head.", "classifier.", "qa_outputs.", "pooler.", "head.", "decoder."
Call = tuple[tuple[Any, ...], dict[str, Any]]  # Arguments and keywords of a layer's call.
Tables = tuple[Tensor, tuple[Call, ...]]  # Positions [T], and each layer's call.


class Recorder(nn.Module):
    """A stand-in for a layer, which keeps the arguments of its call and returns its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Models choose a layer's mask by this attribute.
        self.attention_type = getattr(layer, "attention_type", None)
        self.call: tuple[Tensor, Call] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        self.call = hidden_states, (args, options)
        return hidden_states

    def take(self) -> tuple[Tensor, Call]:
        """Return the input [1, T, D] and the arguments of the last call, and forget them."""
        assert self.call is not None
        call, self.call = self.call, None
        return call


class AutoLayer(Layer):
    """A layer of transformers, `block`, and its place among the layers, from 0 on."""

    def __init__(self, cfg: config.Model, block: nn.Module, place: int) -> None:
        super().__init__(cfg)
        self.block, self.place = block, place


class AutoTransformer(Transformer):
    """Model from packed text to one raw (not normalised) vector per text and exit."""

    def build(self, cfg: config.Model) -> None:
        """Build the modules after the vocabulary, on the default device.

        Raises:
            ValueError: an architecture that style transformers does not support.
        """
        host = build(cfg)
        self.places = places = Places.of(host, cfg.num_hidden_layers)
        self.prefix = f"{host.base_model_prefix}."
        self.kind = type(host).__name__
        table = host.get_input_embeddings()
        self.scale = float(getattr(table, "embed_scale", 1.0))
        host.set_input_embeddings(nn.Identity())
        layers = host.get_submodule(places.layers)
        self.layers = nn.ModuleList(AutoLayer(cfg, x, place) for place, x in enumerate(layers))
        _replace(host, places.layers, nn.ModuleList(map(Recorder, layers)))
        norm = nn.Identity()
        self.norm: Any = norm if places.norm is None else _replace(host, places.norm, norm)
        host.pooler = None
        _check_positions(host, cfg)
        self.host = host
        widths = (cfg.hidden_size, *cfg.dense)
        self.dense = nn.ModuleList(
            nn.Linear(before, after, bias=False)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        if (device := torch.get_default_device()).type != "meta":
            for module in self.modules():
                for name, weight in module._parameters.items():
                    if weight is not None and weight.is_meta:
                        module._parameters[name] = nn.Parameter(
                            torch.empty_like(weight, device=device)
                        )

    def compile_blocks(self, backend: str = "inductor", lean: bool = False) -> None:
        """Compile each layer, in parts before and after attention. `lean` changes nothing."""
        layers: Any = self.layers
        for layer in layers:
            layer.block.compile(dynamic=True, backend=backend)

    # ---- forward ----

    def embed(self, batch: PackedBatch, rank: int | None) -> tuple[Tensor, Any]:
        """Return the residual stream [T, D] before the first layer, and the layers' arguments."""
        self._check_lengths(batch)
        x_TD = self.embed_tokens(batch.ids_T, rank, batch.token_index)
        if self.scale != 1.0:
            x_TD = x_TD * self.scale
        return self._record(x_TD, batch.pos_T)

    def rotation(self, pos_T: Tensor) -> Any:
        """Return the layers' arguments for tokens at these positions."""
        x_TD = torch.zeros(len(pos_T), self.cfg.hidden_size, device=pos_T.device, dtype=self.dtype)
        return self._record(x_TD, pos_T)[1]

    def _record(self, x_TD: Tensor, pos_T: Tensor) -> tuple[Tensor, Tables]:
        """Run all of the model but its layers."""
        self.host(
            inputs_embeds=x_TD[None],
            attention_mask=torch.ones(1, len(pos_T), dtype=torch.bool, device=pos_T.device),
            position_ids=pos_T[None] + self.cfg.position_offset,
            use_cache=False,
        )
        calls = [recorder.take() for recorder in self.host.get_submodule(self.places.layers)]
        for _, call in calls:
            if not any(hasattr(x, "mlembed") for x in tree_leaves(call)):
                raise ValueError(f"{NAME}: expected layers with a mask, got {self.kind}")
        return calls[0][0][0], (pos_T, tuple(call for _, call in calls))

    def block(
        self,
        layer: nn.Module,
        x_TD: Tensor,
        tables: Any,
        plan: AttentionPlan,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        """Run a layer on the first plan.tokens rows of a pack, with the arguments of `embed`.

        rows_N: None; transformers' layers compute all rows.
        """
        assert rows_N is None
        return self._run(layer, x_TD, tables, slice(len(x_TD)), plan)

    def _skip(self, layer: nn.Module, x_TD: Tensor, tables: Any, skip: SkipLayer) -> Tensor:
        """Run a layer on the gathered rows of the texts that do not skip it."""
        rows_T = skip.rows_T
        out_tD = self._run(layer, x_TD[rows_T], tables, rows_T, skip.plan)
        return x_TD.index_copy(0, rows_T, out_tD.to(x_TD.dtype))

    def _run(
        self, layer: Any, x_TD: Tensor, tables: Tables, rows: slice | Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Run a layer on x_TD, which are `rows` of a pack; `plan` is of the texts of these rows."""
        pos_T, calls = tables

        def of_rows(x: Any) -> Any:
            """Return a layer's argument, for `rows` if it has one entry a token."""
            if (shared := getattr(x, "mlembed", None)) is not None:
                mask = torch.ones(1, 0, dtype=torch.bool, device=x.device)
                layout, impl = (None, plan), self.cfg.attention
                if shared.causal != self.cfg.causal:
                    got = f"{self.cfg.causal}, unlike the layers of {self.kind}"
                    raise ValueError(f"model.causal: expected {shared.causal}, got {got}")
                mask.mlembed = Forward(shared.causal, shared.window, layout, impl)  # type: ignore[attr-defined]
                return mask
            if not isinstance(x, Tensor) or not x.ndim:
                return x
            if x.ndim > 1 and x.shape[:2] == (1, len(pos_T)):
                return x[:, rows]
            return x[rows] if x.ndim == 1 and len(x) == len(pos_T) else x

        args, options = tree_map(of_rows, calls[layer.place])
        out = layer.block(x_TD[None], *args, **options)
        out = out[0] if isinstance(out, tuple) else out
        # FSDP2 warns of layers that return a view; nothing changes these rows in place.
        return torch.ops.aten._unsafe_view(out, x_TD.shape)

    @property
    def _ends_early(self) -> bool:
        """Return False: transformers' layers compute all rows."""
        return False

    def _pooled(self, rows_nD: Tensor) -> Tensor:
        return self.project(self._normed(rows_nD))

    def _exit(self, x_TD: Tensor, plan: AttentionPlan, staying: int) -> tuple[Tensor, Tensor]:
        x_TD, pooled = super()._exit(x_TD, plan, staying)
        # `_pooled` has projected single tokens.
        return x_TD, self.project(pooled) if self.cfg.pooling == "mean" else pooled

    def project(self, pooled_ND: Tensor) -> Tensor:
        """Return the linear layers' vectors [N, D] of pooled vectors, in fp32 at least."""
        with torch.autocast(pooled_ND.device.type, enabled=False):
            for weight in self.dense.parameters():
                pooled_ND = F.linear(pooled_ND, weight.to(wide(weight.dtype)))
        return pooled_ND

    def _normed(self, x_TD: Tensor) -> Tensor:
        """Return rows after the final norm, if there is one, in fp32 at least."""
        normed_TD = self.norm(x_TD)
        return normed_TD.to(wide(normed_TD.dtype))

    def _check_lengths(self, batch: PackedBatch) -> None:
        most, got = self.cfg.max_position_embeddings, batch.plan.max_seqlen
        if got > most:
            raise ValueError(f"texts: expected at most {most} tokens (positions), got {got}")

    # ---- names of weights ----

    def hf_name(self, name: str) -> str:
        """Return transformers' name for a weight of ours."""
        part, _, rest = name.partition(".")
        if part == "layers":
            number, _, rest = rest.partition(".block.")
            return f"{self.places.layers}.{number}.{rest}"
        homes = {"embed_tokens": self.places.table, "norm": self.places.norm}
        return rest if part == "host" else f"{homes[part]}.{rest}"

    def own_names(self, theirs: Iterable[str]) -> dict[str, str]:
        """Return our name for each weight of a checkpoint, without task heads and buffers.

        Unknown weights keep their names.
        """
        names = set(theirs)
        # A model with a head keeps the encoder under a prefix.
        names = {name for name in names if name.startswith(self.prefix)} or names
        ours = {self.hf_name(n): n for n in self.state_dict() if not n.startswith("dense.")}
        if self.cfg.ranks:
            ours[f"{self.places.table}.weight"] = "embed_tokens.weight"
        found = {}
        for name in names:
            plain = name.removeprefix(self.prefix)
            if plain in ours or not plain.startswith(UNUSED):
                found[name] = ours.get(plain, plain)
        return {
            n: ours for n, ours in found.items() if not n.endswith(("position_ids", "inv_freq"))
        }


def _replace(host: nn.Module, place: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of another one, which is returned."""
    parent, _, name = place.rpartition(".")
    before = host.get_submodule(place)
    setattr(host.get_submodule(parent), name, module)
    return before


def _check_positions(host: nn.Module, cfg: config.Model) -> None:
    """Raise ValueError if a table of positions begins at another row than the shape says."""
    for name, module in host.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            pad = module.padding_idx
            if (wanted := 0 if pad is None else 1 + pad) != cfg.position_offset:
                raise ValueError(
                    f"model.position_offset: expected {wanted}, as {name} has it, got "
                    f"{cfg.position_offset}"
                )
