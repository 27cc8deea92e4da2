"""What a tokenised row promises, looked at again from its token ids.

`tokenize` builds rows so that these hold. Here they are recomputed with nothing but the tokenizer
and its template, for people who want to see it of their own data.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from preftune.data.chat import (
    AnswerFrame,
    TemplateRefused,
    answer_frame,
    eos_id,
    front_tokens,
    render,
)
from preftune.schema import Completion, Example, Message, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Proofs:
    """What holds for a row that was not cut to a length."""

    prefix: bool
    """The prompt, rendered and tokenised alone as when the model is used, begins every sequence."""
    bos: bool
    """Every sequence has the BOS that the tokenizer writes, if any, once and at its start."""
    stop: bool
    """Each of the assistant's turns ends with the stop token and holds it nowhere else."""
    round_trip: bool
    """Every sequence decodes to the text of prompt and answer as the template writes it."""
    verbatim: bool
    """The trained tokens decode to the answers as they are in the data, each with its stop token
    and with nothing of a header. False where the template trims or rewrites an answer."""


class Prover:
    """Proves rows of one tokenizer and its chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Look at what the tokenizer puts in front of a text.

        Args:
            tokenizer: the one that the rows were tokenised with; not changed.
        """
        self._tokenizer = tokenizer
        self._front = front_tokens(tokenizer)

    def __call__(self, example: Example, row: TokenizedExample) -> Proofs:
        """Prove one row.

        Args:
            example: as text, or as messages that the template renders.
            row: what `PairTokenizer` made of it, before truncation.
        """
        chat = not isinstance(example.prompt, str)
        stop_id = self._frame.stop_id if chat else eos_id(self._tokenizer)
        prompt = self._encode(self._prompt_text(example))
        sequences = [list(row.prompt_ids + c.ids) for c in row.completions]
        spans = [_turns(len(row.prompt_ids), completion) for completion in row.completions]
        turns = [ids[a:b] for ids, ab in zip(sequences, spans, strict=True) for a, b in ab]
        return Proofs(
            prefix=list(row.prompt_ids[: len(prompt)]) == prompt,
            bos=all(map(self._one_bos, sequences)),
            stop=all(ids[-1] == stop_id and ids.count(stop_id) == 1 for ids in turns),
            round_trip=all(
                self._decode(ids) == self._decode(self._joint(example, k, stop_id))
                for k, ids in enumerate(sequences)
            ),
            verbatim=all(
                self._trained(ids, spans[k]) == self._given(example, k, stop_id)
                for k, ids in enumerate(sequences)
            ),
        )

    def _trained(self, ids: list[int], spans: list[tuple[int, int]]) -> list[str]:
        """Decode the assistant's turns in place: some tokenizers drop a text's first space."""
        return [self._decode(ids[:b])[len(self._decode(ids[:a])) :] for a, b in spans]

    def _joint(self, example: Example, k: int, stop_id: int) -> list[int]:
        """The tokens of prompt and answer k tokenised as one text, through the stop token."""
        answer = example.completions[k]
        if isinstance(example.prompt, str):
            ids = self._encode(example.prompt + str(answer))
        else:
            messages = [*_messages(example.prompt), *_messages(answer)]
            text = render(self._tokenizer, messages, tools=example.tools)
            ids = self._encode(text.removesuffix(self._frame.trailer))
        return ids if ids[-1:] == [stop_id] else [*ids, stop_id]

    def _given(self, example: Example, k: int, stop_id: int) -> list[str]:
        """The texts that answer k would train on if the template wrote it as it is."""
        answer = example.completions[k]
        stop = self._decode([stop_id])
        if isinstance(answer, str):
            return [answer.removesuffix(stop) + stop]
        blank, end = self._frame.blank, self._frame.stop
        contents = [m.get("content") or "" for m in answer if m["role"] == "assistant"]
        texts = [blank + content + end for content in contents]
        return [*texts[:-1], texts[-1] if end else texts[-1] + stop]

    def _prompt_text(self, example: Example) -> str:
        if isinstance(example.prompt, str):
            return example.prompt
        return render(self._tokenizer, example.prompt, tools=example.tools, open_answer=True)

    def _one_bos(self, ids: list[int]) -> bool:
        """Whether what the tokenizer puts in front stands there, and its BOS nowhere else."""
        front, bos = self._front, self._tokenizer.bos_token_id
        if ids[: len(front)] != front:
            return False
        # Some tokenizers name their turn marker, or the token that ends texts, as the BOS too.
        rest = ids[len(front) or 1 :]
        return rest[:1] != [bos] if self._bos_marks_turns else bos not in rest

    @cached_property
    def _bos_marks_turns(self) -> bool:
        tokenizer = self._tokenizer
        if tokenizer.bos_token_id == tokenizer.eos_token_id or not tokenizer.chat_template:
            return tokenizer.bos_token_id == tokenizer.eos_token_id
        roles = ("user", "assistant", "user", "assistant")
        try:
            text = render(tokenizer, [{"role": role, "content": "preftune"} for role in roles])
        except TemplateRefused:  # then there are text rows only
            return False
        return str(tokenizer.bos_token) in text[1:]

    @cached_property
    def _frame(self) -> AnswerFrame:
        return answer_frame(self._tokenizer)

    def _encode(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # pyright: ignore
        return ids if ids[: len(self._front)] == self._front else self._front + ids

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def _turns(start: int, completion: Completion) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in a sequence: what is scored, split at what is not."""
    scored = completion.scored or (True,) * len(completion.ids)
    spans: list[tuple[int, int]] = []
    for is_scored, run in groupby(scored):
        end = start + len(list(run))
        if is_scored:
            spans.append((start, end))
        start = end
    return spans


def _messages(text: str | list[Message]) -> list[Message]:
    assert not isinstance(text, str), "formats give messages throughout, or text throughout"
    return text
