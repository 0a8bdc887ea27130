"""The demo without a browser: what is refused, how runs behave, what programs can call.

A stand-in pipeline keeps this fast; one test goes through a converted PixArt.
"""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import threading
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
from PIL.PngImagePlugin import PngInfo

import gradio_helper as gh
from ov_pixart.demo import looks, serve
from ov_pixart.demo import settings as asked
from ov_pixart.demo import studio as studio_module
from ov_pixart.demo.page import Demo
from ov_pixart.demo.settings import Settings, problems, read_settings
from ov_pixart.demo.studio import Finished, LatentPreview, Preview, Started, Studio
from ov_pixart_helper import image_sizes
from tests.support.fake_pipeline import PACE, FakePipeline, fake_folder
from tests.support.refused import refused

HEART = "a large red heart on a white background"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(studio_module, "load_pipeline", FakePipeline)
    yield
    PACE.go_on()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {version: fake_folder(tmp_path / version) for version in ("FP16", "INT8")}


@pytest.fixture
def studio(folders: dict[str, Path]) -> Iterator[Studio]:
    studio = Studio(folders)
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One server for the tests that only call it."""
    root = tmp_path_factory.mktemp("served")
    demo = gh.make_demo({version: fake_folder(root / version) for version in ("FP16", "INT8")})
    gh.launch_demo(demo)
    yield Client(demo.local_url, verbose=False)
    demo.close()


def generate(studio: Studio, **settings: object) -> list:
    return updates(studio, Settings(**{"prompt": HEART, "version": "FP16"} | settings))


def updates(studio: Studio, settings: Settings) -> list:
    return [update for update in studio.generate(settings) if update is not None]


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", " \n\t"),
        ("prompt", None),
        ("prompt", "x" * 20_001),
        ("negative_prompt", "x" * 20_001),
        ("seed", -1),
        ("seed", 10**40),
        ("seed", 1.5),
        ("seed", None),
        ("steps", 1),
        ("steps", 1_000),
        ("steps", True),
        ("steps", "20"),
        ("guidance", -1),
        ("guidance", float("nan")),
        ("guidance_end", 35),
        ("guidance_end", None),
        ("images", 100),
        ("style", "Baroque"),
        ("aspect_ratio", "5:17"),
        ("version", "INT2"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(studio, name, value):
    settings = replace(Settings(HEART, version="FP16"), **{name: value})
    assert list(problems(settings, studio.models)) == [name]


@pytest.mark.parametrize(
    "prompt",
    [HEART, "🦊🌵", "לב אדום גדול", "<img src=x onerror=alert(1)>", "{{x}} ${y}", "x" * 10_000],
)
def test_every_kind_of_text_is_accepted(studio, prompt):
    assert problems(Settings(prompt, version="FP16"), studio.models) == {}
    assert isinstance(generate(studio, prompt=prompt, steps=2)[-1], Finished)


def test_defaults_are_the_models_own(tmp_path):
    usual = asked.read_model_info(fake_folder(tmp_path / "usual"))
    few_step = asked.read_model_info(fake_folder(tmp_path / "lcm", few_step=True))
    assert (usual.steps, usual.guidance, usual.min_steps) == (20, 4.5, 2)
    assert (few_step.steps, few_step.guidance, few_step.min_steps) == (4, 0.0, 1)
    assert usual.sizes == image_sizes(tmp_path / "usual")


def test_styles_of_the_scene_model_are_backgrounds_unless_the_prompt_names_one(studio):
    model = studio.models["FP16"]
    plain = Settings("a red heart", style="On navy")
    assert asked.styled_prompt(plain, model) == "a red heart on a navy background"
    assert asked.styled_prompt(replace(plain, prompt=HEART), model) == HEART


def test_other_models_get_examples_and_styles_of_their_own(tmp_path):
    model = asked.read_model_info(fake_folder(tmp_path / "xl", vocabulary=32_128))
    assert model.examples is asked.EXAMPLES
    assert "watercolour" in asked.styled_prompt(Settings("a fox", style="Watercolour"), model)


def test_another_version_keeps_what_its_model_can_use(tmp_path, studio):
    models = studio.models | {
        "LCM": asked.read_model_info(fake_folder(tmp_path / "lcm", few_step=True)),
        "XL": asked.read_model_info(fake_folder(tmp_path / "xl", vocabulary=32_128)),
    }
    mine = Settings(HEART, style="On navy", steps=7, guidance=3, guidance_end=0.5, version="FP16")
    assert asked.fit(mine, "FP16", "INT8", models) == replace(mine, version="INT8")
    few = asked.fit(mine, "FP16", "LCM", models)
    assert (few.steps, few.guidance, few.guidance_end, few.style) == (4, 0, 1, "On navy")
    assert asked.fit(mine, "FP16", "XL", models).style == asked.NO_STYLE


def test_make_demo_names_what_is_missing(tmp_path, folders):
    with pytest.raises(ValueError, match="pipelines"):
        gh.make_demo({})
    with pytest.raises(ValueError, match="INT4"):
        gh.make_demo(folders, default="INT4")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gh.make_demo({"FP16": tmp_path / "nowhere"})
    for given, words in (
        (folders["FP16"], "a dictionary"),
        ([folders["FP16"]], "a dictionary"),
        ({"FP16": FakePipeline(folders["FP16"])}, "the folder of a pipeline"),
        ({"FP16": None}, "the folder of a pipeline"),
    ):
        with refused(ValueError, "pipelines", words):
            gh.make_demo(given)
    with refused(TypeError, "make_demo has no argument 'defualt' (nearest: 'default')"):
        gh.make_demo(folders, defualt="INT8")


def test_the_png_carries_its_settings(tmp_path):
    settings = Settings("ein Herz 🦊 <b>", "blur", asked.NO_STYLE, 3, 5, 2.0, 1, "4:3", "FP16", 0.5)
    path = asked.save_image(Image.new("RGB", (8, 8)), tmp_path, settings)
    assert read_settings(path) == settings


def test_a_png_from_before_the_version_was_called_so_can_be_read(tmp_path):
    info = PngInfo()
    info.add_itxt("parameters", json.dumps({"prompt": HEART, "precision": "INT8", "pictures": 2}))
    Image.new("RGB", (8, 8)).save(tmp_path / "earlier.png", pnginfo=info)
    assert read_settings(tmp_path / "earlier.png") == Settings(HEART, images=2, version="INT8")


def test_a_png_without_settings_is_refused_by_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    for name in ("plain.png", "text.png"):
        with pytest.raises(ValueError, match=name):
            read_settings(tmp_path / name)


def test_html_in_an_error_or_a_note_is_shown_as_text():
    nasty = '"><script>alert(1)</script>'
    markup = looks.status(looks.reason(ValueError(nasty)), nasty)
    assert "<script" not in markup and markup.count("&lt;script") == 2


@pytest.mark.parametrize(("guidance", "passed"), [(4.5, 0.35), (1.0, 1.0)])
def test_the_interval_reaches_the_pipeline_and_the_line_below_the_status(
    guidance, passed, studio, monkeypatch
):
    calls = []

    class Watched(FakePipeline):
        def __call__(self, *args, guidance_end, **kwargs):
            calls.append(guidance_end)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(studio_module, "load_pipeline", Watched)
    settings = Settings(HEART, guidance=guidance, guidance_end=0.35, steps=2, version="FP16")
    updates(studio, settings)
    assert calls == [passed]
    line = asked.describe(settings, studio.models["FP16"])
    assert ("guidance 4.5 in the first 35%" in line) == (guidance > 1)


def test_a_recommended_interval_is_the_pages_own(tmp_path):
    folder = fake_folder(tmp_path / "tiny")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_guidance_end": 0.35}))
    assert asked.read_model_info(folder).guidance_end == 0.35


# -- runs --------------------------------------------------------------------------------------


def test_every_step_shows_a_preview_before_the_image(studio):
    loading, started, *previews, finished = generate(studio, steps=7, images=2, aspect_ratio="16:9")
    assert loading == Started("Loading FP16") and started == Started("Encoding the prompt")
    assert [(p.step, p.steps, len(p.images)) for p in previews] == [(i, 7, 2) for i in range(1, 8)]
    assert previews[-1].seconds_left == 0
    assert [image.size for image in finished.images] == [(336, 192)] * 2


def test_preview_shows_the_colours_of_the_image(studio):
    *_, preview, finished = generate(studio, steps=3)
    seen = np.asarray(preview.images[0].resize(finished.images[0].size), dtype=float)
    assert np.abs(seen - np.asarray(finished.images[0], dtype=float)).mean() < 8


def test_preview_of_a_linear_vae_is_exact():
    vae, latents = FakePipeline(Path()).vae, torch.randn(1, 4, 8, 8) / 4
    image = vae.decode(latents)[0][0, :, ::8, ::8].permute(1, 2, 0)
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).numpy()
    preview = LatentPreview(vae)(latents, step_seconds=0.0)[0]
    assert np.abs(np.asarray(preview, dtype=float) - expected).max() <= 1


def test_a_fast_vae_decodes_previews_itself():
    preview, latents = LatentPreview(FakePipeline(Path()).vae), torch.randn(2, 4, 8, 16)
    assert [p.size for p in preview(latents, step_seconds=60.0)] == [(64, 32)] * 2
    assert [p.size for p in preview(latents, step_seconds=0.0)] == [(16, 8)] * 2


def test_closing_the_iterator_stops_the_run_within_one_step(studio):
    before = PACE.taken
    PACE.hold_after(3)
    run = studio.generate(Settings(HEART, steps=50, version="FP16"))
    assert any(isinstance(update, Preview) and update.step == 3 for update in run)
    assert next(run) is None  # a long step does not block the reader
    run.close()
    PACE.go_on()
    studio.close()  # waits for the run's thread
    assert PACE.taken - before == 4


def test_the_same_seed_gives_the_same_image_alone_or_among_others(studio):
    alone = generate(studio, seed=8, steps=3)[-1].images[0]
    second_of_two = generate(studio, seed=7, steps=3, images=2)[-1].images[1]
    other = generate(studio, seed=9, steps=3)[-1].images[0]
    assert np.array_equal(alone, second_of_two)
    assert not np.array_equal(alone, other)


def test_a_note_names_where_a_long_prompt_is_cut(studio):
    long = " ".join(f"word{i}" for i in range(200))
    (note,) = generate(studio, prompt=long, steps=2)[-1].notes
    assert "120 tokens" in note and "“word119 word120" in note


def test_words_the_model_does_not_have_are_named(studio):
    assert "שלום" in generate(studio, prompt="red שלום heart", steps=2)[-1].notes[0]


def test_a_failing_run_does_not_harm_the_next(studio):
    with pytest.raises(RuntimeError, match="on fire"):
        generate(studio, prompt=FakePipeline.fail_on)
    assert isinstance(generate(studio)[-1], Finished)


def test_pipelines_are_loaded_when_needed_and_only_two_small_ones_stay(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        studio_module, "load_pipeline", lambda f: loaded.append(f.name) or FakePipeline(f)
    )
    studio = Studio({version: fake_folder(tmp_path / version) for version in "abc"})
    assert loaded == []
    for version in "abaca":
        generate(studio, version=version, steps=2)
    assert loaded == ["a", "b", "c"]  # "b" made room for "c"
    studio.models = {v: replace(model, size_mb=3_000) for v, model in studio.models.items()}
    for version in "cbc":
        generate(studio, version=version, steps=2)
    assert loaded == ["a", "b", "c", "b", "c"]
    studio.close()
    generate(studio, version="c", steps=2)
    assert loaded == ["a", "b", "c", "b", "c", "c"]


# -- programs ----------------------------------------------------------------------------------


def test_generate_is_the_only_endpoint_and_documented(client):
    api = client.view_api(return_format="dict", print_info=False)
    assert list(api["named_endpoints"]) == ["/generate"] and not api["unnamed_endpoints"]
    parameters = api["named_endpoints"]["/generate"]["parameters"]
    assert [p["parameter_name"] for p in parameters] == list(asked.FIELDS)
    assert [p["parameter_name"] for p in parameters if not p["parameter_has_default"]] == ["prompt"]


def test_generate_returns_png_files_that_carry_their_settings(client):
    images, details = client.predict(HEART, seed=5, images=2, api_name="/generate")
    assert [read_settings(path).seed for path in images] == [5, 6]
    assert all(Image.open(path).format == "PNG" for path in images)
    assert (details["steps"], details["guidance"], details["version"]) == (20, 4.5, "FP16")
    assert details["guidance_end"] == 1
    again, _ = client.predict(HEART, seed=6, api_name="/generate")
    assert np.array_equal(Image.open(again[0]), Image.open(images[1]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt", " "), ("seed", 10**20), ("steps", 0), ("images", 9), ("version", "INT2")],
)
def test_bad_requests_are_refused_with_the_reason(client, name, value):
    with pytest.raises(Exception, match=name):
        client.predict(**{"prompt": HEART, name: value}, api_name="/generate")


@pytest.mark.slow
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

    monkeypatch.setattr(studio_module, "load_pipeline", Watched)
    client.predict(HEART, version="INT8", steps=2, api_name="/generate")  # loads `Watched`
    prompts = [FakePipeline.fail_on if i % 10 == 3 else f"heart {i}" for i in range(100)]

    def ask(prompt: str) -> str:
        try:
            images, _ = client.predict(prompt, version="INT8", steps=2, api_name="/generate")
            return read_settings(images[0]).prompt
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_launch_returns_at_once_and_prints_one_line_with_the_address(folders, capsys):
    demo = gh.make_demo(folders)
    with pytest.raises(TypeError, match=r"launch_demo has no argument 'shar' \(nearest: 'share'\)"):
        gh.launch_demo(demo, shar=True)
    gh.launch_demo(demo, port=(port := free_port()))
    assert is_open(port) and demo.share_url is None
    assert capsys.readouterr().out == f"The demo is at http://127.0.0.1:{port}/\n"
    demo.close()
    assert not is_open(port)
    demo.close()  # twice is as good as once
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("port", [None, "a fixed one"])
def test_running_the_cell_again_replaces_the_demo_and_leaks_nothing(folders, port):
    port = port and free_port()
    seen, pipelines = [], []
    for _ in range(3):
        demo = gh.make_demo(folders)
        gh.launch_demo(demo, port=port)
        generate(demo.studio, steps=2)
        seen.append((demo.server_port, demo.studio.output, threading.active_count()))
        pipelines += [weakref.ref(o) for o in gc.get_objects() if type(o) is FakePipeline]
    ports, outputs, threads = zip(*seen, strict=True)
    assert len(set(ports)) == 1 and is_open(ports[0])
    assert [output.exists() for output in outputs[:2]] == [False, False]
    assert threads[2] <= threads[1]
    demo.close()
    gc.collect()
    assert not is_open(ports[0]) and not any(pipeline() for pipeline in pipelines)


@pytest.mark.slow
def test_a_demo_on_another_port_stays(folders):
    ports = free_port(), free_port()
    first, second, other = (gh.make_demo(folders) for _ in range(3))
    gh.launch_demo(first, port=ports[0])
    gh.launch_demo(other)
    gh.launch_demo(second, port=ports[1])
    assert first.is_running and second.is_running and other.is_running
    again = gh.make_demo(folders)
    gh.launch_demo(again, port=other.server_port)  # whatever listens there makes room
    assert first.is_running and second.is_running and again.is_running and not other.is_running
    for demo in (first, second, again):
        demo.close()


@pytest.mark.slow
def test_a_closed_demo_can_be_launched_again(folders):
    demo = gh.make_demo(folders)
    for _ in range(2):
        gh.launch_demo(demo)
        client = Client(demo.local_url, verbose=False)
        images, _ = client.predict(HEART, steps=2, api_name="/generate")
        assert read_settings(images[0]).prompt == HEART
        demo.close()


def test_closing_ends_the_run_in_progress(folders):
    demo = gh.make_demo(folders)
    gh.launch_demo(demo)
    PACE.hold_after(2)
    run = demo.studio.generate(Settings(HEART, steps=100, version="FP16"))
    assert any(isinstance(update, Preview) and update.step == 2 for update in run)
    closing = threading.Thread(target=demo.close)
    closing.start()
    assert demo.studio.closing.wait(60)
    PACE.go_on()
    assert not any(isinstance(update, Finished) for update in run)
    closing.join()


@pytest.mark.parametrize("exempt", [None, "example.org", "*"])
@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_is_not_asked_for_this_machine(name, exempt, folders, monkeypatch):
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")  # where nobody listens
    if exempt:
        monkeypatch.setenv("NO_PROXY", exempt)
    before = dict(os.environ)
    demo = gh.make_demo(folders)
    gh.launch_demo(demo)
    assert is_open(demo.server_port)
    demo.close()
    assert dict(os.environ) == before


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
    assert demo.server_name == "127.0.0.1" and not config["stylesheets"]


def test_the_command_converts_what_is_missing_and_serves_until_interrupted(tmp_path, monkeypatch):
    wanted, served = [], []

    def convert(model: str | Path, folder: Path, *args, **options) -> Path:
        wanted.append((Path(model).name, folder.relative_to(tmp_path).as_posix(), *args, *options))
        return fake_folder(folder)

    def interrupt(demo: Demo) -> None:
        served.append((is_open(demo.server_port), list(demo.studio.folders)))
        raise KeyboardInterrupt

    fake_folder(tmp_path / "tiny" / "hybrid")
    (tmp_path / "here" / "tiny-lcm").mkdir(parents=True)
    monkeypatch.setattr(serve, "convert_pipeline", convert)
    monkeypatch.setattr(serve, "optimize_pipeline", convert)
    monkeypatch.setattr(Demo, "block_thread", interrupt)
    gh.main(["--models", str(tmp_path), "--model", str(tmp_path / "here" / "tiny")])
    assert wanted == [
        ("tiny", "tiny/fp16"),
        ("fp16", "tiny/int8-weights", "int8-weights"),
        ("tiny", "tiny/lcm", "transformer", "scheduler"),
    ]
    assert served == [(True, ["FP16", "INT8 weights", "Hybrid", "Four steps"])]


@pytest.mark.slow
def test_in_a_notebook_the_page_stays_until_its_cell_runs_again(tmp_path):
    launch = "demo = gh.make_demo({'FP16': folder})\ngh.launch_demo(demo)"
    call = (
        "from gradio_client import Client\n"
        "client = Client(demo.local_url, verbose=False)\n"
        "images, details = client.predict('a red heart', seed=7, api_name='/generate')"
    )
    cells = [
        f"import sys; sys.path[:0] = {[str(Path(gh.__file__).parent)]!r}\n"
        "from pathlib import Path\n"
        "import gradio_helper as gh\n"
        "from ov_pixart.demo import studio\n"
        "from tests.support.fake_pipeline import FakePipeline, fake_folder\n"
        "studio.load_pipeline = FakePipeline\n"
        f"folder = fake_folder(Path({str(tmp_path / 'fp16')!r}))",
        launch,
        call,
        "first = demo",
        launch,
        call + "\nassert demo.is_running and not first.is_running\n"
        "assert demo.server_port == first.server_port",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell in notebook.cells:
        if cell.source != launch:
            assert cell.outputs == []
            continue
        frame, line = cell.outputs
        assert re.fullmatch(r"The demo is at http://127\.0\.0\.1:\d+/\n", line.text)
        assert re.search(r'<iframe src="http://127\.0\.0\.1:\d+/"', frame.data["text/html"])


# -- the real thing ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_generates_what_its_pipeline_generates(converted, monkeypatch):
    monkeypatch.undo()  # the real loader
    pipelines = []
    load = studio_module.load_pipeline
    monkeypatch.setattr(
        studio_module,
        "load_pipeline",
        lambda folder: pipelines.append(load(folder)) or pipelines[0],
    )
    studio = Studio({"FP32": converted("alpha")})
    settings = Settings("a red circle", seed=3, steps=3, aspect_ratio="4:3", version="FP32")
    *_, preview, finished = updates(studio, settings)
    assert preview.images[0].size in ((36, 28), (144, 112))  # linear, or by the VAE
    expected = pipelines[0](
        settings.prompt,
        num_inference_steps=3,
        height=224,
        width=288,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert np.array_equal(finished.images[0], expected)
    studio.close()
