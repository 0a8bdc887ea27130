"""The training code computes what the models that it trains compute."""

import numpy as np
import pytest
import torch

from assets.training import evaluate, scenes, train


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 42), (16, 16)])
def test_the_denoiser_is_the_transformer_on_patches(height, width):
    torch.manual_seed(0)
    transformer = train.make_transformer().eval()
    for block in transformer.transformer_blocks:  # silent at the start, so they would hide faults
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
        positions = train.position_table(transformer, height, width)
        velocity, answers = train.Denoiser(transformer)(
            train.to_patches(latents), positions, features, mask, timestep
        )
    torch.testing.assert_close(velocity, train.to_patches(expected), rtol=1e-4, atol=1e-4)
    assert answers.shape == (2, height * width // 4, sum(train.PATCH_QUESTIONS.values()))


def test_patch_labels_say_what_is_where():
    thing = scenes.Thing("blue", "ring", "small")
    layout = [scenes.Placement(0.5, 0.25, scenes.SIZES["small"])]
    labels = train.patch_labels(scenes.Scene((thing,), "white"), layout, 256, 256)
    grid = dict(zip(train.PATCH_QUESTIONS, labels.reshape(16, 16, 5).permute(2, 0, 1), strict=True))
    assert (grid["kind"][4, 8], grid["colour"][4, 8], grid["size"][4, 8]) == (
        scenes.KINDS.index("ring"),
        list(scenes.COLOURS).index("blue"),
        0,
    )
    assert (grid["dx"][4, 8], grid["dy"][4, 8], grid["dx"][4, 7], grid["dy"][3, 8]) == (6, 6, 5, 5)
    nothing = [size - 1 for size in train.PATCH_QUESTIONS.values()]
    assert labels.reshape(16, 16, 5)[12, 2].tolist() == nothing
    assert int((grid["kind"] != nothing[0]).sum()) == 36


def test_every_caption_fits_the_length_that_training_pads_to():
    tokenizer = train.T5Tokenizer.from_pretrained(train.CHECKPOINT / "tokenizer")
    rng = np.random.default_rng(0)
    captions = [train.scene_and_caption(rng)[1] for _ in range(2000)]
    captions += [caption for caption, _ in evaluate.read_captions()]
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= train.CAPTION_TOKENS
