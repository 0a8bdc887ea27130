"""What converting, calibrating and painting take of memory, at real size and with random weights.

    python -m tests.benchmarks.memory                  # everything, 40 GB of disk
    python -m tests.benchmarks.memory convert_dit run  # what begins so

Each line is measured in a process of its own, from `import` to the end: the most memory that it has
held (VmHWM on Linux, files that it has read included). The report is `build/memory.json`.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ov_pixart_helper as helper
from tests.benchmarks import checkpoints as models
from tests.benchmarks.bench import BUILD
from tests.benchmarks.cases import FULL, T5_XXL, XL_512, XL_1024, parameters
from tests.benchmarks.workers import WorkerError, call_in_process


@dataclass(frozen=True)
class Measured:
    """What one process has taken."""

    peak_gb: float
    seconds: float
    said_gb: float | None = None  # what `convert_pipeline` says before it starts
    disk_gb: float | None = None  # of the result
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One line of the report: `function(*arguments)`, and what is aimed at."""

    name: str
    target_gb: float
    target_s: float | None
    function: Callable[..., Measured]
    arguments: tuple[Any, ...]


# ==================================================================================================
# Converting
# ==================================================================================================


def convert_one(folder: Path, name: str, weight_format: str, output: Path) -> Measured:
    """Convert one model of a checkpoint, as `convert_pipeline` does."""
    part = helper.PARTS[name]
    said = helper._cost(folder / part.folder, weight_format).memory
    start = time.perf_counter()
    module = helper._load_part(folder / part.folder, part.loader)
    helper._convert(part.trace, module, output, weight_format)
    seconds = time.perf_counter() - start
    peak = helper._peak_memory_mb() / 1000
    size = sum(file.stat().st_size for file in output.glob("*.bin"))
    shutil.rmtree(output)
    return Measured(peak, seconds, said / 1e9, size / 1e9)


def convert_all(folder: Path, text_encoder: Path, weight_format: str, output: Path) -> Measured:
    """`convert_pipeline` from the first model to the last."""
    start = time.perf_counter()
    helper.convert_pipeline(
        folder, output, text_encoder=text_encoder, weight_format=weight_format, force=True
    )
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in output.glob("*/*.bin"))
    return Measured(helper._peak_memory_mb() / 1000, seconds, None, size / 1e9)


def widen(folder: Path, output: Path) -> None:
    """Write a model once more in float32, shard by shard."""
    if output.is_dir():
        return
    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                wide = {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118
            save_file(wide, partial / file.name, metadata={"format": "pt"})
        else:
            text = file.read_text().replace("bfloat16", "float32")
            (partial / file.name).write_text(text)
    partial.rename(output)


# ==================================================================================================
# Calibrating
# ==================================================================================================


def optimize(source: Path, preset: str, output: Path) -> Measured:
    """`optimize_pipeline`; of the three models, some have the real size, see `calibrations`."""
    start = time.perf_counter()
    helper.optimize_pipeline(source, output, preset, num_samples=FULL.num_samples, progress=False)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in output.glob("*/*.bin"))
    return Measured(helper._peak_memory_mb() / 1000, seconds, None, size / 1e9)


# ==================================================================================================
# Painting
# ==================================================================================================


def paint(
    folder: Path,
    pixels: int,
    cache: Path | None = None,
    tiling: bool = False,
    release: bool = False,
) -> Measured:
    """Load a pipeline and paint in four steps: two pictures of one prompt, one of another."""
    config = {"CACHE_DIR": str(cache)} if cache else {}
    start = time.perf_counter()
    pipeline = helper.OVPixArtAlphaPipeline.from_pretrained(
        folder, ov_config=config, release_text_encoder=release
    )
    loaded = time.perf_counter() - start
    pipeline.set_progress_bar_config(disable=True)
    if tiling:
        pipeline.vae.enable_tiling()
    pictures = []
    for prompt in ("a lighthouse in a storm", "a lighthouse in a storm", "a bowl of cherries"):
        start = time.perf_counter()
        pipeline(
            prompt,
            num_inference_steps=4,
            guidance_scale=0.0,
            height=pixels,
            width=pixels,
            use_resolution_binning=False,
            generator=torch.Generator().manual_seed(0),
        )
        pictures.append(time.perf_counter() - start)
    note = "ready after {:.1f} s, pictures: first {:.1f} s, same prompt {:.1f} s, other {:.1f} s"
    return Measured(
        helper._peak_memory_mb() / 1000,
        loaded + sum(pictures),
        note=note.format(loaded, *pictures),
    )


def assemble_laptop(root: Path) -> Path:
    """What a laptop would run: INT4 T5, INT8 DiT and VAE decoder, LCM's scheduler."""
    folder, texts = root / "laptop", root / "laptop-t5"
    weights(root, XL_512, "bf16")
    for engine in ("ov-fp16", "ov-int8"):
        if not models.has_openvino(root, XL_512, engine):
            call_in_process(models.build_openvino, root, XL_512, engine, FULL)
    if not (texts / helper.MODEL_INDEX).is_file():
        checkpoint = weights(root, T5_XXL, "bf16")
        call_in_process(convert_all, checkpoint, checkpoint, "int4", texts)
    pictures = models.openvino_folder(root, XL_512, "ov-int8")
    return models.join(folder, texts, pictures, ("transformer", "vae_decoder"), "LCMScheduler")


# ==================================================================================================
# Everything
# ==================================================================================================


def conversions(root: Path, is_wanted: Callable[[str], bool]) -> Iterator[Task]:
    """The DiT of 1024-MS and T5-XXL, from 16 and 32 bits; then a whole pipeline."""
    scratch = root / "scratch"
    for stored, bytes_each in (("bf16", 2), ("fp32", 4)):
        name = f"convert_dit {stored} fp16"
        target = 1.5 * bytes_each * parameters(XL_1024, FULL)["transformer"] / 1e9 + 1
        if is_wanted(name):
            arguments = (weights(root, XL_1024, stored), "transformer", "fp16", scratch)
            yield Task(name, target, 20, convert_one, arguments)
    for stored, target in (("bf16", 12), ("fp32", 14)):
        for weight_format in ("fp16", "int8", "int4"):
            name = f"convert_t5 {stored} {weight_format}"
            if is_wanted(name):
                arguments = (weights(root, T5_XXL, stored), "text_encoder", weight_format, scratch)
                yield Task(name, target, None, convert_one, arguments)
    if is_wanted("convert_pipeline int8"):
        folders = (weights(root, XL_1024, "bf16"), weights(root, T5_XXL, "fp32"))
        yield Task("convert_pipeline int8", 14, None, convert_all, (*folders, "int8", scratch))


def calibrations(root: Path, is_wanted: Callable[[str], bool]) -> Iterator[Task]:
    """DiT and VAE with pictures in four steps without guidance; T5 and the captions it reads."""
    for subject, checkpoint, preset in (
        ("512", XL_512, "int8"),
        ("1024", XL_1024, "int8"),
        ("t5", T5_XXL, "int8"),
        ("t5", T5_XXL, "int4"),
    ):
        name = f"optimize {subject} {preset}"
        if is_wanted(name):
            weights(root, checkpoint, "bf16")
            call_in_process(models.build_openvino, root, checkpoint, "ov-fp16", FULL)
            source = models.openvino_folder(root, checkpoint, "ov-fp16")
            yield Task(name, 14, None, optimize, (source, preset, root / "scratch" / preset))


def weights(root: Path, name: str, stored: str) -> Path:
    """A checkpoint with random weights in 16 bits, or its largest model in 32."""
    checkpoint = models.checkpoint_folder(root, name)
    if not models.has_checkpoint(root, name, FULL):
        call_in_process(models.build_checkpoint, root, name, FULL)
    if stored == "bf16":
        return checkpoint
    part = "text_encoder" if name == T5_XXL else "transformer"
    call_in_process(widen, checkpoint / part, root / "wide" / name / part)
    return root / "wide" / name


def pictures(root: Path, is_wanted: Callable[[str], bool]) -> Iterator[Task]:
    """Four-step pictures, with and without what saves memory."""
    if not is_wanted("run"):
        return
    folder, cache = assemble_laptop(root), root / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    for pixels, target in ((512, 6.5), (1024, 8.0)):
        yield Task(f"run {pixels}", target, None, paint, (folder, pixels))
    yield Task("run 1024 tiling", 8.0, None, paint, (folder, 1024, None, True))
    yield Task("run 512 release", 6.5, None, paint, (folder, 512, None, False, True))
    for start in ("first", "second"):
        name = f"run 512 CACHE_DIR, {start} start"
        yield Task(name, 6.5, None, paint, (folder, 512, cache))


def main(chosen: list[str]) -> None:
    root, report = BUILD / "bench" / FULL.name, []

    def is_wanted(name: str) -> bool:
        return not chosen or any(name.startswith(one) or one.startswith(name) for one in chosen)

    for lines in (conversions, calibrations, pictures):
        for task in lines(root, is_wanted):
            if not is_wanted(task.name):
                continue
            try:
                measured = call_in_process(task.function, *task.arguments)
            except WorkerError as error:
                print(f"{task.name}: {error}", file=sys.stderr)
                continue
            finally:
                shutil.rmtree(root / "scratch", ignore_errors=True)
            report.append(row(task, measured))
            print(text(report[-1]), flush=True)
    (BUILD / "memory.json").write_text(json.dumps(report, indent=1) + "\n")


def row(task: Task, measured: Measured) -> dict[str, Any]:
    """One line of the report."""
    numbers = {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(measured).items()}
    goals = {"target_gb": round(task.target_gb, 2), "target_s": task.target_s}
    return {"case": task.name, **numbers, **goals}


def text(line: dict[str, Any]) -> str:
    """One line of the table on screen."""
    reached = line["peak_gb"] <= line["target_gb"]
    reached &= line["seconds"] <= (line["target_s"] or float("inf"))
    said = f", said {line['said_gb']:.1f}" if line["said_gb"] else ""
    return (
        f"{line['case']:28} {line['peak_gb']:6.2f} GB of {line['target_gb']:.1f}{said}, "
        f"{line['seconds']:6.1f} s{'' if reached else '  MISSED'}  {line['note']}"
    )


if __name__ == "__main__":
    from tests.benchmarks.memory import main  # under its name: other processes look it up

    main(sys.argv[1:])
