"""One engine with one component or pipeline, and a stopwatch: this runs in a worker process."""

import functools
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov
import psutil
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.schedulers import DPMSolverMultistepScheduler
from transformers import T5EncoderModel

from benchmarks.cases import (
    PUBLISHED_RECIPE,
    T5_XXL,
    TEXT_TOKENS,
    TORCH,
    WEIGHT_FORMATS,
    WORDS,
    Case,
    Scale,
)
from benchmarks.checkpoints import load_tokenizer
from ov_pixart.calibration import CAPTIONS, load_calibration_prompts
from ov_pixart.checkpoint import stored_weights
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

    def warm_up(self) -> None:
        """Run once without the stopwatch. Raises ArithmeticError if the result is not finite."""
        self.measured.warm_up()

    def run(self, turn: int) -> dict[str, float]:
        """Run once: seconds, and the peak memory of the process so far in 10⁹ bytes."""
        seconds = self.measured.run(turn)
        return {"seconds": seconds, "peak_rss_gb": peak_memory_mb() / 1000}


def clock(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `function` takes, and its result."""
    start = time.perf_counter()
    with torch.inference_mode():
        result = function()
    return time.perf_counter() - start, result


def _check_finite(result: torch.Tensor) -> None:
    if not torch.isfinite(torch.as_tensor(result).float()).all():
        raise ArithmeticError("the result is not finite")


# ---- one component -------------------------------------------------------------------------------


class OneModel:
    """The DiT, the VAE decoder or T5 alone: `call(**inputs)` is timed."""

    def __init__(self, call: Callable[..., Any], case: Case, engine: str, scale: Scale):
        self.call, self.case, self.scale = call, case, scale
        self.dtype = _precision(engine)
        self.is_compiled = "compile" in engine
        self.width = scale.configs(T5_XXL)["text_encoder"]["d_model"]

    def warm_up(self) -> None:
        inputs = self.inputs(99)  # outside of inference mode, as in `run`, or torch compiles again
        for _ in range(2 if self.is_compiled else 1):  # the first call of those compiles
            _, result = clock(lambda: self.call(**inputs))
        _check_finite(result[0])

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


def _precision(engine: str) -> torch.dtype:
    """The dtype that torch computes in; inputs of OpenVINO's models are float32."""
    return torch.bfloat16 if "bf16" in engine else torch.float32


_LOADERS = {
    "dit": ("transformer", PixArtTransformer2DModel),
    "vae": ("vae", AutoencoderKL),
    "t5": ("text_encoder", T5EncoderModel),
}


def _load_module(kind: str, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load a component of a checkpoint; raises MemoryError if it does not fit into free memory."""
    name, loader = _LOADERS[kind]
    needed = dtype.itemsize * sum(stored_weights(folder / name).sizes)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(f"{name} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    precision = {"dtype" if kind == "t5" else "torch_dtype": dtype}
    options = {"use_safetensors": True, "local_files_only": True, **precision}
    return loader.from_pretrained(folder / name, **options).eval()


def _load_torch(case: Case, engine: str, folder: Path) -> Callable[..., Any]:
    module = _load_module(case.kind, folder, _precision(engine))
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


# ---- whole images --------------------------------------------------------------------------------


class _Generator:
    """Prompts, size and seeds, the same for torch and OpenVINO. No prompt comes twice."""

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        self.case, self.engine, self.folder = case, engine, folder
        self.prompts = _captions(folder)
        self.size = scale.pixels(case)

    def warm_up(self) -> None:
        _check_finite(self.generate(99, min(2, self.case.steps))[1])

    def run(self, turn: int) -> float:
        return self.generate(turn, self.case.steps)[0]

    def call(self, turn: int, steps: int) -> dict[str, Any]:
        return {
            "num_inference_steps": steps,
            "guidance_scale": self.case.guidance,
            "height": self.size,
            "width": self.size,
            "use_resolution_binning": False,
            "generator": torch.Generator().manual_seed(turn),
            "output_type": "pt",
        }

    def generate(self, turn: int, steps: int) -> tuple[float, Any]:
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
    """The pipeline with all three components in memory."""

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        super().__init__(case, engine, folder, scale)
        self.pipeline = load_pipeline(folder, compile=False)

    def generate(self, turn: int, steps: int) -> tuple[float, Any]:
        call = self.call(turn, steps) | {"guidance_end": self.case.guidance_end}
        self.pipeline.text_encoder.clear_cache()  # or the negative prompt is encoded only once
        return clock(lambda: self.pipeline(self.prompts[turn], **call).images)


class TorchGenerator(_Generator):
    """diffusers' pipeline; T5 is freed before DiT and VAE start, because memory is short.

    Loading is not timed. T5 is loaded anew for each image, and warmed up before the stopwatch
    starts; DiT and VAE stay in memory if they have 16 bits.
    """

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        super().__init__(case, engine, folder, scale)
        self.dtype, self.kept = _precision(engine), None

    def generate(self, turn: int, steps: int) -> tuple[float, Any]:
        text_seconds, text = self._encode(turn)
        pipeline = self.kept or self._load()
        if self.dtype != torch.float32:
            self.kept = pipeline
        call = {**self.call(turn, steps), **text, "prompt": None, "negative_prompt": None}
        seconds, images = clock(lambda: pipeline(**call).images)
        return text_seconds + seconds, images

    def _encode(self, turn: int) -> tuple[float, dict[str, torch.Tensor]]:
        encoder = self._pipeline(text_encoder=_load_module("t5", self.folder, self.dtype))
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
        transformer = _load_module("dit", self.folder, self.dtype)
        vae = _load_module("vae", self.folder, self.dtype)
        if "compile" in self.engine:
            transformer.compile()
            vae.decoder.compile()
        return self._pipeline(transformer=transformer, vae=vae)

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


# ---- conversion ----------------------------------------------------------------------------------


class Conversion:
    """From the checkpoint's files to the IR; imports and a slow disk do not count."""

    def __init__(self, case: Case, engine: str, folder: Path, scale: Scale):
        self.case, self.engine, self.folder, self.scale = case, engine, folder, scale
        self.kind = "t5" if case.checkpoint == T5_XXL else "dit"

    def warm_up(self) -> None:
        for file in (self.folder / _LOADERS[self.kind][0]).glob("*.safetensors"):
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
        module = _load_module(self.kind, self.folder, torch.bfloat16)
        convert = convert_text_encoder if self.kind == "t5" else convert_transformer
        convert(module, output, weight_format=WEIGHT_FORMATS[self.engine])

    def convert_as_published(self, output: Path) -> None:
        """float32 weights and a plain `ov.convert_model` at the model's own size."""
        module = _load_module(self.kind, self.folder, torch.float32)
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
