"""PRESETS: what NNCF does to which layers, with the reasons. Add a preset by adding a row."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What NNCF does to one component.

    `weights`: store weights as "int8" or "int4" (None: leave the component as it is); with "int4",
    those of `sensitive` layers have 8 bits. `activations`: compute in 8-bit integers too, with
    activation ranges from calibration, except in the layers of `weights_only`; all weights that
    take part have 8 bits. `floating` layers are left alone. Layers are given by regular
    expressions on their names in the IR, which follow the modules of the PyTorch model.
    """

    weights: str | None = None
    sensitive: tuple[str, ...] = ()
    activations: bool = False
    weights_only: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    is_transformer: bool = True  # NNCF then keeps softmax, normalisation and the like floating
    smooth_quant: float = -1  # from 0 to 1: how much of activations' range moves to weights
    scale_estimation: bool = False  # fit the weights' scales to calibration data
    gptq: bool = False  # round weights one column after the other, each making up for the last
    options: tuple[tuple[str, str | int], ...] = ()  # compile options, see ir.STORED_OPTIONS
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)  # label → what it changes

    @property
    def fits_weights(self) -> bool:
        """Whether the weights' scales depend on calibration data."""
        return self.scale_estimation or self.gptq

    @property
    def needs_data(self) -> bool:
        """Whether NNCF needs calibration data, for one of the candidates at least."""
        if self.choices:
            return any(one.needs_data for one in self.candidates().values())
        return self.activations or self.fits_weights

    def candidates(self) -> dict[str, "Recipe"]:
        """Label → recipe, for the best of them to be chosen by measurement; itself without any."""
        choices = self.choices or {"": {}}
        return {label: replace(self, **change, choices={}) for label, change in choices.items()}


@dataclass(frozen=True)
class Preset:
    """One row of PRESETS: its purpose, and a recipe per component."""

    summary: str
    text_encoder: Recipe
    transformer: Recipe
    vae_decoder: Recipe

    @property
    def needs_data(self) -> bool:
        """Whether a component needs calibration data."""
        recipes = (self.text_encoder, self.transformer, self.vae_decoder)
        return any(recipe.needs_data for recipe in recipes)


# Which layers stay floating was measured (python -m pixart_tiny.layers): the DiT's guided
# output on captions outside the calibration set, signal to error in dB, one kind of layer at a time
# left in floating point. With everything in integers PixArt-tiny reaches 22.9 dB.

# Positions and timesteps are angles whose sines the DiT computes; 256 levels cannot resolve them.
# They are few, and integers would gain nothing.
POSITIONS = (r"\.pos_embed/", r"\.sinusoids/")
# Queries and keys: 0.0 dB. CPUs compute attention itself in floating point, so that quantizing its
# inputs gains no speed either.
ATTENTION = (r"/ScaledDotProductAttention",)
# The two ends of the DiT, where errors go straight into the image: 1.6 and 1.4 dB for less than
# a hundredth of the work. With the next two: 28.1 dB.
_ENDS = (r"\.pos_embed\.proj/", r"\.proj_out/")
# The projection of the text, computed once for some 120 tokens: 0.5 dB on top of the others.
_CAPTION = (r"\.caption_projection\.",)
# Timestep and adaLN modulation: 0.1 dB, one vector per image. Larger DiTs are known to suffer here.
_MODULATION = (r"\.adaln_single\.",)
_CROSS_ATTENTION = (r"\.attn2\.",)

# SmoothQuant moves part of the range of large activation channels into the weights. Large DiTs have
# such channels; PixArt-tiny has none, its twins (pixart_tiny/twins.py) have. A strength of 0.8 is
# 1 dB better for PixArt-tiny; but a trial short enough for a large DiT does not show that: with the
# default number of samples it chose 0.5 for PixArt-tiny and for every twin.
_SMOOTHING = {
    "no SmoothQuant": {},
    "SmoothQuant 0.5": {"smooth_quant": 0.5},
}

_SENSITIVE = (*_ENDS, *_CAPTION, *_MODULATION)
_INT8_TRANSFORMER = Recipe(
    weights="int8",
    activations=True,
    weights_only=_SENSITIVE,
    floating=(*POSITIONS, *ATTENTION),
    choices=_SMOOTHING,
)
# Post-GELU layers, a known problem in other DiTs, cost 0.2 dB here: quantized like the rest.
# With INT8, the VAE's images have a PSNR of 40 dB against FP16, far closer than the INT8 DiT's.
_INT8_VAE = Recipe(weights="int8", activations=True, is_transformer=False)

# T5's embeddings with 4-bit weights, signal to error: 20.5 dB; with attention's outputs in 8 bits
# 22.5, with scales fitted to data as well 23.3, with GPTQ 26.7. AWQ adds 0.1, groups of 32 instead
# of 64 add 0.8. For T5-XXL, fitting takes 22 minutes and 22 GB instead of a minute and 3 GB: left
# out there.
_INT4_TEXT_ENCODER = Recipe(
    weights="int4",
    sensitive=(r"\.SelfAttention\.o/",),
    choices={"GPTQ": {"gptq": True}, "scale estimation": {"scale_estimation": True}},
)

PRESETS = {
    "int8-weights": Preset(
        "Half the size, no calibration data; the DiT's activations are quantized as they come.",
        text_encoder=Recipe(weights="int8"),
        transformer=Recipe(
            weights="int8",
            floating=POSITIONS,
            options=(("DYNAMIC_QUANTIZATION_GROUP_SIZE", 128),),
        ),
        vae_decoder=Recipe(weights="int8"),
    ),
    "int8": Preset(
        "The fast one: DiT and VAE compute in integers, with activation ranges from calibration.",
        text_encoder=Recipe(weights="int8"),
        transformer=_INT8_TRANSFORMER,
        vae_decoder=_INT8_VAE,
    ),
    "int4": Preset(
        "The small one: as int8, but 4 bits for the weights of the text encoder and of the DiT's "
        "cross-attention.",
        text_encoder=_INT4_TEXT_ENCODER,
        transformer=replace(
            _INT8_TRANSFORMER,
            weights="int4",
            sensitive=_SENSITIVE,
            weights_only=(*_SENSITIVE, *_CROSS_ATTENTION),
        ),
        vae_decoder=_INT8_VAE,
    ),
    "hybrid": Preset(
        "The published recipe: MatMul keeps floating activations, other layers are quantized.",
        text_encoder=Recipe(weights="int4"),
        transformer=Recipe(
            weights="int8",
            activations=True,
            weights_only=(r"/MatMul", r"/Gather"),
            floating=POSITIONS,
        ),
        vae_decoder=Recipe(weights="int8"),
    ),
}

# Signal to error of a component's output, in dB, that a preset has to reach, see quality.py. For
# PixArt-tiny's images, PSNR against FP16: 39.6 dB (median of 30) with 22.6 dB in the DiT, and 38.5
# with 20.4; 52 dB with 20.8 in the text encoder; 45 dB with 35.2 in the VAE decoder, whose errors
# are the image's. A large DiT is allowed more: published INT8 images of PixArt-Σ are at 23.7 dB.
FLOORS = {"text_encoder": 15.0, "transformer": 18.0, "vae_decoder": 30.0}
# Share of the multiply-adds that may stay in floating point for it.
FLOATING_SHARE = 0.1
