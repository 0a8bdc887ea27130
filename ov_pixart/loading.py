"""`load_pipeline`: any PixArt folder, OpenVINO or torch, ready to generate without a bar."""

import inspect
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import T5Tokenizer

from ov_pixart.checkpoint import COMPONENTS, family_of, is_openvino_folder, load_component
from ov_pixart.checks import check_names
from ov_pixart.guidance import with_interval
from ov_pixart.pipeline import PIPELINES
from ov_pixart.quiet import hide_loading_bars, quiet
from ov_pixart.sources import component_class


def load_pipeline(folder: str | Path, **options: Any) -> DiffusionPipeline:
    """Load a pipeline without its progress bar: an OpenVINO folder, or a torch one in float32.

    The call of either takes `guidance_start` and `guidance_end`.
    `options`: arguments of `from_pretrained`, such as `device` or `ov_config`. Raises as
    `from_pretrained` does.
    """
    folder = Path(folder)
    family = family_of(folder)
    if is_openvino_folder(folder):
        pipeline = PIPELINES[family.name].from_pretrained(folder, **options)
    else:
        known = inspect.signature(family.torch_class).parameters
        check_names("load_pipeline, for a torch folder,", options, known)
        modules = {}
        for name in (component.folder for component in COMPONENTS.values()):
            loader = component_class(folder / name, name)  # the VAE may be an AutoencoderTiny
            modules[name] = load_component(folder / name, loader).float()
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        with quiet(), hide_loading_bars():
            pipeline = with_interval(family.torch_class).from_pretrained(
                folder, local_files_only=True, tokenizer=tokenizer, **modules, **options
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
