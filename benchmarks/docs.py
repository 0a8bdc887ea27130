"""Writes the tables of `docs/performance.md` from the reports in `assets/bench`."""

import re
from collections.abc import Callable
from typing import Any

from benchmarks.cases import CASES, OPENVINO, TORCH, VARIANTS
from benchmarks.checkpoints import ROOT
from benchmarks.report import load
from ov_pixart.checks import read_json
from ov_pixart.storage import write_json

REPORTS = ROOT / "assets" / "bench"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "assets" / "images" / "speed.png"
# torch in bfloat16 without compiling lies between the two columns of torch that are shown
_SHOWN = [engine for engine in (*TORCH, *OPENVINO) if engine != "torch-bf16"]


def write() -> None:
    """Write every table and the plot of speed."""
    page = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        page = replace_section(page, name, table())
    PAGE.write_text(page, encoding="utf-8")
    load(REPORTS / "xeon-2-cores.json").plot().savefig(PLOT, dpi=110)


def keep_memory(report: dict[str, Any]) -> None:
    """Keep a report of memory limits, and write its table.

    Raises ValueError for a report without enforced limits: peaks cannot be compared with them.
    """
    if not report["enforced"]:
        raise ValueError("no limit was enforced, so that there is nothing to write.")
    write_json(report, REPORTS / "memory.json")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_section(page, "memory", memory_table()), encoding="utf-8")


def replace_section(page: str, name: str, text: str) -> str:
    """Replace the text between `<!-- name -->` and `<!-- /name -->`.

    Raises ValueError unless both markers are there once.
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    page, count = re.subn(pattern, lambda found: f"{found[1]}{text}\n{found[2]}", page, flags=re.S)
    if count != 1:
        raise ValueError(f"the page has {count} sections <!-- {name} -->, and needs one.")
    return page


def speed_table(file: str) -> str:
    """Median seconds: one row per case, one column per engine."""
    report = load(REPORTS / file)
    seconds = report.to_dataframe()["seconds"]
    measured = set(seconds.index)
    engines = [name for name in _SHOWN if any(engine == name for _, engine in measured)]
    rows = []
    for case in CASES.values():
        if case.kind != "convert" and any(name == case.name for name, _ in measured):
            numbers = [seconds.get((case.name, engine)) for engine in engines]
            rows.append([case.summary, *("–" if n is None else f"{n:#.3g}" for n in numbers)])
    titles = [f"`{name[3:]}`" if name.startswith("ov-") else name for name in engines]
    return f"{report.machine}:\n\n" + table(["seconds", *titles], rows)


def variants_table() -> str:
    """Seconds of an image and ratios to `int8`: one row per variant, two columns per case."""
    seconds = load(REPORTS / "variants.json").to_dataframe()["seconds"]
    cases = list(dict.fromkeys(case for case, _ in seconds.index))
    rows = []
    for engine in ("torch-compile-bf16", "ov-int8", *VARIANTS):
        row = [_VARIANTS[engine]]
        for case in cases:
            found = seconds.get((case, engine))
            row += (
                ["–", "–"]
                if found is None
                else [f"{found:#.3g} s", f"{found / seconds[case, 'ov-int8']:.2f} ×"]
            )
        rows.append(row)
    titles = [title for case in cases for title in (CASES[case].summary, "against `int8`")]
    return table(["", *titles], rows)


_VARIANTS = {
    "torch-compile-bf16": "torch-compile-bf16",
    "ov-int8": "`int8`",
    "ov-int8-cfg50": "guidance in the first half",
    "ov-int8-cfg35": "guidance in the first 35 %",
    "ov-int8-16step-cfg35": "16 steps, guidance in the first 35 %",
    "ov-int8-small-decoder": "small decoder",
    "ov-int8-static": "static shapes",
    "ov-int8-static-small-decoder": "static shapes, small decoder",
    "torch-compile-bf16-small-decoder": "torch-compile-bf16, small decoder",
}


def settings_table() -> str:
    """Ratios of OpenVINO's options to the defaults: one column per case."""
    lines = read_json(REPORTS / "settings.json")["settings"]
    cases = list(dict.fromkeys(line["case"] for line in lines))
    ratios = {(line["setting"], line["case"]): line for line in lines}
    rows = []
    for setting in dict.fromkeys(line["setting"] for line in lines):
        found = [ratios.get((setting, case)) for case in cases]
        against = next(line["against"] for line in found if line)
        name = setting if against == "default" else f"{setting}, against {against}"
        if setting != "default":
            rows.append([name, *("–" if one is None else f"{one['ratio']:.2f} ×" for one in found)])
    return table(["setting", *(CASES[case].summary for case in cases)], rows)


def memory_table() -> str:
    """The smallest limit that each task runs within, and the largest that it failed within."""
    report = read_json(REPORTS / "memory.json")
    rows = []
    for line in report["results"]:
        announced, failed = line["announced_gb"], line["failed_gb"]
        rows.append(
            [
                line["case"],
                f"{line['limit_gb']:.1f} GB",
                f"{failed:.1f} GB" if failed else "–",
                f"{announced:.1f} GB" if announced else "–",
                f"{line['peak_gb']:.1f} GB",
            ]
        )
    titles = ["task", "runs within", "fails within", "announced", "reported peak"]
    return table(titles, rows)


def steps_table() -> str:
    """Right images of PixArt-tiny, one / two objects: a row per number of steps."""
    shown = [("sde", 1.0), ("ode", 1.0), ("unipc", 1.0), ("euler", 1.0)]
    shown += [("sde", 0.35), ("ode", 0.35), ("unipc", 0.35)]
    found = {
        (line["solver"], line["end"], line["steps"]): line
        for line in solver_report("grid")
        if (line["start"], line["scale"]) == (0.0, 4.5)
    }
    rows = []
    for steps in sorted({steps for *_, steps in found}, reverse=True):
        lines = [found.get((*column, steps)) for column in shown]
        evaluations = f"{2 * steps} / {found['ode', 0.35, steps]['rows']:.0f}"
        rows.append([str(steps), evaluations, *(_right(one) if one else "–" for one in lines)])
    titles = [f"{_SOLVERS[solver]}, {_guided(end)}" for solver, end in shown]
    return table(["steps", "evaluations, all / 35 %", *titles], rows)


def caches_table() -> str:
    """Step caches and fewer steps on PixArt-tiny, by the number of evaluations."""
    rows = [
        [
            f"{line['rows']:.0f}" + (f" + {line['shallow_rows']:.0f}" * (line["shallow_rows"] > 0)),
            _SOLVERS[line["solver"]],
            str(line["steps"]),
            _guided(line["end"]),
            _cache(line["cache"]),
            _right(line),
            f"{line['psnr_median_db']:.0f} / {line['psnr_p10_db']:.0f} dB",
        ]
        for line in sorted(solver_report("finalists"), key=lambda one: -one["rows"])
        if 10 < line["rows"] < 30  # those that compete
    ]
    titles = ["evaluations", "solver", "steps", "guided", "cache", "right, %", "PSNR"]
    return table(titles, rows)


def solver_report(part: str) -> list[dict[str, Any]]:
    """The lines of one part of `pixart_tiny.solver_study`."""
    lines = read_json(REPORTS / "pixart-tiny-solvers.json")["rows"]
    return [line for line in lines if line["part"] == part]


_SOLVERS = {"sde": "stochastic", "ode": "deterministic", "unipc": "UniPC", "euler": "Euler"}


def _guided(end: float) -> str:
    return "all" if end == 1 else f"{100 * end:.0f} %"


def _right(line: dict[str, Any]) -> str:
    return f"{line['one_object']:.1f} / {line['two_objects']:.1f}"


def _cache(cache: dict[str, Any] | None) -> str:
    if cache is None:
        return "–"
    if cache["threshold"]:
        return f"first block, threshold {cache['threshold']}"
    return f"interval {cache['interval']}, order {cache['order']}"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory_table,
    "speed-xeon": lambda: speed_table("xeon-2-cores.json"),
    "speed-epyc": lambda: speed_table("epyc-2-cores.json"),
    "variants": variants_table,
    "settings": settings_table,
    "steps": steps_table,
    "caches": caches_table,
}
