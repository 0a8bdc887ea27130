"""What users know from diffusers' other pipelines and PixArt's lack: callbacks, memory calls."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ov_pixart.checks import check, check_shape
from ov_pixart.families import ALPHA

# What a callback can ask for; with guidance, embeddings are those of `[negative, prompt]`.
_REPLACEABLE = ("latents", "prompt_embeds", "prompt_attention_mask")
TENSORS = (*_REPLACEABLE, "negative_prompt_embeds")

StepEndCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]


class FamiliarInterface:
    """Attributes that callbacks read, and calls from diffusers' documentation."""

    _callback_tensor_inputs: ClassVar[list[str]] = list(TENSORS)
    _guidance_scale: float | None = None
    _interrupt = False

    @property
    def guidance_scale(self) -> float | None:
        """Of the call in progress; a callback changes it as `pipe._guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return (self.guidance_scale or 0) > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call in progress."""
        return len(self.scheduler.timesteps)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt` to end the call after its step."""
        return self._interrupt

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """Nothing to do: no weights wait elsewhere. `release_text_encoder` saves memory."""

    enable_sequential_cpu_offload = enable_group_offload = enable_model_cpu_offload

    def load_lora_weights(self, *args, **kwargs) -> None:
        raise ValueError(
            "A converted model takes no LoRA: give it to convert_pipeline(..., lora=...), which "
            "adds it to the checkpoint's weights."
        )

    def enable_vae_tiling(self) -> None:
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()


def check_step_end(callback: Any, tensor_inputs: Any) -> tuple[str, ...]:
    """The names of the tensors that a callback asks for; ValueError for one that cannot work."""
    rule = "a function, or None"
    check(callback is None or callable(callback), "callback_on_step_end", callback, rule)
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        tensor_inputs = callback.tensor_inputs
    fits = isinstance(tensor_inputs, Sequence) and set(tensor_inputs) <= set(TENSORS)
    rule = f"a list of some of {TENSORS}"
    check(fits, "callback_on_step_end_tensor_inputs", tensor_inputs, rule)
    return tuple(tensor_inputs)


@contextlib.contextmanager
def calling_back(
    pipeline: Any, callback: StepEndCallback | None, names: tuple[str, ...], guidance_scale: float
) -> Iterator[None]:
    """Call `callback(pipeline, step, timestep, tensors)` after each step of diffusers' loop.

    PixArt's loop in diffusers has an older callback only, which can replace nothing. Each step of
    it calls the transformer, where embeddings and guidance take effect, and then the scheduler,
    which returns the new latents: these two are wrapped, so that the loop stays diffusers' own.
    """
    pipeline._guidance_scale, pipeline._interrupt = guidance_scale, False
    if callback is None:
        yield
        return
    loop = _StepEnd(pipeline, callback, names)
    with (
        _wrapped(pipeline.transformer, "forward", loop.predict),
        _wrapped(pipeline.scheduler, "step", loop.step),
    ):
        yield


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, wrapper: Callable) -> Iterator[None]:
    """Pass the calls of a method on to `wrapper(method, ...)`."""
    own, method = vars(owner).get(name), getattr(owner, name)
    # with the method's signature, in which diffusers looks for a scheduler's arguments
    setattr(owner, name, functools.wraps(method)(functools.partial(wrapper, method)))
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


class _StepEnd:
    """The wrappers of one call, and the tensors that its callback may see or replace."""

    def __init__(self, pipeline: Any, callback: StepEndCallback, names: tuple[str, ...]):
        self.pipeline, self.callback, self.names = pipeline, callback, names
        self.guidance_scale = pipeline.guidance_scale
        self.tensors: dict[str, torch.Tensor | None] = dict.fromkeys(TENSORS)
        self.noise: torch.Tensor | None = None  # as predicted last
        self.rows = self.steps = 0

    def predict(
        self,
        forward: Callable,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        timestep: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor | None],
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        """The noise, `(B, 8, h, w)`, in latents `(B, 4, h, w)`, with what the callback has changed.

        If it has halved the embeddings, to switch guidance off, the halves of the noise are equal.
        """
        if self.pipeline.interrupt:
            return (self.noise,)  # of the right shape; `step` does not use it
        if self.noise is None:
            self.rows = len(encoder_hidden_states)
            self._keep(encoder_hidden_states, encoder_attention_mask)
        embeds, mask = self.tensors["prompt_embeds"], self.tensors["prompt_attention_mask"]
        rows = len(embeds)
        sizes = {n: size if size is None else size[-rows:] for n, size in added_cond_kwargs.items()}
        (noise,) = forward(
            hidden_states[-rows:],
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask[-rows:],
            timestep=timestep[-rows:],
            added_cond_kwargs=sizes,
            return_dict=False,
        )
        if rows < self.rows:
            noise = torch.cat([noise, noise])
        elif self.guidance_scale > 1 and self.pipeline.guidance_scale != self.guidance_scale:
            # diffusers' loop goes on with the scale it was called with
            negative, positive = noise.chunk(2)
            share = max(self.pipeline.guidance_scale, 1) / self.guidance_scale
            noise = torch.cat([negative, negative + share * (positive - negative)])
        self.noise = noise
        return (noise,)

    def step(
        self, step: Callable, noise: torch.Tensor, timestep: Any, latents: torch.Tensor, **options
    ) -> tuple[torch.Tensor, ...]:
        """The scheduler's step, and the callback; after an interruption, the same latents."""
        if self.pipeline.interrupt:
            return (latents, latents)
        results = list(step(noise, timestep, latents, **options))
        # from one step, α's pipeline takes the scheduler's estimate of the clean latents
        new = 1 if self.pipeline.family is ALPHA and self.pipeline.num_timesteps == 1 else 0
        self.tensors["latents"] = results[new]
        self._call_back(timestep)
        results[new] = self.tensors["latents"]
        self.steps += 1
        return tuple(results)

    def _call_back(self, timestep: Any) -> None:
        """Call the callback, and keep what it returns."""
        given = {name: self.tensors[name] for name in self.names}
        returned = self.callback(self.pipeline, self.steps, timestep, dict(given))
        returned = given if returned is None else returned
        rule = "a dictionary of tensors, or None"
        check(isinstance(returned, dict), "result of callback_on_step_end", returned, rule)
        for name, tensor in returned.items():
            if name in given and tensor is given[name]:
                continue
            argument = f"{name} from callback_on_step_end"
            rule = f"left as it was given: only {_REPLACEABLE} can be replaced"
            check(name in _REPLACEABLE, argument, tensor, rule)
            old, half = self.tensors[name], self.rows // 2
            can_halve = name != "latents" and self.guidance_scale > 1
            is_halved = can_halve and getattr(tensor, "shape", ())[:1] == (half,)
            check_shape(argument, tensor, (half if is_halved else len(old), *old.shape[1:]))
            self.tensors[name] = tensor.to(old.dtype)
        self._keep(self.tensors["prompt_embeds"], self.tensors["prompt_attention_mask"])

    def _keep(self, embeds: torch.Tensor, mask: torch.Tensor) -> None:
        self.tensors["prompt_embeds"], self.tensors["prompt_attention_mask"] = embeds, mask
        guided = self.guidance_scale > 1 and len(embeds) == self.rows
        self.tensors["negative_prompt_embeds"] = embeds.chunk(2)[0] if guided else None
