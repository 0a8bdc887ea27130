"""Pipelines that lack a network, or have one of torch's: they work, or one line says why not."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
)
from transformers import T5EncoderModel

import ov_pixart_helper as helper
from ov_pixart.ir import read_ir
from tests.support.parity import F32, assert_same, generate, load_exact
from tests.support.refused import refused

NAMES = ("prompt_embeds", "prompt_attention_mask")
NAMES += tuple(f"negative_{name}" for name in NAMES)


def embed(pipeline, **options):
    """Arguments of a call with embeddings in place of its text."""
    prompt = "a small red circle above the sea"
    tensors = pipeline.encode_prompt(prompt, max_sequence_length=40, **options)
    return {"prompt": None, "negative_prompt": None, **dict(zip(NAMES, tensors, strict=True))}


# ---- what is left out ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_embeddings_are_enough_without_text_encoder_and_tokenizer(
    family, fresh_pipeline, ov_pipeline, caplog
):
    whole = ov_pipeline(family)
    for left_out in ({"text_encoder": None}, {"text_encoder": None, "tokenizer": None}):
        lean = fresh_pipeline(family, **left_out)
        assert_same(generate(lean, **embed(whole)), generate(whole), 0)
        unguided = embed(whole, do_classifier_free_guidance=False)
        off = {"guidance_scale": 1.0}
        assert_same(generate(lean, **unguided, **off), generate(whole, **off), 0)
    assert "upstream has changed" not in caplog.text


def test_text_without_a_text_encoder_is_refused_in_one_line(fresh_pipeline, ov_pipeline):
    whole = ov_pipeline("alpha")
    some = {name: value for name, value in embed(whole).items() if "negative" not in name}
    for left_out, missing in (("text_encoder", "no text encoder"), ("tokenizer", "no tokenizer")):
        lean = fresh_pipeline("alpha", **{left_out: None})
        with refused(
            ValueError, missing, "prompt_embeds= with prompt_attention_mask=", "negative_"
        ):
            generate(lean)
        with refused(ValueError, missing, "give negative_prompt_embeds="):
            generate(lean, **some)
        with refused(ValueError, missing, "encode_prompt"):
            lean.encode_prompt("a circle")


def test_a_pipeline_without_a_transformer_encodes(fresh_pipeline, ov_pipeline, tmp_path):
    """diffusers' recipe for little memory: encode first, generate later."""
    first = fresh_pipeline("alpha", transformer=None, release_text_encoder=True)
    assert "transformer" not in first.components
    second = fresh_pipeline("alpha", text_encoder=None)
    assert_same(generate(second, **embed(first)), generate(ov_pipeline("alpha")), 0)
    with refused(ValueError, "transformer=None", "only encodes", "load it again"):
        generate(first)
    with refused(ValueError, "transformer", "an OpenVINO component"):
        first.save_pretrained(tmp_path / "saved")
    first.reshape(1, 64, 64, 1, max_sequence_length=40)
    embed(first)
    first.to("CPU")


def test_a_pipeline_without_a_transformer_may_be_compiled_only(fresh_pipeline, ov_pipeline):
    ours = embed(fresh_pipeline("alpha", transformer=None, compile_only=True))
    expected = embed(ov_pipeline("alpha"))
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)


@pytest.mark.slow
def test_a_checkpoint_is_converted_without_the_text_encoder_that_is_not_wanted(
    checkpoint, ov_pipeline
):
    options = {"text_encoder": None, "ov_config": F32, "weight_format": "fp32"}
    lean = helper.OVPixArtAlphaPipeline.from_pretrained(checkpoint("alpha"), **options)
    assert not (lean.model_save_dir / "text_encoder").exists()
    lean.set_progress_bar_config(disable=True)
    assert_same(generate(lean, **embed(ov_pipeline("alpha"))), generate(ov_pipeline("alpha")), 0)


def test_static_shapes_take_embeddings_of_one_prompt_for_all_images(fresh_pipeline, ov_pipeline):
    lean = fresh_pipeline("alpha", text_encoder=None).reshape(1, 64, 64, 2, max_sequence_length=40)
    call = embed(ov_pipeline("alpha"))
    expected = generate(ov_pipeline("alpha"), num_images_per_prompt=2)
    assert_same(generate(lean, **call), expected)
    three = {name: one if one is None else torch.cat([one] * 3) for name, one in call.items()}
    with refused(ValueError, "number of prompts=3", "divisor of 2"):
        generate(lean, **three)


def test_a_vae_is_not_left_out(fresh_pipeline):
    for name in ("vae", "vae_decoder"):
        with refused(ValueError, f"{name}=None", "output_type='latent'"):
            fresh_pipeline("alpha", **{name: None})


# ---- networks of torch --------------------------------------------------------------------------

CLASSES = {
    "text_encoder": T5EncoderModel,
    "transformer": PixArtTransformer2DModel,
    "vae": AutoencoderKL,
}


def torch_network(checkpoint, name):
    return CLASSES[name].from_pretrained(checkpoint("alpha"), subfolder=name)


@pytest.mark.parametrize("name", CLASSES)
def test_a_network_of_torch_generates_the_same_image(
    name, checkpoint, fresh_pipeline, ov_pipeline, tmp_path
):
    expected = generate(ov_pipeline("alpha"))
    network = torch_network(checkpoint, name)
    assigned = fresh_pipeline("alpha")
    setattr(assigned, name, network)
    loaded = fresh_pipeline("alpha", **{name: network})
    for pipeline in (assigned, loaded):
        assert_same(generate(pipeline), expected)
        pipeline.compile()
        pipeline.release_text_encoder()
        assert_same(generate(pipeline, seed=1), generate(ov_pipeline("alpha"), seed=1))
    with refused(ValueError, f"{name}=", type(network).__name__, "an OpenVINO component"):
        assigned.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_networks_of_torch_work_beside_static_shapes(checkpoint, fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha").reshape(1, 64, 64, 1, max_sequence_length=40)
    pipeline.vae = torch_network(checkpoint, "vae")
    pipeline.text_encoder = torch_network(checkpoint, "text_encoder")
    assert (pipeline.height, pipeline.width) == (64, 64)
    assert_same(generate(pipeline), generate(ov_pipeline("alpha")))


def test_an_autoencoder_tiny_of_torch_decodes(fresh_pipeline):
    pipeline = fresh_pipeline("alpha")
    pipeline.vae = AutoencoderTiny().eval()
    assert generate(pipeline).shape == (1, 64, 64, 3)


def test_parts_of_another_pipeline_are_taken(fresh_pipeline, ov_pipeline):
    other = ov_pipeline("alpha")
    pipeline = fresh_pipeline("alpha", text_encoder=other.text_encoder, vae=other.vae)
    assert pipeline.text_encoder is other.text_encoder and pipeline.vae is other.vae
    assert_same(generate(pipeline), generate(other), 0)


def test_what_is_no_network_is_named(checkpoint, converted, fresh_pipeline):
    for name in CLASSES:
        pipeline = fresh_pipeline("alpha")
        setattr(pipeline, name, torch_network(checkpoint, name).half())
        with refused(ValueError, f"pipeline.{name} is in torch.float16", f"{name}.float()"):
            generate(pipeline)
    pipeline = fresh_pipeline("alpha")
    for value in ("a path", read_ir(converted("alpha") / "vae_decoder"), pipeline.scheduler):
        with refused(TypeError, f"vae={type(value).__name__}", "a module of", "another pipeline"):
            pipeline.vae = value
    for name, value in {
        "vae": None,
        "text_encoder": torch.nn.Linear(1, 1),
        "scheduler": None,
    }.items():
        with refused(TypeError, f"{name}={type(value).__name__}", "assign"):
            setattr(pipeline, name, value)
    for value in ("LCMScheduler", FlowMatchEulerDiscreteScheduler()):
        with refused(TypeError, f"scheduler={type(value).__name__}", "a scheduler of diffusers"):
            pipeline.scheduler = value
    assert_same(generate(pipeline), generate(fresh_pipeline("alpha")), 1e-6)


def test_a_callback_sees_the_steps_of_a_transformer_of_torch(checkpoint, fresh_pipeline):
    steps, pipeline = [], load_exact(fresh_pipeline("alpha").model_save_dir)
    pipeline.transformer = torch_network(checkpoint, "transformer")
    generate(pipeline, callback_on_step_end=lambda pipe, step, t, tensors: steps.append(step))
    assert steps == [0, 1, 2]
