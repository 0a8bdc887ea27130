"""The guidance interval: steps outside of it run the DiT on the conditional half alone."""

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ov_pixart.call_checks import check_interval


def is_guided(step: int, steps: int, start: float, end: float) -> bool:
    """Whether a step, numbered from 0, lies in the interval: start ≤ step / steps < end.

    Of 20 steps, the interval from 0 to 0.35 has the first seven.
    """
    return start <= step / steps < end


def count_evaluations(
    num_inference_steps: int,
    guidance_scale: float,
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
) -> int:
    """Evaluations of the DiT per image: two in a guided step, one in any other."""
    steps, interval = num_inference_steps, (guidance_start, guidance_end)
    guided = sum(is_guided(step, steps, *interval) for step in range(steps))
    return steps + (guided if guidance_scale > 1 else 0)


def guidance_interval(
    pipeline: DiffusionPipeline, guidance_scale: float, start: float, end: float
) -> contextlib.AbstractContextManager[None]:
    """Guide only a part of the steps of one call of `pipeline`, OpenVINO or torch.

    `start`, `end`: shares of the steps, see `is_guided`. Raises ValueError for numbers that do not
    work; warns where guidance is off anyway.
    """
    check_interval(guidance_scale, start, end)
    if guidance_scale <= 1 or (start, end) == (0, 1):
        return contextlib.nullcontext()
    return _limited_guidance(pipeline, start, end)


@contextlib.contextmanager
def _limited_guidance(pipeline: DiffusionPipeline, start: float, end: float) -> Iterator[None]:
    """Replace the transformer's `forward` while one call of the pipeline runs.

    The pipeline sends unconditional and conditional rows as one batch, and extrapolates from the
    first to the second half of the answer. Outside the interval the DiT gets the second half only;
    its prediction is returned in both places, so that extrapolating does not change it. Steps are
    counted by calls of the DiT, of which some schedulers make `order` per step.
    """
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    forward, batches = transformer.forward, []  # the rows of every call so far

    def limited(hidden_states: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor]:
        step = len(batches) // scheduler.order
        steps = math.ceil(len(scheduler.timesteps) / scheduler.order)
        batches.append(len(hidden_states))
        is_halved = batches[-1] < batches[0]  # by a callback that has switched guidance off
        if is_halved or is_guided(step, steps, start, end):
            return forward(hidden_states, **inputs)
        rows = len(hidden_states) // 2
        (sample,) = forward(hidden_states[rows:], **_without_first(rows, inputs))
        return (torch.cat([sample, sample]),)

    replaced = vars(transformer).get("forward")  # such as one with a stopwatch
    transformer.forward = limited
    try:
        yield
    finally:
        del transformer.forward
        if replaced is not None:
            transformer.forward = replaced


def _without_first(rows: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the DiT without the first rows of each tensor."""
    halves = {}
    for name, value in inputs.items():
        if isinstance(value, dict):  # size conditions
            halves[name] = _without_first(rows, value)
        else:
            halves[name] = value[rows:] if isinstance(value, torch.Tensor) else value
    return halves


class _IntervalInCall:
    """Adds `guidance_start` and `guidance_end` to the call of a torch pipeline."""

    def __call__(
        self, *args: Any, guidance_start: float = 0.0, guidance_end: float = 1.0, **kwargs: Any
    ) -> Any:
        """As in diffusers; steps outside the interval are not guided: see `guidance_interval`."""
        call = inspect.signature(super().__call__).bind(*args, **kwargs)
        call.apply_defaults()
        scale = call.arguments["guidance_scale"]
        with guidance_interval(self, scale, guidance_start, guidance_end):
            return super().__call__(*args, **kwargs)


def with_interval(torch_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The same pipeline, whose call also takes `guidance_start` and `guidance_end`."""
    return type(torch_class.__name__, (_IntervalInCall, torch_class), {})
