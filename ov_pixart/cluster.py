"""Ray: on this machine, quiet and without a network, or on a cluster that the caller names.

Ray is imported when it is needed. Its environment variables are read while it is imported.
"""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's makers
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: loopback instead of the network
    "RAY_enable_metrics_collection": "0",  # without the dashboard, exporters only log failures
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default from the next release, else a warning
    "RAY_enable_worker_prestart": "0",  # actors are all that is needed, and starting takes time
    "RAY_prestart_worker_first_driver": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else a line per actor: whether it can be restarted
}
OBJECT_STORE = 200 * 2**20  # bytes: rows without images, which are written where they are made
_ATTEMPTS = 3


@contextlib.contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[ModuleType]:
    """The `ray` module, connected; at the end, disconnected, and what was started here is ended.

    `address`: of an existing cluster, as `ray.init` takes it; None starts Ray on this machine with
    `cpus` processors (all of them by default), reachable from this machine only. Where the caller
    is connected to Ray already, that connection is used and stays.

    Raises ModuleNotFoundError without Ray, RuntimeError where it cannot start or connect.
    """
    with quick_start() if address is None else contextlib.nullcontext():
        try:
            import ray
            import ray.data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"several actors need Ray ({error}): pip install ray, or leave `actors` out."
            ) from None
        for name in ("ray", "ray.data"):  # whole tracebacks of what is handled here
            logging.getLogger(name).setLevel(logging.CRITICAL)
        ours = not ray.is_initialized()
        try:
            if ours:
                _connect(ray, address, cpus)
            yield ray
        finally:
            if ours:
                ray.shutdown()


def _connect(ray: ModuleType, address: str | None, cpus: int | None) -> None:
    """Start Ray, or connect to a cluster. A busy machine may be too slow for Ray at first."""
    options = {
        "address": "local",
        "num_cpus": cpus,
        "num_gpus": 0,
        "object_store_memory": OBJECT_STORE,
        "include_dashboard": False,
    }
    if address is not None:
        options = {"address": address}
    for attempt in range(_ATTEMPTS):
        try:
            ray.init(**options, logging_level=logging.CRITICAL, log_to_driver=False)
            return
        except Exception as error:  # Ray raises plain Exception where a process does not start
            ray.shutdown()
            if address is not None or attempt == _ATTEMPTS - 1:
                action = "start" if address is None else f"connect to {address!r}"
                raise RuntimeError(f"Ray could not {action}: {error}") from error


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """Set what a quiet, local Ray needs, and let its processes start in a third of the time.

    Ray starts six Python processes at once and gives up where they need more than 15 s. Each
    imports jsonschema, which compiles a grammar of web addresses for most of that time, if the
    package `rfc3987_syntax`, which came with JupyterLab, can be imported: in them it cannot.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="ov-pixart-") as folder:
        (Path(folder) / "rfc3987_syntax.py").write_text("raise ImportError\n")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, before)))
        try:
            yield
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before


def assigned_threads() -> int | None:
    """The processors that Ray has assigned to the actor in which this runs; None outside Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    cpus = None
    with contextlib.suppress(AssertionError):  # this is the process that directs the actors
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU")
    return max(1, int(cpus)) if cpus else None
