"""`load_balancing_weight` in whole runs of a tiny mixture of experts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from preftune import train
from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout, build_layout
from preftune.batching.micro_batches import MicroBatching
from preftune.losses import DPO
from preftune.model.forward import PolicyModel, pair_logps
from preftune.objective import PairObjective
from preftune.recipes.pairs import load_experiment_pairs, prepare_tokenizer
from preftune.reference.build import reference_logps
from preftune.reference.store import ReferenceStore
from preftune.tracking.progress import ProgressDisplay
from tests.examples import make_examples
from tests.runs import read_metrics, tiny_config
from tests.syncs import syncs_of_a_run
from tests.tiny import tiny_mixture, tiny_tokenizer

CPU = torch.device("cpu")
NAME = "load_balancing_loss"


@pytest.fixture
def root(tmp_path) -> Path:
    tiny_mixture().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def run(root: Path, name: str, **settings) -> list[dict[str, float]]:
    train(tiny_config(root, output_dir=root / name, **settings))
    return read_metrics(root / name)


def _slow(settings):
    return pytest.param(settings, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        _slow({"forward_layout": "concatenated", "gradient_checkpointing": True}),
        _slow({"loss_type": "aot"}),
        _slow({"loss_type": "kto"}),
        _slow({"loss_type": "simpo", "mixed_precision": "bf16"}),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "dpo",
)
def test_it_makes_routing_even(root, settings):
    """2 is even: two experts a token. Evaluation does not compute it."""
    options = {"test_size": 5, "num_epochs": 6.0, "learning_rate": 3e-3} | settings
    without = run(root, "without", **options)
    light = run(root, "light", load_balancing_weight=1e-9, **options)
    heavy = run(root, "heavy", load_balancing_weight=1.0, **options)
    assert all(NAME not in line for line in without)
    assert not any("balancing" in key for line in heavy for key in line if key != NAME)
    assert heavy[0][NAME] == light[0][NAME] > 2.05
    assert heavy[-1][NAME] - 2 < 0.5 * (light[-1][NAME] - 2)
    # Beside `loss`, which it leaves as it is.
    assert heavy[0]["loss"] == without[0]["loss"]
    assert heavy[0]["grad_norm"] != pytest.approx(without[0]["grad_norm"], rel=1e-4)
    assert light[0]["grad_norm"] == pytest.approx(without[0]["grad_norm"], rel=1e-5)


def test_without_the_weight_the_models_own_setting_changes_nothing(root):
    plain = run(root, "plain")
    config = root / "model" / "config.json"
    own = {"output_router_logits": True, "router_aux_loss_coef": 100.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    assert run(root, "own") == plain
    saved = json.loads((root / "own" / "final" / "config.json").read_text())
    assert saved.items() >= own.items()


def objective_parts(weight: float, tmp_path: Path):
    examples = make_examples(5, seed=2)
    policy = PolicyModel(tiny_mixture())
    layout = Layout("concatenated")
    store = ReferenceStore(tmp_path, "ns", {})
    sums = reference_logps(policy, examples, store, layout=layout, device=CPU).sums
    batcher = RowBatcher(examples, sums, layout, CPU)
    return PairObjective(DPO(beta=0.1), load_balancing_weight=weight), policy, batcher


def test_a_step_is_the_mean_of_its_micro_batches_by_rows(root):
    """Five pairs go as four and one: 4/5 of the loss of the first and 1/5 of the second's."""
    config = tiny_config(
        root,
        load_balancing_weight=0.1,
        forward_layout="concatenated",
        max_train_samples=5,
        num_epochs=1.0,
        shuffle=False,
    )
    train(config)
    (line,) = read_metrics(root / "run")
    pairs = load_experiment_pairs(config, prepare_tokenizer(config), ProgressDisplay("none"))
    examples = pairs.train.examples
    shares = MicroBatching(examples.sizes, "concatenated", 4).split(range(5))
    assert [len(share) for share in shares] == [4, 1]
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    four, one = (loss_by_transformers(model, [examples[row] for row in share]) for share in shares)
    assert abs(four - one) > 1e-3
    assert line[NAME] == pytest.approx(0.8 * four + 0.2 * one, rel=1e-5)


@torch.no_grad()
def loss_by_transformers(model, examples) -> float:
    """On unpadded forwards of one sequence at a time."""
    forwards = [
        model(
            input_ids=torch.tensor([[*example.prompt_ids, *completion.ids]]),
            output_router_logits=True,
        ).router_logits
        for example in examples
        for completion in example.completions
    ]
    layers = tuple(torch.cat(layer) for layer in zip(*forwards, strict=True))
    return float(load_balancing_loss_func(layers, num_experts=4, top_k=2))


def test_what_is_differentiated_counts_it_once_a_row(tmp_path):
    """The sum over three rows grows by 3 × weight × the loss of their forward."""
    plain, policy, batcher = objective_parts(0.0, tmp_path)
    weighted = PairObjective(DPO(beta=0.1), load_balancing_weight=0.25)
    rows = [0, 2, 4]
    before, after = (objective(policy, batcher(rows)) for objective in (plain, weighted))
    routing = pair_logps(policy, batcher(rows).layout, with_routing=True).routing
    assert routing is not None
    added = (after.loss_sum - before.loss_sum).item()
    assert added == pytest.approx(3 * 0.25 * routing.loss.item(), rel=1e-9)
    assert torch.equal(after.metrics["loss"].values, before.metrics["loss"].values)
    assert after.metrics[NAME].values.tolist() == [routing.loss.item()] * 3


def test_a_dummy_counts_nothing(tmp_path):
    objective, policy, batcher = objective_parts(0.25, tmp_path)
    output = objective(policy, batcher([]))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    assert output.metrics[NAME].count == 0
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_it_depends_on_which_pairs_share_a_forward():
    """Why it is exempt from the invariance: it is not linear in the batch."""
    examples = make_examples(4, seed=2)
    policy = PolicyModel(tiny_mixture())

    def loss(rows) -> float:
        layout = build_layout([examples[row] for row in rows], "concatenated")
        routing = pair_logps(policy, layout, with_routing=True).routing
        assert routing is not None
        return routing.loss.item()

    assert abs(loss(range(4)) - (loss([0, 1]) + loss([2, 3])) / 2) > 1e-3


def test_it_makes_no_step_wait(root):
    """The experts of transformers wait by themselves on CPUs: the same with and without it."""
    options = {"num_epochs": None, "max_train_steps": 4, "logging_steps": 100, "warmup_ratio": 0.0}
    train(tiny_config(root, output_dir=root / "first", **options))  # fills the store
    without = syncs_of_a_run(root, "without", **options)
    assert syncs_of_a_run(root, "with", load_balancing_weight=0.1, **options) == without
