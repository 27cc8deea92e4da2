"""`Example` -> `TokenizedExample`, in which the prompt is proved to begin every sequence.

Three steps: write each row as the exact texts of its prompt and of its full sequences, tokenise
those, and compare. No span is found by searching for text: a completion is what the sequence has
after the prompt's own tokens, and where these do not begin it, the row is dropped and counted.

    prompt     <|im_start|>user⏎2+2?<|im_end|>⏎<|im_start|>assistant⏎
    sequence   <|im_start|>user⏎2+2?<|im_end|>⏎<|im_start|>assistant⏎4<|im_end|>
    completion                                                       4<|im_end|>
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from preftune.data.chat import (
    AnswerFrame,
    TemplateRefused,
    answer_frame,
    eos_id,
    render,
    shows_tools,
)
from preftune.data.reasons import Dropped, DropReason
from preftune.errors import DataError
from preftune.schema import Completion, Example, Message, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class _Turn:
    """Texts up to where an assistant's turn starts, after its header, and ends, after its stop."""

    start: str
    end: str


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A row as the texts to tokenise."""

    example: Example
    prompt: str
    sequences: tuple[str, ...]
    """Prompt and answer through the stop token; nothing after it."""
    turns: tuple[tuple[_Turn, ...], ...]
    """Per sequence, the assistant's turns; empty where the whole answer is one turn."""
    stop_id: int

    def texts(self) -> list[str]:
        """All texts of the row, in the order in which `_Encoded` expects their ids."""
        edges = [t for turns in self.turns for turn in turns for t in (turn.start, turn.end)]
        return [self.prompt, *self.sequences, *edges]


class _UnexpectedEnding(Exception):
    """What the template wrote after an answer is not what it wrote after the probe's."""


class PairTokenizer:
    """Tokenises examples with one tokenizer and its chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Look at what the tokenizer puts in front of a text.

        Args:
            tokenizer: from transformers; not changed.
        """
        self._tokenizer = tokenizer
        self._front = _front_tokens(tokenizer)
        # One int object per token id, shared by all rows: 8 bytes a token in place of 36.
        self._shared_ids = list(range(max(tokenizer.get_vocab().values()) + 1))

    def __call__(self, examples: Sequence[Example]) -> list[TokenizedExample | Dropped]:
        """Tokenise examples, all in one call of the tokenizer, without any truncation.

        Args:
            examples: any number; a few dozen at a time keep the tokenizer's threads busy.

        Returns:
            One result an example, in order.

        Raises:
            DataError: messages without a chat template, tools that the template does not show, or
                no stop token.
        """
        rendered = [self._render(example) for example in examples]
        texts = [t for r in rendered if isinstance(r, _Rendered) for t in r.texts()]
        ids = iter(self._encode(texts))
        results: list[TokenizedExample | Dropped] = []
        for row in rendered:
            if isinstance(row, _Rendered):
                results.append(self._finish(row, [next(ids) for _ in row.texts()]))
            else:
                results.append(row)
        return results

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts, with what the tokenizer puts in front (BOS), once, and nothing behind."""
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        front = self._front
        # A template or a text may write the BOS itself.
        return [
            ids if ids[: len(front)] == front else front + ids
            for ids in encoded["input_ids"]  # pyright: ignore[reportGeneralTypeIssues]
        ]

    # ---- rows as texts

    def _render(self, example: Example) -> _Rendered | Dropped:
        if isinstance(example.prompt, str):
            return self._render_text(example)
        unfit = _unfit_messages(example)
        if unfit is not None:
            return unfit
        if example.tools and not self._shows_tools:
            raise DataError(
                f"{example.row_id} has tools, and the chat template does not write them; choose "
                "another with --chat_template, or remove the tools"
            )
        try:
            return self._render_chat(example)
        except TemplateRefused as error:
            return Dropped(example.row_id, DropReason.TEMPLATE_REFUSED, str(error))
        except _UnexpectedEnding as error:
            return Dropped(example.row_id, DropReason.UNEXPECTED_ENDING, str(error))

    def _render_text(self, example: Example) -> _Rendered:
        prompt = example.prompt
        assert isinstance(prompt, str)
        answers = [a for a in example.completions if isinstance(a, str)]
        return _Rendered(
            example=example,
            prompt=prompt,
            sequences=tuple(prompt + answer for answer in answers),
            turns=((),) * len(answers),
            stop_id=eos_id(self._tokenizer),
        )

    def _render_chat(self, example: Example) -> _Rendered | Dropped:
        frame = self._frame
        messages = _messages(example.prompt)
        answers = [_messages(answer) for answer in example.completions]
        prompt = render(self._tokenizer, messages, tools=example.tools, open_answer=True)
        sequences: list[str] = []
        for answer in answers:
            text = self._closed(example, messages + answer)
            if not text.startswith(prompt):
                detail = f"the template writes the prompt as {prompt[-60:]!r} before an answer"
                return Dropped(example.row_id, DropReason.NOT_A_PREFIX, detail)
            sequences.append(text)
        if frame.lead and all(text.startswith(prompt + frame.lead) for text in sequences):
            prompt += frame.lead
        turns = tuple(self._turns(example, messages, answer) for answer in answers)
        return _Rendered(example, prompt, tuple(sequences), turns, frame.stop_id)

    def _closed(self, example: Example, messages: list[Message]) -> str:
        """Render a conversation that ends in an answer, up to and including its stop token.

        Raises:
            _UnexpectedEnding: the template ends this answer unlike that of the probe.
        """
        frame = self._frame
        text = render(self._tokenizer, messages, tools=example.tools)
        if not text.endswith(frame.stop + frame.trailer):
            raise _UnexpectedEnding(f"{text[-40:]!r}, not {frame.stop + frame.trailer!r}")
        return text[: len(text) - len(frame.trailer)]

    def _turns(
        self, example: Example, prompt: list[Message], answer: list[Message]
    ) -> tuple[_Turn, ...]:
        """Render the conversation up to each edge of each of the assistant's turns."""
        if len(answer) == 1:
            return ()
        turns: list[_Turn] = []
        for i, message in enumerate(answer):
            if message["role"] != "assistant":
                continue
            before = prompt + answer[:i]
            start = render(self._tokenizer, before, tools=example.tools, open_answer=True)
            end = self._closed(example, [*before, message])
            if self._frame.lead and end.startswith(start + self._frame.lead):
                start += self._frame.lead
            turns.append(_Turn(start, end))
        return tuple(turns)

    @cached_property
    def _frame(self) -> AnswerFrame:
        try:
            return answer_frame(self._tokenizer)
        except TemplateRefused as error:
            raise DataError(
                f"the tokenizer's chat template fails on a question and its answer ({error}); "
                "choose another with --chat_template"
            ) from error

    @cached_property
    def _shows_tools(self) -> bool:
        return shows_tools(self._tokenizer)

    # ---- ids as completions

    def _finish(self, row: _Rendered, ids: list[list[int]]) -> TokenizedExample | Dropped:
        """Prove the prompt a prefix, and cut the completions out behind it."""
        example = row.example
        prompt, edges = ids[0], iter(ids[1 + len(row.sequences) :])
        if not prompt:
            return Dropped(example.row_id, DropReason.EMPTY_PROMPT)
        completions: list[Completion] = []
        for sequence, turns in zip(ids[1:], row.turns, strict=False):
            spans = [(next(edges), next(edges)) for _ in turns]
            if sequence[: len(prompt)] != prompt:
                detail = f"the tokens of prompt and answer merge at {row.prompt[-20:]!r}"
                return Dropped(example.row_id, DropReason.NOT_A_PREFIX, detail)
            completion = self._completion(sequence, len(prompt), spans, row.stop_id)
            if isinstance(completion, DropReason):
                return Dropped(example.row_id, completion, _detail(completion))
            completions.append(completion)
        if len(completions) > 1 and all(c.ids == completions[0].ids for c in completions):
            return Dropped(example.row_id, DropReason.EQUAL_COMPLETIONS)
        return TokenizedExample(
            row_id=example.row_id,
            prompt_ids=self._share(prompt),
            completions=tuple(completions),
            roles=example.roles,
            source=example.source,
            prompt_key=xxhash.xxh3_64_intdigest(np.asarray(prompt, dtype=np.int64).tobytes()),
        )

    def _completion(
        self,
        sequence: list[int],
        start: int,
        spans: list[tuple[list[int], list[int]]],
        stop_id: int,
    ) -> Completion | DropReason:
        """Cut one completion out of its sequence; `spans` are the edges of its many turns."""
        if not sequence[start:]:
            return DropReason.EMPTY_COMPLETION
        if sequence[-1] != stop_id:
            sequence = [*sequence, stop_id]
            spans = [(a, sequence if b == sequence[:-1] else b) for a, b in spans]
        scored = [not spans] * len(sequence)
        for before, through in spans:
            if sequence[: len(before)] != before or sequence[: len(through)] != through:
                return DropReason.NOT_A_PREFIX
            if stop_id in through[len(before) : -1]:
                return DropReason.STOP_TOKEN_INSIDE
            scored[len(before) : len(through)] = [True] * (len(through) - len(before))
        ids, mask = sequence[start:], scored[start:]
        if not any(m and i != stop_id for i, m in zip(ids, mask, strict=True)):
            return DropReason.EMPTY_COMPLETION
        if not spans and stop_id in ids[:-1]:
            return DropReason.STOP_TOKEN_INSIDE
        return Completion(self._share(ids), tuple(mask) if spans else None)

    def _share(self, ids: list[int]) -> tuple[int, ...]:
        return tuple(map(self._shared_ids.__getitem__, ids))


def _detail(reason: DropReason) -> str:
    if reason is DropReason.NOT_A_PREFIX:
        return "the template writes an assistant's turn otherwise once the conversation goes on"
    return ""


def _messages(text: str | list[Message]) -> list[Message]:
    assert not isinstance(text, str), "formats give messages throughout, or text throughout"
    return text


def _unfit_messages(example: Example) -> Dropped | None:
    """Say what makes a row of messages untrainable before any rendering."""
    answers = [_messages(answer) for answer in example.completions]
    if not example.prompt:
        return Dropped(example.row_id, DropReason.EMPTY_PROMPT)
    if len(answers) > 1 and all(answer == answers[0] for answer in answers):
        return Dropped(example.row_id, DropReason.EQUAL_COMPLETIONS)
    for answer in answers:
        if not answer:
            return Dropped(example.row_id, DropReason.EMPTY_COMPLETION)
        if answer[-1]["role"] != "assistant":
            detail = f"it is by {answer[-1]['role']!r}"
            return Dropped(example.row_id, DropReason.LAST_NOT_ASSISTANT, detail)
        if answer[0]["role"] != "assistant":
            detail = f"an answer begins with a message by {answer[0]['role']!r}"
            return Dropped(example.row_id, DropReason.NOT_A_PREFIX, detail)
        turns = [m for m in answer if m["role"] == "assistant"]
        if not any(m.get("content") or m.get("tool_calls") for m in turns):
            return Dropped(example.row_id, DropReason.EMPTY_COMPLETION)
    return None


def _front_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts in front of a text by itself: `[bos]`, or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])  # pyright: ignore
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])  # pyright: ignore
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at]
    return []
