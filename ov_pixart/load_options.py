"""The options of `from_pretrained`: which are known, and what each of them is for."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from optimum.intel.openvino.configuration import OVQuantizationConfigBase
from optimum.intel.openvino.modeling_diffusion import OVModelVae, OVPipelinePart
from transformers import PreTrainedTokenizerBase

from ov_pixart.checkpoint import is_scheduler_for_pixart
from ov_pixart.checks import check, check_names, plain
from ov_pixart.convert import convert_pipeline
from ov_pixart.ir import check_ov_config, device_name

_HUB = ("revision", "cache_dir", "token", "local_files_only")
_CONVERSION = set(inspect.signature(convert_pipeline).parameters)
_CONVERSION -= {"model_id", "output_dir", "force", *_HUB}
_IR = (ov.Model, ov.CompiledModel)
_LOADING = {  # name → classes of its values, None aside
    "device": object,
    "ov_config": object,  # see `check_ov_config`
    **dict.fromkeys(("compile", "compile_only", "dynamic_shapes", "release_text_encoder"), bool),
    "quantization_config": (OVQuantizationConfigBase, dict),
    "load_in_8bit": bool,
    # in place of what the folder holds
    "scheduler": SchedulerMixin,
    "tokenizer": PreTrainedTokenizerBase,
    **dict.fromkeys(("text_encoder", "transformer"), (*_IR, torch.nn.Module, OVPipelinePart)),
    "vae": (torch.nn.Module, OVModelVae),
    **dict.fromkeys(("vae_decoder", "vae_encoder"), _IR),
}
_NONE_COUNTS = {"tokenizer", "text_encoder", "transformer", "vae_encoder", "device"}
# of torch pipelines: how weights are stored does not matter here
_NO_EFFECT = {"torch_dtype", "dtype", "variant", "use_safetensors", "low_cpu_mem_usage"}
_NO_EFFECT |= {"device_map", "safety_checker", "feature_extractor", "resume_download"}


def split_options(
    owner: str, options: dict[str, Any], others: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the conversion and those for loading; `others` are known names beside these.

    A component is taken from a path or an id while converting, and as an object while loading.
    Raises TypeError for unknown names, ValueError for values of another kind and for an unknown
    device or setting: all before anything is converted.
    """
    check_names(owner, options, [*_CONVERSION, *_LOADING, *_NO_EFFECT, *others])
    conversion, loading = {}, {}
    for name, value in options.items():
        value = plain(value)
        is_object = name in _LOADING and not isinstance(value, str | Path | bool)
        if name in _CONVERSION and not is_object:
            conversion[name] = value
        elif name in _LOADING:
            fits = value is None or isinstance(value, _LOADING[name])
            check(fits, name, value, f"{_describe(_LOADING[name])}, or left out of the call")
            rule = "left out of the call: output_type='latent' does without the VAE"
            check(value is not None or name not in ("vae", "vae_decoder"), name, value, rule)
            if value is not None or name in _NONE_COUNTS:
                loading[name] = value
    scheduler = loading.get("scheduler")
    fits = scheduler is None or is_scheduler_for_pixart(type(scheduler))
    rule = "one for models that predict noise, which has scale_model_input"
    check(fits, "scheduler", type(scheduler).__name__, rule)
    is_compiled = loading.get("compile", True) or not loading.get("compile_only")
    check(is_compiled, "compile", False, "True with compile_only=True")
    loading["device"] = device_name(loading.get("device", "CPU"))
    check_ov_config(loading.get("ov_config"), loading["device"])
    return {name: value for name, value in conversion.items() if value is not None}, loading


def _describe(classes: type | tuple[type, ...]) -> str:
    if classes is bool:
        return "True or False"
    one_of = classes if isinstance(classes, tuple) else (classes,)
    return "an object of " + ", ".join(one.__name__ for one in one_of)
