"""Compare a trunk of style transformers with transformers' own forward, when it is loaded.

The trunk knows of an architecture only what it finds: the layers, the norm after them, the masks.
An architecture that does more has other vectors, which the comparison shows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ...data.packing import PackedBatch, pack
from ..transformer import mode
from .architecture import OtherVectorsError, build
from .trunk import AutoTransformer

LENGTHS = 11, 3  # Tokens of the probe's texts.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # Relative; of narrower dtypes:
NARROW = 0.1


def packed(model: AutoTransformer, batch: PackedBatch) -> Tensor:
    """Return the normed output [T, D] of the last layer.

    The weights are in host memory still, where the configured attention may not run.
    """
    cfg = model.cfg
    model.cfg = replace(cfg, attention="auto")
    try:
        with mode(model, training=False):
            x_TD, tables = model.embed(batch, None)
            for layer in model.layers:
                x_TD = model.block(layer, x_TD, tables, batch.plan)
            return model._normed(x_TD)
    finally:
        model.cfg = cfg


@torch.no_grad()
def check(model: AutoTransformer, place: str) -> None:
    """Compare the last layer's normed output of two packed texts, each with the text alone.

    Raises:
        OtherVectorsError: it begins with `place`.
    """
    vocabulary = model.cfg.vocab_size
    lengths = [min(n, model.cfg.max_position_embeddings) for n in LENGTHS]
    ids = [torch.arange(n) * 7919 % vocabulary for n in lengths]
    batch = pack([x.numpy() for x in ids])
    host = build(model.cfg, "eager")
    host.pooler = None
    weights = model.state_dict().items()
    named = {model.hf_name(n): x for n, x in weights if not n.startswith(("embed_tokens", "dense"))}
    host.load_state_dict(named, strict=False, assign=True)
    host = host.eval()
    for text, got_TD in zip(ids, packed(model, batch).split(lengths), strict=True):
        x_TD = model.embed_tokens(text, None) * model.scale
        want_TD = host(inputs_embeds=x_TD[None]).last_hidden_state[0]
        difference, size = (x.abs().max().item() for x in (got_TD - want_TD, want_TD))
        if not difference <= TOLERANCE.get(model.dtype, NARROW) * size:
            raise OtherVectorsError(
                f"{place}: expected the vectors of transformers' {model.kind}, got others, up to "
                f"{difference:.2g} apart: style transformers does not support it"
            )
