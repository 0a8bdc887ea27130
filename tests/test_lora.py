"""A LoRA is part of the converted transformer, as strong as asked."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

import ov_pixart_helper as helper
from ov_pixart.checkpoint import load_component
from ov_pixart.hub import HubOptions
from ov_pixart.lora import fetch_lora, fuse_lora
from tests.support.folders import convert_again
from tests.support.parity import noise_inputs, relative_error, run_ir, torch_noise
from tests.support.refused import refused


def load_transformer(checkpoint: Path) -> PixArtTransformer2DModel:
    return load_component(checkpoint / "transformer", PixArtTransformer2DModel)


@pytest.fixture(scope="module")
def lora(checkpoint, tmp_path_factory):
    """A LoRA that changes much, as diffusers' training script for PixArt saves it."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "to_out.0", "proj"])
    adapted = peft.get_peft_model(load_transformer(checkpoint("alpha")), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    adapted.save_pretrained(folder / "transformer_lora")
    return folder


def beside_the_weights(checkpoint, lora, scale):
    """peft's own computation: the LoRA beside the weights, not added to them."""
    adapted = peft.PeftModel.from_pretrained(load_transformer(checkpoint), lora)
    for layer in adapted.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(scale)
    return adapted.base_model.model.eval()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_fused_lora_computes_what_peft_computes_beside_the_weights(scale, checkpoint, lora):
    source, lora, inputs = checkpoint("alpha"), lora / "transformer_lora", noise_inputs()
    plain = torch_noise(load_transformer(source), inputs)
    fused = torch_noise(fuse_lora(load_transformer(source), lora, scale), inputs)
    expected = torch_noise(beside_the_weights(source, lora, scale), inputs)
    assert relative_error(fused, expected) < 1e-5
    assert relative_error(plain, expected) > 0.05


@pytest.mark.slow
def test_conversion_fuses_a_lora_and_makes_the_transformer_anew_when_it_changes(
    checkpoint, converted, lora, tmp_path
):
    source, folder = checkpoint("alpha"), shutil.copytree(converted("alpha"), tmp_path / "ov")
    inputs, options = noise_inputs(), {"lora": lora, "lora_scale": 0.5}
    assert convert_again(source, folder, **options) == {"transformer"}
    expected = beside_the_weights(source, lora / "transformer_lora", 0.5)
    assert (
        relative_error(run_ir(folder / "transformer", **inputs), torch_noise(expected, inputs))
        < 2e-5
    )
    assert convert_again(source, folder, **options) == set()
    assert convert_again(source, folder, lora=lora) == {"transformer"}  # another scale
    assert convert_again(source, folder) == {"transformer"}  # and without it again


def test_a_lora_that_cannot_be_used_is_refused(checkpoint, lora, tmp_path):
    source, out = checkpoint("alpha"), tmp_path / "ov"
    pickled, other = (
        shutil.copytree(lora / "transformer_lora", tmp_path / name) for name in ("bin", "loha")
    )
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    alter_config(other, peft_type="LOHA")
    for options, kind, *words in [
        ({"lora": tmp_path / "none"}, FileNotFoundError, "lora=", "check the path"),
        ({"lora": source}, FileNotFoundError, "lora=", "adapter_config.json", "peft"),
        ({"lora": pickled}, ValueError, "lora=", "only safetensors", "safe_serialization"),
        ({"lora": other}, ValueError, "lora=", "'LOHA'"),
        ({"lora": lora, "lora_scale": "1"}, ValueError, "lora_scale='1'", "a number"),
        ({"lora": [lora, lora], "lora_scale": [1]}, ValueError, "lora_scale=[1]", "list of 2"),
    ]:
        with refused(kind, *words):
            helper.convert_pipeline(source, out, **options)
    assert not out.exists()


def test_a_lora_for_another_transformer_is_refused(checkpoint, lora, tmp_path):
    wide = shutil.copytree(lora / "transformer_lora", tmp_path / "wide")
    alter_config(wide, r=3)
    with refused(ValueError, "lora=", "does not fit", "choose one"):
        fuse_lora(load_transformer(checkpoint("alpha")), wide, 1.0)
    with refused(ValueError, "lora=", "does not fit"):  # before T5, which takes minutes
        helper.convert_pipeline(checkpoint("alpha"), tmp_path / "ov", lora=wide)
    assert not list((tmp_path / "ov").rglob("*.xml"))
    (wide / "adapter_model.safetensors").write_bytes(b"cut short")
    with refused(ValueError, "lora=", "is damaged", "download it again"):
        helper.convert_pipeline(checkpoint("alpha"), tmp_path / "never", lora=wide)
    assert not (tmp_path / "never").exists()


def test_a_lora_that_does_not_fit_leaves_a_finished_folder_finished(
    checkpoint, converted, lora, tmp_path
):
    wide = shutil.copytree(lora / "transformer_lora", tmp_path / "wide")
    alter_config(wide, r=3)
    out = shutil.copytree(converted("alpha"), tmp_path / "ov")
    with refused(ValueError, "lora=", "does not fit"):
        helper.convert_pipeline(checkpoint("alpha"), out, weight_format="fp32", lora=wide)
    assert helper.OVDiffusionPipeline.from_pretrained(out, compile=False)


def test_a_dora_with_scales_per_input_is_refused_by_name(checkpoint, tmp_path):
    """As OneTrainer trains it; for the square matrices of attention it would fit by its size."""
    model = load_transformer(checkpoint("alpha"))
    rows, columns = model.transformer_blocks[0].attn1.to_q.weight.shape
    name = "lora_transformer_transformer_blocks_0_attn1_to_q"
    weights = {
        "lora_down.weight": torch.ones(2, columns),
        "lora_up.weight": torch.ones(rows, 2),
        "dora_scale": torch.ones(1, columns),
    }
    file = tmp_path / "dora.safetensors"
    save_file({f"{name}.{key}": value for key, value in weights.items()}, file)
    with refused(ValueError, f"lora={str(file)!r}", "a scale per input", "dora_scale"):
        fuse_lora(model, file, 1.0)


# ---- files of diffusers, OneTrainer and others --------------------------------------------------

PREFIX, ALPHA = "base_model.model.", torch.tensor(4.0)  # of the fixture, whose rank is 2


def as_diffusers(name):
    return f"transformer.{name}"


def before_peft(name):
    return f"unet.{name}".replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def with_processors(name):
    module, kind = name.split(".lora_")
    kind = {"A.weight": "down.weight", "B.weight": "up.weight"}[kind]
    head, _, last = module.removesuffix(".0").rpartition(".")
    return f"{head}.processor.{last}_lora.{kind}"


def as_kohya(prefix):
    def rename(name):
        module, kind = name.split(".lora_")
        kind = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[kind]
        return f"{prefix}{module.replace('.', '_')}.{kind}"

    return rename


FORMATS = {  # name → (names of weights, whether an alpha lies beside them)
    "diffusers": (as_diffusers, False),
    "diffusers, saved from peft": (lambda name: f"unet.{PREFIX}{name}", False),
    "diffusers before peft": (before_peft, False),
    "diffusers with processors": (with_processors, False),
    "OneTrainer": (as_kohya("lora_transformer_"), True),
    "kohya": (as_kohya("lora_unet_"), True),
    "OneTrainer with dots": (
        lambda name: as_diffusers(name).replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        True,
    ),
}


def save_as(file, lora, rename, *, alpha, only=""):
    state = load_file(lora / "transformer_lora" / "adapter_model.safetensors")
    state = {n.removeprefix(PREFIX): one for n, one in state.items() if only in n}
    renamed = {rename(name): one for name, one in state.items()}
    if alpha:
        downs = [name for name in renamed if "lora_down" in name]
        renamed |= {name.replace("lora_down.weight", "alpha"): ALPHA.clone() for name in downs}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(renamed, file)
    return file


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_computes_what_peft_computes(kind, checkpoint, lora, tmp_path):
    """Without an alpha the matrices count as they are: half as much as with alpha 4, rank 2."""
    rename, alpha = FORMATS[kind]
    only = "attn" if kind == "diffusers with processors" else ""
    file = save_as(tmp_path / "lora.safetensors", lora, rename, alpha=alpha, only=only)
    source, inputs = checkpoint("alpha"), noise_inputs()
    fused = torch_noise(fuse_lora(load_transformer(source), file, 0.8), inputs)
    scale = 0.8 if alpha else 0.4
    if only:
        expected = load_transformer(source)
        diffusers = save_as(
            tmp_path / "attn.safetensors", lora, as_diffusers, alpha=False, only=only
        )
        expected = fuse_lora(expected, diffusers, 0.8)
    else:
        expected = beside_the_weights(source, lora / "transformer_lora", scale)
    assert relative_error(fused, torch_noise(expected, inputs)) < 1e-5
    assert relative_error(torch_noise(load_transformer(source), inputs), fused) > 0.02


@pytest.mark.parametrize("kind", ["diffusers", "OneTrainer"])
def test_dora_in_a_file_computes_what_peft_computes(kind, checkpoint, tmp_path):
    torch.manual_seed(0)
    source, inputs = checkpoint("alpha"), noise_inputs()
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_v"], "use_dora": True}
    config = peft.LoraConfig(init_lora_weights=False, **options)
    adapted = peft.get_peft_model(load_transformer(source), config)
    state = {
        n.removeprefix(PREFIX): one for n, one in peft.get_peft_model_state_dict(adapted).items()
    }
    magnitudes = {n: 1.5 * one for n, one in state.items() if n.endswith("magnitude_vector")}
    state |= magnitudes
    adapted.save_pretrained(tmp_path / "peft")
    saved = {PREFIX + name: one.contiguous() for name, one in state.items()}
    save_file(saved, tmp_path / "peft" / "adapter_model.safetensors")
    renamed = {}
    for name, one in state.items():
        if kind == "diffusers":
            renamed[as_diffusers(name)] = one.contiguous()
        elif name in magnitudes:
            module = name.removesuffix(".lora_magnitude_vector").replace(".", "_")
            renamed[f"lora_transformer_{module}.dora_scale"] = one.unsqueeze(1).contiguous()
        else:
            renamed[FORMATS[kind][0](name)] = one.contiguous()
    save_file(renamed, tmp_path / "dora.safetensors")
    fused, expected = (
        torch_noise(fuse_lora(load_transformer(source), tmp_path / place, 1.0), inputs)
        for place in ("dora.safetensors", "peft")
    )
    assert relative_error(fused, expected) < 1e-5
    assert relative_error(torch_noise(load_transformer(source), inputs), fused) > 0.02


def test_settings_in_a_files_header_count(checkpoint, lora, tmp_path):
    file = save_as(tmp_path / "lora.safetensors", lora, as_diffusers, alpha=False)
    settings = {"transformer.lora_alpha": 4, "transformer.r": 2, "transformer.use_rslora": False}
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    source, inputs = checkpoint("alpha"), noise_inputs()
    fused = torch_noise(fuse_lora(load_transformer(source), file, 1.0), inputs)
    expected = beside_the_weights(source, lora / "transformer_lora", 1.0)
    assert relative_error(fused, torch_noise(expected, inputs)) < 1e-5


@pytest.mark.parametrize("rename", [str, lambda name: f"lora_unet_{name.replace('.', '_')}"])
def test_names_of_the_original_repository(rename, checkpoint, tmp_path):
    """There, queries, keys and values are one matrix."""
    torch.manual_seed(0)
    source, inputs = checkpoint("alpha"), noise_inputs()
    down, up = torch.randn(2, 48) * 0.1, torch.randn(3 * 48, 2) * 0.1
    key, value = torch.randn(2, 48) * 0.1, torch.randn(2 * 48, 2) * 0.1
    ours = {}
    for target, part in zip("qkv", up.chunk(3), strict=True):
        ours |= {f"attn1.to_{target}.lora_A.weight": down, f"attn1.to_{target}.lora_B.weight": part}
    for target, part in zip("kv", value.chunk(2), strict=True):
        ours |= {f"attn2.to_{target}.lora_A.weight": key, f"attn2.to_{target}.lora_B.weight": part}
    ours = {
        f"transformer.transformer_blocks.1.{n}": one.contiguous().clone() for n, one in ours.items()
    }
    save_file(ours, tmp_path / "ours.safetensors")
    qkv, kv = rename("blocks.1.attn.qkv"), rename("blocks.1.cross_attn.kv_linear")
    original = {f"{qkv}.lora_down.weight": down, f"{qkv}.lora_up.weight": up}
    original |= {f"{kv}.lora_down.weight": key, f"{kv}.lora_up.weight": value}
    save_file(original, tmp_path / "original.safetensors")
    fused, expected = (
        torch_noise(fuse_lora(load_transformer(source), tmp_path / file, 1.0), inputs)
        for file in ("original.safetensors", "ours.safetensors")
    )
    assert relative_error(fused, expected) < 1e-6
    assert relative_error(torch_noise(load_transformer(source), inputs), fused) > 0.02


def test_a_lora_is_found_where_programs_save_it(lora, tmp_path):
    hub, name = HubOptions(), "pytorch_lora_weights.safetensors"
    for place in (f"a/{name}", f"b/transformer_lora/{name}", "c/cat.safetensors"):
        file = save_as(tmp_path / place, lora, as_diffusers, alpha=False)
        assert fetch_lora(tmp_path / place.split("/")[0], hub) == file
        assert fetch_lora(str(file), hub) == file
    assert fetch_lora(lora, hub) == lora / "transformer_lora"
    save_as(tmp_path / "c" / "dog.safetensors", lora, as_diffusers, alpha=False)
    with refused(FileNotFoundError, "several files (cat.safetensors, dog.safetensors)", "name a"):
        fetch_lora(tmp_path / "c", hub)


@pytest.mark.slow
def test_several_loras_are_added_with_a_scale_each(checkpoint, converted, lora, tmp_path):
    source, folder = checkpoint("alpha"), shutil.copytree(converted("alpha"), tmp_path / "ov")
    file = save_as(tmp_path / "one.safetensors", lora, FORMATS["OneTrainer"][0], alpha=True)
    both = {"lora": [lora, file], "lora_scale": [0.7, -0.2]}
    assert convert_again(source, folder, **both) == {"transformer"}
    inputs = noise_inputs()
    expected = beside_the_weights(source, lora / "transformer_lora", 0.5)
    ours = run_ir(folder / "transformer", **inputs)
    assert relative_error(ours, torch_noise(expected, inputs)) < 2e-5
    assert convert_again(source, folder, **both) == set()
    assert convert_again(source, folder, lora=[lora, file], lora_scale=0.5) == {"transformer"}


def test_what_is_no_lora_of_the_transformer_is_named(checkpoint, lora, tmp_path):
    down = torch.zeros(2, 48)
    for name, *words in [
        ("lora_te_encoder_block_0.lora_down.weight", "text encoder", "save that one alone"),
        ("text_encoder.encoder.block.0.lora_A.weight", "text encoder"),
        (
            "transformer.transformer_blocks.0.attn1.to_q.hada_w1_a",
            "hada_w1_a",
            "no weight of a LoRA",
        ),
        ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "down_blocks", "no weight"),
        ("transformer.transformer_blocks.9.attn1.to_q.lora_A.weight", "blocks.9", "no weight"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "does not fit"),
    ]:
        save_file({name: down}, tmp_path / "bad.safetensors")
        with refused(ValueError, "lora=", *words):
            fuse_lora(load_transformer(checkpoint("alpha")), tmp_path / "bad.safetensors", 1.0)
    for file, *words in [("a.pt", "pickled"), ("a.bin", "pickled"), ("a.gguf", "GGUF")]:
        (tmp_path / file).touch()
        with refused(ValueError, f"lora='{tmp_path / file}'", *words):
            fetch_lora(tmp_path / file, HubOptions())


def alter_config(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
