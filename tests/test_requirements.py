"""Every package that is imported directly is pinned in requirements.txt."""

import ast
import json
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONAL = {"openvino_telemetry"}  # imported to be switched off, where it is installed


def sources() -> list[Path]:
    """All modules and notebooks, without what is installed or generated."""
    generated = ("build", "models")
    tops = [path for path in ROOT.iterdir() if path.name not in generated and path.name[0] != "."]
    inner = [file for top in tops if top.is_dir() for file in top.rglob("*")]
    return [file for file in (*tops, *inner) if file.suffix in (".py", ".ipynb")]


def source_code(file: Path) -> str:
    """The Python of a module, or of a notebook's code cells."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def imported_packages(code: str) -> set[str]:
    """Top-level packages of all absolute imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def pinned_packages() -> set[str]:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return {canonical(name) for name in re.findall(r"^([\w.-]+)==[\w.]+$", text, re.MULTILINE)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_imported_directly_is_pinned():
    distributions, pinned = packages_distributions(), pinned_packages()
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    known = ours | OPTIONAL | sys.stdlib_module_names
    for file in sources():
        for package in imported_packages(source_code(file)) - known:
            names = {canonical(name) for name in distributions.get(package, [package])}
            assert names & pinned, f"{file.relative_to(ROOT)} imports {package}"


def test_every_requirement_has_an_exact_version():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert len(requirements) == len(pinned_packages())
