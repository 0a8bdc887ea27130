"""Checkpoints of the published layout and size with random weights, and the IRs made from them.

Weights are random but tame: every layer hands on about the variance that it got, so that
activations stay finite in 16 bits. They are written shard by shard, and kept for the next run.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import ov_pixart_helper as helper
from tests.benchmarks.cases import (
    OPENVINO,
    SCHEDULERS,
    T5_XXL,
    XL_512,
    XL_1024,
    Case,
    Scale,
    disk_gb,
    parameters,
)

TOKENIZER = Path(helper.__file__).parent / "assets" / "pixart-tiny" / "tokenizer" / "spiece.model"
SHARD_BYTES = 10**9
_SCHEDULER_OF = {
    XL_512: "DPMSolverMultistepScheduler",
    XL_1024: "LCMScheduler",
    T5_XXL: "LCMScheduler",
}
_COMPLETE = "complete.json"  # written last: a folder with it is whole

# ==================================================================================================
# Random weights
# ==================================================================================================


def checkpoint_folder(root: Path, name: str) -> Path:
    """Where a checkpoint lies."""
    return root / "checkpoints" / name


def has_checkpoint(root: Path, name: str, scale: Scale) -> bool:
    """Whether a checkpoint of this scale has been built."""
    try:
        made = json.loads((checkpoint_folder(root, name) / _COMPLETE).read_text())
    except (OSError, ValueError):
        return False
    return made == scale.configs(name)


def build_checkpoint(root: Path, name: str, scale: Scale) -> float:
    """Write a diffusers folder as it is published: class names, file names, an unused weight.

    Returns the most memory that the process has held, in 10⁹ bytes.
    """
    folder = checkpoint_folder(root, name)
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f".partial-{name}")
    shutil.rmtree(partial, ignore_errors=True)
    configs, scheduler = scale.configs(name), _SCHEDULER_OF[name]
    for seed, (part, config) in enumerate(configs.items()):
        stored = shapes_of(part, config)
        if part == "transformer":
            stored["caption_projection.y_embedding"] = torch.Size((120, config["caption_channels"]))
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        _write_weights(partial / part, stem, stored, config, seed)
        _write_json(partial / part / "config.json", {**_CLASS_OF[part], **config})
    (partial / "tokenizer").mkdir()
    shutil.copy(TOKENIZER, partial / "tokenizer")
    write_scheduler(partial, scheduler)
    _write_json(
        partial / helper.MODEL_INDEX,
        {
            "_class_name": "PixArtAlphaPipeline",
            "_diffusers_version": "0.22.0.dev0",
            "scheduler": ["diffusers", scheduler],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    _write_json(partial / _COMPLETE, configs)
    os.replace(partial, folder)
    return helper._peak_memory_mb() / 1000


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
    """Put a scheduler into a pipeline's folder, PyTorch or OpenVINO."""
    shutil.rmtree(folder / "scheduler", ignore_errors=True)
    config = {"_class_name": name, "_diffusers_version": "0.22.0.dev0", **SCHEDULERS[name]}
    _write_json(folder / "scheduler" / "scheduler_config.json", config)


def shapes_of(part: str, config: dict[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of a model's weights, without making them."""
    with torch.device("meta"), helper._quiet():
        if part == "text_encoder":
            model = T5EncoderModel(T5Config(**config))
        elif part == "transformer":
            model = helper.PixArtTransformer(**config)
        else:
            model = AutoencoderKL(**{k: _as_given(v) for k, v in config.items()})
    return {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # the same as shared.weight
    }


def _as_given(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write_weights(
    folder: Path, stem: str, shapes: dict[str, torch.Size], config: dict, seed: int
) -> None:
    """Write bfloat16 safetensors, as many shards as it takes; no more than one is in memory."""
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
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Names, in groups of about SHARD_BYTES; the DiT is published in one file and stays so."""
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


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


# ==================================================================================================
# What convert_pipeline and optimize_pipeline make of them
# ==================================================================================================


def openvino_folder(root: Path, name: str, engine: str) -> Path:
    """Where the IRs of a checkpoint lie, for an engine."""
    return root / "openvino" / name / engine


def build_openvino(root: Path, name: str, engine: str, scale: Scale) -> float:
    """Convert a checkpoint to FP16 (`ov-fp16`), or apply the preset that an engine is called after.

    What is there already is kept, by the two functions themselves. Returns the most memory that
    the process has held, in 10⁹ bytes.
    """
    source = openvino_folder(root, name, "ov-fp16")
    if engine == "ov-fp16":
        scheduler = root / "few-steps"  # calibration draws a picture: 4 steps without guidance
        write_scheduler(scheduler, "LCMScheduler")
        helper.convert_pipeline(checkpoint_folder(root, name), source, scheduler=scheduler)
    else:
        preset = engine.removeprefix("ov-")
        samples = scale.num_samples if helper.PRESETS[preset].needs_data else None
        output = openvino_folder(root, name, engine)
        helper.optimize_pipeline(source, output, preset, num_samples=samples, progress=False)
    return helper._peak_memory_mb() / 1000


def has_openvino(root: Path, name: str, engine: str) -> bool:
    """Whether a finished pipeline is there (it may still be out of date: ask `build_openvino`)."""
    return (openvino_folder(root, name, engine) / helper.MODEL_INDEX).is_file()


def preparation_gb(name: str, engine: str | None, scale: Scale) -> float:
    """10⁹ bytes of memory that `build_checkpoint` (None) or `build_openvino` takes at its worst."""
    count = parameters(name, scale)
    text, picture = count["text_encoder"] / 1e9, (count["transformer"] + count["vae"]) / 1e9
    if engine is None:
        return 0.8 + 2 * min(max(text, picture), 1.5)
    if engine == "ov-fp16":
        return 0.8 + 2.4 * max(text, picture)
    fitted = helper.PRESETS[engine.removeprefix("ov-")].text_encoder.needs_data
    text *= 4.2 if fitted else 3  # scales are fitted on what the model computes in float32
    area = 4 if name == XL_1024 else 1
    return 0.8 + max(text, 8 * picture + area / scale.shrink**2)


def size_gb(root: Path, name: str, engine: str | None, scale: Scale) -> float:
    """10⁹ bytes of disk that are still to be filled."""
    there = (
        has_checkpoint(root, name, scale) if engine is None else has_openvino(root, name, engine)
    )
    return 0.0 if there else disk_gb(name, engine, scale)


# ==================================================================================================
# Whole pictures
# ==================================================================================================


def assemble(root: Path, case: Case, engine: str) -> Path:
    """Put the T5-XXL of one folder and DiT and VAE of another into one, as hard links."""
    if engine in OPENVINO:
        texts = openvino_folder(root, T5_XXL, engine)
        pictures = openvino_folder(root, case.checkpoint, engine)
    else:
        texts = checkpoint_folder(root, T5_XXL)
        pictures = checkpoint_folder(root, case.checkpoint)
    return join(
        root / "pictures" / f"{case.name}-{engine}",
        texts,
        pictures,
        ("transformer", "vae_decoder" if engine in OPENVINO else "vae"),
        "LCMScheduler" if case.guidance <= 1 else "DPMSolverMultistepScheduler",
    )


def join(folder: Path, texts: Path, pictures: Path, names: tuple[str, ...], scheduler: str) -> Path:
    """Put the text encoder of `texts` and the models `names` of `pictures` into one folder."""
    shutil.rmtree(folder, ignore_errors=True)
    sources = {"text_encoder": texts, **dict.fromkeys(("tokenizer", *names), pictures)}
    for part, source in sources.items():
        shutil.copytree(source / part, folder / part, copy_function=_link)
    write_scheduler(folder, scheduler)
    index = json.loads((pictures / helper.MODEL_INDEX).read_text())
    _write_json(folder / helper.MODEL_INDEX, {**index, "scheduler": ["diffusers", scheduler]})
    return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """The tokenizer of a checkpoint, which is nothing but a sentencepiece model."""
    return T5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
