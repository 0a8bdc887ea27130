"""How the page's parts look: texts and options that depend on a model, a run or an error."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import gradio as gr

from ov_pixart.demo.settings import ModelInfo
from ov_pixart.demo.studio import Finished

HISTORY_LENGTH = 24


def status(headline: str, line: str = "", done: float = 0, *, error: bool = False) -> str:
    """The status above the images. Elements keep their places, so nothing jumps during a run.

    Screen readers announce the beginning and the end, not every step.
    """
    live = "off" if 0 < done < 1 else "polite"
    return (
        f'<p class="headline{" error" if error else ""}" role="status" aria-live="{live}">'
        f"{html.escape(headline)}</p>"
        f'<progress max="1" value="{done:.3f}" aria-label="Denoising"></progress>'
        f'<p class="line">{html.escape(line)}</p>'
    )


def facts(runs: dict[str, Finished | None], models: dict[str, ModelInfo]) -> str:
    """A table of what each version takes."""
    rows = {
        "": runs,
        "---": ["---:"] * len(runs),
        "On disk": [f"{models[version].size_mb:,.0f} MB" for version in runs],
        "Image": [f"{run.seconds:.2f} s" if run else "–" for run in runs.values()],
        "One step": [f"{run.step_ms:.0f} ms" if run else "–" for run in runs.values()],
    }
    return "\n".join(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())


def reason(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"That did not work: {text[0] if text else type(error).__name__}"


def seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


def newest(saved: list, history: list | None) -> list:
    """This visit's images with the ones just saved in front; the oldest make room."""
    return [*reversed(saved), *(history or [])][:HISTORY_LENGTH]


def dropdown(label: str, choices: Iterable[str], value: str) -> gr.Dropdown:
    elem_id = label.lower().replace(" ", "-")
    return gr.Dropdown(list(choices), value=value, label=label, filterable=False, elem_id=elem_id)


def guidance_looks(model: ModelInfo) -> dict[str, Any]:
    built_in = "Has no effect: this model was distilled with guidance built in."
    how = "How closely to follow the prompt; 1 and below is off."
    return {"info": built_in if model.few_step else how, "interactive": not model.few_step}


def interval_looks(guidance: float) -> dict[str, Any]:
    how = "Guided are the first steps; every step after them takes half the time."
    off = "Has no effect: needs a guidance above 1."
    return {"info": how if guidance > 1 else off, "interactive": guidance > 1}


def negative_looks(guidance: float) -> dict[str, Any]:
    info = "What to keep out." if guidance > 1 else "Has no effect: needs a guidance above 1."
    return {"info": info, "interactive": guidance > 1}
