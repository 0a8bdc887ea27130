"""Trains PixArt-tiny from nothing but `scenes.py`, in stages that follow PixArt's own recipe.

    python -m assets.training.train            # every stage that is not finished yet, in order
    python -m assets.training.train dit-128    # one stage
    python -m assets.training.train --minutes 60   # stop after an hour; the next call goes on
    python -m assets.training.train --from-checkpoint  # go on from the weights in assets/

State lives in build/training/ (one folder a stage; outside git). Every step draws its data from
(seed, step), so a run that was stopped and resumed sees what an unbroken one would have seen. The
last stage, `export`, writes assets/pixart-tiny in diffusers layout; where build/training/ is gone,
`--from-checkpoint` rebuilds from it what later stages start from.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.training_utils import EMAModel
from sentencepiece import sentencepiece_model_pb2
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from assets.training import scenes

STATE = Path("build/training")
CHECKPOINT = Path("assets/pixart-tiny")
LCM_CHECKPOINT = Path("assets/pixart-tiny-lcm")  # transformer and scheduler; the rest is shared
SEED = 0

# ----------------------------------------------------------------------------------------------
# The three models
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
        scaling_factor=1.0,  # latents are whitened when the stage ends, see `whiten_latents`
        force_upcast=False,
    )
    carry_colour(vae)
    return vae


@torch.no_grad()
def carry_colour(vae: AutoencoderKL) -> None:
    """Initialises the VAE as an 8× average pool and its inverse: only edges are left to learn.

    The first channels of every stage carry the picture's RGB through; residual branches start at
    zero. From a random start, a thousand steps went by before any colour came through.
    """
    kept = range(4)
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            module.weight.zero_(), module.bias.zero_()
        elif name.endswith(
            ("conv_in", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
        ):
            for i in kept[: module.in_channels]:
                module.weight[i].zero_(), module.bias[i].zero_()
                if "downsamplers" in name:
                    module.weight[i, i, :2, :2] = 0.25  # the padding is at the right and bottom
                else:
                    module.weight[
                        i, i, module.weight.shape[2] // 2, module.weight.shape[3] // 2
                    ] = 1
        elif name in ("encoder.conv_out", "quant_conv", "post_quant_conv"):
            for i in kept:
                module.weight[i].zero_(), module.bias[i].zero_()
                module.weight[i, i, module.weight.shape[2] // 2, module.weight.shape[3] // 2] = 1


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
    # As the authors' code starts: cross-attention and the output are silent at first.
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_scheduler(algorithm: str = "sde-dpmsolver++") -> DPMSolverMultistepScheduler:
    """PixArt's noise schedule; the model predicts velocity (Salimans & Ho 2022, appendix D).

    The stochastic solver adds a little fresh noise in every step, and each step mends what the
    last ones got wrong: a small model gains much from that. "dpmsolver++" goes straight on.
    """
    return DPMSolverMultistepScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type=algorithm,
        solver_order=2,
        prediction_type="v_prediction",
    )


# ----------------------------------------------------------------------------------------------
# Resumable stages
# ----------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A stage's position: `step` of `steps`, with everything needed to go on after a stop."""

    name: str
    steps: int
    deadline: float
    step: int = 0

    @property
    def folder(self) -> Path:
        return STATE / self.name

    @property
    def finished(self) -> bool:
        return (self.folder / "finished.json").is_file()

    def resume(self, **parts) -> None:
        """Restores model, optimizer and EMA if an earlier segment left them."""
        file = self.folder / "state.pt"
        if file.is_file():
            state = torch.load(file, weights_only=True)
            self.step = state.pop("step")
            for name, part in parts.items():
                part.load_state_dict(state[name])

    def save(self, **parts) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in parts.items()} | {"step": self.step}
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")

    def finish(self, **figures) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "finished.json").write_text(json.dumps(figures, indent=1) + "\n")

    def loop(self, save: Callable[[], None], every: int = 250) -> Iterator[tuple[int, float]]:
        """Yields (step, share of the stage done) until the stage or this segment's time ends."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=10)
        with bar:
            while self.step < self.steps and time.monotonic() < self.deadline:
                yield self.step, self.step / self.steps
                self.step += 1
                bar.update()
                if self.step % every == 0:
                    save()
        save()


def warmup_cosine(done: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Learning-rate factor: a short linear warm-up, then half a cosine down to `floor`."""
    if done < warmup:
        return done / warmup + 1e-3
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor


def to_tensor(pictures: np.ndarray | list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures (N, H, W, 3) as (N, 3, H, W) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.float().div_(127.5).sub_(1)


# ----------------------------------------------------------------------------------------------
# Stage: VAE
# ----------------------------------------------------------------------------------------------

POSTERIOR_STD = 0.2  # noise on unit-variance latents: what the decoder learns to shrug off
BINS = ((224, 288), (288, 224), (192, 336), (336, 192))
VAE_SIZES = (
    (128, 128, 4),
    (256, 256, 1),
    *((height, width, 1) for height, width in BINS),
)  # height, width, batch


def vae_batch(step: int, pool: dict) -> torch.Tensor:
    """Equal numbers of pixels each step: small scenes, whole pictures, or crops around things."""
    rng = np.random.default_rng((SEED, 1, step))
    kind = rng.random()
    if kind < 0.4:  # four 128² crops at native scale, where the edges are
        pictures = [pool[256, 256][i] for i in rng.integers(len(pool[256, 256]), size=4)]
        corners = scenes.RASTER * rng.integers(1, 8, size=(4, 2))
        return to_tensor(
            [p[y : y + 128, x : x + 128] for p, (y, x) in zip(pictures, corners, strict=True)]
        )
    height, width, batch = VAE_SIZES[0 if kind < 0.7 else rng.choice([1, 1, 1, 2, 3, 4, 5])]
    group = pool[height, width]
    return to_tensor([group[i] for i in rng.integers(len(group), size=batch)])


def render_scenes(seed: tuple[int, ...], height: int, width: int, count: int) -> list[np.ndarray]:
    """Renders `count` training scenes."""
    rng = np.random.default_rng(seed)
    drawn = [scenes.sample_training_scene(rng) for _ in range(count)]
    return [scenes.render(scene, height, width, rng) for scene in drawn]


def render_pool(sizes: dict[tuple[int, int], int]) -> dict[tuple[int, int], list[np.ndarray]]:
    """Renders `count` training scenes for each (height, width), on every core."""
    share = 100
    jobs = [
        ((SEED, 2, *size, i), *size, share)
        for size, count in sizes.items()
        for i in range(count // share)
    ]
    pool = {size: [] for size in sizes}
    with multiprocessing.get_context("spawn").Pool() as workers:
        results = workers.imap(_render_job, jobs)
        for job, pictures in zip(jobs, tqdm(results, "rendering", len(jobs)), strict=True):
            pool[job[1:3]] += pictures
    return pool


def _render_job(job: tuple) -> list[np.ndarray]:
    return render_scenes(*job)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and L2 with extra weight on edges, where an 8× VAE blurs first, and on vivid colours.

    Things cover a tenth of a picture: without the weight on vivid colours (and the same error once
    more after 8× average pooling) the VAE spends its four channels on edges and mixes up hues.
    """
    dx = F.pad((target[..., 1:] - target[..., :-1]).abs().amax(1, keepdim=True), (0, 1))
    dy = F.pad((target[..., 1:, :] - target[..., :-1, :]).abs().amax(1, keepdim=True), (0, 0, 0, 1))
    edge = F.max_pool2d(torch.maximum(dx, dy), 5, 1, 2).clamp(max=1)
    vivid = target.amax(1, keepdim=True) - target.amin(1, keepdim=True)
    weighted = (1 + 4 * edge + 3 * vivid) * (output - target)
    pooled = F.avg_pool2d(weighted, 8)
    return (weighted.abs() + 2 * weighted.square() / 3).mean() + pooled.abs().mean()


def train_vae(run: Run) -> None:
    """Trains the VAE with fixed posterior noise on latents held at zero mean and unit variance."""
    torch.manual_seed(SEED)
    vae = make_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMAModel(vae.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    parts = {"model": vae, "optimizer": optimizer, "ema": ema}
    run.resume(**parts)
    losses = []
    pool = render_pool({(128, 128): 4000, (256, 256): 2500} | dict.fromkeys(BINS, 300))
    for step, done in run.loop(lambda: run.save(**parts)):
        set_learning_rate(optimizer, warmup_cosine(done))
        pictures = vae_batch(step, pool).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.quant_conv(vae.encoder(pictures))[:, :4].float()
            noise = POSTERIOR_STD * 2 * torch.rand(len(mean), 1, 1, 1) * torch.randn_like(mean)
            output = vae.decoder(vae.post_quant_conv(mean + noise)).float()
        loss = reconstruction_loss(output, pictures)
        channel_mean, channel_std = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
        loss = loss + 0.02 * (channel_mean.square() + (channel_std - 1).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.step(vae.parameters())
        losses.append(loss.item())
        if step % 100 == 0:
            tqdm.write(f"vae step {step} loss {np.mean(losses[-100:]):.4f}")
    if run.step == run.steps:
        ema.copy_to(vae.parameters())
        whiten_latents(vae, pool[256, 256][:400])
        vae.save_pretrained(run.folder / "vae")
        run.finish(psnr_db=round(vae_psnr(vae), 2))


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pictures: list[np.ndarray]) -> None:
    """Gives the latents zero mean and identity covariance, exactly, without changing a picture.

    PixArt's pipeline knows one scaling factor for all channels, so channels of unequal strength
    would be noised unequally. Both 1×1 convolutions around the latents are linear: the whitening
    goes into `quant_conv` and its inverse into `post_quant_conv`.
    """
    latents = torch.cat([encode(vae, to_tensor([p])) for p in pictures])
    flat = latents.permute(1, 0, 2, 3).flatten(1).double()
    mean, covariance = flat.mean(1), torch.cov(flat)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = (vectors * values.rsqrt()) @ vectors.T
    colour = (vectors * values.sqrt()) @ vectors.T
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight = quant.weight[:4, :, 0, 0].double()
    bias = quant.bias[:4].double()
    quant.weight[:4, :, 0, 0] = (whiten @ weight).float()
    quant.bias[:4] = (whiten @ (bias - mean)).float()
    quant.weight[4:] = 0  # the posterior's width is a constant, as in training
    quant.bias[4:] = 2 * math.log(POSTERIOR_STD)
    back = post.weight[:, :, 0, 0].double()
    post.bias += (back @ mean).float()
    post.weight[:, :, 0, 0] = (back @ colour).float()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] as latents (N, 4, H/8, W/8): the posterior's mean."""
    return vae.quant_conv(vae.encoder(pictures))[:, :4]


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, count: int = 64, size: int = 256) -> float:
    """Mean PSNR in dB of `count` fresh scenes through encoder and decoder (peak 255)."""
    rng = np.random.default_rng((SEED, 3))
    total = 0.0
    for _ in range(count):
        picture = to_tensor([scenes.render(scenes.sample_scene(rng), size, size, rng)])
        output = vae.decode(encode(vae, picture)).sample.clamp(-1, 1)
        total += 10 * math.log10(4 / F.mse_loss(output, picture).item())
    return total / count


# ----------------------------------------------------------------------------------------------
# Stage: text encoder
# ----------------------------------------------------------------------------------------------

NOTHING = "nothing"  # the second thing of a scene with one, and what a caption leaves open
OMIT_SIZES = 0.2
OMIT_BACKGROUND = 0.12


def scene_and_caption(rng: np.random.Generator) -> tuple[scenes.Scene, str]:
    """A training scene and one of its captions."""
    scene = scenes.sample_training_scene(rng)
    return scene, training_caption(scene, rng)


def training_caption(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """Varied wording; some captions leave the sizes or the backdrop open, as people do."""
    return scenes.describe(
        scene,
        rng,
        omit_sizes=rng.random() < OMIT_SIZES,
        omit_background=rng.random() < OMIT_BACKGROUND,
    )


def make_tokenizer(folder: Path) -> T5Tokenizer:
    """A SentencePiece unigram model of the captions, with T5's special tokens and byte fallback."""
    rng = np.random.default_rng((SEED, 4))
    captions = [scene_and_caption(rng)[1] for _ in range(20_000)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=384,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    # So few different words leave the trainer with fragments: add every word as a piece, too.
    vocabulary = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for word in sorted({w for c in captions for w in re.findall(r"[a-z]+", c)}):
        if f"▁{word}" not in {p.piece for p in vocabulary.pieces}:
            vocabulary.pieces.add(piece=f"▁{word}", score=-3.0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(vocabulary.SerializeToString())
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0, model_max_length=120)
    tokenizer.save_pretrained(folder)
    return tokenizer


def scene_questions() -> dict[str, list[str]]:
    """What every token must be able to answer about the whole scene: question → answers."""
    thing = {"colour": [*scenes.COLOURS], "kind": [*scenes.KINDS], "size": [*scenes.SIZES]}
    questions = {
        f"{name} {i}": [*values, NOTHING] for i in (0, 1) for name, values in thing.items()
    }
    return questions | {
        "relation": [*scenes.RELATIONS, NOTHING],
        "background": [*scenes.BACKGROUNDS, NOTHING],
    }


def scene_answers(scene: scenes.Scene) -> list[int]:
    """The scene's answers to `scene_questions`, as class indices in the same order."""
    said = {"relation": scene.relation, "background": scene.background}
    for i, thing in enumerate(scene.things):
        said |= {f"{name} {i}": getattr(thing, name) for name in ("colour", "kind", "size")}
    return [answers.index(said.get(q) or NOTHING) for q, answers in scene_questions().items()]


def train_text_encoder(run: Run) -> None:
    """Trains T5 on text alone: a linear head on every token must tell the whole scene.

    PixArt takes a T5 that has read much text and freezes it. This is the same idea at this scale,
    and the DiT that reads these features learns about five times faster for it. Each token also
    tells whether it stands behind the relation: without that hint the encoder stayed for hundreds
    of steps at knowing all words but not which belong to which thing.
    """
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(run.folder / "tokenizer")
    encoder = make_text_encoder(len(tokenizer))
    questions = scene_questions()
    sizes = [*(len(answers) for answers in questions.values()), 2]
    head = torch.nn.Linear(encoder.config.d_model, sum(sizes))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    parts = {"model": encoder, "head": head, "optimizer": optimizer}
    run.resume(**parts)
    for step, done in run.loop(lambda: run.save(**parts)):
        set_learning_rate(optimizer, warmup_cosine(done))
        rng = np.random.default_rng((SEED, 5, step))
        captions = [scene_and_caption(rng)[1] for _ in range(64)]
        tokens = tokenizer(captions, padding=True, return_tensors="pt", return_offsets_mapping=True)
        features = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        valid = tokens.attention_mask.bool()
        answers = torch.tensor([scene_answers(scenes.parse_caption(c)) for c in captions])
        relation = torch.tensor([scenes.relation_position(c) for c in captions])
        behind = (tokens.offset_mapping[..., 0] >= relation[:, None]).long()
        targets = [*answers[:, :, None].expand(-1, -1, valid.shape[1]).unbind(1), behind]
        loss, right = 0.0, []
        for logit, target in zip(head(features).split(sizes, dim=-1), targets, strict=True):
            loss = loss + F.cross_entropy(logit[valid], target[valid]) / len(sizes)
            right.append((logit[valid].argmax(-1) == target[valid]).float().mean().item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            tqdm.write(f"text step {step} loss {loss.item():.4f} worst question {min(right):.3f}")
    if run.step == run.steps:
        encoder.save_pretrained(run.folder / "text_encoder")
        run.finish(accuracy=round(float(np.mean(right)), 4))


# ----------------------------------------------------------------------------------------------
# Stage: latents, computed once
# ----------------------------------------------------------------------------------------------

CHUNK = 200
LATENT_SETS = {  # (height, width): pictures; PixArt's curriculum goes from 128² to 256² and bins
    (128, 128): 12_000,
    (256, 256): 4_800,
    (224, 288): 800,
    (288, 224): 800,
    (192, 336): 800,
    (336, 192): 800,
}
LONGER_SETS = {size: 12_000 if size == (256, 256) else 1_200 for size in [(256, 256), *BINS]}
BINS_SETS = {size: 12_000 if size == (256, 256) else 4_000 for size in [(256, 256), *BINS]}
# What a patch shows: question → answers, the last of them meaning that no thing is there.
PATCH_QUESTIONS = {
    "kind": len(scenes.KINDS) + 1,
    "colour": len(scenes.COLOURS) + 1,
    "size": len(scenes.SIZES) + 1,
    "dx": 13,
    "dy": 13,
}


def patch_labels(
    scene: scenes.Scene, layout: list[scenes.Placement], height: int, width: int
) -> torch.Tensor:
    """What each of the DiT's patches shows, (patches, questions): see `PATCH_QUESTIONS`.

    dx and dy are the distance from the thing's centre in patches; a thing's box includes what its
    light and shadow touch.
    """
    patch = scenes.RASTER
    y, x = np.mgrid[patch // 2 : height : patch, patch // 2 : width : patch].reshape(2, -1)
    labels = np.tile([size - 1 for size in PATCH_QUESTIONS.values()], (len(x), 1))
    short = min(height, width)
    for thing, at in zip(scene.things, layout, strict=True):
        dx, dy = (x - at.x * short) / patch, (y - at.y * short) / patch
        inside = np.maximum(abs(dx), abs(dy)) < at.radius * short / patch + 1
        shown = [
            [*scenes.KINDS].index(thing.kind),
            [*scenes.COLOURS].index(thing.colour),
            [*scenes.SIZES].index(thing.size),
        ]
        labels[inside, :3] = shown
        labels[inside, 3] = np.clip(np.floor(dx[inside]) + 6, 0, 11)
        labels[inside, 4] = np.clip(np.floor(dy[inside]) + 6, 0, 11)
    return torch.from_numpy(labels.astype(np.int8))


def make_latents(run: Run, sets: dict[tuple[int, int], int] = LATENT_SETS) -> None:
    """Encodes pictures with the finished VAE, a process a core; what is there is kept."""
    chunks = [(h, w, i) for (h, w), count in sets.items() for i in range(count // CHUNK)]
    missing = [chunk for chunk in chunks if not chunk_file(*chunk).is_file()]
    chunk_file(0, 0, 0).parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(initializer=_one_thread) as workers:
        results = workers.imap_unordered(_latents_job, missing)
        for _ in tqdm(results, run.name, len(chunks), initial=len(chunks) - len(missing)):
            if time.monotonic() > run.deadline:
                return
    run.finish(pictures=sum(sets.values()))


def make_more_latents(run: Run) -> None:
    """For the longest stage: the same pictures of 256² and the bins, and more of them."""
    make_latents(run, LONGER_SETS)


def make_bins_latents(run: Run) -> None:
    """For the last DiT stage: more pictures of each bin."""
    make_latents(run, BINS_SETS)


def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def _finished_vae() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(STATE / "vae" / "vae")
    return vae.to(memory_format=torch.channels_last)


def _latents_job(chunk: tuple[int, int, int]) -> None:
    """Writes one chunk: latents, two captions a picture, and what each patch shows."""
    height, width, index = chunk
    rng = np.random.default_rng((SEED, 6, height, width, index))
    saved = {"latents": [], "captions": [], "labels": []}
    for _ in range(CHUNK // 8):
        group = []
        for _ in range(8):
            scene = scenes.sample_training_scene(rng)
            layout = scenes.place(scene, height, width, rng)
            group.append(scenes.paint(scene, layout, height, width))
            saved["captions"].append([training_caption(scene, rng) for _ in range(2)])
            saved["labels"].append(patch_labels(scene, layout, height, width))
        pictures = to_tensor(group).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            saved["latents"].append(encode(_finished_vae(), pictures).half())
    saved["latents"] = torch.cat(saved["latents"]).contiguous()
    saved["labels"] = torch.stack(saved["labels"])
    file = chunk_file(*chunk)
    torch.save(saved, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)


def chunk_file(height: int, width: int, index: int) -> Path:
    return STATE / "latents" / f"{height}x{width}-{index:03d}.pt"


@dataclass
class LatentSet:
    """Pictures of one size as the DiT sees them, and their captions as the text encoder does."""

    latents: torch.Tensor  # (N, 4, H/8, W/8) float16
    labels: torch.Tensor  # (N, patches, questions) int8
    features: torch.Tensor  # (N, 2, L, width) float16: two captions a picture
    masks: torch.Tensor  # (N, 2, L)

    @classmethod
    def load(cls, height: int, width: int, count: int, condition: Conditioner) -> LatentSet:
        files = [chunk_file(height, width, i) for i in range(count // CHUNK)]
        chunks = [torch.load(file, weights_only=True) for file in files]
        texts = [condition([*itertools.chain(*chunk["captions"])]) for chunk in chunks]
        return cls(
            torch.cat([chunk["latents"] for chunk in chunks]),
            torch.cat([chunk["labels"] for chunk in chunks]),
            torch.cat([features.half() for features, _ in texts]).unflatten(0, (-1, 2)),
            torch.cat([mask for _, mask in texts]).unflatten(0, (-1, 2)),
        )

    def batch(self, count: int, rng: np.random.Generator, nothing: tuple) -> tuple:
        """`count` pictures: latents, labels, text features and masks, some of them `nothing`'s."""
        drawn, which = rng.integers(len(self.latents), size=count), rng.integers(2, size=count)
        features, masks = self.features[drawn, which].float(), self.masks[drawn, which]
        dropped = torch.from_numpy(rng.random(count) < CAPTION_DROPOUT)
        features[dropped], masks[dropped] = nothing
        return self.latents[drawn].float(), self.labels[drawn], features, masks


# ----------------------------------------------------------------------------------------------
# Stage: DiT, at 128² and then at 256² with the aspect bins
# ----------------------------------------------------------------------------------------------

CAPTION_DROPOUT = 0.1
SECOND_TASK = 0.1  # weight of the second task's loss, see `Denoiser`
CAPTION_TOKENS = 32  # more than any caption has; one length, so that shapes stay the same


class Conditioner:
    """The frozen text encoder as the DiT sees it."""

    def __init__(self) -> None:
        folder = STATE / "text"
        self.tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = T5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, L, 192) and mask (B, L); padding is masked, so any L gives the same DiT."""
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt"
        )
        features = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return features, tokens.attention_mask


class Denoiser(torch.nn.Module):
    """PixArt's transformer on patches instead of pictures, with a second task for its middle.

    Training alone needs this. Patches in and out leave a compiled graph that knows only how many
    there are. The second task – say for each patch what thing is there, and where in it the patch
    lies (`PATCH_QUESTIONS`) – teaches the middle of the network what to paint long before the
    velocity's error does, as aligning it with a pretrained encoder does in REPA (Yu et al. 2024).
    """

    def __init__(self, transformer: PixArtTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.norm = torch.nn.LayerNorm(width)
        self.answers = torch.nn.Linear(width, sum(PATCH_QUESTIONS.values()))
        self.middle = len(transformer.transformer_blocks) * 5 // 8

    def forward(self, patches, positions, features, mask, timestep):
        """(B, P, 16) noisy patches → their velocity (B, P, 16), answers (B, P, sum of questions).

        `positions` (1, P, width) is PatchEmbed's table for the picture's size.
        """
        dit = self.transformer
        hidden = F.linear(patches, dit.pos_embed.proj.weight.flatten(1), dit.pos_embed.proj.bias)
        hidden = hidden + positions
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
        # The transformer's output goes (row, column, channel), its variance channels unused.
        output = output.unflatten(-1, (2, 2, -1))[..., :4].permute(0, 1, 4, 2, 3)
        return output.flatten(2), answers


def to_patches(latents: torch.Tensor) -> torch.Tensor:
    """(B, 4, H, W) → (B, H/2 · W/2, 16), channel by channel as PatchEmbed's convolution reads."""
    return F.unfold(latents, 2, stride=2).transpose(1, 2)


@torch.no_grad()
def position_table(transformer: PixArtTransformer2DModel, height: int, width: int) -> torch.Tensor:
    """What PatchEmbed adds to the patches of a (height, width) latent: (1, patches, width)."""
    embed = transformer.pos_embed
    return embed(torch.zeros(1, 4, height, width)) - embed.proj.bias


def draw_timesteps(batch: int, rng: np.random.Generator) -> torch.Tensor:
    """Timesteps where the picture is decided: logit-normal around 525, every sixth uniform.

    Esser et al. 2024 for rectified flows; a thing's kind shows through the noise of PixArt's
    linear schedule from about 600 downwards.
    """
    drawn = 1 / (1 + np.exp(-0.1 - rng.standard_normal(batch)))
    drawn = np.where(rng.random(batch) < 1 / 6, rng.random(batch), drawn)
    return torch.from_numpy((drawn * 1000).astype(np.int64).clip(0, 999))


THING_WEIGHT = 3.0  # in the loss, of a patch that shows a thing, from 1.0 for backdrop
DECIDED = 600  # … at timesteps below this; above it, where things stand is still open, and weights
# that depend on the answer would teach the model to paint more thing than there is


def diffusion_loss(denoise, alphas, positions, batch, rng, *, thing_weight: float = 1.0) -> tuple:
    """Mean squared error of the velocity, v = α·noise − σ·latents, and the second task's loss."""
    latents, labels, features, mask = batch
    timestep = draw_timesteps(len(latents), rng)
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    alpha = alphas[timestep].sqrt()[:, None, None, None]
    sigma = (1 - alphas[timestep]).sqrt()[:, None, None, None]
    noisy, target = alpha * latents + sigma * noise, alpha * noise - sigma * latents
    # Plain attention: torch's fused one is the slower of the two on a CPU with so few tokens.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity, answers = denoise(to_patches(noisy), positions, features, mask, timestep)
    split = answers.float().split([*PATCH_QUESTIONS.values()], dim=-1)
    asked = [
        F.cross_entropy(answer.flatten(0, 1), label.flatten().long())
        for answer, label in zip(split, labels.unbind(-1), strict=True)
    ]
    error = (velocity.float() - to_patches(target)).square().mean(-1)  # (B, patches)
    weighed = (labels[..., 0] < len(scenes.KINDS)) & (timestep[:, None] < DECIDED)
    weight = torch.where(weighed, thing_weight, 1.0)
    return (weight * error).sum() / weight.sum(), sum(asked) / len(asked)


def make_optimizers(denoiser: Denoiser, lr: float) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    blocks = denoiser.transformer.transformer_blocks
    inside = [p for p in blocks.parameters() if p.ndim == 2 and len(p) > 6]
    chosen = {id(p) for p in inside}
    rest = [p for p in denoiser.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(inside, 1.5 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.01)


def train_transformer(
    run: Run,
    share: Callable[[float], dict[tuple[int, int], float]],
    lr: float,
    start: Path | None,
    *,
    pictures: dict[tuple[int, int], int] = LATENT_SETS,
    thing_weight: float = 1.0,
    batch: int = 16,
    draws: tuple[int, ...] = (),
) -> None:
    """Trains the DiT on cached latents.

    Each step draws one picture size; `share` tells how often which, by how much of the stage is
    done. Every step sees about as many patches: `batch` pictures of 256², four times as many of
    128². `draws` is part of the seed.
    """
    torch.manual_seed(SEED)
    transformer = make_transformer()
    if start is not None:
        transformer = PixArtTransformer2DModel.from_pretrained(start / "transformer")
    denoiser = Denoiser(transformer)
    if start is not None and (start / "answers.pt").is_file():
        heads = torch.load(start / "answers.pt", weights_only=True)
        denoiser.load_state_dict(heads, strict=False)
    muon, adamw = make_optimizers(denoiser, lr)
    ema = EMAModel(transformer.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
    parts = {"model": denoiser, "muon": muon, "adamw": adamw, "ema": ema}
    run.resume(**parts)
    condition = Conditioner()
    nothing = tuple(tensor[0] for tensor in condition([""]))
    sets = {size: LatentSet.load(*size, pictures[size], condition) for size in share(0)}
    positions = {size: position_table(transformer, *(n // 8 for n in size)) for size in sets}
    alphas = make_scheduler().alphas_cumprod
    denoise = torch.compile(denoiser, dynamic=False)
    seed = (SEED, 7, len(sets), *draws)
    errors = []
    for step, done in run.loop(lambda: run.save(**parts), every=500):
        for optimizer in (muon, adamw):
            set_learning_rate(optimizer, warmup_cosine(done))
        rng = np.random.default_rng((*seed, step))
        weights = np.array([*share(done).values()])
        size = [*sets][rng.choice(len(sets), p=weights / weights.sum())]
        drawn = sets[size].batch(4 * batch if size == (128, 128) else batch, rng, nothing)
        loss, asked = diffusion_loss(
            denoise, alphas, positions[size], drawn, rng, thing_weight=thing_weight
        )
        denoiser.zero_grad()
        (loss + SECOND_TASK * asked).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        muon.step()
        adamw.step()
        ema.step(transformer.parameters())
        errors.append((loss.item(), asked.item(), size == (128, 128)))
        if step % 100 == 99:
            recent = np.array(errors[-100:])
            for small, name in ((1, "128²"), (0, "256²")):
                if len(these := recent[recent[:, 2] == small]):
                    means = "loss {:.4f} second {:.4f}".format(*these.mean(0))
                    tqdm.write(f"{run.name} step {step + 1} {name} {means}")
    heads = {k: v for k, v in denoiser.state_dict().items() if not k.startswith("transformer.")}
    torch.save(heads, run.folder / "answers.pt")
    ema.copy_to(transformer.parameters())
    transformer.save_pretrained(run.folder / "transformer")
    if run.step == run.steps:
        run.finish(loss=round(float(np.mean(errors[-200:] or [[math.nan]], axis=0)[0]), 4))


def train_dit_128(run: Run) -> None:
    train_transformer(run, lambda done: {(128, 128): 1.0}, lr=1.2e-3, start=None)


def train_dit_256(run: Run) -> None:
    """256² and the aspect bins, with ever fewer pictures of 128² between: they teach what goes
    where, four for the price of one."""

    def share(done: float) -> dict[tuple[int, int], float]:
        bins = dict.fromkeys(BINS, 0.07)
        small = 0.75 * max(0, 1 - done / 0.8)
        large = {(256, 256): 0.72, **bins}
        return {(128, 128): small} | {size: (1 - small) * p for size, p in large.items()}

    train_transformer(run, share, lr=1.2e-3, start=STATE / "dit-128")


def train_dit_finish(run: Run) -> None:
    """256² and the bins alone, with a learning rate that falls from the middle to nothing."""
    sizes = {(256, 256): 0.8} | dict.fromkeys(BINS, 0.05)
    train_transformer(run, lambda done: sizes, lr=9e-4, start=STATE / "dit-256")


def train_on(
    run: Run,
    sizes: dict[tuple[int, int], float],
    lr: float,
    start: str,
    pictures: dict[tuple[int, int], int],
    draws: int,
) -> None:
    """One of the late stages: picture sizes in fixed shares, and outlines count triple."""
    train_transformer(
        run,
        lambda done: sizes,
        lr,
        STATE / start,
        pictures=pictures,
        thing_weight=THING_WEIGHT,
        batch=32,
        draws=(draws,),
    )


def train_dit_longer(run: Run) -> None:
    """Once more from a high learning rate to nothing, on more pictures."""
    sizes = {(256, 256): 0.76} | dict.fromkeys(BINS, 0.06)
    train_on(run, sizes, 1.2e-3, "dit-finish", LONGER_SETS, draws=11)


def train_dit_bins(run: Run) -> None:
    """Mostly the aspect bins: each stretches PatchEmbed's positions its own way (see
    `position_table`), so that a shape learned in one has to be learned again in the next."""
    sizes = {(256, 256): 0.28} | dict.fromkeys(BINS, 0.18)
    train_on(run, sizes, 1e-3, "dit-longer", BINS_SETS, draws=8)


def train_dit_wide(run: Run) -> None:
    """Mostly what was still behind: 4:3, and then 9:16."""
    sizes = dict(zip([(256, 256), *BINS], (0.2, 0.4, 0.08, 0.12, 0.2), strict=True))
    train_on(run, sizes, 7e-4, "dit-bins", BINS_SETS, draws=8)


def average_dits(run: Run) -> None:
    """The mean of the last two stages' weights: better at nearly every shape than either.

    What a stage gains in one bin it loses a little in others; between two points on one way down,
    the mean keeps most of both (Wortsman et al. 2022, "model soups").
    """
    mean, other = (
        PixArtTransformer2DModel.from_pretrained(STATE / name / "transformer")
        for name in ("dit-bins", "dit-wide")
    )
    with torch.no_grad():
        for one, two in zip(mean.parameters(), other.parameters(), strict=True):
            one.copy_((one + two) / 2)
    mean.save_pretrained(run.folder / "transformer")
    run.finish()


# ----------------------------------------------------------------------------------------------
# The finished DiT, in OpenVINO
# ----------------------------------------------------------------------------------------------

TEACHER = STATE / "dit-mean" / "transformer"
GUIDANCE_SCALE = 4.5


@cache  # the same for every size and stage
def compile_teacher():
    """The DiT as a function of its inputs, several times as fast as in torch."""
    from ov_pixart_helper import convert_transformer, ov

    teacher = PixArtTransformer2DModel.from_pretrained(TEACHER)
    folder = convert_transformer(teacher.eval(), STATE / "teacher")
    return ov.Core().compile_model(folder / "openvino_model.xml", "CPU")


def guided(
    velocity, latents: torch.Tensor, timestep: int, conditions: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The guided velocity; `conditions` are features and masks, of the empty captions first."""
    output = velocity(
        {
            "hidden_states": torch.cat([latents, latents]).numpy(),
            "timestep": np.full(2 * len(latents), timestep, np.float32),
            "encoder_hidden_states": conditions[0].numpy(),
            "encoder_attention_mask": conditions[1].numpy(),
        }
    )["sample"]
    without, given = torch.from_numpy(output[:, :4]).chunk(2)
    return without + GUIDANCE_SCALE * (given - without)


# ----------------------------------------------------------------------------------------------
# Stage: the VAE's decoder, polished for the latents as they are
# ----------------------------------------------------------------------------------------------


def polish_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 that weighs things, surroundings and backdrops about alike: no halos, no blotches.

    The picture's edge counts more, for zero padding leaves a frame there, seen best on navy.
    """
    vivid = target.amax(1, keepdim=True) - target.amin(1, keepdim=True)
    near = F.max_pool2d((vivid > 0.5).float(), 31, 1, 15)
    frame = F.pad(torch.zeros_like(vivid[..., 3:-3, 3:-3]), (3, 3, 3, 3), value=1)
    error = output - target
    pooled = F.avg_pool2d(error, 4)
    return ((1 + 2 * near + vivid + 5 * frame) * error.abs()).mean() + 2 * (
        (1 + 2 * F.avg_pool2d(near, 4)) * pooled.abs()
    ).mean()


def polish_decoder(
    run: Run,
    start: Path,
    lr: float,
    draw: Callable[[AutoencoderKL, int], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Trains the decoder on, the encoder frozen: cached latents and the DiT stay valid.

    `draw(vae, step)` returns latents (N, 4, H/8, W/8) and the pictures (N, 3, H, W) they stand for.
    """
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(start).to(memory_format=torch.channels_last)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMAModel(trained, decay=0.998, use_ema_warmup=True, power=0.75)
    parts = {"model": vae, "optimizer": optimizer, "ema": ema}
    run.resume(**parts)
    losses = []
    for step, done in run.loop(lambda: run.save(**parts)):
        set_learning_rate(optimizer, warmup_cosine(done))
        with torch.autocast("cpu", torch.bfloat16):
            latents, pictures = draw(vae, step)
            output = vae.decoder(vae.post_quant_conv(latents)).float()
        loss = polish_loss(output, pictures)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.step(trained)
        losses.append(loss.item())
        if step % 100 == 99:
            tqdm.write(f"{run.name} step {step + 1} loss {np.mean(losses[-100:]):.4f}")
    if run.step == run.steps:
        ema.copy_to(trained)
        vae.save_pretrained(run.folder / "vae")
        run.finish(psnr_db=round(vae_psnr(vae), 2))


def train_decoder(run: Run) -> None:
    """On the encoder's latents, with some noise."""
    pool = render_pool({(128, 128): 3000, (256, 256): 2500} | dict.fromkeys(BINS, 300))

    def draw(vae: AutoencoderKL, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = vae_batch(step, pool).to(memory_format=torch.channels_last)
        latents = encode(vae, pictures).float()
        noise = POSTERIOR_STD * torch.rand(len(latents), 1, 1, 1)
        return latents + noise * torch.randn_like(latents), pictures

    polish_decoder(run, STATE / "vae" / "vae", 1e-3, draw)


PAINTED = {(256, 256): 1000} | dict.fromkeys(BINS, 100)
ALMOST_CLEAN = 300  # timestep below which the DiT no longer changes what is where


def train_decoder_dit(run: Run) -> None:
    """On latents as the DiT leaves them: the decoder learns to see through its typical slips.

    Pictures are encoded, noised a little and cleaned by the DiT in one guided step. What it gets
    wrong then (a weave on backdrops, rough edges) is what it gets wrong when it paints, but here
    the right answer is known.
    """
    file = run.folder / "painted.pt"
    if not file.is_file():
        run.folder.mkdir(parents=True, exist_ok=True)
        torch.save({size: painted_latents(*size, n) for size, n in PAINTED.items()}, file)
    sets = torch.load(file, weights_only=True)
    sizes = np.array([*PAINTED.values()]) / sum(PAINTED.values())

    def draw(vae: AutoencoderKL, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((SEED, 12, step))
        size = [*sets][rng.choice(len(sets), p=sizes)]
        latents, pictures = sets[size]  # (N, 3, 4, H/8, W/8): three versions of each picture
        drawn, crop = rng.integers(len(pictures), size=4), size == (256, 256) and rng.random() < 0.6
        drawn = drawn if crop else drawn[:1]
        latents = latents[drawn, rng.integers(latents.shape[1], size=len(drawn))].float()
        pictures = to_tensor(pictures[drawn].numpy())
        if crop:
            y, x = 2 * rng.integers(9, size=2)
            latents = latents[..., y : y + 16, x : x + 16]
            pictures = pictures[..., 8 * y : 8 * y + 128, 8 * x : 8 * x + 128]
        layout = {"memory_format": torch.channels_last}
        return latents.contiguous(**layout), pictures.contiguous(**layout)

    polish_decoder(run, STATE / "decoder" / "vae", 5e-4, draw)


@torch.no_grad()
def painted_latents(height: int, width: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, 4, H/8, W/8) latents: the encoder's with noise, the DiT's, twice; and the pictures."""
    velocity, condition = compile_teacher(), Conditioner()
    vae, alphas = (
        AutoencoderKL.from_pretrained(STATE / "vae" / "vae"),
        make_scheduler().alphas_cumprod,
    )
    rng = np.random.default_rng((SEED, 13, height, width))
    versions, pictures = [], []
    for _ in tqdm(range(count // 10), f"painting {width}×{height}", mininterval=10):
        drawn, captions = zip(*(scene_and_caption(rng) for _ in range(10)), strict=True)
        group = [scenes.render(scene, height, width, rng) for scene in drawn]
        clean = encode(vae, to_tensor(group))
        conditions = condition([""] * len(captions) + [*captions])

        def noise(like=clean):
            return torch.from_numpy(rng.standard_normal(like.shape, dtype=np.float32))

        made = [clean + POSTERIOR_STD / 2 * noise()]
        for _ in range(2):
            timestep = int(rng.integers(20, ALMOST_CLEAN))
            alpha, sigma = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
            noisy = alpha * clean + sigma * noise()
            made.append(alpha * noisy - sigma * guided(velocity, noisy, timestep, conditions))
        versions.append(torch.stack(made, 1).half())
        pictures.append(torch.from_numpy(np.stack(group)))
    return torch.cat(versions), torch.cat(pictures)


# ----------------------------------------------------------------------------------------------
# Stages: a twin that needs four steps
# ----------------------------------------------------------------------------------------------

LCM_TIMESTEPS = (999, 759, 499, 259)  # where diffusers' LCMScheduler stops in four steps
SOLVER_STEPS = 4  # of the teacher, from each of them to the next
CHAINS = {(256, 256): 600} | dict.fromkeys(BINS, 60)
CHAIN_CHUNK = 20
# A chain's i-th trajectory starts at the i-th stop: all (stop passed, trajectory) pairs, in order.
CHAIN_POINTS = [(stop, i) for i in range(len(LCM_TIMESTEPS)) for stop in range(i, 4)]


def make_lcm_scheduler() -> LCMScheduler:
    """Latent consistency sampling (Luo et al. 2023) over the teacher's noise schedule."""
    teacher = make_scheduler().config
    return LCMScheduler(
        beta_schedule=teacher.beta_schedule,
        beta_start=teacher.beta_start,
        beta_end=teacher.beta_end,
        prediction_type=teacher.prediction_type,
    )


def make_trajectories(run: Run) -> None:
    """Follows the teacher, in OpenVINO, from wherever the twin will stand to the picture.

    `LCMScheduler` predicts the picture, noises that afresh for the next stop, and predicts again.
    A chain does the same with the teacher's whole trajectories in place of predictions, so that
    the twin is taught on just what it will meet.
    """
    velocity, condition = compile_teacher(), Conditioner()
    run.folder.mkdir(parents=True, exist_ok=True)
    chunks = [(h, w, i) for (h, w), n in CHAINS.items() for i in range(n // CHAIN_CHUNK)]
    run.steps = len(chunks)
    while run.step < run.steps and chain_file(*chunks[run.step]).is_file():
        run.step += 1
    for step, _ in run.loop(lambda: None):
        height, width, index = chunks[step]
        rng = np.random.default_rng((SEED, 8, height, width, index))
        captions = [scene_and_caption(rng)[1] for _ in range(CHAIN_CHUNK)]
        saved = follow_chain(velocity, captions, height // 8, width // 8, condition, rng)
        file = chain_file(*chunks[step])
        torch.save(saved | {"captions": captions}, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
    if run.step == run.steps:
        run.finish(chains=sum(CHAINS.values()))


def chain_file(height: int, width: int, index: int) -> Path:
    return STATE / "trajectories" / f"{height}x{width}-{index:03d}.pt"


def follow_chain(
    velocity, captions: list[str], height: int, width: int, condition: Conditioner, rng
) -> dict[str, torch.Tensor]:
    """One chain a caption: `points` (B, 10, 4, H, W) by `CHAIN_POINTS`, `ends` (B, 4, 4, H, W)."""
    alphas = make_scheduler().alphas_cumprod
    conditions = condition([""] * len(captions) + captions)
    points, ends = [], []
    end = torch.zeros(len(captions), 4, height, width)  # all is noise at the first stop
    for i, timestep in enumerate(LCM_TIMESTEPS):
        noise = torch.from_numpy(rng.standard_normal(end.shape, dtype=np.float32))
        start = alphas[timestep].sqrt() * end + (1 - alphas[timestep]).sqrt() * noise
        passed, end = follow_teacher(velocity, noise if i == 0 else start, i, conditions)
        points += passed
        ends.append(end)
    return {"points": torch.stack(points, 1).half(), "ends": torch.stack(ends, 1).half()}


def follow_teacher(
    velocity, latents: torch.Tensor, stop: int, conditions: tuple[torch.Tensor, torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The latents at this stop and all later ones, and at the end; with guidance.

    Without fresh noise: from one starting point the twin can learn to foresee one end.
    """
    scheduler = make_scheduler("dpmsolver++")
    scheduler.set_timesteps(
        timesteps=[
            round(start + (end - start) * k / SOLVER_STEPS)
            for start, end in itertools.pairwise([*LCM_TIMESTEPS[stop:], 0])
            for k in range(SOLVER_STEPS)
        ]
    )
    points = []
    for step, timestep in enumerate(scheduler.timesteps):
        if step % SOLVER_STEPS == 0:
            points.append(latents)
        predicted = guided(velocity, latents, timestep.item(), conditions)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return points, latents


def train_lcm(run: Run) -> None:
    """Teaches the twin to jump from each stop to its trajectory's end; guidance is baked in.

    A consistency model (Song et al. 2023) learned from whole trajectories: they fit a small
    machine's memory, and a target that is the teacher's own needs no second network.
    """
    torch.manual_seed(SEED)
    transformer = PixArtTransformer2DModel.from_pretrained(TEACHER)
    denoiser = Denoiser(transformer)
    muon, adamw = make_optimizers(denoiser, lr=6e-4)
    ema = EMAModel(transformer.parameters(), decay=0.995, use_ema_warmup=True, power=0.75)
    parts = {"model": denoiser, "muon": muon, "adamw": adamw, "ema": ema}
    run.resume(**parts)
    sets = {}
    for size, count in CHAINS.items():
        files = [chain_file(*size, i) for i in range(count // CHAIN_CHUNK)]
        chunks = [torch.load(file, weights_only=True) for file in files]
        points, ends = (torch.cat([chunk[name] for chunk in chunks]) for name in ("points", "ends"))
        sets[size] = points, ends, [caption for chunk in chunks for caption in chunk["captions"]]
    condition, alphas = Conditioner(), make_scheduler().alphas_cumprod
    positions = {size: position_table(transformer, *(n // 8 for n in size)) for size in sets}
    denoise = torch.compile(denoiser, dynamic=False)
    sizes = np.array([*CHAINS.values()]) / sum(CHAINS.values())
    starts = np.array([2.0 if stop == i else 1.0 for stop, i in CHAIN_POINTS])
    errors = []
    for step, done in run.loop(lambda: run.save(**parts)):
        for optimizer in (muon, adamw):
            set_learning_rate(optimizer, warmup_cosine(done))
        rng = np.random.default_rng((SEED, 9, step))
        size = [*sets][rng.choice(len(sets), p=sizes)]
        points, ends, captions = sets[size]
        drawn = rng.integers(len(points), size=32)
        which = rng.choice(len(starts), size=32, p=starts / starts.sum())
        stop, trajectory = np.array(CHAIN_POINTS)[which].T
        latents, end = points[drawn, which].float(), ends[drawn, trajectory].float()
        timestep = torch.tensor(LCM_TIMESTEPS)[stop]
        features, mask = condition([captions[i] for i in drawn])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity, _ = denoise(to_patches(latents), positions[size], features, mask, timestep)
        alpha = alphas[timestep].sqrt()[:, None, None]
        sigma = (1 - alphas[timestep]).sqrt()[:, None, None]
        predicted = alpha * to_patches(latents) - sigma * velocity.float()
        loss = F.mse_loss(predicted, to_patches(end))
        denoiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        muon.step()
        adamw.step()
        ema.step(transformer.parameters())
        errors.append(loss.item())
        if step % 100 == 99:
            tqdm.write(f"lcm step {step + 1} loss {np.mean(errors[-100:]):.4f}")
    if run.step == run.steps:
        ema.copy_to(transformer.parameters())
        transformer.save_pretrained(run.folder / "transformer")
        run.finish(loss=round(float(np.mean(errors[-200:] or [math.nan])), 4))


# ----------------------------------------------------------------------------------------------
# Stage: export
# ----------------------------------------------------------------------------------------------


def export(run: Run) -> None:
    """Writes the checkpoint in diffusers layout, fp16 safetensors, keeping its model card."""
    condition = Conditioner()
    pipeline = PixArtAlphaPipeline(
        tokenizer=condition.tokenizer,
        text_encoder=condition.encoder,
        vae=AutoencoderKL.from_pretrained(STATE / "decoder-dit" / "vae"),
        transformer=PixArtTransformer2DModel.from_pretrained(TEACHER),
        scheduler=make_scheduler(),
    ).to(torch.float16)
    pipeline.save_pretrained(CHECKPOINT, safe_serialization=True)
    shutil.copy(STATE / "text" / "tokenizer" / "spiece.model", CHECKPOINT / "tokenizer")
    if (STATE / "lcm" / "transformer").is_dir():
        twin = PixArtTransformer2DModel.from_pretrained(STATE / "lcm" / "transformer")
        twin.to(torch.float16).save_pretrained(LCM_CHECKPOINT / "transformer")
        make_lcm_scheduler().save_pretrained(LCM_CHECKPOINT / "scheduler")
    run.finish()


def restore() -> None:
    """Unpacks assets/pixart-tiny as the finished stages it came from: optimizers start afresh."""
    models = {  # stage and folder ← the checkpoint's
        "text/tokenizer": "tokenizer",
        "text/text_encoder": "text_encoder",
        "vae/vae": "vae",
        "dit-mean/transformer": "transformer",
        "decoder/vae": "vae",
        "decoder-dit/vae": "vae",
    }
    for target, source in models.items():
        shutil.copytree(CHECKPOINT / source, STATE / target, dirs_exist_ok=True)
    dits = ("dit-128", "dit-256", "dit-finish", "dit-longer", "dit-bins", "dit-wide", "dit-mean")
    for name in ("text", "vae", "latents", *dits, "decoder", "decoder-dit"):
        Run(name, 0, math.inf).finish(restored_from=CHECKPOINT.as_posix())


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Callable[[Run], None], int]] = {
    "text": (train_text_encoder, 1000),
    "vae": (train_vae, 3000),
    "latents": (make_latents, 0),
    "dit-128": (train_dit_128, 1000),
    "dit-256": (train_dit_256, 4000),
    "dit-finish": (train_dit_finish, 1800),
    "latents-longer": (make_more_latents, 0),
    "dit-longer": (train_dit_longer, 4500),
    "latents-bins": (make_bins_latents, 0),
    "dit-bins": (train_dit_bins, 4200),
    "dit-wide": (train_dit_wide, 1300),
    "dit-mean": (average_dits, 0),
    "decoder": (train_decoder, 1500),
    "decoder-dit": (train_decoder_dit, 1200),
    "trajectories": (make_trajectories, 0),
    "lcm": (train_lcm, 750),
    "export": (export, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="default: all, in order")
    parser.add_argument("--minutes", type=float, default=math.inf, help="length of this segment")
    parser.add_argument(
        "--from-checkpoint", action="store_true", help="rebuild build/training/ from assets/"
    )
    arguments = parser.parse_args()
    if arguments.from_checkpoint:
        restore()
    deadline = time.monotonic() + 60 * arguments.minutes
    for name in arguments.stages or STAGES:
        function, steps = STAGES[name]
        run = Run(name, steps, deadline)
        if run.finished:
            print(f"{name}: finished before")
            continue
        started = time.monotonic()
        function(run)
        print(f"{name}: step {run.step} of {steps}, {(time.monotonic() - started) / 60:.1f} min")
        if not run.finished:
            break


if __name__ == "__main__":
    main()
