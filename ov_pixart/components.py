"""Compiled text encoder, transformer and VAE in the places of diffusers' own."""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import openvino as ov
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from optimum.intel.openvino.modeling_diffusion import (
    OVDiffusionPipeline,
    OVModelTextEncoder,
    OVModelVae,
    OVModelVaeDecoder,
    OVPipelinePart,
)
from transformers.utils import ModelOutput

from ov_pixart.ir import IR_NAME, read_ir
from ov_pixart.memory import release_memory


def count_tokens(masks: np.ndarray | torch.Tensor) -> int:
    """How many tokens of `(B, L)` masks are needed so that only padding is left out.

    If a mask is all zeros, all L: attention needs at least one token.
    """
    used = torch.as_tensor(masks) > 0
    if not used.any(dim=1).all():
        return used.shape[1]
    return int(used.any(dim=0).nonzero()[-1]) + 1


class OVPixArtTextEncoder(OVModelTextEncoder):
    """Compiled T5 with an LRU cache of prompt embeddings; it can be unloaded between prompts."""

    CACHED_PROMPTS = 16  # T5-XXL's embeddings of one take 2 MB (α) or 5 MB (Σ)

    def __init__(self, model: ov.Model, parent_pipeline: OVDiffusionPipeline, model_name: str):
        self._embeddings: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._shapes: dict[str, ov.PartialShape] | None = None
        super().__init__(model, parent_pipeline, model_name)

    @property
    def model(self) -> ov.Model | ov.CompiledModel:
        """The model; after `release`, read again from its folder, in the shapes it had."""
        if self._model is None:
            file = self.model_save_dir / IR_NAME
            if self.parent_pipeline._compile_only:
                self._model = self.request = self.parent_pipeline._compile_model(
                    file, self._device, self.ov_config
                )
            else:
                self._model = read_ir(file)
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
        """Drop the model and its weights; the next prompt that is not cached loads them again.

        Raises FileNotFoundError where its IR is no longer on disk.
        """
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
        """Compile the model, after `release` with the weights from disk."""
        _ = self.model  # with `compile_only` that is all
        super().compile()

    def clear_requests(self) -> None:
        """Drop the compiled model, and the embeddings that it has computed."""
        self.clear_cache()
        super().clear_requests()

    def clear_cache(self) -> None:
        """Drop the cached embeddings."""
        self._embeddings.clear()

    forget = clear_cache  # an earlier name

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> ModelOutput:
        """Encode tokens, `(B, L)`, to `last_hidden_state`, `(B, L, D)` float32.

        Each prompt is encoded once, and by itself, so that its embeddings depend neither on the
        batch nor on earlier prompts.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        texts = torch.stack([input_ids, attention_mask], dim=1).to(torch.int64).numpy()  # (B, 2, L)
        keys = [text.tobytes() for text in texts]
        found = {key: self._embeddings[key] for key in keys if key in self._embeddings}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if new:
            found |= zip(new, self._encode(np.stack(list(new.values()))), strict=True)
        for key in found:
            self._embeddings[key] = found[key]
            self._embeddings.move_to_end(key)
        while len(self._embeddings) > self.CACHED_PROMPTS:
            self._embeddings.popitem(last=False)
        stacked = np.stack([found[key] for key in keys])
        return ModelOutput(last_hidden_state=torch.from_numpy(stacked))

    def _encode(self, texts: np.ndarray) -> list[np.ndarray]:
        """Run the model on `(N, 2, L)` ids and masks; a static batch is filled up with the last.

        Padding is not encoded, unless shapes are static; its embeddings are zero. The DiT masks
        them.
        """
        self.compile()
        batch, tokens = self.input_shape
        size = 1 if batch.is_dynamic else batch.get_length()
        embeddings = []
        for i in range(0, len(texts), size):
            chunk = texts[i : i + size]
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])
            used = filled[:, :, : count_tokens(filled[:, 1])] if tokens.is_dynamic else filled
            output = self.request({"input_ids": used[:, 0], "attention_mask": used[:, 1]})[0]
            padding = ((0, 0), (0, filled.shape[2] - used.shape[2]), (0, 0))
            embeddings += list(np.pad(output[: len(chunk)], padding))
        return embeddings


class OVPixArtTransformer(OVPipelinePart):
    """Compiled DiT, called the way diffusers calls `PixArtTransformer2DModel`."""

    _calls: list[dict[str, np.ndarray]] | None = None

    @contextlib.contextmanager
    def recorded_calls(self) -> Iterator[list[dict[str, np.ndarray]]]:
        """A list of the inputs, by name, of every call that is made while the block runs."""
        self._calls = []
        try:
            yield self._calls
        finally:
            self._calls = None

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
            tokens = count_tokens(encoder_attention_mask)
            encoder_hidden_states = encoder_hidden_states[:, :tokens]
            encoder_attention_mask = encoder_attention_mask[:, :tokens]
        inputs = {
            "hidden_states": hidden_states,
            "timestep": torch.as_tensor(timestep).expand(hidden_states.shape[0]),
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            **(added_cond_kwargs or {}),
        }
        sample = torch.from_numpy(self.infer(inputs))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def infer(self, inputs: dict[str, torch.Tensor | None]) -> np.ndarray:
        """Run the model, as many times as a static batch size requires.

        A static IR has the shape of the images alone: a call with guidance has twice as many rows
        and takes two runs, a call without takes one, so no row is computed without need.

        Raises ValueError where size conditions are missing.
        """
        arrays = {}
        for port in self.model.inputs:
            name = port.get_any_name()
            if inputs.get(name) is None:
                raise ValueError(
                    f"added_cond_kwargs lacks {name!r}, which this model was trained with: "
                    "its transformer/config.json must have sample_size 128."
                )
            dtype = torch.int64 if port.get_element_type() == ov.Type.i64 else torch.float32
            arrays[name] = np.ascontiguousarray(inputs[name].detach().to(dtype).numpy())
        if self._calls is not None:
            self._calls.append({name: array.copy() for name, array in arrays.items()})
        rows = len(arrays["hidden_states"])
        batch = self.model.input("hidden_states").get_partial_shape()[0]
        size = rows if batch.is_dynamic else batch.get_length()
        results = [
            self.request({k: v[i : i + size] for k, v in arrays.items()}, share_inputs=True)[0]
            for i in range(0, rows, size)
        ]
        return results[0] if len(results) == 1 else np.concatenate(results)


def _of_tiler(name: str) -> property:
    """An attribute of AutoencoderKL, kept in `tiler`."""
    return property(
        lambda vae: getattr(vae.tiler, name), lambda vae, value: setattr(vae.tiler, name, value)
    )


class OVPixArtVae(OVModelVae):
    """Compiled VAE decoder, with the tiling and slicing of diffusers' own VAE.

    `enable_slicing()` decodes the images of a batch one by one, and changes nothing else.
    `enable_tiling()` decodes what is larger than `tile_latent_min_size` in overlapping tiles
    that are blended: memory stays that of one tile, and colours may differ a little between tiles.
    """

    use_tiling, use_slicing = _of_tiler("use_tiling"), _of_tiler("use_slicing")
    tile_sample_min_size = _of_tiler("tile_sample_min_size")
    tile_latent_min_size = _of_tiler("tile_latent_min_size")
    tile_overlap_factor = _of_tiler("tile_overlap_factor")

    def __init__(self, decoder: OVModelVaeDecoder, encoder: Any = None):
        super().__init__(decoder=decoder, encoder=encoder)
        config = {**decoder.config, "use_post_quant_conv": False}  # the IR contains that layer
        is_tiny = "num_decoder_blocks" in config
        vae_class = AutoencoderTiny if is_tiny else AutoencoderKL
        known = inspect.signature(vae_class.__init__).parameters
        with torch.device("meta"):  # no weights: only its methods are used
            self.tiler = vae_class(**{name: config[name] for name in config if name in known})
        self.tiler.decoder = _CompiledDecoder(decoder)
        for name in ("enable_tiling", "disable_tiling", "enable_slicing", "disable_slicing"):
            setattr(self, name, getattr(self.tiler, name))

    def encode(self, sample: torch.Tensor, *args, **kwargs) -> ModelOutput:
        """Encode images, `(B, 3, 8·h, 8·w)` from -1 to 1, to `latent_dist` of `(B, 4, h, w)`.

        An AutoencoderTiny gives `latents` instead. Raises ValueError without a VAE encoder.
        """
        if self.encoder is None:
            raise ValueError(
                "This pipeline has no VAE encoder: run convert_pipeline with vae_encoder=True and "
                "load that folder; optimize_pipeline copies no encoder."
            )
        return self.encoder(sample.contiguous(), *args, **kwargs)

    def decode(self, latent_sample: torch.Tensor, *args, **kwargs) -> ModelOutput:
        """Decode latents, `(B, 4, h, w)`, to `sample`, `(B, 3, 8·h, 8·w)` from -1 to 1.

        Raises ValueError where tiling or slicing would split what static shapes have fixed.
        """
        tiles = max(latent_sample.shape[2:]) > self.tile_latent_min_size
        splits = (self.use_tiling and tiles) or (self.use_slicing and len(latent_sample) > 1)
        if not splits:
            return self.decoder(latent_sample, *args, **kwargs)
        if self.decoder.model.input("latent_sample").get_partial_shape().is_static:
            raise ValueError(
                "Tiling and slicing do not work with static shapes: reshape(-1, -1, -1) frees "
                "them, vae.disable_tiling() and vae.disable_slicing() do without."
            )
        return ModelOutput(sample=self.tiler.decode(latent_sample).sample)


class _CompiledDecoder(torch.nn.Module):
    """The compiled decoder in the place of AutoencoderKL's."""

    def __init__(self, decoder: OVModelVaeDecoder):
        super().__init__()
        self.compiled = decoder

    def forward(self, latents):  # (B, 4, h, w) → (B, 3, 8·h, 8·w)
        return self.compiled(latents.contiguous())[0]
