"""The embedded checkpoint is what its card says."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LCMScheduler, PixArtAlphaPipeline
from safetensors import safe_open
from transformers import T5Tokenizer

from assets.training import evaluate, oracle, scenes
from assets.training.train import (
    CHECKPOINT,
    LCM_CHECKPOINT,
    LCM_TIMESTEPS,
    encode,
    to_tensor,
    vae_psnr,
)
from ov_pixart_helper import OVPixArtAlphaPipeline, convert_pipeline, default_settings

torch.set_grad_enabled(False)


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(CHECKPOINT / "vae")


@pytest.fixture(scope="module")
def in_openvino(tmp_path_factory):
    """`in_openvino(checkpoint)`: it as an OpenVINO folder; the twin borrows what it lacks."""

    @cache
    def convert(checkpoint):
        lent = (
            {} if checkpoint == CHECKPOINT else {"transformer": checkpoint, "scheduler": checkpoint}
        )
        return convert_pipeline(CHECKPOINT, tmp_path_factory.mktemp("ov"), **lent)

    return convert


@pytest.mark.parametrize(
    ("checkpoint", "models", "megabytes"), [(CHECKPOINT, 3, 40), (LCM_CHECKPOINT, 1, 20)]
)
def test_it_is_small_and_in_half_precision_safetensors(checkpoint, models, megabytes):
    weights = list(checkpoint.rglob("*.safetensors"))
    assert len(weights) == models
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_slice(k).get_dtype() for k in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert sum(f.stat().st_size for f in checkpoint.rglob("*")) <= megabytes * 1e6
    assert not [f for f in checkpoint.rglob("*") if f.suffix in {".bin", ".pt", ".pkl", ".py"}]


def test_the_twin_stops_where_its_training_did():
    scheduler = LCMScheduler.from_pretrained(LCM_CHECKPOINT / "scheduler")
    scheduler.set_timesteps(4)
    assert tuple(scheduler.timesteps.tolist()) == LCM_TIMESTEPS


@pytest.mark.parametrize(("checkpoint", "floor"), [(CHECKPOINT, 0.8), (LCM_CHECKPOINT, 0.6)])
def test_it_paints_what_held_out_captions_ask_for(checkpoint, floor, in_openvino):
    """The list's first 24 captions; the floor leaves room for other machines' roundings."""
    settings = default_settings(in_openvino(checkpoint))
    pipeline = OVPixArtAlphaPipeline.from_pretrained(in_openvino(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    rows = evaluate.read_captions()[:24]
    pictures = evaluate.generate(
        pipeline,
        rows,
        height=256,
        width=256,
        steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    scores = [oracle.score_caption(p, c) for p, (c, _) in zip(pictures, rows, strict=True)]
    assert np.mean([score.right for score in scores]) >= floor
    for attribute in ("count", "colour", "background"):
        assert np.mean([score.attributes.get(attribute, True) for score in scores]) >= 0.9


def test_its_geometry_is_that_of_a_256_pixel_pixart_alpha():
    index = json.loads((CHECKPOINT / "model_index.json").read_text())
    config = json.loads((CHECKPOINT / "transformer" / "config.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline"
    assert config["_class_name"] == "PixArtTransformer2DModel"
    assert (config["sample_size"], config["patch_size"], config["out_channels"]) == (32, 2, 8)
    assert config["use_additional_conditions"] is False


def test_its_tokenizer_reads_from_spiece_model_alone(tmp_path):
    (tmp_path / "spiece.model").write_bytes((CHECKPOINT / "tokenizer/spiece.model").read_bytes())
    caption = "a large red star to the left of a tiny purple hoop on a mint background"
    alone = T5Tokenizer.from_pretrained(tmp_path)
    whole = T5Tokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    assert alone(caption).input_ids == whole(caption).input_ids
    assert 2 not in whole(caption).input_ids  # 2 is <unk>


def test_the_vae_reconstructs_at_30_db_or_better(vae):
    assert vae_psnr(vae, count=32) >= 30


def test_the_oracle_finds_vae_reconstructions_right(vae):
    rng = np.random.default_rng(4)
    shapes, wrong, count = list(evaluate.SHAPES.values()), 0, 1000
    for i in range(0, count, 10):
        drawn = [scenes.sample_scene(rng) for _ in range(10)]
        height, width = shapes[i // 10 % len(shapes)]
        pictures = to_tensor([scenes.render(s, height, width, rng) for s in drawn])
        output = vae.decode(encode(vae, pictures)).sample.clamp(-1, 1)
        arrays = ((output + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        wrong += sum(
            not oracle.score_caption(a, s).right for a, s in zip(arrays, drawn, strict=True)
        )
        assert wrong <= 0.01 * count


def test_a_prompt_becomes_a_picture_that_depends_on_it():
    pipeline = PixArtAlphaPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def paint(prompt):
        generator = torch.Generator().manual_seed(0)
        picture = pipeline(prompt, num_inference_steps=8, generator=generator).images[0]
        assert picture.size == (256, 256)
        return oracle.read_picture(picture)

    assert paint("a large red heart on a white background").background == "white"
    assert paint("a large red heart on a black background").background == "black"
