"""`preftune data inspect`: everything about the data of a run that can be seen without a model."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.config.inspection import InspectConfig
from preftune.config.paths import cache_root
from preftune.data.inspection.numbers import Answers, overlap, read_answers
from preftune.data.inspection.page import report_page
from preftune.data.inspection.proving import count_proofs, rows_to_prove
from preftune.data.inspection.report import (
    DatasetReport,
    DroppedRow,
    Report,
    Table,
    cost_table,
    count_table,
    dropped_table,
    number_tables,
    overlap_table,
    proof_table,
    tokenised,
    truncation_costs,
)
from preftune.data.inspection.shown import ShownRow, show_row
from preftune.data.pairs import PairDataset
from preftune.data.reasons import ASKED_FOR, MEANING, Dropped, DropReason
from preftune.data.table import TokenRows, apply_limits, dropped_rows, read_row
from preftune.data.tokenized import Recipe
from preftune.data.transforms import load_transforms
from preftune.data.truncate import truncate
from preftune.errors import ConfigError, ModelError
from preftune.files import write_atomically
from preftune.recipes.pairs import (
    Pairs,
    check_fits_model,
    prepare_tokenizer,
    read_experiment_pairs,
)
from preftune.tracking.progress import ProgressDisplay
from preftune.training.run_folder import check_writable

MOST_PROVED = 20_000
"""Of larger datasets, this many rows are proved, drawn by the seed."""


def inspect_data(config: InspectConfig) -> Report:
    """Read the pairs of a run as `train` would, and find out all that shows without weights.

    Where training would refuse the data, the report says so, and what else there is to see.

    Args:
        config: of the run, and what to show.

    Returns:
        The report; its page and the list of dropped rows are written where the config asks.

    Raises:
        PreftuneError: data or tokenizer cannot be read, or no row is left to look at.
    """
    _check_outputs(config)
    check_writable("cache_dir", cache_root(config.cache_dir))
    display = ProgressDisplay(config.progress)
    tokenizer = prepare_tokenizer(config)
    lenient = copy.copy(config)
    lenient.max_dropped_fraction = 1.0  # too many dropped rows are to be looked at, too
    pairs = read_experiment_pairs(lenient, tokenizer, display)
    report = _Inspection(config, tokenizer, pairs, display).report()
    if config.html is not None:
        _write(config.html, report_page(report))
    if config.dropped is not None:
        rows = (row for dataset in report.datasets for row in dataset.dropped)
        _write(config.dropped, "".join(map(_as_json, rows)))
    return report


class _Inspection:
    """One look at the data of a run."""

    def __init__(
        self,
        config: InspectConfig,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Pairs,
        display: ProgressDisplay,
    ) -> None:
        self._config = config
        self._display = display
        self._tokenizer = tokenizer
        transforms = load_transforms(config.dataset_transforms or ())
        columns = dict(config.column_map or {})
        self._recipe = Recipe(tokenizer, columns, transforms, config.row_kind)
        self._pairs = pairs
        self._titles = {
            label: f"held out as {label}" if label else "held out" for label in pairs.held_out
        }
        self._shown = self._rows_to_show()

    def report(self) -> Report:
        pairs, config = self._pairs, self._config
        train_answers = read_answers(pairs.train.examples.table)
        reports = [self._dataset("training", pairs.train, train_answers)]
        overlaps = []
        for label, dataset in pairs.held_out.items():
            split_off = config.test_size is not None
            answers = train_answers if split_off else read_answers(dataset.examples.table)
            reports.append(self._dataset(self._titles[label], dataset, answers))
            found = overlap(
                pairs.train.examples,
                train_answers.take(pairs.train.examples.positions),
                dataset.examples,
                answers.take(dataset.examples.positions),
            )
            left_out = np.isin(pairs.shared.prompt_keys, dataset.examples.prompt_keys).sum()
            num_answers = len(dataset.examples) * dataset.examples.num_answers
            overlaps.append((self._titles[label], num_answers, found, int(left_out)))
        return Report(
            facts=tuple(self._facts()),
            datasets=tuple(reports),
            overlap=overlap_table(overlaps) if overlaps else None,
            warnings=tuple(self._warnings(reports)),
            is_whole=config.row is not None,
        )

    # ---- one dataset

    def _dataset(self, title: str, dataset: PairDataset, answers: Answers) -> DatasetReport:
        examples = dataset.examples
        dropped = list(self._dropped(dataset))
        tables: list[Table | None] = [
            count_table(dataset),
            self._proofs(title, dataset),
            *number_tables(dataset, answers),
        ]
        if dataset.sources:  # else it was split off training data, whose table tells of both
            costs = truncation_costs(tokenised(answers), examples.limits)
            tables.append(cost_table(costs, examples.limits))
        tables.append(dropped_table(dropped))
        return DatasetReport(
            title=title[0].upper() + title[1:],
            name=dataset.name,
            num_rows=len(examples),
            unit=dataset.unit,
            shown=tuple(self._shown[title]),
            tables=tuple(table for table in tables if table is not None),
            dropped=tuple(dropped),
        )

    def _proofs(self, title: str, dataset: PairDataset) -> Table:
        rows = rows_to_prove(len(dataset.examples), MOST_PROVED, self._config.seed)
        with self._display.stage(f"prove {title}", len(rows), "row") as update:
            counts = count_proofs(dataset, rows, self._recipe, update)
        return proof_table(counts)

    def _dropped(self, dataset: PairDataset) -> Iterator[DroppedRow]:
        """Every row that is dropped, source after source; then those whose prompt is held out."""
        examples = dataset.examples
        if not dataset.sources:
            return
        for table, name in _tables(examples):
            over = apply_limits(table, name, examples.limits)[1]
            for row in (*dropped_rows(table), *over):
                yield DroppedRow(name, row.row_id, row.reason.value, row.detail)
        if dataset is self._pairs.train:
            shared = self._pairs.shared
            for index in range(len(shared)):
                name = shared.names[shared.origins[index]]
                reason = DropReason.PROMPT_HELD_OUT.value
                yield DroppedRow(name, shared.row_id(index), reason, "")

    # ---- rows to show

    def _rows_to_show(self) -> dict[str, list[ShownRow]]:
        """Title of a dataset -> its rows to show."""
        datasets = {"training": self._pairs.train}
        datasets |= {self._titles[label]: held for label, held in self._pairs.held_out.items()}
        if self._config.row is None:
            return {
                title: [self._show(dataset.examples, index) for index in self._some(dataset)]
                for title, dataset in datasets.items()
            }
        wanted = self._config.row
        shown = {
            title: [
                self._show(dataset.examples, int(index))
                for index in np.flatnonzero(
                    np.isin(dataset.examples.positions, _find(dataset.examples, wanted))
                )
            ]
            for title, dataset in datasets.items()
        }
        if not any(shown.values()):
            for title, dataset in datasets.items():
                if dataset.sources:
                    shown[title] = list(self._untrained(dataset.examples, wanted))
        if not any(shown.values()):
            first = self._pairs.train.examples.row_id(0)
            raise ConfigError(
                f"row is {wanted!r}, and no row that was read has this id; ids look like {first!r}"
            )
        return shown

    def _some(self, dataset: PairDataset) -> list[int]:
        """Rows spread over a dataset, one that is cut among them if there is any."""
        examples, wanted = dataset.examples, self._config.num_rows
        rows = np.unique(np.linspace(0, len(examples) - 1, wanted).astype(int))
        cut = np.flatnonzero(examples.is_cut)
        if wanted and len(cut) and not examples.is_cut[rows].any():
            rows[-1] = cut[0]
        return sorted(rows.tolist())

    def _show(self, examples: TokenRows, index: int) -> ShownRow:
        whole = examples.whole(index)
        return show_row(self._decode, whole, examples[index], examples.limits, "")

    def _untrained(self, examples: TokenRows, row_id: str) -> Iterator[ShownRow]:
        """A row that was read and is not in any dataset, with the reason."""
        for position in _find(examples, row_id):
            origin = int(np.searchsorted(examples.starts, position, side="right")) - 1
            name, table = examples.names[origin], examples.table
            found = table.column("row_id")[position].as_py()
            if (reason := table.column("reason")[position].as_py()) is not None:
                detail = table.column("detail")[position].as_py()
                note = _note(Dropped(found, DropReason(reason), detail))
                yield ShownRow(found, name, note, ())
                continue
            whole = read_row(table, position, name)
            result = truncate(whole, examples.limits)
            if isinstance(result, Dropped):
                note = _note(result)
            elif position in self._pairs.shared.positions and examples is self._train_rows:
                note = _note(Dropped(found, DropReason.PROMPT_HELD_OUT))
            else:
                note = "Not trained on: the amount of its source in the mix leaves it out."
            yield show_row(self._decode, whole, None, examples.limits, note)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    @property
    def _train_rows(self) -> TokenRows:
        return self._pairs.train.examples

    # ---- what decided the tokens, and what is wrong

    def _facts(self) -> Iterator[tuple[str, str]]:
        config = self._config
        yield "model", str(config.model_name_or_path)
        if config.tokenizer_name_or_path is not None:
            yield "tokenizer", config.tokenizer_name_or_path
        yield "chat template", config.chat_template or "the tokenizer's own"
        if config.dataset_transforms:
            yield "transforms", ", ".join(config.dataset_transforms)
        limits = self._train_rows.limits
        lengths = [f"max_length {limits.max_length or 'none'}"]
        if limits.max_prompt_length is not None:
            lengths.append(f"max_prompt_length {limits.max_prompt_length}")
        yield "limits", ", ".join([*lengths, f"truncation {limits.truncation}"])

    def _warnings(self, reports: Sequence[DatasetReport]) -> Iterator[str]:
        allowed = self._config.max_dropped_fraction
        for dataset in (self._pairs.train, *self._pairs.held_out.values()):
            for source in dataset.sources:
                dropped = source.counts.dropped.items()
                faulty = sum(n for reason, n in dropped if DropReason(reason) not in ASKED_FOR)
                if faulty / source.counts.read > allowed:
                    yield (
                        f"training would stop: {faulty} of {source.counts.read} rows of "
                        f"{source.name} cannot be trained on, and max_dropped_fraction allows "
                        f"{allowed:g}"
                    )
            try:
                check_fits_model(self._config, dataset)
            except (ConfigError, ModelError) as error:
                yield f"training would stop: {error}"
        for report in reports:
            for table in report.tables:
                for name, _, failing, ids, _ in table.rows if table.title == "Proofs" else ():
                    if failing != "0" and name != "verbatim":
                        yield f"{report.title}: the {name} proof fails for {failing} rows ({ids})"


def _tables(examples: TokenRows) -> Iterator[tuple[pyarrow.Table, str]]:
    ends = [*examples.starts[1:].tolist(), len(examples.table)]
    for start, end, name in zip(examples.starts.tolist(), ends, examples.names, strict=True):
        yield examples.table.slice(start, end - start), name


def _find(examples: TokenRows, row_id: str) -> list[int]:
    """Where rows with an id stand in the table: two sources may have files of one name.

    The id of a pair that was taken apart is that of both its answers.
    """
    ids = pyarrow.array([row_id, *(f"{row_id} ({role})" for role in ("chosen", "rejected"))])
    found = pyarrow.compute.is_in(examples.table.column("row_id"), ids)  # pyright: ignore
    return np.flatnonzero(found.to_numpy()).tolist()


def _note(dropped: Dropped) -> str:
    detail = f" ({dropped.detail})" if dropped.detail else ""
    return f"Not trained on: {dropped.reason.value}: {MEANING[dropped.reason]}{detail}."


def _check_outputs(config: InspectConfig) -> None:
    problems = []
    for key, value in (("html", config.html), ("dropped", config.dropped)):
        if value is None:
            continue
        path = Path(value).expanduser()
        if path.exists():
            problems.append(f"{key} is {value!r}, which exists; give another name")
        check_writable(key, path.parent)
    if problems:
        raise ConfigError(problems)


def _write(name: str, text: str) -> None:
    path = Path(name).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _as_json(row: DroppedRow) -> str:
    values = {"row_id": row.row_id, "reason": row.reason, "detail": row.detail}
    return json.dumps(values | {"source": row.source}, ensure_ascii=False) + "\n"
