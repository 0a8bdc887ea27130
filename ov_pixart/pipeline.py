"""The α and Σ pipelines: optimum-intel's loading and devices, diffusers' calls."""

import contextlib
import inspect
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from optimum.intel.openvino import modeling_diffusion as ov_diffusion
from optimum.intel.openvino.modeling_diffusion import OVDiffusionPipeline

from ov_pixart.call_checks import CallLimits, complete_call, warn_of_cut_prompts
from ov_pixart.checkpoint import (
    MODEL_INDEX,
    check_openvino_folder,
    check_sizes,
    family_of,
    is_openvino_folder,
    read_model_index,
)
from ov_pixart.checks import check_names, plain
from ov_pixart.components import OVPixArtTextEncoder, OVPixArtTransformer, OVPixArtVae
from ov_pixart.convert import convert_pipeline
from ov_pixart.families import ALPHA, SIGMA, Family, find_family
from ov_pixart.guidance import guidance_interval
from ov_pixart.hub import HubOptions, check_place, fetch_pipeline
from ov_pixart.interface import FamiliarInterface, StepEndCallback, calling_back, check_step_end
from ov_pixart.ir import (
    IR_NAME,
    compile_config,
    device_name,
    read_ir,
)
from ov_pixart.load_options import split_options
from ov_pixart.partial import PartialPipeline, pop_ready_networks, stand_in_transformer
from ov_pixart.quiet import silent_nncf, without_log_message
from ov_pixart.saving import SavedPipeline
from ov_pixart.static_shapes import StaticShapes
from ov_pixart.upstream import dispatch_loading, hide_length_warning


class OVPixArtPipeline(StaticShapes, FamiliarInterface, PartialPipeline, SavedPipeline):
    """What α and Σ share: optimum's pipeline with PixArt's transformer, shapes and checks."""

    family: Family
    main_input_name = "prompt"
    export_feature = "text-to-image"

    def __init__(self, *args, compile: bool = True, release_text_encoder: bool = False, **kwargs):
        """Called by optimum's constructor; users call `from_pretrained`.

        Every way to load a pipeline ends here, so this is where stored compile options are read.
        """
        folder, ready = Path(kwargs["model_save_dir"]), pop_ready_networks(kwargs)
        left_out = (
            kwargs.get("transformer") is None and (folder / "transformer" / IR_NAME).is_file()
        )
        if left_out:  # asked for, or a torch module comes in its place
            compiled = kwargs.get("compile_only", False)
            kwargs["transformer"] = stand_in_transformer(compiled=compiled)
        for name in ("transformer", "vae_decoder"):
            if kwargs.get(name) is None:
                raise FileNotFoundError(
                    f"{str(folder)!r} has no {name}/{IR_NAME}: "
                    "run convert_pipeline once more to finish the folder."
                )
        kwargs["device"] = device_name(kwargs.get("device", "CPU"))
        check_sizes(folder)
        self._turn = threading.RLock()
        inputs = kwargs["transformer"].inputs
        is_dynamic = any(port.get_partial_shape().is_dynamic for port in inputs)
        # Unless asked to free them, keep the shapes that the IRs have: `reshape` may have set them.
        kwargs.setdefault("dynamic_shapes", is_dynamic and kwargs.get("compile_only", False))
        # Compile later (unless all is compiled already): the transformer is about to be replaced.
        super().__init__(*args, compile=compile and kwargs.get("compile_only", False), **kwargs)
        self.is_dynamic = self.is_dynamic or is_dynamic
        transformer = OVPixArtTransformer(self.transformer.model, self, "transformer")
        self.transformer = None if left_out else transformer
        if self.text_encoder is not None:
            self.text_encoder = OVPixArtTextEncoder(self.text_encoder.model, self, "text_encoder")
        self._releases_text_encoder = release_text_encoder
        self.vae = OVPixArtVae(self.vae_decoder, self.vae_encoder)
        for component in self.components.values():
            # A dictionary each: optimum shares one, and settings would leak between components.
            user = dict(kwargs.get("ov_config") or {})
            is_model = not self._compile_only
            component.ov_config = compile_config(component.model, user) if is_model else user
        for name, network in ready.items():
            setattr(self, name, network)
        if self.tokenizer is not None:
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
        if isinstance(self.text_encoder, OVPixArtTextEncoder):
            with self._turn:
                self.text_encoder.release()

    def encode_prompt(
        self, prompt, do_classifier_free_guidance=True, negative_prompt="", *args, **kwargs
    ):
        """As in diffusers; embeddings of recent prompts come from a cache."""
        negative = "" if negative_prompt is None else negative_prompt  # diffusers reads "None"
        with self._turn:
            encoded = super().encode_prompt(
                prompt, do_classifier_free_guidance, negative, *args, **kwargs
            )
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
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **options,
    ) -> "OVPixArtPipeline":
        """Load a pipeline from an OpenVINO folder, or convert a PixArt checkpoint and load that.

        `model_id`: an OpenVINO folder, a diffusers folder or a Hugging Face id of either. A
        checkpoint that is not OpenVINO yet is converted in a temporary folder that is removed with
        the pipeline; `convert_pipeline` or `save_pretrained` keep it. Options of
        `convert_pipeline`, such as `weight_format` and `lora`, apply to this conversion.
        `release_text_encoder`: keep it in memory only while it encodes a new prompt.
        `device`, `ov_config`, `compile` and the rest: as in optimum-intel's OVDiffusionPipeline.

        Raises TypeError for an unknown option, ValueError for a checkpoint of the other family, a
        damaged folder, an unknown device or setting, `trust_remote_code`, or options of a
        conversion for what is converted already, FileNotFoundError for a folder that is missing or
        incomplete.
        """
        if trust_remote_code:
            raise ValueError(
                "trust_remote_code=True is not supported: PixArt needs no code from a model's "
                "folder, leave it out."
            )
        named = inspect.signature(cls.from_pretrained).parameters
        conversion, loading = split_options(f"{cls.__name__}.from_pretrained", options, named)
        hub = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = fetch_pipeline(model_id, HubOptions(**hub), revision=revision)
        family = family_of(folder)
        if family is not cls.family:
            name = family.class_name
            raise ValueError(f"model_id={str(model_id)!r} is a {name}: load it with OV{name}.")
        converted = None
        if not is_openvino_folder(folder):
            converted = Path(tempfile.mkdtemp(prefix="ov-pixart-"))
        elif conversion:
            raise ValueError(
                f"{', '.join(conversion)}= cannot be applied to model_id={str(model_id)!r}, which "
                "is converted already: give them to convert_pipeline, with the checkpoint."
            )
        elsewhere = loading.get("text_encoder", False)
        if elsewhere is not False and not isinstance(elsewhere, ov.Model):
            conversion["text_encoder"] = False  # None, or a network that needs no IR
        try:
            if converted:
                folder = convert_pipeline(folder, converted, **conversion, **hub)
            check_openvino_folder(folder)
            compresses = loading.keys() & {"quantization_config", "load_in_8bit"}
            with silent_nncf() if compresses else contextlib.nullcontext():
                pipeline = super().from_pretrained(folder, **loading)
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

    @property
    def dtype(self) -> torch.dtype:
        """Float32: the precision of inputs and outputs, whatever the device computes in."""
        return torch.float32

    def to(
        self,
        *args: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "OVPixArtPipeline":
        """Move to another device, as in `to("GPU")`; the next call compiles for it.

        A `dtype` has no effect: devices choose their precision, `ov_config` overrides it. Raises
        ValueError for a device that OpenVINO does not have here.
        """
        devices = [arg for arg in (*args, device) if not isinstance(arg, torch.dtype | None)]
        return super().to(device=device_name(devices[0])) if devices else self

    # -- generate --

    def __call__(
        self,
        *args,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs,
    ):
        """Generate images: every argument of diffusers' PixArt pipelines, with the same meaning.

        `guidance_start`, `guidance_end`: shares of the steps. Step i of n is guided where
        start ≤ i/n < end; any other runs the DiT on the prompt alone and takes half the time.

        `callback_on_step_end(pipe, step, timestep, tensors)` is called after each step, as in
        diffusers' other pipelines. `tensors` has the names in `callback_on_step_end_tensor_inputs`
        (see `interface.TENSORS`); those that it returns take effect. `pipe._interrupt = True` ends
        the call with the latents as they are.

        A pipeline with static shapes generates in exactly its own size, without resolution
        binning. Raises ValueError with one line for an argument that does not work.
        """
        signature = inspect.signature(self.auto_model_class.__call__)
        names = [name for name in signature.parameters if name not in ("self", "kwargs")]
        own = inspect.signature(self.__call__).parameters
        check_names(self.family.class_name, kwargs, [*names, *own, "mask_feature"])
        tensors = check_step_end(callback_on_step_end, callback_on_step_end_tensor_inputs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given = {**given.pop("kwargs", {}), **given}
        del given["self"]
        defaults = {name: signature.parameters[name].default for name in names}
        self.check_networks()
        call = complete_call(given, defaults, self._limits)
        start, end = plain(guidance_start), plain(guidance_end)
        interval = guidance_interval(self, call["guidance_scale"], start, end)
        step_end = calling_back(self, callback_on_step_end, tensors, call["guidance_scale"])
        # One caller at a time: the scheduler, the progress bar and the compiled models keep state.
        quiet = without_log_message(self.auto_model_class.__module__, "truncated")
        with self._turn, interval, quiet:
            if self.tokenizer is not None:
                warn_of_cut_prompts(self, call)
            with step_end:  # inside the interval, which must see what a callback has halved
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
            token_pixels=self.token_pixels,
            static=self.static_arguments,
        )


class OVPixArtAlphaPipeline(OVPixArtPipeline, PixArtAlphaPipeline):
    """PixArt-α on OpenVINO: 256, 512 and 1024-MS checkpoints, LCM and DMD among them."""

    family = ALPHA
    auto_model_class = PixArtAlphaPipeline


class OVPixArtSigmaPipeline(OVPixArtPipeline, PixArtSigmaPipeline):
    """PixArt-Σ on OpenVINO: 256, 512, 1024-MS and 2K-MS checkpoints."""

    family = SIGMA
    auto_model_class = PixArtSigmaPipeline


PIPELINES = {ALPHA.name: OVPixArtAlphaPipeline, SIGMA.name: OVPixArtSigmaPipeline}


def find_pipeline(model_id: str | Path, **hub: Any) -> type[OVPixArtPipeline] | None:
    """Our class for a PixArt folder or id, None for every other model.

    Raises FileNotFoundError for an OpenVINO folder that is not finished, and as `check_place`.
    """
    check_place("model_id", model_id)
    if is_openvino_folder(Path(model_id)) and not (Path(model_id) / MODEL_INDEX).is_file():
        read_model_index(Path(model_id))
    try:
        index = OVDiffusionPipeline.load_config(model_id, **hub)
    except (OSError, ValueError):  # optimum has the error for it
        return None
    family = find_family(index.get("_class_name"))
    return PIPELINES[family.name] if family else None


class _OnlyFromText:
    """In the place of the classes that diffusers does not have for PixArt."""

    auto_model_class = PixArtAlphaPipeline  # optimum looks at its name

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "PixArt has no pipeline for image-to-image or inpainting: load it with "
            "OVPipelineForText2Image; docs/real-checkpoints.md shows how to start from an image."
        )


def register_with_optimum() -> None:
    """Register PixArt with optimum's loaders: OVDiffusionPipeline and those of one task."""
    for key, pipeline in (
        ("pixart-alpha", OVPixArtAlphaPipeline),
        ("pixart-sigma", OVPixArtSigmaPipeline),
    ):
        if pipeline not in ov_diffusion.SUPPORTED_OV_PIPELINES:
            ov_diffusion.SUPPORTED_OV_PIPELINES.append(pipeline)
        ov_diffusion.OV_TEXT2IMAGE_PIPELINES_MAPPING[key] = pipeline
        ov_diffusion.OV_IMAGE2IMAGE_PIPELINES_MAPPING[key] = _OnlyFromText
        ov_diffusion.OV_INPAINT_PIPELINES_MAPPING[key] = _OnlyFromText
    dispatch_loading(find_pipeline)


register_with_optimum()
