"""Runs the notebook as `make run` does, from nothing, and says what time and memory that takes.

python tests/benchmarks/notebook.py

Memory is the most that all its processes held at a time. On Linux, what several of them share
(libraries, mostly) counts once (proportional set size); elsewhere it counts in each of them.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LEFT_BEHIND = (".git", ".venv", "build", "models")  # converted models would shorten the run


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for item in ROOT.iterdir():
            if item.name not in LEFT_BEHIND:
                (Path(folder) / item.name).symlink_to(item)
        (Path(folder) / "pixart.ipynb").unlink()
        (Path(folder) / "pixart.ipynb").write_bytes((ROOT / "pixart.ipynb").read_bytes())
        command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
        command += ["--KernelManager.transport=ipc", "--log-level=WARN", "--output-dir", "build"]
        start, peak = time.monotonic(), 0.0
        process = subprocess.Popen([*command, "pixart.ipynb"], cwd=folder)
        while process.poll() is None:
            peak = max(peak, memory_gb(process.pid))
            time.sleep(0.5)
        minutes = (time.monotonic() - start) / 60
    if process.returncode:
        sys.exit(process.returncode)
    print(f"The notebook took {minutes:.1f} minutes and at most {peak:.1f} GB of memory.")


def memory_gb(pid: int) -> float:
    """What a process and all that it has started hold now, in 10⁹ bytes."""
    total = 0
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for member in family:
        try:
            memory = member.memory_full_info()
        except psutil.Error:  # has just ended, or is not ours to look at
            continue
        total += getattr(memory, "pss", memory.rss)
    return total / 1e9


if __name__ == "__main__":
    main()
