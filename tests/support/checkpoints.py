"""Random PixArt checkpoints that are built in a second: right in structure, tiny in size."""

import io
import shutil
from pathlib import Path

import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

TEXT_WIDTH = 32  # d_model of T5, caption_channels of the transformer

# The published checkpoints' structure, few and narrow layers:
# name → (pipeline class, sample_size, size conditions, scheduler)
FAMILIES = {
    "alpha": (PixArtAlphaPipeline, 32, False, DPMSolverMultistepScheduler),
    "alpha-512": (PixArtAlphaPipeline, 64, False, DPMSolverMultistepScheduler),
    "alpha-ms": (PixArtAlphaPipeline, 128, True, DPMSolverMultistepScheduler),
    "lcm": (PixArtAlphaPipeline, 32, False, LCMScheduler),
    "lcm-ms": (PixArtAlphaPipeline, 128, True, LCMScheduler),
    "dmd": (PixArtAlphaPipeline, 64, False, DDPMScheduler),
    "sigma": (PixArtSigmaPipeline, 32, False, DPMSolverMultistepScheduler),
    "sigma-512": (PixArtSigmaPipeline, 64, False, DPMSolverMultistepScheduler),
    "sigma-1024": (PixArtSigmaPipeline, 128, False, DPMSolverMultistepScheduler),
    "sigma-2k": (PixArtSigmaPipeline, 256, False, DPMSolverMultistepScheduler),
}
SCALING = {PixArtAlphaPipeline: 0.18215, PixArtSigmaPipeline: 0.13025}  # of the VAE's latents


def build_checkpoint(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a diffusers folder of one of FAMILIES, float32 safetensors."""
    pipeline_class, sample_size, conditions, scheduler_class = FAMILIES[family]
    torch.manual_seed(seed)
    spiece = train_spiece(folder / "spiece")
    pipeline_class(
        tokenizer=T5Tokenizer.from_pretrained(spiece),
        text_encoder=build_text_encoder(),
        transformer=build_transformer(sample_size, conditions),
        vae=build_vae(SCALING[pipeline_class]),
        scheduler=scheduler_class(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    ).save_pretrained(folder)
    return folder


def as_published(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint the way PixArt-α's repositories have it.

    The transformer under its old class name and with a weight that nobody uses, a tokenizer that
    is nothing but a sentencepiece model.
    """
    shutil.copytree(checkpoint, folder)
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        text = file.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel")
        file.write_text(text)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["caption_projection.y_embedding"] = torch.zeros(120, TEXT_WIDTH)
    save_file(state, weights, metadata={"format": "pt"})
    shutil.rmtree(folder / "tokenizer")
    shutil.move(folder / "spiece", folder / "tokenizer")
    return folder


def train_spiece(folder: Path) -> Path:
    """A folder with nothing but a sentencepiece model, as the published repositories have it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        f"a {size} {color} {kind} {relation} the {place}"
        for size in ("small", "large", "bright")
        for color in ("red", "green", "blue", "purple", "yellow")
        for kind in ("circle", "square", "star")
        for relation in ("above", "below", "on")
        for place in ("night sky", "sea", "hill")
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


def build_text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=256,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu_new",
        relative_attention_num_buckets=8,
        tie_word_embeddings=False,
    )
    return _spread(T5EncoderModel(config), 0.3)


def build_transformer(sample_size: int, conditions: bool) -> PixArtTransformer2DModel:
    """Inner width 48: divisible by 3, as the embedder of the size conditions demands."""
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=TEXT_WIDTH,
        sample_size=sample_size,
        use_additional_conditions=conditions,
    )
    _spread(model, 0.15)
    torch.nn.init.normal_(model.proj_out.weight, 0.0, 0.05)  # noise of about the size of noise
    return model


def build_vae(scaling_factor: float = 0.18215) -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 16, 16],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )
    return _spread(model, 0.15)


def _spread(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Give every matrix weights that matter.

    As initialised, a random transformer hardly listens to its text: a comparison of pictures
    would pass with the prompt or the mask left out.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, scale)
    return model.eval()
