"""Writes the tables of `docs/performance.md` from the reports in `assets/bench`."""

import re
from collections.abc import Callable
from typing import Any

from benchmarks.cases import CASES, ENGINES
from benchmarks.checkpoints import ROOT
from benchmarks.report import load
from ov_pixart.checks import read_json
from ov_pixart.storage import write_json

REPORTS = ROOT / "assets" / "bench"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "assets" / "images" / "speed.png"
# torch in bfloat16 without compiling lies between the two columns of torch that are shown
_SHOWN = [engine for engine in ENGINES if engine not in ("torch-bf16", "published-recipe")]


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


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory_table,
    "speed-xeon": lambda: speed_table("xeon-2-cores.json"),
    "speed-epyc": lambda: speed_table("epyc-2-cores.json"),
    "settings": settings_table,
}
