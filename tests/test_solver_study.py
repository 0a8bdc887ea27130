"""The study of solvers, guidance intervals and step caches."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ov_pixart_helper as ovp
from pixart_tiny import evaluate, render, scenes, solver_study
from pixart_tiny.solvers import Study, Variant
from pixart_tiny.step_caches import Blocks, Cache, Half, Series

REPORT = evaluate.CHECKPOINT.parent / "bench" / "pixart-tiny-solvers.json"


class Doubling(torch.nn.Module):
    """A block that adds its input to itself, and counts the images it saw."""

    seen = 0

    def forward(self, hidden, **_):
        self.seen += len(hidden)
        return 2 * hidden


def test_a_series_of_order_one_extrapolates_a_straight_line_of_each_row():
    series, everything = Series(order=1), torch.tensor([True, True])
    series.update(0.0, torch.tensor([[1.0], [5.0]]), everything)
    series.update(2.0, torch.tensor([[3.0], [5.0]]), everything)
    assert series.predict(3.0).tolist() == [[4.0], [5.0]]
    series.update(4.0, torch.tensor([[9.0]]), torch.tensor([False, True]))
    assert series.predict(4.0).tolist() == [[5.0], [9.0]]
    assert series.predict(5.0).tolist() == [[6.0], [11.0]]


def test_a_series_of_order_zero_repeats_the_last_value():
    series = Series(order=0)
    for at, value in ((0.0, 1.0), (1.0, 7.0)):
        series.update(at, torch.tensor([[value]]), torch.tensor([True]))
    assert series.predict(5.0).item() == 7


def test_an_interval_evaluates_the_first_three_steps_every_nth_and_the_last():
    half = Half("conditional", Cache(interval=3))
    steps = [bool(half.decide(torch.ones(1, 1), is_last=step == 9)) for step in range(10)]
    assert [step for step, evaluated in enumerate(steps) if evaluated] == [0, 1, 2, 5, 8, 9]
    assert (half.full, half.shallow) == (6, 0)


def test_only_the_unconditional_half_may_be_cached():
    cache = Cache(only_unconditional=True)
    halves = [Half(name, cache) for name in ("conditional", "unconditional")]
    assert [half.cache for half in halves] == [None, cache]


def test_a_threshold_evaluates_the_later_blocks_for_images_that_changed():
    blocks = Blocks([Doubling(), Doubling()])
    blocks.half = half = Half("conditional", Cache(1, threshold=0.1, order=0))
    calm, moving = torch.ones(1, 4, 2), torch.ones(1, 4, 2)
    for step in range(5):
        blocks.at = float(step)
        output = blocks(torch.cat([calm, moving * 2**step]))
        assert output[1].unique().item() == 4 * 2**step
    assert output[0].unique().item() == 4
    assert blocks.blocks[0].seen == 10
    assert blocks.blocks[1].seen == 2 * 3 + 2  # three steps for both, then one image alone
    assert (half.full, half.shallow) == (4, 1)


def test_guidance_covers_the_same_steps_as_in_the_pipelines():
    for variant in {Variant("sde", v.steps, v.start, v.end) for v in solver_study.grid()}:
        guided = sum(variant.is_guided(step) for step in range(variant.steps))
        expected = ovp.count_evaluations(variant.steps, 4.5, variant.start, variant.end)
        assert variant.steps + guided == expected


def test_each_part_names_every_variant_once():
    for variants, *_ in solver_study.PARTS.values():
        assert set(Counter(variants()).values()) == {1}


def test_the_report_holds_what_the_study_plans():
    rows = ovp.read_json(REPORT)["rows"]
    planned = done = 0
    for part, (variants, _, shapes) in solver_study.PARTS.items():
        planned += len(shapes) * len(list(variants()))
        left = [len(plan) for _, plan in solver_study.missing(part, rows, count=200)]
        done += len(shapes) * len(list(variants())) - sum(left)
    assert done == len(rows)
    assert (
        planned - done <= 6
    )  # Euler and the deterministic solver with few steps, one interval each


def test_figures_count_right_images_by_number_of_objects():
    figures = solver_study.summarize([(1, True, 40.0), (2, True, None), (2, False, None)])
    assert (figures["one_object"], figures["two_objects"]) == (100, 50)
    assert figures["cleanness_median_db"] == 40


def test_an_image_is_judged_by_its_caption():
    caption, other = "a large red heart on a white background", "a red heart above a blue ring"
    scene = scenes.parse_caption(caption)
    image = render.render_scene(scene, 256, 256, np.random.default_rng(0))
    assert solver_study.judge(image, caption, with_cleanness=False) == (1, True, None)
    assert solver_study.judge(image, other, with_cleanness=False) == (2, False, None)


def test_psnr_is_measured_per_image():
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    found = solver_study.psnr(images, images + torch.tensor([0, 255]).byte().view(2, 1, 1, 1))
    assert found.tolist() == [99, 0]


def test_variants_are_generated_one_ahead_and_reported_in_order():
    class Workers:
        def map(self, _, images, *__, **___):
            return [(1, True, 40.0), (2, False, None)]

    def generate(variant):
        return torch.zeros(2, 4, 4, 3, dtype=torch.uint8), 2.0 * variant.steps, 0.0

    study = SimpleNamespace(
        captions=["a", "b"], generate=generate, reference=lambda solver: generate(Variant(""))[0]
    )
    plan = [Variant("sde", steps) for steps in (3, 2)]
    rows = list(solver_study.measure(study, plan, Workers()))
    assert [(row["steps"], row["rows"]) for row in rows] == [(3, 6), (2, 4)]
    assert (rows[0]["one_object"], rows[0]["two_objects"]) == (100, 0)


@pytest.mark.slow
def test_without_a_cache_images_are_the_pipelines():
    captions = evaluate.read_captions()[:2]
    study = Study(captions, (256, 256), "cpu")
    images, rows, shallow = study.generate(Variant("ode", 4, end=0.5))
    assert (rows, shallow) == (6, 0)
    pipeline = ovp.load_pipeline(evaluate.CHECKPOINT)
    options = {"height": 256, "width": 256, "guidance_scale": 4.5, "guidance_end": 0.5}
    expected = evaluate.generate(pipeline, captions, steps=4, **options)
    difference = images.numpy().astype(int) - np.stack([np.asarray(image) for image in expected])
    assert np.abs(difference).max() <= 1
    for cache in (Cache(interval=1), Cache(1, interval=1), Cache(1, threshold=-1.0, order=2)):
        cached, rows, _ = study.generate(Variant("ode", 4, end=0.5, cache=cache))
        assert rows == 6
        assert (cached.int() - images.int()).abs().max() <= 1
