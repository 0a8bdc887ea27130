"""Output folders: whole or not at all, locked, recorded, and with a remedy for write errors."""

import errno
import os
import shutil
from pathlib import Path

import psutil
import pytest

from ov_pixart import storage
from ov_pixart.storage import (
    check_disk,
    check_output,
    explain_write_errors,
    find_damage,
    fingerprint,
    locked,
    read_record,
    remove_leftovers,
    staged,
    write_json,
    write_record,
)
from tests.support.folders import flip_a_bit
from tests.support.refused import refused


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


# ---- staged -------------------------------------------------------------------------------------


def test_a_staged_folder_replaces_the_old_one_as_a_whole(tmp_path):
    output = tmp_path / "deep" / "component"
    for names in ("ab", "bc"):
        with staged(output) as folder:
            for name in names:
                (folder / name).write_text(names)
    assert content(output) == {"b": "bc", "c": "bc"}
    assert list(output.parent.iterdir()) == [output]


def test_an_error_leaves_the_old_folder(tmp_path):
    output = tmp_path / "component"
    output.mkdir()
    (output / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), staged(output) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert content(output) == {"a": "old"}
    assert list(tmp_path.iterdir()) == [output]


def test_all_is_flushed_before_it_is_in_place(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(storage, "flush", lambda path: flushed.append((path.name, output.exists())))
    output = tmp_path / "component"
    with staged(output) as folder:
        (folder / "a").write_text("a")
    assert flushed == [("a", False), ("component", False), (tmp_path.name, True)]


def test_leftovers_of_dead_processes_are_removed_and_others_kept(tmp_path):
    dead = max(psutil.pids()) + 100_000
    for owner in (dead, os.getpid(), "x"):
        (tmp_path / f".partial-{owner}-folder" / "model").mkdir(parents=True)
        (tmp_path / f".partial-{owner}-file").touch()
    remove_leftovers(tmp_path)
    owners = {path.name.split("-")[1] for path in tmp_path.iterdir()}
    assert owners == {str(os.getpid()), "x"}


def test_json_is_whole_or_not_written(tmp_path):
    file = tmp_path / "a.json"
    write_json({"ä": 1}, file)
    assert "ä" in file.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json({"a": object()}, file)
    assert "ä" in file.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [file]


def test_a_lock_is_released_by_an_error(tmp_path):
    output = tmp_path / "new"
    for _ in range(2):
        with pytest.raises(ValueError, match="inside"), locked(output):
            raise ValueError("inside")


# ---- records ------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path) -> Path:
    """A folder with a file and its record."""
    (tmp_path / "model.bin").write_bytes(bytes(1000))
    write_record({"weight_format": "fp16"}, tmp_path / "conversion.json")
    return tmp_path


def test_a_record_names_size_and_hash_of_every_file(recorded):
    record = read_record(recorded / "conversion.json")
    assert record["weight_format"] == "fp16"
    assert record["files"].keys() == {"model.bin"}
    assert record["files"]["model.bin"]["size"] == 1000
    assert find_damage(recorded, record, hashed=True) is None


def test_sizes_show_cut_files_and_hashes_changed_ones(recorded):
    record, file = read_record(recorded / "conversion.json"), recorded / "model.bin"
    flip_a_bit(file)
    assert find_damage(recorded, record) is None
    assert find_damage(recorded, record, hashed=True) == file
    file.write_bytes(bytes(999))
    assert find_damage(recorded, record) == file
    file.unlink()
    assert find_damage(recorded, record) == file


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"files": {"a": {}}}', '{"files": 1}'])
def test_what_is_no_record_counts_as_none(tmp_path, text):
    if text is not None:
        (tmp_path / "conversion.json").write_text(text)
    assert read_record(tmp_path / "conversion.json") == {}


def test_a_fingerprint_changes_with_size_and_time(tmp_path):
    file = tmp_path / "a"
    file.write_text("a")
    os.utime(file, ns=(0, 1))
    first = fingerprint([file])
    assert first == {"a": [1, 1]}
    os.utime(file, ns=(0, 2))
    assert fingerprint([file]) != first


# ---- refuse -------------------------------------------------------------------------------------


def test_a_full_disk_is_explained_and_other_errors_are_not(tmp_path):
    inside, elsewhere = str(tmp_path / "out" / "a"), "/somewhere/else"
    with (
        refused(OSError, "output_dir=", "No space left", "make room"),
        explain_write_errors(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), inside)
    for error in (
        OSError(errno.ENOSPC, "full", elsewhere),
        OSError(errno.ENOENT, "missing", inside),
    ):
        with pytest.raises(OSError) as caught, explain_write_errors(tmp_path / "out"):
            raise error
        assert caught.value is error


def test_too_small_a_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (10**12, 0, 10**9))
    check_disk(10**9, tmp_path / "not" / "yet")
    with refused(OSError, "output_dir=", "2.0 GB", "1.0 GB are free"):
        check_disk(2 * 10**9, tmp_path / "not" / "yet")


def test_an_output_over_its_source_is_refused(tmp_path):
    check_output(tmp_path / "b", [tmp_path / "a"], ["vae"])
    with refused(ValueError, "is the source folder"):
        check_output(tmp_path / "a", [tmp_path / "a"], ["vae"])
    with refused(ValueError, "lies in the source folder"):
        check_output(tmp_path / "a", [tmp_path / "a" / "vae"], ["vae"])
    (tmp_path / "file").touch()
    with refused(ValueError, "is a file"):
        check_output(tmp_path / "file", [], [])
