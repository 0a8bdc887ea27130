"""Captions in, shards of images out: reading a table of rows, and writing it so that it resumes.

Row i belongs to shard i // shard_size, whatever generates it. A shard is finished when its file
has its final name, so that a run may be killed at any time: the next one goes on with the rest.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ov_pixart.checkpoint import COMPONENTS
from ov_pixart.checks import check, nearest_name, read_json, shortened
from ov_pixart.storage import RECORDS, read_record, remove_leftovers, staged_file, write_json

# What a row may set; each is an argument of the pipeline's call, except the seed.
COLUMNS = {
    "prompt": pa.string(),
    "negative_prompt": pa.string(),
    "seed": pa.int64(),
    "height": pa.int64(),
    "width": pa.int64(),
    "num_inference_steps": pa.int64(),
    "guidance_scale": pa.float64(),
    "guidance_start": pa.float64(),
    "guidance_end": pa.float64(),
}
PLAN = "plan.json"
_PNG = "png"  # the folder of PNG files


# ---- captions -----------------------------------------------------------------------------------


def read_captions(
    source: str | Path, *, column: str | None = None, split: str = "train"
) -> pa.Table:
    """Read a table of rows: csv, json lines, parquet, or a Hugging Face data set.

    `column` holds the prompts, by default `prompt` or `caption`. Returns the columns `row`, which
    counts from 0, and those of COLUMNS that the source has; `seed` is there always, and by default
    the row's number. Other columns are left out, with a warning: `row` finds them again. Files are
    parsed as data, and no code of a data set is run.

    Raises FileNotFoundError for a missing file or data set, ValueError for a file that cannot be
    read, a column that looks like a misspelt one, or values of the wrong type.
    """
    file = Path(source)
    if file.suffix not in _READERS:
        rule = f"one of {', '.join(_READERS)}"
        check(not file.exists(), "captions", str(source), f"a file of a known kind: {rule}")
        table = _read_hub(str(source), split, column)
    elif not file.is_file():
        raise FileNotFoundError(f"captions={str(file)!r} is not there: check the path.")
    else:
        try:
            table = _READERS[file.suffix](file, column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
            reason = shortened(str(error), 200)
            raise ValueError(f"captions={str(file)!r} cannot be read: {reason}") from None
    return _complete(table, column, str(source))


def _read_csv(file: Path, column: str | None) -> pa.Table:
    # of numbers, the types are found: beside an empty cell, pandas writes 512 as 512.0
    texts = [name for name, kind in COLUMNS.items() if kind == pa.string()]
    options = pa.csv.ConvertOptions(
        column_types=dict.fromkeys((*texts, column or "caption"), pa.string()),
        null_values=[""],  # and no word that a caption may be
        strings_can_be_null=True,
    )
    # a caption may have several lines
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    return pa.csv.read_csv(file, convert_options=options, parse_options=parse)


def _read_json(file: Path, column: str | None) -> pa.Table:
    return pa.json.read_json(file)


def _read_parquet(file: Path, column: str | None) -> pa.Table:
    # images beside the captions may take gigabytes
    chosen = _choose(pa.parquet.read_schema(file).names, column, str(file))
    return pa.parquet.read_table(file, columns=list(chosen.values()))


def _read_hub(name: str, split: str, column: str | None) -> pa.Table:
    import datasets
    import httpx

    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, RuntimeError, ValueError, httpx.HTTPError) as error:
        reason = shortened(str(error), 200)
        raise FileNotFoundError(
            f"captions={name!r} is no file here and cannot be fetched from Hugging Face: check its "
            f"name and the connection ({reason})."
        ) from error
    chosen = _choose(rows.column_names, column, name)
    return rows.select_columns(list(chosen.values())).with_format("arrow")[:]


_READERS: dict[str, Callable[[Path, str | None], pa.Table]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def _choose(names: list[str], column: str | None, source: str) -> dict[str, str]:
    """The source's column for each of COLUMNS that it has; warns of columns that are left out.

    Raises ValueError where none holds prompts, or one would be left out because of a typing error.
    """
    prompts = column or next((name for name in ("prompt", "caption") if name in names), "prompt")
    rule = f"a column of captions: {source!r} has {', '.join(map(repr, names))}"
    check(prompts in names, "column", prompts, rule)
    chosen = {**{name: name for name in COLUMNS if name in names}, "prompt": prompts}
    left_out = [name for name in names if name not in chosen.values()]
    for name in left_out:
        meant = nearest_name(name, COLUMNS, 0.8)
        if meant and meant not in names:
            raise ValueError(
                f"column {name!r} is unknown (nearest: {meant!r}): rename it, or leave it out."
            )
    if left_out:
        warnings.warn(f"{source!r}: columns {', '.join(left_out)} are left out.", stacklevel=5)
    return chosen


def _complete(table: pa.Table, column: str | None, source: str) -> pa.Table:
    """Prompts, seeds and what else a row may set, in the types of COLUMNS."""
    chosen = _choose(table.column_names, column, source)
    count = pa.array(range(len(table)), pa.int64())
    columns: dict[str, Any] = {"row": count, "prompt": None, "seed": count}
    for name in (name for name in COLUMNS if name in chosen):
        try:
            columns[name] = table[chosen[name]].cast(COLUMNS[name]).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = shortened(str(error), 120)
            rule = f"column {chosen[name]!r} has to be of {COLUMNS[name]}"
            raise ValueError(f"{rule}: {reason}") from None
    columns["seed"] = pa.compute.coalesce(columns["seed"], count)
    return pa.table(columns)


# ---- shards -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """The output folder: `images-00000.parquet` and so on, and `plan.json`, which fixes the rest.

    With `png`, images are files in `png/00000/`, and the shard's file is their index.
    """

    folder: Path
    shard_size: int
    png: bool = False

    def file(self, shard: int) -> Path:
        return self.folder / f"images-{shard:05d}.parquet"

    def tables(self, rows: pa.Table) -> Iterator[pa.Table]:
        """The rows of each shard that is not finished."""
        for start in range(0, len(rows), self.shard_size):
            if not self.file(start // self.shard_size).exists():
                yield rows.slice(start, self.shard_size).combine_chunks()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows of one shard, each with its `image`, bytes of a PNG file, or None."""
        shard = rows[0]["row"] // self.shard_size
        written = []
        for row in rows:
            image, name = row["image"], None
            if image and self.png:
                name = f"{_PNG}/{shard:05d}/{row['row']:09d}.png"
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                with staged_file(self.folder / name) as partial:
                    partial.write_bytes(image)
            picture = image and {"bytes": image, "path": None}
            written.append({**row, "image": picture, "file_name": name})
        with staged_file(self.file(shard)) as partial:
            table = pa.Table.from_pylist(written, schema=_schema(self.png))
            pa.parquet.write_table(table, partial)

    def failed(self, shard: int) -> int:
        """How many rows of a finished shard have an error instead of an image."""
        errors = pa.parquet.read_table(self.file(shard), columns=["error"])["error"]
        return sum(map(bool, errors.to_pylist()))

    def begun(self) -> dict[str, Any]:
        """The plan of the shards that are there, `{}` without any."""
        file = self.folder / PLAN
        return read_json(file) if file.exists() and self._has_shards() else {}

    def _has_shards(self) -> bool:
        return any(self.folder.glob("images-*.parquet"))

    def prepare(self, plan: dict[str, Any], rows: int, *, retry_failed: bool) -> None:
        """Write the plan, or compare it with the one there; the folder is locked by the caller.

        Raises ValueError where the folder was begun with another plan.
        """
        file = self.folder / PLAN
        remove_leftovers(self.folder)
        if self._has_shards():
            rule = f"an empty folder, or one with a {PLAN}"
            check(file.exists(), "output_dir", str(self.folder), rule)
        else:
            write_json(plan, file)
        begun = self.begun() or plan
        for name in {**plan, **begun}:
            if begun.get(name) != plan.get(name):
                shown = f" ({shortened(str(begun.get(name)), 40)})" if name != "captions" else ""
                raise ValueError(
                    f"output_dir={str(self.folder)!r} was begun with other {name}{shown}: "
                    "name another folder, or call as before to go on."
                )
        for shard in range(-(-rows // self.shard_size) if retry_failed else 0):
            if self.file(shard).exists() and self.failed(shard):
                self.file(shard).unlink()


def _schema(png: bool) -> pa.Schema:
    """A shard's columns, with what the `datasets` library needs to know to decode images."""
    import datasets  # takes a second, and only those who write need it

    text = datasets.Value("string")
    settings = datasets.Features.from_arrow_schema(pa.schema({"row": pa.int64(), **COLUMNS}))
    image = {"file_name": text} if png else {"image": datasets.Image()}
    return datasets.Features({**settings, **image, "error": text}).arrow_schema


def make_plan(
    rows: pa.Table, ov_dir: Path, settings: dict[str, Any], shards: Shards
) -> dict[str, Any]:
    """What must stay the same when a run is resumed: rows, model, settings, layout.

    The model counts by its files' sizes and records, not by its path: each machine may have a copy.
    A scheduler counts by its settings.
    """
    files = [file for name in COMPONENTS for file in (ov_dir / name).glob("openvino_model.*")]
    files = sorted([*files, *(ov_dir / "tokenizer").glob("*")])
    scheduler = read_json(ov_dir / "scheduler" / "scheduler_config.json")
    records = [
        read_record(ov_dir / name / record).get("files")
        for name in COMPONENTS
        for record in RECORDS
    ]
    sizes = {str(file.relative_to(ov_dir)): file.stat().st_size for file in files}
    return {
        "rows": len(rows),
        "captions": _digest(rows.to_pydict()),
        "model": _digest([sizes, records, scheduler]),
        **settings,
        "shard_size": shards.shard_size,
        "png": shards.png,
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
