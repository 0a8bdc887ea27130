"""One engine with one component or pipeline, and a stopwatch: this runs in a worker process."""

import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from diffusers import DiffusionPipeline

from benchmarks.cases import (
    PUBLISHED_RECIPE,
    T5_XXL,
    TEXT_TOKENS,
    TORCH,
    WEIGHT_FORMATS,
    WORDS,
    Case,
    Scale,
    Variant,
)
from benchmarks.images import OpenVINOGenerator, TorchGenerator
from benchmarks.loaders import LOADERS, check_finite, clock, load_module, precision_of
from ov_pixart.components import OVPixArtTextEncoder
from ov_pixart.convert import convert_text_encoder, convert_transformer
from ov_pixart.ir import IR_NAME
from ov_pixart.loading import load_pipeline
from ov_pixart.memory import peak_memory_mb
from ov_pixart.trace import T5ExportConfig, TextEncoderWrapper, TransformerWrapper


class Runner:
    """One engine, ready for one case. Lives in a process of its own."""

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        """`folder`: a checkpoint for torch and for conversion, an OpenVINO folder otherwise."""
        torch.manual_seed(0)
        if case.kind == "convert":
            self.measured: Any = Conversion(case, engine, folder, scale)
        elif case.kind == "image":
            generator = TorchGenerator if engine in TORCH else OpenVINOGenerator
            self.measured = generator(case, engine, folder, scale)
        elif engine in TORCH:
            self.measured = OneModel(_load_torch(case, engine, folder), case, engine, scale)
        else:
            model = component_call(case, load_pipeline(folder, compile=False))
            self.measured = OneModel(model, case, engine, scale)

    def warm_up(self, *variant: Variant) -> None:
        """Run once without the stopwatch; images take a variant.

        Raises ArithmeticError if the result is not finite.
        """
        self.measured.warm_up(*variant)

    def run(self, turn: int, *variant: Variant) -> dict[str, float]:
        """Run once: seconds, and the peak memory of the process so far in 10⁹ bytes."""
        seconds = self.measured.run(turn, *variant)
        return {"seconds": seconds, "peak_rss_gb": peak_memory_mb() / 1000}


# ---- one component -------------------------------------------------------------------------------


class OneModel:
    """The DiT, the VAE decoder or T5 alone: `call(**inputs)` is timed."""

    def __init__(self, call: Callable[..., Any], case: Case, engine: str, scale: Scale):
        self.call, self.case, self.scale = call, case, scale
        self.dtype = precision_of(engine)
        self.is_compiled = "compile" in engine
        self.width = scale.configs(T5_XXL)["text_encoder"]["d_model"]

    def warm_up(self) -> None:
        inputs = self.inputs(99)  # outside of inference mode, as in `run`, or torch compiles again
        for _ in range(2 if self.is_compiled else 1):  # the first call of those compiles
            _, result = clock(lambda: self.call(**inputs))
        check_finite(result[0])

    def run(self, turn: int) -> float:
        inputs = self.inputs(turn)
        return clock(lambda: self.call(**inputs))[0]

    def inputs(self, turn: int) -> dict[str, Any]:
        """Other numbers in each turn, so that no cache helps."""
        generator = torch.Generator().manual_seed(turn)
        mask = (torch.arange(TEXT_TOKENS) < WORDS).long()[None]
        if self.case.kind == "t5":
            tokens = torch.randint(3, 300, (1, TEXT_TOKENS), generator=generator)
            return {"input_ids": tokens, "attention_mask": mask}
        rows = self.scale.pixels(self.case) // 8
        latents = torch.randn(1, 4, rows, rows, generator=generator).to(self.dtype)
        if self.case.kind == "vae":
            return {"latents": latents}
        size_conditions = {"resolution": None, "aspect_ratio": None}
        if self.case.pixels == 1024:
            size = float(self.case.pixels)
            size_conditions["resolution"] = torch.tensor([[size, size]], dtype=self.dtype)
            size_conditions["aspect_ratio"] = torch.tensor([[1.0]], dtype=self.dtype)
        text = torch.randn(1, TEXT_TOKENS, self.width, generator=generator)
        return {
            "hidden_states": latents,
            "encoder_hidden_states": text.to(self.dtype),
            "timestep": torch.tensor([999 - 100 * (turn % 5)]),
            "added_cond_kwargs": size_conditions,
            "encoder_attention_mask": mask,
        }


def _load_torch(case: Case, engine: str, folder: Path) -> Callable[..., Any]:
    module = load_module(case.kind, folder, precision_of(engine))
    if case.kind == "vae":
        decode = module.decode
        if "compile" in engine:
            decode = torch.compile(decode)
        return lambda latents: decode(latents, return_dict=False)
    if "compile" in engine:
        module = torch.compile(module)
    if case.kind == "t5":
        return lambda **inputs: (module(**inputs).last_hidden_state,)
    return lambda **inputs: module(**inputs, return_dict=False)


def component_call(case: Case, pipeline: DiffusionPipeline) -> Callable[..., Any]:
    """A function that calls the one component of a pipeline that a case is about."""
    if case.kind == "vae":
        return lambda latents: pipeline.vae.decode(latents, return_dict=False)
    if case.kind == "t5":
        return functools.partial(_encode_anew, pipeline.text_encoder)
    return lambda **inputs: pipeline.transformer(**inputs, return_dict=False)


def _encode_anew(text_encoder: OVPixArtTextEncoder, input_ids, attention_mask) -> Any:
    """T5's embeddings, computed even if they are cached."""
    text_encoder.clear_cache()
    return text_encoder(input_ids, attention_mask=attention_mask)


# ---- conversion ----------------------------------------------------------------------------------


class Conversion:
    """From the checkpoint's files to the IR; imports and a slow disk do not count."""

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        self.case, self.engine, self.folder, self.scale = case, engine, folder, scale
        self.kind = "t5" if case.checkpoint == T5_XXL else "dit"

    def warm_up(self) -> None:
        for file in (self.folder / LOADERS[self.kind][0]).glob("*.safetensors"):
            with open(file, "rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass

    def run(self, turn: int) -> float:
        output = Path(tempfile.mkdtemp(prefix=".conversion-", dir=self.folder.parent))
        try:
            published = self.engine == PUBLISHED_RECIPE
            convert = self.convert_as_published if published else self.convert_as_here
            start = time.perf_counter()
            with torch.no_grad():
                convert(output)
            return time.perf_counter() - start
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def convert_as_here(self, output: Path) -> None:
        """The functions of the tutorial, on weights in the precision that they are stored in."""
        module = load_module(self.kind, self.folder, torch.bfloat16)
        convert = convert_text_encoder if self.kind == "t5" else convert_transformer
        convert(module, output, weight_format=WEIGHT_FORMATS[self.engine])

    def convert_as_published(self, output: Path) -> None:
        """float32 weights and a plain `ov.convert_model` at the model's own size."""
        module = load_module(self.kind, self.folder, torch.float32)
        if self.kind == "t5":
            # Without optimum's patch of the masks, T5 of transformers 5 cannot be traced at all.
            tokens = torch.ones((1, TEXT_TOKENS), dtype=torch.int64)
            example = {"input_ids": tokens, "attention_mask": tokens}
            with T5ExportConfig(module.config).patch_model_for_export(module):
                model = ov.convert_model(TextEncoderWrapper(module), example_input=example)
        else:
            example = self._example(module.config)
            model = ov.convert_model(TransformerWrapper(module), example_input=example)
        ov.save_model(model, output / IR_NAME)

    @staticmethod
    def _example(config: Any) -> dict[str, torch.Tensor]:
        size = config.sample_size
        pixels = 8.0 * size
        example = {
            "hidden_states": torch.randn(2, 4, size, size),
            "timestep": torch.tensor([999, 999]),
            "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, config.caption_channels),
            "encoder_attention_mask": torch.ones((2, TEXT_TOKENS)),
        }
        if size == 128:
            example["resolution"] = torch.tensor([[pixels, pixels]] * 2)
            example["aspect_ratio"] = torch.tensor([[1.0]] * 2)
        return example
