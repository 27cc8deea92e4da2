"""`final/README.md`: what the model is, and how it was made, in facts of the run alone.

Its front matter is the hub's metadata for models: base model, licence, data sets, results.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from preftune.config.experiment import ExperimentConfig
from preftune.config.hub import MAIN
from preftune.recipes.base_card import BaseCard, is_on_hub, read_base_card
from preftune.recipes.results import PREFIX

_HERE = "PATH"
"""Stands in the card for where the model is; see `card_at`."""
_INDEXED = ("loss", "perplexity", "rewards/accuracies", "rewards/margins")
"""Held-out metrics that the hub's metadata get; the table has all."""

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
_REPEAT = """`preftune train preftune.yaml --output_dir NEW` repeats the run, with paths of your own
for what was local. The file is beside this card where the model was pushed to a hub; in the run's
folder, it is `config.yaml`."""


def model_card(
    config: ExperimentConfig,
    facts: Mapping[str, Any],
    is_adapter: bool = False,
    record: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with the hub's metadata in front.

    Args:
        config: of the run.
        facts: of the run, as in run.json; `results` as of `held_out_results`.
        is_adapter: whether the folder holds a LoRA adapter alone.
        record: how the adapter's base was quantised, if it was; see `base_record`.
    """
    path = str(config.model_name_or_path)
    commit = facts.get("model_commit") or (facts.get("model") or {}).get("commit")
    base = read_base_card(path, commit or config.model_revision)
    name = _shown(path)
    words = _words_of(config)
    title = f"{name.rsplit('/', 1)[-1]} {words['title']}"
    front = _metadata(config, facts, base, title, is_adapter)
    what = "A LoRA adapter for" if is_adapter else "Fine-tuned from"
    version = facts["versions"]["preftune"]
    parts = [
        f"---\n{_yaml(front)}---",
        f"# {title}",
        f"{what} `{name}`, trained on {words['trained_on']} with "
        f"[preftune](https://pypi.org/project/preftune/) {version}, loss {words['loss']}.",
        "## Data",
        "\n".join(_data(facts, words["unit"])),
        "## Training",
        _table(("Setting", "Value"), _recipe(config, facts, words["unit"])),
        "## Results",
        _results(facts.get("results") or []),
        "## Use",
        f"```python\n{_usage(name, is_adapter, record or {})}\n```",
        *_serving(config, name, is_adapter, record or {}),
        "## Licence",
        _licence(base, name),
        "## Repeating it",
        _versions(facts) + "\n\n" + _REPEAT,
    ]
    return "\n\n".join(parts) + "\n"


def card_at(card: str, repo_id: str, branch: str) -> str:
    """The card of a model that lies on a hub: its lines of code load it from there.

    Args:
        card: as in `final/`.
        repo_id: of the repository.
        branch: in it.
    """
    elsewhere = "" if branch == MAIN else f', revision="{branch}"'
    card = card.replace(f'"{_HERE}"', f'"{repo_id}"{elsewhere}')
    if elsewhere:
        card = card.replace(f"vllm serve {_HERE}", f"vllm serve {_HERE} --revision {branch}")
    return card.replace(f"serve {_HERE}", f"serve {repo_id}").replace(f"={_HERE}", f"={repo_id}")


# ---------------------------------------------------------------- metadata


def _metadata(
    config: ExperimentConfig,
    facts: Mapping[str, Any],
    base: BaseCard,
    title: str,
    is_adapter: bool,
) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    if base.base_model is not None:
        front["base_model"] = base.base_model
        front["base_model_relation"] = "adapter" if is_adapter else "finetune"
    front |= base.licence
    sources = _sources(facts)
    if on_hub := list(dict.fromkeys(_repo_of(s["name"]) for s in sources if s.get("revision"))):
        front["datasets"] = on_hub
    losses = ["sft"] if config.stage == "sft" else [loss.value for loss in config.loss_types]
    front["tags"] = ["preftune", *losses, *(["lora"] if is_adapter else [])]
    front["pipeline_tag"] = "text-generation"
    if index := _model_index(facts, title):
        front["model-index"] = index
    return front


def _model_index(facts: Mapping[str, Any], title: str) -> list[dict[str, Any]]:
    """The last evaluation, a result for each set of held-out rows."""
    results = facts.get("results") or []
    if not results:
        return []
    held_out = {
        key.removeprefix("held_out").strip("/"): value
        for key, value in facts["data"].items()
        if key.startswith("held_out")
    }
    found = []
    for label, dataset in held_out.items():
        prefix = f"{PREFIX}{label}/" if label else PREFIX
        metrics = [
            {"type": name, "name": prefix + name, "value": results[-1][prefix + name]}
            for name in _INDEXED
            if prefix + name in results[-1]
        ]
        source = (dataset.get("sources") or [{}])[0]
        name = str(dataset["name"])
        on_hub = bool(source.get("revision"))
        about = {"type": _repo_of(name) if on_hub else "local", "name": label or _shown(name)}
        if on_hub:
            about |= {"split": source["split"], "revision": source["revision"]}
        task = {"type": "text-generation", "name": "held-out rows"}
        found.append({"task": task, "dataset": about, "metrics": metrics})
    return [{"name": title, "results": found}]


def _yaml(front: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=10**6)


# ---------------------------------------------------------------- text


def _words_of(config: ExperimentConfig) -> dict[str, str]:
    """The card's words on the stage and its loss."""
    if config.stage == "sft":
        return {
            "title": "after supervised fine-tuning",
            "loss": "negative log-likelihood of the answers' tokens",
            "trained_on": "conversations",
            "unit": "rows",
        }
    losses = " + ".join(loss.value for loss in config.loss_types)
    unit = "rows" if config.unpaired else "pairs"
    kind = "single answers" if config.unpaired else "pairs of a chosen and a rejected answer"
    return {
        "title": f"aligned with {losses}",
        "loss": f"`{losses}`",
        "trained_on": f"preferences ({kind})",
        "unit": unit,
    }


def _sources(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return facts["data"]["train"].get("sources") or []


def _data(facts: Mapping[str, Any], unit: str) -> Iterable[str]:
    """Lines on what was read, kept and dropped."""
    train = facts["data"]["train"]
    for source in _sources(facts):
        commit = f" at {source['revision']}" if source.get("revision") else ""
        amount = "" if source.get("amount") is None else f", of which {source['drawn']} were drawn"
        yield (
            f"- `{_shown(source['name'])}`{commit}, split {source['split']}: {source['read']} rows "
            f"read, {source['kept']} kept{amount}; dropped: {_reasons(source['dropped'])}"
        )
    yield f"- Trained on {train['num_pairs']} {unit}; dropped: {_reasons(train['dropped'])}"
    for label, dataset in facts["data"].items():
        if label != "train":
            named = label.removeprefix("held_out").strip("/") or _shown(str(dataset["name"]))
            yield f"- Held out, never trained on: {dataset['num_pairs']} {unit} of `{named}`"


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items()) or "none"


def _recipe(
    config: ExperimentConfig, facts: Mapping[str, Any], unit: str
) -> Iterable[tuple[str, Any]]:
    """What the numbers depend on."""
    if config.stage != "sft":
        knobs = {loss.value: config.knobs_of(loss) for loss in config.loss_types}
        yield "Loss settings", f"`{json.dumps(knobs)}`"
    yield (
        "Steps",
        f"{facts.get('final_step', facts['steps'])}, {facts['global_batch_size']} {unit} each",
    )
    if config.num_epochs is not None:
        yield "Epochs asked for", config.num_epochs
    warmup = config.warmup_steps or config.warmup_ratio
    warm = f", warm-up {warmup}" if warmup else ""
    yield "Learning rate", f"{config.peak_rate:g}, {config.lr_scheduler_type}{warm}"
    yield "Optimizer", f"{config.optimizer}, weight decay {config.weight_decay:g}"
    yield "Longest gradient", config.max_grad_norm or "not limited"
    yield "Longest row", f"{config.max_length or 'not limited'} tokens ({config.truncation})"
    if config.use_lora:
        yield "LoRA", _lora(config)
    if config.is_quantized:
        yield "Base while training", "4 bits" if config.load_in_4bit else "8 bits"
    yield "Precision", f"products {facts['precision']}, weights here {facts['save_dtype']}"
    yield "Seed", config.seed
    yield "Run", f"`{config.run_name}` of experiment `{config.exp_name}`"


def _lora(config: ExperimentConfig) -> str:
    if config.adapter_name_or_path is not None:
        return f"going on from `{_shown(config.adapter_name_or_path)}`"
    kinds = [kind for kind in ("rslora", "dora") if getattr(config, f"use_{kind}")]
    return (
        f"r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}, layers "
        f"{config.lora_target_modules}, start {config.init_lora_weights}"
        + "".join(f", {kind}" for kind in kinds)
    )


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "Nothing was held out, so nothing was measured besides the training's own metrics."
    names = [key for key in results[-1] if key != "step"]
    heads = [f"after step {result['step']}" for result in results]
    rows = [(f"`{name}`", *(_number(result.get(name)) for result in results)) for name in names]
    return (
        "On the held-out rows; metrics as [preftune names them]"
        "(https://pypi.org/project/preftune/), rewards being implicit ones.\n\n"
        + _table(("Metric", *heads), rows)
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _usage(model: str, is_adapter: bool, record: Mapping[str, Any]) -> str:
    if not record:
        return _ADAPTER_USAGE.format(model=model) if is_adapter else _MODEL_USAGE
    settings = {key: value for key, value in record.items() if key != "dtype"}
    if "load_in_8bit" in settings:
        settings["llm_int8_threshold"] = 0.0
    words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return _QUANTIZED_USAGE.format(settings=words, model=model, dtype=record["dtype"])


def _serving(
    config: ExperimentConfig, model: str, is_adapter: bool, record: Mapping[str, Any]
) -> Iterable[str]:
    """How vLLM serves it, where it can: it knows neither DoRA nor layers that trained whole."""
    if not is_adapter:
        yield f"```sh\nvllm serve {_HERE}\n```"
    elif not (record or config.use_dora or config.modules_to_save or config.adapter_name_or_path):
        rank = f" --max-lora-rank {config.lora_r}"
        yield f"```sh\nvllm serve {model} --enable-lora{rank} --lora-modules trained={_HERE}\n```"


def _licence(base: BaseCard, name: str) -> str:
    if not base.licence:
        return (
            f"That of `{name}`, which is not known here: look it up before you use this model. "
            "Those of the data may bind, too."
        )
    named = base.licence.get("license_name", base.licence["license"])
    link = base.licence.get("license_link")
    at = f" ({link})" if link else ""
    return f"{named}{at}, carried over from `{name}`. Those of the data may bind, too."


def _versions(facts: Mapping[str, Any]) -> str:
    return "Made with " + ", ".join(f"{name} {v}" for name, v in facts["versions"].items()) + "."


# ---------------------------------------------------------------- names


def _shown(name: str) -> str:
    """A name on a hub as it is; of a local path, which is the machine's own, the last part."""
    name = name.rstrip("/")
    return name if is_on_hub(_repo_of(name)) else PurePath(name).name


def _repo_of(name: str) -> str:
    """A data set's repository, of `org/name:subset@revision`."""
    return name if name.startswith(("/", ".", "~")) else name.split("@")[0].split(":")[0]
