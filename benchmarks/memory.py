"""The memory that converting, calibrating and generating need, at published size, random weights.

`python -m benchmarks memory` finds by bisection, for each task, the smallest limit that it runs
within when the kernel enforces that limit; it takes hours and 60 GB of disk for all tasks. Where no
limit can be enforced, it prints the peak of each process instead, which counts the clean pages of
mapped files, too. Found limits are kept in `build/memory.json`, and are not measured again.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks import checkpoints
from benchmarks.cases import FULL, T5_XXL, XL_512, XL_1024
from benchmarks.limits import Controller, find_controller, forget_files, run_in_group
from benchmarks.machine import describe_machine, versions
from ov_pixart.checkpoint import COMPONENTS, MODEL_INDEX
from ov_pixart.checks import read_json
from ov_pixart.convert import convert_pipeline
from ov_pixart.cost import conversion_cost
from ov_pixart.storage import write_json
from ov_pixart.workers import call_in_process

BUILD = checkpoints.ROOT / "build"
STEP_GB = 0.5
_PATIENCE = 3  # a limit that makes a task this many times slower is too small


@dataclass(frozen=True)
class MemoryTask:
    """One line of the report: a task of `probes`, and bounds of the search in 10⁹ bytes."""

    name: str
    task: str
    arguments: dict[str, Any]
    lower: float
    upper: float
    reads: list[Path] = field(default_factory=list)  # folders whose files the task reads
    announced_gb: float | None = None  # by `convert_pipeline`, before it converts


@dataclass(frozen=True)
class Probe:
    """One process that ran to its end."""

    seconds: dict[str, float]
    peak_gb: float


# ---- tasks --------------------------------------------------------------------------------------

_CONVERSIONS = {  # name → checkpoint, component, weight_format, bounds in 10⁹ bytes
    "T5-XXL, bf16 → int8": (T5_XXL, "text_encoder", "int8", 5.0, 5.5),
    "DiT XL, bf16 → fp16": (XL_1024, "transformer", "fp16", 0.5, 2.0),
    "DiT XL, bf16 → int8": (XL_1024, "transformer", "int8", 1.0, 2.0),
    "T5-XXL, bf16 → int4": (T5_XXL, "text_encoder", "int4", 4.5, 5.5),
    "T5-XXL, bf16 → fp16": (T5_XXL, "text_encoder", "fp16", 1.0, 2.0),
}
_IMAGES = {  # name → pixels, options of load_pipeline, bounds in 10⁹ bytes
    "512² image, INT8": (512, {}, 6.5, 7.0),
    "512² image, INT8, release_text_encoder": (512, {"release_text_encoder": True}, 6.0, 7.0),
    "1024² image, INT8": (1024, {}, 7.0, 8.0),
}
_CALIBRATION = "Calibrating DiT XL and VAE at 512²"
NAMES = (*_CONVERSIONS, *_IMAGES, _CALIBRATION)


def select(beginnings: str = "") -> list[str]:
    """Names of tasks that begin with one of `beginnings`, separated by semicolons; all by default.

    Raises ValueError for one that no name begins with.
    """
    wanted = [beginning.strip() for beginning in beginnings.split(";") if beginning.strip()]
    for beginning in wanted:
        if not any(name.startswith(beginning) for name in NAMES):
            known = "; ".join(NAMES)
            raise ValueError(f"--tasks {beginning!r} is unknown: use the beginning of {known}.")
    return [name for name in NAMES if not wanted or name.startswith(tuple(wanted))]


def prepare(root: Path, name: str) -> MemoryTask:
    """Build what a task reads, in processes of their own, and return the task."""
    if name in _CONVERSIONS:
        checkpoint, component, weight_format, *bounds = _CONVERSIONS[name]
        folder = _checkpoint(root, checkpoint)
        part = folder / COMPONENTS[component].folder
        arguments = {"folder": str(folder), "component": component, "weight_format": weight_format}
        arguments["output"] = str(root / "scratch")
        announced = round(conversion_cost(part, weight_format).memory / 1e9, 2)
        return MemoryTask(name, "convert", arguments, *bounds, [part], announced)
    if name in _IMAGES:
        pixels, options, *bounds = _IMAGES[name]
        folder = _int8_pipeline(root)
        arguments = {"folder": str(folder), "pixels": pixels, "options": options}
        return MemoryTask(name, "generate", arguments, *bounds, [folder])
    _checkpoint(root, XL_512)
    folder = _openvino(root, XL_512, "ov-fp16")
    arguments = {"folder": str(folder), "preset": "int8", "num_samples": FULL.num_samples}
    arguments["output"] = str(root / "scratch")
    return MemoryTask(name, "optimize", arguments, 8.5, 10.0, [folder])


def _checkpoint(root: Path, name: str) -> Path:
    if not checkpoints.has_checkpoint(root, name, FULL):
        call_in_process(checkpoints.build_checkpoint, root, name, FULL)
    return checkpoints.checkpoint_folder(root, name)


def _openvino(root: Path, name: str, engine: str) -> Path:
    if not checkpoints.has_openvino(root, name, engine):
        call_in_process(checkpoints.build_openvino, root, name, engine, FULL)
    return checkpoints.openvino_folder(root, name, engine)


def _int8_pipeline(root: Path) -> Path:
    """T5-XXL with INT8 weights, DiT XL and VAE decoder of the `int8` preset, few-step scheduler."""
    texts = root / "int8-t5"
    if not (texts / MODEL_INDEX).is_file():
        call_in_process(convert_pipeline, _checkpoint(root, T5_XXL), texts, weight_format="int8")
    for engine in ("ov-fp16", "ov-int8"):
        _checkpoint(root, XL_512)
        images = _openvino(root, XL_512, engine)
    parts = ("transformer", "vae_decoder")
    return checkpoints.join(root / "int8", texts, images, parts, "LCMScheduler")


# ---- bisection ----------------------------------------------------------------------------------


def find_limit(
    runs_within: Callable[[float], bool], lower: float, upper: float, step: float = STEP_GB
) -> tuple[float, float | None]:
    """The smallest limit on a grid of `step` that a task runs within, and the largest that fails.

    `runs_within(limit)` tries one limit. `lower` and `upper` are where the answer is expected; if
    `upper` fails, the search goes on above it. The second number is None if nothing failed. Raises
    MemoryError if the task fails at four times `upper`.
    """
    tried: dict[int, bool] = {}

    def runs(i: int) -> bool:
        if i not in tried:
            tried[i] = runs_within(i * step)
        return tried[i]

    low, high = math.ceil(lower / step) - 1, math.ceil(upper / step)
    largest = 4 * high
    while not runs(high):
        if high >= largest:
            raise MemoryError(f"it fails within {high * step:.1f} GB")
        low, high = high, min(2 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if runs(middle) else (middle, high)
    failed = [i for i, success in tried.items() if not success]
    return high * step, max(failed) * step if failed else None


def run_probe(
    task: MemoryTask, controller: Controller | None, limit_gb: float, timeout: float | None
) -> Probe | None:
    """Run a task once within a limit; None if the limit is too small for it.

    Raises RuntimeError where it fails for another reason.
    """
    forget_files(task.reads)
    command = [sys.executable, "-m", "benchmarks.probes", task.task, json.dumps(task.arguments)]
    try:
        if controller is None:
            done = run_in_group(command, None)
        else:
            with controller.group(round(limit_gb * 1e9)) as group:
                done = run_in_group(command, group, timeout)
    except subprocess.TimeoutExpired:
        return None  # it reads the same pages again and again
    if done.returncode == 0:
        return Probe(**json.loads(done.stdout.splitlines()[-1]))
    reason = (done.stderr.strip().splitlines() or [""])[-1]
    killed = done.returncode == -9  # SIGKILL, by which the kernel ends what exceeds its limit
    if killed or "MemoryError" in reason or "bad_alloc" in reason:
        return None
    raise RuntimeError(f"{task.name}: {reason}")


def measure(task: MemoryTask, controller: Controller | None) -> dict[str, Any]:
    """One line of the report: the limit found, or the peak alone where none can be enforced."""
    found: dict[str, Any] = {"case": task.name, "announced_gb": task.announced_gb}
    if controller is None:
        probe = run_probe(task, None, math.inf, None)
        if probe is None:
            raise RuntimeError(f"{task.name}: its process was killed")
        return found | _figures(probe)
    probes: dict[float, Probe] = {}

    def runs_within(limit: float) -> bool:
        free = psutil.virtual_memory().available / 1e9
        if limit > free:
            raise MemoryError(f"a limit of {limit:.1f} GB cannot be tried, {free:.1f} GB are free")
        timeout = None
        if probes:  # the first one is the largest
            timeout = 30 + _PATIENCE * sum(probes[max(probes)].seconds.values())
        probe = run_probe(task, controller, limit, timeout)
        tqdm.write(f"  {task.name}: {'runs' if probe else 'fails'} within {limit:.1f} GB")
        if probe:
            probes[limit] = probe
        return probe is not None

    limit, failed = find_limit(runs_within, task.lower, task.upper)
    return found | {"limit_gb": limit, "failed_gb": failed} | _figures(probes[limit])


def _figures(probe: Probe) -> dict[str, Any]:
    seconds = {name: round(value, 1) for name, value in probe.seconds.items()}
    return {"peak_gb": round(probe.peak_gb, 2), "seconds": seconds}


# ---- the whole run ------------------------------------------------------------------------------


def run(names: Iterable[str], *, fresh: bool = False, output: Path | None = None) -> dict[str, Any]:
    """Measure tasks that no earlier run has measured; return the report, and write it."""
    output = output or BUILD / "memory.json"
    root = BUILD / "bench" / FULL.name
    controller = find_controller()
    if controller is None:
        print("No memory limit can be enforced here: peaks are printed, mapped files included.")
    report = read_json(output) if output.is_file() and not fresh else {}
    if report.get("machine") != describe_machine() or report.get("enforced") != bool(controller):
        report = {"machine": describe_machine(), "enforced": bool(controller), "results": []}
    report["versions"] = versions()
    done = {line["case"] for line in report["results"]}
    for name in tqdm([name for name in names if name not in done], unit="task"):
        try:
            line = measure(prepare(root, name), controller)
        except (MemoryError, RuntimeError) as error:
            tqdm.write(f"{name}: skipped: {type(error).__name__}: {error}")
            continue
        finally:
            shutil.rmtree(root / "scratch", ignore_errors=True)
        report["results"].append(line)
        tqdm.write(text(line))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(report, output)
    return report


def text(line: dict[str, Any]) -> str:
    """One line of the report for the terminal."""
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in line["seconds"].items())
    if "limit_gb" not in line:
        return f"{line['case']:42} peak {line['peak_gb']:.2f} GB, no limit enforced; {seconds}"
    return (
        f"{line['case']:42} runs within {line['limit_gb']:.1f} GB "
        f"(reported peak {line['peak_gb']:.2f} GB); {seconds}"
    )
