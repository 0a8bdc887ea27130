"""`callback_on_step_end` as in diffusers' other pipelines, and the calls of its documentation."""

import copy
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from ov_pixart.interface import TENSORS
from tests.support.parity import assert_same, generate
from tests.support.refused import refused

# ---- callback_on_step_end -----------------------------------------------------------------------


def test_it_is_called_after_every_step_with_the_latents(ov_pipeline):
    pipeline, seen, old = ov_pipeline("alpha"), [], []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline and pipe.num_timesteps == 3 and pipe.guidance_scale == 4.5
        seen.append((step, int(timestep), tensors["latents"].clone()))
        return tensors

    image = generate(pipeline, callback_on_step_end=callback)
    assert (image == generate(pipeline, callback=lambda *step: old.append(step))).all()
    for (step, timestep, latents), (old_step, old_timestep, old_latents) in zip(
        seen, old, strict=True
    ):
        assert (step, timestep) == (old_step, int(old_timestep))
        assert torch.equal(latents, old_latents)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_it_is_called_in_every_round_of_the_loop(name, fresh_pipeline):
    pipeline, steps = fresh_pipeline("alpha"), []
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    generate(pipeline, callback_on_step_end=lambda pipe, step, *_: steps.append(step))
    assert steps == list(range(len(pipeline.scheduler.timesteps)))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_latents_that_it_returns_take_effect(in_place, family, ov_pipeline):
    def callback(pipe, step, timestep, tensors):
        if step == 1 and in_place:
            tensors["latents"].zero_()
        elif step == 1:
            return {"latents": torch.zeros_like(tensors["latents"])}
        return tensors

    call = {"callback_on_step_end": callback, "num_inference_steps": 2, "output_type": "latent"}
    assert not generate(ov_pipeline(family), **call).any()


def test_latents_of_a_single_step_take_effect(fresh_pipeline):
    pipeline = fresh_pipeline("lcm")
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    seen = []

    def double(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {"latents": 2 * tensors["latents"]}

    doubled = generate(pipeline, callback_on_step_end=double, **call)
    plain = generate(pipeline, **call)
    assert_same(seen[0].numpy(), plain, 1e-6)
    assert_same(doubled, 2 * plain, 1e-6)


def test_embeddings_that_it_returns_take_effect(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    star = pipeline.encode_prompt("a blue star", max_sequence_length=40, clean_caption=True)

    def callback(pipe, step, timestep, tensors):
        assert tuple(tensors) == TENSORS
        assert torch.equal(tensors["negative_prompt_embeds"], tensors["prompt_embeds"][:1])
        return {
            "prompt_embeds": torch.cat([star[2], star[0]]),
            "prompt_attention_mask": torch.cat([star[3], star[1]]),
        }

    call = {"num_inference_steps": 2, "output_type": "latent"}
    names = {"callback_on_step_end_tensor_inputs": list(TENSORS)}
    swapped = generate(pipeline, callback_on_step_end=callback, **names, **call)
    # the same by hand: latents after one step with one prompt, the second step with the other
    kept = []
    generate(pipeline, callback_on_step_end=lambda *a: kept.append(a[3]["latents"]), **call)

    def go_back(pipe, step, timestep, tensors):
        return {"latents": kept[0]} if step == 0 else None

    expected = generate(pipeline, prompt="a blue star", callback_on_step_end=go_back, **call)
    assert_same(swapped, expected, 1e-5)
    assert abs(swapped - generate(pipeline, **call)).max() > 0.01


def switch_guidance_off(pipe, step, timestep, tensors):
    """The example of diffusers' documentation."""
    if step == 0:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    return tensors


def lower_guidance(pipe, step, timestep, tensors):
    pipe._guidance_scale = 1.0


@pytest.mark.parametrize(
    "callback",
    [switch_guidance_off, lower_guidance, SDCFGCutoffCallback(None, cutoff_step_index=0)],
)
def test_guidance_can_end_early(callback, ov_pipeline):
    pipeline, kept = ov_pipeline("alpha-ms"), []
    call = {"num_inference_steps": 2, "output_type": "latent"}
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pipeline.transformer.recorded_calls() as calls:
        ended = generate(pipeline, callback_on_step_end=callback, **names, **call)
    rows = [len(one["hidden_states"]) for one in calls]
    assert rows == ([2, 2] if callback is lower_guidance else [2, 1])
    generate(pipeline, callback_on_step_end=lambda *a: kept.append(a[3]["latents"]), **call)

    def go_back(pipe, step, timestep, tensors):
        return {"latents": kept[0]} if step == 0 else None

    unguided = generate(pipeline, callback_on_step_end=go_back, guidance_scale=1.0, **call)
    assert_same(ended, unguided, 1e-6)  # DPM-Solver++ ends with a step of first order
    assert abs(ended - generate(pipeline, **call)).max() > 0.01


def test_it_may_end_guidance_inside_an_interval(ov_pipeline):
    """Rows that a callback has halved are not halved once more."""
    pipeline = ov_pipeline("alpha")
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    call = {"num_inference_steps": 3, "callback_on_step_end": switch_guidance_off, **names}
    with pipeline.transformer.recorded_calls() as calls:
        both = generate(pipeline, guidance_end=0.5, **call)
    assert [len(one["hidden_states"]) for one in calls] == [2, 1, 1]
    assert_same(both, generate(pipeline, **call), 1e-6)


@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_interrupting_leaves_the_latents_as_they_are(family, ov_pipeline):
    pipeline, latents = ov_pipeline(family), []

    def callback(pipe, step, timestep, tensors):
        latents.append(tensors["latents"].clone())
        pipe._interrupt = step == 1
        return tensors

    call = {"num_inference_steps": 6, "output_type": "latent", "callback_on_step_end": callback}
    with pipeline.transformer.recorded_calls() as calls:
        result = generate(pipeline, **call)
    assert (result == latents[-1].numpy()).all()
    assert len(latents) == len(calls) == 2
    assert np.isfinite(generate(pipeline)).all()  # the next call is whole again
    assert not pipeline.interrupt


def test_nothing_stays_behind(fresh_pipeline):
    pipeline = fresh_pipeline("alpha")
    forward = pipeline.transformer.forward
    pipeline.transformer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    stopwatch = pipeline.transformer.forward

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, callback_on_step_end=fail)
    assert pipeline.transformer.forward is stopwatch
    assert "step" not in vars(pipeline.scheduler)


BAD_CALLBACKS = {
    "no function": ({"callback_on_step_end": "print"}, "callback_on_step_end='print'", "function"),
    "unknown tensors": (
        {"callback_on_step_end_tensor_inputs": ["latents", "image_embeds"]},
        *("callback_on_step_end_tensor_inputs=", "image_embeds", "'prompt_embeds'"),
    ),
    "no list": ({"callback_on_step_end_tensor_inputs": "latents"}, "='latents'", "a list"),
}


@pytest.mark.parametrize("case", BAD_CALLBACKS.values(), ids=BAD_CALLBACKS)
def test_a_bad_callback_is_answered_in_one_line(case, ov_pipeline):
    call, *words = case
    with refused(ValueError, *words):
        generate(ov_pipeline("alpha"), **call)


BAD_RESULTS = {
    "no dictionary": (7, "result of callback_on_step_end=7", "a dictionary"),
    "other latents": ({"latents": torch.zeros(1, 4, 8, 9)}, "latents from", "(1, 4, 8, 8)"),
    "no tensor": ({"latents": "zeros"}, "latents from callback_on_step_end='zeros'"),
    "half of the latents": ({"latents": torch.zeros(0, 4, 8, 8)}, "latents from", "(1, 4, 8, 8)"),
    "no embeddings": ({"prompt_embeds": None}, "prompt_embeds from callback_on_step_end=None"),
    "unused": ({"pooled": torch.zeros(1)}, "pooled from", "'prompt_embeds'"),
    "read only": ({"negative_prompt_embeds": torch.zeros(1)}, "negative_prompt_embeds from"),
}


@pytest.mark.parametrize("case", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_bad_result_is_answered_in_one_line(case, ov_pipeline):
    returned, *words = case
    with refused(ValueError, *words):
        generate(ov_pipeline("alpha"), callback_on_step_end=lambda *args: returned)


# ---- calls of the documentation -----------------------------------------------------------------


def test_calls_with_nothing_to_do_do_nothing(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha")
    pipeline.enable_model_cpu_offload()
    pipeline.enable_sequential_cpu_offload(gpu_id=0)
    pipeline.enable_group_offload(onload_device="cuda", offload_type="leaf_level")
    pipeline.enable_attention_slicing()
    pipeline = pipeline.to(torch.float16).to("cpu", torch.bfloat16).to(dtype=torch.float16)
    assert pipeline.dtype == torch.float32
    assert_same(generate(pipeline), generate(ov_pipeline("alpha")), 1e-6)


def test_a_lora_for_a_converted_model_is_answered_with_the_remedy(ov_pipeline):
    with refused(ValueError, "no LoRA", "convert_pipeline(..., lora=...)"):
        ov_pipeline("alpha").load_lora_weights("someone/lora")


def test_arguments_of_encode_prompt_are_checked(ov_pipeline):
    with refused(TypeError, "encode_prompt has no argument 'num_images_per_promt'", "per_prompt'"):
        ov_pipeline("alpha").encode_prompt("a cat", num_images_per_promt=2)
    for prompt in (3, None, []):
        with refused(ValueError, f"prompt={prompt}", "a string or a list"):
            ov_pipeline("alpha").encode_prompt(prompt)


def test_tiling_and_slicing_can_be_asked_of_the_pipeline(fresh_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False)
    for name in ("tiling", "slicing"):
        getattr(pipeline, f"enable_vae_{name}")()
        assert getattr(pipeline.vae, f"use_{name}")
        getattr(pipeline, f"disable_vae_{name}")()
        assert not getattr(pipeline.vae, f"use_{name}")


@pytest.mark.parametrize("copy_it", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_in_one_line(copy_it, ov_pipeline):
    with refused(TypeError, "neither copied nor pickled", "load its folder"):
        copy_it(ov_pipeline("alpha"))
    with refused(TypeError, "neither copied nor pickled"):
        copy.deepcopy(ov_pipeline("alpha").transformer)
