"""Random weights for tests of models."""

import torch


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of a trained model's size: at the initial 0.02, attention is uniform and every layer
    nearly the identity, and norms of weight 1 hide which norm is used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise if "embed_tokens" in name else noise * weight.shape[1] ** -0.5)
    return model.eval()
