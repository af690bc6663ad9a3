"""What this machine is, in words for a report."""

import os
import platform
from functools import cache
from pathlib import Path

import torch


@cache
def core_ids() -> list[int]:
    """The cores that this process may use, as when first asked: torchrun's ranks are pinned to some of them later."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(core_ids())


def hardware(device: str) -> str:
    """The GPUs, or the processor and its cores, e.g. "AMD EPYC, 2 cores"."""
    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{_processor()}, {usable_cores()} cores"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
