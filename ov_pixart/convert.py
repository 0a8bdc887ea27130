"""Checkpoint → folder of IRs: text encoder, transformer and VAE decoder, one at a time."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openvino as ov
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, PixArtTransformer2DModel
from tqdm.auto import tqdm
from transformers import T5EncoderModel

from ov_pixart.checkpoint import (
    COMPONENT_FILES,
    COMPONENTS,
    FOLDERS,
    MODEL_INDEX,
    check_replaceable,
    check_torch_folder,
    read_model_index,
    read_scheduler_name,
)
from ov_pixart.checks import check, public
from ov_pixart.compress import (
    compress_to_4_bits,
    compress_to_8_bits,
    int4_group_size,
    matching_layers,
)
from ov_pixart.cost import ConversionCost, check_resources
from ov_pixart.families import check_conditions, find_family
from ov_pixart.hub import HubOptions, fetch_component, fetch_pipeline
from ov_pixart.ir import IR_NAME, save_ir
from ov_pixart.lora import fetch_loras, fuse_lora, record_loras
from ov_pixart.memory import release_memory
from ov_pixart.quiet import quiet, silent_nncf
from ov_pixart.sources import VAE_ENCODER, Source, component_class, find_sources, load_tokenizer
from ov_pixart.storage import (
    CONVERSION,
    check_output,
    explain_write_errors,
    find_damage,
    locked,
    read_record,
    staged,
    write_json,
    write_record,
)
from ov_pixart.trace import (
    trace_text_encoder,
    trace_transformer,
    trace_vae_decoder,
    trace_vae_encoder,
    traceable,
)
from ov_pixart.upstream import free_weights_while_compressing

# The weights on disk. The precision of activations is chosen by OpenVINO when it compiles;
# `ov_config={"INFERENCE_PRECISION_HINT": "f32"}` overrides that.
WEIGHT_FORMATS = {
    "fp32": "32 bits; a 16-bit checkpoint is widened, so that nothing is rounded",
    "fp16": "16 bits: float32 becomes float16, a 16-bit checkpoint stays as it is",
    "int8": "8-bit integers, one scale per output channel",
    "int4": "4-bit integers, one scale per group of weights; 8 bits where groups do not fit",
}

_TRACERS: dict[str, Callable[[Any], ov.Model]] = {
    "text_encoder": trace_text_encoder,
    "transformer": trace_transformer,
    "vae_decoder": trace_vae_decoder,
    VAE_ENCODER: trace_vae_encoder,
}
# The tables of `Sinusoids` look like embeddings to NNCF; at 8 bits they would lose the angles.
_FLOATING = (r"\.sinusoids/",)

# ---- one component ------------------------------------------------------------------------------


@public
def convert_text_encoder(
    text_encoder: T5EncoderModel, output_dir: str | Path, *, weight_format: str = "fp16"
) -> Path:
    """Convert the T5 text encoder to an IR in `output_dir`, and return that folder.

    Inputs: `input_ids` and `attention_mask`, `(B, L)` int64. Output: `last_hidden_state`,
    `(B, L, D)` float32. Batch and length are free. Writes `openvino_model.xml` and `.bin`,
    `config.json` and `conversion.json`; the three functions for one component are alike.

    Raises ValueError for an unknown `weight_format` or a folder that holds other files, OSError
    where it cannot be written.
    """
    return convert_component("text_encoder", text_encoder, output_dir, weight_format)


@public
def convert_transformer(
    transformer: PixArtTransformer2DModel, output_dir: str | Path, *, weight_format: str = "fp16"
) -> Path:
    """Convert the diffusion transformer to one IR for every resolution; return `output_dir`.

    Inputs: `hidden_states` `(B, 4, H/8, W/8)`, `timestep` `(B,)`, `encoder_hidden_states`
    `(B, L, D)`, all float32; `encoder_attention_mask` `(B, L)` int64; checkpoints trained with
    micro-conditions also take `resolution` `(B, 2)` in pixels and `aspect_ratio` `(B, 1)`,
    float32. Output: `sample` `(B, 8, H/8, W/8)`, noise and its variance. All dimensions are free
    except the channels. Raises as `convert_text_encoder` does.
    """
    return convert_component("transformer", transformer, output_dir, weight_format)


@public
def convert_vae_decoder(
    vae: AutoencoderKL | AutoencoderTiny, output_dir: str | Path, *, weight_format: str = "fp16"
) -> Path:
    """Convert the decoding half of the VAE to an IR, and return `output_dir`.

    Input: `latent_sample` `(B, 4, H/8, W/8)`. Output: `sample` `(B, 3, H, W)`, from -1 to 1.
    Raises as `convert_text_encoder` does.
    """
    return convert_component("vae_decoder", vae, output_dir, weight_format)


def convert_component(
    name: str,
    module: torch.nn.Module,
    output_dir: str | Path,
    weight_format: str,
    source: dict | None = None,
    report: Callable[[str], None] = lambda stage: None,
) -> Path:
    """Trace a component, compress its weights and write it.

    `source`: fingerprint of the checkpoint, for the record. `report(stage)` is called at the start
    of each stage.
    """
    _check_weight_format(weight_format)
    output_dir = Path(output_dir)
    _check_replaceable(output_dir)
    report("tracing")
    with traceable(module, keep_float32=weight_format == "fp32"):
        model = _TRACERS[name](module)
    gc.collect()  # from here on, only the graph holds the weights, and drops them one by one
    if weight_format in ("int8", "int4"):
        with free_weights_while_compressing(report), silent_nncf():
            model = _compress(model, weight_format, module.config)
    report("writing")
    with explain_write_errors(output_dir), staged(output_dir) as folder:
        save_ir(model, folder, compress_to_fp16=weight_format != "fp32")
        del model
        save_config = getattr(module, "save_config", None) or module.config.save_pretrained
        save_config(folder)
        write_record({"weight_format": weight_format, "source": source}, folder / CONVERSION)
    return output_dir


def _compress(model: ov.Model, weight_format: str, config: Any) -> ov.Model:
    floating = matching_layers(model, _FLOATING)
    if weight_format == "int4":
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        group_size = int4_group_size(config)
        return compress_to_4_bits(model, group_size, floating, others_in_8_bits=True)
    return compress_to_8_bits(model, floating)


def _check_weight_format(weight_format: str) -> None:
    if weight_format not in WEIGHT_FORMATS:
        choices = ", ".join(repr(name) for name in WEIGHT_FORMATS)
        raise ValueError(f"weight_format={weight_format!r} is unknown: use one of {choices}.")


def _check_replaceable(output_dir: Path) -> None:
    """The folder of a component is replaced as a whole, so it must hold nothing else."""
    if output_dir.is_file():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file: name a folder.")
    found = {file.name for file in output_dir.iterdir()} if output_dir.is_dir() else set()
    others = found - COMPONENT_FILES
    if others:
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds other files ({min(others)}): name a new folder "
            "for this component."
        )


# ---- a whole pipeline ---------------------------------------------------------------------------


@public
def convert_pipeline(
    model_id: str | Path,
    output_dir: str | Path,
    *,
    weight_format: str | dict[str, str] = "fp16",
    text_encoder: str | Path | Literal[False] | None = None,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    vae_encoder: bool = False,
    scheduler: str | Path | None = None,
    lora: str | Path | list[str | Path] | None = None,
    lora_scale: float | list[float] = 1.0,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force: bool = False,
) -> Path:
    """Convert a PixArt-α or PixArt-Σ checkpoint to a folder of OpenVINO IRs; return the folder.

    `model_id`: a Hugging Face id or a local diffusers folder (safetensors only).
    `weight_format`: "fp32", "fp16", "int8" or "int4", for the weights of all three components, or
    for some of them as in {"text_encoder": "int8"}; the others then have "fp16". Names are those
    of COMPONENTS.
    `text_encoder`, `transformer`, `vae`, `scheduler`: take this component from elsewhere, an id or
    a folder that holds it alone or in a subfolder of its name. Fine-tuned and few-step models
    often publish nothing but a transformer. A network may also be a single `.safetensors` file,
    read with the configuration of `model_id`, or an OpenVINO folder, whose IR is shared as it is.
    `text_encoder=False` leaves the text encoder out: such a pipeline takes embeddings.
    `vae_encoder`: convert that half of the VAE too, for `pipeline.vae.encode`.
    `lora`: LoRAs for the transformer, one or a list: ids, `.safetensors` files or folders, as
    peft, diffusers or OneTrainer save them. Each is added to the weights, `lora_scale` times,
    before they are converted.
    `revision` (of `model_id`), `cache_dir`, `token`, `local_files_only`: as in `huggingface_hub`.
    `force`: convert again what is already there.

    Only one component is in memory at a time, and components already converted from the same
    checkpoint in the same format are kept. `model_index.json` is written last: a folder without it
    is not finished, and the same call finishes it.

    Raises ValueError for arguments that do not work or do not fit together, FileNotFoundError for
    a checkpoint that is not there or incomplete, MemoryError or OSError before anything is
    converted where memory or disk is too small.
    """
    formats = _weight_formats(weight_format)
    check(isinstance(output_dir, str | Path), "output_dir", output_dir, "the path of a folder")
    output_dir = Path(output_dir)
    hub = HubOptions(cache_dir, token, local_files_only)
    networks = {"text_encoder": text_encoder, "transformer": transformer, "vae": vae}
    given = {**networks, "scheduler": scheduler}
    given = {name for name, place in given.items() if place is not None}

    checkpoint = fetch_pipeline(model_id, hub, revision=revision, folders=FOLDERS - given)
    index = read_model_index(checkpoint)
    check_torch_folder(checkpoint, without=given)
    options = {"weight_format": weight_format, "has_lora": bool(lora), "vae_encoder": vae_encoder}
    sources = find_sources(networks, hub, checkpoint, **options)
    folders = {source.argument: source.folder for source in sources.values()}
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    check_conditions(find_family(index["_class_name"]), folders["transformer"])
    place = checkpoint if scheduler is None else scheduler
    folders["scheduler"] = fetch_component("scheduler", place, hub)
    index = {name: index[name] for name in index if name[0] == "_" or name in FOLDERS}
    index["scheduler"] = ["diffusers", read_scheduler_name(folders["scheduler"])]
    index["vae"] = ["diffusers", component_class(folders["vae"], "vae").__name__]
    if "text_encoder" not in sources:
        index["text_encoder"] = [None, None]  # as diffusers writes it
    loras = fetch_loras(lora, lora_scale, hub)
    check_output(
        output_dir, {checkpoint, *folders.values(), *(place for place, _ in loras)}, COMPONENTS
    )

    if loras:  # first, what may turn out not to fit
        sources = {"transformer": sources["transformer"], **sources}
    conversion = _Conversion(sources, loras, output_dir, formats)
    conversion.check_room(force)
    with locked(output_dir):
        conversion.run(force)
        with quiet(), staged(output_dir / "tokenizer") as folder:
            tokenizer.save_pretrained(folder)
        with staged(output_dir / "scheduler") as folder:
            name = "scheduler_config.json"
            shutil.copyfile(folders["scheduler"] / name, folder / name)
        write_json(index, output_dir / MODEL_INDEX)
    return output_dir


def _weight_formats(weight_format: str | dict[str, str]) -> dict[str, str]:
    """The format of each component."""
    if not isinstance(weight_format, dict):
        weight_format = dict.fromkeys(COMPONENTS, weight_format)
    for name, value in weight_format.items():
        choices = ", ".join(repr(component) for component in COMPONENTS)
        check(name in COMPONENTS, "weight_format", weight_format, f"formats for some of {choices}")
        _check_weight_format(value)
    return {name: weight_format.get(name, "fp16") for name in COMPONENTS}


@dataclass(frozen=True)
class _Conversion:
    """What `convert_pipeline` converts: where from, where to, in which formats."""

    sources: dict[str, Source]  # by the names of the output's folders
    loras: list[tuple[Path, float]]
    output_dir: Path
    formats: dict[str, str]

    def format(self, name: str) -> str | None:
        """None for an IR that is shared as it is; the VAE's halves have one format."""
        if self.sources[name].is_ir:
            return None
        return self.formats["vae_decoder" if name == VAE_ENCODER else name]

    def source(self, name: str) -> dict[str, Any]:
        """Fingerprint of the files that a component is made from."""
        source = self.sources[name].fingerprint()
        if name == "transformer" and self.loras:
            source = {**source, "lora": record_loras(self.loras)}
        return source

    def is_finished(self, name: str, *, hashed: bool = False) -> bool:
        """Whether the IR is there in this format, undamaged and made from this checkpoint.

        A component that was converted on its own has no source in its record, and is kept.
        """
        folder = self.output_dir / name
        record = read_record(folder / CONVERSION)
        return (
            bool(record)
            and record.get("weight_format") == self.format(name)
            and record["source"] in (None, self.source(name))
            and find_damage(folder, record, hashed=hashed) is None
        )

    def cost(self, name: str) -> ConversionCost:
        return self.sources[name].cost(self.format(name), self.output_dir)

    @property
    def left_out(self) -> list[str]:
        """Components of an earlier call that this one does without."""
        others = {"text_encoder", VAE_ENCODER} - set(self.sources)
        return [name for name in others if (self.output_dir / name / IR_NAME).is_file()]

    def check_room(self, force: bool) -> None:
        """Raise an error now if what is missing could not be written, or made, later."""
        missing = [name for name in self.sources if force or not self.is_finished(name)]
        names = [*missing, *self.left_out, "tokenizer", "scheduler"]
        check_replaceable(self.output_dir, names)
        costs = {name: self.cost(name) for name in missing}
        check_resources(costs, self.output_dir)

    def run(self, force: bool) -> None:
        """Convert the components that are not finished, one at a time; remove what is left out."""
        names = list(self.sources)
        missing = [name for name in names if force or not self.is_finished(name, hashed=True)]
        if not missing:
            self._begin()
        with tqdm(total=len(names), unit="component") as bar:
            for name in names:
                bar.set_description(f"Keeping {name}")
                if name in missing:
                    self._convert(name, bar)
                    release_memory()
                bar.update()
            bar.set_description("Converted")

    def _begin(self) -> None:
        """From here on, the folder is unfinished until all of it is done."""
        (self.output_dir / MODEL_INDEX).unlink(missing_ok=True)
        for name in self.left_out:
            shutil.rmtree(self.output_dir / name)

    def _convert(self, name: str, bar: tqdm) -> None:
        source, output = self.sources[name], self.output_dir / name
        if source.is_ir:
            bar.set_description(f"Sharing {name}")
            self._begin()
            source.share(output)
            return
        memory = self.cost(name).memory / 1e9

        def report(stage: str) -> None:
            bar.set_description(f"Converting {name}, {memory:.1f} GB of memory: {stage}")

        report("loading")
        module = source.load()
        for place, scale in self.loras if name == "transformer" else ():
            module = fuse_lora(module, place, scale)
        self._begin()
        convert_component(name, module, output, self.format(name), self.source(name), report)
