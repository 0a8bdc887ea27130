"""`/generate`, the demo's endpoint for programs."""

import logging
from collections.abc import Callable
from dataclasses import asdict

import gradio as gr
from gradio_client import handle_file

from ov_pixart.demo.looks import reason
from ov_pixart.demo.settings import NO_STYLE, Settings, problems
from ov_pixart.demo.studio import Studio

logger = logging.getLogger(__name__)


# No postponed annotations in this module: Gradio derives the endpoint's types from the real ones.


def endpoint(studio: Studio, default: str) -> Callable[..., tuple[list[dict], dict]]:
    """The function behind `/generate`; its arguments are the fields of `Settings`."""

    def generate(
        prompt: str,
        negative_prompt: str = "",
        style: str = NO_STYLE,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        images: int = 1,
        aspect_ratio: str = "1:1",
        version: str = default,
        guidance_end: float | None = None,
    ) -> tuple[list[dict], dict]:
        """Generate; returns the PNG files and a dictionary with settings, seconds and notes.

        Steps and guidance default to the version's own. `guidance_end`: the share of the steps that
        are guided, from 0 to 1.
        """
        if version in studio.models:
            model = studio.models[version]
            steps = model.steps if steps is None else steps
            guidance = model.guidance if guidance is None else guidance
            guidance_end = model.guidance_end if guidance_end is None else guidance_end
        settings = Settings(
            prompt, negative_prompt, style, seed, steps, guidance, images, aspect_ratio, version,
            guidance_end,
        )  # fmt: skip
        if found := problems(settings, studio.models):
            message = " ".join(f"{name}: {text}" for name, text in found.items())
            raise gr.Error(message, print_exception=False)
        try:
            *_, finished = studio.generate(settings)
        except Exception as error:
            logger.exception("Generation failed.")
            raise gr.Error(reason(error), print_exception=False) from error
        files = [handle_file(path) for path, _ in studio.save(finished, settings)]
        details = {"seconds": round(finished.seconds, 3), "notes": finished.notes}
        return files, asdict(settings) | details

    return generate
