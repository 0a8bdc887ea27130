"""Step caches for a DiT: rows that are predicted from earlier steps instead of evaluated.

For solver_study.py only: at equal cost none of them generates more right images than fewer steps
with a short guidance interval do, see docs/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARM_UP = 3  # evaluations before a cache predicts anything, as in diffusers


@dataclass(frozen=True)
class Cache:
    """Which rows a cache predicts, and from what.

    `first_block`: it predicts what this block and all later ones add; None: the DiT's output.
    `interval`: every n-th step is evaluated. `threshold`: if given, an image is evaluated when what
    the blocks before `first_block` add has changed by this share since its last evaluation.
    `order`: of the Taylor series; 0 repeats the last value. `log_snr`: the series runs over the
    logarithm of the signal-to-noise ratio, not over steps. `only_unconditional`: the conditional
    half of guidance is always evaluated; `together`: it decides for both. `first_order`: the solver
    does not extrapolate from predictions.
    """

    first_block: int | None = None
    interval: int = 2
    threshold: float | None = None
    order: int = 1
    log_snr: bool = False
    only_unconditional: bool = False
    together: bool = False
    first_order: bool = False


class Series:
    """Differences of a sequence of tensors `(B, …)`, extrapolated as TaylorSeer does.

    Each of the B entries has its own history. `positions`: where it was last updated.
    """

    def __init__(self, order: int) -> None:
        self.order, self.terms, self.positions = order, [], None

    def update(self, at: float, value: Tensor, rows: Tensor) -> None:
        """Take `value`, `(rows.sum(), …)`, for the rows of a mask; the first ones are for all."""
        terms = [value]
        for old in self.terms[: self.order]:
            distance = at - self.positions[rows]
            terms.append((terms[-1] - old[rows]) / distance.view(-1, *[1] * (value.ndim - 1)))
        for i, term in enumerate(terms):
            if i == len(self.terms):
                self.terms.append(term.clone())
            self.terms[i][rows] = term
        if self.positions is None:
            self.positions = torch.zeros(len(value), device=value.device)
        self.positions[rows] = at

    def predict(self, at: float) -> Tensor:
        """The value at a position; where it was just updated, that value."""
        distance = (at - self.positions).view(-1, *[1] * (self.terms[0].ndim - 1))
        return sum(term * distance**i / math.factorial(i) for i, term in enumerate(self.terms))


class Half:
    """One half of guidance: its cache's memory, and how many rows it has evaluated."""

    def __init__(self, name: str, cache: Cache | None, leader: Half | None = None) -> None:
        skipped = cache and cache.only_unconditional and name == "conditional"
        self.cache = None if skipped else cache
        self.leader = leader if cache and cache.together else None
        self.series = Series(cache.order) if cache else None
        self.signal, self.rows, self.calls = None, None, 0
        self.full = self.shallow = 0.0  # per image: through all blocks, through the first ones only

    def decide(self, signal: Tensor, is_last: bool) -> Tensor:
        """Which images to evaluate, a mask `(B,)`; `signal`: `(B, …)`, what a threshold watches."""
        rows = torch.ones(len(signal), dtype=torch.bool, device=signal.device)
        self.calls += 1
        if self.cache and self.calls > WARM_UP and not is_last:
            if self.leader:
                rows = self.leader.rows
            elif self.cache.threshold is None:
                rows = rows & ((self.calls - WARM_UP) % self.cache.interval == 0)
            else:
                dims = tuple(range(1, signal.ndim))
                change = (signal - self.signal).abs().mean(dims) / self.signal.abs().mean(dims)
                rows = change > self.cache.threshold
        if self.signal is None:
            self.signal = signal.clone()
        self.signal[rows] = signal[rows]
        self.rows = rows
        self.full += rows.float().mean().item()
        self.shallow += (
            (~rows).float().mean().item() if self.cache and self.cache.first_block else 0
        )
        return rows


class Blocks(nn.Module):
    """All blocks of a DiT as one; `half` decides which images pass through the later ones."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.half, self.at, self.is_last = nn.ModuleList(blocks), None, 0.0, False

    def run(self, blocks: Sequence[nn.Module], hidden: Tensor, inputs: dict) -> Tensor:
        for block in blocks:
            hidden = block(hidden, **inputs)
        return hidden

    def forward(self, hidden_states: Tensor, **inputs) -> Tensor:
        """`hidden_states`: `(B, tokens, width)`."""
        if not self.half.cache or self.half.cache.first_block is None:
            return self.run(self.blocks, hidden_states, inputs)
        first, series = self.half.cache.first_block, self.half.series
        head = self.run(self.blocks[:first], hidden_states, inputs)
        rows = self.half.decide(head - hidden_states, self.is_last)
        if rows.any():
            some = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            tail = self.run(self.blocks[first:], head[rows], some)
            series.update(self.at, tail - head[rows], rows)
        return head + series.predict(self.at)
