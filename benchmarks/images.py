"""Whole images with one engine, timed: this runs in a worker process."""

import functools
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, LCMScheduler, PixArtAlphaPipeline
from diffusers.schedulers import DPMSolverMultistepScheduler

from benchmarks.cases import TEXT_TOKENS, WORDS, Case, Scale, Variant
from benchmarks.checkpoints import load_tokenizer
from benchmarks.loaders import check_finite, clock, load_module, precision_of
from ov_pixart.calibration import CAPTIONS, load_calibration_prompts
from ov_pixart.loading import load_pipeline
from ov_pixart.trace import trace_vae_decoder


class _Generator:
    """Prompts, size and seeds, the same for torch and OpenVINO. No prompt comes twice."""

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        self.case, self.engine, self.folder = case, engine, folder
        self.prompts = _captions(folder)
        self.size = scale.pixels(case)

    def warm_up(self, variant: Variant) -> None:
        check_finite(self.generate(99, replace(variant, steps=2))[1])

    def run(self, turn: int, variant: Variant) -> float:
        return self.generate(turn, variant)[0]

    def call(self, turn: int, steps: int) -> dict[str, Any]:
        return {
            "num_inference_steps": steps or self.case.steps,
            "guidance_scale": self.case.guidance,
            "height": self.size,
            "width": self.size,
            "use_resolution_binning": False,
            "generator": torch.Generator().manual_seed(turn),
            "output_type": "pt",
        }

    def generate(self, turn: int, variant: Variant) -> tuple[float, Any]:
        raise NotImplementedError


def _captions(folder: Path) -> list[str]:
    """A hundred captions of about WORDS tokens, the nearest first: our T5 skips padding.

    The tokenizer here is PixArt-tiny's, whose vocabulary is smaller than T5-XXL's: the same caption
    has more tokens.
    """
    captions = load_calibration_prompts(CAPTIONS / "natural-calibration.csv")
    tokens = load_tokenizer(folder)([caption.lower() for caption in captions])["input_ids"]
    lengths = dict(zip(captions, map(len, tokens), strict=True))
    return sorted(captions, key=lambda caption: abs(lengths[caption] - WORDS))[:100]


class OpenVINOGenerator(_Generator):
    """The pipeline with all three components in memory; variants share the text encoder."""

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        super().__init__(case, engine, folder, scale)
        self.pipelines: dict[tuple[bool, bool], DiffusionPipeline] = {}
        self.text_encoder = load_pipeline(folder, compile=False).text_encoder

    def generate(self, turn: int, variant: Variant) -> tuple[float, Any]:
        call = self.call(turn, variant.steps) | {"guidance_end": variant.guidance_end}
        pipeline = self._pipeline(variant)
        self.text_encoder.clear_cache()  # or the negative prompt is encoded only once
        return clock(lambda: pipeline(self.prompts[turn], **call).images)

    def _pipeline(self, variant: Variant) -> DiffusionPipeline:
        key = (variant.small_decoder, variant.is_static)
        if key not in self.pipelines:
            pipeline = load_pipeline(self.folder, compile=False)
            if variant.small_decoder:
                pipeline.vae_decoder.model = trace_vae_decoder(_small_vae())
            if variant.is_static:
                pipeline.reshape(1, self.size, self.size, 1)
            pipeline.text_encoder = self.text_encoder
            self.pipelines[key] = pipeline
        return self.pipelines[key]


def _small_vae() -> AutoencoderTiny:
    """The published size of Stable Diffusion's small decoder, TAESD, with random weights."""
    return AutoencoderTiny().eval()


class TorchGenerator(_Generator):
    """diffusers' pipeline; T5 is freed before DiT and VAE start, because memory is short.

    Loading is not timed. T5 is loaded anew for each image, and warmed up before the stopwatch
    starts; DiT and VAE stay in memory if they have 16 bits.
    """

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        super().__init__(case, engine, folder, scale)
        self.dtype, self.kept = precision_of(engine), None
        self.decoders: dict[bool, torch.nn.Module] = {}  # small or not

    def generate(self, turn: int, variant: Variant) -> tuple[float, Any]:
        text_seconds, text = self._encode(turn)
        pipeline = self.kept or self._load()
        if self.dtype != torch.float32:
            self.kept = pipeline
        pipeline.vae = self._decoder(variant.small_decoder)
        call = {**self.call(turn, variant.steps), **text, "prompt": None, "negative_prompt": None}
        seconds, images = clock(lambda: pipeline(**call).images)
        return text_seconds + seconds, images

    def _encode(self, turn: int) -> tuple[float, dict[str, torch.Tensor]]:
        encoder = self._pipeline(text_encoder=load_module("t5", self.folder, self.dtype))
        encode = functools.partial(
            encoder.encode_prompt,
            do_classifier_free_guidance=self.case.guidance > 1,
            max_sequence_length=TEXT_TOKENS,
        )
        clock(lambda: encode("warm up"))
        seconds, tensors = clock(lambda: encode(self.prompts[turn]))
        encoder.text_encoder = None
        gc.collect()
        names = ("prompt_embeds", "prompt_attention_mask")
        names += tuple(f"negative_{name}" for name in names)
        return seconds, dict(zip(names, tensors, strict=True))

    def _load(self) -> PixArtAlphaPipeline:
        transformer = load_module("dit", self.folder, self.dtype)
        if "compile" in self.engine:
            transformer.compile()
        return self._pipeline(transformer=transformer, vae=self._decoder(is_small=False))

    def _decoder(self, is_small: bool) -> torch.nn.Module:
        if is_small not in self.decoders:
            vae = _small_vae() if is_small else load_module("vae", self.folder, self.dtype)
            self.decoders[is_small] = vae.to(self.dtype)
            if "compile" in self.engine:
                vae.decoder.compile()
        return self.decoders[is_small]

    def _pipeline(self, **models: torch.nn.Module) -> PixArtAlphaPipeline:
        few_steps = self.case.guidance <= 1
        scheduler = LCMScheduler if few_steps else DPMSolverMultistepScheduler
        parts = {"text_encoder": None, "transformer": None, "vae": None, **models}
        pipeline = PixArtAlphaPipeline(
            tokenizer=load_tokenizer(self.folder),
            scheduler=scheduler.from_pretrained(self.folder / "scheduler"),
            **parts,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
