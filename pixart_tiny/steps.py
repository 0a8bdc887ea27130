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
FEW_STEP = "few-step model"
VERSIONS = (  # label, numbers of steps, the share of them that is guided
    ("guided in all steps", (6, 8, 12, 16, 20), 1.0),
    ("guided in the first 35 %", (6, 8, 12, 16, 20), 0.35),
    (FEW_STEP, (1, 2, 4), 1.0),
)


def measure(guided: Path, few_step: Path, count: int) -> list[dict]:
    """One point per version and number of steps; a guided step takes two evaluations."""
    rows = evaluate.read_captions()[:count]
    captions = [caption for caption, _ in rows]
    objects = [len(scenes.parse_caption(caption).objects) for caption in captions]
    points = []
    for version, numbers, guidance_end in VERSIONS:
        folder = few_step if version == FEW_STEP else guided
        pipeline, settings = ovp.load_pipeline(folder), ovp.default_settings(folder)
        guidance = {"guidance_scale": settings.guidance_scale, "guidance_end": guidance_end}
        for steps in numbers:
            images = evaluate.generate(
                pipeline,
                rows,
                height=settings.height,
                width=settings.width,
                steps=steps,
                **guidance,
            )
            scores = oracle.score_pictures(images, captions)
            right = {
                number: np.mean([s for s, n in zip(scores, objects, strict=True) if n == number])
                for number in (1, 2)
            }
            points.append(
                {
                    "version": version,
                    "steps": steps,
                    "evaluations": ovp.count_evaluations(steps, **guidance),
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
