"""Checks of arguments: one line that names the argument, its value and what it should be."""

import json
import math
from pathlib import Path
from typing import Any

import torch


def check(holds: bool, name: str, value: Any, rule: str) -> None:
    """Raise ValueError with one line, unless `holds`."""
    if not holds:
        is_tensor = isinstance(value, torch.Tensor)
        shown = f"(tensor of {tuple(value.shape)})" if is_tensor else shortened(repr(value), 80)
        raise ValueError(f"{name}={shown} does not work: it has to be {rule}.")


def check_shape(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """Raise ValueError unless `value` is a tensor of this shape; a word stands for any length."""
    fits = isinstance(value, torch.Tensor) and value.ndim == len(shape)
    pairs = zip(shape, value.shape, strict=True) if fits else ()
    fits = fits and all(isinstance(wanted, str) or wanted == size for wanted, size in pairs)
    check(fits, name, value, f"a tensor of ({', '.join(map(str, shape))})")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_text(value: Any) -> bool:
    """Whether `value` is a string or a list of at least one string."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def shortened(text: str, length: int) -> str:
    """`text` on one line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises FileNotFoundError where the file is missing, ValueError where it holds anything else.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(file)!r} is missing: the folder is incomplete, download or convert it again."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # also for bytes that are not text
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} is damaged: download or convert it again.")
    return content
