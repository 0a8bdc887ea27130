"""Measures what the quantization presets cost and gain on PixArt-tiny.

    python -m pixart_tiny.presets              # 200 held-out captions, all presets
    python -m pixart_tiny.presets --count 40   # a quick look
    python -m pixart_tiny.presets --twins      # the same for the twins with outliers

The first two convert the embedded checkpoint, apply every preset to it, and generate the held-out
captions with all of them and with torch at the same seeds; the oracle counts the right images.
`--twins` does so for the models of pixart_tiny/twins.py, with the presets that have targets there.
Prints the table and the targets that are missed, writes it to docs/presets.md and the figures to
build/. Everything made on the way stays in build/presets/, so that an interrupted run continues
where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import ov_pixart_helper as ovp
from ov_pixart_helper import PRESETS
from pixart_tiny import evaluate, oracle
from pixart_tiny.twins import TWINS, build_twin

WORK = Path("build/presets")
DOCUMENT = Path("docs/presets.md")
COMMAND = "python -m pixart_tiny.presets"
RECORDS = ("conversion.json", "optimization.json")  # written anew when a component is kept
TWIN_PRESETS = ("int8", "int4")
TORCH, FP16_F32, FP16 = "PyTorch", "FP16, computed in float32", "FP16"
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


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


def make_versions(checkpoint: Path, root: Path, presets: Sequence[str]) -> list[Version]:
    """FP16, then the presets, below `root`; what is finished is kept."""
    fp16 = ovp.convert_pipeline(checkpoint, root / "fp16")
    versions = [Version(FP16, fp16)]
    for preset in presets:
        start = time.perf_counter()
        folder = ovp.optimize_pipeline(fp16, root / preset, preset)
        versions.append(Version(preset, folder, seconds=time.perf_counter() - start))
    return versions


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model, torch or OpenVINO, in a folder."""
    files = (f for f in folder.rglob("*") if f.suffix in {".json", ".safetensors", ".xml", ".bin"})
    models = {str(f.relative_to(folder)): f for f in files if f.name not in RECORDS}
    return {name: hashlib.sha256(models[name].read_bytes()).hexdigest() for name in sorted(models)}


def generate_images(
    version: Version, captions: list[tuple[str, int]], root: Path
) -> list[Image.Image]:
    """One image per (caption, seed), from `root`/images if the model has not changed since."""
    key = json.dumps([captions, version.ov_config, fingerprint(version.folder)])
    name = version.label.replace(" ", "-").replace(",", "")
    file, key_file = root / "images" / f"{name}.npz", root / "images" / f"{name}.json"
    if key_file.is_file() and key_file.read_text() == key:
        return [Image.fromarray(image) for image in np.load(file)["images"]]
    print(f"Generating {len(captions)} images with {version.label}", flush=True)
    settings = ovp.default_settings(version.folder)
    images = evaluate.generate(
        version.load(),
        captions,
        height=settings.height,
        width=settings.width,
        steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_end=settings.guidance_end,
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
    versions = make_versions(checkpoint, WORK, list(PRESETS))
    fp16 = versions[0].folder
    versions = [Version(TORCH, checkpoint), Version(FP16_F32, fp16, F32), *versions]
    images = {version.label: generate_images(version, rows, WORK) for version in versions}
    print("Timing, a few images in turns", flush=True)
    times = ovp.compare_pipelines(
        {version.label: version.folder for version in versions if not version.ov_config},
        captions[:3],
        seeds=[seed for _, seed in rows[:3]],
    ).to_dataframe()
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
        ("int8", "seconds_to_make", "<=", 60),
        *_targets("int8", right[FP16], 41, 30, 1),
        *_targets("int4", right[FP16], 39, 25, 2),
        ("int8-weights", "right_percent", ">=", right[FP16] - 1),
        ("int8-weights", "psnr_median_db", ">=", 45),
    ]
    return _missed(figures, checks)


def _targets(preset: str, right: float, median: float, p10: float, points: float) -> list[tuple]:
    """The least that a preset's images have to reach; `right`: FP16's share in per cent."""
    return [
        (preset, "right_percent", ">=", right - points),
        (preset, "psnr_median_db", ">=", median),
        (preset, "psnr_p10_db", ">=", p10),
    ]


def _missed(figures: dict[str, dict], checks: list[tuple]) -> list[str]:
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
        f"{result['captions']} held-out captions with the model's own settings; "
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


def write_table(table: str, command: str = COMMAND, document: Path = DOCUMENT) -> None:
    """Replaces the document's table that `command` has measured.

    Raises: ValueError if the document does not have the two marks.
    """
    start, end = f"<!-- measured by {command} -->\n", "<!-- end of the table -->\n"
    before, _, rest = document.read_text(encoding="utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{str(document)!r} has no place for the table: {start.strip()}")
    parts = [before, start, "\n", table, "\n", end, after]
    document.write_text("".join(parts), encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# Twins
# ----------------------------------------------------------------------------------------------


def measure_twins(count: int) -> dict:
    """Figures by twin and version, and the targets that are missed."""
    rows = evaluate.read_captions()[:count]
    captions = [caption for caption, _ in rows]
    twins, missed = {}, []
    for name, outliers in TWINS.items():
        root = WORK / "twins" / name.replace(" ", "-").replace("%", "")
        checkpoint = root / "checkpoint"
        if not checkpoint.is_dir():
            build_twin(checkpoint, outliers)
        versions = make_versions(checkpoint, root, TWIN_PRESETS)
        images = {version.label: generate_images(version, rows, root) for version in versions}
        figures = {}
        for version in versions:
            right = oracle.score_pictures(images[version.label], captions)
            figures[version.label] = {"right_percent": 100 * float(np.mean(right))}
            if version.label != FP16:
                figures[version.label] |= likeness(images[version.label], images[FP16])
                figures[version.label] |= component_quality(version.folder)
        fp16 = figures[FP16]["right_percent"]
        checks = [*_targets("int8", fp16, 39, 29, 2), *_targets("int4", fp16, 38, 25, 3)]
        missed += [f"{name}, {miss}" for miss in _missed(figures, checks)]
        twins[name] = figures
    return {"captions": count, "twins": twins, "misses": missed}


def component_quality(folder: Path) -> dict[str, str]:
    """The column "quality" of `summarize_models` by component, "–" where nothing was measured."""
    table = ovp.summarize_models(folder)
    return {name: table.get("quality", {}).get(name, "") or "–" for name in ovp.COMPONENTS}


def format_twins(result: dict) -> str:
    """The figures as a Markdown table, a row per twin and preset."""
    lines = [
        f"{result['captions']} held-out captions, PSNR against the twin's own FP16:",
        "",
        "| outliers | version | right | PSNR, median | 10th percentile | T5 | DiT | VAE decoder |",
        "|---|---|---:|---:|---:|---|---|---|",
    ]
    for name, versions in result["twins"].items():
        for label, figures in versions.items():
            cells = [
                "–" if title not in figures else form.format(figures[title])
                for title, (_, form) in list(COLUMNS.items())[:3]
            ]
            cells += [figures.get(component, "–") for component in ovp.COMPONENTS]
            lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def main() -> None:
    """The command, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    parser.add_argument("--twins", action="store_true", help="the models with outliers")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.twins:
        result, name = measure_twins(arguments.count), "twins"
        table, command = format_twins(result), f"{COMMAND} --twins"
    else:
        result, name = measure(arguments.checkpoint, arguments.count), "presets"
        table, command = format_table(result), COMMAND
    Path(f"build/{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(table, command)
    print(table, *(result["misses"] or ["Every target is reached."]), sep="\n")


if __name__ == "__main__":
    main()
