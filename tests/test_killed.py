"""The power goes: whenever conversion or optimisation dies, nothing finished is lost.

A warm process has the package imported and forks a child for each run, which is killed by SIGKILL
just before one of the operations that change what is on the disk.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ov_pixart.checkpoint import COMPONENTS, check_openvino_folder, read_model_index
from ov_pixart.storage import RECORDS
from tests.support.refused import refused

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process with threads"),
]
KILLS = 6  # spread over a whole run

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
            cwd=Path(__file__).parents[1],
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


def finished_components(folder: Path) -> dict[str, tuple[int, int]]:
    """Component → inode and time of its weights, for those that are in place."""
    found = {}
    for name in COMPONENTS:
        if (folder / name).is_dir():
            assert (folder / name / "openvino_model.xml").is_file()  # whole, or not there
            status = (folder / name / "openvino_model.bin").stat()
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def loads_or_names_the_call_that_finishes(folder: Path, call: str) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return  # killed before there was anything
    if (folder / "model_index.json").is_file():
        check_openvino_folder(folder)
        return
    call = call if finished_components(folder) else ""
    with refused(FileNotFoundError, "unfinished", f"{call}(", str(folder)):
        read_model_index(folder)


def drill(runner, call, source, reference, root, options) -> None:
    """Kill a call at operations all over a run, twice in a folder; then let it finish."""
    operations = runner.wait(runner.start(call, source, reference, **options)) - 100
    assert operations > 20
    for number in range(KILLS):
        at = number * operations // KILLS
        folder = root / f"{call}-{at}"
        finished = {}
        for die_before in (at, at // 2):
            child = runner.start(call, source, folder, die_before=die_before, **options)
            assert runner.wait(child) in (-signal.SIGKILL, 0)  # 0: little was left to do
            loads_or_names_the_call_that_finishes(folder, call)
            before, finished = finished, finished_components(folder)
            assert before.items() <= finished.items()  # what was finished stays as it is
        assert runner.wait(runner.start(call, source, folder, **options)) >= 100
        assert finished.items() <= finished_components(folder).items()
        assert_same_folders(folder, reference)
        shutil.rmtree(folder)


def assert_same_folders(folder: Path, reference: Path) -> None:
    """The same files, none half-written, none left over."""
    names = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (folder, reference)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.suffix in (".bin", ".json"):
            if name.name in RECORDS:
                continue
            assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    check_openvino_folder(folder)


def test_a_conversion_that_is_killed_goes_on_where_it_was(runner, checkpoint, tmp_path):
    options = {"weight_format": "fp32"}
    source, reference = checkpoint("alpha"), tmp_path / "reference"
    drill(runner, "convert_pipeline", source, reference, tmp_path, options)


def test_an_optimisation_that_is_killed_goes_on_where_it_was(runner, converted, tmp_path):
    options = {"preset": "int8-weights", "progress": False}
    source, reference = converted("alpha"), tmp_path / "reference"
    drill(runner, "optimize_pipeline", source, reference, tmp_path, options)


def test_two_processes_convert_into_the_same_folder_one_after_the_other(
    runner, checkpoint, tmp_path
):
    source, folder = checkpoint("alpha"), tmp_path / "ov"
    children = [
        runner.start("convert_pipeline", source, folder, weight_format="fp32") for _ in range(2)
    ]
    operations = sorted(runner.wait(child) - 100 for child in children)
    assert operations[0] > 0
    # the second found three components done; writing one takes at least eight calls to the disk
    assert operations[1] - operations[0] >= 3 * 8
    check_openvino_folder(folder)
    assert not list(folder.rglob(".partial-*"))
