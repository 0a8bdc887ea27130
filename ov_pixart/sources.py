"""Where a conversion takes each component from: a diffusers folder, one file, or an IR to share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from transformers import T5Tokenizer

from ov_pixart.checkpoint import COMPONENTS, load_component, stored_weights
from ov_pixart.checks import check, read_json, shortened
from ov_pixart.cost import ConversionCost, conversion_cost
from ov_pixart.hub import HubOptions, fetch_component
from ov_pixart.ir import IR_NAME, damage_message, ir_files, read_ir
from ov_pixart.quiet import quiet
from ov_pixart.single_file import check_file, load_single_file
from ov_pixart.storage import (
    CONVERSION,
    RECORDS,
    explain_write_errors,
    find_damage,
    fingerprint,
    link_or_copy,
    read_record,
    staged,
    write_record,
)

VAE_ENCODER = "vae_encoder"  # optional, made from the same checkpoint as the decoder
_CLASSES = {  # folder in a checkpoint → what config.json may say
    "text_encoder": ("model_type", {"t5"}),
    "transformer": ("_class_name", {"PixArtTransformer2DModel", "Transformer2DModel"}),
    "vae": ("_class_name", {"AutoencoderKL", "AutoencoderTiny"}),
}
_INPUTS = {
    "text_encoder": {"input_ids", "attention_mask"},
    "transformer": {"hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"},
    "vae": {"latent_sample"},
}


@dataclass(frozen=True)
class Source:
    """What one component is made from.

    `argument`: "text_encoder", "transformer" or "vae". `folder` holds its `config.json` and, unless
    `file` names them, its weights.
    """

    argument: str
    folder: Path
    file: Path | None = None

    @property
    def is_ir(self) -> bool:
        """Whether it is converted already, and is taken over as it is."""
        return self.file is None and (self.folder / IR_NAME).is_file()

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of the files that it is made from."""
        if self.file:
            return fingerprint([self.file, self.folder / "config.json"])
        weights = ir_files(self.folder) if self.is_ir else self.folder.glob("*.safetensors")
        records = {self.folder / record for record in RECORDS} if self.is_ir else set()
        return fingerprint({*self.folder.glob("*.json"), *weights} - records)

    def cost(self, weight_format: str | None, output_dir: Path) -> ConversionCost:
        """Memory and disk that its conversion needs; a copy of an IR takes disk, a link nothing."""
        if self.is_ir:
            near = next(one for one in (output_dir, *output_dir.absolute().parents) if one.exists())
            is_linked = near.stat().st_dev == self.folder.stat().st_dev
            size = sum(file.stat().st_size for file in ir_files(self.folder))
            return ConversionCost(0, 0, 0 if is_linked else size)
        return conversion_cost(self.file or self.folder, weight_format)

    def load(self) -> torch.nn.Module:
        """The torch module. Raises ValueError where weights do not fit the configuration."""
        if self.file:
            module = load_single_file(self.argument, self.file, self.folder)
            return module.to(stored_weights(self.file).dtype)
        return load_component(self.folder, component_class(self.folder, self.argument))

    def share(self, output_dir: Path) -> None:
        """Put the IR into `output_dir`: hard links where the file system has them, else copies.

        Links are safe because every writer here replaces files instead of writing into them. The
        graph and the configuration, which somebody may edit by hand, are copied.
        """
        with explain_write_errors(output_dir), staged(output_dir) as folder:
            for file in (*ir_files(self.folder), self.folder / "config.json"):
                link_or_copy(file, folder / file.name, link=file.suffix == ".bin")
            record = {"weight_format": None, "source": self.fingerprint()}
            write_record(record, folder / CONVERSION)


def find_sources(
    networks: dict[str, Any],
    hub: HubOptions,
    checkpoint: Path,
    *,
    weight_format: str | dict[str, str],
    has_lora: bool,
    vae_encoder: bool,
) -> dict[str, Source]:
    """The source of each component, by its folder among IRs.

    `networks`: "text_encoder", "transformer" and "vae" → what the user has given, None for the
    checkpoint's own, False to leave the text encoder out. Raises as `find_source` does, and where
    components do not fit together or what is asked cannot be done to an IR.
    """
    check(isinstance(vae_encoder, bool), "vae_encoder", vae_encoder, "True or False")
    sources = {
        name: find_source(one.folder, networks[one.folder], hub, checkpoint / one.folder)
        for name, one in COMPONENTS.items()
        if not (name == "text_encoder" and networks[name] is False)
    }
    sources |= {VAE_ENCODER: sources["vae_decoder"]} if vae_encoder else {}
    _check_components_fit({source.argument: source.folder for source in sources.values()})
    _check_shared(sources, weight_format, has_lora=has_lora)
    return sources


def find_source(argument: str, given: str | Path | None, hub: HubOptions, own: Path) -> Source:
    """Where a component comes from: `given`, or the folder `own` of the checkpoint itself.

    Raises ValueError or FileNotFoundError that names the argument.
    """
    if given is None:
        source = Source(argument, own)
    elif isinstance(given, str | Path) and Path(given).is_file():
        check_file(argument, Path(given))
        source = Source(argument, own, Path(given))
        if not (own / "config.json").is_file():
            raise FileNotFoundError(
                f"{argument}={str(given)!r} is a file of weights, and model_id has no "
                f"{argument}/config.json to go with it: choose a model_id that has one."
            )
        load_single_file(argument, source.file, own)  # memory-mapped: shows early whether it fits
    else:
        source = Source(argument, fetch_component(argument, given, hub))
    component_class(source.folder, argument)
    if source.is_ir:
        _check_ir(argument, source.folder)
    return source


def component_class(folder: Path, argument: str) -> type:
    """The class that loads a component, as its `config.json` names it.

    Raises ValueError for one that PixArt cannot use, FileNotFoundError without `config.json`.
    """
    key, known = _CLASSES[argument]
    name = read_json(folder / "config.json").get(key)
    if name not in (None, *known):
        raise ValueError(
            f"{argument}={str(folder)!r} holds a {name}: only {' or '.join(sorted(known))} can be "
            "used here."
        )
    if name == "AutoencoderTiny":
        return AutoencoderTiny
    return next(one.loader for one in COMPONENTS.values() if one.folder == argument)


def _check_ir(argument: str, folder: Path) -> None:
    for record in RECORDS:
        if file := find_damage(folder, read_record(folder / record)):
            raise ValueError(damage_message(file))
    found = {port.get_any_name() for port in read_ir(folder).inputs}
    if missing := _INPUTS[argument] - found:
        raise ValueError(
            f"{argument}={str(folder)!r} has no input {min(missing)!r}: only an IR that "
            "convert_pipeline or optimize_pipeline has made can be taken over."
        )


def _check_shared(
    sources: dict[str, Source], weight_format: str | dict[str, str], *, has_lora: bool
) -> None:
    """Raise ValueError for what cannot be done to a component that is converted already."""
    asked = weight_format if isinstance(weight_format, dict) else {}
    for name, source in sources.items():
        if source.is_ir:
            place = f"{source.argument}={str(source.folder)!r} is converted already"
            if name in asked:
                raise ValueError(f"{place}: leave {name!r} out of weight_format.")
            if name == VAE_ENCODER:
                raise ValueError(f"{place}: vae_encoder=True needs the VAE's own checkpoint.")
            if name == "transformer" and has_lora:
                raise ValueError(f"{place}: lora= needs the transformer's own checkpoint.")


def _check_components_fit(folders: dict[str, Path]) -> None:
    """Raise ValueError if the transformer's widths do not match the text encoder or VAE."""
    transformer = read_json(folders["transformer"] / "config.json")
    for name, theirs, ours in (
        ("text_encoder", "d_model", "caption_channels"),
        ("vae", "latent_channels", "in_channels"),
    ):
        width = read_json(folders[name] / "config.json").get(theirs) if name in folders else None
        expected = transformer.get(ours)
        if None not in (width, expected) and width != expected:
            raise ValueError(
                f"transformer={str(folders['transformer'])!r} expects {ours}={expected}, but "
                f"{name}={str(folders[name])!r} has {theirs}={width}: choose two that fit."
            )


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """A checkpoint's tokenizer; of its files, `spiece.model` is enough.

    Raises ValueError for one that is damaged.
    """
    try:
        with quiet():
            return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its parsers raise
        reason = shortened(str(error), 150)
        raise ValueError(f"{str(folder)!r} is damaged ({reason}): download it again.") from None
