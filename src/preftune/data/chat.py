"""Chat templates: the built-in ones, and what a template writes around an assistant's answer."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from preftune.data.template_files import builtin_templates, template_text
from preftune.errors import ConfigError, DataError
from preftune.schema import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION: Message = {"role": "user", "content": "preftune's probe question"}
_ANSWER: Message = {"role": "assistant", "content": "preftune's probe answer"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "preftune_probe_tool",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_CALL: Message = {
    "role": "assistant",
    "content": "preftune's probe answer",
    "tool_calls": [
        {
            "id": "probe0001",  # the length that Mistral's templates insist on
            "type": "function",
            "function": {"name": _TOOL["function"]["name"], "arguments": {}},
        }
    ],
}

MOST_SECONDS = 10.0
"""A template renders a conversation in about a millisecond."""
MOST_CHARACTERS = 50_000_000
# What a template raises itself, and what its expressions do: overflows, depths, missing names.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
_REFUSALS += (RecursionError, MemoryError, TimeoutError)

_DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26"}
_DATE |= {"%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}


class TemplateRefused(Exception):
    """The chat template raised an error on these messages."""


@dataclass(frozen=True, slots=True)
class AnswerFrame:
    r"""What a template writes around the content of the last, assistant's, message.

    For SmolLM2: lead `""`, stop `"<|im_end|>"`, trailer `"\n"`.
    """

    lead: str
    """Header text that comes after the generation prompt and before the content: the empty think
    block of Qwen3, the whole header where a template ignores `add_generation_prompt`. Blanks alone
    do not count: they merge with the answer's first token and so belong to it."""
    blank: str
    """Those blanks: the space in Mistral's `[/INST] answer`."""
    stop: str
    """From the content's end through the stop token; empty if the template writes none."""
    trailer: str
    """What comes after the stop token, and is not part of the answer."""
    stop_id: int
    """Id of the stop token; the tokenizer's `eos_token` if the template writes none."""


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> None:
    """Give a tokenizer a chat template.

    A built-in template of a tokenizer that begins texts with a BOS writes it, too: chat prompts are
    tokenised as they are rendered when the model is used, without a BOS of the tokenizer's own.

    Args:
        tokenizer: changed in place; saved with the model, so that users get the same template.
        chat_template: a built-in name, the path of a Jinja file, or the folder or Hub id of a
            tokenizer whose template is taken.

    Raises:
        ConfigError: nothing has that name, or its template cannot render a question and answer, or
            ends an answer with what is no token of this tokenizer.
    """
    text = template_text(chat_template)
    if chat_template in builtin_templates() and front_tokens(tokenizer) == [tokenizer.bos_token_id]:
        text = "{{- bos_token }}" + text
    before = tokenizer.chat_template
    tokenizer.chat_template = text
    try:
        answer_frame(tokenizer)
    except DataError as error:
        tokenizer.chat_template = before
        raise ConfigError(f"chat_template {chat_template!r}: {error}") from None
    except TemplateRefused as error:
        tokenizer.chat_template = before
        raise ConfigError(
            f"chat_template: {chat_template!r} does not work on a question and its answer: "
            f"{error}; correct the template, or use a built-in one "
            f"({', '.join(builtin_templates())})"
        ) from None


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
    open_answer: bool = False,
) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
        tokenizer: has a `chat_template`.
        messages: at least one.
        tools: schemas that the template may show.
        open_answer: end with the header of the assistant's next message.

    Raises:
        TemplateRefused: the template raised an error.
    """
    try:
        with _in_time():
            text = tokenizer.apply_chat_template(
                messages,
                tools=tools,  # pyright: ignore[reportArgumentType]
                add_generation_prompt=open_answer,
                tokenize=False,
                chat_template=_with_fixed_date(tokenizer.get_chat_template(tools=tools)),  # pyright: ignore
            )
    except _REFUSALS as error:
        message = (str(error).strip().splitlines() or [""])[0]
        raise TemplateRefused(f"{type(error).__name__}: {message}") from error
    assert isinstance(text, str)
    if len(text) > MOST_CHARACTERS:
        raise TemplateRefused(f"it writes {len(text)} characters, more than {MOST_CHARACTERS}")
    return text


@contextmanager
def _in_time() -> Iterator[None]:
    """Interrupt a template that does not end.

    By a signal, so only on the main thread, and only where nobody else waits for that signal.
    What a template does in one call, such as a very long `*`, is not interrupted.
    """
    watched = threading.current_thread() is threading.main_thread()
    if not watched or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"it did not end within {MOST_SECONDS:g} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _with_fixed_date(template: str) -> str:
    """Make a template that writes today's date write Llama 3.1's default, 26 Jul 2024, instead.

    A prompt must not change overnight, between the scoring of the reference and a resumed run.
    transformers takes no function for a template, so a macro of the same name covers its own.
    """
    if "strftime_now" not in template:
        return template
    date = "".join(f"|replace('{key}','{value}')" for key, value in _DATE.items())
    return f"{{% macro strftime_now(format) -%}}{{{{ format{date} }}}}{{%- endmacro +%}}{template}"


def answer_frame(tokenizer: "PreTrainedTokenizerBase") -> AnswerFrame:
    """Work out, by rendering a probe, what the template writes around an answer.

    The probe's content is known and occurs once, so looking for it here is safe; no row is ever
    searched for its text.

    Raises:
        DataError: no chat template, one that does not write the assistant's content as it is, one
            that ends it with what is no token, or one that writes no stop token while the tokenizer
            has no `eos_token` either.
        TemplateRefused: the template raised an error.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are chat messages, and the tokenizer has no chat template; choose one with "
            f"--chat_template NAME ({', '.join(builtin_templates())}, the path of a .jinja file, "
            "or the Hub id of a tokenizer that has one)"
        )
    header = render(tokenizer, [_QUESTION], open_answer=True)
    full = render(tokenizer, [_QUESTION, _ANSWER])
    content = _ANSWER["content"]
    if full.count(content) != 1:
        raise DataError(
            f"the chat template writes the assistant's message {full.count(content)} times where "
            "once was expected; choose another template with --chat_template"
        )
    before, _, tail = full.partition(content)
    lead = before[len(header) :] if before.startswith(header) else ""
    stop, stop_id = _stop(tokenizer, tail)
    return AnswerFrame(
        lead=lead if lead.strip() else "",
        blank="" if lead.strip() else lead,
        stop=stop,
        trailer=tail[len(stop) :],
        stop_id=stop_id,
    )


def shows_tools(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template writes tool schemas at all."""
    plain = render(tokenizer, [_QUESTION], open_answer=True)
    return render(tokenizer, [_QUESTION], tools=[_TOOL], open_answer=True) != plain


def shows_tool_calls(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template writes an assistant's calls of tools, or refuses them aloud."""
    try:
        return _TOOL["function"]["name"] in render(tokenizer, [_QUESTION, _CALL], tools=[_TOOL])
    except TemplateRefused:  # so it does on the rows, each of which is then counted
        return True


def _stop(tokenizer: "PreTrainedTokenizerBase", tail: str) -> tuple[str, int]:
    """Find the first special token in what follows an answer: its text and everything before it."""
    added = tokenizer.added_tokens_decoder
    special = {i: t.content for i, t in added.items() if t.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    # Some tokenizers add their turn marker as an ordinary token, and some add runs of blanks too.
    others = {i: t.content for i, t in added.items() if not t.special and t.content.strip()}
    for tokens in (special, others):
        found = [(tail.find(t), -len(t), i, t) for i, t in tokens.items() if t and t in tail]
        if found:
            at, _, token_id, text = min(found)
            return tail[: at + len(text)], int(token_id)
    if tail.strip():
        raise DataError(
            f"the chat template ends an answer with {tail.strip()!r}, which holds no token of this "
            "tokenizer that could stop the model; choose a template that stops with eos_token "
            "(--chat_template alpaca, plain, tulu or zephyr), or a tokenizer that has the token"
        )
    return "", eos_id(tokenizer)


def eos_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of the end-of-sequence token.

    Raises:
        DataError: the tokenizer has none, so that nothing could end an answer.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(
            "the tokenizer has no eos_token, and nothing else marks an answer's end; set "
            "eos_token in its tokenizer_config.json"
        )
    return eos


def front_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts in front of a text by itself: `[bos]`, or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])  # pyright: ignore
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])  # pyright: ignore
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at]
    return []
