"""Lookup in a low-rank nested vocabulary."""
