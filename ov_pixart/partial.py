"""Pipelines without some components, or with torch modules in the places of compiled ones."""

import inspect
from typing import Any

import openvino as ov
import torch
from optimum.intel.openvino.modeling_diffusion import (
    OVDiffusionPipeline,
    OVModelVae,
    OVPipelinePart,
)

from ov_pixart.checkpoint import is_scheduler_for_pixart
from ov_pixart.checks import check, check_names, is_text
from ov_pixart.ir import static_length

_READY = (torch.nn.Module, OVPipelinePart, OVModelVae)
_NETWORKS = ("text_encoder", "transformer", "vae")


def pop_ready_networks(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take out of constructor arguments what needs no IR: torch modules, other pipelines' parts."""
    given = {name: arguments.get(name) for name in _NETWORKS}
    ready = {name: value for name, value in given.items() if isinstance(value, _READY)}
    for name in ready:
        arguments[name] = None
    return ready


def stand_in_transformer(*, compiled: bool) -> ov.Model | ov.CompiledModel:
    """A graph that does nothing: optimum's constructor insists on a transformer."""
    latents = ov.opset13.parameter([-1, 4, -1, -1], ov.Type.f32, name="hidden_states")
    latents.output(0).set_names({"hidden_states"})
    model = ov.Model([ov.opset13.result(latents)], [latents])
    return ov.Core().compile_model(model, "CPU") if compiled else model


class PartialPipeline(OVDiffusionPipeline):
    """What lets a pipeline do without a network, or with a torch module, which is never saved."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises TypeError for a network or a scheduler that cannot be used."""
        is_torch = isinstance(value, torch.nn.Module)
        may_be_none = name in ("text_encoder", "transformer")
        fits, remedy = True, "a module of diffusers or transformers, or another pipeline's"
        if name == "scheduler":
            fits = is_scheduler_for_pixart(type(value))
            remedy = "a scheduler of diffusers for models that predict noise"
        elif name in _NETWORKS and is_torch:
            fits = hasattr(value, "config") and hasattr(value, "dtype")
        elif name in _NETWORKS:
            fits = isinstance(value, _READY) or (may_be_none and value is None)
        if not fits:
            raise TypeError(f"{name}={type(value).__name__} cannot be used: assign {remedy}.")
        super().__setattr__(name, value)

    @property
    def components(self) -> dict[str, OVPipelinePart]:
        """The compiled components by name, swapped ones included, torch modules left out."""
        halves = {f"vae_{name}": getattr(self.vae, name, None) for name in ("decoder", "encoder")}
        found = {**super().components, **halves}
        return {name: one for name, one in found.items() if isinstance(one, OVPipelinePart)}

    @property
    def _ov_model_names(self) -> list[str]:  # what optimum saves
        return list(self.components)

    @property
    def height(self) -> int:
        """Pixels that static shapes have fixed, -1 without."""
        return self._static_pixels(axis=2)

    @property
    def width(self) -> int:
        """As `height`."""
        return self._static_pixels(axis=3)

    def _static_pixels(self, axis: int) -> int:
        if not isinstance(self.transformer, OVPipelinePart):
            return -1
        shape = self.transformer.model.input("hidden_states").get_partial_shape()
        length = static_length(shape[axis])
        return length if length == -1 else length * self.vae_scale_factor

    def encode_prompt(self, *args, **kwargs):
        """As in diffusers.

        Raises ValueError for text that there is no text encoder for, or for what is no text,
        TypeError for a misspelt argument.
        """
        signature = inspect.signature(self.auto_model_class.encode_prompt)
        check_names("encode_prompt", kwargs, [*signature.parameters, "mask_feature"])
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        if call.arguments["prompt_embeds"] is None:
            prompt = call.arguments["prompt"]
            check(is_text(prompt), "prompt", prompt, "a string or a list of at least one string")
        needed = ["prompt_embeds"]
        if call.arguments["do_classifier_free_guidance"]:
            needed.append("negative_prompt_embeds")
        missing = [name for name in needed if call.arguments[name] is None]
        absent = [name for name in ("text_encoder", "tokenizer") if getattr(self, name) is None]
        if missing and absent:
            masks = ", ".join(
                f"{one}= with {one.replace('embeds', 'attention_mask')}=" for one in missing
            )
            raise ValueError(
                f"This pipeline has no {absent[0].replace('_', ' ')}: give {masks}, as "
                "encode_prompt of a whole pipeline returns them, or load it with one."
            )
        return super().encode_prompt(*args, **kwargs)

    def check_networks(self) -> None:
        """Raise ValueError without a transformer, and for a torch module in 16 bits."""
        if self.transformer is None:
            raise ValueError(
                "This pipeline was loaded with transformer=None and only encodes prompts, with "
                "encode_prompt: load it again with its transformer."
            )
        for name in _NETWORKS:
            network = getattr(self, name)
            if isinstance(network, torch.nn.Module) and network.dtype != torch.float32:
                raise ValueError(
                    f"pipeline.{name} is in {network.dtype}, and the others pass float32: assign "
                    f"{name}.float()."
                )
