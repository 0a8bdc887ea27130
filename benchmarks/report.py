"""Read what `make bench` measured: tables, ratios against targets, plots.

from benchmarks.report import load
load("assets/bench/xeon-2-cores.json").plot()
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.cases import VARIANTS
from ov_pixart.checks import read_json
from ov_pixart.plots import COLOURS, add_bars, finished

_TITLES = {
    "dit_step_512": "One DiT step, 512²",
    "dit_step_1024": "One DiT step, 1024²",
    "vae_decode_512": "VAE decoder, 512²",
    "vae_decode_1024": "VAE decoder, 1024²",
    "t5_encode_120": "T5-XXL, a prompt of 30 tokens",
    "image_512_4step": "Image of 512², 4 steps",
    "image_512_20step_cfg": "Image of 512², 20 steps, guided",
    "convert_dit": "Conversion of the DiT",
    "convert_t5": "Conversion of T5-XXL",
}
_QUANTITIES = {
    "seconds": "seconds",
    "peak_rss_gb": "GB at the peak of the process, mapped files included",
}
_OF_ENGINES = {  # first part of an engine's name → colour
    "torch": COLOURS["text_encoder"],
    "ov": COLOURS["transformer"],
    "published": COLOURS["rest"],
}

# Each engine is compared with these, where they were measured, too; variants also with the others.
BASELINES = ("ov-fp16", "torch-fp32", "torch-bf16", "torch-compile-bf16", "published-recipe")
_OF_VARIANTS = ("ov-int8", "torch-compile-bf16-small-decoder")
# Upper bounds of ratios, on a machine with VNNI and AVX-512 BF16.
TARGETS = {
    "ov-int8/ov-fp16@dit_step_512": 0.60,
    "ov-int8/ov-fp16@dit_step_1024": 0.70,
    "ov-int8/ov-fp16@image_512_4step": 0.60,
    "ov-int8/torch-compile-bf16@image_512_4step": 0.40,
    "ov-int8/torch-fp32@image_512_4step": 0.16,
    "ov-int8-cfg35/ov-int8@image_512_20step_cfg": 0.70,
    "ov-int8-16step-cfg35/ov-int8@image_512_20step_cfg": 0.58,
    "ov-int8-16step-cfg35/torch-compile-bf16@image_512_20step_cfg": 0.36,
    "ov-int8-static-small-decoder/ov-int8@image_512_4step": 0.78,
    "ov-int8-static-small-decoder/torch-compile-bf16-small-decoder@image_512_4step": 0.46,
    "ov-fp16/published-recipe@convert_dit": 0.10,
}


def ratios(results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of one engine over those of another: `{"ov-int8/ov-fp16@dit_step_512": 0.59}`."""
    seconds = {(result["case"], result["engine"]): result["seconds"] for result in results}
    found = {}
    for (case, engine), value in seconds.items():
        for baseline in BASELINES + _OF_VARIANTS * (engine in VARIANTS):
            other = seconds.get((case, baseline))
            if other and baseline != engine and engine.startswith("ov-"):
                found[f"{engine}/{baseline}@{case}"] = round(value / other, 4)
    return found


@dataclass(frozen=True)
class Report:
    """One run of the benchmark: the content of its JSON file."""

    data: dict[str, Any]

    @property
    def machine(self) -> str:
        """The machine in one line."""
        machine = self.data["machine"]
        return (
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB"
            + (f" ({', '.join(machine['instructions'])})" if machine["instructions"] else "")
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per case and engine: median `seconds`, `peak_rss_gb` in 10⁹ bytes, `runs`."""
        columns = ["case", "engine", "seconds", "peak_rss_gb", "runs"]
        table = pd.DataFrame(self.data["results"], columns=columns)
        return table.set_index(["case", "engine"])

    def targets(self) -> list[str]:
        """One line per target whose engines were measured: met, or missed by how much."""
        lines = []
        for name, limit in TARGETS.items():
            if name in self.data["ratios"]:
                ratio = self.data["ratios"][name]
                miss = ratio / limit - 1
                verdict = "met" if miss <= 0 else f"missed by {100 * miss:.1f} %"
                lines.append(f"{name}: {ratio:.3f}, target ≤ {limit:.2f}: {verdict}")
        return lines

    def plot(self, quantity: str = "seconds", cases: list[str] | None = None) -> Figure:
        """Bars for every engine, one panel per case.

        `quantity`: "seconds", or "peak_rss_gb" for memory. `cases`: all measured ones by default.
        Raises ValueError for unknown ones, and for a report without results.
        """
        if quantity not in _QUANTITIES:
            raise ValueError(f"quantity={quantity!r} is unknown: use one of {list(_QUANTITIES)}.")
        table = self.to_dataframe()
        measured = list(dict.fromkeys(table.index.get_level_values("case")))
        for case in cases or []:
            if case not in measured:
                raise ValueError(f"cases={case!r} was not measured: use some of {measured}.")
        cases = cases or measured
        if not cases:
            raise ValueError("The report has no results: run `make bench` first.")
        columns = min(2, len(cases))
        rows = -(-len(cases) // columns)
        longest = max(len(table.loc[case]) for case in cases)
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(5 * columns + 0.5, rows * (1.1 + 0.3 * longest) + 0.4),
            facecolor="white",
            squeeze=False,
        )
        for ax in axes.flat[len(cases) :]:
            ax.axis("off")
        for ax, case in zip(axes.flat, cases, strict=False):
            _draw_engines(ax, table.loc[case][quantity])
            ax.set_title(_TITLES.get(case, case), loc="left", fontsize=11)
            ax.set_xlabel(_QUANTITIES[quantity])
        quick = "" if self.data["scale"] == "full" else f" – {self.data['scale']}, not real size"
        figure.suptitle(self.machine + quick, x=0.01, ha="left", fontsize=9)
        figure.tight_layout()
        return finished(figure)

    def plot_profile(self, count: int = 8) -> Figure:
        """Where one step of the INT8 DiT spends its time: the `count` slowest types of layers.

        Raises ValueError for a report without a profile.
        """
        profile = self.data.get("profile")
        if not profile:
            raise ValueError("The report has no profile: run `make bench` with ov-int8.")
        layers = profile["by_type"][:count]
        shares = pd.Series({layer["name"]: 100 * layer["share"] for layer in layers})
        figure, ax = plt.subplots(figsize=(7, 1.1 + 0.3 * len(shares)), facecolor="white")
        add_bars(ax, shares, colours=dict.fromkeys(shares.index, _OF_ENGINES["ov"]))
        ax.invert_yaxis()
        title = f"{_TITLES.get(profile['case'], profile['case'])}, {profile['engine']}"
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("% of the step's time")
        figure.tight_layout()
        return finished(figure)


def _draw_engines(ax: plt.Axes, values: pd.Series) -> None:
    """Bars coloured by the kind of engine, the first one on top."""
    colours = {name: _OF_ENGINES.get(name.split("-")[0], COLOURS["whole"]) for name in values.index}
    add_bars(ax, values, colours=colours)
    ax.invert_yaxis()


def load(file: str | Path) -> Report:
    """Read a report of `make bench`.

    Raises FileNotFoundError where it is missing, ValueError where the file is anything else.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"file={str(file)!r} is not there: run `make bench` first.")
    data = read_json(file)
    missing = {"machine", "versions", "scale", "results", "ratios"} - set(data)
    if missing:
        raise ValueError(f"file={str(file)!r} is no report of `make bench`: it lacks {missing}.")
    for result in data["results"]:
        result["engine"] = _present_name(result["engine"])
    data["ratios"] = {_present_name(name): ratio for name, ratio in data["ratios"].items()}
    return Report(data)


def _present_name(name: str) -> str:
    """Reports of earlier versions have another name for the published recipe."""
    return name.replace("seed-recipe", "published-recipe")


def save_plots(file: str | Path) -> list[Path]:
    """Write the plots of a report beside it, as PNG, and return their paths."""
    file, report = Path(file), load(file)
    figures = {"": report.plot(), "-memory": report.plot("peak_rss_gb")}
    if report.data.get("profile"):
        figures["-profile"] = report.plot_profile()
    written = []
    for suffix, figure in figures.items():
        image = file.with_name(f"{file.stem}{suffix}.png")
        figure.savefig(image, dpi=110)
        written.append(image)
    return written


def describe(content: dict[str, Any]) -> list[str]:
    """A report as lines of text for the terminal."""
    lines = [f"\n{'case':22}{'engine':34}{'seconds':>10}{'peak GB':>9}{'runs':>6}"]
    last = None
    for one in content["results"]:
        case = one["case"] if one["case"] != last else ""
        last = one["case"]
        lines.append(
            f"{case:22}{one['engine']:34}{one['seconds']:10.3f}{one['peak_rss_gb']:9.2f}"
            f"{one['runs']:6d}"
        )
    if content["quick"]:
        lines.append("\nQuick: a few layers of each component, so that no target is judged.")
    elif targets := Report(content).targets():
        lines += ["", *targets]
    if content["preparations"]:
        lines.append("\nBuilt for it, each in a process of its own:")
    for one in content["preparations"]:
        lines.append(
            f"{one['checkpoint']:26}{one['made']:16}{one['seconds']:10.1f}{one['peak_rss_gb']:9.2f}"
        )
    for one in content["skipped"]:
        lines.append(f"skipped: {one['case']}, {one['engine']}: {one['reason']}")
    if profile := content.get("profile"):
        lines += _describe_profile(profile)
    return lines


def _describe_profile(profile: dict[str, Any]) -> list[str]:
    lines = [f"\nOne {profile['engine']} step, {profile['seconds']:.3f} s by layer type:"]
    for layer in profile["by_type"][:6]:
        lines.append(f"  {layer['name']:32}{layer['share']:7.1%}{layer['layers']:6d} layers")
    lines.append("  by primitive:")
    for layer in profile["by_primitive"][:6]:
        lines.append(f"  {layer['name']:48}{layer['share']:7.1%}")
    lines.append(f"  the same in every step of an image: {profile['text_side']['share']:.1%}")
    peaks, matmul = profile["peak_gflop_per_s"], profile["matmul"]
    lines.append(
        f"  matrix products: {matmul['gflop_per_s']:.0f} GFLOP/s, {matmul['share_of_peak']:.0%}"
        f" of a lone one's (int8 {peaks['int8']:.0f}, floating point {peaks['float']:.0f})"
    )
    return lines
