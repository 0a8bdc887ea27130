"""`compare_pipelines`: the same images from several versions, with size, time, memory, quality."""

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm.auto import tqdm

from ov_pixart import plots
from ov_pixart.call_checks import check_interval
from ov_pixart.checkpoint import (
    GenerationDefaults,
    check_openvino_folder,
    check_torch_folder,
    default_settings,
    is_openvino_folder,
    read_model_index,
    sizes_mb,
)
from ov_pixart.checks import check, is_count, is_text, named_folders, plain, public
from ov_pixart.components import OVPixArtTextEncoder
from ov_pixart.loading import load_pipeline
from ov_pixart.memory import group_by_memory, peak_memory_mb
from ov_pixart.workers import WorkerDied, WorkerError, Workers

Scorer = Callable[[list[Image.Image], list[str]], list[float]]


@public
def compare_pipelines(
    pipelines: dict[str, str | Path],
    prompts: str | list[str],
    *,
    seeds: int | list[int],
    num_inference_steps: int | dict[str, int] | None = None,
    guidance_scale: float | dict[str, float] | None = None,
    guidance_end: float | dict[str, float] | None = None,
    scorer: Scorer | None = None,
    reference: str | None = None,
) -> "Comparison":
    """Generate the same images with several pipelines and measure each.

    `pipelines`: a label for each folder, OpenVINO or diffusers (that one runs in torch float32).
    `seeds`: one for each prompt, or one for all; one prompt may also have several seeds. Steps and
    guidance: one number for all, or numbers by label; by default those of the reference's
    checkpoint. `reference`: the label whose images the others are compared with, by default the
    first. `scorer(images, prompts)` returns one number per image, the higher the better.

    Each pipeline has a process of its own, so that its memory can be measured, and they take
    turns, so that a machine that slows down slows all of them. One short image warms up first.
    Where memory does not hold them all, as many as fit take turns, then the next ones.

    Raises ValueError for arguments that do not work, FileNotFoundError for a folder that is
    missing or incomplete, RuntimeError where a pipeline fails or its process dies.
    """
    folders = named_folders(pipelines)
    reference = next(iter(folders), None) if reference is None else reference
    pairs = _check_compare(folders, prompts, seeds, reference)
    given = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_end": guidance_end,
    }
    calls = _calls_by_label(list(folders), given, default_settings(folders[reference]))
    for call in calls.values():
        check_interval(call["guidance_scale"], 0.0, call["guidance_end"])
    sizes = {label: sizes_mb(folder) for label, folder in folders.items()}
    # estimated memory: weights, their repacked copy and activations (× 1.5), plus the process
    needs = {label: 1.5 * sum(size.values()) + 300 for label, size in sizes.items()}
    runs: dict[str, list[ImageRun]] = {}
    with tqdm(total=(1 + len(pairs)) * len(folders), unit="image") as bar:
        for group in group_by_memory(needs, 0.8 * psutil.virtual_memory().available / 1e6):
            runs |= _take_turns({label: folders[label] for label in group}, pairs, calls, bar)
    return evaluate(runs, sizes, pairs, reference, scorer)


def _check_compare(
    folders: dict[str, Path],
    prompts: str | list[str],
    seeds: int | list[int],
    reference: str | None,
) -> list[tuple[str, int]]:
    """Raise before a process is started, or return (prompt, seed) pairs."""
    check(bool(folders), "pipelines", folders, "at least one label with its folder")
    labels = ", ".join(repr(label) for label in folders)
    check(reference in folders, "reference", reference, f"one of the labels {labels}")
    for label, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"pipelines[{label!r}]={str(folder)!r} is no folder.")
        left_out = read_model_index(folder).get("text_encoder") == [None, None]
        rule = "a folder with a text encoder: prompts are compared, not embeddings"
        check(not left_out, f"pipelines[{label!r}]", str(folder), rule)
        if is_openvino_folder(folder):
            check_openvino_folder(folder)
        else:
            check_torch_folder(folder)
    check(is_text(prompts), "prompts", prompts, "a string or a list of at least one string")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = [seeds] if isinstance(seeds, int) else [plain(seed) for seed in seeds]
    if len(prompts) == 1:
        prompts = prompts * len(seeds)
    if len(seeds) == 1:
        seeds = seeds * len(prompts)
    rule = f"one whole number, or one for each of the {len(prompts)} prompts"
    fits = all(isinstance(seed, int) for seed in seeds) and len(seeds) == len(prompts) > 0
    check(fits, "seeds", seeds, rule)
    return list(zip(prompts, seeds, strict=True))


def _calls_by_label(
    labels: list[str], given: dict[str, Any], settings: GenerationDefaults
) -> dict[str, dict[str, Any]]:
    """Arguments of each pipeline's call; `given`: one value for all, values by label, or None."""
    calls = {}
    for label in labels:
        call: dict[str, Any] = {"use_resolution_binning": settings.use_resolution_binning}
        for name, value in given.items():
            if isinstance(value, dict):
                rule = f"numbers by label, of {', '.join(map(repr, labels))}"
                check(value.keys() <= set(labels), name, value, rule)
                value = value.get(label)
            call[name] = getattr(settings, name) if value is None else plain(value)
            if name == "num_inference_steps" and value is None and settings.timesteps:
                call["timesteps"] = list(settings.timesteps)
        calls[label] = call
    return calls


# ---- generate and time --------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRun:
    """One timed image, its stages, and the peak memory of its process so far."""

    image: Image.Image
    total_s: float
    text_encoder_s: float  # prompt and negative prompt together
    step_s: list[float]  # one number per call of the DiT
    vae_decoder_s: float
    peak_memory_mb: float


def _take_turns(
    folders: dict[str, Path],
    pairs: list[tuple[str, int]],
    calls: dict[str, dict[str, Any]],
    bar: tqdm,
) -> dict[str, list[ImageRun]]:
    """Generate every image with every pipeline in turn."""
    runs: dict[str, list[ImageRun]] = {label: [] for label in folders}
    with Workers() as workers:
        for label, folder in folders.items():
            bar.set_description(f"Warming up {label}")
            _call(workers, label, Timer, folder)
            short = {"num_inference_steps": min(2, calls[label]["num_inference_steps"])}
            _call(workers, label, "run", *pairs[0], **{**calls[label], **short})
            bar.update()
        for prompt, seed in pairs:
            for label in folders:
                bar.set_description(f"Generating with {label}")
                runs[label].append(_call(workers, label, "run", prompt, seed, **calls[label]))
                bar.update()
    return runs


def _call(workers: Workers, label: str, function: Callable | str, *args: Any, **kwargs: Any) -> Any:
    try:
        return workers.call(label, function, *args, **kwargs)
    except WorkerDied as error:
        raise RuntimeError(
            f"{label!r} failed: {error}, perhaps because memory ran out: compare fewer pipelines "
            "at a time."
        ) from None
    except WorkerError as error:
        raise RuntimeError(f"{label!r} failed: {error}") from None


class Timer:
    """A pipeline, OpenVINO or torch, with a stopwatch at each of its three components."""

    def __init__(self, folder: Path):
        self.pipeline = load_pipeline(folder)
        self.seconds: dict[str, list[float]] = {}
        for stage, component, method in (
            ("text_encoder", self.pipeline.text_encoder, "forward"),
            ("transformer", self.pipeline.transformer, "forward"),
            ("vae_decoder", self.pipeline.vae, "decode"),
        ):
            setattr(component, method, self._timed(stage, getattr(component, method)))

    def _timed(self, stage: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds.setdefault(stage, []).append(time.perf_counter() - start)
            return result

        return timed

    def run(self, prompt: str, seed: int, **call) -> ImageRun:
        """Generate one image; `call`: further arguments of the pipeline's call."""
        self.seconds.clear()
        if isinstance(self.pipeline.text_encoder, OVPixArtTextEncoder):
            self.pipeline.text_encoder.clear_cache()  # torch encodes its prompt in every run, too
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        image = self.pipeline(prompt, generator=generator, **call).images[0]
        return ImageRun(
            image=image,
            total_s=time.perf_counter() - start,
            text_encoder_s=sum(self.seconds["text_encoder"]),
            step_s=self.seconds["transformer"],
            vae_decoder_s=sum(self.seconds["vae_decoder"]),
            peak_memory_mb=peak_memory_mb(),
        )


# ---- results ------------------------------------------------------------------------------------


def evaluate(
    runs: dict[str, list[ImageRun]],
    sizes_mb: dict[str, dict[str, float]],
    pairs: list[tuple[str, int]],
    reference: str,
    scorer: Scorer | None,
) -> "Comparison":
    """Compare every image with the reference's, and score it."""
    prompts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    images = {label: [run.image for run in runs[label]] for label in runs}
    pairings = {
        label: [likeness(a, b) for a, b in zip(generated, images[reference], strict=True)]
        for label, generated in images.items()
    }
    return Comparison(
        reference=reference,
        prompts=prompts,
        seeds=seeds,
        images=images,
        sizes_mb=sizes_mb,
        runs=runs,
        psnr_db={label: [psnr for psnr, _ in values] for label, values in pairings.items()},
        ssim={label: [ssim for _, ssim in values] for label, values in pairings.items()},
        scores={
            label: [float(score) for score in scorer(generated, prompts)] if scorer else []
            for label, generated in images.items()
        },
    )


def likeness(image: Image.Image, reference: Image.Image) -> tuple[float, float]:
    """PSNR in dB (infinite for equal images) and SSIM (1 for equal images).

    Raises ValueError for images of different sizes.
    """
    a, b = np.asarray(image), np.asarray(reference)
    if a.shape != b.shape:
        raise ValueError(
            f"An image of {image.size} cannot be compared with one of {reference.size}: "
            "compare pipelines of one checkpoint."
        )
    same = np.array_equal(a, b)
    psnr = math.inf if same else float(peak_signal_noise_ratio(b, a, data_range=255))
    return psnr, float(structural_similarity(b, a, data_range=255, channel_axis=-1))


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_pipelines`: a table, plots, images, and the numbers behind them.

    Every dictionary is keyed by label; lists have one entry per image, in the order of `prompts`
    and `seeds`. `sizes_mb` has one entry per component.
    """

    reference: str
    prompts: list[str]
    seeds: list[int]
    images: dict[str, list[Image.Image]]
    sizes_mb: dict[str, dict[str, float]]
    runs: dict[str, list[ImageRun]]
    psnr_db: dict[str, list[float]]
    ssim: dict[str, list[float]]
    scores: dict[str, list[float]]

    @property
    def pictures(self) -> dict[str, list[Image.Image]]:
        """An earlier name of `images`."""
        return self.images

    @property
    def turns(self) -> dict[str, list[ImageRun]]:
        """An earlier name of `runs`."""
        return self.runs

    def to_dataframe(self) -> pd.DataFrame:
        """One row per label: times and likeness are medians, the score is the mean of all images.

        `size_mb`: the three components, in 10⁶ bytes. `text_encoder_ms`: prompt and negative
        prompt. `step_ms`: one call of the DiT; of a guided step, with both predictions.
        `total_s`: the whole image. `peak_memory_mb`: of the process, with about half a GB of
        libraries in it. `psnr_db` and `ssim` compare with the reference, which equals itself:
        infinity and 1.
        """
        rows = {}
        for label, runs in self.runs.items():
            rows[label] = {
                "size_mb": sum(self.sizes_mb[label].values()),
                "text_encoder_ms": 1000 * _median(run.text_encoder_s for run in runs),
                "step_ms": 1000 * _median(step for run in runs for step in run.step_s),
                "vae_decoder_ms": 1000 * _median(run.vae_decoder_s for run in runs),
                "total_s": _median(run.total_s for run in runs),
                "peak_memory_mb": max(run.peak_memory_mb for run in runs),
                "psnr_db": _median(self.psnr_db[label]),
                "ssim": _median(self.ssim[label]),
                "score": float(np.mean(self.scores[label])) if self.scores[label] else math.nan,
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("pipeline")

    def plot(self) -> Figure:
        """Bars for size, memory, time and quality, one panel each."""
        shares = {"size_mb": self.sizes_mb, "total_s": self._seconds_per_component()}
        return plots.comparison_figure(self.to_dataframe(), shares, self.reference)

    def _seconds_per_component(self) -> dict[str, dict[str, float]]:
        """Medians of the seconds per image: label → component, or "rest" → seconds."""
        shares = {}
        for label, runs in self.runs.items():
            parts = {
                "text_encoder": _median(run.text_encoder_s for run in runs),
                "transformer": _median(sum(run.step_s) for run in runs),
                "vae_decoder": _median(run.vae_decoder_s for run in runs),
            }
            total = _median(run.total_s for run in runs)
            shares[label] = {**parts, "rest": max(0.0, total - sum(parts.values()))}
        return shares

    def show_images(
        self, labels: list[str] | None = None, *, count: int = 3, amplification: float = 8
    ) -> Figure:
        """The first `count` images, the reference's beside the others'; below, the differences.

        `labels`: which pipelines to show, all by default. A difference is grey where two images
        agree, and multiplied by `amplification` elsewhere. Raises ValueError for unknown labels.
        """
        others = [label for label in labels or self.images if label != self.reference]
        for label in others:
            known = ", ".join(repr(name) for name in self.images)
            check(label in self.images, "labels", label, f"among {known}")
        check(is_count(count), "count", count, "a whole number from 1")
        count = min(count, len(self.prompts))
        captions = [f"“{self.prompts[i]}”, seed {self.seeds[i]}" for i in range(count)]
        images = {label: self.images[label][:count] for label in (self.reference, *others)}
        return plots.differences_figure(images, captions, self.psnr_db, amplification)


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))
