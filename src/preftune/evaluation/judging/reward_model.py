"""A judge that scores each answer by itself: a sequence classifier with one output."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from preftune.errors import ModelError
from preftune.evaluation.win_rate import Verdict
from preftune.schema import Message

_READ = ("input_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class RewardModelJudge:
    """Prefers the answer with the higher score; both orders are one and the same to it."""

    model: Any
    tokenizer: Any
    parallel: int = 1
    _known: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(
        cls, name: str, device: torch.device, *, trust_remote_code: bool
    ) -> "RewardModelJudge":
        """Load it.

        Args:
            name: a folder or a name on the Hub.
            device: to compute on.
            trust_remote_code: run code that comes with it.

        Raises:
            ModelError: it cannot be loaded, or is no reward model.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # never a pickle
                output_loading_info=True,
            )
        except Exception as error:  # whatever a library makes of a damaged or crafted file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"judge_model is {name!r}: it cannot be loaded ({reason})") from error
        if missing := sorted(loading["missing_keys"]):
            raise ModelError(
                f"judge_model is {name!r}: its files lack {', '.join(missing[:3])}, which would be "
                "random; give a reward model"
            )
        if model.config.num_labels != 1:
            raise ModelError(
                f"judge_model is {name!r}, which has {model.config.num_labels} outputs; a reward "
                "model has one"
            )
        if not tokenizer.chat_template:
            raise ModelError(f"judge_model is {name!r}, whose tokenizer has no chat template")
        return cls(model.to(device).eval(), tokenizer)

    def compare(self, prompt: list[Message], first: str, second: str) -> Verdict:
        """The answer with the higher score; a score that is not finite is no verdict."""
        a, b = (self._score(prompt, answer) for answer in (first, second))
        if not (math.isfinite(a) and math.isfinite(b)):
            return None
        return "tie" if a == b else "first" if a > b else "second"

    @torch.no_grad()
    def _score(self, prompt: list[Message], answer: str) -> float:
        turns = [*prompt, {"role": "assistant", "content": answer}]
        text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        if text not in self._known:  # the other order asks for the same two
            inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            ids = {k: v.to(self.model.device) for k, v in inputs.items() if k in _READ}
            self._known[text] = self.model(**ids).logits.float().item()
        return self._known[text]
