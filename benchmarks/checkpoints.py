"""Checkpoints of the published layout and size with random weights, and the IRs made from them.

Every layer keeps about the variance of its input, so that activations stay finite in 16 bits.
Weights are written shard by shard, and kept for the next run.
"""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from benchmarks.cases import OPENVINO, SCHEDULERS, T5_XXL, XL_512, XL_1024, Case, Scale
from ov_pixart import quantize
from ov_pixart.checkpoint import MODEL_INDEX
from ov_pixart.checks import read_json
from ov_pixart.convert import convert_pipeline
from ov_pixart.memory import peak_memory_mb
from ov_pixart.optimize import optimize_pipeline
from ov_pixart.presets import PRESETS
from ov_pixart.quiet import quiet
from ov_pixart.storage import staged, write_json

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "assets" / "pixart-tiny" / "tokenizer" / "spiece.model"
SHARD_BYTES = 10**9
_SCHEDULER_OF = {
    XL_512: "DPMSolverMultistepScheduler",
    XL_1024: "LCMScheduler",
    T5_XXL: "LCMScheduler",
}
_CONFIGS = "configs.json"  # of the three components

# ---- random weights ------------------------------------------------------------------------------


def checkpoint_folder(root: Path, name: str) -> Path:
    """Where a checkpoint lies."""
    return root / "checkpoints" / name


def has_checkpoint(root: Path, name: str, scale: Scale) -> bool:
    """Whether a checkpoint of this scale has been built."""
    try:
        return read_json(checkpoint_folder(root, name) / _CONFIGS) == scale.configs(name)
    except (OSError, ValueError):
        return False


def build_checkpoint(root: Path, name: str, scale: Scale) -> float:
    """Write a diffusers folder as it is published: class names, file names, an unused weight.

    Returns the peak memory of the process in 10⁹ bytes.
    """
    configs, scheduler = scale.configs(name), _SCHEDULER_OF[name]
    with staged(checkpoint_folder(root, name)) as folder:
        for seed, (part, config) in enumerate(configs.items()):
            shapes = shapes_of(part, config)
            if part == "transformer":
                width = config["caption_channels"]
                shapes["caption_projection.y_embedding"] = torch.Size((120, width))
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            write_weights(folder / part, stem, shapes, config, seed)
            write_json({**_CLASS_OF[part], **config}, folder / part / "config.json")
        (folder / "tokenizer").mkdir()
        shutil.copy(TOKENIZER, folder / "tokenizer")
        write_scheduler(folder, scheduler)
        index = {**_INDEX, "scheduler": ["diffusers", scheduler]}
        write_json(index, folder / MODEL_INDEX)
        write_json(configs, folder / _CONFIGS)
    return peak_memory_mb() / 1000


_INDEX = {
    "_class_name": "PixArtAlphaPipeline",
    "_diffusers_version": "0.22.0.dev0",
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_CLASS_OF = {
    "transformer": {"_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0.dev0"},
    "text_encoder": {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "torch_dtype": "bfloat16",
    },
    "vae": {"_class_name": "AutoencoderKL", "_diffusers_version": "0.22.0.dev0"},
}


def write_scheduler(folder: Path, name: str) -> None:
    """Put a scheduler into a pipeline's folder, torch or OpenVINO."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    config = {"_class_name": name, "_diffusers_version": "0.22.0.dev0", **SCHEDULERS[name]}
    write_json(config, folder / "scheduler" / "scheduler_config.json")


def shapes_of(part: str, config: dict[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of a component's weights, without allocating them."""
    with torch.device("meta"), quiet():
        if part == "text_encoder":
            model = T5EncoderModel(T5Config(**config))
        elif part == "transformer":
            model = PixArtTransformer2DModel(**config)
        else:
            model = AutoencoderKL(**config)
    return {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # the same as shared.weight
    }


def write_weights(
    folder: Path, stem: str, shapes: dict[str, torch.Size], config: dict, seed: int
) -> None:
    """Write bfloat16 safetensors in shards of about SHARD_BYTES, one at a time in memory."""
    folder.mkdir(parents=True)
    shards = list(_shards(shapes))
    generator = torch.Generator().manual_seed(seed)
    places = {}
    for i, names in enumerate(shards, 1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{number}.safetensors"
        tensors = {name: _random(name, shapes[name], config, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = 2 * sum(shape.numel() for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(index, folder / f"{stem}.safetensors.index.json")


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Names in groups of about SHARD_BYTES; the DiT is published in one file."""
    limit = SHARD_BYTES if "shared.weight" in shapes else math.inf
    group, size = [], 0
    for name, shape in shapes.items():
        if group and size + 2 * shape.numel() > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += 2 * shape.numel()
    yield group


def _random(name: str, shape: torch.Size, config: dict, generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:
        if name.endswith("bias"):
            return (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        return torch.ones(shape, dtype=torch.bfloat16)  # of a normalisation
    deviation = (shape.numel() / shape[0]) ** -0.5
    if name.endswith("SelfAttention.q.weight"):
        deviation *= config["d_kv"] ** -0.5  # T5 has this factor in its weights, others in code
    return torch.randn(shape, generator=generator).mul_(deviation).bfloat16()


# ---- their IRs -----------------------------------------------------------------------------------


def openvino_folder(root: Path, name: str, engine: str) -> Path:
    """Where the IRs of a checkpoint lie, for an engine."""
    return root / "openvino" / name / engine


def build_openvino(root: Path, name: str, engine: str, scale: Scale) -> float:
    """Convert a checkpoint to FP16 (`ov-fp16`), or apply the preset that an engine is named after.

    Finished components are kept. Returns the peak memory of the process in 10⁹ bytes.
    """
    source = openvino_folder(root, name, "ov-fp16")
    if engine == "ov-fp16":
        scheduler = root / "few-steps"  # calibration generates an image: 4 steps, no guidance
        write_scheduler(scheduler, "LCMScheduler")
        convert_pipeline(checkpoint_folder(root, name), source, scheduler=scheduler)
    else:
        preset = engine.removeprefix("ov-")
        samples = scale.num_samples if PRESETS[preset].needs_data else None
        output = openvino_folder(root, name, engine)
        quantize.FLOORS.update(dict.fromkeys(quantize.FLOORS, -math.inf))  # for random weights
        optimize_pipeline(source, output, preset, num_samples=samples, progress=False)
    return peak_memory_mb() / 1000


def has_openvino(root: Path, name: str, engine: str) -> bool:
    """Whether a finished pipeline is there."""
    return (openvino_folder(root, name, engine) / MODEL_INDEX).is_file()


# ---- whole pipelines -----------------------------------------------------------------------------


def assemble(root: Path, case: Case, engine: str) -> Path:
    """Join the T5-XXL of one folder with the DiT and VAE of another, as hard links."""
    if engine in OPENVINO:
        texts = openvino_folder(root, T5_XXL, engine)
        images = openvino_folder(root, case.checkpoint, engine)
    else:
        texts = checkpoint_folder(root, T5_XXL)
        images = checkpoint_folder(root, case.checkpoint)
    return join(
        root / "images" / f"{case.name}-{engine}",
        texts,
        images,
        ("transformer", "vae_decoder" if engine in OPENVINO else "vae"),
        "LCMScheduler" if case.guidance <= 1 else "DPMSolverMultistepScheduler",
    )


def join(folder: Path, texts: Path, images: Path, names: tuple[str, ...], scheduler: str) -> Path:
    """Put the text encoder of `texts` and the components `names` of `images` into one folder."""
    shutil.rmtree(folder, ignore_errors=True)
    sources = {"text_encoder": texts, **dict.fromkeys(("tokenizer", *names), images)}
    for part, source in sources.items():
        shutil.copytree(source / part, folder / part, copy_function=_link)
    write_scheduler(folder, scheduler)
    index = read_json(images / MODEL_INDEX)
    write_json({**index, "scheduler": ["diffusers", scheduler]}, folder / MODEL_INDEX)
    return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """The tokenizer of a checkpoint, which consists of a sentencepiece model."""
    return T5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
