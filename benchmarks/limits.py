"""Memory limits that the kernel enforces: control groups of Linux, version 1 or 2.

A limit counts everything that a process and its children hold: heap, and the pages of files that
they have read or written. The kernel takes back clean file pages where memory is short, so that
only the rest decides if a process runs within its limit.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PREFIX = "pixart-bench-"
# Joins the group, then becomes the real command: nothing is imported outside the group.
_JOIN = "import os, sys; open(sys.argv[1], 'w').write('0'); os.execv(sys.argv[2], sys.argv[2:])"


@dataclass(frozen=True)
class Controller:
    """The kernel's memory controller, as seen by this process."""

    parent: Path  # the group in which groups are made
    limit: str  # name of the file that holds the limit
    swap: tuple[tuple[str, int | None], ...]  # files that forbid swap, value (None: the limit)

    @contextlib.contextmanager
    def group(self, limit: int) -> Iterator[Path]:
        """A group whose processes get no more than `limit` bytes, and no swap.

        Raises OSError where the kernel or missing rights forbid it.
        """
        for left in self.parent.glob(f"{_PREFIX}*"):  # by a process that was killed
            if not psutil.pid_exists(int(left.name.removeprefix(_PREFIX).split("-")[0])):
                _remove_group(left)
        folder = self.parent / f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}"
        folder.mkdir()
        try:
            (folder / self.limit).write_text(str(limit))
            for name, value in self.swap:
                with contextlib.suppress(OSError):  # kernels without swap accounting have no file
                    (folder / name).write_text(str(limit if value is None else value))
            yield folder
        finally:
            _remove_group(folder)

    def works(self) -> bool:
        """Whether the kernel ends a process here that exceeds its limit."""
        if not (self.parent / "cgroup.procs").is_file():
            return False
        try:
            with self.group(100_000_000) as folder:
                command = [sys.executable, "-S", "-c", "print(len(bytearray(200_000_000)))"]
                done = run_in_group(command, folder)
                return done.returncode < 0 and not done.stdout
        except OSError:
            return False


_VERSION_1 = (
    "memory.limit_in_bytes",
    (("memory.memsw.limit_in_bytes", None), ("memory.swappiness", 0)),
)
_VERSION_2 = ("memory.max", (("memory.swap.max", 0),))


def find_controller(proc: Path = Path("/proc/self")) -> Controller | None:
    """The memory controller, if this process may make groups in it.

    `proc`: a folder with `cgroup` and `mountinfo`, as the kernel writes them.
    """
    return next((one for one in _candidates(proc) if one.works()), None)


def _candidates(proc: Path) -> Iterator[Controller]:
    """Version 1: a group in our own. Version 2: there, or beside it.

    Version 2 has no limits below a group that holds processes itself, as ours usually does.
    """
    with contextlib.suppress(OSError):
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
        for number, controllers, path in groups:
            if "memory" in controllers.split(","):
                for own in _folders(mounts, path, "cgroup"):
                    yield Controller(own, *_VERSION_1)
            elif number == "0":
                for own in _folders(mounts, path, "cgroup2"):
                    for parent in (own, own.parent):
                        with contextlib.suppress(OSError):
                            (parent / "cgroup.subtree_control").write_text("+memory")
                        yield Controller(parent, *_VERSION_2)


def _folders(mounts: list[list[str]], path: str, kind: str) -> Iterator[Path]:
    """The folder of a group under each mount of its hierarchy."""
    for mount in mounts:
        root, point = mount[3:5]
        file_system, _, options = mount[mount.index("-") + 1 :][:3]
        if file_system == kind and (kind == "cgroup2" or "memory" in options.split(",")):
            with contextlib.suppress(ValueError):
                yield Path(point) / Path(path).relative_to(root)


def run_in_group(
    command: Sequence[str], group: Path | None, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """Run a command in a group from its first instruction on, or without a limit (None).

    Raises subprocess.TimeoutExpired after `timeout` seconds; the process is killed then.
    """
    if group is not None:
        command = [sys.executable, "-S", "-c", _JOIN, str(group / "cgroup.procs"), *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def forget_files(folders: Sequence[Path]) -> None:
    """Drop files from the system's cache: pages that it holds already count in no new group."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _remove_group(folder: Path) -> None:
    """Remove a group as soon as the last of its processes is gone."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.05)
