"""Rows of a dataset of the Hugging Face Hub, pinned to a commit, from the network or the cache."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from preftune.data.sources.source import RawRow, Source
from preftune.errors import DataError

DATA_FILES = [
    "README.md",  # its header names the subsets and their files
    *(f"*.{kind}{packed}" for kind in ("jsonl", "json", "csv") for packed in ("", ".gz", ".zst")),
    "*.parquet",
    "*.arrow",
]
_NAME = re.compile(r"(?P<repo>[^:@]+)(:(?P<subset>[^:@]+))?(@(?P<revision>[^@]+))?")


@dataclass(frozen=True, slots=True)
class _HubName:
    """`org/name[:subset][@revision]`, taken apart."""

    text: str
    repo: str
    subset: str | None
    revision: str | None

    def error(self, problem: str, remedy: str) -> DataError:
        return DataError(f"dataset {self.text!r}: {problem}; {remedy}")


def hub_source(name: str, split: str) -> Source:
    """Fetch a dataset's files at one commit and open a split of it, memory-mapped.

    Without network (or with `HF_HUB_OFFLINE=1`) the last commit in the local cache is taken.

    Args:
        name: `org/name`, `org/name:subset`, `org/name@revision` or `org/name:subset@revision`;
            a revision is a branch, a tag or a commit.
        split: of the dataset.

    Raises:
        DataError: the dataset, its subset, revision or split is not there or cannot be read.
    """
    wanted = _parse(name)
    folder = _fetch(wanted)
    data = _open_split(wanted, folder, split)
    total = len(data)
    # The number of rows tells a snapshot that was only fetched in part from the whole one.
    identity = json.dumps([wanted.repo, wanted.subset, split, folder.name, total])
    return Source(
        name=name,
        split=split,
        revision=folder.name,
        fingerprint=xxhash.xxh3_128_hexdigest(identity.encode()),
        total=total,
        reader=partial(_rows, wanted.repo, data),
    )


def _rows(repo: str, data: Any) -> Iterator[RawRow]:
    for index, row in enumerate(data):
        yield f"{repo}[{index}]", dict(row)


def _parse(name: str) -> _HubName:
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"dataset {name!r}: no local file or folder has that name, and a Hub id is written "
            f"org/name[:subset][@revision]; correct the name"
        )
    return _HubName(name, match["repo"], match["subset"], match["revision"])


def _fetch(wanted: _HubName) -> Path:
    """The snapshot folder, which is named after its commit."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                wanted.repo,
                repo_type="dataset",
                revision=wanted.revision,
                allow_patterns=DATA_FILES,
            )
        )
    except errors.GatedRepoError as error:
        raise wanted.error(
            "the Hub gives it only to users who accepted its terms",
            f"accept them at https://huggingface.co/datasets/{wanted.repo} and log in with "
            f"`hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise wanted.error(
            f"no local file or folder has that name, and the Hub has no dataset {wanted.repo!r} "
            f"that you may read",
            "check the spelling, and log in with `hf auth login` if it is private",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise wanted.error(
            f"it has no revision {wanted.revision!r}", "give a branch, a tag or a whole commit id"
        ) from error
    except errors.HFValidationError as error:
        raise wanted.error(
            f"no local file or folder has that name, and it is no Hub id ({_first_line(error)})",
            "give a path that exists, or org/name[:subset][@revision]",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        offline = isinstance(cause, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else _first_line(cause)
        revision = "" if wanted.revision is None else f" at revision {wanted.revision!r}"
        raise wanted.error(
            f"no local file or folder has that name, the Hugging Face Hub is out of reach "
            f"({reason}), and its cache on this machine does not hold {wanted.repo!r}{revision} "
            f"complete",
            "give a path that exists, or run once with a network and without HF_HUB_OFFLINE",
        ) from error
    # Disks, proxies, servers: the user's next step is ours to say.
    except Exception as error:
        raise wanted.error(
            f"fetching it from the Hugging Face Hub failed ({type(error).__name__}: "
            f"{_first_line(error)})",
            "check the network, the disk and your rights, or give a path that exists",
        ) from error


def _open_split(wanted: _HubName, folder: Path, split: str) -> Any:
    import datasets

    # Its bars for reading local files would garble the one live view of a run.
    if not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
    try:
        _check_subset(wanted, str(folder))
        builder = datasets.load_dataset_builder(str(folder), name=wanted.subset)
        _check_split(wanted, split, [str(name) for name in builder.config.data_files or ()])
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except DataError:
        raise
    # Whatever goes wrong in there: a script instead of data, columns that differ, a full disk.
    except Exception as error:
        cause = error.__cause__ or error
        raise wanted.error(
            f"split {split!r} of commit {folder.name} cannot be loaded ({type(cause).__name__}: "
            f"{_first_line(cause)})",
            "check the dataset's files on the Hub, or give files of your own",
        ) from error


def _check_subset(wanted: _HubName, folder: str) -> None:
    import datasets

    subsets = datasets.get_dataset_config_names(folder)
    remedy = f"give one of {', '.join(f'{wanted.repo}:{subset}' for subset in subsets)}"
    if wanted.subset is None:
        if len(subsets) > 1 and datasets.get_dataset_default_config_name(folder) is None:
            raise wanted.error(f"it has {len(subsets)} subsets, none of them the default", remedy)
    elif wanted.subset not in subsets:
        raise wanted.error(f"it has no subset {wanted.subset!r}", remedy)


def _check_split(wanted: _HubName, split: str, splits: list[str]) -> None:
    # `train[:10%]` and `train+test` are splits to datasets, too.
    parts = [part.strip() for part in re.sub(r"\[[^\]]*\]|\([^)]*\)", "", split).split("+")]
    if unknown := [part for part in parts if part not in (*splits, "all")]:
        raise wanted.error(f"it has no split {unknown[0]!r}", f"choose one of {', '.join(splits)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
