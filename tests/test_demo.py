"""The demo without a browser: what is refused, how painting behaves, what programs can call.

A stand-in pipeline keeps this fast; one test goes through a converted PixArt.
"""

from __future__ import annotations

import gc
import json
import re
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from gradio_client import Client
from nbclient import NotebookClient
from PIL import Image

import gradio_helper as gh
from tests.demo_support import FakePipeline, fake_folder
from tests.tiny_models import build_checkpoint

HEART = "a large red heart on a white background"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gh, "_load_pipeline", FakePipeline)
    monkeypatch.setattr(FakePipeline, "step_seconds", 0.0)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {label: fake_folder(tmp_path / label) for label in ("FP16", "INT8")}


@pytest.fixture
def studio(folders: dict[str, Path]) -> Iterator[gh.Studio]:
    studio = gh.Studio(folders)
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One server for the tests that only call it."""
    root = tmp_path_factory.mktemp("served")
    demo = gh.make_demo({label: fake_folder(root / label) for label in ("FP16", "INT8")})
    demo.launch(prevent_thread_lock=True, quiet=True)
    yield Client(demo.local_url, verbose=False)
    demo.close()


def paint(studio: gh.Studio, **settings: object) -> list:
    return list(studio.paint(gh.Settings(**{"prompt": HEART, "precision": "FP16"} | settings)))


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ""),
        ("prompt", " \n\t"),
        ("prompt", None),
        ("prompt", "x" * 20_001),
        ("negative_prompt", "x" * 20_001),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 10**40),
        ("seed", 1.5),
        ("seed", None),
        ("steps", 0),
        ("steps", 1_000),
        ("steps", True),
        ("steps", "20"),
        ("guidance", -1),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("pictures", 0),
        ("pictures", 100),
        ("style", "Baroque"),
        ("aspect_ratio", "5:17"),
        ("precision", "INT2"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(studio, name, value):
    settings = replace(gh.Settings(HEART, precision="FP16"), **{name: value})
    assert list(gh.problems(settings, studio.facts)) == [name]


@pytest.mark.parametrize(
    "prompt",
    [HEART, "🦊🌵", "לב אדום גדול", "<img src=x onerror=alert(1)>", "{{x}} ${y}", "x" * 10_000],
)
def test_every_kind_of_text_is_accepted(studio, prompt):
    assert gh.problems(gh.Settings(prompt, precision="FP16"), studio.facts) == {}
    assert isinstance(paint(studio, prompt=prompt, steps=2)[-1], gh.Painted)


def test_defaults_are_the_models_own(tmp_path):
    usual = gh.read_model_facts(fake_folder(tmp_path / "usual"))
    distilled = gh.read_model_facts(fake_folder(tmp_path / "lcm", few_step=True))
    assert (usual.steps, usual.guidance) == (20, 4.5)
    assert (distilled.steps, distilled.guidance) == (4, 0.0)
    assert "no effect" in gh._guidance_looks(distilled)["info"]
    assert not gh._guidance_looks(distilled)["interactive"]
    assert not gh._negative_looks(distilled.guidance)["interactive"]
    assert gh._negative_looks(usual.guidance)["interactive"]


@pytest.mark.parametrize(("sample_size", "native"), [(32, 256), (64, 512), (128, 1024)])
def test_aspect_ratios_by_name_become_sizes_the_model_knows(sample_size, native):
    sizes = gh.picture_sizes(sample_size, (native, native))
    assert sizes["1:1"] == (native, native)
    for name, ratio in gh.ASPECT_RATIOS.items():
        height, width = sizes[name]
        assert height % 16 == width % 16 == 0
        assert width / height == pytest.approx(ratio, rel=0.07)


def test_a_model_without_bins_paints_its_native_square():
    assert gh.picture_sizes(20, (160, 160)) == {"1:1": (160, 160)}


def test_styles_of_the_scene_model_are_backdrops_unless_the_prompt_names_one(studio):
    model = studio.facts["FP16"]
    plain = gh.Settings("a red heart", style="On navy")
    assert gh.styled_prompt(plain, model) == "a red heart on a navy background"
    assert gh.styled_prompt(replace(plain, prompt=HEART), model) == HEART


def test_models_of_the_world_get_examples_and_styles_of_their_own(tmp_path):
    model = gh.read_model_facts(fake_folder(tmp_path / "xl", vocabulary=32_128))
    assert not model.knows_scenes
    assert model.examples is gh.EXAMPLES
    assert "watercolour" in gh.styled_prompt(gh.Settings("a fox", style="Watercolour"), model)


def test_make_demo_says_what_is_missing(tmp_path, folders):
    with pytest.raises(ValueError, match="pipelines"):
        gh.make_demo({})
    with pytest.raises(ValueError, match="INT4"):
        gh.make_demo(folders, default="INT4")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gh.make_demo({"FP16": tmp_path / "nowhere"})


# -- painting ----------------------------------------------------------------------------------


def test_every_step_shows_a_preview_before_the_picture(studio):
    note, *previews, painted = paint(studio, steps=7, pictures=2, aspect_ratio="16:9")
    assert isinstance(note, gh.Note)
    assert [(p.step, p.steps, len(p.images)) for p in previews] == [(i, 7, 2) for i in range(1, 8)]
    assert previews[-1].seconds_left == 0
    assert [image.size for image in painted.images] == [(336, 192)] * 2


def test_preview_shows_the_colours_of_the_picture(studio):
    *_, preview, painted = paint(studio, steps=3)
    assert isinstance(preview, gh.Preview)
    seen = np.asarray(preview.images[0].resize(painted.images[0].size), dtype=float)
    assert np.abs(seen - np.asarray(painted.images[0], dtype=float)).mean() < 8


def decode(latents: torch.Tensor) -> torch.Tensor:
    return FakePipeline.decode(latents)[0]


def test_preview_of_a_linear_vae_is_exact():
    latents = torch.randn(1, 4, 8, 8) / 4
    picture = decode(latents)[0, :, ::8, ::8].permute(1, 2, 0)
    expected = ((picture / 2 + 0.5).clamp(0, 1) * 255).numpy()
    preview = gh.LatentPreview(decode)(latents, decode, step_seconds=0.0)[0]
    assert np.abs(np.asarray(preview, dtype=float) - expected).max() <= 1


def test_a_cheap_vae_decodes_previews_itself():
    preview, latents = gh.LatentPreview(decode), torch.randn(2, 4, 8, 16)
    assert [p.size for p in preview(latents, decode, step_seconds=60.0)] == [(64, 32)] * 2
    assert [p.size for p in preview(latents, decode, step_seconds=0.0)] == [(16, 8)] * 2


def test_stop_ends_within_one_step(studio, monkeypatch):
    monkeypatch.setattr(FakePipeline, "step_seconds", 0.1)
    stop, seen = threading.Event(), []
    for update in studio.paint(gh.Settings(HEART, steps=50, precision="FP16"), stop):
        seen.append(update)
        if isinstance(update, gh.Preview) and update.step == 3:
            stop.set()
            stopped_at = time.perf_counter()
    assert time.perf_counter() - stopped_at < 1.0
    assert isinstance(seen[-1], gh.Preview) and seen[-1].step <= 4


def test_closing_the_iterator_stops_the_run(studio, monkeypatch):
    monkeypatch.setattr(FakePipeline, "step_seconds", 0.05)
    before = threading.active_count()
    run = studio.paint(gh.Settings(HEART, steps=100, precision="FP16"))
    for _ in range(3):
        next(run)
    run.close()
    assert threading.active_count() == before


def test_the_same_seed_paints_the_same_picture_alone_or_among_others(studio):
    alone = paint(studio, seed=8, steps=3)[-1].images[0]
    second_of_two = paint(studio, seed=7, steps=3, pictures=2)[-1].images[1]
    other = paint(studio, seed=9, steps=3)[-1].images[0]
    assert np.array_equal(alone, second_of_two)
    assert not np.array_equal(alone, other)


def test_long_prompts_are_cut_at_a_word_and_the_reader_is_told(studio):
    long = "word " * 200
    note = paint(studio, prompt=long, steps=2)[0]
    assert "120 tokens" in note.notes[0] and "word word" in note.notes[0]
    kept, _ = gh._fit_prompt(FakePipeline(Path()), long, studio.facts["FP16"])
    assert kept == " ".join(["word"] * 119)


def test_words_the_model_does_not_have_are_named(studio):
    assert "שלום" in paint(studio, prompt="red שלום heart", steps=2)[0].notes[0]


def test_a_failing_run_does_not_harm_the_next(studio):
    with pytest.raises(RuntimeError, match="on fire"):
        paint(studio, prompt=FakePipeline.fail_on)
    assert isinstance(paint(studio)[-1], gh.Painted)


def test_pipelines_are_loaded_when_needed_and_only_two_stay(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(gh, "_load_pipeline", lambda f: loaded.append(f.name) or FakePipeline(f))
    studio = gh.Studio({label: fake_folder(tmp_path / label) for label in "abc"})
    assert loaded == []
    for label in "abaca":
        paint(studio, precision=label, steps=2)
    assert loaded == ["a", "b", "c"]
    assert list(studio._pipelines) == ["c", "a"]
    monkeypatch.setattr(
        studio, "facts", {k: replace(f, size_mb=3_000) for k, f in studio.facts.items()}
    )
    paint(studio, precision="b", steps=2)
    assert list(studio._pipelines) == ["b"]
    studio.close()


def test_the_png_carries_its_settings(studio):
    settings = gh.Settings("ein Herz 🦊 <b>", "blur", gh.NO_STYLE, 3, 5, 2.0, 1, "4:3", "FP16")
    path = gh.save_picture(Image.new("RGB", (8, 8)), studio.output, settings)
    assert gh.read_settings(path) == settings
    Image.new("RGB", (8, 8)).save(studio.output / "plain.png")
    with pytest.raises(ValueError, match=r"plain\.png"):
        gh.read_settings(studio.output / "plain.png")


def test_html_in_a_prompt_is_shown_as_text(studio):
    nasty = '"><script>alert(1)</script>'
    entry = {"settings": {"prompt": nasty}, "line": nasty, "thumbnail": "", "path": "x"}
    for markup in (
        gh.stage(["x"], nasty, headline=nasty),
        gh.history_strip([entry]),
        gh._note([nasty]),
    ):
        assert "<script" not in markup and "&lt;script" in markup


# -- programs ----------------------------------------------------------------------------------


def test_generate_is_the_only_endpoint_and_documented(client):
    api = client.view_api(return_format="dict", print_info=False)
    assert list(api["named_endpoints"]) == ["/generate"] and not api["unnamed_endpoints"]
    parameters = api["named_endpoints"]["/generate"]["parameters"]
    assert [p["parameter_name"] for p in parameters] == list(gh.FIELDS)
    assert [p["parameter_name"] for p in parameters if not p["parameter_has_default"]] == ["prompt"]


def test_generate_returns_png_files_that_carry_their_settings(client):
    pictures, details = client.predict(HEART, seed=5, pictures=2, api_name="/generate")
    assert [gh.read_settings(p).seed for p in pictures] == [5, 6]
    assert all(Image.open(p).format == "PNG" for p in pictures)
    assert (details["steps"], details["guidance"], details["precision"]) == (20, 4.5, "FP16")
    again, _ = client.predict(HEART, seed=6, api_name="/generate")
    assert np.array_equal(Image.open(again[0]), Image.open(pictures[1]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", " "),
        ("seed", -1),
        ("seed", 10**20),
        ("steps", 0),
        ("steps", 1_000),
        ("guidance", -3),
        ("pictures", 9),
        ("aspect_ratio", "5:17"),
        ("precision", "INT2"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(client, name, value):
    with pytest.raises(Exception, match=name):
        client.predict(**{"prompt": HEART, name: value}, api_name="/generate")


def test_100_queued_requests_are_answered_and_failures_harm_nobody(client, monkeypatch):
    running, most = [], []

    class Watched(FakePipeline):
        def __call__(self, *args, **kwargs):
            running.append(1)
            most.append(len(running))
            try:
                return super().__call__(*args, **kwargs)
            finally:
                running.pop()

    monkeypatch.setattr(gh, "_load_pipeline", Watched)
    client.predict(HEART, precision="INT8", steps=2, api_name="/generate")  # loads `Watched`
    prompts = [FakePipeline.fail_on if i % 10 == 3 else f"heart {i}" for i in range(100)]

    def ask(prompt: str) -> str:
        try:
            pictures, _ = client.predict(prompt, precision="INT8", steps=2, api_name="/generate")
            return gh.read_settings(pictures[0]).prompt
        except Exception as error:
            return str(error)

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == prompt or (prompt == FakePipeline.fail_on and "on fire" in answer)
    assert max(most) == 1  # one generation at a time


# -- serving -----------------------------------------------------------------------------------


def is_open(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_launch_returns_at_once_and_prints_one_line_with_the_address(folders, capsys):
    demo = gh.make_demo(folders)
    gh.launch_demo(demo)
    assert is_open(demo.server_port) and demo.share_url is None
    assert capsys.readouterr().out == f"The demo is at {demo.local_url}\n"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", demo.local_url)
    demo.close()
    assert not is_open(demo.server_port)
    assert capsys.readouterr().out == ""
    demo.close()  # twice is as good as once


def test_running_the_cell_again_leaks_neither_ports_nor_pipelines(folders):
    loaded = []
    for _ in range(3):
        demo = gh.make_demo(folders)
        gh.launch_demo(demo)
        paint(demo.studio, steps=2)
        loaded.append((demo.server_port, demo.studio.output))
        pipeline = weakref.ref(demo.studio._pipelines["FP16"])
    assert len({port for port, _ in loaded}) == 1
    demo.close()
    gc.collect()
    assert pipeline() is None
    assert not any(output.exists() for _, output in loaded)


def test_a_closed_demo_can_be_launched_again(folders):
    demo = gh.make_demo(folders)
    for _ in range(2):
        gh.launch_demo(demo)
        pictures, _ = Client(demo.local_url, verbose=False).predict(
            HEART, steps=2, api_name="/generate"
        )
        assert gh.read_settings(pictures[0]).prompt == HEART
        demo.close()


def test_closing_ends_the_run_in_progress(folders, monkeypatch):
    monkeypatch.setattr(FakePipeline, "step_seconds", 0.1)
    demo = gh.make_demo(folders)
    gh.launch_demo(demo)
    run = demo.studio.paint(gh.Settings(HEART, steps=100, precision="FP16"))
    next(run), next(run)
    started = time.perf_counter()
    demo.close()
    assert time.perf_counter() - started < 8  # of the run's ten; Gradio itself may take five
    assert not any(isinstance(update, gh.Painted) for update in run)


def test_a_port_can_be_chosen(folders):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    demo = gh.make_demo(folders)
    gh.launch_demo(demo, port=port)
    assert demo.server_port == port
    demo.close()


def test_nothing_leaves_the_loopback_address(folders, monkeypatch):
    connect, outside = socket.socket.connect, []

    def watched(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
            raise OSError("no network in this test")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.delenv("CI", raising=False)
    demo = gh.make_demo(folders)
    gh.launch_demo(demo)
    Client(demo.local_url, verbose=False).predict(HEART, steps=2, api_name="/generate")
    config = demo.get_config_file()
    demo.close()
    assert outside == []
    assert not demo.analytics_enabled and not demo.share and not demo.run_history
    assert demo.server_name == "127.0.0.1"
    assert not config["stylesheets"] and "http" not in json.dumps(config.get("theme_hash", ""))


def test_the_command_converts_what_is_missing_and_serves_until_interrupted(tmp_path, monkeypatch):
    asked, served = [], []

    def convert(model: str | Path, folder: Path, *args, **options) -> Path:
        asked.append((Path(model).name, folder.relative_to(tmp_path).as_posix(), *args, *options))
        return fake_folder(folder)

    def interrupt(demo: gh.Demo) -> None:
        served.append((is_open(demo.server_port), list(demo.studio.folders)))
        raise KeyboardInterrupt

    fake_folder(tmp_path / "tiny" / "hybrid")
    (tmp_path / "here" / "tiny-lcm").mkdir(parents=True)
    monkeypatch.setattr(gh, "convert_pipeline", convert)
    monkeypatch.setattr(gh, "optimize_pipeline", convert)
    monkeypatch.setattr(gh.Demo, "block_thread", interrupt)
    gh.main(["--models", str(tmp_path), "--model", str(tmp_path / "here" / "tiny")])
    assert asked == [
        ("tiny", "tiny/fp16"),
        ("fp16", "tiny/int8-weights", "int8-weights"),
        ("tiny", "tiny/lcm", "transformer", "scheduler"),
    ]
    assert served == [(True, ["FP16", "INT8 weights", "Hybrid", "Four steps"])]


def test_in_a_notebook_the_page_is_shown_and_closed_without_noise(tmp_path):
    cells = [
        f"import sys; sys.path[:0] = {[str(Path(gh.__file__).parent)]!r}\n"
        "from pathlib import Path\n"
        "import gradio_helper as gh\n"
        "from tests.demo_support import FakePipeline, fake_folder\n"
        "gh._load_pipeline = FakePipeline\n"
        f"folder = fake_folder(Path({str(tmp_path / 'fp16')!r}))",
        "demo = gh.make_demo({'FP16': folder})\ngh.launch_demo(demo)",
        "from gradio_client import Client\n"
        "client = Client(demo.local_url, verbose=False)\n"
        "pictures, details = client.predict('a red heart', seed=7, api_name='/generate')",
        "demo.close()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    _, launch, call, close = (cell.outputs for cell in notebook.cells)
    frame, line = launch
    assert re.fullmatch(r"The demo is at http://127\.0\.0\.1:\d+/\n", line.text)
    assert re.search(r'<iframe src="http://127\.0\.0\.1:\d+/"', frame.data["text/html"])
    assert call == close == []


# -- the real thing ----------------------------------------------------------------------------


def test_a_converted_pixart_paints_what_its_pipeline_paints(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real loader
    torch_folder = build_checkpoint(tmp_path / "torch", "alpha")
    folder = gh.convert_pipeline(torch_folder, tmp_path / "fp16")
    studio = gh.Studio({"FP16": folder})
    settings = gh.Settings(
        "a small red circle", seed=3, steps=3, aspect_ratio="4:3", precision="FP16"
    )
    note, *previews, painted = studio.paint(settings)
    assert len(previews) == 3 and note.notes == []
    assert previews[0].images[0].size in ((36, 28), (144, 112))  # linear, or by the VAE
    expected = studio.pipeline("FP16")(
        settings.prompt,
        num_inference_steps=3,
        height=224,
        width=288,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert np.array_equal(painted.images[0], expected)
    studio.close()
