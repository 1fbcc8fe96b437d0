"""Costs against known allocations, known times and known sizes."""

import subprocess
import sys
import time

import pytest
import torch
from factories import tiny_encoder

from mlembed.inference import cost
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained

MIB = 2**20


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return tiny_encoder(num_hidden_layers=4, exits=(1, 4), ranks=(4, 8))


def test_peak_counts_what_lives_at_once(encoder):
    """1 and 2 MiB live at once, then 2 and 4; memory of earlier calls does not count."""
    del [torch.ones(64 * MIB, dtype=torch.uint8)][0]

    def encode(texts):
        assert len(texts) == 32
        first = torch.ones(MIB, dtype=torch.uint8)
        second = torch.ones(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.ones(4 * MIB, dtype=torch.uint8)
        return second, third

    peak = cost._peak(encoder, lambda texts: [encode(texts), None][1])
    assert peak == pytest.approx(6 * MIB, rel=0.01)


def test_profiler_prints_nothing():
    """Run in a new process, as the profiler reads its log level once."""
    script = (
        "import torch; from mlembed.inference import cost; from types import SimpleNamespace as S;"
        "encoder = S(model=S(device=torch.device('cpu')));"
        "print(cost._peak(encoder, lambda texts: [torch.ones(2**18), None][1]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "" and int(done.stdout) == 2**20


@pytest.mark.parametrize(("exit", "rank"), [(1, 4), (4, 8)])
def test_memory_of_a_size(encoder, exit, rank):
    small = pretrained.cut(encoder.model, exit, rank)
    weights = sum(p.nbytes for p in small.parameters())
    measured = cost.measure(encoder, exit, rank)["memory_mib"] * MIB
    # At least the vectors of one layer: 32 texts of 12 words or more.
    assert weights + 32 * 12 * 32 * 4 < measured < weights + 64 * MIB
    expected = {"parameters": sum(p.numel() for p in small.parameters())}
    expected |= {"parameter_bytes": weights, "bytes_per_vector": 32}
    assert cost.sizes(encoder, 8, exit, rank) == expected


def test_bytes_of_half_weights(encoder):
    half = tiny_encoder(num_hidden_layers=4, exits=(1, 4), ranks=(4, 8))
    half.model.bfloat16()
    full = cost.sizes(encoder, 8, 4, 8)
    assert cost.sizes(half, 8, 4, 8) == full | {"parameter_bytes": full["parameter_bytes"] // 2}


def test_latency_is_a_median():
    seconds = iter([0.2, *[0.001] * 10_000])
    assert 0.001 <= cost._median_seconds(lambda: time.sleep(next(seconds))) < 0.1
    calls = []
    cost._median_seconds(lambda: calls.append(time.sleep(0.06)))
    assert len(calls) == 3  # the fewest, of slow calls
    calls.clear()
    cost._median_seconds(lambda: calls.append(None))
    assert len(calls) == 100  # the most, of fast calls


def test_rate_grows_packs_until_long_enough():
    counts = []

    def encode(texts):
        assert len(set(texts)) == len(texts)
        counts.append(len(texts))
        time.sleep(0.0005 * len(texts))

    rate = cost._texts_per_second(encode)
    assert counts == [32, 128, 512] and 500 < rate < 2100
    counts.clear()
    cost._texts_per_second(lambda texts: counts.append(len(texts)))
    assert counts == [32, 128, 512, 2048, 4096]


def test_measure(encoder):
    measured = cost.measure(encoder, 4, 8)
    assert measured.keys() == {"latency_ms", "texts_per_second", "memory_mib"}
    # A text alone takes longer than its share of a pack.
    assert measured["latency_ms"] > 1000 / measured["texts_per_second"] > 0
