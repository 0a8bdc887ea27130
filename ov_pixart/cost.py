"""Memory and disk that a conversion needs, known before it starts."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ov_pixart.checkpoint import stored_weights
from ov_pixart.storage import check_disk

BYTES_PER_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 0.6}  # on disk
_PROCESS = 900_000_000  # bytes of Python with torch, OpenVINO and NNCF
_LARGEST_WORK = 500_000_000  # T5-XXL's embedding needs more, but before others were compressed


@dataclass(frozen=True)
class ConversionCost:
    """Bytes that the conversion of one component needs."""

    memory: int  # an enforced limit that the whole process runs within
    free: int  # memory that has to be free before
    disk: int


def conversion_cost(folder: Path, weight_format: str) -> ConversionCost:
    """Estimate from the sizes of a component's weights what its conversion needs.

    The figures for memory follow the limits in docs/performance.md, which
    `python -m benchmarks memory` finds.
    """
    stored = stored_weights(folder)
    count, largest = sum(stored.sizes), max(stored.sizes, default=0)
    is_wide = stored.dtype == torch.float32
    output = BYTES_PER_WEIGHT[weight_format] * count
    if weight_format == "fp32":
        new = 0 if is_wide else 4 * count
    else:  # float32 becomes float16 first
        new = max(2 * count if is_wide else 0, output if weight_format != "fp16" else 0)
    # NNCF compresses one matrix at a time, and holds ten (8 bits) to 14 bytes per weight of it.
    work = {"int8": 10, "int4": 14}.get(weight_format, 4) * largest
    free = new + min(work, _LARGEST_WORK)
    memory = _PROCESS + max(new, 5 * largest)  # the largest matrix is among the first
    return ConversionCost(round(memory), round(free), round(1.02 * output))


def check_resources(costs: dict[str, ConversionCost], output_dir: Path) -> None:
    """Raise MemoryError or OSError if memory or disk is too small, before anything is done."""
    free = psutil.virtual_memory().available
    for name, cost in costs.items():
        if cost.free > free:
            raise MemoryError(
                f"Converting the {name} takes {cost.free / 1e9:.1f} GB of memory, and "
                f"{free / 1e9:.1f} GB are free: close other programs, or choose a smaller "
                "weight_format."
            )
    check_disk(sum(cost.disk for cost in costs.values()), output_dir)
