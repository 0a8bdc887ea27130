"""OpenVINO's options against the defaults at real size: `python -m benchmarks settings`.

Each setting runs in a process of its own with the IRs of `make bench`, beside one with the
defaults; they take turns. A ratio below 0.97 would be worth having. The report is
`build/settings.json`.
"""

import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks.cases import CASES, FULL, Scale
from benchmarks.engines import OneModel, component_call
from benchmarks.loaders import clock
from benchmarks.machine import describe_machine
from ov_pixart.loading import load_pipeline
from ov_pixart.storage import write_json
from ov_pixart.workers import WorkerError, Workers

BUILD = checkpoints.ROOT / "build"
TURNS = 7


@dataclass(frozen=True)
class Setting:
    """One difference from the defaults. `config`: OpenVINO's properties; `static`: shapes are
    fixed; `rows`: images per call; `calls`: calls per turn."""

    case: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    static: bool = False
    rows: int = 1
    calls: int = 1
    against: str = "default"


SETTINGS = (
    Setting("dit_step_512", "default"),
    Setting("dit_step_512", "static shapes", static=True),
    Setting("dit_step_512", "float32 between", {"INFERENCE_PRECISION_HINT": "f32"}),
    Setting("dit_step_512", "one thread", {"INFERENCE_NUM_THREADS": 1}),
    Setting("dit_step_512", "throughput", {"PERFORMANCE_HINT": "THROUGHPUT"}),
    Setting("dit_step_512", "no pinning", {"ENABLE_CPU_PINNING": "NO"}),
    Setting("dit_step_512", "guidance in one call", rows=2),
    Setting("dit_step_512", "guidance in two", calls=2, against="guidance in one call"),
    Setting("dit_step_1024", "default"),
    Setting("dit_step_1024", "static shapes", static=True),
    Setting("dit_step_1024", "no pinning", {"ENABLE_CPU_PINNING": "NO"}),
    Setting("vae_decode_512", "default"),
    Setting("vae_decode_512", "static shapes", static=True),
    Setting("vae_decode_512", "float32 between", {"INFERENCE_PRECISION_HINT": "f32"}),
    Setting("vae_decode_512", "no pinning", {"ENABLE_CPU_PINNING": "NO"}),
    Setting("t5_encode_120", "default"),
    Setting("t5_encode_120", "static shapes", static=True),
    Setting("t5_encode_120", "float32 between", {"INFERENCE_PRECISION_HINT": "f32"}),
    Setting("t5_encode_120", "no pinning", {"ENABLE_CPU_PINNING": "NO"}),
)


class Subject:
    """One model under one setting, in a process of its own."""

    def __init__(self, setting: Setting, engine: str, folder: Path, scale: Scale):
        case = CASES[setting.case]
        pipeline = load_pipeline(folder, compile=False, ov_config=setting.config)
        if setting.static:
            size = scale.pixels(case)
            pipeline.reshape(setting.rows, size, size, num_images_per_prompt=1)
        self.setting, self.call = setting, component_call(case, pipeline)
        self.model = OneModel(self.call, case, engine, scale)

    def run(self, turn: int) -> float:
        """Seconds of one turn."""
        inputs = self.model.inputs(turn)
        if self.setting.rows > 1:
            inputs = _repeat(inputs, self.setting.rows)
        calls = range(self.setting.calls)
        return clock(lambda: [self.call(**inputs) for _ in calls])[0]


def _repeat(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same inputs with more rows."""
    return {
        name: value.repeat_interleave(rows, 0)
        if isinstance(value, torch.Tensor)
        else _repeat(value, rows)
        if isinstance(value, dict)
        else value
        for name, value in inputs.items()
    }


def measure(
    settings: tuple[Setting, ...], folder: Path, engine: str, scale: Scale, turns: int = TURNS
) -> list[dict[str, Any]]:
    """Let the settings of one case take turns; return seconds and ratios, one line per setting."""
    seconds: dict[str, list[float]] = {}
    with Workers() as workers:
        for one in settings:
            try:
                workers.call(one.name, Subject, one, engine, folder, scale)
                workers.call(one.name, "run", -1)
                seconds[one.name] = []
            except WorkerError as error:
                print(f"{one.case}, {one.name}: {error}", file=sys.stderr)
        for turn in range(turns):
            for name, runs in seconds.items():
                runs.append(workers.call(name, "run", turn))
    medians = {name: statistics.median(runs) for name, runs in seconds.items() if runs}
    return [
        {
            "case": one.case,
            "setting": one.name,
            "seconds": round(medians[one.name], 4),
            "ratio": round(medians[one.name] / medians[one.against], 3),
            "against": one.against,
        }
        for one in settings
        if one.name in medians and one.against in medians
    ]


def run(kinds: Iterable[str] = (), engine: str = "ov-int8") -> None:
    """Measure the settings of some kinds of component ("dit", "vae", "t5"; all by default).

    Raises FileNotFoundError if `make bench` has not made the IRs yet.
    """
    root, lines = BUILD / "bench" / FULL.name, []
    for name in dict.fromkeys(setting.case for setting in SETTINGS):
        case = CASES[name]
        if kinds and case.kind not in kinds:
            continue
        if not checkpoints.has_openvino(root, case.checkpoint, engine):
            raise FileNotFoundError(
                f"{name}: there are no IRs of {engine} yet, "
                f"python -m benchmarks speed --cases {name} --engines {engine} makes them."
            )
        folder = checkpoints.openvino_folder(root, case.checkpoint, engine)
        settings = tuple(setting for setting in SETTINGS if setting.case == name)
        for line in measure(settings, folder, engine, FULL):
            lines.append(line)
            print(
                f"{line['case']:16} {line['setting']:22} {line['seconds']:8.3f} s, "
                f"{line['ratio']:.3f} × {line['against']}",
                flush=True,
            )
    report = {"machine": describe_machine(), "engine": engine, "settings": lines}
    write_json(report, BUILD / "settings.json")
