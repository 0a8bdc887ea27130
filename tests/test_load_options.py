"""Every entrance does the same; an option works, or is refused before anything is converted."""

import gc
import shutil
import tempfile
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from optimum.intel.openvino import (
    OVDiffusionPipeline,
    OVPipelineForImage2Image,
    OVPipelineForInpainting,
    OVPipelineForText2Image,
)

import ov_pixart_helper as helper
from ov_pixart import pipeline as pipeline_module
from ov_pixart.partial import stand_in_transformer
from tests.support.parity import F32, assert_same, generate
from tests.support.refused import refused

ENTRANCES = [helper.OVPixArtAlphaPipeline, OVDiffusionPipeline, OVPipelineForText2Image]
each_entrance = pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda one: one.__name__)


@pytest.fixture
def conversions(monkeypatch, converted) -> list[dict]:
    """The options of every conversion, which is a copy of a folder that is converted already."""
    options = []

    def convert_pipeline(model_id, output_dir, **given):
        options.append(given)
        return shutil.copytree(converted("alpha"), output_dir, dirs_exist_ok=True)

    monkeypatch.setattr(pipeline_module, "convert_pipeline", convert_pipeline)
    return options


@pytest.fixture
def temporary(monkeypatch, tmp_path) -> Path:
    """The folder of temporary files, empty at first."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def constants(component) -> list[ov.Node]:
    return [one for one in component.model.get_ops() if one.get_type_name() == "Constant"]


# ---- entrances ----------------------------------------------------------------------------------


@each_entrance
@pytest.mark.parametrize("export", [{}, {"export": True}, {"export": False}])
def test_a_torch_folder_is_converted_everywhere(entrance, export, checkpoint, conversions):
    options = {"compile": False, "release_text_encoder": True, "weight_format": "int8"}
    pipeline = entrance.from_pretrained(checkpoint("alpha"), **export, **options)
    assert type(pipeline) is helper.OVPixArtAlphaPipeline
    assert conversions[0]["weight_format"] == "int8"


@each_entrance
@pytest.mark.parametrize("export", [{}, {"export": True}])
def test_an_openvino_folder_is_loaded_everywhere(entrance, export, converted, conversions):
    pipeline = entrance.from_pretrained(converted("alpha"), compile=False, **export)
    assert type(pipeline) is helper.OVPixArtAlphaPipeline
    assert Path(pipeline.model_save_dir) == converted("alpha")
    assert not conversions


@each_entrance
def test_a_hub_id_is_found_everywhere(entrance, checkpoint, tmp_path, conversions):
    snapshot = tmp_path / "cache" / "models--someone--pixart" / "snapshots" / "0123abcd"
    shutil.copytree(checkpoint("alpha"), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abcd")
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    pipeline = entrance.from_pretrained("someone/pixart", compile=False, **hub)
    assert type(pipeline) is helper.OVPixArtAlphaPipeline
    assert conversions[0]["cache_dir"] == tmp_path / "cache"  # for a LoRA, say


@each_entrance
def test_a_misspelt_option_is_named_everywhere(entrance, converted):
    with refused(TypeError, "'relase_text_encoder' (nearest: 'release_text_encoder')"):
        entrance.from_pretrained(converted("alpha"), relase_text_encoder=True)


def test_other_models_still_go_to_optimum(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert pipeline_module.find_pipeline(tmp_path) is None
    assert pipeline_module.find_pipeline("someone/flux", local_files_only=True) is None


def test_what_is_no_folder_is_named_on_optimums_entrance_too(checkpoint, tmp_path):
    file = checkpoint("alpha") / "model_index.json"
    for model_id, kind, word in (
        (file, ValueError, "is a file"),
        (tmp_path / "nowhere", FileNotFoundError, "neither a folder here nor"),
        ("~/models/pixart", FileNotFoundError, "neither a folder here nor"),
        (None, ValueError, "a Hugging Face id"),
        ("", ValueError, "a Hugging Face id"),
    ):
        for entrance in (OVDiffusionPipeline, helper.OVPixArtAlphaPipeline):
            with refused(kind, "model_id=", word):
                entrance.from_pretrained(model_id)


@pytest.mark.parametrize("entrance", [OVPipelineForImage2Image, OVPipelineForInpainting])
def test_what_diffusers_has_no_pixart_for_is_named(entrance, checkpoint, converted):
    for folder in (checkpoint("alpha"), converted("sigma")):
        with refused(ValueError, "no pipeline for image-to-image", "OVPipelineForText2Image"):
            entrance.from_pretrained(folder)


def test_weights_are_compressed_without_a_word_while_loading(converted, capfd):
    pipeline = OVDiffusionPipeline.from_pretrained(converted("alpha"), load_in_8bit=True)
    assert any(one.get_element_type() == ov.Type.u8 for one in constants(pipeline.transformer))
    assert not any(capfd.readouterr())


def test_an_unfinished_folder_is_named_on_optimums_entrance_too(converted, tmp_path):
    folder = shutil.copytree(converted("alpha"), tmp_path / "ov")
    (folder / "model_index.json").unlink()
    with refused(FileNotFoundError, "unfinished", "convert_pipeline("):
        OVDiffusionPipeline.from_pretrained(folder)


# ---- options of the conversion ------------------------------------------------------------------


def test_components_by_path_are_for_the_conversion_and_objects_for_loading(checkpoint, conversions):
    scheduler = LCMScheduler()
    places = {"lora": "some/lora", "lora_scale": np.float32(0.5), "vae": Path("vae")}
    pipeline = helper.OVPixArtAlphaPipeline.from_pretrained(
        checkpoint("alpha"), compile=False, transformer="some/dit", scheduler=scheduler, **places
    )
    given = {name: value for name, value in conversions[0].items() if value}
    assert given == {"transformer": "some/dit", **places}
    assert pipeline.scheduler is scheduler


@pytest.mark.parametrize(
    "option", [{"weight_format": "int8"}, {"lora": "lora"}, {"vae": "vae"}, {"transformer": "dit"}]
)
def test_a_converted_folder_takes_no_options_of_a_conversion(option, converted):
    (name,) = option
    with refused(ValueError, f"{name}=", "converted already", "convert_pipeline"):
        helper.OVPixArtAlphaPipeline.from_pretrained(converted("alpha"), **option)


@pytest.mark.slow
def test_a_lora_is_applied_on_the_way(checkpoint, tmp_path, ov_pipeline):
    import peft

    torch.manual_seed(0)
    loader = helper.COMPONENTS["transformer"].loader
    transformer = loader.from_pretrained(checkpoint("alpha") / "transformer")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.get_peft_model(transformer, config).save_pretrained(tmp_path)
    load = helper.OVPixArtAlphaPipeline.from_pretrained
    with_lora = load(checkpoint("alpha"), lora=tmp_path, weight_format="fp32", ov_config=F32)
    assert abs(generate(with_lora) - generate(ov_pipeline("alpha"))).max() > 0.01


# ---- refused early, nothing left behind ---------------------------------------------------------

BAD_OPTIONS = {
    "device": ({"device": "GPU"}, ValueError, "device='GPU'"),
    "device of torch": ({"device": torch.device("cuda")}, ValueError, "device='cuda'"),
    "second device": ({"device": torch.device("cuda:1")}, ValueError, "device='cuda.1'"),
    "setting": (
        {"ov_config": {"INFERENCE_PRECISON_HINT": "f32"}},
        *(ValueError, "ov_config=", "'INFERENCE_PRECISON_HINT'", "'INFERENCE_PRECISION_HINT'"),
    ),
    "setting for AUTO": (
        {"ov_config": {"NUM_STREAM": 1}, "device": "AUTO"},
        *(ValueError, "ov_config=", "'NUM_STREAM'", "'NUM_STREAMS'"),
    ),
    "unlike any setting": (
        {"ov_config": {"XYZZY": 1}},
        *(ValueError, "ov_config={'XYZZY': 1}", "CPU"),
    ),
    "value of a setting": (
        {"ov_config": {"INFERENCE_PRECISION_HINT": "f33"}},
        *(ValueError, "ov_config={'INFERENCE_PRECISION_HINT': 'f33'}", "bf16, f16, f32"),
    ),
    "no settings": ({"ov_config": "f32"}, ValueError, "ov_config='f32'", "a dictionary"),
    "misspelt": ({"wieght_format": "int8"}, TypeError, "'wieght_format'", "'weight_format'"),
    "torch's": ({"unet": 1}, TypeError, "no argument 'unet'"),
    "tokenizer by path": ({"tokenizer": "t5"}, ValueError, "tokenizer='t5'", "an object of"),
    "IR by path": ({"vae_decoder": "vae"}, ValueError, "vae_decoder='vae'", "an object of Model"),
    "no scheduler": ({"scheduler": 3}, ValueError, "scheduler=3", "SchedulerMixin"),
    "no network": ({"transformer": 3}, ValueError, "transformer=3", "an object of Model"),
    "scheduler for flows": (
        {"scheduler": FlowMatchEulerDiscreteScheduler()},
        *(ValueError, "scheduler='FlowMatchEulerDiscreteScheduler'", "predict noise"),
    ),
    "IR in the place of a VAE": (
        {"vae": stand_in_transformer(compiled=False)},
        *(ValueError, "vae=", "an object of Module, OVModelVae"),
    ),
    "module in the place of an IR": (
        {"vae_decoder": torch.nn.Linear(1, 1)},
        *(ValueError, "vae_decoder=", "an object of Model, CompiledModel"),
    ),
    "no VAE": ({"vae": None}, ValueError, "vae=None", "output_type='latent'"),
    "not compiled": (
        {"compile_only": True, "compile": False},
        *(ValueError, "compile=False", "compile_only=True"),
    ),
    "no switch": ({"load_in_8bit": "yes"}, ValueError, "load_in_8bit='yes'", "True or False"),
    "quantization by name": (
        {"quantization_config": "int8"},
        *(ValueError, "quantization_config='int8'", "OVQuantizationConfigBase"),
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_bad_option_is_refused_before_the_conversion(case, checkpoint, conversions, temporary):
    options, kind, *words = case
    with refused(kind, *words):
        helper.OVPixArtAlphaPipeline.from_pretrained(checkpoint("alpha"), **options)
    assert not conversions
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("stage", ["convert_pipeline", "check_openvino_folder"])
def test_a_failure_leaves_no_temporary_folder(
    error, stage, checkpoint, conversions, temporary, monkeypatch
):
    def fail(*args, **kwargs):
        assert list(temporary.iterdir())
        raise error

    monkeypatch.setattr(pipeline_module, stage, fail)
    with pytest.raises(error):
        helper.OVPixArtAlphaPipeline.from_pretrained(checkpoint("alpha"))
    assert not list(temporary.iterdir())


def test_the_temporary_folder_goes_with_its_pipeline(checkpoint, conversions, temporary):
    pipeline = helper.OVPixArtAlphaPipeline.from_pretrained(checkpoint("alpha"), compile=False)
    assert list(temporary.iterdir())
    del pipeline
    gc.collect()
    assert not list(temporary.iterdir())


# ---- as lenient as diffusers --------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "CPU.0", "cpu:0", torch.device("cpu"), "AUTO"])
def test_a_device_may_be_named_in_many_ways(device, converted, ov_pipeline):
    load = helper.OVPixArtAlphaPipeline.from_pretrained
    pipeline = load(converted("alpha"), device=device, ov_config=F32, compile=False)
    if device != "AUTO":
        assert pipeline._device == "CPU"
    assert pipeline.to(device) is pipeline
    assert pipeline.to(device=device) is pipeline
    pipeline.transformer.compile()


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda"), torch.device("cuda", 0), 0])
def test_a_device_that_is_not_there_is_refused_by_to(device, ov_pipeline):
    for call in ({"device": device}, None):
        with refused(ValueError, "device=", "'CPU'"):
            ov_pipeline("alpha").to(**call) if call else ov_pipeline("alpha").to(device)


def test_options_of_torch_pipelines_have_no_effect(converted):
    pipeline = helper.OVPixArtAlphaPipeline.from_pretrained(
        converted("alpha"),
        compile=False,
        torch_dtype=torch.float16,
        variant="fp16",
        use_safetensors=True,
    )
    assert pipeline.dtype is torch.float32


def test_settings_may_be_openvinos_own_objects(converted):
    settings = {
        ov.properties.hint.inference_precision(): ov.Type.f32,
        ov.properties.inference_num_threads: 1,
    }
    pipeline = helper.OVPixArtAlphaPipeline.from_pretrained(converted("alpha"), ov_config=settings)
    compiled = pipeline.transformer.request
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32


def test_shapes_may_be_numpy_numbers(converted, ov_pipeline):
    load = helper.OVPixArtAlphaPipeline.from_pretrained
    pipeline = load(converted("alpha"), ov_config=F32, compile=False)
    pipeline.reshape(*np.array([1, 64, 64, 1]), max_sequence_length=np.int16(40))
    assert_same(generate(pipeline), generate(ov_pipeline("alpha")))
