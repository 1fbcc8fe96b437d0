"""Versions that pyproject.toml admits and constraints.txt pins agree."""

from floors import PYPROJECT, floors
from packaging.requirements import Requirement
from packaging.version import Version

PINS = PYPROJECT.with_name("constraints.txt").read_text(encoding="utf-8").splitlines()
PINNED = {
    line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2]
    for line in PINS
    if not line.startswith("#")
}


def test_floors_are_those_of_pyproject():
    lines = PYPROJECT.read_text(encoding="utf-8")
    assert {"numpy", "transformers", "mteb", "onnxruntime"} < floors().keys()
    assert not {"torch", "triton", "pytest"} & floors().keys()
    for name, version in floors().items():
        assert f'"{name}>={version}"' in lines


def test_every_floor_admits_the_pin():
    for name, version in floors().items():
        assert Version(PINNED[name]) >= Version(version), name


def test_pins_are_exact():
    for line in PINS:
        if not line.startswith("#"):
            (specifier,) = Requirement(line).specifier
            assert specifier.operator == "==", line
