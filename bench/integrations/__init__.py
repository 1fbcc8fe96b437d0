"""Our loss inside SentenceTransformerTrainer, next to the losses of sentence-transformers."""
