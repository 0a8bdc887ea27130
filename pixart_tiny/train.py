"""Trains PixArt-tiny from rendered scenes, in stages that follow PixArt's own recipe.

    python -m pixart_tiny.train --device cuda      # every stage that is not finished yet, in order
    python -m pixart_tiny.train --quick            # every stage for a few steps: does it run?
    python -m pixart_tiny.train --scale 0.1        # a tenth of the steps
    python -m pixart_tiny.train dit --minutes 60   # one stage; stop after an hour, go on next time
    python -m pixart_tiny.train --reuse text vae   # take these stages from the shipped checkpoint

Results go to build/training/ (one folder per stage, losses in metrics.jsonl and losses.png; the
finished checkpoints in pixart-tiny/ and pixart-tiny-lcm/). `--install` copies them to assets/.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel

from pixart_tiny.data import BINS, NATIVE, Size
from pixart_tiny.fit import Run
from pixart_tiny.models import Conditioner, make_lcm_scheduler, make_scheduler
from pixart_tiny.train_dit import make_latents, train_dit
from pixart_tiny.train_lcm import make_chains, train_lcm
from pixart_tiny.train_text import train_text_encoder
from pixart_tiny.train_vae import train_decoder, train_vae

ASSETS = Path("assets")
OUTPUT = Path("build/training")
SMALL = (128, 128)
CHECKPOINTS = ("pixart-tiny", "pixart-tiny-lcm")  # the second: transformer and scheduler alone


def export(run: Run) -> None:
    """Writes both checkpoints in diffusers layout, as fp16 safetensors."""
    condition = Conditioner(run.output / "text")
    base, few_step = (run.output / name for name in CHECKPOINTS)
    PixArtAlphaPipeline(
        tokenizer=condition.tokenizer,
        text_encoder=condition.encoder,
        vae=AutoencoderKL.from_pretrained(run.output / "decoder" / "vae"),
        transformer=PixArtTransformer2DModel.from_pretrained(run.output / "dit" / "transformer"),
        scheduler=make_scheduler(),
    ).to(torch.float16).save_pretrained(base, safe_serialization=True)
    # transformers loads in the precision named here, diffusers in float32: the two must agree
    config = base / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    index = base / "model_index.json"  # the share of the steps that need guidance
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_guidance_end": 0.35}, indent=2))
    shutil.copy(run.output / "text" / "tokenizer" / "spiece.model", base / "tokenizer")
    student = PixArtTransformer2DModel.from_pretrained(run.output / "lcm-own" / "transformer")
    student.to(torch.float16).save_pretrained(few_step / "transformer")
    make_lcm_scheduler().save_pretrained(few_step / "scheduler")
    run.finish()


# ----------------------------------------------------------------------------------------------
# The recipe
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A row of the recipe; `images` are rendered scenes or chains, by size."""

    train: Callable[[Run], None]
    steps: int = 0
    batch: int = 0
    images: dict[Size, int] = field(default_factory=dict)

    def quick(self) -> Stage:
        """The same stage, small enough to see whether it runs.

        Two sizes are enough, except for the latents that the transformer reads.
        """
        sizes = [*self.images] if self.train is make_latents else [*self.images][:2]
        images = dict.fromkeys(sizes, 2)
        return replace(self, steps=min(self.steps, 3), batch=min(self.batch, 2), images=images)


def sizes(native: float, each_bin: float) -> dict[Size, float]:
    """A number for 256² and one for each of the four aspect bins."""
    return {NATIVE: native} | dict.fromkeys(BINS, each_bin)


STAGES: dict[str, Stage] = {
    "text": Stage(train_text_encoder, steps=1000, batch=64),
    "vae": Stage(train_vae, steps=1100, batch=32, images=sizes(3000, 600) | {SMALL: 600}),
    "latents-128": Stage(make_latents, images={SMALL: 12_000}),
    "dit-128": Stage(
        partial(train_dit, shares={SMALL: 1}, learning_rate=1.8e-3, latents_from="latents-128"),
        steps=800,
        batch=512,
    ),
    "latents": Stage(make_latents, images=sizes(32_000, 12_000)),
    "dit": Stage(
        partial(train_dit, shares=sizes(0.32, 0.17), learning_rate=1.8e-3, start="dit-128"),
        steps=5916,
        batch=256,
    ),
    "chains": Stage(partial(make_chains, teacher_from="dit"), batch=512, images=sizes(3584, 1536)),
    "lcm": Stage(
        partial(train_lcm, start="dit", chains_from=["chains"], learning_rate=6e-4),
        steps=999,
        batch=256,
        images=sizes(1, 0.5),
    ),
    "chains-own": Stage(
        partial(make_chains, teacher_from="dit", student_from="lcm"),
        batch=512,
        images=sizes(3584, 1536),
    ),
    "lcm-own": Stage(
        partial(train_lcm, start="lcm", chains_from=["chains", "chains-own"], learning_rate=6e-4),
        steps=1222,
        batch=256,
        images=sizes(1, 0.5),
    ),
    "decoder": Stage(
        partial(train_decoder, vae_from="vae", transformer_from="dit", few_step_from="lcm-own"),
        steps=300,
        batch=16,
        images=sizes(2000, 400),
    ),
    "export": Stage(export),
}

# What `--reuse` takes from assets/: stage → its parts there.
SHIPPED = {
    "text": {"tokenizer": "pixart-tiny/tokenizer", "text_encoder": "pixart-tiny/text_encoder"},
    "vae": {"vae": "pixart-tiny/vae"},
    "dit": {"transformer": "pixart-tiny/transformer"},
    "lcm-own": {"transformer": "pixart-tiny-lcm/transformer"},
}


def reuse(stage: str, output: Path) -> None:
    """Makes the shipped checkpoint's part this stage's result."""
    for part, source in SHIPPED[stage].items():
        shutil.copytree(ASSETS / source, output / stage / part, dirs_exist_ok=True)
    Run(stage, output).finish(taken_from="assets")


def install(output: Path) -> None:
    """Copies the exported checkpoints over those in assets/."""
    for name in CHECKPOINTS:
        shutil.copytree(output / name, ASSETS / name, dirs_exist_ok=True)


def run_stages(
    names: list[str],
    output: Path,
    *,
    device: str = "cpu",
    quick: bool = False,
    scale: float = 1.0,
    deadline: float = math.inf,
) -> bool:
    """Runs the stages that are not finished, in order; returns whether all of them are now."""
    torch.set_float32_matmul_precision("high")
    for name in names:
        stage = STAGES[name].quick() if quick else STAGES[name]
        steps = math.ceil(stage.steps * scale)
        run = Run(name, output, steps, stage.batch, stage.images, device, deadline)
        if run.finished:
            print(f"{name}: finished before")
            continue
        started = time.monotonic()
        stage.train(run)
        minutes = (time.monotonic() - started) / 60
        print(f"{name}: step {run.step} of {steps}, {minutes:.1f} min", flush=True)
        if not run.finished:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="default: all, in order")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="length of this segment")
    parser.add_argument("--reuse", nargs="+", choices=SHIPPED, default=[], metavar="STAGE")
    parser.add_argument("--install", action="store_true", help="overwrite assets/")
    arguments = parser.parse_args()
    for name in arguments.reuse:
        reuse(name, arguments.output)
    complete = run_stages(
        arguments.stages or [*STAGES],
        arguments.output,
        device=arguments.device,
        quick=arguments.quick,
        scale=arguments.scale,
        deadline=time.monotonic() + 60 * arguments.minutes,
    )
    if complete and arguments.install:
        install(arguments.output)


if __name__ == "__main__":
    main()
