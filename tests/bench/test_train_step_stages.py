"""The time of a step by stage: every kernel gets the right stage."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import report
from bench.harness import CPU
from bench.train_step import bench, cases
from bench.train_step import stages as staged

ROOT = Path(__file__).parents[2]
TOYS = {name: case.toy() for name, case in cases.CASES.items()}


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "products"),
        ("triton_tem_fused_mm_3", "products"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("_packed_backward_kernel", "attention"),
        ("_keys_backward_kernel", "attention"),
        ("_project_kernel", "embedding"),
        ("_wide_backward_kernel", "loss"),
        ("triton_poi_fused_add_mul_silu_5", "point-wise"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "point-wise"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "point-wise"),
        ("_rms_norm_forward_kernel", "point-wise"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<bf16>", "copies"),
        ("Memcpy HtoD (Pageable -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("someones_new_kernel", "other"),
    ],
)  # fmt: skip
def test_kernel_names_have_stages(kernel, stage):
    if kernel in ("_project_kernel", "_wide_backward_kernel") or "_backward_kernel" in kernel:
        pytest.importorskip("triton")
    assert staged.by_name(kernel) == stage


def test_every_kernel_module_has_a_stage():
    """A new module of jit kernels needs a stage."""
    pytest.importorskip("triton")
    listed = {module for modules in staged.MODULES.values() for module in modules}
    with_kernels = {
        f"{path.parent.name}.{path.stem}"
        for path in (ROOT / "kernels").rglob("_*.py")
        if re.search(r"^def \w+_kernel\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert with_kernels <= listed and set(staged.our_kernels().values()) == set(staged.MODULES)


def test_marks_go_before_names():
    ran = [("aten::mm", 9.0)]
    for name in ("aten::mm", "nvjet_x", "odd"):
        ran += [("at::cuda::(anonymous namespace)::spin_kernel(long)", 0.1), (name, 1.0)]
    got = staged.staged(ran, ["embedding", "blocks", "blocks"])
    assert [(k.stage, k.ms) for k in got] == [
        *[("products", 9.0), ("embedding", 1.0), ("products", 1.0), ("other", 1.0)]
    ]
    for marks in (["loss"], ["loss"] * 4):
        with pytest.raises(RuntimeError, match="profiler: expected"):
            staged.staged(ran, marks)
    with pytest.raises(RuntimeError, match="profiler: expected"):
        staged.staged([], [])


def test_annotations_are_not_kernels():
    def event(name, start, annotation=False, kind="CUDA"):
        span = SimpleNamespace(start=start, elapsed_us=lambda: 2e3)
        kind = SimpleNamespace(name=kind)
        return SimpleNamespace(
            name=name, time_range=span, device_type=kind, is_user_annotation=annotation
        )

    found = [event("b", 3), event("a", 1), event("Optimizer.step#AdamW.step", 0)]
    found.append(event("x", 0, True))
    assert staged.kernels([*found, event("host", 2, kind="CPU")], True) == [("a", 2.0), ("b", 2.0)]


@pytest.mark.parametrize("name", ["step", "step_skip", "lealla"])
def test_profiled_step_counts_operators_by_stage(name):
    """Products of the embedding and the loss do not count as the blocks'."""
    case = TOYS[name]
    inputs = case.inputs(CPU, 0)
    step = bench.ours(case, CPU, True, compiled=False)
    step(inputs, True)
    loss = step(inputs, False)
    kernels = staged.profiled(step, inputs)
    count = {}
    for kernel in kernels:
        names = "mm", "addmm", "embedding_dense_backward", "linalg_vector_norm"
        if kernel.name.removeprefix("aten::") in names:
            count[kernel.name, kernel.stage] = count.get((kernel.name, kernel.stage), 0) + 1
    m, packs = case.run.model, inputs.packs(False)[1]
    layers = sum(
        pack.plan_at(d) is not None for pack in packs for d in range(1, m.num_hidden_layers + 1)
    )
    if m.style == "bert":  # products of the forward have biases; so has the pooler, at every exit
        pooled = sum(pack.plan_at(e) is not None for pack in packs for e in m.exits)
        assert count["aten::addmm", "products"] == 4 * layers + pooled
        assert count["aten::mm", "products"] == 2 * (4 * layers + pooled)
        # Of positions, which are in no table of words.
        assert count.pop(("aten::embedding_dense_backward", "point-wise")) == len(packs)
    else:
        assert count["aten::mm", "products"] == 3 * 4 * layers
    if m.ranks:
        assert count["aten::mm", "embedding"] == 3 * len(packs)
    else:
        assert count["aten::embedding_dense_backward", "embedding"] == len(packs)
    assert ("aten::linalg_vector_norm", "optimiser") in count
    assert {s for n, s in count if n == "aten::embedding_dense_backward"} <= {"embedding"}
    assert {k.stage for k in kernels} == set(staged.STAGES) - {"attention"} | (
        {"attention"} if any("scaled_dot" in k.name for k in kernels) else set()
    )
    # The hooks are removed.
    before = len(kernels)
    assert step(inputs, False) < loss and not step.model.embed_tokens._forward_hooks
    assert abs(len(staged.profiled(step, inputs)) - before) < before / 10


def test_stage_that_did_not_run_has_no_number():
    kernels = [staged.Kernel("a", 3.0, "products"), staged.Kernel("odd", 1.0, "other")]
    found = staged.summed(kernels, {"products": 1.5, "attention": 2.0})
    printed = report.stages({"status": "ran", **found}, 8.0)
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert lines["products"][1:] == ["3.000", "37.5%", "1.500", "50.0%"]
    assert lines["attention"][1:] == ["-", "-", "2.000", "-"]
    assert lines["other"][1:] == ["1.000", "12.5%", "-", "-"] and "other: odd" in printed
    assert lines["no kernel"][2:] == ["4.000", "50.0%", "-", "-"]
    assert "no kernel" not in report.stages({"status": "ran", **found}, None)
    assert report.stages({"status": "failed", "note": "why"}, None) == "stages of ours: failed why"
