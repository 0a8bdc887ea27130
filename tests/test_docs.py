"""README and docs: short, every link leads somewhere, every command exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(text(README).splitlines()) <= 130


@each_document
def test_every_relative_link_leads_to_a_file(document):
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text(document))
    files = [link for link in links if "://" not in link]
    assert not [link for link in files if not (document.parent / link).exists()]


@each_document
def test_every_make_target_exists(document):
    targets = set(re.findall(r"^([\w-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([\w-]+)", text(document), re.MULTILINE)
    assert set(named) <= targets


@each_document
def test_every_module_that_a_command_runs_exists(document):
    modules = set(re.findall(r"python -m ([\w.]+)", text(document)))
    missing = [name for name in modules if not importlib.util.find_spec(name)]
    assert not missing


def test_the_map_names_every_module():
    # one line per module or folder, between the fences that hold ov_pixart/
    (tree,) = re.findall(r"^```text\n(.*?)^```", text(README), re.MULTILINE | re.DOTALL)
    modules = {path.stem for path in (ROOT / "ov_pixart").glob("*.py")} - {"__init__"}
    assert not {name for name in modules if not re.search(rf"\b{name}\b", tree)}
