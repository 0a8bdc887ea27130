"""From checkpoint to IR: what is in the files, what is written when, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import safetensors.torch
import tiny_models
import torch
from conftest import F32
from diffusers import DiffusionPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_256_BIN
from transformers import T5Tokenizer

import ov_pixart_helper as helper


def run(folder, **inputs):
    """One inference in float32; inputs as torch tensors."""
    model = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", F32)
    return model({name: value.numpy() for name, value in inputs.items()})[0]


def relative_error(ours, reference):
    reference = np.asarray(reference)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.ptp(reference)


def noise_inputs(height=8, width=12, batch=2, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.linspace(999, 1, batch).round(),
        "encoder_hidden_states": torch.randn(batch, tokens, 32, generator=generator),
        "encoder_attention_mask": torch.ones(batch, tokens, dtype=torch.int64),
    }


@torch.no_grad()
def torch_noise(transformer, inputs, **conditions):
    conditions = {"resolution": None, "aspect_ratio": None, **conditions}
    return transformer(**inputs, added_cond_kwargs=conditions).sample.float().numpy()


def constants(folder) -> dict[str, int]:
    """How many numbers a model's constants hold, by type; matrices and larger only."""
    counts = {}
    for node in ov.Core().read_model(folder / "openvino_model.xml").get_ops():
        shape = node.output(0).get_partial_shape()
        if node.get_type_name() == "Constant" and len([d for d in shape if d != 1]) > 1:
            kind = node.get_output_element_type(0).get_type_name()
            counts[kind] = counts.get(kind, 0) + int(np.prod(node.get_output_shape(0)))
    return counts


# ---- one IR for everything ----------------------------------------------------------------------


def test_names_and_free_dimensions_are_those_of_the_contract(converted):
    def ports(family, part):
        model = ov.Core().read_model(converted(family) / part / "openvino_model.xml")
        inputs = {p.get_any_name(): str(p.get_partial_shape()) for p in model.inputs}
        return inputs, [p.get_any_name() for p in model.outputs]

    assert ports("alpha", "text_encoder") == (
        {"input_ids": "[?,?]", "attention_mask": "[?,?]"},
        ["last_hidden_state"],
    )
    noise = {
        "hidden_states": "[?,4,?,?]",
        "timestep": "[?]",
        "encoder_hidden_states": "[?,?,32]",
        "encoder_attention_mask": "[?,?]",
    }
    assert ports("alpha", "transformer") == (noise, ["sample"])
    sizes = {"resolution": "[?,2]", "aspect_ratio": "[?,1]"}
    assert ports("alpha-ms", "transformer") == (noise | sizes, ["sample"])
    assert ports("alpha", "vae_decoder") == ({"latent_sample": "[?,4,?,?]"}, ["sample"])


def test_one_ir_serves_every_aspect_bin(ov_pipeline, torch_pipeline):
    ours, reference = ov_pipeline("alpha").transformer, torch_pipeline("alpha").transformer
    bins = [(int(h) // 8, int(w) // 8) for h, w in ASPECT_RATIO_256_BIN.values()]
    for height, width in [*bins, (8, 12), (16, 40), (90, 180), (128, 128)]:
        inputs = noise_inputs(height, width, batch=1)
        error = relative_error(ours(**inputs).sample.numpy(), torch_noise(reference, inputs))
        assert error < 2e-5, (height, width, error)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 120), (5, 300)])
def test_one_ir_serves_every_batch_and_length(batch, tokens, ov_pipeline, torch_pipeline):
    inputs = noise_inputs(batch=batch, tokens=tokens)
    inputs["encoder_attention_mask"][0, tokens // 2 + 1 :] = 0
    ours = ov_pipeline("sigma").transformer(**inputs).sample.numpy()
    reference = torch_noise(torch_pipeline("sigma").transformer, inputs)
    assert relative_error(ours, reference) < 2e-5


def test_size_conditions_and_fractional_timesteps_are_exact(ov_pipeline, torch_pipeline):
    inputs = noise_inputs(batch=4)
    inputs["timestep"] = torch.tensor([999.0, 666.334, 0.5, 0.0])
    sizes = {
        "resolution": torch.tensor([[512.0, 2048.0], [1088.0, 960.0], [64.0, 96.0], [1024.0, 8.0]]),
        "aspect_ratio": torch.tensor([[0.25], [1.13], [0.67], [4.0]]),
    }
    ours = ov_pipeline("alpha-ms").transformer(**inputs, added_cond_kwargs=sizes).sample.numpy()
    reference = torch_noise(torch_pipeline("alpha-ms").transformer, inputs, **sizes)
    assert relative_error(ours, reference) < 5e-5
    with pytest.raises(ValueError, match="added_cond_kwargs lacks 'resolution'"):
        ov_pipeline("alpha-ms").transformer(**inputs)


@pytest.mark.parametrize("length", [1, 20, 120, 300])
def test_text_of_any_length_is_read_with_its_mask(length, ov_pipeline, torch_pipeline):
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    ours = ov_pipeline("alpha").text_encoder(ids, attention_mask=mask)[0].numpy()
    with torch.no_grad():
        reference = torch_pipeline("alpha").text_encoder(ids, attention_mask=mask)[0].numpy()
    read = mask.bool().numpy()
    assert relative_error(ours[read], reference[read]) < 2e-5
    assert (ours[~read] == 0).all()


# ---- weight formats -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return tiny_models.build_transformer(32, False)


TABLES = (1024 + 8) * 256  # numbers in the tables of sines, which no format rounds to 8 bits


@pytest.mark.parametrize(
    ("weight_format", "types", "tolerance"),
    [
        ("fp32", {"f32"}, 2e-5),
        ("fp16", {"f16"}, 2e-3),
        ("int8", {"u8"}, 0.05),
        ("int4", {"i4"}, 0.5),
    ],
)
def test_weights_are_stored_as_asked(weight_format, types, tolerance, transformer, tmp_path):
    folder = helper.convert_transformer(transformer, tmp_path, weight_format=weight_format)
    counts = constants(folder)
    if "int" in weight_format:
        assert counts.pop("f32", 0) + counts.pop("f16", 0) < TABLES + 10_000  # scales, biases
        if weight_format == "int4":
            assert counts.pop("u8", 0) < 0.1 * counts["i4"]
    assert counts.keys() == types
    inputs = noise_inputs()
    assert relative_error(run(folder, **inputs), torch_noise(transformer, inputs)) < tolerance


def test_int4_groups_divide_the_width_of_the_published_models():
    t5, dit, vae = (
        type("Config", (), width)
        for width in (
            {"d_model": 4096},
            {"num_attention_heads": 16, "attention_head_dim": 72},
            {"block_out_channels": [128, 256, 512, 512]},
        )
    )
    assert [helper._int4_group_size(config) for config in (t5, dit, vae)] == [128, 128, 128]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_model_is_converted_as_it_is_and_left_as_it_was(dtype, tmp_path):
    torch.manual_seed(0)
    model = tiny_models.build_transformer(32, False).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = helper.convert_transformer(model, tmp_path / "fp16")
    widened = helper.convert_transformer(model, tmp_path / "fp32", weight_format="fp32")

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(
        after[name].dtype == dtype and torch.equal(after[name], before[name]) for name in before
    )
    short = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    assert constants(kept)[short] > 100_000
    inputs = noise_inputs()
    reference = torch_noise(model.float(), inputs)
    assert relative_error(run(widened, **inputs), reference) < 2e-5
    assert relative_error(run(kept, **inputs), reference) < 1e-3


def test_a_16_bit_checkpoint_in_fp32_is_widened_without_loss(checkpoint, tmp_path):
    source, out = tmp_path / "fp16", tmp_path / "ov"
    DiffusionPipeline.from_pretrained(
        checkpoint("alpha"), torch_dtype=torch.float16
    ).save_pretrained(
        source,
        variant="fp16",  # a folder with nothing but a variant
    )
    helper.convert_pipeline(source, out, weight_format="fp32")
    reference = DiffusionPipeline.from_pretrained(source, variant="fp16", torch_dtype=torch.float32)
    assert not {"f16", "bf16"} & constants(out / "text_encoder").keys()
    ids = torch.arange(3, 23)[None]
    mask = torch.ones_like(ids)
    latents = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = reference.text_encoder(ids, attention_mask=mask)[0]
        picture = reference.vae.decode(latents).sample
    ours = run(out / "text_encoder", input_ids=ids, attention_mask=mask)
    assert relative_error(ours, text) < 2e-5
    assert relative_error(run(out / "vae_decoder", latent_sample=latents), picture) < 2e-5


# ---- what is written when -----------------------------------------------------------------------


@pytest.fixture
def copies(checkpoint, converted, tmp_path):
    """A checkpoint and its converted folder, to alter."""
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    return source, shutil.copytree(converted("alpha"), tmp_path / "ov")


def times(folder):
    return {
        name: (folder / name / "openvino_model.xml").stat().st_mtime_ns for name in helper.PARTS
    }


def redone(source, folder, **options):
    before = times(folder)
    helper.convert_pipeline(source, folder, **{"weight_format": "fp32", **options})
    assert not list(folder.glob("**/.partial*"))
    assert (folder / "model_index.json").is_file()
    return {name for name, time in times(folder).items() if time != before[name]}


def test_finished_models_are_kept_and_only_what_is_missing_is_made(copies):
    source, folder = copies
    assert redone(source, folder) == set()
    (folder / "vae_decoder" / "openvino_model.bin").write_bytes(b"cut short")
    (folder / "model_index.json").unlink()
    assert redone(source, folder) == {"vae_decoder"}
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(1, 1))  # a checkpoint that was trained on has the same sizes
    assert redone(source, folder) == {"transformer"}
    assert redone(source, folder, force=True) == set(helper.PARTS)
    assert redone(source, folder, weight_format="fp16") == set(helper.PARTS)


def test_each_model_may_have_a_format_of_its_own(copies):
    source, folder = copies
    formats = {"transformer": "fp32", "vae_decoder": "fp32", "text_encoder": "int8"}
    assert redone(source, folder, weight_format=formats) == {"text_encoder"}
    assert set(constants(folder / "text_encoder")) >= {"u8"}
    assert redone(source, folder, weight_format=formats) == set()
    formats.pop("transformer")  # fp16, then
    assert redone(source, folder, weight_format=formats) == {"transformer"}
    assert set(constants(folder / "transformer")) >= {"f16"}


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["openvino_model.bin", "openvino_model.xml", "config.json"])
def test_a_flipped_bit_is_found_when_loading_and_mended_by_converting(file, copies):
    source, folder = copies
    flip_a_bit(folder / "transformer" / file)
    for entrance in (helper.OVPixArtAlphaPipeline, helper.OVDiffusionPipeline):
        if file.endswith(".xml") and entrance is helper.OVDiffusionPipeline:
            continue  # optimum may read the graph, and stumble, before anything of ours runs
        with pytest.raises(ValueError, match=r"transformer.*damaged.*convert_pipeline\(") as caught:
            entrance.from_pretrained(folder, compile=False)
        assert "\n" not in str(caught.value)
    assert redone(source, folder) == {"transformer"}
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


def test_large_weights_are_hashed_when_they_are_kept_not_when_they_are_loaded(copies, monkeypatch):
    source, folder = copies
    monkeypatch.setattr(helper, "_QUICK_TO_HASH", 100_000)
    weights = folder / "transformer" / "openvino_model.bin"
    flip_a_bit(weights)
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)
    assert redone(source, folder) == {"transformer"}
    weights.write_bytes(weights.read_bytes()[:-1])  # sizes are compared at every load
    with pytest.raises(ValueError, match=r"damaged.*convert"):
        helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


def test_models_converted_one_by_one_are_used(checkpoint, tmp_path):
    reference = DiffusionPipeline.from_pretrained(checkpoint("alpha"))
    helper.convert_text_encoder(reference.text_encoder, tmp_path / "text_encoder")
    helper.convert_transformer(reference.transformer, tmp_path / "transformer")
    helper.convert_vae_decoder(reference.vae, tmp_path / "vae_decoder")
    assert redone(checkpoint("alpha"), tmp_path, weight_format="fp16") == set()


def test_an_interrupted_conversion_leaves_nothing_half_written(copies, monkeypatch):
    source, folder = copies
    save_model = ov.save_model

    def interrupted(model, path, **options):
        save_model(model, path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(ov, "save_model", interrupted)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(KeyboardInterrupt):
        helper.convert_pipeline(source, folder, weight_format="fp32")
    assert not list(folder.glob("**/.partial*"))
    assert not list((folder / "transformer").iterdir())
    with pytest.raises(FileNotFoundError, match="unfinished"):
        helper.OVPixArtAlphaPipeline.from_pretrained(folder)
    monkeypatch.undo()
    helper.convert_pipeline(source, folder, weight_format="fp32")
    helper.OVPixArtAlphaPipeline.from_pretrained(folder)


# ---- what the hub's folders look like -----------------------------------------------------------


def test_a_folder_as_published_is_read_in_silence(checkpoint, tmp_path, capfd, caplog):
    """Old class name, a weight that nobody uses, a tokenizer that is one `spiece.model`."""
    source = tiny_models.as_published(checkpoint("alpha"), tmp_path / "source")
    capfd.readouterr()
    folder = helper.convert_pipeline(source, tmp_path / "ov", weight_format="fp32")
    helper.OVPixArtAlphaPipeline.from_pretrained(folder)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "arn" not in printed.err and "Loading weights" not in printed.err
    assert "Converting transformer" in printed.err  # the bar
    assert not caplog.records

    words = "a small red circle above the sea"
    saved = T5Tokenizer.from_pretrained(folder / "tokenizer")(words).input_ids
    assert saved == T5Tokenizer.from_pretrained(checkpoint("alpha") / "tokenizer")(words).input_ids
    assert saved[-1] == 1 and len(set(saved)) > 5


def test_a_hub_id_is_found_in_the_cache(checkpoint, tmp_path):
    snapshot = tmp_path / "cache" / "models--someone--pixart" / "snapshots" / "0123abcd"
    shutil.copytree(checkpoint("alpha"), snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd")
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    pipeline = helper.OVPixArtAlphaPipeline.from_pretrained("someone/pixart", compile=False, **hub)
    assert pipeline.height == -1
    with pytest.raises(
        FileNotFoundError, match=r"model_id='someone/else' .* Hugging Face"
    ) as caught:
        helper.convert_pipeline("someone/else", tmp_path / "ov", **hub)
    assert "\n" not in str(caught.value)


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(
    transformer, tmp_path
):
    script = (
        "import os, sys, time, ov_pixart_helper as helper\n"
        "from pathlib import Path\n"
        f"with helper._staged(Path({str(tmp_path / 'transformer')!r})) as folder:\n"
        "    (folder / 'openvino_model.bin').write_bytes(bytes(1000))\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(helper.__file__).parent) as one:
        assert one.stdout.readline() == b"writing\n"
        (writing,) = tmp_path.glob(".partial-*")
        helper.convert_transformer(transformer, tmp_path / "transformer")
        assert writing.is_dir()
        one.kill()
    helper.convert_transformer(transformer, tmp_path / "transformer")
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


# ---- components from elsewhere ------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a subfolder"])
def test_a_transformer_and_a_scheduler_from_elsewhere(checkpoint, converted, tmp_path, alone):
    other = shutil.copytree(checkpoint("lcm") / "transformer", tmp_path / "other/transformer")
    config = json.loads((other / "config.json").read_text())
    torch.manual_seed(1)
    transformer = helper.PixArtTransformer.from_config(config)
    transformer.save_pretrained(other)
    ov_folder = shutil.copytree(converted("alpha"), tmp_path / "ov")
    before = times(ov_folder)
    helper.convert_pipeline(
        checkpoint("alpha"),
        ov_folder,
        weight_format="fp32",
        transformer=other if alone else other.parent,
        scheduler=checkpoint("lcm"),
    )
    after = times(ov_folder)
    assert {name for name in after if after[name] != before[name]} == {"transformer"}
    index = json.loads((ov_folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert helper.default_settings(ov_folder).num_inference_steps == 4
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.tensor([7.0, 801.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_models.TEXT_WIDTH),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    conditions = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    with torch.no_grad():
        expected = transformer.eval()(**inputs, **conditions).sample
    assert relative_error(run(ov_folder / "transformer", **inputs), expected) < 2e-4


def test_the_pipeline_itself_may_lack_what_comes_from_elsewhere(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    shutil.rmtree(source / "transformer")
    with pytest.raises(FileNotFoundError, match=r"no folder 'transformer'.* name a transformer="):
        helper.convert_pipeline(source, tmp_path / "ov")
    folder = helper.convert_pipeline(source, tmp_path / "ov", transformer=checkpoint("lcm"))
    assert (folder / "model_index.json").is_file()


def test_components_that_do_not_fit_are_refused_in_one_line(checkpoint, tmp_path):
    wide = shutil.copytree(checkpoint("alpha") / "transformer", tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "caption_channels": 4096}))
    pickled = shutil.copytree(checkpoint("alpha") / "vae", tmp_path / "pickled")
    (pickled / "diffusion_pytorch_model.safetensors").rename(pickled / "model.bin")
    for options, kind, message in [
        ({"transformer": wide}, ValueError, "caption_channels=4096, but text_encoder=.* d_model="),
        ({"vae": pickled}, ValueError, "only pickled weights"),
        ({"vae": tmp_path}, FileNotFoundError, r"vae=.* holds no vae \(config.json is missing\)"),
        ({"scheduler": tmp_path / "none"}, FileNotFoundError, "scheduler=.* is neither a folder"),
    ]:
        with pytest.raises(kind, match=message) as caught:
            helper.convert_pipeline(checkpoint("alpha"), tmp_path / "ov", **options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ov").exists()


# ---- bad input ----------------------------------------------------------------------------------


def lose(*names):
    def alter(source):
        for name in names:
            shutil.rmtree(source / name) if (source / name).is_dir() else (source / name).unlink()

    return alter


def become_flux(source):
    (source / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))


def become_pickled(source):
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(weights)
    torch.save(state, weights.with_suffix(".bin"))
    weights.unlink()


def become_damaged(source):
    weights = source / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


BAD_CHECKPOINTS = {
    "no index": (lose("model_index.json"), FileNotFoundError, "has no model_index.json"),
    "no scheduler": (lose("scheduler"), FileNotFoundError, "has no folder 'scheduler'"),
    "no transformer": (lose("transformer"), FileNotFoundError, "has no folder 'transformer'"),
    "another family": (become_flux, ValueError, "holds a FluxPipeline: .* choose a PixArt"),
    "pickled": (become_pickled, ValueError, r"only pickled weights .* safe_serialization=True"),
    "damaged": (become_damaged, ValueError, "damaged .* download it again"),
}


@pytest.mark.parametrize(
    ("alter", "kind", "message"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS
)
def test_a_bad_checkpoint_is_answered_in_one_line(alter, kind, message, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    alter(source)
    with pytest.raises(kind, match=message) as caught:
        helper.convert_pipeline(source, tmp_path / "ov")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ov" / "model_index.json").exists()


def test_bad_arguments_are_answered_in_one_line(checkpoint, converted, transformer, tmp_path):
    source = checkpoint("alpha")
    for arguments, options, kind, message in [
        ((source, tmp_path / "ov"), {"weight_format": "int2"}, ValueError, "weight_format='int2'"),
        (
            (source, tmp_path / "ov"),
            {"weight_format": {"vae": "int8"}},
            ValueError,
            "weight_format={'vae': 'int8'} .*: it has to be .* 'vae_decoder'",
        ),
        (
            (source, tmp_path / "ov"),
            {"weight_format": {"text_encoder": "int2"}},
            ValueError,
            "weight_format='int2'",
        ),
        ((tmp_path / "nowhere", tmp_path / "ov"), {}, FileNotFoundError, "model_id=.*nowhere"),
        ((source, source), {}, ValueError, "output_dir=.* choose another"),
        ((converted("alpha"), tmp_path / "ov"), {}, ValueError, "converted already"),
    ]:
        with pytest.raises(kind, match=message) as caught:
            helper.convert_pipeline(*arguments, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"weight_format='FP16' .* 'fp16'"):
        helper.convert_transformer(transformer, tmp_path / "ov", weight_format="FP16")
    assert not (tmp_path / "ov").exists()
