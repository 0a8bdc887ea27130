"""The benchmark: its whole way on a miniature, and its arithmetic on known numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ov_pixart_helper as helper
from assets.bench import report
from tests.benchmarks import bench, checkpoints
from tests.benchmarks import cases as plan
from tests.benchmarks.layers import profile_step
from tests.benchmarks.settings import Setting, measure
from tests.benchmarks.workers import WorkerError, call_in_process, worker

MINIATURE = plan.Scale(
    "miniature",
    dit={
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 32,
    },
    t5={"num_layers": 1, "num_heads": 2, "d_kv": 8, "d_model": 32, "d_ff": 64, "vocab_size": 512},
    vae={"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1},
    shrink=8,
    turns=2,
    speed=0.01,
)
CASE, ENGINES = "dit_step_512", ["torch-bf16", "ov-fp16"]


def _miniature(folder: Path) -> bench.Bench:
    return bench.Bench(folder / "miniature", folder / "bench.json", MINIATURE, quiet=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder in which the benchmark has run, from random weights to the report."""
    folder = tmp_path_factory.mktemp("bench")
    _miniature(folder).run({CASE: ENGINES})
    return folder


def test_the_report_has_what_was_asked_for(measured):
    content = json.loads((measured / "bench.json").read_text())
    assert {"machine", "versions", "scale", "quick", "results", "ratios"} <= set(content)
    assert content["scale"] == "miniature" and content["skipped"] == []
    assert content["machine"]["cores"] >= 1 and "openvino" in content["versions"]
    assert [(one["case"], one["engine"]) for one in content["results"]] == [
        (CASE, engine) for engine in ENGINES
    ]
    for one in content["results"]:
        assert one["seconds"] > 0 and one["runs"] == 2 == len(one["all_seconds"])
        assert 0.1 < one["peak_rss_gb"] < 10
    torch_s, ov_s = (one["seconds"] for one in content["results"])
    name = f"ov-fp16/torch-bf16@{CASE}"
    assert content["ratios"] == {name: pytest.approx(ov_s / torch_s, rel=1e-3, abs=1e-4)}
    assert all(size > 1000 for size in (f.stat().st_size for f in measured.glob("bench*.png")))


def test_the_checkpoint_is_laid_out_as_published(measured):
    folder = measured / "miniature" / "checkpoints" / plan.XL_512
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "Transformer2DModel"]
    assert [file.name for file in (folder / "tokenizer").iterdir()] == ["spiece.model"]
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, framework="pt") as tensors:
        assert "caption_projection.y_embedding" in tensors.keys()  # noqa: SIM118
    assert helper._stored_weights(folder / "transformer") == (None, [weights], torch.bfloat16)


def _folder(measured: Path) -> Path:
    return checkpoints.openvino_folder(measured / "miniature", plan.XL_512, "ov-fp16")


def test_settings_take_turns_with_what_they_are_held_against(measured):
    settings = (
        Setting(CASE, "default"),
        Setting(CASE, "static shapes", static=True),
        Setting(CASE, "two rows", {"INFERENCE_NUM_THREADS": 1}, rows=2),
        Setting(CASE, "two calls", calls=2, against="two rows"),
    )
    lines = measure(settings, _folder(measured), "ov-fp16", MINIATURE, turns=2)
    assert [line["setting"] for line in lines] == [setting.name for setting in settings]
    assert all(line["seconds"] > 0 for line in lines)
    seconds = {line["setting"]: line["seconds"] for line in lines}
    assert lines[0]["ratio"] == 1
    expected = seconds["two calls"] / seconds["two rows"]
    assert lines[3]["ratio"] == pytest.approx(expected, rel=0.2)  # seconds are rounded


def test_a_setting_that_does_not_work_is_named_and_left_out(measured, capsys):
    settings = (Setting(CASE, "default"), Setting(CASE, "nonsense", {"NO_SUCH_PROPERTY": 1}))
    lines = measure(settings, _folder(measured), "ov-fp16", MINIATURE, turns=1)
    assert [line["setting"] for line in lines] == ["default"]
    assert "nonsense" in capsys.readouterr().err


def test_the_profile_tells_what_depends_on_the_prompt_alone(measured):
    arguments = (plan.CASES[CASE], "ov-fp16", _folder(measured), MINIATURE)
    profile = call_in_process(profile_step, *arguments)
    assert 0 < profile["text_side"]["share"] < 1
    assert sum(one["share"] for one in profile["by_type"]) == pytest.approx(1)
    assert profile["text_side"]["seconds"] < profile["seconds"]


def test_the_irs_are_those_that_convert_pipeline_wrote(measured):
    folder = measured / "miniature" / "openvino" / plan.XL_512 / "ov-fp16"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("openvino_model.*")}
    checkpoint = measured / "miniature" / "checkpoints" / plan.XL_512
    helper.convert_pipeline(checkpoint, folder)
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("openvino_model.*")}


def test_what_has_been_measured_is_kept(measured, monkeypatch):
    monkeypatch.setattr(bench, "worker", None)  # nobody may start a process
    monkeypatch.setattr(bench, "call_in_process", None)
    before = json.loads((measured / "bench.json").read_text())["results"]
    assert _miniature(measured).run({CASE: ENGINES})["results"] == before


def test_results_of_another_machine_are_put_aside(measured, monkeypatch):
    monkeypatch.setattr(bench, "describe_machine", lambda: {"processor": "another"})
    one = _miniature(measured)
    old = one.state_file.read_text()
    assert one._load_state()["results"] == []
    one.state_file.with_suffix(".old.json").rename(one.state_file)
    assert one.state_file.read_text() == old


def test_weights_beyond_the_limit_of_a_shard_take_several(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 8_000)
    config = {**plan.T5_V1_1_XXL, **MINIATURE.t5}
    shapes = checkpoints.shapes_of("text_encoder", config)
    checkpoints._write_weights(tmp_path / "t5", "model", shapes, config, 0)
    places = json.loads((tmp_path / "t5" / "model.safetensors.index.json").read_text())
    assert set(places["weight_map"]) == set(shapes)
    files = sorted(tmp_path.glob("t5/*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    checkpoints._write_json(tmp_path / "t5" / "config.json", config)
    encoder = helper._load_part(tmp_path / "t5", helper.T5EncoderModel)
    assert torch.equal(encoder.encoder.embed_tokens.weight, encoder.shared.weight)
    embedding = encoder.shared.weight.float()
    assert embedding.std().item() == pytest.approx(32**-0.5, rel=0.05)


def test_published_sizes_are_met():
    count = plan.parameters(plan.T5_XXL, plan.FULL)["text_encoder"]
    assert count == pytest.approx(4.76e9, rel=0.005)
    for checkpoint in (plan.XL_512, plan.XL_1024):
        count = plan.parameters(checkpoint, plan.FULL)
        assert count["transformer"] == pytest.approx(0.611e9, rel=0.01)
        assert count["vae"] == pytest.approx(83.7e6, rel=0.005)


def test_every_engine_of_every_case_has_an_estimate():
    for scale in (plan.FULL, plan.QUICK):
        for name, engines in plan.select(scale=plan.FULL).items():
            for engine in engines:
                case = plan.CASES[name]
                assert plan.expected_measure_s(case, engine, scale) > 0
                assert plan.memory_gb(case, engine, scale) > 0.5
    needs = plan.memory_gb(plan.CASES["image_512_4step"], "torch-fp32", plan.FULL)
    assert 19 < needs < 23  # T5-XXL in float32, and little else


def test_names_pick_cases_and_engines():
    chosen = plan.select("convert_dit, dit_step_512", "ov-int8 ov-fp16", scale=plan.FULL)
    assert chosen == {"dit_step_512": ["ov-fp16", "ov-int8"], "convert_dit": ["ov-fp16"]}


@pytest.mark.parametrize(
    "variables, named",
    [
        ({"BENCH_CASES": "dit_step_511"}, "BENCH_CASES='dit_step_511'"),
        ({"BENCH_ENGINES": "ov-int2"}, "BENCH_ENGINES='ov-int2'"),
        ({"BENCH_CASES": "vae_decode_512", "BENCH_ENGINES": "seed-recipe"}, "seed-recipe"),
    ],
)
def test_unknown_names_are_refused_in_one_line(variables, named, capsys):
    assert bench.main(variables) == 2
    complaint = capsys.readouterr().err
    assert named in complaint and complaint.count("\n") == 1


def test_too_little_disk_is_said_before_anything_is_built(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: usage)
    one = bench.Bench(tmp_path / "full", tmp_path / "bench.json", plan.FULL, quiet=True)
    with pytest.raises(OSError, match=r"\d+ GB of disk are needed .* 1 GB are free"):
        one.run({"t5_encode_120": ["ov-fp16"]})
    assert [path.name for path in tmp_path.rglob("*")] == ["full"]


def test_what_does_not_fit_into_memory_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_free_gb", lambda: 0.1)
    content = _miniature(tmp_path).run({CASE: ["torch-bf16"]})
    assert content["results"] == []
    assert "GB of memory are needed, 0.1 GB are free" in content["skipped"][0]["reason"]


def test_engines_run_in_groups_that_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_free_gb", lambda: 10.0)
    monkeypatch.setattr(plan, "memory_gb", lambda case, engine, scale: 3.0)
    one, case = _miniature(tmp_path), plan.CASES[CASE]
    assert one._groups(case, list("abcde")) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_process_that_fails_or_dies_says_so_in_one_line():
    with worker() as one:
        assert one.call(pow, 2, 5) == 32
        with pytest.raises(WorkerError, match="ZeroDivisionError"):
            one.call(divmod, 1, 0)
        assert one.call(pow, 2, 5) == 32
    with pytest.raises(WorkerError, match=r"exit code 3\), perhaps for want of memory"):
        call_in_process(os._exit, 3)


# ---- the report, on known numbers ---------------------------------------------------------------


def _result(case: str, engine: str, seconds: float) -> dict:
    return {"case": case, "engine": engine, "seconds": seconds, "peak_rss_gb": 2.0, "runs": 5}


@pytest.fixture
def known(tmp_path) -> Path:
    results = [
        _result("dit_step_512", "torch-fp32", 8.0),
        _result("dit_step_512", "ov-fp16", 2.0),
        _result("dit_step_512", "ov-int8", 1.0),
        _result("convert_dit", "seed-recipe", 100.0),
        _result("convert_dit", "ov-fp16", 15.0),
    ]
    layers = [{"name": "FullyConnected", "layers": 28, "seconds": 0.8, "share": 0.8}]
    content = {
        "machine": {"processor": "X", "cores": 2, "memory_gb": 24.0, "instructions": ["avx2"]},
        "versions": {},
        "scale": "full",
        "results": results,
        "ratios": report.ratios(results),
        "profile": {"case": "dit_step_512", "engine": "ov-int8", "by_type": layers},
    }
    file = tmp_path / "known.json"
    file.write_text(json.dumps(content))
    return file


def test_ratios_hold_openvino_against_every_baseline(known):
    assert report.load(known).data["ratios"] == {
        "ov-fp16/torch-fp32@dit_step_512": 0.25,
        "ov-int8/torch-fp32@dit_step_512": 0.125,
        "ov-int8/ov-fp16@dit_step_512": 0.5,
        "ov-fp16/seed-recipe@convert_dit": 0.15,
    }


def test_targets_are_met_or_missed_by_a_percentage(known):
    met, missed = report.load(known).targets()
    assert met == "ov-int8/ov-fp16@dit_step_512: 0.500, target ≤ 0.60: met"
    assert missed == "ov-fp16/seed-recipe@convert_dit: 0.150, target ≤ 0.10: missed by 50.0 %"


def test_plots_show_every_engine_with_its_number(known):
    one = report.load(known)
    figure = one.plot()
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_xlabel() for ax in panels] == ["s", "s"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["torch-fp32", "ov-fp16", "ov-int8"]
    assert [text.get_text() for text in panels[0].texts] == ["8", "2", "1"]
    assert [bar.get_width() for bar in panels[0].patches] == [8.0, 2.0, 1.0]
    assert [bar.get_width() for bar in one.plot_profile().axes[0].patches] == [80.0]
    assert len(one.plot(cases=["convert_dit"]).axes) == 1


def test_plots_refuse_what_was_not_measured(known):
    with pytest.raises(ValueError, match="cases='t5_encode_120' was not measured"):
        report.load(known).plot(cases=["t5_encode_120"])
    with pytest.raises(ValueError, match="quantity='joules' is unknown"):
        report.load(known).plot("joules")


def test_a_missing_or_foreign_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `make bench` first"):
        report.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is no report of `make bench`"):
        report.load(tmp_path / "other.json")


def test_the_command_line_draws_pictures_beside_the_report(known):
    root = Path(helper.__file__).parent
    command = [sys.executable, "-m", "assets.bench.report", str(known)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    pictures = [known.with_name(f"known{suffix}.png") for suffix in ("", "-memory", "-profile")]
    assert done.stdout.split() == [str(picture) for picture in pictures]
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)
