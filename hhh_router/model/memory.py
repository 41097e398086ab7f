"""How much memory is left, so that a request is turned away before the system ends the process."""

from __future__ import annotations

from pathlib import Path

import torch

KEPT_BYTES = 256 << 20
"""What is left alone: activations of a prompt, and whoever else lives on the machine."""
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where nobody tells.

    For the CPU it is what Linux calls available, or what is left of a container's limit where that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [left for left in (_available(), _left_of_group()) if left is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _left_of_group() -> int | None:
    try:
        most = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return None if most == "max" else int(most) - used + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
