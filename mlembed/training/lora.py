"""Adapters by peft (LoRA, arXiv 2106.09685): small matrices that are trained next to frozen ones.

    W x  becomes  W x + alpha / rank B A x      A [rank, in] random, B [out, rank] zero at first

All weights of `init` are frozen but U and W of a nested vocabulary, which `init` does not have in
this form. Weights keep the names that peft gives them: q_proj.base_layer.weight,
q_proj.lora_A.default.weight. Scores, model/ and readers of checkpoints take the merged matrices,
W + alpha / rank B A (`pretrained.merged`); adapter/ has A and B alone, in peft's format.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import config
from ..config import strict
from ..modeling import pretrained
from ..modeling.transformer import Transformer
from ..runtime.files import SHARDS


def attach(model: Transformer, cfg: config.Lora, seed: int) -> None:
    """Freeze the model and add adapters, fp32 and equal on all processes, to its linear layers.

    Only those of attention and MLP: the others are small, and fp32. U and W of a nested vocabulary
    stay trainable.

    Raises:
        ValueError: a target that matches no linear layer; peft is not installed.
    """
    peft = require()
    named = model.layers.named_modules(prefix="layers")
    names = [name for name, module in named if type(module) is nn.Linear]
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in cfg.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(
                f"lora.targets: expected names of linear layers ({', '.join(known)}), got "
                f"{target!r}, which matches none{strict.near(target, known)}"
            )
    made = peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, target_modules=list(cfg.targets or known)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(made, model)
    for name, parameter in model.named_parameters():
        if pretrained.LORA in name:
            parameter.data = parameter.data.float()
    for module in model.modules():
        # peft would copy bf16 inputs to fp32, and autocast would cast the copies back.
        if "cast_input_dtype_enabled" in vars(module):
            vars(module)["cast_input_dtype_enabled"] = False
    if model.cfg.ranks:
        model.embed_tokens.requires_grad_(True)


def require() -> ModuleType:
    """Import peft. ValueError, with the command that installs it, if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"lora.rank: expected the package peft (pip install 'mlembed[lora]'), got {error}"
        ) from None
    return peft


def describe(model: Transformer, run: config.Run) -> Iterator[str]:
    """Yield lines of the log: what is trained next to frozen weights, and a rate that is high."""
    cfg, ranks = run.lora, model.cfg.ranks
    if cfg.rank:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        layers = sum(hasattr(module, "lora_A") for module in model.modules())
        factors = "the vocabulary's factors are trained, too" if ranks else "all else frozen"
        yield (
            f"lora   {trained / 1e6:.2f} M trained: rank {cfg.rank}, alpha {cfg.alpha}, "
            f"{layers} layers; {factors}"
        )
    tunes = run.init and run.distill.teacher != run.init and (ranks or not cfg.rank)
    if tunes and run.optim.lr > config.TUNING_LR:
        yield (
            f"rate   optim.lr {run.optim.lr:g} is high for the trained weights of {run.init}; "
            "2e-5 is usual, above 1e-4 they may be lost"
        )


# ---- files ----


def write_scale(directory: Path, cfg: config.Lora) -> None:
    """Write rank and alpha next to the weights of a checkpoint."""
    text = json.dumps({"rank": cfg.rank, "alpha": cfg.alpha}) + "\n"
    (directory / pretrained.ADAPTERS).write_text(text, encoding="utf-8")


def of_checkpoint(init: str) -> bool:
    """Return whether `init` is a training checkpoint, which transformers and peft do not open."""
    return any(Path(init).glob(SHARDS))


def parts(weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return adapters and vocabulary, which `write` writes, of all weights; {} of None."""
    return {
        name: weight
        for name, weight in (weights or {}).items()
        if pretrained.LORA in name or name.startswith("embed_tokens.")
    }


def write(
    directory: Path, model: Transformer, adapters: Mapping[str, Tensor], run: config.Run
) -> None:
    """Write the adapters in peft's format, for transformers' AutoModel of `init`.

    The table of a nested vocabulary, U W, is written in full, as peft's `modules_to_save`. The
    adapters apply to all layers of `init`: a shallower exit has no place in peft's format.

    Args:
        model: the merged model.
        adapters: what `parts` returned.
    """
    m, tensors, modules = model.cfg, {}, set()
    auto: Any = model if m.style == "transformers" else None
    hf_name = auto.hf_name if auto else partial(pretrained.hf_name, cfg=m)
    for name, weight in adapters.items():
        ours, lora, part = name.partition(pretrained.LORA)
        if lora:
            theirs = hf_name(f"{ours}.weight").removesuffix(".weight")
            modules.add(theirs)
            tensors[f"base_model.model.{theirs}.lora_{part[0]}.weight"] = weight.cpu().contiguous()
    table = []
    if m.ranks:
        U, W = (adapters[f"embed_tokens.{letter}"].float().cpu() for letter in "UW")
        name = hf_name("embed_tokens.weight")
        tensors[f"base_model.model.{name}"] = U @ W
        table = [name.removesuffix(".weight")]
    # Last names may be ambiguous: BERT's attention.output.dense also ends with output.dense.
    short = run.lora.targets or {module.rpartition(".")[2] for module in modules}
    finished = (Path(run.init) / "metrics.jsonl").is_file()
    fields = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": f"{run.init}/model" if finished else run.init,
        "r": run.lora.rank,
        "lora_alpha": run.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(short if m.style == "qwen3" else modules),
        "modules_to_save": table or None,
        "inference_mode": True,
    }
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
