"""Run the loss's kernels once, for tools that watch a process: compute-sanitizer, ncu.

python -m bench.gpu.once checks      shapes of the gate, forward and backward, without a truth
python -m bench.gpu.once reference   a case of bench/infonce; profilers see one step of it
"""

import argparse
import os
from dataclasses import replace
from typing import Any

import torch

from .. import harness
from ..harness import TRAIN


def checks(device: torch.device, smoke: bool) -> int:
    """Run the gate's shapes whose prefixes take narrow kernels, and one that also takes wide ones.

    They have odd sizes, so that every mask is used; of large ones a part is enough, as the tools
    slow kernels down by 10 to 100 times.
    """
    from mlembed_kernels import infonce

    from ..infonce import gate

    todo = [check for check in gate.checks() if check.Q < 2048]
    for check in todo[:2] if smoke else todo:
        check = check.toy() if smoke else replace(check, Q=min(check.Q, 331), C=min(check.C, 777))
        dtype = harness.dtype_on(device, torch.float32)
        shapes = (check.E, check.Q, check.D), (check.E, check.C, check.D)
        q, c = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
        options: dict[str, Any] = {"dims": check.dims, "temperature": check.temperature}
        options |= {"directions": check.directions, "partition_mode": check.partition_mode}
        loss = infonce(q, c, **options, **gate.masks(check, device), impl="triton")
        gate.gradients(loss, q, c)
        harness.synchronize(device)
    return len(todo)


def case(name: str, device: torch.device, smoke: bool) -> None:
    """Run a step of ours twice; only the second is between the profiler's marks."""
    from ..infonce import bench

    shaped = bench.CASES[name].toy() if smoke else bench.CASES[name]
    inputs = shaped.inputs(device, 0)
    call = harness.rotating(bench.ours(shaped), [inputs], TRAIN)
    call(0)
    harness.synchronize(device)
    if device.type == "cuda":
        torch.cuda.cudart().cudaProfilerStart()
    call(0)
    harness.synchronize(device)
    if device.type == "cuda":
        torch.cuda.cudart().cudaProfilerStop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.once", description=__doc__)
    parser.add_argument("what", help="checks, or a case of infonce")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    if args.what == "checks":
        print(f"{checks(device, args.smoke)} shapes, forward and backward")
    else:
        case(args.what, device, args.smoke)
        print(f"{args.what}: forward and backward")


if __name__ == "__main__":
    main()
