"""What is measured is what is said: known allocations, known times, known sizes."""

import subprocess
import sys
import time

import pytest
import torch
from factories import randomise

from mlembed.inference import cost
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer
from tests.inference.test_funnel import build

MIB = 2**20


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build(depth=4)


def test_peak_is_of_what_is_alive_at_one_time(encoder):
    """1 and 2 MiB, then 2 and 4: also when the process has had more memory before."""
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


def test_the_profiler_says_nothing():
    """In a process that has not had it before: it reads how much to say once."""
    script = (
        "import torch; from mlembed.inference import cost; from types import SimpleNamespace as S;"
        "encoder = S(model=S(device=torch.device('cpu')));"
        "print(cost._peak(encoder, lambda texts: [torch.ones(2**18), None][1]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "" and int(done.stdout) == 2**20


def test_memory_holds_the_weights_of_that_size(encoder):
    for exit, rank in ((1, 4), (4, 8)):
        weights = cost._weights(encoder, exit, rank)
        small = pretrained.cut(encoder.model, exit, rank)
        assert weights == sum(p.nbytes for p in small.parameters())
        measured = cost.measure(encoder, exit, rank)["memory_mib"] * MIB
        # Beyond them at least the tokens' vectors of one layer: 32 texts of 12 words or more.
        assert measured > weights + 32 * 12 * 32 * 4
        assert measured < weights + 64 * MIB
    half = Encoder(randomise(Transformer(encoder.model.cfg)).bfloat16(), encoder.tokenizer, 32)
    assert cost._weights(half, 4, 8) * 2 == cost._weights(encoder, 4, 8)


def test_latency_is_a_median():
    taken = iter([0.2, *[0.001] * 10_000])
    assert 0.001 <= cost._median_seconds(lambda: time.sleep(next(taken))) < 0.1
    counted = []
    cost._median_seconds(lambda: counted.append(time.sleep(0.06)))
    assert len(counted) == 3  # however slow
    counted.clear()
    cost._median_seconds(lambda: counted.append(None))
    assert len(counted) == 100  # however fast


def test_packs_grow_until_they_take_long_enough():
    seen = []

    def encode(texts):
        assert len(set(texts)) == len(texts)
        seen.append(len(texts))
        time.sleep(0.0005 * len(texts))

    rate = cost._texts_per_second(encode)
    assert seen == [32, 128, 512] and 500 < rate < 2100
    seen.clear()
    cost._texts_per_second(lambda texts: seen.append(len(texts)))
    assert seen == [32, 128, 512, 2048, 4096]


def test_measured(encoder):
    found = cost.measure(encoder, 4, 8)
    assert found.keys() == {"latency_ms", "texts_per_second", "memory_mib"}
    # A text alone takes longer than its share of a pack.
    assert found["latency_ms"] > 1000 / found["texts_per_second"] > 0
    count = sum(p.numel() for p in pretrained.cut(encoder.model, 1, 4).parameters())
    want = {"parameters": count, "parameter_bytes": 4 * count, "bytes_per_vector": 32}
    assert cost.sizes(encoder, 8, 1, 4) == want
