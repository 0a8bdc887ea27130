"""Seconds and peak memory of every engine at real size: `make bench`, `python -m benchmarks speed`.

Each engine runs in a process of its own; engines that fit into memory side by side take turns, so
that a slow minute of the machine hits all of them. Everything is kept under `build/bench/`: an
interrupted run goes on where it stopped. The report is `build/bench.json`, its plots lie beside it.
"""

import contextlib
import os
import shutil
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks import cases as plan
from benchmarks import checkpoints, report
from benchmarks.cases import CASES, FULL, OPENVINO, QUICK, Case, Scale
from benchmarks.engines import Runner
from benchmarks.layers import profile_step
from benchmarks.machine import describe_machine, versions
from ov_pixart.checks import read_json
from ov_pixart.memory import group_by_memory
from ov_pixart.storage import write_json
from ov_pixart.workers import WorkerError, Workers, call_in_process

BUILD = checkpoints.ROOT / "build"
_PROFILED = ("dit_step_512", "ov-int8")
_SIDE_BY_SIDE = 0.3  # of free memory, for the weights on disk of engines that take turns

Part = tuple[str, str | None]  # a checkpoint, and the engine of its IRs (None: random weights)


def run(cases: str = "", engines: str = "", *, quick: bool = False, fresh: bool = False) -> None:
    """Measure, write `build/bench.json` and print the table.

    `cases`, `engines`: names, separated by commas or blanks; all by default. `quick`: a few layers
    instead of the whole components, five minutes. `fresh`: convert and measure anew; random
    weights are kept. Raises ValueError for unknown names.
    """
    scale = QUICK if quick else FULL
    chosen = plan.select(cases, engines, scale=scale)
    bench = SpeedBench(BUILD / "bench" / scale.name, BUILD / "bench.json", scale)
    content = bench.run(chosen, fresh=fresh)
    print("\n".join(report.describe(content)))
    print(f"\nThe report: {bench.output}")


class SpeedBench:
    """One benchmark in a folder of its own: `root` for models and results, `output` the report."""

    def __init__(self, root: Path, output: Path, scale: Scale, *, progress: bool = True):
        self.root, self.output, self.scale, self.progress = root, output, scale, progress
        self.state_file = root / "results.json"
        self.state: dict[str, Any] = {}
        self.failed: dict[Part, str] = {}  # parts that could not be built, and why
        self.bar = tqdm(disable=True)

    def run(self, chosen: dict[str, list[str]], *, fresh: bool = False) -> dict[str, Any]:
        """Measure the chosen engines of each case; return the content of the report."""
        if fresh:
            shutil.rmtree(self.root / "openvino", ignore_errors=True)
            self.state_file.unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        self.state = self._load_state()
        self.state["skipped"] = []
        todo = self._todo(chosen)
        total = sum(map(len, todo.values()))
        with tqdm(total=total, unit="engine", disable=not self.progress) as self.bar:
            for name, engines in todo.items():
                case = CASES[name]
                ready = [one for one in engines if self._prepare(case, plan.variant(one).engine)]
                for group in self._groups(case, ready):
                    self._take_turns(case, group)
            case_name, engine = _PROFILED
            if engine in chosen.get(case_name, []) and "profile" not in self.state:
                self._profile(CASES[case_name], engine)
            self.bar.set_description("Measured")
        shutil.rmtree(self.root / "images", ignore_errors=True)
        return self._write_report()

    def _todo(self, chosen: dict[str, list[str]]) -> dict[str, list[str]]:
        """Cases and engines without a result."""
        done = {(result["case"], result["engine"]) for result in self.state["results"]}
        return {
            case: [engine for engine in engines if (case, engine) not in done]
            for case, engines in chosen.items()
        }

    # ---- preparation ----

    def _prepare(self, case: Case, engine: str) -> bool:
        """Build what an engine needs; False if that is not possible."""
        for part in self._parts(case, engine):
            if part not in self.failed and not self._is_there(*part):
                self._build(*part)
            if part in self.failed:
                self._skip(case, engine, self.failed[part])
                return False
        return True

    def _parts(self, case: Case, engine: str) -> list[Part]:
        names = [plan.T5_XXL, case.checkpoint] if case.kind == "image" else [case.checkpoint]
        parts: list[Part] = [(name, None) for name in names]
        if engine in OPENVINO and case.kind != "convert":
            for step in dict.fromkeys(("ov-fp16", engine)):
                parts += [(name, step) for name in names]
        return parts

    def _is_there(self, checkpoint: str, engine: str | None) -> bool:
        if engine is None:
            return checkpoints.has_checkpoint(self.root, checkpoint, self.scale)
        return checkpoints.has_openvino(self.root, checkpoint, engine)

    def _build(self, checkpoint: str, engine: str | None) -> None:
        """Build one part in a process of its own; a failure is noted, and not tried again."""
        made = "random weights" if engine is None else f"IRs of {engine}"
        self.bar.set_description(f"Building {checkpoint}: {made}")
        start = time.perf_counter()
        try:
            if engine is None:
                shutil.rmtree(self.root / "openvino" / checkpoint, ignore_errors=True)
                builder, names = checkpoints.build_checkpoint, (checkpoint,)
            else:
                builder, names = checkpoints.build_openvino, (checkpoint, engine)
            peak = call_in_process(builder, self.root, *names, self.scale)
        except WorkerError as error:
            self.failed[checkpoint, engine] = f"{checkpoint}, {made}: {error}"
            return
        self.state["preparations"].append(
            {
                "checkpoint": checkpoint,
                "made": engine or "random weights",
                "seconds": round(time.perf_counter() - start, 1),
                "peak_rss_gb": round(peak, 3),
            }
        )
        self._save_state()

    # ---- measuring ----

    def _groups(self, case: Case, engines: list[str]) -> list[list[str]]:
        """Engines that take turns; the groups run one after another."""
        if case.kind == "convert":
            return [[engine] for engine in engines]
        loaded = dict.fromkeys(plan.variant(engine).engine for engine in engines)
        sizes = {engine: _weight_bytes(self._folder(case, engine)) for engine in loaded}
        groups = group_by_memory(sizes, _SIDE_BY_SIDE * psutil.virtual_memory().available)
        return [[one for one in engines if plan.variant(one).engine in group] for group in groups]

    def _take_turns(self, case: Case, engines: list[str]) -> None:
        """Load, warm up, then run in turns; an engine that fails drops out.

        Variants of an engine run in its process, with the weights that it has loaded.
        """
        turns = 1 if case.kind == "convert" else self.scale.turns
        runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
        with Workers() as workers:

            def attempt(engine: str, action: str, *task: Any) -> Any:
                self.bar.set_description(f"{case.name}: {action} {engine}")
                process = plan.variant(engine).engine
                try:
                    return workers.call(process, *task)
                except WorkerError as error:
                    self._skip(case, engine, str(error))
                    del runs[engine]
                    if process not in {plan.variant(other).engine for other in runs}:
                        workers.stop(process)

            def arguments(engine: str) -> list[plan.Variant]:
                return [plan.variant(engine)] if case.kind == "image" else []

            loaded = set()
            for engine in engines:
                process = plan.variant(engine).engine
                if process not in loaded:
                    folder = self._folder(case, process)
                    attempt(engine, "loading", Runner, case, process, folder, self.scale)
                if engine in runs:
                    loaded.add(process)
            for engine in list(runs):
                attempt(engine, "warming up", "warm_up", *arguments(engine))
            for turn in range(turns):
                for engine in [name for name in runs if self._has_time(runs[name])]:
                    if measured := attempt(engine, "running", "run", turn, *arguments(engine)):
                        runs[engine].append(measured)
        for engine, measured in runs.items():
            self._keep(case, engine, measured)
        self.bar.update(len(engines))

    def _has_time(self, measured: list[dict[str, float]]) -> bool:
        seconds = [one["seconds"] for one in measured]
        return not seconds or sum(seconds) + seconds[-1] <= self.scale.budget_s

    def _folder(self, case: Case, engine: str) -> Path:
        if case.kind == "image":
            return checkpoints.assemble(self.root, case, engine)
        if engine in OPENVINO and case.kind != "convert":
            return checkpoints.openvino_folder(self.root, case.checkpoint, engine)
        return checkpoints.checkpoint_folder(self.root, case.checkpoint)

    def _profile(self, case: Case, engine: str) -> None:
        """Measure where the time of one step goes."""
        self.bar.set_description(f"{case.name}: profile of {engine}")
        folder = checkpoints.openvino_folder(self.root, case.checkpoint, engine)
        try:
            self.state["profile"] = call_in_process(profile_step, case, engine, folder, self.scale)
            self._save_state()
        except WorkerError as error:
            self._skip(case, engine, f"no profile: {error}")

    # ---- results ----

    def _keep(self, case: Case, engine: str, measured: list[dict[str, float]]) -> None:
        self.state["results"].append(
            {
                "case": case.name,
                "engine": engine,
                "seconds": round(statistics.median(one["seconds"] for one in measured), 5),
                "peak_rss_gb": round(max(one["peak_rss_gb"] for one in measured), 3),
                "runs": len(measured),
                "all_seconds": [round(one["seconds"], 5) for one in measured],
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        self._save_state()

    def _skip(self, case: Case, engine: str, reason: str) -> None:
        self.state["skipped"].append({"case": case.name, "engine": engine, "reason": reason})
        self._save_state()

    def _load_state(self) -> dict[str, Any]:
        """Results of an earlier run, if it was on this machine with these versions."""
        head = {"machine": describe_machine(), "versions": versions(), "scale": self.scale.name}
        with contextlib.suppress(OSError, ValueError):
            state = read_json(self.state_file)
            if all(state.get(key) == value for key, value in head.items()):
                return state
            os.replace(self.state_file, self.state_file.with_suffix(".old.json"))
        return {**head, "results": [], "skipped": [], "preparations": []}

    def _save_state(self) -> None:
        write_json(self.state, self.state_file)

    def _write_report(self) -> dict[str, Any]:
        """Write `output` and its plots."""
        order = {name: i for i, name in enumerate((*CASES, *plan.ENGINES))}
        results = sorted(
            self.state["results"], key=lambda one: (order[one["case"]], order[one["engine"]])
        )
        content = {
            **{key: self.state[key] for key in ("machine", "versions", "scale")},
            "quick": self.scale.name == "quick",
            "results": results,
            "ratios": report.ratios(results),
            **{key: self.state[key] for key in ("skipped", "preparations")},
            **{key: self.state[key] for key in ("profile",) if key in self.state},
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(content, self.output)
        if results:
            report.save_plots(self.output)
        return content


def _weight_bytes(folder: Path) -> float:
    """Bytes of the weights in a folder."""
    files = [*folder.glob("*/*.safetensors"), *folder.glob("*/*.bin")]
    return float(sum(file.stat().st_size for file in files))
