"""From checkpoint to IR: one graph for every size, weights as asked, all of it or nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_256_BIN

import ov_pixart_helper as helper
from ov_pixart.compress import int4_group_size
from ov_pixart.hub import HubOptions, fetch_component
from ov_pixart.ir import read_ir
from ov_pixart.storage import staged
from tests.support.checkpoints import build_text_encoder, build_transformer
from tests.support.folders import convert_again, flip_a_bit
from tests.support.parity import noise_inputs, relative_error, run_ir, torch_noise
from tests.support.refused import refused


def count_numbers(folder: Path) -> dict[str, int]:
    """How many numbers a model's constants hold, by type; matrices and larger only."""
    counts: dict[str, int] = {}
    for op in read_ir(folder).get_ops():
        shape = op.output(0).get_partial_shape()
        if op.get_type_name() == "Constant" and len([d for d in shape if d != 1]) > 1:
            kind = op.get_output_element_type(0).get_type_name()
            counts[kind] = counts.get(kind, 0) + int(np.prod(op.get_output_shape(0)))
    return counts


@pytest.fixture(scope="module")
def transformer() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return build_transformer(32, False)


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [helper.convert_pipeline, helper.optimize_pipeline, helper.convert_transformer]
)
def test_a_misspelt_argument_comes_with_the_nearest(function, tmp_path):
    misspelt, right = (
        ("presett", "preset")
        if function is helper.optimize_pipeline
        else ("weigth_format", "weight_format")
    )
    with refused(TypeError, f"{function.__name__} has no argument '{misspelt}' (nearest: '{right}"):
        function("assets", tmp_path, **{misspelt: "int8"})


def test_a_transformer_with_size_conditions_needs_its_own_family(checkpoint, tmp_path):
    for family in ("sigma", "sigma-1024"):
        with refused(ValueError, "transformer=", "image sizes", "PixArtSigmaPipeline"):
            helper.convert_pipeline(
                checkpoint(family), tmp_path / "ov", transformer=checkpoint("alpha-ms")
            )
    assert not (tmp_path / "ov").exists()


# ---- one IR for everything ----------------------------------------------------------------------


def test_names_and_free_dimensions_are_those_of_the_contract(converted):
    def ports(family, name):
        model = read_ir(converted(family) / name)
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
    with refused(ValueError, "added_cond_kwargs lacks 'resolution'"):
        ov_pipeline("alpha-ms").transformer(**inputs)


@pytest.mark.parametrize("length", [1, 20, 120, 300])
def test_text_of_any_length_is_encoded_with_its_mask(length, ov_pipeline, torch_pipeline):
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    ours = ov_pipeline("alpha").text_encoder(ids, attention_mask=mask)[0].numpy()
    with torch.no_grad():
        reference = torch_pipeline("alpha").text_encoder(ids, attention_mask=mask)[0].numpy()
    used = mask.bool().numpy()
    assert relative_error(ours[used], reference[used]) < 2e-5
    assert (ours[~used] == 0).all()


# ---- weight formats -----------------------------------------------------------------------------

TABLES = (1024 + 8) * 256  # numbers in the tables of sines, which no format rounds to 8 bits


@pytest.mark.slow
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
    counts = count_numbers(folder)
    if "int" in weight_format:
        assert counts.pop("f32", 0) + counts.pop("f16", 0) < TABLES + 10_000  # scales, biases
        if weight_format == "int4":
            assert counts.pop("u8", 0) < 0.1 * counts["i4"]
    assert counts.keys() == types
    inputs = noise_inputs()
    assert relative_error(run_ir(folder, **inputs), torch_noise(transformer, inputs)) < tolerance


def test_int4_groups_divide_the_width_of_the_published_models():
    t5, dit = {"d_model": 4096}, {"num_attention_heads": 16, "attention_head_dim": 72}
    vae = {"block_out_channels": [128, 256, 512, 512]}
    assert [int4_group_size(config) for config in (t5, dit, vae)] == [128, 128, 128]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_model_is_converted_as_it_is_and_left_as_it_was(dtype, tmp_path):
    torch.manual_seed(0)
    model = build_transformer(32, False).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = helper.convert_transformer(model, tmp_path / "fp16")
    widened = helper.convert_transformer(model, tmp_path / "fp32", weight_format="fp32")

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].dtype == dtype for name in before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    short = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    assert count_numbers(kept)[short] > 100_000
    inputs = noise_inputs()
    reference = torch_noise(model.float(), inputs)
    assert relative_error(run_ir(widened, **inputs), reference) < 2e-5
    assert relative_error(run_ir(kept, **inputs), reference) < 1e-3


@pytest.mark.slow
def test_a_16_bit_checkpoint_in_fp32_is_widened_without_loss(checkpoint, tmp_path):
    """From a folder that holds nothing but a variant."""
    source, out = tmp_path / "fp16", tmp_path / "ov"
    narrow = DiffusionPipeline.from_pretrained(checkpoint("alpha"), torch_dtype=torch.float16)
    narrow.save_pretrained(source, variant="fp16")
    helper.convert_pipeline(source, out, weight_format="fp32")
    reference = DiffusionPipeline.from_pretrained(source, variant="fp16", torch_dtype=torch.float32)
    assert not {"f16", "bf16"} & count_numbers(out / "text_encoder").keys()
    ids = torch.arange(3, 23)[None]
    mask = torch.ones_like(ids)
    latents = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = reference.text_encoder(ids, attention_mask=mask)[0]
        image = reference.vae.decode(latents).sample
    ours = run_ir(out / "text_encoder", input_ids=ids, attention_mask=mask)
    assert relative_error(ours, text) < 2e-5
    assert relative_error(run_ir(out / "vae_decoder", latent_sample=latents), image) < 2e-5


def test_weights_beyond_float16_stay_finite_and_the_module_unchanged(tmp_path):
    encoder = build_text_encoder()
    with torch.no_grad():
        encoder.encoder.block[0].layer[0].SelfAttention.q.weight[0, 0] = 1e5
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    helper.convert_text_encoder(encoder, tmp_path, weight_format="fp16")
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    ids = torch.arange(3, 11)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = encoder(ids, attention_mask=mask)[0]
    ours = run_ir(tmp_path, input_ids=ids, attention_mask=mask)
    assert np.isfinite(ours).all()
    assert relative_error(ours, expected) < 0.02


# ---- what is written when -----------------------------------------------------------------------


@pytest.fixture
def copies(checkpoint, converted, tmp_path) -> tuple[Path, Path]:
    """A checkpoint and its converted folder, to alter."""
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    return source, shutil.copytree(converted("alpha"), tmp_path / "ov")


def test_finished_components_are_kept(copies):
    source, folder = copies
    assert convert_again(source, folder) == set()


def test_only_what_is_damaged_is_made_again(copies):
    """Sizes tell, and where they do not, hashes."""
    source, folder = copies
    (folder / "vae_decoder" / "openvino_model.bin").write_bytes(b"cut short")
    flip_a_bit(folder / "text_encoder" / "config.json")
    (folder / "model_index.json").unlink()
    assert convert_again(source, folder) == {"vae_decoder", "text_encoder"}
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


@pytest.mark.parametrize("file", ["openvino_model.bin", "openvino_model.xml"])
def test_a_flipped_bit_is_mended_by_converting_again(file, copies):
    source, folder = copies
    flip_a_bit(folder / "transformer" / file)
    assert convert_again(source, folder) == {"transformer"}
    assert convert_again(source, folder) == set()


@pytest.mark.slow
def test_a_changed_checkpoint_force_and_another_format_convert_again(copies):
    source, folder = copies
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(1, 1))  # a checkpoint that was trained on has the same sizes
    assert convert_again(source, folder) == {"transformer"}
    assert convert_again(source, folder, force=True) == set(helper.COMPONENTS)
    assert convert_again(source, folder, weight_format="fp16") == set(helper.COMPONENTS)


@pytest.mark.slow
def test_each_component_may_have_a_format_of_its_own(copies):
    source, folder = copies
    formats = {"transformer": "fp32", "vae_decoder": "fp32", "text_encoder": "int8"}
    assert convert_again(source, folder, weight_format=formats) == {"text_encoder"}
    assert set(count_numbers(folder / "text_encoder")) >= {"u8"}
    assert convert_again(source, folder, weight_format=formats) == set()
    formats.pop("transformer")  # fp16, then
    assert convert_again(source, folder, weight_format=formats) == {"transformer"}
    assert set(count_numbers(folder / "transformer")) >= {"f16"}


@pytest.mark.slow
def test_components_converted_one_by_one_are_used(checkpoint, tmp_path):
    reference = DiffusionPipeline.from_pretrained(checkpoint("alpha"))
    helper.convert_text_encoder(reference.text_encoder, tmp_path / "text_encoder")
    helper.convert_transformer(reference.transformer, tmp_path / "transformer")
    helper.convert_vae_decoder(reference.vae, tmp_path / "vae_decoder")
    assert convert_again(checkpoint("alpha"), tmp_path, weight_format="fp16") == set()


@pytest.mark.slow
def test_an_interrupted_conversion_leaves_nothing_half_written(copies, monkeypatch):
    source, folder = copies
    save_model = ov.save_model

    def interrupted(model, path, **options):
        save_model(model, path, **options)
        raise KeyboardInterrupt

    shutil.rmtree(folder / "transformer")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ov, "save_model", interrupted)
        helper.convert_pipeline(source, folder, weight_format="fp32")
    assert not list(folder.glob("**/.partial*")) and not (folder / "transformer").exists()
    with refused(FileNotFoundError, "unfinished", "convert_pipeline("):
        helper.OVPixArtAlphaPipeline.from_pretrained(folder)
    helper.convert_pipeline(source, folder, weight_format="fp32")
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_are_not(tmp_path):
    target = tmp_path / "transformer"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ov_pixart.storage import staged\n"
        f"with staged(Path({str(target)!r})) as folder:\n"
        "    (folder / 'openvino_model.bin').write_bytes(bytes(1000))\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    root = Path(helper.__file__).parent
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, **pipes) as other:
        assert other.stdout.readline() == b"writing\n"
        (writing,) = tmp_path.glob(".partial-*")
        with staged(target) as folder:
            (folder / "config.json").write_text("{}")
        assert writing.is_dir()
        other.kill()
    with staged(target) as folder:
        (folder / "openvino_model.xml").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
    assert [path.name for path in target.iterdir()] == ["openvino_model.xml"]


# ---- places to write to -------------------------------------------------------------------------


def test_a_component_is_not_written_among_other_files(transformer, tmp_path):
    """Its folder is replaced as a whole."""
    (tmp_path / "notes.txt").write_text("mine")
    with refused(ValueError, f"output_dir={str(tmp_path)!r}", "notes.txt", "name a new folder"):
        helper.convert_transformer(transformer, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with refused(ValueError, "output_dir=", "is a file"):
        helper.convert_transformer(transformer, tmp_path / "notes.txt")


def test_other_files_in_a_components_folder_are_found_before_anything_is_converted(copies):
    source, folder = copies
    notes = folder / "vae_decoder" / "notes.txt"
    notes.write_text("mine")
    with refused(ValueError, "vae_decoder", "notes.txt", "name a new folder"):
        convert_again(source, folder, weight_format="fp16")
    assert notes.read_text() == "mine"
    assert convert_again(source, folder) == set()  # nothing was touched


def test_arguments_that_do_not_work_are_refused(checkpoint, converted, transformer, tmp_path):
    source, out = checkpoint("alpha"), tmp_path / "ov"
    file = tmp_path / "file"
    file.touch()
    for arguments, options, kind, *words in [
        ((None, out), {}, ValueError, "model_id=None", "a folder or"),
        ((7, out), {}, ValueError, "model_id=7", "a folder or"),
        (("", out), {}, ValueError, "model_id=''", "a folder or"),
        ((tmp_path / "none", out), {}, FileNotFoundError, "model_id=", "check the path"),
        ((source, None), {}, ValueError, "output_dir=None", "the path of a folder"),
        ((source, file), {}, ValueError, "output_dir=", "is a file"),
        ((source, source), {}, ValueError, "output_dir=", "is the source folder", "another"),
        ((source, source / "ov"), {}, ValueError, "output_dir=", "lies in the source", "another"),
        ((source, out), {"weight_format": 8}, ValueError, "weight_format=8", "'int8'"),
        ((source, out), {"weight_format": "int2"}, ValueError, "weight_format='int2'", "'int4'"),
        (
            *((source, out), {"weight_format": {"vae": "int8"}}, ValueError),
            *("weight_format={'vae': 'int8'}", "it has to be", "'vae_decoder'"),
        ),
        (
            *((source, out), {"weight_format": {"text_encoder": "int2"}}, ValueError),
            "weight_format='int2'",
        ),
        ((source, out), {"scheduler": 3}, ValueError, "scheduler=3", "a folder or"),
        ((source, out), {"vae": source / "scheduler"}, FileNotFoundError, "vae=", "name a folder"),
        ((converted("alpha"), out), {}, ValueError, "converted already", "from_pretrained"),
    ]:
        with refused(kind, *words):
            helper.convert_pipeline(*arguments, **options)
    with refused(ValueError, "weight_format='FP16'", "'fp16'"):
        helper.convert_transformer(transformer, out, weight_format="FP16")
    assert not (source / "ov").exists() and not out.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a place where nobody may write")
def test_a_read_only_place_is_named(checkpoint, transformer):
    place = Path("/sys/pixart")
    with refused(OSError, f"output_dir={str(place)!r}", "cannot be written", "name a folder"):
        helper.convert_pipeline(checkpoint("alpha"), place)
    with refused(OSError, f"output_dir={str(place)!r}", "cannot be written", "name a folder"):
        helper.convert_transformer(transformer, place)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on the size of files")
@pytest.mark.parametrize("limit", [20_000, 150_000], ids=["at once", "amid the weights"])
def test_a_full_disk_leaves_what_was_finished_and_nothing_half_written(limit, copies):
    """Not simulated: the system enforces a limit on the size of files."""
    import resource  # not on Windows

    source, folder = copies
    shutil.rmtree(folder / "transformer")
    (folder / "model_index.json").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # pytest keeps the progress bars in a file, which has to fit, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with refused(OSError, "output_dir=", "cannot be written", "make room"):
            helper.convert_pipeline(source, folder, weight_format="fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.rglob(".partial-*")) and not (folder / "transformer").exists()
    helper.convert_pipeline(source, folder, weight_format="fp32")
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


# ---- components from elsewhere ------------------------------------------------------------------


@pytest.mark.slow
def test_a_transformer_and_a_scheduler_from_elsewhere(checkpoint, copies, tmp_path):
    source, folder = copies
    other = tmp_path / "other"
    config = PixArtTransformer2DModel.load_config(checkpoint("lcm") / "transformer")
    torch.manual_seed(1)
    transformer = PixArtTransformer2DModel.from_config(config)
    transformer.save_pretrained(other)
    given = {"transformer": other, "scheduler": checkpoint("lcm")}
    assert convert_again(source, folder, **given) == {"transformer"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert helper.default_settings(folder).num_inference_steps == 4
    inputs = noise_inputs()
    expected = torch_noise(transformer.eval(), inputs)
    assert relative_error(run_ir(folder / "transformer", **inputs), expected) < 2e-4


def test_a_component_may_lie_alone_or_in_a_subfolder_of_its_name(checkpoint):
    whole, hub = checkpoint("alpha"), HubOptions()
    for name in ("text_encoder", "transformer", "vae", "scheduler"):
        assert fetch_component(name, whole, hub) == whole / name
        assert fetch_component(name, whole / name, hub) == whole / name


def test_the_pipeline_itself_may_lack_what_comes_from_elsewhere(copies, tmp_path):
    source, folder = copies
    elsewhere = shutil.move(source / "transformer", tmp_path / "elsewhere")
    with refused(FileNotFoundError, "no folder 'transformer'", "name a transformer="):
        helper.convert_pipeline(source, folder, weight_format="fp32")
    assert convert_again(source, folder, transformer=elsewhere) == set()  # it is the same


def test_components_that_do_not_fit_are_refused(checkpoint, tmp_path):
    wide = shutil.copytree(checkpoint("alpha") / "transformer", tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "caption_channels": 4096}))
    pickled = shutil.copytree(checkpoint("alpha") / "vae", tmp_path / "pickled")
    (pickled / "diffusion_pytorch_model.safetensors").rename(pickled / "model.bin")
    for options, kind, *words in [
        ({"transformer": wide}, ValueError, "caption_channels=4096", "text_encoder=", "d_model="),
        ({"vae": pickled}, ValueError, "only pickled weights"),
        ({"vae": tmp_path}, FileNotFoundError, "vae=", "holds no vae (config.json is missing)"),
        ({"scheduler": tmp_path / "none"}, FileNotFoundError, "scheduler=", "neither a folder"),
    ]:
        with refused(kind, *words):
            helper.convert_pipeline(checkpoint("alpha"), tmp_path / "ov", **options)
    assert not (tmp_path / "ov").exists()
