"""How many evaluations of the DiT does a right image need? The oracle counts.

    python -m pixart_tiny.steps models/pixart-tiny/fp16 models/pixart-tiny/lcm

Generates the held-out captions with several numbers of steps and writes the share of right images
to assets/bench/pixart-tiny-steps.json, which the notebook plots.
"""

import argparse
from pathlib import Path

import numpy as np

import ov_pixart_helper as ovp
from pixart_tiny import evaluate, oracle, scenes

RESULT = Path("assets/bench/pixart-tiny-steps.json")
GUIDED_STEPS = (4, 6, 8, 12, 16, 20)
FEW_STEPS = (1, 2, 4)


def measure(guided: Path, few_step: Path, count: int) -> list[dict]:
    """One point per version and number of steps; a guided step takes two evaluations."""
    rows = evaluate.read_captions()[:count]
    captions = [caption for caption, _ in rows]
    objects = [len(scenes.parse_caption(caption).objects) for caption in captions]
    points = []
    for version, folder, numbers, rows_per_step in (
        ("guided, DPM-Solver++", guided, GUIDED_STEPS, 2),
        ("few-step model, LCM", few_step, FEW_STEPS, 1),
    ):
        pipeline, settings = ovp.load_pipeline(folder), ovp.default_settings(folder)
        for steps in numbers:
            images = evaluate.generate(
                pipeline,
                rows,
                height=settings.height,
                width=settings.width,
                steps=steps,
                guidance_scale=settings.guidance_scale,
            )
            scores = oracle.score_pictures(images, captions)
            right = {
                count: np.mean([s for s, n in zip(scores, objects, strict=True) if n == count])
                for count in (1, 2)
            }
            points.append(
                {
                    "version": version,
                    "steps": steps,
                    "evaluations": steps * rows_per_step,
                    "captions": count,
                    "one_object": round(100 * float(right[1]), 1),
                    "two_objects": round(100 * float(right[2]), 1),
                }
            )
            print(points[-1], flush=True)
    return points


def main() -> None:
    """The command, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("guided", type=Path, help="folder of the model with guidance")
    parser.add_argument("few_step", type=Path, help="folder of the few-step model")
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    arguments = parser.parse_args()
    points = measure(arguments.guided, arguments.few_step, arguments.count)
    ovp.write_json(points, RESULT)


if __name__ == "__main__":
    main()
