"""`final/README.md`: what the model is, and how it was made."""

import json
from collections.abc import Mapping
from typing import Any

from preftune.config.experiment import ExperimentConfig

_CARD = """---
library_name: {library}
base_model: {model}
tags:
- preftune
{losses}
---

# {name}

{what} `{model}`, trained on {trained_on} with
[preftune](https://pypi.org/project/preftune/) {version}, loss `{loss}`.

- Data: `{dataset}`, {num_pairs} {unit} (dropped: {dropped})
- Run: `{run}` of experiment `{experiment}`
- Steps: {steps}, {batch} {unit} each; learning rate {learning_rate:g}, {schedule}
{knobs}- Products in {precision}; weights of this folder in {save_dtype}

```python
{usage}
```

The licence of `{model}` applies to this model too.
"""


_MODEL_USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""
_ADAPTER_USAGE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""
_QUANTIZED_USAGE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

settings = BitsAndBytesConfig({settings})
base = AutoModelForCausalLM.from_pretrained(
    "{model}", dtype="{dtype}", quantization_config=settings
)
model = PeftModel.from_pretrained(base, "PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")

# The adapter was trained over this quantised base. `preftune merge` adds it to the weights that
# these stand for, not to the original ones."""


def model_card(
    config: ExperimentConfig,
    manifest: Mapping[str, Any],
    is_adapter: bool = False,
    record: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with the hub's metadata in front.

    Args:
        config: of the run.
        manifest: of the run; its counts are quoted.
        is_adapter: whether the folder holds a LoRA adapter alone.
        record: how the adapter's base was quantised, if it was; see `base_record`.
    """
    train = manifest["data"]["train"]
    # A local path is the machine's own; the hub's metadata wants a name.
    model = str(config.model_name_or_path).rstrip("/").rsplit("/", 1)
    name = (
        "/".join(model)
        if not str(config.model_name_or_path).startswith(("/", ".", "~"))
        else model[-1]
    )
    return _CARD.format(
        model=name,
        library="peft" if is_adapter else "transformers",
        what="A LoRA adapter for" if is_adapter else "Fine-tuned from",
        usage=_usage(name, is_adapter, record or {}),
        **_training_of(config, model[-1]),
        version=manifest["versions"]["preftune"],
        dataset=", ".join(name.rsplit("/", 1)[-1] for name, _ in config.sources),
        run=config.run_name,
        experiment=config.exp_name,
        num_pairs=train["num_pairs"],
        dropped=json.dumps(train["dropped"]),
        steps=manifest.get("final_step", manifest["steps"]),
        batch=manifest["global_batch_size"],
        learning_rate=config.peak_rate,
        schedule=config.lr_scheduler_type,
        precision=manifest["precision"],
        save_dtype=manifest["save_dtype"],
    )


def _usage(model: str, is_adapter: bool, record: Mapping[str, Any]) -> str:
    if not record:
        return _ADAPTER_USAGE.format(model=model) if is_adapter else _MODEL_USAGE
    settings = {key: value for key, value in record.items() if key != "dtype"}
    if "load_in_8bit" in settings:
        settings["llm_int8_threshold"] = 0.0
    words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return _QUANTIZED_USAGE.format(settings=words, model=model, dtype=record["dtype"])


def _training_of(config: ExperimentConfig, model: str) -> dict[str, str]:
    """The card's words on the stage and its loss."""
    if config.stage == "sft":
        return {
            "name": f"{model} after supervised fine-tuning",
            "losses": "- sft",
            "loss": "negative log-likelihood of the answers' tokens",
            "trained_on": "conversations",
            "unit": "rows",
            "knobs": "",
        }
    knobs = json.dumps({loss.value: config.knobs_of(loss) for loss in config.loss_types})
    return {
        "name": f"{model} aligned with {' + '.join(config.loss_types)}",
        "losses": "\n".join(f"- {loss.value}" for loss in config.loss_types),
        "loss": " + ".join(config.loss_types),
        "trained_on": "preference pairs",
        "unit": "pairs",
        "knobs": f"- Loss settings: {knobs}\n",
    }
