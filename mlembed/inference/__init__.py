"""Texts to vectors, and searches among them."""
