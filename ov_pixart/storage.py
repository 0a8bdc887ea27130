"""Output folders: locked, staged and recorded, so that nothing half-written is ever loaded.

Beside each component lies a record: how it was made, and size and SHA-256 of every file. Loading
compares sizes; a finished component that is kept instead of made again is hashed as well, which
takes tens of seconds for T5-XXL.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

CONVERSION, OPTIMIZATION = RECORDS = ("conversion.json", "optimization.json")
LOCK = ".lock"


# ---- write --------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Lock an output folder; a second process waits. The lock ends with its process.

    Raises OSError where the folder cannot be written.
    """
    with explain_write_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / LOCK)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            tqdm.write(f"Waiting for another process that writes to {str(output_dir)!r} …")
            held = lock.acquire()
        with held:
            yield


@contextlib.contextmanager
def staged(output_dir: Path) -> Iterator[Path]:
    """Write into a temporary folder that replaces `output_dir` when all of it is on disk.

    A process that is killed leaves the old folder, the new one or none; its temporary folder is
    removed by the next call. Raises OSError where it cannot be written.
    """
    output_dir = output_dir.resolve()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir.parent)
    with tempfile.TemporaryDirectory(
        prefix=f".partial-{os.getpid()}-", dir=output_dir.parent, ignore_cleanup_errors=True
    ) as temporary:
        staging = Path(temporary) / output_dir.name
        staging.mkdir()
        yield staging
        for path in (*staging.rglob("*"), staging):
            flush(path)
        old = Path(temporary) / f"{output_dir.name}.old"
        if output_dir.is_dir():  # renamed, not removed: it is there whole, or gone
            os.rename(output_dir, old)
        try:
            os.rename(staging, output_dir)
        except OSError:
            if old.is_dir():
                os.rename(old, output_dir)
            raise
        flush(output_dir.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that no longer exist."""
    for path in folder.glob(".partial-*-*"):
        owner = path.name.split("-")[1]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk: power may fail at any time."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and writes their lists by itself
    # only Windows needs write access, which files copied from a read-only checkpoint lack
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def staged_file(file: Path) -> Iterator[Path]:
    """A temporary path beside `file`, which it replaces when all of it is on disk."""
    partial = file.with_name(f".partial-{os.getpid()}-{file.name}")
    try:
        yield partial
        flush(partial)
        os.replace(partial, file)
        flush(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path, *, link: bool) -> None:
    """Make `target` a copy of a file; with `link`, a hard link where the file system has them."""
    source = source.resolve()  # in the hub's cache, files are symbolic links
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def write_json(content: Any, file: Path) -> None:
    """Write all of a JSON file or nothing; raises OSError where it cannot be written."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with staged_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


# ---- records ------------------------------------------------------------------------------------


def write_record(record: dict[str, Any], file: Path) -> None:
    """Record how the component in this folder was made, and size and hash of its files."""
    files = {
        other.name: {"size": other.stat().st_size, "sha256": sha256(other)}
        for other in sorted(file.parent.iterdir())
    }
    file.write_text(json.dumps({**record, "files": files}, indent=1), encoding="utf-8")


def read_record(file: Path) -> dict[str, Any]:
    """Read a record; `{}` if it is missing or damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        complete = all({"size", "sha256"} <= noted.keys() for noted in record["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return record if complete else {}


def find_damage(folder: Path, record: dict[str, Any], *, hashed: bool = False) -> Path | None:
    """The first file that differs from its record in size or, if `hashed`, in content."""
    for name, noted in record.get("files", {}).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != noted["size"]:
            return file
        if hashed and sha256(file) != noted["sha256"]:
            return file
    return None


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def fingerprint(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of files by name: enough to notice that a model was replaced."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


# ---- refuse -------------------------------------------------------------------------------------

_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextlib.contextmanager
def explain_write_errors(output_dir: Path) -> Iterator[None]:
    """Add the remedy to an error of writing into `output_dir`."""
    try:
        yield
    except OSError as error:
        output = output_dir.resolve()
        path = Path(error.filename or output).resolve()
        # the folder, one above it that cannot be made, or what `staged` has put beside it
        partial = path.is_relative_to(output.parent) and f".partial-{os.getpid()}-" in str(path)
        ours = partial or path.is_relative_to(output) or output.is_relative_to(path)
        if error.errno not in _WRITE_ERRORS or not ours:
            raise
        raise type(error)(
            f"output_dir={str(output_dir)!r} cannot be written ({error.strerror}): make room "
            "there, or name a folder that you may write to, and call again."
        ) from None


def check_disk(size: float, output_dir: Path) -> None:
    """Raise OSError if the disk of `output_dir` has less than `size` bytes free."""
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    total, _, free = shutil.disk_usage(existing)
    if total and size > free:  # /sys and the like report no size; writing there fails anyway
        raise OSError(
            f"output_dir={str(output_dir)!r} needs {size / 1e9:.1f} GB of disk, and "
            f"{free / 1e9:.1f} GB are free: make room there, or name another folder."
        )


def check_output(output_dir: Path, sources: Iterable[Path], components: Iterable[str]) -> None:
    """Raise ValueError where `output_dir` is a file, or would overwrite one of its sources."""
    if output_dir.is_file():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file: name a folder.")
    written = [output_dir.resolve(), *(output_dir.resolve() / name for name in components)]
    for source in sorted(sources):  # a whole checkpoint comes before its folders
        if any(source.resolve() in (folder, *folder.parents) for folder in written):
            place = "is" if written[0] == source.resolve() else "lies in"
            raise ValueError(
                f"output_dir={str(output_dir)!r} {place} the source folder {str(source)!r}: "
                "choose another."
            )
