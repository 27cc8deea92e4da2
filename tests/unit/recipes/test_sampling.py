"""How far a policy has moved from its start, against all continuations of a small one."""

import numpy as np
import pytest
import torch

from preftune.batching.layout import LayoutName
from preftune.config.experiment import ExperimentConfig
from preftune.config.model import ModelConfig
from preftune.distributed.runtime import Runtime
from preftune.evaluation import generation
from preftune.model.attention import SEGMENTS
from preftune.model.layout_choice import LayoutChoice, use_layout
from preftune.model.load import LoadedModel, load_model
from preftune.recipes.sampling import PolicyAnswers, Prompts
from preftune.tracking.progress import ProgressDisplay
from tests.examples import make_examples
from tests.runs import tiny_model_folder
from tests.tiny import tiny_tokenizer

NEW, MANY, FEW = 2, 1200, 6


def a_start(folder, number: int = FEW) -> tuple[PolicyAnswers, LoadedModel, list]:
    """The answers of a start, whose first token is often the stop token, packed as in training."""
    loaded = load_model(
        ModelConfig(model_name_or_path=str(tiny_model_folder(folder))), torch.device("cpu")
    )
    model = loaded.policy.model
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12.0)
    use_layout(loaded.policy, LayoutChoice("shared_prefix", "", "sdpa"))
    layout: LayoutName = "shared_prefix"
    examples = make_examples(3, seed=0)
    config = ExperimentConfig(
        model_name_or_path="m",
        dataset_name="d",
        test_size=2,
        eval_kl_samples=number,
        sample_max_new_tokens=NEW,
        per_device_train_batch_size=200,
    )
    answers = PolicyAnswers(
        config,
        Prompts([], {"": examples}),
        loaded,
        layout,
        tiny_tokenizer(),
        int(stop_id(loaded, examples)),
        Runtime("fp32", seed=0),
        ProgressDisplay("none"),
    )
    answers.begin("weights", [])
    return answers, loaded, examples


def next_logps(loaded: LoadedModel, rows: list[list[int]]) -> torch.Tensor:
    """(rows, vocabulary) By the plain model of transformers, fp64."""
    model = loaded.policy.model
    packed = str(model.config._attn_implementation)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(rows)).logits[:, -1].double()
    model.set_attn_implementation(packed)
    return logits.log_softmax(-1)


def stop_id(loaded: LoadedModel, examples: list) -> torch.Tensor:
    """The likeliest first token, so that some answers are shorter than others."""
    return next_logps(loaded, [list(examples[0].prompt_ids)])[0].argmax()


def two_steps(loaded: LoadedModel, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the first token, and of the second behind each first one."""
    first = next_logps(loaded, [prompt])[0]
    second = next_logps(loaded, [[*prompt, token] for token in range(len(first))])
    return first, second


def test_the_estimate_is_the_divergence_over_all_continuations(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "BATCH", 400)
    answers, loaded, examples = a_start(tmp_path / "model", MANY)
    model = loaded.policy.model
    assert model.config._attn_implementation == SEGMENTS
    assert answers.kl("other") == {}
    assert answers.kl("") == {"kl/forward": 0.0, "kl/forward_error": 0.0}
    stops = {int(stop_id(loaded, examples)), tiny_tokenizer().eos_token_id}
    prompts = [list(example.prompt_ids) for example in examples]
    before = [two_steps(loaded, prompt) for prompt in prompts]
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=noise)
    expected = []
    for prompt, (first, second) in zip(prompts, before, strict=True):
        first_now, second_now = two_steps(loaded, prompt)
        later = (second.exp() * (second - second_now)).sum(-1)
        later[list(stops)] = 0.0  # nothing comes behind a stop token
        expected.append((first.exp() * (first - first_now + later)).sum().item())
    found = answers.kl("")
    lengths = [len(row.completions[0].ids) for row in answers._drawn[""].rows]
    assert {1, 2} == set(lengths)
    divergence = float(np.mean(expected))
    assert divergence > 20 * found["kl/forward_error"] / 4
    assert abs(found["kl/forward"] - divergence) < 4 * found["kl/forward_error"]
    assert model.config._attn_implementation == SEGMENTS


def test_nothing_is_drawn_from_the_generators_of_training(tmp_path):
    answers, loaded, _ = a_start(tmp_path / "model")
    before = torch.get_rng_state()
    loaded.policy.train()
    answers._answer_at_start()
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.policy.training
    assert loaded.policy.model.training


@pytest.mark.parametrize("changed", ["weights", "seed"])
def test_kept_answers_are_those_of_the_same_start(tmp_path, changed, monkeypatch):
    answers, _, _ = a_start(tmp_path / "model")
    answers.write(tmp_path / "kept.json")
    monkeypatch.setattr(answers, "_answer_at_start", lambda: {"greedy": ["anew"], "drawn": {}})
    answers.begin("weights", [tmp_path / "absent.json", tmp_path / "kept.json"])
    assert answers._greedy == []
    if changed == "seed":
        answers._config.seed += 1
    answers.begin("others" if changed == "weights" else "weights", [tmp_path / "kept.json"])
    assert answers._greedy == ["anew"]
