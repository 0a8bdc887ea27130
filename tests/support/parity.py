"""The same call to OpenVINO and torch, and how far two results are apart."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch

import ov_pixart_helper as helper

# One thread: models this small gain nothing from more, and a busy machine makes them wait.
F32 = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}

SMALL = {
    "prompt": "a small red circle above the sea",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "max_sequence_length": 40,
    "use_resolution_binning": False,
    "output_type": "np",
}


def load_exact(folder: Path, **options: Any) -> helper.OVDiffusionPipeline:
    """Our pipeline, computing in float32."""
    pipeline = helper.OVDiffusionPipeline.from_pretrained(folder, **{"ov_config": F32, **options})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, seed: int = 0, **call: Any) -> np.ndarray:
    """Small images, `(N, H, W, 3)`; `call` changes SMALL."""
    call = {**SMALL, **call}
    call.setdefault("generator", torch.Generator().manual_seed(seed))
    return np.asarray(pipeline(**call).images)


def assert_same(ours: np.ndarray, reference: np.ndarray, tolerance: float = 2e-4) -> None:
    """Equal up to a share of the reference's range."""
    error = relative_error(ours, reference)
    assert error <= tolerance, f"off by {error:.1e} of the range"


def relative_error(ours: np.ndarray, reference: Any) -> float:
    """The largest difference as a share of the reference's range."""
    reference = np.asarray(reference)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.ptp(reference)


def run_ir(folder: Path, **inputs: torch.Tensor) -> np.ndarray:
    """One inference of a component's IR in float32."""
    model = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", F32)
    return model({name: value.numpy() for name, value in inputs.items()})[0]


def noise_inputs(
    height: int = 8, width: int = 12, batch: int = 2, tokens: int = 7, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs of a small DiT."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.linspace(999, 1, batch).round(),
        "encoder_hidden_states": torch.randn(batch, tokens, 32, generator=generator),
        "encoder_attention_mask": torch.ones(batch, tokens, dtype=torch.int64),
    }


@torch.no_grad()
def torch_noise(transformer: torch.nn.Module, inputs: dict[str, torch.Tensor], **conditions: Any):
    """What diffusers' DiT predicts for `noise_inputs`."""
    conditions = {"resolution": None, "aspect_ratio": None, **conditions}
    return transformer(**inputs, added_cond_kwargs=conditions).sample.float().numpy()
