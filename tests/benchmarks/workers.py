"""Processes of their own: for each engine, so that its memory can be told, and for preparations.

What dies for want of memory dies alone, and its end is told in one line.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

from ov_pixart_helper import _no_main_module


class WorkerError(RuntimeError):
    """What went wrong in another process, in one line."""


class Worker:
    """The near end of a process that calls functions for us."""

    def __init__(self, process: Any, connection: Any):
        self.process, self.connection = process, connection

    def call(self, function: Callable, *args: Any) -> Any:
        """Return what `function(*args)` returns over there, or raise WorkerError.

        The first call of a class makes the object that strings call methods of:
        `call(Runner, …)`, then `call("run", …)`.
        """
        try:
            self.connection.send((function, args))
            while not self.connection.poll(0.2):
                if not self.process.is_alive() and not self.connection.poll():
                    raise EOFError
            failed, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            raise WorkerError(
                f"its process died (exit code {self.process.exitcode}), perhaps for want of memory"
            ) from None
        if failed:
            raise WorkerError(answer)
        return answer


@contextlib.contextmanager
def worker() -> Iterator[Worker]:
    """Start a fresh process, and end it afterwards."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(far,), daemon=False)
    with _no_main_module():
        process.start()
    far.close()
    try:
        yield Worker(process, near)
        with contextlib.suppress(OSError):
            near.send(None)
        process.join(20)
    finally:
        process.kill()
        process.join()
        near.close()


def call_in_process(function: Callable, *args: Any) -> Any:
    """`function(*args)`, in a process that takes its memory with it when it ends."""
    with worker() as one:
        return one.call(function, *args)


def _serve(connection: Any) -> None:
    """The far end: do what is asked for until None comes. Failures go back as one line."""
    subject = None
    with (
        contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        import ov_pixart_helper as helper

        with helper._quiet():
            while (task := connection.recv()) is not None:
                function, args = task
                try:
                    if isinstance(function, str):
                        answer = getattr(subject, function)(*args)
                    elif isinstance(function, type):
                        subject, answer = function(*args), None
                    else:
                        answer = function(*args)
                    connection.send((False, answer))
                except Exception as error:
                    reason = (str(error).strip().splitlines() or [""])[0][:200]
                    connection.send((True, f"{type(error).__name__}: {reason}"))
