"""torch's modules of a checkpoint, and a stopwatch."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from transformers import T5EncoderModel

from ov_pixart.checkpoint import stored_weights


def clock(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `function` takes, and its result."""
    start = time.perf_counter()
    with torch.inference_mode():
        result = function()
    return time.perf_counter() - start, result


def check_finite(result: torch.Tensor) -> None:
    """Raise ArithmeticError if a number is not."""
    if not torch.isfinite(torch.as_tensor(result).float()).all():
        raise ArithmeticError("the result is not finite")


def precision_of(engine: str) -> torch.dtype:
    """The dtype that torch computes in; inputs of OpenVINO's models are float32."""
    return torch.bfloat16 if "bf16" in engine else torch.float32


LOADERS = {
    "dit": ("transformer", PixArtTransformer2DModel),
    "vae": ("vae", AutoencoderKL),
    "t5": ("text_encoder", T5EncoderModel),
}


def load_module(kind: str, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load a component of a checkpoint; raises MemoryError if it does not fit into free memory."""
    name, loader = LOADERS[kind]
    needed = dtype.itemsize * sum(stored_weights(folder / name).sizes)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(f"{name} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    precision = {"dtype" if kind == "t5" else "torch_dtype": dtype}
    options = {"use_safetensors": True, "local_files_only": True, **precision}
    return loader.from_pretrained(folder / name, **options).eval()
