"""`pair_logps` against plain transformers on one unpadded row at a time."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn import functional as F

from preftune.batching.layout import build_layout
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.probe import head_is_plain
from preftune.schema import Completion, TokenizedExample
from tests.examples import make_examples
from tests.memory import Memory
from tests.tiny import tiny_model

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", SMALL),
    "llama-tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SMALL),
    "mistral-window": ("MistralConfig", SMALL | {"sliding_window": 16}),
    "gemma2-softcap": ("Gemma2Config", SMALL | {"final_logit_softcapping": 5.0}),
    "cohere-scale": ("CohereConfig", SMALL | {"logit_scale": 0.25}),
    "granite-scale": ("GraniteConfig", SMALL | {"logits_scaling": 3.0}),
    "gpt2": ("GPT2Config", {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox": ("GPTNeoXConfig", SMALL | {"rotary_pct": 0.5}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 256,
        },
    ),
}


def make_model(name: str, **overrides):
    config_name, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**(settings | overrides))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def plain_logps(model, prompt, completion) -> torch.Tensor:
    """Per-token log-probs by transformers' own logits and torch's own cross-entropy."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return -F.cross_entropy(logits, torch.tensor(completion), reduction="none")


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["concatenated", "separate"])
def test_log_probs_equal_plain_transformers(name, layout):
    model = make_model(name)
    policy = PolicyModel(model, compact_head=head_is_plain(model))
    examples = make_examples(4)
    result = pair_logps(policy, build_layout(examples, layout))
    answers = [(e.prompt_ids, c.ids) for e in examples for c in e.completions]
    for index, (prompt, completion) in enumerate(answers):
        expected = plain_logps(model, prompt, completion)
        assert torch.allclose(result.per_token[index].double(), expected, atol=2e-5)
        assert result.sums[index].item() == pytest.approx(expected.sum().item(), abs=1e-4)
        assert result.lengths[index] == len(completion)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_is_proved_for_known_architectures(name):
    assert head_is_plain(make_model(name))


@torch.no_grad()
def test_a_head_that_does_something_unknown_runs_the_whole_model():
    model = make_model("cohere-scale")
    # An architecture with a transform that its config does not tell.
    model.config.logit_scale = None
    assert not head_is_plain(model)
    policy = PolicyModel(model, compact_head=False)
    (example,) = make_examples(1)
    result = pair_logps(policy, build_layout([example], "concatenated"))
    expected = plain_logps(model, example.prompt_ids, example.completions[0].ids)
    assert torch.allclose(result.per_token[0].double(), expected, atol=2e-5)


def test_layouts_agree_in_values_and_gradients():
    examples = make_examples(5)
    gradients = []
    sums = []
    for layout in ("concatenated", "separate"):
        model = tiny_model()
        result = pair_logps(PolicyModel(model), build_layout(examples, layout))
        (result.sums * torch.arange(1.0, 11.0)).sum().backward()
        sums.append(result.sums.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(sums[0], sums[1], atol=1e-4, rtol=1e-6)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_separate_keeps_the_activations_of_one_side():
    """The mutant is the same layout with both sides' activations kept."""

    def peak(layout):
        policy = PolicyModel(tiny_model())
        with Memory() as memory:
            pair_logps(policy, layout).sums.sum().backward()
        return memory.peak

    examples = make_examples(8, prompt=(60, 60), completion=(40, 40))
    separate = build_layout(examples, "separate")
    both = peak(build_layout(examples, "concatenated"))
    assert peak(separate) < 0.6 * both
    assert peak(replace(separate, one_at_a_time=False)) > 0.8 * both


def test_separate_makes_the_same_dropout_again():
    examples = make_examples(3)
    gradients = []
    for one_at_a_time in (True, False):
        model = tiny_model(attention_dropout=0.5).train()
        layout = replace(build_layout(examples, "separate"), one_at_a_time=one_at_a_time)
        torch.manual_seed(0)
        pair_logps(PolicyModel(model), layout).sums.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_values_do_not_depend_on_companions():
    """Padding, order and neighbours change nothing but the last bits."""
    examples = make_examples(6)
    policy = PolicyModel(tiny_model())
    with torch.no_grad():
        together = pair_logps(policy, build_layout(examples, "concatenated")).sums
        alone = torch.cat(
            [pair_logps(policy, build_layout([e], "concatenated")).sums for e in examples]
        )
    assert torch.allclose(together, alone, atol=1e-4, rtol=1e-6)


@torch.no_grad()
def test_changing_the_chosen_answer_leaves_the_rejected_ones_bits_alone():
    (example,) = make_examples(1, prompt=(8, 8), completion=(20, 20))
    other_ids = tuple((i + 1) % 300 for i in example.completions[0].ids)
    other = TokenizedExample(
        "x",
        example.prompt_ids,
        (Completion(other_ids), example.completions[1]),
        example.roles,
        "s",
        0,
    )
    policy = PolicyModel(tiny_model())
    before = pair_logps(policy, build_layout([example], "concatenated"))
    after = pair_logps(policy, build_layout([other], "concatenated"))
    assert before.sums[0] != after.sums[0]
    assert torch.equal(before.per_token[1], after.per_token[1])


def test_gradient_reaches_every_parameter_and_only_from_completions():
    (example,) = make_examples(1)
    model = tiny_model()
    pair_logps(PolicyModel(model), build_layout([example], "concatenated")).sums.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_alignment_is_the_mean_of_its_definition():
    (example,) = make_examples(1)
    model = tiny_model()
    layout = build_layout([example], "separate")
    result = pair_logps(PolicyModel(model), layout, with_alignment=True)
    for index, completion in enumerate(example.completions):
        ids = torch.tensor([[*example.prompt_ids, *completion.ids]])
        logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1].double()
        p = logits.softmax(-1)
        own = p[torch.arange(len(completion.ids)), torch.tensor(completion.ids)]
        expected = (own.log() - (p**2).sum(-1).log()).mean()
        assert result.alignment[index].item() == pytest.approx(expected.item(), abs=1e-5)


def test_float64_stays_float64():
    model = tiny_model().double()
    (example,) = make_examples(1)
    result = pair_logps(PolicyModel(model), build_layout([example], "concatenated"))
    assert result.per_token[0].dtype == torch.float64
