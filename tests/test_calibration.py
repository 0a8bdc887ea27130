"""Calibration data: captions from anywhere, and samples recorded while images are generated."""

import itertools
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from ov_pixart import calibration, ir
from ov_pixart.calibration import (
    CAPTIONS,
    DEFAULT_NUM_SAMPLES,
    CalibrationData,
    choose_prompts,
    load_calibration_prompts,
    split_large_call,
    tile_latents,
)
from ov_pixart.optimize import optimize_pipeline
from tests.support.optimized import DATA, PROMPTS
from tests.support.refused import refused

pytestmark = pytest.mark.slow  # NNCF at work

# ---- captions -----------------------------------------------------------------------------------


def test_captions_are_read_from_files(tmp_path):
    files = {
        "csv": "caption,seed\na,1\nb,2\n",
        "jsonl": '{"caption": "a"}\n{"caption": "b"}\n',
        "txt": "a\nb\n",
    }
    for suffix, text in files.items():
        file = tmp_path / f"captions.{suffix}"
        file.write_text(text)
        assert load_calibration_prompts(file) == ["a", "b"]
        assert load_calibration_prompts(str(file), num=1) == ["a"]


def test_data_sets_are_streamed_without_their_code(monkeypatch):
    asked = {}

    def load_dataset(name, **kwargs):
        asked.update(kwargs, name=name)
        return itertools.repeat({"text": "x"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = load_calibration_prompts("some/captions", column="text", split="test", num=3)
    assert read == ["x"] * 3
    assert asked == {"name": "some/captions", "split": "test", "streaming": True}


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Cannot send a request,\nas the client"), ConnectionError("no network")],
)
def test_a_data_set_out_of_reach_is_one_line(error, fp16, tmp_path, monkeypatch):
    def load_dataset(name, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = ("'some/captions'", "connection", str(error).splitlines()[0])
    with refused(FileNotFoundError, "source=", *words):
        load_calibration_prompts("some/captions")
    source = {"calibration_prompts": "some/captions"}
    with refused(FileNotFoundError, "calibration_prompts=", *words):
        numbers = {"num_samples": np.int64(5), "seed": np.int64(0)}
        optimize_pipeline(fp16, tmp_path / "int8", **numbers, **source)


def test_arguments_of_a_data_set_are_not_for_a_file(tmp_path):
    (tmp_path / "captions.txt").write_text("a\n")
    with refused(TypeError, "no argument 'colunm' (nearest: 'column')"):
        load_calibration_prompts(tmp_path / "captions.txt", colunm="text")


def test_shipped_captions_suffice_for_the_default_number_of_samples():
    for file in ("natural-calibration.csv", "pixart-tiny-calibration.csv"):
        captions = load_calibration_prompts(CAPTIONS / file)
        assert len(set(captions)) == len(captions) >= DEFAULT_NUM_SAMPLES / 5
    natural = load_calibration_prompts(CAPTIONS / "natural-calibration.csv")
    assert len(natural) >= 300


# ---- samples ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(optimized, fp16) -> list[dict[str, np.ndarray]]:
    optimized("int8")
    prompts = choose_prompts(PROMPTS, fp16, 10, seed=0)
    data = CalibrationData(fp16, fp16.parent / "calibration", prompts, 10, 0)
    assert (data.folder / f"{data.key}.npz").is_file()
    return data.samples("transformer", progress=False)


def test_samples_hold_both_halves_of_the_guidance(recorded):
    assert len(recorded) == 10
    for sample in recorded:
        assert sample["hidden_states"].shape[0] == 2
        negative, positive = sample["encoder_hidden_states"]
        assert not np.allclose(negative, positive, atol=1e-2)


def test_samples_spread_over_the_timesteps(recorded):
    steps = sorted(float(sample["timestep"][0]) for sample in recorded)
    assert steps[0] < 200
    assert steps[-1] > 900
    assert max(np.diff(steps)) < 200


def test_samples_come_in_several_aspect_ratios(recorded):
    shapes = {sample["hidden_states"].shape[2:] for sample in recorded}
    assert len(shapes) == 2  # two images; five in turn if there are more
    assert all(abs(h * w / 32**2 - 1) < 0.1 for h, w in shapes)


def test_images_are_generated_once_for_all_presets(optimized, fp16, tmp_path, monkeypatch):
    optimized("int8")

    def record(*args, **kwargs):
        raise AssertionError("generated again")

    monkeypatch.setattr(calibration, "record_image", record)
    optimize_pipeline(fp16, fp16.parent / "again", "hybrid", **DATA)
    with pytest.raises(AssertionError, match="generated again"):
        optimize_pipeline(fp16, fp16.parent / "again", "int8", **{**DATA, "seed": 1})
    shutil.rmtree(fp16.parent / "again")


def test_images_are_generated_without_the_text_encoder(fp16, tmp_path, monkeypatch):
    loaded, record = [], calibration.record_image

    def watch(pipeline, **call):
        loaded.append(pipeline.text_encoder.request)
        return record(pipeline, **call)

    monkeypatch.setattr(calibration, "record_image", watch)
    data = CalibrationData(fp16, tmp_path, PROMPTS[:2], 10, 0)
    data.samples("vae_decoder", progress=False)
    assert loaded == [None, None]


def test_a_small_text_encoder_is_the_sources_own(fp16, tmp_path, monkeypatch):
    read = watch_text_encoders(monkeypatch)
    optimize_pipeline(fp16, tmp_path / "int8", "int8", **DATA)
    assert read == [fp16 / "text_encoder"]


def test_a_large_text_encoder_is_the_one_just_written(fp16, tmp_path, monkeypatch):
    """T5-XXL in 16 bits fills 10 GB."""
    monkeypatch.setattr(ir, "LARGE_BYTES", 0)
    read = watch_text_encoders(monkeypatch)
    optimize_pipeline(fp16, tmp_path / "int8", "int8", **DATA)
    assert read == [tmp_path / "int8" / "text_encoder"]


def test_the_text_encoders_recipe_belongs_to_the_key(fp16, tmp_path):
    data = [CalibrationData(fp16, tmp_path, PROMPTS[:2], 10, 0) for _ in range(4)]
    data[1].encode_with(tmp_path / "text_encoder", {"weights": "int8"})
    data[2].encode_with(tmp_path / "text_encoder", {"weights": "int4"})
    data[3].encode_with(tmp_path / "elsewhere", {"weights": "int4"})
    keys = [one.key for one in data]
    assert len(set(keys)) == 3
    assert keys[2] == keys[3]


def watch_text_encoders(monkeypatch) -> list[Path]:
    """The folders of the text encoders that captions are encoded with from now on."""
    read = []

    def watch(folder):
        read.append(folder)
        return ir.read_ir(folder)

    monkeypatch.setattr(calibration, "read_ir", watch)
    return read


def test_large_calls_of_the_dit_are_calibrated_row_by_row():
    rows = {"encoder_attention_mask": np.ones((2, 120), np.int64), "timestep": np.arange(2.0)}
    at_512 = {"hidden_states": np.random.rand(2, 4, 48, 85).astype(np.float32), **rows}
    assert split_large_call(at_512) == [at_512]
    at_1024 = {"hidden_states": np.random.rand(2, 4, 128, 128).astype(np.float32), **rows}
    split = split_large_call(at_1024)
    assert [len(call[name]) for call in split for name in at_1024] == [1] * 6
    for name, value in at_1024.items():
        assert (np.concatenate([call[name] for call in split]) == value).all()


@pytest.mark.parametrize(
    ("size", "count", "largest"),
    [((32, 32), 1, (32, 32)), ((96, 170), 1, (96, 170)), ((256, 256), 4, (128, 128))],
)
def test_the_largest_latents_are_cut_into_tiles(size, count, largest):
    latents = np.arange(4 * np.prod(size), dtype=np.float32).reshape(1, 4, *size)
    tiles = tile_latents(latents)
    assert [tile.shape for tile in tiles] == [(1, 4, *largest)] * count
    seen = np.concatenate([tile.ravel() for tile in tiles])
    assert (np.sort(seen) == latents.ravel()).all()
