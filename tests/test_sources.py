"""Components as people have them: one file, an IR to share, an AutoencoderTiny, or left out."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

import ov_pixart_helper as helper
from ov_pixart.single_file import load_single_file
from tests.support.folders import convert_again
from tests.support.optimized import DATA
from tests.support.parity import (
    assert_same,
    generate,
    load_exact,
    noise_inputs,
    relative_error,
    run_ir,
    torch_noise,
)
from tests.support.refused import refused

WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def output(converted, tmp_path) -> Path:
    """A converted folder, to convert into again."""
    return shutil.copytree(converted("alpha"), tmp_path / "ov")


# ---- single files -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_component_may_be_one_file(name, checkpoint, output, tmp_path):
    """With the configuration of model_id, whose own weights may be missing."""
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    before = {
        part: (output / part / "openvino_model.bin").read_bytes() for part in helper.COMPONENTS
    }
    file = shutil.move(source / WEIGHTS[name], tmp_path / "mine.safetensors")
    written = {"vae": "vae_decoder"}.get(name, name)
    assert convert_again(source, output, **{name: str(file)}) == {written}
    assert (output / written / "openvino_model.bin").read_bytes() == before[written]
    assert convert_again(source, output, **{name: file}) == set()
    os.utime(file, ns=(1, 1))
    assert convert_again(source, output, **{name: file}) == {written}


def as_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names of PixArt's own repository, with what only that one stores."""
    state = dict(state)
    original = {"pos_embed": torch.zeros(1, 4, 48), "y_embedder.y_embedding": torch.zeros(120, 32)}
    original["final_layer.scale_shift_table"] = state.pop("scale_shift_table")
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks.")}
    for i in blocks:
        ours, theirs = f"transformer_blocks.{i}.", f"blocks.{i}."
        original[f"{theirs}scale_shift_table"] = state.pop(f"{ours}scale_shift_table")
        for kind in ("weight", "bias"):
            qkv = [state.pop(f"{ours}attn1.to_{x}.{kind}") for x in "qkv"]
            original[f"{theirs}attn.qkv.{kind}"] = torch.cat(qkv)
            kv = [state.pop(f"{ours}attn2.to_{x}.{kind}") for x in "kv"]
            original[f"{theirs}cross_attn.kv_linear.{kind}"] = torch.cat(kv)
    for name, tensor in state.items():
        for ours, theirs in (
            ("transformer_blocks", "blocks"),
            ("attn1.to_out.0", "attn.proj"),
            ("attn2.to_q", "cross_attn.q_linear"),
            ("attn2.to_out.0", "cross_attn.proj"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
            ("pos_embed.", "x_embedder."),
            ("caption_projection.linear_", "y_embedder.y_proj.fc"),
            ("adaln_single.emb.timestep_embedder", "t_embedder"),
            ("adaln_single.emb.resolution_embedder", "csize_embedder"),
            ("adaln_single.emb.aspect_ratio_embedder", "ar_embedder"),
            ("adaln_single.linear", "t_block.1"),
            ("linear_1", "mlp.0"),
            ("linear_2", "mlp.2"),
            ("proj_out", "final_layer.linear"),
        ):
            name = name.replace(ours, theirs)
        original[name] = tensor
    return original


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "_orig_mod."])
@pytest.mark.parametrize("family", ["alpha", "alpha-ms"])
def test_names_of_the_original_repository_are_read(
    family, prefix, checkpoint, torch_pipeline, tmp_path
):
    folder = checkpoint(family)
    original = as_original(load_file(folder / WEIGHTS["transformer"]))
    assert not [name for name in original if "transformer_blocks" in name or "adaln" in name]
    save_file({prefix + name: one for name, one in original.items()}, tmp_path / "x.safetensors")
    loaded = load_single_file("transformer", tmp_path / "x.safetensors", folder / "transformer")
    inputs = noise_inputs()
    sizes = {"resolution": torch.full((2, 2), 512.0), "aspect_ratio": torch.ones(2, 1)}
    conditions = sizes if family == "alpha-ms" else {}
    expected = torch_noise(torch_pipeline(family).transformer, inputs, **conditions)
    assert np.array_equal(torch_noise(loaded, inputs, **conditions), expected)


@pytest.mark.slow
def test_an_original_file_of_16_bits_is_converted(checkpoint, output, tmp_path):
    file = tmp_path / "sigma.safetensors"
    state = as_original(load_file(checkpoint("alpha") / WEIGHTS["transformer"]))
    save_file({name: one.half().contiguous() for name, one in state.items()}, file)
    assert convert_again(checkpoint("alpha"), output, transformer=file) == {"transformer"}
    inputs = noise_inputs()
    expected = torch_noise(
        load_single_file("transformer", file, checkpoint("alpha") / "transformer").float(), inputs
    )
    assert relative_error(run_ir(output / "transformer", **inputs), expected) < 2e-5


def test_a_file_that_does_not_fit_is_refused_before_anything_is_converted(checkpoint, tmp_path):
    source, out, file = checkpoint("alpha"), tmp_path / "ov", tmp_path / "mine.safetensors"
    state = load_file(source / WEIGHTS["transformer"])
    original = as_original(state)
    lost, strange = dict(state), dict(original)
    lost.pop("proj_out.bias")
    strange["blocks.0.attn.sr.weight"] = torch.zeros(2)  # of models with compressed keys
    wide = {**state, "proj_out.bias": torch.zeros(7)}
    for weights, word in (
        (lost, "proj_out.bias"),
        (strange, "blocks.0.attn.sr"),
        (wide, "proj_out"),
    ):
        save_file(weights, file)
        with refused(ValueError, f"transformer={str(file)!r}", "does not fit", word, "model_id"):
            helper.convert_pipeline(source, out, transformer=file)
    vae = load_file(source / WEIGHTS["vae"])
    vae.pop("decoder.conv_in.bias")
    save_file(vae, tmp_path / "vae.safetensors")
    with refused(ValueError, "vae=", "does not fit the configuration"):
        helper.convert_pipeline(source, out, vae=tmp_path / "vae.safetensors")
    file.write_bytes(b"cut short")
    for name in ("transformer", "text_encoder", "vae", "lora"):
        with refused(ValueError, f"{name}={str(file)!r} is damaged", "download it again"):
            helper.convert_pipeline(source, out, **{name: file})
    assert not out.exists()


def test_files_that_cannot_be_read_are_named_with_the_remedy(checkpoint, tmp_path):
    source, out = checkpoint("alpha"), tmp_path / "ov"
    files = {x: tmp_path / f"model.{x}" for x in ("pth", "ckpt", "bin", "gguf", "txt")}
    for file in files.values():
        file.touch()
    for options, *words in [
        ({"transformer": files["pth"]}, "transformer=", "pickled", "never read", ".safetensors"),
        ({"vae": str(files["ckpt"])}, "vae=", "pickled"),
        ({"text_encoder": files["bin"]}, "text_encoder=", "pickled"),
        ({"text_encoder": files["gguf"]}, "text_encoder=", "GGUF", "weight_format='int4'"),
        ({"transformer": files["txt"]}, "transformer=", "cannot be read", "safetensors"),
        ({"scheduler": files["txt"]}, "scheduler=", "is a file", "name the folder"),
    ]:
        with refused(ValueError, *words):
            helper.convert_pipeline(source, out, **options)
    with refused(ValueError, "model_id=", "is a file", "name the folder"):
        helper.convert_pipeline(source / WEIGHTS["transformer"], out)
    for kind, word in (("pth", "only pickled weights (model.pth)"), ("gguf", "only GGUF weights")):
        folder = tmp_path / kind
        folder.mkdir()
        shutil.copy(source / "transformer" / "config.json", folder)
        shutil.copy(files[kind], folder)
        with refused(ValueError, word):
            helper.convert_pipeline(source, out, transformer=folder)
    assert not out.exists()


# ---- an IR that is shared -----------------------------------------------------------------------


def sharing(checkpoint, ov_dir, output, **options):
    options = {"weight_format": "fp32", **options}
    return helper.convert_pipeline(checkpoint("alpha"), output, text_encoder=ov_dir, **options)


@pytest.mark.slow
def test_a_converted_t5_is_shared_and_nothing_writes_through(checkpoint, converted, tmp_path):
    first = shutil.copytree(converted("alpha"), tmp_path / "first")
    before = {file.name: file.read_bytes() for file in (first / "text_encoder").iterdir()}
    weights, graph = "text_encoder/openvino_model.bin", "text_encoder/openvino_model.xml"
    second = sharing(checkpoint, first, tmp_path / "second")
    assert (second / weights).samefile(first / weights)
    assert not (second / graph).samefile(first / graph)  # people edit it by hand
    assert_same(generate(load_exact(second)), generate(load_exact(first)), 0)
    kept = (second / graph).stat().st_mtime_ns
    sharing(checkpoint, first / "text_encoder", second)  # its folder, or the pipeline's
    assert (second / graph).stat().st_mtime_ns == kept

    # every way to write another text encoder into the second folder
    pipeline = load_exact(converted("alpha"))
    pipeline.save_pretrained(second)
    assert not (second / weights).samefile(first / weights)
    shutil.rmtree(second)
    sharing(checkpoint, first, second)
    helper.convert_pipeline(checkpoint("alpha"), second, weight_format="int8")
    assert not (second / weights).samefile(first / weights)
    sharing(checkpoint, first, second)
    helper.convert_text_encoder(
        load_single_file(
            "text_encoder",
            checkpoint("alpha") / WEIGHTS["text_encoder"],
            checkpoint("alpha") / "text_encoder",
        ),
        second / "text_encoder",
    )
    sharing(checkpoint, first, second)
    third = helper.optimize_pipeline(second, tmp_path / "third", "int8-weights")
    assert not (third / weights).samefile(first / weights)
    assert {file.name: file.read_bytes() for file in (first / "text_encoder").iterdir()} == before


@pytest.mark.slow
def test_without_hard_links_an_ir_is_copied(checkpoint, converted, monkeypatch, tmp_path):
    def no_links(*args, **kwargs):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", no_links)
    folder = sharing(checkpoint, converted("alpha"), tmp_path / "ov")
    ours, theirs = (f / "text_encoder" / "openvino_model.bin" for f in (folder, converted("alpha")))
    assert not ours.samefile(theirs) and ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_an_optimized_ir_and_other_components_are_shared_too(checkpoint, optimized, tmp_path):
    int8, folder = optimized("int8-weights"), tmp_path / "ov"
    given = {"text_encoder": int8, "vae": int8 / "vae_decoder", "transformer": int8}
    helper.convert_pipeline(checkpoint("alpha"), folder, **given)
    assert helper.summarize_models(folder).equals(helper.summarize_models(int8))
    assert_same(generate(load_exact(folder)), generate(load_exact(int8)), 0)


def test_an_ir_that_cannot_be_shared_is_refused(checkpoint, converted, tmp_path):
    source, out, ov_dir = checkpoint("alpha"), tmp_path / "ov", converted("alpha")
    damaged = shutil.copytree(ov_dir, tmp_path / "damaged")
    (damaged / "text_encoder" / "openvino_model.bin").write_bytes(b"cut")
    wide = shutil.copytree(ov_dir / "text_encoder", tmp_path / "wide")
    (wide / "conversion.json").unlink()
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "d_model": 4096}))
    for options, *words in [
        ({"text_encoder": damaged}, "damaged"),
        ({"text_encoder": wide}, "d_model=4096", "choose two that fit"),
        (
            {"text_encoder": ov_dir, "weight_format": {"text_encoder": "int8"}},
            "leave 'text_encoder'",
        ),
        ({"transformer": ov_dir, "lora": "any"}, "transformer=", "converted already", "lora="),
        ({"vae": ov_dir, "vae_encoder": True}, "vae=", "converted already", "own checkpoint"),
        ({"text_encoder": ov_dir / "vae_decoder"}, "text_encoder="),
        ({"text_encoder": True}, "text_encoder=True"),
        ({"transformer": False}, "transformer=False"),
        ({"vae_encoder": "yes"}, "vae_encoder='yes'", "True or False"),
    ]:
        with refused((ValueError, FileNotFoundError), *words):
            helper.convert_pipeline(source, out, **options)
    assert not out.exists()


# ---- without a text encoder ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_encoder_may_be_left_out_and_come_back(checkpoint, ov_pipeline, output):
    source = checkpoint("alpha")
    options = {"text_encoder": False, "weight_format": "fp32"}
    helper.convert_pipeline(source, output, **options)
    assert not (output / "text_encoder").exists()
    assert json.loads((output / "model_index.json").read_text())["text_encoder"] == [None, None]
    kept = (output / "transformer" / "openvino_model.xml").stat().st_mtime_ns
    helper.convert_pipeline(source, output, **options)
    assert (output / "transformer" / "openvino_model.xml").stat().st_mtime_ns == kept
    assert list(helper.summarize_models(output).index) == ["transformer", "vae_decoder"]
    with refused(FileNotFoundError, "text_encoder", "missing", "convert it first"):
        helper.optimize_pipeline(output, output.parent / "int8", **DATA)
    with refused(ValueError, "pipelines['lean']", "with a text encoder"):
        helper.compare_pipelines({"lean": output}, "a star", seeds=0)
    lean = load_exact(output)
    with refused(ValueError, "no text encoder", "prompt_embeds=", "encode_prompt"):
        generate(lean)
    embeddings = embed(ov_pipeline("alpha"))
    assert_same(generate(lean, **embeddings), generate(ov_pipeline("alpha")), 0)
    lean.save_pretrained(output.parent / "saved")
    assert_same(
        generate(load_exact(output.parent / "saved"), **embeddings), generate(lean, **embeddings), 0
    )
    assert (output / "tokenizer" / "tokenizer_config.json").is_file()
    helper.convert_pipeline(source, output, weight_format="fp32")
    assert_same(generate(load_exact(output)), generate(ov_pipeline("alpha")), 0)


def embed(pipeline):
    """Arguments of a call with embeddings in place of its text."""
    names = ("prompt_embeds", "prompt_attention_mask")
    names += tuple(f"negative_{name}" for name in names)
    prompt = "a small red circle above the sea"
    tensors = pipeline.encode_prompt(prompt, max_sequence_length=40)
    return {"prompt": None, "negative_prompt": None, **dict(zip(names, tensors, strict=True))}


# ---- other VAEs, and the encoder ----------------------------------------------------------------


def build_taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks, depth = (8, 8, 8, 8), (1, 1, 1, 1)
    vae = AutoencoderTiny(
        encoder_block_out_channels=blocks,
        decoder_block_out_channels=blocks,
        num_encoder_blocks=depth,
        num_decoder_blocks=depth,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.12)
    return vae.eval()


@pytest.fixture(scope="module")
def tiny(checkpoint, tmp_path_factory):
    """α with an AutoencoderTiny, its encoder converted too, and the same in torch."""
    root = tmp_path_factory.mktemp("tiny")
    build_taesd().save_pretrained(root / "taesd")
    source = shutil.copytree(checkpoint("alpha"), root / "source")
    shutil.rmtree(source / "vae")
    shutil.copytree(root / "taesd", source / "vae")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(
        json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]})
    )
    options = {"vae": root / "taesd", "vae_encoder": True, "weight_format": "fp32"}
    return source, helper.convert_pipeline(checkpoint("alpha"), root / "ov", **options)


@pytest.mark.slow
def test_an_autoencoder_tiny_gives_torchs_images_in_every_way_of_decoding(tiny):
    source, folder = tiny
    ours, reference = load_exact(folder), helper.load_pipeline(source)
    assert ours.vae.config.scaling_factor == 1.0
    assert_same(generate(ours), generate(reference))
    ours.vae.enable_slicing()
    assert_same(
        generate(ours, num_images_per_prompt=2), generate(reference, num_images_per_prompt=2)
    )
    for vae in (ours.vae, reference.vae):
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 4
    assert_same(generate(ours), generate(reference))
    static = load_exact(folder).reshape(1, 64, 64, 1)
    assert static.vae.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
    assert helper.default_settings(folder) == helper.default_settings(source)
    assert json.loads((folder / "model_index.json").read_text())["vae"][1] == "AutoencoderTiny"
    assert list(helper.summarize_models(folder).index) == list(helper.COMPONENTS)


@pytest.mark.slow
def test_an_autoencoder_tiny_is_compared_and_optimized(tiny, tmp_path):
    source, folder = tiny
    call = {"prompts": ["a red circle"], "seeds": 0, "num_inference_steps": 2}
    int8 = helper.optimize_pipeline(folder, tmp_path / "int8", **DATA)
    result = helper.compare_pipelines({"torch": source, "ov": folder, "int8": int8}, **call)
    assert set(result.images) == {"torch", "ov", "int8"}
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, exact = (run_ir(one / "vae_decoder", latent_sample=latents) for one in (int8, folder))
    assert np.corrcoef(ours.ravel(), exact.ravel())[0, 1] > 0.98


def test_other_classes_are_refused_by_name_before_anything_is_converted(checkpoint, tmp_path):
    source, out = checkpoint("alpha"), tmp_path / "ov"
    for name, key, value in (
        ("vae", "_class_name", "AutoencoderDC"),
        ("transformer", "_class_name", "SD3Transformer2DModel"),
        ("text_encoder", "model_type", "umt5"),
    ):
        folder = shutil.copytree(source / name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with refused(ValueError, f"{name}={str(folder)!r}", f"holds a {value}", "can be used"):
            helper.convert_pipeline(source, out, **{name: folder})
    assert not out.exists()


@pytest.mark.slow
def test_the_vae_encoder_is_optional_and_equals_torchs(checkpoint, torch_pipeline, output):
    source, image = checkpoint("alpha"), torch.rand(2, 3, 64, 96) * 2 - 1
    with refused(ValueError, "no VAE encoder", "vae_encoder=True"):
        load_exact(output).vae.encode(image)
    assert convert_again(source, output, vae_encoder=True) == set()  # the others are kept
    encoder = output / "vae_encoder" / "openvino_model.xml"
    written = encoder.stat().st_mtime_ns
    assert convert_again(source, output, vae_encoder=True) == set()
    assert encoder.stat().st_mtime_ns == written
    pipeline = load_exact(output)
    vae: AutoencoderKL = torch_pipeline("alpha").vae
    with torch.no_grad():
        expected = vae.encode(image).latent_dist
    ours = pipeline.vae.encode(image).latent_dist
    assert_same(ours.mean.numpy(), expected.mean.numpy(), 2e-5)
    assert_same(ours.std.numpy(), expected.std.numpy(), 2e-5)
    pipeline.save_pretrained(output.parent / "saved")
    again = load_exact(output.parent / "saved").reshape(1, 64, 64, 1)  # the encoder stays free
    assert_same(again.vae.encode(image).latent_dist.mean.numpy(), ours.mean.numpy(), 0)
    assert convert_again(source, output) == set()
    assert not encoder.exists()  # it belongs to a call that asked for it


@pytest.mark.slow
def test_an_autoencoder_tiny_encodes(tiny):
    source, folder = tiny
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    vae = AutoencoderTiny.from_pretrained(source / "vae")
    with torch.no_grad():
        expected = vae.encode(image).latents.numpy()
    assert_same(load_exact(folder).vae.encode(image).latents.numpy(), expected, 2e-5)


@pytest.mark.slow
def test_image_to_image_takes_five_lines(tmp_path, checkpoint, torch_pipeline):
    """As docs/real-checkpoints.md has them; with one step from the end, little changes."""
    folder = helper.convert_pipeline(
        checkpoint("alpha"), tmp_path / "ov", vae_encoder=True, weight_format="fp32"
    )

    def redraw(pipe, image, keep):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            latents = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
        pipe.scheduler.set_timesteps(20)
        steps = pipe.scheduler.timesteps[keep:]
        noise = torch.randn(latents.shape, generator=generator)
        latents = pipe.scheduler.add_noise(latents, noise, steps[:1])
        return generate(pipe, latents=latents, timesteps=steps.tolist())

    image = torch_pipeline("alpha").image_processor.preprocess(
        generate(torch_pipeline("alpha"), seed=7)
    )
    pipe = load_exact(folder)
    drawn = {keep: redraw(pipe, image, keep) for keep in (8, 18)}
    original = image.permute(0, 2, 3, 1).numpy() / 2 + 0.5
    reference = helper.load_pipeline(checkpoint("alpha"))
    assert_same(drawn[8], redraw(reference, image, 8), 1e-3)
    assert np.abs(drawn[18] - drawn[8]).max() > 0.01
    assert original.shape == drawn[8].shape
