"""Components in diffusers' places: prompts are encoded once, padding left out, tiles blended."""

import subprocess
import sys
import weakref
from pathlib import Path

import diffusers
import numpy as np
import openvino
import pytest
import torch
from optimum.intel.openvino import OVPipelineForText2Image

import ov_pixart_helper as helper
from ov_pixart import components
from ov_pixart.ir import compile_config, read_ir
from tests.support.parity import F32, SMALL, assert_same, generate, load_exact

ROOT = Path(__file__).parents[1]

# ---- prompts are encoded once -------------------------------------------------------------------


def count_texts(pipeline):
    """The pipeline, and the growing list of texts that its T5 encodes from now on."""
    encoder, texts = pipeline.text_encoder, []
    compile_model = encoder.compile

    def compile_and_count():
        compile_model()
        if not hasattr(encoder.request, "counts"):
            encoder.request = count_runs(encoder.request, texts, "input_ids")

    encoder.compile = compile_and_count
    return pipeline, texts


@pytest.fixture(scope="module")
def shared(converted):
    return count_texts(load_exact(converted("alpha")))


@pytest.fixture
def counted(shared):
    """A pipeline that has encoded nothing yet, and the growing list of texts that it encodes."""
    pipeline, texts = shared
    pipeline.text_encoder.clear_cache()
    texts.clear()
    return pipeline, texts


def count_runs(request, seen, name):
    """`request`, that adds its input `name` to the list `seen`."""

    def run(inputs, **options):
        seen.append(np.asarray(inputs[name]))
        return request(inputs, **options)

    run.counts = True
    return run


def test_the_same_prompt_is_encoded_once(counted, ov_pipeline, monkeypatch):
    pipeline, texts = counted
    first = generate(pipeline)
    assert len(texts) == 2  # the prompt, and the empty one
    assert (generate(pipeline) == first).all()
    euler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    monkeypatch.setattr(pipeline, "scheduler", euler)
    generate(pipeline, num_images_per_prompt=2, guidance_scale=1.0, height=96)
    assert len(texts) == 2
    assert_same(first, generate(ov_pipeline("alpha")), 1e-6)


@pytest.mark.parametrize(
    ("call", "encoded"),
    [
        ({"prompt": "another"}, 1),
        ({"prompt": [SMALL["prompt"], "another", "another"]}, 1),
        ({"negative_prompt": "another"}, 1),
        ({"max_sequence_length": 41}, 2),
        ({"prompt": "A <b>Star</b>", "clean_caption": True}, 1),
    ],
)
def test_new_prompts_are_encoded(call, encoded, counted, ov_pipeline):
    pipeline, texts = counted
    generate(pipeline)
    texts.clear()
    assert_same(generate(pipeline, **call), generate(ov_pipeline("alpha"), **call), 1e-6)
    assert len(texts) == encoded


@pytest.mark.slow
def test_another_device_or_shape_encodes_anew(fresh_pipeline):
    pipeline, texts = count_texts(fresh_pipeline("alpha"))
    generate(pipeline)
    for change in (lambda: pipeline.to("CPU"), lambda: pipeline.reshape(1, 64, 64, 1)):
        texts.clear()
        change()
        generate(pipeline, max_sequence_length=120)
        assert len(texts) == 2


def test_the_least_recent_prompts_leave_the_cache(counted):
    pipeline, texts = counted
    encode = {"do_classifier_free_guidance": False}
    prompts = [
        f"a star {'red ' * number}" for number in range(pipeline.text_encoder.CACHED_PROMPTS)
    ]
    for prompt in [*prompts, "one more", prompts[-1]]:
        pipeline.encode_prompt(prompt, **encode)
    assert len(texts) == len(prompts) + 1
    pipeline.encode_prompt(prompts[0], **encode)
    assert len(texts) == len(prompts) + 2


# ---- a text encoder that leaves memory ----------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """The growing list of IRs that components have read again."""
    read, files = components.read_ir, []
    monkeypatch.setattr(components, "read_ir", lambda file: files.append(file) or read(file))
    return files


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"compile_only": True}], ids=["model", "compiled"])
def test_released_between_prompts_the_text_encoder_encodes_the_same(
    options, converted, ov_pipeline
):
    pipeline = OVPipelineForText2Image.from_pretrained(
        converted("alpha"), ov_config=F32, release_text_encoder=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    for prompt in (SMALL["prompt"], SMALL["prompt"], "another", SMALL["prompt"]):
        assert pipeline.text_encoder.request is None
        ours = generate(pipeline, prompt=prompt)
        assert_same(ours, generate(ov_pipeline("alpha"), prompt=prompt), 1e-6)


def test_a_released_text_encoder_is_held_by_nothing(fresh_pipeline):
    pipeline = fresh_pipeline("alpha")
    pipeline.encode_prompt("a red circle", do_classifier_free_guidance=False)
    compiled = weakref.ref(pipeline.text_encoder.request)
    assert compiled() is not None
    pipeline.release_text_encoder()
    assert compiled() is None


def test_a_released_text_encoder_keeps_its_shape_and_can_be_saved(fresh_pipeline, loads, tmp_path):
    pipeline = fresh_pipeline("alpha", compile=False)
    pipeline.reshape(2, 64, 64, 1, max_sequence_length=40)
    call = {"prompt": ["a star", "a hill"], "negative_prompt": ["red", "blue"]}
    image = generate(pipeline, **call)
    pipeline.release_text_encoder()
    assert pipeline.batch_size == 2
    assert (generate(pipeline, **call) == image).all()
    assert loads == []  # neither the shape nor known prompts need the model
    generate(pipeline, prompt=["a circle", "a hill"], negative_prompt="")
    assert len(loads) == 1
    assert list(pipeline.text_encoder.model.input("input_ids").shape) == [2, 40]
    pipeline.release_text_encoder()
    pipeline.reshape(-1, -1, -1)
    pipeline.release_text_encoder()
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "text_encoder" / "openvino_model.bin").is_file()


def test_a_text_encoder_that_could_not_come_back_is_not_released(fresh_pipeline, loads, tmp_path):
    pipeline = fresh_pipeline("alpha", compile=False)
    pipeline.text_encoder.model_save_dir = tmp_path
    with pytest.raises(FileNotFoundError, match=r"text encoder .* keep the folder"):
        pipeline.release_text_encoder()
    assert generate(pipeline).std() > 0 and loads == []


# ---- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "needed"),
    [
        ([[1, 1, 0]], 2),
        ([[1, 0, 0], [1, 1, 0]], 2),
        ([[0, 1, 0]], 2),
        ([[0, 0, 0], [1, 0, 0]], 3),  # attention needs something to look at
    ],
)
def test_only_padding_is_left_out(masks, needed):
    assert components.count_tokens(np.array(masks)) == needed
    assert components.count_tokens(torch.tensor(masks)) == needed


@torch.no_grad()
def test_padding_is_neither_encoded_nor_attended_to(fresh_pipeline, torch_pipeline, monkeypatch):
    pipeline = fresh_pipeline("alpha")
    words = len(pipeline.tokenizer(SMALL["prompt"]).input_ids)
    seen = {"text_encoder": [], "transformer": []}
    for name, port in (("text_encoder", "input_ids"), ("transformer", "encoder_hidden_states")):
        component = getattr(pipeline, name)
        component.request = count_runs(component.request, seen[name], port)

    def lengths(name):
        return {array.shape[1] for array in seen[name]}

    short = generate(pipeline)
    assert lengths("text_encoder") == {1, words}  # an empty prompt is one token
    assert lengths("transformer") == {words}

    encoded = pipeline.encode_prompt(SMALL["prompt"], do_classifier_free_guidance=False)
    embeddings, mask = encoded[:2]
    assert embeddings.shape[1] == 120 and mask.sum() == words
    assert (embeddings[:, words:] == 0).all()
    expected = torch_pipeline("alpha").encode_prompt(SMALL["prompt"], False)[0]
    assert torch.allclose(embeddings[:, :words], expected[:, :words], atol=1e-4)

    pipeline.text_encoder.clear_cache()
    monkeypatch.setattr(components, "count_tokens", lambda masks: masks.shape[1])
    assert_same(short, generate(pipeline))  # padding that takes part changes nothing
    assert max(lengths("text_encoder")) == max(lengths("transformer")) == 40


def test_the_length_of_padding_does_not_show(ov_pipeline):
    short, long = (generate(ov_pipeline("alpha"), max_sequence_length=n) for n in (40, 70))
    assert_same(short, long)


# ---- large images -------------------------------------------------------------------------------


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
    whole, batches = generate(pipeline, num_images_per_prompt=3), []
    decode = pipeline.vae.decoder.forward
    pipeline.vae.decoder.forward = lambda z, *args: batches.append(len(z)) or decode(z, *args)
    pipeline.vae.enable_slicing()
    assert_same(generate(pipeline, num_images_per_prompt=3), whole, 1e-6)
    assert batches == [1, 1, 1]


def test_tiles_and_static_shapes_exclude_each_other(fresh_pipeline):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(1, 128, 128, 1)
    pipeline.vae.enable_tiling()
    with pytest.raises(ValueError, match=r"static shapes: reshape\(-1, -1, -1\)"):
        generate(pipeline, height=128, width=128, max_sequence_length=120)


# ---- compile options ----------------------------------------------------------------------------


def test_each_component_has_its_own_options_and_the_users_win(fresh_pipeline):
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
    assert helper.stored_runtime_options(model) == {"INFERENCE_PRECISION_HINT": "bf16"}
    with pytest.raises(ValueError, match="NUM_STREAMS='1' cannot be stored"):
        helper.store_runtime_options(model, NUM_STREAMS="1")


@pytest.mark.parametrize("options", [{"INFERENCE_NUM_THREADS": 1}, {"NUM_STREAMS": 2}])
def test_one_thread_does_not_end_the_process(options, converted):
    """With bf16 on processors with AMX, OpenVINO divides by zero where it compiles T5."""
    code = (
        "import sys, openvino; from ov_pixart.ir import compile_config, read_ir\n"
        f"model = read_ir(sys.argv[1]); config = compile_config(model, {options})\n"
        "openvino.Core().compile_model(model, 'CPU', config)"
    )
    command = [sys.executable, "-c", code, str(converted("alpha") / "text_encoder")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_t5_has_two_threads_or_runs_in_f32(converted):
    t5, dit = (read_ir(converted("alpha") / name) for name in ("text_encoder", "transformer"))
    threads, hint = "INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT"
    for name in (threads, openvino.properties.inference_num_threads):
        config = compile_config(t5, {name: 1})
        assert config[threads] == 2 or config[hint] == "f32"  # the latter with one processor
    assert compile_config(t5, {"NUM_STREAMS": 2, threads: 2, hint: "bf16"})[hint] == "f32"
    assert compile_config(dit, {threads: 1})[threads] == 1
