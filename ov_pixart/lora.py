"""LoRA: low-rank matrices that are added to a transformer's weights before it is converted."""

from pathlib import Path

from diffusers import PixArtTransformer2DModel
from safetensors import safe_open

from ov_pixart.checks import check, read_json
from ov_pixart.hub import HubOptions, fetch_lora_folder
from ov_pixart.quiet import quiet

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fetch_lora(lora: str | Path, hub: HubOptions) -> Path:
    """The folder of a LoRA as peft saves it, or its subfolder `transformer_lora`.

    diffusers' training script for PixArt uses that subfolder. Raises FileNotFoundError or
    ValueError.
    """
    folder = fetch_lora_folder(lora, hub)
    places = (folder, folder / "transformer_lora")
    folder = next((place for place in places if (place / _CONFIG).is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"lora={str(lora)!r} holds no {_CONFIG}: name a folder that peft has saved."
        )
    kind = read_json(folder / _CONFIG).get("peft_type")
    check(kind == "LORA", "lora", str(lora), f"a LoRA, not of type {kind!r}")
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"lora={str(lora)!r} holds no {_WEIGHTS}, and only safetensors are "
            "read: save it again with safe_serialization=True."
        )
    return folder


def fuse_lora(
    transformer: PixArtTransformer2DModel, folder: Path, scale: float
) -> PixArtTransformer2DModel:
    """Add a LoRA, `scale` times, to the weights it belongs to; generation then takes no longer.

    Raises ValueError where its matrices do not fit the transformer; peft does not check that.
    """
    import peft  # not at the top: it takes a second, and most conversions do without

    with safe_open(folder / _WEIGHTS, framework="pt") as tensors:
        expected = set(tensors.keys())
    try:
        with quiet():
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
