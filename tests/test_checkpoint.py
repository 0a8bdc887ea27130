"""The embedded checkpoint is what its card says."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LCMScheduler, PixArtAlphaPipeline
from safetensors import safe_open
from transformers import T5EncoderModel, T5Tokenizer

from ov_pixart_helper import convert_pipeline, default_settings, image_sizes, load_pipeline
from pixart_tiny import evaluate, oracle, render, scenes

CHECKPOINT = evaluate.CHECKPOINT
CARD = CHECKPOINT / "README.md"
FEW_STEP_CHECKPOINT = Path("assets/pixart-tiny-lcm")


@pytest.fixture(autouse=True, scope="module")
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(CHECKPOINT / "vae")


@pytest.fixture(scope="module")
def in_openvino(tmp_path_factory):
    """`in_openvino(checkpoint)`: it as an OpenVINO folder; the few-step model borrows the rest."""

    @cache
    def convert(checkpoint):
        lent = (
            {} if checkpoint == CHECKPOINT else {"transformer": checkpoint, "scheduler": checkpoint}
        )
        return convert_pipeline(CHECKPOINT, tmp_path_factory.mktemp("ov"), **lent)

    return convert


@pytest.mark.parametrize(
    ("checkpoint", "models", "megabytes"), [(CHECKPOINT, 3, 40), (FEW_STEP_CHECKPOINT, 1, 20)]
)
def test_it_is_small_and_in_half_precision_safetensors(checkpoint, models, megabytes):
    weights = list(checkpoint.rglob("*.safetensors"))
    assert len(weights) == models
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_slice(k).get_dtype() for k in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert sum(f.stat().st_size for f in checkpoint.rglob("*")) <= megabytes * 1e6
    assert not [f for f in checkpoint.rglob("*") if f.suffix in {".bin", ".pt", ".pkl", ".py"}]


def test_the_few_step_model_stops_at_the_timesteps_of_its_training():
    scheduler = LCMScheduler.from_pretrained(FEW_STEP_CHECKPOINT / "scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "floor"), [(CHECKPOINT, 0.8), (FEW_STEP_CHECKPOINT, 0.6)])
def test_it_generates_what_held_out_captions_ask_for(checkpoint, floor, in_openvino):
    """The list's first 24 captions; the floor leaves room for other machines' roundings."""
    settings = default_settings(in_openvino(checkpoint))
    pipeline = load_pipeline(in_openvino(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    rows = evaluate.read_captions()[:24]
    images = evaluate.generate(
        pipeline,
        rows,
        height=256,
        width=256,
        steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    scores = [oracle.score_caption(i, c) for i, (c, _) in zip(images, rows, strict=True)]
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


@pytest.mark.slow
def test_the_vae_reconstructs_at_30_db_or_better(vae):
    assert evaluate.vae_psnr(vae, count=8) >= 30


@pytest.mark.slow
def test_the_oracle_finds_vae_reconstructions_right(vae):
    rng = np.random.default_rng(4)
    sizes, wrong, count = list(image_sizes(CHECKPOINT).values()), 0, 200
    for i in range(0, count, 10):
        drawn = [scenes.sample_scene(rng) for _ in range(10)]
        size = sizes[i // 10 % len(sizes)]
        images = evaluate.reconstruct(vae, [render.render_scene(s, *size, rng) for s in drawn])
        wrong += sum(
            not oracle.score_caption(image, scene).right
            for image, scene in zip(images, drawn, strict=True)
        )
        assert wrong <= 0.01 * count


def test_the_cards_example_loads_all_components_in_one_precision():
    assert 'PixArtAlphaPipeline.from_pretrained("assets/pixart-tiny")' in CARD.read_text()
    assert T5EncoderModel.from_pretrained(CHECKPOINT / "text_encoder").dtype is torch.float32
    assert AutoencoderKL.from_pretrained(CHECKPOINT / "vae").dtype is torch.float32


@pytest.mark.slow
def test_a_prompt_becomes_an_image_that_depends_on_it():
    pipeline = PixArtAlphaPipeline.from_pretrained(CHECKPOINT)  # as in its card
    pipeline.set_progress_bar_config(disable=True)

    def background(prompt):
        generator = torch.Generator().manual_seed(0)
        image = pipeline(prompt, num_inference_steps=8, generator=generator).images[0]
        assert image.size == (256, 256)
        return oracle.read_picture(image).background

    assert background("a large red heart on a white background") == "white"
    assert background("a large red heart on a black background") == "black"
