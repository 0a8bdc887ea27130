"""LoRA: low-rank matrices that are added to a transformer's weights before it is converted."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from safetensors import SafetensorError, safe_open

from ov_pixart.checks import check, is_number, read_json
from ov_pixart.hub import HubOptions, fetch_lora_folder
from ov_pixart.quiet import quiet
from ov_pixart.single_file import check_file, original_modules
from ov_pixart.storage import fingerprint

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DIFFUSERS = "pytorch_lora_weights.safetensors"

# ---- find ---------------------------------------------------------------------------------------


def fetch_loras(lora: Any, lora_scale: Any, hub: HubOptions) -> list[tuple[Path, float]]:
    """The place and the scale of each LoRA; `lora` and `lora_scale` may be lists.

    Raises FileNotFoundError or ValueError.
    """
    loras = [] if lora is None else lora if isinstance(lora, list | tuple) else [lora]
    scales = lora_scale if isinstance(lora_scale, list | tuple) else [lora_scale] * len(loras)
    rule = f"a number, or a list of {len(loras)}, one per LoRA; 1 is full strength"
    fits = len(scales) == len(loras) and all(map(is_number, scales))
    is_default = not loras and is_number(lora_scale)
    check(fits or is_default, "lora_scale", lora_scale, rule)
    return [(fetch_lora(one, hub), scale) for one, scale in zip(loras, scales, strict=True)]


def fetch_lora(lora: str | Path, hub: HubOptions) -> Path:
    """A LoRA's place: a folder as peft saves it, or a file as diffusers and OneTrainer save it.

    diffusers' training script for PixArt uses the subfolder `transformer_lora`, in its output and
    in each checkpoint. Raises FileNotFoundError or ValueError.
    """
    if isinstance(lora, str | Path) and Path(lora).is_file():
        check_file("lora", Path(lora))
        return Path(lora)
    folder = fetch_lora_folder(lora, hub)
    for place in (folder, folder / "transformer_lora"):
        if (place / _CONFIG).is_file():
            return _check_peft_folder(lora, place)
        if (place / _DIFFUSERS).is_file():
            check_file("lora", place / _DIFFUSERS)
            return place / _DIFFUSERS
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        check_file("lora", files[0])
        return files[0]
    if pickled := next(
        (file for file in folder.glob("*.*") if file.suffix in (".bin", ".pt")), None
    ):
        check_file("lora", pickled)
    found = f"several files ({files[0].name}, {files[1].name})" if files else "no LoRA"
    raise FileNotFoundError(
        f"lora={str(lora)!r} holds {found}: name a .safetensors file, or a folder of peft "
        f"({_CONFIG}) or diffusers ({_DIFFUSERS})."
    )


def _check_peft_folder(lora: str | Path, folder: Path) -> Path:
    kind = read_json(folder / _CONFIG).get("peft_type")
    check(kind == "LORA", "lora", str(lora), f"a LoRA, not of type {kind!r}")
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"lora={str(lora)!r} holds no {_WEIGHTS}, and only safetensors are "
            "read: save it again with safe_serialization=True."
        )
    check_file("lora", folder / _WEIGHTS)
    return folder


def record_loras(loras: list[tuple[Path, float]]) -> dict[str, Any] | list[dict[str, Any]]:
    """Scales and fingerprints of LoRAs, for the record of a conversion; of one, without a list."""
    records = []
    for place, scale in loras:
        inside = [*place.glob("*.json"), *place.glob("*.safetensors")]
        records.append({"scale": scale, **fingerprint(inside if place.is_dir() else [place])})
    return records[0] if len(records) == 1 else records


# ---- add ----------------------------------------------------------------------------------------


def fuse_lora(
    transformer: PixArtTransformer2DModel, lora: Path, scale: float
) -> PixArtTransformer2DModel:
    """Add a LoRA, `scale` times, to the weights it belongs to; generation then takes no longer.

    `lora`: as `fetch_lora` returns it. Raises ValueError where its matrices do not fit the
    transformer; peft does not check that.
    """
    import peft  # not at the top: it takes a second, and most conversions do without

    tensors, settings = ({}, {}) if lora.is_dir() else _read_file(lora, transformer)
    try:
        with quiet():
            if lora.is_dir():
                with safe_open(lora / _WEIGHTS, framework="pt") as content:
                    expected = set(content.keys())
                adapted = peft.PeftModel.from_pretrained(transformer, lora)
            else:
                weights = {name: one for name, one in tensors.items() if not name.endswith("alpha")}
                expected = set(weights)
                config = peft.LoraConfig(**_peft_options(tensors, settings))
                adapted = peft.get_peft_model(transformer, config)
                peft.set_peft_model_state_dict(adapted, weights)
            found = set(peft.get_peft_model_state_dict(adapted))
            for layer in adapted.modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    layer.scale_layer(scale)
            fused = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError):
        found, expected = set(), {""}
    if found != expected:
        raise ValueError(
            f"lora={str(lora)!r} does not fit the transformer: choose one that was trained for "
            "this checkpoint."
        )
    return fused


# ---- files --------------------------------------------------------------------------------------

_MODEL = "base_model.model."  # peft's prefix
_PREFIXES = re.compile(
    r"(base_model\.model\.|transformer\.|unet\.|model\.|diffusion_model\.|"
    r"lora_transformer[._]|lora_unet[._]|lycoris[._])+"
)
_TEXT_ENCODER = re.compile(r"(text_encoders?|lora_te)\d?[._]")
# diffusers before and since peft, kohya and OneTrainer; "_lora." ends the oldest names of modules
_KINDS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_down": "lora_A",
    "lora_up": "lora_B",
    "lora.down": "lora_A",
    "lora.up": "lora_B",
    "lora_linear_layer.down": "lora_A",
    "lora_linear_layer.up": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "dora_scale": "lora_magnitude_vector",
    "alpha": "alpha",
}
_NAME = re.compile(
    rf"(.+?)[._]({'|'.join(map(re.escape, _KINDS))})(?:\.default)?(?:\.(weight|bias))?"
)


def _read_file(
    file: Path, transformer: PixArtTransformer2DModel
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A file's matrices under peft's names, with `….alpha`, and peft's settings, if it has them.

    Raises ValueError for a damaged file, and for names that are not of a LoRA for PixArt.
    """
    try:
        with safe_open(file, framework="pt") as content:
            stored = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = (content.metadata() or {}).get("lora_adapter_metadata", "{}")
        settings = {
            name.removeprefix("transformer."): value for name, value in json.loads(metadata).items()
        }
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"lora={str(file)!r} is damaged ({error}): download it again.") from None
    modules = _modules(transformer)
    tensors = {}
    for name, tensor in stored.items():
        if _TEXT_ENCODER.match(name):
            raise ValueError(
                f"lora={str(file)!r} changes the text encoder too ({name!r}), and only the "
                "transformer's LoRA can be added: save that one alone."
            )
        match = _NAME.fullmatch(_PREFIXES.sub("", name, count=1))
        module = match and match[1].replace(".processor", "").replace(".", "_")
        targets = modules.get(module) or modules.get(f"{module}_0")
        if targets is None:
            raise ValueError(
                f"lora={str(file)!r} holds {name!r}, which is no weight of a LoRA for PixArt: "
                "choose one that was trained for this checkpoint."
            )
        kind = _KINDS[match[2]]
        shared = kind in ("lora_A", "alpha")  # of stacked matrices, only the output is divided
        parts = [tensor] * len(targets) if shared else tensor.chunk(len(targets))
        for target, part in zip(targets, parts, strict=True):
            if kind == "lora_magnitude_vector":
                _check_dora(file, name, tensor)
                part = part.flatten()
            ending = (
                "" if kind in ("alpha", "lora_magnitude_vector") else f".{match[3] or 'weight'}"
            )
            tensors[f"{_MODEL}{target}.{kind}{ending}"] = part.contiguous()
    return tensors, settings


def _check_dora(file: Path, name: str, scales: torch.Tensor) -> None:
    """Raise ValueError unless a DoRA has a scale per output, `(out,)` or `(out, 1)`, as in peft."""
    if scales.ndim > 1 and scales.shape[0] == 1 < scales.shape[1]:
        raise ValueError(
            f"lora={str(file)!r} is a DoRA with a scale per input ({name!r}), as OneTrainer trains "
            "it, and only scales per output can be added: use a LoRA without decomposed weights."
        )


def _modules(transformer: PixArtTransformer2DModel) -> dict[str, tuple[str, ...]]:
    """Modules by name, dots as underscores, in diffusers' words and the original repository's."""
    named = transformer.named_modules()
    own = {name: (name,) for name, module in named if hasattr(module, "weight")}
    original = original_modules(len(transformer.transformer_blocks))
    return {name.replace(".", "_"): targets for name, targets in (original | own).items()}


def _peft_options(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of peft's LoraConfig. Without any alpha, the matrices count as they are."""
    ranks = {
        name.removeprefix(_MODEL).removesuffix(".lora_A.weight"): one.shape[0]
        for name, one in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    alphas = dict(settings.get("alpha_pattern") or {})
    for name, rank in ranks.items():
        alpha = tensors.get(f"{_MODEL}{name}.alpha", None if "lora_alpha" in settings else rank)
        if alpha is not None:
            alphas[f"^{name}"] = float(alpha)
    return {
        "r": Counter(ranks.values()).most_common(1)[0][0] if ranks else 1,
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items()},
        "lora_alpha": settings.get("lora_alpha", 8),
        "alpha_pattern": alphas,
        "target_modules": list(ranks),
        "use_rslora": bool(settings.get("use_rslora")),
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors),
        "lora_bias": any(name.endswith("lora_B.bias") for name in tensors),
    }
