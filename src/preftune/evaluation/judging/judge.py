"""What all judges are, and how both orders of each pair come to them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from preftune.evaluation.win_rate import Verdict
from preftune.schema import Message


@dataclass(frozen=True)
class AnswerPair:
    """One prompt with the answers of both models."""

    prompt: list[Message]
    base: str
    trained: str


class Judge(Protocol):
    """Compares two answers to a prompt."""

    @property
    def parallel(self) -> int:
        """How many comparisons may be under way at once."""
        ...

    def compare(self, prompt: list[Message], first: str, second: str) -> Verdict:
        """Which is better.

        Raises:
            PreftuneError: it cannot be asked.
        """
        ...


def in_both_orders(
    judge: Judge, pairs: Sequence[AnswerPair], keep: Callable[[int, Verdict, Verdict], None]
) -> None:
    """Ask for each pair twice, with the trained model's answer first and second.

    Args:
        judge: who is asked.
        pairs: of answers.
        keep: called with the number of a pair, and what was said with the trained one first and
            second, as soon as both are known, in the order of the pairs.
    """

    def ask(pair: AnswerPair) -> tuple[Verdict, Verdict]:
        first = judge.compare(pair.prompt, pair.trained, pair.base)
        return first, judge.compare(pair.prompt, pair.base, pair.trained)

    for number, verdicts in enumerate(_mapped(ask, pairs, judge.parallel)):
        keep(number, *verdicts)


def _mapped(
    ask: Callable[[AnswerPair], tuple[Verdict, Verdict]], pairs: Sequence[AnswerPair], parallel: int
) -> Iterator[tuple[Verdict, Verdict]]:
    if parallel == 1:
        yield from map(ask, pairs)
        return
    pool = ThreadPoolExecutor(parallel)
    try:
        yield from pool.map(ask, pairs)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what was not begun is not asked


def as_text(prompt: Sequence[Message]) -> str:
    """A prompt for a reader: one question as it stands, longer conversations with who speaks."""
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in prompt)
