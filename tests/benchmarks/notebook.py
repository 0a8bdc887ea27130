"""Runs the notebook as `make run` does, from nothing, and says what time, memory and disk it takes.

    python -m tests.benchmarks.notebook                     # the embedded PixArt-tiny
    python -m tests.benchmarks.notebook real                # PixArt-XL at 512², 20 guided steps
    python -m tests.benchmarks.notebook few-steps           # the same in 4 steps, as LCM has it
    python -m tests.benchmarks.notebook path/of/a/checkpoint

PixArt-XL comes with T5-XXL, both of the published size and with random weights: its pictures are
noise. Memory is the most that all processes held at a time. On Linux, what several of them share
(libraries, mostly) counts once (proportional set size); elsewhere it counts in each of them.
The notebook that ran is left in `build/`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.benchmarks import checkpoints
from tests.benchmarks.cases import FULL, T5_XXL, XL_512
from tests.benchmarks.workers import call_in_process

ROOT = Path(__file__).parents[2]
MODEL = "assets/pixart-tiny"  # the notebook's own choice
SCHEDULERS = {"real": "DPMSolverMultistepScheduler", "few-steps": "LCMScheduler"}
LEFT_BEHIND = (".git", ".venv", "build", "models")  # converted models would shorten the run


def main(model: str = "") -> None:
    checkpoint = assemble(model) if model in SCHEDULERS else Path(model).resolve()
    output = ROOT / "build" / (f"notebook-{checkpoint.name}.ipynb" if model else "notebook.ipynb")
    minutes, memory, disk = run(checkpoint if model else None, output)
    print(f"The notebook took {minutes:.1f} minutes, at most {memory:.1f} GB of memory, and")
    print(f"{disk:.1f} GB of disk for its models. It lies in build/{output.name}.")


def run(checkpoint: Path | None, output: Path) -> tuple[float, float, float]:
    """Execute the notebook in a folder of its own, with another model if one is given.

    Returns minutes, the most memory that all its processes held at a time and the size of the
    models that it wrote, both in 10⁹ bytes. Raises CalledProcessError where a cell fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        for item in ROOT.iterdir():
            if item.name not in LEFT_BEHIND:
                (Path(folder) / item.name).symlink_to(item)
        copy = Path(folder) / "pixart.ipynb"
        copy.unlink()
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
    """The notebook's text; its first choice of a model is `checkpoint`."""
    notebook = (ROOT / "pixart.ipynb").read_text(encoding="utf-8")
    if checkpoint is None:
        return notebook
    before, after = (json.dumps(f'value="{name}"')[1:-1] for name in (MODEL, checkpoint.as_posix()))
    if notebook.count(before) != 1:
        raise ValueError(f"pixart.ipynb does not have value={MODEL!r} once: it has changed.")
    return notebook.replace(before, after)


def assemble(model: str) -> Path:
    """PixArt-XL for 512² with T5-XXL in one folder, random weights."""
    root = ROOT / "build" / "bench" / FULL.name
    for name in (XL_512, T5_XXL):
        if not checkpoints.has_checkpoint(root, name, FULL):
            call_in_process(checkpoints.build_checkpoint, root, name, FULL)
    texts, pictures = (checkpoints.checkpoint_folder(root, name) for name in (T5_XXL, XL_512))
    folder = root / "notebook" / f"PixArt-XL-512-{model}"
    return checkpoints.join(folder, texts, pictures, ("transformer", "vae"), SCHEDULERS[model])


def memory_gb(pid: int) -> float:
    """What a process and all that it has started hold now, in 10⁹ bytes."""
    total = 0
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for member in family:
        try:
            memory = member.memory_full_info()
        except psutil.Error:  # has just ended, or is not ours to look at
            continue
        total += getattr(memory, "pss", memory.rss)
    return total / 1e9


if __name__ == "__main__":
    main(*sys.argv[1:])
