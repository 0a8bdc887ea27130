"""Checks of a pipeline's call, before anything is computed: plain functions, no pipeline needed.

diffusers' own `check_inputs` runs afterwards; here is only what it lets through, or refuses without
the value or the remedy.
"""

import inspect
import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from ov_pixart.checks import (
    check,
    check_shape,
    is_count,
    is_number,
    is_text,
    plain,
    shortened,
)
from ov_pixart.families import ALPHA, Family


@dataclass(frozen=True)
class CallLimits:
    """What a call may ask of a pipeline.

    `static`: arguments whose values the shapes of the models have fixed, with "images" and
    "prompts" for their numbers; empty for a pipeline with free shapes.
    """

    family: Family
    scheduler: SchedulerMixin
    sample_size: int  # side of the native latents
    latent_channels: int
    text_width: int  # of prompt embeddings
    latent_pixels: int  # per latent
    token_pixels: int  # per token of the transformer: latent_pixels times the patch
    static: dict[str, int] = field(default_factory=dict)


def complete_call(
    given: dict[str, Any], defaults: dict[str, Any], limits: CallLimits
) -> dict[str, Any]:
    """The arguments that a call was given, with those of static shapes and defaults filled in.

    Raises ValueError with one line for an argument that does not work.
    """
    call = {name: plain(value) for name, value in {**defaults, **given}.items()}
    if call["negative_prompt_embeds"] is not None and "negative_prompt" not in given:
        call["negative_prompt"] = None  # diffusers takes one of the two
    for name in ("num_inference_steps", "num_images_per_prompt", "max_sequence_length"):
        check(is_count(call[name]), name, call[name], "a whole number from 1")
    scale = call["guidance_scale"]
    check(is_number(scale), "guidance_scale", scale, "a number; up to 1 switches guidance off")
    prompts = _check_prompts(call, limits)
    call |= _static_arguments(given, prompts, limits.static)
    _check_size(call, limits)
    _check_schedule(call, limits)
    _check_noise(call, prompts * call["num_images_per_prompt"], limits)
    kinds = ("pil", "np", "pt", "latent")
    check(call["output_type"] in kinds, "output_type", call["output_type"], f"one of {kinds}")
    callback = call["callback"]
    check(callback is None or callable(callback), "callback", callback, "a function, or None")
    return call


def _check_prompts(call: dict[str, Any], limits: CallLimits) -> int:
    """Check texts or embeddings, and return the number of prompts."""
    prompt, embeds = call["prompt"], call["prompt_embeds"]
    negative, negative_embeds = call["negative_prompt"], call["negative_prompt_embeds"]
    if embeds is None:
        check(is_text(prompt), "prompt", prompt, "a string or a list of at least one string")
        prompts = 1 if isinstance(prompt, str) else len(prompt)
    else:
        check(prompt is None, "prompt", prompt, "None where prompt_embeds is given")
        check_shape("prompt_embeds", embeds, ("prompts", "tokens", limits.text_width))
        mask = call["prompt_attention_mask"]
        check_shape("prompt_attention_mask", mask, tuple(embeds.shape[:2]))
        prompts = len(embeds)
    if negative_embeds is not None:
        rule = "None where prompt is text: encode both, or neither"
        check(embeds is not None, "negative_prompt_embeds", negative_embeds, rule)
        rule = "None where negative_prompt_embeds is given"
        check(negative is None, "negative_prompt", negative, rule)
    elif call["guidance_scale"] > 1:
        fits = negative is None or isinstance(negative, str)
        fits = fits or (is_text(negative) and len(negative) == prompts)
        rule = f"a string, a list of {prompts} as prompt is, or None"
        check(fits, "negative_prompt", negative, rule)
    return prompts


def _static_arguments(
    given: dict[str, Any], prompts: int, static: dict[str, int]
) -> dict[str, Any]:
    """The arguments that static shapes have fixed; other values are refused."""
    fixed = dict(static)
    if "prompts" in fixed:
        rule = f"{fixed['prompts']}, as reshape has fixed, or reshape again"
        check(prompts == fixed["prompts"], "number of prompts", prompts, rule)
    if "images" in fixed:
        images = fixed["images"]
        rule = f"a divisor of {images} images, as reshape has fixed, or reshape again"
        check(images % prompts == 0, "number of prompts", prompts, rule)
        fixed["num_images_per_prompt"] = images // prompts
    arguments = {}
    for name in ("height", "width", "num_images_per_prompt", "max_sequence_length"):
        if name in fixed:
            value = given.get(name) or fixed[name]
            rule = f"{fixed[name]}, as reshape has fixed, or reshape again"
            check(value == fixed[name], name, value, rule)
            arguments[name] = fixed[name]
    if {"height", "width"} & fixed.keys():
        arguments["use_resolution_binning"] = False
    return arguments


def _check_size(call: dict[str, Any], limits: CallLimits) -> None:
    """Bins exist for some checkpoints only; without them, an image is made of whole tokens."""
    binning, bins = call["use_resolution_binning"], tuple(limits.family.bins)
    if binning and limits.sample_size not in bins:
        rule = f"False for a model with sample_size {limits.sample_size} (bins exist for {bins})"
        check(False, "use_resolution_binning", binning, rule)
    for name in ("height", "width"):
        size = call[name]
        if size is not None and binning:  # the nearest bin is generated, and resized to any size
            check(is_count(size), name, size, "a whole number of pixels from 1")
        elif size is not None:
            fits = is_count(size) and size % limits.token_pixels == 0
            check(fits, name, size, f"a multiple of {limits.token_pixels} pixels")


def _check_schedule(call: dict[str, Any], limits: CallLimits) -> None:
    """The scheduler must be able to take these steps."""
    scheduler, steps = type(limits.scheduler).__name__, call["num_inference_steps"]
    given = {name: call[name] for name in ("timesteps", "sigmas") if call[name] is not None}
    check(len(given) < 2, "sigmas", call["sigmas"], "None where timesteps is given")
    for name, values in given.items():
        listed = values.tolist() if hasattr(values, "tolist") else values
        if isinstance(listed, list | tuple):
            listed = [plain(number) for number in listed]
        falls = isinstance(listed, list) and all(map(is_number, listed)) and listed
        falls = falls and all(a > b for a, b in itertools.pairwise(listed))
        check(bool(falls), name, values, "numbers in descending order, at least one")
        takes = name in inspect.signature(limits.scheduler.set_timesteps).parameters
        check(takes, name, values, f"None with {scheduler}, which makes its own")
        steps = len(listed)
    if not given:
        config = limits.scheduler.config
        most = config.get("original_inference_steps") or config.get("num_train_timesteps", 1000)
        rule = f"{most} or fewer with {scheduler}"
        check(steps <= most, "num_inference_steps", steps, rule)
    if steps == 1 and limits.family is ALPHA and _needs_two_steps(limits.scheduler):
        # with one step diffusers reads the clean image from the scheduler, and these return none
        rule = f"2 or more with {scheduler} (one step takes an LCM or DDPM scheduler)"
        check(False, next(iter(given), "num_inference_steps"), given or steps, rule)


def _needs_two_steps(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step returns the next sample only, without the clean one."""
    returned = inspect.signature(scheduler.step).return_annotation
    return SchedulerOutput in get_args(returned)


def _check_noise(call: dict[str, Any], images: int, limits: CallLimits) -> None:
    """Noise comes as latents, from one generator, or from one per image."""
    generator, latents = call["generator"], call["latents"]
    several = isinstance(generator, list | tuple)
    rule = "a torch.Generator on the CPU, where noise is made, or a list of such"
    for one in generator if several else [generator]:
        on_cpu = isinstance(one, torch.Generator) and torch.device(one.device).type == "cpu"
        none = one is None and not several
        check(on_cpu or none or isinstance(one, np.random.RandomState), "generator", one, rule)
    if several:
        rule = f"one generator, or a list of {images}, one per image"
        check(len(generator) == images, "generator", generator, rule)
    if latents is not None:
        sides = ("height / 8", "width / 8")
        if not call["use_resolution_binning"]:
            native = limits.sample_size * limits.latent_pixels
            sides = [(call[x] or native) // limits.latent_pixels for x in ("height", "width")]
        check_shape("latents", latents, (images, limits.latent_channels, *sides))


def check_interval(guidance_scale: float, start: float, end: float) -> None:
    """Check a guidance interval, in shares of the steps; warn where guidance is off anyway.

    Raises ValueError with one line for an interval that does not work.
    """
    for name, share in {"guidance_start": start, "guidance_end": end}.items():
        fits = is_number(share) and 0 <= share <= 1
        check(fits, name, share, "a share of the steps, from 0 to 1")
    check(start <= end, "guidance_start", start, f"guidance_end={end} or less")
    if guidance_scale <= 1 and (start, end) != (0, 1):
        warnings.warn(
            f"guidance_start={start} and guidance_end={end} have no effect: "
            f"guidance_scale={guidance_scale} switches guidance off in every step.",
            stacklevel=4,  # the call of a pipeline, or of compare_pipelines
        )


def warn_of_cut_prompts(pipeline: DiffusionPipeline, call: dict[str, Any]) -> None:
    """Quote the end of a text that exceeds the limit, in one line per text.

    Replaces the messages of diffusers, which covers the prompt only, and of transformers, which
    names another limit.
    """
    limit = call["max_sequence_length"]
    for name in ("prompt", "negative_prompt"):
        if call[name] is None or (name == "negative_prompt" and call["guidance_scale"] <= 1):
            continue
        for text in pipeline._text_preprocessing(call[name], clean_caption=call["clean_caption"]):
            tokens = pipeline.tokenizer(text).input_ids
            if len(tokens) > limit:
                cut = pipeline.tokenizer.decode(tokens[limit - 1 : -1])  # the last one is the end
                warnings.warn(
                    f"{name} has {len(tokens)} tokens, more than max_sequence_length={limit}: "
                    f"“{shortened(cut, 300)}” is cut off.",
                    stacklevel=3,
                )
