"""What is in a checkpoint's folder, diffusers' layout or OpenVINO's: read, check, load."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError, safe_open
from transformers import T5EncoderModel

from ov_pixart.checks import read_json
from ov_pixart.families import ALPHA, Family, find_family
from ov_pixart.ir import IR_NAME, damage_message, ir_files
from ov_pixart.quiet import hide_loading_bars, quiet
from ov_pixart.storage import LOCK, OPTIMIZATION, RECORDS, find_damage, read_record

MODEL_INDEX = "model_index.json"


@dataclass(frozen=True)
class Component:
    """One of the three networks: its folder in a diffusers checkpoint and the class that loads it.

    Its folder among IRs is its name in COMPONENTS.
    """

    folder: str
    loader: type


COMPONENTS = {
    "text_encoder": Component("text_encoder", T5EncoderModel),
    "transformer": Component("transformer", PixArtTransformer2DModel),
    "vae_decoder": Component("vae", AutoencoderKL),
}
NETWORK_FOLDERS = frozenset(component.folder for component in COMPONENTS.values())
FOLDERS = NETWORK_FOLDERS | {"tokenizer", "scheduler"}  # of a whole diffusers checkpoint


# ---- folders ------------------------------------------------------------------------------------


def is_openvino_folder(folder: Path) -> bool:
    """Whether at least one component is there as IR."""
    return any((folder / name / IR_NAME).is_file() for name in COMPONENTS)


def read_model_index(folder: Path) -> dict[str, Any]:
    """Read the `model_index.json` of a PixArt pipeline.

    Raises FileNotFoundError where the folder is not a whole pipeline, ValueError where it holds
    another one, or names code from outside diffusers and transformers.
    """
    file = folder / MODEL_INDEX
    if not file.is_file():
        if is_openvino_folder(folder) or (folder / LOCK).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} is an unfinished OpenVINO folder ({MODEL_INDEX} is missing): "
                f"run {_finishing_call(folder)} once more to finish it."
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
    for name, given in index.items():  # optimum imports the classes that are named here
        library = given[0] if isinstance(given, list) and given else None
        if name not in NETWORK_FOLDERS and library not in (None, "diffusers", "transformers"):
            raise ValueError(
                f"{str(file)!r} takes its {name} from {given!r}: code from outside diffusers and "
                "transformers is never run, name the checkpoint that this one was made from."
            )
    return index


def _finishing_call(folder: Path) -> str:
    """The call that finishes an output folder."""
    if any((folder / name / OPTIMIZATION).is_file() for name in COMPONENTS):
        return f"optimize_pipeline(ov_dir, {str(folder)!r}, preset)"
    return f"convert_pipeline(model_id, {str(folder)!r})"


def family_of(folder: str | Path) -> Family:
    """The family of a diffusers or OpenVINO folder; raises as `read_model_index` does."""
    return find_family(read_model_index(Path(folder))["_class_name"])


def check_torch_folder(folder: Path, *, without: Iterable[str] = ()) -> None:
    """Every folder of a checkpoint, except `without`, must be there, with safetensors weights.

    Raises FileNotFoundError or ValueError.
    """
    if is_openvino_folder(folder):
        raise ValueError(
            f"model_id={str(folder)!r} is converted already: load it with from_pretrained, "
            "or name the checkpoint that it was made from."
        )
    needed = sorted(FOLDERS - set(without))
    for name in needed:
        if not (folder / name).is_dir():
            remedy = f" or name a {name}=" if name != "tokenizer" else ""
            raise FileNotFoundError(
                f"{str(folder)!r} has no folder {name!r}: the checkpoint is incomplete, "
                f"download it again{remedy}."
            )
    for name in needed:
        if name in NETWORK_FOLDERS:
            check_weights(folder / name)
    _check_vocabulary(folder / "tokenizer")


def check_weights(folder: Path) -> None:
    """Raise ValueError unless a component's weights are safetensors, which cannot run code."""
    if any(folder.glob("*.safetensors")):
        return
    kinds = {**dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), "pickled"), ".gguf": "GGUF"}
    other = next((file for file in folder.iterdir() if file.suffix in kinds), None)
    held = f"only {kinds[other.suffix]} weights ({other.name})" if other else "no weights"
    raise ValueError(
        f"{str(folder)!r} holds {held}, and only safetensors are read: "
        "save the model again with safe_serialization=True."
    )


def check_openvino_folder(folder: Path) -> None:
    """Every file of a converted pipeline must be there, in the size that its record states.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    read_scheduler_name(folder / "scheduler")
    index = read_model_index(folder)
    if index.get("tokenizer") != [None, None]:
        read_json(folder / "tokenizer" / "tokenizer_config.json")
        _check_vocabulary(folder / "tokenizer")
    left_out = index.get("text_encoder") == [None, None]
    for name in list(COMPONENTS)[left_out:]:  # the text encoder is the first
        for file in (IR_NAME, IR_NAME.replace(".xml", ".bin"), "config.json"):
            if not (folder / name / file).is_file():
                raise FileNotFoundError(
                    f"{str(folder)!r} has no {name}/{file}: run {_finishing_call(folder)} once "
                    "more to finish it."
                )
    check_sizes(folder)


def _check_vocabulary(folder: Path) -> None:
    """Without it, transformers makes a tokenizer that knows no word, and says nothing."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise FileNotFoundError(
            f"{str(folder)!r} has neither tokenizer.json nor spiece.model: the folder is "
            "incomplete, download or convert it again."
        )


def check_sizes(folder: Path) -> None:
    """Raise ValueError if a component's file is not of the size that its record states."""
    for name, record in itertools.product(COMPONENTS, RECORDS):
        if file := find_damage(folder / name, read_record(folder / name / record)):
            raise ValueError(damage_message(file))


def is_scheduler_for_pixart(kind: Any) -> bool:
    """Whether a class is a scheduler with `scale_model_input`, which flow matching has not."""
    is_scheduler = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    return is_scheduler and hasattr(kind, "scale_model_input")


def read_scheduler_name(folder: Path) -> str:
    """The class of a folder's scheduler; raises ValueError unless PixArt can use it."""
    file = folder / "scheduler_config.json"
    name = str(read_json(file).get("_class_name"))
    if not is_scheduler_for_pixart(getattr(diffusers, name, None)):
        raise ValueError(
            f"{str(file)!r} names the scheduler {name!r}, which is unknown or does not work with "
            "PixArt: name a folder with another one as scheduler=."
        )
    return name


COMPONENT_FILES = {IR_NAME, IR_NAME.replace(".xml", ".bin"), "config.json", *RECORDS}
OUTPUT_FOLDERS = (*COMPONENTS, "tokenizer", "scheduler")


def check_replaceable(
    output_dir: Path, names: Iterable[str] = OUTPUT_FOLDERS, argument: str = "output_dir"
) -> None:
    """Raise ValueError where a folder that will be replaced as a whole holds other files.

    Files of tokenizer and scheduler have many names: these two are replaced only in the output of
    an earlier call, which has a lock or IRs.
    """
    ours = (output_dir / LOCK).is_file() or is_openvino_folder(output_dir)
    for name in names:
        folder = output_dir / name
        found = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        others = found - COMPONENT_FILES if name in COMPONENTS else set() if ours else found
        if others:
            raise ValueError(
                f"{argument}={str(output_dir)!r} holds other files ({name}/{min(others)}): "
                "name a new folder."
            )


# ---- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredWeights:
    """The weights of one component on disk.

    `variant`: as in `from_pretrained`, None for the plain one. `dtype`: the precision of all
    tensors, float32 where they differ. `sizes`: how many numbers each tensor has.
    """

    variant: str | None
    files: list[Path]
    dtype: torch.dtype
    sizes: list[int]


_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")


def stored_weights(folder: Path) -> StoredWeights:
    """Read from the headers of a component's safetensors files, or of one file, what they hold.

    Raises FileNotFoundError where there are none of the usual names, ValueError for a damaged one.
    """
    variants: dict[str, list[Path]] = {"": [folder]} if folder.is_file() else {}
    for file in sorted(folder.glob("*.safetensors")):
        if match := _WEIGHTS.fullmatch(file.name):
            variants.setdefault(match.group(1) or "", []).append(file)
    if not variants:
        raise FileNotFoundError(
            f"{str(folder)!r} has no model*.safetensors or diffusion_pytorch_model*.safetensors: "
            "save the model again with save_pretrained."
        )
    variant = min(variants)  # "" comes first
    dtypes, sizes = set(), []
    for file in variants[variant]:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 – it cannot be iterated otherwise
                    tensor = tensors.get_slice(name)
                    dtypes.add(tensor.get_dtype())
                    sizes.append(math.prod(tensor.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is damaged ({error}): download it again.") from None
    only = dtypes.pop() if len(dtypes) == 1 else "F32"
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(only, torch.float32)
    return StoredWeights(variant or None, variants[variant], dtype, sizes)


def load_component(folder: Path, loader: type) -> torch.nn.Module:
    """Load one component in the precision it is stored in, so that weights stay memory-mapped.

    Raises ValueError where a weight is missing: safetensors have no checksum of their own.
    """
    stored = stored_weights(folder)
    precision = "torch_dtype" if hasattr(loader, "save_config") else "dtype"
    with quiet(), hide_loading_bars():
        module, loaded = loader.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            variant=stored.variant,
            output_loading_info=True,
            **{precision: stored.dtype},
        )
    if loaded["missing_keys"]:
        name = min(loaded["missing_keys"])
        raise ValueError(
            f"{str(folder)!r} lacks the weight {name!r}, its files are damaged or belong to "
            "another model: download it again."
        )
    return module


def sizes_mb(folder: Path) -> dict[str, float]:
    """10⁶ bytes on disk of each component; of a torch folder, of the weights that are read.

    Raises FileNotFoundError where there are no weights.
    """
    sizes = {}
    for name, component in COMPONENTS.items():
        if is_openvino_folder(folder):
            files = ir_files(folder / name)
        else:
            files = stored_weights(folder / component.folder).files
        sizes[name] = sum(file.stat().st_size for file in files) / 1e6
    return sizes


# ---- recommended settings -----------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationDefaults:
    """Recommended call arguments of a checkpoint; the fields are named as the pipeline's call.

    `height` and `width` in pixels. `timesteps` is set for one-step (DMD) checkpoints only.
    `use_resolution_binning` is off where the checkpoint's family has no bins for its size.
    `guidance_end`: the share of the steps that are guided, from the first.
    """

    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    height: int
    width: int
    timesteps: tuple[int, ...] | None = None
    use_resolution_binning: bool = True
    guidance_end: float = 1.0


def default_settings(model_dir: str | Path) -> GenerationDefaults:
    """Read a checkpoint's recommended settings from its folder, OpenVINO or diffusers.

    LCM checkpoints take 4 steps without guidance (PixArt: any scale ≤ 1 switches it off), the
    others 20 steps with scale 4.5. α takes prompts of 120 tokens, Σ of 300. Guidance ends early
    where `model_index.json` has `_guidance_end`.

    DMD checkpoints take one step from the middle of the schedule. Nothing in their folder marks
    them but the scheduler that their model card asks for, DDPM, which no other α checkpoint comes
    with: `convert_pipeline(..., scheduler=)` puts it there.

    Raises FileNotFoundError where `model_dir` is not a folder, and as `read_model_index` does.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"model_dir={str(model_dir)!r} is no folder: check the path.")
    family = family_of(folder)
    scheduler = read_scheduler_name(folder / "scheduler")
    vae = "vae_decoder" if is_openvino_folder(folder) else "vae"
    blocks = read_json(folder / vae / "config.json").get("block_out_channels", [0] * 4)
    sample_size = _sample_size(folder)
    size = sample_size * 2 ** (len(blocks) - 1)
    shape = {
        "max_sequence_length": family.max_tokens,
        "height": size,
        "width": size,
        "use_resolution_binning": sample_size in family.bins,
    }
    if scheduler == "LCMScheduler":
        return GenerationDefaults(num_inference_steps=4, guidance_scale=0.0, **shape)
    if scheduler == "DDPMScheduler" and family is ALPHA:
        # the only timestep that it was trained at: model card of PixArt-Alpha-DMD-XL-2-512x512
        return GenerationDefaults(
            num_inference_steps=1, guidance_scale=1.0, timesteps=(400,), **shape
        )
    shape["guidance_end"] = read_model_index(folder).get("_guidance_end", 1.0)
    return GenerationDefaults(num_inference_steps=20, guidance_scale=4.5, **shape)


def image_sizes(folder: str | Path) -> dict[str, tuple[int, int]]:
    """`(height, width)` in pixels that a checkpoint was trained on, by aspect ratio as "4:3".

    A checkpoint without aspect-ratio bins has its own square only. Raises as `default_settings`.
    """
    folder = Path(folder)
    defaults = default_settings(folder)
    square = {"1:1": (defaults.height, defaults.width)}
    return family_of(folder).image_sizes(_sample_size(folder)) or square


def _sample_size(folder: Path) -> int:
    return read_json(folder / "transformer" / "config.json").get("sample_size", 128)
