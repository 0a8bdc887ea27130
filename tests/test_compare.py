"""Comparison: its numbers on runs with known answers, and its processes on random models."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import openvino as ov
import psutil
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

import ov_pixart_helper as helper
from ov_pixart import compare
from ov_pixart.compare import Comparison, Timer, compare_pipelines, likeness
from ov_pixart.workers import Workers
from tests.support.comparisons import gray, known_comparison
from tests.support.refused import refused

COLUMNS = [  # in this order
    "size_mb",
    "text_encoder_ms",
    "step_ms",
    "vae_decoder_ms",
    "total_s",
    "peak_memory_mb",
    "psnr_db",
    "ssim",
    "score",
]


# ---- numbers with known answers -----------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> Comparison:
    return known_comparison()


@pytest.mark.parametrize(
    ("pipelines", "words"),
    [
        ("folder", ("pipelines='folder'", "a dictionary")),
        ({"a": object()}, ("pipelines['a']=", "the folder of a pipeline")),
        ({}, ("pipelines={}", "at least one")),
    ],
)
def test_pipelines_are_folders_by_label(pipelines, words):
    with refused(ValueError, *words):
        compare_pipelines(pipelines, "a star", seeds=0)


def test_a_misspelt_argument_comes_with_the_nearest():
    with refused(TypeError, "compare_pipelines has no argument 'seed'"):
        compare_pipelines({}, "a star", seed=0)


def test_the_table_has_one_row_per_label_and_the_promised_columns(known):
    table = known.to_dataframe()
    assert list(table.index) == ["a", "b"]
    assert list(table.columns) == COLUMNS


def test_times_are_medians_and_memory_is_a_peak(known):
    row = known.to_dataframe().loc["a"]
    assert row["size_mb"] == 6.0
    assert row["total_s"] == 2.0
    assert row["step_ms"] == pytest.approx(200)
    assert row["text_encoder_ms"] == pytest.approx(50)
    assert row["vae_decoder_ms"] == pytest.approx(500)
    assert row["peak_memory_mb"] == 600


def test_psnr_is_the_textbook_one(known):
    one, two, none = known.psnr_db["b"]
    assert one == pytest.approx(20 * np.log10(255))
    assert two == pytest.approx(20 * np.log10(255 / 2))
    assert none == np.inf
    assert known.to_dataframe().loc["b", "psnr_db"] == pytest.approx(one)  # the median


def test_the_reference_equals_itself(known):
    row = known.to_dataframe().loc["a"]
    assert row["psnr_db"] == np.inf
    assert row["ssim"] == 1


def test_ssim_is_that_of_skimage(known):
    a, b = np.asarray(gray(100)), np.asarray(gray(102))
    assert known.ssim["b"][1] == structural_similarity(a, b, channel_axis=-1, data_range=255)


def test_the_score_is_the_scorers_mean(known):
    assert known.scores["b"] == [101, 102, 100]
    assert list(known.to_dataframe()["score"]) == [100, 101]


def test_images_of_different_sizes_cannot_be_compared():
    with pytest.raises(ValueError, match="pipelines of one checkpoint"):
        likeness(gray(1), Image.new("RGB", (16, 32)))


def test_pictures_is_an_earlier_name_of_images(known):
    assert known.pictures is known.images


# ---- processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint, converted) -> dict[str, Path]:
    """A random α pipeline, as it was made and converted."""
    tmp = tmp_path_factory.mktemp("compare")
    fp32 = shutil.copytree(converted("alpha"), tmp / "fp32")
    for name in helper.COMPONENTS:  # so that torch and OpenVINO agree on any machine
        file = fp32 / name / helper.IR_NAME
        model = ov.Core().read_model(file)
        helper.store_runtime_options(model, INFERENCE_PRECISION_HINT="f32")
        ov.save_model(model, tmp / helper.IR_NAME, compress_to_fp16=False)
        for suffix in (".xml", ".bin"):
            shutil.move((tmp / helper.IR_NAME).with_suffix(suffix), file.with_suffix(suffix))
        (file.parent / "conversion.json").unlink()  # it has the sizes of the old files
    return {"torch": checkpoint("alpha"), "openvino": fp32}


@pytest.fixture(scope="module")
def compared(folders) -> Comparison:
    def scorer(images, prompts):
        assert os.getpid() == parent
        return [float(len(prompt)) for prompt in prompts]

    parent = os.getpid()
    return compare_pipelines(
        folders, ["red", "a star"], seeds=[5, 6], num_inference_steps=2, scorer=scorer
    )


def test_torch_and_openvino_generate_the_same_images(compared):
    assert [image.size for image in compared.images["openvino"]] == [(256, 256)] * 2
    assert compared.to_dataframe().loc["openvino", "psnr_db"] > 50


def test_every_stage_is_timed(compared):
    table = compared.to_dataframe()
    stages = table["text_encoder_ms"] + 2 * table["step_ms"] + table["vae_decoder_ms"]
    assert (table[["text_encoder_ms", "step_ms", "vae_decoder_ms"]] > 0).all(axis=None)
    assert (stages < 1500 * table["total_s"]).all()
    assert {len(run.step_s) for runs in compared.runs.values() for run in runs} == {2}
    assert list(table["score"]) == [4.5, 4.5]


@pytest.mark.slow
def test_steps_and_guidance_may_differ_by_label(folders):
    versions = {"all": folders["openvino"], "half": folders["openvino"], "torch": folders["torch"]}
    compared = compare_pipelines(
        versions,
        "a star",
        seeds=5,
        num_inference_steps={"all": 3, "half": 4, "torch": 4},
        guidance_end={"half": 0.5, "torch": 0.5},
        reference="torch",
    )
    steps = {label: len(run.step_s) for label, (run,) in compared.runs.items()}
    assert steps == {"all": 3, "half": 4, "torch": 4}
    assert compared.psnr_db["half"][0] > 50 > compared.psnr_db["all"][0]


def test_an_interval_without_guidance_is_mentioned_at_once(folders, monkeypatch):
    class NoWorkers(Exception):
        pass

    def refuse():
        raise NoWorkers

    monkeypatch.setattr(compare, "Workers", refuse)
    with pytest.warns(UserWarning, match="have no effect") as caught, pytest.raises(NoWorkers):
        compare_pipelines(folders, "red", seeds=1, guidance_scale=1.0, guidance_end={"torch": 0.5})
    assert caught[0].filename == __file__


def test_memory_is_that_of_the_workers(compared):
    """A worker starts anew: what this process holds does not count."""
    assert (compared.to_dataframe()["peak_memory_mb"].between(200, 3000)).all()


def test_sizes_are_those_of_the_weights_on_disk(compared, folders):
    sizes = compared.sizes_mb
    file = folders["torch"] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert sizes["torch"]["transformer"] == file.stat().st_size / 1e6
    files = (folders["openvino"] / "transformer").glob("openvino_model.*")
    assert sizes["openvino"]["transformer"] == sum(file.stat().st_size for file in files) / 1e6


@pytest.mark.slow
def test_it_works_from_a_script_without_a_main_guard(folders, tmp_path):
    """And so from a notebook: no process may run the caller once more."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from ov_pixart_helper import compare_pipelines\n"
        f"folders = {{'ov': {str(folders['openvino'])!r}}}\n"
        "result = compare_pipelines(folders, 'red', seeds=[1, 2], num_inference_steps=2)\n"
        "print(result.to_dataframe().shape, len(result.images['ov']), result.seeds)\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == ["started", "(1, 9) 2 [1, 2]"]
    assert "Traceback" not in done.stderr
    bar = [line for line in done.stderr.replace("\r", "\n").split("\n") if line.strip()]
    assert all("image" in line for line in bar), bar


class WatchedWorkers(Workers):
    """Notes which worker processes there are side by side."""

    groups: ClassVar[list[set[str]]] = []

    def __enter__(self) -> Workers:
        self.groups.append(set())
        return super().__enter__()

    def call(self, worker: str, *args, **kwargs):
        self.groups[-1].add(worker)
        return super().call(worker, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("free_gb", "groups"), [(8, [{"torch", "openvino"}]), (0.7, [{"torch"}, {"openvino"}])]
)
def test_memory_decides_how_many_take_turns(free_gb, groups, folders, compared, monkeypatch):
    memory = SimpleNamespace(available=free_gb * 1e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(WatchedWorkers, "groups", [])
    monkeypatch.setattr(compare, "Workers", WatchedWorkers)
    again = compare_pipelines(folders, ["red", "a star"], seeds=[5, 6], num_inference_steps=2)
    assert WatchedWorkers.groups == groups
    assert list(again.runs) == list(folders)
    for label in folders:
        for one, other in zip(again.images[label], compared.images[label], strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.slow
def test_a_failure_at_the_far_end_arrives_as_one_line(folders):
    only = {"openvino": folders["openvino"]}
    with refused(RuntimeError, "'openvino' failed: ValueError: num_inference_steps=0"):
        compare_pipelines(only, "red", seeds=1, num_inference_steps=0)


class MortalTimer(Timer):
    """A pipeline whose process is killed while it generates."""

    def run(self, *args, **kwargs):
        os.kill(os.getpid(), 9)


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_with_the_remedy(folders, monkeypatch):
    monkeypatch.setattr(compare, "Timer", MortalTimer)
    words = ("'openvino' failed: its process died (exit code -9)", "compare fewer pipelines")
    with refused(RuntimeError, *words):
        compare_pipelines({"openvino": folders["openvino"]}, "red", seeds=1, num_inference_steps=2)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("reference='c' does not work.*'torch', 'openvino'", {"reference": "c"}),
        (r"seeds=\[1, 2, 3\] does not work.*2 prompts", {"seeds": [1, 2, 3]}),
        ("seeds=", {"seeds": []}),
        ("prompts=", {"prompts": []}),
        ("pipelines=", {"pipelines": {}}),
        ("guidance_end=2 does not work", {"guidance_end": 2}),
        ("guidance_end=2 does not work", {"guidance_end": {"openvino": 2}}),
        (r"num_inference_steps=.'c': 4.*'torch', 'openvino'", {"num_inference_steps": {"c": 4}}),
    ],
)
def test_wrong_arguments_are_refused_before_a_process_starts(folders, words, change, monkeypatch):
    monkeypatch.setattr(compare, "Workers", None)
    call = {"pipelines": folders, "prompts": ["a", "b"], "seeds": [1, 2], **change}
    with pytest.raises(ValueError, match=words) as caught:
        compare_pipelines(call.pop("pipelines"), call.pop("prompts"), **call)
    assert "\n" not in str(caught.value)


def test_folders_that_are_none_are_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        compare_pipelines({"a": tmp_path / "nowhere"}, "red", seeds=1)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        compare_pipelines({"a": tmp_path}, "red", seeds=1)
