"""Pace and memory of `python -m ov_pixart.batch`: a plain loop, one actor, two actors.

    python -m pixart_tiny.many_pictures models/pixart-tiny                 # 60 captions, 3 rounds
    python -m pixart_tiny.many_pictures models/pixart --count 20 --steps 4 --versions 2

Rounds alternate between the three. The pace counts what is finished after the first quarter. Memory
is the most that all processes held at a time; on Linux, pages that they share count once. "Beside"
is what all processes but those that generate took meanwhile, whatever else the machine does.
"""

import argparse
import contextlib
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ov_pixart_helper import memory_gb
from pixart_tiny import evaluate

VERSIONS = {"plain loop": 0, "one actor": 1, "two actors": 2}
SHARD_SIZE = 5  # rows: the time of a file is when they were finished


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table; other options go to the command as they are."""
    parser = argparse.ArgumentParser("python -m pixart_tiny.many_pictures", usage=__doc__)
    parser.add_argument("ov_dir", help="folder of the converted pipeline")
    parser.add_argument("--count", type=int, default=60, help="captions, from 15")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--versions", type=int, default=3, help="2: without the two actors")
    options, others = parser.parse_known_args(arguments)
    runs: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(options.rounds):
        for name in list(VERSIONS)[: options.versions]:
            figures = run(options.ov_dir, VERSIONS[name], options.count, others)
            runs.setdefault(name, []).append(figures)
            print(name, *(f"{figure:.2f}" for figure in figures), flush=True)
    print("\n| | images a minute | start, s | memory, GB | beside, % of a core |")
    print("|---|---|---|---|---|")
    for name, rounds in runs.items():
        pace, start, memory, beside = map(statistics.median, zip(*rounds, strict=True))
        spread = f"{min(r[0] for r in rounds):.1f} to {max(r[0] for r in rounds):.1f}"
        print(f"| {name} | {pace:.1f} ({spread}) | {start:.0f} | {memory:.2f} | {beside:.1f} |")


def run(ov_dir: str, actors: int, count: int, others: list[str]) -> tuple[float, ...]:
    """Images a minute, seconds before the first image is begun, the most memory in 10⁹ bytes, and
    what the processes that do not generate took, in % of one core.

    Raises ValueError where `count` captions are not enough.
    """
    with tempfile.TemporaryDirectory() as folder:
        captions, output = Path(folder, "captions.csv"), Path(folder, "out")
        with captions.open("w", newline="") as file:
            csv.writer(file).writerows([("prompt", "seed"), *evaluate.read_captions()[:count]])
        command = [sys.executable, "-m", "ov_pixart.batch", str(captions), str(output)]
        command += ["--ov-dir", ov_dir, "--shard-size", str(SHARD_SIZE), *others]
        command += ["--actors", str(actors)] if actors else []
        start, memory, looks = time.time(), 0.0, []
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            memory = max(memory, memory_gb(process.pid))
            if any(output.glob("images-*.parquet")):
                looks.append((time.time(), processor_seconds(process.pid)))
            time.sleep(3)  # to look takes time from those that are measured
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        ends = sorted(file.stat().st_mtime for file in output.glob("images-*.parquet"))
    first = len(ends) // 4
    pace = 60 * SHARD_SIZE * (len(ends) - 1 - first) / (ends[-1] - ends[first])
    looks = [look for look in looks if look[0] <= ends[-1]]
    if len(looks) < 2:
        raise ValueError(f"--count={count} is over too soon to be measured: give more captions.")
    spent = [looks[-1][1][pid] - looks[0][1][pid] for pid in looks[0][1].keys() & looks[-1][1]]
    beside = 100 * sum(sorted(spent)[: -max(actors, 1)]) / (looks[-1][0] - looks[0][0])
    return pace, ends[0] - start - 60 * SHARD_SIZE / pace, memory, beside


def processor_seconds(pid: int) -> dict[int, float]:
    """Processor time that a process and all its descendants have taken so far, by process."""
    seconds = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds[process.pid] = times.user + times.system
    return seconds


if __name__ == "__main__":
    main()
