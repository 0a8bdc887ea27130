"""Worker processes: calls, failures, deaths, and nothing that outlives the `with` block."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ov_pixart.workers import WorkerDied, WorkerError, Workers, call_in_process


class Counter:
    """An object that lives in a worker."""

    def __init__(self, start: int, *, step: int = 1):
        self.count, self.step = start, step

    def increase(self) -> int:
        self.count += self.step
        return self.count


def fail() -> None:
    raise ValueError("bad luck\nand a second line")


def fail_in_silence() -> None:
    raise ValueError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def print_much() -> str:
    print("x" * 100_000)
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    return "answer"


def assert_all_ended(processes: list[psutil.Process]) -> None:
    """Wait until none of them runs; a zombie that nobody collects has ended, too."""
    for _ in range(1200):
        if not any(map(is_alive, processes)):
            return
        psutil.wait_procs(processes, timeout=0.1)
    raise AssertionError([process for process in processes if is_alive(process)])


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- calls --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers():
    with Workers() as workers:
        yield workers


def test_each_worker_is_a_process_of_its_own(workers):
    pids = [workers.call(name, os.getpid) for name in ("a", "b", "a")]
    assert pids[0] == pids[2]
    assert len({*pids, os.getpid()}) == 3


def test_a_class_makes_the_object_that_strings_call(workers):
    workers.call("one", Counter, 10, step=5)
    workers.call("other", Counter, 0)
    assert [workers.call("one", "increase") for _ in range(2)] == [15, 20]
    assert workers.call("other", "increase") == 1
    workers.call("other", Counter, 100)  # takes the place of the first
    assert workers.call("other", "increase") == 101


def test_prints_do_not_get_among_the_answers(workers):
    assert workers.call("a", print_much) == "answer"


def test_a_failure_arrives_as_one_line_and_the_worker_lives_on(workers):
    pid = workers.call("a", os.getpid)
    with pytest.raises(WorkerError, match=r"^ValueError: bad luck$") as caught:
        workers.call("a", fail)
    assert not isinstance(caught.value, WorkerDied)
    with pytest.raises(WorkerError, match=r"^ValueError: $"):
        workers.call("a", fail_in_silence)
    with pytest.raises(WorkerError, match=r"AttributeError.*'nothing'"):
        workers.call("one", "nothing")
    assert workers.call("a", os.getpid) == pid


def test_a_long_reason_is_cut(workers):
    with pytest.raises(WorkerError) as caught:
        workers.call("a", int, "x" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("death", "code"), [(die, -9), (leave, 3)])
def test_a_worker_that_dies_is_reported_and_started_anew(workers, death, code):
    pid, neighbour = workers.call("mortal", os.getpid), workers.call("a", os.getpid)
    with pytest.raises(WorkerDied, match=rf"its process died \(exit code {code}\)"):
        workers.call("mortal", death)
    assert workers.call("mortal", os.getpid) != pid
    assert workers.call("a", os.getpid) == neighbour


def test_a_worker_killed_between_two_calls_is_reported(workers):
    process = psutil.Process(workers.call("mortal", os.getpid))
    process.kill()
    with pytest.raises(WorkerDied, match="exit code -9"):
        workers.call("mortal", os.getpid)


def test_stop_ends_one_worker(workers):
    stopped = psutil.Process(workers.call("brief", os.getpid))
    neighbour = workers.call("a", os.getpid)
    workers.stop("brief")
    workers.stop("never started")
    assert_all_ended([stopped])
    assert workers.call("a", os.getpid) == neighbour


@pytest.mark.parametrize("unpicklable", [lambda: 0, type("Local", (), {})()])
def test_what_cannot_be_pickled_is_an_error_and_the_workers_live_on(workers, unpicklable):
    pid = workers.call("a", os.getpid)
    with pytest.raises(Exception, match=r"pickle|local"):
        workers.call("a", print, unpicklable)
    assert workers.call("a", os.getpid) == pid


# ---- the end ------------------------------------------------------------------------------------


def family(workers: Workers) -> list[psutil.Process]:
    """The server and two workers."""
    members = [psutil.Process(workers.call(name, os.getpid)) for name in ("a", "b")]
    return [members[0].parent(), *members]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_outlives_the_block(error):
    try:
        with Workers() as workers:
            processes = family(workers)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert_all_ended(processes)


def test_a_block_without_calls_ends():
    with Workers():
        pass


def test_a_server_that_dies_is_reported():
    with Workers() as workers:
        processes = family(workers)
        processes[0].kill()
        processes[0].wait()
        with pytest.raises(WorkerDied, match="server"):
            workers.call("a", os.getpid)
    assert_all_ended(processes)


INTERRUPTED = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from ov_pixart.workers import Workers

with Workers() as workers:
    print(*(workers.call(name, __import__("os").getpid) for name in "ab"), flush=True)
    workers.call("a", time.sleep, 1000)
"""


def run_script(folder: Path, text: str) -> subprocess.Popen:
    """Start a script without a main guard, with the product on its path, as a notebook would."""
    script = folder / "script.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_caller_that_is_stopped_in_a_call(tmp_path, sent):
    caller = run_script(tmp_path, INTERRUPTED)
    workers = [psutil.Process(int(pid)) for pid in caller.stdout.readline().split()]
    server = workers[0].parent()
    caller.send_signal(sent)
    _, errors = caller.communicate(timeout=60)
    if sent == signal.SIGINT:
        assert errors.strip().endswith("KeyboardInterrupt")
        assert_all_ended([server, *workers])
    else:  # nobody is left to end them but they themselves
        workers[0].kill()  # as if its call was over
        assert_all_ended([server, *workers])


def test_a_script_without_a_main_guard_is_run_once(tmp_path):
    caller = run_script(
        tmp_path,
        "print('started')\n"
        "import math\n"
        "from ov_pixart.workers import call_in_process\n"
        "print(call_in_process(math.sqrt, 4))\n",
    )
    output, errors = caller.communicate(timeout=120)
    assert (output.split(), errors) == (["started", "2.0"], "")


def test_call_in_process_takes_its_memory_with_it():
    pid = call_in_process(os.getpid)
    assert pid != os.getpid()
    assert not psutil.pid_exists(pid)
    with pytest.raises(WorkerDied, match="exit code -9"):
        call_in_process(die)
