"""Runs the notebook as `make run` does, from nothing: minutes, memory and disk that it takes.

    python -m benchmarks notebook                      # the embedded PixArt-tiny
    python -m benchmarks notebook real                 # PixArt-XL at 512², 20 guided steps
    python -m benchmarks notebook few-steps            # the same in 4 steps, as LCM has it
    python -m benchmarks notebook path/of/a/checkpoint
    python -m benchmarks notebook --store              # PixArt-tiny, and commit what it printed

PixArt-XL comes with T5-XXL, both of the published size and with random weights: its images are
noise. Memory is the most that all processes held at a time. On Linux, pages that several of them
share (libraries, mostly) count once (proportional set size); elsewhere they count in each process.
The executed notebook is left in `build/`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.stored import store
from ov_pixart.memory import memory_gb

ROOT = Path(__file__).parents[1]
NOTEBOOK = "pixart.ipynb"
# Files and folders that the notebook reads or imports. Whatever runs it elsewhere copies these.
NEEDED = (
    NOTEBOOK,
    "ov_pixart_helper.py",
    "gradio_helper.py",
    "ov_pixart",
    "pixart_tiny",
    "benchmarks",
    "assets",
)
MODEL = "assets/pixart-tiny"  # the notebook's own choice
SCHEDULERS = {"real": "DPMSolverMultistepScheduler", "few-steps": "LCMScheduler"}


def copy_needed(folder: Path) -> Path:
    """Copy the notebook and everything that it needs into a folder; return the notebook's copy.

    Models that an earlier run has converted are left behind: they would shorten the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in NEEDED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / name, folder)
    return folder / NOTEBOOK


def main(model: str = "", *, keep: bool = False) -> None:
    """Run the notebook with a model, see above, and print its figures.

    `keep`: put the outputs into pixart.ipynb. Raises ValueError if they are another model's.
    """
    if keep and model:
        raise ValueError(
            f"--store keeps the outputs of PixArt-tiny, not of {model!r}: leave it out."
        )
    checkpoint = _join_full_size(model) if model in SCHEDULERS else Path(model).resolve()
    output = ROOT / "build" / (f"notebook-{checkpoint.name}.ipynb" if model else "notebook.ipynb")
    minutes, memory, disk = run(checkpoint if model else None, output)
    print(f"The notebook took {minutes:.1f} minutes, at most {memory:.1f} GB of memory, and")
    print(f"{disk:.1f} GB of disk for its models. It lies in build/{output.name}.")
    if keep:
        store(output, ROOT / NOTEBOOK)


def run(checkpoint: Path | None, output: Path) -> tuple[float, float, float]:
    """Execute the notebook in a folder of its own, with another model if one is given.

    Returns minutes, the most memory that all its processes held at a time and the size of the
    models that it wrote, both in 10⁹ bytes. Raises CalledProcessError where a cell fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_needed(Path(folder))
        copy.write_text(with_model(checkpoint), encoding="utf-8")
        command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
        command += ["--KernelManager.transport=ipc", "--log-level=WARN", "--output-dir", "build"]
        start, peak = time.monotonic(), 0.0
        process = subprocess.Popen([*command, copy.name], cwd=folder)
        while process.poll() is None:
            peak = max(peak, memory_gb(process.pid))
            time.sleep(0.5)
        minutes = (time.monotonic() - start) / 60
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        models = [file for file in Path(folder, "models").rglob("*") if file.is_file()]
        disk = sum(file.stat().st_size for file in models) / 1e9
        output.parent.mkdir(exist_ok=True)
        shutil.move(Path(folder, "build", copy.name), output)
    return minutes, peak, disk


def with_model(checkpoint: Path | None) -> str:
    """The notebook's text; its first choice of a model is `checkpoint`.

    Raises ValueError if the notebook does not contain its own choice exactly once.
    """
    notebook = (ROOT / NOTEBOOK).read_text(encoding="utf-8")
    if checkpoint is None:
        return notebook
    before, after = (json.dumps(f'value="{name}"')[1:-1] for name in (MODEL, checkpoint.as_posix()))
    if notebook.count(before) != 1:
        raise ValueError(f"{NOTEBOOK} does not have value={MODEL!r} once: it has changed.")
    return notebook.replace(before, after)


def _join_full_size(model: str) -> Path:
    """PixArt-XL for 512² with T5-XXL in one folder, random weights."""
    from benchmarks import checkpoints  # brings torch along, which copying does not need
    from benchmarks.cases import FULL, T5_XXL, XL_512
    from ov_pixart.workers import call_in_process

    root = ROOT / "build" / "bench" / FULL.name
    for name in (XL_512, T5_XXL):
        if not checkpoints.has_checkpoint(root, name, FULL):
            call_in_process(checkpoints.build_checkpoint, root, name, FULL)
    texts, images = (checkpoints.checkpoint_folder(root, name) for name in (T5_XXL, XL_512))
    folder = root / "notebook" / f"PixArt-XL-512-{model}"
    return checkpoints.join(folder, texts, images, ("transformer", "vae"), SCHEDULERS[model])
