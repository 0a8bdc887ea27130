"""How few evaluations of the DiT make a right image? Solvers, steps, guidance intervals, caches.

    python -m pixart_tiny.solver_study grid --count 20    # a first look on a CPU
    python -m pixart_tiny.solver_study --device cuda      # everything: ten minutes on an H100

Generates the held-out captions with torch in 32 bits, one run per variant, and lets the oracle read
the images. Writes build/evaluation/solvers.json and goes on from there when run again; the report
of the full study is assets/bench/pixart-tiny-solvers.json, its conclusions in docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ov_pixart_helper as ovp
from pixart_tiny import evaluate, oracle, scenes
from pixart_tiny.solvers import SOLVERS, Study, Variant
from pixart_tiny.step_caches import Cache

RESULT = evaluate.OUTPUT / "solvers.json"
STEPS = (20, 18, 16, 14, 12, 10, 8)
CLEANNESS_IMAGES = 100  # of each variant; cleanness takes the oracle three times as long


def grid() -> Iterator[Variant]:
    """Solvers, steps, and where guidance starts and ends."""
    for solver in SOLVERS:
        for end in (1.0, 0.35):
            yield from (Variant(solver, steps, end=end) for steps in STEPS)
    for solver in ("sde", "ode"):
        for end in (0.5, 0.25):
            yield from (Variant(solver, steps, end=end) for steps in STEPS)
    for solver in ("sde", "ode", "unipc"):
        for end in (0.35, 0.25):
            yield from (Variant(solver, steps, end=end) for steps in (7, 6, 5, 4))
    for steps in (20, 12, 8):
        for start, end in ((0.1, 0.35), (0.1, 0.5), (0.2, 0.5)):
            yield Variant("sde", steps, start, end)
        yield from (Variant("sde", steps, end=0.35, scale=scale) for scale in (3.0, 6.0, 8.0))


def cached_steps() -> Iterator[Variant]:
    """Every cache, with guidance all the way and with little of it."""
    for solver in ("sde", "ode"):
        for end in (1.0, 0.35):
            yield from (Variant(solver, end=end, cache=cache) for cache in caches())


def caches() -> Iterator[Cache]:
    """TaylorSeer-Lite, the same on blocks, first-block caches, and half of guidance alone."""
    schedules = [(2, 0), (2, 1), (2, 2), (3, 1), (3, 2)]  # interval, order
    for interval, order in schedules:
        yield Cache(None, interval, order=order)
        yield Cache(1, interval, order=order)
        if order:
            yield Cache(None, interval, order=order, log_snr=True)
            yield Cache(1, interval, order=order, log_snr=True)
    yield Cache(None, first_order=True)
    yield from (Cache(block, interval) for block in (2, 3) for interval in (2, 3))
    for threshold in (0.1, 0.2, 0.3, 0.5):
        yield from (Cache(1, threshold=threshold, order=order) for order in (0, 1))
    yield Cache(1, threshold=0.3, order=0, together=True)
    for interval, order in schedules[:4]:
        yield Cache(None, interval, order=order, only_unconditional=True)


def finalists() -> Iterator[Variant]:
    """The best at each number of rows, and the caches that compete with them."""
    for solver in ("sde", "ode"):
        yield Variant(solver)
        yield from (Variant(solver, steps, end=0.35) for steps in (20, 12, 10, 8, 6))
        yield from (Variant(solver, end=0.35, cache=Cache(order=order)) for order in (1, 2))
        yield Variant(solver, 14, end=0.35, cache=Cache())
        yield Variant(solver, end=0.35, cache=Cache(interval=3))
        yield Variant(solver, end=0.35, cache=Cache(1, threshold=0.2, order=0))
    yield from (Variant("unipc", steps, end=0.35) for steps in (12, 10, 8, 6))
    yield from (Variant("ode", 12), Variant("ode", cache=Cache()))


def candidates() -> Iterator[Variant]:
    """What may become the default, for every aspect ratio."""
    for solver in ("sde", "ode", "unipc"):
        yield Variant(solver)
        yield from (Variant(solver, steps, end=0.35) for steps in (16, 12, 10, 8))


PARTS = {  # name → variants, images per caption, shapes
    "grid": (grid, 2, ("1:1",)),
    "caches": (cached_steps, 2, ("1:1",)),
    "finalists": (finalists, 8, ("1:1",)),
    "shapes": (candidates, 1, evaluate.OTHER_BINS),
}


# ----------------------------------------------------------------------------------------------
# Judging
# ----------------------------------------------------------------------------------------------


def judge(image: np.ndarray, caption: str, with_cleanness: bool) -> tuple[int, bool, float | None]:
    """Number of objects asked for, whether the image is right, and its cleanness in dB."""
    scene, reading = scenes.parse_caption(caption), oracle.read_picture(image)
    right = oracle.score_reading(reading, scene).right
    return len(scene.objects), right, oracle.cleanness(image, reading) if with_cleanness else None


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Per image in dB, at most 99; both `(B, H, W, 3)` uint8."""
    pairs = zip(images.split(50), references.split(50), strict=True)
    errors = torch.cat([(a.float() - b.float()).square().mean((1, 2, 3)) for a, b in pairs])
    return (10 * torch.log10(255**2 / errors)).clamp(max=oracle.CLEANEST)


def summarize(judged: Sequence[tuple[int, bool, float | None]]) -> dict[str, float]:
    """The shares of right images in per cent, and the cleanness."""
    shares = {
        name: round(100 * float(np.mean([right for n, right, _ in judged if n == count])), 1)
        for name, count in (("one_object", 1), ("two_objects", 2))
    }
    clean = evaluate.summarize_cleanness([db for *_, db in judged if db is not None])
    return shares | {f"cleanness_{name}": round(value, 1) for name, value in clean.items()}


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def measure(study: Study, plan: Sequence[Variant], workers: Executor) -> Iterator[dict]:
    """A row of figures per variant; the workers judge one while the next is generated."""
    before = None
    clean = [i < CLEANNESS_IMAGES for i in range(len(study.captions))]
    for variant in [*plan, None]:
        if variant:
            images, full, shallow = study.generate(variant)
            found = psnr(images, study.reference(variant.solver))
            row = asdict(variant) | {"rows": full, "shallow_rows": shallow}
            row["psnr_median_db"] = round(float(found.median()), 1)
            row["psnr_p10_db"] = round(float(found.quantile(0.1)), 1)
            judged = workers.map(judge, images.cpu().numpy(), study.captions, clean, chunksize=4)
        if before:
            yield before[0] | summarize(list(before[1]))
        before = variant and (row, judged)


def missing(part: str, rows: Sequence[dict], count: int) -> Iterator[tuple[dict, list[Variant]]]:
    """What a part of the study still lacks: shape and number of images, and variants."""
    variants, seeds, shapes = PARTS[part]
    for shape in shapes:
        size = {"part": part, "shape": shape, "captions": count, "seeds": seeds}
        names = [*asdict(Variant("")), *size]
        done = [{name: row[name] for name in names} for row in rows]
        yield size, [one for one in variants() if asdict(one) | size not in done]


def main() -> None:
    """The command, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    rows = ovp.read_json(given.result)["rows"] if given.result.exists() else []
    listed = evaluate.read_captions()[: given.count]
    sizes = ovp.image_sizes(evaluate.CHECKPOINT)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as workers:
        for part in given.parts or PARTS:
            for size, plan in missing(part, rows, given.count):
                captions = [
                    (c, seed + 1000 * n) for n in range(size["seeds"]) for c, seed in listed
                ]
                study = Study(captions, sizes[size["shape"]], given.device)
                for row in measure(study, plan, workers):
                    rows.append(size | row)
                    print(rows[-1], flush=True)
                    ovp.write_json({"rows": rows}, given.result)


if __name__ == "__main__":
    main()
