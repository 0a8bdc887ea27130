"""One component's weights in a single file: the original repository's names, no configuration."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from ov_pixart.checks import read_json, shortened
from ov_pixart.quiet import quiet

_PICKLED = (".pth", ".pt", ".ckpt", ".bin", ".pkl")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "_orig_mod.", "module.")

# Modules of the original PixArt repository → diffusers' names; where one matrix is several in
# diffusers, stacked, all of them in their order. Those of a block follow `blocks.N.`.
_WHOLE = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# A table of positions, which the model computes, and an embedding for prompts left out in training.
_UNUSED = {
    "pos_embed",
    "pos_embed.pos_embed",
    "y_embedder.y_embedding",
    "caption_projection.y_embedding",
}


def check_file(argument: str, file: Path) -> None:
    """Raise ValueError unless a file is one of safetensors, with a whole header."""
    given = f"{argument}={str(file)!r}"
    if file.suffix == ".gguf":
        raise ValueError(
            f"{given} is a GGUF file, and only safetensors are read: name the model that it was "
            "made from; weight_format='int4' makes it as small."
        )
    if file.suffix in _PICKLED:
        raise ValueError(
            f"{given} holds pickled weights, which can run code and are never read: save them as "
            ".safetensors first."
        )
    if file.suffix != ".safetensors":
        raise ValueError(f"{given} is a file that cannot be read: name a .safetensors or a folder.")
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{given} is damaged ({error}): download it again.") from None


def original_modules(layers: int) -> dict[str, tuple[str, ...]]:
    """Each module's name in the original repository → its names in diffusers, stacked in order."""
    names = {original: (ours,) for original, ours in _WHOLE.items()}
    for i in range(layers):
        for original, ours in _BLOCK.items():
            targets = tuple(f"transformer_blocks.{i}.{name}" for name in ours.split())
            names[f"blocks.{i}.{original}"] = targets
    return names


def diffusers_names(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A transformer's weights under diffusers' names, whichever of the two they have."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    modules = original_modules(layers)
    tables = {f"blocks.{i}.scale_shift_table": f"transformer_blocks.{i}." for i in range(layers)}
    tables["final_layer.scale_shift_table"] = ""
    renamed = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in tables:
            renamed[f"{tables[name]}scale_shift_table"] = tensor
        elif module in modules:
            parts = tensor.chunk(len(modules[module]))
            targets = (f"{target}.{kind}" for target in modules[module])
            renamed |= zip(targets, parts, strict=True)
        elif name not in _UNUSED:
            renamed[name] = tensor
    return renamed


def load_single_file(argument: str, file: Path, config: Path) -> torch.nn.Module:
    """The module that a file holds the weights of, with the `config.json` in the folder `config`.

    `argument`: "text_encoder", "transformer" or "vae". Raises ValueError where weights are missing,
    unknown or of another shape.
    """
    try:
        with quiet():
            module = _LOADERS[argument](file, config)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = shortened(lines[-1], 150)
        raise ValueError(
            f"{argument}={str(file)!r} does not fit the configuration in {str(config)!r} "
            f"({reason}): choose a model_id of the same architecture."
        ) from None
    return module.eval()


def _load_transformer(file: Path, config: Path) -> PixArtTransformer2DModel:
    with init_empty_weights():
        module = PixArtTransformer2DModel.from_config(read_json(config / "config.json"))
    state = diffusers_names(load_file(file), len(module.transformer_blocks))
    module.load_state_dict(state, assign=True)
    return module


def _load_text_encoder(file: Path, config: Path) -> T5EncoderModel:
    with init_empty_weights():
        module = T5EncoderModel(T5Config.from_pretrained(config, local_files_only=True))
    state = load_file(file)
    state = {name: state[name] for name in state if not name.startswith(("decoder.", "lm_head."))}
    embedding = "encoder.embed_tokens.weight"  # the same matrix, which some files hold once
    if "shared.weight" in state:
        state.setdefault(embedding, state["shared.weight"])
    module.load_state_dict(state, assign=True)
    module.tie_weights()
    return module


def _load_vae(file: Path, config: Path) -> AutoencoderKL:
    """diffusers itself reads the names of Stable Diffusion's original repository."""
    return AutoencoderKL.from_single_file(str(file), config=str(config), local_files_only=True)


_LOADERS: dict[str, Callable[[Path, Path], torch.nn.Module]] = {
    "text_encoder": _load_text_encoder,
    "transformer": _load_transformer,
    "vae": _load_vae,
}
