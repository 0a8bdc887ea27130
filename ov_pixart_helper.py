"""Everything between a PixArt checkpoint and a picture made by OpenVINO.

The file reads in the order an image travels:

1. **Convert**: text encoder, diffusion transformer (DiT) and VAE decoder become OpenVINO IR.
2. **Run**: the three IRs take their places in diffusers' PixArt pipelines.

Import this module before `openvino` or `nncf`: it switches their usage telemetry off.
"""

import contextlib
import gc
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

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


_opt_out_of_telemetry()
with _quiet():
    import nncf
    import numpy as np
    import openvino as ov
    import pandas as pd
    import torch
    from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtSigmaPipeline
    from diffusers import PixArtTransformer2DModel as PixArtTransformer
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from huggingface_hub import snapshot_download
    from openvino.frontend.pytorch.patch_model import (
        __make_16bit_traceable as make_16bit_traceable,
    )
    from openvino.frontend.pytorch.patch_model import unpatch_model
    from optimum.exporters.openvino.model_configs import T5EncoderOpenVINOConfig
    from optimum.intel.openvino import modeling_diffusion as ov_diffusion
    from optimum.intel.openvino.modeling_diffusion import OVDiffusionPipeline, OVPipelinePart
    from safetensors import SafetensorError, safe_open
    from tqdm.auto import tqdm
    from transformers import T5EncoderModel, T5Tokenizer

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
        return _trace(
            _TextEncoderForTracing(text_encoder),
            example={"input_ids": tokens, "attention_mask": tokens},
            inputs={"input_ids": any_text, "attention_mask": any_text},
            output="last_hidden_state",
        )


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
        # Float, though most schedulers count in integers: the model's first act is to make it
        # float, integers up to 2^24 survive that exactly, and Euler's fractions fit too.
        "timestep": ([-1], ov.Type.f32),
        "encoder_hidden_states": ([-1, -1, width], ov.Type.f32),
        "encoder_attention_mask": ([-1, -1], ov.Type.i64),
    }
    if transformer.use_additional_conditions:  # the 1024-MS family: picture size and its shape
        example["resolution"] = torch.tensor([[512.0, 768.0]] * 2)
        example["aspect_ratio"] = torch.tensor([[0.66]] * 2)
        inputs["resolution"] = ([-1, 2], ov.Type.f32)
        inputs["aspect_ratio"] = ([-1, 1], ov.Type.f32)
    return _trace(_TransformerForTracing(transformer), example, inputs, output="sample")


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
        model = ov.convert_model(
            module.eval(),
            example_input=example,
            input=[(name, ov.PartialShape(shape), kind) for name, (shape, kind) in inputs.items()],
        )
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({output})
    model.validate_nodes_and_infer_types()
    return model


@contextlib.contextmanager
def _ready_for_tracing(module: torch.nn.Module, *, widen: bool) -> Iterator[None]:
    """Let a module of any precision be traced in float32 without copying its big weights.

    OpenVINO's 16-bit patch puts placeholders where the weights of linear layers and embeddings
    were, so that tracing computes shapes only, and hands the stored weights to the graph as they
    are. `widen` turns 16-bit weights into float32 first. Afterwards the module is as it was.
    """
    stored = [(t, t.dtype) for t in (*module.parameters(), *module.buffers())]
    if widen:
        for tensor, dtype in stored:
            tensor.data = tensor.data.float() if dtype.is_floating_point else tensor.data
    make_16bit_traceable(module)
    try:
        yield
    finally:
        unpatch_model(module, "_openvino_module_extension_patch_orig_forward")
        for tensor, dtype in stored:
            tensor.data = tensor.data.to(dtype)


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
) -> Path:
    """Trace, compress, write. `source` identifies the checkpoint, for `_is_converted`."""
    _check_weight_format(weight_format)
    with _ready_for_tracing(module, widen=weight_format == "fp32"):
        model = trace(module)
        if weight_format in ("int8", "int4"):
            model = _compress_weights(model, weight_format, module.config)
        with _staged(Path(output_dir)) as folder:
            ov.save_model(model, folder / IR_NAME, compress_to_fp16=weight_format != "fp32")
            del model
            _save_config(module, folder)
            files = {file.name: file.stat().st_size for file in folder.iterdir()}
            record = {"weight_format": weight_format, "source": source, "files": files}
            (folder / "conversion.json").write_text(json.dumps(record, indent=1))
    gc.collect()
    return Path(output_dir)


def _check_weight_format(weight_format: str) -> None:
    if weight_format not in WEIGHT_FORMATS:
        choices = ", ".join(repr(name) for name in WEIGHT_FORMATS)
        raise ValueError(f"weight_format={weight_format!r} is unknown: use one of {choices}.")


def _compress_weights(model: ov.Model, weight_format: str, config: Any) -> ov.Model:
    """Compress the weights in memory, before anything is written."""
    with _quiet(), contextlib.redirect_stdout(None):  # NNCF draws tables and bars
        if weight_format == "int8":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            ratio=1.0,
            group_size=_int4_group_size(config),
            backup_mode=nncf.BackupMode.INT8_ASYM,
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE
            ),
        )


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


@contextlib.contextmanager
def _staged(output_dir: Path) -> Iterator[Path]:
    """Write into a folder beside `output_dir` and move the files when all are written.

    The `.xml` goes last, and an old one goes first: whoever finds an `.xml` finds its weights.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output_dir.parent) as staging:
        yield Path(staging)
        (output_dir / IR_NAME).unlink(missing_ok=True)
        for file in sorted(Path(staging).iterdir(), key=lambda file: file.suffix == ".xml"):
            os.replace(file, output_dir / file.name)


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
    weight_format: str = "fp16",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force: bool = False,
) -> Path:
    """Turn a PixArt-α or PixArt-Σ checkpoint into a folder of OpenVINO IRs and return the folder.

    `model_id`: a Hugging Face id or a local diffusers folder (safetensors only).
    `weight_format`: "fp32", "fp16", "int8" or "int4", for the weights of all three models.
    `revision`, `cache_dir`, `token`, `local_files_only`: as in `huggingface_hub`.
    `force`: convert again what is already there.

    Only one model is in memory at a time, and models already converted from the same checkpoint
    in the same format are kept. `model_index.json` is written last: a folder without it is not
    finished, and the same call finishes it.
    """
    _check_weight_format(weight_format)
    source = _fetch(model_id, revision, cache_dir, token, local_files_only)
    index = _read_model_index(source)
    _check_torch_folder(source)
    output_dir = Path(output_dir)
    if output_dir.resolve() == source.resolve():
        raise ValueError(
            f"output_dir={str(output_dir)!r} is the folder of the checkpoint: choose another."
        )
    output_dir.mkdir(parents=True, exist_ok=True)

    prints = {name: _fingerprint(source / part.folder) for name, part in PARTS.items()}
    missing = [
        name
        for name in PARTS
        if force or not _is_converted(output_dir / name, weight_format, prints[name])
    ]
    if missing:
        (output_dir / MODEL_INDEX).unlink(missing_ok=True)
    with tqdm(total=len(PARTS), unit="model") as bar:
        for name, part in PARTS.items():
            bar.set_description(f"{'Converting' if name in missing else 'Keeping'} {name}")
            if name in missing:
                module = _load_part(source / part.folder, part.loader)
                _convert(part.trace, module, output_dir / name, weight_format, prints[name])
                del module
                gc.collect()
            bar.update()
        bar.set_description("Converted")

    _save_tokenizer(source / "tokenizer", output_dir / "tokenizer")
    shutil.copytree(source / "scheduler", output_dir / "scheduler", dirs_exist_ok=True)
    _write_json(index, output_dir / MODEL_INDEX)
    return output_dir


def _fetch(model_id, revision, cache_dir, token, local_files_only) -> Path:
    """The local folder of `model_id`, downloaded if it is a hub id; never anything pickled."""
    if Path(model_id).is_dir():
        return Path(model_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model_id)) or isinstance(model_id, Path):
        raise FileNotFoundError(
            f"model_id={str(model_id)!r} is neither a folder here nor a Hugging Face id: "
            "check the path, or use an id such as 'PixArt-alpha/PixArt-XL-2-512x512'."
        )
    folders = {part.folder for part in PARTS.values()} | set(PARTS)
    weights = [f"{folder}/{kind}" for folder in folders for kind in ("*.safetensors", "openvino*")]
    return Path(
        snapshot_download(
            str(model_id),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[*weights, "*.json", "tokenizer/spiece.model"],
            # Second copies of the weights; `.fp16.` and the like. Millions of bytes, unused.
            ignore_patterns=["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*"],
        )
    )


def _read_model_index(folder: Path) -> dict:
    """The folder's `model_index.json`, if it is one of a PixArt pipeline."""
    file = folder / MODEL_INDEX
    if not file.is_file():
        if any((folder / name / IR_NAME).is_file() for name in PARTS):
            raise FileNotFoundError(
                f"{str(folder)!r} is an unfinished OpenVINO folder ({MODEL_INDEX} is missing): "
                f"run convert_pipeline(model_id, {str(folder)!r}) once more to finish it."
            )
        raise FileNotFoundError(
            f"{str(folder)!r} has no {MODEL_INDEX}: name the folder of a whole PixArt pipeline."
        )
    index = json.loads(file.read_text(encoding="utf-8"))
    if _family(index) is None:
        raise ValueError(
            f"{str(folder)!r} holds a {index.get('_class_name')}: only PixArtAlphaPipeline and "
            "PixArtSigmaPipeline can be used here, choose a PixArt-α or PixArt-Σ checkpoint."
        )
    return index


def _family(index: dict) -> str | None:
    """The diffusers class a folder is for, if it is one of the two; "OV" in front is no matter."""
    name = str(index.get("_class_name")).removeprefix("OV")
    return name if name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline") else None


def _is_openvino_folder(folder: Path) -> bool:
    return any((folder / name / IR_NAME).is_file() for name in PARTS)


def _check_torch_folder(folder: Path) -> None:
    """Every part of the checkpoint must be there, with weights that cannot run code."""
    if _is_openvino_folder(folder):
        raise ValueError(
            f"model_id={str(folder)!r} is converted already: load it with from_pretrained, "
            "or name the checkpoint that it was made from."
        )
    for name in ("tokenizer", "scheduler", *(part.folder for part in PARTS.values())):
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{str(folder)!r} has no folder {name!r}: the checkpoint is incomplete, "
                "download it again."
            )
    for part in PARTS.values():
        weights = folder / part.folder
        if any(weights.glob("*.safetensors")):
            continue
        pickled = next(itertools.chain(weights.glob("*.bin"), weights.glob("*.pt")), None)
        held = f"only pickled weights ({pickled.name})" if pickled else "no weights"
        raise ValueError(
            f"{str(weights)!r} holds {held}, and only safetensors are read: "
            "save the model again with safe_serialization=True."
        )


def _load_part(folder: Path, loader: type) -> torch.nn.Module:
    """Load one model in the precision it is stored in, so that its weights stay memory-mapped."""
    variant, dtype = _stored_weights(folder)
    precision = {"torch_dtype" if hasattr(loader, "save_config") else "dtype": dtype}
    with _quiet(), _no_transformers_bars():
        return loader.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, variant=variant, **precision
        )


def _stored_weights(folder: Path) -> tuple[str | None, torch.dtype]:
    """Which variant of the weights to read (None: the plain one), and its precision."""
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
    return variant or None, dtype


def _stored_dtype(file: Path) -> str:
    """The precision of all tensors in a file, or "F32" where they differ."""
    try:
        with safe_open(file, framework="pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}): download it again.") from None
    return dtypes.pop() if len(dtypes) == 1 else "F32"


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
    with _quiet():
        T5Tokenizer.from_pretrained(source, local_files_only=True).save_pretrained(output)


def _fingerprint(folder: Path) -> dict[str, list[int]]:
    """Names, sizes and times of a model's files: enough to see that a checkpoint has changed."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _is_converted(folder: Path, weight_format: str, source: dict) -> bool:
    """Whether `folder` holds a whole IR of this format, made from this checkpoint.

    A model converted on its own, by one of the three functions above, has no source on record and
    is taken as it is.
    """
    try:
        record = json.loads((folder / "conversion.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (
        sizes == record["files"]
        and record["weight_format"] == weight_format
        and record["source"] in (None, source)
    )


def _write_json(content: dict, file: Path) -> None:
    """Write all of it or nothing."""
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


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


def default_settings(model_dir: str | Path) -> GenerationDefaults:
    """Read a checkpoint's own defaults from its folder, OpenVINO or diffusers.

    LCM checkpoints draw in 4 steps and without guidance (PixArt: any scale ≤ 1 switches it off),
    the others in 20 steps with scale 4.5. α reads 120 tokens, Σ reads 300. Size in pixels.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"model_dir={str(model_dir)!r} is no folder: check the path.")
    family = _family(_read_model_index(folder))
    scheduler = _read_config(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    vae = "vae_decoder" if _is_openvino_folder(folder) else "vae"
    blocks = _read_config(folder / vae / "config.json").get("block_out_channels", [0] * 4)
    sample_size = _read_config(folder / "transformer" / "config.json").get("sample_size", 128)
    size = sample_size * 2 ** (len(blocks) - 1)
    is_lcm = scheduler == "LCMScheduler"
    return GenerationDefaults(
        num_inference_steps=4 if is_lcm else 20,
        guidance_scale=0.0 if is_lcm else 4.5,
        max_sequence_length=_MAX_TOKENS[family],
        height=size,
        width=size,
    )


_MAX_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


def _read_config(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is missing: the folder is incomplete.")
    return json.loads(file.read_text(encoding="utf-8"))


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


# ---- the pipelines ------------------------------------------------------------------------------


class _OVPixArtPipeline(OVDiffusionPipeline):
    """What α and Σ share. Optimum's pipeline with PixArt's transformer, shapes and checks."""

    main_input_name = "prompt"
    export_feature = "text-to-image"

    def __init__(self, *args, compile: bool = True, **kwargs):
        """Take the place of optimum's constructor; `from_pretrained` is the way in.

        Every route to a pipeline ends here, so this is where stored compile options are read.
        """
        for name in ("transformer", "vae_decoder"):
            if kwargs.get(name) is None:
                raise FileNotFoundError(
                    f"{str(kwargs.get('model_save_dir'))!r} has no {name}/{IR_NAME}: "
                    "run convert_pipeline once more to finish the folder."
                )
        # Compile later (unless all is compiled already): the transformer is about to be replaced.
        super().__init__(*args, compile=compile and kwargs.get("compile_only", False), **kwargs)
        self.transformer = OVPixArtTransformer(self.transformer.model, self, "transformer")
        for part in self.components.values():
            # A dictionary for each: optimum shares one, and settings would leak between models.
            user = kwargs.get("ov_config") or {}
            part.ov_config = {**user} if self._compile_only else _compile_config(part.model, user)
        if compile:
            self.compile()

    # -- load and save --

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        export: bool = False,
        *,
        weight_format: str = "fp16",
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
        family = _family(_read_model_index(folder))
        if family != cls.auto_model_class.__name__:
            raise ValueError(f"model_id={str(model_id)!r} is a {family}: load it with OV{family}.")
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
            raise ValueError(
                f"{str(file_name)!r} cannot be read, it or its .bin is damaged: "
                "convert it again with convert_pipeline(..., force=True)."
            ) from None

    @staticmethod
    def _compile_model(model, device=None, ov_config=None, model_save_dir=None):
        """Compile straight from disk (`compile_only=True`), stored options included."""
        config = _compile_config(ov.Core().read_model(model), ov_config or {})
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
        (folder / MODEL_INDEX).unlink(missing_ok=True)
        self._save_pretrained(folder)
        self._save_config(folder)
        if push_to_hub:
            return self.push_to_hub(folder, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Float32: what goes in and comes out, whatever precision the device computes in."""
        return torch.float32

    # -- static shapes --

    @property
    def batch_size(self) -> int:
        """Prompts per call that the models are shaped for, -1 if any number."""
        model = self.transformer.model if self.text_encoder is None else self.text_encoder.model
        return _length(model.inputs[0].get_partial_shape()[0])

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

        self.is_dynamic = -1 in {batch_size, height, width, num_images_per_prompt}
        tokens = max_sequence_length or (-1 if self.is_dynamic else self._family_tokens)
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
    def _family_tokens(self) -> int:
        return _MAX_TOKENS[self.auto_model_class.__name__]

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
        defaults = {name: p.default for name, p in signature.parameters.items()}
        prompts = self._check_prompts({**defaults, **call})
        self._apply_static_shapes(call, prompts)
        self._check_call({**defaults, **call})
        return super().__call__(**call)

    def _check_prompts(self, call: dict[str, Any]) -> int:
        """Check what is to be drawn and return the number of prompts."""
        prompt, embeds, negative = call["prompt"], call["prompt_embeds"], call["negative_prompt"]
        if prompt is None and embeds is not None:
            return len(embeds)
        _check(_is_text(prompt), "prompt", prompt, "a string or a list of at least one string")
        prompts = 1 if isinstance(prompt, str) else len(prompt)
        if isinstance(negative, list) and call["guidance_scale"] > 1:
            fits = _is_text(negative) and len(negative) == prompts
            _check(fits, "negative_prompt", negative, f"one string, or {prompts}, one a prompt")
        return prompts

    def _apply_static_shapes(self, call: dict[str, Any], prompts: int) -> None:
        """Fill in what static shapes have fixed, and refuse what contradicts them."""
        static = self._static
        if not static:
            return
        if "prompts" in static:
            rule = f"{static['prompts']} of them, as reshape has fixed, or reshape again"
            _check(prompts == static["prompts"], "prompt", f"{prompts} prompts", rule)
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

    def _check_call(self, call: dict[str, Any]) -> None:
        """Say in one line what is wrong with a call, before anything is computed."""
        for name in ("num_inference_steps", "num_images_per_prompt", "max_sequence_length"):
            _check(_is_count(call[name]), name, call[name], "a whole number from 1")
        scale = call["guidance_scale"]
        is_number = isinstance(scale, int | float) and math.isfinite(scale)
        _check(is_number, "guidance_scale", scale, "a number; up to 1 switches guidance off")

        sample_size = self.transformer.config.sample_size
        bins = (32, 64, 128) if self._family_tokens == 120 else (32, 64, 128, 256)
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

        schedule = call["timesteps"] if call["timesteps"] is not None else call["sigmas"]
        steps = call["num_inference_steps"] if schedule is None else len(schedule)
        if steps == 1 and isinstance(self, PixArtAlphaPipeline) and self._needs_two_steps():
            # diffusers asks the scheduler for the clean picture then, and these have none to give
            name = type(self.scheduler).__name__
            rule = f"2 or more with {name} (one step takes an LCM or DDPM scheduler)"
            _check(False, "num_inference_steps", steps, rule)

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

    auto_model_class = PixArtAlphaPipeline


class OVPixArtSigmaPipeline(_OVPixArtPipeline, PixArtSigmaPipeline):
    """PixArt-Σ on OpenVINO: 256, 512, 1024-MS and 2K-MS checkpoints."""

    auto_model_class = PixArtSigmaPipeline


# From here on optimum's own entrances know PixArt: OVDiffusionPipeline, OVPipelineForText2Image.
for _key, _class in (
    ("pixart-alpha", OVPixArtAlphaPipeline),
    ("pixart-sigma", OVPixArtSigmaPipeline),
):
    ov_diffusion.SUPPORTED_OV_PIPELINES.append(_class)
    ov_diffusion.OV_TEXT2IMAGE_PIPELINES_MAPPING[_key] = _class


def _check_openvino_folder(folder: Path) -> None:
    """Every model that `model_index.json` names must be there in full."""
    for name in PARTS:
        for file in (IR_NAME, IR_NAME.replace(".xml", ".bin"), "config.json"):
            if not (folder / name / file).is_file():
                raise FileNotFoundError(
                    f"{str(folder)!r} has no {name}/{file}: run convert_pipeline(model_id, "
                    f"{str(folder)!r}) once more to finish it."
                )


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
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}…"
        raise ValueError(f"{name}={shown} does not work: it has to be {rule}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
