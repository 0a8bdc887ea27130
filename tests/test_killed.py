"""The power goes: whenever conversion or optimisation dies, nothing finished is lost.

A warm process has the helper imported and forks a child for each run, which is killed by SIGKILL:
at random moments, and just before one of the calls that change what is on the disk.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ov_pixart_helper as helper

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process with threads")

# Reads jobs, one a line, forks a child for each and answers with its id; "wait" waits for one.
SERVER = """
import itertools, json, os, signal, sys
import ov_pixart_helper as helper

def die_before(number):
    calls = itertools.count()
    for name in ("replace", "unlink", "rename", "fsync", "mkdir", "rmdir"):
        def counted(*args, _call=getattr(os, name), **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return _call(*args, **kwargs)
        setattr(os, name, counted)
    return calls

answer = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.dup2(1, 2)
answer.write("ready\\n")
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        answer.write(f"{os.waitstatus_to_exitcode(os.waitpid(job['wait'], 0)[1])}\\n")
        continue
    child = os.fork()
    if not child:
        try:
            calls = die_before(job["die_before"])
            getattr(helper, job["call"])(*job["args"], **job["options"])
            os._exit(0 if job["die_before"] is not None else 100 + min(next(calls), 155))
        except BaseException:
            os._exit(1)
    answer.write(f"{child}\\n")
"""


class Runner:
    """Runs the helper's functions in processes that may be killed."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(helper.__file__).parent,
            text=True,
            bufsize=1,
        )
        assert self.server.stdout.readline() == "ready\n"

    def start(self, call, *args, die_before=None, **options) -> int:
        args = [str(arg) for arg in args]
        job = {"call": call, "args": args, "options": options, "die_before": die_before}
        return self._ask(job)

    def wait(self, child: int) -> int:
        """The exit code: negative if killed, 100 + number of calls to the disk if all went well."""
        return self._ask({"wait": child})

    def _ask(self, job) -> int:
        self.server.stdin.write(json.dumps(job) + "\n")
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    runner.server.stdin.close()
    runner.server.wait()


def finished_models(folder: Path) -> dict[str, tuple[int, int]]:
    """Model → inode and time of its weights, for those whose graph is in place."""
    found = {}
    for name in helper.PARTS:
        if (folder / name / "openvino_model.xml").is_file():
            status = (folder / name / "openvino_model.bin").stat()
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def loads_or_says_how_to_finish(folder: Path, call: str) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return  # killed before there was anything
    if (folder / "model_index.json").is_file():
        helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)
        return
    with pytest.raises(FileNotFoundError, match="unfinished") as caught:
        helper.OVPixArtAlphaPipeline.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{call}(" in message or not (folder / ".unfinished").is_file()
    assert str(folder) in message


def drill(runner, call, source, reference, root, *, seed, options):
    """Kill a call several times in the same folder, let it finish, and look what was kept."""
    chance = random.Random(seed)
    start = time.monotonic()
    operations = runner.wait(runner.start(call, source, reference, **options)) - 100
    duration = time.monotonic() - start
    assert operations > 20
    kills = 0
    for attempt in itertools.count():
        folder = root / f"{call}-{attempt}"
        for by_time in (True, False, False):
            before = finished_models(folder) if folder.is_dir() else {}
            at = None if by_time else chance.randrange(operations)
            child = runner.start(call, source, folder, die_before=at, **options)
            if by_time:
                time.sleep(chance.uniform(0, duration))
                os.kill(child, signal.SIGKILL)
            kills += runner.wait(child) == -signal.SIGKILL
            loads_or_says_how_to_finish(folder, call)
            after = finished_models(folder)
            assert before.items() <= after.items()  # what was finished stays as it is
        assert runner.wait(runner.start(call, source, folder, **options)) >= 100
        assert after.items() <= finished_models(folder).items()
        assert_same_folders(folder, reference)
        shutil.rmtree(folder)
        if kills >= 11:
            return


def assert_same_folders(folder: Path, reference: Path) -> None:
    """The same files, none half-written, none left over."""
    names = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (folder, reference)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.suffix in (".bin", ".json"):
            if name.name in ("conversion.json", "optimization.json"):
                continue
            assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


def test_a_conversion_that_is_killed_goes_on_where_it_was(runner, checkpoint, tmp_path):
    drill(
        runner,
        "convert_pipeline",
        checkpoint("alpha"),
        tmp_path / "reference",
        tmp_path,
        seed=1,
        options={"weight_format": "fp32"},
    )


def test_an_optimisation_that_is_killed_goes_on_where_it_was(
    runner, converted, tmp_path, tmp_path_factory
):
    drill(
        runner,
        "optimize_pipeline",
        converted("alpha"),
        # elsewhere: models of a neighbouring folder would be copied
        tmp_path_factory.mktemp("reference") / "int8-weights",
        tmp_path,
        seed=2,
        options={"preset": "int8-weights", "progress": False},
    )


def test_two_processes_convert_into_the_same_folder_one_after_the_other(
    runner, checkpoint, tmp_path
):
    source, folder = checkpoint("alpha"), tmp_path / "ov"
    children = [
        runner.start("convert_pipeline", source, folder, weight_format="fp32") for _ in range(2)
    ]
    operations = sorted(runner.wait(child) - 100 for child in children)
    assert operations[0] > 0
    assert operations[0] < operations[1] / 2  # the second found everything done
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)
    assert not list(folder.rglob(".partial-*"))
