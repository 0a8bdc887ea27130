"""The demo: a page that paints with the converted pipelines and shows every denoising step.

Read from top to bottom: what can be asked for (*Settings*), how a picture is painted and watched
(*Studio*), how results look in the page (*Page*), how controls are wired (*Demo*), and how the
page is served (*Launch*).

    demo = make_demo({"FP16": "models/pixart-tiny-fp16", "INT8": "models/pixart-tiny-int8"})
    launch_demo(demo)
    demo.close()

Everything stays on this machine: the server listens on the loopback address only, nothing is
fetched from elsewhere (no web fonts, no scripts, no analytics) and Gradio's run history is off.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import gc
import html
import io
import json
import math
import queue
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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

EXAMPLES = (
    "A small cactus with a happy face in the Sahara desert",
    "An isometric cutaway of a lighthouse keeper's library at night",
    "A red fox asleep on a mossy stone, morning mist",
    "A paper boat sailing over a map of the stars",
)
SCENE_EXAMPLES = (
    "a large red heart on a white background",
    "a small purple circle above a large yellow star on a black background",
    "a big cyan ring to the left of a small orange square on a navy background",
    "a large green star on a mint background",
    "a tiny blue heart below a huge pink triangle on a cream background",
)


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

    @property
    def styles(self) -> dict[str, str]:
        return SCENE_STYLES if self.knows_scenes else STYLES

    @property
    def examples(self) -> tuple[str, ...]:
        return SCENE_EXAMPLES if self.knows_scenes else EXAMPLES


class SettingsError(ValueError):
    """A setting that is refused: `name` is the field, the message is for the reader."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


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
    """Reads steps, guidance, sizes and token limit of a converted pipeline without loading it."""
    transformer = _read_json(folder / "transformer" / "config.json")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    text_encoder = _read_json(folder / "text_encoder" / "config.json")
    vae = _read_json(folder / "vae_decoder" / "config.json")
    index = _read_json(folder / "model_index.json")
    few_step = "LCM" in scheduler.get("_class_name", "")
    scale = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
    return ModelFacts(
        steps=4 if few_step else 20,
        guidance=0.0 if few_step else 4.5,
        max_tokens=300 if "Sigma" in index.get("_class_name", "") else 120,
        sizes=picture_sizes(transformer.get("sample_size", 32), scale),
        few_step=few_step,
        min_steps=1 if few_step else 2,  # DPM-Solver++ in diffusers needs two
        knows_scenes=text_encoder.get("vocab_size", 32_128) < 1_000,
        size_mb=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6,
    )


def picture_sizes(sample_size: int, scale: int = 8) -> dict[str, tuple[int, int]]:
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
        return {"1:1": (sample_size * scale, sample_size * scale)}
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


class LatentPreview:
    """Turns latents `(B, 4, h, w)` into pictures of h × w pixels with one linear map.

    A VAE's latents are, to a good approximation, a linear code of the colour under them, so a
    least-squares fit against a few decoded latents gives a preview that costs nothing.
    """

    def __init__(self, decode: Callable[[torch.Tensor], torch.Tensor], channels: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        smooth = torch.randn(8, channels, 4, 4, generator=generator)
        latents = torch.nn.functional.interpolate(smooth, scale_factor=4, mode="bicubic")
        latents = latents + 0.25 * torch.randn(latents.shape, generator=generator)
        pictures = decode(latents).float()  # (8, 3, 16 s, 16 s)
        colours = torch.nn.functional.adaptive_avg_pool2d(pictures, latents.shape[-2:])
        design = self._design(latents)
        target = colours.permute(0, 2, 3, 1).reshape(-1, 3)
        self.weights = torch.linalg.lstsq(design, target).solution  # (channels + 1, 3)

    @staticmethod
    def _design(latents: torch.Tensor) -> torch.Tensor:
        flat = latents.float().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)

    def __call__(self, latents: torch.Tensor) -> list[Image.Image]:
        batch, _, height, width = latents.shape
        colours = (self._design(latents) @ self.weights).reshape(batch, height, width, 3)
        pixels = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return [Image.fromarray(p) for p in pixels]


class Studio:
    """Owns the pipelines: loads them when first asked, keeps few, paints one request at a time."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.facts = {label: read_model_facts(folder) for label, folder in folders.items()}
        self.output = Path(tempfile.mkdtemp(prefix="pixart-demo-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.output, ignore_errors=True)
        self._pipelines: OrderedDict[str, Any] = OrderedDict()
        self._preview: LatentPreview | None = None
        self._lock = threading.RLock()

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
        """Frees pipelines and pictures."""
        self.unload()
        self._preview = None
        self._cleanup()

    def paint(self, settings: Settings, stop: threading.Event | None = None) -> Iterator[Any]:
        """Yields a `Note`, a `Preview` after every step and `Painted` at the end.

        The pipeline runs in a thread of its own; setting `stop`, or closing the iterator, ends it
        within one step. A stopped run simply yields no `Painted`.
        """
        stop = stop or threading.Event()
        updates: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def work() -> None:
            try:
                with self._lock:
                    updates.put(self._run(settings, stop, updates.put))
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
            stop.set()
            worker.join()

    def _run(
        self, settings: Settings, stop: threading.Event, tell: Callable[[Any], None]
    ) -> Painted:
        pipe = self.pipeline(settings.precision)
        model = self.facts[settings.precision]
        preview = self._preview_of(pipe)
        prompt, notes = _fit_prompt(pipe, styled_prompt(settings, model), model)
        negative, _ = _fit_prompt(pipe, settings.negative_prompt.strip(), model)
        tell(Note(notes))
        ticks = [time.perf_counter()]

        def after_step(step: int, timestep: Any, latents: torch.Tensor) -> None:
            if stop.is_set():
                raise _Stopped
            ticks.append(time.perf_counter())
            pace = statistics.median(np.diff(ticks))
            images = preview(_estimate(pipe, latents))
            tell(Preview(step + 1, settings.steps, images, pace * (settings.steps - step - 1)))

        if stop.is_set():
            raise _Stopped
        height, width = model.sizes[settings.aspect_ratio]
        images = pipe(
            prompt,
            negative_prompt=negative,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            num_images_per_prompt=settings.pictures,
            height=height,
            width=width,
            use_resolution_binning=False,  # the size is one of the model's bins already
            max_sequence_length=model.max_tokens,
            clean_caption=False,  # done above, where it can be cut to the model's length
            generator=[
                torch.Generator().manual_seed(settings.seed + i) for i in range(settings.pictures)
            ],
            callback=after_step,
            callback_steps=1,
        ).images
        if stop.is_set():
            raise _Stopped
        step_ms = 1e3 * statistics.median(np.diff(ticks)) if len(ticks) > 1 else 0.0
        return Painted(images, time.perf_counter() - ticks[0], step_ms, notes)

    def _preview_of(self, pipe: Any) -> LatentPreview:
        if self._preview is None:  # precisions of one model share their VAE
            scaling = pipe.vae.config.scaling_factor
            with torch.no_grad():
                self._preview = LatentPreview(
                    lambda latents: torch.as_tensor(
                        pipe.vae.decode(latents / scaling, return_dict=False)[0]
                    )
                )
        return self._preview


def _load_pipeline(folder: Path) -> Any:
    """Loads a converted pipeline, without its progress bar."""
    from ov_pixart_helper import OVPixArtAlphaPipeline

    pipe = OVPixArtAlphaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
        cleaned = pipe._text_preprocessing(text, clean_caption=True)[0]
    words = cleaned.split()
    if not words:
        return cleaned, ["Nothing the model can read is left of this prompt."]

    def fits(count: int) -> bool:
        # Longer than any limit, so that the tokenizer neither cuts nor warns.
        ids = pipe.tokenizer(" ".join(words[:count]), truncation=True, max_length=1 + limit)
        return len(ids.input_ids) <= limit

    limit = model.max_tokens
    if fits(len(words)):
        return cleaned, []
    low, high = 0, min(len(words), limit)  # a word is at least one token
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    left_out = " ".join(words[low:])
    excerpt = left_out[:40] + ("…" if len(left_out) > 40 else "")
    kept = " ".join(words[: max(low, 1)])
    return kept, [
        f"The model reads {limit} tokens: only the first {low} of {len(words)} words were used, "
        f"“{excerpt}” and what follows was left out."
    ]


def _release_memory() -> None:
    gc.collect()
    if sys.platform == "linux":  # glibc keeps freed memory unless it is asked
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def save_picture(image: Image.Image, folder: Path, settings: Settings, model: str) -> Path:
    """Writes a PNG that carries the settings it was painted with."""
    info = PngInfo()
    info.add_itxt("Title", settings.prompt[:200])
    info.add_itxt("Software", f"PixArt with OpenVINO, {model}")
    info.add_itxt("parameters", json.dumps(asdict(settings), ensure_ascii=False))
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


def _text(value: Any) -> str:
    """Text for HTML: whatever a prompt contains is shown, never interpreted."""
    return html.escape(str(value), quote=True)


def _data_uri(image: Image.Image, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{format.lower()};base64,{encoded}"


def _file_url(path: Path) -> str:
    return f"gradio_api/file={path.as_posix()}"


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def describe(settings: Settings, model: ModelFacts) -> str:
    """One line with the parameters that matter for this picture."""
    height, width = model.sizes[settings.aspect_ratio]
    parts = [f"seed {settings.seed}", f"{settings.steps} steps"]
    if settings.guidance > 1:
        parts.append(f"guidance {settings.guidance:g}")
    parts.append(f"{width} × {height}")
    if settings.style != NO_STYLE:
        parts.append(settings.style)
    parts.append(settings.precision)
    return " · ".join(parts)


def stage(
    sources: Sequence[str] = (),
    alt: str = "",
    *,
    state: str = "idle",
    headline: str = "",
    detail: str = "",
    progress: float = 0.0,
    downloads: Sequence[tuple[str, str]] = (),
) -> str:
    """The picture area: a frame of fixed size, one line of status, one line of details.

    Every state has the same elements in the same places, so that nothing jumps while it streams.
    """
    pictures = "".join(
        f'<img src="{source}" alt="{_text(alt)}{f", picture {i + 1}" if len(sources) > 1 else ""}">'
        for i, source in enumerate(sources)
    )
    if not sources:
        pictures = '<p class="hint">Your picture appears here, step by step.</p>'
    links = "".join(
        f'<a href="{url}" download="{_text(name)}">Save PNG</a>' for url, name in downloads
    )
    return (
        f'<div class="stage {state}">'
        f'<div class="frame count-{max(1, len(sources))}">{pictures}</div>'
        f'<div class="bar"><span style="width: {100 * progress:.1f}%"></span></div>'
        f'<p class="headline" role="status" aria-live="polite">{_text(headline) or "&nbsp;"}</p>'
        f'<p class="detail">{_text(detail) or "&nbsp;"}<span class="links">{links}</span></p>'
        "</div>"
    )


# ==============================================================================================
# Demo: controls and what they do
# ==============================================================================================


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
    missing = [str(f) for f in folders.values() if not (f / "model_index.json").is_file()]
    if missing:
        raise FileNotFoundError(f"No converted pipeline in {', '.join(missing)}.")
    studio = Studio(folders)
    with Demo(title="PixArt with OpenVINO", analytics_enabled=False) as demo:
        demo.studio = studio
        _build_page(studio, default)
    return demo


def _build_page(studio: Studio, default: str) -> None:
    model = studio.facts[default]
    gr.Markdown("# PixArt with OpenVINO")
    prompt = gr.Textbox(model.examples[0], label="Prompt", lines=2)
    precision = gr.Radio(list(studio.folders), value=default, label="Precision")
    seed = gr.Number(7, label="Seed", precision=0)
    button = gr.Button("Generate", variant="primary")
    picture = gr.HTML(stage(), apply_default_css=False)

    def generate(prompt: str, precision: str, seed: int) -> Iterator[str]:
        facts = studio.facts[precision]
        settings = Settings(
            prompt, seed=seed, steps=facts.steps, guidance=facts.guidance, precision=precision
        )
        for update in studio.paint(settings):
            if isinstance(update, Preview):
                yield stage(
                    [_data_uri(i) for i in update.images],
                    prompt,
                    state="working",
                    headline=f"Step {update.step} of {update.steps}",
                    progress=update.step / update.steps,
                )
            elif isinstance(update, Painted):
                path = save_picture(update.images[0], studio.output, settings, precision)
                yield stage([_file_url(path)], prompt, state="done", headline="Done")

    button.click(
        generate, [prompt, precision, seed], picture, concurrency_limit=1, api_name="generate"
    )


# ==============================================================================================
# Launch
# ==============================================================================================

_running: weakref.ref[gr.Blocks] | None = None


def launch_demo(demo: gr.Blocks, *, port: int | None = None, **launch_kwargs: Any) -> Any:
    """Serves the page on the loopback address and returns at once; `demo.close()` ends it.

    A demo that was launched before is closed first, so a cell can be run again. `port`: a fixed
    port (default: the first free one from 7860). Other arguments go to Gradio's `launch`.
    """
    global _running
    previous = _running() if _running is not None else None
    if previous is not None:
        previous.close(verbose=False)
    options = {
        "server_name": "127.0.0.1",
        "server_port": port,
        "share": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": True,
        "run_history": False,
        "footer_links": [],
        "ssr_mode": False,
        "enable_monitoring": False,
        "allowed_paths": [str(demo.studio.output)] if isinstance(demo, Demo) else None,
    }
    launched = demo.launch(**(options | launch_kwargs))
    _running = weakref.ref(demo)
    print(f"The demo is at {demo.local_url}")
    return launched
