"""Two actors and two machines: whatever is killed, every row is there once."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ov_pixart.batch import generate_many
from tests.support.batch_stub import DIES, FAILS, HOLD, load_stub, wait_for
from tests.support.fake_pipeline import fake_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="kills processes, simulates machines"),
]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def ov_dir(tmp_path) -> Path:
    return fake_folder(tmp_path / "ov")


@pytest.fixture
def marks(tmp_path) -> list[Path]:
    """Where the actor that has row 7, or row 16, writes its id, and waits."""
    return [tmp_path / "first", tmp_path / "second"]


@pytest.fixture
def captions(marks, tmp_path) -> Path:
    rows = [{"prompt": f"picture {i}", "seed": 7 * i} for i in range(24)]
    rows[7]["prompt"], rows[16]["prompt"] = (f"{HOLD}{mark}" for mark in marks)
    rows[20]["prompt"] = FAILS
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def read(folder: Path) -> list[dict]:
    """All rows of an output folder, in the order of its shards."""
    files = sorted(folder.glob("images-*.parquet"))
    return pa.concat_tables(map(pq.read_table, files)).to_pylist()


def generate_here(captions: Path, out: Path, ov_dir: Path) -> list[dict]:
    """What a plain loop has written in the end."""
    stub = {"load": load_stub, "release_text_encoder": False, "progress": False}
    generate_many(captions, out, ov_dir, shard_size=3, **stub)
    return read(out)


def start(*runs: dict) -> subprocess.Popen:
    """Runs with two actors and the stub, in a process of their own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.batch_stub", *map(json.dumps, runs)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # apart from pytest: Ray ends groups of processes
        text=True,
    )


def reports(run: subprocess.Popen) -> list[dict]:
    """What came of the runs; an AssertionError where the process failed."""
    output, errors = run.communicate(timeout=500)
    assert run.returncode == 0, errors
    lines = [line for line in output.splitlines() if line.startswith("{")]  # Ray prints too
    return list(map(json.loads, lines))


def arguments(captions: Path, out: Path, ov_dir: Path, shard_size: int = 3, **others) -> dict:
    paths = {"captions": str(captions), "output_dir": str(out), "ov_dir": str(ov_dir)}
    return {**paths, "shard_size": shard_size, **others}


def waiting_actor(mark: Path, run: subprocess.Popen) -> psutil.Process:
    def is_there() -> bool:
        assert run.poll() is None, run.communicate()[1]
        return mark.exists()

    wait_for(is_there, 300)
    return psutil.Process(int(mark.read_text()))


def test_no_row_is_lost_or_doubled(captions, marks, ov_dir, tmp_path):
    """An actor dies, later one of two machines."""
    run = start(arguments(captions, tmp_path / "out", ov_dir, nodes=2))
    for mark, killed in zip(marks, ("actor", "machine"), strict=True):
        actor = waiting_actor(mark, run)
        raylet = actor.parent()  # with it, a simulated machine is gone
        os.kill(raylet.pid if killed == "machine" else actor.pid, signal.SIGKILL)
        mark.with_suffix(".done").touch()
    (report,) = reports(run)
    assert (report["rows"], report["failed"], report["generated"]) == (24, 1, 24)
    assert read(tmp_path / "out") == generate_here(captions, tmp_path / "plain", ov_dir)
    assert [row["row"] for row in read(tmp_path / "out")] == list(range(24))


def test_a_killed_run_ends_its_actors_and_is_resumed(captions, marks, ov_dir, tmp_path):
    out = tmp_path / "out"
    run = start(arguments(captions, out, ov_dir))
    actor = waiting_actor(marks[0], run)
    wait_for(lambda: list(out.glob("images-*.parquet")))  # the other actor's
    run.kill()
    run.communicate()
    wait_for(lambda: not actor.is_running() or actor.status() == psutil.STATUS_ZOMBIE)
    finished = {file: file.stat().st_mtime_ns for file in out.glob("images-*.parquet")}
    assert finished and len(finished) < 8
    for mark in marks:
        mark.with_suffix(".done").touch()
    resumed = generate_here(captions, out, ov_dir)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert resumed == generate_here(captions, tmp_path / "plain", ov_dir)
    assert not list(out.rglob(".partial-*"))


def test_actors_that_cannot_work_end_the_run_and_ten_thousand_rows_do_not(ov_dir, tmp_path):
    """`pytest -s` shows the throughput of the plumbing."""

    deadly, many = tmp_path / "deadly.jsonl", tmp_path / "many.jsonl"
    rows = [{"prompt": DIES if i == 4 else "a picture"} for i in range(9)]
    deadly.write_text("\n".join(map(json.dumps, rows)))
    many.write_text("\n".join(f'{{"prompt": "picture {i}"}}' for i in range(10_000)))
    out = [tmp_path / f"out-{i}" for i in range(4)]
    dies, starts_not, too_many_threads, plumbing = reports(
        start(
            arguments(deadly, out[0], ov_dir),
            arguments(deadly, out[1], ov_dir, loads_nothing=True),
            arguments(deadly, out[2], ov_dir, threads=64),
            arguments(many, out[3], ov_dir, shard_size=32),
        )
    )
    assert "actors died twice with rows 3 to 5" in dies["error"]
    assert [row["row"] for row in read(out[0])] == [0, 1, 2, 6, 7, 8]
    expected = "an actor could not start: FileNotFoundError: no model on this machine"
    assert starts_not["error"] == expected
    assert "threads=64 does not work" in too_many_threads["error"]
    grown = (plumbing["memory"] - starts_not["memory"]) / 1e6
    print(f"{10_000 / plumbing['seconds']:.0f} rows a second, {grown:.0f} MB more")
    assert grown < 64
    assert [row["row"] for row in read(out[3])] == list(range(10_000))


def test_the_pipeline_of_the_documentation_runs(converted, tmp_path):
    """With the real pipeline; one row fails."""
    document = (ROOT / "docs" / "many-pictures.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^```python\n([^`]*ray_session.*?)^```", document, re.MULTILINE | re.DOTALL
    )
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "pixart").symlink_to(converted("alpha"))
    rows = [f"a star,{seed},64,64,{steps}" for seed, steps in enumerate((2, 2, 2, -1))]
    header = "prompt,seed,height,width,num_inference_steps"
    (tmp_path / "captions.csv").write_text("\n".join([header, *rows]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, start_new_session=True)
    rows = [row for file in (tmp_path / "out").iterdir() for row in pq.read_table(file).to_pylist()]
    assert sorted(row["seed"] for row in rows) == [0, 1, 2, 3]
    for row in rows:
        fails = row["num_inference_steps"] < 0
        assert (bool(row["error"]), row["image"] is None) == (fails, fails)
