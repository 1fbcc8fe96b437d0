"""Train a module of your own with the nested contrastive loss. It needs mlembed_kernels only.

python examples/own_model.py [STEPS]

A toy: two noisy views of the same random vector are a pair. Every prefix of the output learns to
match them, and the table at the end shows how well each one does.
"""

import sys

import torch
from torch import nn

from mlembed_kernels import infonce

DIMS = (2, 4, 8, 16, 32)
PAIRS = 256


def views(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two noisy copies of the same vectors, each [N, 64]."""
    x = torch.randn(PAIRS, 64, generator=generator)
    first, second = (x + 0.5 * torch.randn(x.shape, generator=generator) for _ in range(2))
    return first, second


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, DIMS[-1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        q, c = (model(view)[None] for view in views(generator))  # [1, N, D]: a single exit
        loss_EM = infonce(q, c, dims=DIMS, temperature=0.05)
        loss_EM.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        q, c = (model(view) for view in views(generator))
    for dim in DIMS:
        cosines = nn.functional.normalize(q[:, :dim]) @ nn.functional.normalize(c[:, :dim]).T
        found = (cosines.argmax(1) == torch.arange(PAIRS)).float().mean()
        print(f"width {dim:2}: {found:.1%} of {PAIRS} pairs found")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
