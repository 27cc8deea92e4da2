"""Adapters made by PEFT, and log-probs by transformers and PEFT alone, for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import IM_END, tiny_model, tiny_tokenizer


def sft_adapter(folder: Path, *, converted: bool = False, **settings: Any) -> Path:
    """An adapter for the tiny model that changes what it says, as an SFT leaves one.

    Args:
        folder: where to save it.
        converted: save it for the base as it was before PiSSA changed it.
        **settings: of PEFT's `LoraConfig`.
    """
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(tiny_model(), LoraConfig(**(options | settings)))
    if converted:  # as PEFT's documentation has it
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "initial")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    where = {"path_initial_model_for_weight_conversion": folder / "initial"} if converted else {}
    model.save_pretrained(folder, save_embedding_layers=False, **where)
    return folder


def plain_sums(model: Any, data: Path) -> dict[str, float]:
    """The mean log-prob sum of chosen and rejected answers: one unpadded forward an answer."""
    tokenizer, means = tiny_tokenizer(), {}
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            sums = []
            for row in rows:
                prompt = tokenizer.apply_chat_template(
                    row["prompt"], tokenize=False, add_generation_prompt=True
                )
                first = tokenizer(prompt).input_ids
                answer = tokenizer(row[side][0]["content"] + IM_END).input_ids
                ids = torch.tensor([[*first, *answer]])
                logps = model(input_ids=ids).logits[0, len(first) - 1 : -1].double().log_softmax(-1)
                sums.append(logps.gather(1, ids[0, len(first) :, None]).sum().item())
            means[side] = sum(sums) / len(sums)
    return means


def base_and_adapter(base: Path, adapter: Path) -> Any:
    """What a user of transformers and PEFT gets."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
