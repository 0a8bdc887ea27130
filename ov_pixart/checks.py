"""Checks of arguments: one line that names the argument, its value and what it should be."""

import difflib
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
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


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError if `owner` has no argument of a name; each comes with the nearest known."""
    known = list(known)
    unknown = []
    for name in (name for name in given if name not in known):
        nearest = _OTHER_NAMES.get(name) or nearest_name(name, known)
        unknown.append(f"{name!r} (nearest: {nearest!r})" if nearest else repr(name))
    if unknown:
        raise TypeError(f"{owner} has no argument {', '.join(unknown)}: check the spelling.")


_OTHER_NAMES = {"seed": "generator", "steps": "num_inference_steps", "cfg_scale": "guidance_scale"}


def nearest_name(name: str, known: Iterable[str], likeness: float = 0.5) -> str | None:
    """The known name that is most like `name`, None if none is."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=likeness)
    return found[0] if found else None


def public(function: Callable) -> Callable:
    """Let a function of the public API take NumPy's numbers, and name its misspelt arguments."""
    parameters = inspect.signature(function).parameters
    is_open = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not is_open:
            check_names(function.__name__, kwargs, parameters)
        kwargs = {name: plain(value) for name, value in kwargs.items()}
        return function(*map(plain, args), **kwargs)

    return wrapper


def plain(value: Any) -> Any:
    """Python's own number for one of NumPy or torch; anything else as it is."""
    is_array = isinstance(value, np.generic | np.ndarray | torch.Tensor)
    return value.item() if is_array and value.ndim == 0 else value


def named_folders(pipelines: Any) -> dict[str, Path]:
    """The folders of pipelines by their labels; ValueError for anything but folders."""
    rule = "a dictionary of labels and folders, as in {'FP16': folder}"
    check(isinstance(pipelines, dict), "pipelines", pipelines, rule)
    for label, folder in pipelines.items():
        fits = isinstance(folder, str | Path) and bool(str(folder))
        rule = "the folder of a pipeline: save_pretrained writes one"
        check(fits, f"pipelines[{label!r}]", folder, rule)
    return {str(label): Path(folder) for label, folder in pipelines.items()}


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
