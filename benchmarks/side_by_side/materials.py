"""Models and pairs that both tools read: made once, before anything is measured."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from preftune.config.paths import cache_root
from preftune.data.pairs import load_pairs
from preftune.model.embedded import embedded_model

NOISE = 0.05
"""Of the perturbed policy: standard deviations of each weight matrix."""
EOS = "<eos>"


def prepare_model(spec: str, folder: str, with_policy: bool) -> dict[str, Any]:
    """Find or make a model.

    Args:
        spec: `embedded`, a folder, or `random-tiny`, `random-small`, `random-0.5b`, with `:N` for
            another vocabulary.
        folder: where to put what is made.
        with_policy: also make a policy that differs from the model.

    Returns:
        `base` and `policy`, folders, and the numbers of `counts.ModelShape`.
    """
    base = _base(spec, Path(folder))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy = Path(folder) / "policy"
    if with_policy and not policy.exists():
        _perturb(model)
        model.save_pretrained(policy)
        AutoTokenizer.from_pretrained(base).save_pretrained(policy)
    config = model.config.get_text_config()
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // (
        config.num_attention_heads
    )
    return {
        "base": str(base),
        "policy": str(policy),
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": {
            "backbone": matrices,
            "head": config.vocab_size * config.hidden_size,
            "layers": config.num_hidden_layers,
            "width": config.num_attention_heads * head_size,
        },
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
    }


def _base(spec: str, folder: Path) -> Path:
    if spec == "embedded":
        return embedded_model(cache_root(None), print)
    if not spec.startswith("random-"):
        if not (Path(spec) / "config.json").is_file():
            raise SystemExit(f"--model {spec}: no folder with a config.json; see --help")
        return Path(spec).resolve()
    base = folder / "base"
    if not base.exists():
        name, _, vocabulary = spec.removeprefix("random-").partition(":")
        config = _random_config(name, int(vocabulary) if vocabulary else None)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        word_tokenizer(config.vocab_size).save_pretrained(base)
    return base


def _random_config(name: str, vocabulary: int | None) -> PreTrainedConfig:
    common: dict[str, Any] = {"max_position_embeddings": 8192, "eos_token_id": 0}
    if name == "0.5b":  # the shape of Qwen2.5-0.5B
        return Qwen2Config(
            vocab_size=vocabulary or 151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **common,
        )
    sizes = {"tiny": (64, 2, 512), "small": (256, 8, 8192)}
    if name not in sizes:
        raise SystemExit(f"--model random-{name}: there are random-tiny, random-small, random-0.5b")
    hidden, layers, default = sizes[name]
    return LlamaConfig(
        vocab_size=vocabulary or default,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **common,
    )


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Every word `tN` is token N, so that a text says exactly which ids it becomes."""
    words = {EOS: 0} | {f"t{i}": i for i in range(1, size)}
    backend = Tokenizer(models.WordLevel(words, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)


def _perturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += NOISE * parameter.std() * noise


def prepare_pairs(
    dataset: str,
    model: str,
    folder: str,
    batch_size: int,
    num_batches: int,
    max_length: int | None,
    seed: int,
) -> dict[str, Any]:
    """Write the pairs of a run, in two orders, one JSON object a line.

    `random` holds the first batches of a shuffled epoch. `sorted` holds batches of an epoch sorted
    by length, evenly spaced from shortest to longest, in shuffled order.

    Args:
        dataset: a .jsonl file, or `random:PxC` for P prompt and C answer tokens on average.
        model: whose tokenizer to use.
        folder: where to write.
        batch_size: pairs of a step.
        num_batches: steps.
        max_length: rows over it are left out; None for no limit.
        seed: of what is drawn.

    Returns:
        For each order, `file` and `batches`: lists of the four numbers of `counts.Lengths`.
    """
    place = Path(folder)
    num_rows = batch_size * num_batches
    source = Path(dataset)
    if dataset.startswith("random:"):
        source = _write_random_pairs(dataset, model, place / "all.jsonl", num_rows, seed)
    rows = load(str(source), model, max_length)
    if len(rows) < num_rows:
        raise SystemExit(
            f"{dataset} has {len(rows)} pairs, and {num_batches} steps of {batch_size} need "
            f"{num_rows}; lower --steps or --gate-steps"
        )
    lines = source.read_text("utf-8").splitlines()
    rng = random.Random(seed)
    everyone = list(range(len(rows)))
    by_length = sorted(everyone, key=lambda i: int(rows.longest_side[i]))
    groups = [by_length[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    groups = [group for group in groups if len(group) == batch_size]
    picked = [groups[(2 * i + 1) * len(groups) // (2 * num_batches)] for i in range(num_batches)]
    rng.shuffle(picked)
    rng.shuffle(everyone)
    orders = {"random": everyone[:num_rows], "sorted": [i for group in picked for i in group]}
    result = {}
    for name, order in orders.items():
        file = place / f"{name}.jsonl"
        numbers = [int(rows.row_id(i).rsplit(":", 1)[1]) for i in order]
        file.write_text("".join(lines[number - 1] + "\n" for number in numbers), "utf-8")
        examples = [rows[i] for i in order]
        lengths = [
            [len(e.prompt_ids), *(len(c.ids) for c in e.completions), e.prompt_key]
            for e in examples
        ]
        batches = [lengths[i : i + batch_size] for i in range(0, num_rows, batch_size)]
        result[name] = {"file": str(file), "batches": batches}
    return result


def load(file: str, model: str, max_length: int | None) -> Any:
    """Tokenised pairs of a file, as preftune reads them: what both tools train on."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = load_pairs(file, tokenizer=tokenizer, max_length=max_length, max_dropped_fraction=1.0)
    return data.examples


def _write_random_pairs(spec: str, model: str, file: Path, num_rows: int, seed: int) -> Path:
    """Pairs of random tokens, of log-normal lengths; `random:PxC=` makes all lengths equal."""
    found = re.fullmatch(r"random:(\d+)x(\d+)(=?)", spec)
    if found is None:
        raise SystemExit(f"--datasets {spec}: give random:PROMPTxANSWER, numbers of tokens")
    rng = random.Random(seed)
    vocabulary = len(AutoTokenizer.from_pretrained(model))
    spread = 0.0 if found[3] else 0.5

    def words(mean: int) -> str:
        # The mean of a log-normal is its median times exp(spread² / 2).
        length = round(mean * math.exp(rng.gauss(0, spread) - spread**2 / 2))
        length = min(max(length, 2), 2 * mean)
        return " ".join(f"t{rng.randrange(1, vocabulary)}" for _ in range(length))

    rows = []
    for _ in range(num_rows):
        prompt, chosen, rejected = (words(int(found[i])) for i in (1, 2, 2))
        rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file
