"""Whatever a call is given: it works, or one line names the argument, its value and the remedy.

Simulated: a generator on another device, which PyTorch without that device cannot make.
"""

import warnings

import numpy as np
import pytest
import torch

from tests.support.parity import SMALL, generate
from tests.support.refused import refused

# ---- calls that do not work ---------------------------------------------------------------------


def embedded(prompts=1, tokens=5, width=32, **changes):
    """Embeddings and masks as a call takes them."""
    embeds, mask = torch.zeros(prompts, tokens, width), torch.ones(prompts, tokens)
    names = ("prompt_embeds", "negative_prompt_embeds")
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    call = {"prompt": None, **dict.fromkeys(names, embeds), **dict.fromkeys(masks, mask)}
    return {**call, **changes}


class ElsewhereGenerator(torch.Generator):
    device = torch.device("cuda")


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


ZEROS = torch.zeros
BAD_CALLS = {
    "no prompt": ({"prompt": None}, "prompt=None", "a string"),
    "no prompts": ({"prompt": []}, "prompt=[]", "at least one"),
    "a number among prompts": ({"prompt": ["a", 1]}, "prompt=['a', 1]", "a string"),
    "a number": ({"prompt": 7}, "prompt=7", "a string"),
    "bytes": ({"prompt": b"a"}, "prompt=b'a'", "a string"),
    "too many negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt=['a', 'b']", "of 1"),
    "a numeric negative": ({"negative_prompt": 3}, "negative_prompt=3", "a string"),
    "height off the grid": ({"height": 100}, "height=100", "multiple of 16"),
    "negative width": ({"width": -64}, "width=-64", "multiple of 16"),
    "height 0": ({"height": 0}, "height=0", "multiple of 16"),
    "height as text": ({"height": "64"}, "height='64'", "multiple of 16"),
    "height 0, bins": ({"height": 0, "use_resolution_binning": True}, "height=0", "from 1"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps=0", "from 1"),
    "negative steps": ({"num_inference_steps": -4}, "num_inference_steps=-4", "from 1"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps=2.5", "from 1"),
    "a step that is true": ({"num_inference_steps": True}, "num_inference_steps=True", "from 1"),
    "one step": ({"num_inference_steps": 1}, "num_inference_steps=1", "2 or more with DPMSolver"),
    "too many steps": ({"num_inference_steps": 5000}, "num_inference_steps=5000", "1000 or fewer"),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt=0", "from 1"),
    "no tokens": ({"max_sequence_length": 0}, "max_sequence_length=0", "from 1"),
    "no guidance number": ({"guidance_scale": float("nan")}, "guidance_scale=nan", "a number"),
    "endless guidance": ({"guidance_scale": float("inf")}, "guidance_scale=inf", "a number"),
    "guidance as text": ({"guidance_scale": "4.5"}, "guidance_scale='4.5'", "a number"),
    "guidance None": ({"guidance_scale": None}, "guidance_scale=None", "a number"),
    "too many generators": ({"generator": generators(3)}, "generator=[", "list of 1"),
    "too few generators": (
        {"generator": generators(2), "num_images_per_prompt": 3},
        *("generator=[", "list of 3"),
    ),
    "a seed for a generator": ({"generator": 42}, "generator=42", "torch.Generator"),
    "generator elsewhere": ({"generator": ElsewhereGenerator()}, "generator=", "on the CPU"),
    "latents of another size": ({"latents": ZEROS(1, 4, 8, 6)}, "(1, 4, 8, 6)", "(1, 4, 8, 8)"),
    "latents with 3 channels": ({"latents": ZEROS(1, 3, 8, 8)}, "latents=", "(1, 4, 8, 8)"),
    "latents for two": ({"latents": ZEROS(2, 4, 8, 8)}, "latents=", "(1, 4, 8, 8)"),
    "latents as array": ({"latents": np.zeros((1, 4, 8, 8))}, "latents=", "(1, 4, 8, 8)"),
    "embeddings too wide": (
        embedded(width=33),
        "prompt_embeds=(tensor of (1, 5, 33))",
        "tokens, 32)",
    ),
    "flat embeddings": (embedded(prompt_embeds=ZEROS(5, 32)), "prompt_embeds=", "(prompts, tokens"),
    "no mask": (embedded(prompt_attention_mask=None), "prompt_attention_mask=None", "(1, 5)"),
    "mask too long": (
        embedded(prompt_attention_mask=ZEROS(1, 6)),
        "mask=(tensor of (1, 6))",
        "(1, 5)",
    ),
    "negative mask too short": (
        embedded(negative_prompt_attention_mask=ZEROS(1, 4)),
        *("negative_prompt_attention_mask", "must have the same shape", "[1, 4]"),
    ),
    "no negative mask": (
        embedded(negative_prompt_attention_mask=None),
        "Must provide `negative_prompt_attention_mask`",
    ),
    "negative embeddings of another length": (
        embedded(negative_prompt_embeds=ZEROS(1, 4, 32)),
        *("negative_prompt_embeds", "must have the same shape", "[1, 4, 32]"),
    ),
    "prompt and embeddings": (embedded(prompt="a"), "prompt='a'", "None where prompt_embeds"),
    "negative prompt and embeddings": (
        embedded(negative_prompt="a"),
        "negative_prompt='a'",
        "None",
    ),
    "negative embeddings for text": (
        embedded(prompt="a", prompt_embeds=None),
        *("negative_prompt_embeds=", "encode both"),
    ),
    "no timesteps": ({"timesteps": []}, "timesteps=[]", "at least one"),
    "rising timesteps": ({"timesteps": [1, 500]}, "timesteps=[1, 500]", "descending"),
    "timesteps that are no numbers": ({"timesteps": [float("nan")]}, "timesteps=[nan]", "numbers"),
    "timesteps as text": ({"timesteps": "999"}, "timesteps='999'", "numbers"),
    "timesteps and sigmas": ({"timesteps": [9, 1], "sigmas": [1.0]}, "sigmas=[1.0]", "None where"),
    "sigmas for DPM-Solver++": ({"sigmas": [9.0, 1.0]}, "sigmas=[9.0, 1.0]", "None with DPMSolver"),
    "output as JPEG": ({"output_type": "jpeg"}, "output_type='jpeg'", "'pil', 'np', 'pt'"),
    "a callback that is no function": ({"callback": "print"}, "callback='print'", "a function"),
    "callback never": ({"callback_steps": 0}, "callback_steps", "positive integer", "is 0"),
}


@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_is_answered_in_one_line(case, ov_pipeline):
    call, *words = case
    with refused(ValueError, *words):
        generate(ov_pipeline("alpha"), **call)


MISSPELT = {
    "one": ({"num_infernce_steps": 2}, "'num_infernce_steps' (nearest: 'num_inference_steps')"),
    "two": (
        {"guidence_scale": 4.5, "hight": 64},
        *("'guidence_scale' (nearest: 'guidance_scale')", "'hight' (nearest: 'height')"),
    ),
    "another library's": ({"seed": 7}, "'seed' (nearest: 'generator')"),
    "like nothing": ({"xyzzy": 7}, "'xyzzy'"),
    "of callbacks": ({"callback_on_step_ends": print}, "(nearest: 'callback_on_step_end')"),
}


@pytest.mark.parametrize("case", MISSPELT.values(), ids=MISSPELT)
def test_an_unknown_argument_comes_with_the_nearest_known_one(case, ov_pipeline):
    call, *words = case
    with refused(TypeError, "PixArtAlphaPipeline has no argument", *words):
        ov_pipeline("alpha")("a star", **call)


def test_no_negative_prompt_is_an_empty_one(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    for prompt in ("a star", ["a star", "a circle"]):
        images = [
            generate(pipeline, prompt=prompt, negative_prompt=none, num_inference_steps=2)
            for none in (None, "")
        ]
        assert (images[0] == images[1]).all()
    none, empty = (pipeline.encode_prompt("a star", negative_prompt=n)[2] for n in (None, ""))
    assert (none == empty).all()


NUMPY_CALLS = {
    "wide": {"num_inference_steps": np.int64(3), "height": np.int64(64), "width": np.uint16(64)},
    "narrow": {"num_inference_steps": np.int8(3), "guidance_scale": np.float16(4.5)},
    "an interval": {"guidance_start": np.int64(0), "guidance_end": np.float32(1)},
    "floats and truth": {
        "guidance_scale": np.float32(4.5),
        "use_resolution_binning": np.bool_(False),
        "num_images_per_prompt": np.array(1),
    },
    "tensors": {"guidance_scale": torch.tensor(4.5), "max_sequence_length": torch.tensor(40)},
}


@pytest.mark.parametrize("call", NUMPY_CALLS.values(), ids=NUMPY_CALLS)
def test_numbers_of_numpy_and_torch_are_numbers(call, ov_pipeline):
    assert (generate(ov_pipeline("alpha"), **call) == generate(ov_pipeline("alpha"))).all()


def test_a_list_of_numpy_numbers_is_a_schedule(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    schedules = ([900, 400, 100], np.array([900, 400, 100]), list(np.array([900, 400, 100])))
    first, *others = (generate(pipeline, timesteps=timesteps) for timesteps in schedules)
    assert all((image == first).all() for image in others)


@pytest.mark.parametrize("prompt", ["", " ", ["", ""], "\n", "🦊", "<b>&amp;", "http://a.com"])
@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_odd_prompts_work(prompt, ov_pipeline):
    image = generate(ov_pipeline("alpha"), prompt=prompt, num_inference_steps=2)
    assert np.isfinite(image).all() and image.std() > 0


def test_a_model_without_bins_says_so(fresh_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False)
    pipeline.transformer.register_to_config(sample_size=16)
    with refused(ValueError, "use_resolution_binning=True", "False"):
        pipeline("a star")


# ---- prompts that are too long ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_what_is_cut_off_is_quoted_in_one_line(family, ov_pipeline, caplog):
    call = {**SMALL, "num_inference_steps": 2, "max_sequence_length": 10}
    prompt = "a small red circle above the sea " * 3 + "and a bright star"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ov_pipeline(family)(**{**call, "prompt": prompt, "negative_prompt": prompt})
        ov_pipeline(family)(**{**call, "prompt": "a star"})
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert [message.split()[0] for message in messages] == ["prompt", "negative_prompt"]
    for message in messages:
        assert "max_sequence_length=10" in message and "star” is cut off" in message
        assert "\n" not in message
    assert not caplog.records  # diffusers and transformers add nothing


def test_fifty_thousand_characters_are_cut_with_a_short_warning(ov_pipeline):
    prompt = "a small red circle above the sea, " * 1500
    assert len(prompt) > 50_000
    with pytest.warns(UserWarning, match="cut off") as caught:
        image = generate(ov_pipeline("alpha"), prompt=prompt, num_inference_steps=2)
    assert all(len(str(w.message)) < 500 for w in caught)
    assert np.isfinite(image).all()
