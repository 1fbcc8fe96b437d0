"""Training with sentence-transformers: its own losses, our batches, our teacher's vectors.

The competitor gets what helps it: the texts of our run batch by batch, vectors of the source that
mlembed's packed teacher encodes, bf16 autocast where our run has it, frozen token embeddings, whose
update would take most of its time and which its rank corners replace by an SVD, losses at the exits
that are scored, and as many seconds as our run of that seed took. Its loop is plain torch, because
the trainer would add to each step.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss, MSELoss
from torch import Tensor

from mlembed import config
from mlembed.data.batches import Batches
from mlembed.publishing.probes import quiet
from mlembed.runtime import files
from mlembed.runtime.distributed import World
from mlembed.runtime.workers import device_of
from mlembed.training.objective.teacher import Teacher
from mlembed.training.objective.teaching import teachers
from mlembed.training.setup import bf16, load_tokenizer, read_text

from .scoring import quarters, widths
from .settings import Proof

# The better of 5e-5 and 1e-4 after a minute of one thread, on texts that the score contains. Longer
# runs and lower rates were not compared.
RATE = 5e-5
WARMUP = 0.05  # Share of the time in which the rate rises; then it falls in a line to 0.
CLIP = 1.0
ABOUT = (
    "Matryoshka2dLoss around MSELoss: every scored exit and width in each step, exits with equal "
    f"weights, without KL term and dropout; AdamW of rate {RATE:g}, frozen token embeddings"
)


def train(proof: Proof, seed: int) -> dict[str, Any]:
    """Train for the seconds that our run of this seed took; return time, steps and tokens.

    Raises:
        ValueError: what `read_text` and `Teacher.load` raise.
    """
    seconds = proof.read(f"ours-{seed}")["training"]["seconds"]
    run = run_of(proof, seed)
    device = device_of(run.device)
    torch.manual_seed(seed)
    random.seed(seed)
    texts, teacher = batches(run, World(0, 1, device))
    with quiet(), files.atomic_directory(proof.trained(f"peer-{seed}")) as partial:
        student = open_student(proof.model, device, run.max_length)
        result = optimise(student, texts, teacher, seconds, bf16(run, device))
        student.save(str(partial), create_model_card=False)
    return {"training": result | {"command": ABOUT}}


def run_of(proof: Proof, seed: int) -> config.Run:
    """Return our saved run of a seed, with a teacher, so that batches have their texts."""
    run = config.load(proof.runs / f"ours-{seed}" / "config.json")
    return replace(run, distill=config.Distill(teacher=proof.model, features=1.0))


def batches(run: config.Run, where: World) -> tuple[Iterator[tuple[str, ...]], Teacher]:
    """Yield the texts of our run's micro-batches, again from the first after the last."""
    text = read_text(run, lambda _: None)
    tokens = load_tokenizer(run, None, text)
    half = bf16(run, where.device)
    teacher = teachers(run, text.tables, tokens, half, False, None, where)[0]
    assert teacher is not None
    order = Batches(text.tables, tokens, run, where, held_out=text.held_out)

    def texts() -> Iterator[tuple[str, ...]]:
        while True:
            for number in range(run.steps * run.gradient_accumulation_steps):
                yield order[number].texts or ()

    return texts(), teacher


def open_student(model: str, device: torch.device, length: int) -> SentenceTransformer:
    """Open a model to train at `length` tokens, without dropout and with frozen token embeddings.

    Dropout would blur what is distilled.
    """
    student = SentenceTransformer(model, device=str(device), local_files_only=True)
    student.max_seq_length = length
    trunk: Any = student[0].auto_model
    trunk.get_input_embeddings().requires_grad_(False)
    return student.eval()


def loss_of(student: SentenceTransformer, layers: int, width: int) -> Matryoshka2dLoss:
    """Return the loss of every scored exit and width, the last exit included.

    Other layers weigh 0. The library averages over all layers, so the weight is their number.
    """
    exits = quarters(layers)
    return Matryoshka2dLoss(
        student,
        MSELoss(student),
        widths(width),
        n_layers_per_step=-1,
        n_dims_per_step=-1,
        prior_layers_weight=layers,
        kl_temperature=0.0,
        layer_weighting=lambda layer: float(layer in exits),
    )


def optimise(
    student: SentenceTransformer,
    texts: Iterator[tuple[str, ...]],
    teacher: Teacher,
    seconds: float,
    half: bool,
) -> dict[str, Any]:
    """Train until the seconds are over, at least one step."""
    trunk: Any = student[0].auto_model
    layers, width = trunk.config.num_hidden_layers, trunk.config.hidden_size
    loss_of_batch = loss_of(student, layers, width)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    device = student.device
    steps, tokens, began = 0, 0, time.perf_counter()
    while (share := (time.perf_counter() - began) / seconds) < 1 or not steps:
        some = next(texts)
        labels = teacher.encode(some)
        features = student.preprocess(list(some))
        features = {
            name: x.to(device) if isinstance(x, Tensor) else x for name, x in features.items()
        }
        tokens += int(features["attention_mask"].sum())
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(share / WARMUP, (1 - share) / (1 - WARMUP), 1.0)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = loss_of_batch([features], labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        steps += 1
    took = time.perf_counter() - began
    return {"seconds": round(took, 1), "steps": steps, "tokens": tokens}
