"""Loads pipelines when they are first used and generates with them, one request at a time."""

from __future__ import annotations

import queue
import shutil
import statistics
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ov_pixart.demo.settings import ModelInfo, Settings, read_model_info, save_image, styled_prompt
from ov_pixart_helper import load_pipeline, release_memory


@dataclass(frozen=True)
class Started:
    """A stage before the first denoising step, and remarks on the prompt."""

    stage: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Preview:
    """The images after `step` of `steps`, small and blurred."""

    step: int
    steps: int
    images: list[Image.Image]
    seconds_left: float


@dataclass(frozen=True)
class Finished:
    """The images, and the time they took after loading."""

    images: list[Image.Image]
    seconds: float
    step_ms: float  # median
    notes: list[str]


Update = Started | Preview | Finished


class _Stopped(Exception):
    """Raised in diffusers' callback, the only way out of its denoising loop."""


class Studio:
    """The pipelines of one demo. `folders`: version → folder of a converted pipeline.

    `models`: version → ModelInfo. `output`: folder for the PNGs, removed with the studio.
    """

    PATIENCE = 0.5  # seconds

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.models = {version: read_model_info(folder) for version, folder in folders.items()}
        self.output = Path(tempfile.mkdtemp(prefix="pixart-demo-"))
        weakref.finalize(self, shutil.rmtree, self.output, ignore_errors=True)
        self._loaded: OrderedDict[str, tuple[Any, LatentPreview]] = OrderedDict()
        self._lock = threading.RLock()
        self.closing = threading.Event()

    @property
    def capacity(self) -> int:
        """How many pipelines may stay in memory: two if they are small."""
        return 2 if sum(sorted(m.size_mb for m in self.models.values())[-2:]) < 2_000 else 1

    def close(self) -> None:
        """Stop the run in progress, free the pipelines, delete the images. Can be used again."""
        self.closing.set()
        with self._lock:  # waits for the run's current step
            self._loaded.clear()
            release_memory()
        self.closing.clear()
        shutil.rmtree(self.output, ignore_errors=True)

    def generate(self, settings: Settings) -> Iterator[Update | None]:
        """Yield `Started`, a `Preview` after every step, and `Finished`.

        The pipeline runs in its own thread. Closing the iterator stops it after its current step;
        `close()` does so too, and the iterator then ends without `Finished`. During a long step
        it yields None now and then, because an iterator cannot be closed while it waits.
        """
        updates: queue.SimpleQueue[Update | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def report(update: Update) -> None:
            if abandoned.is_set() or self.closing.is_set():
                raise _Stopped
            updates.put(update)

        def work() -> None:
            try:
                with self._lock:
                    self._run(settings, report)
            except BaseException as error:  # raised again in the reader's thread
                updates.put(error)

        threading.Thread(target=work, name="pixart-demo", daemon=True).start()
        try:
            while True:
                try:
                    update = updates.get(timeout=self.PATIENCE)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(update, _Stopped):
                    return
                if isinstance(update, BaseException):
                    raise update
                yield update
                if isinstance(update, Finished):
                    return
        finally:
            abandoned.set()

    def save(self, finished: Finished, settings: Settings) -> list[tuple[str, str]]:
        """Write the images as PNGs; return each one's path and prompt, as a gallery takes them."""
        own = [replace(settings, seed=seed, images=1) for seed in settings.seeds]
        pairs = zip(finished.images, own, strict=True)
        return [(str(save_image(image, self.output, s)), s.prompt) for image, s in pairs]

    def _run(self, settings: Settings, report: Callable[[Update], None]) -> None:
        model = self.models[settings.version]
        if settings.version not in self._loaded:
            report(Started(f"Loading {settings.version}"))
        pipe, preview = self._load(settings.version)
        prompt = styled_prompt(settings, model)
        notes = prompt_notes(pipe.tokenizer, prompt, model.max_tokens)
        report(Started("Encoding the prompt", notes))
        ticks = [time.perf_counter()]

        def after_step(step: int, timestep: Any, latents: torch.Tensor) -> None:
            ticks.append(time.perf_counter())
            pace = statistics.median(np.diff(ticks))
            images = preview(clean_latents(pipe.scheduler, latents), pace)
            report(Preview(step + 1, settings.steps, images, pace * (settings.steps - step - 1)))

        images = pipe(
            prompt,
            **_call_arguments(settings, model),
            callback=after_step,
            callback_steps=1,
        ).images
        step_ms = 1e3 * statistics.median(np.diff(ticks))
        report(Finished(images, time.perf_counter() - ticks[0], step_ms, notes))

    def _load(self, version: str) -> tuple[Any, LatentPreview]:
        """The pipeline and its preview; evicts the ones that were used longest ago."""
        if version not in self._loaded:
            while len(self._loaded) >= self.capacity:
                self._loaded.popitem(last=False)
                release_memory()
            pipe = load_pipeline(self.folders[version])
            pipe.set_progress_bar_config(disable=True)
            self._loaded[version] = pipe, LatentPreview(pipe.vae)
        self._loaded.move_to_end(version)
        return self._loaded[version]


def _call_arguments(settings: Settings, model: ModelInfo) -> dict[str, Any]:
    height, width = model.sizes[settings.aspect_ratio]
    own_timesteps = model.timesteps and settings.steps == len(model.timesteps)
    return {
        "negative_prompt": settings.negative_prompt,
        "num_inference_steps": settings.steps,
        "timesteps": list(model.timesteps) if own_timesteps else None,
        "guidance_scale": settings.guidance,
        "guidance_end": settings.guidance_end if settings.guidance > 1 else 1.0,
        "num_images_per_prompt": settings.images,
        "height": height,
        "width": width,
        "use_resolution_binning": False,  # the size is one that the model was trained on
        "max_sequence_length": model.max_tokens,
        "generator": [torch.Generator().manual_seed(seed) for seed in settings.seeds],
    }


class LatentPreview:
    """Turns latents `(B, 4, h, w)` into small images while the pipeline is at work.

    A fast VAE decodes the latents at half their size. For a slow one, a linear map (latents →
    colours, a least-squares fit to a few decoded samples) gives h × w pixels at no cost.
    """

    SHARE = 0.5  # of a step's time that decoding may take

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(8, 4, 4, 4, generator=generator)
        latents = torch.nn.functional.interpolate(latents, scale_factor=4, mode="bicubic")
        latents += 0.25 * torch.randn(latents.shape, generator=generator)
        colours = torch.nn.functional.adaptive_avg_pool2d(self._decode(latents), (16, 16))
        target = colours.permute(0, 2, 3, 1).reshape(-1, 3)
        self.weights = torch.linalg.lstsq(self._design(latents), target).solution  # (5, 3)
        start = time.perf_counter()
        self._decode(latents)  # once more: the first call was slow
        self.seconds_per_latent = (time.perf_counter() - start) / (8 * 16 * 16)

    def __call__(self, latents: torch.Tensor, step_seconds: float) -> list[Image.Image]:
        batch, _, height, width = latents.shape
        cost = self.seconds_per_latent * batch * height * width / 4
        if cost < self.SHARE * step_seconds:
            colours = self._decode(torch.nn.functional.avg_pool2d(latents.float(), 2))
            colours = colours.permute(0, 2, 3, 1)
        else:
            colours = (self._design(latents) @ self.weights).reshape(batch, height, width, 3)
        pixels = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return [Image.fromarray(p) for p in pixels]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """`(B, 4, h, w)` → `(B, 3, 8h, 8w)` in [-1, 1]."""
        with torch.no_grad():
            scaled = latents / self.vae.config.scaling_factor
            return torch.as_tensor(self.vae.decode(scaled, return_dict=False)[0]).float()

    @staticmethod
    def _design(latents: torch.Tensor) -> torch.Tensor:
        """`(B, 4, h, w)` → `(B h w, 5)`, with a column of ones."""
        flat = latents.float().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)


def clean_latents(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """The model's estimate of the clean latents if the scheduler keeps it, else the noisy ones.

    DPM-Solver++ does. Its estimate shows the image several steps earlier.
    """
    newest = (getattr(scheduler, "model_outputs", None) or [None])[-1]
    is_estimate = getattr(scheduler.config, "algorithm_type", "") == "dpmsolver++"
    if is_estimate and newest is not None and newest.shape == latents.shape:
        return newest
    return latents


def prompt_notes(tokenizer: Any, prompt: str, max_tokens: int) -> list[str]:
    """Remarks on what the model cannot read: the end of a long prompt, unknown words."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=max_tokens + 20).input_ids

    notes = []
    text = prompt.lower()
    ids = tokens(text)
    if len(ids) > max_tokens:  # the last of them ends the text
        cut = tokenizer.decode(ids[max_tokens - 1 :], skip_special_tokens=True).strip()
        notes.append(
            f"The model reads {max_tokens} tokens: the prompt is cut before “{cut[:40]}…”."
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown in ids[:max_tokens]:
        words = [word for word in dict.fromkeys(text.split()) if unknown in tokens(word)]
        notes.append(f"Not in this model's vocabulary: {', '.join(words[:8])}.")
    return notes
