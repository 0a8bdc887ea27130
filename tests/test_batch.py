"""From captions to images: every row once, with its own image, whatever happens on the way."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from ov_pixart import batch
from ov_pixart.batch import GenerateImages, generate_many
from ov_pixart.shards import COLUMNS, read_captions
from pixart_tiny import many_pictures
from tests.support.batch_stub import FAILS, load_stub
from tests.support.fake_pipeline import fake_folder
from tests.support.parity import SMALL
from tests.support.refused import refused

ROOT = Path(__file__).parents[1]
STUB = {"load": load_stub, "release_text_encoder": False, "progress": False}


@pytest.fixture
def ov_dir(tmp_path) -> Path:
    return fake_folder(tmp_path / "ov")


@pytest.fixture
def captions(tmp_path):
    """`captions(rows)`: a csv file of dictionaries."""

    def write(rows: list[dict]) -> Path:
        file = tmp_path / "captions.csv"
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return file

    return write


def numbered(count: int, **others) -> list[dict]:
    return [{"prompt": f"picture {i}", "seed": 7 * i, **others} for i in range(count)]


def read(folder: Path) -> list[dict]:
    """All rows of an output folder, in the order of its shards."""
    files = sorted(folder.glob("images-*.parquet"))
    return pa.concat_tables(map(pa.parquet.read_table, files)).to_pylist()


def assert_each_row_once(folder: Path, rows: list[dict]) -> None:
    written = read(folder)
    assert [row["row"] for row in written] == list(range(len(rows)))
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert all(row["image"]["bytes"] for row in written if not row["error"])
    assert not list(folder.rglob(".partial-*"))


# ---- captions -----------------------------------------------------------------------------------


def test_captions_come_from_csv_json_lines_and_parquet(captions, tmp_path):
    rows = [
        {"caption": "0042", "width": "512", "id": "a"},
        {"caption": "two\nlines", "width": "", "id": "b"},
    ]
    with pytest.warns(UserWarning, match="columns id are left out"):
        table = read_captions(captions(rows))
    assert table.column_names == ["row", "prompt", "seed", "width"]
    assert table["prompt"].to_pylist() == ["0042", "two\nlines"]
    assert table["width"].to_pylist() == [512, None]
    assert table["seed"].to_pylist() == table["row"].to_pylist() == [0, 1]
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.warns(UserWarning, match="columns row are left out"):
        assert read_captions(tmp_path / "rows.parquet") == table
    lines = [json.dumps(row) for row in table.drop(["row"]).to_pylist()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert read_captions(tmp_path / "rows.jsonl") == table


def test_a_column_may_have_any_name(captions):
    with pytest.warns(UserWarning, match="columns prompt are left out"):
        table = read_captions(captions([{"text": "7", "prompt": "other"}]), column="text")
    assert table["prompt"].to_pylist() == ["7"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "seeds": 1}], "seeds.*nearest: 'seed'"),
        ([{"prompt": "a", "height": "tall"}], "height|tall"),
        ([{"text": "a"}], "column='prompt'.*'text'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(captions, rows, words):
    with pytest.raises(ValueError, match=words):
        read_captions(captions(rows))


def test_a_missing_file_and_another_kind_are_refused(tmp_path):
    with refused(FileNotFoundError, "captions=", "check the path"):
        read_captions(tmp_path / "none.csv")
    (tmp_path / "rows.pkl").write_bytes(b"")
    with refused(ValueError, "captions=", ".parquet"):
        read_captions(tmp_path / "rows.pkl")


# ---- the callable class -------------------------------------------------------------------------


def test_it_works_in_a_data_set_of_the_datasets_library(ov_dir):
    """Also where only the last batch has an error: column types come from the first."""
    rows = [*numbered(4, label="kept"), {"prompt": FAILS, "seed": 1, "label": "kept"}]
    generate = GenerateImages(ov_dir, load=load_stub, release_text_encoder=False)
    data = datasets.Dataset.from_list(rows)
    done = data.map(generate, batched=True, batch_size=2, load_from_cache_file=False)
    assert done["label"] == ["kept"] * 5
    assert done["num_inference_steps"] == [20] * 5
    assert done["error"] == [""] * 4 + ["RuntimeError: the device is on fire"]
    assert len(set(done["image"][:4])) == 4
    assert Image.open(io.BytesIO(done["image"][0])).size == (16, 16)


def test_numbers_that_numpy_made_of_missing_ones_are_understood(ov_dir):
    generate = GenerateImages(ov_dir, load=load_stub, release_text_encoder=False)
    columns = {"prompt": np.array(["a", "b"]), "seed": np.array([3, 4])}
    done = generate({**columns, "height": np.array([512.0, np.nan])})
    assert done["height"] == [512, 256]
    assert done["error"] == ["", ""]


def test_an_image_depends_on_its_own_row_only(converted, ov_dir):
    """With the real pipeline: alone, in a batch, and as a plain call."""
    size = {"height": SMALL["height"], "width": SMALL["width"], "num_inference_steps": 2}
    rows = [{"prompt": "a red circle", "seed": seed, **size} for seed in (5, 6)]
    generate = GenerateImages(converted("alpha"), threads=1)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    together = generate(columns)
    assert together["error"] == ["", ""]
    assert [generate.generate(row)["image"] for row in rows[::-1]] == together["image"][::-1]
    assert together["image"][0] != together["image"][1]


def test_a_row_that_fails_has_its_error_and_the_others_their_image(ov_dir, captions, tmp_path):
    rows = numbered(5)
    rows[2]["prompt"] = FAILS
    result = generate_many(captions(rows), tmp_path / "out", ov_dir, shard_size=2, **STUB)
    assert (result.rows, result.failed, result.generated) == (5, 1, 5)
    written = read(tmp_path / "out")
    assert written[2]["error"] == "RuntimeError: the device is on fire"
    assert written[2]["image"] is None
    assert_each_row_once(tmp_path / "out", rows)


def test_rows_without_prompt_or_with_a_bad_value_fail_alone(converted, captions, tmp_path):
    call = {"num_inference_steps": 1}
    rows = [{"prompt": "a", "height": 63, "guidance_scale": 1}] * 2
    file = captions(rows)
    result = generate_many(
        file, tmp_path / "out", converted("alpha"), call=call, threads=1, progress=False
    )
    assert result.failed == 2
    assert "ValueError: " in read(tmp_path / "out")[0]["error"]


# ---- resuming -----------------------------------------------------------------------------------


def test_finished_shards_are_kept_and_half_written_ones_are_not(ov_dir, captions, tmp_path):
    rows, out = numbered(9), tmp_path / "out"
    generate_many(captions(rows), out, ov_dir, shard_size=3, **STUB)
    before = read(out)
    (out / "images-00001.parquet").unlink()
    (out / ".partial-999999999-images-00001.parquet").write_bytes(b"half")
    kept = (out / "images-00000.parquet").stat().st_mtime_ns
    result = generate_many(captions(rows), out, ov_dir, shard_size=3, **STUB)
    assert result.generated == 3
    assert (out / "images-00000.parquet").stat().st_mtime_ns == kept
    assert read(out) == before
    assert_each_row_once(out, rows)


def test_nothing_is_loaded_where_nothing_is_left(ov_dir, captions, tmp_path):
    rows = captions(numbered(2))
    generate_many(rows, tmp_path / "out", ov_dir, **STUB)
    result = generate_many(rows, tmp_path / "out", ov_dir, **{**STUB, "load": None})
    assert (result.rows, result.generated) == (2, 0)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"call": {"num_inference_steps": 3}}, "num_inference_steps (20)"),
        ({"threads": 64}, "threads"),
        ({"shard_size": 4}, "shard_size"),
        ({"png": True}, "png"),
        ({"captions": True}, "captions"),
        ({"model": True}, "model"),
        ({"scheduler": True}, "model"),
    ],
)
def test_a_folder_begun_otherwise_is_refused(ov_dir, captions, tmp_path, changed, name):
    generate_many(captions(numbered(3)), tmp_path / "out", ov_dir, **STUB)
    rows = numbered(3)
    if changed.pop("captions", False):
        rows[1]["prompt"] = "another"
    if changed.pop("model", False):
        (ov_dir / "transformer" / "openvino_model.xml").write_text("other")
    if changed.pop("scheduler", False):
        file = ov_dir / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "solver_order": 3}))
    with refused(ValueError, "output_dir=", f"begun with other {name}"):
        generate_many(captions(rows), tmp_path / "out", ov_dir, **STUB, **changed)


def test_a_folder_without_images_is_begun_anew(ov_dir, captions, tmp_path):
    """As after a first call that could not start its actors."""
    file, out = captions(numbered(3)), tmp_path / "out"

    def load(folder, **options):
        raise MemoryError("too small")

    with pytest.raises(MemoryError):
        generate_many(file, out, ov_dir, threads=1, **{**STUB, "load": load})
    assert generate_many(file, out, ov_dir, threads=2, **STUB).generated == 3


def test_what_cannot_be_written_ends_the_run_with_its_reason(
    ov_dir, captions, tmp_path, monkeypatch
):
    def write(shards, rows):
        raise TypeError("no such type")

    monkeypatch.setattr(batch.Shards, "write", write)
    with refused(OSError, "TypeError", "no such type"):
        generate_many(captions(numbered(3)), tmp_path / "out", ov_dir, **STUB)


def test_an_actor_that_does_not_see_the_output_folder_says_so(ov_dir, tmp_path):
    shards = batch.Shards(tmp_path / "elsewhere", 4)
    with refused(FileNotFoundError, "output_dir=", "all machines have to see the same one"):
        batch.WriteShards(shards, ov_dir, load=load_stub)


def test_shapes_that_were_saved_with_the_pipeline_are_used(ov_dir):
    class Fixed(list):
        static_arguments: ClassVar = {"height": 768, "width": 512, "images": 1}

    def load(folder, **options):
        return Fixed()

    made = GenerateImages(ov_dir, load=load, release_text_encoder=False)
    assert (made.settings["height"], made.settings["width"]) == (768, 512)
    asked = GenerateImages(ov_dir, load=load, release_text_encoder=False, call={"height": 256})
    assert (asked.settings["height"], asked.settings["width"]) == (256, 512)


def test_failed_shards_are_generated_again_on_request(ov_dir, captions, tmp_path, monkeypatch):
    rows = numbered(4)
    rows[3]["prompt"] = FAILS
    file, out = captions(rows), tmp_path / "out"
    generate_many(file, out, ov_dir, shard_size=2, **STUB)
    monkeypatch.setattr("tests.support.batch_stub.FAILS", "")
    result = generate_many(file, out, ov_dir, shard_size=2, retry_failed=True, **STUB)
    assert (result.generated, result.failed) == (2, 0)


# ---- what is written ----------------------------------------------------------------------------


def test_empty_cells_are_missing_and_whole_numbers_may_have_a_point(ov_dir, captions, tmp_path):
    """As pandas writes them."""
    rows = [
        {"prompt": "a cat", "negative_prompt": "", "height": "512.0", "seed": "3"},
        {"prompt": "NA", "negative_prompt": "blurry", "height": "", "seed": ""},
        {"prompt": "", "negative_prompt": "", "height": "", "seed": ""},
    ]
    call = {"negative_prompt": "ugly", "height": 256}
    result = generate_many(captions(rows), tmp_path / "out", ov_dir, call=call, **STUB)
    first, second, third = read(tmp_path / "out")
    assert result.failed == 1 and "prompt=None" in third["error"]
    assert (first["negative_prompt"], first["height"], first["seed"]) == ("ugly", 512, 3)
    assert (second["prompt"], second["negative_prompt"], second["height"]) == ("NA", "blurry", 256)


def test_the_datasets_library_sees_images(ov_dir, captions, tmp_path):
    generate_many(captions(numbered(3)), tmp_path / "out", ov_dir, shard_size=2, **STUB)
    files = sorted(map(str, (tmp_path / "out").glob("*.parquet")))
    rows = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    assert rows[2]["image"].size == (16, 16)
    assert rows.column_names == ["row", *COLUMNS, "image", "error"]


def test_png_files_are_named_after_row_numbers(ov_dir, captions, tmp_path):
    rows = [{"prompt": "../../etc/passwd", "seed": 1}, {"prompt": FAILS, "seed": 1}]
    out = tmp_path / "out"
    generate_many(captions(rows), out, ov_dir, png=True, **STUB)
    assert [row["file_name"] for row in read(out)] == ["png/00000/000000000.png", None]
    assert [str(file.relative_to(out)) for file in out.rglob("*.png")] == [
        "png/00000/000000000.png"
    ]
    assert Image.open(out / "png/00000/000000000.png").size == (16, 16)


# ---- command and arguments ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"actors": 0}, "actors"),
        ({"threads": -1}, "threads"),
        ({"shard_size": 0}, "shard_size"),
        ({"address": "auto"}, "address"),
        ({"call": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"call": {"height": "512"}}, "height"),
        ({"call": {"guidance_scale": "high"}}, "guidance_scale"),
        ({"call": {"guidance_start": 2}}, "guidance_start"),
        ({"call": {"negative_prompt": ["ugly"]}}, "negative_prompt"),
    ],
)
def test_arguments_that_do_not_work_are_refused(ov_dir, captions, tmp_path, options, name):
    with refused(ValueError, f"{name}="):
        generate_many(captions(numbered(1)), tmp_path / "out", ov_dir, **STUB, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_reports_failed_rows(ov_dir, captions, tmp_path, monkeypatch, capsys):
    rows = numbered(3)
    rows[0]["prompt"] = FAILS
    seen = {}

    def spy(captions, output_dir, ov_dir, **options):
        seen.update(options)
        return generate_many(captions, output_dir, ov_dir, **{**options, **STUB})

    monkeypatch.setattr(batch, "generate_many", spy)
    monkeypatch.setattr(batch, "check_openvino_folder", lambda folder: None)
    arguments = [str(captions(rows)), str(tmp_path / "out"), "--ov-dir", str(ov_dir)]
    assert batch.main([*arguments, "--steps", "3"]) == 1
    assert "3 rows (1 failed): 3 generated now" in capsys.readouterr().out
    assert seen["call"] == {"num_inference_steps": 3}
    assert batch.main([*arguments, "--steps", "4"]) == 2
    assert "begun with other num_inference_steps (3)" in capsys.readouterr().err


@pytest.mark.slow
def test_importing_the_module_imports_no_ray():
    code = "import sys, ov_pixart.batch; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_ten_thousand_rows_take_no_more_memory_than_two_thousand(ov_dir, captions, tmp_path):
    """The plumbing, with a stub in place of the model. `pytest -s` shows its throughput."""
    process = psutil.Process()
    file = captions(numbered(10_000))
    (tmp_path / "few.csv").write_text("".join(file.open().readlines()[:2001]))
    generate_many(tmp_path / "few.csv", tmp_path / "few", ov_dir, **STUB)
    before = process.memory_info().rss
    result = generate_many(file, tmp_path / "out", ov_dir, **STUB)
    grown = (process.memory_info().rss - before) / 1e6
    print(f"{result.generated / result.seconds:.0f} rows a second, {grown:.0f} MB more")
    assert grown < 64
    assert [row["row"] for row in read(tmp_path / "out")] == list(range(10_000))


@pytest.mark.slow
def test_the_measuring_command_prints_a_table(converted, capsys):
    """A plain loop, which has nothing beside it."""
    options = ["--count", "15", "--rounds", "1", "--versions", "1", "--steps", "200"]
    many_pictures.main([str(converted("alpha")), *options, "--height", "64", "--width", "64"])
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[0] == "| plain loop" and row[-1] == "0.0 |"
    pace, start, memory = (float(cell.split()[0]) for cell in row[1:4])
    assert pace > 1 and start > 0 and memory > 0.1
