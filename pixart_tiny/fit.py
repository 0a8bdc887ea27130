"""The one training loop: every stage resumes, logs and averages its weights in the same way."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from pixart_tiny.data import SEED, Size, save_atomically

# A step's losses: "loss" is minimised, the others are logged with it.
Losses = Callable[[int, np.random.Generator], dict[str, torch.Tensor]]


@dataclass
class Run:
    """One stage's position: `step` of `steps`, its folder, and the numbers of its table row."""

    name: str
    output: Path  # holds a folder per stage
    steps: int = 0
    batch: int = 0
    images: dict[Size, int] = field(default_factory=dict)
    device: str = "cpu"
    deadline: float = math.inf  # in time.monotonic() seconds
    step: int = 0

    @property
    def folder(self) -> Path:
        return self.output / self.name

    @property
    def finished(self) -> bool:
        return (self.folder / "finished.json").is_file()

    def finish(self, **figures) -> None:
        """Marks the stage as done, with figures for the reader."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "finished.json").write_text(json.dumps(figures, indent=1) + "\n")

    def resume(self, parts: dict) -> None:
        """Restores every part (anything with a state dict) that an earlier segment saved."""
        file = self.folder / "state.pt"
        if file.is_file():
            state = torch.load(file, map_location=self.device, weights_only=True)
            self.step = state.pop("step")
            for name, part in parts.items():
                part.load_state_dict(state[name])

    def save(self, parts: dict) -> None:
        state = {name: part.state_dict() for name, part in parts.items()} | {"step": self.step}
        save_atomically(state, self.folder / "state.pt")

    @property
    def is_short(self) -> bool:
        """Too short to earn back a minute of compilation, or to be measured carefully."""
        return self.steps < 200

    def seeds(self, step: int) -> tuple[int, int, int]:
        """The seed of a step's random draws: a resumed run is the same as an unbroken one."""
        return SEED, zlib.crc32(self.name.encode()), step


def fit(
    run: Run,
    modules: dict[str, torch.nn.Module],
    optimizers: list[torch.optim.Optimizer],
    losses: Losses,
    *,
    ema: Ema | None = None,
) -> bool:
    """Trains until the stage or the time is over; returns whether the stage is complete.

    Draws inside `losses` come from its generator or from torch's global one; both are seeded from
    (stage, step) alone. Losses go to `metrics.jsonl` in the stage's folder, and to a plot.
    """
    parts = dict(modules) | {f"optimizer {i}": o for i, o in enumerate(optimizers)}
    parts |= {"ema": ema} if ema else {}
    run.resume(parts)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    log = Log(run)
    bar = tqdm(total=run.steps, initial=run.step, desc=run.name, mininterval=10)
    while run.step < run.steps and time.monotonic() < run.deadline:
        seeds = run.seeds(run.step)
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        set_learning_rate(optimizers, warmup_cosine(run.step / run.steps))
        values = losses(run.step, np.random.default_rng(seeds))
        for optimizer in optimizers:
            optimizer.zero_grad()
        values["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if ema:
            ema.update()
        run.step += 1
        bar.update()
        log.add(values)
        if run.step % SAVE_EVERY == 0:
            run.save(parts)
    bar.close()
    run.save(parts)
    plot_metrics(run.folder)
    return run.step >= run.steps


SAVE_EVERY = 1000  # steps


class Log:
    """Means of the losses over stretches of steps, appended to `metrics.jsonl`."""

    def __init__(self, run: Run) -> None:
        self.run, self.recent = run, []
        self.every = max(1, min(100, run.steps // 20))
        self.file = run.folder / "metrics.jsonl"
        run.folder.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= run.step]
        self.file.write_text("".join(f"{line}\n" for line in kept))
        self.started = time.monotonic()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        self.recent.append({name: value.detach() for name, value in values.items()})
        if self.run.step % self.every == 0:
            row = {"step": self.run.step, "seconds": round(time.monotonic() - self.started, 1)}
            for name in self.recent[0]:
                row[name] = round(torch.stack([r[name] for r in self.recent]).mean().item(), 5)
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.recent = []


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a stage's `metrics.jsonl`."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def plot_metrics(folder: Path) -> None:
    """Draws every loss of a stage over its steps, in `losses.png`."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    names = [name for name in (rows[0] if rows else {}) if name not in ("step", "seconds")]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (log scale)", yscale="log")
    for name in names:
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    if names:
        axes.legend()
    axes.set_title(folder.name)
    figure.savefig(folder / "losses.png", dpi=100)


# ----------------------------------------------------------------------------------------------
# Learning rate, averages, optimizers
# ----------------------------------------------------------------------------------------------


def warmup_cosine(done: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Learning-rate factor: a short linear warm-up, then half a cosine down to `floor`."""
    if done < warmup:
        return done / warmup + 1e-3
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every group's learning rate to `factor` times the one it was made with."""
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor


class Ema:
    """Exponential moving average of parameters, with a warm-up."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = [*parameters], decay, 0
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict:
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then the nearest orthogonal matrix as the update.

    The same as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but all matrices of one
    shape at once: the DiT has 80 small ones, and one at a time they leave a GPU idle.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, same in shapes.items():
                gradient = torch.stack([parameter.grad for parameter in same])
                state = self.state[same[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                update = orthogonalize(gradient.lerp(state["momentum"], group["momentum"]))
                rate = -0.2 * max(shape) ** 0.5 * group["lr"]
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, [*update.float().unbind()], alpha=rate)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with all singular values near 1, by Newton–Schulz in bfloat16."""
    x = matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
