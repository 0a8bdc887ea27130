"""Everything between a PixArt checkpoint and a picture made by OpenVINO.

The file reads in the order an image travels:

1. **Convert**: text encoder, diffusion transformer (DiT) and VAE decoder become OpenVINO IR.
2. **Run**: the three IRs take their places in diffusers' PixArt pipelines.
3. **Optimise**: NNCF makes them smaller and faster, by one of a few presets.
4. **Compare**: what that gained, what it cost, in numbers and pictures.

Import this module before `openvino` or `nncf`: it switches their usage telemetry off.
"""

import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args
from unittest import mock

# ==================================================================================================
# 0. Quiet, please
# ==================================================================================================


def _opt_out_of_telemetry() -> None:
    """Keep OpenVINO and NNCF from reporting usage, without touching environment or home folder.

    Both look for the optional package `openvino_telemetry` and do without it where it is missing.
    `None` in `sys.modules` is Python's own way to say "missing", so nothing that could open a
    connection is ever loaded. (Setting `CI=true`, the other way, changes what unrelated tools do.)
    If another import was faster, what is already loaded loses its consent instead.
    """
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None
    if sys.modules["openvino_telemetry"] is None:
        return
    from openvino_telemetry.utils.opt_in_checker import ConsentCheckResult, OptInChecker

    OptInChecker.check = lambda *args, **kwargs: ConsentCheckResult.DECLINED
    with contextlib.suppress(RuntimeError):  # nothing has been set up yet
        sys.modules["openvino_telemetry"].Telemetry().consent = False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back notices that the reader can do nothing about (missing torchvision, tracing…)."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _silent_nncf() -> Iterator[None]:
    """Keep NNCF from drawing tables, and bars of its own, which a notebook keeps as empty boxes."""
    with (
        _quiet(),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(rich.progress.Progress, "start", lambda progress: None),
    ):
        yield


_opt_out_of_telemetry()
with _quiet():
    import datasets
    import diffusers
    import matplotlib.pyplot as plt
    import nncf
    import numpy as np
    import openvino as ov
    import pandas as pd
    import psutil
    import rich.progress
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
    from diffusers import PixArtTransformer2DModel as PixArtTransformer
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
    from filelock import FileLock, Timeout
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from nncf.openvino.graph.model_transformer import OVModelTransformer
    from nncf.openvino.graph.model_utils import copy_rt_info
    from nncf.quantization.algorithms.weight_compression.openvino_backend import (
        OVWeightCompressionAlgoBackend,
    )
    from openvino.frontend.pytorch.patch_model import (
        __make_16bit_traceable as make_16bit_traceable,
    )
    from openvino.frontend.pytorch.patch_model import unpatch_model
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    from optimum.exporters.openvino.model_configs import T5EncoderOpenVINOConfig
    from optimum.exporters.openvino.utils import clear_class_registry
    from optimum.intel.openvino import modeling_diffusion as ov_diffusion
    from optimum.intel.openvino.modeling_diffusion import (
        OVDiffusionPipeline,
        OVModelTextEncoder,
        OVModelVae,
        OVModelVaeDecoder,
        OVPipelinePart,
    )
    from PIL import Image
    from safetensors import SafetensorError, safe_open
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from tqdm.auto import tqdm
    from transformers import T5EncoderModel, T5Tokenizer
    from transformers.utils import ModelOutput

    from ov_pixart.families import ALPHA, SIGMA, Family, find_family

    nncf.set_log_level(logging.ERROR)

MODEL_INDEX = "model_index.json"
IR_NAME = "openvino_model.xml"


# ==================================================================================================
# 1. Convert
# ==================================================================================================

# What becomes of the weights on disk. Activations are another matter: OpenVINO picks their
# precision when it compiles, and `ov_config={"INFERENCE_PRECISION_HINT": "f32"}` overrules it.
WEIGHT_FORMATS = {
    "fp32": "32 bits; a 16-bit checkpoint is widened, so that nothing is rounded",
    "fp16": "16 bits: float32 becomes float16, a 16-bit checkpoint stays as it is",
    "int8": "8-bit integers, one scale an output channel",
    "int4": "4-bit integers, one scale a group of weights; what does not fit stays at 8 bits",
}
# The tables of `_Sinusoids` look like embeddings to NNCF; at 8 bits they would lose the angles.
SINUSOIDS = nncf.IgnoredScope(patterns=[r".*\.sinusoids/.*"], validate=False)
_INT4_GROUP_SIZES = (128, 64, 32, 16)  # the largest that divides the model's width


# ---- the three models, traced -------------------------------------------------------------------


class _T5ExportConfig(T5EncoderOpenVINOConfig):
    """Optimum's export settings for T5, plus the mask: PixArt pads, and padding shows."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"input_ids": axes, "attention_mask": axes}


class _TextEncoderForTracing(torch.nn.Module):
    """T5 answers with a dictionary; a traced graph needs the one tensor that PixArt uses."""

    def __init__(self, text_encoder: T5EncoderModel):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids, attention_mask):
        return self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)[
            "last_hidden_state"
        ]


class _TransformerForTracing(torch.nn.Module):
    """The DiT takes its size conditions in a dictionary; a traced graph takes tensors only."""

    def __init__(self, transformer: PixArtTransformer):
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


class _Sinusoids(torch.nn.Module):
    """`cos` and `sin` of numbers times 128 frequencies, in a form that survives 16 bits.

    diffusers multiplies first, `timestep × frequency`, and takes the sine of up to 999 radians.
    In torch that product is float32 whatever the model's precision is, but OpenVINO, told to
    compute in bfloat16 (its own choice where the hardware has it), rounds it to one of 512, 516,
    520 … radians: the transformer no longer knows where in the schedule it is. Stored as float16,
    the frequencies alone would do the same on a smaller scale.

    So the number is taken apart, `x = 1024·coarse + fine + fraction`, the sines of both whole
    parts come from tables, and the angle-sum formulas put them together; a whole timestep is a
    row of the table, to the last bit. `bucketize` and `remainder` read the model's input itself,
    which is float32 in every precision.
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


class _EmbeddingForTracing(torch.nn.Module):
    """The DiT's embedding of timestep, size and aspect ratio, on `_Sinusoids`."""

    def __init__(self, embedding: torch.nn.Module):
        super().__init__()
        self.embedding = embedding
        self.sinusoids = _Sinusoids(embedding.time_proj)

    def forward(self, timestep, resolution, aspect_ratio, batch_size, hidden_dtype):
        conditioning = self.embedding.timestep_embedder(self.sinusoids(timestep))  # (B, D)
        if self.embedding.use_additional_conditions:
            size = self.embedding.resolution_embedder(self.sinusoids(resolution))  # (B, 2, D/3)
            shape = self.embedding.aspect_ratio_embedder(self.sinusoids(aspect_ratio))
            conditioning = conditioning + torch.cat([size.flatten(1), shape.flatten(1)], dim=1)
        return conditioning


@contextlib.contextmanager
def _exact_embedding(transformer: PixArtTransformer) -> Iterator[None]:
    """Trace with `_EmbeddingForTracing` and leave the transformer as it was."""
    block = transformer.adaln_single
    original = block.emb
    block.emb = _EmbeddingForTracing(original)
    try:
        yield
    finally:
        block.emb = original


class _VaeDecoderForTracing(torch.nn.Module):
    """Half of the VAE, without the tiling and slicing that `vae.decode` decides on in Python."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv or torch.nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent_sample):
        return self.decoder(self.post_quant_conv(latent_sample))


def _trace_text_encoder(text_encoder: T5EncoderModel) -> ov.Model:
    tokens = torch.ones((2, 8), dtype=torch.int64)
    any_text = ([-1, -1], ov.Type.i64)  # (batch, tokens)
    # transformers builds its masks with code that cannot be traced; optimum's patcher swaps it.
    with _T5ExportConfig(text_encoder.config).patch_model_for_export(text_encoder):
        model = _trace(
            _TextEncoderForTracing(text_encoder),
            example={"input_ids": tokens, "attention_mask": tokens},
            inputs={"input_ids": any_text, "attention_mask": any_text},
            output="last_hidden_state",
        )
    # T5's activations leave float16's range. A GPU, which computes in it, divides them by this
    # number and multiplies again where it is safe; it reads it here by itself, CPUs do not.
    # The number is the one that optimum-intel gives text encoders.
    model.set_rt_info("8.0", ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
    return model


def _trace_transformer(transformer: PixArtTransformer) -> ov.Model:
    config = transformer.config
    width = config.caption_channels or config.cross_attention_dim
    # Why so small, and why not square? The DiT adds a sin-cos table of positions. Given a latent
    # of its own `sample_size` (square) it takes the table stored for that size, and tracing would
    # freeze that one into the graph. For any other shape it *computes* the table, from the shape –
    # and then the computation is what gets traced: one IR for every resolution and aspect ratio.
    height, width_of_latent = 8, 12
    example = {
        "hidden_states": torch.randn(2, config.in_channels, height, width_of_latent),
        "timestep": torch.tensor([999.0, 1.0]),
        "encoder_hidden_states": torch.randn(2, 7, width),
        "encoder_attention_mask": torch.ones((2, 7), dtype=torch.int64),
    }
    inputs = {
        "hidden_states": ([-1, config.in_channels, -1, -1], ov.Type.f32),
        # Float, though most schedulers count in integers: the model makes it float anyway,
        # whole numbers survive that exactly, and Euler's fractions fit too.
        "timestep": ([-1], ov.Type.f32),
        "encoder_hidden_states": ([-1, -1, width], ov.Type.f32),
        "encoder_attention_mask": ([-1, -1], ov.Type.i64),
    }
    if transformer.use_additional_conditions:  # the 1024-MS family: picture size and its shape
        example["resolution"] = torch.tensor([[512.0, 768.0]] * 2)
        example["aspect_ratio"] = torch.tensor([[0.66]] * 2)
        inputs["resolution"] = ([-1, 2], ov.Type.f32)
        inputs["aspect_ratio"] = ([-1, 1], ov.Type.f32)
    with _exact_embedding(transformer):
        model = _trace(_TransformerForTracing(transformer), example, inputs, output="sample")
    _keep_token_axis(model)
    return model


def _keep_token_axis(model: ov.Model) -> None:
    """Take out diffusers' `squeeze(1)` of the tokens, `(B, N, C)`.

    In torch it does nothing, for there is more than one token. OpenVINO believes that the axis is
    gone, and fails where the batch size is fixed and the picture's is not.
    """
    for op in model.get_ops():
        if op.get_type_name() == "Squeeze" and op.input_value(0).get_partial_shape().rank == 3:
            op.output(0).replace(op.input_value(0))
    model.validate_nodes_and_infer_types()


def _trace_vae_decoder(vae: AutoencoderKL) -> ov.Model:
    channels = vae.config.latent_channels
    return _trace(
        _VaeDecoderForTracing(vae),
        example={"latent_sample": torch.randn(1, channels, 8, 12)},
        inputs={"latent_sample": ([-1, channels, -1, -1], ov.Type.f32)},
        output="sample",
    )


def _trace(
    module: torch.nn.Module,
    example: dict[str, torch.Tensor],
    inputs: dict[str, tuple[list[int], ov.Type]],
    output: str,
) -> ov.Model:
    """Run `module` once on `example` and keep the graph; -1 in `inputs` marks a free dimension."""
    with torch.no_grad(), _quiet():
        # without the check, which traces once more to compare: the tests compare with torch itself
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
def _ready_for_tracing(module: torch.nn.Module, weight_format: str) -> Iterator[None]:
    """Let a module of any precision be traced in float32 without copying its big weights.

    OpenVINO's 16-bit patch puts placeholders where the weights of linear layers and embeddings
    were, so that tracing computes shapes only, and hands the stored weights to the graph as they
    are. For "fp32", 16-bit weights are turned into float32 first, else float32 into float16.
    Afterwards the module is as it was.
    """
    stored = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        if weight_format == "fp32":
            for tensor, data in stored:
                tensor.data = data.float() if data.dtype.is_floating_point else data
        else:
            _narrow(module)
        make_16bit_traceable(module)
        yield
    finally:
        unpatch_model(module, "_openvino_module_extension_patch_orig_forward")
        for tensor, data in stored:
            tensor.data = data
        clear_class_registry()  # TorchScript remembers what it has traced, and holds its weights


def _narrow(module: torch.nn.Module) -> None:
    """Turn float32 matrices into float16, one after another, so that both are never there whole.

    In float32, OpenVINO would read all of them at a time: when it tidies up what it has traced,
    and when it saves.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            wide = layer.weight.data
            narrow = wide.half() if wide.dtype == torch.float32 else wide
            if torch.isfinite(narrow).all():  # float16 ends at 65504
                layer.weight.data = narrow


def _constants(model: ov.Model) -> list[np.ndarray]:
    """The weights of a graph, where they lie: nothing is copied."""
    return [op.data for op in model.get_ops() if op.get_type_name() == "Constant"]


# ---- the three models, converted and written ----------------------------------------------------


def convert_text_encoder(
    text_encoder: T5EncoderModel, output_dir: str | Path, *, weight_format: str = "fp16"
) -> Path:
    """Turn the T5 text encoder into OpenVINO IR and return `output_dir`.

    Inputs: `input_ids` and `attention_mask`, `(B, L)` int64. Output: `last_hidden_state`,
    `(B, L, D)` float32. Batch and length are free.
    """
    return _convert(_trace_text_encoder, text_encoder, output_dir, weight_format)


def convert_transformer(
    transformer: PixArtTransformer, output_dir: str | Path, *, weight_format: str = "fp16"
) -> Path:
    """Turn PixArt's diffusion transformer into one IR for every resolution; return `output_dir`.

    Inputs: `hidden_states` `(B, 4, H/8, W/8)`, `timestep` `(B,)`, `encoder_hidden_states`
    `(B, L, D)`, all float32; `encoder_attention_mask` `(B, L)` int64; models trained with size
    conditions also take `resolution` `(B, 2)` in pixels and `aspect_ratio` `(B, 1)`, float32.
    Output: `sample` `(B, 8, H/8, W/8)`, noise and its variance. All but the channels is free.
    """
    return _convert(_trace_transformer, transformer, output_dir, weight_format)


def convert_vae_decoder(
    vae: AutoencoderKL, output_dir: str | Path, *, weight_format: str = "fp16"
) -> Path:
    """Turn the decoding half of the VAE into OpenVINO IR and return `output_dir`.

    Input: `latent_sample` `(B, 4, H/8, W/8)`. Output: `sample` `(B, 3, H, W)`, from -1 to 1.
    """
    return _convert(_trace_vae_decoder, vae, output_dir, weight_format)


def _convert(
    trace: Callable[[Any], ov.Model],
    module: torch.nn.Module,
    output_dir: str | Path,
    weight_format: str,
    source: dict | None = None,
    tell: Callable[[str], None] = lambda doing: None,
) -> Path:
    """Trace, compress, write.

    `source` identifies the checkpoint, for `_is_converted`; `tell` hears what is being done.
    """
    _check_weight_format(weight_format)
    tell("tracing")
    with _ready_for_tracing(module, weight_format):
        model = trace(module)
    gc.collect()  # from here on, only the graph holds weights, and drops them one by one
    if weight_format in ("int8", "int4"):
        with _weight_by_weight(tell):
            model = _compress_weights(model, weight_format, module.config)
    tell("writing")
    with _refusals_in_one_line(Path(output_dir)), _staged(Path(output_dir)) as folder:
        _save_ir(model, folder, compress_to_fp16=weight_format != "fp32")
        del model
        _save_config(module, folder)
        record = {"weight_format": weight_format, "source": source}
        _write_record(record, folder / "conversion.json")
    return Path(output_dir)


def _check_weight_format(weight_format: str) -> None:
    if weight_format not in WEIGHT_FORMATS:
        choices = ", ".join(repr(name) for name in WEIGHT_FORMATS)
        raise ValueError(f"weight_format={weight_format!r} is unknown: use one of {choices}.")


def _compress_weights(model: ov.Model, weight_format: str, config: Any) -> ov.Model:
    """Compress the weights in memory, before anything is written."""
    with _silent_nncf():
        if weight_format == "int8":
            mode = nncf.CompressWeightsMode.INT8_ASYM
            return nncf.compress_weights(model, mode=mode, ignored_scope=SINUSOIDS)
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            ratio=1.0,
            group_size=_int4_group_size(config),
            backup_mode=nncf.BackupMode.INT8_ASYM,
            ignored_scope=SINUSOIDS,
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE
            ),
        )


@contextlib.contextmanager
def _weight_by_weight(tell: Callable[[str], None] = lambda doing: None) -> Iterator[None]:
    """Let NNCF drop each weight as soon as it is compressed, and tell how far it is.

    NNCF takes one weight after the other, the biggest first, but keeps all of them in a list of
    names.
    """
    original = OVWeightCompressionAlgoBackend.transform_model

    def transform_model(backend, model, graph, weights, *args, **kwargs):
        weights = list(weights)

        def one_by_one() -> Iterator[Any]:
            done, total = 0, sum(one.num_weights for one in weights)
            for one in weights:
                tell(f"compressing weights, {done / total:.0%}")
                yield one
                attributes = one.node_with_weight.layer_attributes.constant_attributes
                del backend.name_to_node_mapping[attributes[one.weight_port_id]["name"]]
                done += one.num_weights

        return original(backend, model, graph, one_by_one(), *args, **kwargs)

    with mock.patch.object(OVWeightCompressionAlgoBackend, "transform_model", transform_model):
        yield


def _int4_group_size(config: Any) -> int:
    """The largest usual group that divides the model's width (T5: 4096, DiT XL: 1152)."""
    if hasattr(config, "d_model"):
        width = config.d_model
    elif hasattr(config, "num_attention_heads"):
        width = config.num_attention_heads * config.attention_head_dim
    else:
        width = config.block_out_channels[-1]
    return next((size for size in _INT4_GROUP_SIZES if width % size == 0), _INT4_GROUP_SIZES[-1])


def _save_config(module: torch.nn.Module, folder: Path) -> None:
    save = getattr(module, "save_config", None) or module.config.save_pretrained
    save(folder)


# ---- nothing half-written, nothing lost ---------------------------------------------------------


@contextlib.contextmanager
def _writing_to(output_dir: Path, command: str) -> Iterator[None]:
    """Have an output folder to oneself; who finds another process at work waits for it.

    The lock goes with its process, however that ends. What stays then is `command`, the call that
    finishes the folder, for the reader who tries to load it.
    """
    with _refusals_in_one_line(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / ".lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            tqdm.write(f"Waiting for another process that writes to {str(output_dir)!r} …")
            held = lock.acquire()
        with held:
            (output_dir / _UNFINISHED).write_text(command, encoding="utf-8")
            yield
            (output_dir / _UNFINISHED).unlink()


_UNFINISHED = ".unfinished"


def _how_to_finish(folder: Path) -> str:
    """The call that finishes or mends a folder; in general terms where none is on record."""
    with contextlib.suppress(OSError, ValueError):
        if command := (folder / _UNFINISHED).read_text(encoding="utf-8"):
            return command
    if any((folder / name / _RECORDS[1]).is_file() for name in PARTS):
        return f"optimize_pipeline(ov_dir, {str(folder)!r}, preset)"
    return f"convert_pipeline(model_id, {str(folder)!r})"


def _call_text(function: str, *args: Any, **options: Any) -> str:
    """A call as one would type it; paths as strings, options that are None left out."""
    shown = [repr(str(arg)) for arg in args]
    for name, value in options.items():
        if value is not None:
            shown.append(f"{name}={(str(value) if isinstance(value, Path) else value)!r}")
    return f"{function}({', '.join(shown)})"


@contextlib.contextmanager
def _refusals_in_one_line(output_dir: Path) -> Iterator[None]:
    """Say what to do if the system does not let us write."""
    try:
        yield
    except OSError as error:
        there = Path(error.filename or output_dir).is_relative_to(output_dir)
        if error.errno not in _REFUSALS or not there:
            raise
        raise type(error)(
            f"output_dir={str(output_dir)!r} cannot be written ({error.strerror}): make room "
            "there, or name a folder that you may write to, and call again."
        ) from None


_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextlib.contextmanager
def _staged(output_dir: Path) -> Iterator[Path]:
    """Write into a folder beside `output_dir` and move the files when all are on the disk.

    The `.xml` goes last, and an old one goes first, with its record: whoever finds an `.xml` finds
    its weights. What a process that was killed has left half-written is removed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(output_dir.parent)
    with tempfile.TemporaryDirectory(
        prefix=f".partial-{os.getpid()}-", dir=output_dir.parent
    ) as staging:
        yield Path(staging)
        files = sorted(Path(staging).iterdir(), key=lambda file: file.suffix == ".xml")
        for file in files:
            _flush(file)
        for name in (IR_NAME, *_RECORDS):
            (output_dir / name).unlink(missing_ok=True)
        for file in files:
            os.replace(file, output_dir / file.name)
        _flush(output_dir)


def _remove_leftovers(folder: Path) -> None:
    for left in folder.glob(".partial-*-*"):
        owner = left.name.split("-")[1]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk: power may go at any time."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and writes their lists by itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_ir(model: ov.Model, folder: Path, *, compress_to_fp16: bool = False) -> None:
    """Write an IR, and make sure that all of it was: OpenVINO does not look at a full disk."""
    try:
        ov.save_model(model, folder / IR_NAME, compress_to_fp16=compress_to_fp16)
        ov.Core().read_model(folder / IR_NAME)  # maps the weights, and misses what is not there
    except RuntimeError:
        raise OSError(errno.ENOSPC, "is the disk full?", str(folder)) from None


# Beside each model lies a record: how it was made, and size and SHA-256 of every file. A folder
# of IRs is tens of seconds' reading where T5-XXL is in it, so hashes are not for every load:
#
# - whoever keeps or copies a finished model instead of making it again reads all of it;
# - whoever loads one compares sizes, and hashes up to `_QUICK_TO_HASH`: graphs and configurations
#   always, weights of small models. Flipped bits in large weights wait for the next conversion.
_RECORDS = ("conversion.json", "optimization.json")
_QUICK_TO_HASH = 32_000_000  # bytes: about 0.03 seconds


def _write_record(record: dict[str, Any], file: Path) -> None:
    """Write down how the model in this folder was made, and what its files are."""
    files = {
        other.name: {"size": other.stat().st_size, "sha256": _sha256(other)}
        for other in sorted(file.parent.iterdir())
    }
    file.write_text(json.dumps({**record, "files": files}, indent=1), encoding="utf-8")


def _read_record(file: Path) -> dict[str, Any]:
    """What `_write_record` has written; empty if there is nothing of the kind."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        sealed = all({"size", "sha256"} <= noted.keys() for noted in record["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return record if sealed else {}


def _find_damage(folder: Path, record: dict[str, Any], *, thorough: bool) -> str | None:
    """The first file of a model that is not as its record says; `thorough`: hash all."""
    for name, noted in record.get("files", {}).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != noted["size"]:
            return name
        if (thorough or noted["size"] <= _QUICK_TO_HASH) and _sha256(file) != noted["sha256"]:
            return name
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_json(content: dict, file: Path) -> None:
    """Write all of it or nothing."""
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(partial)
    os.replace(partial, file)
    _flush(file.parent)


def _check_output(output_dir: Path, sources: Iterable[Path]) -> None:
    """An output must not be mixed up with what it is made from."""
    if output_dir.is_file():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file: name a folder.")
    written = [output_dir.resolve(), *(output_dir.resolve() / name for name in PARTS)]
    for source in sources:
        if any(source.resolve() in (folder, *folder.parents) for folder in written):
            place = "is" if written[0] == source.resolve() else "lies in"
            raise ValueError(
                f"output_dir={str(output_dir)!r} {place} the source folder {str(source)!r}: "
                "choose another."
            )


# ---- the whole pipeline -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One of the three models: where a checkpoint keeps it and how it becomes an IR."""

    folder: str
    loader: type
    trace: Callable[[Any], ov.Model]


PARTS = {
    "text_encoder": _Part("text_encoder", T5EncoderModel, _trace_text_encoder),
    "transformer": _Part("transformer", PixArtTransformer, _trace_transformer),
    "vae_decoder": _Part("vae", AutoencoderKL, _trace_vae_decoder),
}


def convert_pipeline(
    model_id: str | Path,
    output_dir: str | Path,
    *,
    weight_format: str | dict[str, str] = "fp16",
    text_encoder: str | Path | None = None,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    scheduler: str | Path | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force: bool = False,
) -> Path:
    """Turn a PixArt-α or PixArt-Σ checkpoint into a folder of OpenVINO IRs and return the folder.

    `model_id`: a Hugging Face id or a local diffusers folder (safetensors only).
    `weight_format`: "fp32", "fp16", "int8" or "int4", for the weights of all three models, or one
    for each that is not to have "fp16": {"text_encoder": "int8"}. Names are those of PARTS.
    `text_encoder`, `transformer`, `vae`, `scheduler`: take this component from elsewhere, an id or
    a folder that holds it alone or in a subfolder of its name. Fine-tuned and few-step models
    often publish nothing but a transformer.
    `lora`: an id or a folder of a LoRA for the transformer, as peft saves it; it is added to the
    weights, `lora_scale` times, before they are converted.
    `revision` (of `model_id`), `cache_dir`, `token`, `local_files_only`: as in `huggingface_hub`.
    `force`: convert again what is already there.

    Only one model is in memory at a time, and models already converted from the same checkpoint
    in the same format are kept. `model_index.json` is written last: a folder without it is not
    finished, and the same call finishes it.
    """
    formats = _weight_formats(weight_format)
    _check(isinstance(output_dir, str | Path), "output_dir", output_dir, "the path of a folder")
    others = {
        "text_encoder": text_encoder,
        "transformer": transformer,
        "vae": vae,
        "scheduler": scheduler,
    }
    others = {name: given for name, given in others.items() if given is not None}
    hub = (cache_dir, token, local_files_only)
    source = _fetch(model_id, revision, *hub, names=_COMPONENTS - set(others))
    index = _read_model_index(source)
    _check_torch_folder(source, but=others)
    folders = {name: source / name for name in _COMPONENTS}
    for name, given in others.items():
        folders[name] = _fetch_component(name, given, *hub)
    _check_components_fit(folders)
    _check(_is_number(lora_scale), "lora_scale", lora_scale, "a number; 1 is full strength")
    if lora is not None:
        others |= {"lora": lora, "lora_scale": lora_scale}
        folders["lora"] = _fetch_lora(lora, *hub)
    output_dir = Path(output_dir)
    _check_output(output_dir, {source, *(folders[name] for name in others.keys() & folders.keys())})
    index = {name: index[name] for name in index if name[0] == "_" or name in _COMPONENTS}
    index["scheduler"] = ["diffusers", _read_scheduler_name(folders["scheduler"])]
    command = _call_text(
        "convert_pipeline", model_id, output_dir, weight_format=weight_format, **others
    )
    prints = _fingerprints(folders, lora_scale)
    missing = _missing(output_dir, formats, prints, force, thorough=False)
    costs = {name: _cost(folders[PARTS[name].folder], formats[name]) for name in missing}
    _check_resources(costs, output_dir)
    with _writing_to(output_dir, command):
        missing = _missing(output_dir, formats, prints, force, thorough=True)
        _convert_all(folders, lora_scale, output_dir, formats, prints, missing)
        _save_tokenizer(folders["tokenizer"], output_dir / "tokenizer")
        with _staged(output_dir / "scheduler") as folder:
            shutil.copy(folders["scheduler"] / "scheduler_config.json", folder)
        _write_json(index, output_dir / MODEL_INDEX)
    return output_dir


def _weight_formats(weight_format: str | dict[str, str]) -> dict[str, str]:
    """One format for each of PARTS."""
    if not isinstance(weight_format, dict):
        weight_format = dict.fromkeys(PARTS, weight_format)
    for name, value in weight_format.items():
        choices = ", ".join(repr(part) for part in PARTS)
        _check(name in PARTS, "weight_format", weight_format, f"formats for some of {choices}")
        _check_weight_format(value)
    return {name: weight_format.get(name, "fp16") for name in PARTS}


def _fingerprints(folders: dict[str, Path], lora_scale: float) -> dict[str, dict]:
    """What tells for each model whether it has been made from these files."""
    prints = {name: _fingerprint(folders[part.folder]) for name, part in PARTS.items()}
    if "lora" in folders:
        added = {"scale": lora_scale, **_fingerprint(folders["lora"])}
        prints["transformer"] = {**prints["transformer"], "lora": added}
    return prints


def _missing(
    output_dir: Path,
    formats: dict[str, str],
    prints: dict[str, dict],
    force: bool,
    *,
    thorough: bool,
) -> list[str]:
    """The models that are not there yet, or not as they should be."""
    return [
        name
        for name in PARTS
        if force
        or not _is_converted(output_dir / name, formats[name], prints[name], thorough=thorough)
    ]


def _convert_all(
    folders: dict[str, Path],
    lora_scale: float,
    output_dir: Path,
    formats: dict[str, str],
    prints: dict[str, dict],
    missing: list[str],
) -> None:
    """Convert the models that are not there yet, one after another."""
    if missing:
        (output_dir / MODEL_INDEX).unlink(missing_ok=True)
    with tqdm(total=len(PARTS), unit="model") as bar:
        for name, part in PARTS.items():
            bar.set_description(f"Keeping {name}")
            if name in missing:
                memory = _cost(folders[part.folder], formats[name]).memory / 1e9

                def tell(doing: str, about=f"Converting {name}, {memory:.1f} GB of memory") -> None:
                    bar.set_description(f"{about}: {doing}")

                tell("loading")
                module = _load_part(folders[part.folder], part.loader)
                if name == "transformer" and "lora" in folders:
                    module = _fuse_lora(module, folders["lora"], lora_scale)
                _convert(part.trace, module, output_dir / name, formats[name], prints[name], tell)
                del module
                release_memory()
            bar.update()
        bar.set_description("Converted")


@dataclass(frozen=True)
class _Cost:
    """What it takes to convert a model, in bytes."""

    memory: int  # within which the whole process runs
    free: int  # of memory that has to be free before
    disk: int


def _cost(folder: Path, weight_format: str) -> _Cost:
    """Work out from the sizes of a checkpoint's weights what its conversion takes.

    `python -m tests.benchmarks.memory` puts these figures beside measured ones.
    """
    _, files, dtype = _stored_weights(folder)
    sizes = [size for file in files for size in _weight_sizes(file)]
    count, largest, is_wide = sum(sizes), max(sizes, default=0), dtype == torch.float32
    output = _BYTES_A_WEIGHT[weight_format] * count
    if weight_format == "fp32":
        new = 0 if is_wide else 4 * count
    else:  # float32 becomes float16 first
        new = max(2 * count if is_wide else 0, output if weight_format != "fp16" else 0)
    # One matrix at a time is taken apart: NNCF has some ten bytes of it at hand for each weight.
    free = new + (10 if weight_format in ("int8", "int4") else 4) * largest
    return _Cost(round(_PROCESS + free), round(free), round(1.02 * output))


_BYTES_A_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 0.6}  # on disk
_PROCESS = 800_000_000  # bytes of Python with torch, OpenVINO and NNCF


def _weight_sizes(file: Path) -> list[int]:
    """How many numbers each tensor of a file holds."""
    with safe_open(file, framework="pt") as tensors:
        return [math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118


def _check_resources(costs: dict[str, _Cost], output_dir: Path) -> None:
    """Before anything is done, say in one line if memory or disk will not be enough."""
    free = psutil.virtual_memory().available
    for name, cost in costs.items():
        if cost.free > free:
            raise MemoryError(
                f"Converting the {name} takes {cost.free / 1e9:.1f} GB of memory, and "
                f"{free / 1e9:.1f} GB are free: close other programs, or choose a smaller "
                "weight_format."
            )
    _check_disk(sum(cost.disk for cost in costs.values()), output_dir)


def _check_disk(size: float, output_dir: Path) -> None:
    there = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    total, _, free = shutil.disk_usage(there)
    if total and size > free:  # a place without a disk, as /sys, refuses in its own words
        raise OSError(
            f"output_dir={str(output_dir)!r} needs {size / 1e9:.1f} GB of disk, and "
            f"{free / 1e9:.1f} GB are free: make room there, or name another folder."
        )


_MODELS = frozenset({"text_encoder", "transformer", "vae"})
_COMPONENTS = _MODELS | {"tokenizer", "scheduler"}


def _fetch(
    model_id, revision, cache_dir, token, local_files_only, *, names=_COMPONENTS, kind="model_id"
) -> Path:
    """The local folder of `model_id`, downloaded if it is a hub id; never anything pickled.

    `names`: the components whose weights are wanted; `kind`: the argument to name in errors.
    """
    is_name = isinstance(model_id, str | Path) and bool(str(model_id))
    _check(is_name, kind, model_id, "a folder or a Hugging Face id")
    if Path(model_id).is_dir():
        return Path(model_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model_id)) or isinstance(model_id, Path):
        raise FileNotFoundError(
            f"{kind}={str(model_id)!r} is neither a folder here nor a Hugging Face id: "
            "check the path, or use an id such as 'PixArt-alpha/PixArt-XL-2-512x512'."
        )
    weights = [f"{name}/*.safetensors" for name in names]
    if kind == "model_id":
        weights += [f"{name}/openvino*" for name in PARTS]
    else:  # a component may lie in a repository of its own
        weights += ["model*.safetensors", "diffusion_pytorch_model*.safetensors"]
        weights += ["*adapter_model.safetensors"]
    try:
        folder = snapshot_download(
            str(model_id),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[*weights, "*.json", "tokenizer/spiece.model"],
            # second copies of the weights in other precisions: gigabytes that nobody would read
            ignore_patterns=["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*"],
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{kind}={str(model_id)!r} is no folder here and cannot be fetched from Hugging "
            f"Face: check its name, the connection and, for a gated model, token= ({reason})"
        ) from error
    return Path(folder)


def _read_model_index(folder: Path) -> dict:
    """The folder's `model_index.json`, if it is one of a PixArt pipeline."""
    file = folder / MODEL_INDEX
    if not file.is_file():
        if _is_openvino_folder(folder) or (folder / ".lock").is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} is an unfinished OpenVINO folder ({MODEL_INDEX} is missing): "
                f"run {_how_to_finish(folder)} once more to finish it."
            )
        raise FileNotFoundError(
            f"{str(folder)!r} has no {MODEL_INDEX}: name the folder of a whole PixArt pipeline."
        )
    index = read_json(file)
    if find_family(index.get("_class_name")) is None:
        raise ValueError(
            f"{str(folder)!r} holds a {index.get('_class_name')}: only PixArtAlphaPipeline and "
            "PixArtSigmaPipeline can be used here, choose a PixArt-α or PixArt-Σ checkpoint."
        )
    for name, given in index.items():  # optimum imports what stands here
        library = given[0] if isinstance(given, list) and given else None
        if name not in _MODELS and library not in (None, "diffusers", "transformers"):
            raise ValueError(
                f"{str(file)!r} takes its {name} from {given!r}: code from outside diffusers and "
                "transformers is never run, name the checkpoint that this one was made from."
            )
    return index


def _is_openvino_folder(folder: Path) -> bool:
    return any((folder / name / IR_NAME).is_file() for name in PARTS)


def _check_torch_folder(folder: Path, *, but: Iterable[str] = ()) -> None:
    """Every component `but` these must be there, with weights that cannot run code."""
    if _is_openvino_folder(folder):
        raise ValueError(
            f"model_id={str(folder)!r} is converted already: load it with from_pretrained, "
            "or name the checkpoint that it was made from."
        )
    needed = sorted(_COMPONENTS - set(but))
    for name in needed:
        if not (folder / name).is_dir():
            mend = f" or name a {name}=" if name != "tokenizer" else ""
            raise FileNotFoundError(
                f"{str(folder)!r} has no folder {name!r}: the checkpoint is incomplete, "
                f"download it again{mend}."
            )
    for name in needed:
        if name not in ("tokenizer", "scheduler"):
            _check_weights(folder / name)


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = next(itertools.chain(folder.glob("*.bin"), folder.glob("*.pt")), None)
    held = f"only pickled weights ({pickled.name})" if pickled else "no weights"
    raise ValueError(
        f"{str(folder)!r} holds {held}, and only safetensors are read: "
        "save the model again with safe_serialization=True."
    )


def _fetch_component(name: str, given: str | Path, *hub) -> Path:
    """The folder of one component that was named apart from its pipeline."""
    folder = _fetch(given, None, *hub, names={name}, kind=name)
    folder = folder / name if (folder / name).is_dir() else folder
    config = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
    if not config.is_file():
        raise FileNotFoundError(
            f"{name}={str(given)!r} holds no {name} ({config.name} is missing): "
            "name a folder that holds one, alone or in a subfolder of its name."
        )
    if name != "scheduler":
        _check_weights(folder)
    return folder


def _fetch_lora(lora: str | Path, *hub) -> Path:
    """The folder of a LoRA, or its subfolder as diffusers' training script for PixArt names it."""
    folder = _fetch(lora, None, *hub, names=set(), kind="lora")
    folder = next((f for f in (folder, folder / "transformer_lora") if _has_lora(f)), None)
    if folder is None:
        raise FileNotFoundError(
            f"lora={str(lora)!r} holds no adapter_config.json: name a folder that peft has saved."
        )
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    _check(kind == "LORA", "lora", str(lora), f"a LoRA, not of type {kind!r}")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"lora={str(lora)!r} holds no adapter_model.safetensors, and only safetensors are "
            "read: save it again with safe_serialization=True."
        )
    return folder


def _has_lora(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _fuse_lora(transformer: PixArtTransformer, folder: Path, scale: float) -> PixArtTransformer:
    """Add a LoRA's low-rank matrices to the weights that they belong to, so that they cost nothing.

    peft tolerates matrices that fit nowhere, or are missing; here that is refused.
    """
    import peft  # not at the top: it takes a second, and most conversions do without

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        expected = set(tensors.keys())
    try:
        with _quiet():
            adapted = peft.PeftModel.from_pretrained(transformer, folder)
            found = set(peft.get_peft_model_state_dict(adapted))
            for layer in adapted.modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    layer.scale_layer(scale)
            fused = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError):
        found = set()
    if found != expected:
        raise ValueError(
            f"lora={str(folder)!r} does not fit the transformer: choose one that was trained for "
            "this checkpoint."
        )
    return fused


def _check_components_fit(folders: dict[str, Path]) -> None:
    """Say in one line if the transformer speaks another width than its neighbours."""
    transformer = read_json(folders["transformer"] / "config.json")
    for name, theirs, ours in (
        ("text_encoder", "d_model", "caption_channels"),
        ("vae", "latent_channels", "in_channels"),
    ):
        width = read_json(folders[name] / "config.json").get(theirs)
        expected = transformer.get(ours)
        if None not in (width, expected) and width != expected:
            raise ValueError(
                f"transformer={str(folders['transformer'])!r} expects {ours}={expected}, but "
                f"{name}={str(folders[name])!r} has {theirs}={width}: choose two that fit."
            )


def _load_part(folder: Path, loader: type) -> torch.nn.Module:
    """Load one model in the precision it is stored in, so that its weights stay memory-mapped."""
    _check_downloads(folder)
    variant, _, dtype = _stored_weights(folder)
    precision = {"torch_dtype" if hasattr(loader, "save_config") else "dtype": dtype}
    with _quiet(), _no_transformers_bars():
        module, loaded = loader.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            variant=variant,
            output_loading_info=True,
            **precision,
        )
    if loaded["missing_keys"]:
        name = min(loaded["missing_keys"])
        raise ValueError(
            f"{str(folder)!r} lacks the weight {name!r}, its files are damaged or belong to "
            "another model: download it again."
        )
    return module


def _stored_weights(folder: Path) -> tuple[str | None, list[Path], torch.dtype]:
    """Which variant of the weights to read (None: the plain one), its files and precision."""
    pattern = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if match := pattern.fullmatch(file.name):
            variants.setdefault(match.group(1) or "", []).append(file)
    if not variants:
        raise FileNotFoundError(
            f"{str(folder)!r} has no model*.safetensors or diffusion_pytorch_model*.safetensors: "
            "save the model again with save_pretrained."
        )
    variant = min(variants)  # "" comes first
    dtypes = {_stored_dtype(file) for file in variants[variant]}
    one = dtypes.pop() if len(dtypes) == 1 else "F32"
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(one, torch.float32)
    return variant or None, variants[variant], dtype


def _stored_dtype(file: Path) -> str:
    """The precision of all tensors in a file, or "F32" where they differ."""
    try:
        with safe_open(file, framework="pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}): download it again.") from None
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _check_downloads(folder: Path) -> None:
    """Hold weights against their checksums, where there are any: the hub's cache names by SHA-256.

    Safetensors have none of their own: elsewhere, only what is cut short or misnamed is noticed.
    """
    for file in folder.glob("*.safetensors"):
        checksum = file.resolve().name
        if re.fullmatch("[0-9a-f]{64}", checksum) and _sha256(file) != checksum:
            raise ValueError(f"{str(file)!r} is damaged, its checksum differs: download it again.")


def _read_scheduler_name(folder: Path) -> str:
    """The class of a folder's scheduler, one of diffusers' that PixArt's pipelines can drive."""
    file = folder / "scheduler_config.json"
    name = str(read_json(file).get("_class_name"))
    found = getattr(diffusers, name, None)
    known = isinstance(found, type) and issubclass(found, SchedulerMixin)
    if not known or not hasattr(found, "scale_model_input"):
        raise ValueError(
            f"{str(file)!r} names the scheduler {name!r}, which diffusers has not for PixArt: "
            "name a folder with another one as scheduler=."
        )
    return name


@contextlib.contextmanager
def _no_transformers_bars() -> Iterator[None]:
    """One bar is enough: hide transformers' own while a model loads."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _save_tokenizer(source: Path, output: Path) -> None:
    """Read the tokenizer (a `spiece.model` is enough) and write it in today's format."""
    with _quiet(), _staged(output) as folder:
        T5Tokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)


def _fingerprint(folder: Path) -> dict[str, list[int]]:
    """Names, sizes and times of a model's files: enough to see that a checkpoint has changed."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _is_converted(folder: Path, weight_format: str, source: dict, *, thorough: bool) -> bool:
    """Whether `folder` holds a whole IR of this format, made from this checkpoint.

    A model converted on its own, by one of the three functions above, has no source on record and
    is taken as it is.
    """
    record = _read_record(folder / "conversion.json")
    return (
        record.get("weight_format") == weight_format
        and record["source"] in (None, source)
        and _find_damage(folder, record, thorough=thorough) is None
    )


def summarize_models(ov_dir: str | Path) -> pd.DataFrame:
    """A table of the models in an OpenVINO folder: size on disk in MB, inputs, output.

    A `?` in a shape is a dimension that takes any size.
    """

    def ports(ports_of_model: list) -> str:
        shapes = {port.get_any_name(): port.get_partial_shape() for port in ports_of_model}
        return ", ".join(f"{name} {_shape_text(shape)}" for name, shape in shapes.items())

    core, rows = ov.Core(), {}
    for name in PARTS:
        file = Path(ov_dir) / name / IR_NAME
        if file.is_file():
            model = core.read_model(file)
            size = file.with_suffix(".bin").stat().st_size / 1e6
            rows[name] = [round(size, 2), ports(model.inputs), ports(model.outputs)]
    if not rows:
        raise FileNotFoundError(f"ov_dir={str(ov_dir)!r} holds no model: convert one first.")
    return pd.DataFrame.from_dict(rows, "index", columns=["size, MB", "inputs", "output"])


def _shape_text(shape: ov.PartialShape) -> str:
    sizes = ("?" if axis.is_dynamic else str(axis.get_length()) for axis in shape)
    return f"({', '.join(sizes)})"


# ==================================================================================================
# 2. Run
# ==================================================================================================

# Settings that OpenVINO should compile a model with are stored inside its IR, in the section that
# OpenVINO reads by itself: whichever way a model is loaded, copied or saved, they come along.
# OpenVINO leaves some of them aside there (the inference precision), so `_compile_config` below
# passes these two on. What the user hands over as `ov_config` wins.
STORED_OPTIONS = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


def store_runtime_options(model: ov.Model, **options: str | int) -> None:
    """Write compile options into an IR, as in `store_runtime_options(model, X="f32")`."""
    for name, value in options.items():
        if name not in STORED_OPTIONS:
            raise ValueError(f"{name}={value!r} cannot be stored: use {STORED_OPTIONS}.")
        model.set_rt_info(str(value), ["runtime_options", name])


def stored_runtime_options(model: ov.Model) -> dict[str, str]:
    """Read what `store_runtime_options` has written."""
    paths = {name: ["runtime_options", name] for name in STORED_OPTIONS}
    return {
        name: str(model.get_rt_info(path).value)
        for name, path in paths.items()
        if model.has_rt_info(path)
    }


def _compile_config(model: ov.Model, user: dict[str, Any]) -> dict[str, Any]:
    """What one model is compiled with: defaults, then its stored options, then the user's."""
    return {"PERFORMANCE_HINT": "LATENCY", **stored_runtime_options(model), **user}


@dataclass(frozen=True)
class GenerationDefaults:
    """How a checkpoint likes to be called; the fields are arguments of the pipeline's call."""

    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    height: int
    width: int
    timesteps: tuple[int, ...] | None = None  # only for one-step (DMD) checkpoints


def default_settings(model_dir: str | Path) -> GenerationDefaults:
    """Read a checkpoint's own defaults from its folder, OpenVINO or diffusers.

    LCM checkpoints draw in 4 steps and without guidance (PixArt: any scale ≤ 1 switches it off),
    the others in 20 steps with scale 4.5. α reads 120 tokens, Σ reads 300. Size in pixels.

    DMD checkpoints draw in one step from the middle of the schedule, see `timesteps`. Nothing
    in their folder says so. What tells them is the scheduler that their model card asks for, DDPM,
    which no other α checkpoint comes with: `convert_pipeline(..., scheduler=)` puts it there.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"model_dir={str(model_dir)!r} is no folder: check the path.")
    family = family_of(folder)
    scheduler = _read_scheduler_name(folder / "scheduler")
    vae = "vae_decoder" if _is_openvino_folder(folder) else "vae"
    blocks = read_json(folder / vae / "config.json").get("block_out_channels", [0] * 4)
    sample_size = read_json(folder / "transformer" / "config.json").get("sample_size", 128)
    size = sample_size * 2 ** (len(blocks) - 1)
    shape = {"max_sequence_length": family.max_tokens, "height": size, "width": size}
    if scheduler == "LCMScheduler":
        return GenerationDefaults(num_inference_steps=4, guidance_scale=0.0, **shape)
    if scheduler == "DDPMScheduler" and family is ALPHA:
        # The only timestep such a model was trained at: model card of
        # PixArt-Alpha-DMD-XL-2-512x512.
        return GenerationDefaults(
            num_inference_steps=1, guidance_scale=1.0, timesteps=(400,), **shape
        )
    return GenerationDefaults(num_inference_steps=20, guidance_scale=4.5, **shape)


def read_json(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(file)!r} is missing: the folder is incomplete, download or convert it again."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # of bytes that are no text, too
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{str(file)!r} is damaged: download or convert it again.")
    return config


# ---- the text encoder in transformers' place ----------------------------------------------------


class OVPixArtTextEncoder(OVModelTextEncoder):
    """The compiled T5, which remembers what it has read and can leave memory between prompts."""

    REMEMBERED = 16  # prompts; T5-XXL's answer to one takes 2 MB (α) or 5 MB (Σ)

    def __init__(self, model: ov.Model, parent_pipeline: OVDiffusionPipeline, model_name: str):
        self._answers: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._shapes: dict[str, ov.PartialShape] | None = None
        super().__init__(model, parent_pipeline, model_name)

    @property
    def model(self) -> ov.Model | ov.CompiledModel:
        """The model, read again from its folder, in the shapes it had, if it was released."""
        if self._model is None:
            file = self.model_save_dir / IR_NAME
            if self.parent_pipeline._compile_only:
                self._model = self.request = self.parent_pipeline._compile_model(
                    file, self._device, self.ov_config
                )
            else:
                self._model = self.parent_pipeline.load_model(file)
                self._model.reshape(self._shapes)
        return self._model

    @model.setter
    def model(self, model: ov.Model | ov.CompiledModel) -> None:
        self._model = model

    @property
    def input_shape(self) -> ov.PartialShape:
        """`(B, L)` of `input_ids`; known without the model."""
        if self._model is None:
            return self._shapes["input_ids"]
        return self._model.input("input_ids").get_partial_shape()

    def release(self) -> None:
        """Let go of the model and its weights; a prompt that is new brings them back."""
        file = self.model_save_dir / IR_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(file)!r} is gone, and the text encoder could not be read again: "
                "keep the folder, or do not release the text encoder."
            )
        if self._model is not None:
            inputs = self._model.inputs
            self._shapes = {port.get_any_name(): port.get_partial_shape() for port in inputs}
            self._model = self.request = None
            release_memory()

    def compile(self) -> None:
        _ = self.model  # with `compile_only` that is all
        super().compile()

    def clear_requests(self) -> None:
        """Forget what another device, or another shape, has computed."""
        self.forget()
        super().clear_requests()

    def forget(self) -> None:
        """Read every prompt anew."""
        self._answers.clear()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> ModelOutput:
        """Read tokens, `(B, L)`, and return `last_hidden_state`, `(B, L, D)` float32.

        Every text is read once, and by itself, so that what T5 says about it does not depend on
        its neighbours, nor on what was read before.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        texts = torch.stack([input_ids, attention_mask], dim=1).to(torch.int64).numpy()  # (B, 2, L)
        keys = [text.tobytes() for text in texts]
        answers = {key: self._answers[key] for key in keys if key in self._answers}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in answers}
        if new:
            answers |= zip(new, self._read(np.stack(list(new.values()))), strict=True)
        for key in answers:
            self._answers[key] = answers[key]
            self._answers.move_to_end(key)
        while len(self._answers) > self.REMEMBERED:
            self._answers.popitem(last=False)
        stacked = np.stack([answers[key] for key in keys])
        return ModelOutput(last_hidden_state=torch.from_numpy(stacked))

    def _read(self, texts: np.ndarray) -> list[np.ndarray]:
        """Run the model on `(N, 2, L)` ids and masks; a static batch is filled up with the last.

        What only fills a text up to L is not read, unless the shapes are static, and zeros stand
        for what T5 would have said of it: the DiT looks at none of it.
        """
        self.compile()
        batch, tokens = self.input_shape
        size = 1 if batch.is_dynamic else batch.get_length()
        answers = []
        for i in range(0, len(texts), size):
            part = texts[i : i + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            read = filled[:, :, : _count_tokens(filled[:, 1])] if tokens.is_dynamic else filled
            inputs = {"input_ids": read[:, 0], "attention_mask": read[:, 1]}
            said = self.request(inputs)[0]
            padding = ((0, 0), (0, filled.shape[2] - read.shape[2]), (0, 0))
            answers += list(np.pad(said[: len(part)], padding))
        return answers


def _count_tokens(masks: np.ndarray | torch.Tensor) -> int:
    """How many tokens of `(B, L)` masks to read, so that only padding is left out.

    A text without any token is left as it is: its padding would be all there is to look at.
    """
    read = torch.as_tensor(masks) > 0
    if not read.any(dim=1).all():
        return read.shape[1]
    return int(read.any(dim=0).nonzero()[-1]) + 1


def release_memory() -> None:
    """Give the system back what a model has left: garbage, and heap that is free."""
    gc.collect()
    _trim_heap()


def _trim_heap() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


# ---- the transformer in diffusers' place --------------------------------------------------------


class OVPixArtTransformer(OVPipelinePart):
    """The compiled DiT, called the way diffusers calls `PixArtTransformer2DModel`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor | None] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the noise, `(B, 8, h, w)`, in latents `(B, 4, h, w)` at `timestep` `(B,)`.

        With guidance the pipeline sends unconditional and conditional halves as one batch.
        """
        self.compile()
        if encoder_attention_mask is None:
            encoder_attention_mask = torch.ones(encoder_hidden_states.shape[:2])
        if self.model.input("encoder_attention_mask").get_partial_shape()[1].is_dynamic:
            tokens = _count_tokens(encoder_attention_mask)
            encoder_hidden_states = encoder_hidden_states[:, :tokens]
            encoder_attention_mask = encoder_attention_mask[:, :tokens]
        inputs = {
            "hidden_states": hidden_states,
            "timestep": torch.as_tensor(timestep).expand(hidden_states.shape[0]),
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            **(added_cond_kwargs or {}),
        }
        sample = torch.from_numpy(self._infer(inputs))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _infer(self, inputs: dict[str, torch.Tensor | None]) -> np.ndarray:
        """Run the model, as often as a static batch size asks for.

        A static IR is shaped for the pictures alone: a call with guidance brings twice as many
        rows and takes two runs, one without takes one, and no run computes what nobody reads.
        """
        arrays = {}
        for port in self.model.inputs:
            name = port.get_any_name()
            if inputs.get(name) is None:
                raise ValueError(
                    f"added_cond_kwargs lacks {name!r}, which this model was trained with: "
                    "its transformer/config.json must say sample_size 128."
                )
            dtype = torch.int64 if port.get_element_type() == ov.Type.i64 else torch.float32
            arrays[name] = np.ascontiguousarray(inputs[name].detach().to(dtype).numpy())
        rows = len(arrays["hidden_states"])
        batch = self.model.input("hidden_states").get_partial_shape()[0]
        size = rows if batch.is_dynamic else batch.get_length()
        results = [
            self.request({k: v[i : i + size] for k, v in arrays.items()}, share_inputs=True)[0]
            for i in range(0, rows, size)
        ]
        return results[0] if len(results) == 1 else np.concatenate(results)


# ---- the VAE in diffusers' place ----------------------------------------------------------------


class OVPixArtVae(OVModelVae):
    """The compiled VAE decoder, with the tiling and slicing of diffusers' AutoencoderKL.

    `enable_slicing()` decodes pictures of a batch one by one, and changes nothing else.
    `enable_tiling()` decodes what is larger than `tile_latent_min_size` in tiles that overlap and
    are blended: memory stays that of one tile, and colours may differ a little between tiles.
    """

    enable_tiling, disable_tiling = AutoencoderKL.enable_tiling, AutoencoderKL.disable_tiling
    enable_slicing, disable_slicing = AutoencoderKL.enable_slicing, AutoencoderKL.disable_slicing

    def __init__(self, decoder: OVModelVaeDecoder, encoder: Any = None):
        super().__init__(decoder=decoder, encoder=encoder)
        self.use_tiling = self.use_slicing = False
        size = decoder.config.get("sample_size", 512)
        self.tile_sample_min_size = size[0] if isinstance(size, list | tuple) else size
        scale = 2 ** (len(decoder.config["block_out_channels"]) - 1)
        self.tile_latent_min_size = self.tile_sample_min_size // scale
        self.tile_overlap_factor = 0.25

    def decode(self, latent_sample: torch.Tensor, *args, **kwargs) -> ModelOutput:
        """Turn latents, `(B, 4, h, w)`, into `sample`, `(B, 3, 8·h, 8·w)` from -1 to 1."""
        tiles = self.use_tiling and max(latent_sample.shape[2:]) > self.tile_latent_min_size
        slices = self.use_slicing and len(latent_sample) > 1
        if not (tiles or slices):
            return self.decoder(latent_sample, *args, **kwargs)
        if self.decoder.model.input("latent_sample").get_partial_shape().is_static:
            raise ValueError(
                "Tiling and slicing do not work with static shapes: reshape(-1, -1, -1) frees "
                "them, vae.disable_tiling() and vae.disable_slicing() do without."
            )
        decode = self._decode_tiled if tiles else self._decode_whole
        parts = latent_sample.split(1) if slices else [latent_sample]
        return ModelOutput(sample=torch.cat([decode(part) for part in parts]))

    def _decode_whole(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents.contiguous())[0]

    def _decode_tiled(self, latents: torch.Tensor) -> torch.Tensor:
        """diffusers' own method, on what it looks for in its VAE."""
        stand_in = SimpleNamespace(
            config=SimpleNamespace(use_post_quant_conv=False),  # the IR has it inside
            decoder=self._decode_whole,
            blend_v=functools.partial(AutoencoderKL.blend_v, None),
            blend_h=functools.partial(AutoencoderKL.blend_h, None),
            tile_sample_min_size=self.tile_sample_min_size,
            tile_latent_min_size=self.tile_latent_min_size,
            tile_overlap_factor=self.tile_overlap_factor,
        )
        return AutoencoderKL.tiled_decode(stand_in, latents, return_dict=False)[0]


# ---- the pipelines ------------------------------------------------------------------------------


class _OVPixArtPipeline(OVDiffusionPipeline):
    """What α and Σ share. Optimum's pipeline with PixArt's transformer, shapes and checks."""

    family: Family
    main_input_name = "prompt"
    export_feature = "text-to-image"

    def __init__(self, *args, compile: bool = True, release_text_encoder: bool = False, **kwargs):
        """Take the place of optimum's constructor; `from_pretrained` is the way in.

        Every route to a pipeline ends here, so this is where stored compile options are read.
        """
        for name in ("transformer", "vae_decoder"):
            if kwargs.get(name) is None:
                raise FileNotFoundError(
                    f"{str(kwargs.get('model_save_dir'))!r} has no {name}/{IR_NAME}: "
                    "run convert_pipeline once more to finish the folder."
                )
        _check_device(kwargs.get("device", "CPU"))
        _check_intact(Path(kwargs["model_save_dir"]))
        self._turn = threading.RLock()
        # Compile later (unless all is compiled already): the transformer is about to be replaced.
        super().__init__(*args, compile=compile and kwargs.get("compile_only", False), **kwargs)
        self.transformer = OVPixArtTransformer(self.transformer.model, self, "transformer")
        if self.text_encoder is not None:
            self.text_encoder = OVPixArtTextEncoder(self.text_encoder.model, self, "text_encoder")
        self._releases_text_encoder = release_text_encoder
        self.vae = OVPixArtVae(self.vae_decoder, self.vae_encoder)
        for part in self.components.values():
            # A dictionary for each: optimum shares one, and settings would leak between models.
            user = kwargs.get("ov_config") or {}
            part.ov_config = {**user} if self._compile_only else _compile_config(part.model, user)
        # A prompt that is too long is spoken of in our own words: see `_warn_of_cut`.
        self.tokenizer.deprecation_warnings[_TOO_LONG] = True
        if release_text_encoder:
            self.release_text_encoder()
        if compile:
            self.compile()

    def compile(self) -> None:
        """Compile all models, but for a text encoder that is in memory only when it reads."""
        for name, part in self.components.items():
            if name != "text_encoder" or not self._releases_text_encoder:
                part.compile()

    def release_text_encoder(self) -> None:
        """Let go of the text encoder, most of the memory, until a new prompt needs it.

        What the last prompts say is remembered without it. `from_pretrained(...,
        release_text_encoder=True)` does this after every prompt, and loads it for none before.
        """
        if self.text_encoder is not None:
            self.text_encoder.release()

    def encode_prompt(self, *args, **kwargs):
        """As in diffusers; a prompt among the last is remembered, not read again."""
        encoded = super().encode_prompt(*args, **kwargs)
        if self._releases_text_encoder:
            self.release_text_encoder()
        return encoded

    # -- load and save --

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        export: bool = False,
        *,
        weight_format: str | dict[str, str] = "fp16",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **kwargs,
    ) -> "_OVPixArtPipeline":
        """Load a pipeline from an OpenVINO folder, or convert a PixArt checkpoint and load that.

        `model_id`: an OpenVINO folder, a diffusers folder or a Hugging Face id of either. What is
        not OpenVINO yet is converted to `weight_format` in a temporary folder that goes with the
        pipeline; `convert_pipeline` or `save_pretrained` keep it.
        `release_text_encoder`: keep it in memory only while it reads a prompt that is new.
        `device`, `ov_config`, `compile` and the rest: as in optimum-intel's OVDiffusionPipeline.
        """
        if trust_remote_code:
            raise ValueError(
                "trust_remote_code=True is not supported: PixArt needs no code from a model's "
                "folder, leave it out."
            )
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        folder = _fetch(model_id, *hub.values())
        family = family_of(folder)
        if family is not cls.family:
            name = family.class_name
            raise ValueError(f"model_id={str(model_id)!r} is a {name}: load it with OV{name}.")
        converted = None
        if not _is_openvino_folder(folder):
            converted = Path(tempfile.mkdtemp(prefix="ov-pixart-"))
            try:
                convert_pipeline(folder, converted, weight_format=weight_format)
            except BaseException:
                shutil.rmtree(converted, ignore_errors=True)
                raise
        folder = converted or folder
        _check_openvino_folder(folder)
        pipeline = super().from_pretrained(folder, **kwargs)
        if converted:
            weakref.finalize(pipeline, shutil.rmtree, converted, ignore_errors=True)
        return pipeline

    @staticmethod
    def load_model(file_name: str | Path, quantization_config: Any = None) -> ov.Model:
        """Read one IR."""
        try:
            return OVDiffusionPipeline.load_model(file_name)
        except RuntimeError:
            raise ValueError(_damaged(Path(file_name))) from None  # it, or its .bin

    @staticmethod
    def _compile_model(model, device=None, ov_config=None, model_save_dir=None):
        """Compile straight from disk (`compile_only=True`), stored options included."""
        config = _compile_config(_OVPixArtPipeline.load_model(model), ov_config or {})
        return OVDiffusionPipeline._compile_model(model, device, config, model_save_dir)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """Write the pipeline to a folder, `model_index.json` last."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory={str(folder)!r} is a file: name a folder.")
        if folder.resolve() == Path(self.model_save_dir).resolve():
            raise ValueError(
                f"save_directory={str(folder)!r} is where this pipeline reads its weights from: "
                "choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name in (MODEL_INDEX, *(f"{part}/{file}" for part in PARTS for file in _RECORDS)):
            (folder / name).unlink(missing_ok=True)  # of what was here before
        self._save_pretrained(folder)
        self._save_config(folder)
        if push_to_hub:
            return self.push_to_hub(folder, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Float32: what goes in and comes out, whatever precision the device computes in."""
        return torch.float32

    def to(self, *args, device: str | None = None, **kwargs) -> "_OVPixArtPipeline":
        """Move to another device, as in `to("GPU")`; the next call compiles for it."""
        for name in (*args, device):
            if isinstance(name, str):
                _check_device(name)
        return super().to(*args, device=device, **kwargs)

    # -- static shapes --

    @property
    def batch_size(self) -> int:
        """Prompts per call that the models are shaped for, -1 if any number."""
        if self.text_encoder is None:
            return _length(self.transformer.model.inputs[0].get_partial_shape()[0])
        return _length(self.text_encoder.input_shape[0])

    def reshape(
        self,
        batch_size: int,
        height: int,
        width: int,
        num_images_per_prompt: int = -1,
        num_frames: int = -1,
        *,
        max_sequence_length: int | None = None,
    ) -> "_OVPixArtPipeline":
        """Fix the shapes of all models (-1: keep free), for devices and speed that want that.

        `height`, `width` in pixels, divisible by 16. `max_sequence_length`: tokens; fixed to the
        family's own (α 120, Σ 300) where everything else is fixed. Guidance may be on or off at
        any call: see `OVPixArtTransformer`. `num_frames` is for video models, and ignored.
        """
        if self._compile_only:
            raise ValueError(
                "reshape does not work with compile_only=True: load the pipeline without it."
            )
        counts = {"batch_size": batch_size, "num_images_per_prompt": num_images_per_prompt}
        for name, value in counts.items():
            _check(_is_count(value) or value == -1, name, value, "a whole number from 1, or -1")
        for name, value in {"height": height, "width": width}.items():
            rule = f"{self._grid_rule()}, or -1"
            _check(self._fits_grid(value) or value == -1, name, value, rule)
        if max_sequence_length is not None:
            rule = "a whole number from 1"
            _check(_is_count(max_sequence_length), "max_sequence_length", max_sequence_length, rule)

        self.is_dynamic = -1 in {batch_size, height, width, num_images_per_prompt}
        tokens = max_sequence_length or (-1 if self.is_dynamic else self.family.max_tokens)
        pictures = -1 if -1 in counts.values() else batch_size * num_images_per_prompt
        rows, columns = (s if s == -1 else s // self.vae_scale_factor for s in (height, width))

        _reshape(
            self.transformer.model,
            hidden_states={0: pictures, 2: rows, 3: columns},
            timestep={0: pictures},
            encoder_hidden_states={0: pictures, 1: tokens},
            encoder_attention_mask={0: pictures, 1: tokens},
            resolution={0: pictures},
            aspect_ratio={0: pictures},
        )
        _reshape(self.vae_decoder.model, latent_sample={0: pictures, 2: rows, 3: columns})
        if self.text_encoder is not None:
            text = {0: batch_size, 1: tokens}
            _reshape(self.text_encoder.model, input_ids=text, attention_mask=text)
        self.clear_requests()
        return self

    @property
    def _static(self) -> dict[str, int]:
        """Which arguments of a call the models' shapes have fixed, and to what."""
        pictures, tokens, _ = self.transformer.model.input("encoder_hidden_states").partial_shape
        shape = {
            "height": self.height,
            "width": self.width,
            "max_sequence_length": _length(tokens),
            "pictures": _length(pictures),
            "prompts": self.batch_size,
        }
        return {name: value for name, value in shape.items() if value != -1}

    # -- generate --

    def __call__(self, *args, **kwargs):
        """Draw pictures: every argument of diffusers' PixArt pipelines, with the same meaning.

        A pipeline with static shapes takes its own size for granted and draws in exactly that
        size, so that resolution binning is off.
        """
        signature = inspect.signature(self.auto_model_class.__call__)
        call = dict(signature.bind(self, *args, **kwargs).arguments)
        call = {**call.pop("kwargs", {}), **call}
        del call["self"]
        if call.get("negative_prompt_embeds") is not None:
            call.setdefault("negative_prompt", None)  # diffusers takes one of the two
        defaults = {name: p.default for name, p in signature.parameters.items()}
        self._check_numbers({**defaults, **call})
        prompts = self._check_prompts({**defaults, **call})
        self._apply_static_shapes(call, prompts)
        self._check_call({**defaults, **call}, prompts)
        # One caller at a time: the scheduler, the progress bar and the compiled models keep state.
        with self._turn, _unsaid(self.auto_model_class.__module__, "truncated"):
            self._warn_of_cut({**defaults, **call})
            return super().__call__(**call)

    def _check_numbers(self, call: dict[str, Any]) -> None:
        """Check what the other checks reckon with."""
        for name in (
            *("num_inference_steps", "num_images_per_prompt"),
            *("max_sequence_length", "callback_steps"),
        ):
            _check(_is_count(call[name]), name, call[name], "a whole number from 1")
        scale = call["guidance_scale"]
        rule = "a number; up to 1 switches guidance off"
        _check(_is_number(scale), "guidance_scale", scale, rule)

    def _check_prompts(self, call: dict[str, Any]) -> int:
        """Check what is to be drawn, text or embeddings, and return the number of prompts."""
        prompt, embeds = call["prompt"], call["prompt_embeds"]
        negative, negative_embeds = call["negative_prompt"], call["negative_prompt_embeds"]
        if embeds is None:
            _check(_is_text(prompt), "prompt", prompt, "a string or a list of at least one string")
            prompts = 1 if isinstance(prompt, str) else len(prompt)
        else:
            _check(prompt is None, "prompt", prompt, "None where prompt_embeds is given")
            config = self.transformer.config
            width = config.caption_channels or config.cross_attention_dim
            _check_shape("prompt_embeds", embeds, ("prompts", "tokens", width))
            mask = call["prompt_attention_mask"]
            _check_shape("prompt_attention_mask", mask, tuple(embeds.shape[:2]))
            prompts = len(embeds)
        if negative_embeds is not None:
            rule = "None where prompt is text: encode both, or neither"
            _check(embeds is not None, "negative_prompt_embeds", negative_embeds, rule)
            rule = "None where negative_prompt_embeds is given"
            _check(negative is None, "negative_prompt", negative, rule)
            _check_shape("negative_prompt_embeds", negative_embeds, tuple(embeds.shape))
            mask = call["negative_prompt_attention_mask"]
            _check_shape("negative_prompt_attention_mask", mask, tuple(embeds.shape[:2]))
        elif call["guidance_scale"] > 1:
            fits = isinstance(negative, str) or (_is_text(negative) and len(negative) == prompts)
            rule = f"a string or a list of {prompts}, as prompt is"
            _check(fits, "negative_prompt", negative, rule)
        return prompts

    def _apply_static_shapes(self, call: dict[str, Any], prompts: int) -> None:
        """Fill in what static shapes have fixed, and refuse what contradicts them."""
        static = self._static
        if not static:
            return
        if "prompts" in static:
            rule = f"{static['prompts']}, as reshape has fixed, or reshape again"
            _check(prompts == static["prompts"], "number of prompts", prompts, rule)
        if "pictures" in static:
            static["num_images_per_prompt"] = static["pictures"] // prompts
        for name in ("height", "width", "num_images_per_prompt", "max_sequence_length"):
            if name in static:
                fixed = static[name]
                value = call.get(name) or fixed
                rule = f"{fixed}, as reshape has fixed, or reshape again"
                _check(value == fixed, name, value, rule)
                call[name] = fixed
        if {"height", "width"} & static.keys():
            call["use_resolution_binning"] = False

    def _check_call(self, call: dict[str, Any], prompts: int) -> None:
        """Say in one line what is wrong with a call, before anything is computed."""
        self._check_size(call)
        self._check_schedule(call)
        pictures = prompts * call["num_images_per_prompt"]
        self._check_noise(call, pictures)
        kinds = ("pil", "np", "pt", "latent")
        _check(call["output_type"] in kinds, "output_type", call["output_type"], f"one of {kinds}")
        callback = call["callback"]
        _check(callback is None or callable(callback), "callback", callback, "a function, or None")

    def _check_size(self, call: dict[str, Any]) -> None:
        """Bins exist for some models only; without them, a picture is made of whole tokens."""
        sample_size = self.transformer.config.sample_size
        bins = tuple(self.family.bins)
        binning = call["use_resolution_binning"]
        if binning and sample_size not in bins:
            rule = f"False for a model with sample_size {sample_size} (bins exist for {bins})"
            _check(False, "use_resolution_binning", binning, rule)
        for name in ("height", "width"):
            size = call[name]
            if size is not None and binning:  # the nearest bin is drawn, and cut to any size
                _check(_is_count(size), name, size, "a whole number of pixels from 1")
            elif size is not None:
                _check(self._fits_grid(size), name, size, self._grid_rule())

    def _check_schedule(self, call: dict[str, Any]) -> None:
        """The steps must be such that the scheduler can take them."""
        scheduler, steps = type(self.scheduler).__name__, call["num_inference_steps"]
        given = {name: call[name] for name in ("timesteps", "sigmas") if call[name] is not None}
        _check(len(given) < 2, "sigmas", call["sigmas"], "None where timesteps is given")
        for name, values in given.items():
            rule = "numbers in descending order, at least one"
            listed = values.tolist() if hasattr(values, "tolist") else values
            falling = isinstance(listed, list | tuple) and all(map(_is_number, listed)) and listed
            falling = falling and all(a > b for a, b in itertools.pairwise(listed))
            _check(bool(falling), name, values, rule)
            takes = name in inspect.signature(self.scheduler.set_timesteps).parameters
            _check(takes, name, values, f"None with {scheduler}, which makes its own")
            steps = len(listed)
        if not given:
            config = self.scheduler.config
            most = config.get("original_inference_steps") or config.get("num_train_timesteps", 1000)
            rule = f"{most} or fewer with {scheduler}"
            _check(steps <= most, "num_inference_steps", steps, rule)
        if steps == 1 and self.family is ALPHA and self._needs_two_steps():
            # diffusers asks the scheduler for the clean picture then, and these have none to give
            rule = f"2 or more with {scheduler} (one step takes an LCM or DDPM scheduler)"
            _check(False, next(iter(given), "num_inference_steps"), given or steps, rule)

    def _check_noise(self, call: dict[str, Any], pictures: int) -> None:
        """Noise comes as latents, or from one generator, or from one for each picture."""
        generator, latents = call["generator"], call["latents"]
        several = isinstance(generator, list | tuple)
        for one in generator if several else [generator]:
            is_here = isinstance(one, torch.Generator) and torch.device(one.device).type == "cpu"
            fits = (
                is_here or isinstance(one, np.random.RandomState) or (one is None and not several)
            )
            rule = "a torch.Generator on the CPU, where noise is made, or a list of such"
            _check(fits, "generator", one, rule)
        if several:
            rule = f"one generator, or a list of {pictures}, one a picture"
            _check(len(generator) == pictures, "generator", generator, rule)
        if latents is not None:
            sides = ("height / 8", "width / 8")
            if not call["use_resolution_binning"]:
                native = self.transformer.config.sample_size * self.vae_scale_factor
                sides = [(call[x] or native) // self.vae_scale_factor for x in ("height", "width")]
            _check_shape(
                "latents", latents, (pictures, self.transformer.config.in_channels, *sides)
            )

    def _warn_of_cut(self, call: dict[str, Any]) -> None:
        """Quote what T5 will not read, one line a text.

        diffusers says so of the prompt only, transformers speaks of another limit; both hold their
        tongue. Python shows the same warning once.
        """
        limit = call["max_sequence_length"]
        for name in ("prompt", "negative_prompt"):
            if call[name] is None or (name == "negative_prompt" and call["guidance_scale"] <= 1):
                continue
            for text in self._text_preprocessing(call[name], clean_caption=call["clean_caption"]):
                tokens = self.tokenizer(text).input_ids
                if len(tokens) > limit:
                    cut = self.tokenizer.decode(
                        tokens[limit - 1 : -1]
                    )  # the last one marks the end
                    warnings.warn(
                        f"{name} has {len(tokens)} tokens, more than max_sequence_length={limit}: "
                        f"“{_shortened(cut, 300)}” is cut off.",
                        stacklevel=3,
                    )

    def _needs_two_steps(self) -> bool:
        """Whether the scheduler's step returns the next sample only, without the clean one."""
        returned = inspect.signature(self.scheduler.step).return_annotation
        return SchedulerOutput in get_args(returned)

    def _fits_grid(self, size: Any) -> bool:
        return _is_count(size) and size % self._grid == 0

    def _grid_rule(self) -> str:
        return f"a multiple of {self._grid} pixels"

    @property
    def _grid(self) -> int:
        """Pixels per transformer token: 8 in the VAE times 2 in the patch."""
        return self.vae_scale_factor * self.transformer.config.patch_size


class OVPixArtAlphaPipeline(_OVPixArtPipeline, PixArtAlphaPipeline):
    """PixArt-α on OpenVINO: 256, 512 and 1024-MS checkpoints, LCM and DMD among them."""

    family = ALPHA
    auto_model_class = PixArtAlphaPipeline


class OVPixArtSigmaPipeline(_OVPixArtPipeline, PixArtSigmaPipeline):
    """PixArt-Σ on OpenVINO: 256, 512, 1024-MS and 2K-MS checkpoints."""

    family = SIGMA
    auto_model_class = PixArtSigmaPipeline


OV_PIPELINES = {
    pipeline.family.name: pipeline for pipeline in (OVPixArtAlphaPipeline, OVPixArtSigmaPipeline)
}


# How transformers files its notice about texts that are longer than it thinks T5 can read.
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"


@contextlib.contextmanager
def _unsaid(logger: str, words: str) -> Iterator[None]:
    """Hold back a notice that is given in other words."""

    def other(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logging.getLogger(logger).addFilter(other)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(other)


# From here on optimum's own entrances know PixArt: OVDiffusionPipeline, OVPipelineForText2Image.
for _key, _class in (
    ("pixart-alpha", OVPixArtAlphaPipeline),
    ("pixart-sigma", OVPixArtSigmaPipeline),
):
    ov_diffusion.SUPPORTED_OV_PIPELINES.append(_class)
    ov_diffusion.OV_TEXT2IMAGE_PIPELINES_MAPPING[_key] = _class


def _check_openvino_folder(folder: Path) -> None:
    """Every component that `model_index.json` names must be there in full."""
    _read_scheduler_name(folder / "scheduler")
    read_json(folder / "tokenizer" / "tokenizer_config.json")
    for name in PARTS:
        for file in (IR_NAME, IR_NAME.replace(".xml", ".bin"), "config.json"):
            if not (folder / name / file).is_file():
                raise FileNotFoundError(
                    f"{str(folder)!r} has no {name}/{file}: run {_how_to_finish(folder)} once "
                    "more to finish it."
                )


def _check_intact(folder: Path) -> None:
    """Every model's files must be what its record says, as far as that can be told quickly."""
    for name, record in itertools.product(PARTS, _RECORDS):
        damaged = _find_damage(folder / name, _read_record(folder / name / record), thorough=False)
        if damaged:
            raise ValueError(_damaged(folder / name / damaged))


def _damaged(file: Path) -> str:
    """What to say of a model's file, in `folder/model/`, that is not what was written."""
    return (
        f"{str(file)!r} is damaged: run {_how_to_finish(file.parents[1])} once more, as the first "
        "time; it makes this model anew and keeps the others."
    )


def family_of(folder: str | Path) -> Family:
    """The family of a diffusers or OpenVINO folder."""
    return find_family(_read_model_index(Path(folder))["_class_name"])


def image_sizes(folder: str | Path) -> dict[str, tuple[int, int]]:
    """`(height, width)` in pixels that a checkpoint was trained on, by ASPECT_RATIOS' names.

    A checkpoint without aspect-ratio bins has its own square only.
    """
    folder = Path(folder)
    defaults = default_settings(folder)
    sample_size = read_json(folder / "transformer" / "config.json").get("sample_size", 128)
    return family_of(folder).image_sizes(sample_size) or {"1:1": (defaults.height, defaults.width)}


def _check_device(device: str) -> None:
    """Every device must be one that OpenVINO has here, also in lists as in "HETERO:GPU,CPU"."""
    here = {name.split(".")[0] for name in ov.Core().available_devices}
    several = {"AUTO", "HETERO", "MULTI", "BATCH"}
    first, _, rest = str(device).upper().partition(":")
    names = [first]
    if first in several:  # "-GPU" leaves one out, "GPU.1" is the second, "GPU(4)" draws in fours
        names = [name for name in rest.replace(" ", "").split(",") if name and name[0] != "-"]
    names = [re.split("[.(]", name)[0] for name in names]
    known = isinstance(device, str) and set(names) <= here
    _check(known, "device", device, f"one of {sorted(here)} on this machine, or AUTO")


def _reshape(model: ov.Model, **inputs: dict[int, int]) -> None:
    """Set some dimensions of a model's inputs: `{axis: size}` by name, -1 for any size."""
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        for axis, size in inputs[port.get_any_name()].items():
            shape[axis] = size
        shapes[port] = shape
    model.reshape(shapes)


def _length(dimension: ov.Dimension) -> int:
    return -1 if dimension.is_dynamic else dimension.get_length()


def _check(holds: bool, name: str, value: Any, rule: str) -> None:
    """Raise one line that names the argument, its value and what it should be."""
    if not holds:
        is_tensor = isinstance(value, torch.Tensor)
        shown = f"(tensor of {tuple(value.shape)})" if is_tensor else _shortened(repr(value), 80)
        raise ValueError(f"{name}={shown} does not work: it has to be {rule}.")


def _check_shape(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """The same for a tensor; a word in `shape` stands for any number."""
    fits = isinstance(value, torch.Tensor) and value.ndim == len(shape)
    pairs = zip(shape, value.shape, strict=True) if fits else ()
    fits = fits and all(isinstance(wanted, str) or wanted == size for wanted, size in pairs)
    _check(fits, name, value, f"a tensor of ({', '.join(map(str, shape))})")


def _shortened(text: str, length: int) -> str:
    """On one line, and no longer than that."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def show_pictures(pictures: dict[str, Image.Image | np.ndarray]) -> Figure:
    """Pictures side by side, each under its name; `(H, W, 3)` arrays of uint8 will do, too."""
    shapes = [np.asarray(picture).shape for picture in pictures.values()]
    widths = [width / height for height, width, _ in shapes]  # all are drawn equally high
    figure, axes = plt.subplots(
        ncols=len(pictures),
        figsize=(12, 12 / sum(widths) + 0.35) if len(pictures) > 2 else (4 * sum(widths), 4.35),
        width_ratios=widths,
        squeeze=False,
        facecolor="white",
    )
    for ax, (name, picture) in zip(axes.flat, pictures.items(), strict=True):
        ax.imshow(picture)
        ax.set_title(name, fontsize=10, wrap=True)
        ax.axis("off")
    figure.tight_layout(pad=0.3)
    return _shown_once(figure)


# ==================================================================================================
# 3. Optimise
# ==================================================================================================


@dataclass(frozen=True)
class Recipe:
    """What NNCF does to one of the three models.

    `weights`: store weights as "int8" or "int4" (None: leave the model as it is); with "int4",
    those of `sensitive` layers take 8 bits. `activations`: compute in 8-bit integers too, in
    ranges learnt from calibration data, except in the layers of `weights_only`; all weights that
    take part have 8 bits. `floating` layers are left alone. Layers are given by regular
    expressions on their names in the IR, which follow the modules of the PyTorch model.
    """

    weights: str | None = None
    sensitive: tuple[str, ...] = ()
    activations: bool = False
    weights_only: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    is_transformer: bool = True  # NNCF then keeps softmax, normalisation and the like in float
    smooth_quant: float = -1  # from 0 to 1: how much of activations' range moves to weights
    scale_estimation: bool = False  # fit the weights' scales to calibration data
    options: tuple[tuple[str, str | int], ...] = ()  # see STORED_OPTIONS

    @property
    def needs_data(self) -> bool:
        return self.activations or self.scale_estimation


@dataclass(frozen=True)
class Preset:
    """One row of PRESETS: what happens to each of the three models, and what for."""

    summary: str
    text_encoder: Recipe
    transformer: Recipe
    vae_decoder: Recipe

    @property
    def needs_data(self) -> bool:
        return any(getattr(self, name).needs_data for name in PARTS)


# Which layers to spare was measured (python -m assets.training.measure_presets --layers): the DiT's
# guided output on captions that calibration never saw, signal to error in dB, one kind of layer
# at a time left in floating point. With everything in integers PixArt-tiny reaches 22.9 dB.
#
# Positions and timesteps become sines inside the DiT, of angles that 256 levels cannot tell apart.
# It is a handful of numbers, and integers would gain nothing.
_POSITIONS = (r"\.pos_embed/", r"\.sinusoids/")
# Queries and keys: 0.0 dB. CPUs compute attention itself in floating point, so that rounding its
# inputs gains no speed either.
_ATTENTION = (r"/ScaledDotProductAttention",)
# The two ends of the DiT, where errors go straight into the picture: 1.6 and 1.4 dB for less than
# a hundredth of the work. With the next two: 28.1 dB.
_ENDS = (r"\.pos_embed\.proj/", r"\.proj_out/")
# The text's way in, once for some 120 tokens: 0.5 dB on top of the others.
_CAPTION = (r"\.caption_projection\.",)
# Timestep and adaLN modulation: 0.1 dB, one vector a picture. Larger DiTs are known to suffer here.
_MODULATION = (r"\.adaln_single\.",)
_CROSS_ATTENTION = (r"\.attn2\.",)

_SPARED = (*_ENDS, *_CAPTION, *_MODULATION)
_INT8_TRANSFORMER = Recipe(
    weights="int8",
    activations=True,
    weights_only=_SPARED,
    floating=(*_POSITIONS, *_ATTENTION),
    # SmoothQuant would cost 0.3 dB at 0.15, more above that, and one multiplication a layer.
    smooth_quant=-1,
)
# After GELU, where other DiTs are in trouble: 0.2 dB, no more than anywhere else; so it stays.
# In integers the VAE's pictures are 40 dB from its own, far closer than what the DiT does to them.
_INT8_VAE = Recipe(weights="int8", activations=True, is_transformer=False)

# T5's answers in 4 bits, signal to error: 19.9 dB; with fitted scales 21.3; with attention's
# outputs in 8 bits, too, 22.9 (values instead: 22.4, groups of 32: 21.9). For T5-XXL, fitting takes
# 22 minutes and 22 GB instead of a minute and 3 GB: it goes without (`_choose_recipe`).
_INT4_TEXT_ENCODER = Recipe(
    weights="int4", sensitive=(r"\.SelfAttention\.o/",), scale_estimation=True
)

PRESETS = {
    "int8-weights": Preset(
        "Half the size and no data needed; the DiT's activations are rounded as they come.",
        text_encoder=Recipe(weights="int8"),
        transformer=Recipe(
            weights="int8",
            floating=_POSITIONS,
            options=(("DYNAMIC_QUANTIZATION_GROUP_SIZE", 128),),
        ),
        vae_decoder=Recipe(weights="int8"),
    ),
    "int8": Preset(
        "The fast one: DiT and VAE compute in integers, in ranges seen while pictures were drawn.",
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
            sensitive=_SPARED,
            weights_only=(*_SPARED, *_CROSS_ATTENTION),
        ),
        vae_decoder=_INT8_VAE,
    ),
    "hybrid": Preset(
        "The published recipe: MatMul keeps floating activations, everything else loses them.",
        text_encoder=Recipe(weights="int4"),
        transformer=Recipe(
            weights="int8",
            activations=True,
            weights_only=(r"/MatMul", r"/Gather"),
            floating=_POSITIONS,
        ),
        vae_decoder=Recipe(weights="int8"),
    ),
}

CAPTIONS = Path(__file__).parent / "assets" / "captions"
DEFAULT_NUM_SAMPLES = 100  # calls of the DiT; each holds both halves of the guidance
_SAMPLES_PER_PICTURE = 5  # of all its denoising steps: neighbours are much alike
_CALIBRATION_RATIOS = (1.0, 3 / 4, 4 / 3, 9 / 16, 16 / 9)  # height / width, in turn


def optimize_pipeline(
    ov_dir: str | Path,
    output_dir: str | Path,
    preset: str = "int8",
    *,
    calibration_prompts: str | Path | list[str] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a smaller, faster copy of an OpenVINO pipeline and return its folder.

    `ov_dir`: a folder of `convert_pipeline` in 16 or 32 bits. Its text encoder may have 8 or 4 bits
    already, and is copied then. `preset`: a name in PRESETS.
    `calibration_prompts`: captions, or what `load_calibration_prompts` takes; the shipped ones by
    default. `num_samples`: how many calls of the DiT to calibrate with, five from each picture.

    Pictures for calibration are drawn once and kept in the folder `calibration` next to
    `output_dir`, for other presets with the same source, captions and seed. Models that an
    earlier call has finished are kept, and those that a preset in a neighbouring folder shares
    are copied. The same call writes the same bytes, on the same machine.
    """
    source, output = Path(ov_dir), Path(output_dir)
    recipes = _check_optimize(source, output, preset)
    prompts = []
    if PRESETS[preset].needs_data:
        num_samples = DEFAULT_NUM_SAMPLES if num_samples is None else num_samples
        _check(_is_count(num_samples), "num_samples", num_samples, "a whole number from 1")
        prompts = _choose_prompts(calibration_prompts, source, num_samples, seed)
    data = _CalibrationData(source, output.parent / "calibration", prompts, num_samples, seed)

    records = {name: _optimization_record(source, name, recipes[name], data) for name in PARTS}
    command = _call_text("optimize_pipeline", source, output, preset)
    with _writing_to(output, command):
        _optimize_all(source, output, recipes, records, data, progress)
        for name in ("tokenizer", "scheduler"):
            with _staged(output / name) as folder:
                shutil.copytree(source / name, folder, dirs_exist_ok=True)
        _write_json(_read_model_index(source), output / MODEL_INDEX)
    return output


def _optimize_all(
    source: Path,
    output: Path,
    recipes: dict[str, Recipe],
    records: dict[str, dict[str, Any]],
    data: "_CalibrationData",
    progress: bool,
) -> None:
    """Keep, copy or make each of the three models."""
    finished = {name: _is_optimized(output / name, records[name]) for name in PARTS}
    if not all(finished.values()):
        (output / MODEL_INDEX).unlink(missing_ok=True)
    with tqdm(total=len(PARTS), unit="model", disable=not progress) as bar:
        for name, record in records.items():
            kept = finished[name]
            twin = None if kept else _find_twin(output, name, record)
            verb = "Keeping" if kept else "Copying" if twin else "Optimising"
            bar.set_description(f"{verb} {name}")
            if not kept:
                with _staged(output / name) as folder:
                    if twin:
                        shutil.copytree(twin, folder, dirs_exist_ok=True)
                    else:
                        _optimize_part(source, name, recipes[name], data, folder, progress)
                        _write_record(record, folder / _RECORD)
            bar.update()
        bar.set_description("Optimised")


def _check_optimize(source: Path, output: Path, preset: str) -> dict[str, Recipe]:
    """Say in one line what is wrong, before anything is computed; return a recipe a model."""
    if preset not in PRESETS:
        choices = ", ".join(repr(name) for name in PRESETS)
        raise ValueError(f"preset={preset!r} is unknown: use one of {choices}.")
    if not source.is_dir():
        raise FileNotFoundError(f"ov_dir={str(source)!r} is no folder: check the path.")
    _read_model_index(source)
    if not _is_openvino_folder(source):
        raise ValueError(
            f"ov_dir={str(source)!r} is not converted to OpenVINO yet: call convert_pipeline first."
        )
    _check_openvino_folder(source)
    _check_intact(source)
    _check_output(output, [source])
    recipes, disk = {}, 0.0
    for name in PARTS:
        model = _read_ir(source / name)
        recipes[name] = _choose_recipe(source, name, preset, is_quantized=_is_quantized(model))
        if not (output / name / IR_NAME).is_file():
            bytes_each = _BYTES_A_WEIGHT.get(recipes[name].weights)
            weights = _constants(model)
            disk += sum(one.size * bytes_each if bytes_each else one.nbytes for one in weights)
    _check_disk(disk, output)
    return recipes


def _choose_recipe(source: Path, name: str, preset: str, *, is_quantized: bool) -> Recipe:
    """What a preset says of a model; a large text encoder is spared what would take too much."""
    recipe = getattr(PRESETS[preset], name)
    if name == "text_encoder":
        if is_quantized:
            return Recipe()
        return replace(recipe, scale_estimation=False) if _is_large(source / name) else recipe
    if is_quantized:
        raise ValueError(
            f"ov_dir={str(source)!r} is quantized already (its {name} is): start from a "
            "folder of convert_pipeline with weight_format='fp16'."
        )
    return recipe


def _is_large(folder: Path) -> bool:
    """Whether laptops cannot run this model in 16 bits: T5-XXL with room to spare."""
    return (folder / IR_NAME).with_suffix(".bin").stat().st_size > _LARGE


_LARGE = 2_000_000_000  # bytes


def _read_ir(folder: Path) -> ov.Model:
    return OVPixArtAlphaPipeline.load_model(folder / IR_NAME)


def _is_quantized(model: ov.Model) -> bool:
    """Whether a matrix of the model is stored in 8 bits or less, or activations are rounded."""
    small = {ov.Type.i8, ov.Type.u8, ov.Type.i4, ov.Type.u4, ov.Type.nf4, ov.Type.f8e4m3}
    return any(
        op.get_type_name() == "FakeQuantize"
        or (
            op.get_type_name() == "Constant"
            and op.get_element_type() in small
            and len(op.shape) > 1
        )
        for op in model.get_ops()
    )


# ---- one model ----------------------------------------------------------------------------------


def _optimize_part(
    source: Path,
    name: str,
    recipe: Recipe,
    data: "_CalibrationData",
    folder: Path,
    progress: bool,
) -> None:
    """Apply a recipe to one model of `source` and write it to `folder`."""
    shutil.copy(source / name / "config.json", folder)
    if recipe.weights is None and not recipe.options:
        for file in (IR_NAME, IR_NAME.replace(".xml", ".bin")):
            shutil.copy(source / name / file, folder)
        return
    samples = data.samples(name, progress=progress) if recipe.needs_data else []
    model = _read_ir(source / name)
    config = SimpleNamespace(**read_json(source / name / "config.json"))
    passes = recipe.scale_estimation + recipe.activations * (1 + (recipe.smooth_quant >= 0))
    with (
        _progress_bar(f"Calibrating {name}", passes * len(samples), "sample", progress) as bar,
        _weight_by_weight(),
        _statistics_first(),
        _silent_nncf(),
    ):
        model = _apply_recipe(model, recipe, config, samples, bar.update)
    store_runtime_options(model, **dict(recipe.options))
    _number_anew(model)
    _save_ir(model, folder, compress_to_fp16=True)


@contextlib.contextmanager
def _statistics_first() -> Iterator[None]:
    """Let OpenVINO free activations as soon as NNCF has read them.

    NNCF adds an output for each statistic, behind the model's own. OpenVINO computes outputs in
    their order, and with the model's own one first, every activation waits until the end. The
    other way round, DiT XL calibrates at 512² in 9.7 GB instead of 15.4, the VAE decoder in 2.7
    instead of 9.6.
    """
    original = OVModelTransformer._insert_outputs

    def insert_outputs(model: ov.Model, outputs: list) -> ov.Model:
        extended, own = original(model, outputs), len(model.get_results())
        results = extended.get_results()
        ordered = ov.Model(
            results[own:] + results[:own],
            extended.get_sinks(),
            extended.get_parameters(),
            extended.get_friendly_name(),
        )
        copy_rt_info(extended, ordered, path=["nncf"])
        return ordered

    with mock.patch.object(OVModelTransformer, "_insert_outputs", staticmethod(insert_outputs)):
        yield


def _progress_bar(description: str, total: int, unit: str, shown: bool) -> tqdm:
    """A bar below the one that counts models; it goes when it is full."""
    return tqdm(
        desc=description, total=total, unit=unit, leave=False, disable=not (shown and total)
    )


def _number_anew(model: ov.Model) -> None:
    """Number nameless operations by their place, so that the same model has the same bytes.

    OpenVINO numbers them as they are made, counting everything that the process has made before.
    """
    for place, op in enumerate(model.get_ordered_ops()):
        if re.fullmatch(rf"{op.get_type_name()}_\d+", op.get_friendly_name()):
            op.set_friendly_name(f"{op.get_type_name()}_{place}")


def _apply_recipe(
    model: ov.Model,
    recipe: Recipe,
    config: SimpleNamespace,
    samples: list[dict[str, np.ndarray]],
    on_sample: Callable[[], Any],
) -> ov.Model:
    """Weights of what keeps floating activations first, then all that computes in integers."""

    def count(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        on_sample()
        return sample

    dataset = nncf.Dataset(samples, count) if samples else None
    weighted, floating = _layers(model, _WEIGHTED), _layers(model, recipe.floating)
    spared = _layers(model, recipe.weights_only) if recipe.activations else weighted
    if recipe.weights == "int4":
        quarters = (spared & weighted) - floating - _layers(model, recipe.sensitive)
        fit = dataset if recipe.scale_estimation else None
        model = _compress_to_4_bits(model, _int4_group_size(config), weighted - quarters, fit)
    if spared:
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT8_ASYM,
            ignored_scope=_scope((weighted - spared) | floating),
        )
    if not recipe.activations:
        return model
    smooth_quant = nncf.AdvancedSmoothQuantParameters(matmul=recipe.smooth_quant)
    return nncf.quantize(
        model,
        dataset,
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if recipe.is_transformer else None,
        ignored_scope=_scope(spared | floating),
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth_quant),
    )


_WEIGHTED = (r"/(MatMul|Convolution|Gather)(_\d+)?$",)  # what NNCF may find weights in


def _layers(model: ov.Model, patterns: tuple[str, ...]) -> set[str]:
    """Names of the operations that a recipe means."""
    names = (op.get_friendly_name() for op in model.get_ops() if op.get_type_name() != "Constant")
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _scope(names: set[str]) -> nncf.IgnoredScope:
    return nncf.IgnoredScope(names=sorted(names), validate=False)


def _compress_to_4_bits(
    model: ov.Model, group_size: int, ignored: set[str], dataset: nncf.Dataset | None
) -> ov.Model:
    """Store weights in 4 bits; those that do not divide into groups stay as they are."""
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        ratio=1.0,
        group_size=group_size,
        backup_mode=nncf.BackupMode.NONE,
        ignored_scope=_scope(ignored),
        dataset=dataset,
        scale_estimation=dataset is not None,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE
        ),
    )


# ---- what has been done already -----------------------------------------------------------------

_RECORD = _RECORDS[1]


def _optimization_record(
    source: Path, name: str, recipe: Recipe, data: "_CalibrationData"
) -> dict[str, Any]:
    """All that decides what an optimised model looks like, for `_is_optimized` to compare."""
    record = {
        "recipe": asdict(recipe),
        "source": _ir_print(source / name),
        "calibration": data.key if recipe.needs_data else None,
        "nncf": nncf.__version__,
    }
    return json.loads(json.dumps(record))  # tuples are lists from here on, as in the file


def _ir_print(folder: Path) -> dict[str, list[int]]:
    """Names, sizes and times of an IR's files: enough to see that it is another one."""
    files = sorted(folder.glob("openvino_model.*"))
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _is_optimized(folder: Path, record: dict[str, Any]) -> bool:
    """Whether `folder` holds a whole model that was made as `record` says."""
    found = _read_record(folder / _RECORD)
    made_so = found == {**record, "files": found.get("files")}
    return made_so and _find_damage(folder, found, thorough=True) is None


def _find_twin(output: Path, name: str, record: dict[str, Any]) -> Path | None:
    """The same model in a neighbouring folder, if another preset has made it already."""
    neighbours = sorted(output.parent.glob(f"*/{name}/{_RECORD}"))
    return next((file.parent for file in neighbours if _is_optimized(file.parent, record)), None)


# ---- what models see while pictures are drawn ---------------------------------------------------


def load_calibration_prompts(
    source: str | Path,
    *,
    column: str = "caption",
    split: str = "train",
    num: int | None = None,
    **kwargs,
) -> list[str]:
    """Read captions from a file (csv, json lines, parquet, txt) or a Hugging Face data set.

    `column` holds the captions (of a txt file: its lines). `num`: how many to read, all by
    default. A data set is streamed, so that a few captions of a huge one cost little; `kwargs`
    go to `datasets.load_dataset` (`name`, `revision`, `token`...), but no code of its is run.
    """
    if num is not None:
        _check(_is_count(num), "num", num, "a whole number from 1")
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code=True is not supported: choose a data set without code.")
    file = Path(source)
    if file.is_file():
        rows, column = _read_rows(file, column)
    elif file.suffix in _READERS:
        raise FileNotFoundError(f"source={str(file)!r} is not there: check the path.")
    else:
        rows = datasets.load_dataset(str(source), split=split, streaming=True, **kwargs)
    captions = []
    for row in itertools.islice(rows, num):
        if column not in row:
            columns = ", ".join(repr(name) for name in row)
            raise ValueError(f"column={column!r} is not in {str(source)!r}: it has {columns}.")
        captions.append(str(row[column]))
    return captions


_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def _read_rows(file: Path, column: str) -> tuple[Iterable[dict[str, Any]], str]:
    """The rows of a local file, and the name of the column of captions."""
    if file.suffix not in _READERS:
        raise ValueError(f"source={str(file)!r} cannot be read: use one of {', '.join(_READERS)}.")
    kind = _READERS[file.suffix]
    # Dataset.from_csv and its like, not load_dataset: that one counts downloads, over the network.
    reader = getattr(datasets.Dataset, f"from_{kind}")
    with tempfile.TemporaryDirectory() as cache, _quiet():
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            rows = reader(str(file), cache_dir=cache, keep_in_memory=True).to_list()
        finally:
            if not bars:
                datasets.enable_progress_bars()
    return rows, "text" if kind == "text" else column


def _choose_prompts(
    calibration_prompts: str | Path | list[str] | None, source: Path, num_samples: int, seed: int
) -> list[str]:
    """Draw as many different captions as calibration takes."""
    if calibration_prompts is None:
        # T5-XXL reads English, a small text encoder was taught one grammar of scenes.
        width = read_json(source / "text_encoder" / "config.json").get("d_model", 4096)
        name = "natural-calibration.csv" if width >= 4096 else "pixart-tiny-calibration.csv"
        calibration_prompts = CAPTIONS / name
    if isinstance(calibration_prompts, str | Path):
        num = None if Path(calibration_prompts).is_file() else 10 * num_samples
        calibration_prompts = load_calibration_prompts(calibration_prompts, num=num)
    rule = "captions: a list of strings, or a file or data set for load_calibration_prompts"
    _check(_is_captions(calibration_prompts), "calibration_prompts", calibration_prompts, rule)
    captions = sorted({caption.strip() for caption in calibration_prompts} - {""})
    needed = math.ceil(num_samples / _SAMPLES_PER_PICTURE)
    if len(captions) < needed:
        raise ValueError(
            f"calibration_prompts has {len(captions)} different captions, too few for "
            f"num_samples={num_samples}: give {needed} or more, or lower num_samples."
        )
    return random.Random(seed).sample(captions, needed)


def _is_captions(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)


class _CalibrationData:
    """Inputs of the three models, recorded while the source pipeline draws pictures.

    Recorded when first asked for, and kept on disk in half precision, which ranges do not feel.
    """

    def __init__(self, source: Path, folder: Path, prompts: list[str], num: int | None, seed: int):
        self.source, self.folder, self.prompts = source, folder, prompts
        self.num_samples, self.seed = num, seed
        facts = [prompts, num, seed, *(_ir_print(source / name) for name in PARTS)]
        self.key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def samples(self, name: str, *, progress: bool) -> list[dict[str, np.ndarray]]:
        """What to feed one model with: a list of its inputs by name."""
        if name == "text_encoder":
            return [_tokenize(self.source, prompt) for prompt in self.prompts]
        pictures = self._pictures(progress=progress)
        if name == "vae_decoder":
            pieces = [piece for picture in pictures for piece in _pieces(picture["latent_sample"])]
            return [{"latent_sample": piece} for piece in pieces]
        calls = [
            {key: value[step] if key in _BY_STEP else value for key, value in picture.items()}
            for picture in pictures
            for step in range(len(picture["timestep"]))
        ]
        for call in calls:
            del call["latent_sample"]
        return [rows for call in calls[: self.num_samples] for rows in _bearable(call)]

    def _pictures(self, *, progress: bool) -> list[dict[str, np.ndarray]]:
        file = self.folder / f"{self.key}.npz"
        if not file.is_file():
            self._record(file, progress=progress)
        pictures: list[dict[str, np.ndarray]] = [{} for _ in self.prompts]
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                index, key = name.split("/")
                value = arrays[name]
                is_half = value.dtype == np.float16
                pictures[int(index)][key] = value.astype(np.float32) if is_half else value
        return pictures

    def _record(self, file: Path, *, progress: bool) -> None:
        """Draw one picture a prompt, several aspect ratios in turn, up to the final latents."""
        settings = default_settings(self.source)
        pipeline = load_pipeline(self.source, compile=False)
        sizes = _calibration_sizes(pipeline, settings)
        with self._text_encoder(progress=progress) as folder:
            pipeline.text_encoder.model = _read_ir(folder)
            texts = [_encode(pipeline, prompt, settings.guidance_scale) for prompt in self.prompts]
            pipeline.release_text_encoder()  # or it would be in memory beside the others
        arrays = {}
        with _progress_bar("Drawing", len(texts), "picture", progress) as bar:
            for i, text in enumerate(texts):
                height, width = sizes[i % len(sizes)]
                picture = _record_picture(
                    pipeline,
                    **text,
                    height=height,
                    width=width,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    timesteps=settings.timesteps and list(settings.timesteps),
                    generator=torch.Generator().manual_seed(self.seed + i),
                    first=i,
                )
                arrays |= {f"{i}/{key}": value for key, value in picture.items()}
                bar.update()
        del pipeline
        gc.collect()  # it holds itself, and its models: they would crowd the calibration
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.folder)
        partial = self.folder / f".partial-{os.getpid()}-{file.name}"
        np.savez(partial, **arrays)
        _flush(partial)
        os.replace(partial, file)

    @contextlib.contextmanager
    def _text_encoder(self, *, progress: bool) -> Iterator[Path]:
        """The folder of the T5 to read captions with: a large one in 8 bits.

        XXL in 16 bits would fill 10 GB of memory, and twice that where there is no bfloat16. The
        copy in 8 bits is the one that most presets have just made, or one that is gone again soon.
        """
        own, recipe = self.source / "text_encoder", Recipe(weights="int8")
        if not _is_large(own) or _is_quantized(_read_ir(own)):
            yield own
            return
        record = _optimization_record(self.source, "text_encoder", recipe, self)
        twin = _find_twin(self.folder, "text_encoder", record)
        if twin:
            yield twin
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        prefix = f".partial-{os.getpid()}-"  # what a killed process leaves goes by this name
        with tempfile.TemporaryDirectory(prefix=prefix, dir=self.folder) as folder:
            _optimize_part(self.source, "text_encoder", recipe, self, Path(folder), progress)
            yield Path(folder)


_BY_STEP = ("hidden_states", "timestep")  # the other inputs stay the same for a whole picture
_DTYPES = {"encoder_attention_mask": np.int64}  # the other inputs are float32


_LARGEST_CALL = 2 * 4 * 64 * 64  # numbers in both halves of the guidance at 512²


def _bearable(call: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """A call of the DiT, or its rows one by one where together they would take much memory."""
    latents = call["hidden_states"]
    if latents.size <= _LARGEST_CALL * 1.1:  # other aspect ratios are a little larger
        return [call]
    return [{name: value[i : i + 1] for name, value in call.items()} for i in range(len(latents))]


# Latents a side: pictures of 1024² stay whole in all aspect ratios (6.4 GB), 2048² comes in four
# pieces. Smaller ones would cost quality: from quarters of its pictures, PixArt-tiny's decoder
# learns ranges with which it is 41.1 dB from itself, from whole ones 43.9 dB.
_PIECE = 172


def _pieces(latents: np.ndarray) -> list[np.ndarray]:
    """Cut latents, `(1, C, h, w)`, into equal pieces that a VAE decoder can be calibrated with."""
    rows, columns = (-(-side // _PIECE) for side in latents.shape[2:])
    bands = np.array_split(latents, rows, axis=2)
    return [piece for band in bands for piece in np.array_split(band, columns, axis=3)]


def _encode(
    pipeline: _OVPixArtPipeline, prompt: str, guidance_scale: float
) -> dict[str, torch.Tensor | None]:
    """A prompt as arguments of the pipeline's call that do not need the text encoder."""
    names = ("prompt_embeds", "prompt_attention_mask")
    names += tuple(f"negative_{name}" for name in names)
    tensors = pipeline.encode_prompt(
        prompt,
        do_classifier_free_guidance=guidance_scale > 1,
        clean_caption=True,
        max_sequence_length=pipeline.family.max_tokens,
    )
    return dict(zip(names, tensors, strict=True))


def _record_picture(pipeline: _OVPixArtPipeline, *, first: int, **call) -> dict[str, np.ndarray]:
    """Draw one picture and return the DiT's inputs at some of the steps, and the final latents.

    The steps are spread evenly; `first` shifts them, so that pictures in a row see all of them.
    `hidden_states` `(steps, B, 4, h, w)`, `timestep` `(steps, B)`, the rest as for the DiT.
    """
    calls: list[dict[str, np.ndarray]] = []
    infer = pipeline.transformer._infer

    def record(inputs: dict[str, torch.Tensor | None]) -> np.ndarray:
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        calls.append({k: v.numpy().astype(_DTYPES.get(k, np.float32)) for k, v in given.items()})
        return infer(inputs)

    pipeline.transformer._infer = record
    try:
        latents = pipeline(output_type="latent", use_resolution_binning=False, **call).images
    finally:
        del pipeline.transformer._infer
    count = min(_SAMPLES_PER_PICTURE, len(calls))
    stride = len(calls) / count
    chosen = [int(stride * (i + (first * 0.382) % 1)) for i in range(count)]
    picture = {key: calls[0][key] for key in calls[0].keys() - set(_BY_STEP)}
    for key in _BY_STEP:
        picture[key] = np.stack([calls[step][key] for step in chosen])
    scaling = pipeline.vae.config.scaling_factor
    picture["latent_sample"] = (latents / scaling).numpy()
    return {
        key: value.astype(np.float16) if value.dtype == np.float32 and key != "timestep" else value
        for key, value in sorted(picture.items())
    }


def _calibration_sizes(
    pipeline: _OVPixArtPipeline, settings: GenerationDefaults
) -> list[tuple[int, int]]:
    """Heights and widths in pixels with about the model's own area, for a few aspect ratios."""
    grid = pipeline._grid
    sizes = []
    for ratio in _CALIBRATION_RATIOS:
        height = settings.height * math.sqrt(ratio)
        width = settings.width / math.sqrt(ratio)
        sizes.append((round(height / grid) * grid, round(width / grid) * grid))
    return sizes


def _tokenize(source: Path, prompt: str) -> dict[str, np.ndarray]:
    """One caption as the text encoder gets it, `(1, L)` int64, without the padding."""
    tokenizer = T5Tokenizer.from_pretrained(source / "tokenizer", local_files_only=True)
    tokens = tokenizer(prompt.lower(), return_tensors="np")
    return {key: tokens[key].astype(np.int64) for key in ("input_ids", "attention_mask")}


# ==================================================================================================
# 4. Compare
# ==================================================================================================


def compare_pipelines(
    pipelines: dict[str, str | Path],
    prompts: str | list[str],
    *,
    seeds: int | list[int],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    scorer: Callable[[list[Image.Image], list[str]], list[float]] | None = None,
    reference: str | None = None,
) -> "Comparison":
    """Let several pipelines draw the same pictures, and measure what each takes and how it fares.

    `pipelines`: a label for each folder, OpenVINO or diffusers (that one runs in torch float32).
    `seeds`: one for each prompt, or one for all; one prompt may also have several seeds. Steps and
    guidance: those of `reference`'s checkpoint by default. `reference`: the label whose pictures
    the others are held against, by default the first. `scorer(pictures, prompts)` returns one
    number a picture, the higher the better.

    Each pipeline lives in a process of its own, so that its memory can be told, and they take
    turns, so that a machine that slows down slows all of them. One short picture warms up first.
    Where memory does not hold them all, as many as it does take turns, then the next ones.
    """
    folders = {label: Path(folder) for label, folder in pipelines.items()}
    reference = next(iter(folders), None) if reference is None else reference
    pairs = _check_compare(folders, prompts, seeds, reference)
    settings = default_settings(folders[reference])
    steps = settings.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = settings.guidance_scale if guidance_scale is None else guidance_scale
    call = {"num_inference_steps": steps, "guidance_scale": scale}
    if num_inference_steps is None and settings.timesteps:
        call["timesteps"] = list(settings.timesteps)
    sizes = {label: _sizes_mb(folder) for label, folder in folders.items()}
    # Weights, their copy in the form that the processor likes, pictures on their way; a process
    needs = {label: 1.5 * sum(size.values()) + 300 for label, size in sizes.items()}
    turns: dict[str, list[_Turn]] = {}
    with tqdm(total=(1 + len(pairs)) * len(folders), unit="picture") as bar:
        for group in _side_by_side(needs, 0.8 * psutil.virtual_memory().available / 1e6):
            turns |= _take_turns({label: folders[label] for label in group}, pairs, call, bar)
    return _evaluate(turns, sizes, pairs, reference, scorer)


def _side_by_side(needs: dict[str, float], limit: float) -> list[list[str]]:
    """Group, in their order, what memory of this limit holds at a time; one is always enough."""
    groups: list[list[str]] = []
    load = 0.0
    for label, need in needs.items():
        if not groups or load + need > limit:
            groups.append([])
            load = 0.0
        groups[-1].append(label)
        load += need
    return groups


def _take_turns(
    folders: dict[str, Path], pairs: list[tuple[str, int]], call: dict[str, Any], bar: tqdm
) -> dict[str, list["_Turn"]]:
    """Let these pipelines draw all pictures, one after the other."""
    turns: dict[str, list[_Turn]] = {label: [] for label in folders}
    with contextlib.ExitStack() as stack:
        workers = {label: stack.enter_context(_worker(label, folders[label])) for label in folders}
        for label, worker in workers.items():
            bar.set_description(f"Warming up {label}")
            short = {**call, "num_inference_steps": min(2, call["num_inference_steps"])}
            worker.draw(*pairs[0], **short)
            bar.update()
        for prompt, seed in pairs:
            for label, worker in workers.items():
                bar.set_description(f"Drawing with {label}")
                turns[label].append(worker.draw(prompt, seed, **call))
                bar.update()
    return turns


def _check_compare(
    folders: dict[str, Path],
    prompts: str | list[str],
    seeds: int | list[int],
    reference: str | None,
) -> list[tuple[str, int]]:
    """Say in one line what is wrong, before a process is started; return (prompt, seed) pairs."""
    _check(bool(folders), "pipelines", folders, "at least one label with its folder")
    labels = ", ".join(repr(label) for label in folders)
    _check(reference in folders, "reference", reference, f"one of the labels {labels}")
    for label, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"pipelines[{label!r}]={str(folder)!r} is no folder.")
        _read_model_index(folder)
        if _is_openvino_folder(folder):
            _check_openvino_folder(folder)
        else:
            _check_torch_folder(folder)
    _check(_is_text(prompts), "prompts", prompts, "a string or a list of at least one string")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    if len(prompts) == 1:
        prompts = prompts * len(seeds)
    if len(seeds) == 1:
        seeds = seeds * len(prompts)
    rule = f"one whole number, or one for each of the {len(prompts)} prompts"
    fits = all(isinstance(seed, int) for seed in seeds) and len(seeds) == len(prompts) > 0
    _check(fits, "seeds", seeds, rule)
    return list(zip(prompts, seeds, strict=True))


# ---- one process a pipeline ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """One picture, what its stages took, and the most memory its process has used so far."""

    picture: Image.Image
    total_s: float
    text_encoder_s: float  # prompt and negative prompt together
    step_s: list[float]  # one number a call of the DiT
    vae_decoder_s: float
    peak_memory_mb: float


class _Worker:
    """The near end of a process that holds one pipeline."""

    def __init__(self, label: str, process: Any, connection: Any):
        self.label, self.process, self.connection = label, process, connection

    def draw(self, prompt: str, seed: int, **call) -> _Turn:
        """Have one picture drawn; raises RuntimeError with what went wrong at the far end."""
        try:
            self.connection.send({"prompt": prompt, "seed": seed, **call})
            while not self.connection.poll(0.5):
                if not self.process.is_alive() and not self.connection.poll():
                    raise EOFError
            answer = self.connection.recv()
        except (EOFError, ConnectionError):  # a closed pipe shows in either way, by chance
            raise RuntimeError(self._obituary()) from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.label!r} failed: {answer}")
        return answer

    def _obituary(self) -> str:
        self.process.join(5)
        return (
            f"{self.label!r} died (exit code {self.process.exitcode}), perhaps for want of "
            "memory: compare fewer pipelines at a time."
        )


# Half a gigabyte of libraries for each process, unless they share it: on Linux a clean process
# imports this module once and forks itself for each pipeline. Elsewhere each imports its own.
_START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"


@contextlib.contextmanager
def _worker(label: str, folder: Path) -> Iterator[_Worker]:
    """Start a process for one pipeline, and end it when all is drawn."""
    context = multiprocessing.get_context(_START_METHOD)
    if _START_METHOD == "forkserver":
        context.set_forkserver_preload([__name__])
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(far, str(folder)), daemon=True)
    with _no_main_module():
        process.start()
    far.close()
    try:
        yield _Worker(label, process, near)
        with contextlib.suppress(OSError):  # dead already
            near.send(None)
        process.join(10)
    finally:
        process.kill()
        process.join()
        near.close()


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Let a process start without running the caller's script or notebook kernel once more.

    All it needs is in this module. (Python's own way asks every script that calls us for an
    `if __name__ == "__main__"`, and runs it again in every process.)
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(connection: Any, folder: str) -> None:
    """The far end: draw what is asked for, until None comes. Failures go back as text."""
    with (
        contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        _quiet(),
    ):
        artist = None
        while (call := connection.recv()) is not None:
            try:
                artist = artist or _Artist(Path(folder))
                connection.send(artist.draw(**call))
            except Exception as error:
                connection.send(f"{type(error).__name__}: {error}")


class _Artist:
    """A pipeline, OpenVINO or torch, with a stopwatch at each of its three models."""

    def __init__(self, folder: Path):
        self.pipeline = load_pipeline(folder)
        self.seconds: dict[str, list[float]] = {}
        for stage, model, method in (
            ("text_encoder", self.pipeline.text_encoder, "forward"),
            ("transformer", self.pipeline.transformer, "forward"),
            ("vae_decoder", self.pipeline.vae, "decode"),
        ):
            setattr(model, method, self._timed(stage, getattr(model, method)))

    def _timed(self, stage: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds.setdefault(stage, []).append(time.perf_counter() - start)
            return result

        return timed

    def draw(self, prompt: str, seed: int, **call) -> _Turn:
        self.seconds.clear()
        if isinstance(self.pipeline.text_encoder, OVPixArtTextEncoder):
            self.pipeline.text_encoder.forget()  # torch reads its prompt in every turn, too
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        picture = self.pipeline(prompt, generator=generator, **call).images[0]
        return _Turn(
            picture=picture,
            total_s=time.perf_counter() - start,
            text_encoder_s=sum(self.seconds["text_encoder"]),
            step_s=self.seconds["transformer"],
            vae_decoder_s=sum(self.seconds["vae_decoder"]),
            peak_memory_mb=_peak_memory_mb(),
        )


def load_pipeline(folder: str | Path, **options: Any) -> DiffusionPipeline:
    """Load a pipeline without its progress bar: an OpenVINO folder, or a torch one in float32.

    `options`: arguments of `from_pretrained`, such as `device` or `ov_config`.
    """
    folder = Path(folder)
    family = family_of(folder)
    if _is_openvino_folder(folder):
        pipeline = OV_PIPELINES[family.name].from_pretrained(folder, **options)
    else:
        modules = {
            part.folder: _load_part(folder / part.folder, part.loader).float()
            for part in PARTS.values()
        }
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        pipeline = family.torch_class.from_pretrained(
            folder, local_files_only=True, tokenizer=tokenizer, **modules, **options
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _peak_memory_mb() -> float:
    """The most memory that this process has held at a time, Python and its libraries included."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; `getrusage` there counts what the parent had before `exec`
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak.group(1)) * 1024 / 1e6
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e6
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _sizes_mb(folder: Path) -> dict[str, float]:
    """Millions of bytes on disk, a model; of a torch folder, the weights that are read."""
    sizes = {}
    for name, part in PARTS.items():
        if _is_openvino_folder(folder):
            files = list((folder / name).glob("openvino_model.*"))
        else:
            _, files, _ = _stored_weights(folder / part.folder)
        sizes[name] = sum(file.stat().st_size for file in files) / 1e6
    return sizes


# ---- what came out ------------------------------------------------------------------------------


def _evaluate(
    turns: dict[str, list[_Turn]],
    sizes_mb: dict[str, dict[str, float]],
    pairs: list[tuple[str, int]],
    reference: str,
    scorer: Callable[[list[Image.Image], list[str]], list[float]] | None,
) -> "Comparison":
    """Hold every picture against the reference's, and ask the scorer."""
    prompts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    pictures = {label: [turn.picture for turn in turns[label]] for label in turns}
    likeness = {
        label: [_likeness(a, b) for a, b in zip(drawn, pictures[reference], strict=True)]
        for label, drawn in pictures.items()
    }
    return Comparison(
        reference=reference,
        prompts=prompts,
        seeds=seeds,
        pictures=pictures,
        sizes_mb=sizes_mb,
        turns=turns,
        psnr_db={label: [psnr for psnr, _ in values] for label, values in likeness.items()},
        ssim={label: [ssim for _, ssim in values] for label, values in likeness.items()},
        scores={
            label: [float(score) for score in scorer(drawn, prompts)] if scorer else []
            for label, drawn in pictures.items()
        },
    )


def _likeness(picture: Image.Image, reference: Image.Image) -> tuple[float, float]:
    """PSNR in dB (infinite for equal pictures) and SSIM (1 for equal pictures)."""
    a, b = np.asarray(picture), np.asarray(reference)
    if a.shape != b.shape:
        raise ValueError(
            f"A picture of {picture.size} cannot be held against one of {reference.size}: "
            "compare pipelines of one checkpoint."
        )
    same = np.array_equal(a, b)
    psnr = math.inf if same else float(peak_signal_noise_ratio(b, a, data_range=255))
    return psnr, float(structural_similarity(b, a, data_range=255, channel_axis=-1))


_PANELS = {  # column of the table → title, unit, format of the numbers on the bars
    "size_mb": ("Size on disk", "MB", "{:.1f}"),
    "peak_memory_mb": ("Peak memory of the process", "MB", "{:.0f}"),
    "total_s": ("Time for one picture", "s", "{:.2f}"),
    "step_ms": ("Time for one step of the DiT", "ms", "{:.0f}"),
    "psnr_db": ("Likeness to {reference} (PSNR)", "dB, more is closer", "{:.1f}"),
    "ssim": ("Likeness to {reference} (SSIM)", "1 is equal", "{:.3f}"),
    "score": ("Score of the pictures", "mean, more is better", "{:.3g}"),
}
# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
_COLOURS = {
    "text_encoder": "#E69F00",
    "transformer": "#0072B2",
    "vae_decoder": "#009E73",
    "rest": "#999999",
    "whole": "#56B4E9",
}
_PART_NAMES = {
    "text_encoder": "text encoder",
    "transformer": "DiT",
    "vae_decoder": "VAE decoder",
    "rest": "rest",
}


@dataclass(frozen=True)
class Comparison:
    """What `compare_pipelines` found out: a table, plots, pictures, and the numbers behind them.

    Every dictionary goes by label; lists have one entry a picture, in the order of `prompts` and
    `seeds`. `sizes_mb` has one entry a model.
    """

    reference: str
    prompts: list[str]
    seeds: list[int]
    pictures: dict[str, list[Image.Image]]
    sizes_mb: dict[str, dict[str, float]]
    turns: dict[str, list[_Turn]]
    psnr_db: dict[str, list[float]]
    ssim: dict[str, list[float]]
    scores: dict[str, list[float]]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a label: times and likeness are medians, the score is the mean of all pictures.

        `size_mb`: the three models, in 10⁶ bytes. `text_encoder_ms`: prompt and negative prompt.
        `step_ms`: one call of the DiT, guidance included. `total_s`: the whole picture.
        `peak_memory_mb`: of the process, with about half a GB of libraries in it. `psnr_db` and
        `ssim` hold against the reference, which is equal to itself: infinity and 1.
        """
        rows = {}
        for label, turns in self.turns.items():
            rows[label] = {
                "size_mb": sum(self.sizes_mb[label].values()),
                "text_encoder_ms": 1000 * _median(turn.text_encoder_s for turn in turns),
                "step_ms": 1000 * _median(step for turn in turns for step in turn.step_s),
                "vae_decoder_ms": 1000 * _median(turn.vae_decoder_s for turn in turns),
                "total_s": _median(turn.total_s for turn in turns),
                "peak_memory_mb": max(turn.peak_memory_mb for turn in turns),
                "psnr_db": _median(self.psnr_db[label]),
                "ssim": _median(self.ssim[label]),
                "score": float(np.mean(self.scores[label])) if self.scores[label] else math.nan,
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("pipeline")

    def plot(self) -> Figure:
        """Bars for size, memory, time and quality, one panel each."""
        table = self.to_dataframe()
        names = ["size_mb", "peak_memory_mb", "total_s", "step_ms", "psnr_db"]
        names.append("ssim" if table["score"].isna().all() else "score")
        figure, axes = plt.subplots(
            3, 2, figsize=(10, 3 * (1.1 + 0.32 * len(table))), facecolor="white", sharey=True
        )
        for ax, name in zip(axes.flat, names, strict=True):
            title, unit, form = _PANELS[name]
            _draw_bars(ax, table[name], self._shares(name), form)
            ax.set_title(title.format(reference=self.reference), loc="left", fontsize=11)
            ax.set_xlabel(unit)
        axes.flat[0].invert_yaxis()  # shared: the first label on top, everywhere
        handles = [Patch(color=_COLOURS[part], label=text) for part, text in _PART_NAMES.items()]
        figure.legend(handles=handles, ncols=4, loc="lower center", frameon=False)
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        return _shown_once(figure)

    def _shares(self, name: str) -> dict[str, dict[str, float]] | None:
        """What a bar is made of: label → model → number, for the columns that have shares."""
        if name == "size_mb":
            return self.sizes_mb
        if name != "total_s":
            return None
        shares = {}
        for label, turns in self.turns.items():
            parts = {
                "text_encoder": _median(turn.text_encoder_s for turn in turns),
                "transformer": _median(sum(turn.step_s) for turn in turns),
                "vae_decoder": _median(turn.vae_decoder_s for turn in turns),
            }
            total = _median(turn.total_s for turn in turns)
            shares[label] = {**parts, "rest": max(0.0, total - sum(parts.values()))}
        return shares

    def show_images(
        self, labels: list[str] | None = None, *, count: int = 3, amplification: float = 8
    ) -> Figure:
        """The first `count` pictures, the reference's beside the others'; below, the differences.

        `labels`: which pipelines to show, all by default. A difference is grey where two pictures
        agree; `amplification` says how much stronger than in truth it is drawn.
        """
        others = [label for label in labels or self.pictures if label != self.reference]
        for label in others:
            known = ", ".join(repr(name) for name in self.pictures)
            _check(label in self.pictures, "labels", label, f"among {known}")
        _check(_is_count(count), "count", count, "a whole number from 1")
        columns = [self.reference, *others]
        count = min(count, len(self.prompts))
        aspect = self.pictures[self.reference][0].height / self.pictures[self.reference][0].width
        width = min(3.2, 12 / len(columns))
        figure, axes = plt.subplots(
            2 * count,
            len(columns),
            figsize=(width * len(columns), 2 * count * (width * aspect + 0.25)),
            facecolor="white",
            squeeze=False,
        )
        for ax in axes.flat:
            ax.axis("off")
        for i in range(count):
            top, bottom = axes[2 * i], axes[2 * i + 1]
            truth = self.pictures[self.reference][i]
            caption = textwrap.fill(f"“{self.prompts[i]}”, seed {self.seeds[i]}", int(width * 10))
            bottom[0].text(0.5, 0.95, caption, ha="center", va="top", fontsize=9)
            for column, label in enumerate(columns):
                top[column].imshow(self.pictures[label][i])
                top[column].set_title(label, fontsize=10)
                if column:
                    difference = _difference(self.pictures[label][i], truth, amplification)
                    bottom[column].imshow(difference)
                    title = f"difference × {amplification:g}, {self.psnr_db[label][i]:.1f} dB"
                    bottom[column].set_title(title, fontsize=9)
        figure.tight_layout()
        return _shown_once(figure)


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _draw_bars(
    ax: Axes, values: pd.Series, shares: dict[str, dict[str, float]] | None, form: str
) -> None:
    """Horizontal bars, one a label, with their numbers; an infinite one is the reference's."""
    finite = values[np.isfinite(values)]
    longest = (float(finite.max()) if len(finite) else 0.0) or 1.0
    for row, (label, value) in enumerate(values.items()):
        if not np.isfinite(value):
            ax.text(0.01 * longest, row, "equal" if value > 0 else "–", va="center", fontsize=9)
            continue
        left = 0.0
        for part, share in (shares[label] if shares else {"whole": value}).items():
            ax.barh(row, share, left=left, color=_COLOURS[part], height=0.7)
            left += share
        number = form.format(value)
        ax.text(max(left, value) + 0.01 * longest, row, number, va="center", fontsize=9)
    ax.set_yticks(range(len(values)), values.index)
    ax.set_xlim(0, 1.18 * longest)
    ax.spines[["top", "right"]].set_visible(False)


def _difference(picture: Image.Image, reference: Image.Image, amplification: float) -> np.ndarray:
    """`(H, W, 3)` uint8: grey where the two agree."""
    a, b = np.asarray(picture, np.float32), np.asarray(reference, np.float32)
    return np.clip(128 + amplification * (a - b), 0, 255).astype(np.uint8)


def _shown_once(figure: Figure) -> Figure:
    """Take a figure out of pyplot's hands: a notebook shows those and a cell's result, twice."""
    plt.close(figure)
    return figure
