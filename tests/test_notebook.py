"""The notebook is committed as it ran, and strict nbval would notice if a picture went wrong."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from benchmarks.notebook import copy_needed, run
from benchmarks.stored import clean

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "pixart.ipynb"
READING = re.compile(r"on (mint|white) – (right|wrong)")  # as printed by the oracle's cell


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """Every text that a cell left behind."""
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (str(output.get("data", {}).get(k, "")) for k in ("text/plain", "text/html"))


def test_it_is_committed_executed_in_order_and_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_its_outputs_hold_no_paths_of_a_machine(notebook):
    for cell in code_cells(notebook):
        for text in texts(cell):
            assert not re.search(r"(^|[\s'\"(])(/[a-z]+/[\w./-]+|[A-Z]:\\)", text), text


def test_nothing_in_it_needs_a_kernel_to_show(notebook):
    shown = str([cell.outputs for cell in code_cells(notebook)])
    assert (
        "widget-view" not in shown and "<iframe" not in shown and "widgets" not in notebook.metadata
    )


def test_widgets_are_stored_as_text_in_their_last_state():
    def label(text):
        return {"state": {"_model_name": "HTMLModel", "value": text}}

    widgets = {
        "bar": {
            "state": {
                "_model_name": "HBoxModel",
                "children": ["IPY_MODEL_a", "IPY_MODEL_b", "IPY_MODEL_c"],
            }
        },
        "a": label("Converted: 100%"),
        "b": {"state": {"_model_name": "FloatProgressModel", "value": 3.0, "max": 3.0}},
        "c": label(" 3/3\u2007[00:04&lt;00:00]"),
        "box": {"state": {"_model_name": "VBoxModel", "children": ["IPY_MODEL_d"]}},
        "d": {
            "state": {
                "_model_name": "DropdownModel",
                "description": "Device:",
                "index": 1,
                "_options_labels": ["GPU", "CPU"],
            }
        },
    }
    view = "application/vnd.jupyter.widget-view+json"
    outputs = [
        nbformat.v4.new_output("display_data", {view: {"model_id": name}, "text/plain": "…"})
        for name in ("bar", "box")
    ]
    frame = {"text/html": '<div><iframe src="http://127.0.0.1:7860/"></iframe></div>'}
    outputs.append(nbformat.v4.new_output("display_data", frame))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=outputs)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    state = "application/vnd.jupyter.widget-state+json"
    notebook.metadata.widgets = {state: {"state": widgets}}
    notebook = nbformat.from_dict(notebook)
    clean(notebook)
    texts = [output.data.get("text/plain") for output in notebook.cells[0].outputs]
    assert texts[:2] == ["Converted: 100%|██████████| 3/3 [00:04<00:00]", "Device: CPU"]
    assert "iframe" not in str(notebook) and "widget-view" not in str(notebook)


def test_no_table_is_cut(notebook):
    for cell in code_cells(notebook):
        assert not any(re.search(r"<td>[^<]*\.\.\.</td>", text) for text in texts(cell))


def test_every_code_cell_is_short_and_leaves_something_to_look_at(notebook):
    cells = notebook.cells
    assert len(cells) <= 60
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 15, cell.source
    assert len((NOTEBOOK).read_bytes()) < 2.5e6


def test_no_cell_is_spared_by_nbval(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert not re.search(r"nbval[-_]|NBVAL_", source, re.IGNORECASE)
    assert not any(cell.metadata.get("tags") for cell in notebook.cells)


def test_every_contents_link_has_its_anchor(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = set(re.findall(r"\]\(#([\w-]+)\)", prose))
    assert links and links <= set(re.findall(r'<a id="([\w-]+)"', prose))


@pytest.mark.slow
def test_nbval_fails_when_one_oracle_reading_is_altered(notebook, tmp_path):
    """In `make test` strict nbval passes on the notebook as it is; here one word is another."""
    cells = notebook.cells
    first = next(i for i, c in enumerate(cells) if any(READING.search(text) for text in texts(c)))
    notebook.cells = cells[: first + 1]  # conversion and first images; the rest takes minutes
    copy = copy_needed(tmp_path)
    nbformat.write(notebook, copy)
    honest = copy.read_text(encoding="utf-8")
    copy.write_text(READING.sub(r"on navy – \2", honest, count=1), encoding="utf-8")

    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--nbval"]
    command += ["--nbval-sanitize-with", str(ROOT / "tests" / "nbval_sanitize.cfg")]
    command += ["--rootdir", str(tmp_path), copy.name]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    failed = re.findall(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    assert len(failed) == 1, result.stdout[-3000:]
    assert "on navy" in result.stdout


@pytest.mark.slow
def test_with_another_model_it_runs_to_its_end(checkpoint, tmp_path):
    """As with a real checkpoint: no oracle, no PyTorch beside it, nothing in 32 bits."""
    run(checkpoint("lcm"), tmp_path / "other.ipynb")
    other = nbformat.read(tmp_path / "other.ipynb", as_version=4)
    cells = code_cells(other)
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    warned = [output.text for output in outputs if output.get("name") == "stderr"]
    assert all("it keeps its 16 bits" in text for text in warned)  # of random weights
    printed = " ".join(text for cell in cells for text in texts(cell))
    assert "lcm will be converted" in printed
    assert "'num_inference_steps': 4" in printed
    assert "difference from PyTorch" not in printed
    assert "blue ring" not in printed  # nothing that only PixArt-tiny knows
