"""What `preftune score` writes: scores of every pair, the summary, and lists of pairs."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.config.score import ScoreConfig
from preftune.data.table import TokenRows
from preftune.errors import ConfigError, Findings
from preftune.evaluation.lists import SortedPairs
from preftune.evaluation.scores import Comparison, PairScores, ScoreSummary
from preftune.files import replacing, write_atomically
from preftune.training.run_folder import check_writable

_EXCERPT = 200
"""Characters of a text in a list."""


def check_outputs(config: ScoreConfig) -> None:
    """Refuse files that exist, or cannot be written.

    Args:
        config: names them.

    Raises:
        PreftuneError: with every such file.
    """
    findings = Findings()
    for key, name in (
        ("output", config.output),
        ("summary", config.summary),
        ("lists", config.lists),
    ):
        with findings:
            if name:
                check_writable(key, Path(name).expanduser().parent)
            if name and Path(name).expanduser().exists():
                raise ConfigError(f"{key} is {name!r}, which exists; give another name")
    findings.raise_all()


def write_scores(
    path: Path,
    examples: TokenRows,
    scores: Mapping[str, PairScores],
    rewards: Mapping[Comparison, PairScores],
    config: ScoreConfig,
) -> None:
    """One parquet row a pair, in the order of the dataset.

    Of one model, with one reference or none, columns are `logps_chosen`, `reference_logps_chosen`
    and `reward_chosen`; of several, `LABEL/logps_chosen` and `LABEL/reward_chosen`, with several
    references `LABEL/reward_chosen/REFERENCE`.

    Args:
        path: of the file.
        examples: the pairs.
        scores: log-probs by model and reference.
        rewards: implicit rewards.
        config: says which are models.
    """
    columns: dict[str, Any] = {
        "row_id": examples.row_ids,
        "source": examples.sources,
        "num_tokens_chosen": examples.num_scored[:, 0],
        "num_tokens_rejected": examples.num_scored[:, 1],
    }
    is_one = len(config.model_labels) == 1 and len(config.reference_labels) <= 1
    for label, held in scores.items():
        prefix = f"{label}/"
        if is_one:
            prefix = "" if label in config.model_labels else "reference_"
        columns |= {f"{prefix}logps_chosen": held.chosen, f"{prefix}logps_rejected": held.rejected}
    for pair, held in rewards.items():
        prefix = "" if is_one else f"{pair.model}/"
        suffix = "" if len(config.reference_labels) == 1 else f"/{pair.reference}"
        columns[f"{prefix}reward_chosen{suffix}"] = held.chosen
        columns[f"{prefix}reward_rejected{suffix}"] = held.rejected
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def write_summary(path: Path, summary: ScoreSummary) -> None:
    """The summary as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n")


def listed_rows(
    examples: TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    found: SortedPairs,
    margins: Mapping[str, np.ndarray],
    most: int,
) -> list[dict[str, Any]]:
    """The first pairs of each list, with what they say.

    Args:
        examples: the pairs.
        tokenizer: theirs.
        found: the rows of the lists.
        margins: of rewards, by what ranks.
        most: pairs of a list.
    """

    def text(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    rows = []
    for name, members in found.rows.items():
        for place, index in enumerate(map(int, members[:most]), start=1):
            example = examples[index]
            chosen, rejected = example.completions
            rows.append(
                {
                    "list": name,
                    "rank": place,
                    "row_id": example.row_id,
                    "source": example.source,
                    "confidence": float(found.confidence[index]),
                    "margins": {label: float(held[index]) for label, held in margins.items()},
                    "num_tokens_chosen": chosen.num_scored,
                    "num_tokens_rejected": rejected.num_scored,
                    # Prompts begin alike, with what the system says: their ends tell them apart.
                    "prompt_end": text(example.prompt_ids)[-_EXCERPT:],
                    "chosen": text(chosen.ids)[:_EXCERPT],
                    "rejected": text(rejected.ids)[:_EXCERPT],
                }
            )
    return rows


def write_lists(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
