"""Attention over packed sequences next to FlashAttention, xformers and flex attention."""
