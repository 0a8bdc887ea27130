"""The three components of PixArt-tiny, its schedulers, and the DiT as training sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtTransformer2DModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from pixart_tiny.data import PATCH_QUESTIONS

# ----------------------------------------------------------------------------------------------
# The components
# ----------------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    """8× VAE of 2.6 M parameters; narrow at full resolution, where a CPU spends its time."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,  # groups of two channels would normalise colours away
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,  # latents are whitened at the end of the stage, see train_vae.py
        force_upcast=False,
    )
    _carry_colour(vae)
    return vae


@torch.no_grad()
def _carry_colour(vae: AutoencoderKL) -> None:
    """Initialises the VAE as an 8× average pool and its inverse: only edges are left to learn.

    The first channels of every level carry the image's RGB through; residual branches start at
    zero. From diffusers' random start, no colour came through in a thousand steps.
    """
    kept = range(4)
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            module.weight.zero_(), module.bias.zero_()
        elif name.endswith(
            ("conv_in", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
        ):
            for i in kept[: module.in_channels]:
                _pass_on(module, i, pool="downsamplers" in name)
        elif name in ("encoder.conv_out", "quant_conv", "post_quant_conv"):
            for i in kept:
                _pass_on(module, i)


def _pass_on(conv: torch.nn.Conv2d, i: int, pool: bool = False) -> None:
    """Makes the convolution's channel `i` a copy of its input's, or the 2×2 mean of it."""
    conv.weight[i].zero_(), conv.bias[i].zero_()
    if pool:
        conv.weight[i, i, :2, :2] = 0.25  # the padding is at the right and bottom
    else:
        conv.weight[i, i, conv.weight.shape[2] // 2, conv.weight.shape[3] // 2] = 1


def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [-1, 1] → latents (N, 4, H/8, W/8): the posterior's mean."""
    return vae.quant_conv(vae.encoder(images))[:, :4]


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, 4, H/8, W/8) → images (N, 3, H, W), about [-1, 1]."""
    return vae.decoder(vae.post_quant_conv(latents))


def make_text_encoder(vocab_size: int) -> T5EncoderModel:
    """T5 v1.1 encoder (gated GELU) of 1.4 M parameters."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=192,
            d_kv=32,
            num_heads=6,
            d_ff=512,
            num_layers=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.05,
            tie_word_embeddings=False,
        )
    )


def make_transformer() -> PixArtTransformer2DModel:
    """PixArt's DiT with 256² as its native size; `out_channels=8` as in the real checkpoints."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        cross_attention_dim=192,
        caption_channels=192,
        num_layers=8,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    # As in the authors' code, cross-attention and the output start at zero.
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_scheduler() -> DPMSolverMultistepScheduler:
    """PixArt's noise schedule; the model predicts velocity (Salimans & Ho 2022, appendix D).

    The solver is the deterministic one. "sde-dpmsolver++" adds fresh noise in every step, so that
    later steps correct earlier ones; with guidance in the first third that gains nothing.
    """
    return DPMSolverMultistepScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="v_prediction",
    )


def make_lcm_scheduler() -> LCMScheduler:
    """Latent consistency sampling (Luo et al. 2023) over the same noise schedule."""
    teacher = make_scheduler().config
    return LCMScheduler(
        beta_schedule=teacher.beta_schedule,
        beta_start=teacher.beta_start,
        beta_end=teacher.beta_end,
        prediction_type=teacher.prediction_type,
    )


# ----------------------------------------------------------------------------------------------
# As training sees them
# ----------------------------------------------------------------------------------------------

CAPTION_TOKENS = 32  # more than any caption has; one length, so that tensor shapes stay the same


@contextlib.contextmanager
def low_precision(device: str) -> Iterator[None]:
    """bfloat16 autocast; on a CPU with plain attention, which is faster there for few tokens."""
    attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()
    with torch.autocast(device, torch.bfloat16), attention:
        yield


class Conditioner(torch.nn.Module):
    """The frozen text encoder: captions → token ids → embeddings."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds `tokenizer/` and `text_encoder/`."""
        super().__init__()
        self.tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = T5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ).eval()

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Token ids (B, `CAPTION_TOKENS`), padded with zeros."""
        return self.tokenizer(
            captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, L, 192) and mask (B, L) of token ids (B, L)."""
        mask = (tokens != 0).long()
        return self.encoder(tokens, mask).last_hidden_state, mask


class Denoiser(torch.nn.Module):
    """PixArt's transformer with a second task for its middle, which training alone needs.

    The second task is to predict for each patch which object is there, and where in the object the
    patch lies (`PATCH_QUESTIONS`). It teaches the middle of the network the layout long before the
    velocity's error does, as aligning it with a pretrained encoder does in REPA (Yu et al. 2024).
    """

    def __init__(self, transformer: PixArtTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.norm = torch.nn.LayerNorm(width)
        self.answers = torch.nn.Linear(width, sum(PATCH_QUESTIONS.values()))
        self.middle = len(transformer.transformer_blocks) * 5 // 8
        self._tables: dict[torch.Size, torch.Tensor] = {}

    def compile_blocks(self) -> None:
        """Compiles one block for all: the graph depends only on the number of patches."""
        torch._dynamo.config.recompile_limit = 64
        for block in self.transformer.transformer_blocks:
            block.compile(dynamic=False)

    @torch.no_grad()
    def position_table(self, latents: torch.Tensor) -> torch.Tensor:
        """PatchEmbed's positions for latents of this size, (1, P, width), from a cache."""
        if latents.shape[2:] not in self._tables:
            embed = self.transformer.pos_embed
            with torch.autocast(latents.device.type, enabled=False):
                table = embed(torch.zeros_like(latents[:1], dtype=torch.float32)) - embed.proj.bias
            self._tables[latents.shape[2:]] = table
        return self._tables[latents.shape[2:]]

    def forward(self, latents, features, mask, timestep) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents (B, 4, H, W) → velocity (B, 4, H, W) and patch answers (B, P, questions).

        `features` (B, L, 192) and `mask` (B, L) come from the Conditioner; `timestep`: (B,).
        """
        dit = self.transformer
        height, width = (side // 2 for side in latents.shape[-2:])
        hidden = dit.pos_embed.proj(latents).flatten(2).transpose(1, 2)
        hidden = hidden + self.position_table(latents)
        conditions = {"resolution": None, "aspect_ratio": None}
        modulation, embedded = dit.adaln_single(timestep, conditions, hidden_dtype=hidden.dtype)
        features = dit.caption_projection(features)
        bias = (1 - mask.to(hidden.dtype))[:, None] * -10000.0
        answers = None
        for i, block in enumerate(dit.transformer_blocks, start=1):
            hidden = block(
                hidden,
                encoder_hidden_states=features,
                encoder_attention_mask=bias,
                timestep=modulation,
            )
            if i == self.middle:
                answers = self.answers(self.norm(hidden))
        shift, scale = (dit.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        output = dit.proj_out(dit.norm_out(hidden) * (1 + scale) + shift)
        # The output goes (row, column, channel); its last four channels, the variance, are unused.
        output = output.unflatten(-1, (2, 2, -1))[..., :4].unflatten(1, (height, width))
        velocity = output.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)
        return velocity.float(), answers
