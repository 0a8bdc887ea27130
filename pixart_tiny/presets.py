"""Measures what the quantization presets cost and gain on PixArt-tiny.

    python -m pixart_tiny.presets              # 200 held-out captions, all presets
    python -m pixart_tiny.presets --count 40   # a quick look
    python -m pixart_tiny.presets --layers     # which layers suffer from integers

The first two convert the embedded checkpoint, apply every preset to it, and generate the held-out
captions with all of them and with torch at the same seeds; the oracle counts the right images.
Prints the table and the targets that are missed, writes build/presets.json and the table in
docs/presets.md. Everything made on the way stays in build/presets/, so that an interrupted run
continues where it was.

`--layers` is the evidence for the presets' lists of layers: with one kind of layer at a time left
in floating point, how much closer does the DiT get to its own floating-point output, on samples
from held-out captions?
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import ov_pixart_helper as ovp
from ov_pixart.calibration import CalibrationData, choose_prompts
from ov_pixart.presets import ATTENTION, POSITIONS
from ov_pixart.quantize import apply_recipe
from ov_pixart.quiet import silent_nncf
from ov_pixart_helper import PRESETS, Recipe
from pixart_tiny import evaluate, oracle

WORK = Path("build/presets")
RESULT = Path("build/presets.json")
DOCUMENT = Path("docs/presets.md")
MARKS = ("<!-- measured by python -m pixart_tiny.presets -->\n", "<!-- end of the table -->\n")
TORCH, FP16_F32, FP16 = "PyTorch", "FP16, computed in float32", "FP16"
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
STEPS, GUIDANCE_SCALE, SIZE = 20, 4.5, 256


# ----------------------------------------------------------------------------------------------
# Versions and their images
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """One line of the table. `seconds`: that it took to make, calibration included."""

    label: str
    folder: Path
    ov_config: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None

    def load(self) -> DiffusionPipeline:
        """The pipeline, OpenVINO or torch, without progress bars."""
        if self.ov_config:
            pipeline = ovp.OVDiffusionPipeline.from_pretrained(
                self.folder, ov_config=self.ov_config
            )
        else:
            pipeline = ovp.load_pipeline(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def make_versions(checkpoint: Path) -> list[Version]:
    """Torch, FP16 in two precisions, then every preset; what is finished is kept."""
    fp16 = ovp.convert_pipeline(checkpoint, WORK / "fp16")
    versions = [Version(TORCH, checkpoint), Version(FP16_F32, fp16, F32), Version(FP16, fp16)]
    for preset in PRESETS:
        start = time.perf_counter()
        folder = ovp.optimize_pipeline(fp16, WORK / preset, preset)
        versions.append(Version(preset, folder, seconds=time.perf_counter() - start))
    return versions


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time in ns of every file of a model, torch or OpenVINO, in a folder."""
    files = (f for f in folder.rglob("*") if f.suffix in {".json", ".safetensors", ".xml", ".bin"})
    stats = {str(file.relative_to(folder)): file.stat() for file in sorted(files)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def generate_images(version: Version, captions: list[tuple[str, int]]) -> list[Image.Image]:
    """One image per (caption, seed), from build/presets/ if the model has not changed since."""
    key = json.dumps([captions, version.ov_config, fingerprint(version.folder)])
    name = version.label.replace(" ", "-").replace(",", "")
    file, key_file = WORK / "images" / f"{name}.npz", WORK / "images" / f"{name}.json"
    if key_file.is_file() and key_file.read_text() == key:
        return [Image.fromarray(image) for image in np.load(file)["images"]]
    print(f"Generating {len(captions)} images with {version.label}", flush=True)
    images = evaluate.generate(
        version.load(),
        captions,
        height=SIZE,
        width=SIZE,
        steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    key_file.unlink(missing_ok=True)
    np.savez_compressed(file, images=np.stack([np.asarray(image) for image in images]))
    key_file.write_text(key)
    return images


# ----------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------


def measure(checkpoint: Path, count: int) -> dict:
    """All figures, by label, with the machine and the targets that are missed."""
    rows = evaluate.read_captions()[:count]
    captions = [caption for caption, _ in rows]
    versions = make_versions(checkpoint)
    images = {version.label: generate_images(version, rows) for version in versions}
    print("Timing, a few images in turns", flush=True)
    times = ovp.compare_pipelines(
        {version.label: version.folder for version in versions if not version.ov_config},
        captions[:3],
        seeds=[seed for _, seed in rows[:3]],
    ).to_dataframe()
    fp16 = next(version.folder for version in versions if version.label == FP16)
    figures = {}
    for version in versions:
        label = version.label
        right = oracle.score_pictures(images[label], captions)
        figures[label] = {"right_percent": 100 * float(np.mean(right))}
        if label != TORCH:
            figures[label] |= likeness(
                images[label], images[TORCH if version.folder == fp16 else FP16]
            )
            figures[label] |= weight_ratios(version.folder, fp16)
        if label in times.index:
            figures[label] |= times.loc[label, ["size_mb", "step_ms", "total_s"]].to_dict()
        figures[label]["seconds_to_make"] = version.seconds
    device = f"{ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}, {os.cpu_count()} cores"
    return {"captions": count, "device": device, "versions": figures, "misses": misses(figures)}


def likeness(images: list[Image.Image], references: list[Image.Image]) -> dict[str, float]:
    """PSNR in dB to the references: median and 10th percentile; infinite for equal images."""
    with np.errstate(divide="ignore"):
        psnr = [
            peak_signal_noise_ratio(np.asarray(reference), np.asarray(image))
            for image, reference in zip(images, references, strict=True)
        ]
    return {
        "psnr_median_db": float(np.median(psnr)),
        "psnr_p10_db": float(np.quantile(psnr, 0.1, method="lower")),
    }


def weight_ratios(folder: Path, fp16: Path) -> dict[str, float]:
    """Bytes of weights in relation to FP16's: T5 and DiT together, and the VAE decoder."""

    def size(root: Path, *components: str) -> int:
        return sum((root / name / "openvino_model.bin").stat().st_size for name in components)

    groups = {"t5_dit_ratio": ("text_encoder", "transformer"), "vae_ratio": ("vae_decoder",)}
    return {name: size(folder, *parts) / size(fp16, *parts) for name, parts in groups.items()}


def misses(figures: dict[str, dict]) -> list[str]:
    """The targets that are not reached; "hybrid", the published recipe, has none."""
    right = {label: found["right_percent"] for label, found in figures.items()}
    checks = [
        (FP16_F32, "psnr_median_db", ">=", 55),
        (FP16_F32, "right_percent", ">=", right[TORCH] - 1),
        (FP16_F32, "right_percent", "<=", right[TORCH] + 1),
        ("int8", "t5_dit_ratio", "<=", 0.55),
        ("int4", "t5_dit_ratio", "<=", 0.45),
        ("int8", "seconds_to_make", "<=", 90),
    ]
    for preset in ("int8-weights", "int8", "int4"):
        checks.append((preset, "right_percent", ">=", right[FP16] - 2))
        checks.append((preset, "psnr_median_db", ">=", 25))
    reached = {">=": lambda found, limit: found >= limit, "<=": lambda found, limit: found <= limit}
    return [
        f"{label}: {name} {figures[label][name]:.3g}, target {sign} {limit:.3g}"
        for label, name, sign, limit in checks
        if not reached[sign](figures[label][name], limit)
    ]


COLUMNS = {  # figure → title, format
    "right_percent": ("right", "{:.1f} %"),
    "psnr_median_db": ("PSNR, median", "{:.1f} dB"),
    "psnr_p10_db": ("10th percentile", "{:.1f} dB"),
    "t5_dit_ratio": ("T5 + DiT", "{:.2f}"),
    "vae_ratio": ("VAE decoder", "{:.2f}"),
    "size_mb": ("size", "{:.1f} MB"),
    "step_ms": ("DiT step", "{:.0f} ms"),
    "total_s": ("image", "{:.2f} s"),
}


def format_table(result: dict) -> str:
    """The figures as a Markdown table under one line about how they were measured."""
    lines = [
        f"{result['captions']} held-out captions, {SIZE}×{SIZE}, {STEPS} steps; "
        f"time per step and image on {result['device']}:",
        "",
        "| version | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for label, figures in result["versions"].items():
        cells = [
            "–" if figures.get(name) is None else form.format(figures[name])
            for name, (_, form) in COLUMNS.items()
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_table(table: str, document: Path = DOCUMENT) -> None:
    """Replaces the document's measured table.

    Raises: ValueError if the document does not have the two marks.
    """
    before, _, rest = document.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise ValueError(f"{str(document)!r} has no place for the table: {MARKS[0].strip()}")
    parts = [before, MARKS[0], "\n", table, "\n", MARKS[1], after]
    document.write_text("".join(parts), encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# Which layers suffer from integers
# ----------------------------------------------------------------------------------------------

LAYERS = {  # left in floating point, one at a time
    "modulation (adaLN) and timestep": r"\.adaln_single\.",
    "patches": r"\.pos_embed\.proj/",
    "caption projection": r"\.caption_projection\.",
    "self-attention q, k, v": r"\.attn1\.to_[qkv]/",
    "self-attention out": r"\.attn1\.to_out",
    "cross-attention q": r"\.attn2\.to_q/",
    "cross-attention k, v": r"\.attn2\.to_[kv]/",
    "cross-attention out": r"\.attn2\.to_out",
    "feed-forward in": r"\.ff\.net\.0\.proj/",
    "feed-forward out (after GELU)": r"\.ff\.net\.2/",
    "output": r"\.proj_out/",
}


def layer_variants() -> Iterator[tuple[str, Recipe]]:
    """Recipes for the DiT to compare, with a name for each."""
    kept = POSITIONS
    everything = Recipe(weights="int8", activations=True, floating=kept)
    yield "everything in integers", everything
    for alpha in (0.15, 0.5):
        yield f"  the same, SmoothQuant {alpha}", replace(everything, smooth_quant=alpha)
    base = replace(everything, floating=(*kept, *ATTENTION))
    yield "everything but attention's inputs", base
    for name, pattern in LAYERS.items():
        yield f"  the same, {name} floating", replace(base, floating=(*base.floating, pattern))
    weights = Recipe(weights="int8", floating=kept)
    yield "8-bit weights", weights
    for size in (32, 128):
        options = (("DYNAMIC_QUANTIZATION_GROUP_SIZE", size),)
        yield f"  the same, dynamic activations by {size}", replace(weights, options=options)
    for name, pattern in LAYERS.items():
        others = tuple(p for p in LAYERS.values() if p != pattern)
        yield f"  {name} in 4 bits", Recipe(weights="int4", sensitive=others, floating=kept)
    for preset in PRESETS:
        yield f"preset {preset}", PRESETS[preset].transformer


def measure_layers(checkpoint: Path, samples: int = 40) -> None:
    """Prints the DiT's signal-to-error ratio, in dB, for every variant."""
    fp16 = ovp.convert_pipeline(checkpoint, WORK / "fp16")
    held_out = [caption for caption, _ in evaluate.read_captions()[: samples // 10]]
    prompts = choose_prompts(None, fp16, samples, seed=0)

    def recorded(captions: list[str], count: int) -> list[dict]:
        data = CalibrationData(fp16, WORK / "calibration", captions, count, len(captions))
        return data.samples("transformer", progress=False)

    calibration, tested = recorded(prompts, samples), recorded(held_out, samples // 2)
    folder = fp16 / "transformer"
    config = ovp.read_json(folder / "config.json")

    def read() -> ov.Model:
        return ov.Core().read_model(folder / "openvino_model.xml")

    truth = guided_outputs(read(), tested)
    print("DiT against itself in floating point, signal to error in dB, higher is better")
    for name, recipe in layer_variants():
        data = calibration if recipe.needs_data else []
        with silent_nncf():
            model = apply_recipe(read(), recipe, config, data)
        error = np.square(guided_outputs(model, tested, dict(recipe.options)) - truth)
        print(
            f"  {name:45} {10 * np.log10(np.square(truth).mean() / error.mean()):6.2f}", flush=True
        )


def guided_outputs(model: ov.Model, samples: list[dict], options: dict | None = None) -> np.ndarray:
    """The guided velocity of each sample, flat, in float32 execution."""
    # Dynamic quantization is OpenVINO's default for integer weights: off, unless asked for.
    config = {**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, **(options or {})}
    compiled = ov.Core().compile_model(model, "CPU", config)
    outputs = [compiled(sample)[0][:, :4] for sample in samples]
    # The sampler uses guided outputs: guidance also amplifies the difference of two errors.
    return np.concatenate([(o[:1] + GUIDANCE_SCALE * (o[1:] - o[:1])).ravel() for o in outputs])


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def main() -> None:
    """The command, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    parser.add_argument("--layers", action="store_true", help="which layers suffer from integers")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.layers:
        measure_layers(arguments.checkpoint)
        return
    result = measure(arguments.checkpoint, arguments.count)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    table = format_table(result)
    write_table(table)
    print(table, *(result["misses"] or ["Every target is reached."]), sep="\n")


if __name__ == "__main__":
    main()
