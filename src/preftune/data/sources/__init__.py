"""Where rows come from: a file, a folder of files, or a dataset of the Hugging Face Hub.

Files are streamed and never changed. Each row comes with an id that a person can find it by.
"""

from pathlib import Path

from preftune.data.sources.files import SUFFIXES, file_source, folder_source, suffix_of
from preftune.data.sources.hub import hub_source
from preftune.data.sources.source import RawRow, Source
from preftune.errors import DataError

__all__ = ["RawRow", "Source", "open_source"]


def open_source(name: str, split: str) -> Source:
    """Find a dataset by path or by Hub id, and identify its content; reads no row.

    Args:
        name: a file, a folder of files, or a Hub id `org/name[:subset][@revision]`; a path that
            exists wins over an id.
        split: of a folder, the files of that name (`train.jsonl`, `train-00000-of-00002.parquet`),
            or all files where none is named after a split; of a Hub dataset, its split. A single
            file is read whole.

    Returns:
        The source. Ids of its rows are `file:line` for jsonl and csv, `file[index]` from 0
        otherwise.

    Raises:
        DataError: nothing of that name, an unknown suffix, or a Hub dataset that cannot be loaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return folder_source(name, path, split)
    if path.exists():
        return file_source(name, path, split)
    if name.startswith(("/", "./", "../", "~")) or suffix_of(path) in SUFFIXES:
        raise DataError(
            f"{path}: no such file or folder; correct the path (relative paths start from "
            f"{Path.cwd()})"
        )
    return hub_source(name, split)
