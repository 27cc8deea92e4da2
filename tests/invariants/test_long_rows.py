"""Whole runs whose rows cross the length at which a model's RoPE changes."""

from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from preftune import train
from preftune.batching import batcher
from preftune.batching.layout import LengthLimits
from preftune.cli.main import main
from preftune.recipes import score
from preftune.reference import build
from tests.runs import arguments, tiny_config, tiny_settings
from tests.tiny import tiny_model, tiny_tokenizer

LIMIT = 60
DYNAMIC = {"rope_type": "dynamic", "factor": 16.0, "rope_theta": 10000.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": LIMIT,
    "rope_theta": 10000.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT},
    "longrope": {"rope_parameters": LONG_ROPE, "max_position_embeddings": 16 * LIMIT},
}


def save_model(folder: Any, kind: str) -> None:
    # Weights large enough that positions matter.
    tiny_model(initializer_range=0.2, **MODELS[kind]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("layout", ["auto", "concatenated"])
@pytest.mark.parametrize("kind", MODELS)
def test_score_gives_every_answer_what_it_has_alone(
    kind: str, layout: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", kind)
    data = tiny_settings(tmp_path)["dataset_name"]
    rows: list[Any] = []
    kept = score.score_examples

    def watched(model: Any, examples: Any, *rest: Any, **bounds: Any) -> Any:
        rows.extend(examples)
        return kept(model, examples, *rest, **bounds)

    monkeypatch.setattr(score, "score_examples", watched)
    words = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": data,
        "forward_layout": layout,
        "mixed_precision": "fp32",
        "output": tmp_path / "scores.parquet",
        "progress": "none",
    }
    assert main(["score", *arguments(words)]) == 0
    table = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    lengths = [length for row in rows for length in row.lengths]
    assert min(lengths) < LIMIT < max(lengths)
    for side, column in enumerate(["logps_chosen", "logps_rejected"]):
        for row, value in zip(rows, table[column], strict=True):
            answer = row.completions[side].ids
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
            with torch.no_grad():
                logits = model(torch.tensor([[*row.prompt_ids, *answer]])).logits
            logits = logits[0, len(row.prompt_ids) - 1 : -1].double()
            alone = -cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            assert value == pytest.approx(alone, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_training_and_its_reference_keep_lengths_apart(
    kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", kind)
    limits = {"dynamic": LengthLimits(start=LIMIT), "longrope": LengthLimits(switches=(LIMIT,))}
    blocks: dict[Any, list[int]] = {batcher: [], build: []}
    for module, counts in blocks.items():

        def watched(
            examples: Any, layout: Any, kept: Any = module.build_layout, counts: Any = counts
        ) -> Any:
            assert layout.limits == limits[kind]
            made = kept(examples, layout)
            counts.append(len(made.blocks))
            return made

        monkeypatch.setattr(module, "build_layout", watched)
    train(tiny_config(tmp_path, test_size=5))
    assert all(max(counts) > 1 for counts in blocks.values())
