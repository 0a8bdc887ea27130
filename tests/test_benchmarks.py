"""The benchmarks: the whole way on a miniature, and their arithmetic on known numbers."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors import safe_open
from transformers import T5EncoderModel

from benchmarks import cases as plan
from benchmarks import checkpoints, docs, limits, memory, notebook, report, speed
from benchmarks.__main__ import main
from benchmarks.layers import profile_step
from benchmarks.settings import Setting, measure
from ov_pixart.checkpoint import load_component, stored_weights
from ov_pixart.convert import convert_pipeline
from ov_pixart.storage import write_json
from ov_pixart.workers import Workers, call_in_process

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
)
CASE, ENGINES = "dit_step_512", ["torch-bf16", "ov-fp16"]


def _miniature(folder: Path) -> speed.SpeedBench:
    return speed.SpeedBench(folder / "miniature", folder / "bench.json", MINIATURE, progress=False)


# ---- speed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder in which the benchmark has run, from random weights to the report."""
    folder = tmp_path_factory.mktemp("bench")
    _miniature(folder).run({CASE: ENGINES})
    return folder


@pytest.mark.slow
def test_the_report_holds_the_chosen_cases_and_engines(measured):
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


@pytest.mark.slow
def test_the_checkpoint_is_laid_out_as_published(measured):
    folder = measured / "miniature" / "checkpoints" / plan.XL_512
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "Transformer2DModel"]
    assert [file.name for file in (folder / "tokenizer").iterdir()] == ["spiece.model"]
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, framework="pt") as tensors:
        assert "caption_projection.y_embedding" in tensors.keys()  # noqa: SIM118
    stored = stored_weights(folder / "transformer")
    assert (stored.variant, stored.files, stored.dtype) == (None, [weights], torch.bfloat16)


def _folder(measured: Path) -> Path:
    return checkpoints.openvino_folder(measured / "miniature", plan.XL_512, "ov-fp16")


@pytest.mark.slow
def test_settings_take_turns_with_the_defaults(measured):
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


@pytest.mark.slow
def test_a_setting_that_does_not_work_is_named_and_left_out(measured, capsys):
    settings = (Setting(CASE, "default"), Setting(CASE, "nonsense", {"NO_SUCH_PROPERTY": 1}))
    lines = measure(settings, _folder(measured), "ov-fp16", MINIATURE, turns=1)
    assert [line["setting"] for line in lines] == ["default"]
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.slow
def test_the_profile_has_the_share_of_layers_that_depend_on_the_prompt_alone(measured):
    arguments = (plan.CASES[CASE], "ov-fp16", _folder(measured), MINIATURE)
    profile = call_in_process(profile_step, *arguments)
    assert 0 < profile["text_side"]["share"] < 1
    assert sum(one["share"] for one in profile["by_type"]) == pytest.approx(1)
    assert profile["text_side"]["seconds"] < profile["seconds"]


@pytest.mark.slow
def test_the_irs_are_those_that_convert_pipeline_writes(measured):
    folder = measured / "miniature" / "openvino" / plan.XL_512 / "ov-fp16"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("openvino_model.*")}
    checkpoint = measured / "miniature" / "checkpoints" / plan.XL_512
    convert_pipeline(checkpoint, folder)
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("openvino_model.*")}


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(measured, monkeypatch):
    monkeypatch.setattr(speed, "Workers", None)  # no process can be started
    monkeypatch.setattr(speed, "call_in_process", None)
    before = json.loads((measured / "bench.json").read_text())["results"]
    assert _miniature(measured).run({CASE: ENGINES})["results"] == before


@pytest.mark.slow
def test_results_of_another_machine_are_kept_apart(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "describe_machine", lambda: {"processor": "another"})
    one = _miniature(tmp_path)
    old = (measured / "miniature" / "results.json").read_text()
    one.root.mkdir()
    one.state_file.write_text(old)
    assert one.run({})["results"] == []
    assert one.state_file.with_suffix(".old.json").read_text() == old


@pytest.mark.slow
def test_whole_images_are_timed_with_torch_and_openvino(tmp_path):
    engines = ["torch-bf16", "ov-fp16"]
    content = _miniature(tmp_path).run({"image_512_4step": engines})
    assert content["skipped"] == []
    assert [one["engine"] for one in content["results"]] == engines


@pytest.mark.slow
def test_variants_run_in_the_process_of_their_engine(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(Workers, "call", _noting(used, Workers.call))
    engines = ["ov-int8-16step-cfg35", "ov-int8-static-small-decoder"]
    content = _miniature(tmp_path).run({"image_512_20step_cfg": ["ov-int8", *engines]})
    assert content["skipped"] == []
    assert [one["engine"] for one in content["results"]] == ["ov-int8", *engines]
    assert {name for name, task in used if task == "run"} == {"ov-int8"}
    assert f"{engines[0]}/ov-int8@image_512_20step_cfg" in content["ratios"]


def _noting(used: list, call):
    def noted(self, worker, function, *arguments):
        used.append((worker, function))
        return call(self, worker, function, *arguments)

    return noted


@pytest.mark.slow
def test_conversion_is_compared_with_the_published_recipe(tmp_path):
    content = _miniature(tmp_path).run({"convert_dit": ["published-recipe", "ov-int8-weights"]})
    assert list(content["ratios"]) == ["ov-int8-weights/published-recipe@convert_dit"]


def test_weights_beyond_the_limit_of_a_shard_take_several(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 8_000)
    config = {**plan.T5_V1_1_XXL, **MINIATURE.t5}
    shapes = checkpoints.shapes_of("text_encoder", config)
    checkpoints.write_weights(tmp_path / "t5", "model", shapes, config, 0)
    places = json.loads((tmp_path / "t5" / "model.safetensors.index.json").read_text())
    assert set(places["weight_map"]) == set(shapes)
    files = sorted(tmp_path.glob("t5/*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    write_json(config, tmp_path / "t5" / "config.json")
    encoder = load_component(tmp_path / "t5", T5EncoderModel)
    assert torch.equal(encoder.encoder.embed_tokens.weight, encoder.shared.weight)
    embedding = encoder.shared.weight.float()
    assert embedding.std().item() == pytest.approx(32**-0.5, rel=0.05)


def _parameters(checkpoint: str) -> dict[str, int]:
    return {
        part: sum(shape.numel() for shape in checkpoints.shapes_of(part, config).values())
        for part, config in plan.FULL.configs(checkpoint).items()
    }


@pytest.mark.slow
def test_published_sizes_are_met():
    assert _parameters(plan.T5_XXL)["text_encoder"] == pytest.approx(4.76e9, rel=0.005)
    for checkpoint in (plan.XL_512, plan.XL_1024):
        count = _parameters(checkpoint)
        assert count["transformer"] == pytest.approx(0.611e9, rel=0.01)
        assert count["vae"] == pytest.approx(83.7e6, rel=0.005)


def test_names_pick_cases_and_engines():
    chosen = plan.select("convert_dit, dit_step_512", "ov-int8 ov-fp16", scale=plan.FULL)
    assert chosen == {"dit_step_512": ["ov-fp16", "ov-int8"], "convert_dit": ["ov-fp16"]}
    few_steps = plan.select("image_512_4step", scale=plan.FULL)["image_512_4step"]
    assert "ov-int8-static" in few_steps and "ov-int8-cfg35" not in few_steps


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["speed", "--cases", "dit_step_511"], "--cases 'dit_step_511'"),
        (["speed", "--engines", "ov-int2"], "--engines 'ov-int2'"),
        (["speed", "--cases", "vae_decode_512", "--engines", "published-recipe"], "convert_"),
        (["memory", "--tasks", "T6"], "--tasks 'T6'"),
    ],
)
def test_unknown_names_are_refused_in_one_line(arguments, named, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1


@pytest.mark.slow
def test_an_engine_without_enough_memory_is_skipped_with_the_reason(measured, monkeypatch):
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000, "total": 1000})
    )
    from benchmarks.engines import Runner

    folder = checkpoints.checkpoint_folder(measured / "miniature", plan.XL_512)
    with pytest.raises(MemoryError, match=r"transformer takes .* GB are free"):
        Runner(plan.CASES[CASE], "torch-fp32", folder, MINIATURE)


@pytest.mark.slow
def test_parts_whose_process_dies_are_skipped_with_the_reason(tmp_path, monkeypatch):
    one = _miniature(tmp_path)
    monkeypatch.setattr(speed.checkpoints, "build_checkpoint", _die)
    content = one.run({CASE: ["torch-bf16", "ov-fp16"]})
    assert content["results"] == []
    assert {line["engine"] for line in content["skipped"]} == {"torch-bf16", "ov-fp16"}
    assert all("process died" in line["reason"] for line in content["skipped"])


def _die(*arguments) -> None:
    os._exit(3)


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [0.3, 1.0, 4.2, 5.5, 7.9])
def test_bisection_finds_the_smallest_limit_on_the_grid(needed):
    tried = []

    def runs_within(limit: float) -> bool:
        tried.append(limit)
        return limit >= needed

    limit, failed = memory.find_limit(runs_within, 4.0, 6.0)
    if needed < 4:  # nothing below the lower bound is tried
        assert (limit, failed) == (4.0, None)
    else:
        assert limit - 0.5 < needed <= limit and failed == limit - 0.5
    assert len(tried) == len(set(tried)) <= 6


def test_bisection_gives_up_far_above_the_upper_bound():
    with pytest.raises(MemoryError, match=r"fails within 8\.0 GB"):
        memory.find_limit(lambda limit: False, 1.0, 2.0)


TASK = memory.MemoryTask("a fake", "convert", {}, 1.0, 4.0, announced_gb=2.0)


def _fake_probe(needed: float):
    def run_probe(task, controller, limit, timeout):
        return memory.Probe({"total": 2.0}, peak_gb=9.0) if limit >= needed else None

    return run_probe


def test_a_memory_figure_is_a_limit_that_was_run_within(monkeypatch):
    monkeypatch.setattr(memory, "run_probe", _fake_probe(2.3))
    line = memory.measure(TASK, limits.Controller(Path(), "", ()))
    assert line == {
        "case": "a fake",
        "announced_gb": 2.0,
        "limit_gb": 2.5,
        "failed_gb": 2.0,
        "peak_gb": 9.0,
        "seconds": {"total": 2.0},
    }
    assert "runs within 2.5 GB" in memory.text(line)


def test_without_an_enforced_limit_the_peak_is_printed_and_never_written(monkeypatch):
    monkeypatch.setattr(memory, "run_probe", _fake_probe(0))
    line = memory.measure(TASK, None)
    assert "limit_gb" not in line
    assert "peak 9.00 GB, no limit enforced" in memory.text(line)
    with pytest.raises(ValueError, match="no limit was enforced"):
        docs.keep_memory({"enforced": False, "results": [line]})


def test_found_limits_are_not_measured_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "BUILD", tmp_path)
    monkeypatch.setattr(memory, "prepare", lambda root, name: TASK)
    monkeypatch.setattr(memory, "find_controller", lambda: None)
    monkeypatch.setattr(memory, "run_probe", _fake_probe(0))
    memory.run(["a fake"])
    assert "No memory limit can be enforced here" in capsys.readouterr().out
    monkeypatch.setattr(memory, "run_probe", None)
    assert [line["case"] for line in memory.run(["a fake"])["results"]] == ["a fake"]


def _kernel(folder: Path, cgroup: str, mounts: str) -> Path:
    (folder / "cgroup").write_text(cgroup)
    (folder / "mountinfo").write_text(mounts)
    return folder


def test_both_versions_of_control_groups_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(limits.Controller, "works", lambda self: True)
    first = _kernel(
        tmp_path,
        "9:name=systemd:/\n4:cpu,memory:/jobs/a\n0::/\n",
        "31 23 0:27 /jobs /groups/memory rw - cgroup cgroup rw,cpu,memory\n"
        "32 23 0:28 / /groups/unified rw - cgroup2 cgroup2 rw\n",
    )
    one = limits.find_controller(first)
    assert (one.parent, one.limit) == (Path("/groups/memory/a"), "memory.limit_in_bytes")
    second = _kernel(tmp_path, "0::/user/shell\n", "31 23 0:27 / /groups rw - cgroup2 c rw\n")
    one = limits.find_controller(second)
    assert (one.parent, one.limit) == (Path("/groups/user/shell"), "memory.max")
    monkeypatch.setattr(limits.Controller, "works", lambda self: self.parent.name == "user")
    assert limits.find_controller(second).parent == Path("/groups/user")


def test_without_control_groups_there_is_no_controller(tmp_path):
    assert limits.find_controller(tmp_path) is None
    proc = _kernel(tmp_path, "0::/\n", f"31 23 0:27 / {tmp_path} rw - cgroup2 c rw\n")
    assert limits.find_controller(proc) is None  # an ordinary folder


def test_a_group_ends_what_exceeds_its_limit():
    controller = limits.find_controller()
    if controller is None:
        pytest.skip("no memory limit can be enforced here")
    with controller.group(200_000_000) as group:
        fits = limits.run_in_group([sys.executable, "-c", "bytearray(100_000_000)"], group)
        exceeds = limits.run_in_group([sys.executable, "-c", "bytearray(300_000_000)"], group)
    assert fits.returncode == 0 and exceeds.returncode < 0
    assert not group.exists()


@pytest.mark.slow
def test_a_probe_converts_within_a_limit_and_reports_its_figures(checkpoint, tmp_path):
    arguments = {"folder": str(checkpoint("alpha")), "component": "transformer"}
    arguments |= {"weight_format": "int8", "output": str(tmp_path / "out")}
    task = memory.MemoryTask("tiny", "convert", arguments, 1.0, 2.0, [checkpoint("alpha")])
    controller = limits.find_controller()
    probe = memory.run_probe(task, controller, 3.0, 300)
    assert probe.seconds["total"] > 0 and 0.1 < probe.peak_gb < 3
    if controller:
        assert memory.run_probe(task, controller, 0.1, 300) is None
    wrong = memory.MemoryTask("wrong", "convert", arguments | {"weight_format": "int2"}, 1.0, 2.0)
    with pytest.raises(RuntimeError, match="weight_format='int2' is unknown"):
        memory.run_probe(wrong, controller, 3.0, 300)


# ---- documentation ------------------------------------------------------------------------------


def test_the_tables_of_the_documentation_are_those_of_the_reports():
    page = docs.PAGE.read_text(encoding="utf-8")
    for name, table in docs.TABLES.items():
        page_with_table = docs.replace_section(page, name, table())
        assert page_with_table == page, f"run python -m benchmarks docs ({name})"


def test_a_page_without_markers_is_refused():
    assert docs.replace_section("<!-- a -->\nold\n<!-- /a -->", "a", "new \\1") == (
        "<!-- a -->\nnew \\1\n<!-- /a -->"
    )
    with pytest.raises(ValueError, match="has 0 sections"):
        docs.replace_section("nothing", "a", "new")


# ---- the notebook elsewhere ---------------------------------------------------------------------


def test_the_notebook_imports_nothing_of_ours_that_is_not_copied_with_it():
    cells = nbformat.read(notebook.ROOT / notebook.NOTEBOOK, as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    here = {path.stem for path in notebook.ROOT.iterdir()}
    assert imported & here <= {Path(name).stem for name in notebook.NEEDED}


def test_copying_the_notebook_starts_neither_torch_nor_openvino(tmp_path, monkeypatch):
    code = (
        "import sys; from benchmarks.__main__ import main; main(['notebook', '--copy-to', "
        f"{str(tmp_path / 'copy')!r}]); assert not {{'torch', 'openvino'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=notebook.ROOT, check=True)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(notebook.NEEDED)


# ---- the report, on known numbers ---------------------------------------------------------------


def _result(case: str, engine: str, seconds: float) -> dict:
    return {"case": case, "engine": engine, "seconds": seconds, "peak_rss_gb": 2.0, "runs": 5}


@pytest.fixture
def known(tmp_path) -> Path:
    results = [
        _result("dit_step_512", "torch-fp32", 8.0),
        _result("dit_step_512", "ov-fp16", 2.0),
        _result("dit_step_512", "ov-int8", 1.0),
        _result("convert_dit", "published-recipe", 100.0),
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


def test_ratios_compare_openvino_with_every_baseline(known):
    assert report.load(known).data["ratios"] == {
        "ov-fp16/torch-fp32@dit_step_512": 0.25,
        "ov-int8/torch-fp32@dit_step_512": 0.125,
        "ov-int8/ov-fp16@dit_step_512": 0.5,
        "ov-fp16/published-recipe@convert_dit": 0.15,
    }


def test_targets_are_met_or_missed_by_a_percentage(known):
    met, missed = report.load(known).targets()
    assert met == "ov-int8/ov-fp16@dit_step_512: 0.500, target ≤ 0.60: met"
    assert missed == "ov-fp16/published-recipe@convert_dit: 0.150, target ≤ 0.10: missed by 50.0 %"


def test_plots_show_every_engine_with_its_number(known):
    one = report.load(known)
    figure = one.plot()
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_xlabel() for ax in panels] == ["seconds", "seconds"]
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


def test_plots_are_written_beside_the_report(known):
    images = [known.with_name(f"known{suffix}.png") for suffix in ("", "-memory", "-profile")]
    assert report.save_plots(known) == images
    assert all(image.read_bytes()[:4] == b"\x89PNG" for image in images)


def test_reports_of_earlier_versions_are_read_with_the_present_names(known):
    known.write_text(known.read_text().replace("published-recipe", "seed-recipe"))
    one = report.load(known)
    assert ("convert_dit", "published-recipe") in one.to_dataframe().index
    assert "ov-fp16/published-recipe@convert_dit" in one.data["ratios"]
