"""Stands in for the model where batches of images are tested, and waits where a test wants to kill.

    python -m tests.support.batch_stub '{"captions": …, "output_dir": …, "ov_dir": …}' …

calls `generate_many` with two actors for each argument, and prints what comes of it as a line of
JSON. With "nodes", Ray simulates so many machines.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from ov_pixart.batch import generate_many
from ov_pixart.cluster import quick_start, ray_session

SAME = {"actors": 2, "threads": 1, "release_text_encoder": False, "progress": False}
FAILS = "please fail"
HOLD = "hold "  # and a path: the process writes its id there, and waits for path.done
DIES = "please die"


class Stub:
    """A small image of noise from the generator that it is given."""

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
    return Stub()


def load_nothing(folder: str | Path, **options: Any) -> Stub:
    raise FileNotFoundError("no model on this machine")


def report(options: dict[str, Any]) -> dict[str, Any]:
    """What comes of `generate_many`, and this process's memory in bytes after it."""
    load = load_nothing if options.pop("loads_nothing", False) else load_stub
    try:
        result = dataclasses.asdict(generate_many(**{**SAME, **options}, load=load))
    except (RuntimeError, ValueError) as error:
        result = {"error": str(error)}
    return {**result, "memory": psutil.Process().memory_info().rss}


def main() -> None:
    with contextlib.ExitStack() as stack:
        runs = [json.loads(text) for text in sys.argv[1:]]
        if len(runs) > 1:  # they share one start of Ray
            stack.enter_context(ray_session(None, 2))
        for options in runs:
            if nodes := options.pop("nodes", 0):
                options["address"] = stack.enter_context(simulated_cluster(nodes))
            print(json.dumps(report(options)), flush=True)


@contextlib.contextmanager
def simulated_cluster(nodes: int) -> Iterator[str]:
    """The address of a cluster of machines with one processor each, and one that has none."""
    with quick_start():
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        cluster.add_node(num_cpus=0, include_dashboard=False)
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        yield cluster.address


if __name__ == "__main__":
    # by its name: actors could not import a function of `__main__`
    from tests.support.batch_stub import main

    main()
