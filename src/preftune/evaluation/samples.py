"""Answers of a model to prompts, for people to read."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.schema import Message


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
