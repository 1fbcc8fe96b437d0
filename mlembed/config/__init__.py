"""Configuration of a run, and recipes, which are complete configurations. Imports no torch."""

from .columns import Columns
from .model import ML_EMBED_EXITS, Model
from .objective import TASKS, TUNING_LR, Depth, Distill, Lora, Loss, Optim
from .run import Run, Source, load

__all__ = [
    "Columns",
    "ML_EMBED_EXITS",
    "TASKS",
    "TUNING_LR",
    "Depth",
    "Distill",
    "Lora",
    "Loss",
    "Model",
    "Optim",
    "Run",
    "Source",
    "load",
]
