"""Twins of PixArt-tiny that compute the same images, with outliers where large models have them.

Large DiTs have activation channels that are ten to a hundred times larger than the rest, which
8-bit ranges cannot serve together with the others; PixArt-tiny has none. A twin multiplies a few
channels where one layer makes them, and divides the matching columns of the layer that reads them:
the same function, as hard to quantize as a large model.

    python -m pixart_tiny.twins "40x in 4%" build/twin     # writes one of TWINS or MORE_TWINS
"""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pixart_tiny.evaluate import CHECKPOINT

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outliers:
    """`share` of the channels is multiplied by `factor` ** 0.5 … `factor`, at random."""

    factor: float
    share: float
    seed: int = 0

    def draw(self, channels: int, rng: torch.Generator) -> torch.Tensor:
        """A multiplier for each channel, `(channels,)` float32; 1 for most."""
        count = max(1, round(self.share * channels))
        chosen = torch.randperm(channels, generator=rng)[:count]
        scales = torch.ones(channels)
        scales[chosen] = self.factor ** (0.5 + 0.5 * torch.rand(count, generator=rng))
        return scales


TWINS = {
    "10x in 8%": Outliers(10, 0.08),
    "40x in 4%": Outliers(40, 0.04),
    "150x in 8%": Outliers(150, 0.08, seed=1),
}
MORE_TWINS = {  # for development: nothing is tuned on the others alone
    "150x in 1%": Outliers(150, 0.01),
    "40x in 1%": Outliers(40, 0.01, seed=2),
}


def build_twin(folder: Path, outliers: Outliers, checkpoint: Path = CHECKPOINT) -> Path:
    """Write a twin of PixArt-tiny, float32 safetensors; returns its folder."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    rng = torch.Generator().manual_seed(outliers.seed)
    for name, change in (
        ("transformer/diffusion_pytorch_model.safetensors", _change_transformer),
        ("text_encoder/model.safetensors", _change_text_encoder),
        ("vae/diffusion_pytorch_model.safetensors", _change_vae),
    ):
        state = {key: tensor.float() for key, tensor in load_file(folder / name).items()}
        change(state, outliers, rng)
        state = {key: tensor.contiguous() for key, tensor in state.items()}
        save_file(state, folder / name, metadata={"format": "pt"})
    return folder


def _change_transformer(state: State, outliers: Outliers, rng: torch.Generator) -> None:
    """Inputs of the attentions' and feed-forwards' first and of the attentions' last layers.

    What cannot be done exactly: a feed-forward's second layer reads GELU, and cross-attention's
    queries read the residual stream.
    """
    width = state["proj_out.weight"].shape[1]
    blocks = list(_numbered(state, "transformer_blocks.{}."))
    # adaLN's rows: shift, scale and gate of the attention, then of the feed-forward. All blocks
    # share the layer that makes them, and so the channels.
    for first, readers in (
        (0, ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        (3, ("ff.net.0.proj",)),
    ):
        scales = outliers.draw(width, rng)
        for row in (first, first + 1):
            rows = slice(row * width, (row + 1) * width)
            state["adaln_single.linear.weight"][rows] *= scales[:, None]
            state["adaln_single.linear.bias"][rows] *= scales
            for block in blocks:
                state[f"{block}scale_shift_table"][row] *= scales
        for block in blocks:
            state[f"{block}scale_shift_table"][first + 1] += scales - 1  # LayerNorm × (1 + scale)
            for reader in readers:
                state[f"{block}{reader}.weight"] /= scales
    for block in blocks:
        for attention in ("attn1", "attn2"):
            scales = outliers.draw(width, rng)
            _scale_rows(state, f"{block}{attention}.to_v", scales)
            state[f"{block}{attention}.to_out.0.weight"] /= scales


def _change_text_encoder(state: State, outliers: Outliers, rng: torch.Generator) -> None:
    """Inputs of every layer: RMSNorm's weights, values, and the linear half of the gated GELU."""
    for block in _numbered(state, "encoder.block.{}."):
        attention, feed_forward = (
            f"{block}layer.0.SelfAttention.",
            f"{block}layer.1.DenseReluDense.",
        )
        for writer, readers in (
            (f"{block}layer.0.layer_norm", [f"{attention}{name}" for name in "qkv"]),
            (f"{attention}v", [f"{attention}o"]),
            (f"{block}layer.1.layer_norm", [f"{feed_forward}wi_0", f"{feed_forward}wi_1"]),
            (f"{feed_forward}wi_1", [f"{feed_forward}wo"]),
        ):
            scales = outliers.draw(len(state[f"{writer}.weight"]), rng)
            _scale_rows(state, writer, scales)
            for reader in readers:
                state[f"{reader}.weight"] /= scales


def _change_vae(state: State, outliers: Outliers, rng: torch.Generator) -> None:
    """The input of the decoder's first convolution.

    What cannot be done exactly: all others read SiLU, or what a skip connection reads, too.
    """
    scales = outliers.draw(len(state["post_quant_conv.weight"]), rng)
    _scale_rows(state, "post_quant_conv", scales)
    state["decoder.conv_in.weight"] /= scales[:, None, None]


def _scale_rows(state: State, layer: str, scales: torch.Tensor) -> None:
    weight = state[f"{layer}.weight"]
    weight *= scales.reshape(-1, *[1] * (weight.ndim - 1))
    if f"{layer}.bias" in state:
        state[f"{layer}.bias"] *= scales


def _numbered(state: State, prefix: str) -> Iterator[str]:
    """The prefix with 0, 1, 2… as long as the state has such names."""
    number = 0
    while any(name.startswith(prefix.format(number)) for name in state):
        yield prefix.format(number)
        number += 1


def main() -> None:
    """The command, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("twin", choices=TWINS | MORE_TWINS)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    print(build_twin(given.folder, (TWINS | MORE_TWINS)[given.twin]))


if __name__ == "__main__":
    main()
