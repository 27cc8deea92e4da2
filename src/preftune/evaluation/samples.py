"""Answers of a model to prompts: for people to read, and for estimates."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.evaluation.generation import answers, stop_ids_of
from preftune.schema import Completion, Message, TokenizedExample


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    max_new_tokens: int,
    *,
    repetition_penalty: float = 1.0,
) -> list[str]:
    """The most likely answer, token by token, to each prompt.

    Args:
        model: in eval mode.
        tokenizer: with a chat template.
        prompts: conversations that end with the user's turn.
        max_new_tokens: cut longer answers here.
        repetition_penalty: logits of tokens that occurred are divided by it; 1 is off. Small models
            fall into loops without (arXiv:1909.05858, section 4.1).
    """
    device = next(model.parameters()).device
    answers = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(str(text), add_special_tokens=False, return_tensors="pt").to(device)
        output = model.generate(  # type: ignore[operator]  # torch types attributes as tensors
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            pad_token_id=pad_id_of(tokenizer),
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(str(tokenizer.decode(new, skip_special_tokens=True)).strip())
    return answers


@torch.no_grad()
def sampled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenizedExample],
    number: int,
    max_new_tokens: int,
    update: Callable[[int], None] = lambda done: None,
    *,
    stop_ids: Collection[int] = (),
) -> list[TokenizedExample]:
    """Answers drawn from the model's own distribution: temperature 1, nothing cut off.

    Args:
        model: see `generating`.
        tokenizer: whose pad token fills answers that end early.
        prompts: rows whose prompts are answered, as equally often as the number allows.
        number: of answers.
        max_new_tokens: cut longer answers here.
        update: called with the number of answers done.
        stop_ids: tokens that end an answer, besides those that the model's own files name.

    Returns:
        Rows with one answer each, its stop token included where it came.
    """
    used = prompts[:number]
    rows = [row for i, row in enumerate(used) for _ in range(i, number, len(used))]
    drawn = answers(
        model,
        [row.prompt_ids for row in rows],
        max_new_tokens,
        stop_ids_of(model).union(stop_ids),
        pad_id_of(tokenizer),
        draw=True,
        update=update,
    )
    return [
        replace(row, completions=(Completion(tuple(answer)),), roles=("chosen",))
        for row, answer in zip(rows, drawn, strict=True)
    ]


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up what is shorter than others."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)  # type: ignore[arg-type]


REPEATED = 4
"""Tokens of a sequence that counts as repeated when it comes again."""
REPETITIVE = 0.2
"""An answer is flagged when more than this part of its 4-grams came before in it."""


def repetition(ids: Sequence[int]) -> float:
    """The part of an answer's 4-grams that came before in it; 0 for answers of fewer tokens.

    Source: seq-rep-4 of Welleck et al., "Neural Text Generation with Unlikelihood Training",
    arXiv:1908.04319.
    """
    grams = [tuple(ids[i : i + REPEATED]) for i in range(len(ids) - REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt that is answered again and again."""

    row: TokenizedExample
    dataset: str
    """Label of the held-out set, or train."""

    @property
    def chosen(self) -> Sequence[int] | None:
        """The answer to be learnt; None where the row's is one to be unlearnt."""
        return None if self.row.roles[0] == "rejected" else self.row.completions[0].ids


def sample_row(
    step: int,
    asked: AskedPrompt,
    start: Sequence[int],
    policy: Sequence[int],
    stop_ids: Collection[int],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    """One line of samples.jsonl: answers side by side, and what is remarkable about them.

    Args:
        step: of the policy.
        asked: the prompt.
        start: what the policy answered before its first step, token ids.
        policy: what it answers now.
        stop_ids: tokens that end an answer.
        decode: ids as text.
    """
    given = {"chosen": asked.chosen, "start": start, "policy": policy}
    said = {name: ids for name, ids in given.items() if ids is not None}
    length = None if asked.chosen is None else len(asked.chosen)
    return {
        "step": step,
        "row_id": asked.row.row_id,
        "dataset": asked.dataset,
        "source": asked.row.source,
        "prompt": decode(asked.row.prompt_ids),
        **{name: None if ids is None else decode(ids) for name, ids in given.items()},
        "num_tokens": {name: len(ids) for name, ids in said.items()},
        "repetition": {name: round(repetition(ids), 4) for name, ids in said.items()},
        "flags": {
            "start": _flags(start, length, stop_ids),
            "policy": _flags(policy, length, stop_ids),
        },
    }


def _flags(ids: Sequence[int], chosen: int | None, stop_ids: Collection[int]) -> list[str]:
    cut = not ids or ids[-1] not in stop_ids
    found = {
        "cut": cut,
        "repetitive": repetition(ids) > REPETITIVE,
        "long": chosen is not None and len(ids) > 2 * chosen,
        "short": chosen is not None and not cut and 2 * len(ids) < chosen,
    }
    return [name for name, is_so in found.items() if is_so]
