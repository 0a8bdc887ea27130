"""Pictures from OpenVINO against pictures from torch, and everything a call can say."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from conftest import F32
from optimum.intel.openvino import OVDiffusionPipeline, OVPipelineForText2Image

import ov_pixart_helper as helper

SMALL = {
    "prompt": "a small red circle above the sea",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "max_sequence_length": 40,
    "use_resolution_binning": False,
    "output_type": "np",
}
FAMILIES = ["alpha", "sigma", "alpha-ms", "lcm"]


def draw(pipeline, seed=0, **call):
    call = {**SMALL, **call}
    call.setdefault("generator", torch.Generator().manual_seed(seed))
    return np.asarray(pipeline(**call).images)


def assert_same(ours, reference, tolerance=2e-4):
    assert ours.shape == reference.shape
    error = np.abs(ours - reference).max() / np.ptp(reference)
    assert error <= tolerance, f"off by {error:.1e} of the range"


# ---- the same pictures as torch -----------------------------------------------------------------

CALLS = {
    "square": {},
    "wide": {"height": 48, "width": 112},
    "tall": {"height": 112, "width": 48},
    "larger": {"height": 160, "width": 128},
    "guidance off": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a blue star"},
    "several prompts": {"prompt": ["a blue star", "a large green square on the hill"]},
    "several pictures a prompt": {"num_images_per_prompt": 3},
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
@pytest.mark.parametrize("family", FAMILIES)
def test_openvino_draws_what_torch_draws(family, call, ov_pipeline, torch_pipeline):
    assert_same(draw(ov_pipeline(family), **call), draw(torch_pipeline(family), **call))


@pytest.mark.parametrize("family", ["alpha", "sigma"])
@pytest.mark.parametrize("size", [{}, {"height": 200, "width": 350}, {"height": 512, "width": 128}])
def test_resolution_bins_are_those_of_torch(family, size, ov_pipeline, torch_pipeline):
    call = {
        **{"height": None, "width": None, "use_resolution_binning": True},
        **{"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 300},
        **size,
    }
    ours = draw(ov_pipeline(family), **call)
    assert_same(ours, draw(torch_pipeline(family), **call))
    assert ours.shape[1:3] == (size.get("height", 256), size.get("width", 256))


SCHEDULES = {
    "fractional timesteps": ("EulerDiscreteScheduler", {"num_inference_steps": 4}),
    "DDIM": ("DDIMScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Heun, two calls a step": ("HeunDiscreteScheduler", {}),
    "noise at every step": ("DDPMScheduler", {}),
    "one step from the middle": ("DDPMScheduler", {"timesteps": [400], "guidance_scale": 1.0}),
    "LCM in one step": ("LCMScheduler", {"num_inference_steps": 1, "guidance_scale": 0.0}),
    "custom sigmas": ("EulerDiscreteScheduler", {"sigmas": [14.6, 3.0, 0.5]}),
}


@pytest.mark.parametrize(("name", "call"), SCHEDULES.values(), ids=SCHEDULES)
def test_every_scheduler_finds_its_timesteps(name, call, ov_pipeline, torch_pipeline):
    pictures = []
    for shared in (ov_pipeline("alpha"), torch_pipeline("alpha")):
        original = shared.scheduler
        shared.scheduler = getattr(diffusers, name).from_config(original.config)
        try:
            pictures.append(draw(shared, **call))
        finally:
            shared.scheduler = original
    assert_same(*pictures)


def test_a_comparison_of_pictures_would_notice(ov_pipeline):
    """Random models could ignore their inputs; these do not, so the tests above mean something."""
    pipeline = ov_pipeline("alpha-ms")
    picture = draw(pipeline)
    assert picture.std() > 0.1
    for other in ({"prompt": "the night sky"}, {"guidance_scale": 1.0}, {"negative_prompt": "sea"}):
        assert np.abs(draw(pipeline, **other) - picture).mean() > 0.02, other

    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "encoder_attention_mask": torch.ones(1, 6),
        "timestep": torch.tensor([500]),
    }
    size = {"resolution": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.tensor([[1.0]])}
    noise = pipeline.transformer(**inputs, added_cond_kwargs=size).sample
    masked = {"encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0]])}
    for change, conditions in (
        (masked, {}),
        ({"timestep": torch.tensor([501])}, {}),
        ({}, {"resolution": torch.tensor([[64.0, 128.0]])}),
        ({}, {"aspect_ratio": torch.tensor([[2.0]])}),
    ):
        other = pipeline.transformer(
            **{**inputs, **change}, added_cond_kwargs={**size, **conditions}
        ).sample
        assert (other - noise).abs().mean() > 0.02 * noise.std(), (change, conditions)


def test_padding_does_not_show(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    assert_same(draw(pipeline, max_sequence_length=40), draw(pipeline, max_sequence_length=70))


@torch.no_grad()
def test_padding_is_neither_read_nor_looked_at(fresh_pipeline, torch_pipeline, monkeypatch):
    pipeline, seen = fresh_pipeline("alpha"), {}
    count = helper._count_tokens
    words = len(pipeline.tokenizer(SMALL["prompt"]).input_ids)
    for name in ("text_encoder", "transformer"):
        part = getattr(pipeline, name)

        def watch(inputs, part=part, run=part.request, name=name, **options):
            key = "input_ids" if name == "text_encoder" else "encoder_hidden_states"
            seen.setdefault(name, []).append(np.asarray(inputs[key]).shape[1])
            return run(inputs, **options)

        monkeypatch.setattr(part, "request", watch)
    short = draw(pipeline)
    assert sorted(set(seen["text_encoder"])) == [1, words]  # no prompt is one token
    assert set(seen["transformer"]) == {words}

    said, mask = pipeline.encode_prompt(SMALL["prompt"], do_classifier_free_guidance=False)[:2]
    assert said.shape[1] == 120 and mask.sum() == words
    assert (said[:, words:] == 0).all()
    expected = torch_pipeline("alpha").encode_prompt(SMALL["prompt"], False)[0]
    assert torch.allclose(said[:, :words], expected[:, :words], atol=1e-4)

    pipeline.text_encoder.forget()
    monkeypatch.setattr(helper, "_count_tokens", lambda masks: masks.shape[1])
    assert_same(short, draw(pipeline))
    assert max(seen["text_encoder"]) == max(seen["transformer"]) > words
    assert [count(mask) for mask in ([[1, 1, 0]], [[1, 0, 0], [1, 1, 0]], [[0, 1, 0]])] == [2, 2, 2]
    assert count([[0, 0, 0], [1, 0, 0]]) == 3  # who has nothing else to look at keeps it


@pytest.mark.parametrize("family", ["alpha", "alpha-ms"])
def test_sixteen_bits_know_where_in_the_schedule_they_are(family, converted, torch_pipeline):
    """In bfloat16, OpenVINO's own choice where the CPU has it, noise is as good as torch's."""
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "encoder_attention_mask": torch.ones(2, 6),
        "timestep": torch.tensor([937, 501]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 96.0], [1088.0, 960.0]]),
            "aspect_ratio": torch.tensor([[0.67], [1.13]]),
        },
    }
    with torch.no_grad():
        reference = torch_pipeline(family).transformer(**inputs).sample
    pipeline = OVDiffusionPipeline.from_pretrained(
        converted(family), ov_config={"INFERENCE_PRECISION_HINT": "bf16"}
    )
    error = pipeline.transformer(**inputs).sample - reference
    assert error.std() < 0.03 * reference.std()  # 0.3 to 0.6 with the angles rounded


# ---- everything else a call can say -------------------------------------------------------------


def test_embeddings_and_latents_can_be_handed_in(ov_pipeline, torch_pipeline):
    pictures = []
    for pipeline in (ov_pipeline("alpha"), torch_pipeline("alpha")):
        with torch.no_grad():
            embeds, mask, negative, negative_mask = pipeline.encode_prompt(
                "a blue star", negative_prompt="red", max_sequence_length=40
            )
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        picture = draw(
            pipeline,
            prompt=None,
            negative_prompt=None,
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=negative_mask,
            latents=latents,
        )
        pictures.append(picture)
    assert_same(*pictures)


def test_a_list_of_generators_seeds_each_picture(ov_pipeline):
    def seeds(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    both = draw(ov_pipeline("alpha"), num_images_per_prompt=2, generator=seeds(3, 4))
    for seed, picture in zip((3, 4), both, strict=True):
        assert_same(draw(ov_pipeline("alpha"), generator=seeds(seed))[0], picture)


def test_callback_and_output_types(ov_pipeline, capsys):
    pipeline, seen = ov_pipeline("alpha"), []
    call = {**SMALL, "output_type": "pil", "return_dict": False}
    ((picture,),) = pipeline(**call, callback=lambda *step: seen.append(step), callback_steps=2)
    assert picture.size == (64, 64)
    assert [step for step, _, _ in seen] == [0, 2]
    assert seen[0][2].shape == (1, 4, 8, 8)
    assert draw(pipeline, output_type="pt").shape == (1, 3, 64, 64)
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""  # set_progress_bar_config(disable=True)


# ---- load and save ------------------------------------------------------------------------------


def test_optimums_own_entrances_lead_here(converted):
    for entrance in (OVDiffusionPipeline, OVPipelineForText2Image):
        for family in ("alpha", "sigma"):
            pipeline = entrance.from_pretrained(converted(family), compile=False)
            expected = {
                "alpha": helper.OVPixArtAlphaPipeline,
                "sigma": helper.OVPixArtSigmaPipeline,
            }
            assert type(pipeline) is expected[family]
            assert pipeline.transformer.request is None


@pytest.mark.parametrize("entrance", [helper.OVPixArtAlphaPipeline, OVPipelineForText2Image])
def test_a_torch_folder_is_converted_on_the_way(entrance, checkpoint, ov_pipeline):
    pipeline = entrance.from_pretrained(checkpoint("alpha"), weight_format="fp32", ov_config=F32)
    assert_same(draw(pipeline), draw(ov_pipeline("alpha")), 1e-6)
    folder = pipeline.model_save_dir
    assert folder.is_dir() if hasattr(folder, "is_dir") else True
    assert not list(checkpoint("alpha").rglob("*.xml"))  # nothing is written beside the checkpoint


def test_saved_and_loaded_it_draws_the_same(fresh_pipeline, tmp_path):
    pipeline = fresh_pipeline("sigma")
    helper.store_runtime_options(pipeline.vae_decoder.model, DYNAMIC_QUANTIZATION_GROUP_SIZE=64)
    pipeline.save_pretrained(tmp_path)
    again = helper.OVPixArtSigmaPipeline.from_pretrained(tmp_path, ov_config=F32)
    assert_same(draw(again), draw(pipeline), 1e-6)
    assert again.vae_decoder.ov_config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "64"


def test_a_pipeline_is_not_saved_over_its_own_weights(fresh_pipeline, converted):
    with pytest.raises(ValueError, match=r"save_directory=.*choose another"):
        fresh_pipeline("alpha").save_pretrained(converted("alpha"))


def test_half_to_and_compile_only(fresh_pipeline, ov_pipeline):
    reference = draw(ov_pipeline("alpha"))
    assert_same(draw(fresh_pipeline("alpha").half()), reference, 0.02)
    assert_same(draw(fresh_pipeline("alpha").to("CPU", torch.float32)), reference, 1e-6)
    assert_same(draw(fresh_pipeline("alpha", compile_only=True)), reference, 1e-6)


# ---- compile options ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"compile_only": True}])
def test_stored_options_come_along_on_every_route(options, converted, tmp_path):
    folder = tmp_path / "stored"
    shutil.copytree(converted("alpha"), folder)
    xml = folder / "transformer" / "openvino_model.xml"
    model = helper.ov.Core().read_model(xml.read_bytes(), xml.with_suffix(".bin").read_bytes())
    stored = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}
    helper.store_runtime_options(model, **stored)
    helper.ov.save_model(model, xml, compress_to_fp16=False)
    (folder / "transformer" / "conversion.json").unlink()  # whose checksums are of another model

    for entrance in (helper.OVPixArtAlphaPipeline, OVDiffusionPipeline):
        if options and entrance is OVDiffusionPipeline:
            continue  # compiles from disk before anything of ours runs
        pipeline = entrance.from_pretrained(folder, **options)
        compiled = pipeline.transformer.request
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == helper.ov.Type.f32
        assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 64


def test_the_users_options_win_and_each_model_has_its_own(fresh_pipeline):
    pipeline = fresh_pipeline("alpha", ov_config={"NUM_STREAMS": "1"}, compile=False)
    model = pipeline.transformer.model
    helper.store_runtime_options(model, INFERENCE_PRECISION_HINT="bf16")
    again = helper.OVPixArtAlphaPipeline(
        scheduler=pipeline.scheduler,
        tokenizer=pipeline.tokenizer,
        model_save_dir=pipeline.model_save_dir,
        compile=False,
        ov_config=F32,
        **pipeline.ov_models,
    )
    assert again.transformer.ov_config["INFERENCE_PRECISION_HINT"] == "f32"
    again.transformer.ov_config["X"] = "1"
    assert "X" not in again.vae_decoder.ov_config
    with pytest.raises(ValueError, match="NUM_STREAMS='1' cannot be stored"):
        helper.store_runtime_options(model, NUM_STREAMS="1")


def test_several_threads_share_a_pipeline_and_each_gets_its_own_picture(ov_pipeline):
    pipeline = ov_pipeline("alpha")
    calls = [
        {"seed": i, "num_inference_steps": 2 + i % 3, "guidance_scale": 1.0 + i} for i in range(8)
    ]
    alone = [draw(pipeline, **call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        together = list(threads.map(lambda call: draw(pipeline, **call), calls))
    for ours, expected in zip(together, alone, strict=True):
        assert_same(ours, expected, 1e-6)


def test_a_call_that_fails_lets_the_next_thread_in(ov_pipeline):
    def stop(*step):
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as threads:
        stopped = threads.submit(draw, ov_pipeline("alpha"), callback=stop)
        assert isinstance(stopped.exception(), KeyboardInterrupt)
        assert threads.submit(draw, ov_pipeline("alpha")).result(timeout=120).std() > 0


# ---- devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "HETERO:CPU", "AUTO:-GPU"])
def test_devices_in_lists_draw_the_same(device, fresh_pipeline, ov_pipeline):
    assert_same(draw(fresh_pipeline("alpha", device=device)), draw(ov_pipeline("alpha")), 1e-6)


def test_t5_carries_its_scale_for_16_bit_devices(converted, fresh_pipeline, tmp_path):
    """GPUs read it, CPUs do not: here only that it is there, and survives saving, can be tested."""
    path = ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]
    fresh_pipeline("alpha", compile=False).save_pretrained(tmp_path)
    for folder in (converted("alpha"), tmp_path):
        has = {
            name: helper.ov.Core()
            .read_model(folder / name / "openvino_model.xml")
            .has_rt_info(path)
            for name in helper.PARTS
        }
        assert has == {"text_encoder": True, "transformer": False, "vae_decoder": False}


# ---- prompts are read once ----------------------------------------------------------------------


@pytest.fixture
def counted(fresh_pipeline):
    """`counted(**options)`: a pipeline, and the list of texts that its T5 has read."""

    def load(family="alpha", **options):
        pipeline, texts = fresh_pipeline(family, **options), []
        read = pipeline.text_encoder._read

        def counting(new):
            texts.extend(new)
            return read(new)

        pipeline.text_encoder._read = counting
        return pipeline, texts

    return load


def test_the_same_prompt_is_read_once(counted, ov_pipeline):
    pipeline, texts = counted()
    first = draw(pipeline)
    assert len(texts) == 2  # the prompt, and no prompt
    assert (draw(pipeline) == first).all()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    draw(pipeline, num_images_per_prompt=2, guidance_scale=1.0, height=96)
    assert len(texts) == 2
    assert_same(first, draw(ov_pipeline("alpha")), 1e-6)


@pytest.mark.parametrize(
    ("call", "read"),
    [
        ({"prompt": "another"}, 1),
        ({"prompt": [SMALL["prompt"], "another", "another"]}, 1),
        ({"negative_prompt": "another"}, 1),
        ({"max_sequence_length": 41}, 2),
        ({"prompt": "A <b>Star</b>", "clean_caption": True}, 1),
    ],
)
def test_what_is_new_is_read(call, read, counted, ov_pipeline):
    pipeline, texts = counted()
    draw(pipeline)
    texts.clear()
    assert_same(draw(pipeline, **call), draw(ov_pipeline("alpha"), **call), 1e-6)
    assert len(texts) == read


def test_another_device_or_shape_reads_anew(counted):
    pipeline, texts = counted()
    draw(pipeline)
    for change in (lambda: pipeline.to("CPU"), lambda: pipeline.reshape(1, 64, 64, 1)):
        texts.clear()
        change()
        draw(pipeline, max_sequence_length=120)
        assert len(texts) == 2


def test_only_the_last_prompts_are_remembered(counted):
    pipeline, texts = counted()
    for number in range(20):
        pipeline.encode_prompt(f"a star {'red ' * number}", do_classifier_free_guidance=False)
    assert len(texts) == 20
    assert len(pipeline.text_encoder._answers) == pipeline.text_encoder.REMEMBERED


@pytest.mark.parametrize("entrance", [OVDiffusionPipeline, OVPipelineForText2Image])
@pytest.mark.parametrize("options", [{}, {"compile_only": True}])
def test_released_between_prompts_the_text_encoder_says_the_same(
    entrance, options, converted, ov_pipeline
):
    if options and entrance is OVDiffusionPipeline:
        entrance = helper.OVPixArtAlphaPipeline
    pipeline = entrance.from_pretrained(
        converted("alpha"), ov_config=F32, release_text_encoder=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    encoder = pipeline.text_encoder
    for prompt in (SMALL["prompt"], SMALL["prompt"], "another", SMALL["prompt"]):
        assert encoder._model is None and encoder.request is None
        assert_same(draw(pipeline, prompt=prompt), draw(ov_pipeline("alpha"), prompt=prompt), 1e-6)


def test_a_released_text_encoder_keeps_its_shape_and_can_be_saved(fresh_pipeline, tmp_path):
    pipeline = fresh_pipeline("alpha", compile=False)
    pipeline.reshape(2, 64, 64, 1, max_sequence_length=40)
    call = {"prompt": ["a star", "a hill"], "negative_prompt": ["red", "blue"]}
    picture = draw(pipeline, **call)
    pipeline.release_text_encoder()
    assert pipeline.batch_size == 2
    assert pipeline.text_encoder._model is None  # to ask for the shape does not load it
    assert (draw(pipeline, **call) == picture).all()
    draw(pipeline, prompt=["a circle", "a hill"], negative_prompt="")
    assert list(pipeline.text_encoder.model.input("input_ids").shape) == [2, 40]
    pipeline.release_text_encoder()
    pipeline.reshape(-1, -1, -1)
    pipeline.release_text_encoder()
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "text_encoder" / "openvino_model.bin").is_file()


def test_a_text_encoder_that_could_not_come_back_is_not_released(fresh_pipeline, tmp_path):
    pipeline = fresh_pipeline("alpha", compile=False)
    pipeline.text_encoder.model_save_dir = tmp_path
    with pytest.raises(FileNotFoundError, match=r"text encoder .* keep the folder"):
        pipeline.release_text_encoder()
    assert pipeline.text_encoder._model is not None


# ---- large pictures -----------------------------------------------------------------------------


def test_tiles_are_blended_as_diffusers_blends_them(fresh_pipeline, checkpoint):
    ours = fresh_pipeline("alpha", compile=False).vae
    reference = diffusers.AutoencoderKL.from_pretrained(checkpoint("alpha") / "vae")
    latents = torch.randn(2, 4, 20, 13, generator=torch.Generator().manual_seed(0))
    whole = ours.decode(latents)[0]
    for vae in (ours, reference):
        vae.enable_tiling()
    with torch.no_grad():
        expected = reference.decode(latents).sample
    assert_same(ours.decode(latents, return_dict=False)[0].numpy(), expected.numpy())
    assert (ours.decode(latents)[0] - whole).abs().max() > 0.01  # there were tiles
    ours.disable_tiling()
    assert torch.equal(ours.decode(latents)[0], whole)


def test_slices_change_nothing(fresh_pipeline):
    pipeline = fresh_pipeline("alpha")
    whole, batches = draw(pipeline, num_images_per_prompt=3), []
    decode = pipeline.vae.decoder.forward
    pipeline.vae.decoder.forward = lambda z, *args: batches.append(len(z)) or decode(z, *args)
    pipeline.vae.enable_slicing()
    assert_same(draw(pipeline, num_images_per_prompt=3), whole, 1e-6)
    assert batches == [1, 1, 1]


def test_tiles_and_static_shapes_exclude_each_other(fresh_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(1, 128, 128, 1)
    pipeline.vae.enable_tiling()
    with pytest.raises(ValueError, match=r"static shapes: reshape\(-1, -1, -1\)"):
        draw(pipeline, height=128, width=128, max_sequence_length=120)


# ---- a second start -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"compile_only": True}])
def test_compiled_models_are_kept_in_the_cache(options, fresh_pipeline, tmp_path):
    settings = {**options, "ov_config": {**F32, "CACHE_DIR": str(tmp_path)}}
    first = draw(fresh_pipeline("alpha", **settings))
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.blob")}
    assert len(kept) == 3
    second = fresh_pipeline("alpha", **settings)
    parts = second.components.values()
    assert all(part.request.get_property("LOADED_FROM_CACHE") for part in parts)
    assert (draw(second) == first).all()
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.blob")} == kept


# ---- static shapes ------------------------------------------------------------------------------


def test_static_shapes_draw_the_same_with_and_without_guidance(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha-ms", compile=False)
    pipeline.reshape(1, 96, 64, 2, max_sequence_length=40)
    assert (pipeline.batch_size, pipeline.height, pipeline.width) == (1, 96, 64)
    ports = [port for model in pipeline.ov_models.values() for port in model.inputs]
    assert all(port.get_partial_shape().is_static for port in ports)
    for guidance in (4.5, 1.0):
        call = {"guidance_scale": guidance, "num_images_per_prompt": 2, "height": 96}
        assert_same(draw(pipeline, **call), draw(ov_pipeline("alpha-ms"), **call))


def test_static_shapes_are_taken_for_granted_and_end_binning(fresh_pipeline):
    pipeline = fresh_pipeline("sigma", compile=False).reshape(1, 48, 80, 1)
    tokens = pipeline.text_encoder.model.input("input_ids").shape[1]
    assert tokens == 300
    picture = pipeline("a star", num_inference_steps=2).images[0]  # binning is on by default
    assert picture.size == (80, 48)


def test_static_shapes_can_be_freed_again(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(2, 64, 64, 1)
    pipeline.reshape(-1, -1, -1, -1)
    assert (pipeline.batch_size, pipeline.height, pipeline.width) == (-1, -1, -1)
    assert_same(draw(pipeline), draw(ov_pipeline("alpha")), 1e-6)


def test_height_and_width_alone_can_be_static(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(-1, 64, 64)
    call = {"prompt": ["a star", "a circle"]}
    assert_same(draw(pipeline, **call), draw(ov_pipeline("alpha"), **call))


def test_the_number_of_pictures_alone_can_be_static(fresh_pipeline, ov_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(1, -1, -1, 1)
    for size in ({"height": 64, "width": 64}, {"height": 48, "width": 80}):
        assert_same(draw(pipeline, **size), draw(ov_pipeline("alpha"), **size))


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
        draw(static_pipeline, **call)


@pytest.fixture(scope="module")
def static_pipeline(converted):
    pipeline = OVDiffusionPipeline.from_pretrained(converted("alpha"), compile=False)
    return pipeline.reshape(1, 64, 64, 1, max_sequence_length=40)


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


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": None}, "prompt=None .* string"),
        ({"prompt": []}, r"prompt=\[\] .* string"),
        ({"prompt": ["a", 1]}, "prompt=.* string"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt=.* list of 1"),
        ({"height": 100}, "height=100 .* multiple of 16"),
        ({"width": -64}, "width=-64 .* multiple of 16"),
        ({"height": 0, "use_resolution_binning": True}, "height=0 .* from 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 .* from 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 .* from 1"),
        ({"num_inference_steps": 1}, "num_inference_steps=1 .* 2 or more with DPMSolver"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 .* from 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan .* number"),
        ({"max_sequence_length": 0}, "max_sequence_length=0 .* from 1"),
    ],
)
def test_a_bad_call_is_answered_in_one_line(call, message, ov_pipeline):
    with pytest.raises(ValueError, match=message) as caught:
        draw(ov_pipeline("alpha"), **call)
    assert "\n" not in str(caught.value)


def test_a_model_without_bins_says_so(fresh_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False)
    pipeline.transformer.register_to_config(sample_size=16)
    with pytest.raises(ValueError, match=r"use_resolution_binning=True .* False"):
        pipeline("a star")


@pytest.mark.parametrize("options", [{"device": "XPU"}, {"trust_remote_code": True}])
def test_a_bad_option_is_answered_in_one_line(options, converted):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=") as caught:
        helper.OVPixArtAlphaPipeline.from_pretrained(converted("alpha"), **options)
    assert "\n" not in str(caught.value)


def test_the_wrong_class_names_the_right_one(converted):
    with pytest.raises(ValueError, match="is a PixArtSigmaPipeline: load it with OVPixArtSigma"):
        helper.OVPixArtAlphaPipeline.from_pretrained(converted("sigma"))


@pytest.mark.parametrize("lost", ["model_index.json", "transformer/openvino_model.xml"])
def test_an_unfinished_folder_says_how_to_finish_it(lost, converted, tmp_path):
    folder = tmp_path / "ov"
    shutil.copytree(converted("alpha"), folder)
    (folder / lost).unlink()
    with pytest.raises(FileNotFoundError, match=r"convert_pipeline\(model_id"):
        helper.OVPixArtAlphaPipeline.from_pretrained(folder)


def test_a_damaged_ir_is_named(converted, tmp_path):
    folder = tmp_path / "ov"
    shutil.copytree(converted("alpha"), folder)
    (folder / "transformer" / "openvino_model.bin").write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match=r"transformer.*damaged.*convert_pipeline\(") as caught:
        helper.OVPixArtAlphaPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


# ---- defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("alpha", (20, 4.5, 120, 256, 256)),
        ("sigma", (20, 4.5, 300, 256, 256)),
        ("alpha-ms", (20, 4.5, 120, 1024, 1024)),
        ("lcm", (4, 0.0, 120, 256, 256)),
        ("alpha-512", (20, 4.5, 120, 512, 512)),
        ("lcm-ms", (4, 0.0, 120, 1024, 1024)),
        ("sigma-512", (20, 4.5, 300, 512, 512)),
        ("sigma-1024", (20, 4.5, 300, 1024, 1024)),
        ("sigma-2k", (20, 4.5, 300, 2048, 2048)),
    ],
)
def test_each_family_knows_its_defaults(family, expected, checkpoint, converted):
    for folder in (checkpoint(family), converted(family)):
        assert helper.default_settings(folder) == helper.GenerationDefaults(*expected)


def test_a_dmd_checkpoint_draws_in_one_step_from_the_middle(checkpoint, converted):
    for folder in (checkpoint("dmd"), converted("dmd")):
        settings = helper.default_settings(folder)
        assert settings == helper.GenerationDefaults(1, 1.0, 120, 512, 512, (400,))
        assert settings.timesteps == (400,)


def test_defaults_of_no_pixart_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_dir="):
        helper.default_settings(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"FluxPipeline.*choose a PixArt"):
        helper.default_settings(tmp_path)
