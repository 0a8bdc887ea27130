"""Calibration data: captions, and what the components receive while images are generated."""

import hashlib
import itertools
import json
import math
import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import T5Tokenizer

from ov_pixart.checkpoint import COMPONENTS, GenerationDefaults, default_settings
from ov_pixart.checks import check, check_names, is_count, public, read_json
from ov_pixart.ir import ir_files, read_ir
from ov_pixart.loading import load_pipeline
from ov_pixart.memory import release_memory
from ov_pixart.pipeline import OVPixArtPipeline
from ov_pixart.quiet import quiet
from ov_pixart.storage import fingerprint, remove_leftovers, staged_file

CAPTIONS = Path(__file__).parents[1] / "assets" / "captions"
DEFAULT_NUM_SAMPLES = 100  # calls of the DiT; each holds both halves of the guidance
_SAMPLES_PER_IMAGE = 5  # of all its denoising steps: neighbours are much alike
_ASPECT_RATIOS = (1.0, 3 / 4, 4 / 3, 9 / 16, 16 / 9)  # height / width, in turn


def progress_bar(
    description: str, total: int, unit: str, shown: bool, *, leave: bool = False
) -> tqdm:
    """A bar that disappears when it is full, unless `leave`."""
    return tqdm(
        desc=description, total=total, unit=unit, leave=leave, disable=not (shown and total)
    )


# ---- captions -----------------------------------------------------------------------------------

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@public
def load_calibration_prompts(
    source: str | Path,
    *,
    column: str = "caption",
    split: str = "train",
    num: int | None = None,
    **kwargs,
) -> list[str]:
    """Read captions from a file (csv, json lines, parquet, txt) or a Hugging Face data set.

    `column` holds the captions (of a txt file: its lines). `num`: how many to read, all by
    default. A data set is streamed, so that a few captions of a huge one cost little; `kwargs`
    go to `datasets.load_dataset` (`name`, `revision`, `token`...), but its code is never run.

    Raises ValueError for an unknown column or kind of file, for a `num` below 1 and for
    `trust_remote_code`, FileNotFoundError for a missing file or a data set out of reach.
    """
    return _read_captions("source", source, column, split, num, kwargs)


def _read_captions(
    argument: str,
    source: str | Path,
    column: str = "caption",
    split: str = "train",
    num: int | None = None,
    kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """As `load_calibration_prompts`; errors call the source `argument`."""
    kwargs = dict(kwargs or {})
    if num is not None:
        check(is_count(num), "num", num, "a whole number from 1")
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code=True is not supported: choose a data set without code.")
    file = Path(source)
    if file.is_file():
        check_names("load_calibration_prompts, for a file,", kwargs, ("column", "split", "num"))
        rows, column = _read_rows(file, column)
    elif file.suffix in _READERS:
        raise FileNotFoundError(f"{argument}={str(file)!r} is not there: check the path.")
    else:
        rows = _stream(argument, str(source), split=split, **kwargs)
    captions = []
    for row in itertools.islice(rows, num):
        if column not in row:
            columns = ", ".join(repr(name) for name in row)
            raise ValueError(f"column={column!r} is not in {str(source)!r}: it has {columns}.")
        captions.append(str(row[column]))
    return captions


def _stream(argument: str, name: str, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set, as they arrive."""
    try:
        yield from datasets.load_dataset(name, streaming=True, **kwargs)
    except (OSError, RuntimeError, httpx.HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{argument}={name!r} is no file here and cannot be fetched from Hugging Face: check "
            "its name and the connection; the captions that optimize_pipeline uses by default "
            f"need none ({reason})."
        ) from error


def _read_rows(file: Path, column: str) -> tuple[Iterable[dict[str, Any]], str]:
    """The rows of a local file, and the name of the column of captions."""
    if file.suffix not in _READERS:
        raise ValueError(f"source={str(file)!r} cannot be read: use one of {', '.join(_READERS)}.")
    kind = _READERS[file.suffix]
    # Dataset.from_csv and the like, not load_dataset, which counts downloads over the network
    reader = getattr(datasets.Dataset, f"from_{kind}")
    with tempfile.TemporaryDirectory() as cache, quiet():
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            rows = reader(str(file), cache_dir=cache, keep_in_memory=True).to_list()
        finally:
            if not bars:
                datasets.enable_progress_bars()
    return rows, "text" if kind == "text" else column


def choose_prompts(
    calibration_prompts: str | Path | list[str] | None, source: Path, num_samples: int, seed: int
) -> list[str]:
    """Choose as many different captions at random as `num_samples` needs.

    `source`: an OpenVINO folder. Raises ValueError where there are too few.
    """
    if calibration_prompts is None:
        # T5-XXL encodes any English; a small text encoder was trained on one grammar of scenes.
        width = read_json(source / "text_encoder" / "config.json").get("d_model", 4096)
        name = "natural-calibration.csv" if width >= 4096 else "pixart-tiny-calibration.csv"
        calibration_prompts = CAPTIONS / name
    if isinstance(calibration_prompts, str | Path):
        num = None if Path(calibration_prompts).is_file() else 10 * num_samples
        calibration_prompts = _read_captions("calibration_prompts", calibration_prompts, num=num)
    is_captions = isinstance(calibration_prompts, list | tuple)
    is_captions = is_captions and all(isinstance(caption, str) for caption in calibration_prompts)
    rule = "captions: a list of strings, or a file or data set for load_calibration_prompts"
    check(is_captions, "calibration_prompts", calibration_prompts, rule)
    captions = sorted({caption.strip() for caption in calibration_prompts} - {""})
    needed = math.ceil(num_samples / _SAMPLES_PER_IMAGE)
    if len(captions) < needed:
        raise ValueError(
            f"calibration_prompts has {len(captions)} different captions, too few for "
            f"num_samples={num_samples}: give {needed} or more, or lower num_samples."
        )
    return random.Random(seed).sample(captions, needed)


# ---- recorded trajectories ----------------------------------------------------------------------

_PER_STEP = ("hidden_states", "timestep")  # the other inputs are the same for a whole image


class CalibrationData:
    """Inputs of the three components, recorded while the source pipeline generates images.

    They are recorded when first asked for, and stored as float16, precise enough for activation
    ranges. `key` identifies the data: equal keys, equal samples.
    """

    def __init__(self, source: Path, folder: Path, prompts: list[str], num: int | None, seed: int):
        self.source, self.folder, self.prompts = source, folder, prompts
        self.num_samples, self.seed = num, seed
        self.text_encoder = source / "text_encoder"
        irs = (fingerprint(ir_files(source / name)) for name in COMPONENTS)
        self._facts = [prompts, num, seed, *irs]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self._facts).encode()).hexdigest()[:16]

    def encode_with(self, text_encoder: Path, recipe: dict[str, Any]) -> None:
        """Encode the captions with another IR than the source's, made from it by `recipe`."""
        self.text_encoder = text_encoder
        self._facts.append(recipe)

    def samples(self, name: str, *, progress: bool) -> list[dict[str, np.ndarray]]:
        """Calibration samples of one component: a list of its inputs by name."""
        if name == "text_encoder":
            return _tokenize(self.source, self.prompts)
        images = self._images(progress=progress)
        if name == "vae_decoder":
            tiles = [tile for image in images for tile in tile_latents(image["latent_sample"])]
            return [{"latent_sample": tile} for tile in tiles]
        calls = [
            {key: value[step] if key in _PER_STEP else value for key, value in image.items()}
            for image in images
            for step in range(len(image["timestep"]))
        ]
        for call in calls:
            del call["latent_sample"]
        return [rows for call in calls[: self.num_samples] for rows in split_large_call(call)]

    def _images(self, *, progress: bool) -> list[dict[str, np.ndarray]]:
        """What `record_image` returned for each prompt, from disk if it was recorded before."""
        file = self.folder / f"{self.key}.npz"
        if not file.is_file():
            self._record(file, progress=progress)
        images: list[dict[str, np.ndarray]] = [{} for _ in self.prompts]
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                index, key = name.split("/")
                value = arrays[name]
                is_half = value.dtype == np.float16
                images[int(index)][key] = value.astype(np.float32) if is_half else value
        return images

    def _record(self, file: Path, *, progress: bool) -> None:
        """Generate one image per prompt up to its final latents, several aspect ratios in turn."""
        settings = default_settings(self.source)
        pipeline = load_pipeline(self.source, compile=False)
        sizes = _calibration_sizes(pipeline, settings)
        pipeline.text_encoder.model = read_ir(self.text_encoder)
        texts = [encode(pipeline, prompt, settings.guidance_scale) for prompt in self.prompts]
        pipeline.release_text_encoder()  # or it would be in memory beside the others
        arrays = {}
        with progress_bar("Generating", len(texts), "image", progress) as bar:
            for i, text in enumerate(texts):
                height, width = sizes[i % len(sizes)]
                image = record_image(
                    pipeline,
                    **text,
                    height=height,
                    width=width,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    timesteps=settings.timesteps and list(settings.timesteps),
                    generator=torch.Generator().manual_seed(self.seed + i),
                    first=i,
                )
                arrays |= {f"{i}/{key}": value for key, value in image.items()}
                bar.update()
        del pipeline
        release_memory()  # a pipeline refers to itself: its models would crowd the calibration
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        # an open file: given a path, NumPy would add its own suffix
        with staged_file(file) as partial, partial.open("wb") as content:
            np.savez(content, **arrays)


def encode(
    pipeline: OVPixArtPipeline, prompt: str, guidance_scale: float
) -> dict[str, torch.Tensor | None]:
    """Encode a prompt to arguments of the pipeline's call that do not need the text encoder."""
    names = ("prompt_embeds", "prompt_attention_mask")
    names += tuple(f"negative_{name}" for name in names)
    tensors = pipeline.encode_prompt(
        prompt,
        do_classifier_free_guidance=guidance_scale > 1,
        clean_caption=True,
        max_sequence_length=pipeline.family.max_tokens,
    )
    return dict(zip(names, tensors, strict=True))


def record_image(pipeline: OVPixArtPipeline, *, first: int, **call) -> dict[str, np.ndarray]:
    """Generate one image; return the DiT's inputs at some of the steps, and the final latents.

    `hidden_states` `(steps, B, 4, h, w)`, `timestep` `(steps, B)`, the rest as for the DiT. The
    steps are spread evenly; `first`, the number of the image, shifts them by the golden ratio, so
    that consecutive images cover all steps.
    """
    with pipeline.transformer.recorded_calls() as calls:
        latents = pipeline(output_type="latent", use_resolution_binning=False, **call).images
    count = min(_SAMPLES_PER_IMAGE, len(calls))
    stride = len(calls) / count
    chosen = [int(stride * (i + (first * 0.382) % 1)) for i in range(count)]
    image = {key: calls[0][key] for key in calls[0].keys() - set(_PER_STEP)}
    for key in _PER_STEP:
        image[key] = np.stack([calls[step][key] for step in chosen])
    image["latent_sample"] = (latents / pipeline.vae.config.scaling_factor).numpy()
    return {
        key: value.astype(np.float16) if value.dtype == np.float32 and key != "timestep" else value
        for key, value in sorted(image.items())
    }


def _calibration_sizes(
    pipeline: OVPixArtPipeline, settings: GenerationDefaults
) -> list[tuple[int, int]]:
    """Heights and widths in pixels with about the checkpoint's own area, in some aspect ratios."""
    grid = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    sizes = []
    for ratio in _ASPECT_RATIOS:
        height = settings.height * math.sqrt(ratio)
        width = settings.width / math.sqrt(ratio)
        sizes.append((round(height / grid) * grid, round(width / grid) * grid))
    return sizes


def _tokenize(source: Path, prompts: list[str]) -> list[dict[str, np.ndarray]]:
    """The text encoder's inputs for captions one by one, `(1, L)` int64, without padding."""
    tokenizer = T5Tokenizer.from_pretrained(source / "tokenizer", local_files_only=True)
    tokens = [tokenizer(prompt.lower(), return_tensors="np") for prompt in prompts]
    names = ("input_ids", "attention_mask")
    return [{name: one[name].astype(np.int64) for name in names} for one in tokens]


# ---- samples that memory can hold ---------------------------------------------------------------

_LARGEST_CALL = 2 * 4 * 64 * 64  # numbers in both halves of the guidance at 512²


def split_large_call(call: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """A call of the DiT, or its rows one by one where together they would take much memory."""
    latents = call["hidden_states"]
    if latents.size <= _LARGEST_CALL * 1.1:  # other aspect ratios are a little larger
        return [call]
    return [{name: value[i : i + 1] for name, value in call.items()} for i in range(len(latents))]


# Side in latents: images of 1024² stay whole in all aspect ratios (6.4 GB), 2048² becomes four
# tiles. Smaller tiles would cost quality: calibrated with quarters of its images, PixArt-tiny's
# decoder reaches a PSNR of 41.1 dB against FP16, with whole images 43.9 dB.
_TILE = 172


def tile_latents(latents: np.ndarray) -> list[np.ndarray]:
    """Cut latents, `(1, C, h, w)`, into equal tiles that a VAE decoder can be calibrated with."""
    rows, columns = (-(-side // _TILE) for side in latents.shape[2:])
    bands = np.array_split(latents, rows, axis=2)
    return [tile for band in bands for tile in np.array_split(band, columns, axis=3)]
