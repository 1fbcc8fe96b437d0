"""Search in two stages: shortlist with small vectors, rank the shortlist with full ones.

python examples/search.py QUERY [MODEL] < documents.txt

The index holds the small vectors only: 48 numbers from two layers for each document. The documents
of the shortlist are encoded again at full size.
"""

import sys

import numpy as np

from mlembed import Encoder

DIM, EXIT, SHORTLIST, SHOWN = 48, 2, 100, 5


def main(query: str, source: str = "runs/tiny") -> None:
    encoder = Encoder.from_pretrained(source)
    documents = [line.strip() for line in sys.stdin if line.strip()]

    index = encoder.encode_document(documents, dim=DIM, exit=EXIT)  # [N, 48]
    small = encoder.encode_query([query], dim=DIM, exit=EXIT)[0]
    shortlist = np.argsort(-(index @ small), kind="stable")[:SHORTLIST]

    candidates = encoder.encode_document([documents[i] for i in shortlist])  # [S, D]
    scores = candidates @ encoder.encode_query([query])[0]
    for place in np.argsort(-scores, kind="stable")[:SHOWN]:
        print(f"{scores[place]:.3f}  {documents[shortlist[place]]}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
