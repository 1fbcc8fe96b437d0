"""Readers of files, and the layouts of their rows."""
