"""Measures what the presets of `ov_pixart_helper` cost and gain on PixArt-tiny.

    python -m assets.training.measure_presets              # 200 held-out captions, all presets
    python -m assets.training.measure_presets --count 40   # a quick look
    python -m assets.training.measure_presets --layers     # which layers integers hurt

The first two convert the embedded checkpoint, run every preset on it, and let all of them and
torch draw the held-out captions at the same seeds; the oracle says how many pictures are right.
Prints the table with its targets and writes build/presets.json. Everything made on the way stays
in build/presets/, so that a run that was stopped goes on where it was.

`--layers` is where the presets' lists of layers come from: with one kind of layer at a time left
in floating point, how much closer does the DiT get to its own floating-point answer, on samples
from held-out captions?
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import ov_pixart_helper as helper
from assets.training import evaluate, oracle
from ov_pixart_helper import PRESETS, Recipe, ov

CHECKPOINT = Path("assets/pixart-tiny")
WORK = Path("build/presets")
RESULT = Path("build/presets.json")
TORCH, FP16_F32, FP16 = "torch fp32", "FP16, f32 execution", "FP16"
SIZE_LIMITS = {"int8": 0.55, "int4": 0.45}
HELD_TO_TARGETS = ("int8-weights", "int8", "int4")  # hybrid is reported as it is


# ----------------------------------------------------------------------------------------------
# Folders and pictures
# ----------------------------------------------------------------------------------------------


def prepare(checkpoint: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Label → folder, and preset → seconds that it took to make (recording included)."""
    fp16 = helper.convert_pipeline(checkpoint, WORK / "fp16")
    exact = helper.convert_pipeline(checkpoint, WORK / "fp16-f32")
    for part in helper.PARTS:
        with_hint(exact / part)
    folders = {TORCH: checkpoint, FP16_F32: exact, FP16: fp16}
    seconds = {}
    for preset in PRESETS:
        start = time.perf_counter()
        folders[preset] = helper.optimize_pipeline(fp16, WORK / preset, preset)
        seconds[preset] = time.perf_counter() - start
    return folders, seconds


def with_hint(folder: Path) -> None:
    """Let a model always run in float32, whatever the processor would rather do."""
    model = helper._read_ir(folder)
    if "INFERENCE_PRECISION_HINT" not in helper.stored_runtime_options(model):
        helper.store_runtime_options(model, INFERENCE_PRECISION_HINT="f32")
        with helper._staged(folder) as staged:
            ov.save_model(model, staged / helper.IR_NAME)


def draw(label: str, folder: Path, rows: list[tuple[str, int]]) -> list[Image.Image]:
    """Pictures of the held-out captions, one a row; kept for the next time."""
    prints = [helper._ir_print(folder / part) for part in helper.PARTS]
    key = json.dumps([rows, prints or helper._fingerprint(folder / "transformer")])
    name = label.replace(" ", "-").replace(",", "")
    file, key_file = WORK / "pictures" / f"{name}.npz", WORK / "pictures" / f"{name}.json"
    if key_file.is_file() and key_file.read_text() == key:
        return [Image.fromarray(picture) for picture in np.load(file)["pictures"]]
    pipeline = evaluate.load_pipeline(folder)
    print(f"Drawing {len(rows)} pictures with {label}", flush=True)
    pictures = evaluate.generate(
        pipeline, rows, height=256, width=256, steps=20, guidance_scale=4.5
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, pictures=np.stack([np.asarray(p) for p in pictures]))
    key_file.write_text(key)
    return pictures


# ----------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------


def measure(checkpoint: Path, count: int) -> dict:
    """All figures, by label."""
    rows = evaluate.read_captions()[:count]
    captions = [caption for caption, _ in rows]
    folders, seconds = prepare(checkpoint)
    pictures = {label: draw(label, folder, rows) for label, folder in folders.items()}
    print("Timing, a few pictures in turns", flush=True)
    times = helper.compare_pipelines(
        {label: folder for label, folder in folders.items() if label != FP16_F32},
        captions[:3],
        seeds=[seed for _, seed in rows[:3]],
    ).to_dataframe()
    result = {}
    for label in folders:
        truth = TORCH if label in (FP16_F32, FP16) else FP16
        psnr = [helper._likeness(a, b)[0] for a, b in zip(*map(pictures.get, (label, truth)))]  # noqa: B905
        result[label] = {
            "aligned_percent": 100
            * float(np.mean(oracle.score_pictures(pictures[label], captions))),
            "against": truth,
            "psnr_median_db": float(np.median(psnr)),
            "psnr_10th_percentile_db": float(np.quantile(psnr, 0.1, method="lower")),
            **bytes_of_weights(folders[label], folders[FP16]),
            "seconds_to_make": seconds.get(label),
        }
        if label in times.index:
            result[label] |= times.loc[label, ["step_ms", "total_s", "peak_memory_mb"]].to_dict()
    return {"captions": count, "pipelines": result, "misses": misses(result)}


def bytes_of_weights(folder: Path, fp16: Path) -> dict[str, float]:
    """`.bin` sizes in relation to FP16: T5 and DiT together, and the VAE decoder."""
    if folder.joinpath("text_encoder", helper.IR_NAME).is_file() is False:
        return {}

    def size(root: Path, *parts: str) -> int:
        return sum((root / part / "openvino_model.bin").stat().st_size for part in parts)

    groups = {"t5_dit_ratio": ("text_encoder", "transformer"), "vae_ratio": ("vae_decoder",)}
    return {name: size(folder, *parts) / size(fp16, *parts) for name, parts in groups.items()}


def misses(result: dict[str, dict]) -> list[str]:
    """Which targets are not reached."""
    found = []

    def check(label: str, name: str, reached: bool, target: str) -> None:
        if not reached:
            found.append(f"{label}: {name} {result[label][name]:.3g}, target {target}")

    aligned = {label: figures["aligned_percent"] for label, figures in result.items()}
    check(FP16_F32, "psnr_median_db", result[FP16_F32]["psnr_median_db"] >= 55, "≥ 55")
    near = abs(aligned[FP16_F32] - aligned[TORCH]) <= 1
    check(FP16_F32, "aligned_percent", near, f"{aligned[TORCH]:.1f} ± 1")
    for preset in HELD_TO_TARGETS:
        near = aligned[preset] >= aligned[FP16] - 2
        check(preset, "aligned_percent", near, f"≥ {aligned[FP16] - 2:.1f}")
        check(preset, "psnr_median_db", result[preset]["psnr_median_db"] >= 25, "≥ 25")
    for preset, limit in SIZE_LIMITS.items():
        check(preset, "t5_dit_ratio", result[preset]["t5_dit_ratio"] <= limit, f"≤ {limit}")
    check("int8", "seconds_to_make", result["int8"]["seconds_to_make"] <= 90, "≤ 90")
    return found


COLUMNS = {
    "aligned_percent": ("right %", "{:.1f}"),
    "psnr_median_db": ("PSNR dB", "{:.1f}"),
    "psnr_10th_percentile_db": ("10th pc.", "{:.1f}"),
    "t5_dit_ratio": ("T5+DiT ×", "{:.3f}"),
    "vae_ratio": ("VAE ×", "{:.3f}"),
    "step_ms": ("step ms", "{:.0f}"),
    "total_s": ("picture s", "{:.2f}"),
    "peak_memory_mb": ("peak MB", "{:.0f}"),
    "seconds_to_make": ("made in s", "{:.0f}"),
}


def show(result: dict) -> str:
    """The figures as a Markdown table, then the targets that are missed."""
    lines = [" | ".join(["| ", *(title for title, _ in COLUMNS.values()), "against |"])]
    lines.append("|---|" + "---:|" * len(COLUMNS) + "---|")
    for label, figures in result["pipelines"].items():
        cells = [
            "–" if figures.get(name) is None else form.format(figures[name])
            for name, (_, form) in COLUMNS.items()
        ]
        lines.append(" | ".join([f"| {label}", *cells, f"{figures['against']} |"]))
    missed = result["misses"]
    return "\n".join([*lines, "", *(missed or ["Every target is reached."])])


# ----------------------------------------------------------------------------------------------
# Which layers integers hurt
# ----------------------------------------------------------------------------------------------

LAYERS = {  # what is left in floating point, one at a time
    "modulation (adaLN) and timestep": r"\.adaln_single\.",
    "patches": r"\.pos_embed\.proj/",
    "caption projection": r"\.caption_projection\.",
    "self-attention q, k, v": r"\.attn1\.to_[qkv]/",
    "self-attention out": r"\.attn1\.to_out",
    "cross-attention q": r"\.attn2\.to_q/",
    "cross-attention k, v": r"\.attn2\.to_[kv]/",
    "cross-attention out": r"\.attn2\.to_out",
    "feed-forward in": r"\.ff\.net\.0\.proj/",
    "feed-forward out (after GELU)": r"\.ff\.net\.2/",
    "output": r"\.proj_out/",
}


def layer_variants() -> Iterator[tuple[str, Recipe]]:
    """Recipes for the DiT to compare, with a name for each."""
    kept = helper._POSITIONS
    everything = Recipe(weights="int8", activations=True, floating=kept)
    yield "everything in integers", everything
    for alpha in (0.15, 0.5):
        yield f"  the same, SmoothQuant {alpha}", replace(everything, smooth_quant=alpha)
    base = replace(everything, floating=(*kept, *helper._ATTENTION))
    yield "everything but attention's inputs", base
    for name, pattern in LAYERS.items():
        yield f"  the same, {name} floating", replace(base, floating=(*base.floating, pattern))
    weights = Recipe(weights="int8", floating=kept)
    yield "8-bit weights", weights
    for size in (32, 128):
        options = (("DYNAMIC_QUANTIZATION_GROUP_SIZE", size),)
        yield f"  the same, dynamic activations by {size}", replace(weights, options=options)
    for name, pattern in LAYERS.items():
        others = tuple(p for p in LAYERS.values() if p != pattern)
        yield f"  {name} in 4 bits", Recipe(weights="int4", sensitive=others, floating=kept)
    for preset in PRESETS:
        yield f"preset {preset}", PRESETS[preset].transformer


def measure_layers(checkpoint: Path, samples: int = 40) -> None:
    """Prints the signal-to-error ratio of the DiT, in dB, for every variant."""
    fp16 = helper.convert_pipeline(checkpoint, WORK / "fp16")
    prompts = helper._choose_prompts(None, fp16, samples, seed=0)
    held_out = [caption for caption, _ in evaluate.read_captions()[: samples // 10]]
    sets = {}
    for name, captions, num in (
        ("calibration", prompts, samples),
        ("held out", held_out, samples // 2),
    ):
        data = helper._CalibrationData(fp16, WORK / "calibration", captions, num, len(captions))
        sets[name] = data.samples("transformer", progress=False)
    config = SimpleNamespace(**helper.read_json(fp16 / "transformer" / "config.json"))
    truth = answers(helper._read_ir(fp16 / "transformer"), sets["held out"])
    print("DiT against itself in floating point, signal to error in dB, higher is better")
    for name, recipe in layer_variants():
        with helper._silent_nncf():
            model = helper._apply_recipe(
                helper._read_ir(fp16 / "transformer"),
                recipe,
                config,
                sets["calibration"] if recipe.needs_data else [],
                lambda: None,
            )
        error = np.square(answers(model, sets["held out"], dict(recipe.options)) - truth)
        ratio = 10 * np.log10(np.square(truth).mean() / error.mean())
        print(f"  {name:45} {ratio:6.2f}", flush=True)


def answers(model: ov.Model, samples: list[dict], options: dict | None = None) -> np.ndarray:
    """The guided velocity of each sample, flat, in float32 execution."""
    # Dynamic quantization is OpenVINO's default for integer weights: off, unless asked for.
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    config |= options or {}
    compiled = ov.Core().compile_model(model, "CPU", config)
    outputs = [compiled(sample)[0][:, :4] for sample in samples]
    # What the sampler is given: guidance also amplifies the difference of two errors.
    return np.concatenate([(o[:1] + 4.5 * (o[1:] - o[:1])).ravel() for o in outputs])


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=200, help="the list's first N captions")
    parser.add_argument("--layers", action="store_true", help="which layers integers hurt")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.layers:
        measure_layers(arguments.checkpoint)
        return
    result = measure(arguments.checkpoint, arguments.count)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(show(result))


if __name__ == "__main__":
    main()
