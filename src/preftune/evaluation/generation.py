"""Answers of a model as token ids: the most likely ones, or draws from its distribution."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from preftune.model.load import LoadedModel

BATCH = 16
"""Most prompts that are answered together."""


@contextmanager
def generating(
    loaded: LoadedModel, *, autocast: torch.dtype | None = None, seed: int = 0
) -> Iterator[PreTrainedModel]:
    """The model, ready to generate; afterwards it and all random generators are as they were.

    Args:
        loaded: may be in training, and have an attention of packed rows.
        autocast: the type that products are computed in, where it is not the weights'.
        seed: of what is drawn.
    """
    model = loaded.policy.model
    device = next(model.parameters()).device
    was_training, packed = model.training, str(model.config._attn_implementation)
    gpus = [device] if device.type == "cuda" else []
    products = torch.autocast(device.type, autocast) if autocast else nullcontext()
    model.eval()
    model.set_attn_implementation(loaded.attention)
    try:
        with torch.random.fork_rng(devices=gpus), torch.no_grad(), products:
            torch.manual_seed(seed)
            yield model
    finally:
        model.set_attn_implementation(packed)
        model.train(was_training)


def answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    *,
    draw: bool = False,
    update: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """One answer to each prompt, with its stop token where that came.

    Args:
        model: see `generating`.
        prompts: token ids.
        max_new_tokens: longer answers are cut here.
        stop_ids: tokens that end an answer.
        pad_id: fills up what is shorter.
        draw: from the model's own distribution (temperature 1, nothing cut off), not greedily.
        update: called with the number of answers done.
    """
    found: list[list[int]] = []
    # Batches of prompts of like length have little padding.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for first in range(0, len(order), BATCH):
        batch = [prompts[number] for number in order[first : first + BATCH]]
        found += _batch(model, batch, max_new_tokens, stop_ids, pad_id, draw)
        update(len(found))
    by_number = dict(zip(order, found, strict=True))
    return [by_number[number] for number in range(len(prompts))]


def _batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    draw: bool,
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # a model goes on at the right end
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    # Everything that a model's own generation_config.json may have set otherwise.
    options = {"num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": max_new_tokens}
    if draw:
        options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    output = model.generate(  # type: ignore[operator]  # torch types attributes as tensors
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        do_sample=draw,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad_id,
        **options,
    )
    return [_ended(answer, stop_ids) for answer in output[:, width:].tolist()]


def _ended(answer: list[int], stop_ids: Collection[int]) -> list[int]:
    """Without what fills it up."""
    ends = [place for place, token in enumerate(answer) if token in stop_ids]
    return answer[: ends[0] + 1] if ends else answer


def stop_ids_of(model: PreTrainedModel) -> set[int]:
    """The tokens that end an answer, as the model's own files say."""
    stops = model.generation_config.eos_token_id if model.generation_config else None
    return {stops} if isinstance(stops, int) else set(stops or ())
