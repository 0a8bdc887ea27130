"""Generates held-out captions with a checkpoint and reads the images back with the oracle.

    python -m pixart_tiny.evaluate                          # the embedded checkpoint, with torch
    python -m pixart_tiny.evaluate models/pixart-tiny/fp16  # an OpenVINO folder
    python -m pixart_tiny.evaluate --shape 4:3 --steps 12   # another aspect ratio, fewer steps
    python -m pixart_tiny.evaluate --targets                # every row that has a target

The 200 captions and seeds (assets/captions/pixart-tiny-validation.csv) are fixed: every
one-object caption has a (colour, shape) pair that training never saw, every two-object caption a
(shape, relation, shape) triple that training never saw and at least one such pair.

Prints one table: the share of captions with every attribute right, beside its target, and how clean
the images are, beside the bound, which is the cleanness of renderings of the same captions after
the VAE's encoder and decoder. Writes all figures and an unselected contact sheet of the list's
first 32 captions to build/evaluation/.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tqdm.auto import tqdm

from ov_pixart_helper import default_settings, image_sizes, load_pipeline
from pixart_tiny import oracle, render, scenes

CHECKPOINT = Path("assets/pixart-tiny")
CAPTIONS = Path("assets/captions/pixart-tiny-validation.csv")
OUTPUT = Path("build/evaluation")
SEED = 20_000  # of the held-out captions
VAE_SEED = (0, 3)  # of the scenes that measure the VAE
SHEET = 32  # images on a contact sheet
BOUND_CAPTIONS = 64  # the bound is steady with these


@dataclass(frozen=True)
class Row:
    """One line of the table: what is generated, and the targets, in per cent and in dB.

    `solver`: DPM-Solver's `algorithm_type`; None is the checkpoint's own scheduler.
    `one_object`, `two_objects`: the smallest share of right images.
    `below_bound`: how far below the bound the median cleanness may be.
    """

    shape: str
    steps: int
    solver: str | None = None
    one_object: float | None = None
    two_objects: float | None = None
    below_bound: float | None = None

    def __str__(self) -> str:
        return f"{self.shape}, {self.steps} steps" + (f", {self.solver}" if self.solver else "")


OTHER_BINS = ("4:3", "3:4", "16:9", "9:16")
TARGETS = {  # the checkpoint's own number of steps → rows
    20: (
        *(Row(shape, 20, None, 96, 93, 4) for shape in ("1:1", *OTHER_BINS)),
        Row("1:1", 20, "sde-dpmsolver++", 96, 95, 4),
        Row("1:1", 12, None, 94, 93),
    ),
    4: (
        Row("1:1", 4, None, 95, 90, 6),
        *(Row(shape, 4, None, 93, 88, 6) for shape in OTHER_BINS),
        Row("1:1", 2),
    ),
}


# ----------------------------------------------------------------------------------------------
# Captions and images
# ----------------------------------------------------------------------------------------------


def write_captions(path: Path = CAPTIONS, count: int = 200) -> None:
    """Draws the held-out captions, one- and two-object scenes in turn, no caption twice."""
    rng = np.random.default_rng(SEED)
    rows: dict[str, int] = {}
    while len(rows) < count:
        scene = scenes.sample_scene(rng, num_objects=1 + len(rows) % 2)
        if not scene.has_held_out_pair():
            continue
        if scene.relation is not None and not scene.has_held_out_triple():
            continue
        rows.setdefault(scenes.describe(scene, rng), SEED + len(rows))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["caption", "seed"])
        writer.writerows(rows.items())


def read_captions(path: Path = CAPTIONS) -> list[tuple[str, int]]:
    """The (caption, seed) pairs of a captions file."""
    with path.open(newline="") as file:
        return [(row["caption"], int(row["seed"])) for row in csv.DictReader(file)]


def generate(
    pipeline: DiffusionPipeline,
    captions: Sequence[tuple[str, int]],
    *,
    height: int,
    width: int,
    steps: int,
    guidance_scale: float,
    batch: int = 10,
    **call: Any,
) -> list[Image.Image]:
    """One image per (caption, seed). Each has its own generator: batches change nothing.

    `call`: further arguments of the pipeline's call.
    """
    images = []
    for start in tqdm(range(0, len(captions), batch), desc="images", mininterval=5):
        group = captions[start : start + batch]
        images += pipeline(
            [caption for caption, _ in group],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for _, seed in group],
            **call,
        ).images
    return images


def contact_sheet(images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Images of one size in a grid, in order."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


# ----------------------------------------------------------------------------------------------
# The VAE alone
# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images of one size, `(H, W, 3)` uint8, through the VAE's encoder and decoder."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    output = vae.decode(latents).sample.clamp(-1, 1)
    return list(((output + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


def vae_psnr(vae: AutoencoderKL, count: int = 64, height: int = 256, width: int = 256) -> float:
    """Mean PSNR in dB of `count` renderings of fresh scenes through encoder and decoder."""
    rng = np.random.default_rng(VAE_SEED)
    images = [
        render.render_scene(scenes.sample_scene(rng), height, width, rng) for _ in range(count)
    ]
    values = [peak_signal_noise_ratio(image, reconstruct(vae, [image])[0]) for image in images]
    return float(np.mean(values))


def cleanness_bound(
    vae: AutoencoderKL, captions: Sequence[str], height: int, width: int
) -> dict[str, float]:
    """Cleanness of the captions' renderings after encoder and decoder, see `summarize_cleanness`.

    The DiT's images come out of the same decoder, so they cannot be expected to be cleaner.
    """
    rng = np.random.default_rng(VAE_SEED)
    images = []
    for caption in captions[:BOUND_CAPTIONS]:
        image = render.render_scene(scenes.parse_caption(caption), height, width, rng)
        images += reconstruct(vae, [image])
    return summarize_cleanness([oracle.cleanness(image) for image in images])


def summarize_cleanness(values: Sequence[float]) -> dict[str, float]:
    """Median and 10th percentile, in dB."""
    return {"median_db": float(np.median(values)), "p10_db": float(np.quantile(values, 0.1))}


# ----------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------


def tally(images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Number of objects → attribute (and "right": all of them) → share of captions in per cent.

    The last entry is "cleanness", of all images: see `summarize_cleanness`.
    """
    groups: dict[str, list[oracle.Score]] = {"one object": [], "two objects": []}
    clean = []
    for image, caption in zip(images, captions, strict=True):
        scene, reading = scenes.parse_caption(caption), oracle.read_picture(image)
        name = "one object" if len(scene.objects) == 1 else "two objects"
        groups[name].append(oracle.score_reading(reading, scene))
        clean.append(oracle.cleanness(image, reading))
    shares = {
        name: {"right": 100 * float(np.mean([s.right for s in scores]))}
        | {
            attribute: 100 * float(np.mean([s.attributes[attribute] for s in scores]))
            for attribute in scores[0].attributes
        }
        for name, scores in groups.items()
        if scores
    }
    return shares | {"cleanness": summarize_cleanness(clean)}


def format_table(results: dict[Row, dict[str, dict[str, float]]]) -> str:
    """Markdown: a line per row, targets in brackets; then the shares of every attribute."""

    def share(figures: dict, name: str, target: float | None) -> str:
        if name not in figures:
            return "–"
        return f"{figures[name]['right']:.1f} %" + (f" (≥ {target:g})" if target else "")

    lines = [
        "| images | one object right | two objects right | cleanness, median | 10th percentile "
        "| VAE's bound |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row, figures in results.items():
        clean, bound = figures["cleanness"], figures["bound"]
        floor = row.below_bound and f" (≥ {bound['median_db'] - row.below_bound:.1f})"
        cells = [
            str(row),
            share(figures, "one object", row.one_object),
            share(figures, "two objects", row.two_objects),
            f"{clean['median_db']:.1f} dB{floor or ''}",
            f"{clean['p10_db']:.1f} dB",
            f"{bound['median_db']:.1f}, {bound['p10_db']:.1f} dB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for row, figures in results.items():
        for name in ("one object", "two objects"):
            shares = ", ".join(f"{k} {v:.0f}" for k, v in figures.get(name, {}).items())
            lines += [f"{row}, {name}: {shares}"] if shares else []
    return "\n".join(lines)


def evaluate(
    folder: Path,
    rows: Sequence[Row],
    *,
    count: int = 200,
    guidance_scale: float | None = None,
    guidance_end: float | None = None,
) -> dict[Row, dict[str, dict[str, float]]]:
    """Row → figures, as in `tally`, with the "bound"; writes contact sheets to build/evaluation/.

    `guidance_scale`, `guidance_end`: by default the checkpoint's own.

    Raises: ValueError for a solver that does not fit the checkpoint's scheduler.
    """
    captions = read_captions()[:count]
    texts = [caption for caption, _ in captions]
    sizes = image_sizes(folder)
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, AutoencoderKL):  # OpenVINO folders have no encoder
        vae = AutoencoderKL.from_pretrained(CHECKPOINT / "vae")
    bound = cache(lambda height, width: cleanness_bound(vae, texts, height, width))
    defaults = default_settings(folder)
    if guidance_scale is None:
        guidance_scale = defaults.guidance_scale
    if guidance_end is None:
        guidance_end = defaults.guidance_end
    scheduler, results = pipeline.scheduler, {}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for row in rows:
        height, width = sizes[row.shape]
        pipeline.scheduler = with_solver(scheduler, row.solver)
        images = generate(
            pipeline,
            captions,
            height=height,
            width=width,
            steps=row.steps,
            guidance_scale=guidance_scale,
            guidance_end=guidance_end,
        )
        contact_sheet(images[:SHEET]).save(OUTPUT / f"{file_name(folder, row)}.png")
        results[row] = tally(images, texts) | {"bound": bound(height, width)}
    return results


def with_solver(scheduler: SchedulerMixin, solver: str | None) -> SchedulerMixin:
    """The scheduler with another DPM-Solver `algorithm_type`, or as it is for None.

    Raises: ValueError if the scheduler is no DPM-Solver.
    """
    if solver is None:
        return scheduler
    if "algorithm_type" not in scheduler.config:
        raise ValueError(f"solver={solver!r} does not apply to {type(scheduler).__name__}.")
    return type(scheduler).from_config(scheduler.config, algorithm_type=solver)


def file_name(folder: Path, row: Row) -> str:
    """The name of a row's contact sheet, without suffix."""
    parts = [*folder.parts[-2:], row.shape.replace(":", "x"), str(row.steps)]
    return "-".join(parts + ([row.solver.replace("+", "p")] if row.solver else []))


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def find_row(own_steps: int, shape: str, steps: int | None, solver: str | None) -> Row:
    """The row that the arguments describe, with its targets if it has any."""
    row = Row(shape, steps or own_steps, solver)
    return next((r for r in TARGETS.get(own_steps, ()) if str(r) == str(row)), row)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=CHECKPOINT)
    parser.add_argument("--shape", default="1:1", choices=image_sizes(CHECKPOINT))
    parser.add_argument("--steps", type=int, help="default: the checkpoint's own, 20 or 4")
    parser.add_argument("--guidance-scale", type=float, help="default: its own, 4.5 or 0")
    parser.add_argument("--guidance-end", type=float, help="share of the steps; default: its own")
    parser.add_argument("--solver", choices=("dpmsolver++", "sde-dpmsolver++"))
    parser.add_argument("--targets", action="store_true", help="every row that has a target")
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    given = parser.parse_args(arguments)
    own_steps = default_settings(given.folder).num_inference_steps
    row = find_row(own_steps, given.shape, given.steps, given.solver)
    rows = TARGETS[own_steps] if given.targets else [row]
    results = evaluate(
        given.folder,
        rows,
        count=given.count,
        guidance_scale=given.guidance_scale,
        guidance_end=given.guidance_end,
    )
    name = "-".join(given.folder.parts[-2:]) if given.targets else file_name(given.folder, row)
    figures = {str(row): found for row, found in results.items()}
    (OUTPUT / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{given.folder}, {given.count} held-out captions")
    print(format_table(results))
    print(f"Figures and contact sheets: {OUTPUT / name}.json, {OUTPUT}/*.png")


if __name__ == "__main__":
    main()
