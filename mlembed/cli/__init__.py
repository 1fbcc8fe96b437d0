"""Commands: arguments, then one call. Their files import torch only when they run."""
