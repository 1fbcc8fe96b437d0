"""python -m bench audit: instructions by loop, bytes by loop, how often loops run, tables."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import torch  # noqa: E402
import triton  # noqa: E402

from bench.compiled import audit, sass, tables, ttgir, work  # noqa: E402
from bench.compiled.machines import H100, H200  # noqa: E402

ROOT = Path(__file__).parents[2]
BEFORE = ROOT / "bench/results/2026-11-30-audit-before.json"

# ---- machine code ----

# A loop of products with a condition inside a condition, and a loop within a loop.
CODE = """
        /*0000*/ S2R R0, SR_TID.X ;
        /*0010*/ LDG.E.128 R4, [R2.64] ;
.L_x_0:
        /*0020*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/ @!P0 BRA `(.L_x_2) ;
        /*0050*/ MUFU.EX2 R5, R5 ;
        /*0060*/ @P1 BRA `(.L_x_1) ;
        /*0070*/ FADD R6, R6, R5 ;
        /*0080*/ FADD R6, R6, 1 ;
.L_x_1:
        /*0090*/ MUFU.EX2 R7, R7 ;
.L_x_2:
        /*00a0*/ @P2 BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/ ISETP.GE.AND P0, PT, R0, RZ, PT ;
.L_x_4:
        /*00c0*/ STL [R1], R2 ;
        /*00d0*/ @P3 BRA `(.L_x_4) ;
        /*00e0*/ @P4 BRA `(.L_x_3) ;
        /*00f0*/ EXIT ;
.L_x_5:
        /*0100*/ BRA `(.L_x_5) ;
"""


def test_regions_are_what_runs_equally_often():
    found = [(r.loop, r.depth, r.kind, len(r.lines)) for r in sass.regions_of(CODE)]
    assert found == [
        # The branch to itself that fills the end counts as outside.
        (-1, 0, "other", 4),
        (0, 0, "products", 4),
        (0, 1, "exponentials", 3),
        (0, 2, "other", 2),
        (1, 0, "other", 2),
        (2, 0, "other", 2),
    ]


def test_every_instruction_is_in_one_region():
    lines = Counter(line for region in sass.regions_of(CODE) for line in region.lines)
    assert lines.total() == CODE.count("/*") == sum(lines.values())
    assert max(lines.values()) == 1


@pytest.mark.parametrize(
    "line, expected",
    [
        ("@!P0 LDG.E.128 R4, [R2.64]", "LDG.E.128"),
        ("FADD.FTZ R1, R2, R3", "FADD"),
        ("@!UP0 UIADD3 UR4, UR4, 0x1, URZ", "UIADD3"),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "HGMMA.64x32x16.F32.BF16"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR 1"),
        ("WARPGROUP.ARRIVE", "WARPGROUP.ARRIVE"),
    ],
)
def test_opcodes_keep_widths_shapes_and_depths(line, expected):
    assert sass.opcode(line) == expected


@pytest.mark.parametrize("depth, expected", [(0, True), (1, False)])
def test_a_loop_is_idle_if_a_round_leaves_no_product_under_way(depth, expected):
    code = CODE.replace("gsb0, 0x1", f"gsb0, 0x{depth}")
    assert [sass.idle(r) for r in sass.regions_of(code) if r.loop == 0][0] is expected


# ---- bytes ----

TTGIR = """
  tt.func public @_kernel(%X: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x")) {
    %a = tt.load %p : !tt.ptr<i32> loc(#l)
    %b = ttg.async_copy_global_to_local %q, %r : tensor<64x32x!tt.ptr<bf16>, #b> -> <64x32xbf16, #s>
    %c:2 = scf.for %i = %0 to %1 step %2 iter_args(%d = %e) -> (tensor<64x64xf32, #mma>) {
      %f = ttng.warp_group_dot %g, %h, %d : !ttg.memdesc<64x32xbf16> -> tensor<64x64xf32, #mma>
      %j = ttg.async_copy_global_to_local %q, %r mask %m : tensor<64x32x!tt.ptr<bf16>, #b> -> <x>
      %k = scf.if %n -> (tensor<64xf32>) {
        %o = tt.load %q : tensor<64x!tt.ptr<f32>, #s>
        %s = math.exp2 %f : tensor<64x64xf32, #mma>
        %t = "tt.reduce"(%s) <{axis = 1 : i32}> ({
        ^bb0(%u: f32, %v: f32):
          tt.reduce.return %u : f32
        }) : (tensor<64x64xf32, #mma>) -> tensor<64xf32>
        tt.store %w, %t : tensor<64x!tt.ptr<f32>, #s>
      } else {
        %x = tt.load %q, %m : tensor<8x!tt.ptr<i8>, #s>
      }
    }
    tt.store %w, %c : tensor<64x64x!tt.ptr<bf16>, #s>
  }
"""


def test_bytes_are_counted_once_for_a_tile_and_by_region():
    found = [(r.loop, r.always, r.kind, r.read, r.written) for r in ttgir.regions_of(TTGIR)]
    assert found == [
        # Without the copy ahead of the loop, which is the loop's first.
        (-1, True, "other", 4, 64 * 64 * 2),
        (0, True, "products", 64 * 32 * 2, 0),
        (0, False, "exponentials", 64 * 4, 64 * 4),
        (0, False, "other", 8, 0),
    ]


# ---- costs and bounds ----


def test_costs_are_rounds_times_what_a_round_has():
    regions = [
        {"loop": r.loop, "always": r.always, "depth": r.depth, "kind": r.kind,
         "instructions": len(r.lines), "opcodes": r.opcodes}
        for r in sass.regions_of(CODE)
    ]  # fmt: skip
    traffic = [r.__dict__ for r in ttgir.regions_of(TTGIR)]
    kernel = {"kernel": "_k", "warps": 8, "regions": regions, "traffic": traffic}
    run = SimpleNamespace(programs=10, launch=SimpleNamespace(name="_k"))
    loop = {"products": 1000.0, "exponentials": 100.0, "other": 50.0, "nested": 25.0}
    cost = audit.cost_of(run, kernel, work.Work(7.0, (loop,)))
    assert cost["instructions"] == 8 * (10 * 4 + 1000 * 4 + 100 * 3 + 25 * 2)
    assert cost["issue"] == cost["instructions"] / 4
    assert cost["exponentials"] == 100 * 2 * 8 * 32 / 16
    # m64n128k16 takes 64 clocks of all tensor units: 64 x 128 x 16 / 2048.
    assert cost["tensor"] == 1000 * 64 * 8 / 4
    assert cost["l2"] == 10 * (4 + 8192) + 1000 * 4096 + 100 * 512 + 50 * 8
    assert cost["memory"] == 7.0
    # The compiler knows the rounds of some loops.
    traffic[1]["rounds"] = 30
    assert audit.cost_of(run, kernel, work.Work(7.0, ({"other": 5.0},)))["tensor"] == 300 * 64 * 2
    # A second loop of the model may be code without a loop, and counts as such.
    assert audit.cost_of(run, kernel, work.Work(7.0, (loop, loop)))["memory"] == 7.0
    with pytest.raises(LookupError, match="expected at most 0 loops with products, got 1"):
        audit.cost_of(run, kernel, work.Work(7.0, ()))


def test_bounds_of_a_card():
    cost = {"tensor": 1e9, "exponentials": 2e9, "issue": 4e9, "l2": 1e12, "memory": 1e12}
    h100, h200 = H100.bounds(cost), H200.bounds(cost)
    assert h200["tensor"] == pytest.approx(1e9 / 132 / 1.755e6)
    assert h200["issue"] == pytest.approx(4 * h200["tensor"])
    assert h200["l2"] == pytest.approx(1e12 / (5120 * 1.755e6 * 0.75))
    assert h200["memory"] == pytest.approx(1e12 / 4247e6)  # the copy that was measured
    assert h100["memory"] / h200["memory"] == pytest.approx(4800 / 3350)
    # One product of a bf16 square of 8192 at the rate of the tensor units alone: 949 TFLOP/s.
    clocks = 8192**3 / H200.fma
    assert 2 * 8192**3 / H200.bounds(cost | {"tensor": clocks})["tensor"] / 1e9 == pytest.approx(
        949, abs=1
    )


@pytest.mark.parametrize(
    "warps, registers, shared, expected",
    [(8, 128, 98304, 2), (8, 129, 98304, 1), (4, 168, 72_000, 3), (8, 255, 0, 1), (4, 32, 0, 16)],
)
def test_programs_of_a_multiprocessor(warps, registers, shared, expected):
    assert H100.programs(warps, registers, shared) == expected


# ---- how often loops run ----


def arguments(**values):
    """Arguments of a launch, without a launch. Lists are tensors."""
    lists = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
    sizes = {k: v for k, v in values.items() if k not in lists and k != "grid"}
    kinds = dict.fromkeys(("Q", "X"), "*bf16")
    launch = SimpleNamespace(name="_k", arguments=dict, signature=kinds)
    grid = values.get("grid", (1,))
    run = SimpleNamespace(launch=launch, sizes=sizes, lists=lists, grid=grid)
    run.programs = math.prod(grid)
    return work.Arguments(run)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size, block", [(64, 64), (128, 64), (64, 128)])
def test_rounds_of_long_attention_are_those_of_the_kernels(causal, size, block):
    """Walk the kernels' loops over each tile, as their sources have them."""
    from mlembed_kernels import AttentionPlan

    plan = AttentionPlan.of(torch.tensor([0, 300, 365, 429, 941]))
    values = {"TILES": plan.tiles(size), "CAUSAL": causal, "TOKENS": size, "HQ": 4, "GROUP": 2}
    values |= {"HEADS": 2, "K": 8, "BN": block, "BM": block}
    a = arguments(**values)
    free, keys, whole, masked = 0, 0, 0, 0
    for first, begin, end in plan.tiles(size).tolist():
        at, n = first - begin, end - begin
        free += len(range(0, (at if causal else n - 1) // block * block, block))
        seen = (at if causal else n) // block * block
        whole += len(range(0, seen, block))
        masked += len(range(seen, min(at + size, n) if causal else n, block))
        at = (n - 1) // size * size - at if causal else at
        start = at // block * block if causal else 0
        keys += (n - start + block - 1) // block * 2  # query heads of a group
    programs = 4 // 2  # of each tile
    assert work.long_forward(a).loops == ({"products": free * programs},)
    loops = {"products": whole * programs}, {"products": masked * programs}
    assert work.queries_backward(a).loops == loops
    assert work.keys_backward(a).loops == ({"products": keys * 2},)


SCRIPT = """
import json
from bench.compiled import bench_cases, launches, work
launches.prepare()
known = bench_cases.kernel_cases()
names = "infonce-reference", "infonce-both", "attention-mid-ours", "attention-mid_bert-ours"
launches.collect({name: known[name] for name in (*names, "embed-step", "embed-lealla")})
for run in launches.RUNS:
    done = work.work_of(run)
    print(json.dumps([run.launch.name, done and done.memory, done and done.loops]))
"""


def outside(*command: str) -> subprocess.CompletedProcess:
    """Run Python in a process of its own: collecting patches torch and Triton for good."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_every_kernel_of_the_benches_has_a_model_of_its_work():
    rows = [json.loads(line) for line in outside("-c", SCRIPT).stdout.splitlines()]
    assert {name for name, memory, _ in rows if not memory} == set()
    assert len({name for name, *_ in rows}) == 20
    # All pairs of 7 exits: 128 x 128 tiles of the products, whichever launches share them.
    pairs = sum(loops[0]["other"] for name, _, loops in rows if name == "_wide_backward_kernel")
    assert pairs == 2 * 7 * (16384 // 128) ** 2  # two cases


# ---- tables ----


def test_an_audit_against_itself_has_changed_nothing():
    before = json.loads(BEFORE.read_text(encoding="utf-8"))
    lines = tables.comparison(before, before).splitlines()[2:]
    ratios = {line.split(" | ")[-1].strip(" |") for line in lines}
    assert ratios <= {"1.00", "-"}
    (whole,) = [line for line in lines if line.startswith("| infonce-reference | all |")]
    assert "57." in whole


def test_a_comparison_shows_what_changed_and_sums_the_rest():
    before = json.loads(BEFORE.read_text(encoding="utf-8"))
    after = json.loads(BEFORE.read_text(encoding="utf-8"))
    after["cases"] = [row for row in after["cases"] if row["case"] == "infonce-reference"]
    (kernel,) = [row for row in after["kernels"] if row["index"] == after["cases"][3]["index"]]
    kernel["registers"] = 77
    for name in after["cases"][3]["bounds"]["H200"]:
        after["cases"][3]["bounds"]["H200"][name] /= 2
    lines = tables.comparison(before, after).splitlines()[2:]
    assert all(line.startswith("| infonce-reference |") for line in lines)
    (changed,) = [line for line in lines if "-> 77" in line]
    assert changed.endswith("| 0.50 |")


def test_only_what_stands_between_the_markers_is_written():
    page = "a\n<!-- audit: x y -->\nold\n<!-- end of audit -->\nb\n"
    assert tables.cases_of(page) == ["x", "y"]
    filled = tables.filled(page, {"kernels": [], "cases": []})
    assert filled.startswith("a\n<!-- audit: x y -->\n") and filled.endswith(
        "\n<!-- end of audit -->\nb\n"
    )
    assert "old" not in filled and "| kernel |" in filled
    assert tables.filled(filled, {"kernels": [], "cases": []}) == filled


@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="docs/kernels.md is of Triton 3.7.1")
def test_rows_of_the_documentation_are_what_the_compiler_makes(tmp_path):
    file = tmp_path / "audit.json"
    names = "gather", "sum", "total"
    outside(
        "-m", "bench", "audit", "embed-step", "--kernel", *names, "--json", str(file), "--jobs", "1"
    )
    found = json.loads(file.read_text(encoding="utf-8"))
    page = audit.DOCS.read_text(encoding="utf-8")
    assert {tables.short(row["kernel"]) for row in found["kernels"]} == set(names)
    shown = (tables.resource(row)[: len(tables.SHOWN)] for row in found["kernels"])
    kernels = {row["index"]: row for row in found["kernels"]}
    costs = [tables.bound(row, kernels[row["index"]]) for row in found["cases"]]
    for line in [*shown, *costs]:
        assert "| " + " | ".join(map(str, line)) + " |" in page.splitlines()


def test_an_unknown_case_is_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "audit", "nonsense"],
        cwd=ROOT, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 1 and "expected one of" in done.stderr
    assert "got 'nonsense'" in done.stderr
