"""Launches of the kernels in every case of the benches, found and compiled without a GPU.

    python -m bench.launches [CASE...] -> one JSON object for each kernel and specialisation

The host code runs as it would on a card, on tensors that have shapes, strides and addresses but no
memory (torch's fake tensors), so real sizes cost nothing. Each launch is recorded instead of
compiled; `Launch.compile` compiles it for Hopper (sm_90a), and `machine_code` reads what came out.

A process that collects does nothing else: torch and Triton are patched for good, and without
TRITON_INTERPRET, as a process is either the interpreter or the compiler.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import ROOT

TARGET = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132  # of an H100 or H200: columns are split to fill them
OPS = {  # operator -> its module in kernels/
    "pairwise_lse": "similarity._lse_op",
    "cosine": "similarity._cosine_op",
    "distill": "similarity._distill_op",
    "embed": "embedding._op",
    "attention": "attention._op",
}
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
CPU = torch.device("cpu")
MODE = FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as Triton would compile it at its first launch."""

    kernel: JITFunction
    case: str
    grid: tuple[int, ...]
    signature: dict[str, str]  # argument -> its type, "constexpr" also for an integer that is 1
    constexprs: dict[tuple[int, ...], Any]  # position -> value
    attrs: dict[tuple[int, ...], Any]  # position -> divisible by 16?
    options: Any

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def arguments(self) -> dict[str, Any]:
        """Values of the arguments that are constants of this specialisation."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constexprs.items()}

    def divisible(self) -> set[str]:
        """Names of the arguments that Triton takes to be divisible by 16."""
        names = list(self.signature)
        return {names[path[0]] for path, value in self.attrs.items() if value}

    def key(self, addresses: bool = True) -> str:
        """Return what Triton distinguishes specialisations by; without `addresses`, all but
        the divisibility of pointers."""
        names = [
            name
            for name in sorted(self.divisible())
            if addresses or not self.signature[name].startswith("*")
        ]
        parts = self.signature, self.constexprs, names, self.options.__dict__
        return " ".join([self.name, *map(str, parts)])

    def compile(self) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)
        return triton.compile(source, target=TARGET, options=self.options.__dict__)


# ---- collecting ----

LAUNCHES: dict[str, Launch] = {}  # by key, in the order of the first launch
running = "", ()  # case, grid


class _Hopper:
    """A card for Triton's compiler, which asks its driver for one."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def get_device_interface(self) -> None:
        return None


class _Card:
    multi_processor_count = MULTIPROCESSORS


def prepare() -> None:
    """Make fake tensors pass for tensors on a card, and launches be recorded."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "expected the compiler, got the interpreter"
    triton.runtime.driver.set_active(_Hopper())
    run = JITFunction.run

    def specialise(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        global running
        running = running[0], tuple(grid)
        run(self, *args, grid=grid, warmup=True, **kwargs)

    def record(
        self: JITFunction, key: Any, signature: Any, device: Any, constexprs: Any, options: Any,
        attrs: Any, warmup: bool,
    ) -> None:  # fmt: skip
        launch = Launch(self, *running, signature, constexprs, attrs, options)
        LAUNCHES.setdefault(launch.key(), launch)

    copy = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A copy to the card. What the host knows of a batch is computed before it."""
        if args and isinstance(args[0], torch.device) and not isinstance(self, FakeTensor):
            return MODE.from_tensor(self)
        return copy(self, *args, **kwargs)

    for owner, name, value in (
        (JITFunction, "run", specialise),
        (JITFunction, "_do_compile", record),
        (FakeTensor, "is_cuda", property(lambda self: True)),
        (FakeTensor, "is_cpu", property(lambda self: False)),
        (FakeTensor, "data_ptr", lambda self: self.storage_offset() * self.itemsize),
        (Tensor, "to", to),
        (torch.cuda, "device_of", lambda x: contextlib.nullcontext()),
        (torch.cuda, "get_device_properties", lambda device: _Card),
    ):
        setattr(owner, name, value)
    for name, path in OPS.items():
        # Shapes alone are known of a fake tensor's operators: these run all of their host code.
        module = importlib.import_module(f"mlembed_kernels.{path}")
        for suffix, op in (("", f"{name}_op"), ("_backward", "_backward_op")):
            body = partial(_on_card, getattr(module, op)._init_fn)
            torch.library.register_fake(f"mlembed::{name}{suffix}", body, allow_override=True)


def _on_card(body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with MODE:
        return body(*args, **kwargs)


def collect(cases: dict[str, Callable[[], None]]) -> list[Launch]:
    """Return every distinct launch of these cases; `case` of one is the first that has it."""
    global running
    LAUNCHES.clear()
    for name, case in cases.items():
        running = name, ()
        case()
    return list(LAUNCHES.values())


# ---- the benches' cases ----


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor on the card."""
    with MODE:
        return torch.empty(*shape, dtype=dtype)


def train(function: Callable[..., Any], *leaves: Tensor) -> None:
    """Run a function that returns a tensor or several, forward and backward."""
    with MODE:
        found = function(*(x.detach().requires_grad_() for x in leaves))
        outs = (found,) if isinstance(found, Tensor) else found
        torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])


def run_loss(case: Any) -> None:
    """A case of bench/infonce.py, forward and backward."""
    from .harness import Leaves
    from .infonce import bench

    q, c = (empty(case.E, case.B, case.D) for _ in "qc")
    with MODE:
        bench.ours(case)(Leaves(q, c), True)


def loss_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from mlembed_kernels import infonce

    from .infonce import bench, gate

    def check(check: gate.Check, dtype: torch.dtype) -> None:
        q, c = (empty(check.E, n, check.D, dtype=dtype) for n in (check.Q, check.C))
        ids = {}
        if check.masks:
            # Without `target`, which takes the same kernels: of a tensor on the CPU, which a fake
            # one says it is, the loss looks at its values.
            ids["query_ids"] = empty(check.Q, dtype=torch.int64)
            ids["cand_ids"] = empty(check.C, dtype=torch.int64)
        options: dict[str, Any] = {"dims": check.dims, "directions": check.directions, **ids}
        options |= {"partition_mode": check.partition_mode, "temperature": check.temperature}
        train(partial(infonce, **options, impl="triton"), q, c)

    for case in bench.CASES.values():
        yield f"infonce-{case.name}", partial(run_loss, case)
    for one in gate.checks():
        for dtype in (torch.bfloat16, torch.float32)[: 1 + one.fp32]:
            name = f"infonce-gate-{one.name}-{str(dtype).removeprefix('torch.')}"
            yield name.replace(", ", "-").replace(" ", "-"), partial(check, one, dtype)


def run_attention(case: Any, provider: str) -> None:
    """A case of bench/attention.py, forward and backward."""
    from .attention import bench
    from .attention.peers import Packed

    step = bench.ours(case, provider, CPU)
    heads = case.Hq, case.Hkv, case.Hkv, case.Hq
    inputs = Packed(*(empty(sum(case.lengths), H, case.K) for H in heads))
    with MODE:
        step(inputs, True)


def attention_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from mlembed_kernels.attention.attention import attention

    from .attention import bench, gate
    from .attention.peers import Batch

    def check(check: gate.Check, dtype: torch.dtype) -> None:
        batch = Batch.of(check.lengths, check.causal, check.Hq // check.Hkv, CPU)
        heads = check.Hq, check.Hkv, check.Hkv
        qkv = [empty(sum(check.lengths), H, check.K, dtype=dtype) for H in heads]
        active = empty(len(check.lengths), dtype=torch.bool) if check.skips else None
        options: dict[str, Any] = {"cu_seqlens": batch.cu, "plan": batch.plan, "active": active}
        train(partial(attention, **options, causal=check.causal, impl="triton"), *qkv)

    for case in bench.CASES.values():
        for provider in case.providers:
            if provider in bench.SKIPPING:
                yield f"attention-{case.name}-{provider}", partial(run_attention, case, provider)
    for one in gate.checks():
        for dtype in (torch.bfloat16, torch.float32)[: 1 + one.fp32]:
            name = f"attention-gate-{one.name}-{str(dtype).removeprefix('torch.')}"
            yield name.replace(", ", "-").replace(" ", "-"), partial(check, one, dtype)


def run_embed(case: Any) -> None:
    """A case of bench/embed.py, forward and backward."""
    from . import embed as bench

    factors = torch.float32 if case.masters else torch.bfloat16
    ids = bench.stream(case.T, case.V)
    U, W = empty(case.V, case.R, dtype=factors), empty(case.R, case.D, dtype=factors)
    like = bench.Factors(U, W, ids.to(CPU), empty(case.T, case.D))
    step, _ = bench.build("ours", case, like, False)
    with MODE:
        step(like, True)


def embed_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    from mlembed_kernels import TokenIndex
    from mlembed_kernels.embedding.embed import embed

    from . import embed as bench

    def check(check: bench.Check, dtype: torch.dtype) -> None:
        ids = torch.tensor(check.ids)
        token_index = TokenIndex.of(ids).to(CPU)
        ids = ids.to(CPU)
        factors = torch.float32 if check.masters else dtype

        def function(U: Tensor, W: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=check.masters):
                return embed(ids, U, W, check.rank, impl="triton", token_index=token_index)

        shapes = (check.V, check.R), (check.R, check.D)
        train(function, *(empty(*shape, dtype=factors) for shape in shapes))

    for case in bench.CASES.values():
        yield f"embed-{case.name}", partial(run_embed, case)
    for one in bench.checks():
        for dtype in (torch.bfloat16, torch.float32)[: 1 + one.fp32]:
            name = f"embed-gate-{one.name}-{str(dtype).removeprefix('torch.')}"
            yield name.replace(" ", "-"), partial(check, one, dtype)


def step_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Whole models. Blocks are not compiled by inductor: its kernels are not ours."""
    from .train_step import bench as train_step
    from .train_step.cases import Case, Texts

    table = train_step.loss_table

    def run(case: Case, deep: bool) -> None:
        texts = Texts(case, CPU)
        texts.packs(deep)
        with MODE:
            step = train_step.ours(case, CPU, False, compiled=False, deep=deep)
            # As on a card: matrix products under autocast, and exits in half precision.
            loss = partial(step.loss.func, **{**step.loss.keywords, "half": True})  # type: ignore
        # Outside of the mode the host's own tensors have values: depths, counts, rows.
        loss(step, texts).backward()

    setattr(train_step, "loss_table", lambda exits, *rest: table(exits.bfloat16(), *rest))  # noqa: B010
    for case in train_step.CASES.values():
        for provider in case.providers:
            if provider in ("ours", "full_depth"):
                deep = provider == "full_depth"
                yield f"train_step-{case.name}-{provider}", partial(run, case, deep)


def kernel_cases() -> dict[str, Callable[[], None]]:
    """Every case of a kernel's own bench, and of its gate, by name."""
    return dict([*loss_cases(), *attention_cases(), *embed_cases()])


def bench_cases() -> dict[str, Callable[[], None]]:
    """Every case of the benches that launches our kernels, by name.

    `encode` runs the model of `train_step` forward, `gradcache` in several packs: neither launches
    anything that is not here.
    """
    return {**kernel_cases(), **dict(step_cases())}


# ---- what the compiler made ----


def disassembly(cubin: bytes) -> str:
    return _run_on(cubin, "nvdisasm", "-c")


def _run_on(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(sass: str) -> list[list[str]]:
    """Instructions of each loop: from a label to a branch back to it. Inner loops are in outer
    ones too."""
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    found = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], i) < i - 1:
            found.append(lines[labels[branch[1]] : i + 1])
    return found


def unguarded(loop: Sequence[str]) -> bool:
    """Is shared memory overwritten after a wait for a product, without a barrier between them?

    Other warps may still read there (Triton issue 11047). A loop is walked twice, as a copy may
    stand before the wait of the round before it.
    """
    waited = False
    for line in [*loop, *loop]:
        if "WARPGROUP.DEPBAR" in line:
            waited = True
        elif "BAR.SYNC" in line:
            waited = False
        elif "LDGSTS" in line and waited:
            return True
    return False


def machine_code(launch: Launch, kernel: Any) -> dict[str, Any]:
    """Return what is asserted of a compiled launch, and what a reader wants to know of it."""
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    usage = _run_on(cubin, "cuobjdump", "--dump-resource-usage")
    resources = {
        name: int(re.search(rf"{key}:(\d+)", usage)[1])  # type: ignore[index]
        for key, name in (("REG", "registers"), ("STACK", "stack"))
    }
    inner = loops(disassembly(cubin))
    products = [(_count(loop, "HGMMA"), _count(loop, "WARPGROUP.DEPBAR")) for loop in inner]
    constants = launch.arguments()
    return {
        "kernel": launch.name,
        "case": launch.case,
        "constants": {k: v for k, v in constants.items() if k.isupper()},
        "ones": sorted(k for k, v in constants.items() if not k.isupper()),
        "divisible": sorted(launch.divisible()),
        "warps": launch.options.num_warps,
        "stages": launch.options.num_stages,
        "target": re.search(r"\.target (\S+)", ptx)[1],  # type: ignore[index]
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "async_copies": ptx.count("cp.async"),
        "shared": kernel.metadata.shared,
        **resources,
        "spills_in_loops": sum(_count(loop, "STL") + _count(loop, "LDL") for loop in inner),
        # Loops in which every product is waited for before the next begins.
        "serial_loops": sum(0 < n <= waits for n, waits in products),
        "unguarded_loops": sum(map(unguarded, inner)) if launch.options.num_warps > 4 else 0,
        "hash": kernel.hash,
    }


def _count(lines: Sequence[str], opcode: str) -> int:
    return sum(opcode in line for line in lines)


def keep_compiled() -> Path:
    """Keep what Triton compiles, below MLEMBED_TRITON_CACHE or in this checkout, and return where.

    Triton's key hashes sources, options and the compiler: what is found is what would be made.
    """
    place = Path(os.environ.get("MLEMBED_TRITON_CACHE", ROOT / ".cache" / "triton"))
    place /= triton.__version__
    os.environ["TRITON_CACHE_DIR"] = str(place)
    return place


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all, if none is named")
    parser.add_argument("--list", action="store_true", help="print them, compile nothing")
    args = parser.parse_args()
    keep_compiled()
    prepare()
    cases = bench_cases()
    for launch in collect({name: cases[name] for name in args.cases or cases}):
        if args.list:
            print(json.dumps({"kernel": launch.name, "case": launch.case, "key": launch.key()}))
        else:
            print(json.dumps(machine_code(launch, launch.compile()), default=str), flush=True)
