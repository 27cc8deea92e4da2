"""`Example` -> `TokenizedExample`, in which the prompt is proved to begin every sequence.

Three steps: write each row as the exact texts of its prompt and of its full sequences, tokenise
those, and compare. No span is found by searching for text: a completion is what the sequence has
after the prompt's own tokens. Where these do not begin it, because the answer's first characters
merge with the header's last, a chat answer is tokenised by itself, as the model would go on from
its prompt, and kept if it decodes to the same text; any other row is dropped and counted.

    prompt     <|im_start|>user⏎2+2?<|im_end|>⏎<|im_start|>assistant⏎
    sequence   <|im_start|>user⏎2+2?<|im_end|>⏎<|im_start|>assistant⏎4<|im_end|>
    completion                                                       4<|im_end|>
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import xxhash

from preftune.data.chat import (
    AnswerFrame,
    TemplateRefused,
    answer_frame,
    eos_id,
    front_tokens,
    render,
    shows_tool_calls,
    shows_tools,
)
from preftune.data.reasons import Dropped, DropReason
from preftune.errors import DataError
from preftune.schema import Completion, Example, Message, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Spans: TypeAlias = list[tuple[list[int], list[int]]]
"""Of each assistant's turn, the ids up to its start and up to its end."""


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
        self._front = front_tokens(tokenizer)
        # One int object per token id, shared by all rows: 8 bytes a token in place of 36.
        self._shared_ids = list(range(max(tokenizer.get_vocab().values()) + 1))

    def __call__(self, examples: Sequence[Example]) -> list[TokenizedExample | Dropped]:
        """Tokenise examples, all in one call of the tokenizer, without any truncation.

        Args:
            examples: any number; a few dozen at a time keep the tokenizer's threads busy.

        Returns:
            One result an example, in order.

        Raises:
            DataError: messages without a chat template, tools or calls of tools that the template
                does not show, or no stop token.
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
        front = self._front
        # A template or a text may write the BOS itself.
        return [
            ids if ids[: len(front)] == front else front + ids for ids in self._encode_bare(texts)
        ]

    def _encode_bare(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts with nothing in front or behind."""
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]  # pyright: ignore[reportReturnType]

    # ---- rows as texts

    def _render(self, example: Example) -> _Rendered | Dropped:
        if isinstance(example.prompt, str):
            return self._render_text(example)
        unfit = _unfit_messages(example)
        if unfit is not None:
            return unfit
        self._check_tools(example)
        try:
            return self._render_chat(example)
        except TemplateRefused as error:
            return Dropped(example.row_id, DropReason.TEMPLATE_REFUSED, str(error))
        except _UnexpectedEnding as error:
            return Dropped(example.row_id, DropReason.UNEXPECTED_ENDING, str(error))

    def _check_tools(self, example: Example) -> None:
        """Refuse tools, and calls of tools, that would be lost on the way to the text."""
        if example.tools and not self._shows_tools:
            lost = "tools"
        elif _calls_tools(example) and not self._shows_tool_calls:
            lost = "calls of tools"
        else:
            return
        raise DataError(
            f"{example.row_id} has {lost}, and the chat template does not write them; choose "
            "another with --chat_template (the Hub id of a tokenizer that writes them), or remove "
            "them from the rows"
        )

    def _render_text(self, example: Example) -> _Rendered | Dropped:
        prompt = example.prompt
        assert isinstance(prompt, str)
        answers = [a for a in example.completions if isinstance(a, str)]
        eos = str(self._tokenizer.eos_token or "")
        if any(_blank(answer.strip().removesuffix(eos)) for answer in answers):
            return Dropped(example.row_id, DropReason.EMPTY_COMPLETION)
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
            # A template that strips thoughts may leave nothing.
            if len(answer) == 1 and _blank(text[len(prompt) :].removesuffix(frame.stop)):
                return Dropped(example.row_id, DropReason.EMPTY_COMPLETION)
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

    @cached_property
    def _shows_tool_calls(self) -> bool:
        return shows_tool_calls(self._tokenizer)

    # ---- ids as completions

    def _finish(self, row: _Rendered, ids: list[list[int]]) -> TokenizedExample | Dropped:
        """Prove the prompt a prefix, and cut the completions out behind it."""
        example = row.example
        prompt, edges = ids[0], iter(ids[1 + len(row.sequences) :])
        if not prompt:
            return Dropped(example.row_id, DropReason.EMPTY_PROMPT)
        completions: list[Completion] = []
        for k, (sequence, turns) in enumerate(zip(ids[1:], row.turns, strict=False)):
            spans = [(next(edges), next(edges)) for _ in turns]
            completion = self._completion(prompt, sequence, spans, row.stop_id)
            if completion is DropReason.NOT_A_PREFIX:
                completion = self._completion_apart(row, k, prompt, sequence)
            if isinstance(completion, DropReason):
                unlike = completion is DropReason.NOT_A_PREFIX
                detail = _detail(row, prompt, sequence) if unlike else ""
                return Dropped(example.row_id, completion, detail)
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
            weight=example.weight,
            margin=example.margin,
        )

    def _completion(
        self, prompt: list[int], sequence: list[int], spans: _Spans, stop_id: int
    ) -> Completion | DropReason:
        """Cut one completion out of its sequence; `spans` are the edges of its many turns."""
        if sequence[: len(prompt)] != prompt:
            return DropReason.NOT_A_PREFIX
        if sequence == prompt:
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
        ids, mask = sequence[len(prompt) :], scored[len(prompt) :]
        if not any(m and i != stop_id for i, m in zip(ids, mask, strict=True)):
            return DropReason.EMPTY_COMPLETION
        if not spans and stop_id in ids[:-1]:
            return DropReason.STOP_TOKEN_INSIDE
        return Completion(self._share(ids), tuple(mask) if spans else None)

    def _completion_apart(
        self, row: _Rendered, k: int, prompt: list[int], joint: list[int]
    ) -> Completion | DropReason:
        """Tokenise the answer apart from its prompt, as the model goes on from it.

        What comes out must decode to the text of the joint tokens. Text rows are left out: there,
        a prompt that ends in a space asks the model for words it never writes so.
        """
        if isinstance(row.example.prompt, str):
            return DropReason.NOT_A_PREFIX
        text = row.sequences[k]
        edges = [edge for turn in row.turns[k] for edge in (turn.start, turn.end)]
        if not all(text.startswith(edge) for edge in edges):
            return DropReason.NOT_A_PREFIX
        cuts = [len(row.prompt), *map(len, edges), len(text)]
        # Behind a special token, no tokenizer takes a piece for the start of a text, to which some
        # add a space.
        stop = self._decode([row.stop_id])
        sequence, upto = prompt, [prompt]
        for piece in self._encode_bare([stop + text[a:b] for a, b in pairwise(cuts)]):
            sequence = sequence + piece[1:]
            upto.append(sequence)
        if self._decode(sequence) != self._decode(joint):
            return DropReason.NOT_A_PREFIX
        spans = list(zip(upto[1:-1:2], upto[2:-1:2], strict=True))
        return self._completion(prompt, sequence, spans, row.stop_id)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _share(self, ids: list[int]) -> tuple[int, ...]:
        return tuple(map(self._shared_ids.__getitem__, ids))


def _detail(row: _Rendered, prompt: list[int], sequence: list[int]) -> str:
    if sequence[: len(prompt)] != prompt:
        return f"the tokens of prompt and answer merge at {row.prompt[-20:]!r}"
    return "the template writes an assistant's turn otherwise once the conversation goes on"


def _blank(text: str) -> bool:
    return not text.strip()


def _calls_tools(example: Example) -> bool:
    texts = (example.prompt, *example.completions)
    return any(message.get("tool_calls") for text in texts for message in _messages(text))


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
        if any(_blank(m.get("content") or "") and not m.get("tool_calls") for m in turns):
            return Dropped(example.row_id, DropReason.EMPTY_COMPLETION)
    return None
