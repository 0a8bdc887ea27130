"""The machine and the packages that a measurement depends on."""

import contextlib
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("openvino", "nncf", "torch", "transformers", "diffusers", "optimum-intel")
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory in 10⁹ bytes, system, and the instructions that decide speed."""
    name, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": name,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "instructions": [flag for flag in _INSTRUCTIONS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    found = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}
