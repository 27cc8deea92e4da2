"""Examples -> token ids: the prompt begins every sequence, one BOS, one stop token, no header."""

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data.formats import parse_row
from preftune.data.reasons import Dropped, DropReason
from preftune.data.tokenize import PairTokenizer
from preftune.errors import DataError
from preftune.schema import Example, TokenizedExample
from tests.tiny import CHATML, END_OF_TEXT, IM_END, chat_row, tiny_tokenizer

HEADER = "<|im_start|>assistant\n"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def run(tokenizer: Any, raw: dict[str, Any]) -> TokenizedExample | Dropped:
    example = parse_row("f:1", raw, dataset="set", column_map={})
    assert isinstance(example, Example)
    return PairTokenizer(tokenizer)([example])[0]


def kept(tokenizer: Any, raw: dict[str, Any]) -> TokenizedExample:
    result = run(tokenizer, raw)
    assert isinstance(result, TokenizedExample), result
    return result


def reason(tokenizer: Any, raw: dict[str, Any]) -> DropReason:
    result = run(tokenizer, raw)
    assert isinstance(result, Dropped), result
    assert result.row_id == "f:1"
    return result.reason


def texts(tokenizer: Any, row: TokenizedExample) -> list[str]:
    return [tokenizer.decode(row.prompt_ids), *(tokenizer.decode(c.ids) for c in row.completions)]


def text_row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _merging_newlines(tokenizer: Any) -> Any:
    """The tokenizer's BPE with merges for runs of newlines, as real vocabularies have them."""
    import json

    from tokenizers import models

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = dict(model["vocab"])
    merges = [tuple(merge) for merge in model["merges"]]
    for a, b in (("Ċ", "Ċ"), ("Ċ", "ĊĊ"), ("ĊĊ", "Ċ"), ("Ċ", "Ġ"), ("Ċ", "Ġ" * 2)):
        vocab[a + b] = vocab.get(a + b, max(vocab.values()) + 1)
        merges.append((a, b))
    return models.BPE(vocab=vocab, merges=merges)


class TestChat:
    def test_the_trailer_is_cut_and_the_header_stays_in_the_prompt(self) -> None:
        tokenizer = tiny_tokenizer()
        row = kept(tokenizer, chat_row("What is it?", "Paris.", "Not Paris."))
        assert texts(tokenizer, row) == [
            f"<|im_start|>user\nWhat is it?{IM_END}\n{HEADER}",
            f"Paris.{IM_END}",
            f"Not Paris.{IM_END}",
        ]
        assert [c.scored for c in row.completions] == [None, None]
        assert row.roles == ("chosen", "rejected")

    def test_the_stop_token_is_the_templates_not_the_tokenizers_eos(self) -> None:
        tokenizer = tiny_tokenizer(eos_token=END_OF_TEXT)
        row = kept(tokenizer, chat_row("q", "a", "b"))
        assert texts(tokenizer, row)[1:] == [f"a{IM_END}", f"b{IM_END}"]

    def test_a_template_without_stop_token_gets_the_eos_once(self) -> None:
        template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
        )
        tokenizer = tiny_tokenizer(template, eos_token=END_OF_TEXT)
        row = kept(tokenizer, chat_row("q", "a", "b"))
        assert texts(tokenizer, row) == [
            "user: q\n\nassistant:",
            f" a{END_OF_TEXT}",
            f" b{END_OF_TEXT}",
        ]

    def test_a_template_that_ignores_add_generation_prompt_leaves_no_header_in_answers(
        self,
    ) -> None:
        template = CHATML.partition("{% if add_generation_prompt")[0]
        assert kept(tiny_tokenizer(template), chat_row("q", "a", "b")) == kept(
            tiny_tokenizer(), chat_row("q", "a", "b")
        )

    def test_an_empty_think_block_written_before_answers_joins_the_prompt(self) -> None:
        think = "<think>\n\n</think>\n\n"
        template = CHATML.replace(
            "message['content'] +",
            "('" + think.replace("\n", "\\n") + "' if loop.last and message['role'] == 'assistant'"
            " else '') + message['content'] +",
        )
        tokenizer = tiny_tokenizer(template)
        row = kept(tokenizer, chat_row("q", "a", "b"))
        assert texts(tokenizer, row) == [
            f"<|im_start|>user\nq{IM_END}\n{HEADER}{think}",
            f"a{IM_END}",
            f"b{IM_END}",
        ]

    def test_a_template_that_rewrites_the_prompt_once_answered_is_not_a_prefix(self) -> None:
        template = CHATML.replace(
            "message['content'] +",
            "(message['content'] if loop.last else message['content'][:1]) +",
        )
        result = run(tiny_tokenizer(template), chat_row("question", "a", "b"))
        assert isinstance(result, Dropped)
        assert result.reason is DropReason.NOT_A_PREFIX
        assert "question" in result.detail

    def test_many_turn_prompt(self) -> None:
        tokenizer = tiny_tokenizer()
        chat = [user("q"), assistant("r"), user("s")]
        row = kept(
            tokenizer, {"chosen": [*chat, assistant("a")], "rejected": [*chat, assistant("b")]}
        )
        assert texts(tokenizer, row) == [
            f"<|im_start|>user\nq{IM_END}\n{HEADER}r{IM_END}\n<|im_start|>user\ns{IM_END}\n{HEADER}",
            f"a{IM_END}",
            f"b{IM_END}",
        ]

    def test_many_turn_completion_scores_the_assistants_words_and_stops_only(self) -> None:
        tokenizer = tiny_tokenizer()
        row = kept(
            tokenizer,
            {
                "prompt": [user("q")],
                "chosen": [assistant("the cat"), user("and a dog?"), assistant("a bird")],
                "rejected": [assistant("no")],
            },
        )
        many, one = row.completions
        assert one.scored is None
        assert many.scored is not None
        scored = [i for i, s in zip(many.ids, many.scored, strict=True) if s]
        rest = [i for i, s in zip(many.ids, many.scored, strict=True) if not s]
        assert tokenizer.decode(scored) == f"the cat{IM_END}a bird{IM_END}"
        assert tokenizer.decode(rest) == f"\n<|im_start|>user\nand a dog?{IM_END}\n{HEADER}"
        assert many.num_scored == len(scored)
        assert tokenizer.decode(many.ids).endswith(f"a bird{IM_END}")

    def test_many_turns_without_stop_tokens_still_end_in_one_eos(self) -> None:
        template = (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        tokenizer = tiny_tokenizer(template)
        row = kept(
            tokenizer,
            {
                "prompt": [user("q")],
                "chosen": [assistant("a"), user("b"), assistant("c")],
                "rejected": [assistant("no")],
            },
        )
        many = row.completions[0]
        assert many.scored is not None
        scored = [i for i, s in zip(many.ids, many.scored, strict=True) if s]
        assert tokenizer.decode(scored) == f"ac{IM_END}"

    def test_many_turns_whose_earlier_answers_are_rewritten_are_not_a_prefix(self) -> None:
        template = CHATML.replace(
            "message['content'] +",
            "(message['content'] if loop.last or message['role'] == 'user' else 'x') +",
        )
        raw = {
            "prompt": [user("q")],
            "chosen": [assistant("a"), user("b"), assistant("c")],
            "rejected": [assistant("no")],
        }
        assert reason(tiny_tokenizer(template), raw) is DropReason.NOT_A_PREFIX

    def test_an_answer_that_also_stands_in_the_prompt(self) -> None:
        tokenizer = tiny_tokenizer()
        row = kept(tokenizer, chat_row("A or B? A", "A", "B"))
        assert texts(tokenizer, row)[1:] == [f"A{IM_END}", f"B{IM_END}"]
        assert tokenizer.decode(row.prompt_ids).endswith(f"A or B? A{IM_END}\n{HEADER}")

    @pytest.mark.parametrize("blank", ["", " ", "\n", "\t", "  ", "\n\n", "\u3000"])
    def test_blank_answers_are_empty(self, blank: str) -> None:
        assert reason(tiny_tokenizer(), chat_row("q", "word", blank)) is (
            DropReason.EMPTY_COMPLETION
        )
        many = {
            "prompt": [user("q")],
            "chosen": [assistant(blank), user("and?"), assistant("a bird")],
            "rejected": [assistant("no")],
        }
        assert reason(tiny_tokenizer(), many) is DropReason.EMPTY_COMPLETION

    @pytest.mark.parametrize("answer", ["\n\nThe cat", "\nThe cat", "  The cat", "\n\u00a0cat"])
    def test_answers_whose_first_blanks_merge_with_the_header_are_tokenised_apart(
        self, answer: str
    ) -> None:
        tokenizer = tiny_tokenizer(bos=True)
        tokenizer.backend_tokenizer.model = _merging_newlines(tokenizer)
        row = kept(tokenizer, chat_row("q", answer, "no"))
        assert texts(tokenizer, row)[1:] == [f"{answer}{IM_END}", f"no{IM_END}"]
        alone = f"{END_OF_TEXT}<|im_start|>user\nq{IM_END}\n{HEADER}"
        assert list(row.prompt_ids) == tokenizer(alone, add_special_tokens=False)["input_ids"]

    def test_an_answer_that_reads_otherwise_when_tokenised_apart_is_dropped(self) -> None:
        from tokenizers import pre_tokenizers

        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.model = _merging_newlines(tokenizer)
        # It puts a space in front of whatever it takes for the start of a text.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        assert kept(tokenizer, chat_row("q", "cat", "no"))
        result = run(tokenizer, chat_row("q", "\n\ncat", "no"))
        assert isinstance(result, Dropped)
        assert result.reason is DropReason.NOT_A_PREFIX
        assert "merge at" in result.detail

    def test_many_turns_that_begin_with_newlines_are_tokenised_apart(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.model = _merging_newlines(tokenizer)
        row = kept(
            tokenizer,
            {
                "prompt": [user("q")],
                "chosen": [assistant("\n\ncat"), user("b"), assistant("\na bird")],
                "rejected": [assistant("no"), user("\nb"), assistant("\ndog")],
            },
        )
        for many, words in zip(
            row.completions, (("\n\ncat", "\na bird"), ("no", "\ndog")), strict=True
        ):
            assert many.scored is not None
            scored = [i for i, s in zip(many.ids, many.scored, strict=True) if s]
            assert tokenizer.decode(scored) == "".join(f"{word}{IM_END}" for word in words)

    def test_a_template_that_takes_thoughts_out_may_leave_nothing(self) -> None:
        written = "message['content'].split('</think>')[-1]"
        tokenizer = tiny_tokenizer(CHATML.replace("message['content']", written))
        for answer in ("<think>Hm.</think>", "<think>Hm.</think>\n\n"):
            assert reason(tokenizer, chat_row("q", "word", answer)) is DropReason.EMPTY_COMPLETION

    def test_a_template_that_trims_leaves_a_blank_answer_empty(self) -> None:
        template = CHATML.replace("message['content']", "message['content'] | trim")
        assert reason(tiny_tokenizer(template), chat_row("q", "word", " ")) is (
            DropReason.EMPTY_COMPLETION
        )

    @pytest.mark.parametrize(
        ("raw", "why"),
        [
            (chat_row("q", "a", ""), DropReason.EMPTY_COMPLETION),
            (chat_row("q", "a", "a"), DropReason.EQUAL_COMPLETIONS),
            (
                {"prompt": [], "chosen": [assistant("a")], "rejected": [assistant("b")]},
                DropReason.EMPTY_PROMPT,
            ),
            (
                {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("a")]},
                DropReason.EMPTY_PROMPT,
            ),
            (
                {"chosen": [user("q"), assistant("a")], "rejected": [user("q")]},
                DropReason.EMPTY_COMPLETION,
            ),
            (
                {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
                DropReason.EQUAL_COMPLETIONS,
            ),
            (
                {"prompt": "q", "chosen": [assistant("a"), user("b")], "rejected": "c"},
                DropReason.LAST_NOT_ASSISTANT,
            ),
            (
                {"prompt": "q", "chosen": [user("b"), assistant("a")], "rejected": "c"},
                DropReason.NOT_A_PREFIX,
            ),
            (chat_row("q", f"a{IM_END}", "b"), DropReason.STOP_TOKEN_INSIDE),
            (chat_row("q", f"a{IM_END}b", "b"), DropReason.STOP_TOKEN_INSIDE),
            (
                {
                    "prompt": "q",
                    "chosen": [assistant(f"a{IM_END}"), user("b"), assistant("c")],
                    "rejected": "d",
                },
                DropReason.STOP_TOKEN_INSIDE,
            ),
        ],
    )
    def test_untrainable_rows(self, raw: dict[str, Any], why: DropReason) -> None:
        assert reason(tiny_tokenizer(), raw) is why

    def test_an_answer_that_opens_with_a_user_turn_is_refused_by_any_template(self) -> None:
        # This template opens no answer, so that the text of this row does begin with the prompt.
        template = CHATML.partition("{% if add_generation_prompt")[0]
        raw = {"prompt": "q", "chosen": [user("b"), assistant("a")], "rejected": "c"}
        assert reason(tiny_tokenizer(template), raw) is DropReason.NOT_A_PREFIX

    def test_answers_told_apart_by_text_the_template_trims_are_equal(self) -> None:
        template = CHATML.replace("message['content']", "message['content'] | trim")
        raw = chat_row("q", "a", "a ")
        assert reason(tiny_tokenizer(template), raw) is DropReason.EQUAL_COMPLETIONS

    def test_the_templates_own_refusal_is_counted_with_its_words(self) -> None:
        template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
            "{% endif %}" + CHATML
        )
        raw = chat_row("q", "a", "b")
        raw["prompt"].insert(0, {"role": "system", "content": "s"})
        result = run(tiny_tokenizer(template), raw)
        assert isinstance(result, Dropped)
        assert result.reason is DropReason.TEMPLATE_REFUSED
        assert "no system role" in result.detail

    def test_an_ending_unlike_the_probes_is_counted(self) -> None:
        template = CHATML.replace(
            "'<|im_end|>\n'", "('!' if 'z' in message['content'] else '<|im_end|>\n')"
        )
        assert reason(tiny_tokenizer(template), chat_row("q", "z", "b")) is (
            DropReason.UNEXPECTED_ENDING
        )

    def test_no_chat_template(self) -> None:
        with pytest.raises(DataError, match="--chat_template NAME"):
            run(tiny_tokenizer(None), chat_row("q", "a", "b"))

    def test_broken_template(self) -> None:
        with pytest.raises(DataError, match="fails on a question and its answer"):
            run(tiny_tokenizer("{{ nothing.at.all }}"), chat_row("q", "a", "b"))

    def test_tools_are_rendered_or_refused(self) -> None:
        raw = chat_row("q", "a", "b", tools=[{"type": "function", "function": {"name": "f"}}])
        tokenizer = tiny_tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
        assert tokenizer.decode(kept(tokenizer, raw).prompt_ids).startswith('[{"type": "function"')
        with pytest.raises(DataError, match="f:1 has tools, and the chat template does not"):
            run(tiny_tokenizer(), raw)

    def test_calls_of_tools_are_not_lost_in_silence(self) -> None:
        raw = chat_row("q", "a", "b")
        raw["chosen"][0]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
        with pytest.raises(DataError, match="f:1 has calls of tools, and the chat template does"):
            run(tiny_tokenizer(), raw)
        raw = chat_row("q", "a", "b")
        raw["prompt"] += [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
        with pytest.raises(DataError, match="f:1 has calls of tools"):
            run(tiny_tokenizer(), raw)

    def test_bos_once_whether_or_not_the_template_writes_it(self) -> None:
        plain = tiny_tokenizer(bos=True)
        writes = tiny_tokenizer("{{ bos_token }}" + CHATML, bos=True)
        without = tiny_tokenizer()
        raw = chat_row("q", "a", "b")
        for tokenizer in (plain, writes):
            row = kept(tokenizer, raw)
            assert row.prompt_ids[0] == tokenizer.bos_token_id
            assert row.prompt_ids[1:] == kept(without, raw).prompt_ids
            assert row.completions == kept(without, raw).completions


class TestText:
    def test_continued_as_it_stands_and_ended_once(self) -> None:
        tokenizer = tiny_tokenizer(None, eos_token=END_OF_TEXT)
        row = kept(tokenizer, text_row("The capital is", " Paris.", f" big.{END_OF_TEXT}"))
        assert texts(tokenizer, row) == [
            "The capital is",
            f" Paris.{END_OF_TEXT}",
            f" big.{END_OF_TEXT}",
        ]

    def test_bos_once_and_no_eos_after_the_prompt(self) -> None:
        tokenizer = tiny_tokenizer(None, bos=True)
        for prompt in ("The capital is", f"{END_OF_TEXT}The capital is"):
            row = kept(tokenizer, text_row(prompt, " Paris.", " big."))
            assert tokenizer.decode(row.prompt_ids) == f"{END_OF_TEXT}The capital is"
            assert all(tokenizer.bos_token_id not in c.ids for c in row.completions)

    def test_tokenizer_that_puts_an_eos_behind(self) -> None:
        from tokenizers import processors

        tokenizer = tiny_tokenizer(None)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A {IM_END}",
            special_tokens=[(END_OF_TEXT, 0), (IM_END, tokenizer.eos_token_id)],
        )
        row = kept(tokenizer, text_row("The cat", " sat", " ran"))
        assert texts(tokenizer, row) == [f"{END_OF_TEXT}The cat", f" sat{IM_END}", f" ran{IM_END}"]

    def test_a_prompt_ending_in_a_space_merges_with_the_answer(self) -> None:
        result = run(tiny_tokenizer(), text_row("The capital is ", "Paris", "in France"))
        assert isinstance(result, Dropped)
        assert result.reason is DropReason.NOT_A_PREFIX
        assert "'The capital is '" in result.detail

    @pytest.mark.parametrize(
        ("raw", "why"),
        [
            (text_row("", " a", " b"), DropReason.EMPTY_PROMPT),
            (text_row("q", "", " b"), DropReason.EMPTY_COMPLETION),
            (text_row("q:", " ", " b"), DropReason.EMPTY_COMPLETION),
            (text_row("q:", " a", f"\n{IM_END}"), DropReason.EMPTY_COMPLETION),
            (text_row("q", " a", IM_END), DropReason.EMPTY_COMPLETION),
            (text_row("q", " a", " a"), DropReason.EQUAL_COMPLETIONS),
            (text_row("q", " a", f" a{IM_END}"), DropReason.EQUAL_COMPLETIONS),
            (text_row("q", " a", f" b{IM_END} c"), DropReason.STOP_TOKEN_INSIDE),
            (text_row("q", " a", f" b{IM_END}{IM_END}"), DropReason.STOP_TOKEN_INSIDE),
        ],
    )
    def test_untrainable_rows(self, raw: dict[str, Any], why: DropReason) -> None:
        assert reason(tiny_tokenizer(), raw) is why

    def test_an_empty_prompt_after_a_bos_has_a_token_that_predicts_the_answer(self) -> None:
        row = kept(tiny_tokenizer(bos=True), text_row("", " a", " b"))
        assert len(row.prompt_ids) == 1

    def test_hh(self) -> None:
        tokenizer = tiny_tokenizer()
        head = "\n\nHuman: hi\n\nAssistant:"
        row = kept(tokenizer, {"chosen": head + " yes", "rejected": head + " you"})
        assert texts(tokenizer, row) == [head, f" yes{IM_END}", f" you{IM_END}"]

    def test_no_eos(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="has no eos_token"):
            run(tokenizer, text_row("q", " a", " b"))


def test_prompt_key_is_of_the_prompts_ids_alone() -> None:
    tokenizer = tiny_tokenizer()
    keys = [
        kept(tokenizer, chat_row(*texts)).prompt_key
        for texts in [("q", "a", "b"), ("q", "c", "d"), ("p", "a", "b")]
    ]
    assert keys[0] == keys[1] != keys[2]
    assert all(0 <= key < 2**64 for key in keys)


def test_batches_give_what_single_rows_give_in_order() -> None:
    tokenizer = tiny_tokenizer()
    raws = [
        chat_row("q", "a", "b"),
        chat_row("q", "a", "a"),
        text_row("q", " a", " b"),
        {
            "prompt": [user("q")],
            "chosen": [assistant("a"), user("b"), assistant("c")],
            "rejected": [assistant("no")],
        },
    ]
    examples = [parse_row("f:1", raw, dataset="set", column_map={}) for raw in raws]
    batch = PairTokenizer(tokenizer)([e for e in examples if isinstance(e, Example)])
    assert batch == [run(tokenizer, raw) for raw in raws]
    assert PairTokenizer(tokenizer)([]) == []


def test_a_pair_tokenizer_travels_to_other_processes() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    examples = [
        parse_row("f:1", raw, dataset="set", column_map={})
        for raw in (chat_row("q", "\n\na", "b"), text_row("q", " a", " b"))
    ]
    rows = [example for example in examples if isinstance(example, Example)]
    before = PairTokenizer(tokenizer)
    expected = before(rows)
    assert pickle.loads(pickle.dumps(before))(rows) == expected
    assert PairTokenizer(pickle.loads(pickle.dumps(tokenizer)))(rows) == expected


# Text as people write it, with what breaks careless code: blanks at the edges, newlines, emoji.
ANY_TEXT = st.text(
    st.sampled_from("aA 1.\n\t?Pé✓🙂") | st.characters(codec="utf-8"), min_size=1, max_size=30
)
TOKENIZERS = {
    (bos, chat): tiny_tokenizer(CHATML if chat else None, bos=bos)
    for bos in (False, True)
    for chat in (False, True)
}


@settings(max_examples=200, deadline=None)
@given(prompt=ANY_TEXT, chosen=ANY_TEXT, rejected=ANY_TEXT, bos=st.booleans())
def test_chat_rows_keep_every_promise(prompt: str, chosen: str, rejected: str, bos: bool) -> None:
    tokenizer = TOKENIZERS[bos, True]
    result = run(tokenizer, chat_row(prompt, chosen, rejected))
    if isinstance(result, Dropped):
        blank = not (chosen.strip() and rejected.strip())
        expected = DropReason.EMPTY_COMPLETION if blank else DropReason.EQUAL_COMPLETIONS
        assert result.reason in (expected, DropReason.EQUAL_COMPLETIONS)
        assert blank or chosen == rejected
        return
    stop = tokenizer.convert_tokens_to_ids(IM_END)
    for content, completion in zip((chosen, rejected), result.completions, strict=True):
        messages = [user(prompt), assistant(content)]
        joint = tokenizer.apply_chat_template(messages, tokenize=False)
        joint_ids = tokenizer(joint.removesuffix("\n"), add_special_tokens=bos)["input_ids"]
        ids = list(result.prompt_ids + completion.ids)
        assert ids == joint_ids or joint_ids[: len(result.prompt_ids)] != list(result.prompt_ids)
        assert tokenizer.decode(ids) == tokenizer.decode(joint_ids)
        assert completion.ids[-1] == stop
        assert stop not in completion.ids[:-1]
        assert tokenizer.decode(completion.ids[:-1]) == content
    assert result.prompt_ids.count(0) == int(bos)


@settings(max_examples=200, deadline=None)
@given(prompt=ANY_TEXT, chosen=ANY_TEXT, rejected=ANY_TEXT, bos=st.booleans())
def test_text_rows_keep_every_promise(prompt: str, chosen: str, rejected: str, bos: bool) -> None:
    tokenizer = TOKENIZERS[bos, False]
    result = run(tokenizer, text_row(prompt, chosen, rejected))
    if isinstance(result, Dropped):
        blank = not (chosen.strip() and rejected.strip())
        if result.reason is DropReason.PROMPT_REPEATED:
            assert chosen.startswith(prompt)
            assert rejected.startswith(prompt)
            return
        reasons = (DropReason.EQUAL_COMPLETIONS, DropReason.NOT_A_PREFIX)
        assert result.reason in reasons or (blank and result.reason is DropReason.EMPTY_COMPLETION)
        return
    for content, completion in zip((chosen, rejected), result.completions, strict=True):
        ids = tokenizer(prompt + content, add_special_tokens=bos)["input_ids"]
        assert list(result.prompt_ids + completion.ids) == [*ids, tokenizer.eos_token_id]
        assert tokenizer.decode(completion.ids[:-1]) == content
