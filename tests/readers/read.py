"""Vectors of exported directories by whatever sentence-transformers and transformers this Python
has: python read.py TEXTS.json OUT.npz DIRECTORY ..; it knows nothing of mlembed.

OUT.npz: of directory i `st_i` and `query_i`, by sentence-transformers with and without the prompt
"query", and `tf_i`, the states of every text by transformers, padding left out, one after another.
On standard output the versions, as json.
"""

import json
import sys

import numpy as np
import sentence_transformers
import torch
import transformers


def main(texts_file: str, out: str, directories: list[str]) -> None:
    with open(texts_file, encoding="utf-8") as file:
        texts = json.load(file)
    found = {}
    for i, directory in enumerate(directories):
        model = sentence_transformers.SentenceTransformer(directory, device="cpu")
        options = {"batch_size": 3, "show_progress_bar": False}
        found[f"st_{i}"] = model.encode(texts, **options)
        found[f"query_{i}"] = model.encode_query(texts, **options)
        encoder = transformers.AutoModel.from_pretrained(directory).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(directory)(
            texts, padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = encoder(**tokens).last_hidden_state
        found[f"tf_{i}"] = hidden[tokens["attention_mask"].bool()].numpy()
    np.savez(out, **found)
    packages = sentence_transformers, transformers, torch
    print(json.dumps({package.__name__: package.__version__ for package in packages}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
