"""What the figures were measured on: cores, instructions, versions, load, and how fast memory is. Names nobody."""

from __future__ import annotations

import hashlib
import os
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import leaves_no_team, seconds

_PACKAGES = ("torch", "transformers", "peft", "numpy", "xllamacpp")
_INSTRUCTIONS = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "neon",
    "sve",
    "bf16",
)
_PROBE_TURNS = 5
_ROOT = Path(__file__).resolve().parent.parent


def versions(*packages: str) -> dict[str, str]:
    """Versions of what the figures depend on, the engine's by default; a package that is not here is left out."""
    found = {}
    for name in packages or _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_hash() -> str:
    """Of the model's code and of the benchmarks: figures of other code are not taken for this code's."""
    digest = hashlib.sha256()
    for path in sorted([*_ROOT.glob("hhh_router/model/*.py"), *_ROOT.glob("benchmarks/*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def load_average() -> float | None:
    """Processes that wanted a core over the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def facts(device: str) -> dict[str, Any]:
    """Cores, instructions and versions."""
    capabilities = torch.cpu.get_capabilities()
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "cpu": capabilities.get("cpu_name", capabilities.get("architecture")),
        "instructions": {name: bool(capabilities[name]) for name in _INSTRUCTIONS if name in capabilities},
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


@leaves_no_team
def bandwidth_bytes_s(probe_bytes: int) -> float:
    """How fast memory is read, in bytes/s: the better of summing and of copying a block far larger than the caches.

    A copy counts its block twice, once read and once written. Both use all of torch's threads.
    """
    block = torch.ones(probe_bytes // 4, dtype=torch.float32)
    other = torch.empty_like(block)
    summed = [probe_bytes / seconds(block.sum) for _ in range(_PROBE_TURNS)]
    copied = [2 * probe_bytes / seconds(lambda: other.copy_(block)) for _ in range(_PROBE_TURNS)]
    return max(statistics.median(summed), statistics.median(copied))
