"""A row as pieces of text, each with the tokens behind it and what becomes of them."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from preftune.data.truncate import Limits
from preftune.schema import Completion, TokenizedExample

_TOKENS_OF_A_CHARACTER = 4
"""Most bytes of a character in UTF-8, so most tokens of a byte-level tokenizer."""

Decode = Callable[[list[int]], str]


class Mark(StrEnum):
    """What becomes of a token."""

    TRAINED = "trained"
    """The loss reads its log-prob."""
    CONTEXT = "context"
    """The model reads it, and the loss does not."""
    CUT = "cut"
    """A limit on length takes it away."""


@dataclass(frozen=True)
class Piece:
    """The least tokens that make whole characters: one, unless a character has several."""

    text: str
    ids: tuple[int, ...]
    mark: Mark


@dataclass(frozen=True)
class ShownSide:
    """A prompt or an answer."""

    role: str
    pieces: tuple[Piece, ...]

    def num_tokens(self, mark: Mark) -> int:
        """How many of its tokens are marked so."""
        return sum(len(piece.ids) for piece in self.pieces if piece.mark is mark)

    @property
    def summary(self) -> str:
        """Role and numbers of tokens."""
        trained, context, cut = map(self.num_tokens, Mark)
        text = f"{self.role}: {trained + context} token{'s' * (trained + context != 1)}"
        if self.role != "prompt":
            text += f", {trained} of them trained"
        return text + (f"; {cut} cut off" if cut else "")


@dataclass(frozen=True)
class ShownRow:
    """A row, or why there is none to show."""

    row_id: str
    source: str
    note: str
    """What else is to be said of it; may be empty."""
    sides: tuple[ShownSide, ...]


def show_row(
    decode: Decode, whole: TokenizedExample, cut: TokenizedExample | None, limits: Limits, note: str
) -> ShownRow:
    """Decode a row token by token.

    Args:
        decode: ids to text, special tokens included.
        whole: the row before any cut.
        cut: the row as it is trained on; None where it is not.
        limits: that cut it.
        note: what else is to be said of it, besides its weight and margin.
    """
    prompt = list(whole.prompt_ids)
    marks = _prompt_marks(len(prompt), 0 if cut is None else len(cut.prompt_ids), limits)
    sides = [ShownSide("prompt", tuple(pieces(decode, prompt, marks)))]
    for index, (role, completion) in enumerate(zip(whole.roles, whole.completions, strict=True)):
        left = 0 if cut is None else len(cut.completions[index].ids)
        ids = prompt + list(completion.ids)
        of_side = pieces(decode, ids, marks + _answer_marks(completion, left), len(prompt))
        sides.append(ShownSide(role, tuple(of_side)))
    notes = [] if whole.weight == 1 else [f"weight {whole.weight:g}"]
    notes += [] if whole.margin is None else [f"margin {whole.margin:g}"]
    said = ", ".join(notes)
    return ShownRow(whole.row_id, whole.source, " ".join(filter(None, (note, said))), tuple(sides))


def _prompt_marks(length: int, left: int, limits: Limits) -> list[Mark]:
    kept, lost = [Mark.CONTEXT] * left, [Mark.CUT] * (length - left)
    return lost + kept if limits.truncation == "keep_end" else kept + lost


def _answer_marks(completion: Completion, left: int) -> list[Mark]:
    scored = completion.scored or (True,) * len(completion.ids)
    marks = [Mark.TRAINED if is_scored else Mark.CONTEXT for is_scored in scored[:left]]
    return marks + [Mark.CUT] * (len(scored) - left)


def pieces(
    decode: Decode, ids: Sequence[int], marks: Sequence[Mark], start: int = 0
) -> Iterator[Piece]:
    """Split the text of `ids[start:]` at tokens; joined, the pieces are the text.

    Each piece is decoded behind the one before it: some tokenizers write a text's first token
    otherwise than the same token further on. Tokens that make a character together stay together.

    Args:
        decode: ids to text.
        ids: of the sequence, with what stands before the part that is asked for.
        marks: one a token.
        start: where that part begins.
    """
    before, begin = max(0, start - _TOKENS_OF_A_CHARACTER), start
    for end in range(start + 1, len(ids) + 1):
        known = decode(list(ids[before:begin]))
        text = decode(list(ids[before:end]))
        must_end = (
            end == len(ids)
            or marks[end] is not marks[begin]
            or end - begin == _TOKENS_OF_A_CHARACTER
        )
        if must_end or (len(text) > len(known) and not text.endswith("�")):
            yield Piece(text[len(known) :], tuple(ids[begin:end]), marks[begin])
            before, begin = begin, end


def visible(text: str) -> str:
    """Text that shows its line ends and cannot steer a terminal or a page.

    A newline is shown as ↵ and stays one; other control characters, and those that turn or hide
    text, become pictures or escapes.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    # Joiners of emoji and of some scripts (U+200C, U+200D) are part of what people write.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in (
        0x200C,
        0x200D,
    ):
        return f"\\u{code:04x}"
    return character
