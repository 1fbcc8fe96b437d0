"""Checks of machine code in tests/hopper.py, on lines written by hand."""

import pytest

pytest.importorskip("triton")
import hopper  # noqa: E402

from bench.compiled import sass  # noqa: E402

WAIT, BARRIER, COPY = "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", "BAR.SYNC.DEFER_BLOCKING 0x0 ;", "LDGSTS.E"
PRODUCT, SPILL = "HGMMA.64x128x16.F32.BF16 R24, R116, gdesc[UR8] ;", "STL [R1], R2 ;"


def code(*loop: str, before: tuple[str, ...] = ()) -> str:
    """A loop as nvdisasm prints it, and an exit behind it."""
    lines = ["        " + line for line in loop]
    back = ["        /*0120*/ @!P1 BRA `(.L_x_2) ;", ".L_x_3:", "        EXIT ;"]
    return "\n".join([*before, "        BRA `(.L_x_3) ;", ".L_x_2:", *lines, *back])


def test_loops_are_what_is_run_again():
    inner = sass.bodies(code(PRODUCT, WAIT, before=(SPILL,)))
    assert len(inner) == 1
    text = "\n".join(inner[0])
    assert PRODUCT in text and WAIT in text and SPILL not in text and "EXIT" not in text


@pytest.mark.parametrize(
    "loop, expected",
    [
        ((PRODUCT, WAIT, BARRIER, COPY), False),
        ((PRODUCT, WAIT, COPY), True),
        # In the round after it.
        ((BARRIER, COPY, PRODUCT, WAIT), False),
        ((COPY, BARRIER, PRODUCT, WAIT), True),
    ],
)
def test_a_barrier_stands_between_a_wait_and_a_copy(loop, expected):
    (found,) = sass.bodies(code(*loop))
    assert sass.unguarded(found) is expected


GOOD = {
    "kernel": "_product_kernel", "case": "x", "target": "sm_90a", "registers": 255,
    "shared": 227 * 1024, "stack": 0, "spills_in_loops": 0, "unguarded_loops": 0, "serial_loops": 0,
    "serialised": False, "idle_loops": 0,
    "wgmma": 4, "mma": 0, "async_copies": 8, "stages": 3, "constants": {"PRECISION": "ieee"},
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        {"target": "sm_90"}, {"registers": 256}, {"shared": 227 * 1024 + 1}, {"stack": 8},
        {"spills_in_loops": 1}, {"unguarded_loops": 1}, {"serial_loops": 1}, {"wgmma": 0},
        {"serialised": True}, {"idle_loops": 1},
        {"mma": 1}, {"async_copies": 0},
    ],
    ids=str,
)  # fmt: skip
def test_each_fault_is_a_violation(fault, monkeypatch):
    monkeypatch.setattr(hopper, "EXCEPTIONS", ())
    assert not hopper.violations(GOOD)
    assert len(hopper.violations(GOOD | fault)) == 1


def test_an_exception_is_of_a_kernel_a_version_and_a_constant(monkeypatch):
    row = GOOD | {"stack": 8}
    for exempt, allowed in (
        (hopper.Exempt("_product_kernel", ("3.6.0",), "stack", 8, ""), True),
        (hopper.Exempt("_product_kernel", (), "stack", 8, ""), True),
        (hopper.Exempt("_product_kernel", ("3.6.0",), "stack", 8, "", ("PRECISION", "ieee")), True),
        (hopper.Exempt("_product_kernel", ("3.6.0",), "stack", 4, ""), False),
        (hopper.Exempt("_product_kernel", ("3.9.0",), "stack", 8, ""), False),
        (hopper.Exempt("_pack_kernel", ("3.6.0",), "stack", 8, ""), False),
        (hopper.Exempt("_product_kernel", (), "stack", 8, "", ("PRECISION", "tf32x3")), False),
    ):
        monkeypatch.setattr(hopper, "EXCEPTIONS", (exempt,))
        monkeypatch.setattr(hopper.triton, "__version__", "3.6.0")
        assert bool(hopper.violations(row)) is not allowed, exempt
