"""A LoRA is part of the converted transformer, as strong as asked."""

import json
import shutil

import peft
import pytest
import torch
from test_bad_input import refused
from test_convert import noise_inputs, redone, relative_error, run, torch_noise

import ov_pixart_helper as helper


@pytest.fixture(scope="module")
def lora(checkpoint, tmp_path_factory):
    """A LoRA that changes much, as diffusers' training script for PixArt saves it."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    transformer = helper._load_part(checkpoint("alpha") / "transformer", helper.PixArtTransformer)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "to_out.0", "proj"])
    adapted = peft.get_peft_model(transformer, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    adapted.save_pretrained(folder / "transformer_lora")
    return folder


def fused(checkpoint, lora, scale):
    """peft's own word for it: the LoRA beside the weights, not in them."""
    transformer = helper._load_part(checkpoint("alpha") / "transformer", helper.PixArtTransformer)
    adapted = peft.PeftModel.from_pretrained(transformer, lora / "transformer_lora")
    for layer in adapted.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(scale)
    return adapted.base_model.model.eval()


def test_a_lora_is_fused_as_strong_as_asked(checkpoint, converted, lora, tmp_path):
    folder = shutil.copytree(converted("alpha"), tmp_path / "ov")
    inputs = noise_inputs()
    plain = run(folder / "transformer", **inputs)
    source = checkpoint("alpha")
    for scale in (1.0, 0.5):
        options = {"lora": lora, "lora_scale": scale}
        assert redone(source, folder, **options) == {"transformer"}
        ours = run(folder / "transformer", **inputs)
        expected = torch_noise(fused(checkpoint, lora, scale), inputs)
        assert relative_error(ours, expected) < 2e-5
        assert relative_error(plain, expected) > 0.05
        assert redone(source, folder, **options) == set()
    assert redone(source, folder) == {"transformer"}  # and without it again


def test_a_lora_that_cannot_be_used_is_refused(checkpoint, lora, tmp_path):
    source, out = checkpoint("alpha"), tmp_path / "ov"
    copies = [shutil.copytree(lora / "transformer_lora", tmp_path / str(i)) for i in range(3)]
    pickled, other, wide = copies
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    for folder, changes in ((other, {"peft_type": "LOHA"}), (wide, {"r": 3})):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    for options, kind, *words in [
        ({"lora": tmp_path / "none"}, FileNotFoundError, "lora=", "check the path"),
        ({"lora": source}, FileNotFoundError, "lora=", "adapter_config.json", "peft"),
        ({"lora": pickled}, ValueError, "lora=", "only safetensors", "safe_serialization"),
        ({"lora": other}, ValueError, "lora=", "'LOHA'"),
        ({"lora": wide}, ValueError, "lora=", "does not fit", "choose one"),
        ({"lora": lora, "lora_scale": "1"}, ValueError, "lora_scale='1'", "a number"),
    ]:
        with refused(kind, *words):
            helper.convert_pipeline(source, out, **options)
    assert not (out / "model_index.json").exists()
