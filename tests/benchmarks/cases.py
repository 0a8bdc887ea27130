"""What is measured: cases, engines, sizes, and what each is expected to take."""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# ==================================================================================================
# Cases and engines
# ==================================================================================================

XL_512 = "PixArt-XL-2-512x512"
# Its transformer has the layout of PixArt-XL-2-1024-MS's; only the weights and the scheduler
# differ. Four steps without guidance make calibration at 1024² ten times shorter.
XL_1024 = "PixArt-LCM-XL-2-1024-MS"
T5_XXL = "T5-v1.1-XXL"


@dataclass(frozen=True)
class Case:
    """One thing that is measured. `kind` is the model that runs, or "image" for all three."""

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
        Case("image_512_4step", "image", XL_512, "A picture of 512² in 4 steps (LCM)", steps=4),
        Case(
            "image_512_20step_cfg",
            "image",
            XL_512,
            "A picture of 512² in 20 steps with guidance",
            steps=20,
            guidance=4.5,
        ),
        Case("convert_dit", "convert", XL_1024, "Conversion of the DiT (1024-MS)", 1024),
        Case("convert_t5", "convert", T5_XXL, "Conversion of the T5-XXL encoder"),
    )
}

TORCH = ("torch-fp32", "torch-bf16", "torch-compile-bf16")
OPENVINO = ("ov-fp16", "ov-int8-weights", "ov-int8", "ov-int4", "ov-hybrid")
# Trace at the model's own size, in float32, as the published notebook does.
SEED_RECIPE = "seed-recipe"
ENGINES = (*TORCH, *OPENVINO, SEED_RECIPE)
# How `convert_…` calls the weights that these engines have.
WEIGHT_FORMATS = {"ov-fp16": "fp16", "ov-int8-weights": "int8", "ov-int4": "int4"}


def engines_of(case: Case) -> tuple[str, ...]:
    """The engines that make sense for a case."""
    if case.kind == "convert":
        return (SEED_RECIPE, *WEIGHT_FORMATS)
    return (*TORCH, *OPENVINO)


def select(cases: str = "", engines: str = "", *, scale: "Scale") -> dict[str, list[str]]:
    """Which engines to measure for which case, from two lists of names (empty: the scale's own).

    Names are parted by commas or blanks. Raises ValueError for a name that is none, and where
    nothing is left to measure.
    """
    wanted_cases = _names(cases, "BENCH_CASES", CASES) or list(scale.cases)
    wanted_engines = _names(engines, "BENCH_ENGINES", ENGINES) or list(scale.engines)
    chosen = {
        name: [engine for engine in engines_of(CASES[name]) if engine in wanted_engines]
        for name in CASES
        if name in wanted_cases
    }
    chosen = {name: fitting for name, fitting in chosen.items() if fitting}
    if not chosen:
        raise ValueError(
            f"BENCH_ENGINES={' '.join(wanted_engines)!r} has no engine for "
            f"BENCH_CASES={' '.join(wanted_cases)!r}: seed-recipe is for convert_…, "
            "torch-… for the others."
        )
    return chosen


def _names(text: str, variable: str, known: Any) -> list[str]:
    names = [name for name in re.split(r"[,\s]+", text) if name]
    for name in names:
        if name not in known:
            raise ValueError(f"{variable}={name!r} is unknown: use one of {', '.join(known)}.")
    return names


# ==================================================================================================
# Sizes: the published configurations, and smaller relatives
# ==================================================================================================

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
TEXT_TOKENS, WORDS = 120, 30  # what T5 gets: this many tokens, the rest of them padding

# Who needs only the DiT or the VAE has no use for 9.5 GB of text encoder, and the other way round:
# these stand in, with the widths that their neighbours ask for.
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
    """How much of the real thing is built: `full`, `quick`, or less in tests.

    `dit`, `t5`, `vae`: what differs from the published configurations. `shrink`: pictures are
    this many times smaller. `turns`: how often an engine runs, at most, and `budget_s`: the
    seconds after which it does not start again.
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
    # Calls of the DiT that the presets calibrate with, all of one picture in 4 steps. Random
    # weights have no ranges worth learning; the time that a layer takes does not depend on them.
    num_samples: int = 4
    speed: float = 1.0  # expected seconds are multiplied by this

    def pixels(self, case: Case) -> int:
        """Height and width of a case's picture."""
        return case.pixels // self.shrink

    def configs(self, checkpoint: str) -> dict[str, dict[str, Any]]:
        """The configurations of the three models of a checkpoint."""
        dit, t5, vae = {**DIT_XL, **self.dit}, {**T5_V1_1_XXL, **self.t5}, {**SD_VAE, **self.vae}
        if checkpoint == T5_XXL:
            dit, vae = {**dit, **_SHORT_DIT}, {**vae, **_SHORT_VAE}
        else:
            t5 = {**t5, **_SHORT_T5}
            # diffusers' pipeline goes by this number: 128 means that size conditions exist
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
    speed=0.15,
)


# ==================================================================================================
# What to expect: seconds, memory, disk
# ==================================================================================================

# Seconds on two cores of a server processor with AVX-512 BF16 and VNNI. Estimates start from here
# and follow the machine as soon as something has been measured.
_DIT = dict(zip((*TORCH, *OPENVINO), (6.85, 2.5, 2.4, 1.6, 1.2, 0.95, 1.1, 1.6), strict=True))
_VAE = dict(zip((*TORCH, *OPENVINO), (10.4, 5.2, 5.0, 3.2, 3.2, 2.0, 2.0, 3.2), strict=True))
_T5 = dict(zip((*TORCH, *OPENVINO), (4.0, 3.0, 3.0, 1.5, 1.0, 1.0, 0.9, 0.9), strict=True))
_CONVERT = {
    "convert_dit": {SEED_RECIPE: 420, "ov-fp16": 16, "ov-int8-weights": 25, "ov-int4": 40},
    "convert_t5": {SEED_RECIPE: 180, "ov-fp16": 60, "ov-int8-weights": 60, "ov-int4": 90},
}
_PREPARE = {  # the random weights, then what convert_pipeline and optimize_pipeline take
    XL_512: (20, (30, 40, 240, 300, 300)),
    XL_1024: (20, (30, 40, 600, 660, 660)),
    T5_XXL: (120, (70, 60, 120, 1200, 150)),
}
_START_S, _COMPILE_S = 12, 120  # a process with its model; torch.compile


def expected_run_s(case: Case, engine: str, scale: Scale) -> float:
    """Seconds that one run of a case should take."""
    if case.kind == "convert":
        return scale.speed * _CONVERT[case.name][engine]
    area = (case.pixels / 512) ** 2
    dit = _DIT[engine] * area**1.32  # attention grows with the square of the area
    calls = case.steps * (2 if case.guidance > 1 else 1)
    texts = 2 if case.guidance > 1 else 1
    seconds = {
        "dit": dit,
        "vae": _VAE[engine] * area**1.05,
        "t5": _T5[engine],
        "image": texts * _T5[engine] + calls * dit + _VAE[engine],
    }
    return scale.speed * seconds[case.kind]


def expected_measure_s(case: Case, engine: str, scale: Scale) -> float:
    """Seconds that one engine takes part in a case, start and warm-up included."""
    run = expected_run_s(case, engine, scale)
    start = _START_S * (0.5 + scale.speed / 2)
    if case.kind == "convert":
        return start + run
    if case.kind in ("t5", "image"):
        start += 30 * scale.speed  # ten gigabytes to load
    if "compile" in engine:
        start += _COMPILE_S * scale.speed
    runs = max(1, min(scale.turns, round(scale.budget_s / run)))
    return start + run * runs + (run if case.kind != "image" else 2 * run / case.steps)


def expected_prepare_s(checkpoint: str, engine: str | None, scale: Scale) -> float:
    """Seconds to build a checkpoint (None), or the IRs of an engine."""
    weights, irs = _PREPARE[checkpoint]
    return scale.speed * (weights if engine is None else irs[OPENVINO.index(engine)]) + 5


@cache
def _parameters_of(name: str, config: tuple) -> int:
    from tests.benchmarks.checkpoints import shapes_of

    return sum(shape.numel() for shape in shapes_of(name, dict(config)).values())


def parameters(checkpoint: str, scale: Scale) -> dict[str, int]:
    """How many weights the three models of a checkpoint have."""

    def hashable(config: dict) -> tuple:
        return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items())

    configs = scale.configs(checkpoint)
    return {name: _parameters_of(name, hashable(config)) for name, config in configs.items()}


def disk_gb(checkpoint: str, engine: str | None, scale: Scale) -> float:
    """10⁹ bytes that a checkpoint (None) or the IRs of an engine take."""
    count = parameters(checkpoint, scale)
    if engine is None:
        return 2 * sum(count.values()) / 1e9
    t5, others = count["text_encoder"], count["transformer"] + 0.6 * count["vae"]
    bytes_of = {"ov-fp16": (2, 2), "ov-int4": (0.6, 1.1), "ov-hybrid": (0.6, 1.1)}
    per_t5, per_other = bytes_of.get(engine, (1.1, 1.1))
    return (per_t5 * t5 + per_other * others) / 1e9


# Bytes a weight takes while an engine runs. OpenVINO's IRs are mapped into memory and copied into
# the form that the kernels like; the mapped half gives way where memory is short.
_BYTES = {
    "torch-fp32": 4,
    "torch-bf16": 2,
    "torch-compile-bf16": 2,
    "ov-fp16": 2.4,
    "ov-int8-weights": 1.4,
    "ov-int8": 1.4,
    "ov-int4": 1.0,
    "ov-hybrid": 1.0,
}


def memory_gb(case: Case, engine: str, scale: Scale) -> float:
    """10⁹ bytes that a process is expected to hold at its worst."""
    area = (scale.pixels(case) / 512) ** 2
    libraries = 0.8
    dit = parameters(XL_1024 if case.checkpoint == XL_1024 else XL_512, scale)["transformer"] / 1e9
    t5 = parameters(T5_XXL, scale)["text_encoder"] / 1e9
    vae = parameters(XL_512, scale)["vae"] / 1e9
    if case.kind == "convert":
        weights = t5 if case.checkpoint == T5_XXL else dit
        if engine == SEED_RECIPE:  # float32, and what a trace at full size leaves behind
            traced = 0.2 if case.checkpoint == T5_XXL else 8 * dit / 0.61 * (area / 4)
            return libraries + 4.2 * weights + traced
        return libraries + 2.4 * weights
    size = _BYTES[engine]
    decoding = vae * size + (3.2 if engine == "torch-fp32" else 1.6) * area
    weights = {
        "dit": dit * size + 0.5 * area,
        "vae": decoding,
        "t5": t5 * size + 0.3,
        "image": (t5 + (0 if engine == "torch-fp32" else dit)) * size + 0.3,
    }
    if case.kind == "image" and engine in OPENVINO:
        weights["image"] += decoding  # nothing is freed
    return libraries + weights[case.kind]
