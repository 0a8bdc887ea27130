"""What the demo can be asked for: settings, their limits per model, and their copy in the PNG."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ov_pixart_helper import default_settings, image_sizes, read_json

MAX_SEED = 2**32 - 1
MAX_STEPS = 100
MAX_GUIDANCE = 20.0
MAX_IMAGES = 4
MAX_PROMPT_CHARACTERS = 20_000

NO_STYLE = "None"
STYLES = {  # for checkpoints trained on photographs and art
    NO_STYLE: "{prompt}",
    "Photograph": "{prompt}, photograph, natural light, 50 mm lens, shallow depth of field",
    "Watercolour": "{prompt}, loose watercolour on rough paper, soft edges, pale washes",
    "Ink drawing": "{prompt}, black ink drawing, confident lines, cross-hatching",
    "Paper cut": "{prompt}, layered paper cut-out, clean shapes, soft shadows",
    "Isometric": "{prompt}, isometric illustration, tidy geometry, pastel colours",
    "Film still": "{prompt}, film still, wide shot, dramatic light, fine grain",
}
SCENE_STYLES = {  # PixArt-tiny knows shapes on a background, so its styles are backgrounds
    NO_STYLE: "{prompt}",
    **{
        f"On {colour}": f"{{prompt}} on a {colour} background"
        for colour in ("white", "gray", "black", "cream", "navy", "mint")
    },
}
EXAMPLES = {  # label of the button → prompt
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
    """Everything that decides an image; stored in its PNG, so that it can be generated again."""

    prompt: str
    negative_prompt: str = ""
    style: str = NO_STYLE
    seed: int = 0
    steps: int = 20
    guidance: float = 4.5
    images: int = 1
    aspect_ratio: str = "1:1"
    version: str = ""
    guidance_end: float = 1.0  # the share of the steps that are guided, from the first

    @property
    def seeds(self) -> list[int]:
        """One seed per image, so that each can be generated again on its own."""
        return [(self.seed + i) % (MAX_SEED + 1) for i in range(self.images)]


FIELDS = tuple(field.name for field in fields(Settings))
EARLIER_NAMES = {"precision": "version", "pictures": "images"}  # in PNGs written before


@dataclass(frozen=True)
class ModelInfo:
    """What the page needs to know about a version before its pipeline is loaded."""

    steps: int
    guidance: float
    max_tokens: int
    sizes: dict[str, tuple[int, int]]  # aspect ratio → (height, width) in pixels
    few_step: bool  # distilled (LCM, DMD): guidance is built into the weights
    knows_scenes: bool  # PixArt-tiny: captions of geometric scenes only
    size_mb: float
    timesteps: tuple[int, ...] | None = None  # where one-step models (DMD) start
    guidance_end: float = 1.0

    @property
    def min_steps(self) -> int:
        """One step of DPM-Solver++ raises IndexError inside diffusers' PixArt."""
        return 1 if self.few_step else 2

    @property
    def styles(self) -> dict[str, str]:
        return SCENE_STYLES if self.knows_scenes else STYLES

    @property
    def examples(self) -> dict[str, str]:
        return SCENE_EXAMPLES if self.knows_scenes else EXAMPLES


def read_model_info(ov_dir: Path) -> ModelInfo:
    """Read what the page needs to know about a converted pipeline, without loading it."""
    defaults = default_settings(ov_dir)
    text_encoder = read_json(ov_dir / "text_encoder" / "config.json")
    return ModelInfo(
        steps=defaults.num_inference_steps,
        guidance=defaults.guidance_scale,
        max_tokens=defaults.max_sequence_length,
        sizes=image_sizes(ov_dir),
        few_step=defaults.num_inference_steps < 10,
        knows_scenes=text_encoder.get("vocab_size", 32_128) < 2_000,
        size_mb=sum(f.stat().st_size for f in ov_dir.rglob("*") if f.is_file()) / 1e6,
        timesteps=defaults.timesteps,
        guidance_end=defaults.guidance_end,
    )


def problems(settings: Settings, models: dict[str, ModelInfo]) -> dict[str, str]:
    """Return field → message for every setting that cannot be used (empty: all is well)."""
    if settings.version not in models:
        return {"version": f"Choose one of: {', '.join(models)}."}
    model = models[settings.version]
    found: dict[str, str] = {}
    if not (settings.prompt or "").strip():
        found["prompt"] = "Type what you would like to see first."
    for name in ("prompt", "negative_prompt"):
        if len(getattr(settings, name) or "") > MAX_PROMPT_CHARACTERS:
            found[name] = f"Too long: at most {MAX_PROMPT_CHARACTERS:,} characters."
    whole = {
        "seed": (0, MAX_SEED),
        "steps": (model.min_steps, MAX_STEPS),
        "images": (1, MAX_IMAGES),
    }
    for name, (low, high) in whole.items():
        value = getattr(settings, name)
        if type(value) is not int or not low <= value <= high:
            found[name] = f"Enter a whole number from {low} to {high}."
    for name, most in (("guidance", MAX_GUIDANCE), ("guidance_end", 1)):
        value = getattr(settings, name)
        if type(value) not in (int, float) or not 0 <= value <= most:
            found[name] = f"Enter a number from 0 to {most:g}."
    for name, choices in (("style", model.styles), ("aspect_ratio", model.sizes)):
        if getattr(settings, name) not in choices:
            found[name] = f"Choose one of: {', '.join(choices)}."
    return found


def fit(settings: Settings, old: str, new: str, models: dict[str, ModelInfo]) -> Settings:
    """The same request for version `new`; another kind of model has its own steps and guidance."""
    before, model = models[old], models[new]
    changes: dict[str, Any] = {"version": new}
    own = ("steps", "guidance", "guidance_end")
    if any(getattr(before, name) != getattr(model, name) for name in own):
        changes |= {name: getattr(model, name) for name in own}
    if settings.style not in model.styles:
        changes["style"] = NO_STYLE
    if settings.aspect_ratio not in model.sizes:
        changes["aspect_ratio"] = next(iter(model.sizes))
    return replace(settings, **changes)


def styled_prompt(settings: Settings, model: ModelInfo) -> str:
    """Put the prompt into its style's template, unless it names a background itself."""
    prompt = settings.prompt.strip()
    names_background = any(word in prompt.lower() for word in ("background", "backdrop"))
    if model.knows_scenes and names_background:
        return prompt
    return model.styles[settings.style].format(prompt=prompt)


def describe(settings: Settings, model: ModelInfo) -> str:
    """One line with the settings that matter for this image."""
    height, width = model.sizes[settings.aspect_ratio]
    parts = [settings.version, f"seed {settings.seed}", f"{settings.steps} steps"]
    if settings.guidance > 1:
        part = f" in the first {settings.guidance_end:.0%}" if settings.guidance_end < 1 else ""
        parts.append(f"guidance {settings.guidance:g}{part}")
    parts.append(f"{width} × {height}")
    if settings.style != NO_STYLE:
        parts.append(settings.style)
    return " · ".join(parts)


def save_image(image: Image.Image, folder: Path, settings: Settings) -> Path:
    """Write a PNG that carries the settings it was generated with."""
    info = PngInfo()
    info.add_itxt("Title", settings.prompt[:200])
    info.add_itxt("Software", "PixArt with OpenVINO")
    info.add_itxt("parameters", json.dumps(asdict(settings), ensure_ascii=False))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"pixart-{settings.seed}-{uuid.uuid4().hex[:12]}.png"
    image.save(path, pnginfo=info)
    return path


def read_settings(path: str | Path) -> Settings:
    """Read the settings back from a PNG that this demo saved.

    Raises ValueError for an image that carries none.
    """
    try:
        with Image.open(path) as image:
            image.load()
            stored = json.loads(image.info["parameters"])
        return Settings(**{EARLIER_NAMES.get(name, name): stored[name] for name in stored})
    except (UnidentifiedImageError, KeyError, TypeError, ValueError):
        raise ValueError(f"{Path(path).name} carries no settings of this demo.") from None
