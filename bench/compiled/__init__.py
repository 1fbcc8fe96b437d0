"""Launches of the kernels, collected and compiled for Hopper without a GPU."""
