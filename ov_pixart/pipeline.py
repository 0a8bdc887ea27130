"""The α and Σ pipelines: optimum-intel's loading and devices, diffusers' calls, static shapes."""

import inspect
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from optimum.intel.openvino import modeling_diffusion as ov_diffusion
from optimum.intel.openvino.modeling_diffusion import OVDiffusionPipeline

from ov_pixart.call_checks import CallLimits, complete_call, warn_of_cut_prompts
from ov_pixart.checkpoint import (
    COMPONENTS,
    MODEL_INDEX,
    check_openvino_folder,
    check_sizes,
    family_of,
    is_openvino_folder,
)
from ov_pixart.checks import check, is_count
from ov_pixart.components import OVPixArtTextEncoder, OVPixArtTransformer, OVPixArtVae
from ov_pixart.convert import convert_pipeline
from ov_pixart.families import ALPHA, SIGMA, Family
from ov_pixart.guidance import guidance_interval
from ov_pixart.hub import HubOptions, fetch_pipeline
from ov_pixart.ir import (
    IR_NAME,
    check_device,
    compile_config,
    read_ir,
    reshape_inputs,
    static_length,
)
from ov_pixart.quiet import without_log_message
from ov_pixart.storage import RECORDS
from ov_pixart.upstream import hide_length_warning


class OVPixArtPipeline(OVDiffusionPipeline):
    """What α and Σ share: optimum's pipeline with PixArt's transformer, shapes and checks."""

    family: Family
    main_input_name = "prompt"
    export_feature = "text-to-image"

    def __init__(self, *args, compile: bool = True, release_text_encoder: bool = False, **kwargs):
        """Called by optimum's constructor; users call `from_pretrained`.

        Every way to load a pipeline ends here, so this is where stored compile options are read.
        """
        for name in ("transformer", "vae_decoder"):
            if kwargs.get(name) is None:
                raise FileNotFoundError(
                    f"{str(kwargs.get('model_save_dir'))!r} has no {name}/{IR_NAME}: "
                    "run convert_pipeline once more to finish the folder."
                )
        check_device(kwargs.get("device", "CPU"))
        check_sizes(Path(kwargs["model_save_dir"]))
        self._turn = threading.RLock()
        # Compile later (unless all is compiled already): the transformer is about to be replaced.
        super().__init__(*args, compile=compile and kwargs.get("compile_only", False), **kwargs)
        self.transformer = OVPixArtTransformer(self.transformer.model, self, "transformer")
        if self.text_encoder is not None:
            self.text_encoder = OVPixArtTextEncoder(self.text_encoder.model, self, "text_encoder")
        self._releases_text_encoder = release_text_encoder
        self.vae = OVPixArtVae(self.vae_decoder, self.vae_encoder)
        for component in self.components.values():
            # A dictionary each: optimum shares one, and settings would leak between components.
            user = dict(kwargs.get("ov_config") or {})
            is_model = not self._compile_only
            component.ov_config = compile_config(component.model, user) if is_model else user
        hide_length_warning(self.tokenizer)  # `warn_of_cut_prompts` replaces it
        if release_text_encoder:
            self.release_text_encoder()
        if compile:
            self.compile()

    def compile(self) -> None:
        """Compile all components, except a text encoder that is loaded only while it encodes."""
        for name, component in self.components.items():
            if name != "text_encoder" or not self._releases_text_encoder:
                component.compile()

    def release_text_encoder(self) -> None:
        """Unload the text encoder, most of the memory, until a new prompt needs it.

        The embeddings of the last prompts stay. `from_pretrained(..., release_text_encoder=True)`
        does this after every prompt, and does not load it before the first. Raises
        FileNotFoundError where its IR is no longer on disk.
        """
        if self.text_encoder is not None:
            with self._turn:
                self.text_encoder.release()

    def encode_prompt(self, *args, **kwargs):
        """As in diffusers; embeddings of recent prompts come from a cache."""
        with self._turn:
            encoded = super().encode_prompt(*args, **kwargs)
            if self._releases_text_encoder:
                self.release_text_encoder()
            return encoded

    # -- load and save --

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        export: bool = False,
        *,
        weight_format: str | dict[str, str] = "fp16",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **kwargs,
    ) -> "OVPixArtPipeline":
        """Load a pipeline from an OpenVINO folder, or convert a PixArt checkpoint and load that.

        `model_id`: an OpenVINO folder, a diffusers folder or a Hugging Face id of either. A
        checkpoint that is not OpenVINO yet is converted to `weight_format` in a temporary folder
        that is removed with the pipeline; `convert_pipeline` or `save_pretrained` keep it.
        `release_text_encoder`: keep it in memory only while it encodes a new prompt.
        `device`, `ov_config`, `compile` and the rest: as in optimum-intel's OVDiffusionPipeline.

        Raises ValueError for a checkpoint of the other family, a damaged folder, an unknown device
        or `trust_remote_code`, FileNotFoundError for a folder that is missing or incomplete.
        """
        if trust_remote_code:
            raise ValueError(
                "trust_remote_code=True is not supported: PixArt needs no code from a model's "
                "folder, leave it out."
            )
        hub = HubOptions(cache_dir, token, local_files_only)
        folder = fetch_pipeline(model_id, hub, revision=revision)
        family = family_of(folder)
        if family is not cls.family:
            name = family.class_name
            raise ValueError(f"model_id={str(model_id)!r} is a {name}: load it with OV{name}.")
        converted = None
        if not is_openvino_folder(folder):
            converted = Path(tempfile.mkdtemp(prefix="ov-pixart-"))
        try:
            if converted:
                folder = convert_pipeline(folder, converted, weight_format=weight_format)
            check_openvino_folder(folder)
            pipeline = super().from_pretrained(folder, **kwargs)
        except BaseException:
            if converted:
                shutil.rmtree(converted, ignore_errors=True)
            raise
        if converted:
            weakref.finalize(pipeline, shutil.rmtree, converted, ignore_errors=True)
        return pipeline

    @staticmethod
    def load_model(file_name: str | Path, quantization_config: Any = None) -> ov.Model:
        """Read one IR; raises ValueError where it is damaged."""
        return read_ir(file_name)

    @staticmethod
    def _compile_model(model, device=None, ov_config=None, model_save_dir=None):
        """Compile straight from disk (`compile_only=True`), stored options included."""
        config = compile_config(read_ir(model), ov_config or {})
        return OVDiffusionPipeline._compile_model(model, device, config, model_save_dir)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """Write the pipeline to a folder, `model_index.json` last.

        Raises ValueError where `save_directory` is a file, or the pipeline's own folder.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory={str(folder)!r} is a file: name a folder.")
        if folder.resolve() == Path(self.model_save_dir).resolve():
            raise ValueError(
                f"save_directory={str(folder)!r} is where this pipeline reads its weights from: "
                "choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name in (MODEL_INDEX, *(f"{part}/{file}" for part in COMPONENTS for file in RECORDS)):
            (folder / name).unlink(missing_ok=True)  # of an earlier pipeline
        self._save_pretrained(folder)
        self._save_config(folder)
        if push_to_hub:
            return self.push_to_hub(folder, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Float32: the precision of inputs and outputs, whatever the device computes in."""
        return torch.float32

    def to(self, *args, device: str | None = None, **kwargs) -> "OVPixArtPipeline":
        """Move to another device, as in `to("GPU")`; the next call compiles for it.

        Raises ValueError for a device that OpenVINO does not have here.
        """
        for name in (*args, device):
            if isinstance(name, str):
                check_device(name)
        return super().to(*args, device=device, **kwargs)

    # -- static shapes --

    @property
    def batch_size(self) -> int:
        """Prompts per call that the components are shaped for, -1 if any number."""
        if self.text_encoder is None:
            return static_length(self.transformer.model.inputs[0].get_partial_shape()[0])
        return static_length(self.text_encoder.input_shape[0])

    def reshape(
        self,
        batch_size: int,
        height: int,
        width: int,
        num_images_per_prompt: int = -1,
        num_frames: int = -1,
        *,
        max_sequence_length: int | None = None,
    ) -> "OVPixArtPipeline":
        """Fix the shapes of all components (-1: keep free), which some devices require.

        `height`, `width` in pixels, divisible by 16. `max_sequence_length`: tokens; fixed to the
        family's own (α 120, Σ 300) where everything else is fixed. Guidance may be on or off at
        any call: see `OVPixArtTransformer`. `num_frames` is for video models, and ignored.

        Raises ValueError for other numbers, or with `compile_only=True`.
        """
        if self._compile_only:
            raise ValueError(
                "reshape does not work with compile_only=True: load the pipeline without it."
            )
        counts = {"batch_size": batch_size, "num_images_per_prompt": num_images_per_prompt}
        for name, value in counts.items():
            check(is_count(value) or value == -1, name, value, "a whole number from 1, or -1")
        grid = self._token_pixels
        for name, value in {"height": height, "width": width}.items():
            fits = value == -1 or (is_count(value) and value % grid == 0)
            check(fits, name, value, f"a multiple of {grid} pixels, or -1")
        if max_sequence_length is not None:
            rule = "a whole number from 1"
            check(is_count(max_sequence_length), "max_sequence_length", max_sequence_length, rule)

        self.is_dynamic = -1 in {batch_size, height, width, num_images_per_prompt}
        tokens = max_sequence_length or (-1 if self.is_dynamic else self.family.max_tokens)
        images = -1 if -1 in counts.values() else batch_size * num_images_per_prompt
        rows, columns = (s if s == -1 else s // self.vae_scale_factor for s in (height, width))

        reshape_inputs(
            self.transformer.model,
            hidden_states={0: images, 2: rows, 3: columns},
            timestep={0: images},
            encoder_hidden_states={0: images, 1: tokens},
            encoder_attention_mask={0: images, 1: tokens},
            resolution={0: images},
            aspect_ratio={0: images},
        )
        reshape_inputs(self.vae_decoder.model, latent_sample={0: images, 2: rows, 3: columns})
        if self.text_encoder is not None:
            text = {0: batch_size, 1: tokens}
            reshape_inputs(self.text_encoder.model, input_ids=text, attention_mask=text)
        self.clear_requests()
        return self

    # -- generate --

    def __call__(self, *args, guidance_start: float = 0.0, guidance_end: float = 1.0, **kwargs):
        """Generate images: every argument of diffusers' PixArt pipelines, with the same meaning.

        `guidance_start`, `guidance_end`: shares of the steps. Step i of n is guided where
        start ≤ i/n < end; any other runs the DiT on the prompt alone and takes half the time.

        A pipeline with static shapes generates in exactly its own size, without resolution
        binning. Raises ValueError with one line for an argument that does not work.
        """
        signature = inspect.signature(self.auto_model_class.__call__)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        extra = given.pop("kwargs", {})  # diffusers would ignore these
        if unknown := extra.keys() - {"mask_feature"}:
            raise TypeError(f"{min(unknown)!r} is not an argument of {self.family.class_name}.")
        given = {**extra, **given}
        del given["self"]
        defaults = {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if name not in ("self", "kwargs")
        }
        call = complete_call(given, defaults, self._limits)
        interval = guidance_interval(self, call["guidance_scale"], guidance_start, guidance_end)
        # One caller at a time: the scheduler, the progress bar and the compiled models keep state.
        quiet = without_log_message(self.auto_model_class.__module__, "truncated")
        with self._turn, interval, quiet:
            warn_of_cut_prompts(self, call)
            return super().__call__(**call)

    @property
    def _limits(self) -> CallLimits:
        config = self.transformer.config
        return CallLimits(
            family=self.family,
            scheduler=self.scheduler,
            sample_size=config.sample_size,
            latent_channels=config.in_channels,
            text_width=config.caption_channels or config.cross_attention_dim,
            latent_pixels=self.vae_scale_factor,
            token_pixels=self._token_pixels,
            static=self._static_arguments,
        )

    @property
    def _token_pixels(self) -> int:
        """Pixels per token of the transformer: 8 in the VAE times 2 in the patch."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    @property
    def _static_arguments(self) -> dict[str, int]:
        """Arguments of a call that static shapes have fixed, and their values."""
        images, tokens, _ = self.transformer.model.input("encoder_hidden_states").partial_shape
        lengths = {
            "height": self.height,
            "width": self.width,
            "max_sequence_length": static_length(tokens),
            "images": static_length(images),
            "prompts": self.batch_size,
        }
        return {name: value for name, value in lengths.items() if value != -1}


class OVPixArtAlphaPipeline(OVPixArtPipeline, PixArtAlphaPipeline):
    """PixArt-α on OpenVINO: 256, 512 and 1024-MS checkpoints, LCM and DMD among them."""

    family = ALPHA
    auto_model_class = PixArtAlphaPipeline


class OVPixArtSigmaPipeline(OVPixArtPipeline, PixArtSigmaPipeline):
    """PixArt-Σ on OpenVINO: 256, 512, 1024-MS and 2K-MS checkpoints."""

    family = SIGMA
    auto_model_class = PixArtSigmaPipeline


PIPELINES = {ALPHA.name: OVPixArtAlphaPipeline, SIGMA.name: OVPixArtSigmaPipeline}


def register_with_optimum() -> None:
    """Register PixArt with optimum's loaders: OVDiffusionPipeline, OVPipelineForText2Image."""
    for key, pipeline in (
        ("pixart-alpha", OVPixArtAlphaPipeline),
        ("pixart-sigma", OVPixArtSigmaPipeline),
    ):
        if pipeline not in ov_diffusion.SUPPORTED_OV_PIPELINES:
            ov_diffusion.SUPPORTED_OV_PIPELINES.append(pipeline)
        ov_diffusion.OV_TEXT2IMAGE_PIPELINES_MAPPING[key] = pipeline


register_with_optimum()
