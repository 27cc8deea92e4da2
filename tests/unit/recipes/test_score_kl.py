"""The KL divergence that `preftune score` estimates from samples."""

import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.config.score import ScoreConfig
from preftune.evaluation.samples import sampled_answers
from preftune.recipes.score import score
from tests.examples import make_examples
from tests.runs import tiny_settings
from tests.tiny import tiny_model, tiny_tokenizer


def settings(root, **options) -> dict[str, object]:
    made = tiny_settings(root)
    kept = ("model_name_or_path", "dataset_name", "cache_dir", "mixed_precision", "progress")
    return {name: made[name] for name in kept} | options


def test_a_model_is_not_far_from_itself(tmp_path):
    options = settings(tmp_path, kl_samples=6, kl_max_new_tokens=5)
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    result = score(ScoreConfig(**options, reference_model_name_or_path=[str(tmp_path / "copy")]))
    assert result.summary.against_reference.kl == pytest.approx(0.0, abs=1e-4)
    assert "KL, nats an answer\n" in str(result)


def test_the_estimate_is_the_divergence(tmp_path):
    """Embedding 0 but for one token's: a model that draws it more or less often than others.

    The reference is flat over V tokens. In the model, one token has logit b, whatever stands
    before it: a token's divergence is log V − log(V − 1 + e^b) + p·b with p = e^b/(V − 1 + e^b).
    """
    options = settings(tmp_path)
    source = options["model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    size, width = model.get_output_embeddings().weight.shape
    tilt = 4.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # The norm's scale is the model's output where all else is 0 but one entry of the input.
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.model.norm.weight[0] = 1.0
        hidden = math.sqrt(width)  # an RMS norm of (1, 0, …)
        if model.config.tie_word_embeddings:
            model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(size, width))
            model.config.tie_word_embeddings = False
        model.get_output_embeddings().weight.zero_()
        model.save_pretrained(tmp_path / "flat")
        model.get_output_embeddings().weight[11, 0] = tilt / hidden
        model.save_pretrained(tmp_path / "tilted")
    for name in ("flat", "tilted"):
        tokenizer.save_pretrained(tmp_path / name)
    options |= {
        "model_name_or_path": str(tmp_path / "tilted"),
        "reference_model_name_or_path": str(tmp_path / "flat"),
        "kl_samples": 400,
        "kl_max_new_tokens": 1,
    }
    summary = score(ScoreConfig(**options)).summary.against_reference
    likely = math.exp(tilt) / (size - 1 + math.exp(tilt))
    expected = math.log(size) - math.log(size - 1 + math.exp(tilt)) + likely * tilt
    assert expected > 0.05
    assert summary.kl is not None
    assert summary.kl_error is not None
    assert abs(summary.kl - expected) < 4 * summary.kl_error
    assert summary.kl_error < expected


def test_samples_follow_the_prompts_in_turn():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    prompts = make_examples(3, seed=0)
    samples = sampled_answers(model, tokenizer, prompts, 7, 4)
    order = [0, 0, 0, 1, 1, 2, 2]
    assert [sample.row_id for sample in samples] == [prompts[i].row_id for i in order]
    assert [sample.prompt_ids for sample in samples] == [prompts[i].prompt_ids for i in order]
    assert all(1 <= len(sample.completions[0].ids) <= 4 for sample in samples)
