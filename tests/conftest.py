"""Checkpoints and pipelines that several tests share: built once, on first use."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

import ov_pixart_helper as helper
from ov_pixart import quantize
from tests.support.checkpoints import build_checkpoint
from tests.support.optimized import DATA
from tests.support.parity import load_exact


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """`checkpoint(family)`: a diffusers folder with random weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda family: build_checkpoint(root / family, family))


@pytest.fixture(scope="session")
def converted(tmp_path_factory, checkpoint) -> Callable[[str], Path]:
    """`converted(family)`: the same as an OpenVINO folder, weights in fp32."""
    root = tmp_path_factory.mktemp("converted")
    return cache(
        lambda family: helper.convert_pipeline(
            checkpoint(family), root / family, weight_format="fp32"
        )
    )


@pytest.fixture(scope="session")
def torch_pipeline(checkpoint) -> Callable[[str], DiffusionPipeline]:
    """`torch_pipeline(family)`: diffusers' own pipeline, the reference. Do not alter it."""

    @cache
    def load(family: str) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(checkpoint(family))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def ov_pipeline(converted) -> Callable[..., helper.OVDiffusionPipeline]:
    """`ov_pipeline(family)`: ours, computing in float32. Do not alter it: see `fresh_pipeline`."""
    return cache(lambda family: load_exact(converted(family)))


@pytest.fixture
def fresh_pipeline(converted) -> Callable[..., helper.OVDiffusionPipeline]:
    """`fresh_pipeline(family, **options)`: one that the test has to itself."""
    return lambda family, **options: load_exact(converted(family), **options)


@pytest.fixture(scope="session")
def fp16(tmp_path_factory, checkpoint) -> Path:
    """A random α pipeline with weights in fp16, the source of every preset."""
    return helper.convert_pipeline(checkpoint("alpha"), tmp_path_factory.mktemp("ov") / "fp16")


@pytest.fixture(autouse=True, scope="session")
def no_floor() -> Iterator[None]:
    """Random weights are harder to quantize than any model's: presets apply to them anyway."""
    with pytest.MonkeyPatch.context() as patch:
        for name in quantize.FLOORS:
            patch.setitem(quantize.FLOORS, name, -math.inf)
        yield


@pytest.fixture(scope="session")
def optimized(fp16, no_floor) -> Callable[[str], Path]:
    """`optimized(preset)`: its folder, made once, beside `fp16`."""
    root = fp16.parent
    return cache(lambda preset: helper.optimize_pipeline(fp16, root / preset, preset, **DATA))
