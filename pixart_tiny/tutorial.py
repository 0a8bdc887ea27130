"""What the notebook shows for PixArt-tiny, and for a checkpoint that draws the world."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

import ov_pixart_helper as ovp
from pixart_tiny import evaluate, oracle

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@dataclass(frozen=True)
class Example:
    """One row of the tutorial: prompts, formats and data for one kind of checkpoint.

    `few_step`: the end of the few-step model's id, None if there is none. `presets`: beyond
    "int8-weights" and "int8". `compared`: captions with seeds for the comparison.
    """

    prompt: str
    two_objects: str
    words: tuple[str, ...]  # of `two_objects`, for the word maps
    open_prompt: str  # leaves something to the model
    text_format: str  # of the text encoder's weights
    captions: str
    num_samples: int
    compared: tuple[tuple[str, int], ...]
    few_step: str | None = None
    presets: tuple[str, ...] = ()
    scorer: Callable[[list[Image.Image], list[str]], list[float]] | None = None

    @property
    def is_tiny(self) -> bool:
        """Whether the oracle can read the images."""
        return self.scorer is not None

    def exact_pipeline(self, pipeline: DiffusionPipeline, ov_dir: Path) -> DiffusionPipeline:
        """A pipeline that computes in 32 bits; a large checkpoint goes on as it is."""
        return ovp.load_pipeline(ov_dir, ov_config=F32) if self.is_tiny else pipeline

    def torch_folders(self, model_id: str) -> dict[str, Path]:
        """The checkpoint as a version to compare with; none where it would not fit into memory."""
        return {"PyTorch": Path(model_id)} if self.is_tiny else {}

    def few_step_models(self, model_id: str) -> list[str]:
        """Transformer and scheduler distilled from this checkpoint; at most one."""
        return [f"{model_id}{self.few_step}"] if self.few_step else []

    def describe(self, image: Image.Image, prompt: str) -> str:
        """The oracle's reading of an image, or its size where the oracle cannot read."""
        if not self.is_tiny:
            return f"{image.width}×{image.height}"
        right = oracle.score_caption(image, prompt).right
        return f"{oracle.read_picture(image)} – {'right' if right else 'wrong'}"

    def unwanted(self, image: Image.Image) -> str:
        """A negative prompt against something that this image shows."""
        if not self.is_tiny:
            return "apples, red"
        return f"a small cyan ring on a {oracle.read_picture(image).background} background"

    def locate_words(self, maps: ovp.WordMaps) -> Iterator[str]:
        """One line per word that names a shape: whether its map peaks inside that object."""
        read = oracle.read_picture(maps.image).objects if self.is_tiny else ()
        side = min(maps.image.size)
        for thing in read:
            if thing.shape in maps.maps:
                x, y = maps.peak(thing.shape)
                distance = ((x / side - thing.x) ** 2 + (y / side - thing.y) ** 2) ** 0.5
                place = "inside the outline of" if distance <= thing.radius else "outside"
                name = f"{thing.size} {thing.colour} {thing.shape}"
                yield f"“{thing.shape}” is strongest {place} the {name}"


TINY = Example(
    prompt="a large red star on a navy background",
    two_objects="a small yellow star above a large blue ring on a mint background",
    words=("small", "yellow", "star", "blue", "ring", "mint"),
    open_prompt="a large pink heart",
    text_format="fp16",
    captions="pixart-tiny-calibration.csv",
    num_samples=40,
    compared=tuple(evaluate.read_captions()[8:12]),
    few_step="-lcm",
    presets=("int4", "hybrid"),
    scorer=oracle.score_pictures,
)
WORLD = Example(
    prompt="A cactus with a happy face in the Sahara desert, watercolour",
    two_objects="A small lighthouse on a rock, a red boat in front of it",
    words=("lighthouse", "rock", "red", "boat"),
    open_prompt="a bowl of fruit on a table",
    text_format="int8",  # T5-XXL does not fit into a laptop in 16 bits
    captions="natural-calibration.csv",
    num_samples=20,
    compared=(
        ("A lighthouse in a storm, oil on canvas", 1),
        ("A cactus with a happy face in the Sahara desert, watercolour", 2),
    ),
)


def example_for(model_id: str) -> Example:
    """The row for a checkpoint, given its id or folder."""
    return TINY if Path(model_id).name == "pixart-tiny" else WORLD
