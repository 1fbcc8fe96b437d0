"""Read exported directories by the sentence-transformers and transformers of this Python.

    python read.py TEXTS.json OUT.npz DIRECTORY ...

OUT.npz has, of directory i, `st_i` and `query_i`, vectors of sentence-transformers without and with
the prompt "query", and `tf_i`, transformers' states of every text in a row, without padding. The
versions are printed as JSON. The script does not use mlembed.
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
    arrays = {}
    for i, directory in enumerate(directories):
        model = sentence_transformers.SentenceTransformer(directory, device="cpu")
        options = {"batch_size": 3, "show_progress_bar": False}
        arrays[f"st_{i}"] = model.encode(texts, **options)
        arrays[f"query_{i}"] = model.encode_query(texts, **options)
        encoder = transformers.AutoModel.from_pretrained(directory).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(directory)(
            texts, padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = encoder(**tokens).last_hidden_state
        arrays[f"tf_{i}"] = hidden[tokens["attention_mask"].bool()].numpy()
    np.savez(out, **arrays)
    packages = sentence_transformers, transformers, torch
    print(json.dumps({package.__name__: package.__version__ for package in packages}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
