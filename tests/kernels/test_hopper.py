"""Every kernel as it is shipped, compiled ahead of time for sm_90a: what no CPU run can show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Of all of tests/hopper.py (about ten minutes) those that need most registers, each kernel, each
# dtype: everything at once; masks of near pairs; a teacher; fp32, whose products are three.
CASES = {
    "bf16": ("1024-rows-bf16", "1024-both-masks-bf16"),
    "masks": ("256-rows-masks-bf16", "one-bf16", "one_partner-bf16"),
    "teacher": ("mse-bf16", "kl-fp32"),
    "fp32": ("256-both-masks-fp32",),
    "attention": ("attention-16-8-128-causal-bf16", "attention-skip-bf16", "attention-one-bf16"),
    "heads": ("attention-12-12-96-bf16", "attention-12-4-64-fp16"),
    "attention_fp32": ("attention-12-12-64-causal-fp32",),
    "embed": ("embed-512-bf16", "embed-65-masters-bf16", "embed-1-fp16", "embed-odd-fp16"),
    "embed_fp32": ("embed-512-fp32", "embed-odd-fp32"),
}
# Element-wise kernels, and the repair of underflow with its tiles of 32 rows, have no warpgroups.
NO_WGMMA = {
    "_pack_kernel", "_unpack_kernel", "_positive_kernel", "_exact_kernel",
    "_cosine_forward_kernel", "_cosine_backward_kernel",
    "_sum_kernel", "_total_kernel", "_gather_kernel",
}  # fmt: skip
# Runs only where a NaN was found, with the tile of another kernel, whose bits it repeats.
SPILLS = {"_apart_backward_kernel": 128}


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_compiles_for_hopper_without_spills(cases, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)  # and nothing from another run
    script = Path(__file__).parents[1] / "hopper.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *cases], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) >= 6
    for kernel in kernels:
        assert kernel["target"] == "sm_90a"
        assert kernel["stack"] <= SPILLS.get(kernel["kernel"], 0), f"spills: {kernel}"
        assert kernel["reg"] <= 255, kernel
        assert kernel["shared"] <= 227 * 1024, kernel
        small = kernel["constexprs"].get("TOKENS") == 16  # fp32's attention: no warpgroup's tile
        if kernel["kernel"] not in NO_WGMMA and not small:
            assert kernel["wgmma"] > 0 and kernel["mma"] == 0, kernel
            assert kernel["async_copies"] > 0 or kernel["stages"] == 1, kernel
