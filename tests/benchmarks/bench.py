"""The benchmark: `make bench`, or `python -m tests.benchmarks.bench`.

Settings come from the environment:

- `BENCH_CASES`, `BENCH_ENGINES`: names parted by commas or blanks; all by default.
- `QUICK=1`: a few blocks instead of the whole models, for a first impression in five minutes.
- `FRESH=1`: convert and measure anew what an earlier run has finished. Random weights stay.

Everything is kept under `build/bench/`; an interrupted run goes on where it stopped. The report is
`build/bench.json`, with its plots beside it.
"""

import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ov_pixart_helper as helper  # first: it switches telemetry off
from assets.bench import report
from ov_pixart_helper import psutil, tqdm
from tests.benchmarks import cases as plan
from tests.benchmarks import checkpoints as models
from tests.benchmarks.cases import CASES, FULL, OPENVINO, QUICK, Case, Scale
from tests.benchmarks.engines import Runner
from tests.benchmarks.layers import profile_step
from tests.benchmarks.workers import Worker, WorkerError, call_in_process, worker

BUILD = Path(helper.__file__).parent / "build"
_PACKAGES = ("openvino", "nncf", "torch", "transformers", "diffusers", "optimum-intel")
_FREE_SHARE = 0.8  # engines stay loaded side by side as long as they take no more of free memory
_SPARE_GB = 1.0  # disk to leave free
_PROFILED = ("dit_step_512", "ov-int8")


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Run what the environment asks for; return the exit status."""
    scale = QUICK if _is_on(environment, "QUICK") else FULL
    try:
        chosen = plan.select(
            environment.get("BENCH_CASES", ""), environment.get("BENCH_ENGINES", ""), scale=scale
        )
        bench = Bench(BUILD / "bench" / scale.name, BUILD / "bench.json", scale)
        bench.run(chosen, fresh=_is_on(environment, "FRESH"))
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() not in ("", "0", "no", "false")


class Bench:
    """One benchmark in a folder of its own: `root` for models and results, `output` the report."""

    def __init__(self, root: Path, output: Path, scale: Scale, *, quiet: bool = False):
        self.root, self.output, self.scale, self.quiet = root, output, scale, quiet
        self.state_file = root / "results.json"
        self.state: dict[str, Any] = {}
        self.failed: dict[tuple[str, str | None], str] = {}  # what could not be built, and why
        self.bar = tqdm(disable=True)

    # -- the whole run --

    def run(self, chosen: dict[str, list[str]], *, fresh: bool = False) -> dict[str, Any]:
        """Measure the chosen engines for each chosen case; return what the report holds.

        Raises OSError, before anything is done, where the disk is too small.
        """
        if fresh:
            shutil.rmtree(self.root / "openvino", ignore_errors=True)
            self.state_file.unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self.state = self._load_state()
        self.state["skipped"] = []
        todo = self._todo(chosen)
        total = self._announce(todo)
        style = "{desc} |{bar}| {percentage:.0f} % [{elapsed}, about {remaining} to go]"
        with tqdm(total=round(total), bar_format=style, disable=self.quiet) as self.bar:
            for name, engines in todo.items():
                ready = self._prepare(CASES[name], engines)
                self._measure(CASES[name], ready)
            case, engine = _PROFILED
            if engine in chosen.get(case, []) and "profile" not in self.state:
                self._profile(CASES[case], engine)
            self.bar.set_description("Done")
        shutil.rmtree(self.root / "pictures", ignore_errors=True)
        return self._write_report()

    def _todo(self, chosen: dict[str, list[str]]) -> dict[str, list[str]]:
        """What has not been measured yet."""
        done = {(result["case"], result["engine"]) for result in self.state["results"]}
        todo = {
            case: [engine for engine in engines if (case, engine) not in done]
            for case, engines in chosen.items()
        }
        return {case: engines for case, engines in todo.items() if engines}

    def _announce(self, todo: dict[str, list[str]]) -> float:
        """Say what will be done, and what it takes; return the seconds it should take."""
        missing = [
            (checkpoint, engine)
            for checkpoint, engine in self._needed(todo)
            if not self._is_there(checkpoint, engine)
        ]
        disk = sum(models.size_gb(self.root, *one, self.scale) for one in missing)
        disk += self._scratch_gb(todo)
        free = shutil.disk_usage(self.root).free / 1e9
        if disk + _SPARE_GB > free:
            raise OSError(
                f"{disk + _SPARE_GB:.0f} GB of disk are needed under {self.root}, "
                f"{free:.0f} GB are free: make room, or choose fewer BENCH_CASES or BENCH_ENGINES."
            )
        seconds = sum(plan.expected_prepare_s(*one, self.scale) for one in missing)
        for case, engines in todo.items():
            seconds += sum(
                plan.expected_measure_s(CASES[case], engine, self.scale) for engine in engines
            )
        if not self.quiet:
            count = sum(len(engines) for engines in todo.values())
            minutes = max(1, round(seconds / 60))
            print(f"{report.Report(self.state).machine}")
            print(
                f"{count} measurements, {len(missing)} preparations: about {minutes} min on two "
                f"cores, {disk:.1f} GB of disk more ({free:.0f} GB are free)."
            )
        return seconds

    def _needed(self, todo: dict[str, list[str]]) -> list[tuple[str, str | None]]:
        """Checkpoints (with None) and IRs (with their engine), each once, sources first."""
        needed: dict[tuple[str, str | None], None] = {}
        for case, engines in todo.items():
            for engine in engines:
                needed |= dict.fromkeys(self._parts(CASES[case], engine))
        return list(needed)

    def _parts(self, case: Case, engine: str) -> list[tuple[str, str | None]]:
        """What one engine needs for one case."""
        names = [plan.T5_XXL, case.checkpoint] if case.kind == "image" else [case.checkpoint]
        parts: list[tuple[str, str | None]] = [(name, None) for name in names]
        if engine in OPENVINO and case.kind != "convert":
            for step in dict.fromkeys(("ov-fp16", engine)):
                parts += [(name, step) for name in names]
        return parts

    def _is_there(self, checkpoint: str, engine: str | None) -> bool:
        if engine is None:
            return models.has_checkpoint(self.root, checkpoint, self.scale)
        return models.has_openvino(self.root, checkpoint, engine)

    def _scratch_gb(self, todo: dict[str, list[str]]) -> float:
        """The largest IR that a conversion writes, and deletes when it has been timed."""
        converted = [CASES[case] for case in todo if CASES[case].kind == "convert"]
        return max(
            (plan.disk_gb(case.checkpoint, "ov-fp16", self.scale) for case in converted), default=0
        )

    def _sweep(self) -> None:
        """Remove what a run that was killed has left half-done."""
        for pattern in (
            "checkpoints/.partial-*",
            "checkpoints/*/.conversion-*",
            "checkpoints/.con*",
        ):
            for left in self.root.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)

    # -- preparation --

    def _prepare(self, case: Case, engines: list[str]) -> list[str]:
        """Build what the engines need; return those that have all of it."""
        ready = []
        for engine in engines:
            for part in self._parts(case, engine):
                if part not in self.failed and not self._is_there(*part):
                    self._build(*part)
                if part in self.failed:
                    self._skip(case, engine, self.failed[part])
                    break
            else:
                ready.append(engine)
        return ready

    def _build(self, checkpoint: str, engine: str | None) -> None:
        """Build one part in a process of its own; if that fails, it is not tried again."""
        doing = "Random weights for" if engine is None else f"IRs of {engine} for"
        expected = plan.expected_prepare_s(checkpoint, engine, self.scale)
        with self._step(f"{doing} {checkpoint}", expected):
            try:
                _check_memory(models.preparation_gb(checkpoint, engine, self.scale))
                start = time.perf_counter()
                if engine is None:
                    shutil.rmtree(self.root / "openvino" / checkpoint, ignore_errors=True)
                    arguments = (models.build_checkpoint, self.root, checkpoint, self.scale)
                else:
                    arguments = (models.build_openvino, self.root, checkpoint, engine, self.scale)
                peak = call_in_process(*arguments)
            except WorkerError as error:
                what = "the random weights" if engine is None else f"the IRs of {engine}"
                reason = f"{what} of {checkpoint} could not be made: {error}"
                self.failed[checkpoint, engine] = reason
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

    # -- measuring --

    def _measure(self, case: Case, engines: list[str]) -> None:
        """Let the engines take turns, and keep what each one needed."""
        able = []
        for engine in engines:
            try:
                _check_memory(plan.memory_gb(case, engine, self.scale))
                able.append(engine)
            except WorkerError as error:
                self._skip(case, engine, str(error))
        folders = {engine: self._folder(case, engine) for engine in able}
        runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in able}
        turns = 1 if case.kind == "convert" else self.scale.turns
        groups = self._groups(case, able)
        rounds = 1 if len(groups) == 1 else min(2, turns)
        for i, group in enumerate(groups * rounds):
            is_last = i >= len(groups) * (rounds - 1)
            group = [engine for engine in group if engine in runs]
            with contextlib.ExitStack() as stack:
                workers = {engine: stack.enter_context(worker()) for engine in group}
                self._take_turns(case, workers, folders, runs, -(-turns // rounds))
            for engine in group:
                if is_last or not self._has_time(runs[engine], turns):
                    measured = runs.pop(engine)
                    if measured:
                        self._keep(case, engine, measured)
        self.bar.update(
            sum(round(plan.expected_measure_s(case, one, self.scale)) for one in engines)
        )

    def _groups(self, case: Case, engines: list[str]) -> list[list[str]]:
        """Engines that fit into memory side by side; one group takes its turns after the other."""
        if case.kind == "convert":
            return [[engine] for engine in engines]
        needs = {engine: plan.memory_gb(case, engine, self.scale) for engine in engines}
        return helper._side_by_side(needs, _FREE_SHARE * _free_gb())

    def _take_turns(
        self,
        case: Case,
        workers: dict[str, Worker],
        folders: dict[str, Path],
        runs: dict[str, list[dict[str, float]]],
        turns: int,
    ) -> None:
        """Load, warm up, then run in turns; an engine that fails drops out."""

        def attempt(engine: str, doing: str, *task: Any) -> Any:
            self.bar.set_description(f"{case.name}: {doing} {engine}")
            try:
                return workers[engine].call(*task)
            except WorkerError as error:
                self._skip(case, engine, str(error))
                del workers[engine]

        for engine in list(workers):
            attempt(engine, "loading", Runner, case, engine, folders[engine], self.scale)
        for engine in list(workers):
            attempt(engine, "warming up", "warm_up")
        limit = {engine: len(runs[engine]) + turns for engine in workers}
        for _ in range(turns):
            for engine in list(workers):
                if self._has_time(runs[engine], limit[engine]):
                    turn = len(runs[engine])
                    measured = attempt(engine, "running", "run", turn)
                    if measured:
                        runs[engine].append(measured)

    def _has_time(self, measured: list[dict[str, float]], turns: int) -> bool:
        """Whether an engine runs once more: it has turns left, and seconds of its budget."""
        seconds = [one["seconds"] for one in measured]
        if not seconds:
            return True
        within = sum(seconds) + seconds[-1] <= self.scale.budget_s
        return within and len(seconds) < min(turns, self.scale.turns)

    def _folder(self, case: Case, engine: str) -> Path:
        if case.kind == "image":
            return models.assemble(self.root, case, engine)
        if engine in OPENVINO and case.kind != "convert":
            return models.openvino_folder(self.root, case.checkpoint, engine)
        return models.checkpoint_folder(self.root, case.checkpoint)

    def _profile(self, case: Case, engine: str) -> None:
        """Count where the time of one step goes."""
        if not models.has_openvino(self.root, case.checkpoint, engine):
            return
        folder = models.openvino_folder(self.root, case.checkpoint, engine)
        self.bar.set_description(f"{case.name}: profile of {engine}")
        try:
            self.state["profile"] = call_in_process(profile_step, case, engine, folder, self.scale)
            self._save_state()
        except WorkerError as error:
            self._skip(case, engine, f"no profile: {error}")

    # -- results --

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
            state = json.loads(self.state_file.read_text(encoding="utf-8"))
            if all(state.get(key) == value for key, value in head.items()):
                return state
            os.replace(self.state_file, self.state_file.with_suffix(".old.json"))
        return {**head, "results": [], "skipped": [], "preparations": []}

    def _save_state(self) -> None:
        helper._write_json(self.state, self.state_file)

    def _write_report(self) -> dict[str, Any]:
        """Write `output` and its plots, and print the table."""
        order = {name: i for i, name in enumerate((*CASES, *plan.ENGINES))}
        results = sorted(
            self.state["results"], key=lambda one: (order[one["case"]], order[one["engine"]])
        )
        content = {
            **{key: self.state[key] for key in ("machine", "versions", "scale")},
            "quick": self.scale.name == "quick",
            "results": results,
            "ratios": report.ratios(results),
            "skipped": self.state["skipped"],
            "preparations": self.state["preparations"],
        }
        if "profile" in self.state:
            content["profile"] = self.state["profile"]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        helper._write_json(content, self.output)
        if results:
            report.draw(self.output)
        if not self.quiet:
            print("\n".join(describe(content)))
            print(f"\nThe report: {self.output}")
        return content

    @contextlib.contextmanager
    def _step(self, description: str, expected_s: float) -> Iterator[None]:
        self.bar.set_description(description)
        yield
        self.bar.update(round(expected_s))


def describe(content: dict[str, Any]) -> list[str]:
    """A report as lines of text."""
    lines = [f"\n{'case':22}{'engine':20}{'seconds':>10}{'peak GB':>9}{'runs':>6}"]
    last = None
    for one in content["results"]:
        case = one["case"] if one["case"] != last else ""
        last = one["case"]
        lines.append(
            f"{case:22}{one['engine']:20}{one['seconds']:10.3f}{one['peak_rss_gb']:9.2f}"
            f"{one['runs']:6d}"
        )
    if content["quick"]:
        lines.append("\nQUICK: a part of the models only, so that no target is judged.")
    elif targets := report.Report(content).targets():
        lines += ["", *targets]
    if content["preparations"]:
        lines.append("\nBuilt for it, each in a process of its own:")
    for one in content["preparations"]:
        lines.append(
            f"{one['checkpoint']:26}{one['made']:16}{one['seconds']:10.1f}{one['peak_rss_gb']:9.2f}"
        )
    for one in content["skipped"]:
        lines.append(f"left out: {one['case']}, {one['engine']}: {one['reason']}")
    if profile := content.get("profile"):
        lines.append(f"\nOne {profile['engine']} step, {profile['seconds']:.3f} s by layer type:")
        for layer in profile["by_type"][:6]:
            lines.append(f"  {layer['name']:32}{layer['share']:7.1%}{layer['layers']:6d} layers")
        lines.append("  by primitive:")
        for layer in profile["by_primitive"][:6]:
            lines.append(f"  {layer['name']:48}{layer['share']:7.1%}")
        if text := profile.get("text_side"):  # reports of before have none
            lines.append(f"  of it the same in every step of a picture: {text['share']:.1%}")
        peaks, matmul = profile["peak_gflop_per_s"], profile["matmul"]
        lines.append(
            f"  matrix products: {matmul['gflop_per_s']:.0f} GFLOP/s, {matmul['share_of_peak']:.0%}"
            f" of a lone one's (int8 {peaks['int8']:.0f}, floating point {peaks['float']:.0f})"
        )
    return lines


# ==================================================================================================
# The machine
# ==================================================================================================


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory in 10⁹ bytes, system, and the instructions that decide speed."""
    name, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    affinity = getattr(os, "sched_getaffinity", None)
    deciding = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
    return {
        "processor": name,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "instructions": [flag for flag in deciding if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is measured."""
    found = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def _free_gb() -> float:
    return psutil.virtual_memory().available / 1e9


def _check_memory(needed_gb: float) -> None:
    free = _free_gb()
    if needed_gb > free:
        raise WorkerError(f"about {needed_gb:.1f} GB of memory are needed, {free:.1f} GB are free")


if __name__ == "__main__":
    if len(sys.argv) > 1:  # all of it takes hours: nobody shall start it by asking for help
        sys.exit(__doc__)
    sys.exit(main())
