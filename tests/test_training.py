"""The training code computes what the models compute, resumes exactly, and runs from end to end."""

import json

import numpy as np
import pytest
import torch
from transformers import T5Tokenizer

from pixart_tiny import data, evaluate, fit, models, render, scenes, train, train_lcm, train_text


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 42), (16, 16)])
def test_the_denoiser_computes_what_the_transformer_computes(height, width):
    torch.manual_seed(0)
    transformer = models.make_transformer().eval()
    for block in transformer.transformer_blocks:  # zero at the start, which would hide errors
        torch.nn.init.normal_(block.attn2.to_out[0].weight, std=0.1)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    latents, features = torch.randn(2, 4, height, width), torch.randn(2, 7, 192)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    timestep = torch.tensor([300, 800])
    with torch.no_grad():
        expected = transformer(
            latents,
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]
        velocity, answers = models.Denoiser(transformer)(latents, features, mask, timestep)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
    assert answers.shape == (2, height * width // 4, sum(data.PATCH_QUESTIONS.values()))


def test_patch_labels_describe_each_patch():
    ring = scenes.SceneObject("blue", "ring", "small")
    layout = [render.Placement(0.5, 0.25, scenes.SIZES["small"])]
    labels = data.patch_labels(scenes.Scene((ring,), "white"), layout, 256, 256)
    grid = dict(
        zip(data.PATCH_QUESTIONS, labels.reshape(16, 16, 5).transpose(2, 0, 1), strict=True)
    )
    assert (grid["shape"][4, 8], grid["colour"][4, 8], grid["size"][4, 8]) == (
        scenes.SHAPES.index("ring"),
        list(scenes.COLOURS).index("blue"),
        0,
    )
    assert (grid["dx"][4, 8], grid["dy"][4, 8], grid["dx"][4, 7], grid["dy"][3, 8]) == (6, 6, 5, 5)
    nothing = [size - 1 for size in data.PATCH_QUESTIONS.values()]
    assert labels.reshape(16, 16, 5)[12, 2].tolist() == nothing
    assert int((grid["shape"] != nothing[0]).sum()) == 36


def test_every_caption_fits_the_length_that_training_pads_to():
    tokenizer = T5Tokenizer.from_pretrained(train.ASSETS / "pixart-tiny" / "tokenizer")
    rng = np.random.default_rng(0)
    captions = [data.draw_caption(rng) for _ in range(2000)]
    captions += [caption for caption, _ in evaluate.read_captions()]
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= models.CAPTION_TOKENS


def test_rendered_scenes_are_the_same_each_time_and_never_held_out():
    drawn = data.RenderedScenes((64, 64), 5, seed=1)
    assert torch.equal(drawn[0].images, data.RenderedScenes((64, 64), 5, seed=1)[0].images)
    captions = [caption for group in drawn[0].captions for caption in group]
    assert len(captions) == 5 * data.CAPTIONS_PER_SCENE
    assert not any(scenes.parse_caption(caption).is_held_out() for caption in captions)


def test_the_answers_of_a_scene_follow_the_questions():
    scene = scenes.parse_caption("a red circle above a small blue ring, navy background")
    named = {
        question: answers[answer]
        for (question, answers), answer in zip(
            train_text.scene_questions().items(), train_text.scene_answers(scene), strict=True
        )
    }
    assert named == {
        "colour 0": "red",
        "shape 0": "circle",
        "size 0": "nothing",
        "colour 1": "blue",
        "shape 1": "ring",
        "size 1": "small",
        "relation": "above",
        "background": "navy",
    }


# ----------------------------------------------------------------------------------------------
# The training loop
# ----------------------------------------------------------------------------------------------


def fit_a_line(folder, steps, stop_at=None):
    """Trains a noisy linear model, in one go or with a stop in between; returns its weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    ema = fit.Ema(model.parameters(), decay=0.9)
    optimizers = [
        fit.Muon([model.weight], lr=0.01, weight_decay=0.01),
        torch.optim.AdamW([model.bias], lr=0.01),
    ]
    run = fit.Run("line", folder, steps)

    def losses(step, rng):
        if step == stop_at and run.step == stop_at:
            run.deadline = 0  # this step is the segment's last
        x = torch.from_numpy(rng.standard_normal((8, 3), dtype=np.float32))
        return {"loss": (model(x + torch.randn_like(x)) - 1).square().mean()}

    complete = fit.fit(run, {"model": model}, optimizers, losses, ema=ema)
    return complete, [*model.parameters(), *ema.averages]


def test_a_resumed_run_is_the_same_as_an_unbroken_one(tmp_path):
    complete, unbroken = fit_a_line(tmp_path / "unbroken", 10)
    assert complete
    stopped, _ = fit_a_line(tmp_path / "resumed", 10, stop_at=4)
    assert not stopped
    complete, resumed = fit_a_line(tmp_path / "resumed", 10)
    assert complete
    for one, other in zip(unbroken, resumed, strict=True):
        assert torch.equal(one, other)
    rows = [fit.read_metrics(tmp_path / name / "line") for name in ("unbroken", "resumed")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert (tmp_path / "resumed" / "line" / "losses.png").is_file()


def test_a_segment_that_resumes_after_the_last_step_finishes_the_text_encoder(tmp_path):
    run = fit.Run("text", tmp_path, steps=1, batch=2)
    train_text.train_text_encoder(run)
    (run.folder / "finished.json").unlink()
    train_text.train_text_encoder(fit.Run("text", tmp_path, steps=1, batch=2))
    assert run.finished


def test_muon_is_torchs_muon_with_all_matrices_of_a_shape_at_once():
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 8), (16, 8), (8, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        fit.Muon(ours, lr=0.1, weight_decay=0.01),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


# ----------------------------------------------------------------------------------------------
# The few-step model
# ----------------------------------------------------------------------------------------------


def test_the_few_step_model_learns_at_the_stops_of_its_scheduler():
    scheduler = models.make_lcm_scheduler()
    scheduler.set_timesteps(4)
    assert tuple(scheduler.timesteps.tolist()) == train_lcm.LCM_TIMESTEPS


def test_the_image_error_is_zero_for_the_target_and_weighs_objects():
    target = torch.zeros(1, 4, 8, 8)
    target[..., :2, :2] = 2.0  # an object
    assert train_lcm.image_error(target, target).item() == 0
    on_object, on_background = target.clone(), target.clone()
    on_object[..., 0, 0] += 1
    on_background[..., 7, 7] += 1
    errors = [train_lcm.image_error(x, target).item() for x in (on_object, on_background)]
    assert errors[0] == pytest.approx(train_lcm.OBJECT_WEIGHT * errors[1])


# ----------------------------------------------------------------------------------------------
# Every stage
# ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_goes_through_every_stage_and_leaves_the_shipped_checkpoint_alone(tmp_path):
    shipped = sorted(train.ASSETS.glob("pixart-tiny*/**/*.safetensors"))
    before = [file.stat().st_mtime_ns for file in shipped]
    assert train.run_stages([*train.STAGES], tmp_path, quick=True)
    assert [file.stat().st_mtime_ns for file in shipped] == before
    for name in train.STAGES:
        assert json.loads((tmp_path / name / "finished.json").read_text()) is not None
    pipeline = evaluate.load_pipeline(tmp_path / "pixart-tiny")
    image = pipeline("a red star", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (256, 256, 3)
    student = models.PixArtTransformer2DModel.from_pretrained(
        tmp_path / "pixart-tiny-lcm" / "transformer"
    )
    assert student.config.sample_size == 32
