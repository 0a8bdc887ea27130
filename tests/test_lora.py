"""A LoRA is part of the converted transformer, as strong as asked."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from diffusers import PixArtTransformer2DModel

import ov_pixart_helper as helper
from ov_pixart.checkpoint import load_component
from ov_pixart.lora import fuse_lora
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
    ]:
        with refused(kind, *words):
            helper.convert_pipeline(source, out, **options)
    assert not out.exists()


def test_a_lora_for_another_transformer_is_refused(checkpoint, lora, tmp_path):
    wide = shutil.copytree(lora / "transformer_lora", tmp_path / "wide")
    alter_config(wide, r=3)
    with refused(ValueError, "lora=", "does not fit", "choose one"):
        fuse_lora(load_transformer(checkpoint("alpha")), wide, 1.0)


def alter_config(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
