"""Every PixArt, every scheduler, every argument: OpenVINO generates what torch generates.

Hypothesis chooses combinations, always the same ones: what fails on one machine fails on all.
"""

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.parity import assert_same, generate

pytestmark = pytest.mark.slow

FAMILIES = [
    *("alpha", "alpha-512", "alpha-ms", "lcm-ms", "dmd"),
    *("sigma", "sigma-512", "sigma-1024", "sigma-2k"),
]
SCHEDULERS = {  # name → what its set_timesteps takes, beyond a number of steps
    "DPMSolverMultistepScheduler": ["timesteps"],
    "DDIMScheduler": [],
    "DDPMScheduler": ["timesteps"],
    "EulerDiscreteScheduler": ["timesteps", "sigmas"],
    "UniPCMultistepScheduler": [],
    "SASolverScheduler": [],
    "LCMScheduler": ["timesteps"],
}
# SASolver's name for the algorithm that DPM-Solver++ calls "dpmsolver++".
CONFIGS = {"SASolverScheduler": {"algorithm_type": "data_prediction"}}
CUSTOM = {"timesteps": [901, 500, 120], "sigmas": [14.6, 3.0, 0.5]}

CALLS = st.fixed_dictionaries(
    {
        "family": st.sampled_from(FAMILIES),
        "scheduler": st.sampled_from([None, *SCHEDULERS]),  # None: the family's own
        "custom": st.sampled_from([None, *CUSTOM]),
        "size": st.sampled_from([(64, 64), (48, 80), (80, 48)]),
        "steps": st.integers(2, 3),
        "guidance": st.sampled_from([0.0, 1.0, 2.5, 4.5]),
        "prompts": st.sampled_from([["a small red circle"], ["a BLUE star", "the <b>sea</b>"]]),
        "negative": st.sampled_from(["", "a hill"]),
        "embeddings": st.booleans(),
        "latents": st.booleans(),
        "generators": st.booleans(),  # one per image
        "images": st.integers(1, 2),
        "callback": st.booleans(),
        "clean_caption": st.booleans(),
        "output_type": st.sampled_from(["np", "np", "latent"]),
    }
)


def arguments(pipeline, choice, seen: list) -> dict:
    """The call that was chosen; each pipeline gets generators of its own, with the same seeds."""
    count = len(choice["prompts"]) * choice["images"]
    height, width = choice["size"]
    call = {
        "height": height,
        "width": width,
        "num_inference_steps": choice["steps"],
        "guidance_scale": choice["guidance"],
        "num_images_per_prompt": choice["images"],
        "clean_caption": choice["clean_caption"],
        "output_type": choice["output_type"],
        "prompt": choice["prompts"],
        "negative_prompt": choice["negative"],
        "generator": torch.Generator().manual_seed(7),
    }
    if choice["generators"]:
        call["generator"] = [torch.Generator().manual_seed(i) for i in range(count)]
    if choice["latents"]:
        noise = torch.Generator().manual_seed(3)
        call["latents"] = torch.randn(count, 4, height // 8, width // 8, generator=noise)
    if choice["embeddings"]:
        call |= embeddings(pipeline, choice)
    if choice["custom"] in SCHEDULERS[type(pipeline.scheduler).__name__]:
        call[choice["custom"]] = CUSTOM[choice["custom"]]
    if choice["family"] == "dmd" and choice["scheduler"] is None:
        call |= {"timesteps": [400], "guidance_scale": 1.0}
    if choice["callback"]:
        call["callback"] = lambda step, timestep, latents: seen.append((step, float(timestep)))
    return call


@torch.no_grad()
def embeddings(pipeline, choice) -> dict:
    names = ("prompt_embeds", "prompt_attention_mask")
    names += tuple(f"negative_{name}" for name in names)
    given = pipeline.encode_prompt(
        choice["prompts"],
        negative_prompt=[choice["negative"]] * len(choice["prompts"]),
        max_sequence_length=20,
    )
    call = dict(zip(names, given, strict=True))
    call["prompt_attention_mask"] = call["prompt_attention_mask"].clone()
    call["prompt_attention_mask"][:, 5:] = 0  # a mask that no tokenizer made
    return {**call, "prompt": None, "negative_prompt": None}


def compare(choice, ov_pipeline, torch_pipeline) -> None:
    """The same call to both, with the chosen scheduler."""
    family, images, steps = choice["family"], [], []
    for shared in (ov_pipeline(family), torch_pipeline(family)):
        original, seen = shared.scheduler, []
        if choice["scheduler"]:
            kind = getattr(diffusers, choice["scheduler"])
            config = CONFIGS.get(choice["scheduler"], {})
            shared.scheduler = kind.from_config(original.config, **config)
        try:
            images.append(generate(shared, **arguments(shared, choice, seen)))
        finally:
            shared.scheduler = original
        steps.append(seen)
    assert_same(*images, tolerance=2e-4)
    assert steps[0] == steps[1]
    assert bool(steps[0]) == choice["callback"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
@pytest.mark.filterwarnings("ignore")  # of diffusers', on unusual timesteps
def test_every_family_works_with_every_scheduler(family, scheduler, ov_pipeline, torch_pipeline):
    """A usual call: two prompts, two steps, guidance."""
    switches = ("embeddings", "latents", "generators", "callback", "clean_caption")
    call = {
        "custom": None,
        "size": (64, 48),
        "steps": 2,
        "guidance": 4.5,
        "prompts": ["a small red circle", "a blue star"],
        "negative": "",
        "images": 1,
        "output_type": "np",
    }
    choice = {**dict.fromkeys(switches, False), **call, "family": family, "scheduler": scheduler}
    compare(choice, ov_pipeline, torch_pipeline)


@settings(
    max_examples=72,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(choice=CALLS)
@pytest.mark.filterwarnings("ignore")
def test_any_call_generates_what_torch_generates(choice, ov_pipeline, torch_pipeline):
    compare(choice, ov_pipeline, torch_pipeline)
