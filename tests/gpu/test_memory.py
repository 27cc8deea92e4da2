"""Paged optimizer state and activations in the host's memory: the same steps, on a GPU."""

import pytest
import torch

from preftune import train
from preftune.batching.layout import build_layout
from preftune.config.optimizers import ROUNDS
from preftune.config.training import TrainingConfig
from preftune.model import forward
from preftune.model.activations import HostActivations, recompute
from preftune.model.forward import PolicyModel, pair_logps
from preftune.training.optimizer import make_optimizer
from preftune.training.optimizers.rounding import StochasticRounding
from tests.examples import make_examples
from tests.runs import pretend_unfinished, read_metrics, tiny_config
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_a_paged_run_is_that_of_the_plain_one_and_goes_on(tmp_path):
    """Weights large enough to be paged (1e5 numbers and more)."""
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    runs = {}
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        options = {"optimizer": name, "output_dir": tmp_path / name, "learning_rate": 1e-4}
        options |= {"checkpointing_steps": 2, "keep_last_n_checkpoints": None}
        train(tiny_config(tmp_path, **options))
        runs[name] = read_metrics(tmp_path / name)
    for one, other in zip(*runs.values(), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    pretend_unfinished(tmp_path / name, 2)
    train(tiny_config(tmp_path, **options))
    assert read_metrics(tmp_path / name) == runs[name]


@pytest.mark.parametrize("name", ROUNDS)
def test_rounding_draws_the_same_numbers_as_on_a_cpu(name):
    numbers = torch.linspace(0.01, 0.02, 4096)
    step = torch.tensor(3.0)
    drawn = [
        StochasticRounding(7)(numbers.to(d), first=5, number=2, step=step.to(d)).cpu()
        for d in ("cpu", "cuda")
    ]
    assert torch.equal(*drawn)
    weight = torch.nn.Linear(256, 64).to("cuda", torch.bfloat16)
    optimizer = make_optimizer(weight, TrainingConfig(optimizer=name, stochastic_rounding=True))
    for parameter in weight.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(p.isfinite().all() for p in weight.parameters())


def test_offload_gives_the_same_gradients_for_less_memory(monkeypatch):
    """Inputs of eight layers move; the host waits for none of them."""
    monkeypatch.setattr(forward, "HostActivations", lambda: HostActivations(smallest=1))
    found = []
    for offload in (False, True):
        model = tiny_model(num_hidden_layers=8, hidden_size=256).to("cuda").train()
        recompute(model, True)
        policy = PolicyModel(model)
        policy.activation_offload = offload
        layout = build_layout(make_examples(64, seed=1), "concatenated").to(torch.device("cuda"))
        before = torch.cuda.memory_allocated()
        result = pair_logps(policy, layout)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        result.sums.sum().backward()
        found.append((held, [p.grad for p in model.parameters()]))
    (held, grads), (less, others) = found
    assert less < held
    for one, other in zip(grads, others, strict=True):
        assert torch.equal(one, other)
