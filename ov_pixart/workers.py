"""Run functions in separate Python processes: memory is measured per process, and freed with it.

    with Workers() as workers:
        workers.call("fp16", Timer, folder)           # makes an object in a process called "fp16"
        workers.call("fp16", "run", prompt, seed)     # calls a method of that object
        workers.call("fp16", os.getpid)               # or any function

The processes are children of `python -m ov_pixart.workers`, so that none runs the caller's script
or notebook again. Requests and answers are pickled between our own processes only.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class WorkerError(RuntimeError):
    """A failure in another process, in one line."""


class WorkerDied(WorkerError):
    """The other process ended by itself or was killed, perhaps because memory ran out."""


class Workers:
    """A group of processes, ended together when the `with` block ends."""

    def __enter__(self) -> "Workers":
        self._server = subprocess.Popen(
            [sys.executable, "-m", "ov_pixart.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the others
        )
        return self

    def call(self, worker: str, function: Callable | str, *args: Any, **kwargs: Any) -> Any:
        """Call a function in the process `worker`, which is started for its first call.

        Calling a class makes the object whose methods later calls name as strings. Raises
        WorkerError if the call fails or the process dies.
        """
        return self._exchange(worker, pickle.dumps((function, args, kwargs)))

    def stop(self, worker: str) -> None:
        """End one process; does nothing if it is not running."""
        with contextlib.suppress(WorkerError):
            self._exchange(worker, None)

    def _exchange(self, worker: str, task: bytes | None) -> Any:
        try:
            pickle.dump((worker, task), self._server.stdin)
            self._server.stdin.flush()
            answer = pickle.load(self._server.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise WorkerDied("the server of worker processes died") from None
        if isinstance(answer, WorkerError):
            raise answer
        return answer

    def __exit__(self, *exception: Any) -> None:
        with contextlib.suppress(OSError):
            self._server.stdin.close()  # the server ends its children and itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(1 if any(exception) else 10)
        if hasattr(os, "killpg"):  # not on Windows
            with contextlib.suppress(OSError):  # gone already; macOS may refuse
                os.killpg(self._server.pid, signal.SIGKILL)
        self._server.kill()
        self._server.wait()
        self._server.stdout.close()


def call_in_process(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function in a process of its own, which frees its memory; raises WorkerError."""
    with Workers() as workers:
        return workers.call("single", function, *args, **kwargs)


# ---- the other side -----------------------------------------------------------------------------


def serve_requests() -> None:
    """Pass requests from stdin to worker processes and their answers to stdout, until stdin ends.

    On Linux workers are forked from here, and share the 0.5 GB of libraries that the first request
    imported.
    """
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)  # or a library's print would end up among the answers
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(nowhere, 0)
    forks = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forks else "spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    with contextlib.suppress(EOFError):
        while True:
            name, request = pickle.load(requests)
            try:
                task = None if request is None else pickle.loads(request)
            except Exception as error:  # such as a function of the caller's `__main__`
                pickle.dump(_failure(error), answers)
                answers.flush()
                continue
            if name not in workers and task is not None:
                near, far = context.Pipe()
                others = (connection for _, connection in workers.values())
                inherited = (requests, answers, near, *others) if forks else ()
                process = context.Process(target=_work, args=(far, *inherited), daemon=True)
                process.start()
                far.close()
                workers[name] = process, near
            answer = _ask(*workers[name], task) if name in workers else None
            if task is None or not workers[name][0].is_alive():
                workers.pop(name, None)
            pickle.dump(answer, answers)
            answers.flush()


def _ask(process: Any, connection: Connection, task: Any) -> Any:
    try:
        connection.send(task)
        answer = connection.recv()
    except (EOFError, OSError):  # a closed pipe raises either
        process.join(5)
        return WorkerDied(f"its process died (exit code {process.exitcode})")
    if task is None:
        process.join(10)
    return answer


def _work(connection: Connection, *inherited: Any) -> None:
    """Do tasks until None comes, or the server ends. Failures are returned as one line.

    `inherited`: pipes of the server, closed here: a pipe does not end while any process holds it.
    """
    for pipe in inherited:
        pipe.close()
    subject = None
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while (task := connection.recv()) is not None:
            function, args, kwargs = task
            try:
                if isinstance(function, str):
                    answer = getattr(subject, function)(*args, **kwargs)
                elif isinstance(function, type):
                    subject, answer = function(*args, **kwargs), None
                else:
                    answer = function(*args, **kwargs)
                connection.send(answer)
            except Exception as error:
                connection.send(_failure(error))
        connection.send(None)


def _failure(error: Exception) -> WorkerError:
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return WorkerError(f"{type(error).__name__}: {reason}")


if __name__ == "__main__":
    # this module once more, by its name: the caller could not unpickle a class of `__main__`
    from ov_pixart.workers import serve_requests

    serve_requests()
