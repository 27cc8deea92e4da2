"""One source tokenised once: shards on disk, shared by every run that reads the same content.

    <cache>/datasets/<key>/shard-00000.arrow …   2,048 raw rows each, kept and dropped ones
    <cache>/datasets/<key>/complete.json         written last

The key is a hash of everything that decides the tokens. A pass that was killed finds its finished
shards and goes on after them; memory does not grow with the source.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

from preftune.data.formats import check_column_map, parse_answers, parse_row
from preftune.data.formats.row import renamed
from preftune.data.hub_cache import HubCache
from preftune.data.reasons import Dropped, DropReason
from preftune.data.sources import RawRow, Source
from preftune.data.table import TokenizedRow, make_table
from preftune.data.tokenize import PairTokenizer
from preftune.data.transforms import RowTransforms
from preftune.errors import CacheError, DataError
from preftune.files import replacing, write_atomically
from preftune.schema import Example, RowKind, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_SHARD = 2048
ROWS_AT_A_TIME = 64
_COMPLETE = "complete.json"

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Tokenized:
    """A source, tokenised."""

    source: Source
    table: pa.Table
    """Every row read, of `data.table.SCHEMA`, mapped from disk."""
    num_read: int
    """Rows of the source, which has fewer than the table where pairs were taken apart."""
    reused: bool
    """Whether all of it was in the cache."""


@dataclass(frozen=True)
class Recipe:
    """How raw rows become tokens; everything here is part of the cache's key.

    Picklable, so that other processes can follow it.
    """

    tokenizer: "PreTrainedTokenizerBase"
    column_map: Mapping[str, str]
    transforms: RowTransforms
    kind: RowKind = "pairs"
    """What rows are read as; see `data.formats`."""

    def key(self, source: Source, max_rows: int | None) -> str:
        """Name of the folder that holds the tokens of `source`."""
        parts = {
            "source": source.fingerprint,
            "max_rows": max_rows,
            "columns": dict(self.column_map),
            "transforms": self.transforms.fingerprint,
            "kind": self.kind,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "code": _code_fingerprint(),
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())

    def parse(self, row_id: str, raw: dict[str, Any], dataset: str) -> list[Example | Dropped]:
        """A raw row, transformed where transforms are given, as text.

        One result, or two where a pair is taken apart; a row that a transform drops is one.

        Args:
            row_id: where the row stands, for people.
            raw: the columns as read; never modified.
            dataset: the dataset's name.

        Raises:
            DataError: a column is missing or of the wrong type, or a transform failed.
        """
        if not self.transforms.names:
            return self._parsed(row_id, raw, dataset, self.column_map)
        row = self.transforms(row_id, dataset, renamed(row_id, raw, dataset, self.column_map))
        if isinstance(row, Dropped):
            return [row]
        return self._parsed(row_id, row, dataset, {})

    def _parsed(
        self, row_id: str, raw: dict[str, Any], dataset: str, column_map: Mapping[str, str]
    ) -> list[Example | Dropped]:
        if self.kind == "labelled":
            return parse_answers(row_id, raw, dataset=dataset, column_map=column_map)
        kind = self.kind
        return [parse_row(row_id, raw, dataset=dataset, column_map=column_map, kind=kind)]


def tokenize_source(
    source: Source,
    recipe: Recipe,
    *,
    cache: Path | None,
    hub: HubCache | None = None,
    max_rows: int | None = None,
    num_proc: int = 1,
    progress: Progress | None = None,
) -> Tokenized:
    """Tokenise a source, or map what an earlier run has tokenised.

    Args:
        source: where rows come from.
        recipe: how they become tokens.
        cache: folder of tokenised sources; None keeps nothing.
        hub: where else to look for them, and to put what is made.
        max_rows: read no more rows than this; None for all.
        num_proc: processes that work at it.
        progress: called now and then with (rows done, rows in all or None).

    Raises:
        DataError: the source or a row of it cannot be read.
        CacheError: the cache cannot be written or read.
    """
    check_column_map(dict(recipe.column_map))
    if cache is None:
        # Mapped files live on without their names, so nothing is left behind.
        folder = Path(tempfile.mkdtemp(prefix="preftune-"))
        try:
            return _in_folder(folder, source, recipe, max_rows, num_proc, progress)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    folder = cache / recipe.key(source, max_rows)
    missing = hub is not None and not (folder / _COMPLETE).is_file() and not hub.fetch(folder)
    tokenized = _in_folder(folder, source, recipe, max_rows, num_proc, progress)
    if hub is not None and missing:
        hub.push(folder)
    return tokenized


def _in_folder(
    folder: Path,
    source: Source,
    recipe: Recipe,
    max_rows: int | None,
    num_proc: int,
    progress: Progress | None,
) -> Tokenized:
    reused = (folder / _COMPLETE).is_file()
    if not reused:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fill(folder, source, recipe, max_rows, num_proc, progress)
        except OSError as error:
            raise CacheError(
                f"cache_dir: {folder} cannot be written ({error.strerror or error}); free some "
                "space, or give another --cache_dir. Finished shards stay, and the next run goes "
                "on after them"
            ) from error
    complete = json.loads((folder / _COMPLETE).read_text("utf-8"))
    shards = [_map(_shard(folder, index)) for index in range(complete["num_shards"])]
    table = pa.concat_tables(shards) if shards else make_table([], source.name)
    return Tokenized(source, table, complete["num_rows"], reused)


def _fill(
    folder: Path,
    source: Source,
    recipe: Recipe,
    max_rows: int | None,
    num_proc: int,
    progress: Progress | None,
) -> None:
    """Write the shards that are missing, then say that all are there."""
    total = source.total
    if total is not None and max_rows is not None:
        total = min(total, max_rows)
    num_shards = num_done = 0

    def jobs() -> Iterator["_Job"]:
        nonlocal num_shards
        rows = islice(source.rows(), max_rows)
        while shard := list(islice(rows, ROWS_PER_SHARD)):
            yield _Job(_shard(folder, num_shards), source.name, shard)
            num_shards += 1

    def report(num_rows: int) -> None:
        nonlocal num_done
        num_done += num_rows
        if progress is not None:
            progress(num_done, total)

    work = _work_alone if num_proc == 1 else _work_together
    work(jobs(), recipe, num_proc, report)
    note = {"num_shards": num_shards, "num_rows": num_done}
    write_atomically(folder / _COMPLETE, json.dumps(note, indent=1))


@dataclass(frozen=True)
class _Job:
    path: Path
    dataset: str
    rows: list[RawRow]


def _work_alone(
    jobs: Iterator[_Job], recipe: Recipe, num_proc: int, report: Callable[[int], None]
) -> None:
    worker = _Worker(recipe)
    for job in jobs:
        if job.path.exists():
            report(len(job.rows))
        else:
            worker(job, report)


def _work_together(
    jobs: Iterator[_Job], recipe: Recipe, num_proc: int, report: Callable[[int], None]
) -> None:
    # Fresh processes: forking one in which the tokenizer's threads have run may lock up.
    pool = ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, (recipe,))
    pending: set[Future[int]] = set()
    try:
        for job in jobs:
            if job.path.exists():
                report(len(job.rows))
                continue
            pending.add(pool.submit(_work, job))
            if len(pending) > 2 * num_proc:  # or the rows of a large file would queue in memory
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    report(future.result())
        for future in pending:
            report(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """Follows a recipe, shard by shard."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._encode = PairTokenizer(recipe.tokenizer)

    def __call__(self, job: _Job, report: Callable[[int], None]) -> None:
        rows: list[TokenizedRow] = []
        for start in range(0, len(job.rows), ROWS_AT_A_TIME):
            some = job.rows[start : start + ROWS_AT_A_TIME]
            rows += self._tokenize(some, job.dataset)
            report(len(some))
        with (
            replacing(job.path) as temporary,
            pa.OSFile(str(temporary), "wb") as file,
            pa.ipc.new_file(file, (table := make_table(rows, job.dataset)).schema) as writer,
        ):
            writer.write_table(table)

    def _tokenize(self, rows: list[RawRow], dataset: str) -> Iterator[TokenizedRow]:
        parsed = [self._recipe.parse(row_id, raw, dataset) for row_id, raw in rows]
        examples = [row for answers in parsed for row in answers if isinstance(row, Example)]
        try:
            encoded = iter(self._encode(examples))
        except DataError as error:
            raise DataError(f"dataset {dataset}: {error}") from error
        for answers in parsed:
            results = [next(encoded) if isinstance(row, Example) else row for row in answers]
            for row, result in zip(answers, _without_equal(results), strict=True):
                is_text = isinstance(row, Example) and isinstance(row.prompt, str)
                yield TokenizedRow(result, is_text)


def _without_equal(
    results: list[TokenizedExample | Dropped],
) -> list[TokenizedExample | Dropped]:
    """What one raw row gave; two answers with the same tokens are dropped, as in a pair."""
    kept = [row for row in results if isinstance(row, TokenizedExample)]
    if len(kept) == 2 and len({row.prompt_ids + row.completions[0].ids for row in kept}) == 1:
        return [Dropped(row.row_id, DropReason.EQUAL_COMPLETIONS) for row in kept]
    return results


_worker: _Worker | None = None


def _start_worker(recipe: Recipe) -> None:
    global _worker
    _worker = _Worker(recipe)


def _work(job: _Job) -> int:
    assert _worker is not None  # the pool starts each process with _start_worker
    _worker(job, lambda num_rows: None)
    return len(job.rows)


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05}.arrow"


def _map(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise CacheError(
            f"{path}: tokenised rows that cannot be read ({error}); delete the folder "
            f"{path.parent}, and they are made again"
        ) from error


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of what decides a tokenizer's ids, its chat template among it, and of its library."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    parts = [
        type(tokenizer).__name__,
        rules,
        repr(tokenizer.chat_template),
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(sorted((i, str(t)) for i, t in tokenizer.added_tokens_decoder.items())),
        repr([getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]),
        transformers.__version__,
        tokenizers.__version__,
    ]
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


@cache
def _code_fingerprint() -> str:
    """Hash of the code that makes tokens: an upgrade tokenises anew rather than mixes."""
    digest = xxhash.xxh3_128()
    home = Path(__file__).parent
    for path in sorted(home.rglob("*.py")):
        if "inspection" not in path.relative_to(home).parts:  # it only looks at tokens
            digest.update(path.read_bytes())
    return digest.hexdigest()
