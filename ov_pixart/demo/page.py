"""The demo's page: its layout, a table of events, and the handlers that the table names."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gradio as gr

from ov_pixart.demo import settings as limits
from ov_pixart.demo.endpoint import endpoint
from ov_pixart.demo.looks import (
    dropdown,
    facts,
    guidance_looks,
    interval_looks,
    negative_looks,
    newest,
    reason,
    seconds,
    status,
)
from ov_pixart.demo.settings import NO_STYLE, Settings, describe, read_settings
from ov_pixart.demo.studio import Finished, Preview, Started, Studio, Update
from ov_pixart_helper import named_folders, public

logger = logging.getLogger(__name__)

QUEUE = {"concurrency_id": "generate", "concurrency_limit": 1}  # one generation at a time
HEADER = """# PixArt with OpenVINO
Type a scene, watch it form step by step, compare versions on the same seed. Everything runs on
this machine."""

Values = dict[Any, Any]  # component → its value, or an update of it


class Demo(gr.Blocks):
    """A `gr.Blocks` that frees its pipelines and images when it is closed."""

    studio: Studio

    def close(self, verbose: bool = False) -> None:
        super().close(verbose=verbose)
        self.studio.close()


@public
def make_demo(pipelines: dict[str, Path | str], *, default: str | None = None) -> gr.Blocks:
    """Build the page. `pipelines`: version → folder of a converted pipeline, loaded on first use.

    `default`: the version that is selected at first (default: the first one).
    Raises ValueError for no pipelines, for anything but folders or an unknown `default`,
    FileNotFoundError for a folder without a converted pipeline.
    """
    folders = {name: folder.resolve() for name, folder in named_folders(pipelines).items()}
    if not folders:
        raise ValueError("pipelines={} is empty: give at least one version and its folder.")
    default = next(iter(folders)) if default is None else default
    if default not in folders:
        raise ValueError(f"default={default!r} is not one of the versions {list(folders)}.")
    for version, folder in folders.items():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"No converted pipeline in {pipelines[version]}.")
    kept = (3600, 24 * 3600)  # look every hour for copies of images that are older than a day
    name = "PixArt with OpenVINO"
    with Demo(title=name, analytics_enabled=False, fill_width=True, delete_cache=kept) as demo:
        demo.studio = Studio(folders)
        Page(demo.studio, default)
    return demo


class Page:
    """The components of one page and their handlers. Its state lives in the visitor's session."""

    def __init__(self, studio: Studio, default: str) -> None:
        self.studio, self.default = studio, default
        self.controls: dict[str, Any] = {}  # field of Settings → component
        gr.Markdown(HEADER)
        with gr.Row(equal_height=False, elem_id="workspace"):
            with gr.Column(scale=5, min_width=320):
                self._build_controls()
            with gr.Column(scale=6, min_width=320):
                self._build_results()
        gr.api(endpoint(studio, default), api_name="generate", **QUEUE)
        self._connect()

    # -- layout --------------------------------------------------------------------------------

    def _build_controls(self) -> None:
        model, c = self.studio.models[self.default], self.controls
        prompts, longest = list(model.examples.values()), limits.MAX_PROMPT_CHARACTERS
        c["prompt"] = gr.Textbox(
            prompts[0], label="Prompt", lines=2, max_lines=6, max_length=longest, elem_id="prompt"
        )
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
            self.stop = gr.Button("Stop", interactive=False, min_width=120, elem_id="stop")
        gr.Examples(
            [[prompt] for prompt in prompts],
            inputs=[c["prompt"]],
            label="Try one of these",
            example_labels=list(model.examples),
            elem_id="examples",
            api_visibility="private",
            preload=False,
        )
        with gr.Row(elem_id="basics"):
            c["version"] = dropdown("Version", self.studio.folders, self.default)
            c["aspect_ratio"] = dropdown("Aspect ratio", model.sizes, "1:1")
        with gr.Row(elem_id="seed-row"):
            same = "The same seed, the same image."
            c["seed"] = gr.Number(7, label="Seed", precision=0, info=same, elem_id="seed")
            self.randomise = gr.Checkbox(False, label="New seed each time", min_width=120)
        with gr.Accordion("More settings", open=False, elem_id="more"):
            steps = (model.min_steps, limits.MAX_STEPS, model.steps)
            c["steps"] = gr.Slider(*steps, step=1, label="Steps", elem_id="steps")
            c["guidance"] = gr.Slider(
                0, limits.MAX_GUIDANCE, model.guidance, step=0.1, label="Guidance",
                elem_id="guidance", **guidance_looks(model),
            )  # fmt: skip
            c["guidance_end"] = gr.Slider(
                0, 1, model.guidance_end, step=0.05, label="Guided share of the steps",
                elem_id="guidance-end", **interval_looks(model.guidance),
            )  # fmt: skip
            c["negative_prompt"] = gr.Textbox(
                "", label="Negative prompt", max_length=longest, elem_id="negative-prompt",
                **negative_looks(model.guidance),
            )  # fmt: skip
            c["style"] = dropdown("Style", model.styles, NO_STYLE)
            most = limits.MAX_IMAGES
            c["images"] = gr.Slider(1, most, 1, step=1, label="Number of images", elem_id="images")
        self.previous = gr.State(self.default)  # the version that steps and guidance belong to

    def _build_results(self) -> None:
        self.status = gr.HTML(status("Ready"), elem_id="status", apply_default_css=False)
        self.reached = gr.State("")  # "step 3 of 20" of the run in progress
        gallery = {"format": "png", "show_label": False, "interactive": False}
        with gr.Tabs(elem_id="results") as self.tabs:
            with gr.Tab("Image", id="image"):
                self.stage = gr.Gallery(
                    label="Images", columns=2, object_fit="contain",
                    buttons=["download", "fullscreen"], elem_id="stage", **gallery,
                )  # fmt: skip
            with gr.Tab("Compare", id="compare"):
                self._build_compare()
        with gr.Row(elem_id="visit"):
            gr.Markdown("### This visit")
            self.reuse = gr.Button("Reuse these settings", size="sm", scale=0, elem_id="reuse")
        self.history = gr.Gallery(  # PNGs, newest first
            label="This visit", height="6.5rem", object_fit="cover", fit_columns=False,
            allow_preview=False, buttons=[], elem_id="history", **gallery,
        )  # fmt: skip

    def _build_compare(self) -> None:
        versions = list(self.studio.folders)
        other = next((version for version in versions if version != self.default), self.default)
        with gr.Row():
            self.left = dropdown("Left", versions, self.default)
            self.right = dropdown("Right", versions, other)
        enough = len(versions) > 1
        go = "Compare on the same seed" if enough else "Compare needs two versions"
        self.compare_go = gr.Button(go, variant="primary", interactive=enough, elem_id="compare-go")
        self.slider = gr.ImageSlider(
            label="Comparison", show_label=False, format="png", type="pil", height=440,
            max_height=440, interactive=False, elem_id="compare-slider",
        )  # fmt: skip
        self.divider = gr.Slider(
            0, 100, 50, step=1, label="Divider", interactive=True, buttons=[], elem_id="divider"
        )
        nothing = dict.fromkeys([self.default, other])
        self.facts = gr.Markdown(facts(nothing, self.studio.models), elem_id="facts")

    # -- events --------------------------------------------------------------------------------

    def _connect(self) -> None:
        c = self.controls
        chosen = {*c.values(), self.randomise}
        pair = {*chosen, self.left, self.right}
        page = [*c.values(), self.randomise, self.previous, self.tabs, self.stage, self.status]
        page += [self.reached, self.slider, self.facts, self.history]
        page += [self.go, self.stop, self.compare_go]
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        check = {"validator": self.check, "concurrency_limit": None, **hidden}
        run = {"show_progress": "full", "api_visibility": "private", **QUEUE}
        quick = {"queue": False, "trigger_mode": "always_last", **hidden}
        on = gr.on
        # fmt: off
        # Settings are checked at once; the run that follows waits for its turn.
        asked = on([self.go.click, c["prompt"].submit], self.prepare, chosen, page, **check)
        paired = on(self.compare_go.click, self.prepare, pair, page, **check)
        runs = [
            asked.success(self.generate, {*chosen, self.history}, page,
                          show_progress_on=self.stage, **run),
            paired.success(self.compare, {*pair, self.history}, page,
                           show_progress_on=self.slider, **run),
        ]
        on(self.stop.click, self.stopped, self.reached, page, cancels=runs, **quick)
        on(self.history.select, self.show, self.history, page, **quick)
        on(self.reuse.click, self.restore, self.stage, page, **quick)
        on(c["version"].input, self.change_version, {*c.values(), self.previous}, page, **quick)
        on(c["guidance"].change,
           lambda scale: [gr.update(**f(scale)) for f in (interval_looks, negative_looks)],
           c["guidance"], [c["guidance_end"], c["negative_prompt"]], **quick)
        on(self.randomise.change, lambda random: gr.update(interactive=not random),
           self.randomise, c["seed"], **quick)
        on(self.divider.input, lambda position: gr.update(slider_position=position),
           self.divider, self.slider, **quick)
        # fmt: on

    def check(self, values: Values) -> Values:
        """Refuse what cannot be used, next to its control."""
        found = limits.problems(self._settings(values), self.studio.models)
        if values[self.randomise]:
            found.pop("seed", None)
        verdicts = {
            control: gr.validate(name not in found, found.get(name, ""))
            for name, control in self.controls.items()
        }
        if self.right in values:
            differ = values[self.left] != values[self.right]
            verdicts[self.right] = gr.validate(differ, "Choose another version than on the left.")
        return verdicts

    def prepare(self, values: Values) -> Values:
        """Draw the seed if asked to; show that the request waits."""
        seed = random.randint(0, limits.MAX_SEED) if values[self.randomise] else gr.skip()
        return {
            self.controls["seed"]: seed,
            self.tabs: gr.update(selected="compare" if self.right in values else "image"),
            self.status: status("Waiting for its turn"),
            self.reached: "",
            **self._busy(True),
        }

    def generate(self, values: Values) -> Iterator[Values]:
        """Show every step on the stage; put the finished images in front of this visit's."""
        settings = self._settings(values)
        try:
            for update, shown in self._run(settings):
                if isinstance(update, Preview):
                    shown[self.stage] = [(image, settings.prompt) for image in update.images]
                if isinstance(update, Finished):
                    shown[self.stage] = saved = self.studio.save(update, settings)
                    shown[self.history] = newest(saved, values[self.history])
                    shown |= self._busy(False)
                yield shown
        except Exception as error:
            yield self._failed(error)

    def compare(self, values: Values) -> Iterator[Values]:
        """Generate with both versions; the slider shows each step on its side."""
        asked = replace(self._settings(values), images=1)
        left, right = values[self.left], values[self.right]
        history, finished = values[self.history], dict.fromkeys([left, right])
        sides: dict[str, Any] = {}  # version → image or path
        try:
            for version in (left, right):
                settings = limits.fit(asked, asked.version, version, self.studio.models)
                height, width = self.studio.models[version].sizes[settings.aspect_ratio]
                for update, shown in self._run(settings):
                    if isinstance(update, Preview):
                        sides[version] = update.images[0].resize((width, height))
                    if isinstance(update, Finished):
                        saved = self.studio.save(update, settings)
                        sides[version], finished[version] = saved[0][0], update
                        history = newest(saved, history)
                        shown[self.history] = history
                        shown[self.facts] = facts(finished, self.studio.models)
                    if sides:
                        shown[self.slider] = (sides[left], sides.get(right, sides[left]))
                    yield shown
            yield self._busy(False)
        except Exception as error:
            yield self._failed(error)

    def stopped(self, reached: str) -> Values:
        """Gradio has closed the run's generator; the last preview stays."""
        headline = f"Stopped after {reached}" if reached else "Stopped before the first step"
        return {self.status: status(headline), **self._busy(False)}

    def show(self, history: list[tuple[str, str]], event: gr.SelectData) -> Values:
        """Bring an image of this visit back to the stage."""
        chosen = history[event.index]
        settings = read_settings(chosen[0])
        line = describe(settings, self.studio.models[settings.version])
        headline = f"Image {len(history) - event.index} of this visit"
        shown = {self.stage: [chosen], self.status: status(headline, line)}
        return {self.tabs: gr.update(selected="image"), **shown}

    def restore(self, stage: list[tuple[str, str]] | None) -> Values:
        """Set every control as it was when the image on the stage was generated."""
        try:
            settings = read_settings(stage[0][0])
        except (TypeError, IndexError, ValueError):  # an empty stage; a preview
            return {self.status: status("Choose a finished image first.", error=True)}
        return {self.randomise: False, **self._set_controls(settings.version, asdict(settings))}

    def change_version(self, values: Values) -> Values:
        """Change what the new version cannot use; the rest stays: the visitor may be typing."""
        shown = self._settings(values)
        usable = limits.fit(shown, values[self.previous], shown.version, self.studio.models)
        changed = dict(asdict(usable).items() - asdict(shown).items())
        return self._set_controls(shown.version, changed)

    # -- what handlers share -------------------------------------------------------------------

    def _settings(self, values: Values) -> Settings:
        return Settings(**{name: values[control] for name, control in self.controls.items()})

    def _busy(self, busy: bool) -> Values:
        free = gr.update(interactive=not busy)
        buttons = {self.go: free, self.stop: gr.update(interactive=busy)}
        return buttons | ({self.compare_go: free} if len(self.studio.folders) > 1 else {})

    def _run(self, settings: Settings) -> Iterator[tuple[Update | None, Values]]:
        """The updates of one run, each with its status; None while a step takes long."""
        line = describe(settings, self.studio.models[settings.version])
        with closing(self.studio.generate(settings)) as updates:
            for update in updates:
                match update:
                    case Started(stage, notes):
                        line += " · " + " ".join(notes) if notes else ""
                        shown = {self.status: status(stage, line)}
                    case Preview(step, steps, _, left):
                        reached = f"step {step} of {steps}"
                        rest = f" · {seconds(left)} left" if step < steps else ""
                        headline = reached.capitalize() + rest
                        shown = {self.status: status(headline, line, step / steps)}
                        shown[self.reached] = reached
                    case Finished():
                        headline = f"Done in {seconds(update.seconds)}"
                        shown = {self.status: status(headline, line, 1)}
                    case None:
                        shown = {self.status: gr.skip()}
                yield update, shown

    def _failed(self, error: Exception) -> Values:
        logger.exception("Generation failed.")
        return {self.status: status(reason(error), error=True), **self._busy(False)}

    def _set_controls(self, version: str, values: dict[str, Any]) -> Values:
        """Updates that fit every control to a version and set `values`, field → value."""
        model = self.studio.models[version]
        looks: dict[str, dict[str, Any]] = {
            "style": {"choices": list(model.styles)},
            "aspect_ratio": {"choices": list(model.sizes)},
            "steps": {"minimum": model.min_steps},
            "guidance": guidance_looks(model),
        }
        for name, value in values.items():
            looks.setdefault(name, {})["value"] = value
        updates = {self.controls[name]: gr.update(**look) for name, look in looks.items()}
        return {self.previous: version, **updates}
