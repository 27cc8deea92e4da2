"""Held-out rows in a run: who evaluates them, in which forwards, and what else is measured."""

from collections.abc import Callable
from typing import Any

import numpy as np

from preftune.batching.batcher import RowBatcher
from preftune.batching.micro_batches import largest, sorted_batches
from preftune.evaluation.held_out import MOST_SOURCES, evaluate_pairs, rows_by_source
from preftune.objective import Objective
from preftune.recipes.run import Run
from preftune.tracking.progress import counting
from preftune.training.loop import GOES_ON
from preftune.training.memory import explain_lack_of_memory, rows_and_tokens, scoring_remedies
from preftune.training.step import TrainState


def evaluator(
    run: Run,
    state: TrainState,
    objective: Objective[Any],
    held_out: dict[str, RowBatcher],
) -> Callable[[], dict[str, dict[str, float]]] | None:
    """What evaluates the held-out rows, by label; None without them.

    Args:
        run: whose rows they are.
        state: of the training; evaluation leaves it as it is.
        objective: of the training.
        held_out: the rows by label, with their reference values.
    """
    if not held_out:
        return None
    sources = {label: _sources_of(run, label) for label in held_out}
    batches = {
        label: sorted_batches(
            run.pairs.held_out[label].examples.sizes,
            run.layout.name,
            rows=run.config.eval_rows,
            max_tokens=run.config.max_tokens_per_microbatch,
        )
        for label in held_out
    }

    def evaluate(label: str, batcher: RowBatcher) -> dict[str, float]:
        stage = f"evaluate {label}".rstrip()
        sizes = run.pairs.held_out[label].examples.sizes

        def heaviest() -> tuple[int, int]:
            return largest(batches[label], sizes, run.layout.name)

        with (
            run.display.stage(stage, len(batcher.examples), "pair") as update,
            explain_lack_of_memory(
                "in evaluation",
                run.runtime.device,
                lambda: f"the heaviest micro-batch ({rows_and_tokens(*heaviest())})",
                lambda: scoring_remedies(*heaviest()),
                then=GOES_ON,
            ),
        ):
            metrics = evaluate_pairs(
                state.model,
                objective,
                batcher,
                batches[label],
                run.runtime,
                by_source=sources[label],
                running=state.running,
                progress=counting(update),
            )
        return metrics | ({} if run.answers is None else run.answers.kl(label))

    return lambda: {label: evaluate(label, batcher) for label, batcher in held_out.items()}


def _sources_of(run: Run, label: str) -> dict[str, np.ndarray]:
    """The rows of a held-out set by what they came from; empty where all are of one source."""
    names = run.pairs.held_out[label].examples.sources
    if (number := len(set(names))) > MOST_SOURCES:
        run.display.say(
            f"the held-out {run.pairs.train.unit} {label} are of {number} sources: the "
            f"{MOST_SOURCES} largest have metrics of their own"
        )
    return rows_by_source(names)
