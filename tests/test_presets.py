"""Presets: what each does to the graphs, and that its images stay close to the source's."""

import numpy as np
import pytest

from ov_pixart.checkpoint import COMPONENTS
from ov_pixart.presets import PRESETS
from tests.support.graphs import is_in_a_block, layers, rounded_inputs
from tests.support.optimized import generate_small

pytestmark = pytest.mark.slow  # NNCF at work


def test_int8_computes_every_matmul_of_the_blocks_in_integers(optimized):
    blocks = {k: v for k, v in layers(optimized("int8"), "transformer").items() if is_in_a_block(k)}
    assert len(blocks) == 2 * 10  # q, k, v and out, twice, and two of the feed-forward
    assert {kind for kind, _ in blocks.values()} <= {"i8", "u8"}
    assert all(rounded for _, rounded in blocks.values())


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_the_spared_layers_keep_integer_weights_and_take_floating_point(optimized, preset):
    found = layers(optimized(preset), "transformer")
    for layer in (
        ".adaln_single.linear/",
        ".caption_projection.",
        ".pos_embed.proj/",
        ".proj_out/",
    ):
        spared = {value for name, value in found.items() if layer in name}
        assert spared == {("u8", False)}, layer


def test_int4_stores_cross_attention_in_4_bits_and_the_rest_of_the_blocks_as_int8_does(optimized):
    blocks = {k: v for k, v in layers(optimized("int4"), "transformer").items() if is_in_a_block(k)}
    assert {value for name, value in blocks.items() if ".attn2." in name} == {("i4", False)}
    assert {value for name, value in blocks.items() if ".attn2." not in name} == {("i8", True)}


@pytest.mark.parametrize("preset", ["int8", "int4", "hybrid"])
def test_positions_and_timesteps_are_never_rounded(optimized, preset):
    touched = rounded_inputs(optimized(preset), "transformer")
    assert touched
    assert not [name for name in touched if "sinusoids" in name or "pos_embed/" in name]


def test_int8_leaves_attention_itself_in_floating_point(optimized):
    touched = rounded_inputs(optimized("int8"), "transformer")
    assert not [name for name in touched if "ScaledDotProductAttention" in name]


@pytest.mark.parametrize("name", COMPONENTS)
def test_int8_weights_stores_all_matrices_in_8_bits_and_rounds_no_activation(optimized, name):
    found = layers(optimized("int8-weights"), name)
    kinds = {kind for layer, (kind, _) in found.items() if "sinusoids" not in layer}
    assert kinds == {"u8"}
    assert not rounded_inputs(optimized("int8-weights"), name)


@pytest.mark.parametrize(("preset", "sensitive"), [("int4", "u8"), ("hybrid", "i4")])
def test_int4_stores_the_text_encoder_in_4_bits(optimized, preset, sensitive):
    kinds = {name: kind for name, (kind, _) in layers(optimized(preset), "text_encoder").items()}
    assert {kind for name, kind in kinds.items() if "SelfAttention.q" in name} == {"i4"}
    assert {kind for name, kind in kinds.items() if "SelfAttention.o/" in name} == {sensitive}
    assert {kind for name, kind in kinds.items() if "embed_tokens" in name} == {"u8"}


def test_hybrid_rounds_the_activations_of_everything_but_matmul(optimized):
    found = layers(optimized("hybrid"), "transformer")
    touched = rounded_inputs(optimized("hybrid"), "transformer")
    assert {kind for name, (kind, _) in found.items() if is_in_a_block(name)} == {"u8"}
    assert touched
    assert not [name for name in touched if name.endswith("/MatMul")]


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_the_vae_computes_in_integers(optimized, preset):
    touched = rounded_inputs(optimized(preset), "vae_decoder")
    assert [name for name in touched if name.endswith("/Convolution")]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_stays_close_to_the_source(optimized, fp16, preset):
    ours, source = (generate_small(folder) for folder in (optimized(preset), fp16))
    assert 0 < np.abs(ours - source).mean() < 0.1  # of 1; 0.3 for two random images


@pytest.mark.parametrize("preset", PRESETS)
def test_only_recipes_with_activation_ranges_or_fitted_scales_need_data(preset):
    row = PRESETS[preset]
    recipes = [getattr(row, name) for name in COMPONENTS]
    assert row.needs_data == any(r.activations or r.scale_estimation for r in recipes)
    assert row.needs_data == (preset != "int8-weights")


def test_a_recipe_needs_the_data_that_its_candidates_need():
    assert PRESETS["int4"].text_encoder.needs_data  # other captions make another text encoder
    assert not PRESETS["int8"].text_encoder.needs_data
