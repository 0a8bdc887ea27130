"""How few evaluations of the DiT make a right image? Solvers, steps, guidance intervals, caches.

    python -m pixart_tiny.solvers --count 20 --only sde   # a first look on a CPU
    python -m pixart_tiny.solvers --device cuda           # everything; minutes on an H100

Generates the held-out captions with torch in 32 bits, one run per variant, and lets the oracle read
the images. Writes assets/bench/pixart-tiny-solvers.json and goes on from there when run again.

A *row* is one image's latents passing through the DiT once: a guided step takes two. Step caches
replace rows by predictions from earlier steps. They exist for this study only: at equal cost none
generates more right images than fewer steps do, see docs/performance.md.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache as cached
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import ov_pixart_helper as ovp
from pixart_tiny import evaluate, oracle, scenes

RESULT = Path("assets/bench/pixart-tiny-solvers.json")
SOLVERS = {  # name → scheduler, and what it changes in the checkpoint's configuration
    "sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "ode": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "ode, order 3": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 3},
    ),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}
STEPS = (20, 18, 16, 14, 12, 10, 8)
WARM_UP = 3  # evaluations before a cache predicts anything, as in diffusers
CLEANNESS_IMAGES = 100  # of each variant; cleanness takes the oracle three times as long


@dataclass(frozen=True)
class Cache:
    """Which rows a cache predicts, and from what.

    `first_block`: it predicts what this block and all later ones add; None: the DiT's output.
    `interval`: every n-th step is evaluated. `threshold`: if given, an image is evaluated when what
    the blocks before `first_block` add has changed by this share since its last evaluation.
    `order`: of the Taylor series; 0 repeats the last value. `log_snr`: the series runs over the
    logarithm of the signal-to-noise ratio, not over steps. `only_unconditional`: the conditional
    half of guidance is always evaluated; `together`: it decides for both. `first_order`: the solver
    does not extrapolate from predictions.
    """

    first_block: int | None = None
    interval: int = 2
    threshold: float | None = None
    order: int = 1
    log_snr: bool = False
    only_unconditional: bool = False
    together: bool = False
    first_order: bool = False


@dataclass(frozen=True)
class Variant:
    """One way to generate; guidance runs from `start` to `end`, in shares of the steps."""

    solver: str
    steps: int = 20
    start: float = 0.0
    end: float = 1.0
    scale: float = 4.5
    cache: Cache | None = None

    def is_guided(self, step: int) -> bool:
        return round(self.start * self.steps, 6) <= step < round(self.end * self.steps, 6)


def variants() -> Iterator[Variant]:
    """The study, what matters most first."""
    main, others = ("sde", "ode"), ("unipc", "euler", "ode, order 3")
    for solver in main:
        for end in (1.0, 0.35, 0.5):
            yield from (Variant(solver, steps, end=end) for steps in STEPS)
    for solver in main:
        for end in (1.0, 0.35):
            yield from (Variant(solver, end=end, cache=cache) for cache in caches())
    for solver in others:
        for end in (1.0, 0.35):
            yield from (Variant(solver, steps, end=end) for steps in STEPS)
    for solver in main:
        yield from (Variant(solver, steps, end=0.25) for steps in STEPS)
        for start, end in ((0.1, 0.35), (0.1, 0.5), (0.2, 0.5), (0.1, 1.0)):
            yield from (Variant(solver, steps, start, end) for steps in (20, 16, 12))
        for scale in (3.0, 6.0, 8.0):
            yield from (Variant(solver, steps, end=0.35, scale=scale) for steps in (20, 16, 12))


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


# ----------------------------------------------------------------------------------------------
# Caches
# ----------------------------------------------------------------------------------------------


class Series:
    """Differences of a sequence of tensors `(B, …)`, extrapolated as TaylorSeer does.

    Each of the B entries has its own history. `positions`: where it was last updated.
    """

    def __init__(self, order: int) -> None:
        self.order, self.terms, self.positions = order, [], None

    def update(self, at: float, value: Tensor, rows: Tensor) -> None:
        """Take `value`, `(rows.sum(), …)`, for the rows of a mask; the first ones are for all."""
        terms = [value]
        for old in self.terms[: self.order]:
            distance = at - self.positions[rows]
            terms.append((terms[-1] - old[rows]) / distance.view(-1, *[1] * (value.ndim - 1)))
        for i, term in enumerate(terms):
            if i == len(self.terms):
                self.terms.append(term.clone())
            self.terms[i][rows] = term
        if self.positions is None:
            self.positions = torch.zeros(len(value), device=value.device)
        self.positions[rows] = at

    def predict(self, at: float) -> Tensor:
        """The value at a position; where it was just updated, that value."""
        distance = (at - self.positions).view(-1, *[1] * (self.terms[0].ndim - 1))
        return sum(term * distance**i / math.factorial(i) for i, term in enumerate(self.terms))


class Half:
    """One half of guidance: its cache's memory, and how many rows it has evaluated."""

    def __init__(self, name: str, cache: Cache | None, leader: Half | None = None) -> None:
        skipped = cache and cache.only_unconditional and name == "conditional"
        self.cache = None if skipped else cache
        self.leader = leader if cache and cache.together else None
        self.series = Series(cache.order) if cache else None
        self.signal, self.rows, self.calls = None, None, 0
        self.full = self.shallow = 0.0  # per image: through all blocks, through the first ones only

    def decide(self, signal: Tensor, is_last: bool) -> Tensor:
        """Which images to evaluate, a mask `(B,)`; `signal`: `(B, …)`, what a threshold watches."""
        rows = torch.ones(len(signal), dtype=torch.bool, device=signal.device)
        self.calls += 1
        if self.cache and self.calls > WARM_UP and not is_last:
            if self.leader:
                rows = self.leader.rows
            elif self.cache.threshold is None:
                rows = rows & ((self.calls - WARM_UP) % self.cache.interval == 0)
            else:
                dims = tuple(range(1, signal.ndim))
                change = (signal - self.signal).abs().mean(dims) / self.signal.abs().mean(dims)
                rows = change > self.cache.threshold
        if self.signal is None:
            self.signal = signal.clone()
        self.signal[rows] = signal[rows]
        self.rows = rows
        self.full += rows.float().mean().item()
        self.shallow += (
            (~rows).float().mean().item() if self.cache and self.cache.first_block else 0
        )
        return rows


class Blocks(nn.Module):
    """All blocks of a DiT as one; `half` decides which images pass through the later ones."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.half, self.at, self.is_last = nn.ModuleList(blocks), None, 0.0, False

    def run(self, blocks: Sequence[nn.Module], hidden: Tensor, inputs: dict) -> Tensor:
        for block in blocks:
            hidden = block(hidden, **inputs)
        return hidden

    def forward(self, hidden_states: Tensor, **inputs) -> Tensor:
        """`hidden_states`: `(B, tokens, width)`."""
        if not self.half.cache or self.half.cache.first_block is None:
            return self.run(self.blocks, hidden_states, inputs)
        first, series = self.half.cache.first_block, self.half.series
        head = self.run(self.blocks[:first], hidden_states, inputs)
        rows = self.half.decide(head - hidden_states, self.is_last)
        if rows.any():
            some = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            tail = self.run(self.blocks[first:], head[rows], some)
            series.update(self.at, tail - head[rows], rows)
        return head + series.predict(self.at)


# ----------------------------------------------------------------------------------------------
# Generating
# ----------------------------------------------------------------------------------------------


class Study:
    """The checkpoint on one device, with the embeddings of all captions.

    `captions`: (caption, seed) pairs; a caption may come several times.
    """

    def __init__(self, captions: Sequence[tuple[str, int]], device: str) -> None:
        pipeline = PixArtAlphaPipeline.from_pretrained(
            evaluate.CHECKPOINT, torch_dtype=torch.float32
        ).to(device)
        self.seeds, self.device = [seed for _, seed in captions], device
        self.vae, self.scheduler = pipeline.vae, pipeline.scheduler
        texts = [caption for caption, _ in captions]
        with torch.inference_mode():
            found = pipeline.encode_prompt(texts, device=device)
        longest = int(found[1].sum(1).max())  # padding changes nothing, and costs
        self.text = {
            "conditional": (found[0][:, :longest], found[1][:, :longest]),
            "unconditional": (found[2][:, :longest], found[3][:, :longest]),
        }
        self.transformer = pipeline.transformer
        self.blocks = Blocks(list(self.transformer.transformer_blocks))
        self.transformer.transformer_blocks = nn.ModuleList([self.blocks])
        self.reference = cached(lambda solver: self.generate(Variant(solver))[0])

    def velocity(self, name: str, half: Half, latents: Tensor, time: Tensor) -> Tensor:
        """The DiT's output for one half, `(B, 4, H, W)`, evaluated or predicted."""
        self.blocks.half = half
        embeddings, mask = self.text[name]

        def evaluated() -> Tensor:
            return self.transformer(
                latents,
                encoder_hidden_states=embeddings,
                encoder_attention_mask=mask,
                timestep=time.expand(len(latents)),
                return_dict=False,
            )[0][:, : latents.shape[1]]

        if half.cache and half.cache.first_block is not None:
            return evaluated()
        rows = half.decide(latents[:, :0], self.blocks.is_last)
        if not half.cache:
            return evaluated()
        if rows.all():
            half.series.update(self.blocks.at, evaluated(), rows)
        return half.series.predict(self.blocks.at)

    @torch.inference_mode()
    def generate(self, variant: Variant) -> tuple[Tensor, float, float]:
        """Images `(B, H, W, 3)` uint8, and the full and the shallow rows per image."""
        kind, changes = SOLVERS[variant.solver]
        scheduler = kind.from_config(self.scheduler.config, **changes)
        scheduler.set_timesteps(variant.steps, device=self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        options = {"generator": generators}
        if "generator" not in inspect.signature(scheduler.step).parameters:
            options = {}
        side = self.transformer.config.sample_size
        shape = (len(generators), self.transformer.config.in_channels, side, side)
        latents = randn_tensor(shape, generators, torch.device(self.device), torch.float32)
        latents = latents * scheduler.init_noise_sigma
        conditional = Half("conditional", variant.cache)
        unconditional = Half("unconditional", variant.cache, leader=conditional)
        for step, time in enumerate(scheduler.timesteps):
            over_log_snr = variant.cache and variant.cache.log_snr
            self.blocks.at = -math.log(scheduler.sigmas[step]) if over_log_snr else float(step)
            self.blocks.is_last = step == variant.steps - 1
            scaled = scheduler.scale_model_input(latents, time)
            output = self.velocity("conditional", conditional, scaled, time)
            if variant.is_guided(step):
                base = self.velocity("unconditional", unconditional, scaled, time)
                output = base + variant.scale * (output - base)
            if variant.cache and variant.cache.first_order and not conditional.rows.all():
                scheduler.lower_order_nums = 0
            latents = scheduler.step(output, time, latents, **options, return_dict=False)[0]
        parts = [self.vae.decode(part).sample for part in latents.split(50)]
        pixels = (torch.cat(parts).clamp(-1, 1) + 1) * 127.5
        images = pixels.round().byte().permute(0, 2, 3, 1)
        rows = [getattr(conditional, k) + getattr(unconditional, k) for k in ("full", "shallow")]
        return images, *rows


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


def measure(study: Study, captions: Sequence[str], plan: Sequence[Variant]) -> Iterator[dict]:
    """A row of figures per variant; processes judge one variant while the next is generated."""
    workers = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))
    with workers:
        before = None
        for variant in [*plan, None]:
            row = variant and {**asdict(variant)}
            if variant:
                images, full, shallow = study.generate(variant)
                found = psnr(images, study.reference(variant.solver))
                row |= {"rows": round(full, 2), "shallow_rows": round(shallow, 2)}
                row["psnr_median"] = round(float(found.median()), 1)
                row["psnr_p10"] = round(float(found.quantile(0.1)), 1)
                clean = [i < CLEANNESS_IMAGES for i in range(len(captions))]
                judged = workers.map(judge, images.cpu().numpy(), captions, clean, chunksize=4)
            if before:
                yield before[0] | summarize(list(before[1]))
            before = variant and (row, judged)


def main() -> None:
    """The command, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    parser.add_argument("--seeds", type=int, default=1, help="images per caption")
    parser.add_argument("--only", nargs="+", choices=SOLVERS, default=tuple(SOLVERS))
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    size = {"captions": given.count, "seeds": given.seeds}
    rows = ovp.read_json(given.result) if given.result.exists() else []
    done = [{name: row[name] for name in (*asdict(Variant("")), *size)} for row in rows]
    plan = [v for v in variants() if v.solver in given.only and asdict(v) | size not in done]
    listed = evaluate.read_captions()[: given.count]
    captions = [(text, seed + 1000 * n) for n in range(given.seeds) for text, seed in listed]
    start = monotonic()
    for row in measure(Study(captions, given.device), [text for text, _ in captions], plan):
        rows.append(row | size)
        ovp.write_json(rows, given.result)
        print(f"{monotonic() - start:.0f} s", rows[-1], flush=True)
        if given.minutes and monotonic() - start > 60 * given.minutes:
            break


if __name__ == "__main__":
    main()
