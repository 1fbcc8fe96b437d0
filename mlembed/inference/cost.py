"""Measure what a model costs at one depth and vocabulary rank, to read its scores against."""

import os
import statistics
import time
from collections.abc import Callable

import torch

from ..modeling.transformer import num_parameters
from .encoder import Encoder

SHORT = "A man is playing the guitar in front of a small crowd."
PACK = 32  # Texts of the first pack, whose memory is measured.
MOST = 4096  # Texts of the last pack.
# Long enough for a median, short enough for a grid.
LATENCY_S, PACKS_S = 0.06, 0.08


def sizes(encoder: Encoder, dim: int, exit: int, rank: int | None) -> dict[str, int]:
    """Return the parameters of the model cut to that exit and rank, their bytes in the model's
    dtype, and the bytes of an fp32 vector.
    """
    return {
        "parameters": num_parameters(encoder.model.cfg, exit, rank),
        "parameter_bytes": _weights(encoder, exit, rank),
        "bytes_per_vector": 4 * dim,
    }


def measure(encoder: Encoder, exit: int, rank: int | None) -> dict[str, float]:
    """Measure one depth and rank, on the encoder's device and in its precision. Costs do not
    depend on the width.

    latency_ms: median time of one short text, from text to vector on the CPU.
    texts_per_second: rate of the pack of short texts that takes PACKS_S, at most 4096 texts.
    memory_mib: weights of the model cut to that size, and the peak of live tensors while it encodes
    32 short texts: on CUDA the allocator's, on a CPU that of torch's allocations, as its profiler
    counts them. Python, libraries and the tokenizer are not part of it.
    """

    def encode(texts: list[str]) -> None:
        encoder.encode_exits(texts, [exit], rank, prompt="")

    encode([SHORT])
    encode([SHORT])
    return {
        "latency_ms": 1000 * _median_seconds(lambda: encode([SHORT])),
        "texts_per_second": _texts_per_second(encode),
        "memory_mib": (_weights(encoder, exit, rank) + _peak(encoder, encode)) / 2**20,
    }


def short_texts(count: int) -> list[str]:
    """Return different texts about as long as SHORT."""
    return [f"{SHORT[:-1]} of {number}." for number in range(count)]


def _median_seconds(run: Callable[[], None]) -> float:
    times: list[float] = []
    while len(times) < 3 or (sum(times) < LATENCY_S and len(times) < 100):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _texts_per_second(encode: Callable[[list[str]], None]) -> float:
    count = PACK
    while True:
        texts = short_texts(count)
        began = time.perf_counter()
        encode(texts)
        spent = time.perf_counter() - began
        if spent >= PACKS_S or count >= MOST:
            return count / spent
        count = min(MOST, 4 * count)


def _weights(encoder: Encoder, exit: int, rank: int | None) -> int:
    """Return the bytes of the parameters of a model cut to that size."""
    width = next(encoder.model.parameters()).element_size()
    return width * num_parameters(encoder.model.cfg, exit, rank)


def _peak(encoder: Encoder, encode: Callable[[list[str]], None]) -> int:
    """Return the peak of bytes of tensors, beyond those that exist before."""
    texts, device = short_texts(PACK), encoder.model.device
    encode(texts)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        encode(texts)
        return torch.cuda.max_memory_allocated(device) - before
    # The process's peak would hide this one behind memory that was freed before.
    # The profiler logs to standard error unless told otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        encode(texts)
    live = peak = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
