"""Open an export with sentence-transformers and with transformers, and compare their vectors.

python examples/hugging_face.py [EXPORT]

transformers runs mlembed's packed attention here; sentence-transformers runs its own. They agree
up to rounding.
"""

import sys

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from mlembed.modeling import attention_interface

TEXTS = ["Wednesday, May 4, 2050", "mercredi 4 mai 2050", "in 3 hours"]


def main(export: str = "small-model") -> None:
    expected = torch.from_numpy(SentenceTransformer(export).encode(TEXTS))

    attention_interface.register()
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModel.from_pretrained(export, attn_implementation="mlembed").eval()
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state  # [N, S, D]
    # The vector of a text is the state of its last token, cut to the export's width.
    last = tokens.attention_mask.shape[1] - 1 - tokens.attention_mask.flip(1).argmax(1)
    vectors = states[torch.arange(len(TEXTS)), last, : expected.shape[1]]
    vectors = torch.nn.functional.normalize(vectors, dim=-1)

    print(f"largest difference: {(vectors - expected).abs().max():.1e}")
    print(vectors @ vectors.T)


if __name__ == "__main__":
    main(*sys.argv[1:])
