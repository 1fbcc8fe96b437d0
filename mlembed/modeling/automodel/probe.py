"""Compare a trunk of style transformers with transformers' own forward, when it is loaded.

The trunk knows of an architecture only what it finds: the layers, the norm after them, the masks.
An architecture that does more has other vectors, which the comparison shows.
"""

import torch

from ...data.packing import pack
from ..transformer import mode
from .architecture import OtherVectorsError, build
from .trunk import AutoTransformer

LENGTHS = 11, 3  # Tokens of the probe's texts.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # Relative; of narrower dtypes:
NARROW = 0.1


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
    with mode(model, training=False):
        got_TD, tables = model.embed(batch, None)
        for layer in model.layers:
            got_TD = model.block(layer, got_TD, tables, batch.plan)
        got_TD = model._normed(got_TD)
        for text, begin in zip(ids, batch.cu_seqlens.tolist(), strict=False):
            x_TD = model.embed_tokens(text, None)
            want_TD = host(inputs_embeds=(x_TD * model.scale)[None]).last_hidden_state[0]
            difference = (got_TD[begin : begin + len(text)] - want_TD).abs().max().item()
            size = want_TD.abs().max().item()
            if not difference <= TOLERANCE.get(model.dtype, NARROW) * size:
                raise OtherVectorsError(
                    f"{place}: expected the vectors of transformers' {model.kind}, got others, up "
                    f"to {difference:.2g} apart: style transformers does not support it"
                )
