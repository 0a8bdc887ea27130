"""What differs between PixArt-α and PixArt-Σ: diffusers class, length of prompts, image sizes."""

import math
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN

from ov_pixart.checks import read_json

ASPECT_RATIOS = {  # name → width / height
    "1:1": 1.0,
    "4:3": 4 / 3,
    "3:4": 3 / 4,
    "3:2": 3 / 2,
    "2:3": 2 / 3,
    "16:9": 16 / 9,
    "9:16": 9 / 16,
}


@dataclass(frozen=True)
class Family:
    """One family of PixArt checkpoints.

    `bins`: the image sizes that checkpoints of this family were trained on, by the `sample_size`
    of their transformer; diffusers' tables, whose values are `[height, width]` in pixels.
    """

    name: str
    torch_class: type[DiffusionPipeline]
    max_tokens: int  # of a prompt
    bins: dict[int, dict[str, list[float]]]

    @property
    def class_name(self) -> str:
        """The diffusers class, as `model_index.json` names it."""
        return self.torch_class.__name__

    def image_sizes(self, sample_size: int) -> dict[str, tuple[int, int]]:
        """The trained `(height, width)` nearest to each of ASPECT_RATIOS, in pixels.

        Empty for a `sample_size` that has no bins: such a checkpoint knows its own square only.
        """
        if sample_size not in self.bins:
            return {}
        trained = [(int(height), int(width)) for height, width in self.bins[sample_size].values()]
        return {
            name: min(trained, key=lambda size: abs(math.log(size[1] / size[0] / ratio)))
            for name, ratio in ASPECT_RATIOS.items()
        }


_ALPHA_BINS = {32: ASPECT_RATIO_256_BIN, 64: ASPECT_RATIO_512_BIN, 128: ASPECT_RATIO_1024_BIN}

ALPHA = Family("PixArt-α", PixArtAlphaPipeline, 120, _ALPHA_BINS)
SIGMA = Family("PixArt-Σ", PixArtSigmaPipeline, 300, {**_ALPHA_BINS, 256: ASPECT_RATIO_2048_BIN})
FAMILIES = (ALPHA, SIGMA)


def find_family(class_name: str) -> Family | None:
    """The family of a pipeline class in `model_index.json`; a leading "OV" is ignored."""
    names = {family.class_name: family for family in FAMILIES}
    return names.get(str(class_name).removeprefix("OV"))


def check_conditions(family: Family, transformer: Path) -> None:
    """Raise ValueError if the pipeline will not pass the image sizes that a transformer needs.

    diffusers passes them in α's pipeline, to models with a `sample_size` of 128.
    """
    config = read_json(transformer / "config.json")
    is_ms = config.get("sample_size") == 128
    needs = config.get("use_additional_conditions")
    needs = is_ms if needs is None else needs  # as diffusers does
    if needs and not (family is ALPHA and is_ms):
        raise ValueError(
            f"transformer={str(transformer)!r} was trained with image sizes as conditions, as "
            f"PixArt-α 1024-MS is, and does not work in a {family.class_name} with sample_size "
            f"{config.get('sample_size')}: choose a transformer of model_id's own family."
        )
