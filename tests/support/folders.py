"""Model folders, looked at and damaged."""

from pathlib import Path
from typing import Any

import ov_pixart_helper as helper


def flip_a_bit(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def graph_times(folder: Path) -> dict[str, int]:
    """When each component's graph was written."""
    return {
        name: (folder / name / "openvino_model.xml").stat().st_mtime_ns
        for name in helper.COMPONENTS
    }


def convert_again(source: Path, folder: Path, **options: Any) -> set[str]:
    """Call `convert_pipeline` and return the components that it has written."""
    before = graph_times(folder)
    helper.convert_pipeline(source, folder, **{"weight_format": "fp32", **options})
    assert not list(folder.glob("**/.partial*"))
    assert (folder / "model_index.json").is_file()
    return {name for name, time in graph_times(folder).items() if time != before.get(name)}
