"""Comparison: its numbers on turns with known answers, and its processes on random models."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity
from tiny_models import build_checkpoint

import ov_pixart_helper as helper
from ov_pixart_helper import Comparison, compare_pipelines

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


def gray(level: int) -> Image.Image:
    return Image.new("RGB", (32, 16), (level, level, level))


def turn(level: int, total_s: float, memory: float) -> helper._Turn:
    """A turn of two steps, 0.1 and 0.3 s, and a slow third."""
    return helper._Turn(
        picture=gray(level),
        total_s=total_s,
        text_encoder_s=0.05,
        step_s=[0.1, 0.3, 0.2],
        vae_decoder_s=0.5,
        peak_memory_mb=memory,
    )


@pytest.fixture(scope="module")
def stub() -> Comparison:
    """Three pictures each; "b" is off by 1, 2 and 0 levels of gray."""
    turns = {
        "a": [turn(100, 1.0, 500), turn(100, 2.0, 600), turn(100, 9.0, 550)],
        "b": [turn(101, 3.0, 700), turn(102, 4.0, 700), turn(100, 5.0, 700)],
    }
    sizes = {
        "a": {"text_encoder": 1.0, "transformer": 2.0, "vae_decoder": 3.0},
        "b": {"text_encoder": 0.5, "transformer": 1.0, "vae_decoder": 1.5},
    }
    pairs = [("red", 1), ("green", 2), ("blue", 3)]

    def brightness(pictures, prompts):
        assert prompts == ["red", "green", "blue"]
        return [float(np.asarray(picture).mean()) for picture in pictures]

    return helper._evaluate(turns, sizes, pairs, "a", brightness)


def test_the_table_has_one_row_a_label_and_the_promised_columns(stub):
    table = stub.to_dataframe()
    assert list(table.index) == ["a", "b"]
    assert list(table.columns) == COLUMNS


def test_times_are_medians_and_memory_is_a_peak(stub):
    row = stub.to_dataframe().loc["a"]
    assert row["size_mb"] == 6.0
    assert row["total_s"] == 2.0
    assert row["step_ms"] == pytest.approx(200)
    assert row["text_encoder_ms"] == pytest.approx(50)
    assert row["vae_decoder_ms"] == pytest.approx(500)
    assert row["peak_memory_mb"] == 600


def test_psnr_is_the_textbook_one(stub):
    one, two, none = stub.psnr_db["b"]
    assert one == pytest.approx(20 * np.log10(255))
    assert two == pytest.approx(20 * np.log10(255 / 2))
    assert none == np.inf
    assert stub.to_dataframe().loc["b", "psnr_db"] == pytest.approx(one)  # the median


def test_the_reference_equals_itself(stub):
    row = stub.to_dataframe().loc["a"]
    assert row["psnr_db"] == np.inf
    assert row["ssim"] == 1


def test_ssim_is_that_of_skimage(stub):
    a, b = np.asarray(gray(100)), np.asarray(gray(102))
    assert stub.ssim["b"][1] == structural_similarity(a, b, channel_axis=-1, data_range=255)


def test_the_score_is_the_scorers_mean(stub):
    assert stub.scores["b"] == [101, 102, 100]
    assert list(stub.to_dataframe()["score"]) == [100, 101]


def test_pictures_of_different_sizes_cannot_be_compared():
    turns = {"a": [turn(1, 1, 1)], "b": [turn(1, 1, 1)]}
    object.__setattr__(turns["b"][0], "picture", Image.new("RGB", (16, 32)))
    with pytest.raises(ValueError, match="pipelines of one checkpoint"):
        helper._evaluate(turns, {}, [("red", 1)], "a", None)


# ---- plots --------------------------------------------------------------------------------------


def texts(figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(helper.plt.Text))


def test_plots_name_units_labels_and_numbers(stub):
    figure = stub.plot()
    shown = texts(figure)
    for ax in figure.axes:
        assert ax.get_xlabel()
        assert ax.get_title(loc="left")
    for word in ("MB", "ms", "dB", "Likeness to a", "equal", "48.1", "700", "text encoder", "DiT"):
        assert word in shown, word


def test_bars_of_parts_add_up_to_the_number_beside_them(stub):
    size, _, time, *_ = stub.plot().axes
    assert sum(bar.get_width() for bar in size.patches) == pytest.approx(6 + 3)
    assert sum(bar.get_width() for bar in time.patches) == pytest.approx(2 + 4)


def test_plots_without_a_scorer_show_ssim(stub):
    scoreless = Comparison(**{**vars(stub), "scores": {"a": [], "b": []}})
    assert "SSIM" in texts(scoreless.plot())
    assert scoreless.to_dataframe()["score"].isna().all()


def test_pictures_are_shown_in_pairs_with_their_amplified_difference(stub):
    figure = stub.show_images(count=2, amplification=10)
    shown = texts(figure)
    assert "“red”, seed 1" in shown
    assert "“blue”" not in shown
    assert "difference × 10, 48.1 dB" in shown
    images = [image.get_array() for ax in figure.axes for image in ax.get_images()]
    assert len(images) == 6  # two pictures and a difference, twice
    assert np.unique(images[2]) == [138]  # gray, and ten times one level
    with pytest.raises(ValueError, match="labels='c'"):
        stub.show_images(labels=["c"])


def test_figures_are_handed_out_once(stub):
    """What pyplot still holds, a notebook would show a second time."""
    stub.plot(), stub.show_images()
    assert helper.plt.get_fignums() == []


# ---- processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A random α pipeline, as it was made and converted."""
    folder = tmp_path_factory.mktemp("compare")
    checkpoint = build_checkpoint(folder / "torch", "alpha")
    fp32 = helper.convert_pipeline(checkpoint, folder / "fp32", weight_format="fp32")
    for part in helper.PARTS:  # so that torch and OpenVINO agree on any machine
        model = helper._read_ir(fp32 / part)
        helper.store_runtime_options(model, INFERENCE_PRECISION_HINT="f32")
        with helper._staged(fp32 / part) as staged:
            helper.ov.save_model(model, staged / helper.IR_NAME, compress_to_fp16=False)
    return {"torch": checkpoint, "openvino": fp32}


@pytest.fixture(scope="module")
def compared(folders) -> Comparison:
    def scorer(pictures, prompts):
        assert os.getpid() == parent
        return [float(len(prompt)) for prompt in prompts]

    parent = os.getpid()
    return compare_pipelines(
        folders, ["red", "a star"], seeds=[5, 6], num_inference_steps=2, scorer=scorer
    )


def test_torch_and_openvino_draw_the_same_pictures(compared):
    assert [picture.size for picture in compared.pictures["openvino"]] == [(256, 256)] * 2
    assert compared.to_dataframe().loc["openvino", "psnr_db"] > 50


def test_every_stage_is_timed(compared):
    table = compared.to_dataframe()
    stages = table["text_encoder_ms"] + 2 * table["step_ms"] + table["vae_decoder_ms"]
    assert (table[["text_encoder_ms", "step_ms", "vae_decoder_ms"]] > 0).all(axis=None)
    assert (stages < 1500 * table["total_s"]).all()
    assert {len(turn.step_s) for turns in compared.turns.values() for turn in turns} == {2}
    assert list(table["score"]) == [4.5, 4.5]


def test_memory_is_that_of_the_workers(compared):
    """A worker starts anew: what this process holds does not count."""
    assert (compared.to_dataframe()["peak_memory_mb"].between(200, 3000)).all()


def test_sizes_are_those_of_the_weights_on_disk(compared, folders):
    sizes = compared.sizes_mb
    file = folders["torch"] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert sizes["torch"]["transformer"] == file.stat().st_size / 1e6
    files = (folders["openvino"] / "transformer").glob("openvino_model.*")
    assert sizes["openvino"]["transformer"] == sum(file.stat().st_size for file in files) / 1e6


def test_it_works_from_a_script_without_a_main_guard(folders, tmp_path):
    """And so from a notebook: no process may run the caller once more."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from ov_pixart_helper import compare_pipelines\n"
        f"folders = {{'ov': {str(folders['openvino'])!r}}}\n"
        "result = compare_pipelines(folders, 'red', seeds=[1, 2], num_inference_steps=2)\n"
        "print(result.to_dataframe().shape, len(result.pictures['ov']), result.seeds)\n"
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
    assert all("picture" in line for line in bar), bar


@pytest.mark.parametrize(("free_gb", "side_by_side"), [(8, 2), (0.7, 1)])
def test_memory_decides_how_many_take_turns(free_gb, side_by_side, folders, compared, monkeypatch):
    living, most, start = set(), [], helper._worker

    @contextlib.contextmanager
    def watch(label, folder):
        with start(label, folder) as worker:
            living.add(label)
            most.append(len(living))
            yield worker
        living.remove(label)

    memory = SimpleNamespace(available=free_gb * 1e9)
    monkeypatch.setattr(helper.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(helper, "_worker", watch)
    again = compare_pipelines(folders, ["red", "a star"], seeds=[5, 6], num_inference_steps=2)
    assert max(most) == side_by_side
    assert list(again.turns) == list(folders)
    for label in folders:
        for one, other in zip(again.pictures[label], compared.pictures[label], strict=True):
            assert one.tobytes() == other.tobytes()


def test_a_failure_at_the_far_end_arrives_as_one_line(folders):
    with pytest.raises(RuntimeError, match="'openvino' failed: ValueError: num_inference_steps=0"):
        compare_pipelines({"openvino": folders["openvino"]}, "red", seeds=1, num_inference_steps=0)


def test_a_worker_that_dies_is_reported(folders):
    with helper._worker("openvino", folders["openvino"]) as worker:
        worker.process.kill()
        with pytest.raises(RuntimeError, match=r"'openvino' died .*exit code -?9"):
            worker.draw("red", 1, num_inference_steps=2)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("reference='c' does not work.*'torch', 'openvino'", {"reference": "c"}),
        (r"seeds=\[1, 2, 3\] does not work.*2 prompts", {"seeds": [1, 2, 3]}),
        ("seeds=", {"seeds": []}),
        ("prompts=", {"prompts": []}),
        ("pipelines=", {"pipelines": {}}),
    ],
)
def test_wrong_arguments_are_refused_before_a_process_starts(folders, words, change, monkeypatch):
    monkeypatch.setattr(helper, "_worker", None)
    call = {"pipelines": folders, "prompts": ["a", "b"], "seeds": [1, 2], **change}
    with pytest.raises(ValueError, match=words) as caught:
        compare_pipelines(call.pop("pipelines"), call.pop("prompts"), **call)
    assert "\n" not in str(caught.value)


def test_folders_that_are_none_are_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        compare_pipelines({"a": tmp_path / "nowhere"}, "red", seeds=1)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        compare_pipelines({"a": tmp_path}, "red", seeds=1)
