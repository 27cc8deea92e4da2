"""Chat templates of published models, crossed with the answers that break careless boundaries."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data.formats import parse_row
from preftune.data.proofs import Proofs, Prover
from preftune.data.reasons import Dropped, DropReason
from preftune.data.tokenize import PairTokenizer
from preftune.schema import Example, TokenizedExample
from tests.chat_models import (
    BY_NAME,
    DEEPSEEK,
    MODELS,
    QUESTION,
    THINK,
    Model,
    chatml,
    tokenizer_of,
)
from tests.tiny import chat_row

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
each_model = pytest.mark.parametrize("model", MODELS, ids=str)


@cache
def pair_tokenizer(model: Model) -> PairTokenizer:
    return PairTokenizer(tokenizer_of(model))


def example_of(raw: dict[str, Any]) -> Example:
    example = parse_row("f:1", raw, dataset="set", column_map={})
    assert isinstance(example, Example)
    return example


def run(model: Model, raw: dict[str, Any]) -> TokenizedExample | Dropped:
    return pair_tokenizer(model)([example_of(raw)])[0]


def kept(model: Model, raw: dict[str, Any]) -> TokenizedExample:
    result = run(model, raw)
    assert isinstance(result, TokenizedExample), result
    return result


def prove(model: Model, raw: dict[str, Any]) -> Proofs:
    return Prover(tokenizer_of(model))(example_of(raw), kept(model, raw))


def decode(model: Model, ids: Any) -> str:
    return tokenizer_of(model).decode(list(ids), clean_up_tokenization_spaces=False)


def trained(model: Model, row: TokenizedExample, k: int) -> str:
    """What the loss reads of answer k, which is one turn, in its place behind the prompt."""
    assert row.completions[k].scored is None
    whole, prompt = row.prompt_ids + row.completions[k].ids, decode(model, row.prompt_ids)
    text = decode(model, whole)
    assert text.startswith(prompt)
    return text[len(prompt) :]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


ANSWERS = [
    "A",
    "a",
    "user",
    "model",
    "assistant\n",
    "Paris.\n",
    "Paris. ",
    "  Paris.",
    " Paris.",
    "\nParis.",
    "\n\nParis.\n\n",
    "\n \tParis.",
    "🙂👩‍👩‍👧",
    "巴黎是法国的首都。",
    "<|im_start",
    "You are a helpful assistant",
    QUESTION,
    "preftune's probe answer",
]


@each_model
@pytest.mark.parametrize("answer", ANSWERS)
def test_trained_tokens_are_the_answer_and_its_stop_once(model: Model, answer: str) -> None:
    raw = chat_row(QUESTION, answer, "No way.")
    row = kept(model, raw)
    stop_id = tokenizer_of(model).convert_tokens_to_ids(model.stop.strip())
    assert decode(model, row.prompt_ids) == model.prompt
    for k, content in enumerate((answer, "No way.")):
        assert trained(model, row, k) == model.written(content) + model.stop
        assert row.completions[k].ids[-1] == stop_id
        assert row.completions[k].ids.count(stop_id) == 1
    # A blank that the template writes in front is its own, and no change of the answer.
    unchanged = model.written(answer).removeprefix(model.written("x")[:-1]) == answer
    assert prove(model, raw) == Proofs(True, True, True, True, verbatim=unchanged)


@each_model
@pytest.mark.parametrize("answer", ["", " ", "\n", "\t\n "])
def test_blank_answers_are_refused(model: Model, answer: str) -> None:
    for raw in (chat_row(QUESTION, "yes", answer), chat_row(QUESTION, answer, "no")):
        result = run(model, raw)
        assert isinstance(result, Dropped)
        assert result.reason is DropReason.EMPTY_COMPLETION


@each_model
@pytest.mark.parametrize("answer", ["{}", "Par{}is", "{}Paris", "Paris{}", "Paris{} "])
def test_the_stop_string_inside_an_answer_is_refused(model: Model, answer: str) -> None:
    result = run(model, chat_row(QUESTION, answer.format(model.stop.strip()), "no"))
    assert isinstance(result, Dropped)
    empty = DropReason.EMPTY_COMPLETION if answer == "{}" else DropReason.STOP_TOKEN_INSIDE
    assert result.reason in (DropReason.STOP_TOKEN_INSIDE, empty)


@each_model
def test_system_messages_are_written_or_refused_by_row(model: Model) -> None:
    raw = chat_row(QUESTION, "yes", "no")
    raw["prompt"].insert(0, {"role": "system", "content": "S"})
    result = run(model, raw)
    if isinstance(model.system, DropReason):
        assert isinstance(result, Dropped)
        assert result.reason is model.system
    else:
        assert isinstance(result, TokenizedExample)
        assert decode(model, result.prompt_ids) == model.system
        assert prove(model, raw) == Proofs(True, True, True, True, True)


@each_model
def test_earlier_turns_belong_to_the_prompt(model: Model) -> None:
    raw = chat_row("", "yes", "\n\nno")
    raw["prompt"] = [user("hello"), assistant("good day"), user(QUESTION)]
    row = kept(model, raw)
    text = decode(model, row.prompt_ids)
    assert text.index("hello") < text.index("good day") < text.index(QUESTION)
    assert trained(model, row, 0) == model.written("yes") + model.stop
    assert trained(model, row, 1) == model.written("\n\nno") + model.stop
    proofs = prove(model, raw)
    assert (proofs.prefix, proofs.bos, proofs.stop, proofs.round_trip) == (True,) * 4


@each_model
def test_many_turn_answers_score_the_assistants_turns_or_are_refused(model: Model) -> None:
    raw = chat_row(QUESTION, "", "no")
    raw["chosen"] = [assistant("Paris."), user("and of Italy?"), assistant("Rome.")]
    result = run(model, raw)
    if model.name == "qwen3":  # it takes the think block out of turns that are not the last
        assert isinstance(result, Dropped)
        assert result.reason is DropReason.NOT_A_PREFIX
        return
    assert isinstance(result, TokenizedExample)
    many = result.completions[0]
    assert many.scored is not None
    scored = [i for i, s in zip(many.ids, many.scored, strict=True) if s]
    expected = "".join(model.written(turn) + model.stop for turn in ("Paris.", "Rome."))
    assert decode(model, scored) == expected.removeprefix(
        " " if model.vocabulary == "metaspace" else ""
    )
    assert prove(model, raw) == Proofs(True, True, True, True, True)


@pytest.mark.parametrize("model", [m for m in MODELS if m.shows_tools], ids=str)
def test_tools_are_in_the_prompt(model: Model) -> None:
    raw = chat_row(QUESTION, "yes", "no", tools=[TOOL])
    row = kept(model, raw)
    assert "look_up" in decode(model, row.prompt_ids)
    assert trained(model, row, 0) == model.written("yes") + model.stop
    assert prove(model, raw) == Proofs(True, True, True, True, True)


@pytest.mark.parametrize("model", [m for m in MODELS if m.shows_tools], ids=str)
def test_an_answer_that_calls_a_tool_is_trained_on(model: Model) -> None:
    call = {"name": "look_up", "arguments": {"place": "France"}}
    raw = chat_row(QUESTION, "", "no", tools=[TOOL])
    raw["chosen"][0]["tool_calls"] = [{"id": "123456789", "type": "function", "function": call}]
    row = kept(model, raw)
    assert "look_up" in trained(model, row, 0)
    assert '"place": "France"' in trained(model, row, 0)
    assert trained(model, row, 0).endswith(model.stop)
    assert prove(model, raw) == Proofs(True, True, True, True, verbatim=False)


# ---- thinking


def test_thoughts_in_answers_are_trained_on_and_an_empty_block_is_not() -> None:
    model = BY_NAME["qwen3"]
    thought = "<think>\nFrance, so\n</think>\n\nParis."
    row = kept(model, chat_row(QUESTION, thought, "<think>\nHm\n</think>\n\nRome."))
    assert decode(model, row.prompt_ids) == chatml(("user", QUESTION))
    assert trained(model, row, 0) == f"{thought}<|im_end|>"


def test_one_answer_with_thoughts_leaves_the_empty_block_to_the_other() -> None:
    # Both share one prompt, and the model itself would have to write the block to answer so.
    model = BY_NAME["qwen3"]
    raw = chat_row(QUESTION, "<think>\nFrance, so\n</think>\n\nParis.", "Rome.")
    row = kept(model, raw)
    assert decode(model, row.prompt_ids) == chatml(("user", QUESTION))
    assert trained(model, row, 1) == f"{THINK}Rome.<|im_end|>"
    assert prove(model, raw) == Proofs(True, True, True, True, verbatim=False)


def test_thoughts_of_earlier_turns_are_stripped_from_the_prompt_alike() -> None:
    model = BY_NAME["qwen3"]
    raw = chat_row("", "yes", "no")
    raw["prompt"] = [user("q"), assistant("<think>\nwhy\n</think>\n\nr"), user("s")]
    row = kept(model, raw)
    assert decode(model, row.prompt_ids) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n"
        f"<|im_start|>user\ns<|im_end|>\n<|im_start|>assistant\n{THINK}"
    )


@pytest.mark.parametrize("answer", ["Paris.", "<think>\nFrance, so\n</think>\n\nParis."])
def test_a_prompt_that_opens_a_thought_which_answers_do_not_have_is_refused(answer: str) -> None:
    # The template asks for `<think>` and takes thoughts out of every answer that it is given.
    result = run(DEEPSEEK, chat_row(QUESTION, answer, "Rome."))
    assert isinstance(result, Dropped)
    assert result.reason is DropReason.NOT_A_PREFIX
    assert "<think>" in result.detail


# ---- any text

TEXT = st.text(
    st.sampled_from("aA 1.\n\t?Pé✓🙂▁<|>") | st.characters(codec="utf-8"), min_size=1, max_size=20
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["llama31", "qwen25", "qwen3", "smollm2", "tulu3", "gemma3"]),
    prompt=TEXT,
    chosen=TEXT,
    rejected=TEXT,
)
def test_any_text(name: str, prompt: str, chosen: str, rejected: str) -> None:
    model = BY_NAME[name]
    raw = chat_row(prompt, chosen, rejected)
    result = run(model, raw)
    if isinstance(result, Dropped):
        blank = not (chosen.strip() and rejected.strip())
        equal = model.written(chosen) == model.written(rejected)
        assert result.reason is DropReason.EMPTY_COMPLETION or equal
        assert blank or equal
        return
    lossless = model.vocabulary == "bytes" or not any("▁" in t for t in (prompt, chosen, rejected))
    for k, content in enumerate((chosen, rejected)):
        if lossless:
            assert trained(model, result, k) == model.written(content) + model.stop
    proofs = prove(model, raw)
    assert (proofs.prefix, proofs.bos, proofs.stop, proofs.round_trip) == (True,) * 4
    if lossless:
        assert proofs.verbatim == all(model.written(c) == c for c in (chosen, rejected))
