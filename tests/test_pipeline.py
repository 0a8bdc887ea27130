"""Images from OpenVINO against images from torch; loading, static shapes and devices."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import openvino as ov
import pytest
import torch
from optimum.intel.openvino import OVDiffusionPipeline, OVPipelineForText2Image

import ov_pixart_helper as helper
from ov_pixart.ir import read_ir, save_ir
from ov_pixart.trace import trace_vae_decoder, trace_vae_encoder
from tests.support.checkpoints import build_vae
from tests.support.parity import (
    F32,
    SMALL,
    assert_same,
    generate,
    noise_inputs,
    torch_noise,
)
from tests.support.refused import refused

# ---- the same images as torch -------------------------------------------------------------------

CALLS = {
    "square": {},
    "wide": {"height": 48, "width": 112},
    "tall": {"height": 112, "width": 48},
    "larger": {"height": 160, "width": 128},
    "guidance off": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a blue star"},
    "several prompts": {"prompt": ["a blue star", "a large green square on the hill"]},
    "several images per prompt": {"num_images_per_prompt": 3},
    "several of both, guidance off": {
        "prompt": ["a blue star", "a red circle"],
        "num_images_per_prompt": 2,
        "guidance_scale": 0.0,
    },
    "a negative for each": {"prompt": ["a star", "a hill"], "negative_prompt": ["red", "blue sea"]},
    "all tokens of the family": {"max_sequence_length": 120},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_openvino_generates_what_torch_generates(call, ov_pipeline, torch_pipeline):
    """One family; `test_matrix.py` has the others."""
    ours, reference = (pipeline("alpha-ms") for pipeline in (ov_pipeline, torch_pipeline))
    assert_same(generate(ours, **call), generate(reference, **call))


@pytest.mark.parametrize("family", ["alpha", "sigma"])
@pytest.mark.parametrize("size", [{}, {"height": 200, "width": 350}, {"height": 512, "width": 128}])
def test_resolution_bins_are_those_of_torch(family, size, ov_pipeline, torch_pipeline):
    call = {
        **{"height": None, "width": None, "use_resolution_binning": True},
        **{"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 300},
        **size,
    }
    ours = generate(ov_pipeline(family), **call)
    assert_same(ours, generate(torch_pipeline(family), **call))
    assert ours.shape[1:3] == (size.get("height", 256), size.get("width", 256))


SCHEDULES = {  # what the matrix does not have
    "Heun, two calls per step": ("HeunDiscreteScheduler", {}),
    "LCM in one step": ("LCMScheduler", {"num_inference_steps": 1, "guidance_scale": 0.0}),
}


@pytest.mark.parametrize(("name", "call"), SCHEDULES.values(), ids=SCHEDULES)
def test_unusual_schedules_find_their_timesteps(name, call, ov_pipeline, torch_pipeline):
    images = []
    for shared in (ov_pipeline("alpha"), torch_pipeline("alpha")):
        original = shared.scheduler
        shared.scheduler = getattr(diffusers, name).from_config(original.config)
        try:
            images.append(generate(shared, **call))
        finally:
            shared.scheduler = original
    assert_same(*images)


def test_a_comparison_of_images_would_notice(ov_pipeline):
    """Random models could ignore their inputs; these do not, so the tests above mean something."""
    pipeline = ov_pipeline("alpha-ms")
    image = generate(pipeline)
    assert image.std() > 0.1
    for other in ({"prompt": "the night sky"}, {"guidance_scale": 1.0}, {"negative_prompt": "sea"}):
        assert abs(generate(pipeline, **other) - image).mean() > 0.02, other


def test_a_comparison_of_noise_would_notice(ov_pipeline):
    transformer = ov_pipeline("alpha-ms").transformer
    inputs = {**noise_inputs(batch=1, tokens=6), "timestep": torch.tensor([500.0])}
    size = {"resolution": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.tensor([[1.0]])}
    noise = transformer(**inputs, added_cond_kwargs=size).sample
    mask = torch.tensor([[1, 1, 0, 0, 0, 0]])
    for change, conditions in (
        ({"encoder_attention_mask": mask}, {}),
        ({"timestep": torch.tensor([501.0])}, {}),
        ({}, {"resolution": torch.tensor([[64.0, 128.0]])}),
        ({}, {"aspect_ratio": torch.tensor([[2.0]])}),
    ):
        conditions = {**size, **conditions}
        other = transformer(**{**inputs, **change}, added_cond_kwargs=conditions).sample
        assert (other - noise).abs().mean() > 0.02 * noise.std(), (change, conditions)


def test_sixteen_bits_know_where_in_the_schedule_they_are(fresh_pipeline, torch_pipeline):
    """In bfloat16, OpenVINO's own choice where the CPU has it, noise is as good as torch's."""
    inputs = {**noise_inputs(), "timestep": torch.tensor([937.0, 501.0])}
    sizes = {
        "resolution": torch.tensor([[64.0, 96.0], [1088.0, 960.0]]),
        "aspect_ratio": torch.tensor([[0.67], [1.13]]),
    }
    reference = torch_noise(torch_pipeline("alpha-ms").transformer, inputs, **sizes)
    bf16 = {"INFERENCE_PRECISION_HINT": "bf16"}
    transformer = fresh_pipeline("alpha-ms", ov_config=bf16, compile=False).transformer
    error = transformer(**inputs, added_cond_kwargs=sizes).sample.numpy() - reference
    assert error.std() < 0.03 * reference.std()  # 0.3 to 0.6 with the angles rounded


# ---- everything else a call can ask for ---------------------------------------------------------


def test_embeddings_and_latents_can_be_handed_in(ov_pipeline, torch_pipeline):
    images = []
    for pipeline in (ov_pipeline("alpha"), torch_pipeline("alpha")):
        with torch.no_grad():
            embeds, mask, negative, negative_mask = pipeline.encode_prompt(
                "a blue star", negative_prompt="red", max_sequence_length=40
            )
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        image = generate(
            pipeline,
            prompt=None,
            negative_prompt=None,
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=negative_mask,
            latents=latents,
        )
        images.append(image)
    assert_same(*images)


def test_a_list_of_generators_seeds_each_image(ov_pipeline):
    def seeds(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    both = generate(ov_pipeline("alpha"), num_images_per_prompt=2, generator=seeds(3, 4))
    for seed, image in zip((3, 4), both, strict=True):
        assert_same(generate(ov_pipeline("alpha"), generator=seeds(seed))[0], image)


def test_callback_and_output_types(ov_pipeline, capsys):
    pipeline, seen = ov_pipeline("alpha"), []
    call = {**SMALL, "output_type": "pil", "return_dict": False}
    ((image,),) = pipeline(**call, callback=lambda *step: seen.append(step), callback_steps=2)
    assert image.size == (64, 64)
    assert [step for step, _, _ in seen] == [0, 2]
    assert seen[0][2].shape == (1, 4, 8, 8)
    assert generate(pipeline, output_type="pt").shape == (1, 3, 64, 64)
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""  # the bar is switched off


# ---- load and save ------------------------------------------------------------------------------


def test_optimums_own_entrances_lead_here(converted):
    for entrance in (OVDiffusionPipeline, OVPipelineForText2Image):
        for family, expected in (
            ("alpha", helper.OVPixArtAlphaPipeline),
            ("sigma", helper.OVPixArtSigmaPipeline),
        ):
            pipeline = entrance.from_pretrained(converted(family), compile=False)
            assert type(pipeline) is expected
            assert pipeline.transformer.request is None


@pytest.mark.slow
@pytest.mark.parametrize("entrance", [helper.OVPixArtAlphaPipeline, OVDiffusionPipeline])
def test_a_torch_folder_is_converted_on_the_way(entrance, checkpoint, ov_pipeline):
    pipeline = entrance.from_pretrained(checkpoint("alpha"), weight_format="fp32", ov_config=F32)
    assert_same(generate(pipeline), generate(ov_pipeline("alpha")), 1e-6)
    assert Path(pipeline.model_save_dir).is_dir()
    assert not list(checkpoint("alpha").rglob("*.xml"))  # nothing is written beside the checkpoint


def test_load_pipeline_names_unknown_options(checkpoint, converted):
    for folder in (checkpoint("alpha"), converted("alpha")):
        with refused(TypeError, "no argument 'devise'"):
            helper.load_pipeline(folder, devise="CPU")


def test_load_pipeline_takes_torch_and_openvino_folders(checkpoint, converted, ov_pipeline):
    images = []
    for folder, options in ((checkpoint("alpha"), {}), (converted("alpha"), {"ov_config": F32})):
        images.append(generate(helper.load_pipeline(folder, **options)))
        assert_same(images[-1], generate(ov_pipeline("alpha")))
    with refused(ValueError, "device=", "'CPU'"):
        helper.load_pipeline(converted("alpha"), device="XPU")


@pytest.mark.slow
def test_half_to_and_compile_only(fresh_pipeline, ov_pipeline):
    reference = generate(ov_pipeline("alpha"))
    assert_same(generate(fresh_pipeline("alpha").half()), reference, 0.02)
    assert_same(generate(fresh_pipeline("alpha").to("CPU", torch.float32)), reference, 1e-6)
    assert_same(generate(fresh_pipeline("alpha", compile_only=True)), reference, 1e-6)


# ---- compile options ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"compile_only": True}])
def test_stored_options_come_along_on_every_route(options, converted, tmp_path):
    folder = tmp_path / "stored"
    shutil.copytree(converted("alpha"), folder)
    transformer = folder / "transformer"
    model = read_ir(converted("alpha") / "transformer")
    stored = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}
    helper.store_runtime_options(model, **stored)
    save_ir(model, transformer)
    (transformer / "conversion.json").unlink()  # whose sizes are those of another model
    assert helper.stored_runtime_options(read_ir(transformer)) == stored

    for entrance in (helper.OVPixArtAlphaPipeline, OVDiffusionPipeline):
        pipeline = entrance.from_pretrained(folder, **options)
        compiled = pipeline.transformer.request
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
        assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 64


# ---- threads ------------------------------------------------------------------------------------


def test_several_threads_share_a_pipeline_and_each_gets_its_own_image(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    calls = [
        {"seed": i, "num_inference_steps": 2 + i % 3, "guidance_scale": 1.0 + i} for i in range(8)
    ]
    alone = [generate(pipeline, **call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        together = list(threads.map(lambda call: generate(pipeline, **call), calls))
    for ours, expected in zip(together, alone, strict=True):
        assert_same(ours, expected, 1e-6)


def test_a_call_that_fails_lets_the_next_thread_in(ov_pipeline):
    def stop(*step):
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as threads:
        stopped = threads.submit(generate, ov_pipeline("alpha"), callback=stop)
        assert isinstance(stopped.exception(), KeyboardInterrupt)
        assert threads.submit(generate, ov_pipeline("alpha")).result(timeout=120).std() > 0


# ---- devices ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "HETERO:CPU", "AUTO:-GPU"])
def test_devices_in_lists_generate_the_same(device, fresh_pipeline, ov_pipeline):
    assert_same(
        generate(fresh_pipeline("alpha", device=device)), generate(ov_pipeline("alpha")), 1e-6
    )


def test_t5_and_vae_carry_their_scales_for_16_bit_devices(converted, fresh_pipeline, tmp_path):
    """GPUs read it, CPUs do not: here only that it is there, and survives saving, can be tested."""
    path = ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]
    fresh_pipeline("alpha", compile=False).save_pretrained(tmp_path)
    for folder in (converted("alpha"), tmp_path):
        models = {name: read_ir(folder / name) for name in helper.COMPONENTS}
        scales = {
            n: one.get_rt_info(path).value for n, one in models.items() if one.has_rt_info(path)
        }
        assert scales == {"text_encoder": "8.0", "vae_decoder": "128.0"}


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_vae_has_a_scale_where_its_configuration_asks_for_it(force_upcast):
    vae = build_vae()
    vae.register_to_config(force_upcast=force_upcast)
    path = ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]
    for trace in (trace_vae_decoder, trace_vae_encoder):
        assert trace(vae).has_rt_info(path) == force_upcast


# ---- a second load ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"compile_only": True}])
def test_compiled_models_are_kept_in_the_cache(options, fresh_pipeline, tmp_path):
    settings = {**options, "ov_config": {**F32, "CACHE_DIR": str(tmp_path)}}
    first = generate(fresh_pipeline("alpha", **settings))
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.blob")}
    assert len(kept) == 3
    second = fresh_pipeline("alpha", **settings)
    loaded = second.components.values()
    assert all(component.request.get_property("LOADED_FROM_CACHE") for component in loaded)
    assert (generate(second) == first).all()
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.blob")} == kept


# ---- static shapes ------------------------------------------------------------------------------


def test_static_shapes_generate_the_same_with_and_without_guidance(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha-ms", compile=False)
    pipeline.reshape(1, 96, 64, 2, max_sequence_length=40)
    assert (pipeline.batch_size, pipeline.height, pipeline.width) == (1, 96, 64)
    ports = [port for model in pipeline.ov_models.values() for port in model.inputs]
    assert all(port.get_partial_shape().is_static for port in ports)
    for guidance in (4.5, 1.0):
        call = {"guidance_scale": guidance, "num_images_per_prompt": 2, "height": 96}
        assert_same(generate(pipeline, **call), generate(ov_pipeline("alpha-ms"), **call))


def test_static_shapes_are_taken_for_granted_and_end_binning(fresh_pipeline):
    pipeline = fresh_pipeline("sigma", compile=False).reshape(1, 48, 80, 1)
    tokens = pipeline.text_encoder.model.input("input_ids").shape[1]
    assert tokens == 300
    image = pipeline("a star", num_inference_steps=2).images[0]  # binning is on by default
    assert image.size == (80, 48)


def test_static_shapes_can_be_freed_again(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(2, 64, 64, 1)
    pipeline.reshape(-1, -1, -1, -1)
    assert (pipeline.batch_size, pipeline.height, pipeline.width) == (-1, -1, -1)
    assert_same(generate(pipeline), generate(ov_pipeline("alpha")), 1e-6)


def test_height_and_width_alone_can_be_static(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(-1, 64, 64)
    call = {"prompt": ["a star", "a circle"]}
    assert_same(generate(pipeline, **call), generate(ov_pipeline("alpha"), **call))


def test_the_number_of_images_alone_can_be_static(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(1, -1, -1, 1)
    for size in ({"height": 64, "width": 64}, {"height": 48, "width": 80}):
        assert_same(generate(pipeline, **size), generate(ov_pipeline("alpha"), **size))


@pytest.fixture(scope="module")
def static_pipeline(converted):
    pipeline = OVDiffusionPipeline.from_pretrained(converted("alpha"), compile=False)
    return pipeline.reshape(1, 64, 64, 1, max_sequence_length=40)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 128}, "height=128 .* 64"),
        ({"prompt": ["a", "b"]}, "number of prompts=2 .* 1"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt=2 .* 1"),
        ({"max_sequence_length": 70}, "max_sequence_length=70 .* 40"),
    ],
)
def test_another_size_than_the_static_one_is_refused(call, message, static_pipeline):
    with pytest.raises(ValueError, match=message):
        generate(static_pipeline, **call)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"height": 100}, "height=100 .* multiple of 16"),
        ({"batch_size": 0}, "batch_size=0 .* from 1, or -1"),
        ({"max_sequence_length": -3}, "max_sequence_length=-3"),
    ],
)
def test_impossible_shapes_are_refused(shape, message, static_pipeline):
    with pytest.raises(ValueError, match=message):
        static_pipeline.reshape(**{"batch_size": 1, "height": 64, "width": 64, **shape})


# ---- options that do not work -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "word"),
    [("XPU", "XPU"), ("HETERO:NPU,CPU", "NPU"), (None, "None"), ("", "''"), (3, "3")],
)
def test_a_device_that_is_not_there_is_named(device, word, converted):
    with refused(ValueError, "device=", word, "'CPU'"):
        helper.OVPixArtAlphaPipeline.from_pretrained(converted("alpha"), device=device)


def test_code_from_a_models_folder_is_never_allowed(converted):
    with refused(ValueError, "trust_remote_code=True", "leave it out"):
        helper.OVPixArtAlphaPipeline.from_pretrained(converted("alpha"), trust_remote_code=True)


def test_the_wrong_class_names_the_right_one(converted):
    with refused(ValueError, "is a PixArtSigmaPipeline: load it with OVPixArtSigma"):
        helper.OVPixArtAlphaPipeline.from_pretrained(converted("sigma"))
