"""Losses over pairwise similarities: InfoNCE, log-sum-exp, cosine and distillation."""
