"""Each proof fails where its promise is broken, and no other does."""

from dataclasses import replace
from typing import Any

import pytest

from preftune.data.formats import parse_row
from preftune.data.proofs import Proofs, Prover
from preftune.data.tokenize import PairTokenizer
from preftune.schema import Completion, Example, TokenizedExample
from tests.tiny import CHATML, END_OF_TEXT, IM_END, chat_row, tiny_tokenizer

HOLDS = Proofs(prefix=True, bos=True, stop=True, round_trip=True, verbatim=True)
TEXT_ROW = {"prompt": "The cat", "chosen": " sat.", "rejected": f" ran.{IM_END}"}
MANY_TURNS = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "a bird"},
    ],
    "rejected": [{"role": "assistant", "content": "no"}],
}


def pair(tokenizer: Any, raw: dict[str, Any]) -> tuple[Example, TokenizedExample]:
    example = parse_row("f:1", raw, dataset="set", column_map={})
    assert isinstance(example, Example)
    row = PairTokenizer(tokenizer)([example])[0]
    assert isinstance(row, TokenizedExample)
    return example, row


def with_chosen(row: TokenizedExample, ids: tuple[int, ...]) -> TokenizedExample:
    return replace(row, completions=(Completion(ids), *row.completions[1:]))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("raw", [chat_row("q", "\n\na", "b"), TEXT_ROW, MANY_TURNS])
def test_rows_as_tokenised_hold(raw: dict[str, Any], bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    assert Prover(tokenizer)(*pair(tokenizer, raw)) == HOLDS


@pytest.mark.parametrize("raw", [chat_row("q", "word", "b"), TEXT_ROW])
def test_broken_rows_fail(raw: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    prove = Prover(tokenizer)
    example, row = pair(tokenizer, raw)
    chosen = row.completions[0].ids
    stop, bos = chosen[-1], row.prompt_ids[0]

    twice = replace(row, prompt_ids=(bos, *row.prompt_ids))
    assert prove(example, twice) == replace(HOLDS, prefix=False, bos=False, round_trip=False)
    without = replace(row, prompt_ids=row.prompt_ids[1:])
    assert prove(example, without) == replace(HOLDS, prefix=False, bos=False, round_trip=False)
    inside = prove(example, with_chosen(row, (bos, *chosen)))
    assert inside == replace(HOLDS, bos=False, round_trip=False, verbatim=False)

    unended = prove(example, with_chosen(row, chosen[:-1]))
    assert unended == replace(HOLDS, stop=False, round_trip=False, verbatim=False)
    ended_twice = prove(example, with_chosen(row, (*chosen, stop)))
    assert ended_twice == replace(HOLDS, stop=False, round_trip=False, verbatim=False)
    other = prove(example, with_chosen(row, row.completions[1].ids))
    assert other == replace(HOLDS, round_trip=False, verbatim=False)

    # The same sequence, with the prompt's last token among what is trained on, and the other way.
    early = TokenizedExample(
        row_id=row.row_id,
        prompt_ids=row.prompt_ids[:-1],
        completions=tuple(Completion((row.prompt_ids[-1], *c.ids)) for c in row.completions),
        roles=row.roles,
        source=row.source,
        prompt_key=row.prompt_key,
    )
    assert prove(example, early) == replace(HOLDS, prefix=False, verbatim=False)


def test_a_turn_of_the_user_among_what_is_scored_is_seen() -> None:
    tokenizer = tiny_tokenizer()
    example, row = pair(tokenizer, MANY_TURNS)
    everything = with_chosen(row, row.completions[0].ids)
    expected = replace(HOLDS, stop=False, verbatim=False)
    assert Prover(tokenizer)(example, everything) == expected


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (CHATML.replace("message['content']", "message['content'] | trim"), "a "),
        (
            CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"),
            "<think>x</think>y",
        ),
    ],
)
def test_a_template_that_changes_an_answer_is_seen(template: str, answer: str) -> None:
    tokenizer = tiny_tokenizer(template)
    proofs = Prover(tokenizer)(*pair(tokenizer, chat_row("q", answer, "b")))
    assert proofs == replace(HOLDS, verbatim=False)
    assert Prover(tokenizer)(*pair(tokenizer, chat_row("q", "a", "b"))) == HOLDS


@pytest.mark.parametrize("bos_token", ["<|im_start|>", IM_END])
def test_a_bos_that_also_marks_turns_is_counted_at_the_start_only(bos_token: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = bos_token
    prove = Prover(tokenizer)
    example, row = pair(tokenizer, chat_row("q", "a", "b"))
    assert prove(example, row) == HOLDS
    bos = tokenizer.bos_token_id
    assert not prove(example, replace(row, prompt_ids=(bos, bos, *row.prompt_ids[1:]))).bos


def test_text_rows_of_a_tokenizer_whose_template_fails() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('never') }}", bos=True, eos_token=IM_END)
    assert tokenizer.bos_token == END_OF_TEXT
    assert Prover(tokenizer)(*pair(tokenizer, TEXT_ROW)) == HOLDS
