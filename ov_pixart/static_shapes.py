"""Static shapes: `reshape`, and what it has fixed."""

from ov_pixart.checks import check, is_count, public
from ov_pixart.ir import reshape_inputs, static_length


class StaticShapes:
    """The part of a pipeline that fixes and reads the shapes of its components."""

    @property
    def batch_size(self) -> int:
        """Prompts per call that the components are shaped for, -1 if any number."""
        parts = self.components
        if "text_encoder" in parts:
            return static_length(parts["text_encoder"].input_shape[0])
        if "transformer" in parts:
            return static_length(parts["transformer"].model.inputs[0].get_partial_shape()[0])
        return -1

    @public
    def reshape(
        self,
        batch_size: int,
        height: int,
        width: int,
        num_images_per_prompt: int = -1,
        num_frames: int = -1,
        *,
        max_sequence_length: int | None = None,
    ) -> "StaticShapes":
        """Fix the shapes of all components (-1: keep free), which some devices require.

        `height`, `width` in pixels, divisible by 16. `max_sequence_length`: tokens; fixed to the
        family's own (α 120, Σ 300) where everything else is fixed. Guidance may be on or off at
        any call: see `OVPixArtTransformer`. `num_frames` is for video models, and ignored.

        Raises ValueError for other numbers, or with `compile_only=True`.
        """
        if self._compile_only:
            raise ValueError(
                "reshape does not work with compile_only=True: load the pipeline without it."
            )
        counts = {"batch_size": batch_size, "num_images_per_prompt": num_images_per_prompt}
        for name, value in counts.items():
            check(is_count(value) or value == -1, name, value, "a whole number from 1, or -1")
        grid = self.token_pixels
        for name, value in {"height": height, "width": width}.items():
            fits = value == -1 or (is_count(value) and value % grid == 0)
            check(fits, name, value, f"a multiple of {grid} pixels, or -1")
        if max_sequence_length is not None:
            rule = "a whole number from 1"
            check(is_count(max_sequence_length), "max_sequence_length", max_sequence_length, rule)

        self.is_dynamic = -1 in {batch_size, height, width, num_images_per_prompt}
        tokens = max_sequence_length or (-1 if self.is_dynamic else self.family.max_tokens)
        images = -1 if -1 in counts.values() else batch_size * num_images_per_prompt
        rows, columns = (s if s == -1 else s // self.vae_scale_factor for s in (height, width))

        latents, text = {0: images, 2: rows, 3: columns}, {0: batch_size, 1: tokens}
        inputs = {
            "hidden_states": latents,
            "timestep": {0: images},
            "encoder_hidden_states": {0: images, 1: tokens},
            "encoder_attention_mask": {0: images, 1: tokens},
            "resolution": {0: images},
            "aspect_ratio": {0: images},
            "latent_sample": latents,
            "input_ids": text,
            "attention_mask": text,
        }
        for name, component in self.components.items():
            if name != "vae_encoder":  # it stays free: what is encoded may have another size
                reshape_inputs(component.model, **inputs)
        self.clear_requests()
        return self

    @property
    def static_arguments(self) -> dict[str, int]:
        """Arguments of a call that static shapes have fixed, and their values."""
        if "transformer" not in self.components:
            return {}
        images, tokens, _ = self.transformer.model.input("encoder_hidden_states").partial_shape
        lengths = {
            "height": self.height,
            "width": self.width,
            "max_sequence_length": static_length(tokens),
            "images": static_length(images),
            # embeddings may be of any number of prompts that makes up the images
            "prompts": self.batch_size if "text_encoder" in self.components else -1,
        }
        return {name: value for name, value in lengths.items() if value != -1}

    @property
    def token_pixels(self) -> int:
        """Pixels per token of the transformer: 8 in the VAE times 2 in the patch."""
        patch = self.transformer.config.patch_size if self.transformer else 2
        return self.vae_scale_factor * patch
