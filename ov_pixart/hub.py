"""Find a model's folder: a local one, or a download from the Hugging Face Hub; nothing pickled."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ov_pixart.checkpoint import COMPONENTS, FOLDERS, check_weights
from ov_pixart.checks import check
from ov_pixart.ir import IR_NAME


@dataclass(frozen=True)
class HubOptions:
    """How to download; the fields are those of `huggingface_hub.snapshot_download`."""

    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False


def fetch_pipeline(
    model_id: str | Path,
    hub: HubOptions,
    *,
    revision: str | None = None,
    folders: Iterable[str] = FOLDERS,
) -> Path:
    """The local folder of a pipeline; of its weights, only those of `folders` are downloaded.

    Raises ValueError or FileNotFoundError that names `model_id`.
    """
    weights = [f"{name}/*.safetensors" for name in folders]
    weights += [f"{name}/openvino*" for name in COMPONENTS]
    return _fetch("model_id", model_id, hub, weights, revision)


def fetch_component(name: str, given: str | Path, hub: HubOptions) -> Path:
    """The local folder of a single component: alone, or in a subfolder of its name; also an IR's.

    Raises ValueError or FileNotFoundError that names the argument `name`.
    """
    weights = [f"{name}/*.safetensors", "model*.safetensors"]
    weights += ["diffusion_pytorch_model*.safetensors"]
    ir = next((key for key, one in COMPONENTS.items() if one.folder == name), name)
    weights += [f"{ir}/openvino*", "openvino_model.*"]
    weights = [] if name == "scheduler" else weights
    folder = _fetch(name, given, hub, weights)
    for place in () if name == "scheduler" else (folder / ir, folder):
        if (place / IR_NAME).is_file() and (place / "config.json").is_file():
            return place
    folder = folder / name if (folder / name).is_dir() else folder
    config = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
    if not config.is_file():
        raise FileNotFoundError(
            f"{name}={str(given)!r} holds no {name} ({config.name} is missing): "
            "name a folder that holds one, alone or in a subfolder of its name."
        )
    if name != "scheduler":
        check_weights(folder)
    return folder


def fetch_lora_folder(lora: str | Path, hub: HubOptions) -> Path:
    """The local folder of a LoRA; raises as `fetch_component` does."""
    weights = [f"*{name}*.safetensors" for name in ("adapter_model", "lora", "Lora", "LoRA")]
    return _fetch("lora", lora, hub, weights)


def check_place(argument: str, given: str | Path) -> None:
    """Raise ValueError or FileNotFoundError for what is no folder and cannot be an id."""
    is_name = isinstance(given, str | Path) and bool(str(given))
    check(is_name, argument, given, "a folder or a Hugging Face id")
    if Path(given).is_file():
        raise ValueError(f"{argument}={str(given)!r} is a file: name the folder that holds it.")
    is_id = isinstance(given, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given)
    if not is_id and not Path(given).is_dir():
        raise FileNotFoundError(
            f"{argument}={str(given)!r} is neither a folder here nor a Hugging Face id: "
            "check the path, or use an id such as 'PixArt-alpha/PixArt-XL-2-512x512'."
        )


def _fetch(
    argument: str,
    given: str | Path,
    hub: HubOptions,
    weights: list[str],
    revision: str | None = None,
) -> Path:
    check_place(argument, given)
    if Path(given).is_dir():
        return Path(given)
    try:
        folder = snapshot_download(
            str(given),
            revision=revision,
            allow_patterns=[*weights, "*.json", "tokenizer/spiece.model"],
            # second copies of the weights in other precisions: gigabytes that are never read
            ignore_patterns=["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*"],
            **asdict(hub),
        )
    except (OSError, httpx.HTTPError, HFValidationError) as error:  # HfHubHTTPError is both
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{argument}={str(given)!r} is no folder here and cannot be fetched from Hugging "
            f"Face: check its name, the connection and, for a gated model, token= ({reason})"
        ) from error
    return Path(folder)
