"""What the policy answers during a run: for people to read, and to see how far it has moved.

No second model is needed: what is compared with is what the policy itself answered, and how likely
it found that, before its first step. Those answers are kept in the run's folder.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.batching.layout import Layout, LayoutName
from preftune.batching.micro_batches import RowSizes
from preftune.config.experiment import ExperimentConfig
from preftune.data.table import TokenRows
from preftune.distributed.runtime import AUTOCAST, Runtime
from preftune.errors import ConfigError
from preftune.evaluation.generation import BATCH, answers, generating, stop_ids_of
from preftune.evaluation.samples import (
    AskedPrompt,
    pad_id_of,
    sample_row,
    sampled_answers,
)
from preftune.files import write_atomically
from preftune.model.load import LoadedModel
from preftune.recipes.pairs import Pairs, model_context
from preftune.recipes.score import answer_logps
from preftune.schema import Completion, TokenizedExample
from preftune.tracking.progress import ProgressDisplay, Update
from preftune.training.loop import GOES_ON
from preftune.training.memory import explain_lack_of_memory


@dataclass(frozen=True)
class Prompts:
    """Which prompts the policy answers in a run."""

    shown: Sequence[AskedPrompt]
    """For people."""
    drawn: dict[str, list[TokenizedExample]]
    """By label of the held-out set: for how far it has moved."""


def choose_prompts(config: ExperimentConfig, pairs: Pairs) -> Prompts | None:
    """Prompts of the held-out rows, evenly from all over each set; None where none is asked for.

    Raises:
        ConfigError: none leaves room for an answer.
    """
    if not config.generates:
        return None
    context, new = model_context(config), config.sample_max_new_tokens
    assert new is not None  # filled by the config
    longest = None if context is None else context - new
    sets = pairs.held_out or {"train": pairs.train}
    usable = {label: _usable(dataset.examples, longest) for label, dataset in sets.items()}
    if not all(map(len, usable.values())):
        raise ConfigError(
            f"sample_max_new_tokens is {new}, and behind no prompt of a set is there so much room "
            f"in the {context} tokens that the model takes; set it lower"
        )
    shown, drawn = [], {}
    if config.num_samples is not None:
        all_of = [(label, row) for label, rows in usable.items() for row in rows]
        shown = [
            AskedPrompt(sets[label].examples[int(row)], label or "held out")
            for label, row in _spread(all_of, config.num_samples)
        ]
    if config.eval_kl_samples is not None:
        drawn = {
            label: [sets[label].examples[int(r)] for r in _spread(rows, config.eval_kl_samples)]
            for label, rows in usable.items()
        }
    return Prompts(shown, drawn)


def _usable(examples: TokenRows, longest: int | None) -> list[int]:
    """Rows with different prompts of at most `longest` tokens, those with an answer to be learnt
    if there are any."""
    rows = np.flatnonzero(examples.roles != "rejected")
    rows = rows if len(rows) else np.arange(len(examples))
    if longest is not None:
        rows = rows[examples.lengths[rows, 0] <= longest]
    _, first = np.unique(examples.prompt_keys[rows], return_index=True)
    return rows[np.sort(first)].tolist()


def _spread(things: Sequence[Any], number: int) -> list[Any]:
    """So many of them, evenly from first to last; all if they are fewer."""
    places = np.linspace(0, len(things) - 1, min(number, len(things)))
    return [things[place] for place in places.round().astype(int)]


@dataclass(frozen=True)
class _Drawn:
    """Answers drawn from the policy before its first step, to the prompts of one held-out set."""

    rows: list[TokenizedExample]
    logps: np.ndarray
    """Log-probs under the policy as it was then, nats, fp64."""


class PolicyAnswers:
    """Lets the policy answer, and knows what it answered before its first step."""

    def __init__(
        self,
        config: ExperimentConfig,
        prompts: Prompts,
        loaded: LoadedModel,
        layout: LayoutName,
        tokenizer: PreTrainedTokenizerBase,
        stop_id: int | None,
        runtime: Runtime,
        display: ProgressDisplay,
    ) -> None:
        """Nothing is generated yet.

        Args:
            config: of the run.
            prompts: what to answer.
            loaded: the policy.
            layout: how rows go through it.
            tokenizer: of the policy.
            stop_id: the token that ends answers of a chat, besides those that the model's files
                name.
            runtime: the ranks; rank 0 generates, all of them score.
            display: says what is done.
        """
        self._config = config
        self._prompts = prompts
        self._loaded = loaded
        self._layout = Layout(layout, loaded.policy.limits)
        self._tokenizer = tokenizer
        own = set() if stop_id is None else {stop_id}
        self._stop_ids = stop_ids_of(loaded.policy.model) | own
        self._runtime = runtime
        self._display = display
        self._greedy: list[list[int]] = []
        self._drawn: dict[str, _Drawn] = {}
        self._key: dict[str, Any] = {}

    # ---------------------------------------------------------------- before the first step

    def begin(self, weights: str, kept: Sequence[Path]) -> None:
        """Answer as the policy that has not trained yet, unless that was kept.

        Args:
            weights: fingerprint of the policy, which is in its initial state.
            kept: files that may hold its answers.
        """
        self._key = self._identity(weights)
        document = self._runtime.decide(lambda: self._read(kept))
        if document is None:
            document = self._answer_at_start()
        self._greedy = document["greedy"]
        self._drawn = {
            label: _Drawn(self._with_answers(label, drawn["answers"]), np.array(drawn["logps"]))
            for label, drawn in document["drawn"].items()
        }

    def write(self, path: Path) -> None:
        """Keep the answers of the start."""
        drawn = {
            label: {
                "answers": [row.completions[0].ids for row in of.rows],
                "logps": of.logps.tolist(),
            }
            for label, of in self._drawn.items()
        }
        document = {"key": self._key, "greedy": self._greedy, "drawn": drawn}
        write_atomically(path, json.dumps(document) + "\n")

    def _identity(self, weights: str) -> dict[str, Any]:
        """What the answers of the start depend on."""
        asked = {
            "shown": [p.row.prompt_ids for p in self._prompts.shown],
            "drawn": {k: [r.prompt_ids for r in rows] for k, rows in self._prompts.drawn.items()},
        }
        config = self._config
        return {
            "weights": weights,
            "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            "max_new_tokens": config.sample_max_new_tokens,
            "kl_samples": config.eval_kl_samples,
            "stop_ids": sorted(self._stop_ids),
            "seed": config.seed,
            "precision": self._runtime.precision,
        }

    def _read(self, kept: Sequence[Path]) -> dict[str, Any] | None:
        for path in kept:
            try:
                document = json.loads(path.read_text("utf-8"))
                if document["key"] == self._key:
                    return document
            except (OSError, ValueError, LookupError, TypeError):
                continue  # what is lost or damaged is made again, to the same answers
        return None

    def _answer_at_start(self) -> dict[str, Any]:
        greedy = self._generate_shown()
        drawn = {}
        for label, rows in self._prompts.drawn.items():
            answered = self._runtime.decide(lambda rows=rows: self._draw(rows))
            whole = self._with_answers(label, answered)
            drawn[label] = {"answers": answered, "logps": self._logps(whole).tolist()}
        return {"greedy": greedy, "drawn": drawn}

    def _draw(self, prompts: Sequence[TokenizedExample]) -> list[tuple[int, ...]]:
        number, new = self._config.eval_kl_samples, self._config.sample_max_new_tokens
        assert number is not None
        assert new is not None
        with self._generating("draw answers", number) as (model, update):
            rows = sampled_answers(
                model,
                self._tokenizer,
                prompts,
                number,
                new,
                update,
                stop_ids=self._stop_ids,
            )
        return [row.completions[0].ids for row in rows]

    def _with_answers(
        self, label: str, answered: Sequence[Sequence[int]]
    ) -> list[TokenizedExample]:
        """The rows of a set's prompts with answers that `sampled_answers` gave, in its order."""
        prompts = self._prompts.drawn[label]
        places = sorted(number % len(prompts) for number in range(len(answered)))
        return [
            replace(prompts[place], completions=(Completion(tuple(ids)),), roles=("chosen",))
            for place, ids in zip(places, answered, strict=True)
        ]

    # ---------------------------------------------------------------- during training

    def sample(self, step: int) -> list[dict[str, Any]]:
        """The lines of samples.jsonl of a step, on every rank."""
        policy = self._generate_shown()

        def decode(ids: Sequence[int]) -> str:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

        rows = [
            sample_row(step, asked, start, now, self._stop_ids, decode)
            for asked, start, now in zip(self._prompts.shown, self._greedy, policy, strict=True)
        ]
        self._display.say(_summary(step, rows))
        return rows

    def kl(self, label: str) -> dict[str, float]:
        """How far the policy has moved from its start: KL(start ‖ policy), nats an answer.

        The mean of log p_start(y) − log p_policy(y) over answers y that were drawn from the start:
        unbiased for what is said up to `sample_max_new_tokens`.

        Args:
            label: of the held-out set whose prompts are answered.
        """
        drawn = self._drawn.get(label)
        if drawn is None:
            return {}
        far = drawn.logps - self._logps(drawn.rows)
        error = float(far.std(ddof=1) / len(far) ** 0.5)
        return {"kl/forward": float(far.mean()), "kl/forward_error": error}

    def _logps(self, rows: Sequence[TokenizedExample]) -> np.ndarray:
        # The module inside the engine's wrapper, whose forward may wait for other ranks.
        policy = self._loaded.policy
        was_training = policy.training
        policy.eval()
        try:
            sums = answer_logps(
                policy,
                rows,
                RowSizes.of(rows),
                self._layout,
                self._runtime.device,
                rows=self._config.eval_rows,
                max_tokens=self._config.max_tokens_per_microbatch,
                ranks=self._runtime,
            )
        finally:
            policy.train(was_training)
        return sums[:, 0]

    def _generate_shown(self) -> list[list[int]]:
        asked = self._prompts.shown
        new = self._config.sample_max_new_tokens
        assert new is not None
        if not asked:
            return []

        def generate() -> list[list[int]]:
            prompts = [prompt.row.prompt_ids for prompt in asked]
            with self._generating("sample", len(prompts)) as (model, update):
                pad_id = pad_id_of(self._tokenizer)
                return answers(model, prompts, new, self._stop_ids, pad_id, update=update)

        return self._runtime.decide(generate)

    @contextmanager
    def _generating(self, stage: str, number: int) -> Iterator[tuple[PreTrainedModel, Update]]:
        runtime, new = self._runtime, self._config.sample_max_new_tokens
        autocast = AUTOCAST[runtime.precision]
        with (
            generating(self._loaded, autocast=autocast, seed=self._config.seed) as model,
            self._display.stage(stage, number, "answer") as update,
            explain_lack_of_memory(
                "while the policy answers prompts",
                runtime.device,
                lambda: f"a batch of up to {BATCH} prompts with up to {new} new tokens each",
                lambda: ["a lower --sample_max_new_tokens"],
                then=GOES_ON,
            ),
        ):
            yield model, update


def _summary(step: int, rows: Sequence[dict[str, Any]]) -> str:
    def mean(name: str) -> float:
        return float(np.mean([row["num_tokens"][name] for row in rows]))

    flags = [flag for row in rows for flag in row["flags"]["policy"]]
    told = ", ".join(f"{flags.count(flag)} {flag}" for flag in dict.fromkeys(flags))
    return (
        f"samples after step {step}: {mean('policy'):.0f} tokens a greedy answer (at the start "
        f"{mean('start'):.0f}){f'; of {len(rows)}: {told}' if told else ''}"
    )
