"""The tasks whose memory is measured, each in its own process: `python -m benchmarks.probes`.

The arguments are a task's name and its keyword arguments as JSON. The last line on stdout is JSON
again: seconds of the task's parts, and the peak memory of the process.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def convert(folder: str, component: str, weight_format: str, output: str) -> dict[str, float]:
    """Convert one component of a checkpoint, as `convert_pipeline` does."""
    from ov_pixart.checkpoint import COMPONENTS, load_component
    from ov_pixart.convert import convert_component

    part = COMPONENTS[component]
    start = time.perf_counter()
    module = load_component(Path(folder) / part.folder, part.loader)
    convert_component(component, module, Path(output), weight_format)
    return {"total": time.perf_counter() - start}


def optimize(folder: str, preset: str, num_samples: int, output: str) -> dict[str, float]:
    """Apply a preset to an FP16 pipeline, calibration included."""
    from ov_pixart.optimize import optimize_pipeline

    start = time.perf_counter()
    optimize_pipeline(Path(folder), Path(output), preset, num_samples=num_samples, progress=False)
    return {"total": time.perf_counter() - start}


def generate(
    folder: str, pixels: int, options: dict[str, Any], tiling: bool = False
) -> dict[str, float]:
    """Load a pipeline and generate in four steps: an image, the same again, another prompt's."""
    import torch

    from ov_pixart.loading import load_pipeline

    start = time.perf_counter()
    pipeline = load_pipeline(folder, **options)
    seconds = {"load": time.perf_counter() - start}
    if tiling:
        pipeline.vae.enable_tiling()
    call = {"num_inference_steps": 4, "guidance_scale": 0.0, "use_resolution_binning": False}
    prompts = {"first image": "a lighthouse in a storm", "same prompt": "a lighthouse in a storm"}
    for name, prompt in {**prompts, "other prompt": "a bowl of cherries"}.items():
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        pipeline(prompt, height=pixels, width=pixels, generator=generator, **call)
        seconds[name] = time.perf_counter() - start
    return seconds


TASKS: dict[str, Callable[..., dict[str, float]]] = {
    task.__name__: task for task in (convert, optimize, generate)
}


def main(name: str, arguments: str) -> None:
    """Run one task and print its figures."""
    given = json.loads(arguments)
    if "output" in given:
        shutil.rmtree(given["output"], ignore_errors=True)
    seconds = TASKS[name](**given)
    from ov_pixart.memory import peak_memory_mb

    print(json.dumps({"seconds": seconds, "peak_gb": peak_memory_mb() / 1000}))


if __name__ == "__main__":
    main(*sys.argv[1:])
