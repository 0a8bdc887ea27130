"""The evaluation of a checkpoint on held-out captions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from PIL import Image

from pixart_tiny import evaluate, render, scenes, steps
from pixart_tiny.evaluate import Row


class PerfectPipeline:
    """Renders what its prompts ask for, except for prompts with a forbidden word."""

    def __init__(self, forbidden: str = "nothing"):
        self.forbidden, self.calls = forbidden, []
        self.scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++")

    def set_progress_bar_config(self, **_):
        pass

    def __call__(
        self, prompts, *, height, width, generator, num_inference_steps, guidance_scale, **interval
    ):
        guidance = (guidance_scale, *interval.values())
        self.calls.append((len(prompts), height, width, num_inference_steps, *guidance))
        images = [self.render(p, height, width) for p in prompts]
        return SimpleNamespace(images=images)

    def render(self, prompt, height, width):
        scene = scenes.parse_caption(prompt)
        if self.forbidden in prompt:
            scene = scenes.change_one_attribute(scene, np.random.default_rng(0))
        rng = np.random.default_rng(0)
        return Image.fromarray(render.render_scene(scene, height, width, rng))


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    """Takes the place of the checkpoint's own pipeline; output goes to a folder of the test's."""
    pipeline = PerfectPipeline()
    monkeypatch.setattr(evaluate, "load_pipeline", lambda folder: pipeline)
    monkeypatch.setattr(evaluate, "OUTPUT", tmp_path)
    monkeypatch.setattr(evaluate, "BOUND_CAPTIONS", 1)
    return pipeline


def images_of(captions, **options):
    return evaluate.generate(
        PerfectPipeline(**options), captions, height=256, width=256, steps=2, guidance_scale=1
    )


def test_images_are_generated_in_batches_and_stay_in_order():
    captions = evaluate.read_captions()[:5]
    pipeline = PerfectPipeline()
    images = evaluate.generate(
        pipeline, captions, height=256, width=256, steps=2, guidance_scale=1, batch=2
    )
    assert pipeline.calls == [(2, 256, 256, 2, 1), (2, 256, 256, 2, 1), (1, 256, 256, 2, 1)]
    for image, (caption, _) in zip(images, captions, strict=True):
        assert np.array_equal(image, pipeline.render(caption, 256, 256))


def test_the_tally_counts_right_images_by_number_of_objects():
    captions = [
        ("a large red heart on a white background", 0),
        ("a large blue star on a white background", 0),
        ("a large red heart above a small blue ring on a white background", 0),
    ]
    figures = evaluate.tally(images_of(captions, forbidden="star"), [c for c, _ in captions])
    assert (figures["one object"]["right"], figures["two objects"]["right"]) == (50, 100)
    assert figures["two objects"]["relation"] == 100
    assert "relation" not in figures["one object"]
    assert figures["cleanness"]["median_db"] > 45


def test_a_tally_leaves_out_numbers_of_objects_that_no_caption_has():
    captions = [("a large red heart on a white background", 0)]
    assert "two objects" not in evaluate.tally(images_of(captions), [captions[0][0]])


def test_a_contact_sheet_is_filled_row_by_row():
    images = [Image.new("RGB", (4, 3), (i, 0, 0)) for i in range(1, 4)]
    sheet = evaluate.contact_sheet(images, columns=2)
    assert sheet.size == (8, 6)
    corners = [sheet.getpixel(at)[0] for at in [(0, 0), (4, 0), (0, 3), (4, 3)]]
    assert corners == [1, 2, 3, 255]


def test_the_command_prints_one_row_and_writes_figures_and_sheet(pipeline, tmp_path, capsys):
    evaluate.main(["--shape", "4:3", "--count", "2"])
    printed = capsys.readouterr().out
    assert "| 4:3, 20 steps | 100.0 % (≥ 96) | 100.0 % (≥ 93) |" in printed
    figures = json.loads((tmp_path / "assets-pixart-tiny-4x3-20.json").read_text())
    assert figures["4:3, 20 steps"]["one object"]["right"] == 100
    assert Image.open(tmp_path / "assets-pixart-tiny-4x3-20.png").size == (8 * 288, 224)
    settings = evaluate.default_settings(evaluate.CHECKPOINT)
    assert pipeline.calls == [(2, 224, 288, 20, 4.5, settings.guidance_end)]


def test_the_command_can_change_steps_guidance_and_solver(pipeline, capsys):
    arguments = ["--count", "1", "--steps", "12", "--guidance-scale", "2"]
    evaluate.main([*arguments, "--guidance-end", "0.35", "--solver", "sde-dpmsolver++"])
    assert "| 1:1, 12 steps, sde-dpmsolver++ | 100.0 % |" in capsys.readouterr().out
    assert pipeline.calls == [(1, 256, 256, 12, 2.0, 0.35)]
    assert pipeline.scheduler.config.algorithm_type == "sde-dpmsolver++"


@pytest.mark.slow
def test_the_command_can_print_every_row_that_has_a_target(pipeline, capsys):
    evaluate.main(["--targets", "--count", "1"])
    printed = capsys.readouterr().out
    assert all(f"| {row} |" in printed for row in evaluate.TARGETS[20])


def test_points_have_as_many_evaluations_as_rows_through_the_dit(pipeline, monkeypatch):
    monkeypatch.setattr(steps.ovp, "load_pipeline", lambda folder: pipeline)
    monkeypatch.setattr(steps, "VERSIONS", (("whole", (20,), 1.0), ("part", (16, 20), 0.35)))
    points = steps.measure(evaluate.CHECKPOINT, evaluate.CHECKPOINT, count=2)
    figures = [(p["version"], p["evaluations"], p["one_object"], p["two_objects"]) for p in points]
    assert figures == [("whole", 40, 100, 100), ("part", 22, 100, 100), ("part", 27, 100, 100)]
    assert [call[-1] for call in pipeline.calls] == [1.0, 0.35, 0.35]  # whatever is recommended


def test_targets_stand_beside_the_row_that_the_arguments_describe():
    assert evaluate.find_row(4, "9:16", None, None) == Row("9:16", 4, None, 93, 88, 6)
    assert evaluate.find_row(20, "1:1", 7, None) == Row("1:1", 7)


def test_a_solver_is_refused_where_the_scheduler_has_none():
    with pytest.raises(ValueError, match=r"dpmsolver.*LCMScheduler"):
        evaluate.with_solver(LCMScheduler(), "dpmsolver++")


def test_a_reconstruction_keeps_size_and_type():
    class Brightening:
        def encode(self, pixels):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels))

        def decode(self, latents):
            return SimpleNamespace(sample=latents + 2 / 255)

    image = np.full((8, 16, 3), 100, np.uint8)
    (output,) = evaluate.reconstruct(Brightening(), [image])
    assert output.dtype == np.uint8
    assert np.array_equal(output, image + 1)
    assert evaluate.vae_psnr(Brightening(), count=1, height=64, width=64) > 40
