"""Versions and the device, which a result is read with."""

import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import TYPE_CHECKING, Any

from . import ROOT

if TYPE_CHECKING:
    import torch

# Packages whose versions are part of a result.
PACKAGES = (
    *("flash-attn", "flash-attn-3", "flash-attn-4", "xformers"),
    *("sentence-transformers", "transformers", "cut-cross-entropy", "inf-cl", "liger-kernel"),
    "siglip-kernel",
)


def sources() -> str:
    """Return a hash of the kernels and of mlembed; imports no torch, which takes seconds."""
    every = hashlib.sha256()
    for path in sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("mlembed/**/*.py")]):
        every.update(path.name.encode() + path.read_bytes())
    return every.hexdigest()[:12]


def environment(device: "torch.device") -> dict[str, Any]:
    """Return versions and the device, without paths or host names."""
    import torch

    import mlembed_kernels

    from .harness import l2_bytes

    known = {
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cudnn": torch.backends.cudnn.version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpus": os.cpu_count(),
        "kernels": mlembed_kernels.__version__,
        "sources": sources(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        fields = "driver_version,power.limit,clocks.max.sm"
        limits = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
        known |= {
            "gpu": card.name,
            "multiprocessors": card.multi_processor_count,
            "l2_mib": l2_bytes(device) / 2**20,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "driver, power limit, top SM clock": limits,
        }
    return known


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Return the first line that a command prints, None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
