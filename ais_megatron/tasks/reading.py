"""Reads rows from JSONL, CSV, parquet and arrow files, and from folders of such files or of Hugging Face ``datasets``.

Every row knows its file and line, for error messages.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl", ".csv", ".parquet", ".arrow")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Row:
    """One row of a data set."""

    where: str
    """"file:line", or "file:row" counted from 1 in parquet and arrow files."""
    values: Mapping[str, object]
    """The values by column name."""

    @property
    def columns(self) -> str:
        """The names of the columns, for messages."""
        return ", ".join(str(name) for name in self.values) or "none"

    def text(self, column: str) -> str:
        """The column as non-empty text. Otherwise a ValueError names file, line, column and what was found."""
        if column not in self.values:
            raise ValueError(f"{self.where}: column {column!r} is missing; columns found: {self.columns}")
        value = self.values[column]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: column {column!r} must be text, got {value!r}")
        return value


def read_rows(path: str | Path, split: str) -> list[Row]:
    """All rows of a file, or of the files in a folder that belong to `split` ("train" or "test").

    Raises:
        ValueError: the file is missing, of an unknown kind, or has no rows; a line is not a JSON object; or a parquet or arrow file
            is read without the `datasets` extra.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"task.{split}_path={path}: no such file or folder")
    files = _files_of_folder(path, split) if path.is_dir() else [path]
    rows = [row for file in files for row in _read_file(file, split)]
    if not rows:
        raise ValueError(f"task.{split}_path={path}: the data set is empty")
    return rows


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder of `save_to_disk` (one split, or a folder per split), or in a folder of plain files, whose names
    may contain the split."""
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            raise ValueError(f"task.{split}_path={folder}: this data set has no {split!r} split; give the folder of one split")
        folder = folder / split
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / entry["filename"] for entry in state["_data_files"]]
    by_suffix = {suffix: sorted(folder.rglob(f"*{suffix}")) for suffix in SUFFIXES}
    files = next((found for found in by_suffix.values() if found), [])
    if not files:
        raise ValueError(f"task.{split}_path={folder}: the folder has no file that matches {', '.join('*' + s for s in SUFFIXES)}")
    # For example "train.jsonl", "train-00000-of-00002.parquet", "main/test.jsonl". Named splits must not be read together.
    named = {name: [file for file in files if _names_split(file.relative_to(folder), name)] for name in SPLITS}
    if named[split] or not any(named.values()):
        return named[split] or files
    raise ValueError(f"task.{split}_path={folder}: no file in this folder is named after the {split!r} split; give a file instead")


def _names_split(file: Path, split: str) -> bool:
    return any(part == split or part.startswith((f"{split}.", f"{split}-", f"{split}_")) for part in file.parts)


def _read_file(path: Path, split: str) -> Iterator[Row]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_columns, ".arrow": _read_columns}
    if path.suffix not in readers:
        raise ValueError(f"task.{split}_path={path}: unknown kind of file {path.suffix!r}; allowed: {', '.join(SUFFIXES)}, or a folder")
    return readers[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Lines are split only at b"\n". str.splitlines would also split at U+2028, which occurs in GSM8K's texts.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(values).__name__}")
        yield Row(where, values)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for values in reader:
                yield Row(f"{path}:{reader.line_num}", values)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: not valid CSV ({error})") from error


def _read_columns(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: reading {path.suffix} files needs pyarrow; run pip install 'ais_megatron[datasets]', or give a .jsonl file"
        ) from error
    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            with pyarrow.memory_map(str(path)) as source:  # `datasets` writes arrow files in the streaming format
                table = pyarrow.ipc.open_stream(source).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a valid {path.suffix} file ({error})") from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(f"{path}:{number}", values)
