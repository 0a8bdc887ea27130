"""Stands in for the model where batches of images are tested, and waits where a test wants to kill.

    python -m tests.support.batch_stub '{"captions": …, "output_dir": …, "ov_dir": …}'

runs `generate_many` with it in a process of its own. With "nodes", Ray simulates so many machines.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

FAILS = "please fail"
HOLD = "hold "  # and a path: the process writes its id there, and waits for path.done
DIES = "please die"


class Stub:
    """A small image of noise from the generator that it is given."""

    def __init__(self, folder: Path, options: dict[str, Any]):
        self.folder, self.options = folder, options
        self.text_encoder = SimpleNamespace(ov_config=options["ov_config"])

    def __call__(self, prompt: str, *, generator: torch.Generator, **_: Any) -> Any:
        if prompt == FAILS:
            raise RuntimeError("the device is\non fire")
        if prompt == DIES:
            os.kill(os.getpid(), 9)
        if prompt.startswith(HOLD):
            wait_at(Path(prompt.removeprefix(HOLD)))
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        return SimpleNamespace(images=[Image.fromarray(np.asarray(pixels))])


def wait_at(mark: Path) -> None:
    """Write this process's id to the mark, and wait until a file beside it ends all waiting."""
    done = mark.with_suffix(".done")
    if done.exists():
        return
    partial = mark.with_suffix(f".{os.getpid()}")
    partial.write_text(str(os.getpid()))
    os.replace(partial, mark)
    wait_for(done.exists)


def wait_for(condition, seconds: float = 120) -> Any:
    """The condition's first true value; an AssertionError if none comes."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def load_stub(folder: str | Path, **options: Any) -> Stub:
    return Stub(Path(folder), options)


def main() -> None:
    # by its name: actors could not import a function of `__main__`
    from ov_pixart.batch import generate_many
    from ov_pixart.cluster import quick_start
    from tests.support.batch_stub import load_stub

    options = {"release_text_encoder": False, "progress": False, "load": load_stub}
    options |= json.loads(sys.argv[1])
    with contextlib.ExitStack() as stack:
        if nodes := options.pop("nodes", 0):
            stack.enter_context(quick_start())
            from ray.cluster_utils import Cluster

            cluster = Cluster()
            cluster.add_node(num_cpus=0, include_dashboard=False)
            for _ in range(nodes):
                cluster.add_node(num_cpus=1)
            options["address"] = cluster.address
        result = generate_many(**options)
    print(json.dumps({"rows": result.rows, "failed": result.failed, "now": result.generated}))


if __name__ == "__main__":
    main()
