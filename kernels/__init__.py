"""The operations that make 3D Matryoshka training expensive; they know nothing of mlembed.

Each file holds one operation: its mathematics, its plain PyTorch reference `x_ref` (the
specification that every faster implementation is held to) and the public function `x`. Files that
begin with _ are what they share, and the Triton behind them, imported only when asked for.
"""

from mlembed_kernels.attention.attention import attention, attention_ref
from mlembed_kernels.attention.plan import AttentionPlan
from mlembed_kernels.embedding.embed import embed, embed_ref
from mlembed_kernels.embedding.token_index import TokenIndex
from mlembed_kernels.similarity.cosine import cosine, cosine_ref
from mlembed_kernels.similarity.distill import distill, distill_ref
from mlembed_kernels.similarity.infonce import infonce, infonce_ref
from mlembed_kernels.similarity.pairwise_lse import pairwise_lse, pairwise_lse_ref

__version__ = "0.1.0"
__all__ = [
    "TokenIndex",
    "AttentionPlan",
    "attention",
    "attention_ref",
    "cosine",
    "cosine_ref",
    "distill",
    "distill_ref",
    "embed",
    "embed_ref",
    "infonce",
    "infonce_ref",
    "pairwise_lse",
    "pairwise_lse_ref",
]
