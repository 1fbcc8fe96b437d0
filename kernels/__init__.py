"""The operations that make 3D Matryoshka training expensive; they know nothing of mlembed.

Each public module holds one operation: its mathematics, its plain PyTorch reference `x_ref` (the
specification that faster implementations are compared with) and the public function `x`. Modules
that begin with _ hold shared code and the Triton kernels, which are imported at their first use.
"""

from ._version import __version__
from .attention.attention import attention, attention_ref
from .attention.plan import AttentionPlan
from .embedding.embed import embed, embed_ref
from .embedding.token_index import TokenIndex
from .optimiser.adamw import stochastic_adamw, stochastic_adamw_ref
from .similarity.cosine import cosine, cosine_ref
from .similarity.distill import distill, distill_ref
from .similarity.infonce import infonce, infonce_ref
from .similarity.pairwise_lse import pairwise_lse, pairwise_lse_ref

__all__ = [
    "AttentionPlan", "TokenIndex", "__version__", "attention", "attention_ref", "cosine",
    "cosine_ref", "distill", "distill_ref", "embed", "embed_ref", "infonce", "infonce_ref",
    "pairwise_lse", "pairwise_lse_ref", "stochastic_adamw", "stochastic_adamw_ref",
]  # fmt: skip
