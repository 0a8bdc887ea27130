"""Two actors and two machines: whatever is killed, every row is there once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest

from ov_pixart.batch import generate_many
from tests.support.batch_stub import DIES, FAILS, HOLD, load_stub, wait_for
from tests.support.fake_pipeline import fake_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="kills processes, simulates machines"),
]
ROOT = Path(__file__).parents[1]
SAME = {"threads": 1, "shard_size": 3}


@pytest.fixture
def ov_dir(tmp_path) -> Path:
    return fake_folder(tmp_path / "ov")


@pytest.fixture
def mark(tmp_path) -> Path:
    """Where the actor that has row 7 writes its id, and waits."""
    return tmp_path / "mark"


@pytest.fixture
def captions(mark) -> Path:
    rows = [{"prompt": f"picture {i}", "seed": 7 * i} for i in range(24)]
    rows[7]["prompt"] = f"{HOLD}{mark}"
    rows[20]["prompt"] = FAILS
    file = mark.with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def read(folder: Path) -> list[dict]:
    """All rows of an output folder, in the order of its shards."""
    files = sorted(folder.glob("images-*.parquet"))
    return pa.concat_tables(map(pa.parquet.read_table, files)).to_pylist()


def generate_here(captions: Path, out: Path, ov_dir: Path) -> list[dict]:
    """What a plain loop has written in the end."""
    stub = {"load": load_stub, "release_text_encoder": False, "progress": False}
    generate_many(captions, out, ov_dir, shard_size=3, **stub)
    return read(out)


def start(captions: Path, out: Path, ov_dir: Path, **options) -> subprocess.Popen:
    """Two actors with the stub, in a process of their own."""
    paths = {"captions": str(captions), "output_dir": str(out), "ov_dir": str(ov_dir)}
    options = {**paths, **SAME, "actors": 2, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.batch_stub", json.dumps(options)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # apart from pytest: Ray ends groups of processes
        text=True,
    )


def waiting_actor(mark: Path, run: subprocess.Popen) -> psutil.Process:
    def is_there() -> bool:
        assert run.poll() is None, run.communicate()[1]
        return mark.exists()

    wait_for(is_there, 300)
    return psutil.Process(int(mark.read_text()))


@pytest.mark.parametrize(("killed", "nodes"), [("actor", 0), ("node", 2)])
def test_no_row_is_lost_or_doubled(captions, mark, ov_dir, tmp_path, killed, nodes):
    run = start(captions, tmp_path / "out", ov_dir, nodes=nodes)
    actor = waiting_actor(mark, run)
    raylet = actor.parent()  # with it, a simulated machine is gone
    os.kill(raylet.pid if killed == "node" else actor.pid, signal.SIGKILL)
    mark.with_suffix(".done").touch()
    output, errors = run.communicate(timeout=500)
    assert run.returncode == 0, errors
    assert json.loads(output.splitlines()[-1]) == {"rows": 24, "failed": 1, "now": 24}
    assert read(tmp_path / "out") == generate_here(captions, tmp_path / "plain", ov_dir)
    assert [row["row"] for row in read(tmp_path / "out")] == list(range(24))


def test_a_killed_run_ends_its_actors_and_is_resumed(captions, mark, ov_dir, tmp_path):
    out = tmp_path / "out"
    run = start(captions, out, ov_dir)
    actor = waiting_actor(mark, run)
    wait_for(lambda: list(out.glob("images-*.parquet")))  # the other actor's
    run.kill()
    run.communicate()
    wait_for(lambda: not actor.is_running() or actor.status() == psutil.STATUS_ZOMBIE)
    finished = {file: file.stat().st_mtime_ns for file in out.glob("images-*.parquet")}
    assert finished and len(finished) < 8
    mark.with_suffix(".done").touch()
    resumed = generate_here(captions, out, ov_dir)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert resumed == generate_here(captions, tmp_path / "plain", ov_dir)
    assert not list(out.rglob(".partial-*"))


def test_a_row_that_kills_every_actor_ends_the_run(ov_dir, tmp_path):
    captions = tmp_path / "captions.jsonl"
    rows = [{"prompt": DIES if i == 4 else "a picture"} for i in range(9)]
    captions.write_text("\n".join(map(json.dumps, rows)))
    run = start(captions, tmp_path / "out", ov_dir)
    _, errors = run.communicate(timeout=500)
    assert run.returncode == 1
    assert "every actor died; one had rows 3 to 5" in errors
    assert [row["row"] for row in read(tmp_path / "out")] == [0, 1, 2, 6, 7, 8]
