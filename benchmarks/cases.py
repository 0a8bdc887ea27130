"""Cases, engines and sizes of the benchmark: the tables that the command line chooses from."""

import re
from dataclasses import dataclass, field
from typing import Any

# ---- cases and engines --------------------------------------------------------------------------

XL_512 = "PixArt-XL-2-512x512"
# Its transformer has the layout of PixArt-XL-2-1024-MS's; only the weights and the scheduler
# differ. Four steps without guidance make calibration at 1024² ten times shorter.
XL_1024 = "PixArt-LCM-XL-2-1024-MS"
T5_XXL = "T5-v1.1-XXL"


@dataclass(frozen=True)
class Case:
    """One measurement. `kind` is the component that runs, "image" for all three, or "convert"."""

    name: str
    kind: str  # "dit", "vae", "t5", "image", "convert"
    checkpoint: str
    summary: str
    pixels: int = 512
    steps: int = 1
    guidance: float = 0.0


CASES = {
    case.name: case
    for case in (
        Case("dit_step_512", "dit", XL_512, "One step of the DiT at 512²"),
        Case("dit_step_1024", "dit", XL_1024, "One step of the DiT at 1024²", 1024),
        Case("vae_decode_512", "vae", XL_512, "VAE decoder at 512²"),
        Case("vae_decode_1024", "vae", XL_512, "VAE decoder at 1024²", 1024),
        Case("t5_encode_120", "t5", T5_XXL, "T5-XXL encoder, 30 tokens padded to 120"),
        Case("image_512_4step", "image", XL_512, "An image of 512² in 4 steps (LCM)", steps=4),
        Case(
            "image_512_20step_cfg",
            "image",
            XL_512,
            "An image of 512² in 20 steps with guidance",
            steps=20,
            guidance=4.5,
        ),
        Case("convert_dit", "convert", XL_1024, "Conversion of the DiT (1024-MS)", 1024),
        Case("convert_t5", "convert", T5_XXL, "Conversion of the T5-XXL encoder"),
    )
}

TORCH = ("torch-fp32", "torch-bf16", "torch-compile-bf16")
OPENVINO = ("ov-fp16", "ov-int8-weights", "ov-int8", "ov-int4", "ov-hybrid")
# The conversion of the published notebook: traced at the model's own size, in float32.
PUBLISHED_RECIPE = "published-recipe"


@dataclass(frozen=True)
class Variant:
    """Another way to generate an image with the weights of `engine`. `steps`: 0 for the case's."""

    engine: str
    steps: int = 0
    guidance_end: float = 1.0  # share of the steps
    small_decoder: bool = False  # an AutoencoderTiny in place of the VAE
    is_static: bool = False


VARIANTS = {
    "ov-int8-cfg50": Variant("ov-int8", guidance_end=0.5),
    "ov-int8-cfg35": Variant("ov-int8", guidance_end=0.35),
    "ov-int8-16step-cfg35": Variant("ov-int8", steps=16, guidance_end=0.35),
    "ov-int8-small-decoder": Variant("ov-int8", small_decoder=True),
    "ov-int8-static": Variant("ov-int8", is_static=True),
    "ov-int8-static-small-decoder": Variant("ov-int8", small_decoder=True, is_static=True),
    "torch-compile-bf16-small-decoder": Variant("torch-compile-bf16", small_decoder=True),
}
ENGINES = (*TORCH, *OPENVINO, PUBLISHED_RECIPE, *VARIANTS)
# The weight_format that `convert_…` makes these engines with.
WEIGHT_FORMATS = {"ov-fp16": "fp16", "ov-int8-weights": "int8", "ov-int4": "int4"}


def engines_of(case: Case) -> tuple[str, ...]:
    """The engines that make sense for a case."""
    if case.kind == "convert":
        return (PUBLISHED_RECIPE, *WEIGHT_FORMATS)
    if case.kind != "image":
        return (*TORCH, *OPENVINO)
    is_guided = case.guidance > 1
    variants = [name for name, one in VARIANTS.items() if is_guided or one.guidance_end == 1]
    return (*TORCH, *OPENVINO, *variants)


def variant(engine: str) -> Variant:
    """How an engine generates."""
    return VARIANTS.get(engine, Variant(engine))


def select(cases: str = "", engines: str = "", *, scale: "Scale") -> dict[str, list[str]]:
    """Choose the engines for each case from two lists of names (empty: the scale's own).

    Commas or blanks separate names. Raises ValueError for an unknown name, and if nothing is left
    to measure.
    """
    wanted_cases = _names(cases, "--cases", CASES) or list(scale.cases)
    wanted_engines = _names(engines, "--engines", ENGINES) or list(scale.engines)
    chosen = {
        name: [engine for engine in engines_of(CASES[name]) if engine in wanted_engines]
        for name in CASES
        if name in wanted_cases
    }
    chosen = {name: fitting for name, fitting in chosen.items() if fitting}
    if not chosen:
        raise ValueError(
            f"--engines {' '.join(wanted_engines)!r} has no engine for "
            f"--cases {' '.join(wanted_cases)!r}: published-recipe is for convert_…, "
            "torch-… for the others."
        )
    return chosen


def _names(text: str, option: str, known: Any) -> list[str]:
    names = [name for name in re.split(r"[,\s]+", text) if name]
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name!r} is unknown: use one of {', '.join(known)}.")
    return names


# ---- sizes: the published configurations, and smaller ones --------------------------------------

# The transformer of all PixArt-α XL checkpoints; `sample_size` tells them apart.
DIT_XL = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "upcast_attention": False,
}
T5_V1_1_XXL = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}
SD_VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
    "force_upcast": True,
}
_NOISE = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
SCHEDULERS = {
    "DPMSolverMultistepScheduler": {
        **_NOISE,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
    },
    "LCMScheduler": {
        **_NOISE,
        "original_inference_steps": 50,
        "timestep_spacing": "leading",
        "timestep_scaling": 10.0,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    },
}
TEXT_TOKENS, WORDS = 120, 30  # T5's input: 30 tokens, and padding up to 120

# Cases of the DiT or the VAE do not need 9.5 GB of text encoder, nor do cases of T5 need the other
# two: these small components stand in, with the widths that the others require.
_SHORT_T5 = {"num_layers": 1, "num_heads": 2, "d_ff": 64, "vocab_size": 512}
_SHORT_DIT = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "sample_size": 16,
}
_SHORT_VAE = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}


@dataclass(frozen=True)
class Scale:
    """How much of the published size is built: `full`, `quick`, or less in tests.

    `dit`, `t5`, `vae`: differences from the published configurations. `shrink`: height and width
    of images are divided by it. `turns`: the most runs per engine; after `budget_s` seconds no
    further one starts.
    """

    name: str
    dit: dict[str, Any] = field(default_factory=dict)
    t5: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    shrink: int = 1
    cases: tuple[str, ...] = tuple(CASES)
    engines: tuple[str, ...] = ENGINES
    turns: int = 5
    budget_s: float = 150.0
    # Calls of the DiT that the presets calibrate with, all of one image in 4 steps. Random weights
    # have no ranges worth learning, and a layer's time does not depend on them.
    num_samples: int = 4

    def pixels(self, case: Case) -> int:
        """Height and width of a case's image."""
        return case.pixels // self.shrink

    def configs(self, checkpoint: str) -> dict[str, dict[str, Any]]:
        """The configurations of a checkpoint's three components."""
        dit, t5, vae = {**DIT_XL, **self.dit}, {**T5_V1_1_XXL, **self.t5}, {**SD_VAE, **self.vae}
        if checkpoint == T5_XXL:
            dit, vae = {**dit, **_SHORT_DIT}, {**vae, **_SHORT_VAE}
        else:
            t5 = {**t5, **_SHORT_T5}
            # diffusers' pipeline passes size conditions if this number is 128
            dit["sample_size"] = 128 if checkpoint == XL_1024 else 64 // self.shrink
        return {"transformer": dit, "text_encoder": t5, "vae": vae}


FULL = Scale("full")
# A seventh of the DiT and half the channels of the VAE: ratios keep their meaning, roughly.
QUICK = Scale(
    "quick",
    dit={"num_layers": 4},
    t5={"num_layers": 2},
    vae={"block_out_channels": [64, 128, 256, 256]},
    cases=("dit_step_512", "vae_decode_512"),
    engines=("torch-bf16", "ov-fp16", "ov-int8-weights", "ov-int8"),
    turns=5,
    budget_s=10.0,
)
