"""What a model costs at one depth and vocabulary rank, measured, so that scores can be read
against it."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..modeling.transformer import num_parameters
from .encoder import Encoder

SHORT = "A man is playing the guitar in front of a small crowd."
PACK = 32  # texts in the first pack; memory is of this one
MOST = 4096
LATENCY_S, PACKS_S = 0.06, 0.08  # long enough to be a median, short enough for a grid


def sizes(encoder: Encoder, dim: int, exit: int, rank: int | None) -> dict[str, int]:
    """Parameters of the model cut to that exit and rank, their bytes in the precision that they are
    in, and bytes of an fp32 vector."""
    parameters = num_parameters(encoder.model.cfg, exit, rank)
    return {
        "parameters": parameters,
        "parameter_bytes": _weights(encoder, exit, rank),
        "bytes_per_vector": 4 * dim,
    }


def measure(encoder: Encoder, exit: int, rank: int | None) -> dict[str, float]:
    """Of one depth and rank, on the encoder's device and in its precision; of every width alike.

    latency_ms: median of one short text alone, from text to vector on the CPU, tokenising included.
    texts_per_second: of as many different short texts at once as take PACKS_S, 4096 at most.
    memory_mib: weights of the model cut to that size, and the highest sum of tensors alive at one
    time while it encodes 32 short texts: on CUDA the allocator's peak, on a CPU that of torch's
    allocations as its profiler sees them. It is not the process's size: Python, libraries and the
    tokenizer come on top.
    """

    def encode(texts: list[str]) -> None:
        encoder.encode_exits(texts, [exit], rank)

    encode([SHORT])
    encode([SHORT])
    return {
        "latency_ms": 1000 * _median_seconds(lambda: encode([SHORT])),
        "texts_per_second": _texts_per_second(encode),
        "memory_mib": (_weights(encoder, exit, rank) + _peak(encoder, encode)) / 2**20,
    }


def short_texts(count: int) -> list[str]:
    """As long as SHORT, all different."""
    return [f"{SHORT[:-1]} of {number}." for number in range(count)]


def _median_seconds(run: Callable[[], None]) -> float:
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < LATENCY_S and len(taken) < 100):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _texts_per_second(encode: Callable[[list[str]], None]) -> float:
    count = PACK
    while True:
        texts = short_texts(count)
        began = time.perf_counter()
        encode(texts)
        taken = time.perf_counter() - began
        if taken >= PACKS_S or count >= MOST:
            return count / taken
        count = min(MOST, 4 * count)


def _weights(encoder: Encoder, exit: int, rank: int | None) -> int:
    """Bytes of the parameters that a model cut to that size holds."""
    width = next(encoder.model.parameters()).element_size()
    return width * num_parameters(encoder.model.cfg, exit, rank)


def _peak(encoder: Encoder, encode: Callable[[list[str]], None]) -> int:
    """Bytes of tensors, beyond those that are there already."""
    texts, device = short_texts(PACK), encoder.model.device
    encode(texts)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        encode(texts)
        return torch.cuda.max_memory_allocated(device) - before
    # Not the process's peak: what it freed before and kept would hide what this needs.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to standard error
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        encode(texts)
    alive = peak = 0
    for event in _events(profile):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def _events(profile: Any) -> Any:
    return profile.profiler.kineto_results.events()
