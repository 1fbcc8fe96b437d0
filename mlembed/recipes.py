"""Named runs, each a complete configuration: `python train.py NAME`."""

from collections.abc import Callable

from .config import Loss, Model, Optim, Run


def tiny() -> Run:
    """3D Matryoshka on CLDR text in two minutes of two CPU cores. All numbers are ours."""
    return Run(
        name="tiny",
        steps=300,
        model=Model(
            vocab_size=4096,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            intermediate_size=512,
            exits=(1, 2, 4),
            matryoshka_dims=(12, 24, 48, 96, 192),
            ranks=(32, 64, 128),
            max_position_embeddings=512,
        ),
    )


def qwen3() -> Run:
    """3D Matryoshka from a Qwen3 checkpoint: `--init DIR`, and `--data` of your own.

    Exits, prefixes, prefix weights, temperature, betas, weight decay, clipping, the learning rate
    1e-5 -> 1e-7 and the stored rank 512 are those of ML-Embed's released code (arXiv 2605.15081);
    batch, length and steps are ours, and so is one softmax over all candidates.
    """
    return Run(
        name="qwen3",
        init="Qwen/Qwen3-0.6B-Base",
        model=Model(hidden_size=1024, ranks=(64, 128, 256, 512), max_position_embeddings=4096),
        loss=Loss(directions="query_to_doc", matryoshka_weights="ml-embed", num_negatives=7),
        optim=Optim(lr=1e-5, min_lr_ratio=0.01),
        steps=10_000,
        max_length=512,
        activation_checkpointing="selective",
    )


RECIPES: dict[str, Callable[[], Run]] = {"tiny": tiny, "qwen3": qwen3}
