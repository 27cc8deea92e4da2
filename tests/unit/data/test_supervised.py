"""Rows for supervised fine-tuning: what is learnt of them, and what is dropped."""

from typing import Any

import pytest

from preftune.data.formats import parse_row
from preftune.data.pairs import load_pairs
from preftune.data.proofs import Prover
from preftune.data.reasons import Dropped, DropReason
from preftune.data.tokenize import PairTokenizer
from preftune.data.truncate import Limits, truncate
from preftune.errors import DataError
from preftune.schema import Example, TokenizedExample
from tests.chat_models import BY_NAME, MODELS, Model, tokenizer_of
from tests.tiny import tiny_tokenizer, write_jsonl

TURNS = [
    ("user", "What is the capital of France?"),
    ("assistant", "Paris."),
    ("user", "And of Italy?"),
    ("assistant", "Rome, a city."),
    ("user", "Thank you."),
    ("assistant", "You are welcome."),
]


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def parsed(raw: dict[str, Any], **column_map: str) -> Example | Dropped:
    return parse_row("f:1", raw, dataset="set", column_map=column_map, kind="supervised")


def tokenised(raw: dict[str, Any], tokenizer: Any) -> TokenizedExample | Dropped:
    example = parsed(raw)
    assert isinstance(example, Example)
    return PairTokenizer(tokenizer)([example])[0]


def turns_read(row: TokenizedExample, tokenizer: Any) -> list[str]:
    """The text of each run of scored tokens."""
    (completion,) = row.completions
    ids = [*row.prompt_ids, *completion.ids]
    scored = [False] * len(row.prompt_ids)
    scored += completion.scored or [True] * len(completion.ids)
    runs: list[list[int]] = []
    for at, (token, is_scored) in enumerate(zip(ids, scored, strict=True)):
        if is_scored and not scored[at - 1]:
            runs.append([])
        if is_scored:
            runs[-1].append(token)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_every_turn_of_the_assistant_is_learnt_and_nothing_else(model: Model):
    """Through its stop token, in each published template; or the row is dropped by name."""
    tokenizer = tokenizer_of(model)
    row = tokenised({"messages": messages(*TURNS)}, tokenizer)
    if model.name == "qwen3":  # it takes the think block out of turns that are not the last
        assert isinstance(row, Dropped)
        assert row.reason is DropReason.NOT_A_PREFIX
        return
    assert isinstance(row, TokenizedExample), row
    said = [text for role, text in TURNS if role == "assistant"]
    expected = [(model.written(text) + model.stop).strip() for text in said]
    assert [text.strip() for text in turns_read(row, tokenizer)] == expected
    example = parsed({"messages": messages(*TURNS)})
    assert isinstance(example, Example)
    proofs = Prover(tokenizer)(example, row)
    assert all((proofs.prefix, proofs.bos, proofs.stop, proofs.round_trip)), proofs


def test_thoughts_that_the_template_strips_from_earlier_turns_drop_the_row():
    """What would be trained on is not what the model is shown when it is used."""
    turns = [("user", "2+2?"), ("assistant", "<think>\nhm\n</think>\n\n4"), *TURNS[:2]]
    row = tokenised({"messages": messages(*turns)}, tokenizer_of(BY_NAME["qwen3"]))
    assert isinstance(row, Dropped)
    assert row.reason is DropReason.NOT_A_PREFIX
    assert row.detail


def test_a_prompt_and_its_completion_learn_the_completion_alone():
    """Earlier turns of the assistant are part of the prompt."""
    tokenizer = tiny_tokenizer()
    raw = {"prompt": messages(*TURNS[:3]), "completion": messages(TURNS[3])}
    row = tokenised(raw, tokenizer)
    assert isinstance(row, TokenizedExample)
    assert turns_read(row, tokenizer) == ["Rome, a city.<|im_end|>"]
    assert row.roles == ("answer",)
    text = tokenised({"prompt": "2+2?", "completion": " 4 is it"}, tokenizer)
    assert isinstance(text, TokenizedExample)
    assert turns_read(text, tokenizer) == [" 4 is it<|im_end|>"]


def test_messages_go_before_other_columns_and_columns_can_be_renamed():
    both = {"messages": messages(*TURNS[:2]), "prompt": "x", "completion": "y"}
    assert parsed(both) == parsed({"messages": messages(*TURNS[:2])})
    chosen = {"chosen": messages(*TURNS[:2]), "rejected": messages(*TURNS[:2])}
    assert parsed(chosen, messages="chosen") == parsed(both)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (TURNS[:1], DropReason.NO_ASSISTANT_TURN),
        ([], DropReason.NO_ASSISTANT_TURN),
        (TURNS[:3], DropReason.LAST_NOT_ASSISTANT),
        (TURNS[1:], DropReason.EMPTY_PROMPT),
        ([*TURNS[:3], ("assistant", " ")], DropReason.EMPTY_COMPLETION),
        ([TURNS[0], ("assistant", "a<|im_end|>b"), *TURNS[:2]], DropReason.STOP_TOKEN_INSIDE),
    ],
)
def test_what_cannot_be_learnt_right_is_dropped_by_name(tmp_path, turns, reason):
    rows = [{"messages": messages(*TURNS)}, {"messages": messages(*turns)}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load_pairs(
        str(path), tokenizer=tiny_tokenizer(), kind="supervised", max_dropped_fraction=1.0
    )
    assert data.counts.dropped == {reason.value: 1}
    assert data.counts.dropped_rows == (("rows.jsonl:2", reason.value),)
    assert data.unit == "rows"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, '{"completion": "chosen"}'),
        ({"chosen": messages(*TURNS), "rejected": []}, '{"messages": "chosen"}'),
        ({"text": "a"}, "give messages, or prompt and completion"),
        ({"prompt": "a", "completion": "b", "label": False}, "its label is false"),
        ({"messages": "a: b"}, "column 'messages' is text"),
        ({"completion": "b"}, "column 'prompt' is missing"),
    ],
)
def test_a_row_of_another_kind_is_an_error_that_says_what_to_do(raw, said):
    with pytest.raises(DataError) as caught:
        parsed(raw)
    assert said in str(caught.value)


def test_rows_to_fine_tune_on_are_no_pairs():
    with pytest.raises(DataError, match="--stage sft"):
        parse_row("f:1", {"messages": messages(*TURNS)}, dataset="set", column_map={})


def test_a_cut_conversation_keeps_what_is_left_of_its_turns():
    tokenizer = tiny_tokenizer()
    row = tokenised({"messages": messages(*TURNS)}, tokenizer)
    assert isinstance(row, TokenizedExample)
    (length,) = row.lengths
    for room in range(2, length):
        cut = truncate(row, Limits(room, None, "keep_start"))
        if isinstance(cut, Dropped):
            assert room <= len(row.prompt_ids)
            continue
        assert cut.lengths == [room]
        whole = "".join(turns_read(row, tokenizer))
        assert whole.startswith("".join(turns_read(cut, tokenizer)).rstrip("�"))
