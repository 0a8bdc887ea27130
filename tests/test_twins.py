"""The twins of PixArt-tiny compute what it computes, from activations with outliers."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from transformers import T5EncoderModel

from pixart_tiny.evaluate import CHECKPOINT
from pixart_tiny.twins import TWINS, build_twin

READERS = {  # a layer that reads outliers, in each component
    "transformer": "transformer_blocks.3.attn1.to_q",
    "text_encoder": "encoder.block.1.layer.1.DenseReluDense.wo",
    "vae": "decoder.conv_in",
}


@pytest.fixture(scope="module", params=TWINS)
def twin(request, tmp_path_factory):
    return request.param, build_twin(tmp_path_factory.mktemp("twin"), TWINS[request.param])


@torch.no_grad()
def outputs(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each component, on random inputs: its output, and what its layer of READERS reads."""
    models = {
        "transformer": PixArtTransformer2DModel.from_pretrained(folder / "transformer"),
        "text_encoder": T5EncoderModel.from_pretrained(folder / "text_encoder"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
    }
    random = torch.Generator().manual_seed(0)
    latents, texts = (
        torch.randn(shape, generator=random) for shape in ((2, 4, 32, 32), (2, 9, 192))
    )
    tokens = torch.randint(1, 371, (2, 9), generator=random)
    calls = {
        "transformer": lambda model: (
            model(latents, encoder_hidden_states=texts, timestep=torch.tensor([20, 500])).sample
        ),
        "text_encoder": lambda model: model(tokens).last_hidden_state,
        "vae": lambda model: model.decode(latents).sample,
    }
    found = {}
    for name, model in models.items():
        read = []
        layer = model.float().eval().get_submodule(READERS[name])
        layer.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))  # noqa: B023
        found[name] = calls[name](model), read[0]
    return found


def spread_of_channels(activations: torch.Tensor, name: str) -> float:
    """The largest channel's maximum in relation to the median channel's."""
    channels = activations.abs().movedim(1 if name == "vae" else -1, 0).flatten(1).amax(1)
    return float(channels.max() / channels.median())


def test_a_twin_has_the_same_outputs_and_larger_outliers(twin):
    name, folder = twin
    factor, found, originals = TWINS[name].factor, outputs(folder), outputs(CHECKPOINT)
    for component, (output, read) in found.items():
        original, was_read = originals[component]
        span = original.max() - original.min()
        assert (output - original).abs().max() < 1e-4 * span, component
        growth = spread_of_channels(read, component) / spread_of_channels(was_read, component)
        assert growth > factor**0.5 / 4, component
