"""The executed notebook as it is committed: what only a running kernel can show becomes text."""

import html
import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

_VIEW = "application/vnd.jupyter.widget-view+json"
_STATE = "application/vnd.jupyter.widget-state+json"
_DEMO = "<p><em>While the notebook runs, the demo is here.</em></p>"


def store(executed: Path, target: Path) -> None:
    """Write an executed notebook to `target` as it is committed."""
    notebook = nbformat.read(executed, as_version=4)
    clean(notebook)
    nbformat.write(notebook, target)


def clean(notebook: NotebookNode) -> None:
    """Put text in place of widgets and of the demo's frame, and drop what differs by run.

    Without a kernel JupyterLab would show an error for each of them.
    """
    widgets = notebook.metadata.pop("widgets", {}).get(_STATE, {}).get("state", {})
    notebook.metadata.kernelspec.display_name = "Python 3 (ipykernel)"  # as JupyterLab names it
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for data in (output["data"] for output in cell.get("outputs", []) if "data" in output):
            if view := data.pop(_VIEW, None):
                data["text/plain"] = _as_text(widgets, view["model_id"])
            if data.get("text/html", "").startswith("<div><iframe"):
                data["text/html"] = _DEMO


def _as_text(widgets: dict[str, Any], model_id: str) -> str:
    """A widget in its last state: a progress bar as tqdm prints it, or labels with values."""
    state = widgets[model_id]["state"]
    if "children" in state:
        children = [
            _as_text(widgets, name.removeprefix("IPY_MODEL_")) for name in state["children"]
        ]
        is_bar = len(children) == 3 and "█" in children[1]
        return ("" if is_bar else " · ").join(children).strip()
    if state["_model_name"] == "FloatProgressModel":
        share = state["value"] / state["max"]
        return f" {share:.0%}|{round(10 * share) * '█':10}| "
    if "index" in state:
        return f"{state['description']} {state['_options_labels'][state['index']]}"
    text = html.unescape(state["value"]).replace("\u2007", " ")  # tqdm aligns with this space
    return re.sub(r"\s*\d+%$", "", f"{state.get('description', '')} {text}").strip()
