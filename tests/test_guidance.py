"""The guidance interval: the same images as a loop by hand, and fewer rows through the DiT."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import diffusers
import pytest
import torch

import ov_pixart_helper as helper
from ov_pixart.guidance import guidance_interval
from tests.support.parity import SMALL, assert_same, generate, load_exact
from tests.support.refused import refused

# ---- the same images as torch -------------------------------------------------------------------


@torch.no_grad()
def denoise(pipeline, latents, *, scale, start, end, steps, **text):
    """Diffusers' parts in a loop of our own: the final latents, guided in an interval only."""
    names = ("num_images_per_prompt", "negative_prompt", "max_sequence_length")
    embeds, mask, no_embeds, no_mask = pipeline.encode_prompt(
        text["prompt"], True, **{name: text[name] for name in names}
    )
    count, _, height, width = latents.shape
    sizes = {"resolution": None, "aspect_ratio": None}
    if pipeline.transformer.config.sample_size == 128:
        sizes["resolution"] = torch.tensor([[8.0 * height, 8.0 * width]]).repeat(count, 1)
        sizes["aspect_ratio"] = torch.tensor([[height / width]]).repeat(count, 1)

    def predict(latents, timestep, embeds, mask):
        moment = timestep.expand(count)
        output = pipeline.transformer(latents, embeds, moment, sizes, encoder_attention_mask=mask)
        return output.sample[:, :4]

    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    for i, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        noise = predict(scaled, timestep, embeds, mask)
        if start <= i / steps < end:
            without = predict(scaled, timestep, no_embeds, no_mask)
            noise = without + scale * (noise - without)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("family", ["alpha", "alpha-ms", "sigma"])
@pytest.mark.parametrize("interval", [(0.0, 0.35), (0.25, 0.75), (0.5, 1.0), (0.0, 0.0)])
def test_it_generates_what_a_loop_by_hand_generates(family, interval, ov_pipeline, torch_pipeline):
    start, end = interval
    latents = torch.randn(4, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    text = {
        "prompt": ["a red star", "a circle above the sea"],
        "negative_prompt": ["the night sky", ""],
        "num_images_per_prompt": 2,
        "max_sequence_length": 40,
    }
    expected = denoise(
        torch_pipeline(family), latents, scale=4.5, start=start, end=end, steps=8, **text
    )
    call = {**text, "latents": latents, "width": 48, "num_inference_steps": 8}
    call |= {"guidance_start": start, "guidance_end": end, "output_type": "latent"}
    ours = generate(ov_pipeline(family), **call)
    assert_same(ours, expected.numpy())
    whole = generate(ov_pipeline(family), **{**call, "guidance_start": 0, "guidance_end": 1})
    assert abs(whole - ours).mean() > 0.01  # or the comparison would mean nothing


def test_the_whole_interval_is_the_usual_call(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    usual = generate(pipeline)
    assert (generate(pipeline, guidance_start=0, guidance_end=1.0) == usual).all()


def test_a_torch_pipeline_takes_the_same_arguments(checkpoint, ov_pipeline):
    torch_pipeline = helper.load_pipeline(checkpoint("alpha"))
    assert isinstance(torch_pipeline, diffusers.PixArtAlphaPipeline)
    assert type(torch_pipeline).__name__ == "PixArtAlphaPipeline"  # which it writes when saved
    call = {"num_inference_steps": 4, "guidance_end": 0.5}
    assert_same(generate(ov_pipeline("alpha"), **call), generate(torch_pipeline, **call))
    with refused(ValueError, "guidance_end=7"):
        generate(torch_pipeline, guidance_end=7)
    with pytest.warns(UserWarning, match="have no effect"):
        generate(torch_pipeline, **call, guidance_scale=1.0)


# ---- fewer rows ---------------------------------------------------------------------------------


def rows(pipeline, **call) -> list[int]:
    """Rows in each call of the DiT."""
    with pipeline.transformer.recorded_calls() as calls:
        generate(pipeline, **call)
    return [len(one["hidden_states"]) for one in calls]


ROWS = {
    "the first half": ({"guidance_end": 0.5}, [2, 2, 2, 1, 1, 1]),
    "the first third": ({"guidance_end": 0.35}, [2, 2, 2, 1, 1, 1]),
    "the middle": ({"guidance_start": 1 / 3, "guidance_end": 2 / 3}, [1, 1, 2, 2, 1, 1]),
    "the end": ({"guidance_start": 0.5}, [1, 1, 1, 2, 2, 2]),
    "nowhere": ({"guidance_start": 0.5, "guidance_end": 0.5}, [1] * 6),
    "several images": (
        {"guidance_end": 0.5, "prompt": ["a star", "the sea"], "num_images_per_prompt": 2},
        [8, 8, 8, 4, 4, 4],
    ),
    "timesteps": ({"guidance_end": 0.5, "timesteps": [900, 600, 300, 10]}, [2, 2, 1, 1]),
    "a whole number": ({"guidance_end": 0}, [1] * 6),
}


@pytest.mark.parametrize(("call", "expected"), ROWS.values(), ids=ROWS)
def test_outside_the_interval_the_dit_gets_the_conditional_rows_alone(call, expected, ov_pipeline):
    assert rows(ov_pipeline("alpha-ms"), num_inference_steps=6, **call) == expected


def test_the_rows_that_remain_are_those_of_the_prompt(ov_pipeline):
    pipeline = ov_pipeline("alpha-ms")
    with pipeline.transformer.recorded_calls() as calls:
        generate(pipeline, guidance_end=0.5, num_inference_steps=2, negative_prompt="the sea")
    guided, unguided = calls
    for name in ("encoder_hidden_states", "encoder_attention_mask", "resolution", "aspect_ratio"):
        tokens = unguided[name].shape[1]
        assert (unguided[name] == guided[name][1:, :tokens]).all(), name


def test_a_step_of_two_calls_is_guided_as_a_whole(fresh_pipeline):
    pipeline = fresh_pipeline("alpha")
    heun = diffusers.HeunDiscreteScheduler
    pipeline.scheduler = heun.from_config(pipeline.scheduler.config)
    expected = [2, 2, 2, 2, 1, 1, 1]  # four steps, the last of one call
    assert rows(pipeline, num_inference_steps=4, guidance_end=0.5) == expected


def test_static_shapes_run_half_as_often(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(1, 64, 64, 2, max_sequence_length=40)
    call = {"num_images_per_prompt": 2, "num_inference_steps": 4, "guidance_end": 0.5}
    assert_same(generate(pipeline, **call), generate(ov_pipeline("alpha"), **call))
    runs, request = [], pipeline.transformer.request

    def counted(inputs, **options):
        runs.append(len(inputs["hidden_states"]))
        return request(inputs, **options)

    pipeline.transformer.request = counted
    generate(pipeline, **call)
    assert runs == [2] * 6


def test_embeddings_and_callbacks_work(ov_pipeline):
    pipeline, seen = ov_pipeline("alpha"), []
    names = ("prompt_embeds", "prompt_attention_mask")
    names += tuple(f"negative_{name}" for name in names)
    encoded = pipeline.encode_prompt(SMALL["prompt"], max_sequence_length=40)
    call = {"guidance_end": 0.5, "callback": lambda step, *_: seen.append(step)}
    text = {"prompt": None, "negative_prompt": None, **dict(zip(names, encoded, strict=True))}
    assert_same(generate(pipeline, **text, **call), generate(pipeline, guidance_end=0.5), 1e-6)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "evaluations"),
    [
        ((20, 4.5), 40),
        ((20, 4.5, 0, 0.5), 30),
        ((20, 4.5, 0, 0.35), 27),
        ((20, 4.5, 0, 0.25), 25),
        ((16, 4.5, 0, 0.35), 22),
        ((4, 0.0), 4),
        ((4, 1.0, 0, 0.5), 4),
    ],
)
def test_evaluations_can_be_counted_beforehand(call, evaluations):
    assert helper.count_evaluations(*call) == evaluations


# ---- one call at a time -------------------------------------------------------------------------


def test_every_call_begins_at_its_first_step(ov_pipeline):
    pipeline = ov_pipeline("alpha")

    def stop(step, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, guidance_end=0.5, callback=stop)
    assert rows(pipeline, num_inference_steps=4, guidance_end=0.5) == [2, 2, 1, 1]
    assert rows(pipeline, num_inference_steps=4) == [2] * 4


def test_threads_keep_their_own_intervals(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    calls = [{"seed": i, "guidance_end": i / 4, "num_inference_steps": 4} for i in range(5)]
    alone = [generate(pipeline, **call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        together = list(threads.map(lambda call: generate(pipeline, **call), calls))
    for ours, expected in zip(together, alone, strict=True):
        assert_same(ours, expected, 1e-6)


def test_a_replaced_forward_is_put_back(fresh_pipeline):
    transformer = (pipeline := fresh_pipeline("alpha")).transformer
    calls, forward = [], transformer.forward

    def watched(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    transformer.forward = watched
    generate(pipeline, guidance_end=0.5)
    assert transformer.forward is watched and len(calls) == 3


def test_rows_that_a_callback_has_halved_are_left_alone():
    def forward(hidden_states, **_):
        seen.append(len(hidden_states))
        return (hidden_states,)

    seen: list[int] = []
    scheduler = SimpleNamespace(order=1, timesteps=range(4))
    pipeline = SimpleNamespace(transformer=SimpleNamespace(forward=forward), scheduler=scheduler)
    with guidance_interval(pipeline, 4.5, 0.0, 0.5):
        whole = [len(pipeline.transformer.forward(torch.zeros(n, 4))[0]) for n in (4, 4, 4, 2)]
    assert seen == [4, 4, 2, 2] and whole == [4, 4, 4, 2]
    assert pipeline.transformer.forward is forward


# ---- what does not work -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"guidance_end": 1.5}, ("guidance_end=1.5", "from 0 to 1")),
        ({"guidance_end": 35}, ("guidance_end=35", "from 0 to 1")),
        ({"guidance_start": -0.1}, ("guidance_start=-0.1", "from 0 to 1")),
        ({"guidance_end": float("nan")}, ("guidance_end=nan", "from 0 to 1")),
        ({"guidance_end": None}, ("guidance_end=None", "from 0 to 1")),
        ({"guidance_end": True}, ("guidance_end=True", "from 0 to 1")),
        ({"guidance_start": 0.6, "guidance_end": 0.4}, ("guidance_start=0.6", "guidance_end=0.4")),
    ],
)
def test_a_wrong_interval_is_refused_in_one_line(call, words, ov_pipeline):
    with refused(ValueError, *words):
        generate(ov_pipeline("alpha"), **call)


def test_an_interval_without_guidance_is_answered_with_one_warning(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        plain = pipeline(**SMALL, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
        assert not caught
        assert (generate(pipeline, guidance_scale=1.0, guidance_end=0.5) == plain.images).all()
    (warning,) = caught
    assert "guidance_end=0.5 have no effect" in str(warning.message)
    assert warning.filename.endswith("parity.py")  # where the call stands


# ---- what a checkpoint recommends ---------------------------------------------------------------


def test_a_checkpoint_recommends_where_guidance_ends(checkpoint, tmp_path, caplog):
    folder = shutil.copytree(checkpoint("alpha"), tmp_path / "alpha")
    file = folder / helper.MODEL_INDEX
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "_guidance_end": 0.35}))
    ov_dir = helper.convert_pipeline(folder, tmp_path / "ov")
    saved = tmp_path / "saved"
    load_exact(ov_dir, compile=False).save_pretrained(saved)
    for one in (folder, ov_dir, saved):
        assert helper.default_settings(one).guidance_end == 0.35
    helper.load_pipeline(folder)
    assert "_guidance_end" not in caplog.text
