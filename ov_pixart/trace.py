"""torch module → `ov.Model`, one graph for every batch, prompt length and image size.

Each wrapper gives a network the signature that tracing needs: tensors in, one tensor out.
"""

import contextlib
import math
from collections.abc import Iterator

import openvino as ov
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, PixArtTransformer2DModel
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from optimum.exporters.openvino.model_configs import T5EncoderOpenVINOConfig
from transformers import T5EncoderModel

from ov_pixart.quiet import quiet
from ov_pixart.upstream import trace_in_16_bits

# ---- text encoder -------------------------------------------------------------------------------


class T5ExportConfig(T5EncoderOpenVINOConfig):
    """Optimum's export settings for T5, plus the mask.

    PixArt pads prompts; without the mask, padding changes the image.
    """

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"input_ids": axes, "attention_mask": axes}


class TextEncoderWrapper(torch.nn.Module):
    """T5 returns a dictionary; a traced graph needs the one tensor that PixArt uses."""

    def __init__(self, text_encoder: T5EncoderModel):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids, attention_mask):  # (B, L) → (B, L, D)
        encoded = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return encoded["last_hidden_state"]


def trace_text_encoder(text_encoder: T5EncoderModel) -> ov.Model:
    """`input_ids`, `attention_mask` `(B, L)` int64 → `last_hidden_state` `(B, L, D)` float32."""
    tokens = torch.ones((2, 8), dtype=torch.int64)
    any_text = ([-1, -1], ov.Type.i64)  # (B, L)
    # transformers builds its masks with code that cannot be traced; optimum's patcher replaces it
    with T5ExportConfig(text_encoder.config).patch_model_for_export(text_encoder):
        model = _trace(
            TextEncoderWrapper(text_encoder),
            example={"input_ids": tokens, "attention_mask": tokens},
            inputs={"input_ids": any_text, "attention_mask": any_text},
            output="last_hidden_state",
        )
    # T5's activations exceed float16's range. A GPU, which computes in float16, divides them by
    # this number and multiplies again where that is safe; CPUs ignore it. The number is the one
    # that optimum-intel gives text encoders.
    model.set_rt_info("8.0", ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
    return model


# ---- transformer --------------------------------------------------------------------------------


class TransformerWrapper(torch.nn.Module):
    """The DiT takes its size conditions in a dictionary; a traced graph takes tensors only."""

    def __init__(self, transformer: PixArtTransformer2DModel):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_attention_mask,
        resolution=None,
        aspect_ratio=None,
    ):
        return self.transformer(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]


class Sinusoids(torch.nn.Module):
    """`cos` and `sin` of numbers times 128 frequencies, in a form that survives 16 bits.

    diffusers multiplies first, `timestep × frequency`, and takes the sine of up to 999 radians.
    In torch that product is float32 whatever the model's precision is, but OpenVINO, told to
    compute in bfloat16 (its own choice where the hardware has it), rounds it to one of 512, 516,
    520 … radians: the transformer no longer knows where in the schedule it is. Stored as float16,
    the frequencies alone would do the same on a smaller scale.

    So the number is split, `x = 1024·coarse + fine + fraction`, the sines of both whole parts come
    from tables, and the angle-sum formulas combine them; a whole timestep is a row of the table,
    to the last bit. `bucketize` and `remainder` read the model's input itself, which is float32 in
    every precision.
    """

    FINE, COARSE = 1024, 8  # rows of the tables: numbers up to 8191

    def __init__(self, projection: torch.nn.Module):
        super().__init__()
        half = projection.num_channels // 2
        exponent = -math.log(10_000) * torch.arange(half) / (half - projection.downscale_freq_shift)
        tables = {
            "frequency": torch.exp(exponent),
            "fine": projection(torch.arange(self.FINE)),  # (1024, 256): cosines, then sines
            "coarse": projection(torch.arange(self.COARSE) * self.FINE),
            "whole": torch.arange(1.0, self.FINE * self.COARSE),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def forward(self, x):  # (…) → (…, 256)
        whole = torch.bucketize(x, self.whole, right=True)
        angle = torch.remainder(x, 1.0).unsqueeze(-1) * self.frequency
        fraction = torch.cos(angle), torch.sin(angle)
        fine = self.fine[whole % self.FINE].chunk(2, dim=-1)
        coarse = self.coarse[whole // self.FINE].chunk(2, dim=-1)
        return torch.cat(self._sum(self._sum(coarse, fine), fraction), dim=-1)

    @staticmethod
    def _sum(a, b):  # cos(α+β), sin(α+β)
        return a[0] * b[0] - a[1] * b[1], a[1] * b[0] + a[0] * b[1]


class TimestepEmbedding(torch.nn.Module):
    """The DiT's embedding of timestep, size and aspect ratio, computed with `Sinusoids`."""

    def __init__(self, embedding: torch.nn.Module):
        super().__init__()
        self.embedding = embedding
        self.sinusoids = Sinusoids(embedding.time_proj)

    def forward(self, timestep, resolution, aspect_ratio, batch_size, hidden_dtype):
        conditioning = self.embedding.timestep_embedder(self.sinusoids(timestep))  # (B, D)
        if self.embedding.use_additional_conditions:
            size = self.embedding.resolution_embedder(self.sinusoids(resolution))  # (B, 2, D/3)
            shape = self.embedding.aspect_ratio_embedder(self.sinusoids(aspect_ratio))
            conditioning = conditioning + torch.cat([size.flatten(1), shape.flatten(1)], dim=1)
        return conditioning


@contextlib.contextmanager
def _with_table_embedding(transformer: PixArtTransformer2DModel) -> Iterator[None]:
    """Put `TimestepEmbedding` into the transformer, and the original back afterwards."""
    block = transformer.adaln_single
    original = block.emb
    block.emb = TimestepEmbedding(original)
    try:
        yield
    finally:
        block.emb = original


def trace_transformer(transformer: PixArtTransformer2DModel) -> ov.Model:
    """Trace the DiT once for every resolution and aspect ratio.

    Inputs, with B images, latents of h × w and prompts of L tokens: `hidden_states`
    `(B, 4, h, w)`, `timestep` `(B,)`, `encoder_hidden_states` `(B, L, D)`, all float32;
    `encoder_attention_mask` `(B, L)` int64; with micro-conditions also `resolution` `(B, 2)` in
    pixels and `aspect_ratio` `(B, 1)`, float32. Output: `sample` `(B, 8, h, w)`.
    """
    config = transformer.config
    width = config.caption_channels or config.cross_attention_dim
    # Why so small, and why not square? The DiT adds a sin-cos table of positions. Given a latent
    # of its own `sample_size` (square) it takes the table stored for that size, and tracing would
    # freeze that one into the graph. For any other shape it *computes* the table, from the shape –
    # and then the computation is what gets traced: one IR for every resolution and aspect ratio.
    rows, columns = 8, 12
    example = {
        "hidden_states": torch.randn(2, config.in_channels, rows, columns),
        "timestep": torch.tensor([999.0, 1.0]),
        "encoder_hidden_states": torch.randn(2, 7, width),
        "encoder_attention_mask": torch.ones((2, 7), dtype=torch.int64),
    }
    inputs = {
        "hidden_states": ([-1, config.in_channels, -1, -1], ov.Type.f32),
        # Float, though most schedulers count in integers: the model converts it to float anyway,
        # whole numbers survive that exactly, and the fractions of Euler's scheduler fit too.
        "timestep": ([-1], ov.Type.f32),
        "encoder_hidden_states": ([-1, -1, width], ov.Type.f32),
        "encoder_attention_mask": ([-1, -1], ov.Type.i64),
    }
    if transformer.use_additional_conditions:  # α 1024-MS: the micro-conditions
        example["resolution"] = torch.tensor([[512.0, 768.0]] * 2)
        example["aspect_ratio"] = torch.tensor([[0.66]] * 2)
        inputs["resolution"] = ([-1, 2], ov.Type.f32)
        inputs["aspect_ratio"] = ([-1, 1], ov.Type.f32)
    with _with_table_embedding(transformer):
        model = _trace(TransformerWrapper(transformer), example, inputs, output="sample")
    _remove_token_squeeze(model)
    return model


def _remove_token_squeeze(model: ov.Model) -> None:
    """Remove diffusers' `squeeze(1)` of the tokens, `(B, N, C)`.

    In torch it does nothing, because there is more than one token. OpenVINO assumes that the axis
    is gone, and fails where the batch size is fixed and the image size is not.
    """
    for op in model.get_ops():
        if op.get_type_name() == "Squeeze" and op.input_value(0).get_partial_shape().rank == 3:
            op.output(0).replace(op.input_value(0))
    model.validate_nodes_and_infer_types()


# ---- VAE decoder --------------------------------------------------------------------------------


class VaeDecoderWrapper(torch.nn.Module):
    """Half of the VAE, without the tiling and slicing that `vae.decode` decides on in Python."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny):
        super().__init__()
        self.post_quant_conv = getattr(vae, "post_quant_conv", None) or torch.nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent_sample):
        return self.decoder(self.post_quant_conv(latent_sample))


class VaeEncoderWrapper(torch.nn.Module):
    """The other half: mean and log-variance of the latents; of an AutoencoderTiny, the latents."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny):
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = getattr(vae, "quant_conv", None) or torch.nn.Identity()

    def forward(self, sample):
        return self.quant_conv(self.encoder(sample))


def trace_vae_decoder(vae: AutoencoderKL | AutoencoderTiny) -> ov.Model:
    """`latent_sample` `(B, 4, h, w)` → `sample` `(B, 3, 8·h, 8·w)` from -1 to 1, float32."""
    channels = vae.config.latent_channels
    model = _trace(
        VaeDecoderWrapper(vae),
        example={"latent_sample": torch.randn(1, channels, 8, 12)},
        inputs={"latent_sample": ([-1, channels, -1, -1], ov.Type.f32)},
        output="sample",
    )
    return _with_vae_scale(model, vae)


def trace_vae_encoder(vae: AutoencoderKL | AutoencoderTiny) -> ov.Model:
    """`sample` `(B, 3, 8·h, 8·w)` from -1 to 1 → `latent_parameters` `(B, 8, h, w)`, float32.

    These are mean and log-variance; an AutoencoderTiny gives `latent_sample` `(B, 4, h, w)`. The
    names are those that optimum-intel reads.
    """
    channels = vae.config.in_channels
    is_tiny = isinstance(vae, AutoencoderTiny)
    model = _trace(
        VaeEncoderWrapper(vae),
        example={"sample": torch.randn(1, channels, 64, 96)},
        inputs={"sample": ([-1, channels, -1, -1], ov.Type.f32)},
        output="latent_sample" if is_tiny else "latent_parameters",
    )
    return _with_vae_scale(model, vae)


def _with_vae_scale(model: ov.Model, vae: AutoencoderKL | AutoencoderTiny) -> ov.Model:
    """Store the scale of T5, for a VAE whose activations exceed float16's range, as SDXL's do.

    The number is the one that optimum-intel gives SDXL's VAE.
    """
    if vae.config.get("force_upcast"):
        model.set_rt_info("128.0", ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
    return model


# ---- shared by the three ------------------------------------------------------------------------


def _trace(
    module: torch.nn.Module,
    example: dict[str, torch.Tensor],
    inputs: dict[str, tuple[list[int], ov.Type]],
    output: str,
) -> ov.Model:
    """Run `module` once on `example` and keep the graph; -1 in `inputs` marks a free dimension."""
    with torch.no_grad(), quiet():
        # no check, which would trace once more to compare: the tests compare with torch itself
        decoder = TorchScriptPythonDecoder(
            module.eval(), example_input=example, trace_kwargs={"check_trace": False}
        )
        model = ov.convert_model(
            decoder,
            example_input=example,
            input=[(name, ov.PartialShape(shape), kind) for name, (shape, kind) in inputs.items()],
        )
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({output})
    model.validate_nodes_and_infer_types()
    return model


@contextlib.contextmanager
def traceable(module: torch.nn.Module, *, keep_float32: bool) -> Iterator[None]:
    """Let a module of any precision be traced in float32 without copying its large weights.

    Large float32 weights become float16 first, unless `keep_float32`, which turns 16-bit weights
    into float32 instead. Afterwards the module is unchanged.
    """
    stored = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        if keep_float32:
            for tensor, data in stored:
                tensor.data = data.float() if data.dtype.is_floating_point else data
        else:
            _large_weights_to_float16(module)
        with trace_in_16_bits(module):
            yield
    finally:
        for tensor, data in stored:
            tensor.data = data


def _large_weights_to_float16(module: torch.nn.Module) -> None:
    """Convert one matrix at a time, so that the float32 and float16 copies never coexist.

    In float32, OpenVINO would read all of them at once, when it simplifies the graph and when it
    saves it.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            wide = layer.weight.data
            narrow = wide.half() if wide.dtype == torch.float32 else wide
            if torch.isfinite(narrow).all():  # float16 ends at 65504
                layer.weight.data = narrow
