"""Attention over packed sequences beside FlashAttention, xformers and flex attention."""
