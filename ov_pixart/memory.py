"""Memory of this process: give it back, measure it, and group what fits into it."""

import contextlib
import ctypes
import gc
import re
import sys
from pathlib import Path

import psutil


def release_memory() -> None:
    """Collect garbage and return free heap to the system, after a model was dropped."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory_mb() -> float:
    """The most memory that this process has held, in 10⁶ bytes, Python and libraries included.

    Pages of mapped weight files count, though the system takes them back when memory is short.
    """
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; `getrusage` there counts what the parent had before `exec`
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak.group(1)) * 1024 / 1e6
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e6
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def memory_gb(pid: int) -> float:
    """Memory that a process and all its descendants hold now, in 10⁹ bytes.

    On Linux, pages that they share count once. What ends meanwhile counts as nothing.
    """
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # has just ended, or is another user's
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
    return total / 1e9


def group_by_memory(needs: dict[str, float], limit: float) -> list[list[str]]:
    """Group labels, in their order, so that each group's needs stay within `limit`.

    A label that exceeds the limit by itself gets a group of its own.
    """
    groups: list[list[str]] = []
    load = 0.0
    for label, need in needs.items():
        if not groups or load + need > limit:
            groups.append([])
            load = 0.0
        groups[-1].append(label)
        load += need
    return groups
