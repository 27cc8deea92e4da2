"""Rows of files, streamed: .jsonl, .json, .parquet and .csv."""

import csv
import gzip
import io
import json
import re
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from preftune.data.sources.json_list import JsonListError, NotAListError, json_list
from preftune.data.sources.source import RawRow, Source
from preftune.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_COMPRESSED = (".jsonl.gz", ".json.gz")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading bytes raises; the last two where a .gz file is cut or damaged."""
_BLOCK = 1 << 20
_CSV_LIMIT_LOCK = threading.Lock()


def suffix_of(path: Path) -> str:
    """The kind of file by its name; a `.gz` is left out of the kinds that may be compressed."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz") if name.endswith(_COMPRESSED) else name).suffix


def file_source(name: str, path: Path, split: str) -> Source:
    """Read one file whole, whatever the split.

    Raises:
        DataError: not a regular file, of an unknown suffix, or unreadable.
    """
    if suffix_of(path) not in SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of file {path.suffix!r}; convert it to one of "
            f"{', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise DataError(f"{path}: not a regular file, which can be read again; save the rows first")
    return _source(name, split, [path])


def folder_source(name: str, folder: Path, split: str) -> Source:
    """Read the files of a folder that are named after the split, or all where none is.

    Raises:
        DataError: no such file, or one that is unreadable.
    """
    return _source(name, split, _files_of_folder(folder, split))


def _source(name: str, split: str, files: list[Path]) -> Source:
    return Source(
        name=name,
        split=split,
        revision=None,
        fingerprint=_fingerprint(files),
        total=_total(files),
        reader=partial(_rows_of_files, tuple(files)),
    )


def _fingerprint(files: list[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        size = 0
        digest.update(f"{path.name}\n".encode())  # row ids begin with it
        try:
            with path.open("rb", buffering=0) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            raise _unreadable(path, error) from error
        # The length keeps neighbours apart: a line moved to the next file is another content.
        digest.update(f"\n{size}\n".encode())
    return digest.hexdigest()


def _total(files: list[Path]) -> int | None:
    if any(suffix_of(path) != ".parquet" for path in files):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return sum(pq.read_metadata(path).num_rows for path in files)
    except pa.ArrowException:
        return None  # reading it will say what is wrong


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    files = sorted(
        f
        for f in folder.iterdir()
        if f.is_file() and suffix_of(f) in SUFFIXES and not f.name.startswith(".")
    )
    if not files:
        raise DataError(
            f"{folder}: no {', '.join(SUFFIXES)} file in this folder; name a folder that holds "
            f"some, or a file"
        )
    chosen = [f for f in files if _split_of(f) == split]
    if chosen:
        return chosen
    # A folder of train.jsonl and test.jsonl has no split "validation": reading both would train
    # and test on the same rows.
    others = sorted({_split_of(f) for f in files} & set(_SPLIT_NAMES))
    if others:
        raise DataError(
            f"{folder}: no file of split {split!r}, though there are files of "
            f"{', '.join(others)}; choose one of these splits, or name the file itself"
        )
    return files


def _split_of(path: Path) -> str:
    stem = path.stem
    if path.name.lower().endswith(_COMPRESSED):
        stem = Path(stem).stem
    return re.sub(r"-\d+-of-\d+$", "", stem)


def _rows_of_files(files: tuple[Path, ...]) -> Iterator[RawRow]:
    for path in files:
        empty = True
        try:
            for row in _rows_of_file(path):
                empty = False
                yield row
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error
        if empty:
            raise DataError(f"{path}: the file holds no rows; remove it, or name another")


def _rows_of_file(path: Path) -> Iterator[RawRow]:
    match suffix_of(path):
        case ".jsonl":
            return _jsonl_rows(path)
        case ".json":
            return _json_rows(path)
        case ".csv":
            return _csv_rows(path)
        case _:
            return _parquet_rows(path)


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    # Bytes split at \n only; text would also split at U+2028, which JSON strings may hold.
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, f"{path}:{number}", error, error.start) from None
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            # ValueError: not JSON, or a number of more digits than Python reads.
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON ({error}); correct or remove the line (each "
                    f"line of a .jsonl file is one JSON object)"
                ) from None
            yield f"{path.name}:{number}", _object(f"{path}:{number}", row)


def _json_rows(path: Path) -> Iterator[RawRow]:
    try:
        with _text(path) as file:
            for index, row in enumerate(json_list(file)):
                yield f"{path.name}[{index}]", _object(f"{path}[{index}]", row)
    except JsonListError as error:
        remedy = "correct the file"
        if str(error).startswith("Extra data"):
            remedy = "if each line is an object of its own, rename the file to .jsonl"
        raise DataError(f"{path}:{error.line}: not valid JSON ({error}); {remedy}") from None
    except NotAListError as error:
        raise DataError(
            f"{path}: holds {_json_kind(error.value)}, not a list of rows; write a list of "
            f"objects, or use .jsonl with one object a line"
        ) from None


def _csv_rows(path: Path) -> Iterator[RawRow]:
    with _text(path) as file:
        reader = csv.reader(file)
        header: list[str] | None = None
        start = 1
        while (cells := _next_cells(path, reader)) is not None:
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{number}: {len(cells)} cells, but the first line names {len(header)} "
                    f"columns ({', '.join(header)}); quote cells that hold commas or line breaks"
                )
            yield f"{path.name}:{number}", dict(zip(header, cells, strict=True))


def _next_cells(path: Path, reader: Any) -> list[str] | None:
    # Answers may be longer than csv's limit for one cell (128 KiB). The limit belongs to the whole
    # process, so it is raised only while one row is parsed, by one thread at a time.
    with _CSV_LIMIT_LOCK:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            return next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: not valid CSV ({error}); correct the file"
            ) from None
        finally:
            csv.field_size_limit(limit)


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.stat().st_size == 0:
        return
    index = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path.name}[{index}]", row
                    index += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not readable as Parquet past row {index} ({_first_line(error)}); write the "
            f"file anew"
        ) from None


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


@contextmanager
def _text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file as text without its BOM and with its own line ends."""
    with (
        _open(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
    ):
        try:
            yield text
        except UnicodeDecodeError as error:
            # The block that failed ends where the file stands.
            start = file.tell() - len(error.object) + error.start
            raise _not_utf8(path, str(path), error, start) from None


def _not_utf8(path: Path, where: str, error: UnicodeDecodeError, start: int) -> DataError:
    return DataError(
        f"{where}: not UTF-8 text (byte {error.object[error.start]:#04x} at {start}); save "
        f"{path.name} as UTF-8"
    )


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read ({reason}); check the file and its rights")


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {_json_kind(row)}, not a JSON object; write a row as "
            f'{{"prompt": …, "chosen": …, "rejected": …}}'
        )
    return row


def _json_kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(
        type(value), "a number or boolean"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
