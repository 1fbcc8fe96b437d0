"""Compare one model at several sizes by the similarity of translations and of unrelated texts.

python examples/encode_sizes.py [MODEL]
"""

import sys

from mlembed import Encoder

TEXTS = ["Wednesday, May 4, 2050", "mercredi 4 mai 2050", "in 3 hours"]


def main(source: str = "runs/tiny") -> None:
    encoder = Encoder.from_pretrained(source)
    shape = encoder.model.cfg
    print("exit  width  translation  unrelated")
    for exit in shape.exits:
        for dim in shape.matryoshka_dims:
            vectors = encoder.encode(TEXTS, dim=dim, exit=exit)
            translation, unrelated = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
            print(f"{exit:4}  {dim:5}  {translation:11.3f}  {unrelated:9.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
