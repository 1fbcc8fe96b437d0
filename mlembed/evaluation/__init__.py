"""Scores of a model at every size, and the report of them."""
