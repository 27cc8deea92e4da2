"""What a complete checkpoint holds: its files with sizes and checksums, in `manifest.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from preftune.errors import CheckpointError
from preftune.training.checkpoint_values import check_values
from preftune.training.tensor_files import Damaged, FileSum, read_bytes

VERSION = 3
MANIFEST = "manifest.json"
STATE = "state.json"


def write_manifest(folder: Path, files: Mapping[str, FileSum]) -> None:
    """Write the list of a checkpoint's files, the last of them."""
    body = {
        "version": VERSION,
        "files": {
            name: {"size": file.size, "xxh3_128": file.digest} for name, file in files.items()
        },
    }
    text = json.dumps(body | {"xxh3_128": _digest(body)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def checked_files(folder: Path) -> dict[str, FileSum]:
    """The files of a checkpoint, whose names and sizes are right; contents are not read.

    Raises:
        CheckpointError: one is absent, additional or of another size, the list is damaged, or
            another version of preftune wrote it.
    """
    try:
        files = _read_manifest(folder)
        found = {path.name: path for path in folder.iterdir() if path.name != MANIFEST}
        for name, expected in files.items():
            if name not in found:
                raise Damaged(f"{name} is absent")
            size = found[name].stat().st_size
            if size != expected.size or not found[name].is_file():
                raise Damaged(f"{name} has {size} bytes, and {expected.size} were written")
        for name in sorted(found.keys() - files.keys()):
            raise Damaged(f"{name} does not belong there")
    except (OSError, Damaged) as error:
        raise damaged(folder, error) from error
    return files


def read_document(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, as far as can be told without reading its
            tensors, or another version of preftune wrote it.
    """
    files = checked_files(folder)
    try:
        document = json.loads(read_bytes(folder / STATE, files[STATE]))
        check_values(document)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, Damaged) as error:
        raise damaged(folder, error) from error
    return document


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error of a checkpoint that cannot be used."""
    said = error if isinstance(error, OSError | Damaged) else f"{STATE}: {error!r}"
    return CheckpointError(
        f"the checkpoint {folder} is damaged: {said}; delete that folder to go on from the one "
        "before it"
    )


def _read_manifest(folder: Path) -> dict[str, FileSum]:
    path = folder / MANIFEST
    if not path.is_file():
        _refuse_format(folder, _old_version(folder))
        raise Damaged(f"{MANIFEST} is absent")
    try:
        document = json.loads(path.read_bytes())
        digest = document.pop("xxh3_128")
        if digest != _digest(document):
            raise Damaged(f"{MANIFEST} has other content than was written (its checksum)")
        _refuse_format(folder, document["version"])
        return {
            name: FileSum(file["size"], file["xxh3_128"])
            for name, file in document["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error!r})") from error


def _old_version(folder: Path) -> Any:
    """The format of a checkpoint from before there was a manifest; ours if it is none."""
    try:
        return json.loads((folder / STATE).read_bytes())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return VERSION


def _refuse_format(folder: Path, version: Any) -> None:
    if version != VERSION:
        raise CheckpointError(
            f"the checkpoint {folder} has format {version!r}, and this preftune reads {VERSION}: "
            "go on with the version of preftune that wrote it (run.json names it), or give a new "
            "--output_dir"
        )


def _digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
