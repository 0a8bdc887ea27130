"""`optimize_pipeline`: what is on disk, what is kept, and what happens when something is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from optimum.intel import OVDiffusionPipeline

import ov_pixart_helper as helper
from ov_pixart import ir, optimize, quantize
from ov_pixart_helper import COMPONENTS, PRESETS, OVPixArtAlphaPipeline, optimize_pipeline
from tests.support.folders import flip_a_bit
from tests.support.graphs import layers, rounded_inputs
from tests.support.optimized import DATA, generate_small
from tests.support.refused import refused

pytestmark = pytest.mark.slow  # NNCF at work


def weights(folder: Path, name: str) -> bytes:
    return (folder / name / "openvino_model.bin").read_bytes()


def count_made(monkeypatch) -> list[str]:
    """The names of the components that are computed from now on."""
    made, optimize_component = [], optimize.optimize_component

    def counted(source, name, *args):
        made.append(name)
        return optimize_component(source, name, *args)

    monkeypatch.setattr(optimize, "optimize_component", counted)
    return made


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [OVPixArtAlphaPipeline, OVDiffusionPipeline])
def test_stored_options_survive_saving_and_arrive_through_either_class(optimized, tmp_path, loader):
    stored = dict(PRESETS["int8-weights"].transformer.options)
    assert stored
    first = loader.from_pretrained(optimized("int8-weights"))
    first.save_pretrained(tmp_path / "copy")
    second = loader.from_pretrained(tmp_path / "copy")
    for pipeline in (first, second):
        for name, value in stored.items():
            compiled = pipeline.transformer.request.get_property(name)
            assert str(compiled) == str(value)
    images = [generate_small(f, loader) for f in (optimized("int8-weights"), tmp_path / "copy")]
    assert np.array_equal(*images)


@pytest.mark.parametrize("preset", ["int8", "int4", "hybrid"])
def test_graphs_survive_saving(optimized, tmp_path, preset):
    OVPixArtAlphaPipeline.from_pretrained(optimized(preset)).save_pretrained(tmp_path)
    for name in COMPONENTS:
        assert layers(tmp_path, name) == layers(optimized(preset), name)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(optimized, fp16, tmp_path):
    again = optimize_pipeline(fp16, tmp_path / "int8", "int8", **DATA)  # images are generated, too
    for name in COMPONENTS:
        assert weights(again, name) == weights(optimized("int8"), name), name


@pytest.mark.parametrize("is_large", [False, True])
def test_scales_are_fitted_unless_the_text_encoder_is_large(is_large, fp16, tmp_path, monkeypatch):
    fitted, compress = set(), quantize.compress_to_4_bits

    def watch(model, group_size, ignored, dataset, **options):
        if "last_hidden_state" in model.output(0).get_names():
            fitted.add(dataset is not None)
        return compress(model, group_size, ignored, dataset, **options)

    monkeypatch.setattr(ir, "LARGE_BYTES", 0 if is_large else 10**9)
    monkeypatch.setattr(quantize, "compress_to_4_bits", watch)
    optimize_pipeline(fp16, tmp_path / "int4", "int4", **DATA)
    assert fitted == {not is_large}


def test_too_little_disk_is_said_before_anything_is_written(fp16, tmp_path, monkeypatch):
    half = sum(file.stat().st_size for file in fp16.glob("*/*.bin")) / 2  # 8 bits instead of 16

    def free(share):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: (10**12, 0, share * half))

    free(0.9)
    with pytest.raises(OSError, match=r"output_dir=.* needs .* GB of disk, and .* GB are free"):
        optimize_pipeline(fp16, tmp_path / "new", "int8-weights", progress=False)
    assert not list(tmp_path.iterdir())
    free(1.1)
    optimize_pipeline(fp16, tmp_path / "new", "int8-weights", progress=False)
    free(0)  # what is there already needs no room
    optimize_pipeline(fp16, tmp_path / "new", "int8-weights", progress=False)


# ---- doing no work twice ------------------------------------------------------------------------


def test_finished_components_are_kept_and_missing_ones_made(optimized, fp16, tmp_path, monkeypatch):
    folder = shutil.copytree(optimized("int8-weights"), tmp_path / "int8-weights")
    (folder / "model_index.json").unlink()
    (folder / "vae_decoder" / "openvino_model.bin").unlink()
    made = count_made(monkeypatch)
    optimize_pipeline(fp16, folder, "int8-weights", progress=False)
    assert made == ["vae_decoder"]
    assert (folder / "model_index.json").is_file()


def test_a_damaged_component_is_made_again(optimized, fp16, tmp_path, monkeypatch):
    folder = shutil.copytree(optimized("int8-weights"), tmp_path / "int8-weights")
    flip_a_bit(folder / "transformer" / "openvino_model.bin")  # its size is still right
    made = count_made(monkeypatch)
    optimize_pipeline(fp16, folder, "int8-weights", progress=False)
    assert made == ["transformer"]
    assert weights(folder, "transformer") == weights(optimized("int8-weights"), "transformer")


def test_a_cut_file_is_refused_when_the_folder_is_loaded(optimized, tmp_path):
    folder = shutil.copytree(optimized("int8-weights"), tmp_path / "int8-weights")
    file = folder / "transformer" / "openvino_model.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with refused(ValueError, "transformer", "damaged", "optimize_pipeline"):
        OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


def test_neighbouring_folders_share_nothing_but_calibration_images(optimized, fp16, monkeypatch):
    optimized("int8")
    made = count_made(monkeypatch)
    optimize_pipeline(fp16, fp16.parent / "int8-again", "int8", **DATA)
    assert made == list(COMPONENTS)
    shutil.rmtree(fp16.parent / "int8-again")


def test_another_preset_in_the_same_folder_replaces_the_first(optimized, fp16, tmp_path):
    folder = shutil.copytree(optimized("int8"), tmp_path / "folder")
    optimize_pipeline(fp16, folder, "int8-weights", progress=False)
    assert not rounded_inputs(folder, "transformer")
    record = json.loads((folder / "transformer" / "optimization.json").read_text())
    assert record["recipe"]["activations"] is False


def test_no_temporary_file_is_left(optimized, fp16):
    before = {file.name for file in fp16.iterdir()}
    folder = optimized("int8")
    assert not list(folder.parent.rglob(".partial-*"))
    assert {file.name for file in folder.iterdir()} == before


# ---- errors -------------------------------------------------------------------------------------


def fails(error: type[Exception], words: str, *args, **kwargs) -> None:
    """Check that a call fails with one line that holds `words`, and writes nothing."""
    with pytest.raises(error, match=words) as caught:
        optimize_pipeline(*args, progress=False, **kwargs)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_known_ones(fp16, tmp_path):
    fails(ValueError, "'int9' is unknown.*'int8-weights', 'int8'", fp16, tmp_path / "x", "int9")
    assert not (tmp_path / "x").exists()


def test_too_few_captions_are_refused(fp16, tmp_path):
    words = "1 different captions, too few for num_samples=10: give 2 or more"
    few = ["one", "one ", ""]
    fails(ValueError, words, fp16, tmp_path / "x", calibration_prompts=few, num_samples=10)
    fails(ValueError, "too few", fp16, tmp_path / "x", calibration_prompts=[])


def test_captions_that_are_none_are_refused(fp16, tmp_path):
    fails(ValueError, "calibration_prompts=", fp16, tmp_path / "x", calibration_prompts=[1, 2])
    fails(ValueError, "num_samples=0", fp16, tmp_path / "x", num_samples=0)
    missing = tmp_path / "none.csv"
    fails(FileNotFoundError, "none.csv", fp16, tmp_path / "x", calibration_prompts=missing)
    file = tmp_path / "other.csv"
    file.write_text("text\na\n")
    fails(ValueError, "it has 'text'", fp16, tmp_path / "x", calibration_prompts=file)


def test_a_quantized_source_is_refused(optimized, tmp_path):
    for preset in ("int8", "int8-weights"):
        fails(ValueError, "quantized already", optimized(preset), tmp_path / "x")


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_a_quantized_text_encoder_is_copied(preset, checkpoint, fp16, tmp_path, monkeypatch):
    monkeypatch.setattr(ir, "LARGE_BYTES", 0)
    source = shutil.copytree(fp16, tmp_path / "fp16")
    helper.convert_pipeline(checkpoint("alpha"), source, weight_format={"text_encoder": "int8"})
    folder = optimize_pipeline(source, tmp_path / "out", preset, **DATA)
    assert weights(folder, "text_encoder") == weights(source, "text_encoder")
    assert rounded_inputs(folder, "transformer")
    assert generate_small(folder).std() > 0


def test_a_source_that_is_no_openvino_folder_is_refused(checkpoint, tmp_path):
    fails(ValueError, "convert_pipeline first", checkpoint("alpha"), tmp_path / "x")
    fails(FileNotFoundError, "no folder", tmp_path / "nowhere", tmp_path / "x")
    fails(FileNotFoundError, "model_index.json", tmp_path, tmp_path / "x")


def test_output_equal_to_source_is_refused(fp16, tmp_path):
    fails(ValueError, "is the source folder", fp16, fp16)
    file = tmp_path / "file"
    file.touch()
    fails(ValueError, "is a file", fp16, file)
