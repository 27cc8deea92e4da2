"""Answers of a model to prompts: for people to read, and for estimates."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

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
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
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
) -> list[TokenizedExample]:
    """Answers drawn from the model's own distribution: temperature 1, nothing cut off.

    Args:
        model: in eval mode.
        tokenizer: whose pad token fills answers that end early.
        prompts: rows whose prompts are answered, as equally often as the number allows.
        number: of answers.
        max_new_tokens: cut longer answers here.
        update: called with the number of answers done.

    Returns:
        Rows with one answer each, its stop token included where it came.
    """
    device = next(model.parameters()).device
    stop_ids = model.generation_config.eos_token_id if model.generation_config else None
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else (stop_ids or [])
    samples: list[TokenizedExample] = []
    for index, row in enumerate(prompts[: min(number, len(prompts))]):
        copies = len(range(index, number, len(prompts)))
        ids = torch.tensor([row.prompt_ids], device=device)
        output = model.generate(  # type: ignore[operator]  # torch types attributes as tensors
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            num_return_sequences=copies,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        for answer in output[:, ids.shape[1] :].tolist():
            ends = [place for place, token in enumerate(answer) if token in stop_ids]
            completion = Completion(tuple(answer[: ends[0] + 1] if ends else answer))
            samples.append(replace(row, completions=(completion,), roles=("chosen",)))
        update(len(samples))
    return samples
