"""Reads what `make bench` measured: a table, ratios against targets, plots.

    from assets.bench.report import load
    load("assets/bench/xeon.json").plot()

From the command line, `python -m assets.bench.report build/bench.json` writes the plots beside it.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
_COLOURS = {"torch": "#E69F00", "ov": "#0072B2", "seed": "#999999"}
_TITLES = {
    "dit_step_512": "One DiT step, 512²",
    "dit_step_1024": "One DiT step, 1024²",
    "vae_decode_512": "VAE decoder, 512²",
    "vae_decode_1024": "VAE decoder, 1024²",
    "t5_encode_120": "T5-XXL, a prompt of 30 tokens",
    "image_512_4step": "Picture of 512², 4 steps",
    "image_512_20step_cfg": "Picture of 512², 20 steps, guided",
    "convert_dit": "Conversion of the DiT",
    "convert_t5": "Conversion of T5-XXL",
}
_QUANTITIES = {"seconds": "s", "peak_rss_gb": "GB at its peak, the whole process"}

# What every engine is held against, where it has been measured, too.
BASELINES = ("ov-fp16", "torch-fp32", "torch-bf16", "torch-compile-bf16", "seed-recipe")
# The most that a ratio may be, on a machine with VNNI and AVX-512 BF16.
TARGETS = {
    "ov-int8/ov-fp16@dit_step_512": 0.60,
    "ov-int8/ov-fp16@dit_step_1024": 0.70,
    "ov-int8/ov-fp16@image_512_4step": 0.60,
    "ov-int8/torch-compile-bf16@image_512_4step": 0.40,
    "ov-int8/torch-fp32@image_512_4step": 0.16,
    "ov-fp16/seed-recipe@convert_dit": 0.10,
}


def ratios(results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of one engine by those of another: `{"ov-int8/ov-fp16@dit_step_512": 0.59}`."""
    results = list(results)
    seconds = {(result["case"], result["engine"]): result["seconds"] for result in results}
    found = {}
    for (case, engine), value in seconds.items():
        for baseline in BASELINES:
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
        """One row a case and engine: median `seconds`, `peak_rss_gb` in 10⁹ bytes, `runs`."""
        columns = ["case", "engine", "seconds", "peak_rss_gb", "runs"]
        table = pd.DataFrame(self.data["results"], columns=columns)
        return table.set_index(["case", "engine"])

    def targets(self) -> list[str]:
        """One line a target that this run can answer: met, or missed by how much."""
        lines = []
        for name, limit in TARGETS.items():
            if name in self.data["ratios"]:
                ratio = self.data["ratios"][name]
                miss = ratio / limit - 1
                verdict = "met" if miss <= 0 else f"missed by {100 * miss:.1f} %"
                lines.append(f"{name}: {ratio:.3f}, target ≤ {limit:.2f}: {verdict}")
        return lines

    def plot(self, quantity: str = "seconds", cases: list[str] | None = None) -> Figure:
        """Bars for every engine, a panel a case.

        `quantity`: "seconds", or "peak_rss_gb" for memory. `cases`: all that were measured by
        default.
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
            _bars(ax, table.loc[case][quantity])
            ax.set_title(_TITLES.get(case, case), loc="left", fontsize=11)
            ax.set_xlabel(_QUANTITIES[quantity])
        quick = "" if self.data["scale"] == "full" else f" – {self.data['scale']}, not real size"
        figure.suptitle(self.machine + quick, x=0.01, ha="left", fontsize=9)
        figure.tight_layout()
        plt.close(figure)  # out of pyplot's hands: a notebook would show it twice
        return figure

    def plot_profile(self, count: int = 8) -> Figure:
        """Where one step of the INT8 DiT spends its time: the `count` slowest kinds of layers."""
        profile = self.data.get("profile")
        if not profile:
            raise ValueError("The report has no profile: run `make bench` with ov-int8.")
        layers = profile["by_type"][:count]
        shares = pd.Series({layer["name"]: 100 * layer["share"] for layer in layers})
        figure, ax = plt.subplots(figsize=(7, 1.1 + 0.3 * len(shares)), facecolor="white")
        _bars(ax, shares, dict.fromkeys(shares.index, _COLOURS["ov"]))
        title = f"{_TITLES.get(profile['case'], profile['case'])}, {profile['engine']}"
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("% of the step's time")
        figure.tight_layout()
        plt.close(figure)
        return figure


def _bars(ax: plt.Axes, values: pd.Series, colours: dict[str, str] | None = None) -> None:
    """Horizontal bars with their numbers; the first one on top."""
    top = float(values.max()) or 1.0
    for row, (name, value) in enumerate(values.items()):
        colour = (colours or {}).get(name) or _COLOURS.get(name.split("-")[0], "#56B4E9")
        ax.barh(row, value, color=colour, height=0.7)
        ax.text(value + 0.01 * top, row, f"{value:.3g}", va="center", fontsize=9)
    ax.set_yticks(range(len(values)), values.index)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.18 * top)
    ax.spines[["top", "right"]].set_visible(False)


def load(file: str | Path) -> Report:
    """Read a report of `make bench`."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"file={str(file)!r} is not there: run `make bench` first.")
    data = json.loads(file.read_text(encoding="utf-8"))
    missing = {"machine", "versions", "scale", "results", "ratios"} - set(data)
    if missing:
        raise ValueError(f"file={str(file)!r} is no report of `make bench`: it lacks {missing}.")
    return Report(data)


def draw(file: str | Path) -> list[Path]:
    """Write the plots of a report beside it, as PNG, and return their paths."""
    file, report = Path(file), load(file)
    figures = {"": report.plot(), "-memory": report.plot("peak_rss_gb")}
    if report.data.get("profile"):
        figures["-profile"] = report.plot_profile()
    written = []
    for suffix, figure in figures.items():
        picture = file.with_name(f"{file.stem}{suffix}.png")
        figure.savefig(picture, dpi=110)
        written.append(picture)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Name the report to draw: python -m assets.bench.report build/bench.json")
    for written_picture in draw(sys.argv[1]):
        print(written_picture)
