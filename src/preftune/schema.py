"""The two shapes of a training row: as text, and as token ids.

`data.formats` turns raw rows into `Example`; `data.tokenize` turns those into `TokenizedExample`,
which everything below reads. Both hold one prompt with k >= 1 completions: one for SFT and
unpaired losses, two for pairs (chosen first), more for ranked answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["chosen", "rejected", "answer", "mismatched"]
"""What an answer is to its prompt. An unpaired row's answer is chosen or rejected, and one for
supervised fine-tuning just an answer; mismatched is one that was given to another prompt, of which
nothing is learnt."""
RowKind: TypeAlias = Literal["pairs", "labelled", "supervised"]
"""What a raw row is read as: a pair; each answer by itself, labelled chosen or rejected; or what is
to be learnt as it stands."""
Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]
"""Plain text, continued as it stands, or chat messages, rendered by the chat template."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its completions as text or messages, before tokenising."""

    row_id: str
    """Where the row stands, for people: `train.jsonl:7` (line) or `name[6]` (index)."""
    prompt: Text
    completions: tuple[Text, ...]
    roles: tuple[Role, ...]
    source: str
    """Which dataset or subset the row came from."""
    tools: list[dict[str, Any]] | None = None
    """Tool schemas that the chat template renders, if any."""
    weight: float = 1.0
    """Factor of the row's loss, 0 or more; the number of rows that a sum is divided by stays."""
    margin: float | None = None
    """By how much the chosen answer is better, in units of reward; None where none is given."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids of one answer, without its prompt."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...] | None = None
    """Which tokens the loss reads; None means all. False marks what the assistant did not write,
    such as the user's turns inside a many-turn completion."""

    @property
    def num_scored(self) -> int:
        """Number of tokens that count for the loss: the |y| of the formulas."""
        return len(self.ids) if self.scored is None else sum(self.scored)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One prompt and its completions as token ids.

    The sequence of completion k is `prompt_ids + completions[k].ids`: the prompt is an identical
    token prefix of each by construction. `prompt_ids` is never empty, and each completion has at
    least one scored token.
    """

    row_id: str
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    roles: tuple[Role, ...]
    source: str
    prompt_key: int
    """64-bit hash of the prompt before truncation: rows that share it share a prompt."""
    weight: float = 1.0
    """As in `Example`."""
    margin: float | None = None
    """As in `Example`."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each full sequence, prompt included."""
        return [len(self.prompt_ids) + len(c.ids) for c in self.completions]
