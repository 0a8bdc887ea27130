"""The demo: a page that paints with the converted pipelines and shows every denoising step.

Read from top to bottom: what can be asked for (*Settings*), how a picture is painted and watched
(*Studio*), how results look in the page (*Page*), how controls are wired (*Demo*), and how the
page is served (*Launch*).

    demo = make_demo({"FP16": "models/pixart-tiny/fp16", "INT8": "models/pixart-tiny/int8"})
    launch_demo(demo)
    demo.close()

Everything stays on this machine: the server listens on the loopback address only, nothing is
fetched from elsewhere (no web fonts, no scripts, no analytics) and Gradio's run history is off.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import gc
import html
import io
import json
import logging
import math
import queue
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
import uuid
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import psutil
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ov_pixart_helper import (
    OVDiffusionPipeline,
    convert_pipeline,
    default_settings,
    optimize_pipeline,
)

logger = logging.getLogger(__name__)

# ==============================================================================================
# Settings: what can be asked for, and what is refused
# ==============================================================================================

MAX_SEED = 2**32 - 1
MAX_STEPS = 100
MAX_GUIDANCE = 20.0
MAX_PICTURES = 4
MAX_PROMPT_CHARACTERS = 20_000
HISTORY_LENGTH = 24

ASPECT_RATIOS = {  # name → width / height
    "1:1": 1.0,
    "4:3": 4 / 3,
    "3:4": 3 / 4,
    "3:2": 3 / 2,
    "2:3": 2 / 3,
    "16:9": 16 / 9,
    "9:16": 9 / 16,
}

NO_STYLE = "None"
STYLES = {  # for checkpoints trained on pictures of the world
    NO_STYLE: "{prompt}",
    "Photograph": "{prompt}, photograph, natural light, 50 mm lens, shallow depth of field",
    "Watercolour": "{prompt}, loose watercolour on rough paper, soft edges, pale washes",
    "Ink drawing": "{prompt}, black ink drawing, confident lines, cross-hatching",
    "Paper cut": "{prompt}, layered paper cut-out, clean shapes, soft shadows",
    "Isometric": "{prompt}, isometric illustration, tidy geometry, pastel colours",
    "Film still": "{prompt}, film still, wide shot, dramatic light, fine grain",
}
SCENE_STYLES = {  # PixArt-tiny knows shapes and backdrops, so its styles are backdrops
    NO_STYLE: "{prompt}",
    **{
        f"On {colour}": f"{{prompt}} on a {colour} background"
        for colour in ("white", "gray", "black", "cream", "navy", "mint")
    },
}

EXAMPLES = {  # what the button says → the prompt
    "Happy cactus": "A small cactus with a happy face in the Sahara desert",
    "Night library": "An isometric cutaway of a lighthouse keeper's library at night",
    "Sleeping fox": "A red fox asleep on a mossy stone, morning mist",
    "Paper boat": "A paper boat sailing over a map of the stars",
}
SCENE_EXAMPLES = {
    "Red heart": "a large red heart on a white background",
    "Circle above star": "a small purple circle above a large yellow star on a black background",
    "Ring beside square": "a large cyan ring left of a small orange square on a navy background",
    "Green star": "a large green star on a mint background",
    "Heart below triangle": "a small blue heart below a large pink triangle on a cream background",
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a picture; stored in the PNG, so that it can be painted again."""

    prompt: str
    negative_prompt: str = ""
    style: str = NO_STYLE
    seed: int = 0
    steps: int = 20
    guidance: float = 4.5
    pictures: int = 1
    aspect_ratio: str = "1:1"
    precision: str = ""

    @property
    def seeds(self) -> list[int]:
        """One seed a picture, so that each can be painted again on its own."""
        return [(self.seed + i) % (MAX_SEED + 1) for i in range(self.pictures)]


@dataclass(frozen=True)
class ModelFacts:
    """What the page must know about a model before it is loaded."""

    steps: int
    guidance: float
    max_tokens: int
    sizes: dict[str, tuple[int, int]]  # aspect ratio → (height, width) in pixels
    few_step: bool = False  # distilled (LCM): guidance is built into the weights
    min_steps: int = 1
    knows_scenes: bool = False  # PixArt-tiny: captions of geometric scenes only
    size_mb: float = 0.0
    timesteps: tuple[int, ...] = ()  # where one-step models (DMD) start

    @property
    def styles(self) -> dict[str, str]:
        return SCENE_STYLES if self.knows_scenes else STYLES

    @property
    def examples(self) -> dict[str, str]:
        return SCENE_EXAMPLES if self.knows_scenes else EXAMPLES


def problems(settings: Settings, facts: dict[str, ModelFacts]) -> dict[str, str]:
    """Returns field → message for every setting that cannot be used (empty: all is well)."""
    found: dict[str, str] = {}
    if settings.precision not in facts:
        return {"precision": f"Choose one of: {', '.join(facts)}."}
    model = facts[settings.precision]
    if not (settings.prompt or "").strip():
        found["prompt"] = "Type what you would like to see first."
    for name in ("prompt", "negative_prompt"):
        if len(getattr(settings, name) or "") > MAX_PROMPT_CHARACTERS:
            found[name] = f"Too long: at most {MAX_PROMPT_CHARACTERS:,} characters."
    whole = {
        "seed": (0, MAX_SEED),
        "steps": (model.min_steps, MAX_STEPS),
        "pictures": (1, MAX_PICTURES),
    }
    for name, (low, high) in whole.items():
        if not _is_whole(getattr(settings, name), low, high):
            found[name] = f"Enter a whole number from {low} to {high}."
    if not _is_number(settings.guidance, 0.0, MAX_GUIDANCE):
        found["guidance"] = f"Enter a number from 0 to {MAX_GUIDANCE:g}."
    if settings.style not in model.styles:
        found["style"] = f"Choose one of: {', '.join(model.styles)}."
    if settings.aspect_ratio not in model.sizes:
        found["aspect_ratio"] = f"Choose one of: {', '.join(model.sizes)}."
    return found


def _is_number(value: Any, low: float, high: float) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and low <= value <= high


def _is_whole(value: Any, low: int, high: int) -> bool:
    return _is_number(value, low, high) and float(value).is_integer()


def styled_prompt(settings: Settings, model: ModelFacts) -> str:
    """Puts the prompt into its style's template; a backdrop that the prompt names itself wins."""
    prompt = settings.prompt.strip()
    says_backdrop = any(word in prompt.lower() for word in ("background", "backdrop"))
    if model.knows_scenes and says_backdrop:
        return prompt
    return model.styles[settings.style].format(prompt=prompt)


def read_model_facts(folder: Path) -> ModelFacts:
    """Reads what the page must know of a converted pipeline, without loading it."""
    defaults = default_settings(folder)
    transformer = _read_json(folder / "transformer" / "config.json")
    text_encoder = _read_json(folder / "text_encoder" / "config.json")
    few_step = defaults.num_inference_steps < 10
    return ModelFacts(
        steps=defaults.num_inference_steps,
        guidance=defaults.guidance_scale,
        max_tokens=defaults.max_sequence_length,
        sizes=picture_sizes(transformer.get("sample_size"), (defaults.height, defaults.width)),
        few_step=few_step,
        min_steps=1 if few_step else 2,  # diffusers' PixArt cannot do one step of DPM-Solver++
        knows_scenes=text_encoder.get("vocab_size", 32_128) < 2_000,
        size_mb=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6,
        timesteps=getattr(defaults, "timesteps", ()),
    )


def picture_sizes(sample_size: int | None, native: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Maps aspect ratios by name to the nearest (height, width) the model was trained on."""
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

    bins = {
        32: alpha.ASPECT_RATIO_256_BIN,
        64: alpha.ASPECT_RATIO_512_BIN,
        128: alpha.ASPECT_RATIO_1024_BIN,
        256: sigma.ASPECT_RATIO_2048_BIN,
    }.get(sample_size)
    if bins is None:  # a model without aspect bins paints its native square
        return {"1:1": native}
    sizes = {}
    for name, ratio in ASPECT_RATIOS.items():
        height, width = min(bins.values(), key=lambda hw: abs(math.log(hw[1] / hw[0] / ratio)))
        sizes[name] = (int(height), int(width))
    return sizes


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ==============================================================================================
# Studio: paints pictures, one request at a time, and lets us watch
# ==============================================================================================


@dataclass(frozen=True)
class Preview:
    """The picture after `step` of `steps`; `images` are small and blurred."""

    step: int
    steps: int
    images: list[Image.Image]
    seconds_left: float


@dataclass(frozen=True)
class Painted:
    """The finished pictures and what they took."""

    images: list[Image.Image]
    seconds: float
    step_ms: float
    notes: list[str] = field(default_factory=list)
    memory_mb: float = 0.0


@dataclass(frozen=True)
class Note:
    """Something to tell the reader before the first step."""

    notes: list[str]


class _Stopped(Exception):
    """Raised inside diffusers' callback: the only way out of its loop between two steps."""


Decode = Callable[[torch.Tensor], torch.Tensor]  # latents (B, 4, h, w) → pictures in [-1, 1]


class LatentPreview:
    """Turns latents `(B, 4, h, w)` into small pictures while the pipeline is at work.

    Where the VAE is cheap, it decodes the latents at half their size, at a quarter of its cost.
    Where it is not, one linear map makes h × w pixels of them: a VAE's latents are, roughly, a
    code of the colour under them, and a least-squares fit to a few decoded ones costs nothing.
    """

    SHARE = 0.5  # of a step's time that the VAE may take

    def __init__(self, decode: Decode, channels: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        smooth = torch.randn(8, channels, 4, 4, generator=generator)
        latents = torch.nn.functional.interpolate(smooth, scale_factor=4, mode="bicubic")
        latents = latents + 0.25 * torch.randn(latents.shape, generator=generator)
        pictures = decode(latents).float()  # (8, 3, 16 s, 16 s)
        colours = torch.nn.functional.adaptive_avg_pool2d(pictures, latents.shape[-2:])
        target = colours.permute(0, 2, 3, 1).reshape(-1, 3)
        self.weights = torch.linalg.lstsq(self._design(latents), target).solution
        ticks = [time.perf_counter()]
        for _ in range(3):
            decode(latents[:2])
            ticks.append(time.perf_counter())
        self.seconds_per_latent = min(np.diff(ticks)) / (2 * 16 * 16)

    def __call__(
        self, latents: torch.Tensor, decode: Decode, step_seconds: float
    ) -> list[Image.Image]:
        batch, _, height, width = latents.shape
        cost = self.seconds_per_latent * batch * height * width / 4
        if cost < self.SHARE * step_seconds:
            colours = decode(torch.nn.functional.avg_pool2d(latents.float(), 2)).float()
            colours = colours.permute(0, 2, 3, 1)
        else:
            colours = (self._design(latents) @ self.weights).reshape(batch, height, width, 3)
        pixels = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return [Image.fromarray(p) for p in pixels]

    @staticmethod
    def _design(latents: torch.Tensor) -> torch.Tensor:
        flat = latents.float().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)  # (B h w, 5)


class Studio:
    """Owns the pipelines: loads them when first asked, keeps few, paints one request at a time."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.facts = {label: read_model_facts(folder) for label, folder in folders.items()}
        self.output = Path(tempfile.mkdtemp(prefix="pixart-demo-"))
        weakref.finalize(self, shutil.rmtree, self.output, ignore_errors=True)
        self._pipelines: OrderedDict[str, Any] = OrderedDict()
        self._previews: dict[str, LatentPreview] = {}
        self._lock = threading.RLock()
        self._closing = threading.Event()

    @property
    def capacity(self) -> int:
        """Two pipelines may stay in memory as long as both are small."""
        return 2 if sum(sorted(f.size_mb for f in self.facts.values())[-2:]) < 2_000 else 1

    def pipeline(self, label: str) -> Any:
        """Returns the loaded pipeline; drops the one that was used longest ago."""
        with self._lock:
            if label not in self._pipelines:
                while len(self._pipelines) >= self.capacity:
                    self._pipelines.popitem(last=False)
                    gc.collect()
                self._pipelines[label] = _load_pipeline(self.folders[label])
            self._pipelines.move_to_end(label)
            return self._pipelines[label]

    def unload(self) -> None:
        """Drops every pipeline and gives the memory back to the system where that is possible."""
        with self._lock:
            self._pipelines.clear()
            _release_memory()

    def close(self) -> None:
        """Ends what is being painted; frees pipelines and pictures. It can be used again."""
        self._closing.set()
        self.unload()  # waits for the run to end
        self._closing.clear()
        shutil.rmtree(self.output, ignore_errors=True)

    def paint(
        self, settings: Settings, stop: threading.Event | None = None, *, alone: bool = False
    ) -> Iterator[Note | Preview | Painted]:
        """Yields a `Note`, a `Preview` after every step and `Painted` at the end.

        The pipeline runs in a thread of its own; setting `stop`, or closing the iterator, ends it
        within one step. A stopped run simply yields no `Painted`. `alone` empties the memory
        before it, so that `Painted.memory_mb` is what this pipeline needs, loading included.
        """
        stop = stop or threading.Event()
        abandoned = threading.Event()
        updates: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def work() -> None:
            try:
                with self._lock:
                    if alone:
                        self.unload()
                    with _MemoryGrowth() as memory:
                        stops = (stop, abandoned, self._closing)
                        painted = self._run(settings, stops, updates.put)
                    updates.put(replace(painted, memory_mb=memory.megabytes))
            except _Stopped:
                updates.put(None)
            except BaseException as error:  # handed over to the reader's thread
                updates.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (update := updates.get()) is not None:
                if isinstance(update, BaseException):
                    raise update
                yield update
                if isinstance(update, Painted):
                    return
        finally:
            abandoned.set()
            worker.join()

    def _run(
        self,
        settings: Settings,
        stops: Sequence[threading.Event],
        tell: Callable[[Any], None],
    ) -> Painted:
        def check_stop() -> None:
            if any(stop.is_set() for stop in stops):
                raise _Stopped

        check_stop()
        pipe = self.pipeline(settings.precision)
        model = self.facts[settings.precision]
        decode = _decoder(pipe)
        preview = self._preview_of(settings.precision, decode)
        prompt, notes = _fit_prompt(pipe, styled_prompt(settings, model), model)
        negative, _ = _fit_prompt(pipe, settings.negative_prompt.strip(), model)
        tell(Note(notes))
        ticks = [time.perf_counter()]

        def after_step(step: int, timestep: Any, latents: torch.Tensor) -> None:
            check_stop()
            ticks.append(time.perf_counter())
            pace = statistics.median(np.diff(ticks))
            images = preview(_estimate(pipe, latents), decode, pace)
            tell(Preview(step + 1, settings.steps, images, pace * (settings.steps - step - 1)))

        check_stop()
        height, width = model.sizes[settings.aspect_ratio]
        images = pipe(
            prompt,
            negative_prompt=negative,
            num_inference_steps=settings.steps,
            timesteps=list(model.timesteps) if settings.steps == len(model.timesteps) else None,
            guidance_scale=settings.guidance,
            num_images_per_prompt=settings.pictures,
            height=height,
            width=width,
            use_resolution_binning=False,  # the size is one of the model's bins already
            max_sequence_length=model.max_tokens,
            clean_caption=False,  # done above, where it can be cut to the model's length
            generator=[torch.Generator().manual_seed(seed) for seed in settings.seeds],
            callback=after_step,
            callback_steps=1,
        ).images
        check_stop()
        step_ms = 1e3 * statistics.median(np.diff(ticks)) if len(ticks) > 1 else 0.0
        return Painted(images, time.perf_counter() - ticks[0], step_ms, notes)

    def _preview_of(self, label: str, decode: Decode) -> LatentPreview:
        if label not in self._previews:
            self._previews[label] = LatentPreview(decode)
        return self._previews[label]


def _load_pipeline(folder: Path) -> Any:
    """Loads a converted pipeline, without its progress bar."""
    pipe = OVDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _decoder(pipe: Any) -> Decode:
    scaling = pipe.vae.config.scaling_factor

    def decode(latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(pipe.vae.decode(latents / scaling, return_dict=False)[0])

    return decode


def _estimate(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """The clean picture as the model sees it now; the noisy latents where it is not at hand.

    DPM-Solver++ keeps its last estimate of the clean latents: showing that instead of the noisy
    ones lets the picture appear several steps earlier.
    """
    outputs = getattr(pipe.scheduler, "model_outputs", None)
    newest = outputs[-1] if outputs else None
    is_estimate = getattr(pipe.scheduler.config, "algorithm_type", "") == "dpmsolver++"
    if is_estimate and newest is not None and newest.shape == latents.shape:
        return newest
    return latents


def _fit_prompt(pipe: Any, text: str, model: ModelFacts) -> tuple[str, list[str]]:
    """Cleans a prompt as the pipeline would and cuts it at a word to the model's token limit."""
    if not text:
        return "", []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BeautifulSoup on prompts that look like addresses
        cleaned = " ".join(pipe._text_preprocessing(text, clean_caption=True)[0].split())
    if not cleaned:
        return "", ["Nothing that the model can read is left of this prompt."]
    limit = model.max_tokens

    def tokens(part: str) -> list[int]:
        # One more than the limit tells enough, and the tokenizer does not warn.
        return pipe.tokenizer(part, truncation=True, max_length=limit + 1).input_ids

    if len(tokens(cleaned)) <= limit:
        return cleaned, _unknown_words(pipe, cleaned, tokens)
    low, high = 0, len(cleaned)  # the longest beginning that fits, in characters
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(tokens(cleaned[:middle])) <= limit else (low, middle)
    kept = cleaned[:low]
    if " " in kept and cleaned[low] != " ":
        kept = kept.rpartition(" ")[0]
    left_out = cleaned[len(kept) :].strip()
    excerpt = left_out[:40].strip() + ("…" if len(left_out) > 40 else "")
    said = f"The model reads {limit} tokens: the prompt was cut before “{excerpt}”."
    return kept, [said, *_unknown_words(pipe, kept, tokens)]


def _unknown_words(pipe: Any, text: str, tokens: Callable[[str], list[int]]) -> list[str]:
    """Says which words the model's vocabulary does not have."""
    unknown = getattr(pipe.tokenizer, "unk_token_id", None)
    if unknown is None or unknown not in tokens(text):
        return []
    words = [word for word in dict.fromkeys(text.split()) if unknown in tokens(word)]
    return [f"Not in this model's vocabulary: {', '.join(words[:8])}."]


def _release_memory() -> None:
    gc.collect()
    if sys.platform == "linux":  # glibc keeps freed memory unless it is asked
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class _MemoryGrowth:
    """Samples the process's memory: `megabytes` is the peak inside the block above its start."""

    def __enter__(self) -> _MemoryGrowth:
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        self.megabytes = (self._peak - self._start) / 1e6


def save_picture(image: Image.Image, folder: Path, settings: Settings) -> Path:
    """Writes a PNG that carries the settings it was painted with."""
    info = PngInfo()
    info.add_itxt("Title", settings.prompt[:200])
    info.add_itxt("Software", "PixArt with OpenVINO")
    info.add_itxt("parameters", json.dumps(asdict(settings), ensure_ascii=False))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"pixart-{settings.seed}-{uuid.uuid4().hex[:12]}.png"
    image.save(path, pnginfo=info)
    return path


def read_settings(path: str | Path) -> Settings:
    """Reads the settings back from a PNG that this demo saved."""
    with Image.open(path) as image:
        image.load()
        stored = image.info.get("parameters")
    if stored is None:
        raise ValueError(f"{Path(path).name} carries no settings of this demo.")
    return Settings(**json.loads(stored))


# ==============================================================================================
# Page: how results look
# ==============================================================================================

IDLE_HINT = "Your picture appears here, step by step."


def _text(value: Any) -> str:
    """Text for HTML: whatever a prompt contains is shown, never interpreted."""
    return html.escape(str(value), quote=True)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _file_url(path: Path) -> str:
    return f"gradio_api/file={path.as_posix()}"


def _thumbnail(image: Image.Image, size: int = 96) -> str:
    small = image.copy()
    small.thumbnail((size, size))
    return _data_uri(small)


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _megabytes(size: float) -> str:
    return f"{size:.0f} MB" if size < 1_000 else f"{size / 1_000:.1f} GB"


def describe(settings: Settings, model: ModelFacts) -> str:
    """One line with the parameters that matter for this picture."""
    height, width = model.sizes[settings.aspect_ratio]
    parts = [settings.precision, f"seed {settings.seed}", f"{settings.steps} steps"]
    if settings.guidance > 1:
        parts.append(f"guidance {settings.guidance:g}")
    parts.append(f"{width} × {height}")
    if settings.style != NO_STYLE:
        parts.append(settings.style)
    return " · ".join(parts)


def stage(
    sources: Sequence[str] = (),
    alt: str = "",
    *,
    state: str = "idle",
    headline: str = "Ready",
    detail: str = "",
    progress: float = 0.0,
    downloads: Sequence[Path] = (),
) -> str:
    """The picture area: a frame of fixed size, a progress bar, a line of status, one of details.

    Every state has the same elements in the same places: nothing jumps while pictures stream, and
    as Gradio only changes what differs, pictures do not flicker and screen readers hear changes.
    """
    count = max(1, len(sources))
    numbered = [f"{alt} ({i + 1} of {count})" if count > 1 else alt for i in range(count)]
    pictures = "".join(
        f'<img src="{source}" alt="{_text(label)}">'
        for source, label in zip(sources, numbered, strict=False)
    )
    links = "".join(
        f'<a href="{_file_url(path)}" download="{_text(path.name)}">Save PNG{number}</a>'
        for path, number in zip(
            downloads, [""] if count == 1 else [f" {i + 1}" for i in range(count)], strict=False
        )
    )
    percent = round(100 * progress)
    spoken = "Painting" if state == "working" else headline  # not every step is read out
    return (
        f'<div class="stage {state}">'
        f'<div class="frame pictures-{count}">{pictures or f"<p>{_text(IDLE_HINT)}</p>"}</div>'
        f'<div class="bar" role="progressbar" aria-label="Denoising" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}"><i style="width: {percent}%"></i></div>'
        f'<p class="headline"><span>{_text(headline)}</span><span class="links">{links}</span></p>'
        f'<p class="detail">{_text(detail)}</p>'
        f'<p class="spoken" role="status">{_text(spoken)}</p>'
        "</div>"
    )


def history_strip(history: Sequence[dict[str, Any]], shown: int | None = None) -> str:
    """Thumbnails of this visit, newest first; each is a button that brings its picture back."""
    if not history:
        return '<p class="empty">Nothing yet: what you paint stays here until you leave.</p>'
    items = []
    for index, entry in reversed(list(enumerate(history))):
        label = f"Picture {index + 1}: {entry['settings']['prompt'][:120]}, {entry['line']}"
        items.append(
            f'<li><button type="button" data-index="{index}" title="{_text(label)}" '
            f'aria-label="{_text(label)}" aria-pressed="{str(index == shown).lower()}">'
            f'<img src="{entry["thumbnail"]}" alt=""></button></li>'
        )
    return f'<ul class="strip">{"".join(items)}</ul>'


def facts_card(
    label: str, model: ModelFacts, *, status: str, preview: str = "", painted: Painted | None = None
) -> str:
    """What one precision took, beside its picture in the comparison."""
    rows = {"On disk": _megabytes(model.size_mb), "Picture": "–", "One step": "–", "Memory": "–"}
    if painted is not None:
        rows["Picture"] = f"{painted.seconds:.2f} s"
        rows["One step"] = f"{painted.step_ms:.0f} ms"
        rows["Memory"] = _megabytes(painted.memory_mb)
    table = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows.items())
    picture = f'<img src="{preview}" alt="">' if preview else ""
    return (
        f'<section class="card"><div class="peek">{picture}</div><div>'
        f"<h3>{_text(label)}</h3><p>{_text(status)}</p></div><dl>{table}</dl></section>"
    )


HEADER = """
<header class="page-header">
  <h1>PixArt with OpenVINO</h1>
  <p>Type a scene, watch it form step by step, compare precisions on the same seed.
  Everything runs on this machine.</p>
</header>
"""

CSS = """
:root { --demo-accent: var(--primary-700); }
.dark { --demo-accent: var(--primary-300); --color-accent: var(--primary-300); }
html { scrollbar-gutter: stable both-edges; }
.gradio-container { width: 100%; max-width: 1160px !important; margin: 0 auto !important; }
#workspace > .column { flex-basis: 0; }  /* columns keep their width whatever is in them */
.page-header h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
.page-header p { color: var(--body-text-color-subdued); margin: 0.15rem 0 0; }

.stage .frame {
  display: grid; place-items: center; gap: 6px; width: 100%; aspect-ratio: 1;
  max-height: min(70vh, 34rem); margin: 0 auto; padding: 6px; box-sizing: border-box;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--background-fill-secondary); overflow: hidden;
}
.stage .frame img {
  width: 100%; height: 100%; min-width: 0; min-height: 0; object-fit: contain;
  border-radius: calc(var(--radius-lg) - 4px);
}
.stage .frame p { color: var(--body-text-color-subdued); margin: 0; padding: 1rem; }
.stage .pictures-2 { grid-template: 1fr / 1fr 1fr; }
.stage .pictures-3, .stage .pictures-4 { grid-template: 1fr 1fr / 1fr 1fr; }
.stage .bar {
  height: 4px; margin: 10px 0 6px; border-radius: 2px; overflow: hidden;
  background: var(--border-color-primary);
}
.stage .bar i { display: block; height: 100%; background: var(--demo-accent); }
.stage .headline {
  display: flex; justify-content: space-between; gap: 1rem; min-height: 1.5em; margin: 0;
  font-weight: 600; color: var(--body-text-color);
}
.stage.error .headline { color: var(--error-text-color); }
.stage .detail {
  min-height: 1.5em; margin: 0; color: var(--body-text-color-subdued); font-size: 0.9rem;
}
.stage .links { display: flex; flex: none; gap: 0.9rem; font-weight: 400; }
.stage .spoken {
  position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden;
  clip-path: inset(50%);
}
.stage .links a { color: var(--link-text-color); text-decoration: underline; }

.html-container { padding: 0 !important; }
.note.refused, .refused .info-text { color: var(--error-text-color) !important; font-weight: 600; }
.refused input, .refused textarea { border-color: var(--error-border-color) !important; }
/* Gradio's tracker tells the place in the queue; here it does not dim what is under it. */
#stage .wrap, #compare-slider .wrap {
  inset: 0; overflow: visible; background: none !important; border-color: transparent;
}
#stage .wrap svg, #compare-slider .wrap svg { display: none; }
#stage .pending { opacity: 1 !important; }
#stage .wrap .progress-text, #compare-slider .wrap .progress-text {
  inset: 14px 14px auto auto; padding: 2px 10px; border-radius: 999px; font-size: 0.85rem;
  font-family: var(--font); color: var(--body-text-color);
  background: var(--background-fill-primary); border: 1px solid var(--border-color-primary);
}
#visit { align-items: center; }
#visit h2 { margin: 0; font-size: 1rem; font-weight: 650; }
#visit button { min-width: 12rem; }
#prompt-note { margin: -10px 0; }
.note { margin: 0; min-height: 1.3em; font-size: 0.875rem; color: var(--body-text-color-subdued); }
.empty { margin: 0; min-height: 84px; color: var(--body-text-color-subdued); }
.strip {
  display: flex; gap: 8px; margin: 0; padding: 4px; list-style: none; overflow-x: auto;
  min-height: 84px;
}
.strip li { flex: none; margin: 0; }
.strip button {
  display: block; width: 72px; height: 72px; padding: 0; cursor: pointer; overflow: hidden;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
  background: var(--background-fill-secondary);
}
.strip img { width: 100%; height: 100%; object-fit: cover; display: block; }
.strip button[aria-pressed="true"] {
  outline: 2px solid var(--demo-accent); outline-offset: 1px;
}
.card {
  display: grid; grid-template-columns: 72px 1fr; gap: 4px 12px; align-items: center; padding: 12px;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--background-fill-secondary);
}
.card .peek {
  width: 72px; height: 72px; border-radius: var(--radius-md); overflow: hidden;
  background: var(--border-color-primary);
}
.card .peek img { width: 100%; height: 100%; object-fit: cover; display: block; }
.card h3 { margin: 0; font-size: 1rem; font-weight: 650; }
.card p { margin: 0; min-height: 1.4em; color: var(--body-text-color-subdued); }
.card dl {
  grid-column: 1 / -1; display: grid; gap: 2px; margin: 6px 0 0;
}
.card dl div { display: flex; white-space: nowrap; justify-content: space-between; gap: 8px; }
.card dt { color: var(--body-text-color-subdued); font-size: 0.875rem; }
.card dd { margin: 0; font-variant-numeric: tabular-nums; font-size: 0.875rem; }
:focus-visible { outline: 2px solid var(--demo-accent) !important; outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: 12px !important; }
  .stage .frame { max-height: none; }
  .stage .detail { min-height: 3em; }
  /* The picture comes right after the buttons, the settings after the picture. */
  #workspace { flex-direction: column; flex-wrap: nowrap; align-items: stretch; }
  #workspace > .column { display: contents; }
  #results { order: 1; } #visit, #history { order: 2; }
  #examples, #basics, #seed-row, #more { order: 3; }
}
@media (prefers-reduced-motion: no-preference) { .stage .bar i { transition: width 0.15s; } }
"""

STRIP_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('select', {index: Number(button.dataset.index)});
});
"""


def _theme() -> gr.themes.Base:
    """Quiet, with the system's own fonts: nothing is fetched, and it looks the same offline."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Consolas", "monospace"),
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_300",
        button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="white",
        button_primary_text_color_dark="*neutral_950",
        color_accent="*primary_700",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        error_text_color_dark="#fca5a5",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


# ==============================================================================================
# Demo: controls and what they do
# ==============================================================================================

FIELDS = tuple(f.name for f in fields(Settings))
QUEUE = {"concurrency_id": "paint", "concurrency_limit": 1}  # one generation at a time


class Demo(gr.Blocks):
    """A `gr.Blocks` that frees its pipelines and pictures when it is closed."""

    studio: Studio

    def close(self, verbose: bool = False) -> None:
        super().close(verbose=verbose)
        self.studio.close()


def make_demo(pipelines: dict[str, Path], *, default: str | None = None) -> gr.Blocks:
    """Builds the page. `pipelines`: label → folder of a converted pipeline, loaded when first used.

    `default`: the label that is selected at first (default: the first one).
    """
    folders = {label: Path(folder).resolve() for label, folder in pipelines.items()}
    if not folders:
        raise ValueError("pipelines={} is empty: give at least one label and its folder.")
    default = next(iter(folders)) if default is None else default
    if default not in folders:
        raise ValueError(f"default={default!r} is not one of the labels {list(folders)}.")
    missing = [label for label, f in folders.items() if not (f / "model_index.json").is_file()]
    if missing:
        raise FileNotFoundError(f"No converted pipeline in {pipelines[missing[0]]}.")
    with Demo(title="PixArt with OpenVINO", analytics_enabled=False, fill_width=True) as demo:
        demo.studio = Studio(folders)
        _Page(demo, default)
    return demo


@dataclass
class _Job:
    """One run of one browser tab: how to stop it, and what it showed last."""

    stop: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    shown: dict[Any, Any] = field(default_factory=dict)  # component → what it shows

    def show(self, values: dict[Any, Any]) -> dict[Any, Any]:
        self.shown |= values
        return values


class _Page:
    """Builds the controls and wires them; no state of its own but the runs in progress."""

    def __init__(self, demo: Demo, default: str) -> None:
        self.studio = demo.studio
        self.jobs: dict[str | None, _Job] = {}  # a browser tab's session → its run
        self.controls: dict[str, Any] = {}
        gr.HTML(HEADER, apply_default_css=False)
        with gr.Row(equal_height=False, elem_id="workspace"):
            with gr.Column(scale=5, min_width=320):
                self._build_controls(default)
            with gr.Column(scale=6, min_width=320):
                self._build_results(default)
        self._wire(demo)
        self._build_api(default)

    # -- layout --------------------------------------------------------------------------------

    def _build_controls(self, default: str) -> None:
        model = self.studio.facts[default]
        c = self.controls
        c["prompt"] = gr.Textbox(
            next(iter(model.examples.values())),
            label="Prompt",
            lines=2,
            max_lines=6,
            placeholder="What would you like to see?",
            elem_id="prompt",
        )
        self.note = gr.HTML('<p class="note"></p>', apply_default_css=False, elem_id="prompt-note")
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
            self.stop = gr.Button("Stop", interactive=False, min_width=120, elem_id="stop")
        gr.Examples(
            [[prompt] for prompt in model.examples.values()],
            inputs=[c["prompt"]],
            label="Try one of these",
            example_labels=list(model.examples),
            elem_id="examples",
            api_visibility="private",
            preload=False,
        )
        with gr.Row(elem_id="basics"):
            c["precision"] = gr.Dropdown(
                list(self.studio.folders),
                value=default,
                filterable=False,
                label="Precision",
                elem_id="precision",
            )
            c["aspect_ratio"] = gr.Dropdown(
                list(model.sizes),
                value="1:1",
                filterable=False,
                label="Aspect ratio",
                elem_id="aspect-ratio",
            )
        with gr.Row(elem_id="seed-row"):
            c["seed"] = gr.Number(
                7,
                label="Seed",
                precision=0,
                info="The same seed, the same picture.",
                elem_id="seed",
            )
            self.randomise = gr.Checkbox(
                False, label="New seed each time", elem_id="randomise", min_width=120
            )
        self.more = gr.Accordion("More settings", open=False, elem_id="more")
        with self.more:
            self._build_more(model)

    def _build_more(self, model: ModelFacts) -> None:
        c = self.controls
        c["steps"] = gr.Slider(
            model.min_steps, MAX_STEPS, model.steps, step=1, label="Steps", elem_id="steps"
        )
        c["guidance"] = gr.Slider(
            0, MAX_GUIDANCE, step=0.1, elem_id="guidance", **_guidance_looks(model)
        )
        c["negative_prompt"] = gr.Textbox(
            "", lines=1, elem_id="negative-prompt", **_negative_looks(model.guidance)
        )
        c["style"] = gr.Dropdown(
            list(model.styles), value=NO_STYLE, filterable=False, label="Style", elem_id="style"
        )
        c["pictures"] = gr.Slider(
            1, MAX_PICTURES, 1, step=1, label="Number of pictures", elem_id="pictures"
        )
        for name in ("steps", "guidance", "pictures"):
            c[name].preprocess = _as_is  # `problems` refuses with a message next to the control

    def _build_results(self, default: str) -> None:
        self.history = gr.State([])
        self.model = gr.State(default)  # the precision that the controls are set up for
        self.shown = gr.State(None)  # index in the history of the picture on the stage
        self.tabs = gr.Tabs(elem_id="results")
        with self.tabs:
            with gr.Tab("Picture", id="picture"):
                self.stage = gr.HTML(stage(), apply_default_css=False, elem_id="stage")
            with gr.Tab("Compare", id="compare"):
                self._build_compare(default)
        with gr.Row(elem_id="visit"):
            gr.HTML("<h2>This visit</h2>", apply_default_css=False)
            self.reuse = gr.Button(
                "Reuse these settings", size="sm", interactive=False, scale=0, elem_id="reuse"
            )
        self.strip = gr.HTML(
            history_strip([]), apply_default_css=False, js_on_load=STRIP_JS, elem_id="history"
        )

    def _build_compare(self, default: str) -> None:
        labels = list(self.studio.folders)
        other = next((label for label in labels if label != default), default)
        with gr.Row():
            self.left = gr.Dropdown(
                labels, value=default, filterable=False, label="Left", elem_id="left"
            )
            self.right = gr.Dropdown(
                labels, value=other, filterable=False, label="Right", elem_id="right"
            )
        alone = len(labels) < 2
        self.compare = gr.Button(
            "Compare needs two precisions" if alone else "Compare on the same seed",
            variant="primary",
            interactive=not alone,
            elem_id="compare-go",
        )
        self.slider = gr.ImageSlider(
            format="png",
            type="pil",
            height=440,
            max_height=440,
            show_label=False,
            interactive=False,
            label="Comparison",
            elem_id="compare-slider",
        )
        self.divider = gr.Slider(
            0, 100, 50, step=1, label="Divider", elem_id="divider", interactive=True, buttons=[]
        )
        with gr.Row():
            self.cards = [
                gr.HTML(
                    facts_card(label, self.studio.facts[label], status="Not painted yet"),
                    apply_default_css=False,
                    elem_id=f"card-{side}",
                )
                for side, label in (("left", default), ("right", other))
            ]

    # -- wiring --------------------------------------------------------------------------------

    def _wire(self, demo: Demo) -> None:
        c = self.controls
        inputs = [c[name] for name in FIELDS]
        private = {"api_visibility": "private"}
        hidden = {"show_progress": "hidden", **private}
        checked = [c["seed"], c["steps"], c["guidance"], c["negative_prompt"], c["pictures"]]
        checked += [self.right, self.more]
        outputs = [
            self.tabs,
            self.stage,
            self.note,
            self.slider,
            *self.cards,
            self.history,
            self.strip,
            self.shown,
            self.reuse,
            self.go,
            self.stop,
            self.compare,
        ]
        asked = gr.on(
            [self.go.click, c["prompt"].submit],
            self._prepare,
            [*inputs, self.randomise],
            [*checked, *outputs],
            concurrency_limit=None,
            **hidden,
        )
        painting = asked.success(
            self._generate,
            [*inputs, self.history],
            outputs,
            show_progress="full",
            show_progress_on=[self.stage],
            **QUEUE,
            **private,
        )
        compared = self.compare.click(
            self._prepare_compare,
            [*inputs, self.randomise, self.left, self.right],
            [*checked, *outputs],
            concurrency_limit=None,
            **hidden,
        )
        comparing = compared.success(
            self._compare,
            [*inputs, self.left, self.right, self.history],
            outputs,
            show_progress="full",
            show_progress_on=[self.slider],
            **QUEUE,
            **private,
        )
        self.stop.click(
            self._stop, None, outputs, cancels=[painting, comparing], queue=False, **hidden
        )
        self.strip.select(
            self._show,
            [self.history],
            [self.tabs, self.stage, self.strip, self.shown, self.reuse],
            queue=False,
            **hidden,
        )
        self.reuse.click(
            self._reuse,
            [self.history, self.shown],
            [self.model, *inputs, self.randomise],
            queue=False,
            **hidden,
        )
        self.divider.input(
            lambda position: gr.update(slider_position=position),
            self.divider,
            self.slider,
            trigger_mode="always_last",
            queue=False,
            **hidden,
        )
        c["precision"].input(
            self._precision_changed,
            [self.model, *inputs],
            [self.model, *inputs],
            trigger_mode="always_last",  # a second choice made while the first is at work counts
            queue=False,
            **hidden,
        )
        c["guidance"].change(
            lambda value: gr.update(**_negative_looks(value)),
            c["guidance"],
            c["negative_prompt"],
            queue=False,
            **hidden,
        )
        self.randomise.change(
            lambda on: gr.update(**_seed_looks(on)),
            self.randomise,
            c["seed"],
            queue=False,
            **hidden,
        )
        demo.unload(self._leave)

    # -- what a click does ---------------------------------------------------------------------

    def _prepare(self, *values: Any) -> Iterator[dict[Any, Any]]:
        """Refuses what cannot be used, next to its control; draws the seed if asked to."""
        *chosen, randomise = values
        yield from self._check(chosen, randomise)
        waiting = stage(state="waiting", headline="Waiting for its turn")
        yield {
            self.stage: waiting,
            **self._at_picture(),
            **self._seed(chosen, randomise),
            **self._busy(True),
        }

    def _prepare_compare(self, *values: Any) -> Iterator[dict[Any, Any]]:
        *chosen, randomise, left, right = values
        yield from self._check(chosen, randomise, (left, right))
        cards = {
            card: self._card(label, "Waiting for its turn")
            for card, label in zip(self.cards, (left, right), strict=True)
        }
        empty = {self.slider: gr.update(value=None)}
        yield {**cards, **empty, **self._seed(chosen, randomise), **self._busy(True)}

    def _seed(self, chosen: Sequence[Any], randomise: bool) -> dict[Any, Any]:
        drawn = random.randint(0, MAX_SEED)
        return {self.controls["seed"]: drawn if randomise else int(chosen[FIELDS.index("seed")])}

    def _check(
        self, chosen: Sequence[Any], randomise: bool, pair: tuple[str, ...] = ()
    ) -> Iterator[dict[Any, Any]]:
        """Shows a message next to every control that is refused, and takes old messages away.

        Gradio's own validators would do the same with an HTTP error, which browsers log.
        """
        settings = Settings(*chosen)
        found = problems(settings, self.studio.facts)
        if randomise:
            found.pop("seed", None)
        model = self.studio.facts[settings.precision]
        hints = {
            "seed": _seed_looks(randomise)["info"],
            "steps": None,
            "guidance": _guidance_looks(model)["info"],
            "negative_prompt": _negative_looks(settings.guidance)["info"],
            "pictures": None,
        }
        shown = {
            self.controls[name]: _with_message(found.get(name), hint)
            for name, hint in hints.items()
        }
        if pair:
            same = "Choose another precision than on the left." if len(set(pair)) < 2 else None
            found |= {"right": same} if same else {}
            shown[self.right] = _with_message(same, None)
        prompt_message = found.get("prompt")
        shown[self.note] = _note([prompt_message or ""], refused=prompt_message is not None)
        if found.keys() - {"prompt", "seed", "right"}:
            shown[self.more] = gr.update(open=True)  # where the refused control is
        yield shown
        if found:  # ends this chain of events; the messages say the rest
            raise gr.Error("Some settings were refused.", visible=False, print_exception=False)

    def _at_picture(self) -> dict[Any, Any]:
        return {self.tabs: gr.update(selected="picture")}

    def _busy(self, busy: bool) -> dict[Any, Any]:
        return {
            self.go: gr.update(interactive=not busy),
            self.compare: gr.update(interactive=not busy and len(self.studio.folders) > 1),
            self.stop: gr.update(interactive=busy),
        }

    def _generate(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        *chosen, history = values
        settings = _tidy(Settings(*chosen))
        job = self._begin(request)
        last = update = None
        try:
            for update in self.studio.paint(settings, job.stop):
                last = update if isinstance(update, Preview) else last
                shown = self._painting(update, settings, history)
                yield job.show(shown)
            if not isinstance(update, Painted):
                yield job.show(self._stopped(last, settings))
        except Exception as error:
            logger.exception("Painting failed.")
            failed = stage(state="error", headline=_reason(error))
            yield job.show({self.stage: failed, **self._busy(False)})
        finally:
            self._end(request, job)

    def _painting(self, update: Any, settings: Settings, history: list) -> dict[Any, Any]:
        """What the page shows after one `update` of the studio."""
        line = describe(settings, self.studio.facts[settings.precision])
        look = {"alt": settings.prompt, "detail": line}
        if isinstance(update, Note):
            started = stage(state="working", headline="Reading the prompt", detail=line)
            return {self.stage: started, self.note: _note(update.notes)}
        if isinstance(update, Preview):
            headline = f"Step {update.step} of {update.steps}"
            if update.step < update.steps:
                headline += f" · {_seconds(update.seconds_left)} left"
            sources = [_data_uri(image) for image in update.images]
            progress = update.step / update.steps
            shown = stage(sources, state="working", headline=headline, progress=progress, **look)
            return {self.stage: shown}
        history, paths = self._remember(history, settings, update)
        shown = stage(
            [_file_url(path) for path in paths],
            state="done",
            headline=f"Done in {_seconds(update.seconds)}",
            progress=1,
            downloads=paths,
            **look,
        )
        return {self.stage: shown, **self._history_shows(history, len(history) - 1)}

    def _stopped(self, last: Preview | None, settings: Settings) -> dict[Any, Any]:
        """Keeps the last preview on the page."""
        if last is None:
            shown = stage(headline="Stopped before the first step")
        else:
            shown = stage(
                [_data_uri(image) for image in last.images],
                settings.prompt,
                state="stopped",
                headline=f"Stopped after step {last.step} of {last.steps}",
                detail=describe(settings, self.studio.facts[settings.precision]),
                progress=last.step / last.steps,
            )
        return {self.stage: shown, **self._busy(False)}

    def _remember(
        self, history: list, settings: Settings, painted: Painted
    ) -> tuple[list, list[Path]]:
        """Saves the pictures and adds them to this visit; the oldest make room."""
        paths = []
        for seed, image in zip(settings.seeds, painted.images, strict=True):
            own = replace(settings, seed=seed, pictures=1)
            paths.append(save_picture(image, self.studio.output, own))
            entry = {
                "path": str(paths[-1]),
                "thumbnail": _thumbnail(image),
                "settings": asdict(own),
                "line": describe(own, self.studio.facts[own.precision]),
            }
            history = [*history, entry]
        for gone in history[:-HISTORY_LENGTH]:
            Path(gone["path"]).unlink(missing_ok=True)
        return history[-HISTORY_LENGTH:], paths

    def _history_shows(self, history: list, index: int) -> dict[Any, Any]:
        return {
            self.history: history,
            self.shown: index,
            self.strip: history_strip(history, index),
            self.reuse: gr.update(interactive=True),
            **self._busy(False),
        }

    def _compare(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        *chosen, left, right, history = values
        settings = replace(_tidy(Settings(*chosen)), pictures=1)
        job = self._begin(request)
        paths: list[Path] = []
        try:
            for card, label in zip(self.cards, (left, right), strict=True):
                own = self._for_precision(settings, label)
                for update in self.studio.paint(own, job.stop, alone=True):
                    yield job.show({card: self._comparing(update, label)})
                    if isinstance(update, Painted):
                        history, saved = self._remember(history, own, update)
                        paths += saved
                if job.stop.is_set():
                    yield job.show({card: self._card(label, "Stopped"), **self._busy(False)})
                    return
            shown = {self.slider: gr.update(value=(str(paths[0]), str(paths[1])))}
            yield job.show({**self._history_shows(history, len(history) - 1), **shown})
        except Exception as error:
            logger.exception("Comparing failed.")
            yield job.show({card: self._card(label, _reason(error)), **self._busy(False)})
        finally:
            self._end(request, job)

    def _comparing(self, update: Any, label: str) -> str:
        if isinstance(update, Note):
            return self._card(label, "Reading the prompt")
        if isinstance(update, Preview):
            status = f"Step {update.step} of {update.steps}"
            return self._card(label, status, preview=_data_uri(update.images[0]))
        preview = _thumbnail(update.images[0])
        return self._card(label, "Done", preview=preview, painted=update)

    def _card(self, label: str, status: str, **content: Any) -> str:
        return facts_card(label, self.studio.facts[label], status=status, **content)

    def _for_precision(self, settings: Settings, label: str) -> Settings:
        """The same request for another model; a distilled one keeps its own steps and guidance."""
        asked, model = self.studio.facts[settings.precision], self.studio.facts[label]
        if asked.few_step != model.few_step:
            settings = replace(settings, steps=model.steps, guidance=model.guidance)
        return replace(settings, precision=label)

    # -- runs: begin, end, stop ----------------------------------------------------------------

    def _begin(self, request: gr.Request) -> _Job:
        job = self.jobs[request.session_hash] = _Job()
        return job

    def _end(self, request: gr.Request, job: _Job) -> None:
        self.jobs.pop(request.session_hash, None)
        job.done.set()

    def _stop(self, request: gr.Request) -> dict[Any, Any]:
        """Ends this tab's run within one step and keeps what is on the page."""
        job = self.jobs.get(request.session_hash)
        if job is None:  # still in the queue: Gradio has taken it out
            left = stage(headline="Taken out of the queue before it began")
            return {self.stage: left, **self._busy(False)}
        job.stop.set()
        job.done.wait()
        return {**job.shown, **self._busy(False)}

    def _leave(self, request: gr.Request) -> None:
        """The tab was closed or reloaded: nobody waits for its run any more."""
        job = self.jobs.get(request.session_hash)
        if job is not None:
            job.stop.set()

    # -- history, and controls that depend on others -------------------------------------------

    def _show(self, request: gr.Request, history: list, event: gr.EventData) -> Any:
        index = event.index
        if request.session_hash in self.jobs or not 0 <= index < len(history):
            return [gr.skip()] * 5  # the stage is in use
        entry = history[index]
        path = Path(entry["path"])
        shown = stage(
            [_file_url(path)],
            entry["settings"]["prompt"],
            state="done",
            headline=f"Picture {index + 1} of this visit",
            detail=entry["line"],
            progress=1,
            downloads=[path],
        )
        at_picture = gr.update(selected="picture")
        return at_picture, shown, history_strip(history, index), index, gr.update(interactive=True)

    def _reuse(self, history: list, shown: int | None) -> list[Any]:
        if shown is None or not 0 <= shown < len(history):
            return [gr.skip()] * (len(FIELDS) + 2)
        settings = Settings(**history[shown]["settings"])
        return [settings.precision, *self._controls_for(settings), False]

    def _precision_changed(self, before: str, *chosen: Any) -> list[Any]:
        """Another precision keeps every setting; another kind of model brings its own."""
        settings = Settings(*chosen)
        old, new = self.studio.facts[before], self.studio.facts[settings.precision]
        if (old.steps, old.guidance) != (new.steps, new.guidance):
            settings = replace(settings, steps=new.steps, guidance=new.guidance)
        if settings.style not in new.styles:
            settings = replace(settings, style=NO_STYLE)
        if settings.aspect_ratio not in new.sizes:
            settings = replace(settings, aspect_ratio="1:1")
        return [settings.precision, *self._controls_for(settings, shown=Settings(*chosen))]

    def _controls_for(self, settings: Settings, *, shown: Settings | None = None) -> list[Any]:
        """What every control shows for these settings, in the order of `FIELDS`.

        Values that are `shown` already are left alone: by now the user may have gone on typing.
        """
        model = self.studio.facts[settings.precision]
        looks: dict[str, dict[str, Any]] = {
            "negative_prompt": _negative_looks(settings.guidance),
            "style": {"choices": list(model.styles)},
            "steps": {"minimum": model.min_steps},
            "guidance": _guidance_looks(model),
            "aspect_ratio": {"choices": list(model.sizes)},
        }
        values, present = asdict(settings), asdict(shown) if shown else {}
        for name in FIELDS:
            if name not in present or present[name] != values[name]:
                looks.setdefault(name, {})["value"] = values[name]
        return [gr.update(**looks.get(name, {})) for name in FIELDS]

    # -- programs ------------------------------------------------------------------------------

    def _build_api(self, default: str) -> None:
        """`/generate` for `gradio_client`: and its own inputs, which do not move with the page."""
        boxes = {
            "prompt": gr.Textbox(visible=False, label="prompt"),
            "negative_prompt": gr.Textbox("", visible=False, label="negative_prompt"),
            "style": gr.Textbox(NO_STYLE, visible=False, label="style"),
            "seed": gr.Number(0, visible=False, label="seed"),
            "steps": gr.Number(None, visible=False, label="steps"),
            "guidance": gr.Number(None, visible=False, label="guidance"),
            "pictures": gr.Number(1, visible=False, label="pictures"),
            "aspect_ratio": gr.Textbox("1:1", visible=False, label="aspect_ratio"),
            "precision": gr.Textbox(default, visible=False, label="precision"),
        }
        gr.Button(visible=False).click(
            self._api,
            [boxes[name] for name in FIELDS],
            [
                gr.File(visible=False, file_count="multiple", label="pictures"),
                gr.JSON(visible=False, label="details"),
            ],
            api_name="generate",
            **QUEUE,
        )

    def _api(
        self,
        prompt: str,
        negative_prompt: str = "",
        style: str = NO_STYLE,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        pictures: int = 1,
        aspect_ratio: str = "1:1",
        precision: str = "",
    ) -> tuple[list[str], dict[str, Any]]:
        """Paints and returns the PNG files and a dictionary with settings, seconds and notes.

        Steps and guidance default to the model's own.
        """
        model = self.studio.facts.get(precision)
        if model is not None:
            steps = model.steps if steps is None else steps
            guidance = model.guidance if guidance is None else guidance
        settings = Settings(
            prompt, negative_prompt, style, seed, steps, guidance, pictures, aspect_ratio, precision
        )
        if found := problems(settings, self.studio.facts):
            message = " ".join(f"{name}: {text}" for name, text in found.items())
            raise gr.Error(message, print_exception=False)
        settings = _tidy(settings)
        try:
            *_, painted = self.studio.paint(settings)
        except Exception as error:
            logger.exception("Painting failed.")
            raise gr.Error(_reason(error), print_exception=False) from error
        _, paths = self._remember([], settings, painted)
        details = asdict(settings) | {"seconds": round(painted.seconds, 3), "notes": painted.notes}
        return [str(path) for path in paths], details


def _with_message(message: str | None, hint: str | None) -> dict[str, Any]:
    return gr.update(info=message or hint, elem_classes=["refused"] if message else [])


def _tidy(settings: Settings) -> Settings:
    """Whole numbers as `int`, whatever the page or a program sent."""
    return replace(
        settings,
        prompt=settings.prompt.strip(),
        negative_prompt=(settings.negative_prompt or "").strip(),
        seed=int(settings.seed),
        steps=int(settings.steps),
        guidance=float(settings.guidance),
        pictures=int(settings.pictures),
    )


def _as_is(payload: Any) -> Any:
    return payload


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"That did not work: {text[0] if text else type(error).__name__}"


def _note(notes: Sequence[str], refused: bool = False) -> str:
    look = "note refused" if refused else "note"
    return f'<p class="{look}" role="status">{_text(" ".join(notes))}</p>'


def _guidance_looks(model: ModelFacts) -> dict[str, Any]:
    why = "Has no effect: this model was distilled with guidance built in."
    return {
        "value": model.guidance,
        "label": "Guidance",
        "info": why if model.few_step else "How closely to follow the prompt; 1 and below is off.",
        "interactive": not model.few_step,
    }


def _negative_looks(guidance: float | None) -> dict[str, Any]:
    guided = (guidance or 0) > 1
    return {
        "label": "Negative prompt",
        "info": "What to keep out." if guided else "Has no effect: needs a guidance above 1.",
        "interactive": guided,
    }


def _seed_looks(randomise: bool) -> dict[str, Any]:
    return {
        "info": "Drawn anew for every picture."
        if randomise
        else "The same seed, the same picture.",
        "interactive": not randomise,
    }


# ==============================================================================================
# Launch
# ==============================================================================================

_running: weakref.ref[gr.Blocks] | None = None


def launch_demo(demo: gr.Blocks, *, port: int | None = None, **launch_kwargs: Any) -> None:
    """Serves the page on the loopback address and returns at once; `demo.close()` ends it.

    A demo launched earlier is closed first, so its cell can be run again. `port`: a fixed port
    (default: the first free one from 7860). Other arguments go to Gradio's `launch`. Afterwards
    `demo.local_url` is the address.
    """
    global _running
    previous = _running() if _running is not None else None
    if previous is not None and previous.is_running:
        previous.close(verbose=False)
    options: dict[str, Any] = {
        "server_name": "127.0.0.1",
        "server_port": port,
        "share": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": True,
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": [],
        "ssr_mode": False,
        "height": 900,
        "theme": _theme(),
        "css": CSS,
    }
    if isinstance(demo, Demo):
        options["allowed_paths"] = [str(demo.studio.output)]
    demo.launch(**(options | launch_kwargs))
    _running = weakref.ref(demo)
    print(f"The demo is at {demo.local_url}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Converts the embedded checkpoint if that is still to do; serves the page until Ctrl+C."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Serve the PixArt demo on this machine.")
    parser.add_argument("--model", default=here / "assets" / "pixart-tiny", help="hub id or folder")
    parser.add_argument("--models", default=here / "models", type=Path, help="converted models")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args(arguments)
    demo = make_demo(_converted(str(options.model), options.models))
    launch_demo(demo, port=options.port)
    print("Press Ctrl+C to stop.")
    with contextlib.suppress(KeyboardInterrupt):
        demo.block_thread()
    demo.close()


_LABELS = {"int8": "INT8", "int4": "INT4", "hybrid": "Hybrid"}  # as in the notebook


def _converted(model: str, folder: Path) -> dict[str, Path]:
    """FP16 and INT8 weights of `model`, converted if need be, and what the notebook left beside.

    A twin beside a local checkpoint ("pixart-tiny-lcm" for "pixart-tiny") paints in four steps.
    """
    folder = folder / Path(model).name
    fp16 = convert_pipeline(model, folder / "fp16")
    pipelines = {
        "FP16": fp16,
        "INT8 weights": optimize_pipeline(fp16, folder / "int8-weights", "int8-weights"),
    }
    for preset, label in _LABELS.items():
        if (folder / preset / "model_index.json").is_file():
            pipelines[label] = folder / preset
    twin = Path(f"{model}-lcm")
    if twin.is_dir():
        pipelines["Four steps"] = convert_pipeline(
            model, folder / "lcm", transformer=twin, scheduler=twin
        )
    return pipelines


if __name__ == "__main__":
    main()
